"""Multiply-accumulates that zeros leave over, counted exactly from the operands of a training step.

For y = x * w (see `accel.datapath.convolution`) each pass multiplies the same pairs: forward (x, w), dgrad (y, w),
wgrad (x, y), the gradients in the places of their tensors. A pair counts where both are nonzero; NaN is nonzero. Where
x is padding it is zero. A sum over pairs is a sum of products of sums, so nothing is multiplied out.

A vector of `granularity` neighbours along the channels (of w along its inputs), also of several groups, counts as
nonzero as a whole when one of them is: what hardware sees that skips whole vectors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

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
    axes = forward_axes(conv, tuple(x.shape[2:]), tuple(w.shape[2:]))
    places, outputs = x.shape[0] * math.prod(axis.count for axis in axes), w.shape[0] // conv.groups
    effectual = {}
    for of in GRANULARITIES:
        in_batch = _each(_vectors(x, of).sum(0, keepdim=True, dtype=torch.int32), of, x.shape[1])  # (1, C, *spatial)
        at_places = unfolded(in_batch, axes)  # (1, *positions, C, *taps)
        of_x = at_places.flatten(1, len(axes)).sum(1)[0] if axes else at_places[0]  # (C, *taps)
        coarse = _each(_vectors(w, of), of, w.shape[1])
        of_w = coarse.unflatten(0, (conv.groups, -1)).sum(1).flatten(0, 1)  # (C, *taps)
        effectual[of] = Effectual(
            int(of_x.sum()) * outputs, int(coarse.sum()) * places, int((of_x.long() * of_w).sum())
        )
    return Counted(places, outputs, math.prod(w.shape[1:]), conv.groups, effectual)


def count_dgrad(y: Tensor, w: Tensor, conv: Convolution) -> Counted:
    """Products of y (N, O, *positions) and w, both masks; those whose sums lie in the padding count, too."""
    places, inputs = y.shape[0] * math.prod(y.shape[2:]), math.prod(w.shape[1:])
    others = [dim for dim in range(y.ndim) if dim != 1]
    effectual = {}
    for of in GRANULARITIES:
        of_y = _each(_vectors(y, of).sum(others), of, y.shape[1], dim=0)
        of_w = _each(_vectors(w, of), of, w.shape[1]).flatten(1).sum(1)
        effectual[of] = Effectual(int(of_y.sum()) * inputs, int(of_w.sum()) * places, int((of_y * of_w).sum()))
    return Counted(places, inputs, w.shape[0] // conv.groups, conv.groups, effectual)


def count_wgrad(x: Tensor, y: Tensor, conv: Convolution, kernel: tuple[int, ...]) -> Counted:
    """Products of x and y, both masks."""
    places, inputs = y.shape[0] * math.prod(y.shape[2:]), x.shape[1] // conv.groups * math.prod(kernel)
    outputs = y.shape[1] // conv.groups
    effectual = {}
    for of in GRANULARITIES:
        of_x = _windows(_in_groups(x, of, conv.groups), conv, kernel)
        of_y = _in_groups(y, of, conv.groups)
        both = (of_x.double() * of_y).sum()
        effectual[of] = Effectual(int(of_x.double().sum()) * outputs, int(of_y.double().sum()) * inputs, int(both))
    return Counted(inputs, outputs, places, conv.groups, effectual)


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
    flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    coarse = _each(_vectors(flat, granularity), granularity, flat.shape[1]).view(rows.shape)
    return coarse.mT if is_transposed else coarse


def _vectors(mask: Tensor, granularity: int) -> Tensor:
    """Of a mask (N, C, ...) whether vectors along C hold a nonzero: (N, vectors, ...), the last one perhaps shorter."""
    if granularity == 1:
        return mask
    missing = -mask.shape[1] % granularity
    padded = functional.pad(mask, [0, 0] * (mask.ndim - 2) + [0, missing]) if missing else mask
    return padded.unflatten(1, (-1, granularity)).any(2)


def _each(of_vectors: Tensor, granularity: int, channels: int, dim: int = 1) -> Tensor:
    """A number for each vector as one for each of its channels."""
    if granularity == 1:
        return of_vectors
    return of_vectors.repeat_interleave(granularity, dim).narrow(dim, 0, channels)


def _in_groups(mask: Tensor, granularity: int, groups: int) -> Tensor:
    """How many nonzeros each group of channels has at each place, vectors being whole: (N, groups, ...), float32."""
    vectors, channels = _vectors(mask, granularity), mask.shape[1] // groups
    if channels % granularity and groups > 1:
        return _each(vectors, granularity, mask.shape[1]).unflatten(1, (groups, -1)).sum(2, dtype=torch.float32)
    found = vectors.unflatten(1, (groups, -1)).sum(2, dtype=torch.float32) * granularity
    missing = -channels % granularity
    return found - vectors[:, -1:].float() * missing if missing else found


def _windows(x: Tensor, conv: Convolution, kernel: tuple[int, ...]) -> Tensor:
    """Sums of x (N, groups, *spatial) over the taps at each position; exact below 2^24."""
    if not kernel:
        return x
    add = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(kernel)]
    ones = torch.ones(1, 1, *kernel, device=x.device)
    found = add(x.flatten(0, 1).unsqueeze(1), ones, None, conv.stride, conv.padding, conv.dilation)
    return found.view(*x.shape[:2], *found.shape[2:])
