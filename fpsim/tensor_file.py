"""Tensors of floating-point numbers from .npy and .safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fpsim.errors import ConfigError, Problem

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors writes them
NPY_MAGIC = b"\x93NUMPY"


def load_tensor(path: Path, name: str | None = None) -> torch.Tensor:
    """The tensor of a .npy file, or the one called `name` of a .safetensors file (None: its only one of floats).

    Raises ConfigError, naming the file or the option, for what is not there or does not hold floats.
    """
    names = tensor_names(path)
    message = ""
    if name is None and len(names) > 1:
        message = f"{path.name} holds several, name one: {', '.join(names)}"
    if name is not None and name not in names:
        message = f"{path.name} has no tensor {name!r} of floats; it has {', '.join(names)}"
    if message:
        raise ConfigError([Problem("--tensor", message)])
    return _read(path, name or names[0])


def all_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that hold floats, read one by one. Raises ConfigError as `load_tensor` does."""
    for name in tensor_names(path):
        yield name, _read(path, name)


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors of floats in a file, at least one; the file's own for a .npy. Raises ConfigError."""
    if not path.is_file():
        raise wrong_file(path, "no such file")
    if path.suffix != ".safetensors":
        with path.open("rb") as file:
            if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
                raise wrong_file(path, "is neither a .npy nor a .safetensors file")
        return [path.name]
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if file.get_slice(name).get_dtype() in FLOATS]  # noqa: SIM118
    except SafetensorError as error:
        raise wrong_file(path, str(error)) from None
    if not names:
        raise wrong_file(path, "holds no tensor of float64, float32, bfloat16 or float16")
    return names


def wrong_file(path: Path, message: str) -> ConfigError:
    return ConfigError([Problem("", message, str(path))])


def _read(path: Path, name: str) -> torch.Tensor:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        values = np.load(path, allow_pickle=False)
    except (SafetensorError, ValueError, EOFError) as error:
        raise wrong_file(path, str(error)) from None
    if values.dtype not in (np.float64, np.float32, np.float16):
        raise wrong_file(path, f"values must be float64, float32 or float16 (got {values.dtype})")
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
