"""Uncommon ways to use a model under emulation."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel
from fpsim.emulation import Emulator, emulate
from fpsim.errors import RunError
from fpsim.scales import largest_magnitude, scale_of

S = {"activations": {"format": "e4m3fn", "rounding": "stochastic"}}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Wired(nn.Module):
    def __init__(self, join, a, b):
        super().__init__()
        self.join, self.a, self.b = join, a, b

    def forward(self, x):
        return self.join(self.a, self.b, x)


def test_a_reader_without_grad_does_not_cut_the_gradient_of_the_next():
    """x.grad / the weight gradients of all layers below are None or wrong, silently."""

    def join(a, b, x):
        hidden = a(x)
        with torch.no_grad():
            target = b(hidden)
        return b(hidden) - target

    model = Wired(join, nn.Linear(4, 4), nn.Linear(4, 4))
    emulate(model, S)
    model(torch.ones(2, 4)).sum().backward()
    assert model.a.weight.grad is not None


def test_direct_calls_of_a_submodule_follow_the_step():
    model = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4, bias=False)))
    handle = emulate(model, {**S, "ledger": {"every_steps": 1}})
    x = torch.randn(50, 4)
    first = model.fc(x)
    handle.step()
    assert not torch.equal(first, model.fc(x))
    handle.step()
    assert handle.ledger.steps == [0, 1]


def test_an_override_with_an_equal_specification_reads_the_same_tensor():
    model, seen = Wired(lambda a, b, x: a(x) + b(x), nn.Linear(4, 4), nn.Linear(4, 4)), []
    emulate(model, {**S, "overrides": [{"match": "b", **S}]})
    for layer in (model.a, model.b):
        layer.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach()))
    model(torch.randn(50, 4))
    assert torch.equal(*seen)


def test_the_input_of_a_layer_above_a_frozen_one_was_written():
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
    model.a.requires_grad_(False)
    handle = emulate(model, {"ledger": {"every_steps": 1}})
    model(torch.ones(2, 4)).sum().backward()
    handle.step()
    rows = [r for r in handle.ledger.records if (r.layer, r.role, r.pass_name) == ("b", "activation", "forward")]
    assert [r.writes for r in rows] == [1]


@pytest.mark.parametrize("dim", [None, 0])
def test_amax_stays_finite_for_formats_that_end_below_one(dim):
    fmt = accel.format({"exponent_bits": 4, "mantissa_bits": 3, "bias": 31, "policy": "fn"})
    x = torch.tensor([[2.0**127, 1.0]])
    assert float(scale_of(x, fmt, "amax", largest_magnitude(x, dim), dim)) == 2.0**127


@pytest.mark.parametrize(
    ("role", "tensor"), [("weights", "weight"), ("activations", "activations"), ("gradients", "gradient")]
)
def test_a_tensor_that_its_codec_cannot_hold_is_named(role, tensor):
    model = nn.Sequential(nn.Linear(8, 4))
    emulate(model, {role: {"format": "e4m3fn", "codec": "nm(1:4)", "scale": "amax"}})
    with pytest.raises(RunError, match=f"{tensor} of layer '0': the group of 4 elements at element 0 "):
        model(torch.ones(2, 8, requires_grad=True)).square().sum().backward()


def test_autocast_is_refused_where_the_input_is_float32():
    """A single layer, or every layer after a LayerNorm, gets float32 under autocast and multiplies in bfloat16."""
    model = nn.Sequential(nn.Linear(4, 4))
    emulate(model, S)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RunError, match="autocast"):
        model(torch.ones(2, 4))


def test_a_layer_that_is_not_emulated_may_return_what_it_likes():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = nn.Sequential(Pair(4, 4))
    emulate(model, {"ledger": {"every_steps": 1}})
    model(torch.ones(2, 4))


def test_a_restored_state_draws_the_words_of_its_step():
    spec = {"weights": {"format": "e4m3fn", "rounding": "stochastic"}}
    model = nn.Sequential(nn.Linear(40, 4, bias=False))
    handle = emulate(model, spec)
    at_0 = model(torch.eye(40))
    handle.load_state_dict({**handle.state_dict(), "step": 5})
    assert not torch.equal(at_0, model(torch.eye(40)))


def test_the_older_weight_norm_is_named_as_well():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="stay float32: 0"):
        emulate(nn.Sequential(layer, nn.Linear(4, 4)), S)


# --- what the ledger counts once -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three layers that read one tensor, in the formats that overrides give them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.q(h) + self.k(h) + self.v(h)


EVERY_STEP: dict[str, Any] = {"ledger": {"every_steps": 1}}


@pytest.mark.parametrize("other", ["q", "k", "v"])
def test_a_tensor_is_written_once_in_each_format_whoever_reads_first(other: str) -> None:
    model = Attention()
    overrides = [{"match": other, "activations": {"format": "e5m2"}}]
    handle = emulate(model, {"activations": {"format": "e4m3fn"}, "overrides": overrides, **EVERY_STEP})
    model(torch.randn(16, 64)).sum().backward()
    reads = [
        r for r in handle.ledger.records if (r.role, r.pass_name) == ("activation", "forward") and r.layer in "qkv"
    ]
    assert [r.reads for r in reads] == [1, 1, 1]
    assert sum(r.writes for r in reads) == sum(r.resident for r in reads) == 2


def test_a_tensor_that_two_normalise_is_kept_once() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.first, self.second = nn.Linear(64, 64), nn.LayerNorm(64), nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.first(h) + self.second(h)

    model = Branches()
    handle = emulate(model, EVERY_STEP)
    model(torch.randn(16, 64)).sum().backward()
    kept = [r for r in handle.ledger.records if r.role == "norm_input"]
    assert [(r.writes, r.reads, r.resident) for r in kept] == [
        (1, 0, True),
        (0, 1, False),
        (0, 0, False),
        (0, 1, False),
    ]


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_step_that_begins_anew_counts_anew(is_interrupted: bool) -> None:
    model, x = Attention(), torch.randn(16, 64)

    def step(handle: Emulator) -> list[Any]:
        model(x).sum().backward()
        handle.step()
        return handle.ledger.records

    handle = emulate(model, EVERY_STEP)
    expected = step(handle)
    handle.detach()
    handle = emulate(model, EVERY_STEP)
    if is_interrupted:
        stop = model.v.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        stop.remove()
    else:
        model(x)
    handle.restart_step()
    assert handle.ledger.records == []
    assert step(handle) == expected
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
