"""quantize, prune and prune_quantize as operators of torch: gradients, torch.compile, fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import accel
from accel.kernels.cpu import CHUNK

WORDS = (1, 2, 3, 0)
ROUNDING = ("stochastic", "saturate", 32, "none")
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "quantize": ("e4m3fn", None, torch.tensor([[0.5], [2.0], [1.0]]), None, *ROUNDING, *WORDS, "straight_through"),
    "prune": (0.7, *WORDS),
    "prune_quantize": (0.7, "e5m2", 0.25, None, *ROUNDING, *WORDS, "clipped"),
}
INT8 = accel.format("int8")
CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "quantize": lambda x, **more: accel.quantize(x, "e4m3fn", rounding="stochastic", scale=0.5, **more),
    "described": lambda x, **more: accel.quantize(x, {"exponent_bits": 3, "mantissa_bits": 2}, **more),
    "format": lambda x, **more: accel.quantize(x, INT8, **more),
    "blocks": lambda x, **more: accel.quantize(x, "mxfp4", **more),
    "prune": lambda x, **more: accel.prune(x, 0.7, **more),
    "prune_quantize": lambda x, **more: accel.prune_quantize(x, 0.7, "e5m2", **more)[0],
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_operators_keep_the_rules_of_torch(name: str) -> None:
    """Schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes: torch's own check of operators."""
    operator = getattr(torch.ops.accel, name).default
    for x in (numbers(3, 40), numbers(3, 40).requires_grad_(), numbers(40, 3).t()):
        results = torch.library.opcheck(operator, (x, *ARGUMENTS[name]))
        assert set(results.values()) == {"SUCCESS"}


@calls
def test_gradients_pass_straight_through(call: Callable[..., torch.Tensor]) -> None:
    x = numbers(4, 50).requires_grad_()
    weights = numbers(4, 50) + 2
    (call(x) * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)


@pytest.mark.parametrize(("scale", "limit"), [(None, 6.0), (0.5, 3.0), (torch.tensor([0.5, 1.0]), None)])
def test_clipped_gradients_stop_beyond_the_range(scale: Any, limit: float | None) -> None:
    x = torch.tensor([[2.9, 2.9], [3.1, 3.1], [-6.1, -6.1], [5.9, 6.0]], requires_grad=True)
    limits = torch.tensor([3.0, 6.0]) if limit is None else torch.tensor(limit)
    expected = (x.detach().abs() <= limits).float()
    accel.quantize(x, "e2m1", scale=scale, gradient="clipped").sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    x.grad = None
    accel.prune_quantize(x, 0.1, "e2m1", scale=scale, gradient="clipped")[0].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


def test_clipping_follows_the_format_s_own_range() -> None:
    x = torch.tensor([-129.0, -128.0, 127.0, 128.0, -1.0], requires_grad=True)
    accel.quantize(x, "int8", gradient="clipped").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0, 1]
    x.grad = None
    accel.quantize(x, "uint8", gradient="clipped").sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 0]


def test_unknown_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown gradient 'clip'.*did you mean 'clipped'"):
        accel.quantize(torch.ones(3), "e4m3fn", gradient="clip")
    with pytest.raises(ValueError, match=r"gradient 'clipped' takes a scalar format .got the block format 'mxfp4'"):
        accel.quantize(torch.ones(3), "mxfp4", gradient="clipped")


@calls
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_code_gives_the_same_bits(call: Callable[..., torch.Tensor]) -> None:
    """As one graph, with a step that changes at every call, forward and backward."""

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        return (call(x * 2, step=step) * x).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = numbers(8, 64)
    for step in range(4):
        plain, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss(plain, step).backward()
        compiled(other, step).backward()
        assert plain.grad is not None
        assert other.grad is not None
        assert torch.equal(other.grad, plain.grad)


@calls
def test_fake_and_meta_tensors_tell_shape_dtype_and_strides(call: Callable[..., torch.Tensor]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if dtype != torch.float32 and call is CALLS["prune_quantize"]:
            continue
        x = numbers(4, 6, 8).to(dtype).transpose(0, 1)
        if dtype == torch.float32 or call is not CALLS["prune"]:
            real = call(x)
            with FakeTensorMode() as mode:
                fake = call(mode.from_tensor(x))
            for other in (fake, call(x.to("meta"))):
                assert (other.shape, other.dtype, other.stride()) == (real.shape, real.dtype, real.stride())


def test_counts_are_part_of_the_operator() -> None:
    x = numbers(3 * CHUNK + 5)
    rounded, counts = accel.prune_quantize(x, 0.7, "e5m2")
    assert counts.nonzeros.tolist() == [int((part != 0).sum()) for part in rounded.split(CHUNK)]
    alphas = (rounded.abs() == torch.tensor(0.7)).split(CHUNK)
    assert counts.alphas.tolist() == [int(part.sum()) for part in alphas]
    columns = x[: 3 * CHUNK].view(CHUNK, 3).t()
    rounded, counts = accel.prune_quantize(columns, 0.7, "e5m2")
    assert counts.nonzeros.tolist() == [int((part != 0).sum()) for part in rounded.reshape(-1).split(CHUNK)]


def test_seeds_beyond_63_bits() -> None:
    x = numbers(100)
    for seed in ((1 << 63) + 5, (1 << 64) - 1):
        expected = accel.quantize(x, "e4m3fn", rounding="stochastic", seed=seed, out=torch.empty_like(x))
        assert torch.equal(accel.quantize(x, "e4m3fn", rounding="stochastic", seed=seed), expected)
