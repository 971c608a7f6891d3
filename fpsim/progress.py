"""What a run shows while it trains: a live bar on a terminal, else one plain line an epoch; always on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Progress of a run of `total` steps; shows nothing when quiet. Use as a context manager."""

    def __init__(self, name: str, total: int, quiet: bool) -> None:
        self.name, self.total, self.quiet = name, total, quiet
        self.console = Console(stderr=True, highlight=False)
        self.live = not quiet and sys.stderr.isatty()
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task(name, total=total, figures="")

    def __enter__(self) -> Progress:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)

    def note(self, text: str) -> None:
        """One line of information."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def step(self, row: dict[str, Any]) -> None:
        """Show the figures of one step."""
        if self.live:
            sparsity = row["gradient_sparsity"]
            figures = f"loss {row['loss']:.3f} acc {row['accuracy_percent']:.0f} %"
            figures += "" if sparsity is None else f" dY {100 * sparsity:.0f} % zero"
            self.bar.update(self.task, completed=row["step"], figures=figures)

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the figures of one epoch."""
        sparsity = "" if row["gradient_sparsity"] is None else f", dY sparsity {row['gradient_sparsity']:.3f}"
        self.note(
            f"{self.name}: epoch {row['epoch']}, step {row['step']} of {self.total}: "
            f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy_percent']:.2f} %; "
            f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy_percent']:.2f} %{sparsity}"
        )
