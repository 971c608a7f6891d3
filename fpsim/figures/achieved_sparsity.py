"""Figure 5 right of the source: the sparsity that each rule asks for, and what it achieves on real gradients.

Networks train in float32 (see `neural_gradients.train`). In the last epoch every rule sees every dY, renews its
thresholds as it does in a training with its policy, and prunes a copy of dY; the training goes on with dY itself, so
all rules meet the same gradients.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

import accel
from fpsim.config.schema import Pruning
from fpsim.data import Dataset
from fpsim.emulation import FLOAT32_MAX
from fpsim.figures.figure import Figure, Measured
from fpsim.figures.neural_gradients import BATCH_SIZE, NETWORKS, train
from fpsim.gradients.pruning import LayerPruning
from fpsim.pictures import COLORS
from fpsim.scales import sample

SHOWN = ("resnet18", "vgg16", "densenet121")
EPOCHS = 4
TRAIN_LIMIT = 2048
ASKED = tuple(number / 100 for number in range(50, 100, 5))
RULES: dict[str, dict[str, str]] = {  # the policy that follows a rule
    "empirical": {"policy": "homogeneous", "threshold": "empirical"},
    "lognormal": {"policy": "homogeneous", "threshold": "lognormal"},
    "atp": {"policy": "atp"},
    "topk_stochastic": {"policy": "topk_stochastic"},
}


def measure_fig5_right(datasets: list[Dataset], seed: int) -> Measured:
    """Rows: one for each network, rule and asked sparsity. achieved: mean over steps of the share of zeros in all dY;
    deviation: of that between steps; lowest, highest: of the layers, each its mean over steps."""
    (dataset,) = datasets
    steps_per_epoch = len(dataset.train) // BATCH_SIZE
    steps = EPOCHS * steps_per_epoch
    last_epoch = tuple(range(steps - steps_per_epoch, steps))
    rows: list[dict[str, Any]] = []
    elements = {}
    for network in SHOWN:
        state: dict[tuple[str, float, str], LayerPruning] = {}
        whole: dict[tuple[str, float], list[float]] = defaultdict(list)
        for taken in train(network, dataset, seed, steps, last_epoch):
            drawn = {name: sample(dy).numpy() for name, dy in taken.outputs.items()}
            elements[network] = sum(dy.numel() for dy in taken.outputs.values())
            for rule, policy in RULES.items():
                for asked in ASKED:
                    zeros = 0
                    for name, dy in taken.outputs.items():
                        layer = state.setdefault(
                            (rule, asked, name), LayerPruning(Pruning.model_validate({**policy, "sparsity": asked}))
                        )
                        counts = _prune(dy, layer.threshold(drawn[name], taken.step), seed, taken.step, name)
                        layer.record(counts)
                        zeros += counts.numel - counts.nonzeros
                    whole[rule, asked].append(zeros / elements[network])
        for (rule, asked), achieved in whole.items():
            layers = [
                one.achieved.mean
                for (its_rule, its_asked, _), one in state.items()
                if (its_rule, its_asked) == (rule, asked)
            ]
            rows.append(
                {
                    "network": network,
                    "rule": rule,
                    "asked": asked,
                    "achieved": float(np.mean(achieved)),
                    "deviation": float(np.std(achieved)),
                    "lowest": min(layers),
                    "highest": max(layers),
                }
            )
    return Measured(
        rows,
        {
            "data": dataset.description,
            "seed": seed,
            "epochs": EPOCHS,
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "networks": {name: {**NETWORKS[name], "elements a step": elements[name]} for name in SHOWN},
            "largest |achieved - asked|": _misses(rows),
        },
    )


def _prune(dy: Tensor, alpha: float, seed: int, step: int, name: str) -> accel.Counts:
    """What pruning dY at alpha leaves: its counts."""
    stream = accel.stream_id(name)
    with torch.no_grad():
        alpha = float(np.float32(min(alpha, FLOAT32_MAX)))
        return accel.prune_quantize(dy, alpha, "fp32", seed=seed, stream=stream, step=step)[1].total


def _misses(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        network: {
            rule: max(
                abs(row["achieved"] - row["asked"]) for row in rows if (row["network"], row["rule"]) == (network, rule)
            )
            for rule in RULES
        }
        for network in SHOWN
    }


def draw_fig5_right(canvas: Canvas, measured: Measured) -> None:
    canvas.suptitle(
        "Asked and achieved: the share of zeros in the neural gradients of networks that train on "
        f"{measured.data_name}\n"
        "all gradients together, mean over the last epoch; shaded: from the lowest to the highest layer",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    for number, network in enumerate(SHOWN):
        axes = canvas.add_subplot(1, len(SHOWN), number + 1)
        axes.plot([0.5, 0.95], [0.5, 0.95], color="black", linestyle=":", linewidth=1)
        for rule, color in zip(RULES, COLORS, strict=False):
            shown = [row for row in measured.rows if (row["network"], row["rule"]) == (network, rule)]
            asked = [row["asked"] for row in shown]
            axes.fill_between(
                asked, [row["lowest"] for row in shown], [row["highest"] for row in shown], color=color, alpha=0.12,
                linewidth=0,
            )  # fmt: skip
            axes.plot(
                asked, [row["achieved"] for row in shown], color=color, marker="o", markersize=4, linewidth=1.5,
                label=rule if number == 0 else None,
            )  # fmt: skip
        axes.set(xlabel="asked", ylim=(0, 1), title=network)
        if number == 0:
            axes.set_ylabel("achieved share of zeros")
    canvas.legend(loc="outside lower left", ncols=len(RULES))


FIGURES = (
    Figure(
        "fig5-right", "Sparsity that pruning rules ask for and achieve on real gradients", measure_fig5_right,
        draw_fig5_right, (10.0, 4.4), datasets=1, train_limit=TRAIN_LIMIT,
    ),
)  # fmt: skip
