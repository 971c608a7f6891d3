"""The pruning threshold alpha of one layer, from a sample of its neural gradient dY.

Stochastic pruning at alpha turns an element x into 0 with probability max(0, 1 - |x| / alpha), so a sample is expected
to reach the sparsity mean(max(0, 1 - |x| / alpha)), its zeros counting 1 each. `empirical` solves that equation on the
sample itself; `lognormal` solves it for the lognormal fitted to the sample's nonzeros (Chmiel et al., ICLR 2021).

A sample is an array of any shape, float32 or float64; signs do not matter. alpha = 0 means: prune nothing. Every
function raises ValueError when the sample is empty or not finite, or when the sparsity is outside [0, 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from accel.threshold import threshold_of
from fpsim.lognormal import fit, magnitudes, required_sparsity, threshold


def empirical(sample: ArrayLike, sparsity: float) -> float:
    """The exact solution alpha of mean(max(0, 1 - |x| / alpha)) = sparsity over the sample, zeros included.

    0.0 when the sample is already that sparse.
    """
    values = magnitudes(sample)
    if required_sparsity(sparsity, float(np.mean(values == 0))) == 0:
        return 0.0
    return threshold_of(values, sparsity)


def lognormal(sample: ArrayLike, sparsity: float) -> float:
    """The alpha that reaches the sparsity if the nonzeros are lognormal: fit, equation (5), inverse of equation (1).

    0.0 when the sample is already that sparse. Nonzeros of one single magnitude m (sigma = 0) give the solution of
    1 - m / alpha = required sparsity.
    """
    fitted = fit(sample)
    required = float(required_sparsity(sparsity, fitted.zero_share))
    if required == 0:
        return 0.0
    if fitted.sigma == 0:
        return float(np.exp(fitted.mu) / (1 - required))
    return float(threshold(required, fitted.mu, fitted.sigma))


def expected_sparsity(sample: ArrayLike, alpha: float) -> float:
    """Sparsity that pruning the sample at alpha is expected to reach: mean(max(0, 1 - |x| / alpha)).

    The share of zeros when alpha is 0. ValueError when alpha is negative or not finite.
    """
    if not (alpha >= 0 and np.isfinite(alpha)):
        raise ValueError(f"alpha must be finite and >= 0, got {alpha!r}")
    values = magnitudes(sample)
    if alpha == 0:
        return float(np.mean(values == 0))
    return float(np.mean(np.maximum(alpha - values, 0) / alpha))
