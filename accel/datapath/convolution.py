"""Convolutions on a multiply-accumulate unit: the three products of a training step, each as matrix products.

For y = x * w with x (N, C, *spatial), w (O, C / groups, *kernel), y (N, O, *positions), an element is a sum over

    forward   the channels of x, then the taps of the kernel                           K = C / groups * taps
    dgrad     the channels of y, then the taps of the turned kernel that meet a y      K = O / groups * taps / stride
    wgrad     the samples, then the positions of y                                     K = N * positions

in this order, the last dimension fastest: that of an implicit matrix product, which never meets the zeros that a stride
would put between the elements of y. Padding is zeros that are multiplied. Operands are unfolded in pieces of at most
PIECE elements (one row at least), so memory stays bounded; the pieces do not change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as all_combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from accel.datapath import units
from accel.datapath.products import multiply, result_dtype
from accel.datapath.units import AnyMac, Mac

PIECE = 1 << 22  # elements of an unfolded operand that are held at once


class Convolution(NamedTuple):
    """How a kernel moves: by `stride`, over `padding` zeros at both ends, with taps `dilation` apart, one number for
    each spatial dimension; none for a matrix product. groups: channels are multiplied group by group."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def positions(self, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial size of y for that of x. Raises ValueError for a kernel that does not fit in."""
        each = zip(spatial, kernel, self.stride, self.padding, self.dilation, strict=True)
        found = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)
        if min(found, default=1) < 1:
            raise ValueError(f"a kernel of {kernel} does not fit into {spatial} with padding {self.padding}")
        return found


@dataclass(frozen=True)
class Axis:
    """What one spatial dimension of a result reads: result `i` of `count` times `taps` reads the places
    first + i * step + j * tap_step for j = 0 .. len(taps) - 1. target: where the results lie."""

    count: int
    taps: tuple[int, ...]
    first: int
    step: int
    tap_step: int
    target: slice


