"""What the CPU kernels stand on: splitting work, bf16 bits, and doing without numba."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from strata.ops import threads
from strata.ops.product_key_topk import cpu as topk_cpu
from strata.ops.product_key_topk import reference
from strata.ops.weighted_bag import cpu as bag_cpu


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("num_items", [0, 1, 2, 5, 100])
def test_bounds_cover_every_item_once(num_items: int, count: int) -> None:
    torch.set_num_threads(count)
    bounds = threads.even_bounds(num_items, bytes_per_item=1 << 20)
    assert bounds[0] == 0 and bounds[-1] == num_items
    assert bounds == sorted(bounds)
    assert len(bounds) - 1 <= max(1, min(count, num_items))


def test_a_little_work_stays_in_one_thread() -> None:
    torch.set_num_threads(4)
    assert threads.even_bounds(50, bytes_per_item=100) == [0, 50]


def test_weighed_bounds_follow_the_units() -> None:
    torch.set_num_threads(2)
    starts = np.array([0, 90, 91, 92, 93, 94, 100])
    bounds = threads.weighed_bounds(starts, bytes_per_unit=1 << 20)
    assert bounds == [0, 1, 6]  # the first row has nine tenths of the uses


def test_an_error_in_a_thread_is_raised() -> None:
    def fails(start: int, stop: int) -> None:
        if start > 0:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads.run_split(fails, [0, 1, 2])


TORCH = "/site-packages/torch"
OWN, OWN_LIBS = f"{TORCH}/lib/libgomp.so.1", "/site-packages/torch.libs/libgomp-a34b.so.1"
SKLEARN = "/site-packages/scikit_learn.libs/libgomp-d22c.so.1.0.0"
INTEL, CONDA = "/opt/a folder/libiomp5.so", "/conda/lib/libomp.so"


@pytest.mark.parametrize(
    ("loaded", "picked"),
    [
        ([OWN], OWN),
        ([OWN_LIBS], OWN_LIBS),
        ([SKLEARN, OWN, INTEL], OWN),
        ([OWN_LIBS, SKLEARN], OWN_LIBS),
        ([CONDA], CONDA),
        ([INTEL], INTEL),
        ([CONDA, SKLEARN], None),
        ([OWN, OWN_LIBS], None),
        ([], None),
    ],
)
def test_which_openmp_is_torchs(loaded: list[str], picked: str | None) -> None:
    others = ["", "/usr/lib/libc.so.6", "[stack]", "/site-packages/libgompertz/data.bin"]
    maps = "".join(
        f"7f00000{part}000-7f00000{part}fff r-xp 00000000 fe:00 {260131 + part:<26}{path}\n"
        for path in [*others, *loaded]
        for part in range(3)  # text, constants, data
    )
    assert threads.pick_runtime(maps, torch_folder=Path(TORCH)) == picked


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch without OpenMP")
def test_torchs_threads_are_found_here() -> None:
    """Otherwise the kernels would run on Python's threads, which fight torch's."""
    assert threads._openmp() is not None


@pytest.mark.parametrize("high", [0, 1, 2047, 2048, 1 << 22, (1 << 33) + 5])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_reverse_index_is_a_stable_sort(count: int, high: int) -> None:
    """One, two, three and four passes of the radix sort."""
    rows = torch.randint(0, high + 1, (count, 3))
    rows[0, 0] = high
    index = bag_cpu.reverse_index(rows)
    values, order = rows.flatten().sort(stable=True)
    assert index.order.tolist() == order.tolist()
    unique, counts = values.unique_consecutive(return_counts=True)
    assert index.rows_u.tolist() == unique.tolist()
    assert np.diff(index.starts).tolist() == counts.tolist()


def test_reverse_index_refuses_negative_rows() -> None:
    with pytest.raises(IndexError, match="-3"):
        bag_cpu.reverse_index(torch.tensor([[1, -3]]))


class TestPicks:
    """Sizes of real use, where the threshold does the work; small ones are in the top-k tests."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("m", "k"), [(512, 32), (1024, 32), (256, 8), (1000, 7), (97, 64), (2048, 128), (33, 1)]
    )
    def test_equals_the_reference(self, m: int, k: int, dtype: torch.dtype) -> None:
        half = torch.randn(40, 3, 2, m, dtype=dtype)
        scores, rows = topk_cpu.pick_rows(half, k)
        expected, expected_rows = reference.pick_rows(half, k)
        assert torch.equal(scores, expected)
        if dtype == torch.float64:  # in fp32 sums of draws tie now and then
            assert torch.equal(rows, expected_rows)
        sums = half[:, :, 0].gather(-1, rows // m) + half[:, :, 1].gather(-1, rows % m)
        assert torch.equal(sums, scores)
        assert (rows.sort(dim=-1).values.diff(dim=-1) > 0).all()

    @pytest.mark.parametrize("kind", ["outlier", "few levels", "sorted", "all equal", "minus inf"])
    def test_hard_distributions(self, kind: str) -> None:
        half = torch.randn(8, 2, 2, 512)
        if kind == "outlier":
            half[..., 17] = 1e30
        elif kind == "few levels":
            half = half.round()
        elif kind == "sorted":
            half = half.sort(dim=-1).values
        elif kind == "all equal":
            half.fill_(0.25)
        else:
            half[..., 20:] = -torch.inf
        scores, rows = topk_cpu.pick_rows(half, 16)
        full = (half[:, :, 0, :, None] + half[:, :, 1, None, :]).flatten(2)
        assert torch.equal(scores, full.topk(16).values)
        assert torch.equal(full.gather(-1, rows), scores)
        assert (rows.sort(dim=-1).values.diff(dim=-1) > 0).all()

    @pytest.mark.parametrize("where", [0, 5, 511])
    def test_nan_never_gives_a_row_outside(self, where: int) -> None:
        half = torch.randn(4, 2, 2, 512)
        half[1, 0, :, where] = torch.nan
        half[2] = torch.nan
        scores, rows = topk_cpu.pick_rows(half, 32)
        assert ((rows >= 0) & (rows < 512 * 512)).all()
        assert (rows.sort(dim=-1).values.diff(dim=-1) > 0).all()
        assert not scores[1, 0].isfinite().all() and scores[0].isfinite().all()

    def test_threads_change_no_bit(self) -> None:
        half = torch.randn(500, 4, 2, 128)
        torch.set_num_threads(1)
        one = topk_cpu.pick_rows(half, 16)
        torch.set_num_threads(3)
        three = topk_cpu.pick_rows(half, 16)
        assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])


def test_without_numba_the_reference_runs_and_one_warning_says_so() -> None:
    script = textwrap.dedent(
        """
        import sys, warnings
        sys.modules["numba"] = None  # as where there is no wheel
        import torch
        from strata.ops import UseQueue, kernels, product_key_topk, weighted_bag
        from strata.ops import reduce_uses, row_update
        assert not kernels.AVAILABLE

        def train() -> None:
            table = torch.randn(9, 4, requires_grad=True)
            queue = UseQueue()
            rows, weights = torch.randint(9, (3, 2)), torch.rand(3, 2, requires_grad=True)
            weighted_bag(table, rows, weights, queue=queue).sum().backward()
            row_update(table.data, {}, reduce_uses(queue.take()), algorithm="sgd", lr=0.1)
            keys = torch.randn(2, 2, 5, 3, requires_grad=True)
            scores, _ = product_key_topk(torch.randn(4, 2, 2, 3), keys, top_k=2)
            scores.sum().backward()
            assert weights.grad is not None and keys.grad is not None

        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            train()
            train()
        for warning in heard:
            print(warning.message)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "numba cannot be imported here: memory layers run on their reference, several times "
        "slower\n"
    )
