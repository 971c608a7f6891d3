"""Scales and formats that follow from earlier steps: delayed scales, adaptive exponent bits; and constant scales."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel
import fpsim
from fpsim.config import parse_emulation
from fpsim.errors import ConfigError, NonFiniteError
from fpsim.float_choice import best_exponent_bits


class Probe(nn.Module):
    """A layer whose dY is what the test says, and which keeps the dY that comes back out of the emulation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def gradients_of(spec: dict[str, Any], given: list[Tensor], epochs: tuple[int, ...] = ()) -> tuple[list[Tensor], Any]:
    """The weight gradients of x = identity, which are the rounded dY transposed, a step each."""
    model = Probe()
    handle = fpsim.emulate(model, {"gradients": spec})
    found = []
    for step, dy in enumerate(given):
        if step in epochs:
            handle.next_epoch()
        model.zero_grad()
        model(torch.eye(8)).backward(dy)
        assert model.layer.weight.grad is not None
        found.append(model.layer.weight.grad.T.clone())
        handle.step()
    return found, handle


def lognormal(sigma_log2: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.randn(8, 512, generator=generator) * sigma_log2 - 12)


def test_a_delayed_scale_is_that_of_the_largest_before() -> None:
    given = [torch.full((8, 512), value) for value in (2.0, 8.0, 1.0, 1.0, 1.0)]
    given = [dy * torch.linspace(0.1, 1, 512) for dy in given]
    fmt = accel.format("e4m3fn")
    found, _ = gradients_of({"format": "e4m3fn", "scale": "delayed", "scale_history": 2}, given)
    for step, largest in enumerate((2.0, 2.0, 8.0, 8.0, 1.0)):  # its own; 2; 2, 8; 8, 1; 1, 1
        expected = accel.quantize(given[step], fmt, scale=largest / fmt.max)
        assert torch.equal(found[step], expected), step
    assert float(found[1].max()) == 2.0  # saturated


def test_evaluation_uses_a_delayed_scale_and_leaves_it() -> None:
    model = Probe()
    handle = fpsim.emulate(model, {"activations": {"format": "e4m3fn", "scale": "delayed"}})
    model(torch.eye(8)).sum().backward()
    handle.step()
    before = handle.state_dict()["largest"]
    model.eval()
    model(100 * torch.eye(8))
    model.train()
    handle.step()
    assert handle.state_dict()["largest"] == before == {"layer/activation": (16, [1.0])}


def test_a_restarted_step_forgets_its_largest() -> None:
    model = Probe()
    handle = fpsim.emulate(model, {"activations": {"format": "e4m3fn", "scale": "delayed"}})
    model(100 * torch.eye(8))
    handle.restart_step()
    model(torch.eye(8))
    handle.step()
    assert handle.state_dict()["largest"] == {"layer/activation": (16, [1.0])}


