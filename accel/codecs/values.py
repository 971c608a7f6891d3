"""Values to codes and back, exactly, for every format: code = sign << (E + M) | magnitude code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from accel.formats import Format


def encode_values(x: npt.NDArray[np.float32], fmt: Format, scale: np.float32) -> npt.NDArray[np.uint32]:
    """The code whose value times scale is nearest to each x: uint32 of x's shape.

    `decode_values` of the code is x itself, or x is not a value of scale * grid(fmt).
    """
    magnitude = np.abs(x).astype(np.float64) / np.float64(scale)
    finite = np.isfinite(magnitude)
    magnitude[~finite] = 0
    exponent = np.frexp(np.maximum(magnitude, fmt.min_normal))[1] - 1
    significand = np.rint(np.ldexp(magnitude, fmt.mantissa_bits - exponent)).astype(np.int64)
    codes = np.minimum(significand + ((exponent - fmt.min_exponent) << fmt.mantissa_bits), fmt.max_code)
    codes[~finite] = fmt.infinity_code or fmt.max_code
    codes |= np.signbit(x).astype(np.int64) << (fmt.bits - 1)
    codes[np.isnan(x)] = fmt.nan_code or 0
    return codes.astype(np.uint32)


def decode_values(codes: npt.NDArray[np.uint32], fmt: Format, scale: np.float32) -> npt.NDArray[np.float32]:
    """The value of each code times scale, one float32 product: float32 of codes' shape."""
    negative = (codes >> np.uint32(fmt.bits - 1)) != 0
    magnitude = codes.astype(np.int64) & ((1 << (fmt.bits - 1)) - 1)
    field, mantissa = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    significand = np.where(field > 0, mantissa | (1 << fmt.mantissa_bits), mantissa if fmt.subnormals else 0)
    values = np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - fmt.bias - fmt.mantissa_bits)
    special = magnitude > fmt.max_code
    if fmt.infinity_code is not None:
        values[magnitude == fmt.infinity_code] = np.inf
        special &= magnitude != fmt.infinity_code
    if not fmt.has_negative_zero:
        special |= negative & (magnitude == 0)
    values[special] = np.nan
    with np.errstate(over="ignore", under="ignore"):
        scaled = values.astype(np.float32) * scale
    return np.where(negative & ~special, -scaled, scaled)
