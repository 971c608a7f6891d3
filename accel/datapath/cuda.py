"""Matrix products of a datapath on CUDA: the same steps as in cpu.py, and launchers of the same names.

A block of threads makes a tile of TILE_ROWS x TILE_COLUMNS elements, a thread RESULTS of one column; DEPTH columns of
`a` and rows of `b` at a time lie in shared memory. Each element is summed in the order of K, whatever the tiles.
"""

# ruff: noqa: F821  names that are bound

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import cuda

from accel.datapath import cpu
from accel.datapath.cpu import ADD_OF, NAN, STEP_OF, STEPS, VALUES, Extent
from accel.datapath.steps import Grid
from accel.kernels.arguments import Fields
from accel.kernels.cuda_jit import THREADS, device, launch
from accel.kernels.jit import renamed
from accel.random import round_keys
from accel.rounding import Parameters
from accel.words import LOW_WORD, WORD_BITS

TILE_COLUMNS, DEPTH, RESULTS = 16, 16, 4
THREAD_ROWS = THREADS // TILE_COLUMNS
TILE_ROWS = THREAD_ROWS * RESULTS


def _on_a_grid(a, b, out, chunk, inner_fields, outer_fields):  # type: ignore[no-untyped-def]
    """A tile of out = a b. a: (M, K), b: (K, N). chunk: beyond K where there is no outer accumulator."""
    inner, outer = Grid(*inner_fields), Grid(*outer_fields)
    tile_a = cuda.shared.array((DEPTH, TILE_ROWS), np.float32)
    tile_b = cuda.shared.array((DEPTH, TILE_COLUMNS), np.float32)
    rows, length = a.shape
    columns = b.shape[1]
    across = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
    first_row = cuda.blockIdx.x // across * TILE_ROWS
    first_column = cuda.blockIdx.x % across * TILE_COLUMNS
    row, column = cuda.threadIdx.x // TILE_COLUMNS, cuda.threadIdx.x % TILE_COLUMNS
    x_0 = x_1 = x_2 = x_3 = REAL(0)
    y_0 = y_1 = y_2 = y_3 = np.float64(0)
    for base in range(0, length, DEPTH):
        for i in range(cuda.threadIdx.x, DEPTH * TILE_ROWS, THREADS):
            r, k = i // DEPTH, i % DEPTH
            is_inside = (first_row + r < rows) & (base + k < length)
            tile_a[k, r] = a[first_row + r, base + k] if is_inside else np.float32(0)
        for i in range(cuda.threadIdx.x, DEPTH * TILE_COLUMNS, THREADS):
            k, c = i // TILE_COLUMNS, i % TILE_COLUMNS
            is_inside = (first_column + c < columns) & (base + k < length)
            tile_b[k, c] = b[base + k, first_column + c] if is_inside else np.float32(0)
        cuda.syncthreads()
        for k in range(min(DEPTH, length - base)):
            value = REAL(tile_b[k, column])
            x_0 = STEP(x_0, REAL(tile_a[k, row]), value, inner)
            x_1 = STEP(x_1, REAL(tile_a[k, row + THREAD_ROWS]), value, inner)
            x_2 = STEP(x_2, REAL(tile_a[k, row + 2 * THREAD_ROWS]), value, inner)
            x_3 = STEP(x_3, REAL(tile_a[k, row + 3 * THREAD_ROWS]), value, inner)
            done = base + k + 1
            if chunk <= length and (done % chunk == 0 or done == length):
                y_0, y_1 = ADD(y_0, np.float64(x_0), outer), ADD(y_1, np.float64(x_1), outer)
                y_2, y_3 = ADD(y_2, np.float64(x_2), outer), ADD(y_3, np.float64(x_3), outer)
                x_0 = x_1 = x_2 = x_3 = REAL(0)
        cuda.syncthreads()
    if chunk > length:
        y_0, y_1, y_2, y_3 = np.float64(x_0), np.float64(x_1), np.float64(x_2), np.float64(x_3)
    for i in range(RESULTS):
        place = first_row + row + i * THREAD_ROWS
        if place < rows and first_column + column < columns:
            found = np.float32(y_0 if i == 0 else y_1 if i == 1 else y_2 if i == 2 else y_3)
            out[place, first_column + column] = found if found == found else NAN


def _by_code(  # type: ignore[no-untyped-def]
    a, b, out, chunk, terms, fraction, has_product, number, seed, stream, step, inner_fields, outer_fields, fields
):
    """An element of out = a b for each thread. a: (M, K); b: (N, K), transposed."""
    element = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    columns = b.shape[0]
    if element < a.shape[0] * columns:
        row, column = element // columns, element % columns
        words = (number + element) * a.shape[1]
        out[row, column] = ELEMENT(
            a[row], b[column], chunk, terms, fraction, has_product, words, stream, step,
            round_keys(seed & LOW_WORD, seed >> WORD_BITS),
            Parameters(*inner_fields), Parameters(*outer_fields), Parameters(*fields),
        )  # fmt: skip


def _loops() -> dict[str, Any]:
    """Every kernel as a Python function, by name."""
    loops: dict[str, Any] = {}
    for (kind, mode), step in STEP_OF.items():
        names = {"STEP": step, "ADD": ADD_OF[mode], "REAL": STEPS[kind][1]}
        loops[f"matmul_{kind}_{mode}"] = renamed(_on_a_grid, f"matmul_{kind}_{mode}", {**globals(), **names})
    for mode, names in VALUES.items():
        bound = {**vars(cpu), **names, "ALIGNED_SUM": device(cpu.aligned_sum)}
        element = device(renamed(cpu.element_of, f"element_{mode}", bound))
        loops[f"matmul_by_code_{mode}"] = renamed(_by_code, f"matmul_by_code_{mode}", {**globals(), "ELEMENT": element})
    return loops


LOOPS = _loops()


def extent(x: torch.Tensor) -> Extent:
    """Of a float32 tensor. Waits for the device: the step is chosen from it."""
    mantissa, exponent = torch.frexp(x)
    significand = (mantissa.abs() * 2.0**24).to(torch.int32)
    last = torch.frexp((significand & -significand).float()).exponent - 1
    is_number = x.isfinite() & (x != 0)
    found = torch.stack([24 - last, exponent - 1, 24 - last - exponent])
    bits, high, low = torch.where(is_number, found, -1000).flatten(1).amax(1).tolist()
    is_special = not bool(x.isfinite().all())
    return Extent(bits, high, -low, is_special) if bits > 0 else Extent(0, 0, 0, is_special)


def on_a_grid(
    kind: str, mode: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, chunk: int, inner: Grid, outer: Grid
) -> None:
    name = f"matmul_{kind}_{mode}"
    blocks = -(-a.shape[1] // TILE_ROWS) * -(-b.shape[2] // TILE_COLUMNS)
    for one, other, target in zip(a.contiguous(), b.contiguous(), out, strict=True):
        launch(LOOPS[name], name, blocks, (one, other, target, chunk, tuple(inner), tuple(outer)))


def by_code(
    mode: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, options: tuple[Any, ...], *fields: Fields
) -> None:
    name = f"matmul_by_code_{mode}"
    arguments = a.contiguous(), b.t().contiguous(), out, *options, *map(tuple, fields)
    launch(LOOPS[name], name, -(-out.numel() // THREADS), arguments)
