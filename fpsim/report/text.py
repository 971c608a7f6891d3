"""The report for a terminal."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

from fpsim.report import tables

WIDEST = 10_000  # characters: room to measure a table in


def render_text(comparison: dict[str, Any], width: int, color: bool) -> str:
    """The tables and notes, `width` characters wide; wider only where a number would have to be cut."""
    stream = StringIO()
    console = Console(
        file=stream, width=width, force_terminal=color, color_system="standard" if color else None,
        markup=False, emoji=False, highlight=False, legacy_windows=False,
    )  # fmt: skip
    emulated = [run for run in comparison["runs"] if run["emulated"]]
    _print(console, tables.runs_table(comparison), width)
    for run in emulated:
        console.print(tables.baseline_note(run))
    for told in tables.run_notes(comparison):
        console.print(told)
    for run in emulated:
        console.print(f"\n{run['label']}", style="bold")
        for table in tables.tables_of(run):
            if table.rows:
                _print(console, table, width)
        for note in tables.notes_of(run):
            console.print(note)
    console.print()
    console.print(tables.ledger_note(comparison))
    return stream.getvalue()


def _print(console: Console, table: tables.Table, width: int) -> None:
    grid = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    longest_name = max(len(row[0]) for row in table.rows)
    grid.add_column(table.header[0], overflow="fold", min_width=min(longest_name, width // 3), no_wrap=not table.wraps)
    for title in table.header[1:]:
        if table.wraps:
            grid.add_column(title, justify="right", overflow="fold", min_width=12)
        else:
            grid.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in table.rows[:-1]:
        grid.add_row(*row)
    if table.has_total:
        grid.add_section()
    grid.add_row(*table.rows[-1], style="bold" if table.has_total else None)
    natural = Measurement.get(console, console.options.update(width=WIDEST), grid)
    console.width = max(width, natural.minimum if table.wraps else natural.maximum)
    console.print(grid)
    console.width = width
