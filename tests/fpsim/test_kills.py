"""kill -9 at random moments of a run, each resumed: the end is that of the run that nothing has interrupted.

The run prunes gradients and weights (by snr), chooses formats, and augments its images. Three moments here, thirty with
`-m exhaustive`; each is a moment of the process, from its first import to its end, and each resumed run is killed again
with probability one half.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fpsim.runs import outcome, settings

LAUNCH = [sys.executable, "-m", "fpsim"]
SEED = 20211126
EMULATION: dict[str, Any] = {
    "weights": {"format": "e4m3fn", "scale": "amax", "codec": "bitmask", "rounding": "stochastic"},
    "activations": {"format": "e4m3fn", "scale": "delayed", "scale_history": 4},
    "gradients": {
        "format": "e5m2",
        "rounding": "stochastic",
        "scale": "lognormal_error",
        "adapt": 3,
        "pruning": {"sparsity": 0.8, "policy": "heterogeneous", "refresh": 5},
    },
    "weight_pruning": {"name": "snr", "burn_in": 4, "interval": 7, "threshold": 0.5},
    "ledger": {"every_steps": 4},
}


def config() -> dict[str, Any]:
    """60 steps in 2 epochs, of LeNet on images that are augmented."""
    training = {
        "epochs": 2,
        "batch_size": 16,
        "micro_batches": 2,
        "optimizer": {"name": "adam", "learning_rate": 0.001},
        "checkpoint": {"every_steps": 3, "keep": 2},
    }
    return settings(
        data={"name": "synthetic", "train_samples": 480, "test_samples": 100, "image_size": 16, "augment": True},
        model={"name": "lenet"},
        training=training,
        emulation=EMULATION,
    )


def command(file: Path, folder: Path) -> list[str]:
    """Of a new run, or of one that goes on."""
    if folder.exists():
        return [*LAUNCH, "resume", str(folder), "--quiet"]
    return [*LAUNCH, "run", str(file), "--run-dir", str(folder), "--quiet"]


def end_with_kills(file: Path, folder: Path, draw: random.Random, seconds: float) -> tuple[int, float]:
    """Run to the end through a kill within `seconds`, and more with probability one half each: how many hit a running
    process, and how long the last one took."""
    hits = 0
    while True:
        begun = time.monotonic()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command(file, folder), **pipes, text=True) as process:
            if hits == 0 or draw.random() < 0.5:
                try:
                    process.wait(timeout=draw.uniform(0, seconds))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    hits += 1
            out, err = process.communicate(timeout=300)
        if process.returncode == 0:
            return hits, time.monotonic() - begun
        assert process.returncode == -signal.SIGKILL, f"{out}{err}"


def check_kills(tmp_path: Path, points: int) -> None:
    """As many runs as it takes for so many of them to be hit."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config()))
    begun = time.monotonic()
    subprocess.run(command(file, tmp_path / "whole"), check=True, capture_output=True)
    seconds, draw, hit, kills = time.monotonic() - begun, random.Random(SEED), 0, 0
    expected = outcome(tmp_path / "whole")
    while hit < points:
        folder = tmp_path / "killed"
        hits, took = end_with_kills(file, folder, draw, seconds)
        found = outcome(folder)
        assert [key for key in expected if found[key] != expected[key]] == [], f"after {hits} kills"
        shutil.rmtree(folder)
        hit, kills = hit + (hits > 0), kills + hits
        if not hits:  # kernels are compiled by now
            seconds = min(seconds, took)
    print(f"{points} runs of {seconds:.1f} s, {kills} kills, all ended as the run without one")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    check_kills(tmp_path, 2)


@pytest.mark.exhaustive
def test_killed_at_thirty_random_moments(tmp_path: Path) -> None:
    check_kills(tmp_path, 30)
