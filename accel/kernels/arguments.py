"""What launchers are given beside tensors: random words, scales and the layout of blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class Key(NamedTuple):
    """What the random word of an element depends on beside its number: see accel/random.py. offset: of the numbers."""

    offset: int
    seed: np.uint64
    stream: np.uint64
    step: np.uint64


class Table(NamedTuple):
    """Scales of rows: each `row_length` elements have one of the `values` (float32, flat), taken in turn."""

    values: torch.Tensor
    row_length: int


class Layout(NamedTuple):
    """A contiguous tensor as (outer, length, inner), with `blocks` blocks along `length`."""

    outer: int
    length: int
    inner: int
    blocks: int


Scales = Table | np.float32 | None  # of rows, one for all elements, or no scale
Fields = tuple[Any, ...]
