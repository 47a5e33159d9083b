"""What is written into a memory: which layers and heads, how many tokens, in what code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from strata.config import FrozenConfig

MARKER = "<s>Reference:"

Positions = Literal["parallel", "sequential"]


class ExplicitMemoryConfig(FrozenConfig):
    """Settings of explicit memory; a bank is written with one of these and keeps it.

    Attributes:
        layers: memory layers, ascending; None for the first half of the decoder's layers (without
            its sliding-window layers).
        heads: KV heads that have memory: the same for all memory layers, or by layer; None for all.
        tokens_per_head: tokens kept of each reference, by each head for itself.
        selector: which tokens are kept; a name from `strata.explicit.select.SELECTORS`.
        codec: how keys and values are stored; a name from `strata.explicit.codec`, or a FAISS
            factory string; "faiss" for the paper's, fitted to the head width.
        reference_tokens: longest reference.
        overlap_tokens: tokens that a reference repeats of the one before it; whole sentences only.
        marker: text before each reference; a leading "<s>" stands for the tokenizer's own
            beginning-of-sequence token, and is left out where it has none.
        positions: where memories stand when they are read: "parallel", all in the one interval of
            `reference_tokens` positions before the text; "sequential", in one interval each, best
            first. Nothing that is stored depends on it; a decoder reads as it was trained to.

    Source: "Memory3" (arXiv 2407.01178), section 3.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | Mapping[int, tuple[int, ...]] | None = None
    tokens_per_head: int = Field(default=8, ge=1, le=4096)
    selector: str = "attention"
    codec: str = "bf16"
    reference_tokens: int = Field(default=128, ge=8, le=4096)
    overlap_tokens: int = Field(default=0, ge=0)
    marker: str = MARKER
    positions: Positions = "parallel"

    @model_validator(mode="after")
    def _check(self) -> ExplicitMemoryConfig:
        if self.overlap_tokens >= self.reference_tokens:
            raise ValueError(
                f"overlap_tokens {self.overlap_tokens} must be below reference_tokens "
                f"{self.reference_tokens}"
            )
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must ascend and not repeat, given {list(self.layers)}")
        return self
