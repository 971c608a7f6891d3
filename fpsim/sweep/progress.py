"""What a sweep shows while its trials are trained: a live table on a terminal, else a plain line a trial; on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fpsim.sweep.outcome import Outcome, Status
from fpsim.sweep.trials import Plan, label

COLORS = {"running": "yellow", "finished": "green", "failed": "red"}
# A terminal that is too low cuts the last ones.
ORDER: tuple[Status, ...] = ("running", "failed", "finished", "begun", "new")


class Progress(NamedTuple):
    """note: prints a line; show: shows a change of an outcome."""

    note: Callable[[str], None]
    show: Callable[[Outcome], None]


@contextmanager
def showing(plan: Plan, outcomes: list[Outcome], quiet: bool) -> Iterator[Progress]:
    """Shows the outcomes as they change, on a terminal all of them."""
    if quiet:
        yield Progress(lambda _: None, lambda _: None)
        return
    console = Console(stderr=True, highlight=False)
    note = partial(console.print, markup=False, soft_wrap=True)
    for line in (*plan.notes, f"{plan.folder}: {_counts(outcomes)}"):
        note(line)
    if not sys.stderr.isatty():
        yield Progress(note, lambda outcome: _print(note, outcomes, outcome))
        return
    with Live(_table(plan, outcomes), console=console, transient=True, refresh_per_second=4) as live:
        yield Progress(note, lambda _: live.update(_table(plan, outcomes)))


def _print(note: Callable[[str], None], outcomes: list[Outcome], outcome: Outcome) -> None:
    """A line for a trial that has ended, or failed and is begun again."""
    if outcome.status in ("finished", "failed"):
        ended = sum(one.status in ("finished", "failed") for one in outcomes)
        trial = f"{outcome.trial.config_hash} {label(outcome.trial.varied)}"
        note(f"{ended} of {len(outcomes)}: {trial}: {_end(outcome)}")


def _end(outcome: Outcome) -> str:
    if outcome.answer is not None:
        results = outcome.answer["results"]
        return f"{results['test_accuracy_percent']:.2f} % right, {results['wall_seconds']:.1f} s"
    if outcome.error is not None:
        return f"attempt {outcome.attempts} failed: {' '.join(outcome.error.split())}"
    return ""


def _counts(outcomes: list[Outcome]) -> str:
    statuses = [outcome.status for outcome in outcomes]
    counted = (f"{statuses.count(status)} {status}" for status in ORDER if status in statuses)
    return f"{len(outcomes)} trials: {', '.join(counted)}"


def _table(plan: Plan, outcomes: list[Outcome]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left", title_style="bold")
    table.title = f"{plan.sweep.name}: {_counts(outcomes)}"
    for title in ("trial", "what it changes", "status", ""):
        table.add_column(title, overflow="ellipsis", no_wrap=True)
    for outcome in sorted(outcomes, key=lambda one: ORDER.index(one.status)):
        status = Text(outcome.status, style=COLORS.get(outcome.status, ""))
        table.add_row(outcome.trial.config_hash, Text(label(outcome.trial.varied)), status, Text(_end(outcome)))
    return table
