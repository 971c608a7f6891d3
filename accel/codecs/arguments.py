"""What the public functions accept: each check names the argument, what was given and what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from accel import launch
from accel.block_formats import BlockFormat
from accel.codecs.codec import MAX_BLOCK, CodecError
from accel.formats import Format
from accel.kernels import cpu
from accel.presets import format

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIMENSIONS = 64


def as_float32(x: Any) -> npt.NDArray[np.float32]:
    """x as a contiguous float32 array, copied only if it must be. CodecError unless it is float32 or 16 bits wide."""
    if isinstance(x, torch.Tensor):
        _check_tensor(x)
        x = x.detach().to("cpu", torch.float32).numpy()
    elif not isinstance(x, np.ndarray) or x.dtype not in (np.float32, np.float16):
        kind = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise CodecError(f"x must be a torch tensor or a NumPy array of float32 or float16 (got {kind})")
    return np.ascontiguousarray(x, np.float32).reshape(x.shape)  # ascontiguousarray makes 0-d arrays 1-d


def _check_tensor(x: torch.Tensor) -> None:
    if x.dtype not in FLOAT_TYPES or x.layout != torch.strided:
        raise CodecError(f"a tensor must be dense float32, bfloat16 or float16 (got {x.dtype}, {x.layout})")
    if x.ndim > MAX_DIMENSIONS:
        raise CodecError(f"a tensor may have {MAX_DIMENSIONS} dimensions (got {x.ndim})")


def on_its_device(x: Any) -> npt.NDArray[np.float32] | torch.Tensor:
    """The same; a tensor on a GPU stays a tensor there."""
    if not isinstance(x, torch.Tensor) or launch.backend(x) is cpu:
        return as_float32(x)
    _check_tensor(x)
    return x.detach().to(torch.float32).contiguous()


def checked_block(block: int) -> int:
    if type(block) is not int or not 1 <= block <= MAX_BLOCK:
        raise CodecError(f"block must be an integer from 1 to {MAX_BLOCK} (got {block!r})")
    return block


def checked_alpha(alpha: float | None) -> np.float32 | None:
    """alpha in float32, None for no alpha."""
    return None if alpha is None or alpha == 0 else checked_positive("alpha", alpha)


def checked_positive(name: str, value: float) -> np.float32:
    """A positive finite number in float32. CodecError, naming the field, for anything else."""
    if isinstance(value, torch.Tensor | np.ndarray):
        raise CodecError(f"{name} must be one number: a {name} per channel or group is not supported (got a tensor)")
    try:
        with np.errstate(over="ignore", under="ignore"):
            number = np.float32(value)
    except (TypeError, ValueError):
        raise CodecError(f"{name} must be a number (got {value!r})") from None
    if not 0 < number < np.inf:
        raise CodecError(f"{name} must be positive and finite in float32 (got {value!r})")
    return number


def checked_format(fmt: Any) -> Format:
    """The scalar format that fmt describes (see accel.format); CodecError where it describes none."""
    try:
        described = format(fmt)
    except ValueError as error:
        raise CodecError(str(error)) from None
    if isinstance(described, BlockFormat):
        raise CodecError(f"a stream holds codes of a scalar format (got the block format {described.name!r})")
    return described
