"""The emulated layer against the same products written by hand with accel, bit for bit; what emulation leaves alone."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import accel
import fpsim
from accel import Ledger
from fpsim.emulation import Emulator, emulate
from fpsim.errors import ConfigError, NonFiniteError, RunError
from fpsim.gradients import thresholds
from fpsim.layers import PatternError

SEED = 11
FORWARD = {"format": "e4m3fn", "rounding": "stochastic", "scale": "power_of_two"}
GRADIENTS = {
    "format": "e5m2",
    "rounding": "stochastic",
    "scale": "amax",
    "codec": "alpha",
    "pruning": {"sparsity": 0.7},
}
SPEC: dict[str, Any] = {"weights": {**FORWARD, "scale": "amax"}, "activations": FORWARD, "gradients": GRADIENTS}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def amax_scale(x: Tensor, fmt: str) -> float:
    """max|x| over the format's maximum, rounded up where the quotient with it would exceed that maximum."""
    amax, largest = np.float32(x.detach().abs().max()), np.float32(accel.format(fmt).max)
    scale = amax / largest
    return float(np.nextafter(scale, np.float32(np.inf)) if amax / scale > largest else scale)


def power_of_two_scale(x: Tensor, fmt: str) -> float:
    return 2.0 ** math.ceil(math.log2(float(x.detach().abs().max()) / accel.format(fmt).max))


def rounded_input(x: Tensor, name: str, step: int) -> Tensor:
    scale = power_of_two_scale(x, "e4m3fn")
    words = {"seed": SEED, "stream": accel.stream_id(name), "step": step}
    return accel.quantize(x.detach(), "e4m3fn", rounding="stochastic", scale=scale, **words)


def rounded_weight(weight: Tensor, name: str, step: int) -> Tensor:
    words = {"seed": SEED, "stream": accel.stream_id(name), "step": step}
    scale = amax_scale(weight, "e4m3fn")
    return accel.quantize(weight.detach(), "e4m3fn", rounding="stochastic", scale=scale, **words)


def pruned_gradient(dy: Tensor, name: str, step: int, alpha: float | None = None) -> Tensor:
    """alpha: None where the threshold is renewed from this very tensor."""
    alpha = thresholds.empirical(dy.numpy(), 0.7) if alpha is None else alpha
    words = {"seed": SEED, "stream": accel.stream_id(name), "step": step}
    scale = amax_scale(dy, "e5m2")
    return accel.prune_quantize(dy, alpha, "e5m2", rounding="stochastic", scale=scale, **words)[0]


def following_alpha(dy: Tensor, renewed: Tensor) -> float:
    """The threshold of dy where it was renewed with another tensor: as far above the 0.7-quantile as it was then."""
    first, now = (float(t.abs().reshape(-1).sort().values[int(0.7 * t.numel())]) for t in (renewed, dy))
    return thresholds.empirical(renewed.numpy(), 0.7) / first * now


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


