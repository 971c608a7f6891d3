"""What the public operations accept: each check names the argument, what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from accel.block_formats import BlockFormat
from accel.formats import Format, nearest
from accel.kernels.arguments import Key, Scales
from accel.launch import largest_magnitude, table_of
from accel.presets import AnyFormat, Spec, format
from accel.rounding import FLUSHES, OVERFLOWS, ROUNDINGS

CARRIERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GRADIENTS = ("straight_through", "clipped")
DEVICES = ("cpu", "cuda")
BEYOND_FLOAT32 = 2.0**128 - 2.0**103  # from here on, numbers round to infinity
LARGEST = float(np.finfo(np.float32).max)

Scale = float | torch.Tensor | npt.NDArray[Any] | None


class Options(NamedTuple):
    """How to round."""

    rounding: str = "nearest_even"
    overflow: str = "saturate"
    random_bits: int = 32
    flush_subnormals: bool | str = False


def checked_options(rounding: str, overflow: str, random_bits: int, flush_subnormals: bool | str) -> Options:
    checked_choice("rounding", rounding, ROUNDINGS)
    checked_choice("overflow", overflow, OVERFLOWS)
    checked_choice("flush_subnormals", flush_subnormals, FLUSHES)
    if type(random_bits) is not int or not 1 <= random_bits <= 32:
        raise ValueError(f"random_bits must be an integer from 1 to 32 (got {random_bits!r})")
    return Options(rounding, overflow, random_bits, flush_subnormals)


def checked_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    if value not in (names := tuple(allowed)):
        raise ValueError(f"unknown {name} {value!r}{nearest(value, names)}; allowed: {', '.join(map(repr, names))}")


def checked_words(seed: int, stream: int, step: int, offset: int) -> None:
    if (
        type(seed) is type(stream) is type(step) is type(offset) is int
        and 0 <= seed < 1 << 64
        and 0 <= stream < 1 << 32
        and 0 <= step < 1 << 32
        and 0 <= offset < 1 << 62
    ):
        return
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 32), ("step", step, 32), ("offset", offset, 62)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be an integer from 0 to 2^{bits} - 1 (got {value!r})")


def key_of(seed: int, stream: int, step: int, offset: int) -> Key:
    """The words' key; a seed that came as a signed 64-bit integer is the unsigned one of the same bits."""
    return Key(int(offset), np.uint64(seed & 0xFFFFFFFFFFFFFFFF), np.uint64(stream), np.uint64(step))


def as_tensor(x: torch.Tensor | npt.NDArray[Any], name: str) -> torch.Tensor:
    """A torch tensor or NumPy array as a tensor without gradient, on the same memory where that is possible."""
    if isinstance(x, np.ndarray):
        plain = x.flags.writeable and x.dtype.isnative and all(stride >= 0 for stride in x.strides)
        if name == "out" and not plain:
            raise ValueError("out must be a writable array of native byte order without negative strides")
        try:
            x = torch.from_numpy(x if plain else np.array(x, dtype=x.dtype.newbyteorder("=")))
        except TypeError:
            raise TypeError(f"{name} must hold numbers of a dtype that torch has (got {x.dtype})") from None
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor or a NumPy array (got {type(x).__name__})")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor (got {x.layout})")
    if x.device.type not in DEVICES:
        raise TypeError(f"{name} must be on the CPU or a CUDA device (got {x.device})")
    x = x.detach() if x.requires_grad else x
    return x.resolve_neg() if name != "out" and x.is_neg() else x


def checked_tensor(x: torch.Tensor | npt.NDArray[Any], name: str = "x") -> torch.Tensor:
    """The same, of floats that the kernels read."""
    tensor = as_tensor(x, name)
    if tensor.dtype not in CARRIERS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16 (got {tensor.dtype})")
    return tensor


def checked_out(out: torch.Tensor | npt.NDArray[Any], x: torch.Tensor) -> torch.Tensor:
    """`out` as a tensor that can take the result of an operation on x."""
    target = as_tensor(out, "out")
    if target.shape != x.shape or target.dtype not in (torch.float32, x.dtype) or target.device != x.device:
        raise ValueError(
            f"out must be a float32 or {x.dtype} tensor of shape {tuple(x.shape)} on {x.device} "
            f"(got {target.dtype}, {tuple(target.shape)}, {target.device})"
        )
    return target


def scalar_format(fmt: Spec, what: str) -> Format:
    described = format(fmt)
    if isinstance(described, BlockFormat):
        raise ValueError(f"{what} takes a scalar format (got the block format {described.name!r})")
    return described


def code_dtype(fmt: Format) -> torch.dtype:
    """The smallest unsigned integers that hold the codes of a format."""
    return torch.uint8 if fmt.bits <= 8 else torch.uint16 if fmt.bits <= 16 else torch.uint32


