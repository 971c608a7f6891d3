"""Rounding into a format, pruning, and the code of a value: each written once, as scalar functions on bit patterns.

`parameters(fmt, ...)` turns a Format into the few run-time numbers that the functions need, so that a new format
compiles nothing. A rounding function returns the magnitude in two forms, one for normal and one for subnormal results;
`finish` makes the value of them and `code_of` the code.

Nearest-even: a normal result adds half a unit to the bit pattern and truncates it; a subnormal one is the last bits of
``|x| + magic``, with ``magic = 2^(min_exponent + 23 - M)``, whose unit in the last place is the smallest number.
Stochastic: |x| in units of the last kept bit, with 32 fraction bits, plus a random word, truncated.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from accel.formats import Format
from accel.kernels.jit import scalar

SIGN = np.uint32(0x80000000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)
FRACTION = np.uint32(0x007FFFFF)
HIDDEN = np.uint32(0x00800000)
ONE = np.uint32(1)
ZERO = np.uint32(0)
LAST_BIT = np.uint32(31)
EXPONENT_SHIFT = np.uint32(23)
WORD_BITS = np.uint64(32)
LONGEST_SHIFT = np.uint32(63)
FLOAT_ZERO = np.float32(0)
INFINITE = np.float32(np.inf)
NOT_A_NUMBER = np.float32(np.nan)
EPS_SHIFT = np.uint32(8)
EPS_UNIT = np.float32(2.0**-24)

ROUNDINGS = ("nearest_even", "stochastic")
OVERFLOWS = ("saturate", "ieee")


class Parameters(NamedTuple):
    """A format as the scalar functions see it (see `parameters`)."""

    shift: np.uint32  # discarded fraction bits of a normal number, 23 - M
    lsb: np.uint32  # 1, or 0 when nothing is discarded
    half: np.uint32  # half of the discarded unit, minus one (0 when nothing is discarded)
    keep: np.uint32  # mask of the kept bits
    word_shift: np.uint32  # random word to the discarded field of a normal number
    word_mask: np.uint32  # and the bits of it that `random_bits` leaves
    word_mask_32: np.uint32  # the same for a field of 32 bits
    subnormal_shift: np.uint32  # discarded bits of a number below min_normal, plus its float32 exponent field
    min_normal: np.float32
    prescale: np.float32  # 1; 2^-64 where magic would leave float32; 0 flushes subnormal inputs
    magic: np.float32  # the float32 whose unit in the last place is the smallest number (times prescale)
    step: np.float32  # the smallest positive number
    max: np.float32
    overflow: np.float32  # what replaces a result beyond max
    flush_below: np.float32  # results below become zero
    signed_from: np.uint32  # added to a magnitude, sets the top bit where a sign is kept: from 0, or from 1 without -0
    code_offset: np.uint32  # float32 exponent bias minus the format's, in units of a code
    step_shift: np.uint32  # smallest number to its code: 0, or M without subnormals
    sign_shift: np.uint32  # from float32's sign bit to the format's
    max_code: np.uint32
    overflow_code: np.uint32  # what replaces a code beyond max_code
    flush_below_code: np.uint32
    nan_code: np.uint32
    infinity_code: np.uint32  # this and the next: for decoding, 2^32 - 1 where the format has none
    negative_zero_nan: np.uint32
    last_number_code: np.uint32  # the last magnitude that is a number or an infinity
    min_normal_code: np.uint32


@cache
def parameters(
    fmt: Format, overflow: str = "saturate", random_bits: int = 32, flush_subnormals: bool | str = False
) -> Parameters:
    """The run-time numbers of `fmt` under an overflow policy, a random-word width and a flush rule."""
    shift = 23 - fmt.mantissa_bits
    below_shift = shift if fmt.subnormals else 23
    magic_exponent = fmt.min_exponent + below_shift
    prescale_exponent = 64 if magic_exponent > 127 else 0
    flush_input, flush_output = flush_subnormals in (True, "input"), flush_subnormals in (True, "output")
    min_normal = fmt.min_normal if fmt.min_exponent <= 127 else np.inf
    beyond, beyond_code = fmt.max, fmt.max_code
    if overflow == "ieee" and fmt.infinity_code is not None:
        beyond, beyond_code = np.inf, fmt.infinity_code
    elif overflow == "ieee" and fmt.nan_code is not None:
        beyond, beyond_code = np.nan, fmt.nan_code
    absent = 0xFFFFFFFF
    kept_word_bits = min(random_bits, shift)
    u32, f32 = np.uint32, np.float32
    return Parameters(
        shift=u32(shift),
        lsb=u32(1 if shift and fmt.mantissa_bits else 0),
        half=u32((1 << shift >> 1) - (1 if fmt.mantissa_bits else 0) if shift else 0),
        keep=u32(0xFFFFFFFF ^ ((1 << shift) - 1)),
        word_shift=u32(32 - shift if shift else 31),
        word_mask=u32(((1 << kept_word_bits) - 1) << (shift - kept_word_bits)),
        word_mask_32=u32(((1 << random_bits) - 1) << (32 - random_bits)),
        subnormal_shift=u32(1000 if flush_input else below_shift + fmt.min_exponent + 127),
        min_normal=f32(min_normal),
        prescale=f32(0 if flush_input else 2.0**-prescale_exponent),
        magic=f32(2.0 ** (magic_exponent - prescale_exponent)),
        step=f32(fmt.min_subnormal),
        max=f32(fmt.max),
        overflow=f32(beyond),
        flush_below=f32(min_normal if flush_output else 0),
        signed_from=u32(0x80000000 if fmt.has_negative_zero else 0x7FFFFFFF),
        code_offset=u32((127 - fmt.bias) << fmt.mantissa_bits & 0xFFFFFFFF),
        step_shift=u32(0 if fmt.subnormals else fmt.mantissa_bits),
        sign_shift=u32(32 - fmt.bits),
        max_code=u32(fmt.max_code),
        overflow_code=u32(beyond_code),
        flush_below_code=u32(min(1 << fmt.mantissa_bits, fmt.max_code + 1) if flush_output else 0),
        nan_code=u32(fmt.nan_code or 0),
        infinity_code=u32(absent if fmt.infinity_code is None else fmt.infinity_code),
        negative_zero_nan=u32(absent if fmt.has_negative_zero else fmt.nan_code or 0),
        last_number_code=u32(fmt.max_code if fmt.infinity_code is None else fmt.infinity_code),
        min_normal_code=u32(1 << fmt.mantissa_bits),
    )


@scalar
def bits_of(value):  # type: ignore[no-untyped-def]
    return np.float32(value).view(np.uint32)


@scalar
def float_of(bits):  # type: ignore[no-untyped-def]
    return np.uint32(bits).view(np.float32)


@scalar
def right(word, count):  # type: ignore[no-untyped-def]
    """word >> count, for counts below 32: the mask tells the compiler so, and it stays in 32-bit lanes."""
    return np.uint32(np.uint32(word) >> np.uint32(count & LAST_BIT))


@scalar
def left(word, count):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(word) << np.uint32(count & LAST_BIT))


@scalar
def round_nearest_even(x, p):  # type: ignore[no-untyped-def]
    """Round |x| to nearest, ties to even. Returns (pattern, steps), of which one holds:

    where |x| >= min_normal, the float32 bit pattern whose bits above the discarded ones are the result's;
    where |x| < min_normal, the result in units of the smallest number.
    """
    bits = np.uint32(bits_of(x) & MAGNITUDE)
    lowest = np.uint32(right(bits, p.shift) & p.lsb)
    shifted = np.float32(np.float32(float_of(bits) * p.prescale) + p.magic)
    return np.uint32(np.uint32(bits + p.half) + lowest), np.uint32(bits_of(shifted) - bits_of(p.magic))


@scalar
def round_stochastic(x, word, p):  # type: ignore[no-untyped-def]
    """Round |x| up with the probability of its discarded fraction, by a random word: (pattern, steps) as above."""
    bits = np.uint32(bits_of(x) & MAGNITUDE)
    pattern = np.uint32(bits + np.uint32(right(word, p.word_shift) & p.word_mask))
    field = right(bits, EXPONENT_SHIFT)
    significand = np.uint32(np.uint32(bits & FRACTION) | (HIDDEN if field > ZERO else ZERO))
    exponent = field if field > ZERO else ONE
    discarded = np.uint32(p.subnormal_shift - exponent)
    discarded = discarded if discarded < LONGEST_SHIFT else LONGEST_SHIFT
    steps = np.uint64(np.uint64(np.uint64(significand) << WORD_BITS) >> np.uint64(discarded))
    return pattern, np.uint32(np.uint64(steps + np.uint64(word & p.word_mask_32)) >> WORD_BITS)


@scalar
def finish(pattern, steps, x, p):  # type: ignore[no-untyped-def]
    """The format's value for x, rounded to (pattern, steps): float32, with overflow, flushing, NaN and sign applied."""
    bits = bits_of(x)
    magnitude = np.uint32(bits & MAGNITUDE)
    subnormal = np.float32(np.float32(np.int32(steps)) * p.step)
    rounded = subnormal if float_of(magnitude) < p.min_normal else float_of(pattern & p.keep)
    rounded = p.overflow if rounded > p.max else rounded
    rounded = bits_of(FLOAT_ZERO if rounded < p.flush_below else rounded)
    sign = np.uint32(np.uint32(bits & SIGN) & np.uint32(rounded + p.signed_from))
    return np.float32(x if magnitude > INFINITY else float_of(rounded | sign))


