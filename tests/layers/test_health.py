"""Health figures against numbers worked out by hand, and when picks are counted."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from strata.layers import (
    PEER,
    MemoryLayerConfig,
    ProductKeyMemory,
    ValueTable,
    health,
    track_usage,
)
from strata.layers.health import summarise

CONFIG = MemoryLayerConfig(layers=(0,), num_heads=2, top_k=3, num_half_keys=4, key_dim=6)
PICKS_PER_TOKEN = 6


class Two(nn.Module):
    """Two layers on one table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ValueTable(16, 8)
        self.first = ProductKeyMemory(8, CONFIG, self.table, own_values=False)
        self.second = ProductKeyMemory(8, CONFIG, self.table, own_values=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(hidden))


def test_figures() -> None:
    found = summarise(torch.tensor([4, 2, 2, 0], dtype=torch.int32))
    assert found.picks == 8
    assert found.rows_used == 0.75
    assert found.hottest == 0.5
    # shares 1/2, 1/4, 1/4: 1.5 bits of the 2 that four rows could have
    assert found.entropy == pytest.approx(0.75)
    assert found.kl_nats == pytest.approx(0.5 * math.log(2))


def test_extremes() -> None:
    even = summarise(torch.full((5,), 3, dtype=torch.int32))
    assert (even.rows_used, even.hottest) == (1.0, pytest.approx(0.2))
    assert even.entropy == pytest.approx(1.0) and even.kl_nats == pytest.approx(0.0, abs=1e-12)
    lone = summarise(torch.tensor([0, 7, 0, 0], dtype=torch.int32))
    assert (lone.rows_used, lone.hottest, lone.entropy) == (0.25, 1.0, 0.0)
    assert lone.kl_nats == pytest.approx(math.log(4))
    single = summarise(torch.tensor([9], dtype=torch.int32))
    assert (single.rows_used, single.entropy, single.kl_nats) == (1.0, 0.0, 0.0)


def test_counts_are_the_picks() -> None:
    model = Two()
    track_usage(model)
    hidden = torch.randn(5, 8)
    model(hidden)
    rows, _ = model.first.keys(hidden)
    expected = summarise(torch.bincount(rows.flatten(), minlength=16))
    assert health(model, reset=False)["first"] == expected
    model(hidden)
    assert health(model)["first"].picks == 2 * 5 * PICKS_PER_TOKEN
    assert health(model) == {}  # reset
    model(hidden)
    assert health(model)["first"] == expected


def test_each_layer_is_counted_by_itself() -> None:
    model = Two()
    track_usage(model)
    model.first(torch.randn(4, 8))
    assert set(health(model, reset=False)) == {"first"}
    model.second(torch.randn(3, 8))
    assert {name: h.picks for name, h in health(model).items()} == {
        "first": 4 * PICKS_PER_TOKEN,
        "second": 3 * PICKS_PER_TOKEN,
    }


def test_only_where_asked_and_only_in_training() -> None:
    model = Two()
    model(torch.randn(4, 8))
    assert health(model) == {}
    track_usage(model)
    model.eval()(torch.randn(4, 8))
    assert health(model) == {}
    model.train()(torch.randn(4, 8))
    assert set(health(model)) == {"first", "second"}
    track_usage(model, enabled=False)
    model(torch.randn(4, 8))
    assert health(model) == {}
    assert model.first.usage is None


def test_tracking_twice_keeps_the_count() -> None:
    model = Two()
    track_usage(model)
    model(torch.randn(4, 8))
    track_usage(model)
    assert health(model)["first"].picks == 4 * PICKS_PER_TOKEN


def test_a_batch_without_tokens() -> None:
    model = Two()
    track_usage(model)
    model(torch.randn(0, 8))
    assert health(model) == {}


def test_shuffled_rows_are_counted_where_they_lie() -> None:
    config = CONFIG.model_copy(update={"shuffle_rows": True})
    layer = ProductKeyMemory(8, config, ValueTable(16, 8))
    track_usage(layer)
    hidden = torch.randn(50, 8)
    rows, _ = layer.keys(hidden)
    layer(hidden)
    assert layer.usage is not None and layer.usage.counts_r is not None
    assert torch.equal(layer.usage.counts_r.long(), torch.bincount(rows.flatten(), minlength=16))


def test_peer() -> None:
    config = CONFIG.model_copy(update={"kind": "peer", "gate": "none"})
    layer = PEER(8, config, ValueTable(16, 8), ValueTable(16, 8))
    track_usage(layer)
    layer(torch.randn(4, 8))
    assert health(layer)[""].picks == 4 * PICKS_PER_TOKEN


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_once(use_reentrant: bool) -> None:
    """The forward pass runs a second time inside backward; its picks are no new picks."""
    model = Two()
    track_usage(model)
    hidden = torch.randn(4, 8, requires_grad=True)
    out = checkpoint(model, hidden, use_reentrant=use_reentrant)
    out.sum().backward()
    assert {h.picks for h in health(model).values()} == {4 * PICKS_PER_TOKEN}


def test_a_copy_counts_for_itself() -> None:
    model = Two()
    track_usage(model)
    model(torch.randn(4, 8))
    twin = copy.deepcopy(model)
    assert health(twin) == {}
    twin(torch.randn(2, 8))
    assert health(twin)["first"].picks == 2 * PICKS_PER_TOKEN
    assert health(model)["first"].picks == 4 * PICKS_PER_TOKEN


def test_counting_inside_a_compiled_model() -> None:
    """Counting breaks the graph where it happens, and gives the same figures."""
    layer = Two().first
    track_usage(layer)
    hidden = torch.randn(4, 8)
    with torch.no_grad():
        torch.compile(layer, backend="aot_eager")(hidden)
        compiled = health(layer)
        layer(hidden)
    assert compiled == health(layer)
