"""Nothing of the table's size, and no gather of all picked rows, is ever allocated.

torch's profiler sees every allocation, those inside kernels and custom operators too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from strata.layers import PEER, MemoryLayerConfig, ProductKeyMemory, ValueTable
from strata.ops import weighted_bag
from strata.ops.weighted_bag import reference
from strata.train.optim import RowOptimizer

WIDTH = 32
N, HEADS, TOP_K = 8, 2, 4
CONFIG = MemoryLayerConfig(layers=(0,), num_heads=HEADS, top_k=TOP_K, num_half_keys=128, key_dim=16)
LIMIT_BYTES = CONFIG.num_rows * WIDTH // 2  # an eighth of an fp32 table


def largest_allocation_bytes(function: Callable[[], object]) -> int:
    """The largest piece of memory asked for while `function` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        function()
    assert session.profiler is not None and session.profiler.kineto_results is not None
    sizes = []
    pending = list(session.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            sizes.append(event.extra_fields.alloc_size)
    return max(sizes, default=0)


def test_the_measure_sees_inside_custom_operators() -> None:
    values = torch.zeros(4, 3, dtype=torch.float16)  # the reference gathers its rows
    rows, weights = torch.zeros(500, 7, dtype=torch.int64), torch.zeros(500, 7)
    seen = largest_allocation_bytes(lambda: weighted_bag(values, rows, weights))
    assert seen == 500 * 7 * 3 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["adagrad", "adam", "sgd"])
@pytest.mark.parametrize("kind", ["product_key", "peer"])
def test_a_training_step_makes_nothing_of_the_tables_size(
    kind: str, algorithm: str, dtype: torch.dtype
) -> None:
    layer: ProductKeyMemory | PEER
    if kind == "peer":
        config = CONFIG.model_copy(update={"kind": "peer", "gate": "none"})
        tables = [ValueTable(config.num_rows, WIDTH, dtype=dtype) for _ in range(2)]
        layer = PEER(WIDTH, config, tables[0], tables[1], dtype=dtype)
    else:
        tables = [ValueTable(CONFIG.num_rows, WIDTH, dtype=dtype)]
        layer = ProductKeyMemory(WIDTH, CONFIG, tables[0], dtype=dtype)
    optimizer = RowOptimizer(tables, lr=0.1, algorithm=algorithm, max_norm=1.0)  # type: ignore[arg-type]
    hidden = torch.randn(N, WIDTH, dtype=dtype, requires_grad=True)

    def step() -> None:
        layer(hidden).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert largest_allocation_bytes(step) < LIMIT_BYTES


def test_nor_with_a_sparse_gradient() -> None:
    table = ValueTable(CONFIG.num_rows, WIDTH)
    layer = ProductKeyMemory(WIDTH, CONFIG, table)
    optimizer = torch.optim.SGD([table.weight], lr=0.1)
    hidden = torch.randn(N, WIDTH)

    def step() -> None:
        layer(hidden).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert largest_allocation_bytes(step) < LIMIT_BYTES


@pytest.mark.parametrize("kind", ["product_key", "peer"])
def test_picked_rows_are_not_gathered(kind: str) -> None:
    """The (tokens, heads, top_k, d) gather would be 4 MiB here; a fourth of it is not made."""
    n, d = 128, 128
    config = MemoryLayerConfig(
        layers=(0,), kind=kind, gate="none", num_heads=4, top_k=16, num_half_keys=16, key_dim=16
    )
    tables = [ValueTable(config.num_rows, d) for _ in range(2)]
    layer = PEER(d, config, *tables) if kind == "peer" else ProductKeyMemory(d, config, tables[0])
    for table in tables:
        table.queued = True
    hidden = torch.randn(n, d, requires_grad=True)
    gather_bytes = n * 4 * 16 * d * 4
    seen = largest_allocation_bytes(lambda: layer(hidden).sum().backward())
    assert seen < gather_bytes // 4


def test_the_reference_gathers_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 tables on a CPU take the reference, whose gathers stay within one chunk."""
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 64 * 1024)
    n, p, r, v = 256, 32, 100, 64
    values = torch.randn(r, v).bfloat16().requires_grad_()
    rows, weights = torch.randint(0, r, (n, p)), torch.rand(n, p, requires_grad=True)

    def step() -> None:
        weighted_bag(values, rows, weights).square().sum().backward()

    gather_bytes = n * p * v * 4
    seen = largest_allocation_bytes(step)
    assert max(64 * 1024, n * p * 8, n * v * 4) >= seen
    assert seen < gather_bytes // 4
