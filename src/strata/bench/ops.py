"""`strata bench ops`: each operation against every installed rival, in one interleaved run.

Rows are drawn uniformly, the hardest case for caches. Before anything is timed, what each
contestant computes is compared with float64. The floor is the bytes that must move, over the
bandwidth of a large copy measured on the same machine in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strata.bench.rivals import Contestant, bag_rivals, layer_rivals, topk_rivals, value_rivals
from strata.bench.sizes import OpSize
from strata.bench.timing import copy_bytes_per_s, race
from strata.errors import StrataError
from strata.layers import MemoryLayerConfig, ProductKeyMemory, ValueTable
from strata.ops import weighted_bag
from strata.ops.product_key_topk import pick_rows
from strata.ops.weighted_bag import bag_forward
from strata.train.optim import RowOptimizer

OURS = "strata"
_CHECKED = 16  # tokens whose results are compared with float64


class BenchError(StrataError):
    """A contestant computes something else than what is measured."""


@dataclass(frozen=True)
class OpResult:
    """One line of the benchmark; times are medians in milliseconds.

    Attributes:
        op: product_key_topk, bag_forward, value_step or layer_step.
        rows, width, dtype: of the table.
        ours_ms: strata.
        rivals: name -> median.
        floor_ms: bytes that must move over measured copy bandwidth; None where scoring, which
            is arithmetic, is most of the work.
        skipped: rival -> why it was not run.
    """

    op: str
    rows: int
    width: int
    dtype: str
    ours_ms: float
    rivals: Mapping[str, float]
    floor_ms: float | None
    skipped: Mapping[str, str]


def bench_ops(
    sizes: Sequence[OpSize],
    *,
    device: torch.device,
    ops: Sequence[str] | None = None,
    rounds: int = 7,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> Iterator[OpResult]:
    """Run the benchmark, yielding a result as soon as it is there.

    Args:
        sizes: what to time at.
        device: where.
        ops: names from `OPS`; None for all.
        rounds: interleaved rounds that count.
        seed: of tables, rows and weights.
        on_progress: told what is done.

    Raises:
        BenchError: a contestant's result is not that of the float64 formula.
    """
    say = on_progress or (lambda text: None)
    say("measuring the bandwidth of a copy")
    bytes_per_s = copy_bytes_per_s(device)
    for size in sizes:
        for op, make in OPS.items():
            if ops and op not in ops:
                continue
            say(f"{op}, {size.name}")
            torch.manual_seed(seed)
            case = make(size, device)
            ours, rivals, skipped = case.ours, case.rivals, case.skipped
            for name, contestant in {OURS: ours, **rivals}.items():
                _compare(op, name, contestant, case.truth, tolerance=case.tolerance)
            times = race(
                {OURS: ours.step, **{name: rival.step for name, rival in rivals.items()}},
                rounds=rounds,
                device=device,
                on_round=lambda op=op, size=size: say(f"{op}, {size.name}"),  # type: ignore[misc]
            )
            floor = case.floor_bytes
            yield OpResult(
                op=op,
                rows=size.rows,
                width=size.width,
                dtype=str(size.dtype).removeprefix("torch."),
                ours_ms=times.pop(OURS),
                rivals=times,
                floor_ms=None if floor is None else floor / bytes_per_s * 1e3,
                skipped=skipped,
            )
            del case, ours, rivals


@dataclass
class Case:
    """One operation at one size.

    Attributes:
        ours, rivals: who takes part; a contestant's `probe` gives the values to compare.
        truth: the float64 values, None where contestants differ by construction.
        tolerance: largest difference allowed, relative to the largest true value.
        floor_bytes: that must move.
        skipped: rival -> why.
    """

    ours: Contestant
    rivals: dict[str, Contestant]
    truth: Tensor | None
    tolerance: float
    floor_bytes: int | None
    skipped: dict[str, str]


def topk_case(size: OpSize, device: torch.device) -> Case:
    """Both stages of the picking from half scores that are there already."""
    half_scores = torch.randn(size.tokens, size.heads, 2, size.half_keys, device=device)
    part = half_scores[:_CHECKED].double()
    sums = part[:, :, 0, :, None] + part[:, :, 1, None, :]
    truth = sums.flatten(2).topk(size.top_k).values
    ours = Contestant(
        step=lambda: pick_rows(half_scores, size.top_k),
        probe=lambda: pick_rows(half_scores, size.top_k)[0][:_CHECKED],
    )
    floor_bytes = half_scores.numel() * 4 + size.tokens * size.picks * 12
    rivals, skipped = topk_rivals(size, half_scores, checked=_CHECKED)
    return Case(ours, rivals, truth, 1e-6, floor_bytes, skipped)


def bag_case(size: OpSize, device: torch.device) -> Case:
    """The forward pass alone."""
    values, rows, weights = _draw(size, device)
    truth = _true_bag(values, rows, weights)
    ours = Contestant(
        step=lambda: bag_forward(values, rows, weights),
        probe=lambda: bag_forward(values, rows, weights)[:_CHECKED],
    )
    rivals, skipped = bag_rivals(size, values, rows, weights, checked=_CHECKED)
    tolerance = 1e-5 if size.dtype == torch.float32 else 2e-2  # rivals round sums to bf16
    return Case(ours, rivals, truth, tolerance, _forward_bytes(size), skipped)


def value_case(size: OpSize, device: torch.device) -> Case:
    """Forward, both gradients, and the update of the rows that were read."""
    values, rows, weights = _draw(size, device)
    grad_out = torch.randn(size.tokens, size.width, device=device)
    truth = _true_bag(values, rows, weights)
    rivals, skipped = value_rivals(size, values, rows, weights, grad_out, checked=_CHECKED)
    table = ValueTable(size.rows, size.width, device=device, dtype=size.dtype)
    with torch.no_grad():
        table.weight.copy_(values)
    optimizer = RowOptimizer([table], lr=1e-3, algorithm="adagrad")

    def step() -> Tensor:
        wanted = weights.detach().requires_grad_()
        out = weighted_bag(table.weight, rows, wanted, queue=table.active_queue)
        out.backward(grad_out)
        optimizer.step()
        return out.detach()

    _check_update(size, table, optimizer, rows, weights, grad_out)
    with torch.no_grad():
        table.weight.copy_(values)
    ours = Contestant(step=step, probe=lambda: step()[:_CHECKED])
    read = len(rows.unique())
    # Forward and the gradient to the weights read every pick; the update reads and writes rows.
    floor_bytes = 2 * _forward_bytes(size) + 2 * read * size.row_bytes
    tolerance = 1e-5 if size.dtype == torch.float32 else 2e-2
    return Case(ours, rivals, truth, tolerance, floor_bytes, skipped)


def layer_case(size: OpSize, device: torch.device) -> Case:
    """A training step of a whole layer: forward, backward, optimizers."""
    config = MemoryLayerConfig(
        layers=(0,),
        num_heads=size.heads,
        top_k=size.top_k,
        num_half_keys=size.half_keys,
        key_dim=2 * size.half_key_dim,
        gate="none",
    )
    table = ValueTable(size.rows, size.width, device=device, dtype=size.dtype)
    layer = ProductKeyMemory(size.width, config, table, device=device)
    hidden = torch.randn(size.tokens, size.width, device=device)
    dense = torch.optim.AdamW(layer.parameters(), lr=1e-4, fused=True)
    values = RowOptimizer([table], lr=1e-3, algorithm="adagrad")

    def step() -> Tensor:
        out = layer(hidden)
        out.square().mean().backward()
        dense.step()
        dense.zero_grad()
        values.step()
        return out.detach()

    rivals, skipped = layer_rivals(size, hidden)
    return Case(Contestant(step=step, probe=step), rivals, None, 0.0, None, skipped)


OPS: dict[str, Callable[[OpSize, torch.device], Case]] = {
    "product_key_topk": topk_case,
    "bag_forward": bag_case,
    "value_step": value_case,
    "layer_step": layer_case,
}


def _draw(size: OpSize, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.empty(size.rows, size.width, device=device, dtype=size.dtype).normal_()
    rows = torch.randint(size.rows, (size.tokens, size.picks), device=device)
    weights = torch.rand(size.tokens, size.picks, device=device)
    return values, rows, weights


def _true_bag(values: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    gathered = values[rows[:_CHECKED]].double()
    return torch.einsum("np,npv->nv", weights[:_CHECKED].double(), gathered)


def _forward_bytes(size: OpSize) -> int:
    picks = size.tokens * size.picks
    return picks * (size.row_bytes + 12) + size.tokens * size.width * 4


def _compare(
    op: str, name: str, contestant: Contestant, truth: Tensor | None, *, tolerance: float
) -> None:
    found = contestant.probe()
    if truth is None:
        if not bool(found.isfinite().all()):
            raise BenchError(f"{op}: {name} gives numbers that are not finite")
        return
    error = float((found.double() - truth).abs().max() / truth.abs().max())
    if not error <= tolerance:
        raise BenchError(f"{op}: {name} is off by {error:.1e} from float64 (allowed {tolerance})")


def _check_update(
    size: OpSize,
    table: ValueTable,
    optimizer: RowOptimizer,
    rows: Tensor,
    weights: Tensor,
    grad_out: Tensor,
) -> None:
    """Gradients and updated rows of one step against float64, for the first bag's rows."""
    seen = rows[0].unique()
    before = table.weight.detach()[seen].double()
    wanted = weights.detach().requires_grad_()
    weighted_bag(table.weight, rows, wanted, queue=table.active_queue).backward(grad_out)
    true_dots = torch.einsum(
        "pv,v->p", table.weight.detach()[rows[0]].double(), grad_out[0].double()
    )
    assert wanted.grad is not None
    error = float((wanted.grad[0].double() - true_dots).abs().max() / true_dots.abs().max())
    if not error <= 1e-5:
        raise BenchError(f"value_step: the gradient to the weights is off by {error:.1e}")
    optimizer.step()
    for row, old in zip(seen.tolist(), before, strict=True):
        bags, places = (rows == row).nonzero(as_tuple=True)
        gradient = (weights[bags, places].double()[:, None] * grad_out[bags].double()).sum(0)
        new = old - optimizer.param_groups[0]["lr"] * gradient / gradient.square().mean().sqrt()
        allowed = 1e-6 if size.dtype == torch.float32 else 2**-7 * float(new.abs().max())
        error = float((table.weight.detach()[row].double() - new).abs().max())
        if not error <= allowed:
            raise BenchError(f"value_step: row {row} is off by {error:.1e} after the update")
