"""Which modules land where in a decoder: tables, sharing, widths, names, modes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from strata.errors import ConfigError, ModelError
from strata.layers import (
    PEER,
    MemoryLayerConfig,
    ProductKeyMemory,
    ShardedTable,
    ValueTable,
    insert_memory,
    memory_layers,
    value_tables,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))


class Decoder(nn.Module):
    """The least that `insert_memory` asks of a decoder."""

    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8)
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))


def config_of(**options: Any) -> MemoryLayerConfig:
    base = {"layers": (1, 3), "num_heads": 2, "top_k": 2, "num_half_keys": 3, "key_dim": 4}
    return MemoryLayerConfig(**(base | options))


def tables_of(layer: ProductKeyMemory | PEER) -> list[int]:
    tables = layer.tables if isinstance(layer, PEER) else (layer.table,)
    return [id(table) for table in tables]


@pytest.mark.parametrize(
    ("kind", "share", "num_tables"),
    [("product_key", True, 1), ("product_key", False, 2), ("peer", True, 2), ("peer", False, 4)],
)
def test_tables(kind: str, share: bool, num_tables: int) -> None:
    model = Decoder()
    gate = "none" if kind == "peer" else "silu"
    insert_memory(model, config_of(kind=kind, share_values=share, gate=gate))
    assert list(value_tables(model)) == [f"memory_values.{i}" for i in range(num_tables)]
    layers = dict(memory_layers(model))
    assert list(layers) == ["layers.1.mlp", "layers.3.mlp"]
    first, second = (tables_of(layer) for layer in layers.values())
    assert (first == second) == share
    assert sorted({*first, *second}) == sorted(id(t) for t in value_tables(model).values())


class Group:
    """A process of two, that talks to nobody."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2


@pytest.mark.parametrize("kind", ["product_key", "peer"])
def test_a_group_draws_the_columns_of_whole_tables(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Without ever holding one whole."""
    config = config_of(kind=kind, num_half_keys=80, gate="none")  # 6,400 rows: two blocks
    torch.manual_seed(3)
    insert_memory(alone := Decoder(), config)
    with monkeypatch.context() as patch:
        patch.setattr("strata.layers.install.ValueTable", None)
        for rank in (0, 1):
            torch.manual_seed(3)
            insert_memory(shared := Decoder(), config, group=Group(rank))  # type: ignore[arg-type]
            for whole, part in zip(tables(alone), tables(shared), strict=True):
                assert isinstance(part, ShardedTable) and part.weight.shape == (6400, 4)
                assert torch.equal(part.weight, whole.weight[:, 4 * rank : 4 * rank + 4])
            same = [name for name, _ in alone.named_parameters() if "memory_values" not in name]
            for name in same:
                assert torch.equal(alone.get_parameter(name), shared.get_parameter(name)), name


def tables(model: nn.Module) -> list[ValueTable]:
    found = list(value_tables(model).values())
    assert all(isinstance(table, ValueTable) for table in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("share", [True, False])
def test_a_checkpoint_holds_each_table_once(share: bool) -> None:
    model = Decoder()
    insert_memory(model, config_of(share_values=share))
    names = [name for name in model.state_dict() if "values" in name]
    assert names == [f"memory_values.{i}.weight" for i in range(1 if share else 2)]
    pointers = [p.data_ptr() for p in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_replace_and_beside() -> None:
    replaced, beside = Decoder(), Decoder()
    kept = [layer.mlp for layer in beside.layers]
    insert_memory(replaced, config_of())
    insert_memory(beside, config_of(placement="beside"))
    assert isinstance(replaced.layers[1].mlp, ProductKeyMemory)
    assert isinstance(replaced.layers[0].mlp, nn.Sequential)
    assert beside.layers[1].mlp.mlp is kept[1]
    hidden = torch.randn(2, 8)
    pair = beside.layers[3].mlp
    torch.testing.assert_close(pair(hidden), pair.mlp(hidden) + pair.memory(hidden))


def test_device_dtype_and_mode_follow_the_decoder() -> None:
    model = Decoder().to(torch.bfloat16).eval()
    insert_memory(model, config_of(scalar_gate="sigmoid", query_norm="layer", query_bias=True))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    meta = Decoder().to("meta")
    insert_memory(meta, config_of(shuffle_rows=True))
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_freeze_base_trains_the_memory_only() -> None:
    model = Decoder()
    insert_memory(model, config_of(freeze_base=True, placement="beside"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".memory." in name or "memory_values" in name for name in trained)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 4 * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": (1, 4)}, "layer 4, the decoder has 4: 0..3 are allowed"),
        ({"kind": "peer", "gate": "none", "value_dim": 5}, "value_dim 5 does not fit"),
    ],
)
def test_a_refused_configuration_leaves_the_model_as_it_was(
    options: dict[str, Any], says: str
) -> None:
    model = Decoder()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=says) as caught:
        insert_memory(model, config_of(freeze_base=True, **options))
    assert "\n" not in str(caught.value)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_twice() -> None:
    model = Decoder()
    insert_memory(model, config_of())
    with pytest.raises(ModelError, match="has memory layers already"):
        insert_memory(model, config_of(layers=(0,)))


class Headless(nn.Module):
    """Its blocks have no `mlp`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Headless()], ids=["no layers", "no mlp"])
def test_not_a_decoder(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"layers\[i\].mlp") as caught:
        insert_memory(model, config_of(layers=(0,)))
    assert "\n" not in str(caught.value)


class TestWidthsAreCheckedWhenALayerIsMadeByHand:
    def test_product_key(self) -> None:
        from strata.layers import ValueTable

        with pytest.raises(ValueError, match="8 rows, 3 half-keys address 9"):
            ProductKeyMemory(8, config_of(), ValueTable(8, 8))

    def test_peer(self) -> None:
        from strata.layers import ValueTable

        config = config_of(kind="peer", gate="none")
        with pytest.raises(ValueError, match="up table is 9 x 7, 9 x 8 is needed"):
            PEER(8, config, ValueTable(9, 8), ValueTable(9, 7))
