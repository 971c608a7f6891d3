"""From a value to its tag and code, and back: the scalar functions that the loops of the CPU and of the GPU share."""

from __future__ import annotations

import numpy as np

from accel.codecs.codec import NEGATIVE_ALPHA, POSITIVE_ALPHA, VALUE
from accel.kernels.jit import scalar
from accel.rounding import value_of
from accel.words import bits_of, float_of

MAGNITUDE, INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
SIGN_SHIFT = np.uint32(31)
NO_CODE, NO_DRAW = np.uint32(0), np.uint32(0)
NOT_A_NUMBER = np.float32(np.nan)


def coded(value, scale, p):  # type: ignore[no-untyped-def]
    """The code of value / scale, in float32 or float64 as `scale` is; a NaN has no sign."""
    quotient = value / scale
    quotient = quotient if quotient == quotient else scale * NOT_A_NUMBER
    return np.uint32(transform(quotient, NO_DRAW, p))  # noqa: F821


@scalar
def decoded(code, factor, v):  # type: ignore[no-untyped-def]
    """What a code stands for, times the scale."""
    return np.float32(np.float32(value_of(code, v)) * factor)


@scalar
def pattern_code(value, draw, p):  # type: ignore[no-untyped-def]
    """The code of a float32 number in float32."""
    return bits_of(value)


@scalar
def pattern_decoded(code, factor, v):  # type: ignore[no-untyped-def]
    """The reverse; factor is 1."""
    return float_of(np.uint32(code))


@scalar
def is_misfit(given, decoded, alpha_bits):  # type: ignore[no-untyped-def]
    """Whether a value has no code, from its pattern and its decoded code's. alpha_bits: of +alpha, or of a NaN."""
    magnitude = np.uint32(given & MAGNITUDE)
    both_nan = (magnitude > INFINITY) & (np.uint32(decoded & MAGNITUDE) > INFINITY)
    return (given != decoded) & (not both_nan) & (magnitude != alpha_bits)


@scalar
def tag_of(given, alpha_bits, tags_alpha):  # type: ignore[no-untyped-def]
    """The tag of a nonzero, from its pattern."""
    is_alpha = np.uint32(given & MAGNITUDE) == alpha_bits
    return np.uint8(POSITIVE_ALPHA + np.uint32(given >> SIGN_SHIFT)) if is_alpha & tags_alpha else VALUE


@scalar
def code_with_alpha(code, given, alpha_bits, tags_alpha, alpha_code, sign_code):  # type: ignore[no-untyped-def]
    """The code of a nonzero; of +-alpha the one that the format reserves, or 0 where the tag tells all."""
    lifted = NO_CODE if tags_alpha else np.uint32(alpha_code | (sign_code if given >> SIGN_SHIFT else NO_CODE))
    return lifted if np.uint32(given & MAGNITUDE) == alpha_bits else code


@scalar
def value_with_alpha(value, tag, code, alpha, has_alpha_codes, alpha_code, sign_code):  # type: ignore[no-untyped-def]
    """The value of a nonzero that its tag or its code may say to be +-alpha."""
    is_negative = (tag == NEGATIVE_ALPHA) | (has_alpha_codes & (code == np.uint32(alpha_code | sign_code)))
    is_positive = (tag == POSITIVE_ALPHA) | (has_alpha_codes & (code == alpha_code))
    positive = alpha if is_positive else value
    return -alpha if is_negative else positive
