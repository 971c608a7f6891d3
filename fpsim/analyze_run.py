"""`fpsim analyze RUN`: how the gradients of a training are distributed, layer by layer and over its steps.

From what the run has recorded (see fpsim.gradients.distribution): D of seven distributions on every sampled step, and
the samples of the latest one, which are analyzed as any other tensor is (see fpsim.analyze).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fpsim.analyze import Page, draw_pages
from fpsim.console import plain_console, print_table
from fpsim.distributions import FAMILIES
from fpsim.errors import ConfigError, Problem, RunError
from fpsim.files import write_bytes
from fpsim.gradients.distribution import GRADIENTS
from fpsim.pictures import COLORS, picture
from fpsim.run_directory import CONFIG_FILE, DISTRIBUTIONS_FILE, SAMPLES_FILE, find_run, rows_of
from fpsim.tensor_file import wrong_file

ALL = "(all layers)"
INCHES = 3.4  # height of what is drawn over the steps


@dataclass(frozen=True)
class OverTime:
    """One layer's dY or dW over the recorded steps, or those of all layers together.

    zero_share, std_log2 (of log2|x| over the nonzeros): at the first and at the last step; None for all layers.
    D: by family, (mean, deviation) over steps (and layers); best_in: how many gradients a family fits best.
    """

    role: str
    layer: str
    gradients: int
    zero_share: tuple[float, float] | None
    std_log2: tuple[float | None, float | None] | None
    D: dict[str, tuple[float, float] | None]
    best_in: dict[str, int]


def run_of(place: Path) -> Path:
    """The run directory with recorded gradients that a folder is, or the newest in it. Raises ConfigError."""
    folder = find_run(place)
    if not (folder / CONFIG_FILE).is_file():
        raise wrong_file(place, "no such run")
    if not (folder / DISTRIBUTIONS_FILE).is_file():
        raise wrong_file(
            folder, f"has no {DISTRIBUTIONS_FILE}: the run was made by an fpsim that recorded no gradients"
        )
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    """What was recorded of each gradient, in the order of the steps. ConfigError where there is none, or damage."""
    try:
        found = rows_of(run / DISTRIBUTIONS_FILE)
    except RunError as error:
        raise ConfigError([Problem("", str(error))]) from None
    if not found:
        raise wrong_file(run / DISTRIBUTIONS_FILE, "is empty: nothing was recorded before the first checkpoint")
    return found


def samples_file(run: Path) -> Path:
    """The .safetensors file with the samples of the latest recorded step."""
    return run / SAMPLES_FILE


def of_neural_gradients(samples: list[tuple[str, Tensor]], recorded: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """The samples of dY, in the order in which backward reaches the layers."""
    known = dict(samples)
    names = dict.fromkeys(f"dY {row['layer']}" for row in recorded if row["role"] == "dY")
    return [(name, known[name]) for name in names if name in known]


def over_time(recorded: list[dict[str, Any]]) -> list[OverTime]:
    """All layers together, then each layer, dY before dW."""
    found = []
    for role in GRADIENTS:
        of_role = [row for row in recorded if row["role"] == role]
        if of_role:
            found.append(_over_time(role, ALL, of_role))
            layers = dict.fromkeys(row["layer"] for row in of_role)
            found += [_over_time(role, layer, [row for row in of_role if row["layer"] == layer]) for layer in layers]
    return found


def _over_time(role: str, layer: str, shown: list[dict[str, Any]]) -> OverTime:
    fitted = [row["statistics"] for row in shown if row["statistics"] is not None]
    best = [min((d for d in one if one[d] is not None), key=lambda name: one[name], default=None) for one in fitted]
    ends = (shown[0], shown[-1]) if layer != ALL else None
    return OverTime(
        role,
        layer,
        len(shown),
        None if ends is None else (_zero_share(ends[0]), _zero_share(ends[1])),
        None if ends is None else (ends[0]["std_log2"], ends[1]["std_log2"]),
        {name: _spread(one[name] for one in fitted) for name in FAMILIES},
        {name: best.count(name) for name in FAMILIES if name in best},
    )


def _zero_share(row: dict[str, Any]) -> float:
    return float(row["zeros"] / max(row["elements"], 1))


def _spread(values: Iterable[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    return (float(np.mean(known)), float(np.std(known))) if known else None


def show(run: Path, recorded: list[dict[str, Any]]) -> None:
    """Print a row for all layers together and for each, of neural gradients; of weight gradients the first alone."""
    steps = sorted({row["step"] for row in recorded})
    console = plain_console()
    console.print(f"{run}: {len(steps)} recorded steps, {steps[0]} to {steps[-1]}\n")
    header = ["gradient", "recorded", "zeros", "spread of log2|x|", *FAMILIES, "best"]
    print_table(header, [_row(one) for one in over_time(recorded) if one.role == "dY" or one.layer == ALL])
    console.print(
        "\nzeros, spread: at the first and at the last step. D of seven distributions, mean +- deviation over the "
        "steps (and layers): 0 fits exactly; * the least. best: how many gradients each fits best. dY: neural "
        "gradients, before pruning and rounding; dW: weight gradients.\n"
    )


def to_data(run: Path, recorded: list[dict[str, Any]]) -> dict[str, Any]:
    """What `show` prints, as plain data (JSON), of every layer's dY and dW."""
    steps = sorted({row["step"] for row in recorded})
    return {"run": str(run), "steps": steps, "over_time": [asdict(one) for one in over_time(recorded)]}


