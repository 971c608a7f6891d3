"""The examples run, in seconds, and train."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "examples").glob("*.py"))])
def test_an_example(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    ran = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout
    sparsities = [float(found) for found in re.findall(r"^layer \S+: ([\d.]+) % of the gradient", shown, re.MULTILINE)]
    assert len(sparsities) >= 3
    assert all(75 < sparsity < 96 for sparsity in sparsities)
    (less,) = re.findall(r"^traffic of a step: ([\d.]+) times less than float32$", shown, re.MULTILINE)
    assert float(less) > 1.2
    for accuracy in re.findall(r"accuracy.*: ([\d.]+) %", shown):
        assert float(accuracy) > 80
    for first, last in re.findall(r"^loss: ([\d.]+) at first, ([\d.]+) in the end$", shown, re.MULTILINE):
        assert float(last) < float(first) - 0.3
    assert re.search("accuracy|loss: ", shown)
    assert list(tmp_path.iterdir()) == []
