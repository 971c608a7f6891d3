"""How every benchmark times, prints and stores: alternating calls in one run, ratios of medians, the machine's name."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numpy
import rich.box
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
FEWEST = 3  # repeats of the slowest call

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """The seconds that each repeat of one call took, in the order of the run.

    preemptions: involuntary context switches in all of them.
    """

    seconds: tuple[float, ...]
    preemptions: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def max(self) -> float:
        return max(self.seconds)

    @property
    def noise(self) -> float:
        """Slowest over fastest repeat: 1 on a silent machine."""
        return self.max / self.min

    def figures(self) -> dict[str, float]:
        return {"median_seconds": self.median, "min_seconds": self.min, "max_seconds": self.max}


@dataclass(frozen=True)
class Comparison:
    """An operation and the baseline that alternated with it in the same run."""

    operation: Times
    baseline: Times

    @property
    def ratio_of_medians(self) -> float:
        return self.operation.median / self.baseline.median

    @property
    def ratio_of_minima(self) -> float:
        return self.operation.min / self.baseline.min

    @property
    def preemptions_per_second(self) -> float:
        """Involuntary context switches: many when other processes want the same cores, or when memory is allocated."""
        seconds = sum(self.operation.seconds) + sum(self.baseline.seconds)
        return (self.operation.preemptions + self.baseline.preemptions) / seconds

    def figures(self) -> dict[str, object]:
        return {
            "ratio_of_medians": self.ratio_of_medians,
            "ratio_of_minima": self.ratio_of_minima,
            "repeats": len(self.operation.seconds),
            "preemptions_per_second": self.preemptions_per_second,
            "operation": self.operation.figures(),
            "baseline": self.baseline.figures(),
        }


def alternate(
    calls: Mapping[str, Call], repeats: int, warm_ups: int = 2, budget_seconds: float = math.inf
) -> dict[str, Times]:
    """Time every call `repeats` times, A B A B ..., after untimed rounds; a result is freed outside the timed part.

    budget_seconds: slow calls are repeated less often, to stay within it by the time of the last untimed round, but at
    least FEWEST times.
    """
    start = time.perf_counter()
    for _ in range(warm_ups):
        start = time.perf_counter()
        for call in calls.values():
            call()
    repeats = int(min(repeats, max(FEWEST, budget_seconds / (time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    preemptions = dict.fromkeys(calls, 0)
    for _ in range(repeats):
        for name, call in calls.items():
            before = _preemptions()
            start = time.perf_counter()
            result = call()
            seconds[name].append(time.perf_counter() - start)
            preemptions[name] += _preemptions() - before
            del result
    return {name: Times(tuple(seconds[name]), preemptions[name]) for name in calls}


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def compare(operation: Call, baseline: Call, repeats: int, budget_seconds: float = math.inf) -> Comparison:
    """`operation` against `baseline`, alternating."""
    times = alternate({"operation": operation, "baseline": baseline}, repeats, budget_seconds=budget_seconds)
    return Comparison(times["operation"], times["baseline"])


def machine() -> dict[str, object]:
    """What a result depends on: processor, threads, versions, and how busy the machine was (call it before timing)."""
    return {
        "processor": _processor(),
        "llvm_processor": llvmlite.binding.get_host_cpu_name(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_minute": os.getloadavg()[0],
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "numpy": numpy.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def show_progress(text: str) -> None:
    """What is being measured, on a terminal alone: each text takes the place of the one before."""
    if sys.stderr.isatty():
        print(f"\r{text[:100]:100}\r", end="", file=sys.stderr, flush=True)


def print_lines(lines: Mapping[str, object]) -> None:
    """One `name: value` a line."""
    for name, value in lines.items():
        print(f"{name}: {value}", flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that is also Markdown, as wide as its content; the first column is aligned left, the others right."""
    table = Table(box=rich.box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    print(f"\n{title}", flush=True)
    Console(width=Console(width=1 << 12).measure(table).maximum).print(table)


def results_path(benchmark: str, processor: object) -> Path:
    """Where a benchmark's figures go unless it is told otherwise: results/<benchmark>-<processor>.json."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{benchmark} {processor}".lower()).strip("-")
    return RESULTS / f"{name}.json"


def selection(
    description: str | None, option: str, names: Sequence[str], quick: str, repeats: int, what: str
) -> argparse.Namespace:
    """The command line of a benchmark of several cases: `chosen` of the names, `repeats`, `json`, `is_whole`.

    option: the case's name on the command line. quick: the case of --quick. what: is repeated.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"{what} (default {repeats})")
    parser.add_argument(f"--{option}", dest="chosen", choices=names, action="append", help="only this (repeatable)")
    parser.add_argument("--quick", action="store_true", help=f"only {quick!r}")
    parser.add_argument("--json", type=Path, help="where the figures go (of a whole run: results/)")
    arguments = parser.parse_args()
    arguments.chosen = arguments.chosen or ([quick] if arguments.quick else list(names))
    arguments.is_whole = len(arguments.chosen) == len(names)
    return arguments


def keep(arguments: argparse.Namespace, benchmark: str, document: Mapping[str, Any]) -> None:
    """Write the figures where `selection` was told to, or those of a whole run to `results_path`."""
    if arguments.json or arguments.is_whole:
        write_json(arguments.json or results_path(benchmark, document["machine"]["processor"]), document)


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write `document`, whole or not at all, and print where it lies. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(json.dumps(document, indent=2) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    print_lines({"written": path})
