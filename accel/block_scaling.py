"""The scale of a block, from its largest magnitude: scalar functions on bit patterns (see accel/block_formats.py)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from accel.block_formats import SCALE_RULES, BlockFormat
from accel.kernels.jit import scalar
from accel.rounding import Parameters, assembled, limited, parameters, round_deterministic, value_of_magnitude
from accel.words import bits_of, float_of, left, right

MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)
FRACTION = np.uint32(0x007FFFFF)
HIDDEN = np.uint32(0x00800000)
EXPONENT_SHIFT = np.uint32(23)
BIAS = np.int32(127)
SUBNORMAL_BIAS = np.int32(127 + 149)
NONE, ONE = np.int32(0), np.int32(1)
LEAST_NORMAL = np.int32(-126)

FLOOR, CEIL, EVEN, RCEIL, AMAX = (np.int32(number) for number in range(len(SCALE_RULES)))
_NUMBERS = dict(zip(SCALE_RULES, (FLOOR, CEIL, EVEN, RCEIL, AMAX), strict=True))


class BlockParameters(NamedTuple):
    """How a block format's scale follows from amax (see `block_parameters`)."""

    rule: np.int32
    emax: np.int32  # floor(log2(element.max))
    element_max: np.float32
    half_unit: np.uint32  # half of the element's last place, in amax's bit pattern
    lowest: np.int32  # exponents that the scale's format holds, and its bias
    highest: np.int32
    bias: np.int32
    least: np.float32  # least scale of the rule amax
    nan_code: np.uint32


@cache
def block_parameters(fmt: BlockFormat) -> BlockParameters:
    """The run-time numbers of a block format's scale rule."""
    element, scale = fmt.element, fmt.scale
    significand_bits = element.mantissa_bits if element.exponent_bits else element.mantissa_bits - 1
    return BlockParameters(
        rule=_NUMBERS[fmt.scale_rule],
        emax=np.int32(element.max_exponent),
        element_max=np.float32(element.max),
        half_unit=np.uint32(1 << (23 - significand_bits) >> 1),
        lowest=np.int32(-scale.bias),
        highest=np.int32(scale.max_exponent),
        bias=np.int32(scale.bias),
        least=np.float32(scale.min_normal),
        nan_code=np.uint32(scale.nan_code or 0),
    )


@cache
def scale_parameters(fmt: BlockFormat) -> Parameters:
    """The scale's own format, as `amax_scale` rounds into it."""
    return parameters(fmt.scale)


@scalar
def exponent_and_fraction(bits):  # type: ignore[no-untyped-def]
    """(e, f) of a positive float32 2^e (1 + f / 2^23), also a subnormal one, by its pattern; (128, .) for infinity."""
    normalised = bits_of(np.float32(np.int32(bits)))  # a subnormal is an integer times 2^-149
    is_subnormal = bits < HIDDEN
    pattern = normalised if is_subnormal else bits
    bias = SUBNORMAL_BIAS if is_subnormal else BIAS
    return np.int32(np.int32(right(pattern, EXPONENT_SHIFT)) - bias), np.uint32(pattern & FRACTION)


@scalar
def power_of_two_scale(amax, b):  # type: ignore[no-untyped-def]
    """(scale, its code) of a block whose largest magnitude has the bit pattern `amax`, for the power-of-two rules."""
    rounded = np.uint32(amax + (b.half_unit if (b.rule == EVEN) & (amax < INFINITY) else np.uint32(0)))
    quotient = bits_of(np.float32(float_of(amax) / b.element_max))
    exponent, fraction = exponent_and_fraction(quotient if b.rule == RCEIL else rounded)
    is_ceiling = (b.rule == CEIL) | (b.rule == RCEIL)
    exponent = np.int32(exponent + (ONE if is_ceiling & (fraction != np.uint32(0)) else NONE))
    exponent = np.int32(exponent - (NONE if b.rule == RCEIL else b.emax))
    exponent = b.highest if exponent > b.highest else exponent
    exponent = b.lowest if (exponent < b.lowest) | (amax == np.uint32(0)) else exponent
    is_nan = amax > INFINITY
    code = b.nan_code if is_nan else np.uint32(np.int32(exponent + b.bias))
    return np.float32(np.nan) if is_nan else power_of_two(exponent), code


@scalar
def power_of_two(exponent):  # type: ignore[no-untyped-def]
    """2^exponent for -149 <= exponent <= 127, as float32."""
    normal = left(np.uint32(np.int32(exponent + BIAS)), EXPONENT_SHIFT)
    subnormal = left(np.uint32(1), np.uint32(np.int32(exponent + np.int32(149))))
    return float_of(normal if exponent >= LEAST_NORMAL else subnormal)


@scalar
def wanted_scale(amax, tensor_scale, b):  # type: ignore[no-untyped-def]
    """What the rule `amax` rounds into the scale's format. tensor_scale: 1, or the tensor's own scale."""
    wanted = np.float32(np.float32(float_of(amax) / b.element_max) / tensor_scale)
    return wanted if wanted > b.least else b.least


@scalar
def amax_scale(amax, tensor_scale, b, s):  # type: ignore[no-untyped-def]
    """(scale, its code) by the rule `amax`: float32, uint32. s: the scale format's Parameters."""
    magnitude = bits_of(wanted_scale(amax, tensor_scale, b))
    rounded = limited(round_deterministic(magnitude, False, s), magnitude, False, s)
    scale = np.float32(value_of_magnitude(rounded, False, s) * tensor_scale)
    is_nan = amax > INFINITY
    return np.float32(np.nan) if is_nan else scale, b.nan_code if is_nan else assembled(rounded, False, s)


@scalar
def block_scale(amax, tensor_scale, b, s):  # type: ignore[no-untyped-def]
    """(scale, its code) by a block format's rule: float32, uint32."""
    if b.rule == AMAX:
        return amax_scale(amax, tensor_scale, b, s)
    return power_of_two_scale(amax, b)
