from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fpsim.config.schema import Adam, ConstantSchedule, CosineSchedule, Sgd, StepSchedule
from fpsim.data.dataset import TensorSplit
from fpsim.emulation import NonFiniteError
from fpsim.training import (
    EVALUATION_BATCH,
    build_optimizer,
    check_gradients,
    data_order,
    evaluate,
    first_non_finite,
    generator,
    learning_rate_factor,
)

PER_EPOCH, TOTAL = 10, 40
IMAGES = torch.ones(4, 1, 3, 3)


# --- learning rate --------------------------------------------------------------------------------------------------


def test_constant_schedule() -> None:
    assert {learning_rate_factor(ConstantSchedule(), step, PER_EPOCH, TOTAL) for step in range(TOTAL)} == {1.0}


def test_cosine_without_warmup_is_the_closed_form_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL, eta_min=0.1)
    for step in range(TOTAL):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_factor(
            CosineSchedule(warmup_epochs=0.0, final_factor=0.1), step, PER_EPOCH, TOTAL
        ) == pytest.approx(expected)
        optimizer.step()
        theirs.step()


def test_cosine_with_warmup() -> None:
    schedule = CosineSchedule(warmup_epochs=0.5, final_factor=0.0)
    factors = [learning_rate_factor(schedule, step, PER_EPOCH, TOTAL) for step in range(TOTAL)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert factors[5:] == pytest.approx([math.cos(math.pi / 2 * n / 35) ** 2 for n in range(35)])
    assert min(factors) > 0


@pytest.mark.parametrize("warmup_epochs", [0.01, 0.15, 0.25, 3.99])
def test_warmup_of_any_length_grows_to_one_and_never_beyond(warmup_epochs: float) -> None:
    schedule = CosineSchedule(warmup_epochs=warmup_epochs, final_factor=0.0)
    factors = [learning_rate_factor(schedule, step, PER_EPOCH, TOTAL) for step in range(TOTAL)]
    assert all(0 < factor <= 1 for factor in factors)
    last = math.ceil(warmup_epochs * PER_EPOCH) - 1
    assert factors[last] == 1.0
    assert factors[: last + 1] == sorted(factors[: last + 1])


def test_step_schedule() -> None:
    schedule = StepSchedule(milestones_epochs=[1, 2.5], factor=0.1)
    factors = [learning_rate_factor(schedule, step, PER_EPOCH, TOTAL) for step in range(TOTAL)]
    assert factors == pytest.approx([1.0] * 10 + [0.1] * 15 + [0.01] * 15)


# --- optimizers -----------------------------------------------------------------------------------------------------


def quadratic_descent(optimizer_of: type[Sgd] | type[Adam], steps: int = 3) -> list[float]:
    """Weights of the loss w^2 / 2 from w = 2 on."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    spec: Sgd | Adam
    if optimizer_of is Sgd:
        spec = Sgd(learning_rate=0.1, momentum=0.5, nesterov=True, weight_decay=0.25)
    else:
        spec = Adam(learning_rate=0.1, betas=[0.5, 0.75], epsilon=0.01, weight_decay=0.25)
    optimizer = build_optimizer(spec, model)
    weights = []
    for _ in range(steps):
        model.weight.grad = model.weight.detach().clone()
        optimizer.step()
        weights.append(model.weight.item())
    return weights


def test_sgd_by_hand() -> None:
    expected, weight, velocity = [], 2.0, 0.0
    for _ in range(3):
        gradient = weight + 0.25 * weight
        velocity = 0.5 * velocity + gradient
        weight -= 0.1 * (gradient + 0.5 * velocity)
        expected.append(weight)
    assert quadratic_descent(Sgd) == pytest.approx(expected, rel=1e-6)


def test_adam_by_hand() -> None:
    expected, weight, first, second = [], 2.0, 0.0, 0.0
    for step in range(1, 4):
        gradient = weight + 0.25 * weight
        first = 0.5 * first + 0.5 * gradient
        second = 0.75 * second + 0.25 * gradient**2
        weight -= 0.1 * (first / (1 - 0.5**step)) / (math.sqrt(second / (1 - 0.75**step)) + 0.01)
        expected.append(weight)
    assert quadratic_descent(Adam) == pytest.approx(expected, rel=1e-6)


# --- order of the data ----------------------------------------------------------------------------------------------


def test_data_order() -> None:
    order = data_order(seed=1, epoch=0, samples=100)
    assert order.sort().values.tolist() == list(range(100))
    assert not torch.equal(order, data_order(1, 1, 100))
    assert not torch.equal(order, data_order(2, 0, 100))
    assert torch.equal(order, data_order(1, 0, 100))  # made anew: the latest order was another one


def test_data_order_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    data_order(0, 0, 10)
    generator(0, "augment", 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_of_different_purposes_differ() -> None:
    purposes: list[tuple[int, *tuple[object, ...]]] = [
        (0, "order", 1),
        (0, "augment", 1),
        (0, "order", 11),
        (1, "order", 1),
        (0, "order", 1, 1),
    ]
    draws = {
        tuple(torch.randint(2**62, (2,), generator=generator(purpose[0], *purpose[1:])).tolist())
        for purpose in purposes
    }
    assert len(draws) == len(purposes)


# --- evaluation -----------------------------------------------------------------------------------------------------


def split(samples: int) -> TensorSplit:
    images = torch.randint(256, (samples, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.25)
    return TensorSplit(images, torch.arange(samples) % 4, mean, std, augment=False, flip=False)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))


def test_evaluate_is_the_mean_over_all_samples() -> None:
    test, model = split(2 * EVALUATION_BATCH + 7), network()
    loss, accuracy = evaluate(model, test)
    model.eval()
    with torch.no_grad():
        images, labels = test.batch(torch.arange(len(test)))
        logits = model(images)
    assert loss == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    assert accuracy == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_model_as_it_was(training: bool) -> None:
    model = network().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, split(10))
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- NaN and infinity -----------------------------------------------------------------------------------------------


def with_gradients(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def test_finite_gradients_pass() -> None:
    check_gradients(network(), 0)
    check_gradients(with_gradients(network()), 0)
    huge = with_gradients(network())
    for p in huge.parameters():
        p.grad = torch.full_like(p, 3e38)  # finite, though their norm is not
    check_gradients(huge, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("bad", "layer", "parameter"),
    [(["1.weight"], "1", "weight"), (["5.weight"], "5", "weight"), (["1.weight", "5.bias"], "5", "bias")],
)
def test_check_gradients_names_the_layer_that_backward_reached_first(
    value: float, bad: list[str], layer: str, parameter: str
) -> None:
    model = with_gradients(network())
    for name in bad:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient.view(-1)[0] = value
    message = f"^{parameter} gradient of layer '{layer}' is not finite at step 12 "
    with pytest.raises(NonFiniteError, match=message) as caught:
        check_gradients(model, 12)
    assert caught.value.layer == layer


def test_check_gradients_names_a_nested_layer_in_full() -> None:
    model = with_gradients(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)))
    model.get_parameter("0.0.weight").grad = torch.full((2, 2), math.nan)
    with pytest.raises(NonFiniteError, match=r"^weight gradient of layer '0\.0' is") as caught:
        check_gradients(model, 0)
    assert caught.value.layer == "0.0"


def search(model: nn.Module, images: Tensor = IMAGES) -> str | None:
    found = first_non_finite(model, images, torch.get_rng_state(), 12)
    return None if found is None else found.layer


@pytest.mark.parametrize(("parameter", "expected"), [("1.weight", "1"), ("2.bias", "2"), ("5.bias", "5")])
def test_first_non_finite(parameter: str, expected: str) -> None:
    model = network()
    model.get_parameter(parameter).data[0] = math.nan
    assert search(model) == expected


def test_first_non_finite_of_a_finite_model_and_of_the_images() -> None:
    assert search(network()) is None
    assert search(network(), torch.full((4, 1, 3, 3), math.inf)) == "0"


def test_first_non_finite_draws_what_the_run_drew() -> None:
    """A layer that fails at one draw only is found after the generator went on, and the generator stays there."""
    model = network()
    before = torch.get_rng_state()
    model(IMAGES)
    model.append(_FailsAt(torch.rand(())))
    torch.rand(3)
    after = torch.get_rng_state()
    assert search(model) is None
    found = first_non_finite(model, IMAGES, before, 12)
    assert found is not None
    assert (found.layer, found.role) == ("6", "output")
    assert torch.equal(torch.get_rng_state(), after)


def test_first_non_finite_leaves_the_model_as_it_was() -> None:
    """Running statistics would otherwise be poisoned before the state is saved for the user to look at."""
    model = network()
    model.get_parameter("1.weight").data[0] = math.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
    assert all(not module._forward_hooks for module in model.modules())


def test_first_non_finite_is_left_as_it_was_when_the_model_raises() -> None:
    model = network()
    model.append(_Raises(ArithmeticError()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArithmeticError):
        search(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("weight", "expected"), [(math.nan, "1"), (1.0, "6")])
def test_first_non_finite_of_a_model_that_emulation_stops(weight: float, expected: str | None) -> None:
    """Emulation refuses a tensor that is not finite: what came before it was seen nevertheless."""
    model = network()
    model.get_parameter("1.weight").data[0] = weight
    model.append(_Raises(NonFiniteError("activation", "6", 0, {"activation": torch.tensor(math.nan)})))
    assert search(model) == expected
    assert all(not module._forward_hooks for module in model.modules())


class _Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


class _FailsAt(nn.Module):
    """NaN when torch's generator draws `number`."""

    def __init__(self, number: Tensor) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand(()) == self.number, math.nan, x)
