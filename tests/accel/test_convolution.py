"""Convolutions of a datapath: against torch where every order gives the same sums, and against sums written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import accel
from accel import Convolution
from accel.datapath import convolution

ONE, TWO = Convolution((1,), (0,), (1,)), Convolution((1,), (0,), (1,), 2)
CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
CASES = [
    (dims, stride, padding, dilation, groups, kernel)
    for dims, stride, padding, dilation, groups, kernel in itertools.product(
        (1, 2, 3), (1, 2, 3), (0, 1, 4), (1, 2), (1, 2, 4), (1, 2, 3)
    )
    if (dims, kernel) != (3, 3) or groups == 2
]


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def operands(dims: int, stride: int, padding: int, dilation: int, groups: int, kernel: int) -> tuple[Any, ...]:
    """A convolution, small integers as its operands, and its results by torch: exact in any order."""
    spatial = (9, 7, 8)[:dims]
    x = integers(0, 2, 4, *spatial).requires_grad_()
    w = integers(1, 8, 4 // groups, *[kernel] * dims).requires_grad_()
    y = CONVOLVE[dims](x, w, None, stride, padding, dilation, groups)
    dy = integers(2, *y.shape)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    conv = Convolution((stride,) * dims, (padding,) * dims, (dilation,) * dims, groups)
    return conv, x.detach(), w.detach(), dy, y.detach(), dx, dw


@pytest.mark.parametrize("piece", [convolution.PIECE, 40])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_integers_give_what_torch_gives(dims: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "PIECE", piece)
    cases = [case for case in CASES if case[0] == dims][:: 1 if piece > 40 else 7]
    for case in cases:
        conv, x, w, dy, y, dx, dw = operands(*case)
        assert torch.equal(accel.conv_forward(x, w, conv, "fp32"), y), case
        assert torch.equal(accel.conv_dgrad(dy, w, conv, tuple(x.shape[2:]), "fp32"), dx), case
        assert torch.equal(accel.conv_wgrad(x, dy, conv, tuple(w.shape[2:]), "fp32"), dw), case
    assert len(cases) > 12


def test_without_dimensions_they_are_matrix_products() -> None:
    x, w, dy = integers(0, 5, 3), integers(1, 4, 3), integers(2, 5, 4)
    assert torch.equal(accel.conv_forward(x, w, Convolution(), "fp22"), x @ w.t())
    assert torch.equal(accel.conv_dgrad(dy, w, Convolution(), (), "fp22"), dy @ w)
    assert torch.equal(accel.conv_wgrad(x, dy, Convolution(), (), "fp22"), dy.t() @ x)


def in_float16(pairs: list[tuple[float, float]]) -> float:
    """The sum of products in NumPy's float16, one after another; the products are exact."""
    total = np.float16(0)
    for a, b in pairs:
        total = np.float16(np.float32(total) + np.float32(a) * np.float32(b))
    return float(total)


