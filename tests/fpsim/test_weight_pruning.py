"""Weight pruning in training: what layers see, what weights learn, when masks are renewed, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import accel
from fpsim.config import parse_config
from fpsim.emulation import Emulator, emulate
from fpsim.errors import ConfigError, RunError
from fpsim.layers import PatternError
from fpsim.weights.pruner import WeightPruner
from fpsim.weights.snr import moments_of_parts

SNR: dict[str, Any] = {"name": "snr", "burn_in": 2, "interval": 2}
SMALL = {0: [2, 3], 1: [0, 1]}  # what `linear` has small, by row


def linear() -> nn.Linear:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.1, -0.2], [0.3, 0.1, 3.0, -1.0]]))
    return layer


def weight_of(model: nn.Module) -> nn.Parameter:
    return model.get_parameter("0.weight")


def gradient_of(model: nn.Module) -> Tensor:
    gradient = weight_of(model).grad
    return torch.zeros_like(weight_of(model)).detach() if gradient is None else gradient.clone()


def pruner_of(handle: Emulator) -> WeightPruner:
    assert handle.weight_pruning is not None
    return handle.weight_pruning


def steps(handle: Emulator, model: nn.Module, count: int, parts: int = 2, rate: float = 0.0) -> None:
    """Training steps on random numbers, with plain gradient descent."""
    for _ in range(count):
        model.zero_grad()
        for _ in range(parts):
            model(torch.randn(8, 4)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(rate * parameter.grad)
        handle.step()


def zeros(mask: Tensor) -> dict[int, list[int]]:
    return {row: torch.nonzero(~kept).flatten().tolist() for row, kept in enumerate(mask)}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def test_ema_waits_for_two_steps() -> None:
    model = nn.Sequential(linear())
    handle = emulate(model, {"weight_pruning": {"name": "snr", "estimator": "ema", "burn_in": 1}})
    steps(handle, model, 3, parts=1)
    assert [row["step"] for row in pruner_of(handle).rows] == [2]


def test_a_layer_without_gradients_is_named() -> None:
    model = nn.Sequential(linear())
    model.add_module("idle", nn.Linear(3, 3))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    handle = emulate(model, {"weight_pruning": {"name": "snr", "burn_in": 1}})
    for _ in range(2):
        model(torch.randn(8, 4)).square().mean().backward()
    handle.step()
    with pytest.raises(RunError, match="layer 'idle' had no gradient so far: exclude it from weight_pruning"):
        model(torch.randn(8, 4))


# --- what layers see, and what weights learn ------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "learns"), [("dpf", True), ("gmp", False), ("magnitude", False)])
def test_layers_see_masked_weights_and_the_method_says_who_learns(method: str, learns: bool) -> None:
    model = nn.Sequential(linear())
    when = {"at_epochs": 1} if method == "magnitude" else {"ramp_epochs": 1, "interval": 1}
    spec = {"name": method, "sparsity": 0.5, **when}
    handle = emulate(model, {"weight_pruning": spec}, steps_per_epoch=1)
    dense = weight_of(model).detach().clone()
    steps(handle, model, 1)
    x, target = torch.randn(5, 4), torch.randn(5, 2)
    model.zero_grad()
    output = model(x)
    assert zeros(pruner_of(handle).masks["0"]) == SMALL
    masked = torch.where(pruner_of(handle).masks["0"], dense, 0.0).requires_grad_()
    assert torch.equal(output, functional.linear(x, masked))
    (output - target).square().mean().backward()
    (functional.linear(x, masked) - target).square().mean().backward()
    assert masked.grad is not None
    expected = masked.grad if learns else torch.where(pruner_of(handle).masks["0"], masked.grad, 0.0)
    assert torch.equal(gradient_of(model), expected)
    assert torch.equal(weight_of(model), dense)
    handle.detach()
    assert torch.equal(model(x), functional.linear(x, dense))
    assert weight_of(model)._backward_hooks is None or not weight_of(model)._backward_hooks


def test_pruned_weights_are_plus_zero_and_rounded_after_the_mask() -> None:
    model = nn.Sequential(linear())
    weights = {"format": "e4m3fn", "scale": "amax", "codec": "bitmask"}
    spec = {"name": "magnitude", "sparsity": 0.5, "at_epochs": 0}
    handle = emulate(
        model, {"weights": weights, "weight_pruning": spec, "ledger": {"every_steps": 1}}, steps_per_epoch=1
    )
    x = torch.eye(4)
    output = model(x)  # the weight as the layer has it, transposed
    output.sum().backward()
    kept = torch.where(pruner_of(handle).masks["0"], weight_of(model).detach(), 0.0)
    expected = accel.quantize(kept, "e4m3fn", scale=float(torch.tensor(3.0) / 448))
    torch.testing.assert_close(output.T, expected, rtol=1e-6, atol=0)
    handle.step()
    stored = [record for record in handle.ledger.records if record.role == "weight"]
    assert {record.stored.nonzeros for record in stored} == {4}


def test_a_pruned_weight_learns_and_returns() -> None:
    """Its dense value grows under the gradient at theta_hat until it is larger than another."""
    model = nn.Sequential(linear())
    spec = {"name": "dpf", "sparsity": 0.5, "ramp_epochs": 20, "interval": 1}
    handle = emulate(model, {"weight_pruning": spec}, steps_per_epoch=1)
    with torch.no_grad():
        weight_of(model)[0, 2] = 0.01
    for _ in range(30):
        model.zero_grad()
        (-model(torch.ones(1, 4))[0, 0]).backward()  # pushes the first row up: d/dw = -1
        with torch.no_grad():
            weight_of(model).sub_(0.1 * gradient_of(model))
        handle.step()
    rows = pruner_of(handle).rows
    assert sum(layer["returned"] for row in rows for layer in row["layers"]) > 0
    assert bool(pruner_of(handle).masks["0"][0, 2])


# --- the snr ----------------------------------------------------------------------------------------------------------


def test_microbatches_are_the_parts() -> None:
    model = nn.Sequential(linear())
    handle = emulate(model, {"weight_pruning": {**SNR, "beta": 0.5}})
    parts: list[Tensor] = []
    first = second = torch.zeros(2, 4)
    for _ in range(3):
        model.zero_grad()
        parts.clear()
        for _ in range(4):
            before = gradient_of(model)
            model(torch.randn(8, 4)).square().mean().backward()
            parts.append(gradient_of(model) - before)
        handle.step()
        stacked = torch.stack(parts)
        mean_square, variance = moments_of_parts(stacked.sum(0), stacked.square().sum(0), 4)
        first, second = (first + mean_square) / 2, (second + variance) / 2
    tensors = handle.tensors()
    torch.testing.assert_close(tensors["first.0"], first)
    torch.testing.assert_close(tensors["second.0"], second, rtol=1e-4, atol=1e-7)
    snr = pruner_of(handle)._averages["0"].snr()
    torch.testing.assert_close(snr, first / second, rtol=1e-4, atol=0)


def test_samples_of_an_emulated_network_are_those_of_torch_func() -> None:
    """With masks in place and micro-batches: the gradient and its variance at theta_hat."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(1), nn.Linear(48, 4))
    handle = emulate(model, {"weight_pruning": {**SNR, "estimator": "per_sample", "burn_in": 1, "beta": 0.0}})
    x, labels = torch.randn(8, 1, 6, 6), torch.randint(0, 4, (8,))
    for _ in range(2):
        model.zero_grad()
        for some, its in zip(x.chunk(2), labels.chunk(2), strict=True):
            (functional.cross_entropy(model(some), its) / 2).backward()
        handle.step()
    masks = pruner_of(handle).masks
    assert 0 < pruner_of(handle).sparsity < 1
    plain = {name: value.detach().clone() for name, value in model.named_parameters()}
    for name, mask in masks.items():
        plain[f"{name}.weight"] = torch.where(mask, plain[f"{name}.weight"], 0.0)
    averages = handle.tensors()
    handle.detach()

    def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, x.unsqueeze(0))
        return functional.cross_entropy(output, label.unsqueeze(0))

    samples = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(plain, x, labels)
    for name in masks:
        gradients = samples[f"{name}.weight"]
        torch.testing.assert_close(averages[f"first.{name}"], gradients.mean(0).square(), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(averages[f"second.{name}"], gradients.var(0) / 8, rtol=1e-3, atol=1e-7)


def test_ema_needs_whole_gradients_alone() -> None:
    model = nn.Sequential(linear())
    handle = emulate(model, {"weight_pruning": {**SNR, "estimator": "ema", "beta": 0.5}})
    gradients = []
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        gradients.append(gradient_of(model))
        handle.step()
    weights = torch.tensor([0.125, 0.25, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(handle.tensors()["first.0"], (weights * torch.stack(gradients)).sum(0))
    torch.testing.assert_close(handle.tensors()["second.0"], (weights * torch.stack(gradients).square()).sum(0))


# --- when ------------------------------------------------------------------------------------------------------------


def renewals(spec: dict[str, Any], epochs: int, steps_per_epoch: int = 4) -> list[int]:
    model = nn.Sequential(linear())
    handle = emulate(model, {"weight_pruning": spec}, steps_per_epoch=steps_per_epoch)
    for _ in range(epochs):
        handle.next_epoch()
        steps(handle, model, steps_per_epoch)
        model.eval()
        model(torch.ones(1, 4))
        model.train()
    return [row["step"] for row in pruner_of(handle).rows]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "snr"}, [4, 8]),
        ({"name": "snr", "burn_in": 5}, [5, 10]),
        ({"name": "snr", "burn_in": 5, "interval": 2}, [5, 7, 9, 11]),
        ({"name": "snr", "burn_in": "epoch", "interval": 3}, [4, 7, 10]),
        ({"name": "snr", "burn_in": 1, "interval": "epoch"}, [1, 4, 8]),
        ({"name": "dpf", "sparsity": 0.5, "ramp_epochs": 2, "interval": 3}, [3, 6, 8]),
        ({"name": "gmp", "sparsity": 0.5, "begin_epochs": 1, "ramp_epochs": 1.25, "interval": 2}, [6, 8, 9]),
        ({"name": "magnitude", "sparsity": 0.5, "at_epochs": 1.5}, [6]),
        ({"name": "dense"}, []),
    ],
)
def test_masks_are_renewed_when_they_are_due(spec: dict[str, Any], expected: list[int]) -> None:
    assert renewals(spec, epochs=3) == expected


