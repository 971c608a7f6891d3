"""Uncommon ways to use a model under emulation."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import accel
from fpsim.emulation import emulate
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
    handle.load_state_dict({"step": 5, "pruning": {}})
    assert not torch.equal(at_0, model(torch.eye(40)))


def test_the_older_weight_norm_is_named_as_well():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="stay float32: 0"):
        emulate(nn.Sequential(layer, nn.Linear(4, 4)), S)
