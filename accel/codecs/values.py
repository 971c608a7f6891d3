"""Values to codes and back, exactly, for every format: code = sign << (E + M) | magnitude code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from accel.formats import Format
from accel.kernels import cpu
from accel.rounding import parameters


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
    values = np.empty(codes.shape, np.float32)
    flat = np.ascontiguousarray(codes).reshape(-1)
    cpu.run(cpu.decode, flat.size, flat, values.reshape(-1), *parameters(fmt), threads=torch.get_num_threads())
    with np.errstate(over="ignore", under="ignore"):
        return values * scale
