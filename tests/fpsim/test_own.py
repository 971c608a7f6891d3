"""Networks and data by import path: what runs, what a run notes of it, and what a mistake says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import fpsim
from fpsim.config import config_hash, config_to_yaml, json_schema, load_config, parse_config
from fpsim.data import Samples
from fpsim.errors import ConfigError, RunError
from fpsim.runner import resume, run
from tests.fpsim.command_line import command

pytestmark = pytest.mark.usefixtures("restored_threads", "own_modules")

NETWORK = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, features, classes, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, x):
        return self.body(x)


def build(input_shape, classes, width=8, extras=None):
    if width == 13:
        raise ValueError("thirteen brings\\nbad luck")
    if width == 14:
        nn.Linear(3, 3)(torch.zeros(4))
    return Net(input_shape[0], classes, width)


def as_mapping(input_shape, classes):
    return {}


def without_classes(input_shape):
    return nn.Identity()


def needs_depth(input_shape, classes, depth):
    return nn.Identity()


TABLE = {"a": 1}
"""
DATA = """\
import torch
from fpsim.data import Dataset, Samples


def split(count, seed):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return Samples(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def read(seed, count=40):
    return Dataset("halves", split(count, seed), split(16, seed + 1), 3, (6,), "points by the signs of two numbers")


def half(seed):
    return Dataset("half", split(8, 0), None, 3, (6,), "no test split")
"""
CONFIG = """\
name: own
threads: 1
data: {name: "own_data:read", count: 48}
model:
  name: own_nets.small:build
  width: 12
  extras: {depths: [1, 2.5, null], on: "x"}
training: {epochs: 2, batch_size: 8, optimizer: {name: sgd, learning_rate: 0.1}, checkpoint: {every_steps: 4}}
emulation: {accelerator: fp8-training, exclude: [], ledger: {every_steps: 5}}
"""