def test_evaluation_between_steps_and_a_resume_change_nothing() -> None:
    """Of a delayed scale of weights, which one step rounds once."""
    spec = {"weights": {"format": "e4m3fn", "scale": "delayed", "scale_history": 2}}

    def train(evaluates: bool, resumes: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        handle, found = fpsim.emulate(model, spec), []
        for step in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            handle.step()
            found.append(model[0].weight.detach().clone())
            if evaluates:
                model.eval()
                model(torch.randn(3, 6, generator=torch.Generator().manual_seed(99)))
                model.train()
            if resumes:
                state = json.loads(json.dumps(handle.state_dict()))
                handle.detach()
                handle = fpsim.emulate(model, spec)
                handle.load_state_dict(state)
        return found

    expected = train(evaluates=False, resumes=False)
    for evaluates, resumes in ((True, False), (False, True), (True, True)):
        assert all(map(torch.equal, train(evaluates, resumes), expected))


def test_a_history_of_zeros_is_none() -> None:
    dy = lognormal(1.0, 0)
    spec = {"format": "e4m3fn", "scale": "delayed"}
    found, _ = gradients_of(spec, [torch.zeros(8, 512), dy])
    fmt = accel.format("e4m3fn")
    assert torch.equal(found[1], accel.quantize(dy, fmt, scale=float(dy.max()) / fmt.max))


def test_what_is_not_finite_is_one_clear_error_before_a_format_is_chosen() -> None:
    dy = lognormal(1.0, 0)
    dy[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="layer"):
        gradients_of({"format": "e5m2", "scale": "lognormal_error", "adapt": "epoch"}, [dy])


def test_a_state_of_an_earlier_fpsim() -> None:
    model = Probe()
    handle = fpsim.emulate(model, {"weights": {"format": "e4m3fn", "scale": "delayed"}})
    handle.load_state_dict({"step": 5, "pruning": {}})
    assert handle.step_number == 5


def test_a_constant_scale() -> None:
    dy = lognormal(1.0, 0)
    found, _ = gradients_of({"format": "e5m2", "scale": 2.0**-10}, [dy])
    assert torch.equal(found[0], accel.quantize(dy, "e5m2", scale=2.0**-10))


@pytest.mark.parametrize("adapt", [2, "epoch"])
@pytest.mark.parametrize("fmt", ["e5m2", "e3m2", "e2m1"])
def test_formats_are_chosen_when_that_is_due(fmt: str, adapt: int | str) -> None:
    """By the spread of the tensor at hand: what comes between two choices is rounded in the format before."""
    sigmas = (0.6, 5.0, 5.0, 0.6)
    given = [lognormal(sigma, step) for step, sigma in enumerate(sigmas)]
    spec = {"format": fmt, "scale": "lognormal_error", "adapt": adapt}
    found, handle = gradients_of(spec, given, epochs=(2,))
    width = accel.format(fmt)
    for step, of_step in enumerate((0, 0, 2, 2)):
        logs = given[of_step].double().log2()
        bits = int(best_exponent_bits(width.bits, round(float(logs.std()) * 16) / 16, policy=width.policy))
        chosen = accel.format({"exponent_bits": bits, "mantissa_bits": width.bits - 1 - bits, "policy": width.policy})
        alone, _ = gradients_of({"format": _spec(chosen), "scale": "lognormal_error"}, [given[step]])
        assert torch.equal(found[step], alone[0]), step
    (summary,) = handle.gradient_formats
    assert summary["renewals"] == 2
    assert summary["layer"] == "layer"


def _spec(fmt: Any) -> dict[str, Any]:
    return {
        "exponent_bits": fmt.exponent_bits, "mantissa_bits": fmt.mantissa_bits, "bias": fmt.bias, "policy": fmt.policy,
    }  # fmt: skip


def test_zeros_leave_the_format() -> None:
    spec = {"format": "e5m2", "scale": "lognormal_error", "adapt": 1}
    _, handle = gradients_of(spec, [torch.zeros(8, 512), lognormal(1.0, 0), torch.zeros(8, 512)])
    (summary,) = handle.gradient_formats
    assert summary["renewals"] == 1
    assert summary["format"] == "e3m4"


def test_pruning_and_the_ledger_take_the_format_in_force() -> None:
    spec = {
        "format": "e5m2", "scale": "lognormal_error", "adapt": 1, "codec": "alpha", "pruning": {"sparsity": 0.8},
    }  # fmt: skip
    _, handle = gradients_of(spec, [lognormal(0.6, 0)])
    chosen = handle.gradient_formats[0]["format"]
    stored = {one.stored.format for one in handle.ledger.records if one.role == "gradient"}
    assert stored == {chosen}
    assert chosen != "e5m2"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"format": "e5m2", "scale": "amx"}, "gradients.scale: must be none, amax, power_of_two, lognormal_mean"),
        ({"format": "e5m2", "scale": True}, "gradients.scale: must be none, amax"),
        ({"format": "e5m2", "scale": 0.0}, "gradients.scale"),
        ({"format": "e5m2", "scale": -1.0}, "gradients.scale"),
        ({"format": "e5m2", "scale_history": 4}, "gradients.scale_history: is for scale delayed (got 'none')"),
        ({"format": "e5m2", "scale": "delayed", "scale_history": 0}, "gradients.scale_history"),
        (
            {"format": "e5m2", "scale": "delayed", "granularity": "channel"},
            "gradients.granularity: must be 'tensor' with scale delayed (got 'channel')",
        ),
        (
            {"format": "fp32", "scale": "lognormal_error"},
            "gradients.scale: lognormal_error is for formats up to 16 bits",
        ),
        ({"format": "mxfp4", "scale": 2.0}, "gradients.scale: must be 'none' with the block format 'mxfp4'"),
        ({"format": "int8", "adapt": 5}, "gradients.adapt: is for signed floating-point formats"),
        ({"format": "mxfp4", "adapt": 5}, "gradients.adapt: is for signed floating-point formats"),
        ({"format": "fp32", "adapt": 5}, "gradients.adapt: is for formats of 3 to 8 bits (got 'fp32' of 32)"),
        ({"format": "e5m2", "adapt": 0}, "gradients.adapt"),
        ({"format": "e5m2", "adapt": 5}, "gradients.adapt: needs scale lognormal_error, at which formats compare"),
        ({"format": "e5m2", "adapt": 5, "scale": "amax"}, "gradients.adapt: needs scale lognormal_error"),
        (
            {"format": {"exponent_bits": 3, "mantissa_bits": 2, "subnormals": False}, "adapt": 5},
            "gradients.adapt: is for formats with subnormals",
        ),
        (
            {"format": "e5m2", "scale": "lognormal_error", "overflow": "ieee"},
            "gradients.overflow: must be 'saturate' with scale lognormal_error (got 'ieee')",
        ),
        ({"format": "e5m2", "adapt": "never"}, "gradients.adapt: must be a number of steps or 'epoch'"),
    ],
)
def test_mistakes(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_emulation({"gradients": spec})
    assert message in str(error.value)
