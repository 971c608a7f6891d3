"""The operations of the training path as operators of torch: autograd, torch.compile and fake tensors know them.

    accel::quantize(x, ...) -> y                      s Q(x / s)
    accel::prune(x, alpha, ...) -> y                  T(x)
    accel::prune_quantize(x, alpha, ...) -> (y, counts)

Gradients pass straight through: dL/dx = dL/dy. With `gradient` "clipped" they pass only where x / s is within the
format's range. Results are laid out as torch.empty_like(x).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel import launch
from accel.arguments import (
    GRADIENTS,
    LARGEST,
    Options,
    alpha_of,
    check_block,
    checked_alpha,
    checked_choice,
    checked_options,
    checked_scale,
    checked_scales,
    checked_tensor,
    key_of,
    refuse_narrow,
    scalar_format,
)
from accel.block_formats import BlockFormat
from accel.formats import Format
from accel.kernels.arguments import Key
from accel.kernels.cpu import CHUNK
from accel.presets import format

_FLUSHES: dict[str, bool | str] = {"none": False, "both": True, "input": "input", "output": "output"}
_FLUSH_NAMES = {value: name for name, value in _FLUSHES.items()}


def flush_name(flush_subnormals: object) -> str:
    """flush_subnormals as the operators take it; unknown values as they are, to be refused."""
    if isinstance(flush_subnormals, bool | str) and flush_subnormals in _FLUSH_NAMES:
        return _FLUSH_NAMES[flush_subnormals]
    return str(flush_subnormals)


# --- into a given tensor --------------------------------------------------------------------------------------------


def quantize_into(
    x: Tensor,
    out: Tensor,
    fmt: Format | BlockFormat,
    options: Options,
    number: float | None,
    scales: Tensor | None,
    alpha: float | None,
    key: Key,
) -> None:
    """out = s Q(x / s); +-alpha stays where the format has codes for it."""
    refuse_narrow(out.dtype, fmt)
    if isinstance(fmt, BlockFormat):
        check_block(fmt, x, number if scales is None else scales)
        method = launch.method_of(fmt.element, *options)
        none = torch.empty(0, dtype=torch.uint8, device=x.device)
        launch.round_blocks_into("quantize", x, out, none, tensor_scale(x, fmt, number), fmt, method, key)
        return
    register = alpha_of(alpha, fmt)
    table = checked_scales(number, scales, x)
    source = x.clone() if register is not None and x.data_ptr() == out.data_ptr() else x
    launch.round_into("quantize", source, out, launch.method_of(fmt, *options, launch.work_dtype(x)), table, key)
    if register is not None:
        launch.on_flat(lambda s, t: launch.backend(x).keep_alphas(s, register, t), source, out)


def tensor_scale(x: Tensor, fmt: BlockFormat, given: float | None) -> Tensor:
    """The scale of the whole tensor: float32 of shape (1,), 1 where the format has none."""
    if not fmt.tensor_scale:
        return torch.ones(1, device=x.device)
    if given is not None:
        return torch.full((1,), float(checked_scale(given)), device=x.device)
    largest = launch.largest_magnitude(x, keeps_nan=False).clamp(max=LARGEST)
    scale = (largest / (fmt.element.max * fmt.scale.max)).clamp(min=2.0**-126)
    return torch.where(largest > 0, scale, 1.0)


def prune_quantize_into(
    x: Tensor,
    out: Tensor,
    alpha: float,
    fmt: Format | BlockFormat,
    options: Options,
    number: float | None,
    scales: Tensor | None,
    key: Key,
) -> Tensor:
    """out = T(x), its survivors rounded; returns the counts, int64 (2, blocks): nonzeros and +-alphas."""
    threshold = checked_alpha(alpha)
    refuse_narrow(out.dtype, fmt)
    counts = torch.zeros((2, -(-x.numel() // CHUNK)), dtype=torch.int64, device=x.device)
    if isinstance(fmt, BlockFormat):
        pruned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        launch.prune_into(x, pruned, threshold, key)
        quantize_into(pruned, out, fmt, options, number, scales, None, key)
        launch.on_flat(lambda s, t: launch.backend(x).keep_alphas(s, threshold, t), pruned, out)
        count_into(out, threshold, counts)
        return counts
    table = checked_scales(number, scales, x)
    launch.prune_round_into(x, out, counts, threshold, launch.method_of(fmt, *options), table, key)
    if threshold == 0:
        counts[1] = 0
    return counts


def count_into(x: Tensor, alpha: np.float32, counts: Tensor) -> None:
    """counts = nonzeros and +-alphas of each block of CHUNK elements of x."""
    padded = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % CHUNK)).view(-1, CHUNK)
    counts[0] = (padded.view(torch.int32) != 0).sum(1) if x.dtype == torch.float32 else (padded != 0).sum(1)
    counts[1] = (padded.abs() == float(alpha)).sum(1) if alpha > 0 else 0


# --- the operators --------------------------------------------------------------------------------------------------

_WORDS = "SymInt seed, SymInt stream, SymInt step, SymInt offset"
_ROUNDING = "str rounding, str overflow, int random_bits, str flush_subnormals"

_library = torch.library.Library("accel", "DEF")
_library.define(
    f"quantize(Tensor x, str fmt, float? scale, Tensor? scales, float? alpha, {_ROUNDING}, {_WORDS}, str gradient)"
    " -> Tensor"
)
_library.define(f"prune(Tensor x, float alpha, {_WORDS}) -> Tensor")
_library.define(
    f"prune_quantize(Tensor x, float alpha, str fmt, float? scale, Tensor? scales, {_ROUNDING}, {_WORDS}, str gradient)"
    " -> (Tensor, Tensor)"
)


def _options(rounding: str, overflow: str, random_bits: int, flush_subnormals: str) -> Options:
    flush = _FLUSHES.get(flush_subnormals, flush_subnormals)
    return checked_options(rounding, overflow, random_bits, flush)


def _check_gradient(gradient: str, fmt: Format | BlockFormat) -> None:
    checked_choice("gradient", gradient, GRADIENTS)
    if gradient == "clipped" and isinstance(fmt, BlockFormat):
        raise ValueError(f"gradient 'clipped' takes a scalar format (got the block format {fmt.name!r})")


def _quantize(
    x: Tensor, fmt: str, scale: float | None, scales: Tensor | None, alpha: float | None, rounding: str, overflow: str,
    random_bits: int, flush_subnormals: str, seed: int, stream: int, step: int, offset: int, gradient: str,
) -> Tensor:  # fmt: skip
    described = format(fmt)
    _check_gradient(gradient, described)
    tensor = checked_tensor(x)
    out = torch.empty_like(tensor)
    options = _options(rounding, overflow, random_bits, flush_subnormals)
    quantize_into(tensor, out, described, options, scale, scales, alpha, key_of(seed, stream, step, offset))
    return out


def _prune(x: Tensor, alpha: float, seed: int, stream: int, step: int, offset: int) -> Tensor:
    tensor = checked_tensor(x)
    out = torch.empty_like(tensor)
    launch.prune_into(tensor, out, checked_threshold(alpha, out.dtype), key_of(seed, stream, step, offset))
    return out


def checked_threshold(alpha: float, dtype: torch.dtype) -> np.float32:
    """alpha as float32; ValueError where `dtype` does not hold it."""
    threshold = checked_alpha(alpha)
    if float(torch.tensor(float(threshold)).to(dtype)) != float(threshold):
        raise ValueError(f"alpha = {float(threshold)!r} is not a value of {dtype}: give a float32 `out`")
    return threshold


def _prune_quantize(
    x: Tensor, alpha: float, fmt: str, scale: float | None, scales: Tensor | None, rounding: str, overflow: str,
    random_bits: int, flush_subnormals: str, seed: int, stream: int, step: int, offset: int, gradient: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    described = format(fmt)
    _check_gradient(gradient, described)
    tensor = checked_prunable(x)
    out = torch.empty_like(tensor)
    options, key = _options(rounding, overflow, random_bits, flush_subnormals), key_of(seed, stream, step, offset)
    return out, prune_quantize_into(tensor, out, alpha, described, options, scale, scales, key)


def checked_prunable(x: Any) -> Tensor:
    tensor = checked_tensor(x)
    if tensor.dtype != torch.float32:
        raise TypeError(f"x must be float32 (got {tensor.dtype})")
    return tensor


def _fake_like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_pruned(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, (x.numel() + CHUNK - 1) // CHUNK), dtype=torch.int64)


def _setup_quantize(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, fmt, scale, scales, *_, gradient = inputs
    _setup_clipping(ctx, x, fmt, scale, scales, gradient)


def _setup_pruned(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, fmt, scale, scales, *_, gradient = inputs
    _setup_clipping(ctx, x, fmt, scale, scales, gradient)
    ctx.mark_non_differentiable(output[1])


def _setup_clipping(ctx: Any, x: Tensor, fmt: str, scale: float | None, scales: Tensor | None, gradient: str) -> None:
    ctx.range = None
    if gradient == "clipped":
        described = scalar_format(fmt, "gradient 'clipped'")
        ctx.range, ctx.scale = (described.min, described.max), scale
        ctx.save_for_backward(x, scales)


def _passed(ctx: Any, gradient: Tensor) -> Tensor:
    if ctx.range is None:
        return gradient
    x, scales = ctx.saved_tensors
    scale = scales if scales is not None else ctx.scale
    scaled = x if scale is None else x / scale
    low, high = ctx.range
    return torch.where((scaled >= low) & (scaled <= high), gradient, 0.0)


def _backward_quantize(ctx: Any, gradient: Tensor) -> Any:
    return _passed(ctx, gradient), *[None] * 13


def _backward_prune(ctx: Any, gradient: Tensor) -> Any:
    return gradient, *[None] * 5


def _backward_pruned(ctx: Any, gradient: Tensor, _: Any) -> Any:
    return _passed(ctx, gradient), *[None] * 13


for _name, _implementation, _fake, _backward, _setup in (
    ("quantize", _quantize, _fake_like, _backward_quantize, _setup_quantize),
    ("prune", _prune, _fake_like, _backward_prune, None),
    ("prune_quantize", _prune_quantize, _fake_pruned, _backward_pruned, _setup_pruned),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _device)
    torch.library.register_fake(f"accel::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"accel::{_name}", _backward, setup_context=_setup, lib=_library)
