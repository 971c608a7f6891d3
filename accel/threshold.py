"""The pruning threshold that a tensor's own magnitudes call for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def threshold_of(magnitudes: npt.NDArray[np.float64], sparsity: float) -> float:
    """The exact solution alpha of mean(max(0, 1 - |x| / alpha)) = sparsity: stochastic pruning is expected to reach it.

    magnitudes: |x| in one dimension, at least one, finite, zeros included. sparsity: in [0, 1). 0.0 where the share of
    zeros is as high already. Between two neighbouring magnitudes the equation reads k - P / alpha = n sparsity, with k
    elements <= alpha that sum to P, so one sort and one prefix sum solve it.
    """
    ordered = np.sort(magnitudes)
    nonzeros = ordered[ordered > 0]
    zeros = ordered.size - nonzeros.size
    if zeros / ordered.size >= sparsity:
        return 0.0
    wanted_zeros = ordered.size * sparsity
    counts = zeros + np.arange(1, nonzeros.size + 1)
    sums = np.cumsum(nonzeros)
    zeros_at_magnitude = counts - sums / nonzeros
    last = np.searchsorted(zeros_at_magnitude, wanted_zeros, side="right") - 1
    return float(sums[last] / (counts[last] - wanted_zeros))
