"""Documents that are encoded together, in another process than the one that commits them.

The process that holds the writer's lock makes partitions and commits what comes back; any other
process may write one, as often as it likes: files that no commit names belong to no version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from strata.errors import BankError, StrataError
from strata.explicit.bank import seals
from strata.explicit.bank.files import files_at
from strata.explicit.bank.given import Cut, EmbedderLike, EncoderLike
from strata.explicit.bank.intake import Change, Means
from strata.explicit.bank.settings import (
    BankSettings,
    open_codec,
    read_settings,
    refuse_other_embedder,
)
from strata.explicit.bank.store import Store
from strata.explicit.documents import Document
from strata.explicit.fingerprint import Fingerprint, refuse_other
from strata.explicit.memories import Reference

_FILE_BYTES = 512 * 2**20  # of rows held in a worker's memory before they go to a file

PARTITIONS = pa.schema([("number", pa.int64()), ("documents", pa.string())])
WRITTEN = pa.schema([("number", pa.int64()), ("error", pa.bool_()), ("content", pa.string())])


@dataclass(frozen=True)
class WorkerMeans:
    """What a worker cuts, encodes and embeds with.

    Attributes:
        cut: a document to its references.
        encoder: None for cold rows.
        embedder: None where the bank holds no vectors.
        fingerprint: of the encoder's model.
    """

    cut: Cut
    encoder: EncoderLike | None
    embedder: EmbedderLike | None
    fingerprint: Fingerprint | None


OpenMeans = Callable[[BankSettings], WorkerMeans]


@dataclass(frozen=True)
class Written:
    """What became of a partition.

    Attributes:
        references: of each of its documents.
        fragments: of the dataset, not yet committed.
        sealed: path below the dataset -> file, of those fragments.
    """

    references: tuple[int, ...]
    fragments: tuple[Any, ...]
    sealed: Mapping[str, seals.SealedFile]


def packed(changes: Sequence[Change]) -> str:
    """Documents as text that another process reads."""
    rows = [(c.document.text, c.document.source, c.metadata, c.text_id) for c in changes]
    return json.dumps(rows, ensure_ascii=False)


def unpacked(content: str) -> Written:
    """What a worker answered.

    Raises:
        BankError: the files are not where they were written.
    """
    from lance.fragment import FragmentMetadata

    tree = json.loads(content)
    return Written(
        tuple(tree["references"]),
        tuple(FragmentMetadata.from_json(json.dumps(fragment)) for fragment in tree["fragments"]),
        {name: seals.SealedFile(*entry) for name, entry in tree["sealed"].items()},
    )


class PartitionWriter:
    """What a worker does; opened at its first partition.

    Args:
        place: of the bank: its folder, or its URL.
        open_means: called once, with the bank's settings.
        batch_size: references embedded and encoded at a time.
    """

    def __init__(self, place: str | Path, open_means: OpenMeans, batch_size: int) -> None:
        self._place, self._open_means, self._batch_size = place, open_means, batch_size
        self._opened: tuple[Store, Means] | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write each partition of a table of PARTITIONS; a table of WRITTEN."""
        rows = []
        for row in batch.to_pylist():
            try:
                answer, failed = self._write(json.loads(row["documents"])), False
            except StrataError as error:  # one line for the user, not a traceback of the worker's
                answer, failed = str(error), True
            rows.append({"number": row["number"], "error": failed, "content": answer})
        return pa.Table.from_pylist(rows, WRITTEN)

    def _write(self, documents: Sequence[tuple[str, str, str, str]]) -> str:
        if self._opened is None:
            self._opened = self._open()
        store, means = self._opened
        counts: list[int] = []
        tables: list[pa.Table] = []
        waiting: list[tuple[Reference, str]] = []
        fragments: list[Any] = []

        def encode() -> None:
            if waiting:
                references, text_ids = zip(*waiting, strict=True)
                tables.append(means.rows(references, text_ids, store.columns))
                waiting.clear()

        def write() -> None:
            if tables:
                fragments.extend(store.write(pa.concat_tables(tables)))
                tables.clear()

        for text, source, metadata, text_id in documents:
            references = means.cut(Document(text, source, json.loads(metadata)))
            counts.append(len(references))
            for reference in references:
                waiting.append((reference, text_id))
                if len(waiting) >= self._batch_size:
                    encode()
                    if sum(table.nbytes for table in tables) >= _FILE_BYTES:
                        write()
        encode()
        write()
        names = [f"data/{file.path}" for fragment in fragments for file in fragment.files]
        sealed = seals.hashed(store.files, names)
        return json.dumps(
            {
                "references": counts,
                "fragments": [fragment.to_json() for fragment in fragments],
                "sealed": {name: entry.as_list() for name, entry in sealed.items()},
            }
        )

    def _open(self) -> tuple[Store, Means]:
        files = files_at(self._place)
        settings = read_settings(files)
        given = self._open_means(settings)
        refuse_other_embedder(files, settings.embedder, given.embedder)
        codec = None
        if given.encoder is not None:
            if settings.fingerprint is None or given.fingerprint is None:
                raise BankError(f"bank {files} belongs to no model yet: bind it to one")
            refuse_other(settings.fingerprint, given.fingerprint)
            codec = open_codec(files, settings)
        means = Means(given.cut, codec, given.encoder, given.embedder)
        return Store(files), means
