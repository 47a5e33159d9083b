"""What kernels are written with, and numba lacks: bf16 and fp8 as bits, prefetching, noise.

Importing this needs numba; `strata.ops.kernels` does without where there is none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Sums may be reordered into vectors; NaN and infinity keep their meaning.
compiled = njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)


def store(row: Any, column: Any, number: Any, seed: Any, row_number: Any) -> None:
    """In a kernel: row[column] = number, rounded where the row is bf16 bits.

    Args:
        row: one row of a table.
        column: place in it.
        number: fp32 or fp64.
        seed: uint64; 0 rounds to nearest even, others stochastically.
        row_number: uint64, names the noise together with seed and column.
    """
    raise NotImplementedError("only inside kernels")


@intrinsic
def prefetch(_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address; nothing else happens, whatever the address."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        i32 = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32]),
            "llvm.prefetch.p0",
        )
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])  # a read, keep it, data
        return context.get_dummy_value()

    return types.void(types.uintp), generate


@intrinsic
def widen(_context: Any, element: Any) -> Any:
    """bf16 bits (uint16), fp8 e4m3 bits (uint8) and int8 to fp32; other elements as they are.

    fp8: shifted by 7 bits, exponent and mantissa are those of an fp16 that is 2^8 too small, its
    subnormals included. The two NaN codes become +-480.
    """
    if element not in (types.uint16, types.uint8, types.int8):
        return element(element), lambda _c, _b, _s, arguments: arguments[0]
    i16, i32 = ir.IntType(16), ir.IntType(32)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if element == types.int8:
            return builder.sitofp(value, ir.FloatType())
        if element == types.uint16:
            bits = builder.shl(builder.zext(value, i32), i32(16))
            return builder.bitcast(bits, ir.FloatType())
        wide = builder.zext(value, i16)
        sign = builder.shl(builder.and_(wide, i16(0x80)), i16(8))
        rest = builder.shl(builder.and_(wide, i16(0x7F)), i16(7))
        small = builder.fpext(
            builder.bitcast(builder.or_(sign, rest), ir.HalfType()), ir.FloatType()
        )
        return builder.fmul(small, ir.FloatType()(256.0))

    return types.float32(element), generate


@intrinsic
def bits_of(_context: Any, number: Any) -> Any:
    """The 32 bits of an fp32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@overload(store)
def _compiled_store(row, column, number, seed, row_number):  # type: ignore[no-untyped-def]
    def plain(row, column, number, seed, row_number):  # type: ignore[no-untyped-def]
        row[column] = number

    def rounded(row, column, number, seed, row_number):  # type: ignore[no-untyped-def]
        bits = bits_of(np.float32(number))
        # bf16 is the upper half of fp32: add something below 2^16, then cut the lower half off.
        if seed == 0:
            below = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        else:
            below = np.uint32(noise(seed, row_number, np.uint64(column)) >> np.uint64(48))
        # Infinities and NaN have all exponent bits set, and would carry into the sign.
        if (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000):
            below = np.uint32(0)
            if number != number:
                bits = np.uint32(0x7FC00000)
        row[column] = np.uint16((bits + below) >> np.uint32(16))

    return rounded if row.dtype == types.uint16 else plain


@compiled
def noise(seed: Any, row: Any, column: Any) -> Any:
    """64 random bits named by three numbers: two rounds of the splitmix64 finalizer."""
    state = seed + row * np.uint64(0x9E3779B97F4A7C15) + column * np.uint64(0xD1B54A32D192ED03)
    for _ in range(2):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


@compiled
def prefetch_row(base: Any, row: Any, row_bytes: Any) -> None:
    """Ask for all cache lines of a row of a table that starts at address `base`."""
    start = base + np.uint64(row) * np.uint64(row_bytes)
    for offset in range(0, row_bytes, 64):
        prefetch(start + np.uint64(offset))
