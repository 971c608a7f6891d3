"""A training step of an emulated ResNet18 over the plain float32 step, and where the difference goes.

Two copies of the network train side by side on the same random batch, step by step in turn. The profile times the parts
of the emulation from inside, in a run of its own.
"""

from __future__ import annotations

import accel  # before torch: see accel/kernels/openmp.py

# isort: split
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timing import Comparison, alternate, keep, machine, print_lines, print_table, selection
from torch.nn import functional

import fpsim.emulation
import models
from fpsim.emulation import Emulator, emulate
from fpsim.gradients.distribution import Distributions
from fpsim.gradients.pruning import LayerPruning
from fpsim.memory import keep_freed_memory
from fpsim.recorder import Recorder

# name: (image shape, width, batch size, target ratio of performance)
CASES: dict[str, tuple[tuple[int, int, int], int, int, float | None]] = {
    "width 16, batch 128, 3x32x32": ((3, 32, 32), 16, 128, 1.35),
    "width 64, batch 128, 3x32x32": ((3, 32, 32), 64, 128, 1.15),
    "width 16, batch 64, 1x28x28 (quickstart)": ((1, 28, 28), 16, 64, None),
}
SHARE_TARGET = 0.05  # of the step's time, for thresholds and statistics together
QUICK_CASE = "width 16, batch 128, 3x32x32"
PARTS: dict[str, list[tuple[Any, str]]] = {
    "quantize weights and activations": [(accel, "quantize")],
    "prune + quantize gradients": [(accel, "prune_quantize")],
    "scales": [(fpsim.emulation, "measured"), (fpsim.emulation, "scale_of")],
    "thresholds": [(fpsim.emulation, "sample"), (LayerPruning, "threshold")],
    "statistics": [(Distributions, "record"), (LayerPruning, "measure")],
    "ledger": [
        (Emulator, "_stored"),
        (Emulator, "_record_products"),
        (Emulator, "_record_gradient_products"),
        (Recorder, "layer"),
        (Recorder, "gradient"),
        (Recorder, "update"),
        (fpsim.emulation, "stored_tensor"),
    ],
}


def training_step(shape: tuple[int, int, int], width: int, batch: int, accelerator: str | None) -> Callable[[], None]:
    """One step on a fixed batch: forward, backward, SGD update."""
    torch.manual_seed(0)
    model = models.build("resnet18", input_shape=shape, classes=10, width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    emulator = None if accelerator is None else emulate(model, accelerator, optimizer=optimizer)
    images, labels = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if emulator is not None:
            emulator.step()

    return step


@contextmanager
def stopwatches() -> Iterator[dict[str, float]]:
    """Seconds spent in each of PARTS, the outermost call counting."""
    seconds = dict.fromkeys(PARTS, 0.0)
    running: list[str] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if running:
                return function(*arguments, **named)
            running.append(part)
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[part] += time.perf_counter() - start
                running.pop()

        return call

    originals = [(part, owner, name, getattr(owner, name)) for part, places in PARTS.items() for owner, name in places]
    for part, owner, name, function in originals:
        setattr(owner, name, timed(part, function))
    try:
        yield seconds
    finally:
        for _, owner, name, function in originals:
            setattr(owner, name, function)


def profile(emulated: Callable[[], None], plain_seconds: float, steps: int) -> dict[str, float]:
    """Mean milliseconds of a step that each part takes; the remainder is hooks and what emulation does to the rest."""
    with stopwatches() as seconds:
        start = time.perf_counter()
        for _ in range(steps):
            emulated()
        total = time.perf_counter() - start
    parts = {part: 1e3 * value / steps for part, value in seconds.items()}
    parts["everything else (hooks, memory)"] = 1e3 * (total / steps - plain_seconds) - sum(parts.values())
    return parts


def watching(parts: dict[str, float]) -> float:
    """Milliseconds of a step that go into finding thresholds and into statistics."""
    return parts["thresholds"] + parts["statistics"]


def main() -> None:
    what = "steps of each kind; one ledger sample in 50"
    arguments = selection(__doc__, "case", list(CASES), QUICK_CASE, 50, what)
    keep_freed_memory()  # for both, as `fpsim run` does for every run
    description = machine()
    print_lines(description)
    document: dict[str, Any] = {"machine": description, "cases": {}}
    rows, profiles, shares = [], [], []
    for name in arguments.chosen:
        shape, width, batch, target = CASES[name]
        plain, emulated = (training_step(shape, width, batch, kind) for kind in (None, "fp8-training"))
        times = alternate({"emulated": emulated, "plain": plain}, arguments.repeats, warm_ups=3)
        comparison = Comparison(times["emulated"], times["plain"])
        mean_ratio = sum(times["emulated"].seconds) / sum(times["plain"].seconds)
        parts = profile(emulated, times["plain"].median, arguments.repeats)
        document["cases"][name] = {
            **comparison.figures(),
            "ratio_of_means": mean_ratio,
            "target_ratio": target,
            "thresholds_and_statistics_share": (share := watching(parts) / (1e3 * times["emulated"].median)),
            "profile_milliseconds_per_step": parts,
        }
        met = "" if target is None else "yes" if comparison.ratio_of_medians <= target else "no"
        rows.append([
            name, f"{1e3 * times['plain'].median:.1f}", f"{1e3 * times['emulated'].median:.1f}",
            f"{comparison.ratio_of_medians:.2f}", f"{mean_ratio:.2f}", "" if target is None else f"{target:.2f}", met,
        ])  # fmt: skip
        profiles.append([name, *(f"{value:.1f}" for value in parts.values())])
        shares.append(
            [name, f"{100 * share:.1f} %", f"{100 * SHARE_TARGET:g} %", "yes" if share < SHARE_TARGET else "no"]
        )
    columns = ["ResNet18", "plain ms", "emulated ms", "ratio of medians", "of means", "target", "met"]
    print_table("Training step, emulated (fp8-training) over plain float32", columns, rows)
    print_table("Where the difference goes, mean ms a step", ["ResNet18", *PARTS, "everything else"], profiles)
    columns = ["ResNet18", "thresholds and statistics", "target", "met"]
    print_table("Share of the emulated step's time at the default schedule (with --repeats 50)", columns, shares)
    keep(arguments, "training_step", document)


if __name__ == "__main__":
    main()
