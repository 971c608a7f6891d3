"""Products of a model on emulated units: layers and attention, in all three passes, and what the ledger counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import accel
import models
from accel import Convolution
from fpsim.config import parse_emulation
from fpsim.emulation import Emulator, emulate
from fpsim.errors import ConfigError, RunError
from fpsim.layers import PatternError

ALL_FP32 = {"forward": "fp32", "dgrad": "fp32", "wgrad": "fp32"}
LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Linear(5, 3), (4, 5)),
    (lambda: nn.Linear(5, 3, bias=False), (2, 4, 5)),
    (lambda: nn.Linear(5, 3), (5,)),
    (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 9)),
    (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (2, 4, 7, 6)),
    (lambda: nn.Conv2d(4, 4, 3, padding="valid", groups=4, dilation=2), (2, 4, 7, 8)),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 6)),
    (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
    (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 2, 5, 4, 6)),
    (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), padding=1, groups=2, dilation=2), (2, 4, 5, 6)),
]


def integers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=generator).float()


def step(layer: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    """Output and gradients of one pass with integer dY."""
    x = x.clone().requires_grad_()
    y = layer(x)
    dy = integers(torch.Generator().manual_seed(seed), *y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", range(len(LAYERS)))
@pytest.mark.parametrize("passes", ["forward dgrad wgrad", "forward", "dgrad", "wgrad"])
def test_integers_give_what_torch_gives(case: int, passes: str) -> None:
    make, shape = LAYERS[case]
    layer, generator = make(), torch.Generator().manual_seed(case)
    for parameter in layer.parameters():
        parameter.data = integers(generator, *parameter.shape)
    x = integers(generator, *shape)
    expected = step(layer, x, case)
    handle = emulate(layer, {"datapath": dict.fromkeys(passes.split(), "fp32")})
    found = step(layer, x, case)
    handle.detach()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert [one.shape for one in found] == [one.shape for one in expected]


def run(spec: dict[str, Any], *, bias: float = 0.0) -> tuple[nn.Linear, list[Tensor], Emulator]:
    """One step of a linear layer of 40 inputs."""
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(40, 6)
    layer.weight.data, layer.bias.data = torch.randn(6, 40, generator=generator) * 0.1, torch.full((6,), bias)
    x = torch.randn(9, 40, generator=generator, requires_grad=True)
    handle = emulate(layer, spec)
    y = layer(x)
    grads = torch.autograd.grad(y, [x, layer.weight], torch.randn(9, 6, generator=generator) * 1e-3)
    return layer, [x.detach(), y.detach(), *grads], handle


def test_units_multiply_the_codes_and_scales_come_after() -> None:
    """The results of a layer from the codes of its tensors, whose scales are no powers of two; dY has +-alpha off the
    grid."""
    tensor = {"format": "e4m3fn", "scale": "amax"}
    gradients = {"format": "e5m2", "scale": "amax", "codec": "alpha", "pruning": {"sparsity": 0.4}}
    unit = {"accumulator": "e8m6"}
    spec = {"weights": tensor, "activations": tensor, "gradients": gradients}
    layer, (x, y, dx, dw), handle = run({**spec, "datapath": {"forward": unit, "dgrad": unit, "wgrad": unit}}, bias=0.5)

    def codes(tensor: Tensor, fmt: str) -> tuple[Tensor, float]:
        scale = float(tensor.abs().max()) / accel.format(fmt).max
        scale = float(torch.tensor(scale))
        return accel.decode(accel.encode(tensor, fmt, scale=scale), fmt), scale

    (x_codes, s_x), (w_codes, s_w) = codes(x, "e4m3fn"), codes(layer.weight.detach(), "e4m3fn")
    assert torch.equal(y, accel.matmul(x_codes, w_codes.t(), unit) * torch.tensor(s_x * s_w) + 0.5)

    seen: list[Tensor] = []
    layer, _, other = run(spec)
    generator = torch.Generator().manual_seed(3)
    torch.randn(6, 40, generator=generator), torch.randn(9, 40, generator=generator)
    dy = torch.randn(9, 6, generator=generator) * 1e-3
    scale = float(torch.tensor(float(dy.abs().max()) / accel.format("e5m2").max))
    other.restart_step()
    output = layer(x)
    output.register_hook(lambda gradient: seen.append(gradient.clone()))
    output.backward(dy)
    rounded = seen[0]
    alpha = float(rounded[rounded != 0].abs().mode().values)  # of the pruned ones
    is_alpha = rounded.abs() == alpha
    assert not torch.equal(accel.quantize(rounded, "e5m2", scale=scale), rounded)  # alpha lies off the grid
    on_grid = accel.decode(accel.encode(rounded.masked_fill(is_alpha, 0), "e5m2", scale=scale), "e5m2")
    dy_codes = torch.where(is_alpha, rounded / scale, on_grid)
    assert int((dy_codes == 0).sum()) > 10
    assert torch.equal(dx, accel.matmul(dy_codes, w_codes, unit) * torch.tensor(scale * s_w))
    assert torch.equal(dw, (accel.matmul(x_codes.t(), dy_codes, unit) * torch.tensor(scale * s_x)).t())
    assert handle.ledger.products


def test_scales_a_channel_of_weights() -> None:
    weights = {"format": "e4m3fn", "scale": "amax", "granularity": "channel"}
    layer, (x, y, _, _), _ = run({"weights": weights, "datapath": {"forward": "fp22"}})
    weight = layer.weight.detach()
    scales = weight.abs().amax(1, keepdim=True) / 448
    expected = accel.matmul(x, accel.decode(accel.encode(weight, "e4m3fn", scale=scales), "e4m3fn").t(), "fp22")
    assert torch.equal(y, expected * scales.t())


def test_a_narrow_accumulator_in_one_pass_changes_that_pass_alone() -> None:
    narrow = {"accumulator": "e6m2"}
    plain, one = run({})[1], {}
    for which in ("forward", "dgrad", "wgrad"):
        one[which] = [torch.equal(a, b) for a, b in zip(plain, run({"datapath": {which: narrow}})[1], strict=True)]
    assert one == {
        "forward": [True, False, True, True],
        "dgrad": [True, True, False, True],
        "wgrad": [True, True, True, False],
    }


def test_random_sums_depend_on_seed_pass_and_step_alone() -> None:
    unit = {"accumulator": "e5m2", "rounding": "stochastic"}
    spec = {"datapath": {"forward": unit, "dgrad": unit, "wgrad": unit}}
    first, again = run(spec)[1], run({**spec, "saved_activations": {"codec": "bitmask"}})[1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    layer, (x, *_), handle = run(spec)
    handle.restart_step()
    y = layer(x)
    handle.step()
    assert not torch.equal(y, layer(x))


def test_overrides_and_evaluation() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    hidden = model[0](x)
    narrow = {"forward": {"accumulator": "e5m2"}}
    handle = emulate(model, {"overrides": [{"match": "last", "datapath": narrow}]})
    model.eval()
    y = model(x)
    expected = accel.matmul(hidden.detach(), model[1].weight.detach().t(), narrow["forward"]) + model[1].bias.detach()
    assert torch.equal(y, expected)
    handle.detach()
    assert not torch.equal(model(x), expected)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": (torch.arange(49) % 3 != 1).view(7, 7), "scale": 0.2},
        {"attn_mask": torch.linspace(-2, 2, 49).view(7, 7)},
        {"enable_gqa": True},
    ],
)
def test_attention_is_that_of_torch_but_for_its_products(options: dict[str, Any]) -> None:
    generator, heads = torch.Generator().manual_seed(1), 2 if options.get("enable_gqa") else 4
    q = torch.randn(2, 4, 7, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, heads, 7, 8, generator=generator, requires_grad=True) for _ in "kv")
    model, dy = Attention(**options), torch.randn(2, 4, 7, 8, generator=generator)
    expected = [y := model(q, k, v), *torch.autograd.grad(y, (q, k, v), dy)]
    emulate(model, {"include": [], "products": [{"match": "*", "datapath": ALL_FP32}]})
    found = [y := model(q, k, v), *torch.autograd.grad(y, (q, k, v), dy)]
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_products_of_activations_use_the_units_bit_for_bit() -> None:
    class Model(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a @ b).bmm(torch.matmul(b, b)) + torch.mm(a[0], b[0]) @ b[0, 0]

    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(3, 5, 5, generator=generator, requires_grad=True) for _ in "ab")
    names = {"forward": {"accumulator": "e8m5"}, "dgrad": {"accumulator": "e8m4"}, "wgrad": {"accumulator": "e8m3"}}
    model = Model()
    emulate(model, {"include": [], "products": [{"match": "type:Model", "datapath": names}]})
    y = model(a, b)

    def product(x: Tensor, z: Tensor) -> Tensor:
        return accel.matmul(x.detach(), z.detach(), names["forward"])

    last = product(product(a[0], b[0]), b[0, 0].unsqueeze(1)).squeeze(1)
    assert torch.equal(y, product(product(a, b), product(b, b)) + last)
    one = nn.Sequential()
    one.forward = lambda x, z: x @ z  # type: ignore[method-assign]
    emulate(one, {"include": [], "products": [{"match": "*", "datapath": names}]})
    dc = torch.randn(3, 5, 5, generator=generator)
    da, db = torch.autograd.grad(one(a, b[0]), (a, b), dc)
    assert torch.equal(da, accel.matmul(dc, b[0].detach().t(), names["dgrad"]))
    assert torch.equal(db[0], accel.matmul(a.detach().mT, dc, names["wgrad"]).sum(0))


def test_the_gpt_trains_with_emulated_attention() -> None:
    model = models.build("gpt", input_shape=(16,), classes=11, layers=1, heads=2, width=16)
    text = torch.randint(0, 11, (4, 16), generator=torch.Generator().manual_seed(0))
    plain = model(text)
    unit = {"base": "fp22", "chunk": 8}
    every = {"forward": unit, "dgrad": unit, "wgrad": unit}
    handle = emulate(model, {"datapath": every, "products": [{"match": "type:CausalSelfAttention", "datapath": every}]})
    y = model(text)
    y.square().mean().backward()
    handle.step()
    assert not torch.equal(y, plain)
    torch.testing.assert_close(y, plain, rtol=1e-2, atol=1e-3)
    handle.detach()
    assert torch.equal(model(text), plain)


# --- what the ledger counts -----------------------------------------------------------------------------------------


def test_multiply_accumulates_are_those_of_the_flop_counter() -> None:
    model = models.build("resnet18", input_shape=(3, 16, 16), classes=10, width=8)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    handle = emulate(model, {})
    model(x).sum().backward()
    products = handle.ledger.products
    assert 2 * sum(product.macs for product in products) == counter.get_total_flops()
    first = [product.pass_name for product in products if product.layer == "conv1"]
    assert first == ["forward", "wgrad"]
    assert len(products) == 3 * 21 - 1
    handle.restart_step()
    assert not handle.ledger.products


def test_effectual_ones_come_from_the_tensors_that_are_multiplied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2))
    gradients = {"format": "e5m2", "codec": "alpha", "pruning": {"sparsity": 0.7}}
    spec = {"weights": {"format": "e2m1"}, "activations": {"format": "e3m0"}, "gradients": gradients}
    pruning = {"name": "magnitude", "sparsity": 0.5, "at_epochs": 0.0}
    handle = emulate(model, {**spec, "weight_pruning": pruning}, steps_per_epoch=1)
    seen: dict[str, Tensor] = {}
    model[2].register_forward_pre_hook(lambda module, x: seen.update(x=x[0].detach(), w=module.weight.detach()))
    model[2].register_forward_hook(
        lambda module, x, y: y.register_hook(lambda dy: seen.update(dy=dy.clone())) and None  # after the emulation's
    )
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    masks = {name: (tensor != 0).double() for name, tensor in seen.items()}
    pairs = {one.pass_name: one for one in handle.ledger.products if one.layer == "2"}
    convolved = functional.conv2d(masks["x"], masks["w"], stride=2)
    assert pairs["forward"].effectual[1].both == int(convolved.sum()) < pairs["forward"].macs // 4
    by_x = torch.nn.grad.conv2d_input(masks["x"].shape, masks["w"], masks["dy"], stride=2)
    assert pairs["dgrad"].effectual[1].both == int(by_x.sum())
    by_w = torch.nn.grad.conv2d_weight(masks["x"], masks["w"].shape, masks["dy"], stride=2)
    assert pairs["wgrad"].effectual[1].both == int(by_w.sum())
    assert pairs["wgrad"].operands == ("activation", "gradient")


def test_of_a_transposed_convolution() -> None:
    layer, generator = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, 5, generator=generator).relu().requires_grad_()
    handle = emulate(layer, {})
    y = layer(x)
    dy = torch.randn(y.shape, generator=generator).relu()
    y.backward(dy)
    forward, dgrad, wgrad = handle.ledger.products
    masks = (x != 0).double(), (layer.weight != 0).double(), (dy != 0).double()
    both = functional.conv_transpose2d(masks[0], masks[1], stride=2, groups=2).sum()
    assert forward.effectual[1].both == int(both)
    assert dgrad.effectual[1].both == int(functional.conv2d(masks[2], masks[1], stride=2, groups=2).sum())
    assert forward.macs == dgrad.macs == wgrad.macs
    assert wgrad.effectual[1].first == int(masks[0].sum()) * 3 * 9
    assert wgrad.rows == 2
    assert wgrad.columns == 3 * 9


@pytest.mark.parametrize("products", [[], [{"match": "type:CausalSelfAttention", "datapath": ALL_FP32}]])
def test_attention_is_counted(products: list[Any]) -> None:
    model = models.build("gpt", input_shape=(16,), classes=11, layers=2, heads=2, width=16)
    text = torch.randint(0, 11, (4, 16), generator=torch.Generator().manual_seed(0))
    handle = emulate(model, {"products": products})
    model(text).square().mean().backward()
    found = [one for one in handle.ledger.products if one.layer == "blocks.1.attention"]
    assert sum(one.macs for one in found) == 6 * 4 * 2 * 16 * 16 * 8
    passes = [(one.pass_name, one.operands, one.rows, one.columns, one.length, one.groups) for one in found]
    assert passes == [
        ("forward", ("activation", "activation"), 16, 16, 8, 8),
        ("forward", ("activation", "activation"), 16, 8, 16, 8),
        ("dgrad", ("gradient", "activation"), 16, 16, 8, 8),
        ("wgrad", ("activation", "gradient"), 16, 8, 16, 8),
        ("dgrad", ("gradient", "activation"), 16, 8, 16, 8),
        ("wgrad", ("activation", "gradient"), 8, 16, 16, 8),
    ]
    causal = 8 * 8 * 16 * 17 // 2  # half of the attention weights are zero, and of their gradient
    scores = causal - (64 if products else 0)  # emulated: the gradient of a weight that has no other beside it is zero
    assert [one.effectual[1].both for one in found] == [16384, causal, 16384, causal, scores, scores]
    assert found[1].effectual[1].first == causal
    assert found[1].effectual[16].first == 16384
    assert found[1].effectual[4].first == 8 * 8 * 4 * (4 + 8 + 12 + 16)


def test_products_of_a_module_are_counted_from_its_tensors() -> None:
    class Model(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 1, 4, 5, generator=generator).relu().requires_grad_()
    b = torch.randn(2, 5, 6, generator=generator).relu().requires_grad_()
    model = Model()
    handle = emulate(model, {"include": []})
    c = model(a, b)
    dc = torch.randn(c.shape, generator=generator).relu()
    c.backward(dc)
    x, y, z = ((one != 0).double() for one in (a, b, dc))
    both = [int(product.sum()) for product in (x @ y, z @ y.mT, x.mT @ z)]
    assert [one.effectual[1].both for one in handle.ledger.products] == both
    assert [one.macs for one in handle.ledger.products] == [6 * 4 * 5 * 6] * 3


def test_micro_batches_and_steps_are_told_apart() -> None:
    model = nn.Linear(3, 2)
    handle = emulate(model, {"ledger": {"every_steps": 2}})
    for _ in range(3):
        for _ in range(2):
            model(torch.ones(4, 3)).sum().backward()
        handle.step()
    places = [(one.step, one.micro_batch, one.pass_name) for one in handle.ledger.products]
    assert places == [(s, b, which) for s in (0, 2) for b in (0, 1) for which in ("forward", "wgrad")]


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "path", "message"),
    [
        (
            {"weights": {"format": "e4m3fn", "scale": "amax", "granularity": "channel"}, "datapath": {"dgrad": "fp22"}},
            "datapath.dgrad",
            "several scales of its weights: their granularity must be 'tensor' \\(layer '0'\\)",
        ),
        (
            {"activations": {"format": "int8", "granularity": "channel", "scale": "amax"}, "datapath": ALL_FP32},
            "datapath.forward",
            "several scales of its activations",
        ),
        (
            {"weights": {"format": "e4m3fn"}, "activations": {"format": "int8"}, "datapath": {"forward": "int8"}},
            "datapath.forward",
            "the unit 'int8' takes int8, its weights are e4m3fn, which it cannot hold",
        ),
        (
            {
                "activations": {"format": "mxfp8_e4m3fn"},
                "datapath": {"forward": {"accumulator": "fp16", "a": "e4m3fn"}},
            },
            "datapath.forward",
            "its activations are mxfp8_e4m3fn, which it cannot hold",
        ),
        ({"products": [{"match": "0", "datapath": {}}]}, "products.0.match", "matches no module"),
        (
            {"weights": {"format": "int8", "scale": "amax"}, "datapath": {"forward": "int8"}},
            "datapath.forward",
            "the unit 'int8' multiplies integers, its activations are float32",
        ),
        (
            {
                "gradients": {"format": "e5m2", "codec": "alpha", "pruning": {"sparsity": 0.8}},
                "datapath": {"wgrad": {"accumulator": "fp32", "b": "e5m2"}},
            },
            "datapath.wgrad",
            "takes e5m2, off whose grid \\+-alpha of the gradients may lie",
        ),
    ],
)
def test_units_that_do_not_fit_the_tensors(spec: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(PatternError, match=message) as caught:
        emulate(nn.Sequential(nn.Linear(3, 2)), spec)
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("fp23", "emulation.datapath.forward: unknown mac 'fp23'"),
        ({"accumulator": "e9m3"}, "emulation.datapath.forward.accumulator: format 'e9m3'"),
        ({"accumulator": "fp16", "terms": 4}, "emulation.datapath.forward.terms: terms above 1 and fraction_bits go"),
        ({"chunk": 3}, "emulation.datapath.forward.accumulator: is required where there is no base"),
        ({"base": "fp16"}, "emulation.datapath.forward.base: unknown mac 'fp16'"),
        ({"accumulator": "mxfp8_e4m3fn"}, "emulation.datapath.forward.accumulator: must be a scalar format"),
        (
            {"accumulator": "fp32", "rounding": "stochastic", "random_bits": 32},
            "emulation.datapath.forward.random_bits: random_bits may be 26",
        ),
        (3, "emulation.datapath.forward: must be the name of a unit or a mapping"),
    ],
)
def test_units_that_cannot_be(unit: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_emulation({"datapath": {"forward": unit}})
    assert message in str(caught.value)


def test_products_that_are_not_seen_are_refused() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ij,jk->ik", x, self.weight)

    with pytest.raises(PatternError, match="is for linear layers and convolutions"):
        emulate(nn.Sequential(Custom()), {"datapath": ALL_FP32})

    class Mixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    model = nn.Sequential(Mixed(3, 3))
    emulate(model, {"datapath": ALL_FP32})
    with pytest.raises(RunError, match="layer '0' \\(Mixed\\) does not multiply its weight by a linear map"):
        model(torch.ones(1, 3))

    class Einsum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ij,jk->ik", x, x)

    module = Einsum()
    emulate(module, {"include": [], "products": [{"match": "*", "datapath": ALL_FP32}]})
    with pytest.raises(RunError, match="multiplies by einsum, which cannot be emulated: use matmul"):
        module(torch.ones(2, 2))
    assert torch.equal(torch.ones(2, 2) @ torch.ones(2, 2), torch.full((2, 2), 2.0))  # nothing is left on


def test_a_forward_pass_that_fails_leaves_nothing_on() -> None:
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = nn.Sequential(nn.Linear(3, 3), Fails(3, 3))
    handle = emulate(model, {"datapath": ALL_FP32})
    weight = model[1].weight
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(1, 3))
    assert model[1].weight is weight
    assert not handle._products.running
    assert Convolution() == Convolution((), (), (), 1)


# --- layers that do more than multiply, and other unusual calls -------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.1 * 1.1


class Pooled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(super().forward(x), 2)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), super().forward(-x)], -1)


class Glu(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.glu(super().forward(x))


def test_what_reaches_a_product_is_counted_not_what_reaches_its_layer() -> None:
    for model, x in (
        (nn.Sequential(Pooled(2, 4, 3, padding=1), Pooled(4, 4, 3, padding=1)), torch.randn(2, 2, 8, 8)),
        (nn.Sequential(Twice(4, 3), Glu(6, 4)), torch.randn(5, 4)),
    ):
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        handle = emulate(model, {"activations": {"format": "e4m3fn"}})
        model(x).sum().backward()
        assert 2 * sum(product.macs for product in handle.ledger.products) == counter.get_total_flops()


def test_a_gradient_that_is_not_what_arrived_is_multiplied_as_it_is() -> None:
    """dY of the layer is rounded; what reaches the product is float32, also where it lies in the same memory."""
    gradients = {"format": "e5m2", "scale": "amax"}
    model = nn.Sequential(Scaled(4, 64, bias=False))
    x, dy = torch.randn(70_000, 4), torch.randn(70_000, 64)  # large enough for memory to be used again
    grads = []
    for datapath in (None, {"wgrad": "fp32"}):
        handle = emulate(model, {"gradients": gradients, "datapath": datapath, "ledger": {"every_steps": 1000}})
        handle.step_number = 1
        grads.append(torch.autograd.grad(model(x), model[0].weight, dy)[0])
        handle.detach()
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-2)


def test_integers_need_a_rounded_gradient() -> None:
    tensor = {"format": "int8", "scale": "amax"}
    model = nn.Sequential(Scaled(4, 4))
    spec = {"weights": tensor, "activations": tensor, "gradients": tensor, "datapath": dict.fromkeys(ALL_FP32, "int8")}
    emulate(model, spec)
    with pytest.raises(RunError, match="layer '0', wgrad: needs a rounded dY for the integers of 'int8'"):
        model(torch.randn(3, 4)).sum().backward()


def test_what_a_unit_cannot_multiply_names_the_layer() -> None:
    tensor = {"format": "int8", "scale": "amax"}
    model = nn.Sequential(nn.Linear(200_000, 1))
    emulate(model, {"weights": tensor, "activations": tensor, "datapath": {"forward": "int8"}})
    with pytest.raises(RunError, match="layer '0', forward: mac 'int8': a sum of 200000 products could overflow"):
        model(torch.randn(2, 200_000))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_what_follows_may_write_in_place(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(inplace=True))
    x = torch.randn(*shape)
    expected = model(x)
    emulate(model, {"datapath": ALL_FP32})
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("datapath", [None, ALL_FP32])
def test_empty_batches(datapath: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    emulate(model, {"datapath": datapath})
    y = model(torch.randn(0, 2, 3, 3))
    y.sum().backward()
    assert y.shape == (0, 3)
    assert model[0].weight.grad is not None
    assert not model[0].weight.grad.any()


def test_formats_with_alpha_codes() -> None:
    fmt = {"exponent_bits": 4, "mantissa_bits": 3, "alpha_codes": True}
    gradients = {"format": fmt, "scale": "amax", "pruning": {"policy": "homogeneous", "sparsity": 0.5}}
    grads = []
    for datapath in (None, ALL_FP32):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 4)), torch.randn(16, 20)
        emulate(model, {"gradients": gradients, "datapath": datapath})
        model(x).square().sum().backward()
        grads.append(model[0].weight.grad)
    torch.testing.assert_close(*grads)


def test_an_output_padding_of_the_stride_is_not_emulated() -> None:
    layer = nn.ConvTranspose2d(2, 3, 3, dilation=2, output_padding=1)
    handle = emulate(nn.Sequential(layer), {})
    handle.model(torch.randn(1, 2, 4, 4)).sum().backward()
    assert not handle.ledger.products
    emulate(model := nn.Sequential(nn.ConvTranspose2d(2, 3, 3, dilation=2, output_padding=1)), {"datapath": ALL_FP32})
    with pytest.raises(RunError, match="has output_padding of its stride or more"):
        model(torch.randn(1, 2, 4, 4))


def test_a_kernel_larger_than_its_input() -> None:
    emulate(model := nn.Sequential(nn.Conv1d(2, 2, 3, stride=3)), {"datapath": ALL_FP32})
    with pytest.raises(RunError, match="layer '0', forward: a kernel of \\(3,\\) does not fit into \\(1,\\)"):
        model(torch.randn(3, 2, 1))


def test_layers_and_modules_may_be_called_by_themselves() -> None:
    unit = {"forward": {"accumulator": "e6m2"}}
    model = nn.Sequential(nn.Linear(9, 4), nn.Sequential())
    x = torch.randn(3, 9)
    emulate(model, {"datapath": unit, "products": [{"match": "1", "datapath": unit}]})
    expected = accel.matmul(x, model[0].weight.detach().t(), unit["forward"]) + model[0].bias.detach()
    assert torch.equal(model[0](x), expected)
    model[1].forward = lambda y: y @ y.t()  # type: ignore[method-assign]
    assert torch.equal(model[1](x), accel.matmul(x, x.t(), unit["forward"]))


def test_names_of_operands_and_products_that_are_refused() -> None:
    def model_of(function: Any, datapath: Any) -> nn.Module:
        module = nn.Sequential()
        module.forward = function  # type: ignore[method-assign]
        emulate(module, {"include": [], "products": [{"match": "*", "datapath": datapath}]})
        return module

    x, unit = torch.randn(3, 4, 4), {"forward": {"accumulator": "e6m2"}}
    expected = accel.matmul(x, x, unit["forward"])
    for function in (
        lambda y: torch.matmul(input=y, other=y),
        lambda y: torch.bmm(y, mat2=y),
        lambda y: torch.linalg.matmul(y, y),
        lambda y: (
            functional.linear(y, y[0].t()) if y.ndim == 2 else torch.stack([functional.linear(z, z.t()) for z in y])
        ),
    ):
        assert torch.equal(model_of(function, unit)(x), expected)
        assert torch.equal(model_of(function, {})(x), function(x))
    for function in (
        lambda y: y[0].mv(y[0, 0]),
        lambda y: torch.inner(y, y),
        lambda y: functional.conv1d(y, y),
        lambda y: functional.multi_head_attention_forward(y, y, y, *[None] * 20),
        lambda y: torch.bmm(y, y, out=torch.empty(0)),
    ):
        with pytest.raises(RunError, match="cannot be emulated"):
            model_of(function, unit)(x)


def test_a_query_that_no_key_is_for() -> None:
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[2] = False
    model, q = Attention(attn_mask=mask), torch.randn(1, 7, 8, requires_grad=True)
    expected = torch.autograd.grad(model(q, q, q).sum(), q)[0]
    emulate(model, {"include": [], "products": [{"match": "*", "datapath": ALL_FP32}]})
    y = model(q, q, q)
    assert not y[0, 2].any()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), q)[0], expected)
    model.options["is_causal"] = True
    with pytest.raises(RunError, match="attn_mask and is_causal exclude each other"):
        model(q, q, q)


def test_backward_of_backward_is_refused() -> None:
    emulate(model := nn.Sequential(nn.Linear(3, 2)), {"datapath": ALL_FP32})
    x = torch.randn(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_inference_mode_and_other_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    emulate(model, {"activations": {"format": "e4m3fn"}, "weights": {"format": "e4m3fn"}})
    with torch.inference_mode():
        assert model.eval()(torch.randn(2, 3)).shape == (2, 2)
    with pytest.raises(RunError, match="layer '0' is called with a weight that is not its parameter"):
        torch.func.functional_call(model, {"0.weight": torch.ones(2, 3)}, torch.randn(2, 3))


def test_checkpointed_products_are_refused() -> None:
    unit = {"forward": {"accumulator": "e6m2"}}

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, x, x, use_reentrant=True)

    model, x = Root(), torch.randn(1, 3, 4, requires_grad=True)
    emulate(model, {"include": [], "products": [{"match": "inner", "datapath": unit}]})
    with pytest.raises(RunError, match="module 'inner' is recomputed in backward"):
        model(x).sum().backward()