# --- forward and backward by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_linear_by_hand(bias: bool) -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(12, 7, bias=bias)))
    handle = emulate(model, SPEC, seed=SEED)
    renewed = None
    for step in range(3):
        x, dy = torch.randn(9, 12, requires_grad=True), torch.randn(9, 7)
        model.zero_grad()
        y = model(x)
        y.backward(dy)
        handle.step()

        qx, qw = rounded_input(x, "fc/activation", step), rounded_weight(model.fc.weight, "fc/weight", step)
        alpha = thresholds.empirical(dy.numpy(), 0.7) if renewed is None else following_alpha(dy, renewed)
        renewed = dy if renewed is None else renewed  # for ten steps
        qdy = pruned_gradient(dy, "fc/gradient", step, alpha)
        assert not torch.equal(qx, x)
        assert (qdy == 0).float().mean() > 0.4
        assert torch.equal(y, functional.linear(qx, qw, model.fc.bias))
        assert torch.equal(gradient_of(x), qdy @ qw)
        assert torch.equal(gradient_of(model.fc.weight), qdy.T @ qx)
        if bias:
            assert torch.equal(gradient_of(model.fc.bias), qdy.sum(0))
    assert handle.pruning["fc"].alpha == alpha
    assert handle.pruning["fc"].next_renewal == 10


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "bias": False}])
def test_convolution_by_hand(options: dict[str, Any]) -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 6, 3, **options)))
    handle = emulate(model, SPEC, seed=SEED)
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    y = model(x)
    dy = torch.randn(y.shape)
    y.backward(dy)
    handle.step()

    conv = model.conv
    shape = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}
    qx, qw = rounded_input(x, "conv/activation", 0), rounded_weight(conv.weight, "conv/weight", 0)
    qdy = pruned_gradient(dy, "conv/gradient", 0)
    assert torch.equal(y, functional.conv2d(qx, qw, conv.bias, **shape))
    assert torch.equal(gradient_of(x), nn.grad.conv2d_input(x.shape, qw, qdy, **shape))
    assert torch.equal(gradient_of(conv.weight), nn.grad.conv2d_weight(qx, conv.weight.shape, qdy, **shape))
    if conv.bias is not None:
        assert torch.allclose(gradient_of(conv.bias), qdy.sum((0, 2, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_two_layers_with_relu_by_hand(inplace: bool) -> None:
    """The gradient that reaches a layer is the one that the next layer computed from its own rounded operands."""
    model = nn.Sequential(OrderedDict(a=nn.Linear(8, 10), relu=nn.ReLU(inplace), b=nn.Linear(10, 5)))
    emulate(model, SPEC, seed=SEED)
    x, dy = torch.randn(16, 8, requires_grad=True), torch.randn(16, 5)
    y = model(x)
    y.backward(dy)

    a, b = model.a, model.b
    qx, qwa = rounded_input(x, "a/activation", 0), rounded_weight(a.weight, "a/weight", 0)
    hidden = functional.linear(qx, qwa, a.bias)
    active = hidden.relu().detach()
    qh, qwb = rounded_input(active, "b/activation", 0), rounded_weight(b.weight, "b/weight", 0)
    qdy = pruned_gradient(dy, "b/gradient", 0)
    qdh = pruned_gradient((qdy @ qwb) * (active > 0), "a/gradient", 0)
    assert torch.equal(y, functional.linear(qh, qwb, b.bias))
    assert torch.equal(gradient_of(b.weight), qdy.T @ qh)
    assert torch.equal(gradient_of(a.weight), qdh.T @ qx)
    assert torch.equal(gradient_of(a.bias), qdh.sum(0))
    assert torch.equal(gradient_of(x), qdh @ qwa)


def test_a_module_called_twice_rounds_each_input_with_its_own_words_and_its_weight_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    model = Twice()
    handle = emulate(model, SPEC, seed=SEED)
    x, dy = torch.randn(20, 6, requires_grad=True), torch.randn(20, 6)
    y = model(x)
    y.backward(dy)
    qx, qw = rounded_input(x, "fc/activation", 0), rounded_weight(model.fc.weight, "fc/weight", 0)
    qh = rounded_input(qx @ qw.T, "fc/activation/2", 0)
    qdy = pruned_gradient(dy, "fc/gradient/2", 0)
    alpha = following_alpha(qdy @ qw, dy)
    qdh = pruned_gradient(qdy @ qw, "fc/gradient", 0, alpha)
    assert handle.pruning["fc"].alpha == alpha
    assert torch.equal(y, qh @ qw.T)
    assert torch.equal(gradient_of(x), qdh @ qw)
    assert torch.equal(gradient_of(model.fc.weight), qdy.T @ qh + qdh.T @ qx)


def test_an_input_given_by_name_is_rounded_as_well() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    model = ByName()
    emulate(model, SPEC, seed=SEED)
    x, dy = torch.randn(20, 6, requires_grad=True), torch.randn(20, 3)
    y = model(x)
    y.backward(dy)
    qx, qw = rounded_input(x, "fc/activation", 0), rounded_weight(model.fc.weight, "fc/weight", 0)
    assert torch.equal(y, functional.linear(qx, qw, model.fc.bias))
    assert torch.equal(gradient_of(x), pruned_gradient(dy, "fc/gradient", 0) @ qw)


def test_the_emulated_model_may_be_the_layer_itself() -> None:
    layer = nn.Linear(6, 3)
    emulate(layer, SPEC, seed=SEED)
    x = torch.randn(4, 6)
    qx, qw = rounded_input(x, "/activation", 0), rounded_weight(layer.weight, "/weight", 0)
    assert torch.equal(layer(x), functional.linear(qx, qw, layer.bias))


def test_evaluation_mode_rounds_inputs_with_words_of_their_own_and_counts_nothing() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(6, 3)))
    handle = emulate(model, SPEC, seed=SEED)
    x = torch.randn(20, 6)
    model.eval()
    with torch.no_grad():
        y = model(x)
    qx = rounded_input(x, "fc/activation/evaluation/1", 0)
    qw = rounded_weight(model.fc.weight, "fc/weight", 0)
    assert torch.equal(y, functional.linear(qx, qw, model.fc.bias))
    assert handle.ledger.records == []
    model.train()
    trained = model(x)
    assert not torch.equal(qx, rounded_input(x, "fc/activation", 0))
    assert torch.equal(trained, functional.linear(rounded_input(x, "fc/activation", 0), qw, model.fc.bias))


def test_gradients_are_emulated_only_in_training_mode() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(6, 3)))
    handle = emulate(model, SPEC, seed=SEED)
    model.eval()
    x, dy = torch.randn(20, 6, requires_grad=True), torch.randn(20, 3)
    model(x).backward(dy)
    qx = rounded_input(x, "fc/activation/evaluation/1", 0)
    assert torch.equal(gradient_of(x), dy @ rounded_weight(model.fc.weight, "fc/weight", 0))
    assert torch.equal(gradient_of(model.fc.weight), dy.T @ qx)
    assert handle.statistics[0]["steps"] == 0
    assert handle.gradient_sparsity is None
    assert handle.ledger.records == []


