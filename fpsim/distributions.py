"""Which distribution a tensor follows, and whether its magnitudes have a second mode.

Source: Chmiel et al., "Neural gradients are near-lognormal: improved quantized and sparse training", ICLR 2021
(arXiv 2006.08173), section 3 and table 1: the Kolmogorov-Smirnov statistic against seven fitted distributions.

    D = sup_x |F_n(x) - F(x)|        F_n the sample's distribution function, F the fitted one; in [0, 1], no unit

Zeros, of which ReLU makes many, are counted apart: the sample is x's nonzeros, with their signs. Equal terms: all seven
F are distributions of the signed x. Normal, Laplace, uniform, Cauchy and logistic are so by nature. Lognormal and
loglaplace are of |x|, with distribution function G, and get the sample's share q of negative elements:

    F(x) = q (1 - G(-x)) for x < 0,    q + (1 - q) G(x) for x > 0

so that q = 0 (a tensor of magnitudes) is the ordinary lognormal. Comparing a lognormal of |x| with a normal of the
signed x would not be fair: where both signs have the same magnitudes, D over |x| is 1 / max(q, 1 - q) times D over x,
twice for q = 1/2. To have it nevertheless, as the source may: `compare(abs(x))["lognormal"]`.

The parameters are a location and a scale, of x or (lognormal, loglaplace) of ln|x|, in closed form but for logistic:

    normal, lognormal      maximum likelihood: mean and standard deviation
    laplace, loglaplace    maximum likelihood: median and mean distance from it
    uniform                maximum likelihood: smallest, largest - smallest
    logistic               maximum likelihood: Newton's method from median and mean distance, at most 30 steps
    cauchy                 robust, not maximum likelihood: median and half the distance between the quartiles

Because the parameters come from the sample itself, D is smaller than the classical tables expect (Lilliefors 1967). All
estimators move and stretch with the sample, so the distribution of D under its own family depends on nothing but the
number of elements (and on q for the two): `p_value` and `critical_value` simulate it with a fixed seed, a parametric
bootstrap that serves every tensor. With a neural gradient's number of elements every p-value is near 0 and says only
that no such distribution is exact; D says how far off it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit, ndtr

from fpsim.arguments import Floats
from fpsim.lognormal import magnitudes

REPLICATES = 1999  # of the simulated null distribution
REPLICATE_SIZE = 512  # elements of the largest replicate
NEGATIVE_STEPS = 20  # q is rounded to 1/20 for the simulation
SEED = 20_060_817
NEWTON_STEPS = 30
NEWTON_TOLERANCE = 1e-12  # of location and scale, relative to the scale
SMALLEST_SAMPLE = 8  # nonzeros

EM_STEPS = 300
EM_TOLERANCE = 1e-7  # of the mean log likelihood, per step
EM_SPLITS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the sorted sample into the two components that EM starts from
LEAST_RELATIVE_SIGMA = 0.02  # of a component, over the whole sample's
LEAST_WEIGHT = 0.01
LEAST_BIC_GAIN = 10.0  # "very strong" in Kass and Raftery (1995)
LEAST_DIP = 0.05  # how far the density between two modes lies below the lower one, relative


@dataclass(frozen=True)
class Family:
    """A distribution with a location and a scale, of x or, `of_logs`, of ln|x|.

    standard: scipy's, location 0 and scale 1; cdf: its distribution function, without scipy's checks of the argument,
    which took longer than the function. estimate: (location, scale) of every row of a sorted sample.
    """

    name: str
    standard: Any
    cdf: Callable[[Floats], Floats]
    of_logs: bool
    estimate: Callable[[Floats], tuple[Floats, Floats]]


@dataclass(frozen=True)
class Fitted:
    """A family with the parameters of one sample. statistic: D, nan where the scale is 0 and there is no such fit.

    location, scale: of x in x's unit, or of ln|x|. negative_share: q. count: nonzeros of the sample.
    """

    family: str
    location: float
    scale: float
    negative_share: float
    count: int
    statistic: float

    def cdf(self, x: Floats) -> Floats:
        """F(x), float64, in x's shape."""
        family = FAMILIES[self.family]
        return _cdf(family, floats_of(x), self.location, self.scale, self.negative_share)

    @property
    def p_value(self) -> float:
        """See `p_value`; nan without a statistic."""
        return p_value(self.family, self.statistic, self.count, self.negative_share)


