"""One step of a datapath, on floats that carry its numbers exactly: scalar functions for CPU loops and CUDA kernels.

A sum is formed in a carrier (float32 or float64) and then rounded to the accumulator's grid. That is one rounding of
the exact sum, because of one of these:

    exact   all addends are multiples of 2^L and the sum stays below 2^(L + 24) (float32) or 2^(L + 53) (float64)
    short   rounding to nearest, addends of at most p bits, p those of the accumulator, and 2 p + 2 <= 24 or 53: where
            the sum has more bits than the carrier, the smaller addend is too small to move the other off a tie
    odd     the carrier's sum is rounded to odd (TwoSum gives the error), and has two bits more than the accumulator

A number x of exponent e is rounded to a multiple of u = 2^(max(e, e_min) - M) by adding and subtracting 1.5 u 2^F, F
the carrier's fraction bits: the processor's own rounding to nearest even does it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.core import types
from numba.extending import intrinsic, overload

from accel.kernels.jit import scalar
from accel.words import bits_of, float_of

EXPONENT_32, EXPONENT_64 = np.uint32(0x7F800000), np.uint64(0x7FF << 52)
SIGN_32, SIGN_64 = np.uint32(1 << 31), np.uint64(1 << 63)
MINUS_ONE = np.uint64((1 << 64) - 1)


class Grid(NamedTuple):
    """An accumulator's format with subnormals and one mantissa bit or more, in numbers of the carrier.

    least: 2^e_min. top: 2^e_max. shifter: 1.5 2^(F - M). unit: 2^-M. largest: finite number; a rounded number beyond
    becomes `beyond`, an infinite one `infinite`, with its sign. up, down: 2^(E - e_max), E the carrier's largest
    exponent, and its inverse: a number times both is infinite from 2^(e_max + 1) on, and else what it was.
    """

    least: Any
    top: Any
    shifter: Any
    unit: Any
    largest: Any
    beyond: Any
    infinite: Any
    up: Any
    down: Any


def fused(a: Any, b: Any, c: Any) -> Any:
    """a b + c where the product is exact: with one rounding."""
    return a * b + c


@intrinsic
def _fused(typing_context, a, b, c):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return a(a, a, a), emit


@overload(fused)
def _overload_fused(a, b, c):  # type: ignore[no-untyped-def]
    return lambda a, b, c: _fused(a, b, c)


def power_below(x: Any) -> Any:
    """2^e of x = 1.f 2^e: its bits without sign and fraction. Zero for subnormal x, infinity for NaN."""
    return float_of(bits_of(x) & (EXPONENT_32 if x.dtype == np.float32 else EXPONENT_64))


@overload(power_below)
def _power_below(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: float_of(np.uint32(bits_of(x) & EXPONENT_32))
    return lambda x: float_of(np.uint64(bits_of(x) & EXPONENT_64))


def with_sign(magnitude: Any, x: Any) -> Any:
    """A number that is not negative, or has the sign of x, with the sign of x."""
    return float_of(bits_of(magnitude) | bits_of(x) & (SIGN_32 if x.dtype == np.float32 else SIGN_64))


@overload(with_sign)
def _with_sign(magnitude, x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda magnitude, x: float_of(np.uint32(bits_of(magnitude) | np.uint32(bits_of(x) & SIGN_32)))
    return lambda magnitude, x: float_of(np.uint64(bits_of(magnitude) | np.uint64(bits_of(x) & SIGN_64)))


@scalar
def to_nearest(x, grid):  # type: ignore[no-untyped-def]
    """x on the grid, ties to even, without a limit; x is finite."""
    power = power_below(x)
    power = power if power > grid.least else grid.least
    shifted = fused(power, grid.shifter, x)
    return with_sign(fused(power, -grid.shifter, shifted), x)


@scalar
def to_nearest_or_beyond(x, grid):  # type: ignore[no-untyped-def]
    """The same for any x; what lies beyond the format stays beyond it, and infinite what is so."""
    power = power_below(x)
    power = power if power < grid.top else grid.top
    power = power if power > grid.least else grid.least
    shifted = fused(power, grid.shifter, x)
    return with_sign(fused(power, -grid.shifter, shifted), x)


@scalar
def to_infinity(rounded, grid):  # type: ignore[no-untyped-def]
    """Numbers from 2^(e_max + 1) on as infinite: the limit of formats whose last binade is full, as in IEEE 754."""
    return rounded * grid.up * grid.down


@scalar
def to_largest(rounded, grid):  # type: ignore[no-untyped-def]
    """Numbers beyond the largest as the largest; NaN stays NaN."""
    rounded = grid.largest if rounded > grid.largest else rounded
    return -grid.largest if rounded < -grid.largest else rounded


@scalar
def to_zero(x, grid):  # type: ignore[no-untyped-def]
    """x on the grid, toward zero, without a limit; x is finite."""
    power = power_below(x)
    power = power if power > grid.least else grid.least
    shifted = fused(power, grid.shifter, x)
    magnitude = abs(fused(power, -grid.shifter, shifted))
    magnitude = magnitude - power * grid.unit if magnitude > abs(x) else magnitude
    return with_sign(magnitude, x)


@scalar
def limited(rounded, x, grid):  # type: ignore[no-untyped-def]
    """What the format makes of x, whose multiple on the grid is `rounded`: within its range, and for x not finite."""
    real = type(x)
    rounded = with_sign(grid.beyond, x) if abs(rounded) > grid.largest else rounded
    return with_sign(grid.infinite, x) if abs(x) == real(np.inf) else rounded


@scalar
def odd_sum(a, b):  # type: ignore[no-untyped-def]
    """a + b in float64, rounded to odd: where inexact, the neighbour whose last bit is 1."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    word = bits_of(total)
    is_inexact = ((error > 0.0) | (error < 0.0)) & ((word & np.uint64(1)) == np.uint64(0))
    step = np.uint64(1) if (error > 0.0) == (total > 0.0) else MINUS_ONE
    return float_of(np.uint64(word + (step if is_inexact else np.uint64(0))))
