"""One tensor of floating-point numbers from a .npy or .safetensors file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fpsim.errors import ConfigError, Problem

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors writes them


def load_tensor(path: Path, name: str | None = None) -> torch.Tensor:
    """The tensor of a .npy file, or the one called `name` of a .safetensors file (None: its only one of floats).

    Raises ConfigError, naming the file or the option, for what is not there or does not hold floats.
    """
    if not path.is_file():
        raise _wrong(path, "no such file")
    if path.suffix == ".safetensors":
        return _from_safetensors(path, name)
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise _wrong(path, "must be a .npy or a .safetensors file")
    if name is not None:
        raise ConfigError([Problem("--tensor", f"is for .safetensors files; {path.name} holds one tensor")])
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _wrong(path, str(error)) from None
    if values.dtype not in (np.float64, np.float32, np.float16):
        raise _wrong(path, f"values must be float64, float32 or float16 (got {values.dtype})")
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))


def _from_safetensors(path: Path, name: str | None) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            names = [key for key in file.keys() if file.get_slice(key).get_dtype() in FLOATS]  # noqa: SIM118
            if not names:
                raise _wrong(path, "holds no tensor of float64, float32, bfloat16 or float16")
            if name is None and len(names) > 1:
                raise ConfigError([Problem("--tensor", f"{path.name} holds several, name one: {', '.join(names)}")])
            if name is not None and name not in names:
                raise ConfigError([Problem("--tensor", f"{path.name} has no {name!r} of floats: {', '.join(names)}")])
            return file.get_tensor(name or names[0])
    except SafetensorError as error:
        raise _wrong(path, str(error)) from None


def _wrong(path: Path, message: str) -> ConfigError:
    return ConfigError([Problem("", message, str(path))])
