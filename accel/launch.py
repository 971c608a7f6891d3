"""From tensors to kernels: which kernel serves a format, and how any tensor becomes flat pieces that kernels take.

Kernels work on flat, contiguous float32 or float64. A tensor that is so already is used where it lies; one that is
dense in another order of its dimensions (channels_last) is taken in memory order where the order does not matter; any
other (strided, 16 bits wide) passes through a buffer of PIECE elements: no operation takes more memory than its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, reduce
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch

from accel.block_formats import BlockFormat
from accel.formats import Format
from accel.kernels import cpu
from accel.kernels.arguments import Fields, Key, Layout, Scales, Table
from accel.rounding import needs_wide, parameters
from accel.rounding_fast import fast_parameters, integer_parameters, is_fast, is_fast_integer, is_narrow

PIECE = 1 << 18  # a multiple of the kernels' chunk
NO_KEY = Key(0, np.uint64(0), np.uint64(0), np.uint64(0))


def loops_for(x: torch.Tensor, on_cpu: ModuleType, on_cuda: str) -> ModuleType:
    """The one of two modules with loops of the same names that serves a tensor's device. on_cuda: the other's name.

    RuntimeError where the device is a GPU and numba-cuda is not installed.
    """
    if x.device.type != "cuda":
        return on_cpu
    try:
        return import_module(on_cuda)
    except ImportError as error:
        raise RuntimeError(f"tensors on a GPU need numba-cuda: pip install 'fpsim[cuda]' ({error})") from error


def backend(x: torch.Tensor) -> ModuleType:
    """The launchers for a tensor's device (see `loops_for`)."""
    return loops_for(x, cpu, "accel.kernels.cuda")


@cache
def method_of(
    fmt: Format,
    rounding: str,
    overflow: str,
    random_bits: int,
    flush_subnormals: bool | str,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, Fields]:
    """The name of the kernels that round `dtype` into `fmt`, and their parameters."""
    kind = "stochastic" if rounding == "stochastic" else "nearest"
    if dtype == torch.float32 and is_fast(fmt, rounding, flush_subnormals):
        is_short = rounding == "nearest_even" and is_narrow(fmt)
        return "fast_narrow" if is_short else f"fast_{kind}", fast_parameters(fmt, overflow, random_bits)
    if dtype == torch.float32 and is_fast_integer(fmt, rounding):
        return "fast_integer", integer_parameters(fmt)
    wide = dtype == torch.float64 or needs_wide(fmt)
    return kind, parameters(fmt, rounding, overflow, random_bits, flush_subnormals, wide)


def round_into(
    operation: str, x: torch.Tensor, out: torch.Tensor, method: tuple[str, Fields], scales: Scales, key: Key
) -> None:
    """out = s Q(x / s) for operation "quantize", the codes of Q(x / s) for "encode"."""
    name, fields = method
    launch = backend(x).round_elements
    in_any_order = not name.endswith("stochastic") and (not isinstance(scales, Table) or scales.values.numel() == 1)
    for source, target, first in pieces(x, out, work_dtype(x), in_any_order):
        launch(operation, name, source, first, scales, target, key, fields)


def round_both_into(
    x: torch.Tensor,
    out: torch.Tensor,
    codes: torch.Tensor,
    method: tuple[str, Fields],
    values: Fields,
    scales: Scales,
    key: Key,
) -> None:
    """out = s Q(x / s), and codes = its codes (contiguous)."""
    name, fields = method
    launch = backend(x).round_both
    flat = codes.view(-1)
    for source, target, first in pieces(x, out, work_dtype(x)):
        part = flat[first : first + source.numel()]
        launch(name, source, first, scales, target, part, values, key, fields)


