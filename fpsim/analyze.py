"""`fpsim analyze`: which distribution a tensor follows, and the format, scale and threshold that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure

import accel
from fpsim import distribution_plot
from fpsim.console import plain_console, print_table
from fpsim.distributions import FAMILIES, SMALLEST_SAMPLE, Modes, best, compare, modes
from fpsim.errors import ConfigError, Problem
from fpsim.files import write_bytes
from fpsim.float_choice import Lognormal, format_grid, grid_error
from fpsim.gradients.thresholds import empirical, expected_sparsity
from fpsim.gradients.thresholds import lognormal as by_lognormal
from fpsim.lognormal import best_exponent_bits, cosine, fit, measured_cosine
from fpsim.pictures import COLORS, picture
from fpsim.scales import sample
from fpsim.tensor_file import all_tensors, load_tensor

SAMPLE = 1 << 14  # elements that D and the modes are taken from
MOST_DRAWN = 6  # tensors
BISECTIONS = 60
NEAR_MEAN = 4  # binades around the scale that centres the mean, among which the best scale is looked for
LN2 = float(np.log(2))


@dataclass(frozen=True)
class Threshold:
    """An alpha for what was asked, by the tensor itself or by the lognormal rule; what it reaches on the tensor."""

    rule: str
    alpha: float
    sparsity: float
    cosine: float


@dataclass(frozen=True)
class FormatAdvice:
    """The float of `bits` bits with the least mean relative error for the fitted lognormal, at its best scale 2^k.

    expected_error: of the lognormal; measured_error: mean |q - x| / |x| of the nonzeros; saturated, underflown: shares
    of the nonzeros beyond the largest number, and of those that become 0.
    """

    format: str
    bits: int
    exponent_bits: int
    scale: float
    expected_error: float
    measured_error: float
    saturated: float
    underflown: float


@dataclass(frozen=True)
class Page:
    """What is known of one tensor. mu, sigma: of ln|x|; statistics, p_values: by family, None without a fit.

    too_few: why a tensor with fewer than 8 nonzeros, or of one single magnitude, has no more than counts; None else.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    zeros: int
    sampled: int
    too_few: str | None
    mu: float | None = None
    sigma: float | None = None
    statistics: dict[str, float | None] = field(default_factory=dict)
    p_values: dict[str, float | None] = field(default_factory=dict)
    best: str | None = None
    modes: Modes | None = None
    advice: FormatAdvice | None = None
    thresholds: tuple[Threshold, ...] = ()


def pages(
    file: Path, tensor: str | None = None, bits: int = 8, sparsity: float | None = None, target: float | None = None
) -> list[Page]:
    """A page for each tensor of floats in the file, or for the one called `tensor`.

    sparsity, in [0, 1), or target, a cosine in (0, 1): what alpha is for. Raises ConfigError for a file or an option
    that is wrong, and for a tensor with NaN or infinity.
    """
    return [page(name, x, bits, sparsity, target) for name, x in tensors(file, tensor)]


def tensors(file: Path, tensor: str | None = None) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of the file's tensors, or of the one named. Raises ConfigError."""
    return list(all_tensors(file)) if tensor is None else [(tensor, load_tensor(file, tensor))]


def check_options(bits: int, sparsity: float | None, target: float | None) -> None:
    """ConfigError for an option out of range."""
    message: tuple[str, str] | None = None
    if not 2 <= bits <= 16:
        message = "--bits", f"must lie in 2..16 (got {bits})"
    elif sparsity is not None and target is not None:
        message = "--cosine", "give either --sparsity or --cosine"
    elif sparsity is not None and not 0 <= sparsity < 1:
        message = "--sparsity", f"must lie in [0, 1) (got {sparsity})"
    elif target is not None and not 0 < target < 1:
        message = "--cosine", f"must lie in (0, 1) (got {target})"
    if message is not None:
        raise ConfigError([Problem(*message)])


