"""Reports: what runs cost and saved, side by side, for the terminal, as a page for a browser, and as data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpsim.errors import ConfigError, Problem
from fpsim.files import write_text
from fpsim.report.compare import comparison
from fpsim.report.formats import FORMATS
from fpsim.report.page import render_html
from fpsim.report.results import load_results
from fpsim.report.text import render_text

__all__ = ["compared", "comparison", "load_results", "report", "report_as", "write_page"]

FILE_NAME = "report.html"


def report(
    run_dirs: Sequence[Path],
    output: Path | None = None,
    *,
    machines: Sequence[str] = (),
    width: int = 100,
    color: bool = False,
) -> str:
    """Compare the runs in `run_dirs`: write report.html and return the text for a terminal.

    output: the directory to write into, made if it is missing; default: the first emulated run's, else the first one.
    machines: as in `compared`. width: characters per line; color: with ANSI colours. The last line of the text is the
    path of the HTML. Raises as `compared` and `write_page`.
    """
    document = compared(run_dirs, machines)
    return f"{render_text(document, width, color)}{write_page(document, run_dirs, output)}"


def compared(run_dirs: Sequence[Path], machines: Sequence[str] = ()) -> dict[str, Any]:
    """The comparison document of the runs (see `comparison`).

    machines: accelerators, by name or file, on which the runs' ledgers are estimated; none: what the runs noted.
    Raises ValueError where `run_dirs` is empty, ConfigError where a run cannot be read (see `load_results`) or a
    machine is not one.
    """
    if not run_dirs:
        raise ValueError("report needs at least one run directory")
    results = [load_results(run_dir) for run_dir in run_dirs]
    if machines:
        from fpsim.machine_costs import machine_costs, machines_named
        from fpsim.run_directory import ledger_of

        described = machines_named(machines)
        for run_dir, result in zip(run_dirs, results, strict=True):
            result["machines"] = machine_costs(described, ledger_of(run_dir))
    return comparison(results)


def write_page(document: dict[str, Any], run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write report.html of the runs into `output`, or the first emulated run's directory, else the first one: its path.
    Raises ConfigError where it cannot be written."""
    emulated = [run_dir for run_dir, run in zip(run_dirs, document["runs"], strict=True) if run["emulated"]]
    file = (output or [*emulated, *run_dirs][0]) / FILE_NAME
    _write(file, render_html(document))
    return file


def report_as(
    format_name: str, run_dirs: Sequence[Path], output: Path | None = None, *, machines: Sequence[str] = ()
) -> str:
    """The report as `md`, `csv` or `json`: the text, or with `output` the path of report.<format> written there; as
    `html` the path of the page. Raises as `compared`, and ConfigError where a file cannot be written."""
    document = compared(run_dirs, machines)
    if format_name == "html":
        return f"{write_page(document, run_dirs, output)}\n"
    text = FORMATS[format_name](document)
    if output is None:
        return text
    file = output / f"report.{format_name}"
    _write(file, text)
    return f"{file}\n"


def _write(file: Path, content: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, content)
    except OSError as error:
        raise ConfigError([Problem("", f"the report cannot be written: {error.strerror}", str(file))]) from error
