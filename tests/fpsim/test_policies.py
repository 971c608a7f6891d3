"""Pruning policies: thresholds against closed forms and simulation, one cosine for all layers, and in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

import accel
from fpsim import lognormal
from fpsim.config.schema import Pruning
from fpsim.emulation import Emulator, emulate
from fpsim.errors import ConfigError
from fpsim.gradients import thresholds
from fpsim.gradients.equal_cosine import equal_cosine
from fpsim.gradients.pruning import LayerPruning

RULES = [thresholds.laplace, thresholds.atp, thresholds.quantile]


def draw(sigma: float, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.exp(sigma * rng.standard_normal(count)) * rng.choice([-1.0, 1.0], count)


# --- thresholds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.99, 0.999])
def test_laplace_reaches_the_sparsity_on_its_distribution(sparsity: float) -> None:
    x = np.random.default_rng(1).laplace(0, 3, 1_000_000)
    alpha = thresholds.laplace(x, sparsity)
    b = np.abs(x).mean()
    if sparsity:
        assert 1 + b / alpha * np.exp(-alpha / b) - b / alpha == pytest.approx(sparsity, abs=1e-12)
    assert thresholds.expected_sparsity(x, alpha) == pytest.approx(sparsity, abs=5 * 0.5 / 1000)


def test_atp_misses_the_sparsity_as_the_closed_form_says() -> None:
    """On a normal, p gives p - 2 / (t sqrt(2 pi)) (1 - exp(-t^2 / 2)) zeros, t = Phi^-1((1 + p) / 2): .54 for .9."""
    x = np.random.default_rng(2).standard_normal(1_000_000) * 7
    for p in (0.5, 0.9, 0.99):
        alpha = thresholds.atp(x, p)
        assert alpha == pytest.approx(7 * norm.ppf((1 + p) / 2), rel=5e-3)
        t = norm.ppf((1 + p) / 2)
        expected = p - 2 / (t * np.sqrt(2 * np.pi)) * (1 - np.exp(-t * t / 2))
        assert thresholds.expected_sparsity(x, alpha) == pytest.approx(expected, abs=0.0025)
    assert thresholds.expected_sparsity(x, thresholds.atp(x, 0.9)) == pytest.approx(0.54, abs=0.005)


def test_quantile_by_hand() -> None:
    assert thresholds.quantile([4, -1, 0, 3], 0.5) == 3  # ordered 0, 1, 3, 4
    assert thresholds.quantile([4, -1, 0, 3], 0.74) == 3
    assert thresholds.quantile([4, -1, 0, 3], 0.75) == 4


@pytest.mark.parametrize("rule", RULES)
def test_thresholds_scale_with_the_sample_and_refuse_what_they_cannot_take(rule: Any) -> None:
    x = draw(2.0, 3000)
    assert rule(8 * x, 0.7) == pytest.approx(8 * rule(x, 0.7), rel=1e-12)
    assert rule(np.zeros(5), 0.7) == 0
    for sample, sparsity, name in (([], 0.5, "x"), ([1.0, np.nan], 0.5, "x"), ([1.0], 1.0, "sparsity")):
        with pytest.raises(ValueError, match=name):
            rule(sample, sparsity)


# --- one cosine ---------------------------------------------------------------------------------------------------


def measured_cosine(x: np.ndarray, alpha: float) -> float:
    return float(np.sqrt((x * x).sum() / np.maximum(alpha * np.abs(x), x * x).sum()))


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.95])
def test_all_layers_get_one_cosine_and_the_mean_sparsity(wanted: float) -> None:
    samples = [draw(sigma, 4000, seed) for seed, sigma in enumerate((0.7, 1.5, 2.5, 4.0))]
    samples[1][:1000] = 0
    sizes = np.array([10, 200, 3000, 40])
    found = equal_cosine(samples, sizes, wanted, lowest=0.0, highest=0.9999)
    assert sizes @ found / sizes.sum() == pytest.approx(wanted, abs=1e-3)
    cosines = [measured_cosine(x, thresholds.empirical(x, s)) for x, s in zip(samples, found, strict=True)]
    assert cosines == pytest.approx([cosines[0]] * 4, abs=2e-3)
    assert (np.diff(found[[0, 2, 3]]) > 0).all()  # a wider distribution loses less by the same sparsity


def test_the_lognormal_model_finds_the_sparsities_of_its_closed_forms() -> None:
    sigmas, sizes = (1.0, 2.0, 3.0), [1, 1, 1]
    samples = [draw(sigma, 200_000, seed) for seed, sigma in enumerate(sigmas)]
    found = equal_cosine(samples, sizes, 0.8, "lognormal", highest=0.9999)
    assert found.mean() == pytest.approx(0.8, abs=1e-3)
    fits = [lognormal.fit(x) for x in samples]
    alphas = [float(lognormal.threshold(s, f.mu, f.sigma)) for s, f in zip(found, fits, strict=True)]
    cosines = [float(lognormal.cosine(a, f.mu, f.sigma)) for a, f in zip(alphas, fits, strict=True)]
    assert cosines == pytest.approx([cosines[0]] * 3, abs=1e-3)


def test_bounds_and_layers_that_are_sparse_already() -> None:
    samples = [draw(1.0, 2000), draw(4.0, 2000, 1), np.zeros(50), np.append(draw(1.0, 500), np.zeros(9500))]
    found = equal_cosine(samples, [1, 1, 0.001, 0.001], 0.7, lowest=0.5, highest=0.8)
    assert found == pytest.approx([0.6, 0.8, 0.8, 0.8], abs=2e-3)
    free = equal_cosine(samples, [1, 1, 1, 1], 0.1, highest=0.9999)
    assert free[2:] == pytest.approx([0.9999, 0.95], abs=1e-3)  # what they are; more is asked than no pruning gives


# --- in training --------------------------------------------------------------------------------------------------


def train(policy: dict[str, Any], steps: int = 4) -> Emulator:
    """An MLP whose middle layer's gradient is pruned, trained for some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 10))
    gradients = {"format": "e5m2", "codec": "alpha", "scale": "lognormal_mean", "pruning": policy}
    handle = emulate(model, {"gradients": gradients, "exclude": ["first", "last"], "ledger": {"every_steps": 1}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        x = torch.randn(500, 20)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.randint(0, 10, (500,))).backward()
        optimizer.step()
        handle.step()
    return handle


@pytest.mark.parametrize(
    ("policy", "low", "high"),
    [
        ({"policy": "homogeneous", "sparsity": 0.8}, 0.77, 0.83),
        ({"policy": "heterogeneous", "sparsity": 0.8}, 0.77, 0.83),
        ({"policy": "topk", "sparsity": 0.8}, 0.77, 0.83),
        ({"policy": "laplace", "sparsity": 0.8}, 0.7, 0.9),
        ({"policy": "topk_stochastic", "sparsity": 0.8}, 0.2, 0.7),
        ({"policy": "atp", "sparsity": 0.8}, 0.2, 0.7),
        ({"policy": "none", "sparsity": 0.8}, -0.1, 0.1),
    ],
    ids=lambda value: value["policy"] if isinstance(value, dict) else "",
)
def test_what_a_policy_achieves(policy: dict[str, Any], low: float, high: float) -> None:
    (row,) = train(policy).statistics
    assert low < row["achieved_sparsity"] < high
    is_stochastic = policy["policy"] not in ("topk", "none")
    assert row["alpha_kept"] == ("streams" if is_stochastic else "none")
    assert (row["alpha_share_of_nonzeros"] > 0.2) == is_stochastic
    if policy["policy"] == "topk":
        assert row["bias"] < -0.05  # what it removes is lost
    else:
        assert abs(row["bias"]) < 0.05
    assert 0.4 < row["cosine"] <= 1


def test_topk_keeps_the_largest_as_they_are() -> None:
    pruning = LayerPruning(Pruning(policy="topk", sparsity=0.5))
    assert pruning.threshold(np.array([1, -2, 3, -4], np.float32), 0) == 3
    assert pruning.threshold(np.array([8, -2, 30, 4], np.float32), 1) == 8  # it follows each tensor
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    emulate(
        model, {"gradients": {"format": "e5m2", "codec": "bitmask", "pruning": {"policy": "topk", "sparsity": 0.9}}}
    )
    x, dy = torch.ones(2000, 1, requires_grad=True), torch.from_numpy(draw(2.0, 2000)).float().reshape(-1, 1)
    model(x).backward(dy)  # dX = dY
    smallest = dy.abs().flatten().sort().values[1800]
    assert torch.equal(x.grad, accel.quantize(torch.where(dy.abs() >= smallest, dy, 0.0), "e5m2"))


def test_heterogeneous_layers_get_their_own_sparsities() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 300, bias=False), nn.Linear(300, 100, bias=False))
    gradients = {"format": "e5m2", "codec": "alpha", "scale": "lognormal_mean"}
    pruning = {"policy": "heterogeneous", "sparsity": 0.7, "refresh": 2, "max_sparsity": 0.95}
    handle = emulate(model, {"gradients": {**gradients, "pruning": pruning}})
    for _ in range(5):
        x = torch.randn(64, 4)
        (model(x) * torch.randn(64, 100).mul(2).exp()).sum().backward()
        handle.step()
    first, second = handle.statistics
    assert first["asked_sparsity"] != pytest.approx(second["asked_sparsity"], abs=0.02)
    mean = (64 * 300 * first["asked_sparsity"] + 64 * 100 * second["asked_sparsity"]) / (64 * 400)
    assert mean == pytest.approx(0.7, abs=0.01)
    state = handle.state_dict()
    handle.detach()
    again = emulate(model, {"gradients": {**gradients, "pruning": pruning}})
    again.load_state_dict(state)
    assert [row["asked_sparsity"] for row in again.statistics] == [first["asked_sparsity"], second["asked_sparsity"]]


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"policy": "atp", "sparsity": 0.5, "threshold": "lognormal"}, "threshold: is for the policies homogeneous"),
        ({"policy": "topk", "sparsity": 0.5, "min_sparsity": 0.2}, "min_sparsity: is for the policy heterogeneous"),
        (
            {"policy": "heterogeneous", "sparsity": 0.5, "min_sparsity": 0.6},
            "sparsity: must be from min_sparsity 0.6 to max_sparsity 0.99 (got 0.5)",
        ),
        ({"policy": "randomly", "sparsity": 0.5}, "policy"),
    ],
)
def test_keys_that_do_not_fit(pruning: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        emulate(nn.Sequential(nn.Linear(2, 2)), {"gradients": {"format": "e5m2", "codec": "alpha", "pruning": pruning}})
    assert message in str(error.value)
