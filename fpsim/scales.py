"""What a tensor is divided by before it is rounded, so that it sits well in the format's range.

    none            1
    amax            the largest magnitude over the format's largest number
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

from accel import Format

SMALLEST_SCALE = 2.0**-126
SAMPLE = 4096  # elements that the mean of log2|x| is taken over
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # of 2^64: its multiples are sample positions that follow no stride of the tensor


def largest_magnitude(x: Tensor, channel_dim: int | None = None) -> float | Tensor:
    """max|x|: a number, or float32 a channel in a shape that broadcasts with x. NaN where x holds one; 0 if empty."""
    if channel_dim is None or x.ndim < 2:
        if x.numel() == 0:
            return 0.0
        low, high = torch.aminmax(x)
        return float(torch.maximum(-low, high))
    dims = [d for d in range(x.ndim) if d != channel_dim % x.ndim]
    return torch.maximum(-x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)).float()


def scale_of(
    x: Tensor, fmt: Format, kind: str, amax: float | Tensor, channel_dim: int | None = None
) -> float | Tensor | None:
    """The scale of x for `fmt`, given its `largest_magnitude` over the same channels; None means 1."""
    if kind == "none":
        return None
    ratio = amax / fmt.max if isinstance(amax, float) else amax.double() / fmt.max
    centre = (math.log2(fmt.min_normal) + math.log2(fmt.max)) / 2
    if isinstance(ratio, float):
        if ratio == 0:
            return 1.0
        scale = float(np.float32(ratio)) if kind == "amax" else 2.0 ** _exponent_above(ratio)
        if kind == "lognormal_mean":
            scale = max(scale, 2.0 ** min(max(round(float(mean_log2(x)) - centre), -126), 127))
        return max(scale, SMALLEST_SCALE)
    scales = ratio if kind == "amax" else _powers_of_two_above(ratio)
    if kind == "lognormal_mean":
        scales = torch.maximum(scales, torch.exp2(torch.round(mean_log2(x, channel_dim) - centre).clamp(-126, 127)))
    return torch.where(ratio > 0, scales.clamp(min=SMALLEST_SCALE), 1.0).float()


def mean_log2(x: Tensor, channel_dim: int | None = None) -> Tensor:
    """Mean of log2|x| over the nonzeros, float64: of a fixed sample of the tensor, or of every channel as a whole."""
    values = (sample(x) if channel_dim is None else x).double().abs()
    nonzero = values > 0
    logs = torch.where(nonzero, values, 1).log2()
    if channel_dim is None:
        return logs.sum() / nonzero.sum().clamp(min=1)
    dims = [d for d in range(x.ndim) if d != channel_dim % x.ndim]
    return logs.sum(dims, keepdim=True) / nonzero.sum(dims, keepdim=True).clamp(min=1)


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


def _powers_of_two_above(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))
