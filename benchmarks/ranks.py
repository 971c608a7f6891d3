"""What two ranks send of their weight gradients: bytes, the accuracy that is left, and the time of a step.

LeNet learns 5,000 MNIST images on two ranks of this machine, from several seeds, for each way to send. `counted` are
the bytes that a run reports for a rank and a step. `on the wire` is what the kernel counted on the loopback device for
both ranks: of a run of two epochs less that of a run of one, over the steps between; with TCP's headers, and with the
few numbers that ranks tell each other beside gradients. Linux only; other traffic on the device counts as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from timing import keep, machine, print_lines, print_table, selection, show_progress

E5M2 = {"format": "e5m2", "rounding": "stochastic", "scale": "amax"}
WAYS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "e5m2": E5M2,
    "int8": {**E5M2, "format": "int8"},
    "e2m1 (4 bits)": {**E5M2, "format": "e2m1"},
    "e5m2, 90 % left out": {**E5M2, "sparsity": 0.9, "codec": "bitmask"},
    "e5m2, 90 % left out, no feedback": {**E5M2, "sparsity": 0.9, "codec": "bitmask", "error_feedback": False},
    "e5m2, 99 % left out": {**E5M2, "sparsity": 0.99, "codec": "coo"},
}
QUICK = "e5m2"
EPOCHS = 5
CONFIG: dict[str, Any] = {
    "data": {"name": "mnist5k"},
    "model": {"name": "lenet"},
    "threads": 1,
    "training": {
        "epochs": EPOCHS,
        "batch_size": 64,
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9},
        "checkpoint": {"every_steps": 100_000},
    },
}


def sent_on_loopback() -> int:
    """Bytes that this machine has sent to itself so far."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def trained(folder: Path, way: dict[str, Any] | None, seed: int, epochs: int) -> tuple[dict[str, Any], int]:
    """The results of a run on two ranks, and the bytes on the loopback device meanwhile."""
    training = {**CONFIG["training"], "epochs": epochs, "communication": way}
    file = folder / "run.yaml"  # JSON is YAML
    file.write_text(json.dumps({**CONFIG, "training": training, "seed": seed}), encoding="utf-8")
    place = folder / f"{len(list(folder.iterdir()))}"
    before = sent_on_loopback()
    command = [sys.executable, "-m", "fpsim", "run", str(file), "--run-dir", str(place), "--nproc", "2", "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((place / "results.json").read_text(encoding="utf-8")), sent_on_loopback() - before


def measured(way: dict[str, Any] | None, seeds: int) -> dict[str, Any]:
    """Accuracies in percent by seed; bytes that a rank sends in a step, counted and on the wire; seconds of a step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [trained(folder, way, seed, EPOCHS)[0] for seed in range(seeds)]
        (one, less), (two, more) = (trained(folder, way, 0, epochs) for epochs in (1, 2))
    return {
        "accuracy_percent": [run["test_accuracy_percent"] for run in runs],
        "counted_bytes_per_step": runs[0]["communication"]["sent_bytes_per_step"],
        "float32_bytes_per_step": runs[0]["communication"]["float32_bytes_per_step"],
        "wire_bytes_per_step": (more - less) / (two["steps"] - one["steps"]) / 2,
        "seconds_per_step": float(np.median([run["wall_seconds"] / run["steps"] for run in runs])),
    }


def main() -> None:
    arguments = selection(__doc__, "way", list(WAYS), QUICK, 3, "seeds of each")
    description = machine()
    print_lines(description)
    document: dict[str, Any] = {"machine": description, "ways": {}}
    rows = []
    for name in dict.fromkeys(["float32", *arguments.chosen]):
        show_progress(name)
        found = document["ways"][name] = measured(WAYS[name], arguments.repeats)
        accuracies, plain = found["accuracy_percent"], document["ways"]["float32"]
        spread = np.std(accuracies, ddof=1) if len(accuracies) > 1 else np.nan
        losses = np.subtract(accuracies, plain["accuracy_percent"])
        error = np.std(losses, ddof=1) / np.sqrt(len(losses)) if len(losses) > 1 else np.nan
        rows.append([
            name, f"{found['counted_bytes_per_step'] / 1024:.1f}", f"{found['wire_bytes_per_step'] / 1024:.1f}",
            f"{plain['counted_bytes_per_step'] / found['counted_bytes_per_step']:.1f}",
            f"{plain['wire_bytes_per_step'] / found['wire_bytes_per_step']:.1f}",
            f"{np.mean(accuracies):.2f} +- {spread:.2f}", f"{losses.mean():+.2f} +- {error:.2f}",
            f"{1e3 * found['seconds_per_step']:.1f}",
        ])  # fmt: skip
    columns = [
        "sent as", "counted KiB", "on the wire KiB", "float32 over counted", "float32 over wire", "accuracy %",
        "points to float32", "ms a step",
    ]  # fmt: skip
    print_table("Weight gradients that a rank sends in a step of LeNet, two ranks", columns, rows)
    keep(arguments, "ranks", document)


if __name__ == "__main__":
    main()