@pytest.fixture
def own_modules() -> Iterator[None]:
    """Leaves neither modules nor folders behind."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("own_"):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment with its own modules, elsewhere than the current directory."""
    place = tmp_path / "experiment"
    (place / "own_nets").mkdir(parents=True)
    (place / "own_nets" / "__init__.py").touch()
    (place / "own_nets" / "small.py").write_text(NETWORK)
    (place / "own_data.py").write_text(DATA)
    (place / "own.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return place


def message(folder: Path, *changes: str) -> str:
    """The first line that a run with the changes fails with."""
    with pytest.raises(ConfigError) as caught:
        run(folder / "own.yaml", folder.parent / "run", overrides=changes, quiet=True)
    assert not (folder.parent / "run").exists()
    return str(caught.value).splitlines()[0]


def test_a_run_of_ones_own_resumes_exports_and_is_estimated(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from another directory, by another process."""
    done = run("experiment/own.yaml", "run", quiet=True)
    assert done.results["model"] == "own_nets.small:build"
    assert done.results["data"] == "points by the signs of two numbers"
    noted = json.loads(Path("run/env.json").read_text())["modules"]
    assert noted == {
        name: {"folder": str(folder), "file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for name, file in (("own_data", folder / "own_data.py"), ("own_nets.small", folder / "own_nets" / "small.py"))
    }
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    verbs = [["resume", "-q"], ["export"], ["estimate", "--machine", "tpu-like"], ["timeloop"], ["report"]]
    calls = [[verb, str(folder.parent / "run"), *options] for verb, *options in verbs]
    code = f"from fpsim.cli import app\nfor call in {calls}:\n    assert app(call, standalone_mode=False) in (0, None)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    packed = folder.parent / "run" / "export" / "packed.safetensors"
    with pytest.raises(RunError, match=r"its model is of own_nets\.small:build: give it as build"):
        fpsim.load_model(packed)
    build = sys.modules["own_nets.small"].build
    assert fpsim.load_model(packed, build)(torch.zeros(1, 6)).shape == (1, 3)
    with pytest.raises(RunError, match="its model cannot be built"):
        fpsim.load_model(packed, sys.modules["own_nets.small"].as_mapping)


def test_a_resumed_run_warns_of_a_module_that_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(folder / "own.yaml", "run", quiet=True)
    resume(done.run_dir, quiet=True)
    assert capsys.readouterr().err == ""
    del sys.modules["own_data"]
    with (folder / "own_data.py").open("a") as file:
        file.write("# another version\n")
    resume(done.run_dir, quiet=True)
    assert capsys.readouterr().err == (
        f"fpsim: warning: {folder / 'own_data.py'} is not what it was when the run was begun\n"
    )


def test_the_current_directory_is_importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONFIG.replace("emulation: {", "#")
    (folder.parent / "own.yaml").write_text(text)
    monkeypatch.chdir(folder)
    assert run(folder.parent / "own.yaml", folder / "run", quiet=True).results["status"] == "completed"


def test_round_trip_and_hash(folder: Path) -> None:
    config = load_config("experiment/own.yaml")
    Path("again.yaml").write_text(config_to_yaml(config))
    assert load_config("again.yaml") == config
    assert config_hash(load_config("again.yaml")) == config_hash(config)
    for change in ("model.width=9", "model.extras.on=y", "model.name=own_nets.small:other", "data.count=32"):
        assert config_hash(load_config("experiment/own.yaml", [change])) != config_hash(config)
    assert config_hash(parse_config(config.model_dump())) == config_hash(config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("model.name=own_nothing:build", "<overrides>: model.name: no module named 'own_nothing'"),
        ("model.name=own_nets.big:build", "<overrides>: model.name: no module named 'own_nets.big'"),
        (
            "model.name=own_nets.small:biuld",
            "<overrides>: model.name: own_nets.small has no attribute 'biuld'; did you mean 'build'?",
        ),
        ("model.name=own_nets.small:TABLE.b", "<overrides>: model.name: own_nets.small.TABLE has no attribute 'b'"),
        ("model.name=own_nets.small:TABLE", "<overrides>: model.name: own_nets.small:TABLE is a dict, not a function"),
        (
            "model={name: own_nets.small:as_mapping}",
            "<overrides>: model.name: own_nets.small:as_mapping returned a dict, not an nn.Module",
        ),
        ("model.widht=3", "<overrides>: model.widht: unknown option of own_nets.small:build; did you mean 'width'?"),
        (
            "model={name: own_nets.small:needs_depth}",
            "<overrides>: model: own_nets.small:needs_depth: missing a required argument: 'depth'",
        ),
        (
            "model={name: own_nets.small:without_classes}",
            "<overrides>: model.name: own_nets.small:without_classes must take the argument 'classes'",
        ),
        ("model.classes=3", "<overrides>: model.classes: is what fpsim itself gives own_nets.small:build"),
        ("data.seed=3", "<overrides>: data.seed: is what fpsim itself gives own_data:read"),
        ("model.name=own nets:build", "<overrides>: model.name: must be module:function, such as my.networks:build"),
        ("data={name: own_data:split, count: 3}", "own_data:split returned a Samples, not an fpsim.data.Dataset"),
        ("data={name: own_data:half}", "own_data:half returned a Dataset whose test is None, not an fpsim.data.Split"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, change: str, expected: str) -> None:
    assert expected in message(folder, change)


def test_a_mistake_is_shown_where_it_was_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own.yaml").write_text(CONFIG.replace("own_nets.small", "own_nets.smal"))
    call = partial(command, "run", capsys, monkeypatch)
    out, err, code = call("experiment/own.yaml", "-q")
    assert (out, code) == ("", 2)
    assert err.splitlines()[:2] == [
        "experiment/own.yaml:5:9: model.name: no module named 'own_nets.smal'",
        "      name: own_nets.smal:build",
    ]
    (folder / "own.yaml").write_text(CONFIG.replace("width: 12", "width: 13"))
    place = folder / "own_nets" / "small.py"
    raised = f"model.name: own_nets.small:build raised ValueError: thirteen brings bad luck ({place}:16)"
    _, err, code = call("experiment/own.yaml", "-q")
    assert (err.splitlines()[0], code) == (f"experiment/own.yaml:5:9: {raised}", 2)
    assert "Traceback" not in err
    monkeypatch.setenv("FPSIM_TRACEBACK", "1")
    _, err, code = call("experiment/own.yaml", "-q")
    assert code == 2
    assert "Traceback" in err
    assert re.search(r'small.py", line 16, in build', err)
    assert raised in err


def test_errors_inside_libraries_and_imports_name_the_users_line(folder: Path) -> None:
    assert re.search(r"RuntimeError: .*own_nets/small\.py:18\)$", message(folder, "model.width=14"))
    (folder / "own_broken.py").write_text("\nimport nothing_of_that_name\n")
    assert message(folder, "model.name=own_broken:build") == (
        "<overrides>: model.name: own_broken cannot be imported: ModuleNotFoundError: No module named "
        f"'nothing_of_that_name' ({folder / 'own_broken.py'}:2)"
    )
    (folder / "own_syntax.py").write_text("def build(:\n")
    place = folder / "own_syntax.py"
    assert message(folder, "model.name=own_syntax:build") == (
        f"<overrides>: model.name: own_syntax cannot be imported: SyntaxError: invalid syntax ({place}:1)"
    )


def test_a_name_that_another_module_has_is_refused(folder: Path) -> None:
    (folder / "models.py").write_text("")
    found = message(folder, "model.name=models:build")
    assert f"{folder / 'models.py'} cannot be imported: another module 'models' is in use" in found


def test_samples_check_what_they_are_given() -> None:
    with pytest.raises(ValueError, match="must be float32"):
        Samples(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 inputs have 2 labels"):
        Samples(torch.zeros(3, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("model", "is_valid"),
    [
        ({"name": "a.b:build", "anything": {"x": [1, None]}}, True),
        ({"name": "mlp", "hidden": [8]}, True),
        ({"name": "mlp", "hiden": [8]}, False),
        ({"name": "mpl"}, False),
        ({"hiden": [8]}, False),
    ],
)
def test_schema(model: dict[str, Any], is_valid: bool) -> None:
    training = {"epochs": 1, "batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.1}}
    config = {"data": {"name": "a:b", "count": 3}, "model": model, "training": training}
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(config) == is_valid


def test_help_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fpsim import cli\ntry:\n    cli.app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'accel', 'numba', 'lightning', 'transformers', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for arguments in (["--help"], ["run", "--help"], ["presets"]):
        subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True
        )
