"""Parameter and FLOP counts: the published sizes, a hand formula, torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from strata.layers import MemoryLayerConfig
from strata.models import Counts, ModelConfig, build, count

SEQUENCE_TOKENS = 4096
SIZES: dict[str, dict[str, Any]] = {
    "373m": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 2816},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632},
}
LAYERS = {"373m": (4, 12, 20), "1.3b": (3, 11, 19)}


def count_published(size: str, num_half_keys: int | None) -> Counts:
    """Counted on the meta device: nothing is allocated, whatever the size."""
    host = SIZES[size] | {
        "model_type": "llama",
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    memory = None
    if num_half_keys is not None:
        memory = MemoryLayerConfig(layers=LAYERS[size], num_half_keys=num_half_keys)
    model = build(ModelConfig(host=host), memory, device="meta")
    assert all(p.device.type == "meta" for p in model.parameters())
    return count(model, sequence_tokens=SEQUENCE_TOKENS)


@pytest.mark.parametrize(
    ("size", "num_half_keys", "published_billions"),
    [
        ("373m", None, 0.373),
        ("373m", 1024, 0.367 + 1.07),
        ("1.3b", 1024, 3.377),
        ("1.3b", 2048, 9.823),
        ("1.3b", 4096, 35.618),
        ("1.3b", 8192, 138.748),
    ],
)
def test_published_totals(size: str, num_half_keys: int | None, published_billions: float) -> None:
    """ "Memory Layers at Scale", table 1; our vocabulary and norms differ by less than 1.5%."""
    counts = count_published(size, num_half_keys)
    assert counts.params_total / 1e9 == pytest.approx(published_billions, rel=0.015)
    assert counts.params_total == counts.params_dense + counts.params_values
    if num_half_keys is not None:
        assert counts.params_values == num_half_keys**2 * SIZES[size]["hidden_size"]


def test_373m_splits_into_367m_dense_and_1_07b_values() -> None:
    counts = count_published("373m", 1024)
    assert counts.params_dense / 1e6 == pytest.approx(367, abs=0.5)
    assert counts.params_values / 1e9 == pytest.approx(1.07, abs=0.005)


@pytest.mark.parametrize(
    ("size", "num_half_keys"), [("373m", 1024), ("1.3b", 1024), ("1.3b", 2048), ("1.3b", 4096)]
)
def test_memory_costs_the_flops_of_the_dense_model(size: str, num_half_keys: int) -> None:
    dense = count_published(size, None).flops_per_token
    assert count_published(size, num_half_keys).flops_per_token == pytest.approx(dense, rel=0.03)


def test_at_64m_rows_the_keys_cost_3_5_percent_more() -> None:
    """8,192 half-keys are scored for each token, head and half: no longer free at 1.3B."""
    dense = count_published("1.3b", None).flops_per_token
    assert count_published("1.3b", 8192).flops_per_token / dense == pytest.approx(1.035, abs=0.001)


D, L, Q, KV, HD, F, VOCAB = 32, 3, 4, 2, 8, 48, 97  # the tiny llama of conftest.py
HEADS, TOP_K, M, KEY = 2, 4, 16, 8  # its memory, in layers 1 and 2
ATTENTION = D * Q * HD + 2 * D * KV * HD + Q * HD * D
FFN = 3 * D * F


def expected(
    memory_params: int, memory_macs: int, read: int, values: int, *, tied: bool, positions: float
) -> Counts:
    """The hand formula: two memory layers in the place of two FFNs."""
    embeddings = VOCAB * D * (1 if tied else 2)
    dense = embeddings + L * (ATTENTION + 2 * D) + D + FFN + 2 * memory_params
    macs = VOCAB * D + L * ATTENTION + FFN + 2 * memory_macs + L * 2 * Q * HD * positions
    return Counts(
        params_total=dense + values,
        params_dense=dense,
        params_values=values,
        params_active=dense + 2 * read,
        flops_per_token=round(2 * macs),
    )


KEYS = D * HEADS * KEY + HEADS * M * KEY  # the query projection and the two codebooks
NORMS = 2 * (KEY // 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("memory", "params", "macs", "read", "values"),
    [
        # Memory+: gate and output projection of D x D
        ({}, KEYS + NORMS + 2 * D * D, KEYS + 2 * D * D + 8 * D, 8 * D, M * M * D),
        (
            {"share_values": False},
            KEYS + NORMS + 2 * D * D,
            KEYS + 2 * D * D + 8 * D,
            8 * D,
            512 * D,
        ),
        ({"gate": "none"}, KEYS + NORMS, KEYS + 8 * D, 8 * D, M * M * D),
        (
            {"gate": "none", "value_dim": 20},
            KEYS + NORMS + 20 * D,
            KEYS + 20 * D + 160,
            160,
            256 * 20,
        ),
        ({"kind": "peer", "gate": "none"}, KEYS + NORMS, KEYS + 16 * D, 16 * D, 2 * 256 * D),
    ],
    ids=["memory+", "own tables", "no gate", "other width", "peer"],
)
def test_hand_formula(
    build_tiny: Callable[..., PreTrainedModel],
    memory: dict[str, Any],
    params: int,
    macs: int,
    read: int,
    values: int,
    tied: bool,
) -> None:
    model = build_tiny(memory=memory, tie_word_embeddings=tied)
    found = count(model, sequence_tokens=21)
    assert found == expected(params, macs, read, values, tied=tied, positions=(21 + 1) / 2)
    assert found.as_dict()["params_total"] == sum(p.numel() for p in model.parameters())


def test_sliding_windows_cost_less(build_tiny: Callable[..., PreTrainedModel]) -> None:
    """Counted one position at a time."""
    window, tokens = 6, 20
    model = build_tiny("gemma3_text", memory=None)
    full = sum(t + 1 for t in range(tokens)) / tokens
    sliding = sum(min(t + 1, window) for t in range(tokens)) / tokens
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    wanted = 2 * (linear + 2 * Q * HD * (2 * sliding + full))
    assert count(model, sequence_tokens=tokens).flops_per_token == pytest.approx(wanted, abs=1)
    short = count(model, sequence_tokens=window).flops_per_token
    assert short == round(2 * (linear + 3 * 2 * Q * HD * (window + 1) / 2))


@pytest.mark.parametrize("memory", [None, {}, {"kind": "peer", "gate": "none"}], ids=str)
def test_torchs_flop_counter(
    build_tiny: Callable[..., PreTrainedModel], memory: dict[str, Any] | None
) -> None:
    """torch counts all T x T attention scores, not half of them, and the rotary angles; our
    operators tell it what they cost.
    """
    batch, tokens = 2, 12
    model = build_tiny(memory=memory).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, VOCAB, (batch, tokens))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    # (2T - 1 + 1) / 2 positions are T
    ours = count(model, sequence_tokens=2 * tokens - 1).flops_per_token * batch * tokens
    angles = 2 * (HD // 2) * tokens
    found = counter.get_total_flops()
    assert found - ours in (0, angles, batch * angles)
