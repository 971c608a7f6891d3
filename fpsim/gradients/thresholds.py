"""The pruning threshold alpha of one layer, from a sample of its neural gradient dY.

Stochastic pruning at alpha turns an element x into 0 with probability max(0, 1 - |x| / alpha), so a sample is expected
to reach the sparsity mean(max(0, 1 - |x| / alpha)), its zeros counting 1 each. `empirical` solves that equation on the
sample itself; `lognormal` solves it for the lognormal fitted to the sample's nonzeros (Chmiel et al., ICLR 2021);
`laplace` for a Laplace distribution. `quantile` is the threshold that top-k takes, and `atp` that of Ye et al. (2019):
pruned stochastically, they do not reach the sparsity that is asked.

A sample is an array of any shape, float32 or float64; signs do not matter. alpha = 0 means: prune nothing. Every
function raises ValueError when the sample is empty or not finite, or when the sparsity is outside [0, 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

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


def laplace(sample: ArrayLike, sparsity: float) -> float:
    """The alpha that reaches the sparsity if x has a Laplace distribution of scale b = mean|x|.

    Pruning then makes the share S = 1 - (b / alpha) (1 - exp(-alpha / b)) zero, which bisection inverts. 0.0 for a
    sparsity of 0 and a sample of zeros.
    """
    scale = float(magnitudes(sample).mean())
    _check(sparsity)
    if sparsity == 0 or scale == 0:
        return 0.0
    low, high = 0.0, 1 / (1 - sparsity)  # of alpha / b: S >= 1 - b / alpha
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 + np.expm1(-middle) / middle < sparsity else (low, middle)
    return scale * (low + high) / 2


def atp(sample: ArrayLike, sparsity: float) -> float:
    """The magnitude below which the share `sparsity` of a normal distribution lies that has the sample's mean |x|.

    sigma = sqrt(pi / 2) mean|x|, alpha = Phi^-1((1 + sparsity) / 2) sigma (Ye et al., "Accelerating CNN training by
    pruning activation gradients", 2019).
    """
    _check(sparsity)
    return float(ndtri((1 + sparsity) / 2) * np.sqrt(np.pi / 2) * magnitudes(sample).mean())


def quantile(sample: ArrayLike, sparsity: float) -> float:
    """The magnitude that the share `sparsity` of the sample precedes: what top-k keeps begins there."""
    values = magnitudes(sample)
    _check(sparsity)
    rank = int(sparsity * values.size)
    return float(np.partition(values, rank)[rank])


def _check(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        required_sparsity(sparsity, 0.0)  # raises


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
