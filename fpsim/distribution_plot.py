"""Four panels that show whether a tensor is normal or lognormal: numbers first (`points`), then the drawing of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from scipy import stats

from fpsim.arguments import Floats
from fpsim.distributions import signed_nonzeros
from fpsim.lognormal import fit
from fpsim.pictures import COLORS

PANELS = ("density", "log2", "qq_normal", "qq_lognormal")
DENSITY_BINS = 40
LOG2_BINS = 60
QUANTILES = np.concatenate(
    [np.geomspace(5e-4, 0.05, 20), np.linspace(0.06, 0.94, 45), 1 - np.geomspace(0.05, 5e-4, 20)]
)
LARGEST_SHOWN = 0.995  # quantile at which the density's axis ends
NORMAL, LOGNORMAL = COLORS[3], "#000000"


def points(x: Any) -> list[dict[str, Any]]:
    """What the panels draw of the nonzeros of x (array-like or torch tensor): plain data, panel by panel.

    Keys panel, at, sample, normal, lognormal. density: of |x| / mean|x|, at the middle of a bin. log2: density of
    log2|x|. Both with the densities that the fitted normal (of the signed x) and lognormal would have. qq_normal,
    qq_lognormal: at is the fitted one's quantile, sample that of x or log2|x|, in standard deviations from its mean.
    ValueError where x is empty, not finite, or has fewer than two different magnitudes.
    """
    values = signed_nonzeros(x)
    sizes = np.abs(values)
    if sizes.size == 0 or sizes.min() == sizes.max():
        raise ValueError("x must have at least two different magnitudes to be drawn")
    mean, deviation, unit = values.mean(), values.std(), sizes.mean()
    fitted = fit(values)

    def normal(at: Floats) -> Floats:
        return stats.norm.pdf(at, mean, deviation) + stats.norm.pdf(-at, mean, deviation)

    def lognormal(at: Floats) -> Floats:
        return stats.norm.pdf(np.log(at), fitted.mu, fitted.sigma) / at

    edges = np.linspace(0, np.quantile(sizes, LARGEST_SHOWN), DENSITY_BINS + 1)
    middle, density = _histogram(sizes, edges)
    found = _rows("density", middle / unit, density * unit, normal(middle) * unit, lognormal(middle) * unit)
    logs = np.log2(sizes)
    middle, density = _histogram(logs, np.linspace(logs.min(), logs.max(), LOG2_BINS + 1))
    change = np.exp2(middle) * np.log(2)
    found += _rows(
        "log2", middle, density, normal(np.exp2(middle)) * change, lognormal(np.exp2(middle)) * change
    )  # fmt: skip
    z = stats.norm.ppf(QUANTILES)
    for panel, sample in zip(PANELS[2:], (values, logs), strict=True):
        quantiles = (np.quantile(sample, QUANTILES) - sample.mean()) / sample.std()
        found += [
            {"panel": panel, "at": float(at), "sample": float(y), "normal": None, "lognormal": None}
            for at, y in zip(z, quantiles, strict=True)
        ]
    return found


def draw_panels(
    axes: Sequence[Axes], drawn: Sequence[dict[str, Any]], title: str, statistics: dict[str, float], color: str
) -> None:
    """Draw the `points` of one tensor into four axes. statistics: D by family; normal and lognormal are shown."""
    density, log2, *quantiles = axes
    for panel, one in zip(PANELS, axes, strict=True):
        rows = [row for row in drawn if row["panel"] == panel]
        at, sample = [row["at"] for row in rows], [row["sample"] for row in rows]
        if panel in PANELS[:2]:
            one.fill_between(at, sample, step="mid", color=color, alpha=0.45, linewidth=0)
            one.plot(at, [row["normal"] for row in rows], color=NORMAL, linewidth=1.4, linestyle="--")
            one.plot(at, [row["lognormal"] for row in rows], color=LOGNORMAL, linewidth=1.2)
        else:
            one.axline((0, 0), slope=1, color="#6b7280", linewidth=1)
            one.plot(at, sample, color=color, linestyle="", marker="o", markersize=3)
            largest = 1.08 * max(3.5, *np.abs(sample))
            one.set(xlim=(-3.7, 3.7), ylim=(-largest, largest))
    density.set_yscale("log")
    density.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lowest = min(row["sample"] for row in drawn if row["panel"] == "density" and row["sample"] > 0)
    density.set_ylim(bottom=lowest / 3)
    density.set_title(title, loc="left", fontsize=10, weight="bold")
    density.set(xlabel="|x| / mean |x|", ylabel="density (log scale)")
    log2.set(xlabel="log2|x|", ylabel="density", ylim=(0, None))
    for name, one in zip(("normal", "lognormal"), quantiles, strict=True):
        one.set_title(f"{name}? D = {statistics[name]:.3f}", loc="left", fontsize=10)
        one.set_xlabel(f"quantiles of a {name} (sigma)", fontsize=9)
        one.set_ylabel("of x (sigma)" if name == "normal" else "of log2|x| (sigma)", fontsize=9)


def draw_legend(canvas: Canvas, color: str) -> None:
    """What the lines and marks of all panels mean, below them."""
    meanings = [
        Line2D([], [], color=color, linewidth=7, alpha=0.45, label="the tensor's nonzeros"),
        Line2D([], [], color=LOGNORMAL, linewidth=1.2, label="fitted lognormal"),
        Line2D([], [], color=NORMAL, linestyle="--", linewidth=1.4, label="fitted normal"),
        Line2D([], [], color=color, linestyle="", marker="o", markersize=3, label="a quantile: on the line if it fits"),
    ]
    canvas.legend(handles=meanings, loc="outside lower left", ncols=4)


def _histogram(values: Floats, edges: Floats) -> tuple[Floats, Floats]:
    """Middles of the bins, and the share of all values in each over its width."""
    counts = np.histogram(values, edges)[0]
    return (edges[:-1] + edges[1:]) / 2, counts / values.size / np.diff(edges)


def _rows(panel: str, at: Floats, sample: Floats, normal: Floats, lognormal: Floats) -> list[dict[str, Any]]:
    return [
        {"panel": panel, "at": float(a), "sample": float(s), "normal": float(n), "lognormal": float(g)}
        for a, s, n, g in zip(at, sample, normal, lognormal, strict=True)
    ]
