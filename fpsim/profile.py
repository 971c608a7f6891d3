"""`fpsim run --profile`: where the time of a training step goes.

    profile.json   milliseconds a step by phase (data, forward, backward, optimizer, end of step), and in each what is
                   the network's and what the emulation's, by kind (see `fpsim.ranges`)
    trace.json     every operation of the profiled steps, for https://ui.perfetto.dev or chrome://tracing

Every moment counts once, for the innermost range: a scale that is found while a weight is rounded is among the scales.
What is in a phase and in no kind is the network's; emulation also makes that slower, by the tensors that it leaves in
the caches and by watching function calls.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from fpsim.console import print_table
from fpsim.errors import ConfigError, Problem
from fpsim.files import write_json
from fpsim.ranges import END, KINDS, PHASES, PREFIX, STEP, span
from fpsim.run_directory import PROFILE_FILE, TRACE_FILE

WARM_UP_STEPS, STEPS = 2, 3  # kernels are compiled or loaded in the first step
OTHER = "between the phases"


class Range(NamedTuple):
    """A range of a profile: its name without PREFIX, and where it begins and ends, in microseconds."""

    name: str
    start: float
    end: float


class StepProfiler:
    """Profiles the third to the fifth step of a run and writes the files in its directory; a context manager.

    Raises ConfigError for a run of fewer steps.
    """

    def __init__(self, folder: Path, total_steps: int) -> None:
        if total_steps < WARM_UP_STEPS + STEPS:
            message = f"profiles steps {WARM_UP_STEPS + 1} to {WARM_UP_STEPS + STEPS} (the run has {total_steps})"
            raise ConfigError([Problem("--profile", message)])
        self.folder = folder
        self._done = 0
        self._seconds: list[float] = []
        self._running: torch.profiler.profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._running.stop()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        if self._done == WARM_UP_STEPS:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch writes on stderr that it profiles
            self._running = torch.profiler.profile(activities=_activities())
            self._running.start()
        began = time.perf_counter()
        with span(STEP):
            yield
        self._seconds.append(time.perf_counter() - began)
        self._done += 1
        if self._done == WARM_UP_STEPS + STEPS and self._running is not None:
            profiler, self._running = self._running, None
            profiler.stop()
            self._write(profiler)

    def _write(self, profiler: torch.profiler.profile) -> None:
        trace = self.folder / TRACE_FILE
        temporary = trace.with_name(f".{trace.name}.{os.getpid()}.tmp.json")
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, trace)
        found = summary(ranges_of(profiler))
        found["milliseconds_of_the_step_before"] = 1e3 * self._seconds[WARM_UP_STEPS - 1]
        write_json(self.folder / PROFILE_FILE, {"first_step": WARM_UP_STEPS + 1, **found})


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def ranges_of(profiler: torch.profiler.profile) -> list[Range]:
    """The ranges of a profile that has ended."""
    return [
        Range(event.name.removeprefix(PREFIX), event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.name.startswith(PREFIX) and event.device_type == torch.autograd.DeviceType.CPU
    ]


def summary(ranges: Iterable[Range]) -> dict[str, Any]:
    """Milliseconds and calls a step, and shares of the step, by phase and kind, from the ranges of whole steps."""
    own: dict[tuple[str, str], float] = defaultdict(
        float
    )  # of a phase and a kind, a phase itself being "", microseconds
    calls: Counter[tuple[str, str]] = Counter()
    steps, open_ranges = 0, list[Range]()
    for one in sorted(ranges, key=lambda one: (one.start, -one.end)):
        while open_ranges and open_ranges[-1].end <= one.start:
            open_ranges.pop()
        if one.name == STEP:
            steps += 1
        elif not open_ranges:
            continue  # outside the steps, as evaluation is
        place = _place([*open_ranges, one])
        own[place] += one.end - one.start
        calls[place] += one.name != STEP
        if open_ranges:
            own[_place(open_ranges)] -= one.end - one.start
        open_ranges.append(one)
    total = sum(own.values())

    def row(names: dict[str, str], places: Iterable[tuple[str, str]]) -> dict[str, Any]:
        chosen = list(places)
        spent = sum(own[place] for place in chosen)
        counted = sum(calls[place] for place in chosen)
        milliseconds, share = spent / steps / 1e3, spent / total
        return {**names, "milliseconds": milliseconds, "share": share, "calls": counted / steps}

    phases = []
    for phase in (*PHASES, OTHER):
        kinds = [kind for kind in KINDS if (phase, kind) in own]
        whole = row({"phase": phase}, ((phase, kind) for kind in ("", *kinds)))
        whole["calls"] = calls[phase, ""] / steps
        emulation = [row({"kind": kind}, [(phase, kind)]) for kind in kinds]
        phases.append({**whole, "network_milliseconds": own[phase, ""] / steps / 1e3, "emulation": emulation})
    by_kind = [row({"kind": kind}, [place for place in own if place[1] == kind]) for kind in KINDS]
    return {
        "steps": steps,
        "milliseconds_per_step": total / steps / 1e3,
        "emulation_milliseconds": sum(one["milliseconds"] for one in by_kind),
        "emulation_share": sum(one["share"] for one in by_kind),
        "phases": phases,
        "emulation": [one for one in by_kind if one["calls"]],
    }


def _place(nested: list[Range]) -> tuple[str, str]:
    """The phase and the kind of the innermost of ranges that lie in one another."""
    phase = next((one.name for one in nested if one.name in PHASES), OTHER)
    return phase, nested[-1].name if nested[-1].name in KINDS else ""


def load(run: Path) -> dict[str, Any]:
    """The profile of a run."""
    found: dict[str, Any] = json.loads((run / PROFILE_FILE).read_text(encoding="utf-8"))
    return found


def show(profile: dict[str, Any], run: Path) -> None:
    """Print where the time of a step goes."""
    last = profile["first_step"] + profile["steps"] - 1
    print(
        f"steps {profile['first_step']} to {last}: {profile['milliseconds_per_step']:.1f} ms each, "
        f"{100 * profile['emulation_share']:.1f} % of it emulation "
        f"({profile['milliseconds_of_the_step_before']:.1f} ms the step before, without the profiler)"
    )
    rows = []
    for phase in profile["phases"]:
        rows.append(_cells(phase["phase"], phase))
        if phase["emulation"] and phase["phase"] != END:
            itself = {"milliseconds": phase["network_milliseconds"], "calls": phase["calls"]}
            share = itself["milliseconds"] / profile["milliseconds_per_step"]
            rows.append(_cells("  the network itself", {**itself, "share": share}))
        rows += [_cells(f"  {one['kind']}", one) for one in phase["emulation"]]
    print_table(["part", "ms a step", "% of it", "calls"], rows)
    print(f"every operation: {run / TRACE_FILE}, to be opened in https://ui.perfetto.dev")


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    return [name, f"{row['milliseconds']:9.2f}", f"{100 * row['share']:7.1f}", f"{row['calls']:5.0f}"]