def test_the_ramp_and_its_end() -> None:
    model = nn.Sequential(nn.Linear(4, 250, bias=False))
    spec = {"name": "dpf", "sparsity": 0.9, "ramp_epochs": 2, "interval": 2}
    handle = emulate(model, {"weight_pruning": spec}, steps_per_epoch=4)
    steps(handle, model, 12, rate=0.1)
    rows = pruner_of(handle).rows
    assert [(row["step"], row["sparsity"]) for row in rows] == [
        (step, pytest.approx(0.9 * (1 - (1 - step / 8) ** 3), abs=6e-4)) for step in (2, 4, 6, 8)
    ]
    assert rows[-1]["sparsity"] == pruner_of(handle).sparsity == 0.9


def test_what_gmp_prunes_stays_pruned() -> None:
    model = nn.Sequential(nn.Linear(4, 25, bias=False))
    spec = {"name": "gmp", "sparsity": 0.6, "ramp_epochs": 2, "interval": 1}
    handle = emulate(model, {"weight_pruning": spec}, steps_per_epoch=4)
    before = torch.ones(25, 4, dtype=torch.bool)
    for _ in range(9):
        steps(handle, model, 1, rate=1.0)
        mask = pruner_of(handle).masks.get("0", before)
        assert not bool((mask & ~before).any())
        before = mask
    assert pruner_of(handle).sparsity == 0.6


