"""`fpsim recommend`: the points that `accel.recommend` tried, as a table, a plot and JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import accel
from fpsim.console import plain_console, print_table
from fpsim.errors import ConfigError, Problem
from fpsim.files import write_bytes
from fpsim.lognormal import Fit
from fpsim.pictures import COLORS, WIDTH_INCHES, picture
from fpsim.tensor_file import load_tensor

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
GRAY = "#6b7280"
WAYS = {
    "streams": ("±alpha outside the format (streams)", COLORS[0]),
    "reserved": ("±alpha in two codes of the format (reserved)", COLORS[2]),
    "snap": ("alpha on the format's grid (snap)", COLORS[1]),
    "rounded": ("alpha rounded: biased, only to compare (rounded)", COLORS[3]),
    "none": ("not pruned", GRAY),
}
MARKERS = "os^DvPX<>hdp"
LIMIT = "#b91c1c"
ALLOWED: dict[str, Any] = {"color": "#fde68a", "alpha": 0.35, "linewidth": 0, "zorder": 0}
PAPER = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.0}
APART = 26  # dots between the names of points
MANY = 200  # points, from which on those that are beaten are drawn fainter
ROOM_FOR_NAMES = 3.5  # how many times fewer bits than the fewest the axis begins at
AXES = {"rms": "error ||y - x|| / ||x||", "relative": "mean relative error of rounding a nonzero"}
HEIGHT_INCHES = 6.2


def source_of(file: Path | None, tensor: str | None, lognormal: str | None) -> Any:
    """What `accel.recommend` takes: the tensor of a file, or a lognormal given as MU,SIGMA. Raises ConfigError."""
    if (file is None) == (lognormal is None):
        raise ConfigError([Problem("", "give either a FILE or --lognormal MU,SIGMA")])
    if file is not None:
        return load_tensor(file, tensor)
    if tensor is not None:
        raise ConfigError([Problem("--tensor", "names a tensor of a FILE")])
    assert lognormal is not None
    try:
        mu, sigma = map(float, lognormal.split(","))
    except ValueError:
        raise ConfigError([Problem("--lognormal", f"must be two numbers, MU,SIGMA (got {lognormal!r})")]) from None
    return Fit(mu, sigma, 0.0, 0)


def check_outputs(plot: Path | None, as_json: Path | None) -> None:
    """ConfigError for a file that could not be written, before anything is computed."""
    for option, path in (("--plot", plot), ("--json", as_json)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError([Problem(option, f"no file can be written at {str(path)!r}")])
    if plot is not None and plot.suffix not in PLOT_SUFFIXES:
        raise ConfigError([Problem("--plot", f"must end in {', '.join(PLOT_SUFFIXES)} (got {plot.name!r})")])


def recommend(source: Any, **options: Any) -> accel.Recommendation:
    """`accel.recommend`, whose complaints become ConfigError."""
    try:
        return accel.recommend(source, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError([Problem("", str(error))]) from None


def show(found: accel.Recommendation) -> None:
    """Print the Pareto points as a table, and the advice in a sentence."""
    console = plain_console()
    console.print(
        f"{found.source}: {len(found.points)} combinations, these are the best in bits and {found.error} error\n"
    )
    print_table(accel.Point.COLUMNS, [point.row() for point in found.pareto])
    console.print()
    for reason in found.refused:
        console.print(f"left out: {reason}")
    console.print(found.explanation)


def to_data(found: accel.Recommendation) -> dict[str, Any]:
    """Everything as plain data (JSON). `pareto` and `best` are numbers of points."""
    numbers = {id(point): number for number, point in enumerate(found.points)}
    return {
        "source": found.source,
        "error": found.error,
        "budget_bits": found.budget_bits,
        "max_error": found.max_error,
        "explanation": found.explanation,
        "best": None if found.best is None else numbers[id(found.best)],
        "pareto": [numbers[id(point)] for point in found.pareto],
        "points": [{**asdict(point), "bits_per_element": point.bits_per_element} for point in found.points],
        "refused": list(found.refused),
    }


def save_plot(found: accel.Recommendation, path: Path) -> None:
    """Bits against error of every point, the Pareto line, the limits and the advice; written whole or not at all."""
    size = WIDTH_INCHES, HEIGHT_INCHES
    write_bytes(path, picture(lambda canvas: _draw(canvas, found), path.suffix[1:], size))


def _draw(canvas: Figure, found: accel.Recommendation) -> None:
    axes = canvas.add_subplot()
    axes.set_title(f"What to store it as: {found.source}", loc="left", fontsize=10, pad=12)
    _draw_points(axes, found)
    _draw_limits(axes, found)
    _draw_names(axes, found)
    _draw_legends(canvas, found)


def _draw_points(axes: Axes, found: accel.Recommendation) -> None:
    front, markers = found.pareto, _markers(found)
    faint = 0.3 if len(found.points) > MANY else 0.7
    for (way, codec), group in _groups(found.points).items():
        axes.scatter(*_places(found, group), s=13, marker=markers[codec], color=WAYS[way][1], alpha=faint, linewidths=0)
    axes.step(*_places(found, front), where="post", color="black", linewidth=1.1, zorder=3)
    for (way, codec), group in _groups(front).items():
        axes.scatter(
            *_places(found, group), s=44, marker=markers[codec], color=WAYS[way][1], edgecolors="black", linewidths=0.7,
            zorder=4,
        )  # fmt: skip
    is_log = found.error_of(front[-1]) > 0
    axes.set_xscale("log", base=2)
    axes.set_yscale("log" if is_log else "linear")
    axes.set_xlabel("bits an element of the stream, header and offsets included (log scale)")
    axes.set_ylabel(AXES[found.error] + (" (log scale)" if is_log else ""))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_limits(axes: Axes, found: accel.Recommendation) -> None:
    left, right, bottom, top = *axes.get_xlim(), *axes.get_ylim()
    left = min(left, found.pareto[0].bits_per_element / ROOM_FOR_NAMES)
    bits, error = found.budget_bits, found.max_error
    if bits is not None:
        axes.axvline(bits, color=LIMIT, linewidth=1.3, linestyle="--", zorder=1)
        axes.annotate(
            f"budget: {bits:g} bits", (bits, 1), xycoords=axes.get_xaxis_transform(), xytext=(5, -10),
            textcoords="offset points", color=LIMIT, bbox=PAPER,
        )  # fmt: skip
    if error is not None:
        axes.axhline(error, color=LIMIT, linewidth=1.3, linestyle="--", zorder=1)
        axes.annotate(
            f"largest error: {error:g}", (1, error), xycoords=axes.get_yaxis_transform(), xytext=(-2, 5),
            textcoords="offset points", ha="right", color=LIMIT, bbox=PAPER,
        )  # fmt: skip
    if bits is not None or error is not None:
        axes.fill_between([left, right if bits is None else bits], bottom, top if error is None else error, **ALLOWED)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _draw_names(axes: Axes, found: accel.Recommendation) -> None:
    """What the advised point is, above its place; and some others of the line, left of theirs, as far as there is room.

    Each is named by its zeros and format.
    """
    best = found.best
    named = [] if best is None else [best]
    if best is not None:
        axes.scatter(*_places(found, [best]), s=240, facecolors="none", edgecolors="black", linewidths=1.8, zorder=5)
    span = axes.transData.transform
    places = {id(point): span((point.bits_per_element, found.error_of(point))) for point in found.pareto}
    for point in found.pareto:
        if all(abs(places[id(point)][1] - places[id(other)][1]) > APART for other in named):
            named.append(point)
    plain: dict[str, Any] = {"fontsize": 8}
    for point in named:
        words, style = f"{100 * point.achieved:.0f} % zeros, {point.format}", plain
        if point is best:
            words, style = f"advised: {words}, {point.codec}", {"fontsize": 9, "weight": "bold"}
        axes.annotate(
            words, (point.bits_per_element, found.error_of(point)), xytext=(-14, -12), textcoords="offset points",
            ha="right", zorder=6, bbox=PAPER, **style,
        )  # fmt: skip


def _draw_legends(figure: Figure, found: accel.Recommendation) -> None:
    def mark(color: str, label: str, **options: Any) -> Line2D:
        return Line2D([], [], **{"marker": "o", "linestyle": "", "color": color, "label": label, **options})

    tried = [way for way in WAYS if any(point.way == way for point in found.points)]
    colors = [mark(WAYS[way][1], WAYS[way][0]) for way in tried]
    figure.legend(handles=colors, loc="outside lower left", title="colour: where ±alpha is kept", alignment="left")
    shapes = [mark(GRAY, codec, marker=marker) for codec, marker in _markers(found).items()]
    figure.legend(handles=shapes, loc="outside right upper", title="shape: codec", alignment="left")
    meanings: list[Artist] = [
        mark(GRAY, "a combination that was tried", alpha=0.4, markersize=4),
        mark("black", "none is better in both bits and error", linestyle="-", markerfacecolor="white"),
    ]
    if found.best is not None:
        meanings.append(mark("black", "advised", markersize=12, markerfacecolor="none", markeredgewidth=1.8))
    if found.budget_bits is not None or found.max_error is not None:
        meanings.append(Patch(label="within the limits", **ALLOWED))
    figure.legend(handles=meanings, loc="outside lower right", title="marks", alignment="left")


def _markers(found: accel.Recommendation) -> dict[str, str]:
    codecs = dict.fromkeys(point.codec for point in found.points)
    return {codec: MARKERS[number % len(MARKERS)] for number, codec in enumerate(codecs)}


def _groups(points: Iterable[accel.Point]) -> dict[tuple[str, str], list[accel.Point]]:
    groups: dict[tuple[str, str], list[accel.Point]] = {}
    for point in points:
        groups.setdefault((point.way, point.codec), []).append(point)
    return groups


def _places(found: accel.Recommendation, points: Iterable[accel.Point]) -> tuple[list[float], list[float]]:
    listed = list(points)
    return [point.bits_per_element for point in listed], [found.error_of(point) for point in listed]
