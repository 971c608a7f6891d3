"""Finds the configuration files that come with fpsim, and those that a configuration refers to."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

from fpsim.files import packaged_folder

Kind = Literal["experiments", "accelerators", "formats", "figures", "sweeps"]


class Preset(NamedTuple):
    """A YAML file that comes with fpsim; `summary` is its first comment line."""

    kind: Kind
    name: str
    path: Path
    summary: str


def preset_folder() -> Path:
    """Where the YAML files that come with fpsim are."""
    return packaged_folder("configs")


def preset_files(kind: Kind) -> dict[str, Path]:
    """Name -> path of every preset of one kind, sorted by name."""
    return {path.stem: path for path in sorted((preset_folder() / kind).glob("*.yaml"))}


def presets() -> list[Preset]:
    """Every preset that comes with fpsim, experiments first."""
    kinds: tuple[Kind, ...] = ("experiments", "accelerators", "formats", "figures", "sweeps")
    return [Preset(kind, name, path, _summary(path)) for kind in kinds for name, path in preset_files(kind).items()]


def find_file(reference: str, kind: Kind, folder: Path) -> Path:
    """The file that `reference` means: a path relative to `folder`, else the name of a preset of that kind.
    Raises ValueError, naming the nearest preset, where there is neither."""
    path = folder / reference
    if os.path.isfile(path):
        return path
    named = preset_files(kind)
    if reference in named:
        return named[reference]
    near = get_close_matches(reference, named, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no such file, nor one of the {kind} {', '.join(named)} (got {reference!r}){hint}")


def _summary(path: Path) -> str:
    comments = (line.removeprefix("#").strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("yaml-language-server:")), "")
