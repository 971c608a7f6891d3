"""The report as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fpsim.report import plots, tables


def render_html(comparison: dict[str, Any]) -> str:
    """The tables, cards and plots: styles and images inline, no script, nothing loaded from elsewhere."""
    environment = Environment(
        loader=PackageLoader("fpsim.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = comparison["runs"]
    emulated = [run for run in runs if run["emulated"]]
    return environment.get_template("report.html").render(
        runs=runs,
        headlines=[(run, tables.cards(run)) for run in emulated or runs],
        runs_table=tables.runs_table(comparison),
        accuracy=Markup(plots.accuracy_svg(runs)),
        sections=[_section(run, f"run{index}") for index, run in enumerate(emulated)],
        notes=[*(tables.baseline_note(run) for run in emulated), *tables.run_notes(comparison)],
        ledger_note=tables.ledger_note(comparison),
    )


def _section(run: dict[str, Any], prefix: str) -> dict[str, Any]:
    pruned = any(row["asked_percent"] is not None for row in run["gradients"])
    weights = run["weight_pruning"]
    return {
        "run": run,
        "sizes": [tables.footprint_table(run), *tables.traffic_tables(run)],
        "gradients": tables.gradients_table(run),
        "miss_note": tables.miss_note(run),
        "weights": tables.weights_table(run),
        "weights_note": tables.weights_note(run),
        "weight_sparsity": Markup(plots.weights_svg(run, prefix)) if weights and weights["history"] else None,
        "snr": Markup(plots.snr_svg(run, prefix)) if weights and "log2_snr" in weights else None,
        "bits": Markup(plots.bits_svg(run, prefix)) if run["tensors"] else None,
        "sparsity": Markup(plots.sparsity_svg(run, prefix)) if pruned else None,
    }
