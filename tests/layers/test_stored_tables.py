"""Quantized tables inside layers: what they answer, how they move, and that they do not train."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from strata.errors import ModelError
from strata.layers import (
    PEER,
    MemoryLayerConfig,
    ProductKeyMemory,
    QuantizedTable,
    RowTable,
    ValueTable,
    replace_tables,
    stored,
    value_tables,
)
from strata.ops.quantized_rows import Codes, quantize_rows
from strata.train.optim import RowOptimizer, parameter_groups

WIDTH = 12
CONFIG = MemoryLayerConfig(layers=(0,), num_heads=2, top_k=4, num_half_keys=8, key_dim=8)
both_kinds = pytest.mark.parametrize("codes", ["int8", "fp8"])


def layer(kind: str) -> ProductKeyMemory | PEER:
    if kind == "peer":
        config = CONFIG.model_copy(update={"kind": "peer", "gate": "none"})
        return PEER(WIDTH, config, ValueTable(64, WIDTH), ValueTable(64, WIDTH))
    return ProductKeyMemory(WIDTH, CONFIG, ValueTable(64, WIDTH))


@both_kinds
@pytest.mark.parametrize("kind", ["product_key", "peer"])
def test_a_layer_reads_the_codes(kind: str, codes: Codes) -> None:
    model = layer(kind).eval()
    hidden = torch.randn(5, WIDTH)
    twin = copy.deepcopy(model)
    replace_tables(model, lambda table: QuantizedTable.of(table, codes))
    tables = value_tables(model)
    assert list(tables) == list(value_tables(twin))
    assert all(isinstance(table, QuantizedTable) for table in tables.values())
    with torch.no_grad():
        for name, table in value_tables(twin).items():
            quantized = tables[name]
            assert isinstance(table, ValueTable) and isinstance(quantized, QuantizedTable)
            table.weight.copy_(quantized(torch.arange(64)))
        assert torch.allclose(model(hidden), twin(hidden), rtol=1e-5, atol=1e-6)


@both_kinds
def test_a_table_is_written_block_by_block(codes: Codes, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ValueTable(37, WIDTH, dtype=torch.bfloat16)
    whole_codes, whole_scales = quantize_rows(table.weight, codes)
    monkeypatch.setattr(stored, "_BLOCK_BYTES", 5 * WIDTH * 4)
    assert [len(block) for block in table.blocks(stored.block_rows(WIDTH))] == [5] * 7 + [2]
    quantized = QuantizedTable.of(table, codes)
    assert torch.equal(quantized.codes.view(torch.int8), whole_codes.view(torch.int8))
    assert torch.equal(quantized.scales, whole_scales)


def test_a_row_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_BLOCK_BYTES", 5 * WIDTH * 4)
    table = ValueTable(37, WIDTH)
    with torch.no_grad():
        table.weight[23, 3] = float("nan")
    with pytest.raises(ModelError, match="row 23 of a value table holds NaN or infinity"):
        QuantizedTable.of(table, "int8")


@both_kinds
@pytest.mark.parametrize(
    "cast",
    [
        lambda table: table.to(torch.bfloat16),
        lambda table: table.half(),
        lambda table: table.double(),
        copy.deepcopy,
    ],
)
def test_casting_a_model_leaves_codes_and_scales(
    codes: Codes, cast: Callable[[RowTable], RowTable]
) -> None:
    table = QuantizedTable.of(ValueTable(20, WIDTH), codes)
    held = table.codes.view(torch.int8).clone(), table.scales.clone()
    moved = cast(table)
    assert isinstance(moved, QuantizedTable)
    assert moved.codes.dtype == (torch.int8 if codes == "int8" else torch.float8_e4m3fn)
    assert torch.equal(moved.codes.view(torch.int8), held[0])
    assert moved.scales.dtype == torch.float32 and torch.equal(moved.scales, held[1])


@both_kinds
def test_training_is_refused(codes: Codes) -> None:
    model = layer("product_key").train()
    replace_tables(model, lambda table: QuantizedTable.of(table, codes))
    wanted = f"value tables stored as {codes} are for inference"
    with pytest.raises(ModelError, match=wanted):
        model(torch.randn(2, WIDTH))
    with pytest.raises(ModelError, match=wanted):
        parameter_groups(model)
    with pytest.raises(ModelError, match=wanted):
        RowOptimizer(list(value_tables(model).values()), lr=0.1)  # type: ignore[arg-type]
    with torch.no_grad():
        assert model(torch.randn(2, WIDTH)).isfinite().all()
    model.eval()(torch.randn(2, WIDTH, requires_grad=True)).sum().backward()
    assert model.keys.query.weight.grad is not None


def test_codes_are_not_quantized_again() -> None:
    table = QuantizedTable.of(ValueTable(20, WIDTH), "int8")
    with pytest.raises(ModelError, match="stored as int8 already"):
        QuantizedTable.of(table, "fp8")


def test_a_shared_table_is_made_once() -> None:
    table = ValueTable(64, WIDTH)
    pair = torch.nn.ModuleList(ProductKeyMemory(WIDTH, CONFIG, table) for _ in range(2))
    made = []

    def make(old: RowTable) -> RowTable:
        made.append(QuantizedTable.of(old, "int8"))
        return made[-1]

    replace_tables(pair, make)
    assert len(made) == 1 and list(value_tables(pair).values()) == made
    assert all(layer.table is made[0] for layer in pair)


@both_kinds
def test_under_torch_compile(codes: Codes) -> None:
    model = layer("product_key").eval()
    replace_tables(model, lambda table: QuantizedTable.of(table, codes))
    hidden = torch.randn(5, WIDTH)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(hidden), model(hidden))
