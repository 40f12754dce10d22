"""Arithmetic of the softmax, two columns an instruction where the machine has one for it."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import nvvm
from cutlass.cutlass_dsl import dsl_user_op

from .tiles import PAIRS_PER_UNIT

# Adding it rounds a number in (-2^22, 2^22) to an integer, which stands in the low bits of the sum.
ROUND = float(2**23 + 2**22)
MANTISSA_BITS = 23
SMALLEST_EXPONENT = -127.0  # the float with exponent bits 0 and mantissa 0 is 0
# 2^f = 1 + f (c0 + f (c1 + f (c2 + f c3))) on [0, 1), relative error below 3.0e-6: a Remez exchange
# that holds the value at 0, so that powers of two are exact. A cubic, with 8.6e-5, would do for P,
# which is rounded to 16 bits, but not for the log-sum-exp.
QUARTIC = (0.6930448412895203, 0.241280198097229, 0.052242472767829895, 0.013426683843135834)


@dsl_user_op
def max3(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """The greatest of three numbers; NaN counts for nothing."""
    a, b, c = (Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c))
    return Float32(nvvm.fmax(a, b, c=c, loc=loc, ip=ip))


@cute.jit
def row_max(row: cute.Tensor, start: Float32) -> Float32:
    """The greatest of `start` and a row of 2 n values: up to four chains that overlap."""
    chains = [start] + [-Float32.inf] * (min(4, cute.size(row) // 2) - 1)
    for i in cutlass.range_constexpr(0, cute.size(row), 2):
        j = i // 2 % len(chains)
        chains[j] = max3(chains[j], row[i], row[i + 1])
    largest = chains[0]
    for chain in chains[1:]:
        largest = cute.arch.fmax(largest, chain)
    return largest


def start_sums(start: Float32) -> list:
    """Four chains of partial sums, two columns wide, of which one starts with `start`."""
    zero = Float32(0.0)
    return [(start, zero), (zero, zero), (zero, zero), (zero, zero)]


def add_to_sums(sums: list, row: cute.Tensor, first_pair: int) -> list:
    """The chains after the values of some more pairs of columns."""
    sums = list(sums)
    for i in range(0, cute.size(row), 2):
        chain = (first_pair + i // 2) % len(sums)
        sums[chain] = cute.arch.add_packed_f32x2(sums[chain], (row[i], row[i + 1]))
    return sums


def total_of(sums: list) -> Float32:
    """The sum of all values, in an order that depends on their number alone."""
    left = cute.arch.add_packed_f32x2(sums[0], sums[1])
    right = cute.arch.add_packed_f32x2(sums[2], sums[3])
    total = cute.arch.add_packed_f32x2(left, right)
    return total[0] + total[1]


@cute.jit
def scale_and_shift(row: cute.Tensor, scale: Float32, shift: Float32):
    """row <- row * scale - shift, in place."""
    for i in cutlass.range_constexpr(0, cute.size(row), 2):
        row[i], row[i + 1] = cute.arch.fma_packed_f32x2(
            (row[i], row[i + 1]), (scale, scale), (-shift, -shift)
        )


@cute.jit
def exp2_row(row: cute.Tensor, first_pair: int, emulated_pairs: int):
    """row <- 2^row, in place; `emulated_pairs` of every 16 pairs on the FMA units.

    Which pairs depends on their columns alone: `first_pair` is the number of pairs before the row.
    """
    for i in cutlass.range_constexpr(0, cute.size(row), 2):
        if cutlass.const_expr(is_emulated(first_pair + i // 2, emulated_pairs)):
            row[i], row[i + 1] = exp2_by_fma(row[i], row[i + 1])
        else:
            row[i] = cute.math.exp2(row[i], fastmath=True)
            row[i + 1] = cute.math.exp2(row[i + 1], fastmath=True)


def is_emulated(pair: int, emulated_pairs: int) -> bool:
    """Whether a pair of columns is among those spread evenly over each unit."""
    place = pair % PAIRS_PER_UNIT
    return (place + 1) * emulated_pairs // PAIRS_PER_UNIT > place * emulated_pairs // PAIRS_PER_UNIT


@cute.jit
def exp2_by_fma(x: Float32, y: Float32):
    """(2^x, 2^y) for x, y <= 127: a polynomial in the fraction, the integer added to the exponent.

    -inf and everything below -127 give a number below 2^-126, and exactly 0 at -127 and -inf.
    """
    low = (cute.arch.fmax(x, SMALLEST_EXPONENT), cute.arch.fmax(y, SMALLEST_EXPONENT))
    rounded = cute.arch.add_packed_f32x2(low, (ROUND, ROUND), rnd="rm")
    floor = cute.arch.sub_packed_f32x2(rounded, (ROUND, ROUND))
    f = cute.arch.sub_packed_f32x2(low, floor)
    c0, c1, c2, c3 = ((coefficient, coefficient) for coefficient in QUARTIC)
    power = cute.arch.fma_packed_f32x2(c3, f, c2)
    power = cute.arch.fma_packed_f32x2(power, f, c1)
    power = cute.arch.fma_packed_f32x2(power, f, c0)
    power = cute.arch.fma_packed_f32x2(power, f, (1.0, 1.0))
    return _add_to_exponent(power[0], rounded[0]), _add_to_exponent(power[1], rounded[1])


@dsl_user_op
def _add_to_exponent(power: Float32, rounded: Float32, *, loc=None, ip=None) -> Float32:
    """power * 2^n, n the integer in the low bits of `rounded`."""
    bits = Int32(Float32(power).bitcast(Int32)) + (
        Int32(Float32(rounded).bitcast(Int32)) << MANTISSA_BITS
    )
    return bits.bitcast(Float32)
