"""Which float suits a distribution: the mean relative error of rounding, and the exponent bits that make it least.

Source: Chmiel et al., "Neural gradients are near-lognormal: improved quantized and sparse training", ICLR 2021
(arXiv 2006.08173), section 4. The error of rounding x != 0 into q is |q - x| / |x|; its mean is over a distribution of
magnitudes. Of `bits` bits one is the sign, n2 = 1 .. bits - 1 are exponent, n1 = bits - 1 - n2 >= 0 mantissa.

The source's float has 2^n2 ordinary exponents -E .. E - 1, E = 2^(n2 - 1), rounds to nearest, flushes |x| < 2^-E to 0
and clamps |x| >= 2^E to 2^E: `model_float`. With r = 1 / (8 ln 2 2^n1) its error is about

    (7) r P(2^-E < |x| < 2^E) + P(|x| < 2^-E) + P(|x| > 2^E) - 2^E E[1/|x|; |x| > 2^E]

For a lognormal, log2|x| ~ N(0, s^2), Phi the standard normal distribution function, that is

    eta = r (2 Phi(E / s) - 1) + 2 Phi(-E / s) - 2^E exp(s^2 ln(2)^2 / 2) Phi(-(E / s + s ln 2))

r is the mean over a binade of evenly spread log2|x| for n1 -> infinity (at n1 = 0 it is .180, the exact one .170), so
(7) is good where the density of log2|x| hardly changes within a binade: within .002 for n1 >= 1 and .012 for n1 = 0
where s >= 0.5. Below, where the mass gathers around the number 1, it is off by up to .04 and .13 (s = 0.1).

`grid_error` instead adds up the exact integrals over the cells of any grid, to about 1e-12. Real formats have
subnormals and a scale: `scaled_error` is their least error over all scales 2^k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erfcx, exp1, ndtr

from fpsim.arguments import Floats, Integers, floats, integers, positive

if TYPE_CHECKING:
    from accel import Format

LN2 = float(np.log(2))
MODELS = ("numeric", "closed_form")
POLICIES = ("finite", "fn", "ieee", "fnuz", "p3109")
MOST_BITS = {"closed_form": 32, "numeric": 16}  # beyond 16 bits the codes of a format are not listed
MOST_EXPONENT_BITS = 8  # of a format that float32 carries
NOISE = 1e-12  # of grid_error
MARGIN = 32  # powers of two beyond those that put the median inside the format's range
NUMBERS_AT_ONCE = 1 << 20
FAR = 500.0  # as log2|x| / sigma: beyond it a normal and a Laplace have no mass, and float64 has its squares


@dataclass(frozen=True)
class Distribution:
    """Of magnitudes |x|, for an array of one parameter. ValueError, naming it, unless all are finite and > 0.

    The methods broadcast log2_t with the parameter.
    """

    parameter: ArrayLike
    NAME: ClassVar[str]

    def __post_init__(self) -> None:
        positive(self.parameter, self.NAME)

    @property
    def values(self) -> Floats:
        return floats(self.parameter)

    def above(self, log2_t: Floats) -> Floats:
        """P(|x| > t)."""
        raise NotImplementedError

    def ratio_above(self, log2_t: Floats) -> Floats:
        """t E[1/|x|; |x| > t], which lies between 0 and P(|x| > t)."""
        raise NotImplementedError


class Lognormal(Distribution):
    """log2|x| ~ N(0, sigma_log2^2)."""

    NAME = "sigma_log2"

    def above(self, log2_t: Floats) -> Floats:
        return ndtr(-log2_t / self.values)

    def ratio_above(self, log2_t: Floats) -> Floats:
        """t exp(s^2 ln(2)^2 / 2) Phi(-z), y = log2(t) / s, z = y + s ln 2; as exp(-y^2 / 2) erfcx(z / sqrt(2)) / 2."""
        s = self.values
        y, z = log2_t / s, log2_t / s + s * LN2
        low = np.exp(np.minimum((y + z) * s * LN2 / 2, 0)) * ndtr(-z)
        return np.where(z > 0, np.exp(-y * y / 2) * erfcx(np.maximum(z, 0) / np.sqrt(2)) / 2, low)


class Normal(Distribution):
    """x ~ N(0, sigma^2). Whatever sigma, the standard deviation of log2|x| is pi / (2 sqrt(2) ln 2) = 1.60."""

    NAME = "sigma"

    def above(self, log2_t: Floats) -> Floats:
        return 2 * ndtr(-_exp2(log2_t - np.log2(self.values)))

    def ratio_above(self, log2_t: Floats) -> Floats:
        t = _exp2(log2_t - np.log2(self.values))
        return t * exp1(t * t / 2) / np.sqrt(2 * np.pi)


class Laplace(Distribution):
    """|x| is exponential with that mean: the standard deviation of x is sqrt(2) mean, that of log2|x| 1.85."""

    NAME = "mean"

    def above(self, log2_t: Floats) -> Floats:
        return np.exp(-_exp2(log2_t - np.log2(self.values)))

    def ratio_above(self, log2_t: Floats) -> Floats:
        t = _exp2(log2_t - np.log2(self.values))
        return t * exp1(t)


@dataclass(frozen=True)
class Grid:
    """The positive numbers of a float, ascending, and where each one's cell begins, both as log2: shape (numbers,).

    What lies below the first cell becomes 0, what lies above the last number becomes that number.
    """

    values: Floats
    edges: Floats


def relative_error(exponent_bits: ArrayLike, mantissa_bits: ArrayLike, sigma_log2: ArrayLike) -> Floats:
    """Mean relative error of the source's float for a lognormal, log2|x| ~ N(0, sigma_log2^2): eta, which broadcasts.

    See the module for its range of validity. ValueError for exponent_bits that are no integer from 1 to 32,
    mantissa_bits from 0 to 32, or sigma_log2 <= 0 or not finite.
    """
    return closed_form_error(exponent_bits, mantissa_bits, Lognormal(sigma_log2))


def best_exponent_bits(
    bits: ArrayLike, sigma_log2: ArrayLike, model: str = "numeric", policy: str = "finite"
) -> Integers:
    """The exponent bits of the float of `bits` bits with the least mean relative error for a lognormal.

    Arguments as for `best_exponent_bits_of`; `bits` and `sigma_log2` broadcast.
    """
    return best_exponent_bits_of(Lognormal(sigma_log2), bits, model, policy)


def best_exponent_bits_of(
    distribution: Distribution, bits: ArrayLike, model: str = "numeric", policy: str = "finite"
) -> Integers:
    """The exponent bits of the float of `bits` bits, sign included, with the least mean relative error; int64.

    model: `closed_form`, equation (7) of the source's float without a scale, or `numeric`, the `scaled_error` of the
    real formats of `policy` (see accel.formats.POLICIES), at most 8 exponent bits. `finite` makes a number of every
    code, so that widths alone are compared. The smaller of two that are equal.
    ValueError for bits that are no integer from 2 to 32 (`closed_form`) or 16 (`numeric`), another model or policy.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    widths, parameter = np.broadcast_arrays(integers(bits, "bits", 2, MOST_BITS[model]), distribution.values)
    best = np.empty(widths.shape, np.int64)
    for width in np.unique(widths):
        chosen = widths == width
        best[chosen] = errors_of(type(distribution)(parameter[chosen]), int(width), model, policy).argmin(-1) + 1
    return best


