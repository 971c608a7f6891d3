"""Weight sparsity that sets itself: accuracy against it, and how it comes about, beside dense, DPF and gradual pruning.

Source: "Dynamic pruning of a neural network via gradient signal-to-noise ratio" (2021). Its sparsity is an output, so
the rivals, which are told theirs, are trained once more at the one that it has ended with, seed by seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from pydantic import Field, model_validator

from fpsim.config import Config, load_config, parse_config
from fpsim.config.schema import ByName, Fraction, Model, PositiveInt, Section, SnrPruning
from fpsim.figures.figure import Figure, Measured, data_overrides, draw_plain
from fpsim.figures.runs import folder_of, summaries, train_all
from fpsim.pictures import COLORS
from fpsim.report.results import Results, load_results

DENSE = "dense"
RAMP = 0.5  # share of the training in which the rivals reach their sparsity
CASE = ("data", "network")
MARKERS = {"dpf": "s", "gmp": "^"}
Labels = dict[str, Any]


class Case(Section):
    experiment: str
    """The training: a configuration, which the figure gives data, network, seed and pruning."""
    data: list[str] = Field(min_length=1)
    """Data sets, each NAME or NAME=FOLDER of its files."""
    networks: list[Annotated[Model, ByName()]] = Field(min_length=1)
    """Networks, each of which is trained on each data set."""


class Plan(Section):
    """What is trained. With N settings of snr and M sparsities, a case has 1 + 3 N + M runs a seed."""

    cases: list[Case] = Field(min_length=1)
    """The trainings."""
    snr: list[SnrPruning] = Field(min_length=1)
    """Settings of pruning by snr; at the sparsity that each ends with, dpf and gmp are trained as well."""
    sparsities: list[Fraction]
    """Of more runs with dpf."""
    seeds: PositiveInt = 3
    """How many."""
    seed: int = Field(0, ge=0)
    """The first of them."""

    @model_validator(mode="after")
    def _names_tell_runs_apart(self) -> Plan:
        cases = [(text.partition("=")[0], n.name) for case in self.cases for text in case.data for n in case.networks]
        for names in (cases, [(_label(spec),) for spec in self.snr], [(f"{one:g}",) for one in self.sparsities]):
            if twice := [name for number, name in enumerate(names) if name in names[:number]]:
                raise ValueError(f"{' with '.join(twice[0])} is there twice: a run is named by that")
        return self


def measure_snr(plan: Plan, runs: Path) -> Measured:
    """Rows: one a run (see `train_all`; achieved: share of zeros in the weights at the end; returned: how many times a
    weight came back, over their number). Results: of each data set, network and method, over its seeds."""
    rows, _ = train_all(_free(plan), runs, _of_weights)
    ends = {(*(row[key] for key in CASE), row["method"], row["seed"]): row["achieved"] for row in rows}
    rows += train_all(_rivals(plan, ends), runs, _of_weights)[0]
    means = summaries(rows, (*CASE, "method"), DENSE, CASE)
    by_snr = [row for row in rows if row["method"].startswith("snr")]
    return Measured(
        rows,
        {
            "data": ", ".join(dict.fromkeys(row["data"] for row in rows)),
            "plan": _without_folders(plan),
            "cases": means,
            "over_time": [_over_time(row, runs) for row in by_snr],
        },
    )


def _without_folders(plan: Plan) -> dict[str, Any]:
    content = plan.model_dump(mode="json")
    for case in content["cases"]:
        case["data"] = [text.partition("=")[0] for text in case["data"]]
    return content


def _free(plan: Plan) -> Iterator[tuple[Labels, Config]]:
    """The runs whose sparsity is known or free."""
    for case, content, seed in _trainings(plan):
        epochs = content["training"]["epochs"]
        yield _run(case, content, seed, DENSE, {"name": "dense"})
        for spec in plan.snr:
            yield _run(case, content, seed, _label(spec), spec.model_dump())
        for sparsity in plan.sparsities:
            yield _run(case, content, seed, f"dpf@{sparsity:g}", _told("dpf", sparsity, epochs))


def _rivals(plan: Plan, ends: dict[tuple[Any, ...], float]) -> Iterator[tuple[Labels, Config]]:
    """The runs at the sparsities that snr has ended with: ends[data, network, method, seed]."""
    for case, content, seed in _trainings(plan):
        for spec in plan.snr:
            sparsity = ends[(*(case[key] for key in CASE), _label(spec), seed)]
            for name in ("dpf", "gmp"):
                pruning = _told(name, sparsity, content["training"]["epochs"])
                yield _run(case, content, seed, f"{name}@{_label(spec)}", pruning)


def _trainings(plan: Plan) -> Iterator[tuple[Labels, dict[str, Any], int]]:
    """(data and network, the training's content, seed)."""
    for case in plan.cases:
        for text in case.data:
            content = load_config(case.experiment, data_overrides(text)).model_dump()
            for network in case.networks:
                for seed in range(plan.seed, plan.seed + plan.seeds):
                    labels = {"data": content["data"]["name"], "network": network.name}
                    yield labels, {**content, "model": network.model_dump()}, seed


def _run(
    case: Labels, content: dict[str, Any], seed: int, method: str, pruning: dict[str, Any]
) -> tuple[Labels, Config]:
    name = "-".join((content["name"], *case.values(), method.replace("@", "-at-")))
    emulation = {**(content["emulation"] or {}), "weight_pruning": pruning}
    return {**case, "method": method, "seed": seed}, parse_config(
        {**content, "name": name, "seed": seed, "emulation": emulation}
    )


def _label(spec: SnrPruning) -> str:
    """snr, and what the setting says otherwise than the default does: snr-either, snr-0.9."""
    parts = ["snr"]
    for key, value in spec.model_dump(exclude_defaults=True).items():
        if key in ("threshold", "agreement", "average", "estimator"):
            parts.append(str(value.popitem()[1] if isinstance(value, dict) else value))
        else:
            parts.append(f"{key}-{value}")
    return "-".join(parts)


def _told(name: str, sparsity: float, epochs: int) -> dict[str, Any]:
    """dpf and gmp renew their masks every 16 steps; a sparsity of 0 prunes nothing."""
    return {"name": name, "sparsity": sparsity, "ramp_epochs": RAMP * epochs, "interval": 16}


def _of_weights(folder: Path, results: Results) -> dict[str, Any]:
    pruned = results.get("weight_pruning")
    if pruned is None:
        return {"achieved": 0.0, "returned": 0.0}
    numel = sum(layer["numel"] for layer in pruned["layers"])
    return {"achieved": pruned["sparsity"], "returned": pruned["returned"] / numel}


def _over_time(row: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Sparsity after each renewal of a run's masks, by epoch, and at the end that of each layer."""
    labels = {key: row[key] for key in (*CASE, "method", "seed")}
    results = load_results(folder_of(labels, runs))
    pruned = results["weight_pruning"]
    assert pruned is not None
    steps_per_epoch = results["steps"] / results["epochs"]
    return {
        **labels,
        "epochs": [one["step"] / steps_per_epoch for one in pruned["history"]],
        "sparsity": [one["sparsity"] for one in pruned["history"]],
        "layers": {layer["layer"]: layer["zeros"] / layer["numel"] for layer in pruned["layers"]},
    }


def draw_snr(canvas: Canvas, measured: Measured) -> None:
    means = measured.results["cases"]
    cases = list(dict.fromkeys((one["data"], one["network"]) for one in means))
    settings = list(dict.fromkeys(one["method"] for one in measured.results["over_time"]))
    canvas.suptitle(
        "Weights pruned by the signal-to-noise ratio of their gradients (snr), and rivals at the same sparsity\n"
        "small: a run each; large: mean over seeds; line and band: dense, mean +- deviation over seeds",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    axes = canvas.subplots(2, len(cases), squeeze=False)
    for column, case in enumerate(cases):
        rows = [row for row in measured.rows if (row["data"], row["network"]) == case]
        _draw_accuracy(axes[0, column], rows, [one for one in means if (one["data"], one["network"]) == case], settings)
        axes[0, column].set_title(" ".join(case))
        for one in measured.results["over_time"]:
            if (one["data"], one["network"]) == case:
                color = COLORS[settings.index(one["method"]) % len(COLORS)]
                axes[1, column].plot(one["epochs"], one["sparsity"], color=color, linewidth=1, alpha=0.8)
        axes[1, column].set(xlabel="epoch", ylim=(0, 1))
    axes[0, 0].set_ylabel("test accuracy at the end, %")
    axes[1, 0].set_ylabel("share of zeros in the weights")
    handles = {label: handle for one in axes[0] for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    canvas.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=6)


def _draw_accuracy(axes: Axes, rows: list[dict[str, Any]], means: list[dict[str, Any]], settings: list[str]) -> None:
    """Of one case. A rival has the colour of the setting whose sparsity it has, black at one of its own."""
    draw_plain(axes, next(one for one in means if one["method"] == DENSE))
    for one in means:
        kind, _, at = one["method"].partition("@")
        if kind == DENSE:
            continue
        found = at or kind
        style: dict[str, Any] = {
            "color": COLORS[settings.index(found) % len(COLORS)] if found in settings else "black",
            "marker": MARKERS.get(kind, "o"),
            "markerfacecolor": "none" if at else None,
            "linestyle": "",
        }
        shown = [row for row in rows if row["method"] == one["method"]]
        places = ([row["achieved"] for row in shown], [row["accuracy_percent"] for row in shown])
        axes.plot(*places, **style, markersize=3, alpha=0.5)
        axes.plot(one["achieved"], one["accuracy_percent"], **style, markersize=8, label=one["method"])
    axes.set(xlabel="share of zeros in the weights", xlim=(0, 1))


FIGURES = (
    Figure(
        "snr", "Weight sparsity that sets itself, and accuracy against it", measure_snr, draw_snr, (15.0, 7.2),
        plan=("snr", Plan),
    ),
)  # fmt: skip