def page(name: str, x: torch.Tensor, bits: int, sparsity: float | None, target: float | None) -> Page:
    """See `pages`."""
    try:
        fitted = fit(x)
    except ValueError as error:
        raise ConfigError([Problem(name, str(error))]) from None
    taken = sample(x, SAMPLE)
    zeros, nonzeros = round(fitted.zero_share * fitted.count), int((taken != 0).sum())
    too_few = None
    if nonzeros < SMALLEST_SAMPLE:
        too_few = f"fewer than {SMALLEST_SAMPLE} nonzeros"
    elif not fit(taken).sigma > 0:
        too_few = "one single magnitude"
    counted = Page(name, tuple(x.shape), fitted.count, zeros, taken.numel(), too_few)
    if too_few is not None:
        return counted
    compared = compare(taken)
    return replace(
        counted,
        mu=fitted.mu,
        sigma=fitted.sigma,
        statistics={family: _plain(one.statistic) for family, one in compared.items()},
        p_values={family: _plain(one.p_value) for family, one in compared.items()},
        best=best(compared).family,
        modes=modes(taken),
        advice=_advice(x, fitted.mu, fitted.sigma, bits),
        thresholds=_thresholds(x, fitted.mu, fitted.sigma, sparsity, target),
    )


def sentence(page: Page) -> str:
    """What to do with the tensor, and how sure that is."""
    if page.too_few is not None:
        return f"{page.name}: {page.too_few}: nothing to advise."
    parts, advice = [f"{page.name}: {_fit_words(page)}."], page.advice
    parts.append(
        "No format: float32 does not reach all of its magnitudes."
        if advice is None
        else f"With {advice.bits} bits: {advice.format} ({advice.exponent_bits} exponent bits) at scale "
        f"2^{round(np.log2(advice.scale))}, mean relative error {advice.expected_error:.4f} expected of a lognormal, "
        f"{advice.measured_error:.4f} measured ({100 * advice.saturated:.2g} % saturate, "
        f"{100 * advice.underflown:.2g} % become 0)."
    )
    for threshold in page.thresholds:
        parts.append(
            f"alpha = {threshold.alpha:.4g} {threshold.rule}: {100 * threshold.sparsity:.1f} % zeros, cosine "
            f"{threshold.cosine:.4f}."
        )
    return " ".join(parts)


def show(found: list[Page]) -> None:
    """Print a row for each tensor, the best D marked, and a sentence for each."""
    header = ["tensor", "elements", "zeros", "mu (ln, log2)", "sigma (ln, log2)", *FAMILIES, "log2|x|"]
    print_table(header, [_row(page) for page in found])
    console = plain_console()
    console.print("\nD of seven distributions: 0 fits exactly; * the best. Zeros count in none of these numbers.\n")
    for page in found:
        console.print(sentence(page))


def to_data(page: Page) -> dict[str, Any]:
    """The page as plain data (JSON), with mu and sigma in log2 as well, and the sentence."""
    return {
        **asdict(page),
        "mu_log2": None if page.mu is None else page.mu / LN2,
        "sigma_log2": None if page.sigma is None else page.sigma / LN2,
        "sentence": sentence(page),
    }


def save_plot(found: list[Page], drawn: list[tuple[str, torch.Tensor]], path: Path) -> None:
    """Density, histogram of log2|x| and two QQ plots of the first six tensors; written whole or not at all."""
    write_bytes(path, picture(lambda canvas: draw_pages(canvas, found, drawn), path.suffix[1:]))