def errors_of(distribution: Distribution, bits: int, model: str = "numeric", policy: str = "finite") -> Floats:
    """The errors that `best_exponent_bits_of` compares: the parameter's shape + (exponent bits from 1 on,).

    Infinite where the policy has no such format (`ieee` none without mantissa bits).
    """
    splits = [(e, bits - 1 - e) for e in range(1, bits)]
    if model == "closed_form":
        return np.stack([closed_form_error(e, m, distribution) for e, m in splits], -1)
    errors = []
    for e, m in splits[:MOST_EXPONENT_BITS]:
        fmt = _format(e, m, policy)
        nothing = np.full(distribution.values.shape, np.inf)
        errors.append(nothing if fmt is None else scaled_error(fmt, distribution)[0])
    return np.stack(errors, -1)


def closed_form_error(exponent_bits: ArrayLike, mantissa_bits: ArrayLike, distribution: Distribution) -> Floats:
    """Mean relative error of the source's float, without a scale: equation (7); the arguments broadcast."""
    e = integers(exponent_bits, "exponent_bits", 1, 32)
    r = np.exp2(-integers(mantissa_bits, "mantissa_bits", 0, 32).astype(np.float64)) / (8 * LN2)
    half = np.exp2(e - 1.0)
    over, under = distribution.above(half), 1 - distribution.above(-half)
    return r * (1 - under - over) + under + over - distribution.ratio_above(half)


def model_float(x: Any, exponent_bits: int, mantissa_bits: int) -> Floats:
    """Magnitudes x rounded into the source's float, bit for bit: float64 in x's shape. exponent_bits at most 10."""
    half = 1 << (int(integers(exponent_bits, "exponent_bits", 1, 10)) - 1)
    magnitudes = np.abs(floats(x))
    step = np.ldexp(1.0, np.frexp(magnitudes)[1] - 1 - int(integers(mantissa_bits, "mantissa_bits", 0, 32)))
    rounded = np.minimum(np.rint(magnitudes / step) * step, 2.0**half)
    return np.where(magnitudes < 2.0**-half, 0.0, rounded)


