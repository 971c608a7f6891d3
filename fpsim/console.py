"""What the command line prints besides plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text


def plain_console() -> Console:
    """A console on stdout that prints texts as they are: in colour on a terminal, unless NO_COLOR is set."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], wrapped: str = "") -> None:
    """A plain table, as wide as its content whatever the terminal: no number is cut. wrapped: the title of a column of
    texts that a terminal breaks into lines, so that the table fits."""
    console = Console(highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in header:
        table.add_column(title, no_wrap=title != wrapped, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if not (wrapped and console.is_terminal):
        widest = console.measure(table, options=console.options.update(width=1 << 12)).maximum
        console.width = max(console.width, widest)
    console.print(table)


@contextmanager
def counting(title: str, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A function that shows (done, total, what was done last) on stderr: a bar on a terminal, else a line a tenth."""
    console = Console(stderr=True, highlight=False)
    is_live = sys.stderr.isatty() and not quiet
    with Progress(console=console, disable=not is_live, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int, last: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title}: {last}")
            if not quiet and not is_live and done * 10 // total > (done - 1) * 10 // total:
                console.print(f"{title}: {done} of {total}, {last}", markup=False, soft_wrap=True)

        yield show
