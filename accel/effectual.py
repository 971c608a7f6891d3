"""Multiply-accumulates that zeros leave over, counted exactly from the operands of a training step.

For y = x * w (see `accel.datapath.convolution`) each pass multiplies the same pairs: forward (x, w), dgrad (y, w),
wgrad (x, y), the gradients in the places of their tensors. A pair counts where both are nonzero; NaN is nonzero. Where
x is padding it is zero. A sum over pairs is a sum of products of sums, so nothing is multiplied out.

A vector of `granularity` neighbours along the channels (of w along its inputs) counts as nonzero as a whole when one of
them is: what hardware sees that skips whole vectors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from accel.datapath.convolution import Convolution, forward_axes, unfolded
from accel.ledger import GRANULARITIES, Effectual


class Counted(NamedTuple):
    """`groups` matrix products (rows, length) x (length, columns), and what zeros leave of them."""

    rows: int
    columns: int
    length: int
    groups: int
    effectual: dict[int, Effectual]


def count_forward(x: Tensor, w: Tensor, conv: Convolution) -> Counted:
    """Products of x (N, C, *spatial) and w (O, C / groups, *kernel), both masks (bool) of what is nonzero."""
    places = x.shape[0] * math.prod(conv.positions(tuple(x.shape[2:]), tuple(w.shape[2:])))
    effectual = {of: _forward(_coarse(x, of), _coarse(w, of), conv) for of in GRANULARITIES}
    return Counted(places, w.shape[0] // conv.groups, math.prod(w.shape[1:]), conv.groups, effectual)


def count_dgrad(y: Tensor, w: Tensor, conv: Convolution) -> Counted:
    """Products of y (N, O, *positions) and w, both masks; those whose sums lie in the padding count, too."""
    places = y.shape[0] * math.prod(y.shape[2:])
    effectual = {of: _dgrad(_coarse(y, of), _coarse(w, of), conv) for of in GRANULARITIES}
    return Counted(places, math.prod(w.shape[1:]), w.shape[0] // conv.groups, conv.groups, effectual)


def count_wgrad(x: Tensor, y: Tensor, conv: Convolution, kernel: tuple[int, ...]) -> Counted:
    """Products of x and y, both masks."""
    places, inputs = y.shape[0] * math.prod(y.shape[2:]), x.shape[1] // conv.groups * math.prod(kernel)
    effectual = {of: _wgrad(_coarse(x, of), _coarse(y, of), conv, kernel) for of in GRANULARITIES}
    return Counted(inputs, y.shape[1] // conv.groups, places, conv.groups, effectual)


def count_matmul(a: Tensor, b: Tensor) -> Counted:
    """Products of a (..., M, K) and b (..., K, N), both masks, leading dimensions broadcast; vectors are neighbours in
    memory, as far as one of the two last dimensions is."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    effectual = {}
    for of in GRANULARITIES:
        first, second = (_coarse_in_memory(x, of).expand(*batch, *x.shape[-2:]) for x in (a, b))
        by_k = first.sum(-2) * second.sum(-1)
        zeros_of_neither = int(first.sum()) * b.shape[-1], int(second.sum()) * a.shape[-2]
        effectual[of] = Effectual(*zeros_of_neither, int(by_k.sum()))
    return Counted(a.shape[-2], b.shape[-1], a.shape[-1], math.prod(batch), effectual)


def _coarse_in_memory(mask: Tensor, granularity: int) -> Tensor:
    is_transposed = mask.stride(-2) == 1 and mask.shape[-1] > 1
    rows = mask.mT if is_transposed else mask
    coarse = _coarse(rows.reshape(-1, rows.shape[-1]), granularity).view(rows.shape)
    return coarse.mT if is_transposed else coarse


def _coarse(mask: Tensor, granularity: int) -> Tensor:
    """mask (N, C, ...) with its vectors along C as a whole."""
    if granularity == 1:
        return mask
    channels = mask.shape[1]
    padded = pad(mask, [0, 0] * (mask.ndim - 2) + [0, -channels % granularity])
    return padded.unflatten(1, (-1, granularity)).any(2).repeat_interleave(granularity, 1)[:, :channels]


def _forward(x: Tensor, w: Tensor, conv: Convolution) -> Effectual:
    axes = forward_axes(conv, tuple(x.shape[2:]), tuple(w.shape[2:]))
    at_places = unfolded(x.sum(0, keepdim=True), axes)  # (1, *positions, C, *taps)
    of_x = at_places.flatten(1, len(axes)).sum(1)[0] if axes else at_places[0]  # (C, *taps)
    of_w = w.unflatten(0, (conv.groups, -1)).sum(1).flatten(0, 1)  # (C, *taps)
    places = x.shape[0] * math.prod(axis.count for axis in axes)
    outputs = w.shape[0] // conv.groups
    return Effectual(int(of_x.sum()) * outputs, int(w.sum()) * places, int((of_x * of_w).sum()))


def _dgrad(y: Tensor, w: Tensor, conv: Convolution) -> Effectual:
    of_y, of_w = y.transpose(0, 1).flatten(1).sum(1), w.flatten(1).sum(1)
    places = y.shape[0] * math.prod(y.shape[2:])
    return Effectual(int(of_y.sum()) * math.prod(w.shape[1:]), int(of_w.sum()) * places, int((of_y * of_w).sum()))


def _wgrad(x: Tensor, y: Tensor, conv: Convolution, kernel: tuple[int, ...]) -> Effectual:
    axes = forward_axes(conv, tuple(x.shape[2:]), kernel)
    by_group = x.unflatten(1, (conv.groups, -1)).sum(2, dtype=torch.int32)
    windows = unfolded(by_group, axes)  # (N, *positions, groups, *taps)
    of_x = windows.flatten(len(axes) + 2).sum(-1) if axes else windows  # (N, *positions, groups)
    of_y = y.unflatten(1, (conv.groups, -1)).sum(2).movedim(1, -1)
    inputs, outputs = x.shape[1] // conv.groups * math.prod(kernel), y.shape[1] // conv.groups
    return Effectual(int(of_x.sum()) * outputs, int(y.sum()) * inputs, int((of_x * of_y).sum()))
