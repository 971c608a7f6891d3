"""The source's figures, measured again: `reproduce` writes one's numbers as JSON and CSV, and its picture as PNG.

A figure is one entry in FIGURES: a function that measures rows of numbers, and one that draws them.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from fpsim.config import load_config, load_section
from fpsim.data import Dataset, load
from fpsim.errors import ConfigError, Problem
from fpsim.figures import (
    accumulators,
    achieved_sparsity,
    float_choice,
    gradient_formats,
    neural_gradients,
    pruned_training,
    weight_sparsity,
)
from fpsim.figures.figure import Figure, Measured, data_overrides
from fpsim.files import write_bytes, write_json, write_text
from fpsim.pictures import picture

MODULES = (
    float_choice,
    neural_gradients,
    achieved_sparsity,
    pruned_training,
    gradient_formats,
    weight_sparsity,
    accumulators,
)
FIGURES: dict[str, Figure] = {figure.name: figure for module in MODULES for figure in module.FIGURES}

__all__ = ["FIGURES", "Figure", "Measured", "reproduce"]


def reproduce(
    name: str, folder: Path, data: list[str] | None = None, seed: int | None = None, config: str | None = None
) -> list[Path]:
    """Measure the figure `name` of FIGURES and write NAME.json, .csv, .png and .svg into `folder`: their paths.

    data: sets for a figure that trains, each NAME or NAME=FOLDER of its files; None is mnist5k, which needs none, or
    what the figure's experiment or plan says (those of its first case). seed: of that training; None is 0, or what
    experiment or plan says. config: another experiment or plan, a name or a file, for a figure that is one of runs;
    these go to `folder`/NAME-runs, and those that are there already are not trained again.
    Each file is written whole or not at all; the folder is made where it is missing.
    Raises ConfigError for what the figure does not take, DataError for files that are missing or damaged, RunError for
    a run that fails or is stopped.
    """
    figure = FIGURES[name]
    if config and not figure.experiment and not figure.plan:
        raise ConfigError([Problem("--config", f"{name} takes none: no experiment is behind it (got {config!r})")])
    if figure.plan:
        preset, section = figure.plan
        overrides = [f"cases.0.data={json.dumps(data)}"] if data else []
        overrides += [] if seed is None else [f"seed={seed}"]
        measured = figure.measure(
            load_section(section, config or preset, "figures", overrides), folder / f"{name}-runs"
        )
    elif data and not figure.datasets:
        raise ConfigError([Problem("--data", f"{name} takes no data (got {data[0]!r})")])
    elif len(data or []) > figure.datasets:
        raise ConfigError([Problem("--data", f"{name} takes {figure.datasets} image set (got {len(data or [])})")])
    elif figure.experiment:
        overrides = [override for text in data or [] for override in data_overrides(text)]
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
    for path in pictures:
        write_bytes(path, _drawn(figure, measured, path.suffix[1:]))
    return [numbers, table, *pictures]


def _dataset(text: str, figure: Figure) -> Dataset:
    limit = [f"data.train_limit={figure.train_limit}"] if figure.train_limit else []
    return load(load_config("quickstart", [*data_overrides(text), *limit]).data, 0)


def _csv(measured: Measured) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(measured.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(measured.rows)
    return stream.getvalue()


def _drawn(figure: Figure, measured: Measured, kind: str) -> bytes:
    return picture(lambda canvas: figure.draw(canvas, measured), kind, figure.size_inches, figure.name)
