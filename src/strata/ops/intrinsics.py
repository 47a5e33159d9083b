"""What kernels are written with, and numba lacks: bf16 and fp8 as bits, prefetching, noise.

Importing this needs numba; `strata.ops.kernels` does without where there is none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Sums may be reordered into vectors; NaN and infinity keep their meaning.
compiled = njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)

# numba computes with 64-bit integers unless each step is cast back, and that halves the vectors.
_HALF, _ONE = np.uint32(16), np.uint32(1)
_NAN = np.uint32(0x7FC00000)


def store(row: Any, column: Any, number: Any, noise: Any) -> None:
    """In a kernel: row[column] = number, rounded where the row is bf16 bits.

    Args:
        row: one row of a table.
        column: place in it.
        number: fp32 or fp64.
        noise: from `row_noise`; 0 rounds to nearest even, others stochastically.
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
        builder.call(function, [pointer, i32(0), i32(2), i32(1)])  # a read, into L2, data
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


def _spread(builder: Any, value: Any) -> Any:
    """A vector of 16 times the same value."""
    nothing = ir.Constant(ir.VectorType(value.type, 16), ir.Undefined)
    one = builder.insert_element(nothing, value, ir.IntType(32)(0))
    return builder.shuffle_vector(
        one, nothing, ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16)
    )


def _compare_16(compare_name: str, relation: str) -> Any:
    """An intrinsic (address, bound): which of 16 numbers stand in a relation to the bound.

    The result has a bit for each number, the first one's lowest.
    """

    @intrinsic
    def compare(_context: Any, address: Any, bound: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            vector = ir.VectorType(arguments[1].type, 16)
            pointer = builder.inttoptr(arguments[0], vector.as_pointer())
            numbers = builder.load(pointer, align=bound.bitwidth // 8)
            found = getattr(builder, compare_name)(
                relation, numbers, _spread(builder, arguments[1])
            )
            return builder.zext(builder.bitcast(found, ir.IntType(16)), ir.IntType(64))

        return types.uint64(types.uintp, bound), generate

    return compare


not_below_16 = _compare_16("fcmp_unordered", ">=")  # true for NaN


@intrinsic
def num_ones(_context: Any, bits: Any) -> Any:
    """How many of 64 bits are set."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def lowest_one(_context: Any, bits: Any) -> Any:
    """Place of the lowest of 64 bits that is set; one must be."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.uint64), generate


@intrinsic
def rank_16(_context: Any, address: Any, count: Any, first: Any, number: Any, ranks: Any) -> Any:
    """Places of 16 numbers, first..first + 15, in the descending order of `count` of them.

    Equal numbers stand in the order they come in; none may be NaN. `number` is any number of the
    same type; `ranks` is the address of 16 int32, to write to.
    """
    if not isinstance(number, types.Float):
        return None
    element_bytes = number.bitwidth // 8
    i32, i64 = ir.IntType(32), ir.IntType(64)
    places = ir.VectorType(i32, 16)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, count, first, number, ranks = arguments
        lanes = ir.VectorType(number.type, 16)

        def at(index: Any, kind: Any) -> Any:
            offset = builder.mul(index, i64(element_bytes))
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        mine = builder.load(at(first, lanes), align=element_bytes)
        own_place = builder.add(
            _spread(builder, builder.trunc(first, i32)), ir.Constant(places, list(range(16)))
        )
        before = builder.block
        loop, done = builder.append_basic_block("rank"), builder.append_basic_block("rank_done")
        builder.branch(loop)
        builder.position_at_end(loop)
        j, rank = builder.phi(i64), builder.phi(places)
        other = _spread(builder, builder.load(at(j, number.type), align=element_bytes))
        earlier = builder.icmp_signed("<", _spread(builder, builder.trunc(j, i32)), own_place)
        equal = builder.fcmp_ordered("==", other, mine)
        beats = builder.or_(builder.fcmp_ordered(">", other, mine), builder.and_(equal, earlier))
        rank_next = builder.sub(rank, builder.sext(beats, places))
        j_next = builder.add(j, i64(1))
        for phi, start, then in (
            (j, i64(0), j_next),
            (rank, ir.Constant(places, [0] * 16), rank_next),
        ):
            phi.add_incoming(start, before)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", j_next, count), loop, done)
        builder.position_at_end(done)
        builder.store(rank_next, builder.inttoptr(ranks, places.as_pointer()), align=4)
        return _context.get_dummy_value()

    return types.void(types.uintp, types.intp, types.intp, number, types.uintp), generate


@overload(store)
def _compiled_store(row, column, number, noise):  # type: ignore[no-untyped-def]
    def plain(row, column, number, noise):  # type: ignore[no-untyped-def]
        row[column] = number

    def rounded(row, column, number, noise):  # type: ignore[no-untyped-def]
        bits = bits_of(np.float32(number))
        # bf16 is the upper half of fp32: add something below 2^16, then cut the lower half off.
        if noise == 0:
            below = np.uint32(np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> _HALF) & _ONE))
        else:
            # Multiply-add hashing: pairs of columns are independent, over rows and seeds.
            factor, shift = np.uint32(noise >> np.uint64(32)), np.uint32(noise)
            below = np.uint32(np.uint32(np.uint32(column * factor) + shift) >> _HALF)
        # Infinity cannot carry, a NaN could carry into the sign.
        sum_bits = np.uint32(bits + below) if number == number else _NAN
        row[column] = np.uint16(np.uint32(sum_bits >> _HALF))

    return rounded if row.dtype == types.uint16 else plain


