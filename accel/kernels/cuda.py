"""CUDA loops over the same scalar functions as kernels/cpu.py, and the same launchers.

A thread strides over the tensor. Where random words are drawn it takes the four elements that one call of the generator
serves (16 apart), so that neighbouring threads still touch neighbouring elements. Launches go to torch's current stream
and nothing waits for them; tensors are read and written where they lie.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cuda

from accel import block_scaling
from accel.block_formats import BlockFormat
from accel.block_scaling import BlockParameters, block_scale
from accel.kernels.arguments import Fields, Key, Layout, Scales, Table
from accel.kernels.cpu import CHUNK, GROUP, INFINITY, MAGNITUDE, METHODS, is_alpha, scaled_back, tally, unchanged
from accel.kernels.jit import CACHE_FOLDER, CACHED, cache_in, config, renamed, scalar
from accel.random import LOW_WORD, philox4x32
from accel.rounding import Parameters, prune_stochastic, value_of
from accel.words import bits_of

THREADS = 256  # of a block
MAX_BLOCKS = 1 << 16
SIMULATED: bool = config.ENABLE_CUDASIM
COUNT_MASK = np.uint32((1 << 16) - 1)


@scalar
def draw_four(group, j, seed, stream, step):  # type: ignore[no-untyped-def]
    """The random words of the elements 64 group + j + (0, 16, 32, 48)."""
    counter = np.uint64(group) * np.uint64(16) + np.uint64(j)
    low, high = counter & LOW_WORD, counter >> np.uint64(32)
    k0, k1 = seed & LOW_WORD, seed >> np.uint64(32)
    w0, w1, w2, w3 = philox4x32(low, high, stream & LOW_WORD, step & LOW_WORD, k0, k1)
    return np.uint32(w0), np.uint32(w1), np.uint32(w2), np.uint32(w3)


@scalar
def draw_one(number, seed, stream, step):  # type: ignore[no-untyped-def]
    """The random word of one element."""
    w0, w1, w2, w3 = draw_four(number // GROUP, number % 16, seed, stream, step)
    lane = (number // 16) % 4
    low, high = (w1, w3) if lane % 2 else (w0, w2)
    return high if lane // 2 else low


@scalar
def row_of(number, row_length, rows):  # type: ignore[no-untyped-def]
    """Which of `rows` scales an element has: rows of `row_length` elements take them in turn."""
    return (number // row_length) % rows


def _round(x, first, scales, row_length, out, offset, seed, stream, step, fields):  # type: ignore[no-untyped-def]
    p = PARAMETERS(*fields)  # noqa: F821
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        if scales.size == 0:
            out[i] = transform(x[i], np.uint32(0), p)  # noqa: F821
        else:
            factor = scales[row_of(first + i, row_length, scales.size)]
            out[i] = rescaled(transform(x[i] / factor, np.uint32(0), p), factor)  # noqa: F821


def _round_drawn(x, first, scales, row_length, out, offset, seed, stream, step, fields):  # type: ignore[no-untyped-def]
    p = PARAMETERS(*fields)  # noqa: F821
    start = offset + first
    first_group = start // GROUP
    quads = ((start + x.size + GROUP - 1) // GROUP - first_group) * 16
    for quad in range(cuda.grid(1), quads, cuda.gridsize(1)):
        group, j = first_group + quad // 16, quad % 16
        drawn = draw_four(group, j, seed, stream, step)
        for lane in range(4):
            i = group * GROUP + lane * 16 + j - start
            if 0 <= i < x.size:
                draw = drawn[lane]
                if scales.size == 0:
                    out[i] = transform(x[i], draw, p)  # noqa: F821
                else:
                    factor = scales[row_of(first + i, row_length, scales.size)]
                    out[i] = rescaled(transform(x[i] / factor, draw, p), factor)  # noqa: F821


def _round_both(x, first, scales, row_length, out, codes, value_fields, offset, seed, stream, step, fields):  # type: ignore[no-untyped-def]
    p, v = PARAMETERS(*fields), Parameters(*value_fields)  # noqa: F821
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        draw = draw_one(offset + first + i, seed, stream, step) if DRAWS else np.uint32(0)  # noqa: F821
        if scales.size == 0:
            code = transform(x[i], draw, p)  # noqa: F821
            out[i] = value_of(code, v)
        else:
            factor = scales[row_of(first + i, row_length, scales.size)]
            code = transform(x[i] / factor, draw, p)  # noqa: F821
            out[i] = value_of(code, v) * factor
        codes[i] = code


def _round_blocks(  # type: ignore[no-untyped-def]
    x, outer, length, inner, block_size, blocks_a_row, tensor_scale, block_fields, scale_fields, out, scale_codes,
    offset, seed, stream, step, fields,
):  # fmt: skip
    """A thread takes a block: `block_size` elements, `inner` apart, of x as (outer, length, inner)."""
    p, b, s = PARAMETERS(*fields), BlockParameters(*block_fields), Parameters(*scale_fields)  # noqa: F821
    for item in range(cuda.grid(1), outer * blocks_a_row * inner, cuda.gridsize(1)):
        row, column = item // inner, item % inner
        top = (row // blocks_a_row) * length + (row % blocks_a_row) * block_size
        bottom = min(top + block_size, (row // blocks_a_row + 1) * length)
        largest = np.uint32(0)
        for k in range(top, bottom):
            bits = np.uint32(bits_of(x[k * inner + column]) & MAGNITUDE)
            largest = bits if bits > largest else largest
        factor, code = block_scale(largest, tensor_scale[0], b, s)
        if scale_codes.size > 0:
            scale_codes[item] = code
        for k in range(top, bottom):
            i = k * inner + column
            draw = draw_one(offset + i, seed, stream, step) if DRAWS else np.uint32(0)  # noqa: F821
            out[i] = rescaled(transform(x[i] / factor, draw, p), factor)  # noqa: F821


def largest_patterns(x, last, pattern):  # type: ignore[no-untyped-def]
    largest = np.uint32(0)
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        bits = np.uint32(bits_of(x[i]) & MAGNITUDE)
        bits = bits if bits <= last else np.uint32(0)
        largest = bits if bits > largest else largest
    cuda.atomic.max(pattern, 0, largest)


def decode(codes, first, scales, row_length, out, fields):  # type: ignore[no-untyped-def]
    p = Parameters(*fields)
    for i in range(cuda.grid(1), codes.size, cuda.gridsize(1)):
        value = value_of(codes[i], p)
        out[i] = value if scales.size == 0 else value * scales[row_of(first + i, row_length, scales.size)]


def prune(x, first, alpha, out, offset, seed, stream, step):  # type: ignore[no-untyped-def]
    start = offset + first
    first_group = start // GROUP
    quads = ((start + x.size + GROUP - 1) // GROUP - first_group) * 16
    for quad in range(cuda.grid(1), quads, cuda.gridsize(1)):
        group, j = first_group + quad // 16, quad % 16
        drawn = draw_four(group, j, seed, stream, step)
        for lane in range(4):
            i = group * GROUP + lane * 16 + j - start
            if 0 <= i < x.size:
                out[i] = prune_stochastic(x[i], drawn[lane], alpha)


def _prune_round(x, first, alpha, scales, row_length, out, counts, offset, seed, stream, step, fields):  # type: ignore[no-untyped-def]
    p = PARAMETERS(*fields)  # noqa: F821
    start = offset + first
    first_group = start // GROUP
    quads = ((start + x.size + GROUP - 1) // GROUP - first_group) * 16
    for quad in range(cuda.grid(1), quads, cuda.gridsize(1)):
        group, j = first_group + quad // 16, quad % 16
        drawn = draw_four(group, j, seed, stream, step)
        for lane in range(4):
            i = group * GROUP + lane * 16 + j - start
            if 0 <= i < x.size:
                draw = drawn[lane]
                kept = np.float32(prune_stochastic(x[i], draw, alpha))
                if scales.size == 0:
                    value = np.float32(transform(kept, draw, p))  # noqa: F821
                else:
                    factor = scales[row_of(first + i, row_length, scales.size)]
                    value = np.float32(transform(np.float32(kept / factor), draw, p) * factor)  # noqa: F821
                value = kept if is_alpha(kept, alpha) else value
                out[i] = value
                counted = tally(value, alpha)
                if counted != np.uint32(0):
                    block = (first + i) // CHUNK
                    cuda.atomic.add(counts, (0, block), np.int64(counted & COUNT_MASK))
                    cuda.atomic.add(counts, (1, block), np.int64(counted >> np.uint32(16)))


def keep_alpha(x, alpha, out):  # type: ignore[no-untyped-def]
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        if is_alpha(x[i], alpha):
            out[i] = x[i]


def encode_alpha(x, alpha, codes, positive, negative):  # type: ignore[no-untyped-def]
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        if is_alpha(x[i], alpha):
            codes[i] = positive if x[i] > np.float32(0) else negative


def decode_alpha(codes, positive, negative, alpha, out):  # type: ignore[no-untyped-def]
    for i in range(cuda.grid(1), codes.size, cuda.gridsize(1)):
        if codes[i] == positive:
            out[i] = alpha
        elif codes[i] == negative:
            out[i] = -alpha


# --- one kernel for each way to round -------------------------------------------------------------------------------


def _loops() -> dict[str, Any]:
    """Every kernel as a Python function, by name."""
    loops: dict[str, Any] = {
        loop.__name__: loop for loop in (largest_patterns, decode, prune, keep_alpha, encode_alpha, decode_alpha)
    }
    for method, (value, code, record, draws) in METHODS.items():
        bound: dict[str, Any] = {**globals(), "PARAMETERS": record, "DRAWS": draws}
        loop = _round_drawn if draws else _round
        for operation, transform, rescaled in (("quantize", value, scaled_back), ("encode", code, unchanged)):
            names = {**bound, "transform": transform, "rescaled": rescaled}
            loops[f"{operation}_{method}"] = renamed(loop, f"{operation}_{method}", names)
            loops[f"{operation}_blocks_{method}"] = renamed(_round_blocks, f"{operation}_blocks_{method}", names)
        loops[f"both_{method}"] = renamed(_round_both, f"both_{method}", {**bound, "transform": code})
        loops[f"prune_{method}"] = renamed(_prune_round, f"prune_{method}", {**bound, "transform": value})
    return loops


LOOPS = _loops()


@cache
def compiled(name: str) -> Any:
    """The kernel of a name."""
    with cache_in(CACHE_FOLDER):
        return cuda.jit(LOOPS[name]) if SIMULATED else cuda.jit(LOOPS[name], cache=CACHED)


# --- launchers: the same names as in kernels/cpu.py ------------------------------------------------------------------

_SIGNED = {torch.uint16: (torch.int16, np.uint16), torch.uint32: (torch.int32, np.uint32)}


def _array(x: Any) -> Any:
    """A tensor as the kernels take it, without a copy; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    if SIMULATED:
        return x.numpy()
    if x.dtype in _SIGNED:
        signed, unsigned = _SIGNED[x.dtype]
        return cuda.as_cuda_array(x.view(signed), sync=False).view(unsigned)
    return cuda.as_cuda_array(x, sync=False)


