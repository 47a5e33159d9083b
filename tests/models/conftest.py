"""Tiny decoders of every supported host, with memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from strata.layers import MemoryLayerConfig
from strata.models import ModelConfig, build

VOCAB = 97

HOST_FIELDS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "initializer_range": 0.3,  # large: greedy decoding does not stay on one token
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HOST_EXTRAS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    # Gemma ties its embeddings unless told not to, and a tied random model repeats its input.
    "gemma2": {"sliding_window": 6, "tie_word_embeddings": False},  # in turns: sliding, full
    "gemma3_text": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
}
MEMORY: dict[str, Any] = {
    "layers": (1, 2),
    "num_heads": 2,
    "top_k": 4,
    "num_half_keys": 16,
    "key_dim": 8,
}


@pytest.fixture(scope="session")
def tiny_model_config() -> Callable[..., ModelConfig]:
    """Makes the ModelConfig of a tiny host: `tiny_model_config("llama", hidden_size=64)`."""

    def make(model_type: str = "llama", **fields: Any) -> ModelConfig:
        host = {"model_type": model_type} | HOST_FIELDS | HOST_EXTRAS.get(model_type, {}) | fields
        if model_type in ("qwen2", "olmo2"):
            host.pop("head_dim")  # no field of theirs
        return ModelConfig(host=host)

    return make


@pytest.fixture(scope="session")
def build_tiny(tiny_model_config: Callable[..., ModelConfig]) -> Callable[..., PreTrainedModel]:
    """Builds a tiny model: `build_tiny("llama", memory={...} or None, dtype=..., **fields)`."""

    def make(
        model_type: str = "llama",
        *,
        memory: dict[str, Any] | None = MEMORY,
        dtype: str = "float32",
        **fields: Any,
    ) -> PreTrainedModel:
        config = tiny_model_config(model_type, **fields).model_copy(update={"dtype": dtype})
        layers = None if memory is None else MemoryLayerConfig(**(MEMORY | memory))
        return build(config, layers)

    return make
