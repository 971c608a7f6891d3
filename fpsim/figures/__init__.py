"""The source's figures, measured again: `reproduce` writes one's numbers as JSON and CSV, and its picture as PNG.

A figure is one entry in FIGURES: a function that measures rows of numbers, and one that draws them.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure as Canvas

from fpsim.config import load_config
from fpsim.data import Dataset, load
from fpsim.errors import ConfigError, Problem
from fpsim.figures import float_choice, neural_gradients
from fpsim.figures.figure import Figure, Measured
from fpsim.files import write_bytes, write_json, write_text
from fpsim.report.plots import STYLE

FIGURES: dict[str, Figure] = {figure.name: figure for figure in (*float_choice.FIGURES, *neural_gradients.FIGURES)}

__all__ = ["FIGURES", "Figure", "Measured", "reproduce"]


def reproduce(name: str, folder: Path, data: list[str] | None = None, seed: int = 0) -> list[Path]:
    """Measure the figure `name` of FIGURES and write NAME.json, NAME.csv and NAME.png into `folder`: their paths.

    data: image sets for a figure that trains, each NAME or NAME=FOLDER of its files; None is mnist5k, which needs none.
    seed: of that training. Each file is written whole or not at all; the folder is made where it is missing.
    Raises ConfigError for data that the figure does not take, DataError for files that are missing or damaged.
    """
    figure = FIGURES[name]
    if data and not figure.datasets:
        raise ConfigError([Problem("--data", f"{name} takes no data (got {data[0]!r})")])
    measured = figure.measure(_datasets(figure, data or ["mnist5k"]), seed) if figure.datasets else figure.measure()
    folder.mkdir(parents=True, exist_ok=True)
    numbers, table, picture = (folder / f"{name}.{suffix}" for suffix in ("json", "csv", "png"))
    write_json(numbers, {"figure": name, "title": figure.title, "results": measured.results, "rows": measured.rows})
    write_text(table, _csv(measured))
    write_bytes(picture, _png(figure, measured))
    return [numbers, table, picture]


def _datasets(figure: Figure, given: list[str]) -> list[Dataset]:
    if len(given) > figure.datasets:
        raise ConfigError([Problem("--data", f"{figure.name} takes {figure.datasets} image set (got {len(given)})")])
    specs = []
    for text in given:
        name, _, root = text.partition("=")
        specs.append(load_config("quickstart", [f"data.name={name}", *([f"data.root={root}"] if root else [])]).data)
    return [load(spec, 0) for spec in specs]


def _csv(measured: Measured) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(measured.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(measured.rows)
    return stream.getvalue()


def _png(figure: Figure, measured: Measured) -> bytes:
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=figure.size_inches, layout="constrained")
        figure.draw(canvas, measured)
        picture = io.BytesIO()
        canvas.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()