def test_rows_count_what_changed_and_the_classes_of_snr() -> None:
    model = nn.Sequential(nn.Linear(4, 50, bias=False), nn.Linear(50, 4, bias=False))
    handle = emulate(model, {"weight_pruning": {**SNR, "burn_in": 1, "interval": 1, "agreement": "either"}})
    masks = []
    for _ in range(5):
        steps(handle, model, 1, rate=0.5)
        masks.append(dict(pruner_of(handle).masks))
    rows = pruner_of(handle).rows
    for row, old, new in zip(rows[1:], masks[1:], masks[2:], strict=False):
        for layer in row["layers"]:
            name = layer["layer"]
            assert layer["pruned"] == int((old[name] & ~new[name]).sum())
            assert layer["returned"] == int((~old[name] & new[name]).sum())
            assert layer["zeros"] == int((~new[name]).sum())
            assert sum(layer["log2_snr"]) == layer["numel"] == 200
            assert sum(layer["log2_snr"][:16]) <= layer["snr_at_most_threshold"] <= sum(layer["log2_snr"][:17])
    summary = pruner_of(handle).summary
    assert summary is not None
    assert summary["returned"] == sum(layer["returned"] for row in rows for layer in row["layers"]) > 0
    assert 0.4 < summary["false_prune_rate"] < 0.7
    assert [entry["step"] for entry in summary["history"]] == [row["step"] for row in rows]
    assert sum(entry["pruned"] for entry in summary["history"]) > summary["returned"]
    classes = [layer["log2_snr"] for layer in rows[-1]["layers"]]
    assert summary["log2_snr"]["counts"] == [sum(counts) for counts in zip(*classes, strict=True)]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_one_part_a_step_is_an_error_that_says_what_to_do() -> None:
    model = nn.Sequential(linear())
    handle = emulate(model, {"weight_pruning": SNR})
    with pytest.raises(RunError, match=r"layer '0': .*two parts .*\(microbatch: got 1\)"):
        steps(handle, model, 1, parts=1)


