"""Accuracy of trainings by the accumulator of their products: where a narrow one swallows small addends, and what
chunks bring back.

A sum of K products grows to K times an addend, and rounds away addends below half its last place ("swamping"). Sums of
`chunk` products, added up in an outer accumulator, stay small: Wang et al., "Training deep neural networks with 8-bit
floating point numbers", NeurIPS 2018, section 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure as Canvas
from pydantic import Field, model_validator

from fpsim.config import Config, load_config, parse_config
from fpsim.config.schema import Mac, PositiveInt, Section, mac
from fpsim.figures.figure import Figure, Measured, data_overrides, draw_plain
from fpsim.figures.runs import summaries, train_all
from fpsim.pictures import COLORS

PASSES = ("forward", "dgrad", "wgrad")


class Case(Section):
    experiment: str
    """The training: a configuration, which the figure gives the units and the seed."""
    data: list[str] | None = Field(None, min_length=1, max_length=1)
    """Its data set, NAME or NAME=FOLDER of its files; null: that of the experiment."""


class Plan(Section):
    """What is trained: each unit in each of the passes, for each seed, and the first unit only in all of them."""

    cases: list[Case] = Field(min_length=1, max_length=1)
    """The training."""
    units: list[Mac] = Field(min_length=2)
    """The multiply-accumulate units; the others are compared with the first."""
    passes: list[Literal["all", "forward", "dgrad", "wgrad"]] = Field(["all"], min_length=1)
    """In which products a unit stands; in the others it is the first one."""
    seeds: PositiveInt = 3
    """How many."""
    seed: int = Field(0, ge=0)
    """The first of them."""

    @model_validator(mode="after")
    def _names_tell_runs_apart(self) -> Plan:
        for names in ([_name(unit) for unit in self.units], self.passes):
            if twice := [name for number, name in enumerate(names) if name in names[:number]]:
                raise ValueError(f"{twice[0]} is there twice: a run is named by that")
        return self


def measure_accumulators(plan: Plan, runs: Path) -> Measured:
    """Rows: one a run (see `train_all`). Results: of each unit and its passes, over the seeds."""
    rows, data = train_all(_wanted(plan), runs)
    return Measured(
        rows,
        {
            "data": data,
            "training": _content(plan)["training"],
            "units": summaries(rows, ("method", "passes"), _name(plan.units[0]), ("network",)),
        },
    )


def _content(plan: Plan) -> dict[str, Any]:
    case = plan.cases[0]
    return load_config(case.experiment, data_overrides(case.data[0]) if case.data else []).model_dump(mode="json")


def _wanted(plan: Plan) -> Iterator[tuple[dict[str, Any], Config]]:
    """(network, method, passes, seed) and the configuration of each run; method: the name of the unit."""
    content, plain = _content(plan), plan.units[0]
    for unit in plan.units:
        for which in plan.passes if unit is not plain else ["all"]:
            for seed in range(plan.seed, plan.seed + plan.seeds):
                datapath = {one: unit if which in ("all", one) else plain for one in PASSES}
                emulation = {**(content["emulation"] or {}), "datapath": {k: _dumped(u) for k, u in datapath.items()}}
                labels = {"network": content["model"]["name"], "method": _name(unit), "passes": which, "seed": seed}
                name = "-".join((content["name"], _name(unit), which))
                yield labels, parse_config({**content, "name": name, "seed": seed, "emulation": emulation})


def _dumped(unit: Any) -> Any:
    return unit if isinstance(unit, str) else unit.model_dump(mode="json")


def _name(unit: Any) -> str:
    """Of a unit, as a part of a folder's name."""
    return mac(unit).name.replace(", ", "-").replace(" ", "-")


def draw_accumulators(canvas: Canvas, measured: Measured) -> None:
    means = measured.results["units"]
    canvas.suptitle(
        f"Accuracy by the accumulator of the products: {measured.rows[0]['network']} on {measured.data_name}, "
        f"{measured.results['training']['epochs']} epochs\n"
        "small: a run each; large: mean over seeds; line and band: the first unit, mean +- deviation over seeds",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    axes = canvas.add_subplot()
    draw_plain(axes, means[0], means[0]["method"])
    names = list(dict.fromkeys(one["method"] for one in means[1:]))
    passes = list(dict.fromkeys(one["passes"] for one in means[1:]))
    for one in means[1:]:
        color = COLORS[passes.index(one["passes"])]
        place = names.index(one["method"]) + 0.12 * (passes.index(one["passes"]) - (len(passes) - 1) / 2)
        shown = [row for row in measured.rows if (row["method"], row["passes"]) == (one["method"], one["passes"])]
        axes.plot(
            [place] * len(shown), [row["accuracy_percent"] for row in shown], ".", color=color, alpha=0.6,
        )  # fmt: skip
        label = one["passes"] if one["method"] == names[0] else None
        axes.plot(place, one["accuracy_percent"], "o", color=color, markersize=8, label=label)
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
    axes.set_ylabel("test accuracy at the end, %")
    canvas.legend(title="passes of the unit", ncols=len(passes) + 1, loc="outside lower left")


FIGURES = (
    Figure(
        "accumulators", "Accuracy of trainings by the accumulator of their products", measure_accumulators,
        draw_accumulators, (9.5, 5.2), datasets=1, plan=("accumulators", Plan),
    ),
)  # fmt: skip
