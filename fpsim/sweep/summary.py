"""The numbers of a sweep: a row a trial, groups of trials that differ in the seed alone, and the best of these."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpsim.files import write_json, write_text
from fpsim.report.compare import comparison
from fpsim.sweep.outcome import Outcome
from fpsim.sweep.page import render_html
from fpsim.sweep.trials import Plan

SCHEMA_VERSION = 1
ACCURACY = "test_accuracy_percent"
COSTS = (
    "traffic_mib_per_step", "gradient_bits_per_element", "footprint_mib", "estimated_seconds_per_step", "wall_seconds",
)  # fmt: skip
MEASURED = (
    ACCURACY, "best_test_accuracy_percent",
    "gradient_bits_per_element", "gradient_bits_fp32_ratio",
    "footprint_mib", "footprint_fp32_ratio", "traffic_mib_per_step", "traffic_fp32_ratio",
    "wall_seconds", "machine", "estimated_seconds_per_step", "estimated_joules_per_step", "estimated_time_fp32_ratio",
)  # fmt: skip
FP32_BITS = 32


def summarize(plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The content of the sweep's results.json, plain data.

    trials: a row each, in the sweep's order: `varied` (key -> value), its seed, status, attempts, error, and what was
    measured: accuracy (%); bits per element of the gradients, peak footprint (MiB), traffic of a step (MiB), and dense
    float32 over each of them; wall seconds; seconds and joules of a step on the configuration's machine, and how many
    times as long float32 takes there. What a trial does not have is None.
    groups: trials whose `varied` differs in the seed alone: how many finished (n), mean and sample deviation over them
    (None for fewer than two), and `best_by`: the costs by which no other group is as cheap and more accurate, or
    cheaper and as accurate.
    """
    rows = [_row(number, outcome) for number, outcome in enumerate(outcomes, start=1)]
    keys = list(dict.fromkeys(key for row in rows for key in row["varied"]))
    return {
        "schema_version": SCHEMA_VERSION,
        "name": plan.sweep.name,
        "sweep": plan.sweep.model_dump(mode="json"),
        "notes": plan.notes,
        "varied_keys": keys,
        "trials": rows,
        "groups": groups(rows),
    }


def write(folder: Path, summary: dict[str, Any]) -> None:
    """Write results.json, results.csv and report.html into the folder, each in one step."""
    write_json(folder / "results.json", summary)
    write_text(folder / "results.csv", csv_text(summary))
    write_text(folder / "report.html", render_html(summary))


def groups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of the rows of trials, in the order of their first trial (see `summarize`)."""
    by_rest: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_rest.setdefault(json.dumps(_without_seed(row), sort_keys=True), []).append(row)
    found = [_group(number, members) for number, members in enumerate(by_rest.values(), start=1)]
    for cost in COSTS:
        measured = [group for group in found if None not in (group["mean"][cost], group["mean"][ACCURACY])]
        marks = non_dominated([(group["mean"][cost], group["mean"][ACCURACY]) for group in measured])
        for group, is_best in zip(measured, marks, strict=True):
            if is_best:
                group["best_by"].append(cost)
    return found


def non_dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, quality) no other one dominates, by costing no more and being no worse, and not alike."""
    best: dict[tuple[float, float], bool] = {}
    highest = float("-inf")
    for cost, quality in sorted(set(points), key=lambda point: (point[0], -point[1])):
        best[cost, quality] = quality > highest
        highest = max(highest, quality)
    return [best[point] for point in points]


def csv_text(summary: dict[str, Any]) -> str:
    """A line a trial; values that are not numbers or strings as JSON, a key that a trial does not change empty."""
    keys = summary["varied_keys"]
    columns = ["trial", "config_hash", *keys, *(["seed"] if "seed" not in keys else []), "status", "attempts", "error"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*columns, *MEASURED], restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in summary["trials"]:
        varied = {key: _cell(value) for key, value in row["varied"].items()}
        writer.writerow({**row, **varied})
    return stream.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if value is None or isinstance(value, bool | dict | list) else value


def _without_seed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row["varied"].items() if key != "seed"}


def _group(number: int, members: list[dict[str, Any]]) -> dict[str, Any]:
    finished = [row for row in members if row["status"] == "finished"]
    columns = {key: [row[key] for row in finished] for key in MEASURED if key != "machine"}
    return {
        "group": number,
        "varied": _without_seed(members[0]),
        "trials": [row["trial"] for row in members],
        "n": len(finished),
        "mean": {key: _statistic(statistics.fmean, values, 1) for key, values in columns.items()},
        "deviation": {key: _statistic(statistics.stdev, values, 2) for key, values in columns.items()},
        "best_by": [],
    }


def _statistic(of: Any, values: list[float | None], least: int) -> float | None:
    return None if None in values or len(values) < least else float(of(values))


def _row(number: int, outcome: Outcome) -> dict[str, Any]:
    answer = outcome.answer
    measured = dict.fromkeys(MEASURED) if answer is None else _measured(answer)
    estimate_error = answer["estimate"].get("error") if answer is not None and answer["estimate"] else None
    return {
        "trial": number,
        "config_hash": outcome.trial.config_hash,
        "varied": outcome.trial.varied,
        "seed": outcome.trial.config.seed,
        "status": outcome.status if outcome.status in ("finished", "failed") else "unfinished",
        "attempts": outcome.attempts,
        "error": outcome.error if estimate_error is None else f"no estimate: {estimate_error}",
        **measured,
    }


def _measured(answer: dict[str, Any]) -> dict[str, Any]:
    (run,) = comparison([answer["results"]])["runs"]
    footprint, traffic, bits = run["footprint"]["total"], run["traffic"]["total"], run["gradient_bits"]
    values = (
        run[ACCURACY], run["best_test_accuracy_percent"],
        bits, FP32_BITS / bits if bits else None,
        footprint["encoded_mib"], footprint["fp32_ratio"], traffic["encoded_mib"], traffic["fp32_ratio"],
        run["wall_seconds"], *_estimated(answer["estimate"]),
    )  # fmt: skip
    return dict(zip(MEASURED, values, strict=True))


def _estimated(estimate: dict[str, Any] | None) -> tuple[str | None, float | None, float | None, float | None]:
    """Machine; seconds and joules of a step; float32's time over the run's."""
    if estimate is None:
        return None, None, None, None
    schemes = {one["scheme"]: one for one in estimate["schemes"]}
    if not schemes:
        return estimate["machine"]["name"], None, None, None
    ours, fp32 = schemes["encoded"], schemes.get("fp32")
    ratio = None if fp32 is None else fp32["time_over_encoded"]
    return estimate["machine"]["name"], ours["seconds"], ours["joules"], ratio
