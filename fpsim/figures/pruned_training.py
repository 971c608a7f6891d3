"""Figure 5 left of the source: what the accuracy of a training is worth when its neural gradients are pruned.

All runs have the experiment's training and data; `none` prunes nothing, and only counts the zeros.
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

SEEDS = {"resnet18": 3, "vgg16": 3, "densenet121": 1}  # how many, by network
ASKED = (0.8, 0.9)
METHODS: dict[str, dict[str, Any]] = {  # the source's, and its rivals
    "homogeneous": {"policy": "homogeneous", "threshold": "lognormal"},
    "heterogeneous": {"policy": "heterogeneous", "threshold": "lognormal"},
    "topk": {"policy": "topk"},
    "atp": {"policy": "atp"},
}
TITLES = {"topk": "topk (SAW)", "atp": "ATP"}
NONE = "none"


def measure_fig5_left(config: Config, runs: Path) -> Measured:
    """Rows: one a run (see `train_all`). Results: of each network, method and asked sparsity, over its seeds."""
    rows, data = train_all(_wanted(config), runs)
    return Measured(
        rows,
        {
            "data": data,
            "training": config.training.model_dump(mode="json"),
            "width": getattr(config.model, "width", None),
            "networks": summaries(rows, ("network", "method", "asked"), NONE),
        },
    )


def _wanted(config: Config) -> Iterator[tuple[dict[str, Any], Config]]:
    """(network, method, asked, seed) and the configuration of each run."""
    points = [(NONE, 0.0), *((method, asked) for method in METHODS for asked in ASKED)]
    for network, seeds in SEEDS.items():
        for method, asked in points:
            pruning = {**METHODS.get(method, {"policy": NONE}), "sparsity": asked}
            for seed in range(config.seed, config.seed + seeds):
                content = config.model_dump()
                content["model"]["name"] = network
                content["emulation"] = {"gradients": {"format": "fp32", "pruning": pruning}}
                content |= {"name": f"{config.name}-{network}-{method}", "seed": seed}
                labels = {"network": network, "method": method, "asked": asked, "seed": seed}
                yield labels, parse_config(content)


def draw_fig5_left(canvas: Canvas, measured: Measured) -> None:
    canvas.suptitle(
        f"Accuracy against the zeros in the neural gradients: networks of width {measured.results['width']} on "
        f"{measured.data_name}, {measured.results['training']['epochs']} epochs\n"
        "small: a run each; large: mean over seeds, joined along the sparsity asked for",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    for number, network in enumerate(SEEDS):
        axes = canvas.add_subplot(1, len(SEEDS), number + 1)
        means = [one for one in measured.results["networks"] if one["network"] == network]
        plain = next(one for one in means if one["method"] == NONE)
        draw_plain(axes, plain, None if number else "no pruning")
        for method, color in zip(METHODS, COLORS, strict=False):
            runs = [row for row in measured.rows if (row["network"], row["method"]) == (network, method)]
            axes.plot(
                [row["achieved"] for row in runs], [row["accuracy_percent"] for row in runs], color=color, marker=".",
                linestyle="", markersize=5, alpha=0.6,
            )  # fmt: skip
            shown = [one for one in means if one["method"] == method]
            axes.plot(
                [one["achieved"] for one in shown], [one["accuracy_percent"] for one in shown], color=color, marker="o",
                markersize=7, linewidth=1.5, label=TITLES.get(method, method) if not number else None,
            )  # fmt: skip
        seeds = SEEDS[network]
        axes.set(xlabel="share of zeros in dY", title=f"{network}, {seeds} seed{'s' if seeds > 1 else ''}")
        if not number:
            axes.set_ylabel("test accuracy at the end, %")
    canvas.legend(loc="outside lower left", ncols=len(METHODS) + 1)


FIGURES = (
    Figure(
        "fig5-left", "Accuracy of trainings whose neural gradients are pruned", measure_fig5_left, draw_fig5_left,
        (10.5, 4.6), datasets=1, experiment="fig5_left",
    ),
)  # fmt: skip
