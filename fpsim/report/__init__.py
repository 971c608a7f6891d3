"""Reports: what runs cost and saved, side by side, for the terminal and as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fpsim.errors import ConfigError, Problem
from fpsim.files import write_text
from fpsim.report.compare import comparison
from fpsim.report.page import render_html
from fpsim.report.results import load_results
from fpsim.report.text import render_text

__all__ = ["comparison", "load_results", "report"]

FILE_NAME = "report.html"


def report(run_dirs: Sequence[Path], output: Path | None = None, *, width: int = 100, color: bool = False) -> str:
    """Compare the runs in `run_dirs`: write report.html and return the text for a terminal.

    output: the directory to write into, made if it is missing; default: the first emulated run's, else the first one.
    width: characters per line; color: with ANSI colours. The last line of the text is the path of the HTML.
    Raises ValueError where `run_dirs` is empty, ConfigError where a run cannot be read (see `load_results`)
    or the HTML cannot be written.
    """
    if not run_dirs:
        raise ValueError("report needs at least one run directory")
    results = [load_results(run_dir) for run_dir in run_dirs]
    emulated = [run_dir for run_dir, result in zip(run_dirs, results, strict=True) if result["emulated"]]
    file = (output or [*emulated, *run_dirs][0]) / FILE_NAME
    data = comparison(results)
    _write(file, render_html(data))
    return f"{render_text(data, width, color)}{file}"


def _write(file: Path, content: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, content)
    except OSError as error:
        raise ConfigError([Problem("", f"the report cannot be written: {error.strerror}", str(file))]) from error
