"""Squares of per-sample weight gradients, summed over a batch: exact, without a model that is run sample by sample.

A layer's weight gradient is the sum over the batch of h_b, which depends on the b-th input and the b-th gradient at the
output alone. Normalisation over the batch mixes samples: there dY of one sample carries the others, and h_b is no
sample's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_ELEMENTS = 1 << 24  # of the per-sample gradients that are held at once


def sum_of_squares(module: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """sum_b h_b^2 elementwise, in the shape of module.weight.

    module: Linear (any dimensions between batch and features), Conv1d/2d, Embedding, or another layer whose output is a
    function of its weight and of one input; then `torch.func` differentiates it sample by sample. x: its input, dy: the
    gradient at its output, both with the batch as dimension 0. Raises ValueError for an Embedding that scales gradients
    by frequency: a sample's depends on the others.
    """
    with torch.no_grad():
        if isinstance(module, nn.Embedding):
            if module.scale_grad_by_freq:
                raise ValueError("an Embedding with scale_grad_by_freq has no gradient of a single sample")
            return _embedding(module, x, dy)
        if isinstance(module, nn.Linear):
            if x.ndim == 2:
                return dy.square().mT @ x.square()
            pairs = dy.flatten(1, -2), x.flatten(1, -2)
            return _summed(module.weight, *pairs, lambda dy, x: torch.bmm(dy.mT, x))
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros":
            return _convolution(module, x, dy)
        return _any(module, x, dy)


def _summed(weight: Tensor, dy: Tensor, x: Tensor, gradients) -> Tensor:  # type: ignore[no-untyped-def]
    """Of gradients(dy, x), a weight's gradient a sample, by as many samples as fit."""
    total = torch.zeros_like(weight)
    count = max(1, MOST_ELEMENTS // max(weight.numel(), 1))
    for some_dy, some_x in zip(dy.split(count), x.split(count), strict=True):
        total += gradients(some_dy, some_x).square_().sum(0).view_as(weight)
    return total


def _convolution(module: nn.Conv1d | nn.Conv2d, x: Tensor, dy: Tensor) -> Tensor:
    """h_b = dY_b unfold(X_b)^T, group by group."""
    if isinstance(module, nn.Conv1d):
        x, dy = x.unsqueeze(-2), dy.unsqueeze(-2)
    kernel, stride, dilation = ((1,) * (2 - len(pair)) + tuple(pair) for pair in _sizes(module))
    before, after = _padding(module)
    groups = module.groups

    def gradients(dy: Tensor, x: Tensor) -> Tensor:
        columns = functional.unfold(x, kernel, dilation, 0, stride)
        columns = columns.unflatten(1, (groups, -1)).flatten(0, 1)
        products = torch.bmm(dy.flatten(2).unflatten(1, (groups, -1)).flatten(0, 1), columns.mT)
        return products.unflatten(0, (-1, groups))

    return _summed(module.weight, dy, functional.pad(x, [*_both(before, after)]), gradients)


def _sizes(module: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return module.kernel_size, module.stride, module.dilation


def _padding(module: nn.Conv1d | nn.Conv2d) -> tuple[list[int], list[int]]:
    """Zeros before and after, by spatial dimension."""
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [total // 2 for total in totals], [total - total // 2 for total in totals]
    sides = [0] * len(module.kernel_size) if module.padding == "valid" else [int(p) for p in module.padding]
    return sides, sides


def _both(before: list[int], after: list[int]) -> list[int]:
    """As `functional.pad` takes it: the last dimension first."""
    return [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]


def _embedding(module: nn.Embedding, x: Tensor, dy: Tensor) -> Tensor:
    """Rows that a sample looks up more than once are added up before they are squared."""
    batch, rows = x.shape[0], module.num_embeddings
    sample = torch.arange(batch, device=x.device).view(-1, *[1] * (x.ndim - 1))
    found, place = torch.unique((sample * rows + x).flatten(), return_inverse=True)
    sums = dy.new_zeros(len(found), dy.shape[-1]).index_add_(0, place, dy.flatten(0, -2))
    total = torch.zeros_like(module.weight).index_add_(0, found % rows, sums.square_())
    if module.padding_idx is not None:
        total[module.padding_idx] = 0
    return total


def _any(module: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    others = {name: value.detach() for name, value in [*module.named_parameters(), *module.named_buffers()]}
    weight = others.pop("weight")

    def one(dy: Tensor, x: Tensor) -> Tensor:
        def output(weight: Tensor) -> Tensor:
            return torch.func.functional_call(module, {**others, "weight": weight}, x.unsqueeze(0))

        (gradient,) = torch.func.vjp(output, weight)[1](dy.unsqueeze(0))
        return gradient

    return _summed(weight, dy, x, torch.func.vmap(one))
