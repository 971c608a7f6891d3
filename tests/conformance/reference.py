"""The definition of formats and rounding in exact arithmetic: short, slow, and independent of the kernels.

Only what describes a Format is read (widths, bias, policy, flags), none of the limits that it derives.
"""

from __future__ import annotations

import math
from fractions import Fraction

from accel.formats import Format

HALF = Fraction(1, 2)


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def min_normal(fmt: Format) -> Fraction:
    return power(-fmt.bias if fmt.policy == "scale" else 1 - fmt.bias)


def has_infinity(fmt: Format) -> bool:
    return fmt.policy in ("ieee", "p3109")


def has_nan(fmt: Format) -> bool:
    """A NaN is left: two's complement and `finite` have none, and alpha codes can take the last."""
    if fmt.alpha_codes and (fmt.policy == "fn" or (fmt.policy == "ieee" and fmt.mantissa_bits == 1)):
        return False
    return fmt.policy not in ("finite", "integer")


def has_negative_zero(fmt: Format) -> bool:
    return fmt.signed and fmt.policy in ("ieee", "fn", "finite")


def largest_code(fmt: Format) -> int:
    """Magnitude code of the largest finite number."""
    codes = 1 << (fmt.exponent_bits + fmt.mantissa_bits)
    special = {"ieee": 1 << fmt.mantissa_bits, "fn": 1, "p3109": 1, "scale": 1}.get(fmt.policy, 0)
    alpha = fmt.alpha_codes and fmt.policy in ("fnuz", "finite", "p3109")
    return codes - special - alpha - 1


def magnitude_of(fmt: Format, code: int) -> Fraction:
    """The number of a magnitude code, as if no code were special."""
    if fmt.policy == "scale":
        return power(code - fmt.bias)
    e, m = divmod(code, 1 << fmt.mantissa_bits)
    if e == 0 and not fmt.subnormals:
        return Fraction(0)
    return power(max(e, 1) - fmt.bias) * ((e > 0) + Fraction(m, 1 << fmt.mantissa_bits))


def value_of(fmt: Format, code: int) -> float:
    """The value of a code; NaN for the alpha codes."""
    if fmt.policy == "integer":
        wraps = fmt.signed and code >> fmt.mantissa_bits
        step = power(1 - fmt.bias - fmt.mantissa_bits)
        return float((code - (2 << fmt.mantissa_bits) if wraps else code) * step)
    is_negative, magnitude = divmod(code, 1 << (fmt.exponent_bits + fmt.mantissa_bits))
    if magnitude > largest_code(fmt):
        first_special = magnitude == largest_code(fmt) + 1 + (fmt.alpha_codes and fmt.policy == "p3109")
        value = math.inf if has_infinity(fmt) and first_special else math.nan
    elif is_negative and magnitude == 0 and fmt.policy in ("fnuz", "p3109"):
        value = math.nan
    else:
        value = float(magnitude_of(fmt, magnitude))
    return -value if is_negative and (value or has_negative_zero(fmt)) else value


def rounded(
    fmt: Format,
    x: float,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    word: int = 0,
    random_bits: int = 32,
    flush: bool | str = False,
) -> float:
    """Q(x). word: the 32-bit random word of stochastic rounding."""
    if math.isnan(x) or (fmt.policy == "scale" and x <= 0):
        return math.nan
    is_negative = math.copysign(1, x) < 0
    largest = magnitude_of(fmt, largest_code(fmt))
    if is_negative and fmt.policy == "integer":
        largest += power(1 - fmt.bias - fmt.mantissa_bits)
    if is_negative and not fmt.signed:
        largest = Fraction(0)
    result: Fraction | float = math.inf
    if math.isfinite(x):
        magnitude = abs(Fraction(x))
        if flushes(fmt, flush, "input") and magnitude < min_normal(fmt):
            magnitude = Fraction(0)
        result = rounded_magnitude(fmt, magnitude, is_negative, rounding, word, random_bits)
    if result > largest:
        stops = math.isfinite(x) and rounding in ("toward_zero", "up" if is_negative else "down")
        if overflow == "saturate" or stops or not (has_infinity(fmt) or has_nan(fmt)):
            result = largest
        else:
            result = math.inf if has_infinity(fmt) and (fmt.signed or not is_negative) else math.nan
    if flushes(fmt, flush, "output") and result < min_normal(fmt):
        result = 0
    return -float(result) if is_negative and (result or has_negative_zero(fmt)) else float(result)


def flushes(fmt: Format, flush: bool | str, side: str) -> bool:
    return flush in (True, side) and fmt.policy not in ("integer", "scale")


def rounded_magnitude(
    fmt: Format, magnitude: Fraction, is_negative: bool, rounding: str, word: int, random_bits: int
) -> Fraction:
    """|x| rounded to the format's grid, which goes on beyond the largest number."""
    smallest = min_normal(fmt)
    if fmt.policy == "scale" and magnitude <= smallest:
        return smallest
    if fmt.policy == "scale" and magnitude < 2 * smallest and rounding == "nearest_even":
        return 2 * smallest  # as ml_dtypes and torch do, not the nearest
    is_normal = magnitude >= smallest
    binade = floor_power(magnitude) if is_normal else smallest
    unit = binade / (1 << fmt.mantissa_bits) if is_normal or fmt.subnormals else smallest
    count, fraction = divmod(magnitude / unit, 1)
    if rounding == "stochastic":
        drawn = word >> (32 - random_bits) << (32 - random_bits)
        goes_up = math.floor(fraction * (1 << 32)) + drawn >= 1 << 32
    elif rounding == "nearest_even":
        is_odd = count % 2 == 1
        if fmt.mantissa_bits == 0 and is_normal:  # between powers of two: to the larger, but p3109 to the even code
            is_odd = fmt.policy != "p3109" or (exponent_of(binade) + fmt.bias) % 2 == 1
        goes_up = fraction > HALF or (fraction == HALF and is_odd)
    elif rounding == "nearest_away":
        goes_up = fraction >= HALF
    else:
        goes_up = fraction > 0 and rounding == ("down" if is_negative else "up")
    return (count + goes_up) * unit


def exponent_of(power_of_two: Fraction) -> int:
    return power_of_two.numerator.bit_length() - power_of_two.denominator.bit_length()


def floor_power(magnitude: Fraction) -> Fraction:
    """The largest power of two that is not above `magnitude`."""
    estimate = power(exponent_of(magnitude))
    return estimate if estimate <= magnitude else estimate / 2