def test_evaluation_between_steps_does_not_change_training() -> None:
    def train(evaluate: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = network()
        handle = emulate(model, SPEC, seed=SEED)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for images in torch.randn(4, 8, 2, 6, 6, generator=torch.Generator().manual_seed(1)):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
            handle.step()
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(images)
                model.train()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


def test_channel_scales_by_hand() -> None:
    channel = {"format": "e4m3fn", "scale": "amax", "granularity": "channel"}
    spec = {
        "weights": channel,
        "activations": channel,
        "gradients": {"format": "e5m2", "scale": "amax", "granularity": "channel"},
    }
    spread = torch.tensor([1e-3, 1.0, 50.0, 7.0])

    def by_channel(x: Tensor, fmt: str, dim: int) -> Tensor:
        pieces = [accel.quantize(p.contiguous(), fmt, scale=amax_scale(p, fmt)) for p in x.detach().unbind(dim)]
        return torch.stack(pieces, dim)

    for layer, x, weight_dim, channel_dim in (
        (nn.Linear(4, 3), torch.randn(5, 4) * spread, 0, 1),
        (nn.Linear(4, 3), torch.randn(2, 5, 4) * spread, 0, 2),
        (nn.Conv2d(4, 3, 2), torch.randn(2, 4, 5, 5) * spread.reshape(4, 1, 1), 0, 1),
        (nn.Conv1d(4, 3, 2), torch.randn(2, 4, 5) * spread.reshape(4, 1), 0, 1),
        (nn.ConvTranspose2d(4, 3, 2), torch.randn(2, 4, 5, 5) * spread.reshape(4, 1, 1), 1, 1),
    ):
        plain = copy.deepcopy(layer)
        emulate(layer, spec)
        x.requires_grad_()
        y = layer(x)
        dy = torch.randn(y.shape) * 2.0 ** torch.arange(3).reshape(-1, *[1] * (y.ndim - 1 - channel_dim))
        y.backward(dy)

        with torch.no_grad():
            plain.weight.copy_(by_channel(layer.weight, "e4m3fn", weight_dim))
        qx = by_channel(x, "e4m3fn", channel_dim).requires_grad_()
        expected = plain(qx)
        expected.backward(by_channel(dy, "e5m2", channel_dim))
        assert torch.equal(y, expected)
        assert torch.equal(gradient_of(x), gradient_of(qx))
        assert torch.equal(gradient_of(layer.weight), gradient_of(plain.weight))


def test_the_channels_of_an_image_without_a_batch() -> None:
    layer = nn.Conv2d(3, 2, 1, bias=False)
    emulate(layer, {"activations": {"format": "e4m3fn", "scale": "amax", "granularity": "channel"}})
    image = torch.randn(3, 5, 5) * torch.tensor([1e-3, 1.0, 30.0]).reshape(3, 1, 1)
    assert torch.equal(layer(image), layer(image[None])[0])


# --- one rounded copy of a tensor ---------------------------------------------------------------------------------


class Heads(nn.Module):
    """Two layers that read one tensor, which a third wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        return self.a(hidden) + self.b(hidden)


def test_a_tensor_that_two_layers_read_is_rounded_once_with_the_words_of_the_first() -> None:
    model = Heads()
    emulate(model, {"activations": FORWARD}, seed=SEED)
    seen = seen_operands(model)
    x, dy = torch.randn(20, 6, requires_grad=True), torch.randn(20, 6)
    y = model(x)
    y.backward(dy)
    qx = rounded_input(x, "stem/activation", 0)
    hidden = (qx @ model.stem.weight.T).detach()
    qh = rounded_input(hidden, "a/activation", 0)
    assert not torch.equal(qh, rounded_input(hidden, "b/activation", 0))
    assert torch.equal(seen["a"][0], qh)
    assert torch.equal(seen["b"][0], qh)
    assert torch.equal(y, qh @ model.a.weight.T + qh @ model.b.weight.T)
    into_stem = dy @ model.a.weight + dy @ model.b.weight
    torch.testing.assert_close(gradient_of(model.stem.weight), into_stem.T @ qx)  # both readers' dX arrive
    torch.testing.assert_close(gradient_of(x), into_stem @ model.stem.weight)


def test_a_second_reader_in_another_format_rounds_with_its_own_words() -> None:
    model = Heads()
    other = {"format": "e5m2", "rounding": "stochastic", "scale": "power_of_two"}
    emulate(model, {"activations": FORWARD, "overrides": [{"match": "b", "activations": other}]}, seed=SEED)
    seen = seen_operands(model)
    x = torch.randn(20, 6)
    model(x)
    hidden = rounded_input(x, "stem/activation", 0) @ model.stem.weight.detach().T
    words = {"seed": SEED, "stream": accel.stream_id("b/activation"), "step": 0}
    scale = power_of_two_scale(hidden, "e5m2")
    assert torch.equal(seen["a"][0], rounded_input(hidden, "a/activation", 0))
    expected = accel.quantize(hidden, "e5m2", rounding="stochastic", scale=scale, **words)
    assert torch.equal(seen["b"][0], expected)


def test_a_tensor_that_changed_in_place_or_comes_again_is_rounded_again() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.mul_(3))

    model = Changes()
    emulate(model, {"activations": FORWARD}, seed=SEED)
    seen = seen_operands(model)
    x = torch.randn(20, 6)
    kept = x.clone()
    model(x)
    assert torch.equal(seen["a"][0], rounded_input(kept, "a/activation", 0))
    assert torch.equal(seen["b"][0], rounded_input(kept * 3, "b/activation", 0))
    model(x)  # the same tensor in the next forward pass of the step
    assert torch.equal(seen["a"][0], rounded_input(kept * 3, "a/activation/2", 0))


def test_a_weight_is_rounded_once_a_step_until_it_changes() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(6, 3)))
    handle = emulate(model, {"weights": {**FORWARD, "scale": "amax"}}, seed=SEED)
    seen = seen_operands(model)

    def weight_in_use() -> Tensor:
        model(torch.randn(4, 6))
        return seen["fc"][1]

    first = weight_in_use()
    assert torch.equal(first, rounded_weight(model.fc.weight, "fc/weight", 0))
    model.eval()
    assert weight_in_use().data_ptr() == first.data_ptr()  # not rounded again
    model.train()
    with torch.no_grad():
        model.fc.weight.mul_(1.7)
    changed = weight_in_use()
    assert not torch.equal(changed, first)
    assert torch.equal(changed, rounded_weight(model.fc.weight, "fc/weight", 0))
    handle.step()
    assert torch.equal(weight_in_use(), rounded_weight(model.fc.weight, "fc/weight", 1))
    assert not torch.equal(weight_in_use(), changed)


def test_micro_batches_accumulate_gradients_of_one_rounded_weight() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(6, 3, bias=False)))
    emulate(model, {"weights": FORWARD, "activations": FORWARD}, seed=SEED)
    pieces = [(torch.randn(8, 6, requires_grad=True), torch.randn(8, 3)) for _ in range(2)]
    for x, dy in pieces:
        model(x).backward(dy)
    words = {"seed": SEED, "stream": accel.stream_id("fc/weight"), "step": 0}
    weight = model.fc.weight.detach()
    scale = power_of_two_scale(weight, "e4m3fn")
    qw = accel.quantize(weight, "e4m3fn", rounding="stochastic", scale=scale, **words)
    inputs = [rounded_input(x, f"fc/activation{number}", 0) for (x, _), number in zip(pieces, ("", "/2"), strict=True)]
    assert torch.equal(gradient_of(model.fc.weight), sum(dy.T @ qx for (_, dy), qx in zip(pieces, inputs, strict=True)))
    for x, dy in pieces:
        assert torch.equal(gradient_of(x), dy @ qw)


# --- which layers -------------------------------------------------------------------------------------------------


def three_layers() -> nn.Sequential:
    return nn.Sequential(OrderedDict(a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6)))


def seen_operands(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and weight with which every Linear computes, filled in by the next forward; call after `emulate`."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda m, inputs, name=name: seen.__setitem__(name, (inputs[0].detach(), m.weight.detach()))
            )
    return seen


def test_excluded_layers_compute_in_float32() -> None:
    model = three_layers()
    emulate(model, {"weights": {"format": "e4m3fn"}, "activations": {"format": "e4m3fn"}, "exclude": ["first", "last"]})
    seen = seen_operands(model)
    x = torch.randn(4, 6)
    y = model(x)
    first = model.a.bias + x @ model.a.weight.T
    assert torch.equal(seen["a"][0], x)
    assert torch.equal(seen["a"][1], model.a.weight)
    torch.testing.assert_close(accel.quantize(first.detach(), "e4m3fn"), seen["b"][0])
    assert torch.equal(seen["b"][1], accel.quantize(model.b.weight.detach(), "e4m3fn"))
    hidden = functional.linear(*seen["b"], model.b.bias)
    assert torch.equal(seen["c"][0], hidden)
    assert torch.equal(seen["c"][1], model.c.weight)
    assert torch.equal(y, functional.linear(hidden, model.c.weight, model.c.bias))


def test_overrides_give_layers_their_own_formats() -> None:
    model = three_layers()
    overrides = [{"match": "b", "weights": {"format": "e2m1"}, "activations": None}, {"match": "c", "weights": None}]
    emulate(model, {"weights": {"format": "e4m3fn"}, "activations": {"format": "e5m2"}, "overrides": overrides})
    seen = seen_operands(model)
    x = torch.randn(4, 6)
    model(x)
    assert torch.equal(seen["a"][0], accel.quantize(x, "e5m2"))
    assert torch.equal(seen["a"][1], accel.quantize(model.a.weight.detach(), "e4m3fn"))
    after_a = functional.linear(*seen["a"], model.a.bias)
    assert torch.equal(seen["b"][0], after_a)
    assert torch.equal(seen["b"][1], accel.quantize(model.b.weight.detach(), "e2m1"))
    assert torch.equal(seen["c"][0], accel.quantize(functional.linear(*seen["b"], model.b.bias).detach(), "e5m2"))
    assert torch.equal(seen["c"][1], model.c.weight)


def test_gradients_of_excluded_layers_pass_unchanged() -> None:
    model = three_layers()
    handle = emulate(model, {"gradients": {"format": "e2m1", "scale": "amax"}, "exclude": ["c"]})
    x, dy = torch.randn(4, 6), torch.randn(4, 6)
    model(x).backward(dy)
    hidden = model.b(model.a(x))
    assert torch.equal(gradient_of(model.c.weight), dy.T @ hidden)
    into_b = dy @ model.c.weight
    scale = amax_scale(into_b, "e2m1")
    assert torch.equal(gradient_of(model.b.bias), accel.quantize(into_b.detach(), "e2m1", scale=scale).sum(0))
    assert handle.statistics == []
    assert handle.gradient_sparsity is None


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_attached() -> None:
    model = three_layers()
    with pytest.raises(PatternError, match="'d' matches no matrix layer"):
        emulate(model, {"exclude": ["d"]})
    assert_no_hooks(model)


def test_a_specification_may_be_an_accelerator_and_is_checked() -> None:
    handle = fpsim.emulate(three_layers(), "fp8-training")
    assert handle.spec.gradients is not None
    assert list(handle.pruning) == ["b"]
    with pytest.raises(ConfigError, match="e4m3fn"):
        emulate(three_layers(), {"weights": {"format": "e4m3fm"}})
    with pytest.raises(ConfigError, match="weights"):
        emulate(three_layers(), {"weight": {"format": "e4m3fn"}})


def test_a_layer_that_does_not_run_as_a_module_is_reported() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(self.a(x), self.b.weight)

    for exclude, expected in (([], True), (["b"], False)):
        model = Around()
        handle = emulate(model, {"weights": {"format": "e4m3fn"}, "exclude": exclude})
        model(torch.randn(2, 3)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            handle.step()
        assert bool(caught) == expected
        if expected:
            assert "stay float32: b" in str(caught[0].message)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (lambda: nn.Bilinear(3, 3, 3), "Bilinear"),
        (lambda: nn.LSTM(3, 3), "LSTM"),
        (lambda: nn.GRUCell(3, 3), "GRUCell"),
        (lambda: nn.MultiheadAttention(3, 1), "MultiheadAttention"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "ParametrizedLinear"),
    ],
)
def test_layers_that_cannot_be_emulated_are_named_where_anything_is_emulated(
    layer: Callable[[], nn.Module], kind: str
) -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(3, 3), other=layer()))
    with pytest.warns(UserWarning, match=rf"stay float32: other \({kind}\)$"):
        emulate(model, {"weights": {"format": "e4m3fn"}, "include": ["fc"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emulate(model, {"ledger": {"every_steps": 1}})
        emulate(three_layers(), {"weights": {"format": "e4m3fn"}})


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("role", ["weights", "activations", "gradients"])
def test_an_input_that_is_not_float32_is_refused_by_emulated_layers_only(dtype: torch.dtype, role: str) -> None:
    x = torch.randn(4, 6, dtype=dtype)
    model = three_layers().to(dtype)
    emulate(model, {role: {"format": "e4m3fn"}, "exclude": ["a"]})
    with pytest.raises(RunError, match=f"layer 'b' gets {dtype}.*float32"):
        model(x)
    assert isinstance(model.b.weight, nn.Parameter)
    model = three_layers().to(dtype)
    emulate(model, {})
    model(x)


def test_autocast_is_refused() -> None:
    model = three_layers()
    emulate(model, SPEC)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RunError, match="autocast"):
        model(torch.randn(4, 6))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_that_is_recomputed_in_backward_is_refused(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.b, self.a(x), use_reentrant=use_reentrant)

    for exclude, refused in (([], True), (["b"], False)):
        model = Checkpointed()
        emulate(model, {"weights": {"format": "e4m3fn"}, "exclude": exclude})
        y = model(torch.randn(4, 6)).sum()
        if refused:
            with pytest.raises(RunError, match="layer 'b' is recomputed in backward"):
                y.backward()
        else:
            y.backward()


def test_a_layer_that_returns_no_tensor_is_refused() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    model = nn.Sequential(OrderedDict(pair=Pair(6, 6)))
    emulate(model, {"gradients": {"format": "e5m2"}, "ledger": {"every_steps": 1}})
    with pytest.raises(RunError, match="layer 'pair' returns a tuple"):
        model(torch.randn(4, 6))
    assert isinstance(model.pair.weight, nn.Parameter)
    model.eval()
    assert isinstance(model(torch.randn(4, 6)), tuple)  # no gradient, nothing to refuse


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_an_activation_or_weight_that_is_not_finite_names_its_layer(special: float) -> None:
    for role in ("activation", "weight"):
        model = three_layers()
        emulate(model, SPEC, seed=SEED)
        x = torch.randn(4, 6)
        broken = x if role == "activation" else model.b.weight.data
        broken[2, 3] = special
        layer = "a" if role == "activation" else "b"
        before = {name: p for name, p in model.named_parameters()}
        with pytest.raises(NonFiniteError, match=f"{role} of layer '{layer}' is not finite at step 0"):
            model(x)
        assert all(p is before[name] for name, p in model.named_parameters())


def test_an_error_inside_a_layer_leaves_its_weight_in_place() -> None:
    model = three_layers()
    handle = emulate(model, SPEC, seed=SEED)
    weight = model.a.weight
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5))
    assert model.a.weight is weight
    model(torch.randn(4, 6)).sum().backward()  # and the model goes on
    handle.detach()
    assert_no_hooks(model)


# --- detach -------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 4, 3, padding=1),
            bn1=nn.BatchNorm2d(4),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(4, 4, 3),
            bn2=nn.BatchNorm2d(4),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc=nn.Linear(64, 5),
        )
    )


def hooks_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if "hooks" in attribute and value is not None:
                yield f"{name}.{attribute}", value
    for name, parameter in model.named_parameters():
        yield f"{name} backward hooks", parameter._backward_hooks
        yield f"{name} post accumulate hooks", parameter._post_accumulate_grad_hooks


def assert_no_hooks(model: nn.Module) -> None:
    assert [name for name, hooks in hooks_of(model) if hooks] == []


def structure(model: nn.Module) -> list[Any]:
    return [
        list(model.state_dict()),
        [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        [(name, type(p), p.shape, p.dtype, p.requires_grad, p.is_leaf, id(p)) for name, p in model.named_parameters()],
        [(name, type(b), b.shape, b.dtype) for name, b in model.named_buffers()],
        [list(module._parameters) for module in model.modules()],
    ]


def test_detach_leaves_the_model_as_it_was() -> None:
    model = network()
    x = torch.randn(3, 2, 6, 6)
    model.eval()
    before, state, y = structure(model), copy.deepcopy(model.state_dict()), model(x)
    handle = emulate(model, SPEC, seed=SEED)
    assert not torch.equal(model(x), y)
    assert structure(model) == before
    handle.detach()
    assert structure(model) == before
    assert_no_hooks(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), y)


def test_detach_after_training_leaves_a_plain_model_of_the_trained_weights() -> None:
    model = network()
    before = structure(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = emulate(model, SPEC, seed=SEED, optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        optimizer.step()
        handle.step()
    handle.detach()
    handle.detach()  # twice does no harm
    assert structure(model) == before
    assert_no_hooks(model)
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(4, 2, 6, 6)
    model.zero_grad()
    first, second = model(x), fresh(x)
    assert torch.equal(first, second)
    first.square().mean().backward()
    second.square().mean().backward()
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(gradient_of(p), gradient_of(q))
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())


def test_detach_keeps_the_hooks_of_others() -> None:
    model = network()
    calls: list[str] = []
    model.fc.register_forward_hook(lambda *_: calls.append("user"))
    handle = emulate(model, SPEC)
    model.conv1.register_forward_pre_hook(lambda *_: calls.append("later"))
    handle.detach()
    model(torch.randn(3, 2, 6, 6))
    assert calls == ["later", "user"]


def test_no_specification_changes_nothing() -> None:
    plain = network()
    emulated = copy.deepcopy(plain)
    emulate(emulated, {})
    x = torch.randn(4, 2, 6, 6)
    for model in (plain, emulated):
        model(x).square().mean().backward()
    assert torch.equal(plain(x), emulated(x))
    for p, q in zip(plain.parameters(), emulated.parameters(), strict=True):
        assert torch.equal(gradient_of(p), gradient_of(q))


# --- determinism --------------------------------------------------------------------------------------------------


def trained(steps: int, seed: int = SEED, stop: int | None = None) -> tuple[dict[str, Tensor], Emulator]:
    """A network after some steps; stop: where it is saved, as JSON, and restored into a new one."""
    batches = torch.randn(steps, 8, 2, 6, 6, generator=torch.Generator().manual_seed(1))

    def new() -> tuple[nn.Module, torch.optim.Optimizer, Emulator]:
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        spec = {**SPEC, "ledger": {"every_steps": 4}}
        return model, optimizer, emulate(model, spec, seed=seed, optimizer=optimizer)

    model, optimizer, handle = new()
    for number in range(steps):
        if number == stop:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), json.dumps(handle.state_dict())
            counted = json.dumps(handle.ledger.to_data())
            model, optimizer, handle = new()
            model.load_state_dict(saved[0][0])
            optimizer.load_state_dict(saved[0][1])
            handle.load_state_dict(json.loads(saved[1]))
            handle.ledger.records[:] = Ledger.from_data(json.loads(counted)).records
        optimizer.zero_grad()
        model(batches[number]).square().mean().backward()
        optimizer.step()
        handle.step()
    return model.state_dict(), handle


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_seed_decides_the_bits() -> None:
    one, handle = trained(5)
    two, other = trained(5)
    assert_equal_states(one, two)
    assert handle.state_dict() == other.state_dict()
    third, _ = trained(5, seed=SEED + 1)
    assert not torch.equal(one["fc.weight"], third["fc.weight"])


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_restored_training_goes_on_bit_for_bit(stop: int) -> None:
    whole, handle = trained(12)
    resumed, other = trained(12, stop=stop)
    assert_equal_states(whole, resumed)
    assert handle.state_dict() == other.state_dict()
    assert handle.ledger.records == other.ledger.records
    assert handle.ledger.summary() == other.ledger.summary()
    assert handle.ledger.steps == [0, 4, 8]


def test_the_number_of_threads_does_not_change_the_bits(restored_threads: None) -> None:
    """Operands are small whole numbers, so the float32 sums of the products are exact in any order."""
    whole = {"format": "e2m1", "rounding": "stochastic"}
    spec = {
        "weights": whole,
        "activations": whole,
        "gradients": {**whole, "codec": "bitmask", "pruning": {"sparsity": 0.5}},
    }
    x = torch.rand(256, 64, generator=torch.Generator().manual_seed(0)) * 6
    dy = torch.rand(256, 64, generator=torch.Generator().manual_seed(1)) * 4 - 2
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = nn.Sequential(OrderedDict(fc=nn.Linear(64, 64, bias=False)))
        with torch.no_grad():
            model.fc.weight.mul_(20)
        handle = emulate(model, spec, seed=SEED)
        operand = x.clone().requires_grad_()
        y = model(operand)
        y.backward(dy)
        handle.step()
        results.append((y.detach(), gradient_of(operand), gradient_of(model.fc.weight), handle.state_dict()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two


def test_the_gradient_sparsity_is_that_of_the_latest_step() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(20, 30), b=nn.Linear(30, 10)))
    gradients = {"format": "e5m2", "scale": "amax", "codec": "alpha", "pruning": {"sparsity": 0.5}}
    handle = emulate(model, {"gradients": gradients})
    zeros: list[Tensor] = []

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda dy: zeros.append(dy == 0))

    for module in model:
        module.register_forward_hook(watch)
    shares = []
    for _ in range(3):
        zeros.clear()
        model(torch.randn(16, 20)).square().sum().backward()
        handle.step()
        share = sum(int(z.sum()) for z in zeros) / sum(z.numel() for z in zeros)
        assert handle.gradient_sparsity == pytest.approx(share)
        shares.append(share)
    assert len(set(shares)) == 3


def test_the_gradient_sparsity_after_an_evaluation_is_that_of_the_latest_step() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4)))
    handle = emulate(model, {"gradients": {"format": "e5m2", "codec": "alpha", "pruning": {"sparsity": 0.5}}})
    for dy in (torch.zeros(8, 4), torch.eye(8, 4)):
        model(torch.ones(8, 4)).backward(dy)
        handle.step()
        model.eval()
        model(torch.ones(8, 4))
        model.train()
    assert handle.gradient_sparsity == 0.875