@dataclass(frozen=True)
class Modes:
    """One or two normal components of log2|x| over the nonzeros, the lower mean first.

    weights: sum 1; means, sigmas: in log2. bic_gain: BIC of one component less that of two, so > 0 speaks for two.
    kind: "two modes" where the gain is over 10, the lighter component has 1 % or more, and the density of the mixture
    dips between two maxima by 5 % of the lower one or more; "two components" where only the gain is: a shoulder, a skew
    or a heavy tail; else "one mode".
    """

    weights: tuple[float, float]
    means: tuple[float, float]
    sigmas: tuple[float, float]
    bic_gain: float
    kind: str


def signed_nonzeros(x: Any) -> Floats:
    """The nonzeros of x (array-like or torch tensor) as a flat float64 array. ValueError as `lognormal.magnitudes`."""
    array = x.detach().cpu().double().numpy() if hasattr(x, "detach") else floats_of(x)
    values = array.ravel()
    return values[magnitudes(values) != 0]


def floats_of(x: Any) -> Floats:
    return np.asarray(x, dtype=np.float64)


def compare(x: Any) -> dict[str, Fitted]:
    """Every family fitted to the nonzeros of x (array-like or torch tensor), by name, in the order of FAMILIES.

    ValueError where x is empty or not finite, or has fewer than 8 nonzeros.
    """
    values = signed_nonzeros(x)
    if values.size < SMALLEST_SAMPLE:
        raise ValueError(f"x must have at least {SMALLEST_SAMPLE} nonzeros, got {values.size}")
    largest = float(np.abs(values).max())
    rows = np.sort(values / largest)[None]
    negative_share = float(np.mean(rows < 0))
    found = {}
    for family in FAMILIES.values():
        location, scale, statistic = (float(part[0]) for part in _fit(family, rows))
        if family.of_logs:
            location += np.log(largest)
        else:
            location, scale = location * largest, scale * largest
        found[family.name] = Fitted(family.name, location, scale, negative_share, values.size, statistic)
    return found


def best(found: dict[str, Fitted]) -> Fitted:
    """The one with the least D; the first of equals. Those without a statistic do not count, unless none has one."""
    return min(found.values(), key=lambda fitted: np.inf if np.isnan(fitted.statistic) else fitted.statistic)


def p_value(family: str, statistic: float, count: int, negative_share: float = 0.5) -> float:
    """Probability of a D at least as large when `count` elements follow the family and it is fitted to them.

    By 1999 simulated samples: (1 + those as large) / 2000, so never below .0005. They have at most 512 elements; above
    that D is scaled by sqrt(n) + .12 + .11 / sqrt(n) (Stephens 1974). negative_share, q in [0, 1], matters for
    lognormal and loglaplace alone. nan for a statistic that is nan. ValueError for a count below 8.
    """
    if np.isnan(statistic):
        return np.nan
    null = _null(family, count, negative_share)
    return float((1 + np.sum(null >= statistic * _stretch(count))) / (1 + null.size))


def critical_value(family: str, count: int, negative_share: float = 0.5, level: float = 0.05) -> float:
    """The D that a fitted sample of the family exceeds with probability `level`. See `p_value` for the simulation."""
    return float(np.quantile(_null(family, count, negative_share), 1 - level) / _stretch(count))


def modes(x: Any) -> Modes:
    """Two normal components of log2|x|, by expectation maximisation, against one, by BIC. Zeros do not count.

    EM starts from the sorted sample cut at 10, 30, 50, 70 and 90 %, each part its own mean and deviation, takes at most
    300 steps, and keeps the start with the largest likelihood (the first of equals): no chance in it. A component's
    sigma is held at 2 % of the whole's or more. BIC = parameters ln n - 2 ln L, with 2 and 5 parameters. Of 280 samples
    of 4096 elements of the seven families, all with one mode, none was said to have two.
    ValueError where x is empty or not finite, or has fewer than 8 nonzeros.
    """
    values = np.sort(np.abs(signed_nonzeros(x)))
    if values.size < SMALLEST_SAMPLE:
        raise ValueError(f"x must have at least {SMALLEST_SAMPLE} nonzeros, got {values.size}")
    logs = np.log2(values)
    mean, sigma = float(logs.mean()), float(logs.std())
    if sigma <= 1e-12 * max(1.0, abs(mean)):
        return Modes((1.0, 0.0), (mean, mean), (0.0, 0.0), 0.0, "one mode")
    z = (logs - mean) / sigma
    parameters, likelihood = max((_maximise(z, split) for split in EM_SPLITS), key=lambda found: found[1])
    one = -z.size * (0.5 + 0.5 * np.log(2 * np.pi))
    gain = float(2 * (likelihood - one) - 3 * np.log(z.size))
    weights, means, sigmas = parameters[:, np.argsort(parameters[1], kind="stable")]
    kind = "one mode"
    if gain > LEAST_BIC_GAIN:
        is_apart = min(weights) >= LEAST_WEIGHT and _dip(weights, means, sigmas) >= LEAST_DIP
        kind = "two modes" if is_apart else "two components"
    return Modes(_pair(weights), _pair(mean + sigma * means), _pair(sigma * sigmas), gain, kind)