@scalar
def code_of(pattern, steps, x, p):  # type: ignore[no-untyped-def]
    """The code, sign included, of the value that `finish` returns: uint32."""
    bits = bits_of(x)
    magnitude = np.uint32(bits & MAGNITUDE)
    normal = np.uint32(right(pattern, p.shift) - p.code_offset)
    code = left(steps, p.step_shift) if float_of(magnitude) < p.min_normal else normal
    code = p.overflow_code if code > p.max_code else code
    code = ZERO if code < p.flush_below_code else code
    code = p.nan_code if magnitude > INFINITY else code
    sign = np.uint32(np.uint32(bits & SIGN) & np.uint32(code + p.signed_from))
    return np.uint32(code | right(sign, p.sign_shift))


@scalar
def value_of(code, p):  # type: ignore[no-untyped-def]
    """The value of a code: float32. The inverse of `code_of`."""
    word = left(code, p.sign_shift)
    sign = np.uint32(word & SIGN)
    steps = right(word & MAGNITUDE, p.sign_shift)
    normal = float_of(left(steps + p.code_offset, p.shift))
    subnormal = np.float32(np.float32(np.int32(right(steps, p.step_shift))) * p.step)
    magnitude = np.float32(subnormal if steps < p.min_normal_code else normal)
    magnitude = INFINITE if steps == p.infinity_code else magnitude
    magnitude = NOT_A_NUMBER if steps > p.last_number_code else magnitude
    magnitude = NOT_A_NUMBER if np.uint32(code) == p.negative_zero_nan else magnitude
    return float_of(bits_of(magnitude) | np.uint32(sign & np.uint32(bits_of(magnitude) + p.signed_from)))


@scalar
def prune_stochastic(x, word, alpha):  # type: ignore[no-untyped-def]
    """The operator T: x where |x| >= alpha, else sign(x) alpha with probability |x| / alpha, else 0.

    eps = (word >> 8) 2^-24 in [0, 1); alpha eps is one float32 product. Zeros become +0, NaN stays NaN.
    """
    bits = bits_of(x)
    magnitude = float_of(bits & MAGNITUDE)
    eps = np.float32(np.float32(right(word, EPS_SHIFT)) * EPS_UNIT)
    lifted = float_of(np.uint32(bits & SIGN) | bits_of(alpha))
    small = lifted if magnitude >= np.float32(alpha * eps) else FLOAT_ZERO
    pruned = small if magnitude < alpha else x
    return np.float32(FLOAT_ZERO if magnitude == FLOAT_ZERO else pruned)
