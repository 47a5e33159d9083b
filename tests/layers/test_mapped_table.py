"""Mapped tables answer what the table in memory answers, bit for bit, whatever the cache holds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from strata.errors import ConfigError, ModelError
from strata.layers import (
    MappedTable,
    MemoryLayerConfig,
    ProductKeyMemory,
    RowPlace,
    ValueTable,
    cache_counts,
    replace_tables,
)
from strata.ops import row_cache, row_dots, weighted_bag
from strata.ops.quantized_rows import quantize_rows, quantized_bag, quantized_dots
from strata.ops.weighted_bag import cpu
from strata.train.optim import parameter_groups

ROWS, WIDTH = 60, 7
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def write(path: Path, rows_rv: Tensor, *, offset: int) -> RowPlace:
    """A file with the rows somewhere in it, and something behind them."""
    data = rows_rv.contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(b"\xff" * offset + data + b"\xff" * 9)
    return RowPlace(path, offset, *rows_rv.shape, rows_rv.dtype)


def draw(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64).to(dtype)


def mapped(
    path: Path, rows_rv: Tensor, *, slots: int, offset: int = 3, scales: Tensor | None = None
) -> MappedTable:
    place = write(path, rows_rv, offset=offset)
    return MappedTable(place, scales, cache_bytes=slots * place.row_bytes).eval()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    slots=st.integers(4, 70),
    offset=st.integers(0, 9),
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=8),
)
def test_equal_bits_across_evictions(
    tmp_path: Path,
    seed: int,
    dtype: torch.dtype,
    slots: int,
    offset: int,
    shapes: list[tuple[int, int]],
) -> None:
    torch.manual_seed(seed)
    rows_rv = draw(dtype)
    table = mapped(tmp_path / "rows", rows_rv, slots=slots, offset=offset)
    for n, p in shapes:
        rows, weights = torch.randint(0, ROWS, (n, p)), torch.randn(n, p)
        vectors = torch.randn(n, WIDTH)
        assert torch.equal(table.bag(rows, weights), weighted_bag(rows_rv, rows, weights))
        assert torch.equal(table.dots(rows, vectors), row_dots(rows_rv, rows, vectors))
    counts = table.counts
    assert counts.misses - counts.evictions <= slots
    assert counts.bytes_read == counts.misses * WIDTH * dtype.itemsize


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_equal_bits_for_codes(tmp_path: Path, codes: str) -> None:
    codes_rv, scales_r = quantize_rows(draw(), codes)  # type: ignore[arg-type]
    table = mapped(tmp_path / "rows", codes_rv, slots=10, scales=scales_r)
    for _ in range(20):
        rows, weights, vectors = (
            torch.randint(0, ROWS, (6, 5)),
            torch.randn(6, 5),
            torch.randn(6, 7),
        )
        bag = quantized_bag(codes_rv, scales_r, rows, weights)
        assert torch.equal(table.bag(rows, weights), bag)
        dots = quantized_dots(codes_rv, scales_r, rows, vectors)
        assert torch.equal(table.dots(rows, vectors), dots)
    assert table.counts.evictions > 0


def test_without_numba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_rv = draw()
    table = mapped(tmp_path / "rows", rows_rv, slots=10)
    rows, weights = torch.randint(0, ROWS, (20, 5)), torch.randn(20, 5)
    truth = weighted_bag(rows_rv, rows, weights)
    monkeypatch.setattr(row_cache, "AVAILABLE", False)
    monkeypatch.setattr(cpu, "readable", lambda values: False)
    assert torch.allclose(table.bag(rows, weights), truth, atol=1e-6)


def test_what_the_counts_count(tmp_path: Path) -> None:
    table = mapped(tmp_path / "rows", draw(), slots=4)

    def read(*rows: int) -> None:
        table.bag(torch.tensor([rows]), torch.ones(1, len(rows)))

    read(1, 2, 1)
    assert (table.counts.hits, table.counts.misses, table.counts.evictions) == (0, 2, 0)
    read(1, 2, 3, 3)
    assert (table.counts.hits, table.counts.misses, table.counts.evictions) == (2, 3, 0)
    read(5, 6)
    assert (table.counts.hits, table.counts.misses, table.counts.evictions) == (2, 5, 1)
    model = torch.nn.ModuleDict({"one": table})
    assert cache_counts(model) == {"one": table.counts}
    assert table.counts.bytes_read == 5 * WIDTH * 4


def test_a_call_larger_than_the_cache_is_done_in_pieces(tmp_path: Path) -> None:
    rows_rv = draw()
    table = mapped(tmp_path / "rows", rows_rv, slots=8)
    rows, weights = torch.randint(0, ROWS, (50, 4)), torch.randn(50, 4)
    assert torch.equal(table.bag(rows, weights), weighted_bag(rows_rv, rows, weights))
    with pytest.raises(ValueError, match="a bag of 9 rows does not fit in a cache of 8 rows"):
        table.bag(torch.randint(0, ROWS, (2, 9)), torch.randn(2, 9))


def test_a_cache_too_small_for_one_token_is_refused(tmp_path: Path) -> None:
    place = write(tmp_path / "rows", draw(), offset=0)
    with pytest.raises(ConfigError, match="one token reads 8: give at least 224"):
        MappedTable(place, None, cache_bytes=7 * place.row_bytes, picks_per_token=8)
    assert MappedTable(place, None, cache_bytes=224, picks_per_token=8).num_rows == ROWS


@pytest.mark.parametrize("row", [-1, ROWS])
def test_rows_outside_the_table(tmp_path: Path, row: int) -> None:
    table = mapped(tmp_path / "rows", draw(), slots=8)
    with pytest.raises(IndexError, match=f"row {row} is not in the table"):
        table.bag(torch.tensor([[0, row]]), torch.ones(1, 2))
    with pytest.raises(IndexError, match=f"row {row} is not in the table"):
        table.dots(torch.tensor([[0, row]]), torch.ones(1, WIDTH))


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "ends after"),
        (lambda path: path.write_bytes(b""), "cannot be mapped"),
        (lambda path: path.unlink(), "cannot be mapped"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], object], wanted: str) -> None:
    place = write(tmp_path / "rows", draw(), offset=5)
    damage(place.path)
    with pytest.raises(ModelError, match=wanted):
        MappedTable(place, None, cache_bytes=10**6)


def test_training_and_backward_are_refused(tmp_path: Path) -> None:
    config = MemoryLayerConfig(layers=(0,), num_heads=2, top_k=2, num_half_keys=8, key_dim=4)
    layer = ProductKeyMemory(WIDTH, config, ValueTable(64, WIDTH))
    place = write(tmp_path / "rows", torch.randn(64, WIDTH), offset=0)
    replace_tables(layer, lambda _: MappedTable(place, None, cache_bytes=10**6))
    wanted = "value tables stored as mapped are for inference"
    with pytest.raises(ModelError, match=wanted):
        layer.train()(torch.randn(2, WIDTH))
    with pytest.raises(ModelError, match=wanted):
        parameter_groups(layer)
    out = layer.eval()(torch.randn(2, WIDTH))
    with pytest.raises(ModelError, match=wanted):
        out.sum().backward()


def test_an_interrupted_read_leaves_no_wrong_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_rv = draw()
    table = mapped(tmp_path / "rows", rows_rv, slots=8)
    rows, weights = torch.arange(8).view(2, 4), torch.ones(2, 4)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(table._file, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            table.bag(rows, weights)
    assert torch.equal(table.bag(rows, weights), weighted_bag(rows_rv, rows, weights))


def test_copies_map_the_same_file(tmp_path: Path) -> None:
    rows_rv = draw()
    table = mapped(tmp_path / "rows", rows_rv, slots=8)
    rows, weights = torch.randint(0, ROWS, (3, 4)), torch.randn(3, 4)
    truth = table.bag(rows, weights)
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert twin.counts.misses == 0 and not twin.training
        assert torch.equal(twin.bag(rows, weights), truth)


def test_threads_take_turns(tmp_path: Path) -> None:
    rows_rv = draw()
    table = mapped(tmp_path / "rows", rows_rv, slots=6)
    calls = [(torch.randint(0, ROWS, (3, 5)), torch.randn(3, 5)) for _ in range(60)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda call: table.bag(*call), calls))
    for (rows, weights), answer in zip(calls, answers, strict=True):
        assert torch.equal(answer, weighted_bag(rows_rv, rows, weights))


def test_under_torch_compile(tmp_path: Path) -> None:
    rows_rv = draw()
    table = mapped(tmp_path / "rows", rows_rv, slots=9)
    compiled = torch.compile(lambda rows, weights: table.bag(rows, weights) * 2, backend="eager")
    rows, weights = torch.randint(0, ROWS, (3, 4)), torch.randn(3, 4)
    assert torch.equal(compiled(rows, weights), weighted_bag(rows_rv, rows, weights) * 2)
