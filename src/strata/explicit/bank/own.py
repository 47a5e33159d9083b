"""The model that a bank writes with by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from strata.errors import BankError
from strata.explicit.cut import cut
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
            BankError: its tokenizer is missing.
            HostError: the model cannot have memory, or not as the settings ask.
            ConfigError: its context is too short for a reference.
        """
        if tokenizer is None:
            raise BankError("a model was given without its tokenizer: give both")
        encoder = Encoder(Host(model), tokenizer, config)
        return cls(tokenizer, encoder, fingerprint(model, tokenizer, config, encoder.shape))

    def cut(self, document: Any) -> Sequence[Reference]:
        """A document to its references, by the model's own tokenizer."""
        return cut(document, self.tokenizer, self.encoder.config)
