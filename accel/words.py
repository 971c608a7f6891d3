"""Floats as bit patterns: the same names for float32 on uint32 and for float64 on uint64.

The widths are told apart when a caller is compiled, and shift counts are masked to them: knowing that a count is below
the width keeps a shift in lanes of that width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from accel.kernels.jit import scalar

LAST_BIT_32 = np.uint32(31)
LAST_BIT_64 = np.uint64(63)
LOW_WORD, WORD_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)
FRACTION_32, FRACTION_64 = np.uint32((1 << 23) - 1), np.uint64((1 << 52) - 1)
LEAST_POWER_32, LEAST_POWER_64 = np.uint32(1 << 23), np.uint64(1 << 52)
TWICE_BIAS_32, TWICE_BIAS_64 = np.uint32(254 << 23), np.uint64(2046 << 52)


def bits_of(value: Any) -> Any:
    """The bit pattern of a float: uint32 or uint64."""
    return value.view(np.uint32 if value.dtype == np.float32 else np.uint64)


def float_of(bits: Any) -> Any:
    """The float of a bit pattern."""
    return bits.view(np.float32 if bits.dtype == np.uint32 else np.float64)


def top_bit(word: Any) -> Any:
    """The first bit of a word, as 0 or 1."""
    return type(word)(word >> (31 if word.dtype == np.uint32 else 63))


def inverse_power(value: Any) -> Any:
    """1 / value for a power of two whose inverse is a normal number (see `has_exact_inverse`)."""
    return type(value)(1) / value


def product(word: Any, factor: Any) -> Any:
    """(high, low) of a 32-bit word times a 32-bit factor, which is a uint64, as words of the same type.

    In uint64, the high half of the word is ignored and that of `low` holds anything.
    """
    whole = np.uint64(word & LOW_WORD) * factor
    return type(word)(whole >> WORD_BITS), type(word)(whole & LOW_WORD)


def has_exact_inverse(value: Any) -> bool:
    """Whether a positive float is a normal power of two with a normal inverse: x / value is then x * (1 / value)."""
    mantissa, exponent = np.frexp(value)
    return bool(mantissa == 0.5 and abs(exponent - 1) <= (126 if value.dtype == np.float32 else 1022))


def right(word: Any, count: Any) -> Any:
    """word >> count, for counts below the width."""
    return type(word)(word >> count)


def left(word: Any, count: Any) -> Any:
    """word << count within the width, for counts below it."""
    return type(word)(word << count)


@overload(bits_of)
def _bits_of(value):  # type: ignore[no-untyped-def]
    if value == types.float32:
        return lambda value: np.float32(value).view(np.uint32)
    return lambda value: np.float64(value).view(np.uint64)


@overload(float_of)
def _float_of(bits):  # type: ignore[no-untyped-def]
    if bits == types.uint32:
        return lambda bits: np.uint32(bits).view(np.float32)
    return lambda bits: np.uint64(bits).view(np.float64)


@overload(inverse_power)
def _inverse_power(value):  # type: ignore[no-untyped-def]
    if value == types.float32:
        return lambda value: np.uint32(TWICE_BIAS_32 - np.float32(value).view(np.uint32)).view(np.float32)
    return lambda value: np.uint64(TWICE_BIAS_64 - np.float64(value).view(np.uint64)).view(np.float64)


@overload(product)
def _product(word, factor):  # type: ignore[no-untyped-def]
    if word == types.uint32:

        def halves(word, factor):  # type: ignore[no-untyped-def]
            whole = np.uint64(word) * factor
            return np.uint32(whole >> WORD_BITS), np.uint32(whole)
    else:

        def halves(word, factor):  # type: ignore[no-untyped-def]
            whole = factor * (word & LOW_WORD)
            return whole >> WORD_BITS, whole

    return halves


@overload(has_exact_inverse)
def _has_exact_inverse(value):  # type: ignore[no-untyped-def]
    if value == types.float32:

        def check(value):  # type: ignore[no-untyped-def]
            bits = np.float32(value).view(np.uint32)
            return (bits & FRACTION_32) == 0 and bits >= LEAST_POWER_32 and bits <= TWICE_BIAS_32 - LEAST_POWER_32
    else:

        def check(value):  # type: ignore[no-untyped-def]
            bits = np.float64(value).view(np.uint64)
            return (bits & FRACTION_64) == 0 and bits >= LEAST_POWER_64 and bits <= TWICE_BIAS_64 - LEAST_POWER_64

    return check


@overload(right)
def _right(word, count):  # type: ignore[no-untyped-def]
    if word == types.uint32:
        return lambda word, count: np.uint32(np.uint32(word) >> np.uint32(np.uint32(count) & LAST_BIT_32))
    return lambda word, count: np.uint64(np.uint64(word) >> np.uint64(np.uint64(count) & LAST_BIT_64))


@overload(left)
def _left(word, count):  # type: ignore[no-untyped-def]
    if word == types.uint32:
        return lambda word, count: np.uint32(np.uint32(word) << np.uint32(np.uint32(count) & LAST_BIT_32))
    return lambda word, count: np.uint64(np.uint64(word) << np.uint64(np.uint64(count) & LAST_BIT_64))


@overload(top_bit)
def _top_bit(word):  # type: ignore[no-untyped-def]
    if word == types.uint32:
        return lambda word: np.uint32(np.uint32(word) >> LAST_BIT_32)
    return lambda word: np.uint64(np.uint64(word) >> LAST_BIT_64)


@scalar
def carry(a, b):  # type: ignore[no-untyped-def]
    """1 where a + b leaves the width, else 0. Comparing the sum with a would keep a loop from vectorising."""
    word = type(a)
    total = word(a + b)
    out = word(word(a & b) | word(word(a | b) & word(~total)))
    return top_bit(out)
