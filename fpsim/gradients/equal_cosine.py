"""Sparsities at which pruning turns the gradients of all layers by one angle (Chmiel et al., ICLR 2021, section 5).

Stochastic pruning at alpha makes T(x) of x, with the cosine sqrt(sum x^2 / sum max(alpha |x|, x^2)) between the two. It
falls as alpha grows, and the sparsity rises: so one cosine gives every layer a sparsity, and the mean of these over all
elements falls as the cosine grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fpsim.lognormal import cosine, fit, magnitudes, sparsity

Floats = NDArray[np.float64]

POINTS = 2048  # of each layer's curve, between which it is linear
LARGEST_RATIO = 1e4  # of alpha to the largest magnitude
LARGEST_Z = 8.0  # of ln alpha, in standard deviations
BISECTIONS = 50


def equal_cosine(
    samples: Sequence[ArrayLike],
    sizes: ArrayLike,
    mean_sparsity: float,
    threshold: str = "empirical",
    lowest: float = 0.0,
    highest: float = 0.99,
) -> Floats:
    """The sparsity of each layer at which the cosine of all is one, and their mean, weighted by size, as asked.

    samples: of each layer's gradient, any shape, finite. sizes: elements of each gradient. threshold: `empirical`, of
    the sample itself; `lognormal`, of the distribution fitted to it, equations (1), (3) and (5). Layers that would get
    less than `lowest` or more than `highest` get that. Where no cosine gives the mean, it comes as near as it can.
    """
    curves = [(_lognormal_curve if threshold == "lognormal" else _curve)(magnitudes(sample)) for sample in samples]
    weights = np.asarray(sizes, np.float64) / np.sum(sizes)

    def at(cosine: float) -> Floats:
        return np.clip([np.interp(cosine, *curve) for curve in curves], lowest, highest)

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if weights @ at(middle) > mean_sparsity else (low, middle)
    return at(high)


def _curve(values: Floats) -> tuple[Floats, Floats]:
    """(rising cosines, the sparsity at each) of a sample's magnitudes."""
    ordered = np.sort(values[values > 0])
    if not ordered.size:
        return np.ones(1), np.ones(1)
    zeros = values.size - ordered.size
    alphas = np.geomspace(ordered[-1] * LARGEST_RATIO, ordered[0], POINTS)
    counts = np.searchsorted(ordered, alphas, side="right")
    sums = np.append(0.0, np.cumsum(ordered))[counts]
    squares = np.append(0.0, np.cumsum(ordered * ordered))
    cosines = np.sqrt(squares[-1] / (alphas * sums + (squares[-1] - squares[counts])))
    return cosines, (zeros + counts - sums / alphas) / values.size


def _lognormal_curve(values: Floats) -> tuple[Floats, Floats]:
    """The same of the lognormal that fits the magnitudes, zeros apart."""
    fitted = fit(values)
    if not fitted.sigma > 0:
        return _curve(values)
    logs = fitted.mu + np.linspace(LARGEST_Z + 2 * fitted.sigma, -LARGEST_Z, POINTS) * fitted.sigma
    alphas = np.exp(np.clip(logs, -700, 700))
    shares = sparsity(alphas, fitted.mu, fitted.sigma)
    return cosine(alphas, fitted.mu, fitted.sigma), fitted.zero_share + (1 - fitted.zero_share) * shares
