"""Tiny decoders of every family that explicit memory is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_COMMON: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HOSTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": None},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {
        "query_pre_attn_scalar": 8,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 512,
        "attn_implementation": "eager",  # sdpa knows no softcap
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 8,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 512,
    },
    "olmo2": {"head_dim": None},
}


def _make_host(name: str, **changes: Any) -> PreTrainedModel:
    """A decoder with random weights, the same at every call; norms and biases random too."""
    settings = {**_COMMON, **HOSTS[name], **changes}
    implementation = settings.pop("attn_implementation", "sdpa")
    settings = {
        key: value for key, value in settings.items() if value is not None or key != "head_dim"
    }
    config = AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(params=sorted(HOSTS))
def host_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each family in turn."""
    return _make_host(request.param)


@pytest.fixture(scope="session")
def make_host() -> Callable[..., PreTrainedModel]:
    """Makes one tiny decoder: `make_host("llama", num_hidden_layers=6)`."""
    return _make_host


def _make_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, within the tiny decoders' vocabulary."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = ["\n", *map(chr, range(32, 123))]
    vocab = {token: number for number, token in enumerate([*special, *characters])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>")),
        bos_token="<s>" if bos else None,
        pad_token="<pad>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a tokenizer of one token a character: `make_tokenizer(bos=False)`."""
    return _make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    return _make_tokenizer()