def model_grid(exponent_bits: int, mantissa_bits: int) -> Grid:
    """The grid of the source's float, whose last number is 2^E. exponent_bits at most 10, mantissa_bits at most 15."""
    half = 1 << (int(integers(exponent_bits, "exponent_bits", 1, 10)) - 1)
    codes = np.arange(2 * half << int(integers(mantissa_bits, "mantissa_bits", 0, 15)))
    exponents, fractions = np.divmod(codes / 2.0**mantissa_bits, 1)
    values = np.append(exponents - half + np.log2(1 + fractions), half)
    middles = exponents - half + np.log2(1 + fractions + 2.0 ** -(mantissa_bits + 1))
    return Grid(values, np.append(-half, middles))


def format_grid(fmt: Format) -> Grid:
    """The grid of a format under rounding to nearest and saturation. ValueError above 16 bits."""
    codes = fmt.codes().astype(np.float64)
    values = np.unique(codes[np.isfinite(codes) & (codes > 0)])
    middles = (np.append(0, values[:-1]) + values) / 2
    return Grid(np.log2(values), np.log2(middles))


def grid_error(grid: Grid, distribution: Distribution, log2_scale: ArrayLike = 0.0) -> Floats:
    """Mean relative error of rounding to nearest on a grid times 2^log2_scale (which broadcasts with the parameter).

    The exact sum over half cells: v E[1/|x|] - P below a number v, P - v E[1/|x|] above it, and P below the first cell.
    """
    parameter, scale = np.broadcast_arrays(distribution.values, floats(log2_scale))
    flat, scales = parameter.reshape(-1, 1), scale.reshape(-1, 1)
    errors = np.empty(len(flat))
    rows = max(1, NUMBERS_AT_ONCE // len(grid.values))
    for first in range(0, len(flat), rows):
        piece = slice(first, first + rows)
        errors[piece] = _grid_error(grid, type(distribution)(flat[piece]), scales[piece])
    return errors.reshape(parameter.shape)


def _grid_error(grid: Grid, distribution: Distribution, scale: Floats) -> Floats:
    values, edges = grid.values + scale, grid.edges + scale
    above_value, above_edge = distribution.above(values), distribution.above(edges)
    ratio_value, ratio_edge = distribution.ratio_above(values), distribution.ratio_above(edges)
    begin = ratio_edge * np.exp2(grid.values - grid.edges)
    end = ratio_edge[:, 1:] * np.exp2(grid.values[:-1] - grid.edges[1:])
    below = (begin - ratio_value) - (above_edge - above_value)
    above = above_value - ratio_value
    above[:, :-1] += end - above_edge[:, 1:]
    return (below + above).sum(-1) + 1 - above_edge[:, 0]


def scaled_error(fmt: Format, distribution: Distribution) -> tuple[Floats, Integers]:
    """The least mean relative error of a format over all scales 2^k, and that k (int64), in the parameter's shape.

    The error falls and then rises with k: the tail above the largest number against the share below the smallest. So
    the best k puts the mean of log2|x| into the format's range with just the headroom that the tail is worth. It is
    found by halving an interval; where the error is flat, the smallest k of it.
    """
    grid = format_grid(fmt)
    median = _log2_median(distribution)
    low = np.floor(median - grid.values[-1]).astype(np.int64) - MARGIN
    high = np.ceil(median - grid.values[0]).astype(np.int64) + MARGIN
    while (low < high).any():
        middle = (low + high) // 2
        gain = grid_error(grid, distribution, middle) - grid_error(grid, distribution, middle + 1)
        is_open, falls = low < high, gain > NOISE
        low, high = np.where(is_open & falls, middle + 1, low), np.where(is_open & ~falls, middle, high)
    return grid_error(grid, distribution, low), low


def _log2_median(distribution: Distribution) -> Floats:
    low, high = (np.full(distribution.values.shape, bound) for bound in (-1100.0, 1100.0))
    for _ in range(16):
        middle = (low + high) / 2
        is_below = distribution.above(middle) > 0.5
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return low


def _format(exponent_bits: int, mantissa_bits: int, policy: str) -> Format | None:
    """The format of these widths with exponents around 0 (a scale makes up for any bias), None where there is none."""
    from accel.formats import Format

    name = f"e{exponent_bits}m{mantissa_bits}"
    try:
        return Format(name, exponent_bits, mantissa_bits, 1 << (exponent_bits - 1), policy)
    except ValueError:
        return None


def _exp2(log2: Floats) -> Floats:
    return np.exp2(np.clip(log2, -FAR, FAR))
