"""Trainings whose neural gradients have 8, 6 or 4 bits, with fixed exponent bits and with those that a layer chooses.

Source: Chmiel et al., ICLR 2021, section 4. Gradients alone are rounded, to nearest, at the scale where the fitted
lognormal rounds best (`scale: lognormal_error`); the formats make a number of every code (`policy: finite`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from fpsim.config import Config, parse_config
from fpsim.figures.figure import Figure, Measured, draw_plain
from fpsim.figures.runs import summaries, train_all
from fpsim.pictures import COLORS

SEEDS = 3
FIXED = {8: (5, 4, 3, 2), 6: (4, 3, 2), 4: (3, 2)}  # bits: exponent bits
PLAIN = "fp32"
ADAPT = "epoch"


def measure_formats(config: Config, runs: Path) -> Measured:
    """Rows: one a run (see `train_all`). Results: of each number of bits and way to split them, over its seeds."""
    rows, data = train_all(_wanted(config), runs)
    return Measured(
        rows,
        {
            "data": data,
            "training": config.training.model_dump(mode="json"),
            "model": config.model.model_dump(mode="json"),
            "formats": summaries(rows, ("bits", "method"), PLAIN),
        },
    )


def _wanted(config: Config) -> Iterator[tuple[dict[str, Any], Config]]:
    """(network, bits, method, seed) and the configuration of each run; method: the format, `adaptive` or fp32."""
    found: list[tuple[int, str, dict[str, Any] | None]] = [(32, PLAIN, None)]
    for bits, splits in FIXED.items():
        for exponent_bits in splits:
            found.append((bits, f"e{exponent_bits}m{bits - 1 - exponent_bits}", _gradients(bits, exponent_bits)))
        found.append((bits, "adaptive", {**_gradients(bits, splits[len(splits) // 2]), "adapt": ADAPT}))
    for bits, method, gradients in found:
        for seed in range(config.seed, config.seed + SEEDS):
            content = config.model_dump()
            content["emulation"] = None if gradients is None else {"gradients": gradients}
            content |= {"name": f"{config.name}-{bits}-{method}", "seed": seed}
            yield {"network": config.model.name, "bits": bits, "method": method, "seed": seed}, parse_config(content)


def _gradients(bits: int, exponent_bits: int) -> dict[str, Any]:
    widths = {"exponent_bits": exponent_bits, "mantissa_bits": bits - 1 - exponent_bits}
    return {"format": {**widths, "policy": "finite"}, "scale": "lognormal_error"}


def draw_formats(canvas: Canvas, measured: Measured) -> None:
    data, model = measured.data_name, measured.results["model"]
    canvas.suptitle(
        f"Accuracy by the format of the neural gradients: {model['name']} of width {model.get('width')} on {data}, "
        f"{measured.results['training']['epochs']} epochs\n"
        "small: a run each; large: mean over seeds; band: float32, mean +- deviation over seeds",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    axes = canvas.add_subplot()
    means = measured.results["formats"]
    draw_plain(axes, next(one for one in means if one["method"] == PLAIN))
    names = []
    for place, one in enumerate(one for one in means if one["method"] != PLAIN):
        color = COLORS[list(FIXED).index(one["bits"])]
        runs = [row for row in measured.rows if (row["bits"], row["method"]) == (one["bits"], one["method"])]
        axes.plot(
            [place] * len(runs), [row["accuracy_percent"] for row in runs], color=color, marker=".", linestyle="",
            alpha=0.6,
        )  # fmt: skip
        axes.plot(
            place, one["accuracy_percent"], color=color, marker="D" if one["method"] == "adaptive" else "o",
            markersize=8, label=f"{one['bits']} bits" if one["method"] == "adaptive" else None, linestyle="",
        )  # fmt: skip
        names.append(one["method"])
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_ylabel("test accuracy at the end, %")
    canvas.legend(title="diamonds: chosen by each layer, once an epoch", ncols=len(FIXED), loc="outside lower left")


FIGURES = (
    Figure(
        "gradient-formats", "Accuracy of trainings whose neural gradients have 8, 6 and 4 bits", measure_formats,
        draw_formats, (9.5, 4.8), datasets=1, experiment="fig5_left",
    ),
)  # fmt: skip
