"""A sweep's tables, for the terminal and for a self-contained HTML page with plots of accuracy against costs."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes

from fpsim.console import print_table
from fpsim.pictures import COLORS, picture
from fpsim.report.page import asset, environment
from fpsim.report.tables import ABSENT, number
from fpsim.sweep.outcome import Outcome
from fpsim.sweep.trials import Plan, text


class Column(NamedTuple):
    """A measured value of a table: its title with the unit, and by what it is multiplied."""

    key: str
    title: str
    decimals: int
    factor: float = 1.0


COLUMNS = (
    Column("test_accuracy_percent", "accuracy (%)", 2),
    Column("gradient_bits_per_element", "bits a gradient element", 2),
    Column("gradient_bits_fp32_ratio", "fp32 over it", 2),
    Column("footprint_mib", "footprint (MiB)", 3),
    Column("footprint_fp32_ratio", "fp32 over it", 2),
    Column("traffic_mib_per_step", "traffic a step (MiB)", 3),
    Column("traffic_fp32_ratio", "fp32 over it", 2),
    Column("estimated_seconds_per_step", "estimated step (ms)", 4, 1e3),
    Column("estimated_time_fp32_ratio", "fp32 over it", 2),
    Column("wall_seconds", "wall (s)", 1),
)
ACCURACY, BITS, TRAFFIC, ESTIMATED, WALL = (COLUMNS[index] for index in (0, 1, 5, 7, 9))

Table = tuple[list[str], list[list[str]]]  # header, rows


def show(summary: dict[str, Any]) -> None:
    """Print the tables of trials and of groups, and what failed."""
    print_table(*trials_table(summary))
    print()
    print_table(*groups_table(summary))
    for line in errors(summary):
        print(line)


def render_html(summary: dict[str, Any]) -> str:
    """The same and the plots as one page: styles and images inline, nothing loaded from elsewhere."""
    return (
        environment("fpsim.sweep")
        .get_template("sweep.html")
        .render(
            style=asset("report.css"),
            name=summary["name"],
            counts=counts(summary),
            plot=Markup(pareto_svg(summary["groups"])) if _costs(summary["groups"]) else None,
            groups=groups_table(summary),
            trials=trials_table(summary),
            errors=errors(summary),
            notes=summary["notes"],
        )
    )


def show_plan(plan: Plan, outcomes: list[Outcome]) -> None:
    """Print the trials of a sweep, and how far each is."""
    keys = list(dict.fromkeys(key for trial in plan.trials for key in trial.varied))
    rows = [
        [str(index), one.trial.config_hash, *(_varied(one.trial.varied, key) for key in keys), one.status]
        for index, one in enumerate(outcomes, start=1)
    ]
    print_table(["trial", "hash", *short_names(keys), "status"], rows)
    for note in plan.notes:
        print(note)


def counts(summary: dict[str, Any]) -> str:
    """How many trials there are, and how many of them ended how."""
    statuses = [row["status"] for row in summary["trials"]]
    found = [f"{statuses.count(one)} {one}" for one in ("finished", "failed", "unfinished") if one in statuses]
    return f"{len(statuses)} trials: {', '.join(found)}"


def errors(summary: dict[str, Any]) -> list[str]:
    """A line for each trial with an error."""
    return [f"trial {row['trial']}, {row['status']}: {row['error']}" for row in summary["trials"] if row["error"]]


def trials_table(summary: dict[str, Any]) -> Table:
    """A row a trial."""
    columns = _columns(summary["trials"])
    keys = summary["varied_keys"]
    header = ["trial", "hash", *short_names(keys), "status", "attempts", *(column.title for column in columns)]
    rows = [
        [
            str(row["trial"]), row["config_hash"], *(_varied(row["varied"], key) for key in keys), row["status"],
            str(row["attempts"]), *(_shown(row[column.key], column) for column in columns),
        ]
        for row in summary["trials"]
    ]  # fmt: skip
    return header, rows


def groups_table(summary: dict[str, Any]) -> Table:
    """A row a group of trials that differ in the seed alone; best by: the costs by which no group dominates it."""
    groups, keys = summary["groups"], [key for key in summary["varied_keys"] if key != "seed"]
    columns = _columns([group["mean"] for group in groups])
    costs = [column for column in columns if column in (TRAFFIC, BITS, ESTIMATED, WALL)]
    header = ["group", *short_names(keys), "n", *(column.title for column in columns), "best by"]
    rows = [
        [
            str(group["group"]), *(_varied(group["varied"], key) for key in keys), str(group["n"]),
            *(_mean(group, column) for column in columns),
            ", ".join(column.title.partition(" (")[0] for column in costs if column.key in group["best_by"]),
        ]
        for group in groups
    ]  # fmt: skip
    return header, rows


def short_names(keys: list[str]) -> list[str]:
    """The shortest end of each dotted key that is no other key's, or all of it."""

    def ends(key: str) -> list[str]:
        parts = key.split(".")
        return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]

    return [next((end for end in ends(key) if sum(end in ends(other) for other in keys) == 1), key) for key in keys]


