"""The definition of rounding, codes and values, for every format and mode: scalar functions on bit patterns.

`parameters(fmt, ...)` turns a Format into the run-time numbers that the functions need, so that a new format compiles
nothing. The functions are written for words of either width: 32 bits for float32, 64 for float64 (and for float32
values of formats whose normal numbers begin below float32's own).

|x| is rounded to a magnitude code in integers alone: a word whose last `discarded` bits are rounded away is the bit
pattern of |x| where the result is normal (it counts the codes, from some offset on), and its significand where it is
subnormal (it counts steps of the smallest number). Nothing here depends on how the processor treats float subnormals.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from accel.formats import POLICIES, Format
from accel.kernels.jit import scalar
from accel.words import bits_of, carry, float_of, left, right

ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic")
OVERFLOWS = ("saturate", "ieee")
FLUSHES = (False, True, "input", "output")

EPS_SHIFT = np.uint32(8)
EPS_UNIT = np.float32(2.0**-24)
SIGN_32 = np.uint32(0x80000000)
MAGNITUDE_32 = np.uint32(0x7FFFFFFF)
FLOAT_ZERO = np.float32(0)
LEAST = np.float32(2.0**-149)  # the smallest float32 that is not zero


class Parameters(NamedTuple):
    """A format, a rounding mode and an overflow policy as the scalar functions see them (see `parameters`).

    Words are uint32 or uint64, reals float32 or float64. A magnitude code beyond `last_number` stands for NaN.
    """

    # the carrier
    one: Any
    sign: Any  # mask of the sign bit, and of all others
    magnitude: Any
    infinity: Any
    fraction: Any  # mask of the fraction, and the hidden bit above it
    hidden: Any
    exponent_shift: Any
    word_bits: Any
    draw_shift: Any  # from a 32-bit random word to the top of a word
    # rounding
    flush_input_below: Any  # patterns below become zero
    normal_from: Any  # pattern of the smallest normal number
    shift: Any  # discarded bits of a normal number
    subnormal_shift: Any  # discarded bits of a subnormal number, plus its exponent field
    longest_shift: Any
    positive_up: Any  # masks: what is added to the discarded bits is all ones,
    negative_up: Any
    half: Any  # or one less than half a unit,
    tie: Any  # and one more where a tie goes up: where the kept word is odd after these two changes
    normal_xor: Any
    normal_or: Any
    subnormal_or: Any
    draw_mask: Any  # the bits of a random word that are drawn
    # from the kept word to a magnitude code
    code_offset: Any
    step_shift: Any  # smallest number to its code: 0, or M without subnormals
    scale_offset: Any  # 1 where code 0 is the smallest number and not zero
    flush_output_below: Any
    last_positive: Any  # codes beyond are replaced by the four that follow
    last_negative: Any
    beyond_positive: Any
    beyond_negative: Any
    infinite_positive: Any
    infinite_negative: Any
    least_magnitude: Any  # patterns below and beyond infinity become NaN,
    negative_is_nan: Any  # and negative ones where this is 1
    # from a magnitude code to the code
    nan_code: Any
    negate_xor: Any  # the code of -v is ((code of v) ^ xor + add) & mask
    negate_add: Any
    code_mask: Any
    negative_from: Any  # codes and patterns of magnitudes below have no negative: 0, or 1 without -0
    # from a code to the value
    sign_code: Any
    negative_zero_nan: Any  # the code of -0 where it means NaN, else beyond all codes
    value_offset: Any  # normal codes to the carrier's exponents
    normal_code: Any  # the smallest normal number
    step: Any
    smallest: Any  # the value of code 0
    infinity_code: Any
    last_number: Any


@cache
def parameters(
    fmt: Format,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    random_bits: int = 32,
    flush_subnormals: bool | str = False,
    wide: bool = False,
) -> Parameters:
    """The run-time numbers of `fmt` under a rounding mode, an overflow policy, a draw width and a flush rule.

    wide: for words of 64 bits. Formats whose normal numbers begin below 2^-126 must be wide.
    """
    width, fraction_bits, carrier_bias = (64, 52, 1023) if wide else (32, 23, 127)
    word, real = (np.uint64, np.float64) if wide else (np.uint32, np.float32)
    every = (1 << width) - 1
    is_scale = fmt.policy == "scale"

    # A scale format rounds to nearest as ml_dtypes and torch do: as if code 0 were zero and not its smallest number.
    is_shifted = is_scale and rounding != "nearest_even"
    min_exponent = fmt.min_exponent + (1 if is_scale and not is_shifted else 0)
    bias = fmt.bias + (1 if is_shifted else 0)
    shift = fraction_bits - fmt.mantissa_bits
    below_shift = shift if fmt.subnormals else fraction_bits
    normal_field = min_exponent + carrier_bias
    infinite_field = (1 << (width - 1 - fraction_bits)) - 1
    min_normal_field = fmt.min_exponent + carrier_bias
    code_offset = (carrier_bias - bias) << fmt.mantissa_bits

    nearest = rounding in ("nearest_even", "nearest_away")
    even_powers = fmt.mantissa_bits == 0 and fmt.policy == "p3109"
    ties_up = rounding == "nearest_away"
    powers_up = fmt.mantissa_bits == 0 and not even_powers

    is_twos_complement = fmt.policy == "integer" and fmt.signed
    last_negative = fmt.max_code + is_twos_complement if fmt.signed else 0
    nan_mark = every >> 1
    infinite = fmt.infinity_code if fmt.infinity_code is not None else nan_mark if fmt.has_nan else None
    beyond = {}
    for side, last, up in (("positive", fmt.max_code, "up"), ("negative", last_negative, "down")):
        replacement = last if overflow == "saturate" or infinite is None else infinite
        if side == "negative" and not fmt.signed and replacement != last:
            replacement = nan_mark if fmt.has_nan else last
        stops = rounding == "toward_zero" or (rounding in ("up", "down") and rounding != up)
        beyond[side] = last if stops else replacement
        beyond["infinite_" + side] = replacement

    has_subnormals = fmt.policy not in ("integer", "scale")
    flush_input = has_subnormals and flush_subnormals in (True, "input")
    flush_output = has_subnormals and flush_subnormals in (True, "output")
    absent = every
    return Parameters(
        one=word(1),
        sign=word(1 << (width - 1)),
        magnitude=word(every >> 1),
        infinity=word(infinite_field << fraction_bits),
        fraction=word((1 << fraction_bits) - 1),
        hidden=word(1 << fraction_bits),
        exponent_shift=word(fraction_bits),
        word_bits=word(width),
        draw_shift=word(width - 32),
        flush_input_below=word(min(min_normal_field, infinite_field) << fraction_bits if flush_input else 0),
        normal_from=word(min(normal_field, infinite_field) << fraction_bits),
        shift=word(shift),
        subnormal_shift=word(below_shift + normal_field),
        longest_shift=word(2 * width - 1 if rounding == "stochastic" else fraction_bits + 2),
        positive_up=word(every if rounding == "up" else 0),
        negative_up=word(every if rounding == "down" else 0),
        half=word(every if nearest else 0),
        tie=word(1 if nearest else 0),
        normal_xor=word(code_offset & 1 if even_powers else 0),
        normal_or=word(1 if ties_up or powers_up else 0),
        subnormal_or=word(1 if ties_up else 0),
        draw_mask=word(((1 << random_bits) - 1) << (width - random_bits)),
        code_offset=word(code_offset & every),
        step_shift=word(0 if fmt.subnormals else fmt.mantissa_bits),
        scale_offset=word(1 if is_shifted else 0),
        flush_output_below=word(min(1 << fmt.mantissa_bits, fmt.max_code + 1) if flush_output else 0),
        last_positive=word(fmt.max_code),
        last_negative=word(last_negative),
        beyond_positive=word(beyond["positive"]),
        beyond_negative=word(beyond["negative"]),
        infinite_positive=word(beyond["infinite_positive"]),
        infinite_negative=word(beyond["infinite_negative"]),
        least_magnitude=word(1 if is_scale else 0),
        negative_is_nan=word(1 if is_scale else 0),
        nan_code=word(fmt.nan_code or 0),
        negate_xor=word((1 << fmt.bits) - 1 if is_twos_complement else fmt.sign_code),
        negate_add=word(1 if is_twos_complement else 0),
        code_mask=word((1 << fmt.bits) - 1),
        negative_from=word(0 if fmt.has_negative_zero else 1),
        sign_code=word(fmt.sign_code),
        negative_zero_nan=word(fmt.sign_code if POLICIES[fmt.policy].nan == "negative_zero" else absent),
        value_offset=word((carrier_bias - fmt.bias) << fmt.mantissa_bits & every),
        normal_code=word(1 << fmt.mantissa_bits if not is_scale else 1),
        step=real(fmt.min_subnormal),
        smallest=real(0.0 if fmt.has_zero else fmt.min_normal),
        infinity_code=word(absent if fmt.infinity_code is None else fmt.infinity_code),
        last_number=word(max(fmt.max_code, last_negative) if fmt.infinity_code is None else fmt.infinity_code),
    )


def needs_wide(fmt: Format) -> bool:
    """Whether float32 values of `fmt` are rounded in 64-bit words: its normal numbers begin below float32's."""
    return fmt.min_exponent < -126


