"""Figures 2 and 4 and table 1 of the source: real gradients, taken from a short training in float32.

    fig2    neural gradients dY and weight gradients dW of one network: density, histogram of log2, two QQ plots
    fig4    a dY before and after stochastic pruning
    table1  Kolmogorov-Smirnov statistic of dY against seven distributions, mean +- deviation over layers and time

A neural gradient dY is the gradient of the loss by a layer's output; a hook on that output reads it. The networks train
with SGD (momentum 0.9, weight decay 5e-4), batches of 64, a constant learning rate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from torch import Tensor, nn
from torch.nn import functional

import accel
import models
from fpsim.data import Dataset
from fpsim.distribution_plot import draw_legend, draw_panels, points
from fpsim.distributions import FAMILIES, compare, modes
from fpsim.errors import ConfigError, Problem
from fpsim.figures.figure import Figure, Measured
from fpsim.gradients.thresholds import empirical, expected_sparsity, lognormal
from fpsim.layers import matrix_layers
from fpsim.lognormal import fit, measured_cosine
from fpsim.pictures import COLORS
from fpsim.scales import sample
from fpsim.training import data_order

BATCH_SIZE = 64
STEPS = 200
LEARNING_RATE = 0.05
WIDTH = 8
LAYERS = {"layer1.0.conv1": "layer1.0.bn1", "layer4.1.conv1": "layer4.1.bn1"}  # and the normalisation, then ReLU, after
SPARSITIES = (0.8, 0.9)
PRUNED_LAYER = "layer3.0.conv2"
TABLE_TIMES = 5
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"width": WIDTH},
    "vgg16": {"width": WIDTH},
    "densenet121": {"width": WIDTH},
    "mobilenet_v2": {"width": WIDTH},
    "lenet": {},
    "mlp": {},
}
BINS = 160
MARKERS = "os^D"  # of what the colours do not tell apart


@dataclass(frozen=True)
class Gradients:
    """Of one step: dY and dW of every matrix layer, by name, in module order, and the loss before the update.

    others: dY of the other modules that were asked for.
    """

    step: int
    loss: float
    outputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    others: dict[str, Tensor]


def train(
    network: str, dataset: Dataset, seed: int, steps: int, times: tuple[int, ...], others: Collection[str] = ()
) -> Iterator[Gradients]:
    """Train a network of NETWORKS for `steps` steps and yield the gradients of the steps `times` (counted from 0).

    others: modules besides the matrix layers whose dY is wanted. Raises ConfigError for images that it cannot take.
    """
    torch.manual_seed(seed)
    try:
        model = models.build(network, input_shape=dataset.input_shape, classes=dataset.classes, **NETWORKS[network])
    except ValueError as error:
        raise ConfigError([Problem("--data", f"{dataset.name}: {error}")]) from None
    layers = matrix_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        images, labels = dataset.train.batch(_indices(dataset, seed, step))
        outputs: dict[str, Tensor] = {}
        watched = {**layers, **{name: model.get_submodule(name) for name in others}} if step in times else {}
        hooks = [_watch(name, layer, outputs) for name, layer in watched.items()]
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        for hook in hooks:
            hook.remove()
        if step in times:
            weights = {name: gradient_of_weight(layer) for name, layer in layers.items()}
            yield Gradients(
                step, loss.item(), {name: outputs[name] for name in layers}, weights,
                {name: outputs[name] for name in others},
            )  # fmt: skip
        optimizer.step()


def gradient_of_weight(layer: nn.Module) -> Tensor:
    """A copy of dW of a layer after backward."""
    gradient = layer.get_parameter("weight").grad
    assert gradient is not None
    return gradient.clone()


def _indices(dataset: Dataset, seed: int, step: int) -> Tensor:
    per_epoch = len(dataset.train) // BATCH_SIZE
    epoch, batch = divmod(step, per_epoch)
    return data_order(seed, epoch, len(dataset.train))[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]


def _watch(name: str, layer: nn.Module, outputs: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    def keep(gradient: Tensor) -> None:
        outputs[name] = gradient.detach().clone()

    def after(module: nn.Module, arguments: object, output: Tensor) -> None:
        output.register_hook(keep)

    return layer.register_forward_hook(after)


def measure_fig2(datasets: list[Dataset], seed: int) -> Measured:
    """Rows: points of every panel of every tensor. Results: fit, D of the seven, modes, of every layer's dY and dW.

    Also, of the layers drawn, the elements whose ReLU was off apart from those whose was on.
    """
    (dataset,) = datasets
    (found,) = train("resnet18", dataset, seed, STEPS, (STEPS - 1,), LAYERS.values())
    shown = {f"dY of {name}": found.outputs[name] for name in LAYERS}
    last = list(LAYERS)[-1]
    shown |= {f"dW of {last}": found.weights[last]}
    rows = [
        {"tensor": title, **point} for title, tensor in shown.items() for point in points(tensor)
    ]  # fmt: skip
    described = {
        kind: {name: _describe(tensor) for name, tensor in tensors.items()}
        for kind, tensors in (("dY", found.outputs), ("dW", found.weights))
    }
    by_relu = {name: _by_relu(found.outputs[name], found.others[norm]) for name, norm in LAYERS.items()}
    return Measured(
        rows,
        {**_origin("resnet18", dataset, seed), "step": found.step, "loss": found.loss, **described, "ReLU": by_relu},
    )


def _by_relu(gradient: Tensor, of_norm: Tensor) -> dict[str, dict[str, float]]:
    """dY of a convolution where ReLU let nothing back to the normalisation between them, and elsewhere."""
    found = {}
    for state, chosen in (("off", of_norm == 0), ("on", of_norm != 0)):
        part = gradient[chosen]
        found[state] = {
            "share": part.numel() / gradient.numel(),
            "median of log2|x|": float(np.median(_logs(part))),
            **{name: one.statistic for name, one in compare(sample(part)).items()},
        }
    return found


def draw_fig2(canvas: Canvas, measured: Measured) -> None:
    canvas.suptitle(
        "Neural gradients dY (blue): far from normal, nearer to lognormal, some with two modes; weight gradients dW\n"
        f"{_words(measured)}, step {measured.results['step']}; exact zeros left out",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    tensors = list(dict.fromkeys(row["tensor"] for row in measured.rows))
    for number, tensor in enumerate(tensors):
        axes = [canvas.add_subplot(len(tensors), 4, 4 * number + panel + 1) for panel in range(4)]
        drawn = [row for row in measured.rows if row["tensor"] == tensor]
        kind, _, layer = tensor.partition(" of ")
        found = measured.results[kind][layer]
        draw_panels(
            axes, drawn, tensor, found["statistics"], COLORS[0] if kind == "dY" else COLORS[2]
        )  # fmt: skip
    draw_legend(canvas, COLORS[0])


def measure_fig4(datasets: list[Dataset], seed: int) -> Measured:
    """Rows: histogram of log2|x| before and after, a bin a row. Results: alpha, shares and cosine of each sparsity."""
    (dataset,) = datasets
    (found,) = train("resnet18", dataset, seed, STEPS, (STEPS - 1,))
    x = found.outputs[PRUNED_LAYER]
    logs = _logs(x)
    edges = np.linspace(logs.min(), logs.max() + 1e-9, BINS + 1)
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for target in SPARSITIES:
        alpha = float(np.float32(empirical(x, target)))
        pruned = accel.prune(x, alpha=alpha, seed=seed)
        before, after = np.histogram(logs, edges)[0], np.histogram(_logs(pruned), edges)[0]
        rows += [
            {
                "sparsity": target,
                "log2_from": float(low),
                "log2_to": float(high),
                "before": int(old),
                "after": int(new),
            }
            for low, high, old, new in zip(edges[:-1], edges[1:], before, after, strict=True)
        ]
        by_rule = lognormal(x, target)
        cosine = functional.cosine_similarity(x.double().flatten(), pruned.double().flatten(), dim=0)
        results[f"{target:g}"] = {
            "alpha": alpha,
            "zeros before": float((x == 0).double().mean()),
            "zeros after": float((pruned == 0).double().mean()),
            "+-alpha": float((pruned.abs() == alpha).double().mean()),
            "kept": float((pruned.abs() > alpha).double().mean()),
            "cosine": float(cosine),
            "expected cosine": measured_cosine(x, alpha),
            "sum|pruned| / sum|x| - 1": float(pruned.double().abs().sum() / x.double().abs().sum() - 1),
            "lognormal rule's alpha": by_rule,
            "lognormal rule's sparsity": expected_sparsity(x, by_rule),
        }
    return Measured(
        rows,
        {**_origin("resnet18", dataset, seed), "layer": PRUNED_LAYER, "step": found.step, "elements": x.numel(),
         "sparsities": results},
    )  # fmt: skip


def draw_fig4(canvas: Canvas, measured: Measured) -> None:
    canvas.suptitle(
        "Stochastic pruning: what is smaller than alpha becomes 0 or ±alpha by chance, the rest stays\n"
        f"dY of {measured.results['layer']}, {_words(measured)}",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    for number, (target, found) in enumerate(measured.results["sparsities"].items()):
        rows = [row for row in measured.rows if f"{row['sparsity']:g}" == target]
        edges = [row["log2_from"] for row in rows] + [rows[-1]["log2_to"]]
        level = np.log2(found["alpha"])
        axes = canvas.add_subplot(len(measured.results["sparsities"]), 2, 2 * number + 1)
        _draw_counts(axes, edges, [row["before"] for row in rows], COLORS[0])
        axes.set_title(f"before: {100 * found['zeros before']:.1f} % zeros (not drawn)", loc="left", fontsize=10)
        axes.axvspan(edges[0], level, color="#fde68a", alpha=0.45, linewidth=0, zorder=0)
        axes.axvline(level, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"alpha for {100 * float(target):g} % zeros", (level, 1), xycoords=axes.get_xaxis_transform(),
            xytext=(-5, -12), textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
        top = 1.15 * max(row["before"] for row in rows)
        axes.set(ylim=(0, top), ylabel="elements in a bin")
        after = canvas.add_subplot(len(measured.results["sparsities"]), 2, 2 * number + 2, sharex=axes)
        _draw_counts(after, edges, [row["after"] for row in rows], COLORS[1])
        after.set_title(f"after: {100 * found['zeros after']:.1f} % zeros (not drawn)", loc="left", fontsize=10)
        spike = max(row["after"] for row in rows)
        after.set(ylim=(0, top))
        after.annotate(
            f"±alpha: {100 * found['+-alpha']:.1f} % of all\n({spike / top:.1f} times as high as the panel)"
            if spike > 1.05 * top else f"±alpha: {100 * found['+-alpha']:.1f} % of all",
            (level, 0.97), xycoords=after.get_xaxis_transform(), xytext=(-6, 0), textcoords="offset points",
            ha="right", va="top", fontsize=9, color=COLORS[1],
        )  # fmt: skip
        after.annotate(
            f"kept as they are:\n{100 * found['kept']:.1f} % of all", (level, 0.5),
            xycoords=after.get_xaxis_transform(), xytext=(8, 0), textcoords="offset points", fontsize=9,
            color=COLORS[1],
        )  # fmt: skip
        for one in (axes, after):
            one.set_xlabel("log2|x|")


def measure_table1(datasets: list[Dataset], seed: int) -> Measured:
    """Rows: one for each network and data set: mean and standard deviation of D over layers and times, by family.

    Results: also the mean over layers at each time, and every layer at each time. `left out`: networks that do not take
    a set's images.
    """
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {"seed": seed, "steps": STEPS, "batch_size": BATCH_SIZE, "sets": {}, "left out": []}
    times = tuple(round(number * (STEPS - 1) / (TABLE_TIMES - 1)) for number in range(TABLE_TIMES))
    for dataset in datasets:
        results["sets"][dataset.name] = dataset.description
        for network in NETWORKS:
            try:
                found = [
                    {"step": taken.step, "layer": name, **_describe(sample(gradient))}
                    for taken in train(network, dataset, seed, STEPS, times)
                    for name, gradient in taken.outputs.items()
                ]
            except ConfigError as error:
                results["left out"].append(f"{network}: {error}")
                continue
            statistics = {name: [tensor["statistics"][name] for tensor in found] for name in FAMILIES}
            rows.append({"network": network, "data": dataset.name, "tensors": len(found)})
            for name, values in statistics.items():
                rows[-1] |= {name: float(np.mean(values)), f"{name} deviation": float(np.std(values))}
            for name in FAMILIES:
                rows[-1][f"{name} best in"] = sum(tensor["best"] == name for tensor in found)
                rows[-1][f"{name} p > 0.05"] = sum(tensor["p_values"][name] > 0.05 for tensor in found)
            rows[-1]["two modes"] = sum(tensor["modes"] == "two modes" for tensor in found)
            for step in times:
                now = [tensor for tensor in found if tensor["step"] == step]
                of_step = {name: float(np.mean([tensor["statistics"][name] for tensor in now])) for name in FAMILIES}
                results.setdefault("by step", []).append(
                    {
                        "network": network,
                        "data": dataset.name,
                        "step": step,
                        **of_step,
                        "sigma log2": float(np.mean([tensor["sigma"] for tensor in now]) / np.log(2)),
                        "two modes": sum(tensor["modes"] == "two modes" for tensor in now),
                    }
                )
            kept = ("step", "layer", "zero_share", "mu", "sigma", "best", "modes")
            results[f"{network} {dataset.name}"] = [
                {key: tensor[key] for key in kept} | tensor["statistics"] for tensor in found
            ]
    return Measured(rows, results)


def draw_table1(canvas: Canvas, measured: Measured) -> None:
    canvas.suptitle(
        "How far neural gradients are from seven distributions: Kolmogorov-Smirnov statistic D (0: exact)\n"
        "mean and standard deviation over layers and training steps; the best of each network is filled",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    grid = canvas.add_gridspec(2, 2)
    axes, over_time, single = (canvas.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    names = list(FAMILIES)
    for number, row in enumerate(measured.rows):
        least = min(names, key=lambda name: row[name])
        color, marker = COLORS[number % len(COLORS)], MARKERS[number // len(COLORS)]
        aside = (number - (len(measured.rows) - 1) / 2) * 0.8 / len(measured.rows)
        for place, name in enumerate(names):
            axes.errorbar(
                place + aside, row[name], yerr=row[f"{name} deviation"],
                color=color, marker=marker, markersize=5, capsize=2, linewidth=1,
                markerfacecolor=color if name == least else "white",
                label=f"{row['network']}, {row['data']}" if place == 0 else None,
            )  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="D", ylim=(0, None))
    _draw_over_time(over_time, measured)
    _draw_single_layers(single, measured)
    canvas.legend(handles=axes.get_legend_handles_labels()[0], loc="outside lower left", ncols=4)


def _draw_over_time(axes: Axes, measured: Measured) -> None:
    for number, row in enumerate(measured.rows):
        shown = [
            one for one in measured.results["by step"] if (one["network"], one["data"]) == (row["network"], row["data"])
        ]
        axes.plot(
            [one["step"] for one in shown], [one["lognormal"] for one in shown], color=COLORS[number % len(COLORS)],
            marker=MARKERS[number // len(COLORS)], markersize=4,
        )  # fmt: skip
    axes.set(title="lognormal, mean over layers", xlabel="training step", ylabel="D", ylim=(0, None))


def _draw_single_layers(axes: Axes, measured: Measured) -> None:
    """The first, the middle and the last layer of the first network."""
    row = measured.rows[0]
    found = measured.results[f"{row['network']} {row['data']}"]
    layers = list(dict.fromkeys(tensor["layer"] for tensor in found))
    for layer, color in zip((layers[0], layers[len(layers) // 2], layers[-1]), COLORS, strict=False):
        for family, linestyle in (("lognormal", "-"), ("normal", ":")):
            shown = [tensor for tensor in found if tensor["layer"] == layer]
            axes.plot(
                [tensor["step"] for tensor in shown], [tensor[family] for tensor in shown], color=color, marker=".",
                linestyle=linestyle, label=layer if family == "lognormal" else None,
            )  # fmt: skip
    axes.set(title=f"{row['network']}, {row['data']}: single layers", xlabel="training step", ylim=(0, None))
    axes.legend(title="solid: lognormal, dotted: normal", alignment="left")


def _describe(x: Tensor) -> dict[str, Any]:
    """Plain data: of the whole of x elements, zeros, mu, sigma; of 4096 elements D, p-values, best and modes."""
    fitted, taken = fit(x), sample(x)
    compared, two = compare(taken), modes(taken)
    statistics = {name: one.statistic for name, one in compared.items()}
    return {
        "elements": fitted.count,
        "zero_share": fitted.zero_share,
        "mu": fitted.mu,
        "sigma": fitted.sigma,
        "statistics": statistics,
        "p_values": {name: one.p_value for name, one in compared.items()},
        "best": min(statistics, key=lambda name: statistics[name]),
        "modes": two.kind,
        "components_log2": {"weights": two.weights, "means": two.means, "sigmas": two.sigmas},
    }


def _origin(network: str, dataset: Dataset, seed: int) -> dict[str, Any]:
    return {
        "network": network, **NETWORKS[network], "data": dataset.description, "seed": seed, "steps": STEPS,
        "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE,
    }  # fmt: skip


def _words(measured: Measured) -> str:
    return f"ResNet18 of width {WIDTH} trained on {measured.data_name}"


def _logs(x: Tensor) -> Any:
    values = x.detach().double().abs().flatten().numpy()
    return np.log2(values[values > 0])


def _draw_counts(axes: Axes, edges: list[float], counts: list[int], color: str) -> None:
    axes.stairs(counts, edges, fill=True, color=color, alpha=0.55)


FIGURES = (
    Figure(
        "fig2", "Neural gradients and weight gradients beside a normal and a lognormal", measure_fig2, draw_fig2,
        (13.0, 9.0), datasets=1,
    ),
    Figure("fig4", "A neural gradient before and after stochastic pruning", measure_fig4, draw_fig4, (9.0, 6.5), 1),
    Figure(
        "table1", "Kolmogorov-Smirnov statistic of neural gradients against seven distributions", measure_table1,
        draw_table1, (11.0, 9.0), datasets=9,
    ),
)  # fmt: skip
