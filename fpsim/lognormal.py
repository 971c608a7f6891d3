"""Lognormal magnitudes under stochastic pruning: fit, sparsity, threshold, cosine similarity, mean squared error.

Source: Chmiel et al., "Neural gradients are near-lognormal: improved quantized and sparse training", ICLR 2021
(arXiv 2006.08173). Nonzero magnitudes x follow ln x ~ N(mu, sigma^2), natural logarithm. The stochastic pruning
operator T keeps x >= alpha and turns x < alpha into alpha with probability x / alpha, else into 0, so that E[T(x)] = x.
With z = (ln(alpha) - mu) / sigma and Phi the standard normal distribution function:

    (1) S = Phi(z) - exp(mu + sigma^2/2 - ln(alpha)) Phi(z - sigma)           share that becomes 0
    (2) Phi(z) - S;  1 - Phi(z)                                               share that becomes alpha; that is kept
    (3) cos^2 = E[x^2] / (alpha m1 + exp(2 mu + 2 sigma^2) Phi(2 sigma - z))
    (4) E[(T(x) - x)^2] = alpha m1 - exp(2 mu + 2 sigma^2) Phi(z - 2 sigma)   m1 = exp(mu + sigma^2/2) Phi(z - sigma)
    (5) (S - S0) / (1 - S0)                                                   to ask when the share S0 is 0 already
    (6) cos^2 = Phi(2 sigma - Phi^-1(S))                                      keeping the largest 1 - S exactly instead

Arrays (or scalars) in, arrays out, broadcast, float64. Each quantity is computed from y = ln(alpha) - mu in the log
domain, which keeps it accurate to 1e-10 for sigma in [0.05, 15] and sparsity in [0.01, 0.999]. The choice of a float
for a lognormal, `relative_error` and `best_exponent_bits`, is explained in fpsim.float_choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_ndtr, ndtr, ndtri

from fpsim.arguments import Floats, floats, positive, require
from fpsim.float_choice import best_exponent_bits, relative_error

__all__ = [
    "Fit",
    "best_exponent_bits",
    "cosine",
    "fit",
    "magnitudes",
    "mean_squared_error",
    "measured_cosine",
    "relative_error",
    "required_sparsity",
    "sparsity",
    "symbol_shares",
    "threshold",
    "top_k_cosine",
]

_BISECTIONS = 64


@dataclass(frozen=True)
class Fit:
    """A lognormal fitted to the nonzero magnitudes of a tensor; zeros are counted apart.

    mu, sigma: mean and (population) standard deviation of ln|x| over the nonzeros; nan when every element is 0.
    zero_share: zeros / count. count: number of elements, zeros included.
    """

    mu: float
    sigma: float
    zero_share: float
    count: int


def magnitudes(x: Any) -> Floats:
    """|x| as a flat float64 array; x is array-like or a torch tensor. ValueError when it is empty or not finite."""
    array = x.detach().cpu().double().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)
    if array.size == 0:
        raise ValueError("x must have at least one element, got none")
    finite = np.isfinite(array)
    if not finite.all():
        nans = int(np.isnan(array).sum())
        infinities = array.size - int(finite.sum()) - nans
        raise ValueError(f"x must be finite, got {nans} NaN and {infinities} infinite of {array.size} elements")
    return np.abs(array).ravel()


def fit(x: Any) -> Fit:
    """Fit a lognormal to the nonzero magnitudes of x (array-like or torch tensor, any shape).

    The maximum-likelihood estimate, in two passes. All zeros give mu = sigma = nan and zero_share = 1; equal magnitudes
    give sigma = 0 exactly. ValueError when x is empty or holds NaN or infinity.
    """
    values = magnitudes(x)
    nonzeros = values[values != 0]
    zero_share = (values.size - nonzeros.size) / values.size
    if nonzeros.size == 0:
        return Fit(mu=np.nan, sigma=np.nan, zero_share=zero_share, count=values.size)
    logs = np.log(nonzeros)
    shifted = logs - logs[0]
    return Fit(float(logs[0] + shifted.mean()), float(shifted.std()), zero_share, values.size)


def sparsity(alpha: ArrayLike, mu: ArrayLike, sigma: ArrayLike) -> Floats:
    """Share of the nonzeros that pruning at alpha turns into 0: E[max(0, 1 - x / alpha)], equation (1).

    Computed as Phi(z) (1 - E[x / alpha | x < alpha]), so that nothing cancels.
    ValueError for alpha < 0, sigma <= 0 or any argument that is not finite.
    """
    y, _, sigma = _checked(alpha, mu, sigma)
    return np.exp(_log_sparsity(y, sigma))


def symbol_shares(alpha: ArrayLike, mu: ArrayLike, sigma: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Shares of the nonzeros that become 0, become +-alpha, and are kept exactly; they sum to 1. Equation (2)."""
    y, _, sigma = _checked(alpha, mu, sigma)
    return np.exp(_log_sparsity(y, sigma)), np.exp(_log_alpha_share(y, sigma)), ndtr(-y / sigma)


