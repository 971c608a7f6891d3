"""Pruning over a run: the sparsity that is reached, when thresholds are renewed, grids, states and errors."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import accel
from accel import Counts
from fpsim.config.schema import Pruning
from fpsim.emulation import Emulator, emulate
from fpsim.errors import NonFiniteError
from fpsim.gradients import thresholds
from fpsim.gradients.pruning import LayerPruning, Tally

Drive = Callable[[Tensor], Tensor]


def gradient_spec(**changes: Any) -> dict[str, Any]:
    return {"format": "e5m2", "codec": "alpha", "pruning": {"sparsity": 0.8}, **changes}


def attached(gradients: dict[str, Any], seed: int = 0, **others: Any) -> tuple[Emulator, Drive]:
    """An emulated layer "fc" of one input and one weight, 1, and a function that runs one step with a given dY and
    returns what became of it: with this weight, dX is the rounded dY."""
    model = nn.Sequential(OrderedDict(fc=nn.Linear(1, 1, bias=False)))
    nn.init.ones_(model.fc.weight)
    handle = emulate(model, {"gradients": gradients, **others}, seed=seed)

    def step(dy: Tensor) -> Tensor:
        x = torch.ones(dy.numel(), 1, requires_grad=True)
        model(x).backward(dy.reshape(-1, 1))
        handle.step()
        assert x.grad is not None
        return x.grad.reshape(-1)

    return handle, step


def mixture(generator: torch.Generator, numel: int, sigma: float, zero_share: float) -> Tensor:
    """Lognormal magnitudes of random sign, with exact zeros as a ReLU makes them."""
    x = torch.randn(numel, generator=generator).mul(sigma).exp() * 1e-5
    sign = torch.where(torch.rand(numel, generator=generator) < 0.5, -1.0, 1.0)
    return torch.where(torch.rand(numel, generator=generator) < zero_share, 0.0, x * sign)


# --- what is reached ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.0, 3.0])
@pytest.mark.parametrize("zero_share", [0.0, 0.5])
@pytest.mark.parametrize("sparsity", [0.6, 0.85])
@pytest.mark.parametrize("threshold", ["empirical", "lognormal"])
def test_the_asked_sparsity_is_reached(sigma: float, zero_share: float, sparsity: float, threshold: str) -> None:
    handle, step = attached(gradient_spec(scale="power_of_two", pruning={"sparsity": sparsity, "threshold": threshold}))
    generator = torch.Generator().manual_seed(7)
    zeros = [float((step(mixture(generator, 6000, sigma, zero_share)) == 0).float().mean()) for _ in range(25)]
    (row,) = handle.statistics
    assert row["layer"] == "fc"
    assert row["asked_sparsity"] == sparsity
    assert row["steps"] == 25
    assert row["achieved_sparsity"] == pytest.approx(np.mean(zeros), abs=1e-6)
    assert row["achieved_std"] == pytest.approx(np.std(zeros), abs=1e-6)
    assert row["achieved_sparsity"] == pytest.approx(sparsity, abs=0.015)
    assert row["lognormal_rule_sparsity"] == pytest.approx(sparsity, abs=0.015)


def test_the_lognormal_rule_misses_on_a_mixture_of_two_modes_and_the_empirical_does_not() -> None:
    generator = torch.Generator().manual_seed(7)
    handle, step = attached(gradient_spec(scale="power_of_two", pruning={"sparsity": 0.8}))
    for _ in range(10):
        small, large = mixture(generator, 7000, 0.3, 0.0) * 1e-4, mixture(generator, 1000, 0.3, 0.0)
        step(torch.cat([small, large]))
    (row,) = handle.statistics
    assert row["achieved_sparsity"] == pytest.approx(0.8, abs=0.01)
    assert abs(row["lognormal_rule_sparsity"] - 0.8) > 0.02


def test_a_gradient_that_is_sparse_enough_is_only_rounded() -> None:
    handle, step = attached(gradient_spec())
    dy = mixture(torch.Generator().manual_seed(1), 3000, 1.0, 0.9) * 1e5
    assert torch.equal(step(dy), accel.quantize(dy, "e5m2"))
    assert handle.pruning["fc"].alpha == 0
    assert handle.statistics[0]["achieved_sparsity"] == pytest.approx(float((dy == 0).float().mean()))
    assert handle.statistics[0]["alpha_share_of_nonzeros"] == 0


def test_a_gradient_of_zeros_passes() -> None:
    handle, step = attached(gradient_spec(scale="lognormal_mean"))
    assert not step(torch.zeros(50)).any()
    assert handle.statistics[0]["achieved_sparsity"] == 1
    assert handle.statistics[0]["alpha_share_of_nonzeros"] is None


def test_negative_zeros_are_zeros_of_the_achieved_sparsity() -> None:
    handle, step = attached(gradient_spec())
    dy = torch.full((1000,), -0.0)
    dy[:50] = 1.0
    rounded = step(dy)
    assert handle.pruning["fc"].alpha == 0
    assert handle.statistics[0]["achieved_sparsity"] == 0.95
    assert not rounded[50:].view(torch.int32).any()


# --- when thresholds are renewed ----------------------------------------------------------------------------------


def quantile(dy: Tensor, sparsity: float) -> float:
    """The element of |dy| that `sparsity` of them precede."""
    return float(dy.abs().sort().values[int(sparsity * dy.numel())])


def renewals(pruning: dict[str, Any], steps: int, steps_per_epoch: int) -> list[int]:
    """The steps at which alpha is that of a new tensor, for a gradient that changes scale and shape every step.

    Between them the lognormal rule keeps alpha, and the empirical rule the ratio of alpha to the quantile.
    """
    handle, step = attached(gradient_spec(scale="power_of_two", pruning=pruning))
    uniform, renewed, kept = torch.rand(500, generator=torch.Generator().manual_seed(0)), [], math.nan
    for number in range(steps):
        if number % steps_per_epoch == 0:
            handle.next_epoch()
        dy = uniform ** (1 + number / 8) * 2.0**number
        step(dy)
        alpha = handle.pruning["fc"].alpha
        found = alpha if pruning.get("threshold") == "lognormal" else alpha / quantile(dy, pruning["sparsity"])
        if not math.isclose(found, kept, rel_tol=1e-12):
            renewed.append(number)
            kept = found
    return renewed


@pytest.mark.parametrize(
    ("pruning", "expected"),
    [
        ({"sparsity": 0.7}, [0, 10, 20, 25, 35]),  # every 10 steps, and at the start of an epoch
        ({"sparsity": 0.7, "refresh": 4}, [0, 4, 8, 12, 16, 20, 24, 25, 29, 33, 37]),
        ({"sparsity": 0.7, "refresh": 1}, list(range(40))),
        ({"sparsity": 0.7, "refresh": "epoch"}, [0, 25]),
        ({"sparsity": 0.7, "threshold": "lognormal"}, [0, 25]),
        ({"sparsity": 0.7, "threshold": "lognormal", "refresh": 10}, [0, 10, 20, 25, 35]),
    ],
)
def test_when_the_threshold_is_renewed(pruning: dict[str, Any], expected: list[int]) -> None:
    assert renewals(pruning, steps=40, steps_per_epoch=25) == expected


@pytest.mark.parametrize("threshold", ["empirical", "lognormal"])
def test_the_threshold_is_that_of_the_tensor_at_renewal_and_then_stays_or_follows_the_quantile(threshold: str) -> None:
    rule = {"empirical": thresholds.empirical, "lognormal": thresholds.lognormal}[threshold]
    handle, step = attached(gradient_spec(pruning={"sparsity": 0.6, "threshold": threshold}))
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(900, generator=generator)
    at_renewal = rule(first.numpy(), 0.6)
    for number, dy in enumerate((first, torch.randn(900, generator=generator) * 5, first.sign() * first**2)):
        rounded = step(dy)
        expected = at_renewal
        if threshold == "empirical" and number > 0:
            expected = at_renewal / quantile(first, 0.6) * quantile(dy, 0.6)
        assert handle.pruning["fc"].alpha == expected
        by_hand, _ = accel.prune_quantize(dy, expected, "e5m2", stream=accel.stream_id("fc/gradient"), step=number)
        assert torch.equal(rounded, by_hand)


def test_the_empirical_threshold_between_renewals_by_hand() -> None:
    """1 - mean(x) / alpha = 1/2 where alpha lies above all x: alpha = 2 mean(x); the 1/2-quantile of 4 is the third."""
    pruning = LayerPruning(Pruning(sparsity=0.5, refresh=3))
    assert pruning.threshold(np.array([1, -1, 1, -1.5], np.float32), 0) == 2.25
    assert pruning.threshold(np.array([7, 1, -4, 0], np.float32), 1) == 4 * 2.25  # ordered 0, 1, 4, 7
    assert pruning.threshold(np.array([0, 0, 0, 9], np.float32), 2) == 0
    assert pruning.threshold(np.array([16, 16, 16, 16], np.float32), 3) == 32  # renewed
    assert pruning.threshold(np.array([0, 0, 0.5, 1], np.float32), 4) == 1
    assert pruning.next_renewal == 6


def test_a_tensor_that_is_sparse_enough_at_renewal_is_not_pruned_until_the_next() -> None:
    pruning = LayerPruning(Pruning(sparsity=0.5, refresh=2))
    assert pruning.threshold(np.array([0, 0, 0, 9], np.float32), 0) == 0
    assert pruning.threshold(np.array([1, 1, 1, 1], np.float32), 1) == 0
    assert pruning.threshold(np.array([1, 1, 1, 1], np.float32), 2) == 2


def test_a_renewal_that_was_passed_over_is_made_up_for() -> None:
    """A layer that does not run at the step of its renewal renews when it runs again, and counts from there."""
    pruning = LayerPruning(Pruning(sparsity=0.5, refresh=4, threshold="lognormal"))
    ones = np.ones(8, np.float32)
    found = [pruning.threshold(ones * 2**step, step) for step in (0, 3, 6, 9, 10)]
    assert found == pytest.approx([2, 2, 128, 128, 2048])


def test_the_sparsity_stays_when_the_scale_of_the_gradient_jumps() -> None:
    handle, step = attached(gradient_spec(scale="power_of_two", pruning={"sparsity": 0.7, "refresh": "epoch"}))
    generator = torch.Generator().manual_seed(2)
    for jump in (1.0, 1e3, 1e-3):
        zeros = float((step(mixture(generator, 6000, 1.0, 0.3) * jump) == 0).float().mean())
        assert zeros == pytest.approx(0.7, abs=0.03)
    assert handle.pruning["fc"].lognormal_rule.count == 1  # renewed once


# --- alpha on the grid --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["dense", "bitmask"])
@pytest.mark.parametrize("scale", ["none", "power_of_two", "amax", "lognormal_mean"])
def test_without_tags_alpha_lies_on_the_grid_and_the_mean_stays(codec: str, scale: str) -> None:
    """Values far below alpha keep their mean, and the stream of the codec holds the tensor."""
    numel, seeds = 4000, 40
    dy = torch.full((numel,), 0.03)
    dy[::40] = torch.linspace(1.5, 2.0, numel // 40)
    spec = gradient_spec(codec=codec, scale=scale, format="e4m3fn", rounding="stochastic")
    sums = torch.zeros(numel)
    for seed in range(seeds):
        handle, step = attached(spec, seed)
        rounded = step(dy)
        grid = {"none": 1.0, "amax": float(np.float32(2.0 / 448)), "power_of_two": 2.0**-7}.get(scale)
        if grid is not None:
            packed = accel.pack(rounded, codec, "e4m3fn", scale=grid)  # CodecError for an alpha off the grid
            (record,) = [r for r in handle.ledger.records if r.role == "gradient" and r.pass_name == "wgrad"]
            overhead = 8 * 8  # the packed tensor is 1-D, the layer's is 2-D: one more size in the header
            assert record.stored.nbits == packed.nbits + overhead
        sums += rounded
    small = torch.ones(numel, dtype=torch.bool)
    small[::40] = False
    assert handle.pruning["fc"].alpha > 0.1
    levels = rounded[small].unique()
    assert levels.numel() == 2  # 0 and alpha
    noise = float(levels.max()) * math.sqrt(0.03 / float(levels.max())) / math.sqrt(seeds * int(small.sum()))
    assert float(sums[small].mean()) / seeds == pytest.approx(0.03, abs=4 * noise)
    assert float(sums[~small].mean()) / seeds == pytest.approx(1.75, rel=0.01)


def test_a_small_alpha_snaps_to_the_smallest_number_and_not_to_zero() -> None:
    _, step = attached(gradient_spec(codec="bitmask"))
    generator = torch.Generator().manual_seed(0)
    smallest = accel.format("e5m2").min_subnormal
    rounded = step(torch.full((20000,), smallest / 100) * (0.5 + torch.rand(20000, generator=generator)))
    assert set(rounded.unique().tolist()) == {0.0, smallest}
    assert float(rounded.mean()) == pytest.approx(smallest / 100, rel=0.2)


def test_with_tags_alpha_keeps_its_own_value() -> None:
    handle, step = attached(gradient_spec(scale="power_of_two"))
    dy = mixture(torch.Generator().manual_seed(0), 4000, 1.0, 0.3)
    rounded = step(dy)
    alpha = float(np.float32(handle.pruning["fc"].alpha))
    tagged = rounded.abs() == alpha
    assert tagged.sum() > 100
    scale = 2.0 ** math.ceil(math.log2(float(dy.abs().max()) / 57344))
    assert alpha != float(accel.quantize(torch.tensor(alpha), "e5m2", scale=scale))
    packed = accel.pack(rounded, "alpha", "e5m2", scale=scale, alpha=alpha)
    assert torch.equal(accel.unpack(packed), rounded)


# --- states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [{"sparsity": 0.7}, {"sparsity": 0.7, "threshold": "lognormal"}])
@pytest.mark.parametrize("stop", [0, 3, 10, 14])
def test_a_restored_state_goes_on_identically(pruning: dict[str, Any], stop: int) -> None:
    generator = torch.Generator().manual_seed(5)
    gradients = [mixture(generator, 600, 1.0, 0.2) * 2.0**i for i in range(25)]

    def steps(handle: Emulator, step: Drive, first: int, last: int) -> list[Tensor]:
        outputs = []
        for number in range(first, last):
            if number % 12 == 0:
                handle.next_epoch()
            outputs.append(step(gradients[number]))
        return outputs

    spec = gradient_spec(scale="power_of_two", pruning=pruning, rounding="stochastic")
    handle, step = attached(spec)
    whole = steps(handle, step, 0, 25)
    first_handle, first_step = attached(spec)
    steps(first_handle, first_step, 0, stop)
    second_handle, second_step = attached(spec)
    second_handle.load_state_dict(json.loads(json.dumps(first_handle.state_dict())))
    for expected, found in zip(whole[stop:], steps(second_handle, second_step, stop, 25), strict=True):
        assert torch.equal(expected, found)
    assert second_handle.statistics == handle.statistics
    assert second_handle.state_dict() == handle.state_dict()


def test_a_state_of_other_layers_is_refused() -> None:
    handle, _ = attached(gradient_spec())
    with pytest.raises(ValueError, match="other"):
        handle.load_state_dict({"step": 1, "pruning": {"other": {}}})


def test_a_tally_gives_mean_and_population_deviation() -> None:
    tally, values = Tally(), [0.25, 0.5, 0.75, 0.875]
    assert math.isnan(tally.mean)
    assert math.isnan(tally.std)
    for value in values:
        tally.add(value)
    assert tally.count == 4
    assert tally.mean == np.mean(values)
    assert tally.std == pytest.approx(np.std(values), abs=1e-12)


def test_a_summary_counts_what_was_recorded() -> None:
    pruning = LayerPruning(Pruning(sparsity=0.5))
    assert pruning.threshold(np.array([1.0, 1.0, 1.0, 1.0], np.float32), 6) == 2  # 1 - 1/alpha = 1/2
    pruning.record(Counts(numel=8, nonzeros=4, alphas=3))
    pruning.record(Counts(numel=8, nonzeros=2, alphas=1))
    pruning.record(Counts(numel=8, nonzeros=0, alphas=0))
    assert pruning.summary("a.b") == {
        "layer": "a.b",
        "asked_sparsity": 0.5,
        "achieved_sparsity": 0.75,
        "achieved_std": pytest.approx(math.sqrt((0.0625 + 0 + 0.0625) / 3)),
        "lognormal_rule_sparsity": 0.5,
        "alpha_share_of_nonzeros": 0.625,  # (3/4 + 1/2) / 2: a step without nonzeros has no share
        "alpha": 2.0,
        "alpha_kept": "snap",
        "bias": None,
        "bias_standard_error": None,
        "cosine": None,
        "steps": 3,
    }
    assert pruning.next_renewal == 16


def test_bias_and_cosine_by_hand() -> None:
    pruning = LayerPruning(Pruning(sparsity=0.5))
    pruning.measure(torch.tensor([3.0, -4.0]), torch.tensor([6.0, 0.0]))  # 6/7 - 1, 18 / (5 * 6)
    pruning.measure(torch.zeros(4), torch.zeros(4))  # which has neither
    pruning.measure(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -4.0]))
    row = pruning.summary("a")
    assert row["bias"] == pytest.approx(-1 / 14)
    assert row["bias_standard_error"] == pytest.approx(1 / 14)
    assert row["cosine"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"codec": "alpha"}, "streams"),
        ({"codec": "alpha_tag"}, "streams"),
        ({"codec": "bitmask"}, "snap"),
        ({"codec": "bitmask", "format": {"exponent_bits": 5, "mantissa_bits": 2, "alpha_codes": True}}, "reserved"),
    ],
)
def test_no_way_of_keeping_alpha_has_a_bias(changes: dict[str, Any], way: str) -> None:
    """Beyond that of rounding survivors to nearest, and within five standard errors (seed 0, 40 steps)."""
    handle, step = attached(gradient_spec(**changes), ledger={"every_steps": 1})
    rng = torch.Generator().manual_seed(0)
    for _ in range(40):
        step(torch.empty(4000).log_normal_(0, 2, generator=rng) * (torch.randint(0, 2, (4000,), generator=rng) * 2 - 1))
    (row,) = handle.statistics
    assert row["alpha_kept"] == way
    assert abs(row["bias"]) < 5 * row["bias_standard_error"] + 0.002
    assert 0.5 < row["cosine"] < 1


# --- gradients that are not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", ["none", "amax", "power_of_two", "lognormal_mean"])
@pytest.mark.parametrize("changes", [{}, {"codec": "dense"}, {"codec": "dense", "pruning": None}])
@pytest.mark.parametrize("at_step", [0, 3])
def test_a_gradient_that_is_not_finite_names_its_layer(
    special: float, scale: str, changes: dict[str, Any], at_step: int
) -> None:
    _, step = attached(gradient_spec(scale=scale, **changes))
    dy = torch.linspace(-1, 1, 5000)
    for _ in range(at_step):
        step(dy)
    dy[1234] = special
    with pytest.raises(NonFiniteError, match=f"gradient of layer 'fc' is not finite at step {at_step}") as caught:
        step(dy)
    assert caught.value.layer == "fc"
