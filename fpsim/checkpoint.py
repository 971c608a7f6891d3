"""Checkpoints: a folder `step-N` with the tensors (safetensors) and the other state (JSON), renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fpsim.errors import RunError
from fpsim.files import write_json

VERSION = 1
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
STATE_FILE = "state.json"


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write the checkpoint `folder`/step-`step` with the model, the optimizer, torch's random state and `state`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step}"
    partial = folder / f".step-{step}.{os.getpid()}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tensors = optimizer.state_dict()["state"]
    optimizer_tensors = {f"{i}.{key}": v for i, entry in tensors.items() for key, v in entry.items() if v is not None}
    save_file(_own(model.state_dict()), partial / TENSOR_FILES[0])
    save_file(_own({**optimizer_tensors, "torch_random_state": torch.get_rng_state()}), partial / TENSOR_FILES[1])
    digests = {name: _digest(partial / name) for name in TENSOR_FILES}
    write_json(partial / STATE_FILE, {"version": VERSION, "step": step, "sha256": digests, **state})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    return final


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]))


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the model, the optimizer and torch's random state back as a checkpoint holds them; returns its other state.

    Raises RunError for a checkpoint that is damaged or of a newer version.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if state["version"] > VERSION:
            raise RunError(f"{path}: checkpoint of version {state['version']}; this fpsim reads version {VERSION}")
        for name, digest in state["sha256"].items():
            if _digest(path / name) != digest:
                raise RunError(f"{path / name}: damaged, its SHA-256 is not the one in {STATE_FILE}")
        model.load_state_dict(load_file(path / TENSOR_FILES[0]))
        tensors = load_file(path / TENSOR_FILES[1])
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise RunError(f"{path}: cannot be read as a checkpoint of this run: {error}") from error
    torch.set_rng_state(tensors.pop("torch_random_state"))
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        optimizer_state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    return state


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
