"""What a tensor is divided by before it is rounded, so that it sits well in the format's range.

    none            1
    amax            the largest magnitude over the format's largest number, rounded up where it would not fit otherwise
    power_of_two    that, rounded up to a power of two
    lognormal_mean  the power of two that puts the mean of log2|x| in the middle of the format's normal range, raised
                    where the largest magnitude would not fit (Chmiel et al., ICLR 2021, section 4)
    lognormal_error the power of two at which the lognormal of the tensor's mean and deviation of log2|x| rounds with
                    the least mean relative error, the largest magnitudes saturating where that is worth it (see
                    `fpsim.float_choice.scaled_error`; the deviation in steps of 1/16)
    delayed         as amax, of the largest magnitude in the tensors of earlier steps (see `Emulator`)
    a number        that

All are positive finite numbers, of float32 unless a number is given that is not; a tensor of zeros has scale 1, unless
its scale is a number.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

import accel
from accel import Format
from fpsim.float_choice import Lognormal, best_exponent_bits_of, scaled_error
from fpsim.ranks import ALONE, Ranks

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127
SIGMA_STEPS = 16  # a binade
OF_SAMPLES = ("lognormal_mean", "lognormal_error")  # the scales that look at a sample
SAMPLE = 4096  # elements that the mean of log2|x| is taken over
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # of 2^64: its multiples are sample positions that follow no stride of the tensor


def largest_magnitude(x: Tensor, channel_dim: int | None = None) -> float | Tensor:
    """max|x|: a number, or float32 a channel in a shape that broadcasts with x. NaN where x holds one; 0 if empty."""
    if channel_dim is None or x.ndim < 2:
        return float(accel.largest_magnitude(x))
    dims = [d for d in range(x.ndim) if d != channel_dim % x.ndim]
    return torch.maximum(-x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)).float()


def measured(
    x: Tensor, channel_dim: int | None, ranks: Ranks = ALONE, *, with_sample: bool = True
) -> tuple[float | Tensor, Tensor]:
    """The `largest_magnitude` of the tensor of which x is this rank's part, and a `sample` of it.

    Several ranks that meet a number that is not finite all get infinity. Where no sample is wanted it may be anything;
    one rank alone gets x itself, of which `sample` is the same. Raises ValueError for parts that are not of one size.
    """
    amax = largest_magnitude(x, channel_dim)
    if ranks.count == 1:
        return amax, x
    magnitudes = torch.as_tensor(amax, dtype=torch.float64)
    drawn = _placed(x, ranks) if with_sample else magnitudes.new_empty(0)
    ends = 2 + magnitudes.numel(), 2 + magnitudes.numel() + drawn.numel()
    told = torch.full((ends[0] + SAMPLE,), -torch.inf, dtype=torch.float64)  # of one length, whatever x is
    told[0], told[1] = x.numel(), -x.numel()
    told[2 : ends[0]] = torch.where(magnitudes.isfinite(), magnitudes, torch.inf).flatten()
    told[ends[0] : ends[1]] = drawn
    ranks.maximum(told)
    if told[0] != -told[1]:
        sizes = f"{int(-told[1])} to {int(told[0])} elements"
        raise ValueError(f"ranks have parts of one size each: these have {sizes}")
    largest, drawn = told[2 : ends[0]].float(), told[ends[0] : ends[1]].float()
    return (float(largest) if isinstance(amax, float) else largest.view_as(amax)), drawn


def _placed(x: Tensor, ranks: Ranks) -> Tensor:
    """The sample of the whole tensor with what this rank has of it, and minus infinity elsewhere."""
    size, begin = x.numel() * ranks.count, x.numel() * ranks.number
    places = torch.arange(size) if size <= SAMPLE else _positions(size, SAMPLE)
    is_own = (places >= begin) & (places < begin + x.numel())
    placed = torch.full((len(places),), -torch.inf)
    placed[is_own] = x.detach().reshape(-1)[places[is_own] - begin].float().nan_to_num(torch.inf)
    return placed


def scale_of(
    x: Tensor,
    fmt: Format,
    kind: str | float,
    amax: float | Tensor,
    channel_dim: int | None = None,
    ranks: Ranks = ALONE,
) -> float | Tensor | None:
    """The scale for `fmt` of x, or of the tensor of which x is this rank's part, given its `largest_magnitude` over the
    same channels; None means 1.

    delayed: amax is that of earlier steps.
    """
    if kind == "none":
        return None
    if isinstance(kind, float):
        return kind
    if isinstance(amax, Tensor):
        return _channel_scales(x, fmt, kind, amax, channel_dim, ranks)
    if amax == 0:
        return 1.0
    if kind in ("amax", "delayed"):
        scale = np.float32(min(max(amax / fmt.max, SMALLEST_SCALE), LARGEST_SCALE))
        is_too_small = amax / scale > fmt.max and scale < LARGEST_SCALE
        return float(np.nextafter(scale, np.float32(np.inf)) if is_too_small else scale)
    if kind == "lognormal_error":
        mean, deviation = log2_moments(sample(x))
        if math.isfinite(mean):
            exponent = round(mean) + _best_offset(fmt, sigma_steps(deviation))
        else:  # the nonzeros are not in the sample
            exponent = _exponent_above(amax / fmt.max)
        return 2.0 ** min(max(exponent, -126), 127)
    exponent = _exponent_above(amax / fmt.max)
    if kind == "lognormal_mean":
        exponent = max(exponent, round(max(log2_moments(sample(x))[0] - _centre(fmt), -126)))
    return 2.0 ** min(max(exponent, -126), 127)


def _channel_scales(x: Tensor, fmt: Format, kind: str, amax: Tensor, channel_dim: int | None, ranks: Ranks) -> Tensor:
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
            centred = np.round(channel_means_log2(x, channel_dim, ranks).numpy() - _centre(fmt))
            exponents = np.maximum(exponents, np.maximum(centred, -126).astype(exponents.dtype))
        scales = np.ldexp(1.0, np.clip(exponents, -126, 127)).astype(np.float32)
    return torch.from_numpy(np.where(largest > 0, scales, np.float32(1)))


def _centre(fmt: Format) -> float:
    return (math.log2(fmt.min_normal) + math.log2(fmt.max)) / 2


def log2_moments(x: Tensor) -> tuple[float, float]:
    """Mean and deviation of log2|x| over the nonzeros, in float64; minus infinity and 0 where there are none."""
    values = np.abs(x.numpy().astype(np.float64))  # NumPy: its small operations cost a fraction of torch's
    logs = np.log2(values[values > 0])
    return (float(logs.mean()), float(logs.std())) if logs.size else (-math.inf, 0.0)


def sigma_steps(deviation: float) -> int:
    """A deviation of log2|x| in steps of 1/16, one at least: so that what follows from it is worked out once."""
    return max(round(deviation * SIGMA_STEPS), 1)


@cache
def best_format(bits: int, policy: str, steps: int) -> Format:
    """The float of `bits` bits, at most 8, with the least mean relative error for a lognormal, at its best scale.

    steps: see `sigma_steps`. Its exponent bits are those of `fpsim.float_choice.best_exponent_bits`.
    """
    exponent_bits = int(best_exponent_bits_of(Lognormal(steps / SIGMA_STEPS), bits, policy=policy))
    widths = {"exponent_bits": exponent_bits, "mantissa_bits": bits - 1 - exponent_bits}
    chosen = accel.format({**widths, "policy": policy})
    assert isinstance(chosen, Format)
    return chosen


@cache
def _best_offset(fmt: Format, steps: int) -> int:
    """log2 of the best scale of a lognormal whose log2|x| has mean 0 and that many steps of deviation."""
    return int(scaled_error(fmt, Lognormal(steps / SIGMA_STEPS))[1])


def channel_means_log2(x: Tensor, channel_dim: int, ranks: Ranks = ALONE) -> Tensor:
    """The mean of log2|x| of every channel, of all ranks' parts: float64 in a shape that broadcasts with x."""
    values = x.double().abs()
    dims = [d for d in range(x.ndim) if d != channel_dim % x.ndim]
    nonzero = values > 0
    count = nonzero.sum(dims, keepdim=True)
    total = torch.where(nonzero, values, 1).log2().sum(dims, keepdim=True)
    count, total = ranks.total(count), ranks.total(total)
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
