"""What a bank is given: documents, and what cuts, embeds and encodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from strata.explicit.documents import Document, read_documents
from strata.explicit.memories import Memories, Reference


class DocumentLike(Protocol):
    """A text, where it comes from, and what is said about it: flat, JSON values."""

    @property
    def text(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


class EncoderLike(Protocol):
    """Texts of references to their memories."""

    def encode(self, texts: Sequence[str], /) -> Memories: ...


class EmbedderLike(Protocol):
    """Texts to vectors: (n, width) float32."""

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...

    def embed_documents(self, texts: Sequence[str], /) -> np.ndarray: ...


Cut = Callable[[Any], Sequence[Reference]]


def as_documents(given: str | Path | Iterable[Any]) -> Iterable[Any]:
    """A path, a list of paths, or documents: as documents, as often to be gone through as given.

    Raises:
        DataError: a path is missing, or holds nothing to read.
    """
    if isinstance(given, str | Path):
        given = [given]
    if isinstance(given, Sequence) and given and isinstance(given[0], str | Path):
        read_documents(given)  # one that is missing is said before anything is written
        return _Files(given)
    return given


class _Files:
    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = paths

    def __iter__(self) -> Iterator[Document]:
        return read_documents(self._paths)