@scalar
def rounding_word(magnitude, p):  # type: ignore[no-untyped-def]
    """(is normal, word, discarded): the word that counts codes or steps, and how many of its last bits go."""
    word = type(p.one)
    field = right(magnitude, p.exponent_shift)
    hidden = p.hidden if field > word(0) else word(0)
    exponent = field if field > word(0) else p.one
    significand = word(word(magnitude & p.fraction) | hidden)
    is_normal = magnitude >= p.normal_from
    discarded = p.shift if is_normal else word(p.subnormal_shift - exponent)
    discarded = discarded if discarded < p.longest_shift else p.longest_shift
    return is_normal, magnitude if is_normal else significand, discarded


@scalar
def round_deterministic(magnitude, is_negative, p):  # type: ignore[no-untyped-def]
    """The magnitude code of |x| in the five modes that draw nothing, before overflow."""
    word = type(p.one)
    is_normal, x, discarded = rounding_word(magnitude, p)
    unit_less_one = word(left(p.one, discarded) - p.one)
    kept = right(x, discarded)
    odd = word(word(kept ^ p.normal_xor) | p.normal_or) if is_normal else word(kept | p.subnormal_or)
    ties_up = word(word(odd & unit_less_one) & p.tie)
    away = word(unit_less_one & (p.negative_up if is_negative else p.positive_up))
    to_nearest = word(word(right(unit_less_one, p.one) & p.half) + ties_up)
    kept = right(word(x + word(away + to_nearest)), discarded)
    return word(kept - p.code_offset) if is_normal else left(kept, p.step_shift)


