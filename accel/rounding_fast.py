"""Nearest-even and stochastic rounding of float32 into common formats: the results of `rounding`, in half the steps.

Ordinary are signed floating-point formats whose normal numbers float32 has too (`is_fast`). A rounding function returns
the magnitude in two forms, one for normal and one for subnormal results; `finish` makes the value of them and `code_of`
the code.

Nearest-even: a normal result adds half a unit to the bit pattern and truncates it; a subnormal one is the last bits of
``|x| + magic``, with ``magic = 2^(min_exponent + 23 - M)``, whose unit in the last place is the smallest number.
Where float32 has room above the format's largest number (`is_narrow`), both are one step: the magnitude is
``(|x| + s) - s`` with ``s = 1.5 * 2^(e + 23 - M)``, 2^e being the power of two below |x| or the smallest normal number.
Stochastic: the draw is added to the discarded bits; for a subnormal result |x| is counted in steps of the smallest
number, exactly, and the first 32 bits of the fraction are the discarded ones.

Integers (policy `integer`, to nearest even) have a form of their own: x, limited to the format's range, plus
``magic = 1.5 * 2^23`` steps is the integer in its last bits, in two's complement.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from accel.formats import Format
from accel.kernels.jit import scalar
from accel.words import bits_of, float_of, left, right

SIGN = np.uint32(0x80000000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)
ZERO, ONE = np.uint32(0), np.uint32(1)
FLOAT_ZERO = np.float32(0)
NOT_A_NUMBER = np.float32(np.nan)
TWO_TO_THE_32 = np.float32(2.0**32)

FAST_ROUNDINGS = ("nearest_even", "stochastic")


class FastParameters(NamedTuple):
    """A format as the scalar functions see it (see `fast_parameters`)."""

    shift: np.uint32  # discarded fraction bits of a normal number, 23 - M
    lsb: np.uint32  # 1, or 0 when nothing is discarded
    half: np.uint32  # half of the discarded unit, minus one (0 when nothing is discarded)
    keep: np.uint32  # mask of the kept bits
    draw_shift: np.uint32  # random word to the discarded field of a normal number
    draw_mask: np.uint32  # and the bits of it that are drawn
    draw_mask_32: np.uint32  # the same for a field of 32 bits
    rest_mask_32: np.uint32  # and the bits of that field that are not drawn
    min_normal: np.float32
    magic: np.float32  # the float32 whose unit in the last place is the smallest number
    steps_1: np.float32  # their product counts |x| in steps of the smallest number
    steps_2: np.float32
    step: np.float32  # the smallest positive number
    max: np.float32
    overflow: np.float32  # what replaces a result beyond max
    limit: np.float32  # the power of two above max
    shifter: np.uint32  # added to the pattern of 2^e: 1.5 * 2^(e + 23 - M), whose unit in the last place is 2^(e - M)
    signed_from: np.uint32  # added to a magnitude, sets the top bit where a sign is kept: from 0, or from 1 without -0
    code_offset: np.uint32  # float32 exponent bias minus the format's, in units of a code
    step_shift: np.uint32  # smallest number to its code: 0, or M without subnormals
    sign_shift: np.uint32  # from float32's sign bit to the format's
    max_code: np.uint32
    overflow_code: np.uint32  # what replaces a code beyond max_code
    nan_code: np.uint32


class IntegerParameters(NamedTuple):
    """An integer format as the scalar functions see it (see `integer_parameters`)."""

    low: np.float32  # the format's range
    high: np.float32
    magic: np.float32  # 1.5 * 2^23 steps
    code_mask: np.uint32


def is_fast_integer(fmt: Format, rounding: str) -> bool:
    """Whether the integer functions round float32 values into `fmt` in this mode."""
    is_in_range = -126 <= fmt.min_exponent - fmt.mantissa_bits <= 127 - 24
    return fmt.policy == "integer" and rounding == "nearest_even" and fmt.mantissa_bits <= 21 and is_in_range


@cache
def integer_parameters(fmt: Format) -> IntegerParameters:
    """The run-time numbers of an integer format."""
    magic = np.float32(1.5 * 2**23 * fmt.min_subnormal)
    return IntegerParameters(np.float32(fmt.min), np.float32(fmt.max), magic, np.uint32((1 << fmt.bits) - 1))


def is_fast(fmt: Format, rounding: str, flush_subnormals: bool | str) -> bool:
    """Whether these functions round float32 values into `fmt` in this mode."""
    even_powers = fmt.mantissa_bits == 0 and fmt.policy == "p3109"
    is_ordinary = fmt.signed and fmt.policy not in ("integer", "scale") and not even_powers
    is_in_range = -126 <= fmt.min_exponent <= 127 - 23
    return rounding in FAST_ROUNDINGS and not flush_subnormals and is_ordinary and is_in_range


def is_narrow(fmt: Format) -> bool:
    """Whether `fmt`, one that `is_fast`, leaves float32 room for a shifter above its largest number."""
    has_room = fmt.max_exponent + 25 - fmt.mantissa_bits <= 127
    return fmt.subnormals and has_room and fmt.mantissa_bits <= 21


@cache
def fast_parameters(fmt: Format, overflow: str = "saturate", random_bits: int = 32) -> FastParameters:
    """The run-time numbers of `fmt` under an overflow policy and a draw width."""
    shift = 23 - fmt.mantissa_bits
    below_shift = shift if fmt.subnormals else 23
    magic_exponent = fmt.min_exponent + below_shift
    step_exponent = magic_exponent - 23
    beyond, beyond_code = fmt.max, fmt.max_code
    if overflow == "ieee" and fmt.infinity_code is not None:
        beyond, beyond_code = np.inf, fmt.infinity_code
    elif overflow == "ieee" and fmt.nan_code is not None:
        beyond, beyond_code = np.nan, fmt.nan_code
    kept_bits = min(random_bits, shift)
    u32, f32 = np.uint32, np.float32
    return FastParameters(
        shift=u32(shift),
        lsb=u32(1 if shift and fmt.mantissa_bits else 0),
        half=u32((1 << shift >> 1) - (1 if fmt.mantissa_bits else 0) if shift else 0),
        keep=u32(0xFFFFFFFF ^ ((1 << shift) - 1)),
        draw_shift=u32(32 - shift if shift else 31),
        draw_mask=u32(((1 << kept_bits) - 1) << (shift - kept_bits)),
        draw_mask_32=u32(((1 << random_bits) - 1) << (32 - random_bits)),
        rest_mask_32=u32((1 << (32 - random_bits)) - 1),
        min_normal=f32(fmt.min_normal),
        magic=f32(2.0**magic_exponent),
        steps_1=f32(2.0 ** (-step_exponent // 2)),
        steps_2=f32(2.0 ** (-step_exponent - -step_exponent // 2)),
        step=f32(fmt.min_subnormal),
        max=f32(fmt.max),
        overflow=f32(beyond),
        limit=f32(2.0 ** min(fmt.max_exponent + 1, 127)),
        shifter=u32((shift << 23) + (1 << 22)),
        signed_from=u32(0x80000000 if fmt.has_negative_zero else 0x7FFFFFFF),
        code_offset=u32((127 - fmt.bias) << fmt.mantissa_bits & 0xFFFFFFFF),
        step_shift=u32(0 if fmt.subnormals else fmt.mantissa_bits),
        sign_shift=u32(32 - fmt.bits),
        max_code=u32(fmt.max_code),
        overflow_code=u32(beyond_code),
        nan_code=u32(fmt.nan_code or 0),
    )


@scalar
def round_nearest_even(x, p):  # type: ignore[no-untyped-def]
    """Round |x| to nearest, ties to even. Returns (pattern, steps), of which one holds:

    where |x| >= min_normal, the float32 bit pattern whose bits above the discarded ones are the result's;
    where |x| < min_normal, the result in units of the smallest number.
    """
    bits = np.uint32(bits_of(x) & MAGNITUDE)
    lowest = np.uint32(right(bits, p.shift) & p.lsb)
    shifted = np.float32(float_of(bits) + p.magic)
    return np.uint32(np.uint32(bits + p.half) + lowest), np.uint32(bits_of(shifted) - bits_of(p.magic))


@scalar
def drawn_pattern(x, draw, p):  # type: ignore[no-untyped-def]
    """The pattern of |x| with the drawn bits added to those that a normal result discards."""
    return np.uint32(np.uint32(bits_of(x) & MAGNITUDE) + np.uint32(right(draw, p.draw_shift) & p.draw_mask))


@scalar
def round_stochastic(x, draw, p):  # type: ignore[no-untyped-def]
    """Round |x| up with the probability of its discarded fraction, by a random word: (pattern, steps) as above."""
    small = float_of(np.uint32(bits_of(x) & MAGNITUDE))
    small = small if small < p.min_normal else FLOAT_ZERO
    units = np.float32(np.float32(small * p.steps_1) * p.steps_2)
    whole = np.int32(units)
    fraction = np.uint32(np.float32(np.float32(units - np.float32(whole)) * TWO_TO_THE_32))
    largest_kept = np.uint32(np.uint32(draw | p.rest_mask_32) ^ p.draw_mask_32)
    return drawn_pattern(x, draw, p), np.uint32(np.uint32(whole) + (ONE if fraction > largest_kept else ZERO))


@scalar
def finish(pattern, steps, x, p):  # type: ignore[no-untyped-def]
    """The format's value for x, rounded to (pattern, steps): float32, with overflow, NaN and sign applied."""
    bits = bits_of(x)
    magnitude = np.uint32(bits & MAGNITUDE)
    subnormal = np.float32(np.float32(np.int32(steps)) * p.step)
    rounded = subnormal if float_of(magnitude) < p.min_normal else float_of(np.uint32(pattern & p.keep))
    return signed_value(rounded, bits, p)


