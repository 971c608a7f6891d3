"""Event files for TensorBoard: what they hold, that a run is the same without them, and that a resume neither doubles
nor loses a point."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fpsim import runner
from fpsim.config import config_hash, parse_config
from fpsim.errors import ConfigError, RunError
from fpsim.run_directory import ledger_of
from fpsim.runner import resume, run
from tests.fpsim.runs import outcome, settings

pytestmark = pytest.mark.usefixtures("restored_threads")


def events(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Step and value of every point that TensorBoard shows, by tag."""
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    read.Reload()
    tags = read.Tags()
    scalars = {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in tags["scalars"]}
    histograms = {
        tag: [(one.step, (one.histogram_value.num, one.histogram_value.sum)) for one in read.Histograms(tag)]
        for tag in tags["histograms"]
    }
    return scalars | histograms


def same(one: Any, other: Any) -> bool:
    return math.isclose(one, other, rel_tol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    folder = run(settings(tensorboard=True), tmp_path_factory.mktemp("events") / "run", quiet=True).run_dir
    torch.set_num_threads(threads)
    return folder


def test_what_is_written(whole: Path) -> None:
    found = events(whole)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for kind, keys in (("step", ("loss", "learning_rate", "gradient_sparsity")), ("epoch", ("test_loss",))):
        for key in keys:
            expected = [(row["step"], row[key]) for row in rows if row["kind"] == kind]
            assert [step for step, _ in found[key]] == [step for step, _ in expected]
            assert all(same(a, b) for (_, a), (_, b) in zip(found[key], expected, strict=True))
    assert "weight_sparsity" not in found
    recorded = [1, 5, 9, 10]
    records = [record for record in ledger_of(whole).records if record.stored.codec == "alpha"]
    layers = {record.layer for record in records}
    assert {tag.partition("/")[2] for tag in found if tag.startswith("gradient_sparsity/")} == layers
    assert len(layers) == 2
    for layer in layers:
        for tag in ("gradient_bits_per_element", "gradient_bias", "gradient_cosine", "weight_sparsity", "log2_weight"):
            assert [step for step, _ in found[f"{tag}/{layer}"]] == recorded, tag
        assert [step for step, _ in found[f"log2_gradient/{layer}"]] == recorded
        for step, value in found[f"gradient_sparsity/{layer}"]:
            (stored,) = {record.stored.nonzeros: record.stored for record in records if record.layer == layer
                         and record.step == step - 1}.values()  # fmt: skip
            assert same(value, 1 - stored.nonzeros / stored.numel)
            assert same(dict(found[f"gradient_bits_per_element/{layer}"])[step], stored.nbits / stored.numel)
    summary = {row["layer"]: row for row in json.loads((whole / "results.json").read_text())["gradients"]}
    for layer in layers:
        for key in ("bias", "cosine"):
            values = [value for _, value in found[f"gradient_{key}/{layer}"]]
            assert math.isclose(sum(values) / len(values), summary[layer][key], rel_tol=1e-5, abs_tol=1e-7)


def test_the_run_is_the_same_without_them(whole: Path, tmp_path: Path) -> None:
    plain = outcome(run(settings(), tmp_path / "run", quiet=True).run_dir)
    found = outcome(whole)
    assert set(found.pop("files")) - set(plain.pop("files")) == {"tensorboard"}
    assert found.pop("config.yaml") == plain.pop("config.yaml").replace(b"tensorboard: false", b"tensorboard: true")
    assert [key for key in plain if plain[key] != found[key]] == []
    assert config_hash(parse_config(settings(tensorboard=True))) == config_hash(parse_config(settings()))


KILLED = """\
import json, os, signal, sys
from fpsim import runner

train_step = runner._train_step


def step(session):
    if session.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(session)


runner._train_step = step
runner.run(json.loads(sys.argv[1]), sys.argv[2], quiet=True)
"""


def test_a_killed_run_has_every_point_once(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just after a checkpoint, interrupted after steps of which none knows, and stopped."""
    folder, train_step = tmp_path / "run", runner._train_step
    call = [sys.executable, "-c", KILLED, json.dumps(settings(tensorboard=True)), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(call, env=environment).returncode == -signal.SIGKILL
    assert (folder / "checkpoints" / "step-5").is_dir()

    def step(session: Any) -> Any:
        row = train_step(session)
        if row["step"] == 8 and not interrupted:
            interrupted.append(row["step"])
            raise KeyboardInterrupt
        if row["step"] == 9:
            signal.raise_signal(signal.SIGTERM)
        return row

    interrupted: list[int] = []
    monkeypatch.setattr(runner, "_train_step", step)
    with pytest.raises(KeyboardInterrupt):
        resume(folder, quiet=True)
    with pytest.raises(RunError, match="stopped by SIGTERM"):
        resume(folder, quiet=True)
    monkeypatch.undo()
    resume(folder, quiet=True)
    assert len(list((folder / "tensorboard").iterdir())) == 4
    assert events(folder) == events(whole)


def test_resuming_a_run_that_has_ended_adds_nothing(whole: Path, tmp_path: Path) -> None:
    folder = run(settings(tensorboard=True), tmp_path / "run", quiet=True).run_dir
    resume(folder, quiet=True)
    assert events(folder) == events(whole)


def test_without_the_package_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"^tensorboard: needs the package .* pip install 'fpsim\[tensorboard\]'$"):
        run(settings(tensorboard=True), tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []
    assert run(settings(), tmp_path / "run", quiet=True).results["status"] == "completed"
