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

import torch
from torch import Tensor

from accel import Format

SMALLEST_SCALE = 2.0**-126
SAMPLE = 4096  # elements that the mean of log2|x| is taken over
_PHI = 0x9E3779B97F4A7C15  # golden-ratio sequence: sample positions that follow no stride of the tensor


def largest_magnitude(x: Tensor, channel_dim: int | None = None) -> Tensor:
    """max|x|, float32: 0-d, or one a channel in a shape that broadcasts with x. NaN where x holds one; 0 if empty."""
    if x.numel() == 0:
        return torch.zeros(())
    if channel_dim is None:
        low, high = torch.aminmax(x)
    else:
        dims = [d for d in range(x.ndim) if d != channel_dim % x.ndim]
        low, high = (x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)) if dims else (x, x)
    return torch.maximum(-low, high).float()


def sample(x: Tensor, count: int = SAMPLE) -> Tensor:
    """The same `count` elements of every tensor of x's size (all of a smaller one), as a flat tensor."""
    flat = x.reshape(-1)
    if flat.numel() <= count:
        return flat
    return flat[_positions(flat.numel(), count)]


def scale_of(x: Tensor, fmt: Format, kind: str, amax: Tensor, channel_dim: int | None = None) -> Tensor | None:
    """The scale of x for `fmt`, given its `largest_magnitude` over the same channels; None means 1."""
    if kind == "none":
        return None
    ratio = amax.double() / fmt.max
    if kind == "amax":
        scale = ratio.float()
    else:
        scale = _power_of_two_above(ratio)
        if kind == "lognormal_mean":
            centre = (math.log2(fmt.min_normal) + math.log2(fmt.max)) / 2
            exponent = torch.round(mean_log2(x, channel_dim) - centre)
            scale = torch.maximum(scale, torch.exp2(exponent.clamp(-126, 127)))
        scale = scale.float()
    return torch.where(amax > 0, scale.clamp(min=SMALLEST_SCALE), torch.ones_like(scale))


def mean_log2(x: Tensor, channel_dim: int | None = None) -> Tensor:
    """Mean of log2|x| over the nonzeros, float64: of a fixed sample of the tensor, or of every channel as a whole."""
    values = (sample(x) if channel_dim is None else x).double().abs()
    nonzero = values > 0
    logs = torch.where(nonzero, values, 1).log2()
    if channel_dim is None:
        return logs.sum() / nonzero.sum().clamp(min=1)
    dims = [d for d in range(x.ndim) if d != channel_dim % x.ndim]
    return logs.sum(dims, keepdim=True) / nonzero.sum(dims, keepdim=True).clamp(min=1)


def _power_of_two_above(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


_position_cache: dict[tuple[int, int], Tensor] = {}


def _positions(size: int, count: int) -> Tensor:
    key = (size, count)
    if key not in _position_cache:
        fractions = [(i * _PHI & 0xFFFFFFFFFFFFFFFF) / 2**64 for i in range(1, count + 1)]
        _position_cache[key] = torch.tensor([int(f * size) for f in fractions])
    return _position_cache[key]
