"""`fpsim bench`: runs the scripts of the `benchmarks` folder, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fpsim.errors import FpsimError
from fpsim.files import packaged_folder

# script: (arguments of a quick pass, of a full one)
SCRIPTS = {
    "elementwise": (["--quick"], ["--cold"]),
    "packing": (["--quick"], []),
    "matmul": (["--quick"], []),
    "datapath": (["--quick"], []),
    "training_step": (["--quick"], []),
    "weight_pruning": (["--quick"], []),
    "saved_activations": (["--quick"], []),
    "ranks": (["--quick", "--repeats", "1"], []),
    "gpu": ([], []),
}
NO_DEVICE = 2  # exit code of gpu.py


def scripts_folder() -> Path:
    return packaged_folder("benchmarks")


def run(full: bool, output: Path) -> None:
    """Print every benchmark's tables; its figures go to output/<script>.json.

    full: all rows, peers and first calls, not the rows with targets alone. Raises FpsimError, once all have run, where
    one of them failed; a machine without a CUDA device is no failure.
    """
    output.mkdir(parents=True, exist_ok=True)
    failed = []
    for script, (quick_arguments, full_arguments) in SCRIPTS.items():
        print(f"\n=== {script}", flush=True)
        command = [
            sys.executable,
            str(scripts_folder() / f"{script}.py"),
            *(full_arguments if full else quick_arguments),
        ]
        code = subprocess.run([*command, "--json", str(output / f"{script}.json")]).returncode
        if code and not (script == "gpu" and code == NO_DEVICE):
            failed.append(f"{script} (exit code {code})")
    if failed:
        raise FpsimError(f"benchmarks failed: {', '.join(failed)}")