def test_sums_run_over_channels_then_taps_and_over_samples_then_positions() -> None:
    """Each element of the three products, written out in the documented order, of a strided convolution."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (
        accel.quantize(torch.randn(*shape, generator=generator) * 20, "e4m3fn")
        for shape in ((3, 4, 5, 6), (6, 2, 3, 2), (3, 6, 3, 4))
    )
    conv = Convolution((2, 2), (1, 1), (1, 1), 2)
    taps = list(itertools.product(range(3), range(2)))

    def x_at(n: int, c: int, h: int, v: int) -> float:
        return float(x[n, c, h, v]) if 0 <= h < 5 and 0 <= v < 6 else 0.0

    y = accel.conv_forward(x, w, conv, "fp16-acc")
    dx, dw = accel.conv_dgrad(dy, w, conv, (5, 6), "fp16-acc"), accel.conv_wgrad(x, dy, conv, (3, 2), "fp16-acc")
    for n, o, p, q in np.ndindex(3, 6, 3, 4):
        pairs = [
            (x_at(n, o // 3 * 2 + c, 2 * p - 1 + r, 2 * q - 1 + s), float(w[o, c, r, s]))
            for c in range(2)
            for r, s in taps
        ]
        assert float(y[n, o, p, q]) == in_float16(pairs)
    for n, c, h, v in np.ndindex(3, 4, 5, 6):
        group = c // 2
        pairs = [
            (float(dy[n, o, (h + 1 - r) // 2, (v + 1 - s) // 2]), float(w[o, c % 2, r, s]))
            for o in range(3 * group, 3 * group + 3)
            for r, s in reversed(taps)
            if (h + 1 - r) % 2 == 0 and (v + 1 - s) % 2 == 0
            if 0 <= h + 1 - r < 6 and 0 <= v + 1 - s < 8
        ]
        assert float(dx[n, c, h, v]) == in_float16(pairs)
    for o, c, r, s in np.ndindex(6, 2, 3, 2):
        pairs = [
            (x_at(n, o // 3 * 2 + c, 2 * p - 1 + r, 2 * q - 1 + s), float(dy[n, o, p, q]))
            for n, p, q in np.ndindex(3, 3, 4)
        ]
        assert float(dw[o, c, r, s]) == in_float16(pairs)


def test_pieces_change_no_random_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x, w, dy, *_ = operands(2, 2, 1, 1, 2, 3)
    unit = {"accumulator": "e5m3", "rounding": "stochastic"}

    def results(seed: int) -> list[Tensor]:
        words = {"seed": seed, "stream": 5, "step": 7}
        return [
            accel.conv_forward(x, w, conv, unit, **words),
            accel.conv_dgrad(dy, w, conv, tuple(x.shape[2:]), unit, **words),
            accel.conv_wgrad(x, dy, conv, (3, 3), unit, **words),
        ]

    whole = results(1)
    monkeypatch.setattr(convolution, "PIECE", 20)
    assert all(torch.equal(one, other) for one, other in zip(whole, results(1), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(whole, results(2), strict=True))


def test_operands_are_unfolded_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    multiply = convolution.multiply
    monkeypatch.setattr(
        convolution, "multiply", lambda a, b, *rest, **words: sizes.append(a.numel()) or multiply(a, b, *rest, **words)
    )
    monkeypatch.setattr(convolution, "PIECE", 2000)
    x, w, conv = integers(0, 4, 8, 12, 12), integers(1, 6, 8, 3, 3), Convolution((1, 1), (1, 1), (1, 1))
    y = accel.conv_forward(x, w, conv, "fp32")  # 72 x 12 elements a line
    assert (max(sizes), sum(sizes)) == (2 * 12 * 72, 4 * 144 * 72)
    sizes.clear()
    accel.conv_dgrad(y, w, conv, (12, 12), "fp32")
    assert (max(sizes), sum(sizes)) == (3 * 12 * 54, 4 * 144 * 54)
    sizes.clear()
    accel.conv_wgrad(x, y, conv, (3, 3), "fp32")
    assert (max(sizes), sum(sizes)) == (9 * 576, 72 * 576)  # a channel at least


def test_groups_draw_words_of_their_own() -> None:
    x, w = torch.ones(1, 2, 6, 6), torch.full((2, 1, 3, 3), 0.3)
    unit = {"accumulator": "e5m3", "rounding": "stochastic"}
    y = accel.conv_forward(x, w, Convolution((1, 1), (0, 0), (1, 1), 2), unit)
    assert not torch.equal(y[0, 0], y[0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accel.conv_forward(integers(0, 1, 3, 5), integers(1, 2, 2, 3), ONE, "fp32"), "x has 3 channels"),
        (lambda: accel.conv_dgrad(integers(0, 1, 3, 5), integers(1, 2, 2, 3), ONE, (7,), "fp32"), "y has 3 channels"),
        (lambda: accel.conv_dgrad(integers(0, 1, 2, 5), integers(1, 2, 2, 3), ONE, (9,), "fp32"), "does not give"),
        (lambda: accel.conv_wgrad(integers(0, 1, 2, 7), integers(1, 2, 2, 5), ONE, (3,), "fp32"), "does not give"),
        (lambda: accel.conv_forward(integers(0, 1, 2, 5), integers(1, 3, 1, 3), TWO, "fp32"), "groups must divide"),
    ],
)
def test_shapes_that_do_not_fit(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
