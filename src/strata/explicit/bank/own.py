"""What a bank takes from its own model and embedder to write by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from strata.explicit.cut import cut
from strata.explicit.documents import Document, read_documents
from strata.explicit.encode import Encoder
from strata.explicit.fingerprint import Fingerprint, fingerprint
from strata.explicit.host import Host
from strata.explicit.memories import Reference
from strata.explicit.settings import ExplicitMemoryConfig


@dataclass(frozen=True)
class Own:
    """A model as a bank writes with it.

    Attributes:
        encoder: references to memories.
        fingerprint: who the model is.
    """

    tokenizer: Any
    encoder: Encoder
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any, config: ExplicitMemoryConfig) -> Own:
        """A live model under a bank's settings.

        Raises:
            HostError: the model cannot have memory, or not as the settings ask.
            ConfigError: its context is too short for a reference.
        """
        encoder = Encoder(Host(model), tokenizer, config)
        return cls(tokenizer, encoder, fingerprint(model, tokenizer, config, encoder.shape))

    def cut(self, document: Any) -> Sequence[Reference]:
        """A document to its references, by the model's own tokenizer."""
        return cut(document, self.tokenizer, self.encoder.config)


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