def threshold(sparsity: ArrayLike, mu: ArrayLike, sigma: ArrayLike) -> Floats:
    """The alpha at which pruning turns the share `sparsity` of the nonzeros into 0: the inverse of equation (1).

    Bisection on ln(alpha) between the bounds S <= Phi(z) and S >= 1 - E[x] / alpha. A sparsity of 0 gives alpha = 0.
    ValueError for sparsity outside [0, 1), sigma <= 0 or any argument that is not finite.
    """
    share, mu = _share(sparsity), _mean(mu)
    sigma = positive(sigma, "sigma")
    target = np.where(share == 0, 0.5, share)
    low, high, log_target = np.broadcast_arrays(
        sigma * ndtri(target), sigma * sigma / 2 - np.log1p(-target), np.log(target)
    )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_small = _log_sparsity(middle, sigma) < log_target
        low, high = np.where(too_small, middle, low), np.where(too_small, high, middle)
    return np.exp(np.where(share == 0, -np.inf, mu + (low + high) / 2))


def cosine(alpha: ArrayLike, mu: ArrayLike, sigma: ArrayLike) -> Floats:
    """Cosine similarity of x and T(x) over many elements: sqrt(E[x^2] / E[max(alpha x, x^2)]), equation (3).

    ValueError for alpha < 0, sigma <= 0 or any argument that is not finite.
    """
    y, _, sigma = _checked(alpha, mu, sigma)
    pruned = 2 * (y - sigma * sigma) + _log_alpha_share(y, sigma)
    kept = log_ndtr(2 * sigma - y / sigma)
    return np.minimum(np.exp(-np.logaddexp(pruned, kept) / 2), 1.0)


def measured_cosine(x: Any, alpha: float) -> float:
    """Cosine similarity of a tensor x and T(x), whatever its distribution: sqrt(sum x^2 / sum max(alpha |x|, x^2)).

    x: array-like or torch tensor, any shape. Exact for E[|T(x)|^2], from which one draw of T differs by chance; zeros
    count for nothing, and zeros alone give nan. ValueError for alpha < 0, and alpha or x that is not finite.
    """
    values, level = magnitudes(x), float(_threshold(alpha))
    largest = values.max()
    if largest == 0:
        return np.nan
    scaled = values / largest
    squares = scaled * scaled
    return float(np.sqrt(squares.sum() / np.maximum(level / largest * scaled, squares).sum()))


def top_k_cosine(sparsity: ArrayLike, sigma: ArrayLike) -> Floats:
    """Cosine similarity of x and x without the share `sparsity` of smallest magnitudes, which is biased. Equation (6).

    ValueError for sparsity outside [0, 1), sigma <= 0 or any argument that is not finite.
    """
    return np.sqrt(ndtr(2 * positive(sigma, "sigma") - ndtri(_share(sparsity))))


def mean_squared_error(alpha: ArrayLike, mu: ArrayLike, sigma: ArrayLike) -> Floats:
    """E[(T(x) - x)^2] = alpha E[x; x < alpha] - E[x^2; x < alpha], in x's unit squared. Equation (4).

    Computed as alpha E[x] S', S' the sparsity (1) of the lognormal weighted by x, whose mu is larger by sigma^2.
    ValueError for alpha < 0, sigma <= 0 or any argument that is not finite.
    """
    y, mu, sigma = _checked(alpha, mu, sigma)
    variance = sigma * sigma
    return np.exp(2 * mu + y + variance / 2 + _log_sparsity(y - variance, sigma))


def required_sparsity(sparsity: ArrayLike, zero_share: ArrayLike) -> Floats:
    """Sparsity to ask of the nonzeros so that, with the zeros that exist, `sparsity` is reached overall. Equation (5).

    0 where zero_share >= sparsity. ValueError for sparsity outside [0, 1) or zero_share outside [0, 1].
    """
    share, zeros = _share(sparsity), floats(zero_share)
    require((zeros >= 0) & (zeros <= 1), "zero_share", zeros, "in [0, 1]")
    missing = np.maximum(share - zeros, 0.0)
    return missing / np.where(missing > 0, 1 - zeros, 1.0)


def _log_mean_ratio(y: Floats, sigma: Floats) -> Floats:
    """ln E[x / alpha | x < alpha], never above 0; fmin also takes the inf - inf of alpha = 0, where the share is 0."""
    with np.errstate(invalid="ignore"):
        return np.fmin(sigma * sigma / 2 - y + log_ndtr(y / sigma - sigma) - log_ndtr(y / sigma), 0.0)


def _log_sparsity(y: Floats, sigma: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return log_ndtr(y / sigma) + np.log(-np.expm1(_log_mean_ratio(y, sigma)))


def _log_alpha_share(y: Floats, sigma: Floats) -> Floats:
    return log_ndtr(y / sigma) + _log_mean_ratio(y, sigma)


def _checked(alpha: ArrayLike, mu: ArrayLike, sigma: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Validated (ln(alpha) - mu, mu, sigma) in float64."""
    alpha, mu, sigma = _threshold(alpha), _mean(mu), positive(sigma, "sigma")
    with np.errstate(divide="ignore"):
        return np.log(alpha) - mu, mu, sigma


def _threshold(alpha: ArrayLike) -> Floats:
    level = floats(alpha)
    require((level >= 0) & np.isfinite(level), "alpha", level, "finite and >= 0")
    return level


def _mean(mu: ArrayLike) -> Floats:
    numbers = floats(mu)
    require(np.isfinite(numbers), "mu", numbers, "finite")
    return numbers


def _share(sparsity: ArrayLike) -> Floats:
    share = floats(sparsity)
    require((share >= 0) & (share < 1), "sparsity", share, "in [0, 1)")
    return share
