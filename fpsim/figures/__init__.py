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
from fpsim.figures import achieved_sparsity, float_choice, gradient_formats, neural_gradients, pruned_training
from fpsim.figures.figure import Figure, Measured
from fpsim.files import write_bytes, write_json, write_text
from fpsim.report.plots import STYLE

FIGURES: dict[str, Figure] = {
    figure.name: figure
    for module in (float_choice, neural_gradients, achieved_sparsity, pruned_training, gradient_formats)
    for figure in module.FIGURES
}

__all__ = ["FIGURES", "Figure", "Measured", "reproduce"]


def reproduce(
    name: str, folder: Path, data: list[str] | None = None, seed: int | None = None, config: str | None = None
) -> list[Path]:
    """Measure the figure `name` of FIGURES and write NAME.json, .csv, .png and .svg into `folder`: their paths.

    data: image sets for a figure that trains, each NAME or NAME=FOLDER of its files; None is mnist5k, which needs none,
    or what the figure's experiment says. seed: of that training; None is 0, or what the experiment says. config:
    another experiment, a name or a file, for a figure that is one of runs; these go to `folder`/NAME-runs, and those
    that are there already are not trained again.
    Each file is written whole or not at all; the folder is made where it is missing.
    Raises ConfigError for what the figure does not take, DataError for files that are missing or damaged, RunError for
    a run that fails or is stopped.
    """
    figure = FIGURES[name]
    if data and not figure.datasets:
        raise ConfigError([Problem("--data", f"{name} takes no data (got {data[0]!r})")])
    if len(data or []) > figure.datasets:
        raise ConfigError([Problem("--data", f"{name} takes {figure.datasets} image set (got {len(data or [])})")])
    if config and not figure.experiment:
        raise ConfigError([Problem("--config", f"{name} takes none: no experiment is behind it (got {config!r})")])
    if figure.experiment:
        overrides = [override for text in data or [] for override in _data_overrides(text)]
        overrides += [] if seed is None else [f"seed={seed}"]
        measured = figure.measure(load_config(config or figure.experiment, overrides), folder / f"{name}-runs")
    elif figure.datasets:
        measured = figure.measure([_dataset(text, figure) for text in data or ["mnist5k"]], seed or 0)
    else:
        measured = figure.measure()
    folder.mkdir(parents=True, exist_ok=True)
    numbers, table, *pictures = (folder / f"{name}.{suffix}" for suffix in ("json", "csv", "png", "svg"))
    write_json(numbers, {"figure": name, "title": figure.title, "results": measured.results, "rows": measured.rows})
    write_text(table, _csv(measured))
    for picture in pictures:
        write_bytes(picture, _drawn(figure, measured, picture.suffix[1:]))
    return [numbers, table, *pictures]


def _dataset(text: str, figure: Figure) -> Dataset:
    limit = [f"data.train_limit={figure.train_limit}"] if figure.train_limit else []
    return load(load_config("quickstart", [*_data_overrides(text), *limit]).data, 0)


def _data_overrides(text: str) -> list[str]:
    """What NAME or NAME=FOLDER changes in a configuration."""
    name, _, root = text.partition("=")
    return [f"data.name={name}", *([f"data.root={root}"] if root else [])]


def _csv(measured: Measured) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(measured.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(measured.rows)
    return stream.getvalue()


def _drawn(figure: Figure, measured: Measured, kind: str) -> bytes:
    """The picture as `png` or `svg`: the same bytes for the same numbers."""
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=figure.size_inches, layout="constrained")
        figure.draw(canvas, measured)
        picture = io.BytesIO()
        canvas.savefig(picture, format=kind, dpi=110, metadata=metadata)
    return picture.getvalue()