def test_a_layer_that_runs_twice_has_no_samples() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    emulate(model, {"weight_pruning": {**SNR, "estimator": "per_sample"}})
    with pytest.raises(RunError, match=r"'0' runs twice .* use estimator microbatch"):
        model(torch.randn(8, 4))


@pytest.mark.parametrize(
    ("spec", "path", "message"),
    [
        ({**SNR, "estimator": "per_sample"}, "weight_pruning.estimator", r"batch normalisation \(1\).*use microbatch"),
        ({**SNR, "exclude": ["0"]}, "weight_pruning", "leaves no layer"),
        ({**SNR, "exclude": ["first", "con*"]}, "weight_pruning.exclude.1", r"'con\*' matches no matrix layer"),
    ],
)
def test_options_that_do_not_fit_the_model(spec: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(PatternError, match=message) as caught:
        emulate(nn.Sequential(linear(), nn.BatchNorm1d(2)), {"weight_pruning": spec})
    assert caught.value.path == path


def test_a_state_of_another_method_is_refused() -> None:
    gmp = emulate(linear(), {"weight_pruning": {"name": "gmp", "sparsity": 0.5, "ramp_epochs": 1}}, steps_per_epoch=1)
    with pytest.raises(ValueError, match="is of weight pruning by gmp or of other layers"):
        emulate(linear(), {"weight_pruning": SNR}).load_state_dict(gmp.state_dict(), gmp.tensors())


def test_epochs_need_their_length() -> None:
    spec = {"name": "dpf", "sparsity": 0.5, "ramp_epochs": 1}
    with pytest.raises(ValueError, match="dpf counts in epochs: give steps_per_epoch"):
        emulate(linear(), {"weight_pruning": spec})


@pytest.mark.parametrize(
    ("weight_pruning", "training", "message"),
    [
        ({"name": "snr"}, {}, r"training\.micro_batches: must be 2 or more for snr by microbatch .*\(got 1\)"),
        ({"name": "snr", "average": "ratio"}, {"micro_batches": 2}, r"micro_batches: must be 4 or more.*\(got 2\)"),
        ({"name": "snr", "estimator": "per_sample"}, {"batch_size": 1}, r"batch_size: must be 2 or more.*\(got 1\)"),
        ({"name": "snr", "estimator": "ema", "average": "ratio"}, {}, r"average: is for microbatch and per_sample"),
        ({"name": "snr", "estimator": "ema", "beta": 0.0}, {}, r"beta: must be above 0 for ema"),
        ({"name": "snr", "threshold": {"false_prune_rate": 1.5}}, {}, r"false_prune_rate: must be < 1 \(got"),
        ({"name": "snr", "threshold": "much"}, {}, r"threshold: must be a number or \{false_prune_rate: RATE\}"),
        ({"name": "snr", "sparsity": 0.5}, {"micro_batches": 2}, r"sparsity: unknown key"),
        ({"name": "dpf", "sparsity": 1.0, "ramp_epochs": 1}, {}, r"sparsity: must be < 1 \(got"),
        ({"name": "dpf", "sparsity": 0.5}, {}, r"ramp_epochs: .*missing"),
        ({"name": "lottery"}, {}, r"name: .*'dense', 'snr', 'dpf', 'gmp'"),
        (None, {"micro_batches": 3}, r"micro_batches: must divide the batch size of 8 \(got 3\)"),
    ],
)
def test_bad_settings(weight_pruning: Any, training: dict[str, Any], message: str) -> None:
    sgd = {"name": "sgd", "learning_rate": 0.1}
    content = {
        "data": {"name": "digits"},
        "model": {"name": "mlp"},
        "training": {"epochs": 1, "batch_size": 8, "optimizer": sgd, **training},
        "emulation": {"weight_pruning": weight_pruning},
    }
    with pytest.raises(ConfigError, match=message):
        parse_config(content).check_parts(1)