def _fit(family: Family, rows: Floats) -> tuple[Floats, Floats, Floats]:
    """(location, scale, D) of every row of sorted nonzeros; D is nan where the scale is 0."""
    sample = np.sort(np.log(np.abs(rows))) if family.of_logs else rows
    location, scale = family.estimate(sample)
    is_fit = (scale > 0) & (sample[:, 0] < sample[:, -1])
    divisor = np.where(is_fit, scale, 1.0)
    negative = np.mean(rows < 0, axis=-1)
    theory = _cdf(family, rows, location[:, None], divisor[:, None], negative[:, None])
    count = rows.shape[-1]
    above = np.arange(1, count + 1) / count - theory
    statistic = np.maximum(above, 1 / count - above).max(-1)
    return location, scale, np.where(is_fit, statistic, np.nan)


def _cdf(family: Family, x: Floats, location: Any, scale: Any, negative_share: Any) -> Floats:
    if not family.of_logs:
        return family.cdf((x - location) / scale)
    with np.errstate(divide="ignore"):
        below = family.cdf((np.log(np.abs(x)) - location) / scale)
    return np.where(x < 0, negative_share * (1 - below), negative_share + (1 - negative_share) * below)


def _laplace_cdf(z: Floats) -> Floats:
    tail = np.exp(-np.abs(z)) / 2
    return np.where(z < 0, tail, 1 - tail)


def _uniform_cdf(z: Floats) -> Floats:
    return np.clip(z, 0, 1)


def _cauchy_cdf(z: Floats) -> Floats:
    return np.arctan2(1, -z) / np.pi


def _mean_and_deviation(rows: Floats) -> tuple[Floats, Floats]:
    return rows.mean(-1), rows.std(-1)


def _median_and_distance(rows: Floats) -> tuple[Floats, Floats]:
    median = np.median(rows, axis=-1)
    return median, np.abs(rows - median[:, None]).mean(-1)


def _ends(rows: Floats) -> tuple[Floats, Floats]:
    return rows[:, 0], rows[:, -1] - rows[:, 0]


def _quartiles(rows: Floats) -> tuple[Floats, Floats]:
    low, median, high = np.quantile(rows, [0.25, 0.5, 0.75], axis=-1)
    return median, (high - low) / 2


def _logistic(rows: Floats) -> tuple[Floats, Floats]:
    """Solves mean(tanh(z / 2)) = 0 and mean(z tanh(z / 2)) = 1 for z = (x - location) / scale."""
    location, spread = _median_and_distance(rows)
    scale = np.where(spread > 0, spread, 1.0) / 2
    for _ in range(NEWTON_STEPS):
        z = (rows - location[:, None]) / scale[:, None]
        slope = np.tanh(z / 2)
        curvature = 1 - slope * slope
        excess = (z * slope).mean(-1) - 1
        steepness = 1 + (z * z * curvature).mean(-1) / 2
        shift = scale * 2 * slope.mean(-1) / np.maximum(curvature.mean(-1), 0.05)
        stretch = np.clip(1 + excess / steepness, 0.25, 4.0)
        is_there = (np.abs(shift) <= NEWTON_TOLERANCE * scale) & (np.abs(stretch - 1) <= NEWTON_TOLERANCE)
        location, scale = location + shift, scale * stretch
        if is_there.all():
            break
    return location, np.where(spread > 0, scale, 0.0)


