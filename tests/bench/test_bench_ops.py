"""The benchmark measures what it says, refuses wrong results, and prints what scripts read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strata.bench import ops as bench
from strata.bench import rivals
from strata.bench.ops import BenchError, OpResult
from strata.bench.sizes import SIZES, OpSize
from strata.bench.timing import copy_bytes_per_s, race
from strata.cli import main as command_line
from strata.layers import MemoryLayerConfig

CPU = torch.device("cpu")


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["strata", "bench", *arguments])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    return int(end.value.code or 0)


def test_json_has_every_op_at_every_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ops", "--size", "small", "--rounds", "1", "--json"], monkeypatch) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["op"] for r in results] == list(bench.OPS) * len(SIZES["small"])
    promised = {"op", "rows", "width", "dtype", "ours_ms", "rivals", "floor_ms"}
    for result in results:
        assert promised <= set(result)
        assert result["ours_ms"] > 0
        assert result["rows"] == 64 * 64 and result["width"] == 48
        assert result["dtype"] in ("float32", "bfloat16")
        if result["op"] != "layer_step":
            assert result["floor_ms"] > 0 and result["rivals"]
        assert all(ms > 0 for ms in result["rivals"].values())


def test_the_table_names_rivals_and_floor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ops", "--size", "small", "--rounds", "1"], monkeypatch) == 0
    shown = capsys.readouterr().out
    for word in ("value_step", "embedding_bag", "SparseAdam", "floor"):
        assert word in shown


def test_an_unknown_size_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ops", "--size", "huge"], monkeypatch) == 2
    assert capsys.readouterr().err.strip() == (
        "strata: error: no size 'huge': give one of small, medium, large, rows"
    )


def test_only_the_operations_that_are_named_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["--op", "bag_forward", "--op", "product_key_topk"]
    assert run(["ops", "--size", "small", "--rounds", "1", "--json", *names], monkeypatch) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["op"] for r in results] == ["product_key_topk", "bag_forward"] * len(SIZES["small"])


def test_an_unknown_operation_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ops", "--op", "bag"], monkeypatch) == 2
    assert capsys.readouterr().err.strip() == (
        "strata: error: no operation 'bag': give one of product_key_topk, bag_forward, "
        "value_step, layer_step"
    )


@pytest.mark.parametrize("op", ["product_key_topk", "bag_forward", "value_step"])
def test_a_wrong_result_is_not_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast operation that computes something else must not win a benchmark."""
    patched = {
        "product_key_topk": "pick_rows",
        "bag_forward": "bag_forward",
        "value_step": "weighted_bag",
    }
    real = getattr(bench, patched[op])

    def slightly_off(*args: object, **kwargs: object) -> Tensor | tuple[Tensor, Tensor]:
        result = real(*args, **kwargs)
        return (result[0] * 1.03, result[1]) if isinstance(result, tuple) else result * 1.03

    monkeypatch.setattr(bench, patched[op], slightly_off)
    monkeypatch.setattr(bench, "OPS", {op: bench.OPS[op]})
    with pytest.raises(BenchError, match=op):
        list(bench.bench_ops(SIZES["small"], device=CPU, rounds=1))


def test_rivals_take_turns_in_an_order_that_changes_and_repeats_from_run_to_run() -> None:
    def run(rounds: int) -> str:
        order: list[str] = []
        times = race(
            {name: lambda name=name: order.append(name) for name in "abc"},
            rounds=rounds,
            device=CPU,
        )
        assert list(times) == list("abc")
        return "".join(order)

    order = run(20)
    assert len(order) == 3 * 21
    assert all(sorted(order[i : i + 3]) == list("abc") for i in range(0, len(order), 3))
    followers = {order[i : i + 2] for i in range(len(order) - 1)}
    assert followers >= {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert order == run(20)


def test_copy_bandwidth_is_of_this_world() -> None:
    assert 1e8 < copy_bytes_per_s(CPU, rounds=1) < 1e14


def test_results_are_plain_numbers() -> None:
    result = OpResult("bag_forward", 4, 2, "float32", 1.0, {"torch": 2.0}, 0.5, {})
    assert json.loads(json.dumps(vars(result)))["rivals"] == {"torch": 2.0}


@pytest.mark.parametrize(
    ("package", "make", "table"),
    [
        ("product_key_memory", rivals.product_key_memory, "values"),
        ("PEER_pytorch", rivals.peer, "weight_up_embed"),
    ],
)
def test_rival_layers_score_and_read_as_much_as_ours(
    package: str, make: Callable[[OpSize], torch.nn.Module], table: str
) -> None:
    pytest.importorskip(package, reason="a rival, pip install strata-lm[bench]")
    size = OpSize(64, 48, torch.float32, tokens=1, top_k=8)
    layer = make(size)
    ours = MemoryLayerConfig(layers=(0,), key_dim=2 * size.half_key_dim)
    assert ours.key_dim == size.width // 2
    keys = layer.get_parameter("keys")
    assert keys.numel() == size.heads * 2 * size.half_keys * ours.key_dim // 2
    assert keys.shape[-1] == size.half_key_dim
    reads: list[int] = []
    layer.get_submodule(table).register_forward_hook(
        lambda _module, inputs, _out: reads.append(inputs[0].numel())
    )
    layer(torch.randn(1, 1, size.width))
    assert reads == [size.picks]