@scalar
def round_stochastic(magnitude, draw, p):  # type: ignore[no-untyped-def]
    """The magnitude code of |x| where a 32-bit draw is added to the first 32 bits of what is discarded, and carries."""
    word = type(p.one)
    is_normal, x, discarded = rounding_word(magnitude, p)
    is_short = discarded < p.word_bits
    short = left(word(x << p.one), word(p.word_bits - p.one - discarded))
    fraction = short if is_short else right(x, word(discarded - p.word_bits))
    kept = right(x, discarded) if is_short else word(0)
    drawn = word(left(word(draw), p.draw_shift) & p.draw_mask)
    kept = word(kept + carry(fraction, drawn))
    return word(kept - p.code_offset) if is_normal else left(kept, p.step_shift)


@scalar
def limited(code, magnitude, is_negative, p):  # type: ignore[no-untyped-def]
    """The magnitude code after overflow, flushing and NaN."""
    word = type(p.one)
    code = word((code if code > p.scale_offset else p.scale_offset) - p.scale_offset)
    beyond = p.beyond_negative if is_negative else p.beyond_positive
    infinite = p.infinite_negative if is_negative else p.infinite_positive
    beyond = infinite if magnitude == p.infinity else beyond
    code = beyond if code > (p.last_negative if is_negative else p.last_positive) else code
    code = word(0) if code < p.flush_output_below else code
    is_nan = (magnitude > p.infinity) | (magnitude < p.least_magnitude) | (is_negative & (p.negative_is_nan != word(0)))
    return p.magnitude if is_nan else code