def _launch(name: str, items: int, *arguments: Any) -> None:
    """Start a kernel over `items` on torch's current stream."""
    if items == 0:
        return
    blocks = min(-(-items // THREADS), MAX_BLOCKS)
    if SIMULATED:
        compiled(name)[min(blocks, 2), 32](*map(_array, arguments))
        return
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    with cuda.gpus[device.index]:
        stream = cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)
        compiled(name)[blocks, THREADS, stream](*map(_array, arguments))


def round_elements(
    operation: str, method: str, x: torch.Tensor, first: int, scales: Scales, out: torch.Tensor, key: Key, p: Fields
) -> None:
    _launch(f"{operation}_{method}", x.numel(), x, first, *_table(scales, x), out, *key, tuple(p))


def round_both(
    method: str,
    x: torch.Tensor,
    first: int,
    scales: Scales,
    out: torch.Tensor,
    codes: torch.Tensor,
    values: Fields,
    key: Key,
    p: Fields,
) -> None:
    _launch(f"both_{method}", x.numel(), x, first, *_table(scales, x), out, codes, tuple(values), *key, tuple(p))


def round_blocks(
    operation: str,
    method: str,
    x: torch.Tensor,
    layout: Layout,
    tensor_scale: torch.Tensor,
    fmt: BlockFormat,
    out: torch.Tensor,
    scale_codes: torch.Tensor,
    key: Key,
    p: Fields,
) -> None:
    outer, length, inner, blocks = layout
    fields = tuple(block_scaling.block_parameters(fmt)), tuple(block_scaling.scale_parameters(fmt))
    _launch(
        f"{operation}_blocks_{method}", outer * blocks * inner, x, outer, length, inner, fmt.block_size, blocks,
        tensor_scale, *fields, out, scale_codes, *key, tuple(p),
    )  # fmt: skip


def largest_magnitude(x: torch.Tensor, keeps_nan: bool) -> torch.Tensor:
    pattern = torch.zeros(1, dtype=torch.int32, device=x.device).view(torch.uint32)
    _launch("largest_patterns", x.numel(), x, MAGNITUDE if keeps_nan else INFINITY, pattern)
    return pattern.view(torch.float32)


def decode_elements(codes: torch.Tensor, first: int, scales: Scales, out: torch.Tensor, p: Fields) -> None:
    _launch("decode", codes.numel(), codes, first, *_table(scales, out), out, tuple(p))


def prune_elements(x: torch.Tensor, first: int, alpha: np.float32, out: torch.Tensor, key: Key) -> None:
    _launch("prune", x.numel(), x, first, alpha, out, *key)


def prune_round(
    method: str,
    x: torch.Tensor,
    first: int,
    alpha: np.float32,
    scales: Scales,
    out: torch.Tensor,
    counts: torch.Tensor,
    key: Key,
    p: Fields,
) -> None:
    _launch(f"prune_{method}", x.numel(), x, first, alpha, *_table(scales, x), out, counts, *key, tuple(p))


def keep_alphas(x: torch.Tensor, alpha: np.float32, out: torch.Tensor) -> None:
    _launch("keep_alpha", x.numel(), x, alpha, out)


def encode_alphas(x: torch.Tensor, alpha: np.float32, codes: torch.Tensor, positive: int, negative: int) -> None:
    _launch("encode_alpha", x.numel(), x, alpha, codes, np.uint32(positive), np.uint32(negative))


def decode_alphas(codes: torch.Tensor, positive: int, negative: int, alpha: np.float32, out: torch.Tensor) -> None:
    _launch("decode_alpha", codes.numel(), codes, np.uint32(positive), np.uint32(negative), alpha, out)


def _table(scales: Scales, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The scales as the kernels take them: empty for none, and the length of a row."""
    if isinstance(scales, Table):
        return scales.values.to(x.device, x.dtype), scales.row_length
    if scales is None:
        return torch.empty(0, dtype=x.dtype, device=x.device), 1
    return torch.full((1,), float(scales), dtype=x.dtype, device=x.device), 1