def round_blocks_into(
    operation: str,
    x: torch.Tensor,
    out: torch.Tensor,
    scale_codes: torch.Tensor,
    tensor_scale: torch.Tensor,
    fmt: BlockFormat,
    method: tuple[str, Fields],
    key: Key,
) -> None:
    """The same for a block format; scale_codes: contiguous, one a block, or empty where they are not asked for.

    A tensor that is not dense in an order that puts the blocks' axis last is copied first.
    """
    name, fields = method
    axis = fmt.dim % max(x.ndim, 1)
    order = dense_order(x)
    is_direct = x.dtype == torch.float32 and out.dtype in (torch.float32, torch.uint8, torch.uint16, torch.uint32)
    no_scales_wanted = scale_codes.numel() == 0
    if is_direct and order is not None and order == dense_order(out) and not may_overlap(x, out):
        if is_row_major(order):
            source, target, layout = x.reshape(-1), out.view(-1), layout_of(x.shape, axis, fmt)
        elif no_scales_wanted and not name.endswith("stochastic"):
            source, target = x.permute(order).reshape(-1), out.permute(order).reshape(-1)
            layout = layout_of(tuple(x.shape[d] for d in order), order.index(axis), fmt)
        else:
            order = None
    else:
        order = None
    if order is None:
        source = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format).view(-1)
        target = torch.empty(
            source.shape, dtype=torch.float32 if operation == "quantize" else out.dtype, device=x.device
        )
        layout = layout_of(x.shape, axis, fmt)
    if x.numel():
        backend(x).round_blocks(operation, name, source, layout, tensor_scale, fmt, target, scale_codes, key, fields)
    if order is None:
        out.copy_(target.view(x.shape))


def largest_magnitude(x: torch.Tensor, keeps_nan: bool) -> torch.Tensor:
    """max|x|, 0 for an empty tensor: float32 of shape (1,). A NaN is the result, or left out."""
    launch = backend(x).largest_magnitude
    found = [launch(source, keeps_nan) for source, _, _ in pieces(x, None, torch.float32, in_any_order=True)]
    return reduce(torch.maximum, found) if found else torch.zeros(1, device=x.device)


def decode_into(codes: torch.Tensor, out: torch.Tensor, scales: Scales, fields: Fields) -> None:
    """out = the values of contiguous codes times their scales."""
    backend(codes).decode_elements(codes.view(-1), 0, scales, out.view(-1), fields)


def prune_into(x: torch.Tensor, out: torch.Tensor, alpha: np.float32, key: Key) -> None:
    """out = T(x)."""
    launch = backend(x).prune_elements
    for source, target, first in pieces(x, out, torch.float32):
        launch(source, first, alpha, target, key)


def prune_round_into(
    x: torch.Tensor,
    out: torch.Tensor,
    counts: torch.Tensor,
    alpha: np.float32,
    method: tuple[str, Fields],
    scales: Scales,
    key: Key,
) -> None:
    """out = T(x), its survivors rounded; counts: int64 (2, blocks)."""
    name, fields = method
    launch = backend(x).prune_round
    for source, target, first in pieces(x, out, torch.float32):
        launch(name, source, first, alpha, scales, target, counts, key, fields)


def on_flat(launch: Callable[..., None], x: torch.Tensor, out: torch.Tensor, *arguments: Any) -> None:
    """Call a launcher that takes flat x and out besides `arguments`, whatever their strides."""
    for source, target, _ in pieces(x, out, work_dtype(x), in_any_order=True, keeps_out=True):
        launch(source, target, *arguments)


# --- flat pieces ----------------------------------------------------------------------------------------------------


