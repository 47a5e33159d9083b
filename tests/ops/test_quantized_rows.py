"""Rows as int8 and fp8 codes: what is written, and bags over them, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strata.ops import weighted_bag
from strata.ops.quantized_rows import (
    CODE_DTYPES,
    Codes,
    quantize_rows,
    quantized_bag,
    quantized_dots,
)
from strata.ops.weighted_bag import cpu, reference

KINDS: list[Codes] = ["int8", "fp8"]
both_kinds = pytest.mark.parametrize("codes", KINDS)

# n bags, p picks, r rows, v width
SIZES = [(5, 3, 7, 11), (1, 1, 1, 1), (0, 3, 5, 4), (4, 0, 5, 3), (17, 33, 129, 65), (3, 4, 1, 2)]


def plain(codes_rv: Tensor, scales_r: Tensor) -> Tensor:
    return codes_rv.double() * scales_r.double()[:, None]


def table(r: int, v: int, codes: Codes) -> tuple[Tensor, Tensor]:
    values = torch.randn(r, v) * torch.logspace(-3, 2, r)[:, None]
    return quantize_rows(values, codes)


@both_kinds
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("module", [cpu, reference])
def test_bags_and_dots(
    size: tuple[int, ...],
    codes: Codes,
    module: object,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_empty: None,
) -> None:
    if module is reference:
        monkeypatch.setattr(cpu, "readable", lambda values: False)
    n, p, r, v = size
    codes_rv, scales_r = table(r, v, codes)
    rows, weights, vectors = torch.randint(0, r, (n, p)), torch.randn(n, p), torch.randn(n, v)
    rows_npv = plain(codes_rv, scales_r)[rows]
    bag = torch.einsum("np,npv->nv", weights.double(), rows_npv)
    dots = torch.einsum("npv,nv->np", rows_npv, vectors.double())
    for mine, truth, parts in (
        (quantized_bag(codes_rv, scales_r, rows, weights), bag, p),
        (quantized_dots(codes_rv, scales_r, rows, vectors), dots, v),
    ):
        assert mine.dtype == torch.float32 and mine.shape == truth.shape
        # rounding of fp32 sums of `parts` terms
        largest = max(1.0, float(rows_npv.abs().max())) if rows_npv.numel() else 1.0
        assert torch.allclose(mine.double(), truth, rtol=1e-6, atol=2e-7 * largest * (parts + 4))


def test_every_fp8_code_is_read_exactly() -> None:
    bits = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = bits.view(torch.float8_e4m3fn)
    read = cpu.bag_forward(codes, torch.arange(256)[:, None], torch.ones(256, 1))
    truth = codes.float()
    known = ~truth.isnan()
    assert int(known.sum()) == 254
    assert torch.equal(read[known], truth[known])
    assert read.isfinite().all()


def test_every_int8_code_is_read_exactly() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)[:, None]
    read = cpu.bag_forward(codes, torch.arange(256)[:, None], torch.ones(256, 1))
    assert torch.equal(read, codes.float())


def test_int8_errs_by_half_a_step() -> None:
    values = torch.randn(50, 33) * torch.logspace(-8, 8, 50)[:, None]
    codes, scales = quantize_rows(values, "int8")
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    assert int(codes.min()) >= -127 and torch.all(codes.abs().amax(1) == 127)
    error = (plain(codes, scales) - values.double()).abs()
    assert torch.all(error <= 0.5001 * scales.double()[:, None])


def test_fp8_errs_by_a_sixteenth_of_the_entry() -> None:
    values = torch.randn(50, 33) * torch.logspace(-8, 8, 50)[:, None]
    codes, scales = quantize_rows(values, "fp8")
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.all(codes.float().abs().amax(1) == 448)
    error = (plain(codes, scales) - values.double()).abs()
    # three bits of mantissa; below 2^-6 steps of 2^-9
    allowed = values.double().abs() / 15.99 + 2**-10 * scales.double()[:, None]
    assert torch.all(error <= allowed)


@both_kinds
def test_rows_of_zeros_and_of_next_to_nothing(codes: Codes) -> None:
    values = torch.zeros(3, 5)
    values[1], values[2, 3] = 1e-40, 2.0
    codes_rv, scales_r = quantize_rows(values, codes)
    assert scales_r[:2].tolist() == [0.0, 0.0] and torch.all(codes_rv.float()[:2] == 0)
    assert plain(codes_rv, scales_r)[2].tolist() == pytest.approx([0, 0, 0, 2, 0])
    wide, _ = quantize_rows(torch.full((2, 3), 3e38), codes)
    assert wide.float().isfinite().all()


@both_kinds
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_no_numbers_are_refused(codes: Codes, wrong: float) -> None:
    values = torch.randn(6, 4)
    values[4, 1] = wrong
    with pytest.raises(ValueError, match="row 4 holds NaN or infinity"):
        quantize_rows(values, codes)


@both_kinds
@pytest.mark.parametrize("row", [-1, 7])
def test_rows_outside_the_table(codes: Codes, row: int) -> None:
    codes_rv, scales_r = table(7, 4, codes)
    rows = torch.tensor([[0, row]])
    with pytest.raises(IndexError, match=rf"row {row} is not in the table: 0\.\.6 are"):
        quantized_bag(codes_rv, scales_r, rows, torch.ones(1, 2))
    with pytest.raises(IndexError, match=rf"row {row} is not in the table: 0\.\.6 are"):
        quantized_dots(codes_rv, scales_r, rows, torch.ones(1, 4))


@both_kinds
def test_gradients_flow_to_the_weights(codes: Codes) -> None:
    codes_rv, scales_r = table(9, 5, codes)
    rows, weights = torch.randint(0, 9, (4, 3)), torch.randn(4, 3, requires_grad=True)
    grad_out = torch.randn(4, 5)
    quantized_bag(codes_rv, scales_r, rows, weights).backward(grad_out)
    truth = torch.einsum("npv,nv->np", plain(codes_rv, scales_r)[rows], grad_out.double())
    assert weights.grad is not None
    assert torch.allclose(weights.grad.double(), truth, rtol=1e-5, atol=1e-4)


@both_kinds
def test_bf16_and_fp64_weights(codes: Codes) -> None:
    codes_rv, scales_r = table(9, 5, codes)
    rows, weights = torch.randint(0, 9, (4, 3)), torch.randn(4, 3)
    truth = quantized_bag(codes_rv, scales_r, rows, weights.bfloat16().float())
    assert torch.allclose(quantized_bag(codes_rv, scales_r, rows, weights.bfloat16()), truth)
    assert quantized_bag(codes_rv, scales_r, rows, weights.double()).dtype == torch.float32


def test_the_code_dtypes_are_those_of_safetensors() -> None:
    assert {"int8": torch.int8, "fp8": torch.float8_e4m3fn} == CODE_DTYPES


def test_without_gradients_the_bits_are_those_of_the_operator() -> None:
    values, rows = torch.randn(20, 9, requires_grad=True), torch.randint(0, 20, (5, 7))
    weights = torch.randn(5, 7)
    with torch.no_grad():
        directly = weighted_bag(values, rows, weights)
    assert torch.equal(directly, weighted_bag(values, rows, weights).detach())