# A tile's sums stay in registers: 24 of 16 numbers each where a processor has 32 of that size.
TILE_ROWS = 6
TILE_WIDTH = 64 if get_host_cpu_features().get("avx512f") else 16


@intrinsic
def tile_product(  # type: ignore[no-untyped-def]
    _context, left, left_stride, right, right_stride, depth, out, out_stride
):
    """out[i, j] = sum over c < depth of left[i, c] * right[c, j], i < TILE_ROWS, j < TILE_WIDTH.

    All fp32; left, right and out are addresses, strides are numbers from row to row. Each result
    is one chain of multiply-adds in the order of c, so it does not depend on its place in a tile.
    """
    number, i64 = ir.FloatType(), ir.IntType(64)
    lanes = ir.VectorType(number, 16)
    places = [(i, j) for i in range(TILE_ROWS) for j in range(TILE_WIDTH // 16)]
    fused = ("contract",)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        left, left_stride, right, right_stride, depth, out, out_stride = arguments

        def at(base: Any, element: Any, kind: Any) -> Any:
            address = builder.add(base, builder.shl(element, i64(2)))
            return builder.inttoptr(address, kind.as_pointer())

        before = builder.block
        loop, done = builder.append_basic_block("tile"), builder.append_basic_block("tile_done")
        builder.branch(loop)
        builder.position_at_end(loop)
        c = builder.phi(i64)
        c.add_incoming(i64(0), before)
        sums = {place: builder.phi(lanes) for place in places}
        row = builder.mul(c, right_stride)
        columns = [
            builder.load(at(right, builder.add(row, i64(16 * j)), lanes), align=4)
            for j in range(TILE_WIDTH // 16)
        ]
        for i in range(TILE_ROWS):
            element = builder.add(builder.mul(i64(i), left_stride), c)
            factor = _spread(builder, builder.load(at(left, element, number), align=4))
            for j, column in enumerate(columns):
                old = sums[i, j]
                product = builder.fmul(factor, column, flags=fused)
                old.add_incoming(ir.Constant(lanes, [0.0] * 16), before)
                old.add_incoming(builder.fadd(old, product, flags=fused), loop)
        c_next = builder.add(c, i64(1))
        c.add_incoming(c_next, loop)
        builder.cbranch(builder.icmp_signed("<", c_next, depth), loop, done)
        builder.position_at_end(done)
        for (i, j), sum_ in sums.items():
            element = builder.add(builder.mul(i64(i), out_stride), i64(16 * j))
            builder.store(sum_.incomings[1][0], at(out, element, lanes), align=4)
        return _context.get_dummy_value()

    whole = types.intp
    return types.void(types.uintp, whole, types.uintp, whole, whole, types.uintp, whole), generate


@compiled
def row_noise(seed: Any, row: Any) -> Any:
    """What `store` draws a row's noise from, uint64: 0 for seed 0, not 0 for any other.

    The splitmix64 finalizer of (seed, row), both uint64. Its halves make the noise of a column by
    one multiplication in 32 bits, which is cheap in vectors where 64 bits are not.
    """
    if seed == 0:
        return np.uint64(0)
    state = seed * np.uint64(0xD1B54A32D192ED03) + row * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) | np.uint64(1)


@compiled
def prefetch_row(base: Any, row: Any, row_bytes: Any) -> None:
    """Ask for all cache lines of a row of a table that starts at address `base`."""
    start = base + np.uint64(row) * np.uint64(row_bytes)
    for offset in range(0, row_bytes, 64):
        prefetch(start + np.uint64(offset))