def pareto_svg(groups: list[dict[str, Any]]) -> str:
    """Accuracy against traffic, gradient bits and time, one panel each: groups by number, deviations over seeds as
    bars, those that none dominates filled and joined."""
    costs = _costs(groups)

    def draw_all(canvas: Any) -> None:
        panels = canvas.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axes, column in zip(panels, costs, strict=True):
            _draw(axes, groups, column)
        panels[0].set_ylabel("test accuracy (%)")

    svg = picture(draw_all, "svg", (0.6 + 3.6 * len(costs), 3.8), "sweep").decode()
    return "<svg " + re.sub("<metadata>.*</metadata>", "", svg, flags=re.DOTALL).partition("<svg ")[2]


def _costs(groups: list[dict[str, Any]]) -> list[Column]:
    """What accuracy is plotted against: where every group has an estimated time, that is the time."""
    finished = [group for group in groups if group["mean"][ACCURACY.key] is not None]
    is_estimated = finished and all(group["mean"][ESTIMATED.key] is not None for group in finished)
    costs = (TRAFFIC, BITS, ESTIMATED if is_estimated else WALL)
    return [column for column in costs if any(group["mean"][column.key] is not None for group in finished)]


def _draw(axes: Axes, groups: list[dict[str, Any]], column: Column) -> None:
    shown = [group for group in groups if None not in (group["mean"][column.key], group["mean"][ACCURACY.key])]
    for group in shown:
        x, y = _point(group, column)
        dx, dy = ((group["deviation"][one.key] or 0.0) * one.factor for one in (column, ACCURACY))
        fill = COLORS[0] if column.key in group["best_by"] else "white"
        axes.errorbar(
            x, y, xerr=dx or None, yerr=dy or None, fmt="o", color=COLORS[0], markerfacecolor=fill, elinewidth=0.8
        )
        axes.annotate(str(group["group"]), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=9)
    best = sorted(_point(group, column) for group in shown if column.key in group["best_by"])
    axes.plot(*zip(*best, strict=True), color=COLORS[0], linewidth=1, alpha=0.5)
    axes.set_xlabel(column.title)
    axes.margins(0.12)


def _point(group: dict[str, Any], column: Column) -> tuple[float, float]:
    return group["mean"][column.key] * column.factor, group["mean"][ACCURACY.key]


def _columns(rows: list[dict[str, Any]]) -> list[Column]:
    """Those that any row has."""
    return [column for column in COLUMNS if any(row[column.key] is not None for row in rows)]


def _varied(varied: dict[str, Any], key: str) -> str:
    return text(varied[key]) if key in varied else ABSENT


def _shown(value: float | None, column: Column) -> str:
    return number(None if value is None else value * column.factor, column.decimals)


def _mean(group: dict[str, Any], column: Column) -> str:
    mean, deviation = (_shown(group[part][column.key], column) for part in ("mean", "deviation"))
    return mean if deviation == ABSENT or column.title == "fp32 over it" else f"{mean} ± {deviation}"
