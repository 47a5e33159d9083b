"""Codes to vectors: the loops against the reference, and both against what the bytes mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strata.ops.codec import (
    ResidualBooks,
    cpu,
    decode_int4,
    decode_int8,
    decode_residual,
    encode_residual,
    reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def random_codes(num_vectors: int, code_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_vectors, code_bytes), dtype=torch.uint8)


def with_finite_scales(codes_nb: torch.Tensor) -> torch.Tensor:
    codes_nb[:, :2] = torch.randn(len(codes_nb), 1).half().view(torch.uint8)
    return codes_nb


@pytest.mark.parametrize("width", [1, 2, 7, 16, 63, 80])
@pytest.mark.parametrize("num_vectors", [0, 1, 5, 4099])
def test_integers_mean_scale_times_code(width: int, num_vectors: int) -> None:
    """Bit for bit, from bytes read one at a time."""
    codes = with_finite_scales(random_codes(num_vectors, 2 + width))
    scales = codes[:, :2].numpy().copy().view("<f2").astype(np.float32)
    want = torch.from_numpy(scales * codes[:, 2:].numpy().view(np.int8).astype(np.float32))
    assert torch.equal(decode_int8(codes, width), want)
    assert torch.equal(reference.decode_int8(codes, width), want)

    packed = with_finite_scales(random_codes(num_vectors, 2 + (width + 1) // 2))
    scales = packed[:, :2].numpy().copy().view("<f2").astype(np.float32)
    nibbles = np.array(
        [[row[2 + j // 2] >> 4 * (j % 2) & 15 for j in range(width)] for row in packed.tolist()],
        np.int32,
    ).reshape(num_vectors, width)
    want = torch.from_numpy(scales * np.where(nibbles > 7, nibbles - 16, nibbles)).float()
    assert torch.equal(decode_int4(packed, width), want)
    assert torch.equal(reference.decode_int4(packed, width), want)


@pytest.mark.parametrize(
    ("coarse", "fine", "width", "rotated"),
    [
        ((2, 14), (8, 10), 80, True),
        ((2, 14), (8, 10), 16, True),
        ((1, 9), (7, 5), 7, False),  # an odd width, parts of one number
        ((3, 11), (5, 13), 15, True),
        ((4, 1), (1, 16), 12, False),
    ],
)
def test_residual_codes_name_entries(
    coarse: tuple[int, int], fine: tuple[int, int], width: int, rotated: bool
) -> None:
    """The loops equal the reference, and both equal a look-up through one big integer."""

    def book(parts: int, bits: int) -> torch.Tensor:
        return torch.randn(parts, 2**bits, width // parts)

    rotation = torch.linalg.qr(torch.randn(width, width))[0].contiguous() if rotated else None
    books = ResidualBooks(book(*coarse), book(*fine), rotation)
    codes = random_codes(301, books.code_bytes)
    got = decode_residual(codes, books)
    # Sums of two fp32 numbers, then products over the width: rounding of some 1e-7 a term.
    torch.testing.assert_close(got, reference.decode_residual(codes, books), atol=1e-5, rtol=1e-5)

    for row, vector in list(zip(codes.tolist(), got, strict=True))[:20]:
        want = torch.zeros(width, dtype=torch.float64)
        for book_mkd, first in ((books.coarse_mkd, 0), (books.fine_mkd, books.coarse_bytes)):
            number = int.from_bytes(bytes(row[first:]), "little")
            k = book_mkd.shape[1]
            entries = [book_mkd[m, number // k**m % k] for m in range(len(book_mkd))]
            want += torch.cat(entries).double()
        if rotation is not None:
            want = rotation.double().T @ want
        torch.testing.assert_close(vector.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_vectors", [0, 1, 5, 1500])
@pytest.mark.parametrize(
    ("coarse", "fine", "width", "rotated"),
    [
        ((2, 9), (8, 10), 80, True),
        ((2, 14), (4, 5), 12, False),
        ((1, 8), (7, 3), 7, False),  # an odd width, parts of one number
        ((3, 1), (5, 7), 15, True),
    ],
)
def test_vectors_get_the_codes_of_the_nearest_entries(
    num_vectors: int, coarse: tuple[int, int], fine: tuple[int, int], width: int, rotated: bool
) -> None:
    """By distances in float64: no other entry is nearer, in either stage, by more than rounding."""
    rotation = torch.linalg.qr(torch.randn(width, width))[0].contiguous() if rotated else None
    coarse_mkd, fine_mkd = (
        torch.randn(parts, 2**bits, width // parts) * scale
        for (parts, bits), scale in ((coarse, 1.0), (fine, 0.3))
    )
    books = ResidualBooks(coarse_mkd, fine_mkd, rotation)
    vectors = torch.randn(num_vectors, width)
    for codes in (encode_residual(vectors, books), reference.encode_residual(vectors, books)):
        assert codes.shape == (num_vectors, books.code_bytes) and codes.dtype == torch.uint8
        left = vectors.double() @ (torch.eye(width) if rotation is None else rotation).double().T
        for book, first, last in (
            (coarse_mkd, 0, books.coarse_bytes),
            (fine_mkd, books.coarse_bytes, books.code_bytes),
        ):
            k = book.shape[1]
            numbers = [int.from_bytes(bytes(row[first:last]), "little") for row in codes.tolist()]
            for part, entries in enumerate(book.double()):
                mine = left[:, part * entries.shape[1] : (part + 1) * entries.shape[1]]
                picks = torch.tensor([number // k**part % k for number in numbers]).long()
                assert all(number < k ** len(book) for number in numbers)  # nothing in spare bits
                distance = torch.cdist(mine, entries)
                taken = distance[torch.arange(num_vectors), picks]
                least = distance.amin(1) if num_vectors else taken
                torch.testing.assert_close(taken, least, atol=1e-4, rtol=1e-5)
                mine -= entries[picks]  # a view: what the coarse entries leave


def test_vectors_that_do_not_fit_are_refused() -> None:
    books = ResidualBooks(torch.randn(2, 16, 8), torch.randn(4, 16, 4), None)
    with pytest.raises(ValueError, match=r"fp32 \(n, 16\), given torch.float32 \(3, 15\)"):
        encode_residual(torch.randn(3, 15), books)
    with pytest.raises(ValueError, match=r"given torch\.bfloat16"):
        encode_residual(torch.randn(3, 16).bfloat16(), books)


def test_threads_change_no_bit() -> None:
    books = ResidualBooks(torch.randn(2, 512, 8), torch.randn(4, 64, 4), None)
    codes = random_codes(20_000, books.code_bytes)
    once = cpu.decode_residual(codes, books)
    again = cpu.encode_residual(once, books)
    torch.set_num_threads(3)
    assert torch.equal(cpu.decode_residual(codes, books), once)
    assert torch.equal(cpu.encode_residual(once, books), again)


def test_autocast_does_not_round() -> None:
    rotation = torch.linalg.qr(torch.randn(16, 16))[0].contiguous()
    books = ResidualBooks(torch.randn(2, 16, 8), torch.randn(4, 16, 4), rotation)
    codes = random_codes(9, books.code_bytes)
    want = decode_residual(codes, books)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decode_residual(codes, books), want)
        assert torch.equal(
            reference.decode_residual(codes, books).float(), reference.decode_residual(codes, books)
        )


def test_codes_and_books_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \(n, 10\)"):
        decode_int8(random_codes(3, 9), 8)
    with pytest.raises(ValueError, match="different widths"):
        ResidualBooks(torch.randn(2, 16, 8), torch.randn(4, 16, 5), None)
    with pytest.raises(ValueError, match="a power of two"):
        ResidualBooks(torch.randn(2, 17, 8), torch.randn(4, 16, 4), None)
    with pytest.raises(ValueError, match="not d x d"):
        ResidualBooks(torch.randn(2, 16, 8), torch.randn(4, 16, 4), torch.eye(15))
