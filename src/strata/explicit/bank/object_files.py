"""A bank on an object store: S3 and what speaks like it, Google's and Azure's.

obstore and Lance are the same library underneath and read the same environment: AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID and so on. A store has to answer a conditional put (If-None-Match,
If-Match) as S3 does since 2024; both the lock and Lance's commits stand on it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from strata.errors import BankError
from strata.explicit.bank.lease import Lease
from strata.explicit.extras import require

_THREADS = 16
_RETRIES = {"max_retries": 5, "retry_timeout": timedelta(seconds=30)}
_FEW = 8  # sizes are asked for one by one, not by listing
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

Result = TypeVar("Result")


class ObjectFiles:
    """Objects below a URL; see `Files`.

    Args:
        url: scheme, bucket and prefix.
    """

    def __init__(self, url: str) -> None:
        self._obstore = require("obstore", extra="s3", purpose="a bank on an object store")
        store = require("obstore.store", extra="s3", purpose="a bank on an object store")
        self.place: str | Path = url.rstrip("/")
        endpoint = next((os.environ[name] for name in _ENDPOINTS if name in os.environ), "")
        plain = endpoint.startswith("http://")  # who names such an endpoint means it
        self.storage_options = {"allow_http": "true"} if plain else None
        client = {"client_options": {"allow_http": True}} if plain else {}
        self._store = self._asked(
            lambda: store.from_url(self.place, retry_config=_RETRIES, **client)
        )
        self._lease: Lease | None = None

    def __str__(self) -> str:
        return str(self.place)

    def where(self, name: str) -> str:
        """See `Files`."""
        return f"{self.place}/{name}"

    def prepare(self) -> list[str]:
        """See `Files`."""
        found = self._asked(lambda: self._obstore.list_with_delimiter(self._store))
        names = [entry["path"] for entry in found["objects"]]
        return names + [prefix.rstrip("/") for prefix in found["common_prefixes"]]

    def names(self, below: str) -> list[str]:
        """See `Files`."""
        return sorted(self._listed(below))

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """See `Files`; of many by listing, a thousand objects a request."""
        if len(names) <= _FEW:
            return {name: size for name in names if (size := self._size(name)) is not None}
        found: dict[str, int] = {}
        for top in sorted({name.partition("/")[0] for name in names}):
            found |= self._listed(top)
        return {name: found[name] for name in names if name in found}

    def read(self, name: str) -> bytes:
        """See `Files`."""
        return self._asked(lambda: bytes(self._obstore.get(self._store, name).bytes()))

    def read_range(self, name: str, start: int, count: int) -> bytes:
        """See `Files`."""
        if not count:
            return b""
        return self._asked(
            lambda: bytes(self._obstore.get_range(self._store, name, start=start, length=count))
        )

    def hashes(self, parts: Sequence[tuple[str, int]]) -> list[str]:
        """See `Files`; several at a time, for each is a request."""
        if not parts:
            return []
        with ThreadPoolExecutor(min(_THREADS, len(parts))) as pool:
            return list(pool.map(self._hash, parts))

    def settle(self, names: Iterable[str]) -> None:
        """See `Files`; an object is there once its put has returned."""

    def put(self, name: str, content: bytes) -> None:
        """See `Files`."""
        self._asked(lambda: self._obstore.put(self._store, name, content))

    def delete(self, name: str) -> None:
        """See `Files`."""
        try:
            self._asked(lambda: self._obstore.delete(self._store, name))
        except FileNotFoundError:
            return

    @contextmanager
    def writing(self) -> Iterator[None]:
        """See `Files`."""
        from strata.explicit.bank.settings import LOCK

        if self._lease is not None:
            raise BankError(
                f"bank {self} is being written by another thread: wait until it is done"
            )
        lease = Lease(self._obstore, self._store, LOCK, str(self))
        self._asked(lease.take)
        self._lease = lease
        try:
            yield
        finally:
            self._lease = None
            lease.give_back()

    def check_writing(self) -> None:
        """See `Files`."""
        assert self._lease is not None, "a commit without the lock"
        self._asked(self._lease.renew)

    def _size(self, name: str) -> int | None:
        try:
            return int(self._asked(lambda: self._obstore.head(self._store, name))["size"])
        except FileNotFoundError:
            return None

    def _listed(self, below: str) -> dict[str, int]:
        found = self._asked(lambda: self._obstore.list(self._store, prefix=below).collect())
        return {entry["path"]: entry["size"] for entry in found}

    def _hash(self, part: tuple[str, int]) -> str:
        name, start = part
        digest = hashlib.sha256()
        options = {"range": {"offset": start}} if start else {}

        def read() -> None:
            for step in self._obstore.get(self._store, name, options=options).stream():
                digest.update(step)

        self._asked(read)
        return digest.hexdigest()

    def _asked(self, ask: Callable[[], Result]) -> Result:
        """What the store answers; what it refuses is an OSError of one line."""
        try:
            return ask()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such bucket or object", str(self)) from None
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            if isinstance(error, BankError):
                raise
            line = " ".join(str(error).split())[:300]
            raise OSError(errno.EIO, line, str(self)) from None