def draw_pages(
    canvas: Figure, found: list[Page], drawn: list[tuple[str, torch.Tensor]], inches_above: float = 0.0
) -> SubFigure | None:
    """Four panels for each of the first six tensors, and the canvas as high as that takes.

    Returns a part of the canvas, `inches_above` high, that is left free above them. ConfigError where none can be
    drawn.
    """
    statistics = {
        page.name: {family: np.nan if value is None else value for family, value in page.statistics.items()}
        for page in found
        if page.too_few is None
    }
    shown = [(name, x) for name, x in drawn if name in statistics][:MOST_DRAWN]
    if not shown:
        raise ConfigError([Problem("--plot", "no tensor has enough different nonzeros to be drawn")])
    height = 1.1 + 2.6 * len(shown)
    canvas.set_size_inches(13.0, inches_above + height)
    above, below = (None, canvas) if not inches_above else _two_parts(canvas, inches_above, height)
    left_out = f"; {len(drawn) - len(shown)} more not drawn, --tensor picks one" if len(drawn) > len(shown) else ""
    below.suptitle(
        "Is the tensor normal or lognormal? The smaller D, the better it fits; dots on the gray line fit exactly"
        f"{left_out}",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    for number, (name, x) in enumerate(shown):
        axes = [below.add_subplot(len(shown), 4, 4 * number + panel + 1) for panel in range(4)]
        points = distribution_plot.points(sample(x, SAMPLE))
        distribution_plot.draw_panels(axes, points, name, statistics[name], COLORS[0])
    distribution_plot.draw_legend(below, COLORS[0])
    return above


def _two_parts(canvas: Figure, above: float, below: float) -> tuple[Any, Any]:
    parts: Any = canvas.subfigures(2, 1, height_ratios=[above, below])
    return parts[0], parts[1]


def _row(page: Page) -> list[str]:
    cells = [page.name, f"{page.elements:,}", f"{100 * page.zeros / page.elements:.1f} %"]
    if page.mu is None or page.sigma is None or page.modes is None:
        return [*cells, *["-"] * (2 + len(FAMILIES)), page.too_few or "-"]
    cells += [f"{value:.3f}, {value / LN2:.3f}" for value in (page.mu, page.sigma)]
    for family, value in page.statistics.items():
        cells.append("-" if value is None else f"{value:.3f}{'*' if family == page.best else ''}")
    return [*cells, page.modes.kind]


def _fit_words(page: Page) -> str:
    assert page.best is not None
    assert page.modes is not None
    assert page.sigma is not None
    statistic, lognormal = page.statistics[page.best], page.statistics["lognormal"]
    words = f"nearest to {page.best} (D = {statistic:.3f}"
    if page.best != "lognormal" and lognormal is not None:
        words += f", lognormal {lognormal:.3f}"
    words += f"), log2|x| spreads by {page.sigma / LN2:.2f}"
    if page.modes.kind == "two modes":
        (low, high), (share, _) = page.modes.means, page.modes.weights
        words += f" in two modes, around {low:.1f} ({100 * share:.0f} %) and {high:.1f}"
    return words


def _advice(x: torch.Tensor, mu: float, sigma: float, bits: int) -> FormatAdvice | None:
    """None where float32, in which the emulation computes, cannot hold the tensor."""
    taken = x[x != 0].float()
    if not bool(((taken != 0) & taken.isfinite()).all()):
        return None
    exponent_bits = int(best_exponent_bits(bits, sigma / LN2))
    fmt = accel.Format(f"e{exponent_bits}m{bits - 1 - exponent_bits}", exponent_bits, bits - 1 - exponent_bits,
                       1 << (exponent_bits - 1), "finite")  # fmt: skip
    grid, mean = format_grid(fmt), mu / LN2
    lowest = np.floor(mean - grid.values[-1]) - NEAR_MEAN
    exponents = np.arange(lowest, np.ceil(mean - grid.values[0]) + NEAR_MEAN)
    errors = grid_error(grid, Lognormal(sigma / LN2), exponents - mean)
    least = int(errors.argmin())
    exponent = int(np.clip(exponents[least], -126, 127))
    rounded = accel.quantize(taken, fmt, scale=2.0**exponent)
    sizes = taken.double().abs()
    return FormatAdvice(
        fmt.name, bits, exponent_bits, 2.0**exponent, float(errors[least]),
        float(((rounded.double() - taken.double()).abs() / sizes).mean()),
        float((sizes > fmt.max * 2.0**exponent).double().mean()), float((rounded == 0).double().mean()),
    )  # fmt: skip


def _thresholds(
    x: torch.Tensor, mu: float, sigma: float, sparsity: float | None, target: float | None
) -> tuple[Threshold, ...]:
    if sparsity is not None:
        asked = f"for {100 * sparsity:g} % zeros"
        found = {"from the tensor itself": empirical(x, sparsity), "by the lognormal rule": by_lognormal(x, sparsity)}
    elif target is not None:
        asked = f"for a cosine of {target:g}"
        largest = float(np.log(float(x.abs().max()))) - np.log(1 - target) + 2 * abs(np.log(target)) + 40
        found = {
            "from the tensor itself": _falling(
                lambda alpha: measured_cosine(x, alpha), target, mu - 40 * sigma, largest
            ),
            "by the lognormal rule": _falling(
                lambda alpha: float(cosine(alpha, mu, sigma)), target, mu - 12 * sigma, mu + 12 * sigma + 2 * sigma**2
            ),
        }
    else:
        return ()
    return tuple(
        Threshold(f"{asked}, {rule}", alpha, expected_sparsity(x, alpha), measured_cosine(x, alpha))
        for rule, alpha in found.items()
    )


def _falling(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The alpha at which a function that falls with alpha is `target`, by halving an interval of ln alpha."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(float(np.exp(middle))) > target else (low, middle)
    return float(np.exp((low + high) / 2))


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value