@cache
def refuse_narrow(dtype: torch.dtype, fmt: AnyFormat) -> None:
    """ValueError unless `dtype` holds every value of a scalar format."""
    if isinstance(fmt, BlockFormat):
        return
    info = torch.finfo(dtype)
    is_precise = 2.0**-fmt.mantissa_bits >= info.eps and fmt.min_subnormal >= info.smallest_normal * info.eps
    if not is_precise or max(fmt.max, -fmt.min) > info.max:
        raise ValueError(f"{dtype} cannot hold every value of format {fmt.name!r}: give a float32 `out`")


def refuse_nan(x: torch.Tensor, fmt: Format) -> None:
    """ValueError, naming the first index, for a NaN."""
    holds_nan = torch.isnan(x).any() if x.dtype == torch.float64 else torch.isnan(largest_magnitude(x, keeps_nan=True))
    if bool(holds_nan):
        first = int(torch.isnan(x.reshape(-1)).nonzero()[0])
        raise ValueError(f"x holds a NaN at flat index {first}; format {fmt.name!r} has no NaN code")


def checked_alpha(alpha: float) -> np.float32:
    value = as_float32(alpha)
    if not 0 <= value <= LARGEST:
        raise ValueError(f"alpha must be one number, finite and not negative, also as float32 (got {alpha!r})")
    return value


def alpha_of(alpha: float | None, fmt: Format) -> np.float32 | None:
    """The value of a format's alpha codes; ValueError where it has none."""
    if alpha is None:
        return None
    if not fmt.alpha_codes:
        raise ValueError(f"alpha is for formats with alpha_codes; {fmt.name!r} has none (got alpha={alpha!r})")
    return checked_alpha(alpha)


def as_float32(number: object) -> np.float32:
    """A real number as float32 (infinite where it is too large); NaN for anything that is not one."""
    if isinstance(number, bool | str | bytes):
        return np.float32(np.nan)
    try:
        value = float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return np.float32(np.nan)
    return np.float32(value if abs(value) < BEYOND_FLOAT32 or value != value else math.copysign(math.inf, value))


def split_scale(scale: Scale) -> tuple[float | None, torch.Tensor | None]:
    """A scale as a number or as a tensor, the other being None."""
    if scale is None:
        return None, None
    if isinstance(scale, torch.Tensor | np.ndarray):
        return None, as_tensor(scale, "scale")
    if not isinstance(scale, int | float | np.number) or isinstance(scale, bool):
        raise TypeError(f"scale must hold real numbers (got {scale!r})")
    try:
        return float(scale), None
    except OverflowError:
        return float("inf"), None


def checked_scale(number: float) -> np.float32:
    value = as_float32(number)
    if not 0 < value <= LARGEST:
        raise ValueError(f"scale must be positive and finite, also as float32 (got {number!r})")
    return value


def checked_scales(number: float | None, scales: torch.Tensor | None, x: torch.Tensor) -> Scales:
    """The scales of x, of which one is given at most. Values on a GPU are not checked: that would wait for them."""
    if number is not None:
        return checked_scale(number)
    if scales is None:
        return None
    if scales.is_complex() or scales.dtype == torch.bool:
        raise TypeError(f"scale must hold real numbers (got {scales.dtype})")
    if scales.numel() and scales.device.type == "cpu":
        values = scales.detach().to(torch.float32).numpy()  # NumPy's small operations cost a fraction of torch's
        if not (values.min() > 0 and values.max() < np.inf):
            wrong = torch.from_numpy(~(np.isfinite(values) & (values > 0)))
            raise ValueError(f"scale must be positive and finite, also as float32 (got {float(scales[wrong][0])!r})")
    return table_of(scales, x.shape)


def check_block(fmt: BlockFormat, x: torch.Tensor, scale: object) -> None:
    """Errors for a tensor or scale that a block format does not take."""
    if x.dtype == torch.float64:
        raise TypeError(f"x must be float32, float16 or bfloat16 for the block format {fmt.name!r} (got {x.dtype})")
    if not -max(x.ndim, 1) <= fmt.dim < max(x.ndim, 1):
        raise ValueError(f"format {fmt.name!r}: axis {fmt.dim} is out of range for x of shape {tuple(x.shape)}")
    length = x.shape[fmt.dim] if x.ndim else 1
    if fmt.padding == "refuse" and length % fmt.block_size:
        raise ValueError(
            f"format {fmt.name!r}: axis {fmt.dim} of x has {length} elements, no multiple of block_size "
            f"{fmt.block_size} (padding 'short' or 'zeros' takes it)"
        )
    if scale is not None and not (fmt.tensor_scale and isinstance(scale, int | float)):
        taken = "one number, the tensor's scale" if fmt.tensor_scale else "none: its blocks have their own"
        raise ValueError(f"format {fmt.name!r} takes as scale {taken} (got {scale!r})")
