"""The report as one self-contained HTML page: tables made here, plots drawn by report.js from the same numbers."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fpsim.config.yaml_loader import dump_yaml
from fpsim.report import tables

MOST_NAMED = 3  # runs, in the title
MOST_STEPS = 500  # of a layer over time
MOST_VALUES = 360_000  # of all layers, runs and steps over time, which a page of less than 5 MB has room for
DIGITS = 5  # significant, of a number that is drawn
DIGITS_OVER_TIME = 4
DRAWN = (
    "label", "group", "emulated", "steps", "history", "test_accuracy_percent", "footprint", "traffic", "gradient_bits",
    "gradients", "tensors", "weight_pruning", "over_time", "distributions", "formats", "machines",
)  # fmt: skip
SECTIONS = (
    ("summary", "Summary"), ("accuracy", "Accuracy"), ("storage", "Stored and moved"), ("weights", "Weight sparsity"),
    ("machines", "Machines"), ("tensors", "Tensors and formats"), ("configuration", "Configuration"),
)  # fmt: skip


def environment(package: str) -> Environment:
    """Reads the templates of a package, and the parts that all pages have."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("fpsim.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> Markup:
    """A style sheet or a script that comes with the report, to be put into a page as it is."""
    return Markup((files("fpsim.report") / name).read_text(encoding="utf-8"))


def render_html(comparison: dict[str, Any]) -> str:
    """Tables, cards, plots: styles, scripts and numbers inline, nothing loaded from elsewhere."""
    runs = [
        {**run, "number": number, "yaml": dump_yaml(run["config"]) if run["config"] else None, "again": _again(run)}
        for number, run in enumerate(comparison["runs"])
    ]
    emulated = [run for run in runs if run["emulated"]]
    return (
        environment("fpsim.report")
        .get_template("report.html")
        .render(
            runs=runs,
            title=" · ".join(run["label"] for run in runs) if len(runs) <= MOST_NAMED else f"{len(runs)} runs",
            sections=SECTIONS,
            headlines=[(run, tables.cards(run)) for run in runs],
            runs_table=tables.runs_table(comparison),
            sections_of_runs=[_section(run) for run in runs],
            notes=[*(tables.baseline_note(run) for run in emulated), *tables.run_notes(comparison)],
            ledger_note=tables.ledger_note(comparison),
            version=version("fpsim"),
            data=Markup(_as_script(drawn(comparison))),
            style=asset("report.css"),
            echarts=asset("echarts.min.js"),
            script=asset("report.js"),
        )
    )


def _section(run: dict[str, Any]) -> dict[str, Any]:
    return {"run": run, "tables": tables.tables_of(run), "notes": tables.notes_of(run)}


def _again(run: dict[str, Any]) -> str:
    ranks = run["environment"].get("world_size", 1)
    return "fpsim run again.yaml" + (f" --nproc {ranks}" if ranks > 1 else "")


def drawn(comparison: dict[str, Any]) -> dict[str, Any]:
    """What the plots draw, in few digits; of many steps over time as many as there is room for."""
    runs = [{key: run[key] for key in DRAWN} for run in comparison["runs"]]
    values_a_step = sum(len(one) - 2 for run in runs if run["over_time"] for one in run["over_time"]["series"])
    most = min(MOST_STEPS, MOST_VALUES // max(values_a_step, 1))
    for run in runs:
        if run["over_time"]:
            run["over_time"] = _thinned(run["over_time"], max(most, 1))
        run["machines"] = [{**one, "rows": _roofline(one["rows"])} for one in run["machines"] or []]
    return {"runs": _rounded(runs)}


def _thinned(over_time: dict[str, Any], most: int) -> dict[str, Any]:
    every = -(-len(over_time["steps"]) // most) if over_time["steps"] else 1
    series = [
        {key: value[::every] if isinstance(value, list) else value for key, value in one.items()}
        for one in over_time["series"]
    ]
    return {"steps": over_time["steps"][::every], "every": every, "series": _rounded(series, DIGITS_OVER_TIME)}


def _roofline(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Layer, pass, scheme, what binds, MACs a byte, MACs a second and their peak, of what multiplies from memory."""
    return [
        [
            row["layer"], row["pass"], scheme, cost["bound_by"], cost["executed_macs"] / cost["main_memory_bytes"],
            cost["executed_macs"] / cost["seconds"], cost["peak_macs_per_second"],
        ]
        for row in rows
        for scheme, cost in row["schemes"].items()
        if cost["executed_macs"] and cost["main_memory_bytes"] and cost["peak_macs_per_second"]
    ]  # fmt: skip


def _rounded(value: Any, digits: int = DIGITS) -> Any:
    if isinstance(value, float):
        short = float(f"{value:.{digits}g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    return [_rounded(item, digits) for item in value] if isinstance(value, list) else value


def _as_script(data: Any) -> str:
    """JSON that no tag inside can end."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
