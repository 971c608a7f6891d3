"""Checkpoints: a folder `step-N` with the tensors (safetensors) and the other state (JSON), renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fpsim.errors import RunError
from fpsim.files import sync, write_json, write_text

VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
EMULATOR_FILE = "emulator.safetensors"
RANKS_FILE = "ranks.safetensors"  # what each of several ranks has of its own, as "rank.name"
FILES = (MODEL_FILE, OPTIMIZER_FILE, EMULATOR_FILE, STATE_FILE)
SUMS_FILE = "SHA256SUMS"  # in the form that `sha256sum --check` reads


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    tensors: Mapping[str, Tensor],
    of_ranks: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint `folder`/step-`step`: the model, the optimizer, torch's random state, and the emulator's
    `state` and `tensors`; of_ranks: what several ranks have of their own, as "rank.name".

    Raises OSError where it cannot be written: then nothing of it is left.
    """
    final, partial = folder / f"step-{step}", folder / f".step-{step}.{os.getpid()}.tmp"
    entries = optimizer.state_dict()["state"]
    optimizer_tensors = {f"{i}.{key}": v for i, entry in entries.items() for key, v in entry.items() if v is not None}
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _save_tensors(partial / MODEL_FILE, model.state_dict())
        _save_tensors(partial / OPTIMIZER_FILE, {**optimizer_tensors, "torch_random_state": torch.get_rng_state()})
        _save_tensors(partial / EMULATOR_FILE, tensors)
        if of_ranks:
            _save_tensors(partial / RANKS_FILE, of_ranks)
        write_json(partial / STATE_FILE, {"version": VERSION, "step": step, **state})
        write_text(partial / SUMS_FILE, _sums(partial, [*FILES, RANKS_FILE] if of_ranks else FILES))
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk its space is needed
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync(folder)
    return final


def _save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file(own(tensors), file)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error
    sync(file)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest(run: Path) -> Path:
    """The newest checkpoint of a run directory. Raises RunError where there is none."""
    saved = checkpoints(run / "checkpoints")
    if not saved:
        raise RunError(f"{run}: has no checkpoint yet")
    return saved[-1]


def newest_whole(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint of a run directory whose files are as they were written, None where there is no checkpoint;
    and those after it that are damaged, each with what is wrong. Raises RunError where all are damaged."""
    damaged: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(run / "checkpoints")):
        try:
            _check_whole(path)
            return path, damaged
        except RunError as error:
            damaged.append((path, str(error)))
    if damaged:
        raise RunError(f"{damaged[0][1]}; no checkpoint of this run is whole")
    return None, []


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not one of the run any more; returns its new place."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def clean(folder: Path) -> None:
    """Delete what a kill in the middle of a save left behind."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint without its tensors. Raises RunError for one that is damaged or of a newer version."""
    try:
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if state["version"] > VERSION:
            raise RunError(f"{path}: checkpoint of version {state['version']}; this fpsim reads version {VERSION}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read as a checkpoint of this run: {error}") from error
    return state


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put the model, the optimizer and torch's random state back as a checkpoint holds them; returns the emulator's
    state and tensors.

    Raises RunError for a checkpoint that is damaged or of a newer version.
    """
    _check_whole(path)
    try:
        state = read_state(path)
        model.load_state_dict(load_file(path / MODEL_FILE))
        tensors = load_file(path / OPTIMIZER_FILE)
        torch.set_rng_state(tensors.pop("torch_random_state"))
        optimizer_state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            optimizer_state.setdefault(int(index), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
        has_tensors = (path / EMULATOR_FILE).is_file()
        emulator_tensors = load_file(path / EMULATOR_FILE) if has_tensors else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        raise RunError(f"{path}: cannot be read as a checkpoint of this run: {error}") from error
    return state, emulator_tensors


def _check_whole(path: Path) -> None:
    """Raises RunError, naming the file, where a checkpoint's files are not as they were written."""
    try:
        written = (path / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        optional = (EMULATOR_FILE, RANKS_FILE)  # the first was not there before fpsim wrote it
        names = [n for n in (*FILES, RANKS_FILE) if n not in optional or n in "".join(written)]
        for line in _sums(path, names).splitlines():
            if line not in written:
                raise RunError(f"{path / line.split()[1]}: damaged, its SHA-256 is not the one in {SUMS_FILE}")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as a checkpoint of this run: {error}") from error


def of_rank(path: Path, number: int) -> dict[str, Tensor]:
    """What a rank has of its own in a whole checkpoint of several. Raises RunError where it has nothing."""
    begin = f"{number}."
    try:
        everything = load_file(path / RANKS_FILE)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: is not a checkpoint of several ranks: {error}") from error
    found = {key.removeprefix(begin): tensor for key, tensor in everything.items() if key.startswith(begin)}
    if not found:
        raise RunError(f"{path / RANKS_FILE}: has nothing of rank {number}")
    return found


def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as safetensors wants them."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def _sums(folder: Path, names: Sequence[str]) -> str:
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