FAMILIES = {
    family.name: family
    for family in (
        Family("normal", stats.norm, ndtr, False, _mean_and_deviation),
        Family("lognormal", stats.norm, ndtr, True, _mean_and_deviation),
        Family("laplace", stats.laplace, _laplace_cdf, False, _median_and_distance),
        Family("uniform", stats.uniform, _uniform_cdf, False, _ends),
        Family("cauchy", stats.cauchy, _cauchy_cdf, False, _quartiles),
        Family("loglaplace", stats.laplace, _laplace_cdf, True, _median_and_distance),
        Family("logistic", stats.logistic, expit, False, _logistic),
    )
}


def _stretch(count: int) -> float:
    return float(np.sqrt(count) + 0.12 + 0.11 / np.sqrt(count))


def _null(family: str, count: int, negative_share: float) -> Floats:
    if count < SMALLEST_SAMPLE:
        raise ValueError(f"count must be at least {SMALLEST_SAMPLE}, got {count}")
    steps = round(min(negative_share, 1 - negative_share) * NEGATIVE_STEPS) if FAMILIES[family].of_logs else 0
    return _simulated(family, min(count, REPLICATE_SIZE), steps / NEGATIVE_STEPS)


@cache
def _simulated(name: str, count: int, negative_share: float) -> Floats:
    """D, stretched, of samples of the family fitted to each."""
    family = FAMILIES[name]
    random = np.random.default_rng([SEED, list(FAMILIES).index(name), count])
    rows = family.standard.ppf(1 - random.random((REPLICATES, count)))
    if family.of_logs:
        rows = np.exp(rows) * np.where(random.random(rows.shape) < negative_share, -1.0, 1.0)
    rows.sort(axis=-1)
    return _fit(family, rows)[2] * _stretch(count)


def _maximise(z: Floats, split: float) -> tuple[Floats, float]:
    """EM from a cut of the sorted sample: rows weights, means, sigmas of two components, and the log likelihood."""
    cut = min(max(int(split * z.size), 2), z.size - 2)
    parts = (z[:cut], z[cut:])
    weights = np.array([part.size / z.size for part in parts])
    means = np.array([part.mean() for part in parts])
    sigmas = np.array([max(part.std(), LEAST_RELATIVE_SIGMA) for part in parts])
    last = -np.inf
    for _ in range(EM_STEPS):
        deviations = (z - means[:, None]) / sigmas[:, None]
        logs = np.log(weights / (sigmas * np.sqrt(2 * np.pi)))[:, None] - deviations * deviations / 2
        total = np.logaddexp(*logs)
        likelihood = float(total.sum())
        if likelihood - last < EM_TOLERANCE * z.size:
            break
        last = likelihood
        shares = np.exp(logs - total)
        sums = np.maximum(shares.sum(-1), np.finfo(np.float64).tiny)
        weights, means = sums / z.size, shares @ z / sums
        spread = (shares * (z - means[:, None]) ** 2).sum(-1) / sums
        sigmas = np.maximum(np.sqrt(spread), LEAST_RELATIVE_SIGMA)
    return np.array([weights, means, sigmas]), likelihood


def _dip(weights: Floats, means: Floats, sigmas: Floats) -> float:
    """1 - the least density between the mixture's two maxima over the lower of them; 0 where there is one maximum."""
    grid = np.linspace(means[0], means[1], 1001)
    density = mixture_density(grid, weights, means, sigmas)
    rising = np.diff(density) > 0
    maxima = 1 + np.flatnonzero(rising[:-1] & ~rising[1:])
    if not rising[0]:
        maxima = np.append(0, maxima)
    if rising[-1]:
        maxima = np.append(maxima, density.size - 1)
    if maxima.size < 2:
        return 0.0
    lowest = density[maxima[0] : maxima[-1] + 1].min()
    return float(1 - lowest / min(density[maxima[0]], density[maxima[-1]]))


def mixture_density(x: Floats, weights: Any, means: Any, sigmas: Any) -> Floats:
    """Density of a mixture of normals at x; components of sigma 0 count for nothing."""
    density = np.zeros_like(x)
    for weight, mean, sigma in zip(weights, means, sigmas, strict=True):
        if sigma > 0:
            density = density + weight * stats.norm.pdf(x, mean, sigma)
    return density


def _pair(values: Floats) -> tuple[float, float]:
    return float(values[0]), float(values[1])
