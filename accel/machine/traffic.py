"""Bytes that a pass of a layer moves through each memory level.

The first level, next to the array, is read and written by the array alone, fold by fold (`array_bytes`). Those further
out move whole tensors as streams, encoded as they are stored, each rounded up to whole bursts of the level.

An operand of a product is read as often as its tiles must come back (`tiling`). The level before holds the tiles, one
of each operand and one of the sums, in half its size: the other half is being filled. There they lie decoded, at the
bits of their values; a tile of a convolution's unfolded input takes its share of the tensor, as the unfolding is made
on the way to the array. Sums that do not stay until they are complete leave at accumulator_bits and come back. The
traffic of each level follows in this way from the size of the one before it.

Complete sums are counted as the tensor that they become: they are rounded, added up at their places and encoded on
their way out.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np

from accel.ledger import Product
from accel.machine.cycles import LAYOUT
from accel.machine.description import Array

MATRICES = (("rows", "length"), ("length", "columns"), ("rows", "columns"))  # first operand, second operand, sums


class Operand(NamedTuple):
    """An operand of a product as the array takes it: a tensor of so many elements, decoded to so many bits each."""

    numel: int
    value_bits: int

    @property
    def tensor_bytes(self) -> float:
        return self.numel * self.value_bits / 8


class Reads(NamedTuple):
    """How often each operand's tensor comes into a level, and how often the sums are worked on there."""

    first: int
    second: int
    visits: int


def stream_bytes(bits: float, burst_bytes: int) -> int:
    """Bytes that a stream takes in whole bursts."""
    return math.ceil(bits / 8 / burst_bytes) * burst_bytes


def spilled_bytes(product: Product, visits: int, accumulator_bits: int, burst_bytes: int) -> int:
    """Bytes of the sums that leave a level before they are complete, written and read again at each further visit."""
    bits = product.groups * product.rows * product.columns * accumulator_bits
    return 2 * (visits - 1) * stream_bytes(bits, burst_bytes)


def array_bytes(product: Product, array: Array, first: Operand, second: Operand, accumulator_bits: int) -> float:
    """Bytes that the array reads from and writes to the first level.

    A fold reads the operand that stays once and streams the other one by, at the bits of their values. So a matrix
    moves once if it lies on the array, and otherwise once for each fold along the dimension that it does not have. Each
    move of the sums but the last leaves them incomplete: written at `accumulator_bits`, and read again by the next.
    Zeros are read, too.
    """
    sizes = {"rows": product.rows, "columns": product.columns, "length": product.length}
    along_rows, along_columns, _ = LAYOUT[array.dataflow]
    folds = dict.fromkeys(sizes, 1)
    folds |= {
        along_rows: math.ceil(sizes[along_rows] / array.rows),
        along_columns: math.ceil(sizes[along_columns] / array.columns),
    }
    elements = [math.prod(sizes[name] for name in matrix) for matrix in MATRICES]
    moves = [next(count for name, count in folds.items() if name not in matrix) for matrix in MATRICES]
    moves[2] = 2 * (moves[2] - 1)
    bits = first.value_bits, second.value_bits, accumulator_bits
    return product.groups * sum(map(math.prod, zip(elements, moves, bits, strict=True))) / 8


def reads_of(
    product: Product, array: Array, first: Operand, second: Operand, accumulator_bits: int, level_bytes: float
) -> Reads:
    """How often the operands of a product are read into a level of so many bytes, by the best tiling."""
    sizes = product.rows, product.columns, product.length
    elements = product.rows * product.length, product.length * product.columns
    moved = first.tensor_bytes / product.groups, second.tensor_bytes / product.groups
    held = (
        min(moved[0] / elements[0], first.value_bits / 8),
        min(moved[1] / elements[1], second.value_bits / 8),
        accumulator_bits / 8,
    )
    steps = dict.fromkeys(("rows", "columns", "length"), 1)
    along_rows, along_columns, _ = LAYOUT[array.dataflow]
    steps |= {along_rows: array.rows, along_columns: array.columns}
    return tiling(sizes, LAYOUT[array.dataflow], tuple(steps.values()), held, moved, level_bytes / 2)


@lru_cache(maxsize=4096)
def tiling(
    sizes: tuple[int, ...],
    layout: tuple[str, str, str],
    steps: tuple[int, ...],
    held: tuple[float, ...],
    moved: tuple[float, ...],
    capacity: float,
) -> Reads:
    """The reads of the tiling that moves the fewest bytes from the level outside.

    sizes, steps: of the product's rows, columns and length; a tile has a whole number of steps, or the whole size.
    held: bytes that an element of the first operand, the second and the sums takes in a tile. moved: bytes of the two
    tensors. capacity: bytes for the three tiles together.

    Every tile of whole steps and all six orders of the loops over tiles are compared: a tensor comes anew at each trip
    of the loop over the dimension that it does not have, unless no loop over its own ones turns inside. The schedule is
    made before the run, so it compares tensors as if decoded, not knowing how short their streams will be.
    """
    size, step = (dict(zip(("rows", "columns", "length"), values, strict=True)) for values in (sizes, steps))
    weight = dict(zip(map(frozenset, MATRICES), held, strict=True))
    p, q, t = layout
    edge_p, edge_q = _edges(size[p], step[p])[:, None], _edges(size[q], step[q])[None, :]
    room = capacity - weight[frozenset((p, q))] * edge_p * edge_q
    per_t = weight[frozenset((p, t))] * edge_p + weight[frozenset((q, t))] * edge_q
    edge_t = np.minimum(np.floor(room / per_t), size[t])
    fits = edge_t >= 1
    trips = {
        p: np.broadcast_to(np.ceil(size[p] / edge_p), fits.shape)[fits],
        q: np.broadcast_to(np.ceil(size[q] / edge_q), fits.shape)[fits],
        t: np.ceil(size[t] / edge_t[fits]),
    }
    sum_bytes = held[2] * size["rows"] * size["columns"]
    best: tuple[float, Reads] | None = None
    for order in permutations(trips):
        first, second, visits = (_comes(matrix, order, trips) for matrix in MATRICES)
        cost = first * moved[0] + second * moved[1] + 2 * (visits - 1) * sum_bytes
        index = int(np.argmin(cost))
        if best is None or cost[index] < best[0]:
            best = float(cost[index]), Reads(int(first[index]), int(second[index]), int(visits[index]))
    assert best is not None
    return best[1]


def _comes(matrix: tuple[str, str], order: tuple[str, ...], trips: dict[str, np.ndarray]) -> np.ndarray:
    """How often a matrix comes as a whole, its loops over tiles nested in `order`, outermost first."""
    other = next(name for name in order if name not in matrix)
    inside = [trips[name] > 1 for name in order[order.index(other) + 1 :]]
    turns = np.any(inside, axis=0) if inside else np.zeros_like(trips[other], dtype=bool)
    return np.where(turns, trips[other], 1)


def _edges(size: int, step: int) -> np.ndarray:
    """Tile edges along one dimension: for each number of tiles the smallest edge of whole steps."""
    folds = math.ceil(size / step)
    tiles = np.unique(np.ceil(folds / np.arange(1, folds + 1)))
    return np.minimum(tiles * step, size)
