"""The ledger against counts by hand: streams of the very tensors of a step, reads, writes, footprints, baselines."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel
from accel import Ledger
from accel.ledger import PASSES, ROLES, SCHEMES, Record, peak, stored_encoded, stored_plain
from fpsim.emulation import Emulator, emulate

WEIGHTS, ACTIVATIONS = {"format": "e4m3fn"}, {"format": "e3m2", "codec": "bitmask"}
Bits = dict[str, float]


def spec(codec: str = "alpha", every_steps: int = 1) -> dict[str, Any]:
    gradients = {"format": "e5m2", "rounding": "stochastic", "codec": codec, "pruning": {"sparsity": 0.7}}
    return {
        "weights": WEIGHTS,
        "activations": ACTIVATIONS,
        "gradients": gradients,
        "ledger": {"every_steps": every_steps},
    }


def watch(model: nn.Module, layers: list[str]) -> dict[tuple[str, str], Tensor]:
    """The rounded input, weight and output gradient of each layer, filled in by the next step; after `emulate`."""
    seen: dict[tuple[str, str], Tensor] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name, "activation"], seen[name, "weight"] = inputs[0].detach(), module.weight.detach()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(lambda dy: seen.__setitem__((name, "gradient"), dy.clone()))

        return hook

    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(before(name))
        model.get_submodule(name).register_forward_hook(after(name))
    return seen


def stream_bits(handle: Emulator, seen: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], int]:
    """8 x the bytes of the packed tensors."""
    bits = {}
    for (layer, role), tensor in seen.items():
        given = {"weight": WEIGHTS, "activation": ACTIVATIONS, "gradient": {"format": "e5m2"}}[role]
        codec, alpha = given.get("codec", "dense"), None
        if role == "gradient":
            codec = handle.spec.gradients.codec
            alpha = handle.pruning[layer].alpha if codec == "alpha" else None
        bits[layer, role] = 8 * len(accel.pack(tensor, codec, given["format"], alpha=alpha).to_bytes())
    return bits


def run_step(model: nn.Module, handle: Emulator, optimizer: torch.optim.Optimizer | None, x: Tensor) -> None:
    model.zero_grad()
    model(x).mul(100).square().sum().backward()
    if optimizer is not None:
        optimizer.step()
    handle.step()


def three(encoded: float, numel: int) -> Bits:
    return {"encoded": encoded, "fp32": 32 * numel, "bf16": 16 * numel}


def float32(numel: int) -> Bits:
    """A float32 tensor that is bfloat16 on the bfloat16 machine."""
    return three(32 * numel, numel)


def always_float32(numel: int) -> Bits:
    return dict.fromkeys(SCHEMES, 32 * numel)


def times(count: int, bits: Bits, **other: int) -> Bits:
    """`count` transfers of a tensor, another number of them in the schemes named."""
    return {scheme: other.get(scheme, count) * bits[scheme] for scheme in SCHEMES}


def plus(*rows: Bits) -> Bits:
    return {scheme: sum(row[scheme] for row in rows) for scheme in SCHEMES}


def assert_traffic(ledger: Ledger, expected: dict[str, dict[str, Bits]]) -> None:
    """expected: by role, by pass. Also that the sums by role, by pass and by layer are the total."""
    found: dict[tuple[str, str], Bits] = defaultdict(lambda: dict.fromkeys(SCHEMES, 0.0))
    by_layer: dict[str, Bits] = defaultdict(lambda: dict.fromkeys(SCHEMES, 0.0))
    for record in ledger.records:
        for scheme in SCHEMES:
            found[record.role, record.pass_name][scheme] += record.traffic(scheme)
            by_layer[record.layer][scheme] += record.traffic(scheme)
    flat = {(role, passed): bits for role, row in expected.items() for passed, bits in row.items()}
    assert {key: bits for key, bits in found.items() if any(bits.values())} == flat
    summary = ledger.traffic_bits_per_step()
    assert summary["by_role"] == {role: plus(*row.values()) for role, row in expected.items()}
    assert {name: row for name, row in summary["by_pass"].items() if any(row.values())} == {
        name: plus(*(row[name] for row in expected.values() if name in row))
        for name in PASSES
        if any(name in row for row in expected.values())
    }
    assert summary["total"] == plus(*flat.values()) == plus(*by_layer.values())


# --- a two-layer perceptron ---------------------------------------------------------------------------------------


def perceptron(inputs: int = 6) -> nn.Sequential:
    return nn.Sequential(OrderedDict(a=nn.Linear(inputs, 5), relu=nn.ReLU(), b=nn.Linear(5, 3)))


@pytest.mark.parametrize("codec", ["alpha", "bitmask", "dense"])
@pytest.mark.parametrize("batch", [1, 2000])  # in float32 the smaller peaks in backward of a, the larger of b
def test_a_perceptron_by_hand(codec: str, batch: int) -> None:
    torch.manual_seed(0)
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    handle = emulate(model, spec(codec), seed=3, optimizer=optimizer)
    seen = watch(model, ["a", "b"])
    run_step(model, handle, optimizer, torch.randn(batch, 6))

    bits = stream_bits(handle, seen)
    xa, xb = three(bits["a", "activation"], 6 * batch), three(bits["b", "activation"], 5 * batch)
    wa, wb = three(bits["a", "weight"], 30), three(bits["b", "weight"], 15)
    ga, gb = three(bits["a", "gradient"], 5 * batch), three(bits["b", "gradient"], 3 * batch)
    parameters_a, parameters_b = 30 + 5, 15 + 3
    parameters = parameters_a + parameters_b
    assert_traffic(
        handle.ledger,
        {
            "activation": {
                # the input of the network lies there and is read; xb is written and read, the logits are written
                "forward": plus(xa, times(2, xb), float32(3 * batch)),
                "wgrad": plus(xa, xb),
            },
            "weight": {
                "forward": plus(wa, wb),
                "dgrad": wb,  # the first layer has none
                "update": plus(times(1, wa, fp32=0), times(1, wb, fp32=0)),  # in float32 the master copy is the weight
            },
            "gradient": {"dgrad": plus(ga, times(2, gb)), "wgrad": plus(ga, gb)},  # each is written, b's read by dgrad
            "weight_gradient": {"wgrad": float32(parameters), "update": float32(parameters)},
            "master": {
                "update": times(2, always_float32(parameters)),
                "forward": always_float32(5 + 3),  # biases are used as they are
            },
            "optimizer_state": {"update": times(2, always_float32(parameters))},
        },
    )

    footprint = handle.ledger.footprint_bits()
    for scheme in SCHEMES:
        weights = {"fp32": 0}.get(scheme, wa[scheme] + wb[scheme])
        fixed = weights + 2 * 32 * parameters
        dense = 16 if scheme == "bf16" else 32
        moments = (  # while a layer's weight gradient is made, its input and output gradient exist
            xa[scheme] + xb[scheme] + gb[scheme] + dense * parameters_b,
            xa[scheme] + ga[scheme] + dense * parameters,
        )
        assert footprint["total"][scheme] == fixed + max(moments)
        assert sum(row[scheme] for row in footprint["by_role"].values()) == footprint["total"][scheme]
        assert (
            footprint["by_role"]["master"][scheme] == footprint["by_role"]["optimizer_state"][scheme] == 32 * parameters
        )
        assert footprint["by_role"]["weight"][scheme] == weights
        if scheme == "fp32":
            assert (moments[1] > moments[0]) == (batch == 1)


@pytest.mark.parametrize("codec", [name for name in accel.CODECS if name != "nm"])
def test_records_hold_the_counts_and_bits_of_the_tensors_of_the_step(codec: str) -> None:
    """Tensors of several blocks of 4096 elements, so that padding and offsets count."""
    torch.manual_seed(0)
    model = perceptron(inputs=7)
    handle = emulate(model, spec(codec), seed=3)
    seen = watch(model, ["a", "b"])
    run_step(model, handle, None, torch.randn(3001, 7).relu())

    stored = {(r.layer, r.role): r.stored for r in handle.ledger.records if (r.layer, r.role) in seen}
    assert set(stored) == set(seen)
    formats = {"weight": "e4m3fn", "activation": "e3m2", "gradient": "e5m2"}
    for key, tensor in seen.items():
        layer, role = key
        alpha = handle.pruning[layer].alpha if role == "gradient" else None
        tags = alpha if accel.find_codec(codec).tags_alpha else None
        chosen = {"weight": "dense", "activation": "bitmask", "gradient": codec}[role]
        packed = accel.pack(tensor, chosen, formats[role], alpha=tags)
        assert stored[key].bits_by_part == packed.bits_by_part
        assert stored[key].nbits == packed.nbits == 8 * len(packed.to_bytes())
        assert stored[key].numel == tensor.numel()
        assert stored[key].nonzeros == int((tensor.view(torch.int32) != 0).sum())
        assert (stored[key].format, stored[key].codec) == (formats[role], chosen)
        assert stored[key].value_bits == accel.format(formats[role]).bits
        for other, bits in stored[key].other_codecs_bits.items():
            if not (role == "gradient" and tags):  # an alpha off the grid fits no other codec
                counted = accel.footprint(tensor, codec=other, fmt=formats[role])
                assert bits == counted.nbits or (role == "gradient" and accel.CODECS[other].tags_alpha)
        counted = accel.footprint(tensor, codec=chosen, fmt=formats[role], alpha=tags)
        assert stored[key].order0_entropy_bits == pytest.approx(counted.order0_entropy_bits, rel=1e-12)
        if role == "gradient" and tags:
            assert stored[key].alphas == int((tensor.abs() == torch.tensor(alpha).float()).sum())
            even = accel.Counts(tensor.numel(), stored[key].nonzeros, stored[key].alphas)  # as many +alpha as -alpha
            entropy = accel.footprint(even, codec=chosen, fmt=formats[role]).tag_entropy_bits
            assert stored[key].tag_entropy_bits == pytest.approx(entropy, rel=1e-12)
            assert entropy >= counted.tag_entropy_bits
            assert stored[key].nonzeros < 0.35 * tensor.numel()
        else:
            assert role == "gradient" or stored[key].alphas == 0


# --- a residual network with normalisations -----------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.shortcut = nn.Conv2d(4, 4, 1, bias=False) if shortcut else nn.Identity()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(x)) + self.shortcut(x)).relu()
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("activations", [ACTIVATIONS, None])
def test_a_residual_network_by_hand(shortcut: bool, activations: dict[str, str] | None) -> None:
    torch.manual_seed(0)
    batch, pixels = 2, 36
    model = Residual(shortcut)
    handle = emulate(model, {**spec(), "activations": activations}, seed=3)
    layers = ["conv1", "conv2", *(["shortcut"] if shortcut else []), "fc"]
    seen = watch(model, layers)
    run_step(model, handle, None, torch.randn(batch, 1, 6, 6))

    bits = stream_bits(handle, {key: x for key, x in seen.items() if activations or key[1] != "activation"})
    for name in layers if activations is None else ():
        bits[name, "activation"] = 32 * seen[name, "activation"].numel()
    image, feature = batch * pixels, 4 * batch * pixels
    x1, x2, xf = (
        three(bits[name, "activation"], numel)
        for name, numel in (("conv1", image), ("conv2", feature), ("fc", 4 * batch))
    )
    w1, w2, wf = (three(bits[name, "weight"], numel) for name, numel in (("conv1", 36), ("conv2", 144), ("fc", 12)))
    g1, g2, gf = (
        three(bits[name, "gradient"], numel)
        for name, numel in (("conv1", feature), ("conv2", feature), ("fc", 3 * batch))
    )
    none: Bits = dict.fromkeys(SCHEMES, 0.0)
    ws, gs, xs = none, none, none
    partial_sums = 1  # float32 gradients of one tensor that are made and then added: at the sum with the identity
    if shortcut:  # reads the tensor that conv2 reads, and makes a second gradient of it
        ws, gs = three(bits["shortcut", "weight"], 16), three(bits["shortcut", "gradient"], feature)
        xs, partial_sums = x2, 2
    parameters = 36 + 8 + 144 + 8 + (16 if shortcut else 0) + 15
    # the sum reads what conv2 keeps only where that is float32; the output of the shortcut is written for it
    kept = not shortcut
    addend_writes = {"fp32": 0, "bf16": 0, **({} if activations else {"encoded": 0})} if kept else {}
    addend = float32(feature)
    assert_traffic(
        handle.ledger,
        {
            "activation": {
                "forward": plus(x1, times(2, x2), xs, times(2, xf), float32(3 * batch)),  # and the logits
                "wgrad": plus(x1, x2, xs, xf),
            },
            "weight": {
                "forward": plus(w1, w2, ws, wf),
                "dgrad": plus(w2, ws, wf),
                "update": times(1, plus(w1, w2, ws, wf), fp32=0),
            },
            "gradient": {
                "dgrad": plus(g1, times(2, g2), times(2, gs), times(2, gf)),
                "wgrad": plus(g1, g2, gs, gf),
            },
            "norm_input": {"forward": times(2, float32(feature)), "dgrad": times(2, float32(feature))},
            "addend": {
                "forward": plus(addend, times(1, addend, **addend_writes)),
                "dgrad": times(2 * partial_sums, addend),
            },
            "weight_gradient": {"wgrad": float32(parameters), "update": float32(parameters)},
            "master": {"update": times(2, always_float32(parameters)), "forward": always_float32(8 + 8 + 3)},
        },
    )

    footprint = handle.ledger.footprint_bits()
    for scheme in SCHEMES:
        dense = 16 if scheme == "bf16" else 32
        weights = {"fp32": 0}.get(scheme, plus(w1, w2, ws, wf)[scheme])
        norm = float32(feature)
        moments = (  # what is saved, the output gradient in flight, the elements of the weight gradients so far
            (plus(x1, norm, x2, norm, xf, gf), 15),  # fc
            (plus(x1, norm, x2, norm, gs), 15 + (16 if shortcut else 0)),  # shortcut; bn2 has no gradient of its own
            (plus(x1, norm, x2, g2), parameters - 36 - 8),  # conv2
            (plus(x1, norm), parameters - 36),  # bn1
            (plus(x1, g1), parameters),  # conv1
        )
        backward = max(saved[scheme] + dense * elements for saved, elements in moments)
        assert footprint["total"][scheme] == weights + 32 * parameters + backward


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_optimizer_state_is_what_the_optimizer_keeps(optimizer: str) -> None:
    model = perceptron()
    build = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters()),
    }[optimizer]()
    handle = emulate(model, spec(), optimizer=build)
    run_step(model, handle, build, torch.randn(4, 6))
    tensors = {"sgd": 0, "momentum": 1, "adam": 2}[optimizer]
    traffic = handle.ledger.traffic_bits_per_step()["by_role"].get("optimizer_state", dict.fromkeys(SCHEMES, 0))
    assert traffic == times(2 * tensors, always_float32(53))


def test_a_run_without_emulation_is_its_own_float32_baseline() -> None:
    model = Residual(shortcut=True)
    handle = emulate(model, {"ledger": {"every_steps": 1}})
    run_step(model, handle, None, torch.randn(2, 1, 6, 6))
    traffic, footprint = handle.ledger.traffic_bits_per_step(), handle.ledger.footprint_bits()
    for row in (traffic["total"], footprint["total"], *traffic["by_role"].values(), *footprint["by_role"].values()):
        assert row["encoded"] == row["fp32"]
        assert 0 <= row["bf16"] <= row["fp32"] + 16 * 215  # beside its master copies
    assert traffic["total"]["fp32"] / traffic["total"]["bf16"] > 1.8


# --- which steps --------------------------------------------------------------------------------------------------


def test_one_step_in_n_is_counted_and_every_step_that_is_asked_for() -> None:
    model = perceptron()
    handle = emulate(model, spec(every_steps=4))
    for number in range(11):
        if number == 10:
            handle.sample_this_step()
        run_step(model, handle, None, torch.randn(4, 6))
    assert handle.ledger.steps == [0, 4, 8, 10]
    assert handle.ledger.summary()["sampled_steps"] == [0, 4, 8, 10]
    each = {step: [r for r in handle.ledger.records if r.step == step] for step in handle.ledger.steps}
    shapes = {step: [(r.layer, r.role, r.pass_name, r.reads, r.writes) for r in rows] for step, rows in each.items()}
    assert all(rows == shapes[0] for rows in shapes.values())
    totals = [Ledger(rows).traffic_bits_per_step()["total"]["encoded"] for rows in each.values()]
    assert handle.ledger.traffic_bits_per_step()["total"]["encoded"] == pytest.approx(sum(totals) / 4)
    footprints = [Ledger(rows).footprint_bits()["total"]["encoded"] for rows in each.values()]
    assert handle.ledger.footprint_bits()["total"]["encoded"] == pytest.approx(sum(footprints) / 4)


def test_counting_does_not_change_the_training() -> None:
    def weights(every_steps: int) -> Tensor:
        torch.manual_seed(0)
        model = Residual(shortcut=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        handle = emulate(model, spec(every_steps=every_steps), optimizer=optimizer)
        for x in torch.randn(4, 2, 1, 6, 6, generator=torch.Generator().manual_seed(1)):
            run_step(model, handle, optimizer, x)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    assert torch.equal(weights(1), weights(100))


def test_evaluation_is_not_counted() -> None:
    model = perceptron()
    handle = emulate(model, spec())
    model.eval()
    model(torch.randn(4, 6))
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 6))
    assert handle.ledger.records == []


# --- the class alone ----------------------------------------------------------------------------------------------


def small_ledger() -> Ledger:
    ledger = Ledger()
    x = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, -0.5]])
    counts, fmt = accel.count_blocks(x, alpha=0.5), accel.format("e4m3fn")
    encoded = stored_encoded(counts, "alpha", fmt, (2, 3), histogram=(3, 1, 1, 1))
    ledger.add(0, "a", "activation", "forward", encoded, micro_batch=1, reads=1, writes=1, resident=True)
    ledger.add(0, "a", "activation", "wgrad", encoded, reads=1)
    ledger.add(5, "a", "activation", "forward", encoded, reads=1, resident=True)
    ledger.add(5, "b", "weight", "update", stored_plain(7), writes=1, resident=True, second_name_in=("fp32",))
    return ledger


def test_plain_data_and_back() -> None:
    ledger = small_ledger()
    restored = Ledger.from_data(json.loads(json.dumps(ledger.to_data())))
    assert restored.records == ledger.records
    assert restored.records[0].micro_batch == 1
    assert restored.summary() == ledger.summary()
    assert ledger.to_data(3) == ledger.to_data()[3:]
    assert [row["layer"] for row in ledger.to_data(3)] == ["b"]
    assert json.loads(json.dumps(ledger.summary())) == ledger.summary()


def test_bits_of_a_record_by_hand() -> None:
    """Alpha codec of 6 elements, 3 nonzeros, 2 of them +-alpha, in one block: bytes of 6, 3, 2 and 8 bits."""
    ledger = small_ledger()
    stored = ledger.records[0].stored
    packed = accel.pack(torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, -0.5]]), "alpha", "e4m3fn", alpha=0.5)
    assert (stored.nonzeros, stored.alphas) == (3, 2)
    assert stored.bits_by_part["metadata"] == 8 + 8 + 8
    assert stored.bits_by_part["payload"] == 8
    assert stored.bits_by_part["offsets"] == 32
    assert stored.nbits == packed.nbits
    encoded = packed.nbits
    assert ledger.traffic_bits_per_step()["by_role"] == {
        "activation": {"encoded": 2 * encoded, "fp32": 2 * 6 * 32, "bf16": 2 * 6 * 16},  # 4 transfers in 2 steps
        "weight": {"encoded": 7 * 32 / 2, "fp32": 0, "bf16": 7 * 16 / 2},
    }
    (row,) = [row for row in ledger.tensors() if row["role"] == "activation"]
    assert row["bits"]["total"] == encoded
    assert row["bits_per_element"] == encoded / 6
    assert (row["numel"], row["nonzeros"], row["alphas"], row["survivors"]) == (6, 3, 2, 1)
    # {0: 3, +alpha: 1, -alpha: 1, value: 1}, and 8 bits of the value
    entropy = 3 * 1 + 3 * 2.584962500721156 + 8
    assert row["tag_entropy_bits_per_element"] == pytest.approx(entropy / 6)
    assert row["order0_entropy_bits_per_element"] == pytest.approx((entropy - 8) / 6)


def test_a_row_of_tensors_is_the_mean_of_all_records() -> None:
    """A layer that runs twice in one step and once in another, with 2, 4 and 0 of 6 elements not zero."""
    ledger, fmt, bits = Ledger(), accel.format("e4m3fn"), []
    for step, nonzeros in ((0, 2), (0, 4), (3, 0)):
        x = torch.zeros(6)
        x[:nonzeros] = 1.5
        stored = stored_encoded(accel.count_blocks(x), "bitmask", fmt, (6,))
        bits.append(stored.nbits)
        ledger.add(step, "a", "activation", "forward", stored, reads=1)
    (row,) = ledger.tensors()
    assert (row["numel"], row["nonzeros"]) == (6, 2)
    assert row["bits"]["total"] == sum(bits) / 3
    assert row["bits"]["payload"] == 8 * 2
    assert row["bits_per_element"] == pytest.approx(sum(bits) / 3 / 6)


@pytest.mark.parametrize("codec", ["dense", "bitmask", "alpha"])
def test_further_scales_lie_in_the_header(codec: str) -> None:
    counts, fmt = accel.count_blocks(torch.ones(4, 8)), accel.format("e4m3fn")
    one, five = (stored_encoded(counts, codec, fmt, (4, 8), scales=scales) for scales in (1, 5))
    assert five.nbits == one.nbits + 4 * 32
    assert five.bits_by_part == {**one.bits_by_part, "header": one.bits_by_part["header"] + 4 * 32}
    assert five.other_codecs_bits == {name: bits + 4 * 32 for name, bits in one.other_codecs_bits.items()}
    assert one == stored_encoded(counts, codec, fmt, (4, 8))


def test_an_empty_ledger_sums_to_zero() -> None:
    summary = Ledger().summary()
    assert summary["sampled_steps"] == []
    assert summary["traffic_bits_per_step"]["total"] == summary["footprint_bits"]["total"] == dict.fromkeys(SCHEMES, 0)


@pytest.mark.parametrize(("role", "passed"), [("weights", "forward"), ("weight", "backward")])
def test_unknown_roles_and_passes_are_refused(role: str, passed: str) -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="must be one of"):
        ledger.add(0, "a", role, passed, stored_plain(1))
    assert ledger.records == []
    assert "weight" in ROLES


def walk(*rows: tuple[str, str, int], micro_batch: int = 0) -> list[Record]:
    """Records of float32 tensors that take memory: layer, role, elements."""
    ledger = Ledger()
    for layer, role, numel in rows:
        passed = {"gradient": "dgrad", "weight_gradient": "wgrad"}.get(role, "forward")
        ledger.add(0, layer, role, passed, stored_plain(numel), micro_batch=micro_batch, resident=True)
    return ledger.records


def elements(records: list[Record]) -> dict[str, float]:
    """The peak in elements."""
    return {role: bits / 32 for role, bits in peak(records, "fp32").items() if bits}


def test_the_peak_is_where_backward_holds_most() -> None:
    forward = [("a", "activation", 10), ("n", "norm_input", 20), ("b", "activation", 30), ("a", "master", 5)]
    assert elements(walk(*forward, ("b", "gradient", 7), ("a", "gradient", 2))) == {
        "activation": 40, "norm_input": 20, "gradient": 7, "master": 5,
    }  # fmt: skip
    # at b: 10 + 20 + 30 and b's weight gradient; at n: 10 + 20 and those of b and n; at a: 10 + 100 and the same
    left = (("b", "weight_gradient", 4), ("n", "weight_gradient", 1))
    assert elements(walk(*forward, *left, ("a", "gradient", 100))) == {
        "activation": 10, "gradient": 100, "weight_gradient": 5, "master": 5,
    }  # fmt: skip
    # at a: its input is there while its weight gradient is made
    left = (("a", "weight_gradient", 500), ("b", "weight_gradient", 4))
    assert elements(walk(*forward, *left, ("b", "gradient", 9))) == {
        "activation": 10, "weight_gradient": 504, "master": 5,
    }  # fmt: skip
    # an embedding saves no activation: its weight gradient is there when backward ends, and nothing else is saved
    assert elements(walk(*forward, *left, ("e", "weight_gradient", 600))) == {"weight_gradient": 1104, "master": 5}


def test_a_layer_that_runs_twice_has_one_weight_gradient_and_both_inputs() -> None:
    """The second call first: 4 + 6 saved, the larger dY of 3, and dW of 20."""
    calls = (("a", "activation", 4), ("a", "activation", 6), ("a", "gradient", 3), ("a", "gradient", 2))
    assert elements(walk(*calls, ("a", "weight_gradient", 20))) == {
        "activation": 10, "gradient": 3, "weight_gradient": 20,
    }  # fmt: skip


def test_micro_batches_follow_one_another() -> None:
    """In the first, b: 10 + 30 + 7 + 4 = 51, a: 10 + 5 + 4 = 19. In the second both weight gradients, 4 + 5, are there
    from the start: b: 10 + 28 + 7 + 9 = 54, a: 10 + 9 = 19. Together the inputs would be 78."""
    first = walk(("a", "activation", 10), ("b", "activation", 30), ("b", "gradient", 7))
    second = walk(("a", "activation", 10), ("b", "activation", 28), ("b", "gradient", 7), micro_batch=1)
    update = walk(("a", "weight_gradient", 5), ("b", "weight_gradient", 4))
    assert elements([*first, *second, *update]) == {"activation": 38, "gradient": 7, "weight_gradient": 9}
    assert elements([*first, *update]) == {"activation": 40, "gradient": 7, "weight_gradient": 4}


# --- layers that share, and layers that are frozen ----------------------------------------------------------------


class Wired(nn.Module):
    """Two modules joined by a function."""

    def __init__(self, join: Callable[[nn.Module, nn.Module, Tensor], Tensor], a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.join, self.a, self.b = join, a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.a, self.b, x)


def footprint_of(model: nn.Module, x: Tensor, **emulation: Any) -> dict[str, Any]:
    handle = emulate(model, {"ledger": {"every_steps": 1}, **emulation})
    model(x).sum().backward()
    handle.step()
    return handle.ledger.footprint_bits()


def test_the_weight_of_a_layer_that_is_called_twice_is_stored_once() -> None:
    joins: list[Callable[[nn.Module, nn.Module, Tensor], Tensor]] = [lambda a, b, x: a(x), lambda a, b, x: a(a(x))]
    once, twice = (
        footprint_of(Wired(join, nn.Linear(4, 4, bias=False), nn.ReLU()), torch.ones(2, 4), weights=WEIGHTS)
        for join in joins
    )
    assert twice["by_role"]["weight"] == once["by_role"]["weight"]


def test_micro_batches_read_the_weight_again_and_write_it_once() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(4, 3, bias=False)))
    handle = emulate(model, {"weights": WEIGHTS, "ledger": {"every_steps": 1}})
    x = torch.ones(7, 4, requires_grad=True)
    for _ in range(2):
        model(x).sum().backward()
    handle.step()
    rows = [(r.pass_name, r.micro_batch, r.reads, r.writes, r.resident) for r in handle.ledger.records
            if r.role == "weight"]  # fmt: skip
    assert rows == [
        ("forward", 0, 1, 0, True), ("dgrad", 0, 1, 0, False), ("update", 0, 0, 1, False),
        ("forward", 1, 1, 0, False), ("dgrad", 1, 1, 0, False),
    ]  # fmt: skip
    gradients = [(r.pass_name, r.micro_batch) for r in handle.ledger.records if r.role == "gradient"]
    assert gradients == [("dgrad", 0), ("wgrad", 0), ("dgrad", 1), ("wgrad", 1)]
    # one micro-batch at a time: X and dY of 7, and the weight gradient, beside the weight or the master copy
    assert handle.ledger.footprint_bits()["total"]["fp32"] == 32 * (7 * 4 + 7 * 3 + 12 + 12)
    model(x).sum().backward()
    handle.step()
    assert [r.micro_batch for r in handle.ledger.records if r.step == 1 and r.role == "weight"] == [0, 0, 0]


def test_the_output_of_the_model_is_written_once_and_takes_no_memory() -> None:
    model = perceptron()
    handle = emulate(model, spec())
    run_step(model, handle, None, torch.randn(4, 6))
    (logits,) = [r for r in handle.ledger.records if r.layer == "(output)"]
    assert (logits.role, logits.pass_name, logits.reads, logits.writes) == ("activation", "forward", 0, 1)
    assert not logits.resident
    assert {scheme: logits.traffic(scheme) for scheme in SCHEMES} == float32(4 * 3)


@pytest.mark.parametrize(("needs_gradient", "readers"), [(True, 1), (True, 2), (True, 3), (False, 3)])
def test_readers_of_one_input_beyond_the_first_add_a_float32_gradient_each(needs_gradient: bool, readers: int) -> None:
    class Fan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(5, 2, bias=False) for _ in range(readers))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([head(x) for head in self.heads])

    model = Fan()
    handle = emulate(model, {"activations": ACTIVATIONS, "ledger": {"every_steps": 1}})
    model(torch.ones(9, 5, requires_grad=needs_gradient)).sum().backward()
    handle.step()
    addends = [(r.layer, r.pass_name, r.reads, r.writes, r.stored.numel) for r in handle.ledger.records
               if r.role == "addend"]  # fmt: skip
    further = range(1, readers) if needs_gradient else ()
    assert addends == [(f"heads.{i}", "dgrad", 1, 1, 45) for i in further]
    inputs = [r for r in handle.ledger.records if r.role == "activation" and r.pass_name == "forward"][:-1]
    assert [r.writes for r in inputs] == [int(needs_gradient)] + [0] * (readers - 1)
    assert [r.resident for r in inputs] == [True] + [False] * (readers - 1)


def test_an_addition_before_the_first_layer_belongs_to_the_input() -> None:
    model = Wired(lambda a, b, x: b(a(x + x.clone())), nn.Linear(4, 4), nn.ReLU())
    handle = emulate(model, {"ledger": {"every_steps": 1}})
    for _ in range(2):
        run_step(model, handle, None, torch.ones(2, 4))
    addends = [(r.step, r.layer, r.pass_name) for r in handle.ledger.records if r.role == "addend"]
    assert addends == [(0, "(input)", "forward"), (1, "(input)", "forward")]


def test_a_baseline_stores_a_tensor_once_whatever_the_emulated_formats() -> None:
    def activations(**emulation: Any) -> Bits:
        layers = (nn.Linear(50, 1, bias=False), nn.Linear(50, 1, bias=False))
        model = Wired(lambda a, b, x: torch.cat([a(x), b(x)]), *layers)
        return footprint_of(model, torch.ones(9, 50), **emulation)["by_role"]["activation"]

    plain = activations()
    mixed = activations(activations=ACTIVATIONS, exclude=["b"])
    emulated = activations(activations=ACTIVATIONS)
    assert plain == float32(9 * 50)
    assert mixed == {**plain, "encoded": emulated["encoded"] + 32 * 9 * 50}
    packed = accel.pack(torch.ones(9, 50), ACTIVATIONS["codec"], ACTIVATIONS["format"])
    assert emulated["encoded"] == packed.nbits


def test_the_gradient_of_a_layer_that_shares_its_input_counts_at_the_peak() -> None:
    model = Wired(lambda a, b, x: a(x).sum() + b(x).sum(), nn.Linear(4, 1, bias=False), nn.Linear(4, 9, bias=False))
    assert footprint_of(model, torch.ones(500, 4))["by_role"]["gradient"]["fp32"] == 32 * 500 * 9


def test_a_frozen_weight_is_stored_in_every_scheme_and_never_updated() -> None:
    model = perceptron()
    model.a.requires_grad_(False)
    handle = emulate(model, {"ledger": {"every_steps": 1}})
    run_step(model, handle, None, torch.ones(2, 6))
    frozen = [r for r in handle.ledger.records if (r.layer, r.role) == ("a", "weight")]
    for scheme, bits in three(32 * 30, 30).items():
        assert sum(r.resident_bits(scheme) for r in frozen) == bits
    assert sum(r.writes for r in frozen) == 0
    inputs = [r for r in handle.ledger.records if (r.layer, r.role) == ("a", "activation")]
    assert sum(r.reads for r in inputs if r.pass_name == "wgrad") == 0
    assert {r.layer for r in handle.ledger.records if r.role in ("weight_gradient", "master")} == {"b"}


def test_no_gradient_is_computed_below_the_lowest_layer_that_is_trained() -> None:
    model = perceptron()
    model.a.requires_grad_(False)
    handle = emulate(model, spec())
    run_step(model, handle, None, torch.randn(4, 6))
    gradients = [(r.layer, r.pass_name, r.reads, r.writes) for r in handle.ledger.records if r.role == "gradient"]
    assert gradients == [("b", "dgrad", 0, 1), ("b", "wgrad", 1, 0)]


def test_a_parameter_that_two_modules_share_is_counted_once() -> None:
    model = nn.Sequential(OrderedDict(embedding=nn.Embedding(10, 4), fc=nn.Linear(4, 10, bias=False)))
    model.fc.weight = model.embedding.weight
    by_role = footprint_of(model, torch.tensor([1, 2]))["by_role"]
    assert by_role["master"]["fp32"] == by_role["weight_gradient"]["fp32"] == 32 * 40


def test_an_addend_without_gradient_costs_nothing_in_backward() -> None:
    model = Wired(lambda a, b, x: b(a(x) + x), nn.Linear(4, 4, bias=False), nn.ReLU())
    handle = emulate(model, {"ledger": {"every_steps": 1}})
    run_step(model, handle, None, torch.ones(2, 4))
    assert sum(r.reads + r.writes for r in handle.ledger.records if (r.role, r.pass_name) == ("addend", "dgrad")) == 0


def test_a_normalisation_may_be_called_by_keyword() -> None:
    model = Wired(lambda a, b, x: b(input=a(x)), nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
    handle = emulate(model, {"ledger": {"every_steps": 1}})
    run_step(model, handle, None, torch.ones(2, 4))
    assert [r.reads for r in handle.ledger.records if r.role == "norm_input"] == [0, 1]


def test_every_channel_scale_is_stored() -> None:
    channel = {"format": "e4m3fn", "scale": "amax", "granularity": "channel"}
    model = nn.Sequential(OrderedDict(fc=nn.Linear(4, 64, bias=False)))
    by_channel = footprint_of(model, torch.ones(2, 4), weights=channel)["by_role"]["weight"]["encoded"]
    model = nn.Sequential(OrderedDict(fc=nn.Linear(4, 64, bias=False)))
    by_tensor = footprint_of(model, torch.ones(2, 4), weights=WEIGHTS)["by_role"]["weight"]["encoded"]
    assert by_channel - by_tensor == 32 * 63


def test_channel_scales_of_activations_and_gradients_are_stored_in_every_record() -> None:
    """Input of 4 channels, output of 6."""
    by_channel = {"format": "e4m3fn", "scale": "amax", "granularity": "channel"}
    by_tensor = {**by_channel, "granularity": "tensor"}
    headers = []
    for role in (by_channel, by_tensor):
        model = nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 6, 3)))
        handle = emulate(model, {"activations": role, "gradients": role, "ledger": {"every_steps": 1}})
        run_step(model, handle, None, torch.randn(2, 4, 5, 5))
        rows = [r for r in handle.ledger.records if r.layer == "conv" and r.role in ("activation", "gradient")]
        headers.append([(r.role, r.pass_name, r.stored.bits_by_part["header"]) for r in rows])
    further = {"activation": 32 * 3, "gradient": 32 * 5}
    assert headers[0] == [(role, passed, bits + further[role]) for role, passed, bits in headers[1]]
    assert len(headers[0]) == 4
