from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fpsim import checkpoint
from fpsim.checkpoint import MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, SUMS_FILE
from fpsim.errors import RunError

Optimizer = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Draws data and dropout from torch's global generator."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()


def saved(folder: Path, step: int = 3, **state: Any) -> Path:
    model = network()
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer, 2)
    return checkpoint.save(folder, step, model, optimizer, state, {"mask.0": torch.tensor([True, False])})


def sums(path: Path) -> str:
    names = ("model.safetensors", "optimizer.safetensors", "emulator.safetensors", "state.json")
    return "".join(f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def sign(path: Path) -> None:
    """Let a checkpoint whose files were changed pass for an undamaged one."""
    (path / SUMS_FILE).write_text(sums(path))


def loaded(path: Path) -> dict[str, Any]:
    model = network()
    return checkpoint.load(path, model, OPTIMIZERS["adam"](model))[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_training_goes_on_bit_for_bit(tmp_path: Path, name: str, steps_before: int) -> None:
    """Weights, buffers, optimizer and random state: also before the optimizer has any state."""
    model = network()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, steps_before)
    path = checkpoint.save(tmp_path, steps_before, model, optimizer, {"history": [{"loss": 0.1}], "seconds": 1.5}, {})
    train(model, optimizer, 5)

    other = network(seed=1)
    other_optimizer = OPTIMIZERS[name](other)
    train(other, other_optimizer, 2)
    state, tensors = checkpoint.load(path, other, other_optimizer)
    assert tensors == {}
    train(other, other_optimizer, 5)
    assert (state["step"], state["history"], state["seconds"]) == (steps_before, [{"loss": 0.1}], 1.5)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_tensors_come_back(tmp_path: Path) -> None:
    model = network()
    _, tensors = checkpoint.load(saved(tmp_path), model, OPTIMIZERS["adam"](model))
    assert list(tensors) == ["mask.0"]
    assert torch.equal(tensors["mask.0"], torch.tensor([True, False]))


def test_a_checkpoint_of_an_earlier_fpsim_has_no_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "emulator.safetensors").unlink()
    with pytest.raises(RunError, match=r"emulator\.safetensors"):
        loaded(path)
    lines = (path / SUMS_FILE).read_text().splitlines(keepends=True)
    (path / SUMS_FILE).write_text("".join(line for line in lines if "emulator" not in line))
    assert loaded(path)["step"] == 3


def test_a_checkpoint_is_four_files_and_their_digests(tmp_path: Path) -> None:
    path = saved(tmp_path / "made" / "too", step=12)
    assert path == tmp_path / "made" / "too" / "step-12"
    names = ["SHA256SUMS", "emulator.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(file.name for file in path.iterdir()) == names
    assert [file.name for file in path.parent.iterdir()] == ["step-12"]
    state = json.loads((path / "state.json").read_text())
    assert (state["version"], state["step"]) == (1, 12)
    assert (path / "SHA256SUMS").read_text() == sums(path)


def test_saving_again_replaces_and_gives_the_same_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    (path / "stray").write_text("")
    assert saved(tmp_path) == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = OPTIMIZERS["momentum"](model)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {}, {})
    expected = first.weight.detach().clone()
    with torch.no_grad():
        first.weight.zero_()
    checkpoint.load(path, model, optimizer)
    assert torch.equal(first.weight, expected)


def test_checkpoints_are_ordered_by_number_and_pruned(tmp_path: Path) -> None:
    assert checkpoint.checkpoints(tmp_path / "nothing") == []
    for name in ("step-9", "step-100", "step-20", ".step-101.17.tmp", "step-x", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-9", "step-20", "step-100"]
    checkpoint.prune(tmp_path, 5)
    assert len(checkpoint.checkpoints(tmp_path)) == 3
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-100"]
    assert (tmp_path / "other").is_dir()


def test_clean_deletes_unfinished_checkpoints_alone(tmp_path: Path) -> None:
    for name in ("step-9", ".step-10.17.tmp", ".step-11.1.tmp", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("")
    checkpoint.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-9"]
    checkpoint.clean(tmp_path / "nothing")


@pytest.mark.parametrize("write", ["write_json", "write_text"])
def test_a_failed_write_leaves_the_older_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    path = saved(tmp_path, note="first")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, write, full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, note="second")
    assert loaded(path)["note"] == "first"


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, SUMS_FILE])
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = saved(tmp_path)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(RunError, match=f"{path.name}.*{re.escape(name)}"):
        loaded(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"version": null}',
        '{"version": "1"}',
        "\x00\x01",
    ],
)
def test_a_state_file_of_another_content(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path)
    (path / STATE_FILE).write_text(text)
    with pytest.raises(RunError, match=r"step-3/state\.json: damaged"):
        loaded(path)
    sign(path)
    with pytest.raises(RunError, match="step-3: cannot be read as a checkpoint"):
        loaded(path)


@pytest.mark.parametrize("name", [STATE_FILE, SUMS_FILE])
def test_bytes_that_are_no_text(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    (path / name).write_bytes(b"\xff\xfe\x00")
    if name == STATE_FILE:
        sign(path)
    with pytest.raises(RunError, match="step-3: cannot be read as a checkpoint"):
        loaded(path)


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "version": 2}))
    sign(path)
    with pytest.raises(RunError, match="checkpoint of version 2; this fpsim reads version 1"):
        loaded(path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    other = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(RunError, match="cannot be read as a checkpoint of this run"):
        checkpoint.load(path, other, OPTIMIZERS["adam"](other))


def test_tensors_without_random_state_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    file = path / "optimizer.safetensors"
    tensors = checkpoint.load_file(file)
    del tensors["torch_random_state"]
    checkpoint.save_file(tensors, file)
    sign(path)
    with pytest.raises(RunError, match=r"step-3: .*torch_random_state"):
        loaded(path)
