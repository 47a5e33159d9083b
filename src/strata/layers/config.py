"""What a memory layer is made of, checked once when the configuration is built."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from strata.config import FrozenConfig

Norm = Literal["none", "rms", "layer"]
ValueStorage = Literal["float", "int8", "fp8"]


class MemoryLayerConfig(FrozenConfig):
    """Which decoder layers get memory, and what it looks like.

    The defaults are the paper's Memory+: 2**20 rows shared by all layers, four heads, top-32,
    SwiGLU-style gate, normalised queries and keys. Widths left as None follow the decoder.

    Source: "Memory Layers at Scale" (arXiv 2412.09764), section 2; PEER: arXiv 2407.04153.
    """

    layers: tuple[int, ...] = Field(description="decoder layers, counted from 0")
    kind: Literal["product_key", "peer"] = "product_key"
    placement: Literal["replace", "beside"] = Field(
        default="replace", description="take the FFN's place, or add to it (retrofit)"
    )
    num_heads: int = Field(default=4, ge=1)
    top_k: int = Field(default=32, ge=1, description="rows picked per head")
    num_half_keys: int = Field(default=1024, ge=1, description="per codebook; rows = its square")
    key_dim: int | None = Field(
        default=None, ge=2, description="both halves together; None: half of value_dim"
    )
    value_dim: int | None = Field(default=None, ge=1, description="None: the decoder's width")
    share_values: bool = Field(default=True, description="one table for all layers")
    query_bias: bool = False
    query_norm: Norm = "rms"
    key_norm: Norm = "rms"
    gate: Literal["none", "silu"] = Field(
        default="silu", description="Memory+: silu(W_g x) times the bag, then an output projection"
    )
    scalar_gate: Literal["none", "sigmoid", "zero"] = Field(
        default="none",
        description="sigmoid: one learned gate a token; zero: one learned scale, 0 at step 0, "
        "so that a retrofitted model starts as the identity",
    )
    shuffle_rows: bool = Field(
        default=False, description="permute the row order by a fixed bijection drawn from `seed`"
    )
    input_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    value_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    freeze_base: bool = Field(default=False, description="train the memory only")
    seed: int = Field(default=0, ge=0)
    value_storage: ValueStorage = Field(
        default="float",
        description="int8 or fp8 in a saved model that was quantized; only float trains",
    )

    @property
    def num_rows(self) -> int:
        """Rows of a value table: every pair of half-keys owns one."""
        return self.num_half_keys**2

    @model_validator(mode="after")
    def _check(self) -> MemoryLayerConfig:
        if not self.layers:
            raise ValueError("layers is empty: name at least one decoder layer, counted from 0")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {list(self.layers)} names a layer twice")
        if min(self.layers) < 0:
            raise ValueError(f"layers {list(self.layers)} must be counted from 0")
        if self.top_k > self.num_half_keys:
            raise ValueError(
                f"top_k {self.top_k} is more than the {self.num_half_keys} half-keys: lower top_k "
                "or raise num_half_keys"
            )
        if self.key_dim is not None and self.key_dim % 2:
            raise ValueError(f"key_dim {self.key_dim} is odd: it is split into two halves")
        if self.kind == "peer" and self.gate != "none":
            raise ValueError("gate belongs to product_key layers: set gate to none for peer")
        return self