@scalar
def signed_value(rounded, bits, p):  # type: ignore[no-untyped-def]
    """The rounded magnitude with overflow, NaN and sign of the x whose pattern is `bits` applied."""
    rounded = bits_of(p.overflow if rounded > p.max else rounded)
    sign = np.uint32(np.uint32(bits & SIGN) & np.uint32(rounded + p.signed_from))
    value = float_of(np.uint32(rounded | sign))
    return np.float32(NOT_A_NUMBER if np.uint32(bits & MAGNITUDE) > INFINITY else value)


@scalar
def code_of(pattern, steps, x, p):  # type: ignore[no-untyped-def]
    """The code, sign included, of the value that `finish` returns: uint32."""
    bits = bits_of(x)
    magnitude = np.uint32(bits & MAGNITUDE)
    normal = np.uint32(right(pattern, p.shift) - p.code_offset)
    code = left(steps, p.step_shift) if float_of(magnitude) < p.min_normal else normal
    code = p.overflow_code if code > p.max_code else code
    code = p.nan_code if magnitude > INFINITY else code
    sign = np.uint32(np.uint32(bits & SIGN) & np.uint32(code + p.signed_from))
    return np.uint32(code | right(sign, p.sign_shift))


@scalar
def fast_nearest_value(x, draw, p):  # type: ignore[no-untyped-def]
    pattern, steps = round_nearest_even(x, p)
    return finish(pattern, steps, x, p)