def forward_axes(conv: Convolution, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> list[Axis]:
    """How each dimension of y reads x."""
    each = zip(conv.positions(spatial, kernel), kernel, conv.padding, conv.stride, conv.dilation, strict=True)
    return [Axis(count, tuple(range(k)), -p, s, d, slice(None)) for count, k, p, s, d in each]


def unfolded(x: Tensor, axes: list[Axis]) -> Tensor:
    """What results read of x (N, C, *spatial), zeros outside of it: (N, *counts, C, *taps), a view where x has all."""
    margins: list[int] = []
    for axis, size in zip(axes, x.shape[2:], strict=True):
        last = axis.first + (axis.count - 1) * axis.step + (len(axis.taps) - 1) * axis.tap_step
        margins = [max(0, -axis.first), max(0, last - size + 1), *margins]
    padded = (pad(x, margins) if any(margins) else x).contiguous()
    strides = padded.stride()
    moves = list(zip(axes, strides[2:], strict=True))
    begin = padded.storage_offset() + sum(max(axis.first, 0) * stride for axis, stride in moves)
    sizes = x.shape[0], *(axis.count for axis in axes), x.shape[1], *(len(axis.taps) for axis in axes)
    steps = [axis.step * stride for axis, stride in moves]
    tap_steps = [axis.tap_step * stride for axis, stride in moves]
    return padded.as_strided(sizes, (strides[0], *steps, strides[1], *tap_steps), begin)


def conv_forward(x: Tensor, w: Tensor, conv: Convolution, mac: AnyMac, **words: int) -> Tensor:
    """y = x * w (see above), of `matmul`'s dtype. words: seed, stream, step, as `matmul` takes them.

    Raises ValueError for shapes that do not fit, and what `matmul` does.
    """
    _check(x.shape[1], w.shape[1] * conv.groups, w.shape[0], conv, "x", "w")
    axes = forward_axes(conv, tuple(x.shape[2:]), tuple(w.shape[2:]))
    described = units.mac(mac)
    out = x.new_empty((x.shape[0], w.shape[0], *(axis.count for axis in axes)), dtype=result_dtype(described))
    return _fill(out, x, w, [axes], conv.groups, described, words)


def conv_dgrad(y: Tensor, w: Tensor, conv: Convolution, spatial: tuple[int, ...], mac: AnyMac, **words: int) -> Tensor:
    """The gradient by x, of that spatial size, for the gradient `y` by y."""
    _check(y.shape[1], w.shape[0], w.shape[1] * conv.groups, conv, "y", "w")
    if conv.positions(spatial, tuple(w.shape[2:])) != tuple(y.shape[2:]):
        raise ValueError(f"a convolution of {spatial} does not give {tuple(y.shape[2:])}")
    each = zip(spatial, w.shape[2:], conv.stride, conv.padding, conv.dilation, strict=True)
    phases = [_dgrad_axes(*one) for one in each]
    turned = w.unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(0, 1)  # (C, O / groups, *kernel)
    described = units.mac(mac)
    out = y.new_zeros((y.shape[0], turned.shape[0], *spatial), dtype=result_dtype(described))
    return _fill(out, y, turned, [list(axes) for axes in all_combinations(*phases)], conv.groups, described, words)


def conv_wgrad(x: Tensor, y: Tensor, conv: Convolution, kernel: tuple[int, ...], mac: AnyMac, **words: int) -> Tensor:
    """The gradient by w, of that kernel, for the gradient `y` by y."""
    if conv.positions(tuple(x.shape[2:]), kernel) != tuple(y.shape[2:]) or x.shape[0] != y.shape[0]:
        raise ValueError(f"a convolution of {tuple(x.shape)} by {kernel} does not give {tuple(y.shape)}")
    _check(x.shape[1], x.shape[1], y.shape[1], conv, "x", "y")
    described = units.mac(mac)
    axes, taps = forward_axes(conv, tuple(x.shape[2:]), kernel), math.prod(kernel)
    rows, columns = x.shape[1] // conv.groups, y.shape[1] // conv.groups
    out = x.new_empty((conv.groups, columns, rows * taps), dtype=result_dtype(described))
    places, nd = y[:, 0].numel(), len(kernel)
    right = y.unflatten(1, (conv.groups, columns)).movedim((1, 2), (0, -1)).reshape(conv.groups, places, columns)
    channels = min(rows, max(1, PIECE // max(1, taps * places)))
    groups = 1 if channels < rows else max(1, PIECE // max(1, rows * taps * places))
    for group in range(0, conv.groups, groups):
        these = slice(group, min(group + groups, conv.groups))
        image = x.unflatten(1, (conv.groups, rows))[:, these]
        for first in range(0, rows, channels):
            some = image[:, :, first : first + channels]
            view = unfolded(some.flatten(1, 2), axes).unflatten(nd + 1, some.shape[1:3])
            left = view.movedim(tuple(range(nd + 1, 2 * nd + 3)), tuple(range(nd + 2))).reshape(
                some.shape[1], some.shape[2] * taps, places
            )
            offset, between = (group * rows + first) * taps * columns, rows * taps * columns
            found = multiply(left, right[these], described, offset=offset, between=between, **words)
            out[these, :, first * taps : first * taps + left.shape[1]] = found.mT
    return out.view(y.shape[1], rows, *kernel)


def _check(channels: int, expected: int, outputs: int, conv: Convolution, first: str, second: str) -> None:
    if channels != expected:
        raise ValueError(f"{first} has {channels} channels, {second} is for {expected}")
    if channels % conv.groups or outputs % conv.groups:
        raise ValueError(f"groups must divide the channels (got {conv.groups} for {channels} and {outputs})")


def _dgrad_axes(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Axis]:
    """How one dimension of dx reads dy: for each remainder by the stride, with the taps that meet a dy there."""
    axes = []
    for phase in range(min(stride, size)):
        taps = tuple(t for t in reversed(range(kernel)) if (phase + padding - t * dilation) % stride == 0)
        first = (phase + padding - taps[0] * dilation) // stride if taps else 0
        tap_step = dilation // math.gcd(dilation, stride)
        axes.append(Axis(len(range(phase, size, stride)), taps, first, 1, tap_step, slice(phase, None, stride)))
    return axes


def _fill(
    out: Tensor, x: Tensor, w: Tensor, phases: list[list[Axis]], groups: int, unit: Mac, words: dict[str, int]
) -> Tensor:
    """out (N, channels, *spatial) = what it reads of x times w (channels, inputs, *kernel), phase by phase; zero where
    no tap reads."""
    rows, columns, offset = x.shape[1] // groups, out.shape[1] // groups, 0
    for axes in phases:
        taken = w
        for dim, axis in enumerate(axes, start=2):
            taken = taken.index_select(dim, torch.tensor(axis.taps, dtype=torch.int64, device=w.device))
        if not taken.numel():
            continue
        places: Any = (..., *(axis.target for axis in axes))
        target = out[places].movedim(1, -1).unflatten(-1, (groups, columns))
        view, matrix = unfolded(x, axes), taken.unflatten(0, (groups, columns)).flatten(2).mT
        done, total = 0, math.prod(view.shape[: 1 + len(axes)])  # rows of a group
        for here in _pieces(view.shape, len(axes), groups * matrix.shape[1]):
            left = view[here].unflatten(len(axes) + 1, (groups, rows)).movedim(len(axes) + 1, 0)
            left = left.reshape(groups, -1, matrix.shape[1])
            number, between = offset + done * columns, total * columns
            found = multiply(left, matrix, unit, offset=number, between=between, **words)
            target[here] = found.movedim(0, 1).reshape(target[here].shape)
            done += left.shape[1]
        offset += groups * total * columns
    return out


def _pieces(shape: torch.Size, axes: int, length: int) -> Iterator[tuple[slice, ...]]:
    """Places of an unfolded operand with `length` elements a row: samples, or lines of one where that is large."""
    samples, counts = shape[0], shape[1 : 1 + axes]
    sample = math.prod(counts) * length
    if sample <= PIECE or not axes:
        step = max(1, PIECE // max(1, sample))
        yield from ((slice(first, first + step),) for first in range(0, samples, step))
        return
    lines = max(1, PIECE // (math.prod(counts[1:]) * length))
    for sample in range(samples):
        for first in range(0, counts[0], lines):
            yield slice(sample, sample + 1), slice(first, first + lines)