@scalar
def magnitude_and_sign(x, p):  # type: ignore[no-untyped-def]
    word, real = type(p.one), type(p.step)
    bits = bits_of(real(x))
    magnitude = word(bits & p.magnitude)
    magnitude = word(0) if magnitude < p.flush_input_below else magnitude
    return magnitude, word(bits & p.sign) != word(0)


@scalar
def assembled(code, is_negative, p):  # type: ignore[no-untyped-def]
    """The code, sign included, of a magnitude code."""
    word = type(p.one)
    is_negative = is_negative & (code >= p.negative_from)
    negated = word(word(word(code ^ p.negate_xor) + p.negate_add) & p.code_mask)
    full = negated if is_negative else code
    return np.uint32(p.nan_code if code > p.last_number else full)


@scalar
def value_of_magnitude(code, is_negative, p):  # type: ignore[no-untyped-def]
    word, real = type(p.one), type(p.step)
    normal = float_of(left(word(code + p.value_offset), p.shift))
    subnormal = real(real(np.int32(right(code, p.step_shift))) * p.step)
    subnormal = p.smallest if code == word(0) else subnormal
    value = subnormal if code < p.normal_code else normal
    value = real(np.inf) if code == p.infinity_code else value
    value = real(np.nan) if code > p.last_number else value
    bits = bits_of(real(value))
    is_negative = is_negative & (bits >= p.negative_from)
    return float_of(word(bits | (p.sign if is_negative else word(0))))


@scalar
def nearest_code(x, draw, p):  # type: ignore[no-untyped-def]
    """The code of x in a mode that draws nothing."""
    magnitude, is_negative = magnitude_and_sign(x, p)
    code = limited(round_deterministic(magnitude, is_negative, p), magnitude, is_negative, p)
    return assembled(code, is_negative, p)


@scalar
def stochastic_code(x, draw, p):  # type: ignore[no-untyped-def]
    """The code of x, rounded by a draw."""
    magnitude, is_negative = magnitude_and_sign(x, p)
    code = limited(round_stochastic(magnitude, draw, p), magnitude, is_negative, p)
    return assembled(code, is_negative, p)


@scalar
def nearest_value(x, draw, p):  # type: ignore[no-untyped-def]
    """The format's value for x in a mode that draws nothing. NaN stays NaN."""
    magnitude, is_negative = magnitude_and_sign(x, p)
    code = limited(round_deterministic(magnitude, is_negative, p), magnitude, is_negative, p)
    return value_of_magnitude(code, is_negative, p)


@scalar
def stochastic_value(x, draw, p):  # type: ignore[no-untyped-def]
    """The format's value for x, rounded by a draw. NaN stays NaN."""
    magnitude, is_negative = magnitude_and_sign(x, p)
    code = limited(round_stochastic(magnitude, draw, p), magnitude, is_negative, p)
    return value_of_magnitude(code, is_negative, p)


@scalar
def value_of(code, p):  # type: ignore[no-untyped-def]
    """The value of a code, NaN for the codes that are no number (the alpha codes among them)."""
    word = type(p.one)
    full = word(code)
    is_negative = word(full & p.sign_code) != word(0)
    magnitude = word(word(word(full ^ p.negate_xor) + p.negate_add) & p.code_mask) if is_negative else full
    magnitude = p.magnitude if full == p.negative_zero_nan else magnitude
    return value_of_magnitude(magnitude, is_negative, p)


@scalar
def prune_stochastic(x, draw, alpha):  # type: ignore[no-untyped-def]
    """The operator T: x where |x| >= alpha, else sign(x) alpha with probability |x| / alpha, else 0.

    eps = (draw >> 8) 2^-24 in [0, 1); alpha eps is one float32 product. Zeros become +0, NaN stays NaN.
    """
    bits = bits_of(np.float32(x))
    magnitude = float_of(np.uint32(bits & MAGNITUDE_32))
    eps = np.float32(np.float32(right(draw, EPS_SHIFT)) * EPS_UNIT)
    lifted = float_of(np.uint32(np.uint32(bits & SIGN_32) | bits_of(np.float32(alpha))))
    reached = np.float32(alpha * eps)
    reached = LEAST if reached < LEAST else reached
    small = lifted if magnitude >= reached else FLOAT_ZERO
    kept_from = LEAST if alpha < LEAST else alpha
    return np.float32(small if magnitude < kept_from else x)
