"""Packed activations: the same gradients bit for bit, memory that is really freed, and what the ledger makes of it."""

from __future__ import annotations

import gc
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

import accel
import models
from fpsim.emulation import Emulator, emulate
from fpsim.errors import ConfigError
from fpsim.saved import SMALLEST

EXACT: dict[str, Any] = {"saved_activations": {"codec": "bitmask"}}
ROUNDED: dict[str, Any] = {"saved_activations": {"format": "e4m3fn", "codec": "bitmask"}}
EXACTLY = {"ledger": {"every_steps": 1}}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def streams() -> int:
    """How many packed tensors are alive."""
    return sum(type(thing) is accel.Packed for thing in gc.get_objects())


def assert_nothing_is_packed_here() -> None:
    before = streams()
    y = torch.randn(SMALLEST, requires_grad=True).exp().exp()
    assert streams() == before
    y.sum().backward()


class Net(nn.Module):
    """A linear layer, and what is made of its output and a second parameter."""

    def __init__(self, then: Callable[[nn.Module, Tensor], Tensor], width: int = 64) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.randn(width))
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.fc(x))


def gradients(
    make: Callable[[], nn.Module], spec: dict[str, Any], shape: tuple[int, ...] = (128, 64)
) -> tuple[list[Tensor], Emulator]:
    """Of one step on random input, which needs a gradient too."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape, requires_grad=True)
    handle = emulate(model, spec, seed=3)
    y = model(x)
    y.backward(torch.randn(y.shape))
    return [t.grad for t in (x, *model.parameters()) if t.grad is not None], handle


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def assert_exact(make: Callable[[], nn.Module], spec: dict[str, Any], **options: Any) -> Emulator:
    """The same gradients with and without; returns the handle with."""
    plain, _ = gradients(make, spec, **options)
    packed, handle = gradients(make, {**spec, **EXACT}, **options)
    assert_same_bits(plain, packed)
    return handle


# --- training is the same, bit for bit ----------------------------------------------------------------------------

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "input_shape": (1, 8, 8), "hidden": [256, 128, 128]},
    "lenet": {"name": "lenet", "input_shape": (1, 16, 16)},
    "resnet18": {"name": "resnet18", "input_shape": (3, 12, 12), "width": 8},
}


def trained(network: str, spec: dict[str, Any], steps: int = 2) -> tuple[dict[str, Tensor], Emulator]:
    torch.manual_seed(0)
    model = models.build(classes=10, **NETWORKS[network])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    handle = emulate(model, spec, seed=5, optimizer=optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        images, labels = torch.randn(64, *NETWORKS[network]["input_shape"]), torch.randint(0, 10, (64,))
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        handle.step()
    return model.state_dict(), handle


@pytest.mark.parametrize(
    ("network", "codec"),
    [("mlp", "bitmask"), ("mlp", "rle"), ("mlp", "dense"), ("lenet", "bitmask"), ("resnet18", "bitmask")],
)
def test_training_is_the_same_bit_for_bit(network: str, codec: str) -> None:
    plain, without = trained(network, {"accelerator": "fp8-training"})
    packed, handle = trained(network, {"accelerator": "fp8-training", "saved_activations": {"codec": codec}})
    assert_same_bits(
        [t for t in plain.values() if t.dtype == torch.float32],
        [t for t in packed.values() if t.dtype == torch.float32],
    )
    assert without.saved_activations == {}
    kept = handle.saved_activations
    assert kept["layer_input"].tensors > 0
    assert kept["float32"].tensors > 0
    assert kept["layer_input"].kept_bytes < 0.3 * kept["layer_input"].plain_bytes
    without_norms = [[r for r in h.ledger.records if r.role != "norm_input"] for h in (without, handle)]
    assert without_norms[0] == without_norms[1]


def test_a_network_without_emulated_formats_is_packed_too() -> None:
    plain, _ = trained("resnet18", {})
    packed, handle = trained("resnet18", EXACT)
    assert_same_bits(
        [t for t in plain.values() if t.dtype == torch.float32],
        [t for t in packed.values() if t.dtype == torch.float32],
    )
    assert set(handle.saved_activations) == {"float32", "plain"}


def test_special_values_survive() -> None:
    """Only a NaN's payload does not: it comes back as the canonical NaN."""
    special = torch.randn(128, 64)
    special[:, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    special[:, 4] = -1e-42
    expected = special.view(torch.int32).clone()
    special.view(torch.int32)[0, 0] = -0x3FF123
    assert special[0, 0].isnan()
    seen: list[Tensor] = []

    class Sets(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return special.clone()

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> Any:
            return dy[0]

    _, handle = gradients(lambda: Net(lambda net, h: Saves.apply(Sets.apply(h), seen)), EXACT)
    assert handle.saved_activations["float32"].tensors == 1
    assert torch.equal(seen[0].view(torch.int32), expected)


def test_what_is_saved_twice_is_packed_once_and_by_version() -> None:
    def shared(net: nn.Module, h: Tensor) -> Tensor:
        h = h.exp()  # saved by exp, twice by the product, once more by the other
        return (h * h) * net.gain + h

    kept = assert_exact(lambda: Net(shared), {}).saved_activations
    assert kept["float32"].tensors == 2  # h, h * h
    assert kept["float32"].plain_bytes == 2 * 4 * 128 * 64

    def transposed(net: nn.Module, h: Tensor) -> Tensor:
        return h * net.gain + h.t() * net.gain

    kept = assert_exact(lambda: Net(transposed), {}, shape=(64, 64)).saved_activations
    assert kept["float32"].tensors == 1  # of the same storage

    def modified(net: nn.Module, h: Tensor) -> Tensor:
        product = h * net.gain  # saves h
        h.mul_(2)
        return product + h * net.gain  # saves it again, doubled

    def by_hand(net: nn.Module, h: Tensor) -> Tensor:
        return h * net.gain + (2 * h) * net.gain

    packed, handle = gradients(lambda: Net(modified), EXACT)
    expected, _ = gradients(lambda: Net(by_hand), {})
    for a, b in zip(packed, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert handle.saved_activations["float32"].tensors == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(lambda: Net(modified), {})


def test_an_address_that_is_used_again_is_another_tensor() -> None:
    place = np.empty((128, 64), np.float32)

    def then(net: nn.Module, h: Tensor) -> Tensor:
        total = h
        for i in range(20):
            place[:] = i + 1
            total = total + net.gain * torch.from_numpy(place)  # a storage of its own each time, in the same place
        return total

    model = Net(then)
    handle = emulate(model, EXACT)
    model(torch.randn(128, 64)).sum().backward()
    assert model.gain.grad is not None
    assert torch.equal(model.gain.grad, torch.full((64,), 128.0 * sum(range(1, 21))))
    assert handle.saved_activations["float32"].tensors == 20


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("passes", [1, 2])
def test_accumulated_gradients_and_passes_before_backward(inputs: int, passes: int) -> None:
    """`inputs` forward passes before one backward pass, all that `passes` times in a step; a layer that runs twice."""

    def then(net: nn.Module, h: Tensor) -> Tensor:
        return net.fc(h.relu())

    def train(spec: dict[str, Any]) -> list[Tensor]:
        torch.manual_seed(0)
        model = Net(then)
        handle = emulate(model, {"accelerator": "fp8-training", "exclude": [], **spec}, seed=2)
        for _ in range(2):
            for _ in range(passes):
                sum(model(torch.randn(128, 64)).square().mean() for _ in range(inputs)).backward()  # type: ignore[union-attr]
            handle.step()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert_same_bits(train({}), train(EXACT))


def test_backward_may_run_twice_and_be_differentiated() -> None:
    def twice(spec: dict[str, Any]) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = Net(lambda net, h: h.exp() * net.gain), torch.randn(128, 64, requires_grad=True)
        emulate(model, spec)
        loss = model(x).mean()
        loss.backward(retain_graph=True)
        (into_x,) = torch.autograd.grad(loss, x, create_graph=True)
        into_x.square().sum().backward()
        return [t.grad for t in (x, *model.parameters()) if t.grad is not None]

    assert_same_bits(twice({}), twice(EXACT))


# --- what comes back is what was saved ----------------------------------------------------------------------------


class Saves(torch.autograd.Function):
    """Saves its input and hands what comes back to `seen`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        ctx.seen.append(ctx.saved_tensors[0])
        return dy[0], None


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "transposed": (lambda h: h.t(), "float32"),
    "channels last": (lambda h: h.reshape(2, 4, 32, 32).contiguous(memory_format=torch.channels_last), "float32"),
    "with holes": (lambda h: h.reshape(128, 64)[:, 5:40], "float32"),
    "one of three": (lambda h: h.reshape(32, 4, 64).repeat(1, 3, 1).transpose(0, 1).chunk(3, -1)[1], "float32"),
    "expanded": (lambda h: h[:, :1].expand(128, 64), "plain"),
    "expanded with holes": (lambda h: h[::100, :1].expand(2, 3000), "plain"),
    "windows": (lambda h: h.unfold(1, 8, 1), "plain"),
    "negated": (lambda h: torch.view_as_complex(h.reshape(128, 32, 2)).conj().imag, "plain"),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_come_back(view: str) -> None:
    make, kind = VIEWS[view]
    given: list[Tensor] = []
    seen: list[Tensor] = []

    def then(net: nn.Module, h: Tensor) -> Tensor:
        given.append(make(h))
        return Saves.apply(given[0], seen).sum()

    _, handle = gradients(lambda: Net(then), EXACT)
    assert torch.equal(seen[0], given[0])
    assert seen[0].stride() == given[0].stride()
    assert seen[0].data_ptr() == given[0].data_ptr() if kind == "plain" else seen[0].data_ptr() != given[0].data_ptr()
    assert handle.saved_activations[kind].tensors == 1


@pytest.mark.parametrize(
    ("activations", "kind"),
    [
        ({"format": "e4m3fn", "scale": "amax"}, "layer_input"),
        ({"format": "e4m3fn", "scale": "amax", "granularity": "channel"}, "layer_input"),
        ({"format": "e2m1", "scale": "power_of_two", "rounding": "stochastic"}, "layer_input"),
        ({"format": "mxfp8_e4m3fn"}, "layer_input"),
        ({"format": "nvfp4"}, "float32"),  # its scales are no powers of two
    ],
)
@pytest.mark.parametrize("layout", ["rows", "channels last"])
def test_the_input_of_a_layer_is_packed_in_the_layers_own_format(
    activations: dict[str, Any], kind: str, layout: str
) -> None:
    """Also where the layer saves a view of another shape, as a linear layer does of three dimensions."""
    spec = {"activations": activations}
    if layout == "rows":
        make, shape = lambda: nn.Linear(64, 32), (4, 48, 64)
    else:
        make, shape = lambda: nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last), (4, 8, 16, 16)
    plain, _ = gradients(make, spec, shape)
    packed, handle = gradients(make, {**spec, **ROUNDED}, shape)  # a rounded one would not give the same bits
    assert_same_bits(plain, packed)
    assert set(handle.saved_activations) == {kind}
    assert handle.saved_activations[kind].tensors == 1


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_rounded_input_that_the_layer_modifies_is_no_longer_on_its_grid(granularity: str) -> None:
    class Shifts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach().add_(0.3))

    def make() -> nn.Module:
        return nn.Sequential(nn.ReLU(), Shifts(64, 32))

    activations = {"format": "e4m3fn", "scale": "amax", "granularity": granularity}
    handle = assert_exact(make, {"activations": activations})
    assert set(handle.saved_activations) == {"float32"}


# --- what is left as it is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        {"weights": {"format": "e4m3fn"}},
        {"weight_pruning": {"name": "magnitude", "sparsity": 0.5, "at_epochs": 0}},
    ],
)
def test_parameters_buffers_inputs_and_rounded_or_masked_weights_are_left(weights: dict[str, Any]) -> None:
    class Alive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(128, 128, bias=False)
            self.register_buffer("table", torch.randn(64, 128))
            self.gain = nn.Parameter(torch.randn(64, 128))

        def forward(self, x: Tensor, other: dict[str, Tensor]) -> Tensor:
            return self.fc(x) * self.table + self.gain * other["y"]

    model = Alive()
    handle = emulate(model, {**weights, **EXACT}, steps_per_epoch=1)
    for _ in range(2):  # the second time the weight is there already
        x, y = torch.randn(64, 128, requires_grad=True), torch.randn(64, 128)  # for dX the layer saves its weight
        model(x, {"y": y}).sum().backward()
        assert handle.saved_activations == {}
        assert streams() == 0


def test_a_parameter_of_another_model_is_left() -> None:
    other = nn.Parameter(torch.randn(128, 64))
    model = Net(lambda net, h: h * other)
    handle = emulate(model, EXACT)
    model(torch.randn(128, 64)).sum().backward()
    assert {kind: kept.tensors for kind, kept in handle.saved_activations.items()} == {"float32": 1, "plain": 1}


def test_an_input_of_an_earlier_pass_is_a_tensor_like_any_other() -> None:
    model = Net(lambda net, h: (h + net.gain) * earlier)
    handle = emulate(model, EXACT)
    earlier = torch.randn(128, 64)
    model(earlier).sum().backward()
    assert handle.saved_activations == {}
    model(torch.randn(128, 64)).sum().backward()
    assert handle.saved_activations["float32"].tensors == 1


def test_other_types_and_small_tensors_are_left() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return functional.max_pool2d(self.conv(x), 2).double().exp()

    model = Pool()
    handle = emulate(model, EXACT)
    model(torch.randn(4, 1, 16, 16)).sum().backward()
    kept = handle.saved_activations
    assert (kept["float32"].tensors, kept["float32"].plain_bytes) == (1, 4 * SMALLEST)  # the pool's input
    assert (kept["plain"].tensors, kept["plain"].kept_bytes) == (2, 2 * 8 * SMALLEST // 4)  # its indices, exp's doubles
    model(torch.randn(3, 1, 16, 16)).sum().backward()
    assert set(handle.saved_activations) == {"plain"}


@pytest.mark.parametrize("what", ["parameter", "small tensor"])
def test_a_tensor_that_is_left_and_modified_before_backward_is_an_error(what: str) -> None:
    held: list[Tensor] = []

    def then(net: nn.Module, h: Tensor) -> Tensor:
        held.append(net.gain if what == "parameter" else h[:2].exp())
        return (h[:2] * held[0]).exp() * net.gain

    for spec, message in (({}, "modified by an inplace operation"), (EXACT, "modified in place")):
        held.clear()
        model = Net(then)
        emulate(model, spec)
        y = model(torch.randn(128, 64))
        with torch.no_grad():
            held[0].add_(1)
        with pytest.raises(RuntimeError, match=message):
            y.sum().backward()


# --- rounded for backward -----------------------------------------------------------------------------------------


def test_rounded_activations_by_hand() -> None:
    seen: list[Tensor] = []

    def then(net: nn.Module, h: Tensor) -> Tensor:
        seen.append(h.detach().clone())
        return h * net.gain

    (_, gain_gradient, *_), handle = gradients(lambda: Net(then), ROUNDED)
    scale = 2.0 ** math.ceil(math.log2(float(seen[0].abs().max()) / 448))
    rounded = accel.quantize(seen[0], "e4m3fn", scale=scale)
    torch.manual_seed(0)
    Net(then), torch.randn(128, 64)
    dy = torch.randn(128, 64)
    assert torch.equal(gain_gradient, (dy * rounded).sum(0))
    assert not torch.equal(gain_gradient, (dy * seen[0]).sum(0))
    assert handle.saved_activations["rounded"].kept_bytes == len(
        accel.pack(rounded.flatten(), "bitmask", "e4m3fn", scale).to_bytes()
    )


def test_rounding_changes_the_gradients_a_little() -> None:
    def error(spec: dict[str, Any]) -> float:
        def make() -> nn.Module:
            return models.build(classes=10, **NETWORKS["resnet18"])

        plain, _ = gradients(make, {}, (64, 3, 12, 12))
        packed, _ = gradients(make, spec, (64, 3, 12, 12))
        difference = sum(float((a - b).square().sum()) for a, b in zip(plain, packed, strict=True))
        return math.sqrt(difference / sum(float(a.square().sum()) for a in plain))

    coarse, fine = error(ROUNDED), error({"saved_activations": {"format": "e5m10"}})
    assert 0.01 < coarse < 0.3
    assert 0 < fine < coarse / 30  # seven mantissa bits more


def test_what_needs_no_gradient_or_is_not_finite_is_never_rounded() -> None:
    def dropped() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.3))  # its mask holds 1 / 0.7, which is not in e4m3

    plain, _ = gradients(dropped, {})
    packed, handle = gradients(dropped, ROUNDED)
    assert_same_bits(plain, packed)
    assert handle.saved_activations["float32"].tensors == 1

    def then(net: nn.Module, h: Tensor) -> Tensor:
        return (h + torch.eye(128, 64).log()) * net.gain  # minus infinity

    plain, _ = gradients(lambda: Net(then), {})
    packed, handle = gradients(lambda: Net(then), ROUNDED)
    assert_same_bits(plain, packed)
    assert set(handle.saved_activations) == {"float32"}


# --- memory -------------------------------------------------------------------------------------------------------


def storages_alive_after_forward(spec: dict[str, Any]) -> tuple[int, Tensor]:
    """How many outputs of the ReLU layers are alive once the forward pass is over; the loss."""
    model = models.build(classes=10, **NETWORKS["resnet18"])
    storages: list[StorageWeakRef] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, i, y: storages.append(StorageWeakRef(y.untyped_storage())))
    emulate(model, {"accelerator": "fp8-training", **spec}).step_number = 1  # not a step that the ledger samples
    loss = model(torch.randn(64, 3, 12, 12)).sum()
    assert len(storages) == 17
    return sum(not storage.expired() for storage in storages), loss


def test_float32_activations_are_freed_in_forward_and_streams_in_backward() -> None:
    """Without the collector of cycles: reference counts alone free them."""
    gc.collect()
    gc.disable()
    try:
        alive, loss = storages_alive_after_forward({})
        assert alive == 17
        del loss
        alive, loss = storages_alive_after_forward(EXACT)
        assert alive == 0
        assert streams() > 50
        loss.backward()
        assert streams() == 0
        _, loss = storages_alive_after_forward(EXACT)
        assert streams() > 50
        del loss  # a graph that is dropped without backward
        assert streams() == 0
    finally:
        gc.enable()


def test_an_output_that_is_left_does_not_hold_its_own_graph() -> None:
    model = Net(lambda net, h: h[:2].exp())
    emulate(model, EXACT)
    gc.disable()
    try:
        y = model(torch.randn(128, 64))
        storage = StorageWeakRef(y.untyped_storage())
        assert not storage.expired()
        del y
        assert storage.expired()
    finally:
        gc.enable()


def test_a_stream_is_freed_when_backward_has_used_it() -> None:
    counts: list[int] = []

    class Counts(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> Any:
            counts.append(streams())
            return dy[0]

    def then(net: nn.Module, h: Tensor) -> Tensor:
        for _ in range(4):
            h = Counts.apply((h / 2).sin())  # sin saves its input
        return h

    gradients(lambda: Net(then), EXACT)
    assert counts == [4, 3, 2, 1]


# --- where the hooks are on ---------------------------------------------------------------------------------------


def test_evaluation_is_not_packed() -> None:
    model = Net(lambda net, h: h.exp() * net.gain)
    handle = emulate(model, EXACT)
    x = torch.randn(128, 64)
    y = model(x)
    kept = handle.saved_activations
    assert kept["float32"].tensors == 1
    before = streams()
    with torch.no_grad():
        model(x)
    model.eval()
    other = model(x)
    assert streams() == before
    assert handle.saved_activations == kept  # of the latest pass that trains
    assert_nothing_is_packed_here()
    y.sum().backward()
    other.sum().backward()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_fails_leaves_no_hooks(error: type[BaseException]) -> None:
    def then(net: nn.Module, h: Tensor) -> Tensor:
        if fails:
            raise error
        return h.exp() * net.gain

    model = Net(then)
    handle = emulate(model, EXACT)
    fails = True
    with pytest.raises(error):
        model(torch.randn(128, 64))
    assert_nothing_is_packed_here()  # though torch calls no hooks after an interrupt
    fails = False
    for _ in range(3):
        model(torch.randn(128, 64)).sum().backward()
        assert handle.saved_activations["float32"].tensors == 1
        assert streams() == 0
    handle.step()
    assert_nothing_is_packed_here()


def test_one_storage_in_two_shapes_is_packed_once() -> None:
    def then(net: nn.Module, h: Tensor) -> Tensor:
        return nn.functional.linear(h.relu().unflatten(1, (8, 8)).flatten(1), net.gain.expand(3, 64).clone())

    kept = assert_exact(lambda: Net(then), {}).saved_activations
    assert kept["float32"].tensors == 1  # relu's result, as the product saves it


@pytest.mark.parametrize("is_detached", [False, True])
def test_what_needs_no_gradient_is_never_rounded(is_detached: bool) -> None:
    """Though the sine saves, of the same memory, what does need one."""
    model = Net(lambda net, h: h.sin() + (h.detach() if is_detached else h) * net.gain)
    emulate(model, ROUNDED)
    x = torch.randn(128, 64)
    h = model.fc(x).detach()
    model(x).sum().backward()
    assert torch.equal(model.gain.grad, (torch.ones(128, 64) * h).sum(0)) == is_detached


def test_a_number_near_the_largest_stays_finite() -> None:
    seen: list[Tensor] = []
    model = Net(lambda net, h: Saves.apply(h * 0 + torch.finfo(torch.float32).max, seen) * net.gain.sum())
    emulate(model, {"saved_activations": {"format": "e2m1"}})
    model(torch.randn(128, 64)).sum().backward()
    assert (seen[0] == torch.finfo(torch.float32).max).all()


def test_nothing_is_remembered_without_a_training_pass() -> None:
    model = Net(lambda net, h: h.exp() * net.gain)
    handle = emulate(model, {"activations": {"format": "e4m3fn"}, **EXACT})
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(128, 64))
    model.fc(torch.randn(128, 64))
    assert handle._saved is not None
    assert not handle._saved._grids
    assert not handle._saved._alive


def test_detach_takes_the_hooks_off() -> None:
    model = Net(lambda net, h: (handle.detach() if detaches else None, h.exp() * net.gain)[1])
    detaches = False
    handle = emulate(model, EXACT)
    model(torch.randn(128, 64)).sum().backward()
    handle.detach()
    y = model(torch.randn(128, 64))
    assert streams() == 0
    y.sum().backward()
    handle = emulate(model, EXACT)
    detaches = True  # inside a forward pass
    model(torch.randn(128, 64)).sum().backward()
    assert_nothing_is_packed_here()


@pytest.mark.parametrize("without_grad", [False, True])
def test_a_forward_pass_inside_a_forward_pass(without_grad: bool) -> None:
    depth: list[int] = []

    def then(net: nn.Module, h: Tensor) -> Tensor:
        if depth:
            return h.exp()
        depth.append(1)
        first = h.sin().cos()  # saves h and sin(h)
        with torch.set_grad_enabled(not without_grad):
            inner = net(h.sigmoid())  # saves with gradients the sigmoid and the exponential
        depth.pop()
        return first * inner  # saves both; where inner needs no gradient, inner alone

    plain, _ = gradients(lambda: Net(then), {})
    packed, handle = gradients(lambda: Net(then), EXACT)
    assert_same_bits(plain, packed)
    assert handle.saved_activations["float32"].tensors == (3 if without_grad else 5)
    assert_nothing_is_packed_here()


def test_a_pass_leaves_no_weak_references_behind() -> None:
    """They keep a storage's own memory, though not what it held."""

    def references() -> int:
        return sum(type(thing) is StorageWeakRef for thing in gc.get_objects())

    model = Net(lambda net, h: h.exp())
    emulate(model, {"weights": {"format": "e4m3fn"}, "activations": {"format": "e4m3fn"}, **EXACT})
    before, y = references(), model(torch.randn(128, 64))
    y.sum().backward()
    assert references() == before
    model.register_forward_pre_hook(lambda *_: during.append(references()))
    during: list[int] = []
    model(torch.randn(128, 64))
    assert during[0] > before


def test_the_model_is_collected_with_its_handle() -> None:
    model = Net(lambda net, h: h.exp())
    handle = emulate(model, EXACT)
    model(torch.randn(128, 64)).sum().backward()
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


# --- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ({"codec": "alpha"}, "codec", "must be dense, bitmask, bitmask2, rle(BITS) or coo"),
        ({"codec": "nm(1:4)"}, "codec", "must be dense, bitmask, bitmask2, rle(BITS) or coo"),
        ({"codec": "csr"}, "codec", "must be dense, bitmask, bitmask2, rle(BITS) or coo"),
        ({"codec": "bitmsk"}, "codec", "unknown codec 'bitmsk' (did you mean 'bitmask'?)"),
        ({"format": "mxfp8_e4m3fn"}, "format", "must be a scalar format or null (got the block format 'mxfp8_e4m3fn')"),
        ({"format": "e8m0fnu"}, "format", "must be a signed format without alpha_codes, or null (got 'e8m0fnu')"),
        ({"format": "e4m3fm"}, "format", "e4m3fm"),
        ({"format": {"exponent_bits": 9, "mantissa_bits": 2}}, "format.exponent_bits", "must be <= 8 (got 9)"),
        ({"fmt": "e4m3fn"}, "fmt", "unknown key"),
        ("bitmask", "", "must be a mapping"),
    ],
)
def test_a_mistake_is_one_error_at_its_key(given: Any, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        emulate(nn.Linear(4, 4), {"saved_activations": given})
    (problem,) = caught.value.problems
    assert problem.path == f"emulation.saved_activations.{key}".rstrip(".")
    assert message in problem.message


def test_null_is_off_and_null_is_the_default_format() -> None:
    model = nn.Linear(4, 4)
    assert emulate(model, {}).spec == emulate(model, {"saved_activations": None}).spec
    spec = emulate(model, {"saved_activations": {}}).spec.saved_activations
    assert spec is not None
    assert (spec.format, spec.codec) == (None, "bitmask")
    described = emulate(model, {"saved_activations": {"format": {"base": "e4m3fn", "bias": 8}}}).spec
    assert described.saved_activations is not None


# --- the ledger ---------------------------------------------------------------------------------------------------


def normalised() -> nn.Sequential:
    layers = {"a": nn.Linear(32, 64), "n": nn.BatchNorm1d(64), "relu": nn.ReLU(), "b": nn.Linear(64, 16)}
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("codec", ["bitmask", "rle"])
@pytest.mark.parametrize("fmt", [None, "e4m3fn"])
def test_the_ledger_counts_the_stream_of_what_is_kept(fmt: str | None, codec: str) -> None:
    model = normalised()
    seen: list[Tensor] = []
    model.n.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach().clone()))
    handle = emulate(model, {**EXACTLY, "saved_activations": {"format": fmt, "codec": codec}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(256, 32)).square().mean().backward()
    optimizer.step()
    handle.step()

    values, scale = seen[0], None
    if fmt is not None:
        scale = 2.0 ** math.ceil(math.log2(float(seen[0].abs().max()) / 448))
        values = accel.quantize(seen[0], fmt, scale=scale)
    stream = 8 * len(accel.pack(values.flatten(), codec, fmt or "fp32", scale).to_bytes())
    forward, dgrad = [record for record in handle.ledger.records if record.role == "norm_input"]
    assert forward.stored.nbits == dgrad.stored.nbits == stream
    assert (forward.stored.format, forward.stored.codec) == (fmt or "fp32", codec)
    assert (forward.writes, forward.resident, dgrad.reads) == (1, True, 1)
    assert forward.stored.nonzeros == int(torch.count_nonzero(values.view(torch.int32)))

    # At the peak both inputs, the normalisation's and dY of the last layer are there, and the master weights.
    x, hidden, dy = 256 * 32, 256 * 64, 256 * 16
    parameters = 32 * 64 + 64 + 2 * 64 + 64 * 16 + 16
    by_b = 64 * 16 + 16  # weight gradients that backward has left when dY of b is the one in flight
    assert handle.ledger.footprint_bits()["total"] == {
        "encoded": 32 * (x + hidden + dy + parameters + by_b) + stream,
        "fp32": 32 * (x + 2 * hidden + dy + parameters + by_b),
        "bf16": 16 * (x + 2 * hidden + dy + by_b) + 32 * parameters + 16 * (32 * 64 + 64 * 16),
    }


def test_the_ledger_counts_what_is_not_packed_as_float32() -> None:
    for every, batch in (("module", 256), ("model", 8)):
        model = normalised()
        handle = emulate(model, {**EXACTLY, **EXACT})
        x = torch.randn(batch, 32)
        y = model(x) if every == "model" else model.b(model.n(model.a(x)).relu())  # outside the model no hook is on
        y.sum().backward()
        records = [record for record in handle.ledger.records if record.role == "norm_input"]
        assert [record.stored.is_float32 for record in records] == [True, True]
        assert {record.stored.nbits for record in records} == {32 * batch * 64}
