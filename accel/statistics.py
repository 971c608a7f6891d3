"""How the magnitudes of a tensor are distributed: count, mean and deviation of log2|x|, in one pass.

log2|x| = e + log2(m), with m in [sqrt(1/2), sqrt(2)) and e an integer. log2(m) is a polynomial in m - 1 (absolute error
below 6e-8, 1e-9 on average). e is summed exactly; log2(m), and the square of log2|x| less a whole number near the mean,
in float32, in LANES sums of a chunk that each take every LANES-th element, and in float64 over lanes and chunks, always
in this order: the result has the same bits on any number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba.core import types
from numba.extending import intrinsic

from accel.arguments import checked_tensor
from accel.kernels.cpu import AHEAD, CHUNK, GROUP, STRETCH, prefetch, run
from accel.kernels.jit import kernel, scalar
from accel.words import bits_of, float_of

LANES = 64
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # of 2^64
SQRT_HALF = np.uint32(0x3F3504F3)  # patterns
INFINITY, MAGNITUDE, LEAST_NORMAL = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF), np.uint32(0x00800000)
EXPONENT_SHIFT = np.uint32(23)
SUBNORMAL_SHIFT = np.int32(149)  # a subnormal is an integer times 2^-149
ONE, ZERO = np.float32(1), np.float32(0)
# log2(1 + t) / t on [sqrt(1/2) - 1, sqrt(2) - 1], weighted for the error of t times it
C0, C1, C2 = np.float32(1.442694868544053), np.float32(-0.7213471284962489), np.float32(0.48092253013969805)
C3, C4, C5 = np.float32(-0.36072119267566294), np.float32(0.28765664253546386), np.float32(-0.23851948560154124)
C6, C7, C8 = np.float32(0.21737971078935894), np.float32(-0.21030311433174392), np.float32(0.12541132089153495)


@dataclass(frozen=True)
class Log2Statistics:
    """Of a tensor of `numel` elements: how many are finite and not 0, and the mean and (population) standard deviation
    of log2|x| over these; NaN where there are none. not_finite: how many are infinite or NaN."""

    numel: int
    nonzeros: int
    not_finite: int
    mean: float
    std: float

    @property
    def zero_share(self) -> float:
        """Share of zeros, of either sign; NaN for an empty tensor."""
        return (self.numel - self.nonzeros - self.not_finite) / self.numel if self.numel else math.nan


def log2_statistics(x: torch.Tensor | npt.NDArray[np.floating]) -> Log2Statistics:
    """Count, mean and standard deviation of log2|x| over the elements that are finite and not 0 (see above).

    x: a tensor or array of floats of any shape and strides; it is read in float32 (float64 rounded to it), and on the
    CPU. The mean is exact to 1e-8 for 10^5 and more elements, to 1e-7 for few; the deviation likewise, relative to
    itself or to 1, whichever is more. Raises TypeError for anything else.
    """
    flat = checked_tensor(x).detach().to("cpu", torch.float32).contiguous().view(-1)
    values = flat.numpy()
    centre = np.int32(_centre(values))
    chunks = -(-values.size // CHUNK)
    counts, sums = np.zeros((3, chunks), np.int64), np.zeros((2, chunks))
    run(_log2_sums, values.size, values, centre, counts, sums, threads=torch.get_num_threads())
    nonzeros, not_finite, wholes = (int(count) for count in counts.sum(1))
    if not nonzeros:
        return Log2Statistics(values.size, 0, not_finite, math.nan, math.nan)
    offset, square = (wholes + math.fsum(sums[0])) / nonzeros, math.fsum(sums[1]) / nonzeros
    variance = max(square - offset * offset, 0.0)
    return Log2Statistics(values.size, nonzeros, not_finite, float(centre) + offset, math.sqrt(variance))


def _centre(values: npt.NDArray[np.float32]) -> float:
    """A whole number near the mean of log2|x|: of 256 elements at places that follow no stride of the tensor."""
    fractions = (np.arange(1, 257, dtype=np.uint64) * GOLDEN_RATIO) / 2.0**64
    some = np.abs(values[(fractions * values.size).astype(np.int64)]) if values.size else values
    some = some[np.isfinite(some) & (some > 0)]
    return float(np.round(np.log2(some).mean())) if some.size else 0.0


@intrinsic
def fused(typing_context, a, b, c):  # type: ignore[no-untyped-def]
    """a b + c in float32, rounded once: on every processor, where a compiler's choice would make the bits differ."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), emit


@scalar
def log2_of(magnitude):  # type: ignore[no-untyped-def]
    """log2 of a positive float32, in two parts: a whole number and the logarithm of what lies around 1."""
    bits = bits_of(magnitude)
    is_subnormal = bits < LEAST_NORMAL
    scaled = np.float32(np.int32(bits))
    bits = bits_of(scaled) if is_subnormal else bits
    whole = np.int32(np.int32(bits - SQRT_HALF) >> np.int32(EXPONENT_SHIFT))
    t = float_of(np.uint32(bits - np.uint32(np.uint32(whole) << EXPONENT_SHIFT))) - ONE
    p = fused(t, C8, C7)
    p = fused(p, t, C6)
    p = fused(p, t, C5)
    p = fused(p, t, C4)
    p = fused(p, t, C3)
    p = fused(p, t, C2)
    p = fused(p, t, C1)
    p = fused(p, t, C0)
    return np.int32(whole - (SUBNORMAL_SHIFT if is_subnormal else np.int32(0))), p * t


@kernel
def _log2_sums(start, stop, x, centre, counts, sums):  # type: ignore[no-untyped-def]
    rests, offsets = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    lanes, squares = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for low in range(start, stop, CHUNK):
        piece = x[low : min(low + CHUNK, stop)]
        zeros, others, wholes = np.int32(0), np.int32(0), np.int32(0)
        for base in range(0, piece.size, STRETCH):
            part, found = piece[base : base + STRETCH], rests[base : base + STRETCH]
            around = offsets[base : base + STRETCH]
            for place in range(0, STRETCH, GROUP):
                prefetch(part, place + AHEAD)
            for i in range(part.size):
                bits = np.uint32(bits_of(part[i]) & MAGNITUDE)
                is_zero, is_other = bits == np.uint32(0), bits >= INFINITY
                zeros = np.int32(zeros + np.int32(is_zero))
                others = np.int32(others + np.int32(is_other))
                whole, rest = log2_of(float_of(bits))
                is_left_out = is_zero | is_other
                steps = np.int32(0) if is_left_out else np.int32(whole - centre)
                wholes = np.int32(wholes + steps)
                found[i] = ZERO if is_left_out else rest
                around[i] = np.float32(steps) + found[i]
        for i in range(piece.size, -(-piece.size // LANES) * LANES):
            rests[i] = ZERO
            offsets[i] = ZERO
        for j in range(LANES):
            lanes[j] = ZERO
            squares[j] = ZERO
        for base in range(0, piece.size, LANES):
            found, around = rests[base : base + LANES], offsets[base : base + LANES]
            for j in range(LANES):
                lanes[j] += found[j]
                squares[j] = fused(around[j], around[j], squares[j])
        total, square = 0.0, 0.0
        for j in range(LANES):
            total += np.float64(lanes[j])
            square += np.float64(squares[j])
        chunk = low // CHUNK
        counts[0, chunk], counts[1, chunk], counts[2, chunk] = piece.size - zeros - others, others, wholes
        sums[0, chunk], sums[1, chunk] = total, square