def work_dtype(x: torch.Tensor) -> torch.dtype:
    """What kernels compute with: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pieces(
    x: torch.Tensor,
    out: torch.Tensor | None,
    dtype: torch.dtype,
    in_any_order: bool = False,
    keeps_out: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Flat, contiguous (source of `dtype`, target, row-major number of its first element) that cover x and out.

    What is written into a target is in `out` once the next piece is asked for. in_any_order: elements may come in
    another order than row-major. keeps_out: targets hold what `out` holds.
    """
    if x.numel() == 0:
        return
    target_dtype = dtype if out is None or out.dtype.is_floating_point else out.dtype
    if out is not None and may_overlap(x, out):
        x = x.clone()
    is_direct = x.dtype == dtype and (out is None or out.dtype == target_dtype)
    if is_direct and x.is_contiguous() and (out is None or out.is_contiguous()):
        source = x.view(-1)
        yield source, source if out is None else out.view(-1), 0
        return
    order = dense_order(x) if is_direct else None
    if order is not None and (out is None or order == dense_order(out)) and (in_any_order or is_row_major(order)):
        source = x.permute(order).reshape(-1)
        yield source, source if out is None else out.permute(order).reshape(-1), 0
        return
    first = 0
    for index in slabs(tuple(x.shape), PIECE):
        part = x[index]
        source = part.to(dtype).reshape(-1)
        if out is None:
            yield source, source, first
        else:
            place = out[index]
            target = place.to(target_dtype).reshape(-1) if keeps_out else torch.empty_like(source, dtype=target_dtype)
            yield source, target, first
            if not (target.data_ptr() == place.data_ptr() and target.dtype == place.dtype):
                place.copy_(target.view(place.shape))
        first += source.numel()


def slabs(shape: tuple[int, ...], limit: int) -> Iterator[tuple[slice, ...]]:
    """Indices of parts of at most `limit` elements that cover a shape in row-major order."""
    size = math.prod(shape)
    if size <= limit:
        yield tuple(slice(None) for _ in shape)
        return
    row = size // shape[0]
    step = max(limit // row, 1)
    for start in range(0, shape[0], step):
        if row <= limit:
            yield (slice(start, start + step),)
        else:
            for rest in slabs(shape[1:], limit):
                yield (slice(start, start + 1), *rest)


def dense_order(x: torch.Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which x is contiguous, None where there is none."""
    if x.is_contiguous():
        return tuple(range(x.ndim))
    strides = x.stride()
    order = tuple(sorted(range(x.ndim), key=lambda d: (-strides[d], d)))
    return order if x.permute(order).is_contiguous() else None


def is_row_major(order: tuple[int, ...]) -> bool:
    return order == tuple(range(len(order)))


def may_overlap(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether writing `out` element by element could change elements of x that are still to be read."""
    if x.device != out.device:
        return False
    (x_start, x_stop), (out_start, out_stop) = _extent(x), _extent(out)
    if x_stop <= out_start or out_stop <= x_start:
        return False
    is_same = x_start == out_start and x.dtype == out.dtype and x.stride() == out.stride() and x.shape == out.shape
    return not is_same


def _extent(x: torch.Tensor) -> tuple[int, int]:
    start, count = x.data_ptr(), x.numel()
    if count == 0:
        return 0, 0
    if x.is_contiguous():
        return start, start + count * x.element_size()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size()


def layout_of(shape: tuple[int, ...] | torch.Size, axis: int, fmt: BlockFormat) -> Layout:
    """A contiguous tensor as blocks along `axis`."""
    length = shape[axis] if shape else 1
    return Layout(math.prod(shape[:axis]), length, math.prod(shape[axis + 1 :]), -(-length // fmt.block_size))


def table_of(scale: torch.Tensor, shape: torch.Size) -> Table:
    """The scales of a tensor of this shape, as rows of equal scale. ValueError where they do not broadcast."""
    full = (1,) * (len(shape) - scale.ndim) + tuple(scale.shape)
    fits = len(full) == len(shape) and all(n in (1, size) for n, size in zip(full, shape, strict=True))
    if not fits:
        raise ValueError(f"scale of shape {tuple(scale.shape)} does not broadcast to x's shape {tuple(shape)}")
    varying = [d for d, n in enumerate(full) if n > 1]
    values = scale.detach().to(torch.float32)
    if not varying or math.prod(shape) == 0:
        return Table(values.reshape(-1)[:1] if values.numel() else torch.ones(1, device=scale.device), 1)
    low, high = varying[0], varying[-1] + 1
    spread = values.reshape(full[low:high]).expand(shape[low:high])
    return Table(spread.reshape(-1), math.prod(shape[high:]))
