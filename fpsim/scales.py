"""What a tensor is divided by before it is rounded, so that it sits well in the format's range.

    none            1
    amax            the largest magnitude over the format's largest number, rounded up where it would not fit otherwise
    power_of_two    that, rounded up to a power of two
    lognormal_mean  the power of two that puts the mean of log2|x| in the middle of the format's normal range, raised
                    where the largest magnitude would not fit (Chmiel et al., ICLR 2021, section 4)

All are positive finite float32 numbers; a tensor of zeros has scale 1.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

import accel
from accel import Format

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127
SAMPLE = 4096  # elements that the mean of log2|x| is taken over
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # of 2^64: its multiples are sample positions that follow no stride of the tensor


def largest_magnitude(x: Tensor, channel_dim: int | None = None) -> float | Tensor:
    """max|x|: a number, or float32 a channel in a shape that broadcasts with x. NaN where x holds one; 0 if empty."""
    if channel_dim is None or x.ndim < 2:
        return float(accel.largest_magnitude(x))
    dims = [d for d in range(x.ndim) if d != channel_dim % x.ndim]
    return torch.maximum(-x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)).float()


def scale_of(
    x: Tensor, fmt: Format, kind: str, amax: float | Tensor, channel_dim: int | None = None
) -> float | Tensor | None:
    """The scale of x for `fmt`, given its `largest_magnitude` over the same channels; None means 1."""
    if kind == "none":
        return None
    if isinstance(amax, Tensor):
        return _channel_scales(x, fmt, kind, amax, channel_dim)
    if amax == 0:
        return 1.0
    if kind == "amax":
        scale = np.float32(min(max(amax / fmt.max, SMALLEST_SCALE), LARGEST_SCALE))
        is_too_small = amax / scale > fmt.max and scale < LARGEST_SCALE
        return float(np.nextafter(scale, np.float32(np.inf)) if is_too_small else scale)
    exponent = _exponent_above(amax / fmt.max)
    if kind == "lognormal_mean":
        exponent = max(exponent, round(max(mean_log2(sample(x)) - _centre(fmt), -126)))
    return 2.0 ** min(max(exponent, -126), 127)


def _channel_scales(x: Tensor, fmt: Format, kind: str, amax: Tensor, channel_dim: int | None) -> Tensor:
    largest = amax.numpy()  # NumPy: its small operations cost a fraction of torch's
    ratio = largest.astype(np.float64) / fmt.max
    if kind == "amax":
        scales = np.clip(ratio, SMALLEST_SCALE, LARGEST_SCALE).astype(np.float32)
        is_too_small = (largest / scales > fmt.max) & (scales < LARGEST_SCALE)
        scales = np.where(is_too_small, np.nextafter(scales, np.float32(np.inf)), scales)
    else:
        mantissa, exponents = np.frexp(ratio)
        exponents = np.where(mantissa == 0.5, exponents - 1, exponents)
        if kind == "lognormal_mean":
            assert channel_dim is not None
            centred = np.round(channel_means_log2(x, channel_dim).numpy() - _centre(fmt))
            exponents = np.maximum(exponents, np.maximum(centred, -126).astype(exponents.dtype))
        scales = np.ldexp(1.0, np.clip(exponents, -126, 127)).astype(np.float32)
    return torch.from_numpy(np.where(largest > 0, scales, np.float32(1)))


def _centre(fmt: Format) -> float:
    return (math.log2(fmt.min_normal) + math.log2(fmt.max)) / 2


def mean_log2(x: Tensor) -> float:
    """Mean of log2|x| over the nonzeros, in float64; minus infinity where there are none."""
    values = np.abs(x.numpy().astype(np.float64))  # NumPy: its small operations cost a fraction of torch's
    nonzeros = values[values > 0]
    return float(np.log2(nonzeros).mean()) if nonzeros.size else -math.inf


def channel_means_log2(x: Tensor, channel_dim: int) -> Tensor:
    """The same of every channel: float64 in a shape that broadcasts with x."""
    values = x.double().abs()
    dims = [d for d in range(x.ndim) if d != channel_dim % x.ndim]
    nonzero = values > 0
    count = nonzero.sum(dims, keepdim=True)
    total = torch.where(nonzero, values, 1).log2().sum(dims, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), -torch.inf)


def sample(x: Tensor, count: int = SAMPLE) -> Tensor:
    """The same `count` elements of every tensor of x's size (all of a smaller one), as a flat tensor."""
    flat = x.reshape(-1)
    return flat if flat.numel() <= count else flat[_positions(flat.numel(), count)]


@cache
def _positions(size: int, count: int) -> Tensor:
    fractions = [(i * GOLDEN_RATIO & 0xFFFFFFFFFFFFFFFF) / 2**64 for i in range(1, count + 1)]
    return torch.tensor([int(fraction * size) for fraction in fractions])


def _exponent_above(x: float) -> int:
    mantissa, exponent = math.frexp(x)
    return exponent - 1 if mantissa == 0.5 else exponent
