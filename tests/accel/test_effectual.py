"""Effectual multiply-accumulates against convolutions of the masks, which multiply every pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from accel import Convolution
from accel.effectual import count_dgrad, count_forward, count_wgrad
from accel.ledger import GRANULARITIES

CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def coarse(mask: Tensor, granularity: int) -> Tensor:
    """Vectors along dimension 1, one by one."""
    out = mask.clone()
    for first in range(0, mask.shape[1], granularity):
        some = slice(first, first + granularity)
        out[:, some] = mask[:, some].any(1, keepdim=True)
    return out


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_pass_counts_what_the_masks_multiply(dims: int, stride: int) -> None:
    generator, spatial = torch.Generator().manual_seed(dims), (6, 5, 7)[:dims]
    for padding, dilation, groups, kernel in itertools.product((0, 1, 3), (1, 2), (1, 2), (1, 3)):
        conv = Convolution((stride,) * dims, (padding,) * dims, (dilation,) * dims, groups)
        x = torch.rand(2, 10, *spatial, generator=generator) < 0.2
        w = torch.rand(6, 10 // groups, *[kernel] * dims, generator=generator) < 0.3
        y = torch.rand(2, 6, *conv.positions(spatial, (kernel,) * dims), generator=generator) < 0.1
        forward, dgrad, wgrad = (
            count_forward(x, w, conv),
            count_dgrad(y, w, conv),
            count_wgrad(x, y, conv, (kernel,) * dims),
        )
        macs = y.numel() * w[0].numel()
        assert all(one.rows * one.columns * one.length * groups == macs for one in (forward, dgrad, wgrad))
        for of in GRANULARITIES:
            some_x, some_w = coarse(x, of).double(), coarse(w, of).double()
            some_y = coarse(y, of).double()
            xs, ws = some_x.requires_grad_(), some_w.requires_grad_()
            products = CONVOLVE[dims](xs, ws, None, stride, padding, dilation, groups)
            by_x, by_w = torch.autograd.grad(products, (xs, ws), some_y)
            dense_w = CONVOLVE[dims](some_x, torch.ones_like(some_w), None, stride, padding, dilation, groups)
            assert forward.effectual[of].both == int(products.sum())
            assert forward.effectual[of].first == int(dense_w.sum()) == wgrad.effectual[of].first
            assert forward.effectual[of].second == int(some_w.sum()) * (y.numel() // 6) == dgrad.effectual[of].second
            assert dgrad.effectual[of].first == int(some_y.sum()) * w[0].numel() == wgrad.effectual[of].second
            assert wgrad.effectual[of].both == int(by_w.sum())
            if padding == 0:
                assert dgrad.effectual[of].both == int(by_x.sum())
            else:  # and pairs whose sum lies in the padding
                assert dgrad.effectual[of].both >= int(by_x.sum())


def test_linear_by_hand() -> None:
    x = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    w = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    y = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    forward = count_forward(x, w, Convolution())
    assert forward[:4] == (2, 3, 5, 1)
    assert forward.effectual[1] == (9, 8, 3)
    assert forward.effectual[4] == ((4 + 1) * 3, (4 + 5) * 2, 4 * 2 + 1)  # vectors 0-3 and 4 of each row
    dgrad = count_dgrad(y, w, Convolution())
    assert dgrad[:4] == (2, 5, 3, 1)
    assert dgrad.effectual[1] == (15, 8, 4)
    wgrad = count_wgrad(x, y, Convolution(), ())
    assert wgrad[:4] == (5, 3, 2, 1)
    assert wgrad.effectual[1] == (9, 15, 2 * 2 + 1 * 1)
    assert wgrad.effectual[32] == (30, 30, 30)


def test_nothing_is_counted_of_nothing() -> None:
    x, w = torch.zeros(0, 4, 5, dtype=torch.bool), torch.ones(2, 4, 3, dtype=torch.bool)
    counted = count_forward(x, w, Convolution((1,), (0,), (1,)))
    assert counted.rows == 0
    assert set(counted.effectual.values()) == {(0, 0, 0)}
