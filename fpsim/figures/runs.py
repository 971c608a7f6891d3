"""Figures of many trainings: each a run of `fpsim run` in a folder of its own.

What is finished is not trained again, and what was interrupted goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from fpsim.config import Config, config_hash, load_config
from fpsim.errors import ConfigError, Problem
from fpsim.report.results import Results, load_results
from fpsim.run_directory import CONFIG_FILE, METRICS_FILE, RESULTS_FILE, rows_of
from fpsim.runner import resume, run


def of_gradients(folder: Path, results: Results) -> dict[str, Any]:
    """achieved: mean over the steps of the share of zeros in all pruned dY, None where nothing is pruned. formats: of
    the layers that choose their gradient's, how many end with each, as a text."""
    zeros = [row["gradient_sparsity"] for row in rows_of(folder / METRICS_FILE) if row["kind"] == "step"]
    formats = [layer["format"] for layer in results.get("gradient_formats", [])]
    return {
        "achieved": None if None in zeros else float(np.mean(zeros)),
        "formats": ", ".join(f"{name} {formats.count(name)}" for name in sorted(set(formats))),
    }


def train_all(
    wanted: Iterable[tuple[dict[str, Any], Config]],
    runs: Path,
    more: Callable[[Path, Results], dict[str, Any]] = of_gradients,
) -> tuple[list[dict[str, Any]], str]:
    """A row a run, and the description of the data. wanted: what the row begins with, and the run's configuration.

    accuracy_percent: at the end. more: what else the row has of a run's folder and results, `achieved` among it.
    A line on stdout says what is done. Raises ConfigError for a folder with a run of another configuration, RunError as
    `run` does.
    """
    rows, data, planned = [], "", list(wanted)
    for number, (labels, config) in enumerate(planned, start=1):
        begun = time.monotonic()
        folder = folder_of(labels, runs)
        results = _finished(config, folder)
        data = results["data"]
        row = {
            **labels,
            **more(folder, results),
            "accuracy_percent": results["test_accuracy_percent"],
            "seconds": results["wall_seconds"],
        }
        rows.append(row)
        zeros = "" if row["achieved"] is None else f", {100 * row['achieved']:.1f} % zeros"
        print(
            f"{number} of {len(planned)}: {folder.name}: {row['accuracy_percent']:.2f} % right{zeros} "
            f"({time.monotonic() - begun:.0f} s)",
            flush=True,
        )
    return rows, data


def folder_of(labels: dict[str, Any], runs: Path) -> Path:
    """Where the run of these labels is."""
    return runs / "-".join(str(label) for label in labels.values())


def summaries(
    rows: list[dict[str, Any]], keys: tuple[str, ...], plain: str, case: tuple[str, ...] = ("network",)
) -> list[dict[str, Any]]:
    """Of the runs that agree in all keys: mean and deviation over seeds, and the mean difference of the accuracy to the
    plain run of the same seed, with its standard error.

    plain: the value of `method` in the runs to compare with; these agree in `seed` and in the keys `case`.
    """
    same = itemgetter("seed", *case)
    by_seed = {same(row): row["accuracy_percent"] for row in rows if row["method"] == plain}
    found = []
    for chosen in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        shown = [row for row in rows if tuple(row[key] for key in keys) == chosen]
        accuracies = np.array([row["accuracy_percent"] for row in shown])
        losses = accuracies - [by_seed[same(row)] for row in shown]
        several = len(shown) > 1
        achieved = [row["achieved"] for row in shown if row["achieved"] is not None]
        found.append(
            {
                **dict(zip(keys, chosen, strict=True)),
                "seeds": len(shown),
                "achieved": float(np.mean(achieved)) if achieved else None,
                "accuracy_percent": float(accuracies.mean()),
                "deviation": float(accuracies.std(ddof=1)) if several else None,
                "difference_to_plain": float(losses.mean()),
                "standard_error": float(losses.std(ddof=1) / np.sqrt(len(shown))) if several else None,
            }
        )
    return found


def _finished(config: Config, folder: Path) -> Results:
    """The results of a run of the configuration in the folder, trained now as far as it was not."""
    if (folder / CONFIG_FILE).is_file():
        if config_hash(load_config(folder / CONFIG_FILE)) != config_hash(config):
            message = "holds a run of another configuration: remove it, or choose another --output"
            raise ConfigError([Problem("", message, str(folder))])
        if not (folder / RESULTS_FILE).is_file():
            resume(folder, quiet=True)
    elif folder.exists():
        raise ConfigError([Problem("", "is what a start that was cut off has left: remove it", str(folder))])
    else:
        run(config, folder, quiet=True)
    return load_results(folder)
