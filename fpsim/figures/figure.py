"""What a figure is: how its numbers are measured, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from fpsim.config.schema import Section


@dataclass(frozen=True)
class Measured:
    """rows: the numbers that are drawn, all with the same keys. results: what follows from them; both plain data."""

    rows: list[dict[str, Any]]
    results: dict[str, Any]

    @property
    def data_name(self) -> str:
        """Of the data set that `results` describe under "data"."""
        return str(self.results["data"]).partition(":")[0]


@dataclass(frozen=True)
class Figure:
    """name: as in the source, `fig3a`. title: what it shows, in a sentence. size_inches: width, height.

    datasets: the most image sets it trains on; measure takes a list of them and a seed, or nothing where that is 0.
    train_limit: how many of their training images it uses, None for all.
    experiment: the configuration of the runs that it trains instead; measure takes it and a folder for the runs.
    plan: or the file in configs/figures that says which runs, and what it is read as; measure takes that and a folder.
    """

    name: str
    title: str
    measure: Callable[..., Measured]
    draw: Callable[[Canvas, Measured], None]
    size_inches: tuple[float, float] = (9.0, 5.0)
    datasets: int = 0
    train_limit: int | None = None
    experiment: str | None = None
    plan: tuple[str, type[Section]] | None = None


def draw_plain(axes: Axes, plain: dict[str, Any], label: str | None = None) -> None:
    """The accuracy of the plain runs of `summaries`: a line, and a band of the deviation over seeds."""
    axes.axhline(plain["accuracy_percent"], color="black", linewidth=1.2, label=label)
    if plain["deviation"] is not None:
        low, high = (plain["accuracy_percent"] + sign * plain["deviation"] for sign in (-1, 1))
        axes.axhspan(low, high, color="black", alpha=0.08, linewidth=0)


def data_overrides(text: str) -> list[str]:
    """What NAME or NAME=FOLDER changes in a configuration."""
    name, _, root = text.partition("=")
    return [f"data.name={name}", *([f"data.root={root}"] if root else [])]
