"""A file of a data set on the hub, at one commit: fetched whole, or read where it is."""

from __future__ import annotations

import contextlib
import io
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from strata.data.hub.errors import explain
from strata.data.sources import Source
from strata.errors import StrataError

_BLOCK_BYTES = 8 * 2**20  # of one request while streaming
_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class RemoteSource(Source):
    """One file of a data set.

    Attributes:
        repo: `owner/name`.
        revision: the commit.
        streaming: read ranges of it as they are needed; else it is fetched into the hub's cache.
    """

    repo: str = ""
    revision: str = ""
    streaming: bool = False

    @property
    def key(self) -> object:
        return self.repo, self.revision, self.entry.name

    def fetch(self) -> Path | None:
        """Where it lies in the hub's cache; an interrupted download goes on."""
        if self.streaming:
            return None
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(self.repo, self.entry.name, repo_type="dataset", revision=self.revision)
        )

    def fetch_ahead(self) -> None:
        if not self.streaming:
            threading.Thread(target=self._try_to_fetch, daemon=True).start()

    def _try_to_fetch(self) -> None:
        with contextlib.suppress(Exception):  # whoever reads it fetches it, and says what is wrong
            self.fetch()

    def open(self) -> BinaryIO:
        local = self.fetch()
        if local is not None:
            return open(local, "rb")
        from huggingface_hub import HfFileSystem

        place = f"datasets/{self.repo}@{self.revision}/{self.entry.name}"
        remote = HfFileSystem().open(place, "rb", block_size=_BLOCK_BYTES)
        # Its own readline takes no limit.
        return io.BufferedReader(cast(io.RawIOBase, remote), _BUFFER_BYTES)

    def peek(self) -> Source:
        return replace(self, streaming=True)

    def explain(self, error: Exception) -> StrataError | None:
        if isinstance(error, StrataError):
            return None
        return explain(error, self.repo, kind="dataset", revision=self.revision)