def _row(one: OverTime) -> list[str]:
    zeros = "-" if one.zero_share is None else ", ".join(f"{100 * share:.1f} %" for share in one.zero_share)
    spread = "-" if one.std_log2 is None else ", ".join("-" if s is None else f"{s:.2f}" for s in one.std_log2)
    least = min((name for name in FAMILIES if one.D[name]), key=lambda name: one.D[name] or (), default=None)
    cells = [f"{one.role} {one.layer}", str(one.gradients), zeros, spread]
    for name, found in one.D.items():
        cells.append("-" if found is None else f"{found[0]:.3f} +- {found[1]:.3f}{'*' if name == least else ''}")
    return [*cells, ", ".join(f"{name} {count}" for name, count in one.best_in.items())]


def save_plot(recorded: list[dict[str, Any]], found: list[Page], drawn: list[tuple[str, Tensor]], path: Path) -> None:
    """Over the steps, D and the spread of each layer's dY; below, the panels of the samples' first six tensors."""
    write_bytes(path, picture(lambda canvas: _draw(canvas, recorded, found, drawn), path.suffix[1:]))


def _draw(canvas: Figure, recorded: list[dict[str, Any]], found: list[Page], drawn: list[tuple[str, Tensor]]) -> None:
    above = draw_pages(canvas, found, drawn, inches_above=INCHES)
    assert above is not None
    axes = above.subplots(1, 2)
    of_dy = [row for row in recorded if row["role"] == "dY" and row["statistics"] is not None]
    steps = sorted({row["step"] for row in of_dy})
    for name, color in zip(FAMILIES, COLORS * 2, strict=False):
        values = [
            [row["statistics"][name] for row in of_dy if row["step"] == step and row["statistics"][name] is not None]
            for step in steps
        ]
        axes[0].plot(
            steps, [np.mean(one) if one else np.nan for one in values], color=color, marker=".", label=name,
            linewidth=2.2 if name == "lognormal" else 1.0,
        )  # fmt: skip
    axes[0].set(title="D of dY, mean over layers", xlabel="step", ylabel="D", ylim=(0, None))
    axes[0].set_ylim(0, 1.45 * axes[0].get_ylim()[1])
    axes[0].legend(ncols=4, loc="upper center")
    layers = list(dict.fromkeys(row["layer"] for row in of_dy))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for layer, shade in zip(layers, shades, strict=True):
        shown = [row for row in of_dy if row["layer"] == layer]
        axes[1].plot([row["step"] for row in shown], [row["std_log2"] for row in shown], color=shade, linewidth=1)
    axes[1].set(
        title=f"spread of log2|dY| of {len(layers)} layers (dark: last layer, light: first)", xlabel="step",
        ylabel="binades", ylim=(0, None),
    )  # fmt: skip
