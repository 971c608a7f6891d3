"""Multiply-accumulates that zeros leave over, counted exactly from the operands of a training step.

For y = x * w (see `accel.datapath.convolution`) each pass multiplies the same pairs: forward (x, w), dgrad (y, w),
wgrad (x, y), the gradients in the places of their tensors. A pair counts where both are nonzero; NaN is nonzero. Where
x is padding it is zero. A sum over pairs is a sum of products of sums, so nothing is multiplied out.

A vector of `granularity` neighbours along the channels (of w along its inputs) counts as nonzero as a whole when one of
them is: what hardware sees that skips whole vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accel.datapath.convolution import Convolution, forward_axes, unfolded
from accel.ledger import GRANULARITIES, Effectual


def by_granularity(mask: Tensor) -> dict[int, Tensor]:
    """mask (N, C, ...), whether elements are nonzero, with its vectors of each granularity along C as a whole."""
    return {granularity: _coarse(mask, granularity) for granularity in GRANULARITIES}


def _coarse(mask: Tensor, granularity: int) -> Tensor:
    if granularity == 1:
        return mask
    channels = mask.shape[1]
    padded = torch.nn.functional.pad(mask, [0, 0] * (mask.ndim - 2) + [0, -channels % granularity])
    return padded.unflatten(1, (-1, granularity)).any(2).repeat_interleave(granularity, 1)[:, :channels]


def effectual_forward(x: Tensor, w: Tensor, conv: Convolution) -> Effectual:
    """Of the products of x (N, C, *spatial) and w (O, C / groups, *kernel), both masks (bool)."""
    axes = forward_axes(conv, tuple(x.shape[2:]), tuple(w.shape[2:]))
    at_places = unfolded(x.sum(0, keepdim=True), axes)  # (1, *positions, C, *taps)
    of_x = at_places.flatten(1, len(axes)).sum(1)[0] if axes else at_places[0]  # (C, *taps)
    of_w = w.unflatten(0, (conv.groups, -1)).sum(1).flatten(0, 1)  # (C, *taps)
    places = x.shape[0] * math.prod(axis.count for axis in axes)
    outputs = w.shape[0] // conv.groups
    return Effectual(int(of_x.sum()) * outputs, int(w.sum()) * places, int((of_x * of_w).sum()))


def effectual_dgrad(y: Tensor, w: Tensor, conv: Convolution) -> Effectual:
    """Of the products of y (N, O, *positions) and w, both masks; those whose sums lie in the padding count, too."""
    by_output, of_w = y.transpose(0, 1).flatten(1).sum(1), w.flatten(1).sum(1)
    places = y.numel() // max(1, y.shape[1])
    return Effectual(int(by_output.sum()) * w[:1].numel(), int(of_w.sum()) * places, int((by_output * of_w).sum()))


def effectual_wgrad(x: Tensor, y: Tensor, conv: Convolution, kernel: tuple[int, ...]) -> Effectual:
    """Of the products of x and y, both masks."""
    axes = forward_axes(conv, tuple(x.shape[2:]), kernel)
    by_group = x.unflatten(1, (conv.groups, -1)).sum(2, dtype=torch.int32)
    windows = unfolded(by_group, axes)  # (N, *positions, groups, *taps)
    of_x = windows.flatten(len(axes) + 2).sum(-1) if axes else windows  # (N, *positions, groups)
    of_y = y.unflatten(1, (conv.groups, -1)).sum(2).movedim(1, -1)
    inputs = x.shape[1] // conv.groups * math.prod(kernel)
    outputs = y.shape[1] // conv.groups
    return Effectual(int(of_x.sum()) * outputs, int(y.sum()) * inputs, int((of_x * of_y).sum()))
