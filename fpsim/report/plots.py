"""The report's plots, as inline SVG: deterministic, text kept as text, no outside reference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from io import BytesIO, StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe-Ito
# role: color, vertical offset inside the row of its layer
OPERANDS = {"weight": ("#0072b2", -0.25), "activation": ("#009e73", 0.0), "gradient": ("#d55e00", 0.25)}
LINE_STYLES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fpsim",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "axes.edgecolor": "#8a929b",
    "legend.frameon": False,
}
WIDTH_INCHES = 9.0


def picture(
    draw: Callable[[Figure], Any], kind: str, size_inches: tuple[float, float] | None = None, salt: str = "fpsim"
) -> bytes:
    """What `draw` draws on a canvas, as `png`, `svg` or `pdf`: the same bytes for the same drawing.

    salt: of the ids in an SVG, to be different in pictures of one page.
    """
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        canvas = Figure(figsize=size_inches, layout="constrained")
        draw(canvas)
        stream = BytesIO()
        canvas.savefig(stream, format=kind, dpi=110, metadata=metadata)
    return stream.getvalue()


def accuracy_svg(runs: list[dict[str, Any]]) -> str:
    """Test accuracy after every epoch, one line per run."""

    def draw(axes: Axes) -> None:
        for index, run in enumerate(runs):
            measured = [entry for entry in run["history"] if entry["test_accuracy_percent"] is not None]
            axes.plot(
                [entry["epoch"] for entry in measured],
                [entry["test_accuracy_percent"] for entry in measured],
                marker="o",
                markersize=4,
                color=COLORS[index % len(COLORS)],
                linestyle=LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)],
                label=f"{'emulated' if run['emulated'] else 'float32'}: {run['label']}",
            )
        axes.set(xlabel="epoch", ylabel="test accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _svg("accuracy", draw, height_inches=3.4 + 0.2 * len(runs))


def bits_svg(run: dict[str, Any], prefix: str) -> str:
    """Bits per element (log scale) of each layer's weight, activation and gradient, with the gradient's tag entropy."""
    records = [record for record in run["tensors"] if record["role"] in OPERANDS]
    layers = list(dict.fromkeys(record["layer"] for record in records))

    def draw(axes: Axes) -> None:
        for role, (color, offset) in OPERANDS.items():
            shown = [record for record in records if record["role"] == role]
            rows = [layers.index(record["layer"]) + offset for record in shown]
            axes.scatter([record["bits_per_element"] for record in shown], rows, s=28, color=color, label=role)
        limits = [
            (record["tag_entropy_bits_per_element"], layers.index(record["layer"]) + 0.25)
            for record in records
            if record["role"] == "gradient" and record["tag_entropy_bits_per_element"]
        ]
        axes.scatter(
            [bits for bits, _ in limits], [row for _, row in limits], s=46, marker="|", color="black",
            label="gradient's tag entropy",
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda bits, _: f"{bits:g}")
        axes.set_xlabel("bits per element (log scale)")
        _name_rows(axes, layers)

    return _svg(f"{prefix}-bits", draw, height_inches=1.4 + 0.27 * len(layers))


def sparsity_svg(run: dict[str, Any], prefix: str) -> str:
    """Gradient sparsity of each pruned layer: achieved (bar, standard deviation over steps), asked, lognormal rule."""
    rows = [row for row in run["gradients"] if row["asked_percent"] is not None]

    def draw(axes: Axes) -> None:
        positions = range(len(rows))
        achieved = [row["achieved_percent"] for row in rows]
        deviations = [row["achieved_std_points"] for row in rows]
        axes.barh(
            positions, achieved, xerr=deviations, height=0.62, color="#7fb3d5", ecolor="#28546f",
            label="achieved (± standard deviation over steps)",
        )  # fmt: skip
        asked = [row["asked_percent"] for row in rows]
        axes.vlines(
            asked, [row - 0.5 for row in positions], [row + 0.5 for row in positions], color="black", linewidth=1.4,
            label="asked",
        )  # fmt: skip
        fitted = [(row["lognormal_percent"], position) for position, row in enumerate(rows)]
        fitted = [(percent, position) for percent, position in fitted if percent is not None]
        axes.scatter(
            [percent for percent, _ in fitted], [position for _, position in fitted], s=34, marker="D",
            color="#d55e00", zorder=3, label="the lognormal rule's",
        )  # fmt: skip
        axes.set(xlim=(0, 100), xlabel="zeros in the neural gradient (%)")
        _name_rows(axes, [row["layer"] for row in rows])

    return _svg(f"{prefix}-sparsity", draw, height_inches=1.4 + 0.27 * len(rows))


def weights_svg(run: dict[str, Any], prefix: str) -> str:
    """Share of zero weights after every renewal of the masks."""
    history = run["weight_pruning"]["history"]

    def draw(axes: Axes) -> None:
        steps, shares = [row["step"] for row in history], [100 * row["sparsity"] for row in history]
        axes.step(
            [0, *steps, run["steps"]], [0, *shares, shares[-1]], where="post", color=COLORS[0], label="zero weights"
        )
        axes.set(xlabel="step", ylabel="zero weights (%)", ylim=(0, 100))

    return _svg(f"{prefix}-weights", draw, height_inches=3.2)


def snr_svg(run: dict[str, Any], prefix: str) -> str:
    """How the signal-to-noise ratios of the weights' gradients were distributed at the latest renewal of the masks."""
    pruning = run["weight_pruning"]
    histogram = pruning["log2_snr"]

    def draw(axes: Axes) -> None:
        edges = [histogram["lowest"] + i for i in range(len(histogram["counts"]))]
        axes.bar(edges, histogram["counts"], width=1.0, align="edge", color="#7fb3d5", label="weights")
        axes.axvline(math.log2(pruning["threshold"]), color="black", linewidth=1.4, label="threshold")
        axes.set(xlabel="log2 of the signal-to-noise ratio", ylabel="weights")

    return _svg(f"{prefix}-snr", draw, height_inches=3.2)


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _svg(prefix: str, draw: Callable[[Axes], None], height_inches: float) -> str:
    """An <svg> element; `prefix` keeps its ids apart from those of other plots in the same page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        draw(figure.add_subplot())
        figure.legend(loc="outside upper left", ncols=2 if prefix == "accuracy" else 4)
        stream = StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=metadata)
    element = stream.getvalue().partition("<svg ")[2]
    return "<svg " + re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", element)