@scalar
def fast_narrow_value(x, draw, p):  # type: ignore[no-untyped-def]
    bits = bits_of(x)
    magnitude = float_of(np.uint32(bits & MAGNITUDE))
    limited = p.limit if magnitude > p.limit else magnitude
    power = float_of(np.uint32(bits_of(limited) & INFINITY))
    power = p.min_normal if power < p.min_normal else power
    shifter = float_of(np.uint32(bits_of(power) + p.shifter))
    rounded = np.float32(np.float32(limited + shifter) - shifter)
    return signed_value(rounded, bits, p)


@scalar
def fast_stochastic_value(x, draw, p):  # type: ignore[no-untyped-def]
    pattern, steps = round_stochastic(x, draw, p)
    return finish(pattern, steps, x, p)


@scalar
def fast_stochastic_normal_value(x, draw, p):  # type: ignore[no-untyped-def]
    """`fast_stochastic_value` of zeros and of |x| >= min_normal."""
    return signed_value(float_of(np.uint32(drawn_pattern(x, draw, p) & p.keep)), bits_of(x), p)


@scalar
def fast_nearest_code(x, draw, p):  # type: ignore[no-untyped-def]
    pattern, steps = round_nearest_even(x, p)
    return code_of(pattern, steps, x, p)


@scalar
def fast_stochastic_code(x, draw, p):  # type: ignore[no-untyped-def]
    pattern, steps = round_stochastic(x, draw, p)
    return code_of(pattern, steps, x, p)


@scalar
def shifted_integer(x, p):  # type: ignore[no-untyped-def]
    """x, limited and rounded, plus magic."""
    limited = p.low if x < p.low else x
    limited = p.high if limited > p.high else limited
    return np.float32(limited + p.magic)


@scalar
def fast_integer_value(x, draw, p):  # type: ignore[no-untyped-def]
    return np.float32(shifted_integer(x, p) - p.magic)


@scalar
def fast_integer_code(x, draw, p):  # type: ignore[no-untyped-def]
    code = np.uint32(np.uint32(bits_of(shifted_integer(x, p)) - bits_of(p.magic)) & p.code_mask)
    return np.uint32(0) if np.uint32(bits_of(x) & MAGNITUDE) > INFINITY else code
