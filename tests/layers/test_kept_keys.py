"""Normalised half-keys kept between decoded tokens: equal bits, and never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from strata.layers import MemoryLayerConfig, ProductKeys

CONFIG = MemoryLayerConfig(layers=(0,), num_heads=2, top_k=4, num_half_keys=16)


@pytest.fixture
def keys() -> ProductKeys:
    return ProductKeys(12, 8, CONFIG).eval()


def look_up(keys: ProductKeys, hidden: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(keys(hidden))


def fresh(keys: ProductKeys, hidden: Tensor) -> list[Tensor]:
    """With gradients nothing is kept."""
    return [tensor.detach() for tensor in keys(hidden)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_kept_keys_change_no_bit(keys: ProductKeys) -> None:
    hidden = torch.randn(5, 12)
    first = look_up(keys, hidden)
    kept = keys._kept
    assert kept is not None
    assert same(look_up(keys, hidden), first) and keys._kept is kept
    assert same(fresh(keys, hidden), first)
    with torch.inference_mode():
        assert same(list(keys(hidden)), first)


@pytest.mark.parametrize("change", ["write", "norm", "load", "replace", "cast"])
def test_a_changed_parameter_is_seen(keys: ProductKeys, change: str) -> None:
    hidden = torch.randn(5, 12)
    before = look_up(keys, hidden)
    if change == "write":
        with torch.no_grad():
            keys.half_keys.mul_(torch.randn_like(keys.half_keys))
    elif change == "norm":
        with torch.no_grad():
            keys.key_norm.weight.copy_(torch.rand(4))
    elif change == "load":
        keys.load_state_dict(ProductKeys(12, 8, CONFIG).state_dict())
    elif change == "replace":
        keys.half_keys = torch.nn.Parameter(torch.randn_like(keys.half_keys))
    else:
        keys.to(torch.bfloat16)
        hidden = hidden.bfloat16()
    after = look_up(keys, hidden)
    assert not same(after, before)
    assert same(after, fresh(keys, hidden))


def test_an_optimizer_step_is_seen(keys: ProductKeys) -> None:
    hidden = torch.randn(5, 12)
    look_up(keys, hidden)
    optimizer = torch.optim.AdamW(keys.parameters(), lr=0.1, fused=True)
    keys(hidden)[1].square().sum().backward()
    optimizer.step()
    assert same(look_up(keys, hidden), fresh(keys, hidden))


def test_training_and_copies_keep_nothing(keys: ProductKeys) -> None:
    hidden = torch.randn(5, 12)
    look_up(keys, hidden)
    assert copy.deepcopy(keys)._kept is None
    keys.train()
    assert keys._kept is None
    look_up(keys, hidden)
    assert keys._kept is None


def test_parameters_made_in_inference_mode_are_not_kept() -> None:
    hidden = torch.randn(5, 12)
    with torch.inference_mode():
        keys = ProductKeys(12, 8, CONFIG).eval()
        first = list(keys(hidden))
        keys.half_keys.mul_(torch.randn_like(keys.half_keys))
        assert not same(list(keys(hidden)), first)
