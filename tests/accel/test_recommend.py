"""The joint recommendation: checked numbers of the encodings, bias, real streams, the front, limits and bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accel
from accel.recommendation import SAMPLE
from accel.threshold import threshold_of

FIXED = settings(derandomize=True, deadline=None)
WAYS = ("snap", "reserved", "streams", "rounded")


@dataclass(frozen=True)
class Fit:
    mu: float
    sigma: float
    zero_share: float = 0.0


def lognormal(size: int, sigma: float, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.array([-1, 1]), size)
    return torch.from_numpy((np.exp(sigma * rng.standard_normal(size)) * signs).astype(np.float32))


@pytest.fixture(scope="module")
def small() -> torch.Tensor:
    return lognormal(96 * 160, 2.0).view(96, 160)


@pytest.fixture(scope="module")
def tried(small: torch.Tensor) -> accel.Recommendation:
    return accel.recommend(
        small, budget_bits=2, sparsities=(0.0, 0.8, 0.9), formats=("e2m1", "e4m3fn", "e5m2"), seed=3,
        codecs=("bitmask", "alpha", "alpha_entropy"), alphas=WAYS,
    )  # fmt: skip


def test_survivors_alone_live_in_fewer_bits() -> None:
    """sigma = 2, 85 % zeros: the checked numbers, 1e6 elements, scales that make the mean relative error smallest."""
    x = lognormal(10**6, 2.0)
    found = accel.recommend(
        x, error="relative", sparsities=[0.85], formats=["e2m1", "e4m3fn"], codecs=["bitmask", "alpha"]
    )
    points = {(point.way, point.format, point.codec): point for point in found.points}
    narrow, wide = points["streams", "e2m1", "alpha"], points["reserved", "e4m3fn", "bitmask"]
    assert narrow.survivor_error == pytest.approx(0.118, abs=0.001)
    for point, bits in ((narrow, 1.45), (wide, 2.20)):
        body = point.bits_by_part["metadata"] + point.bits_by_part["payload"]
        assert body / point.numel == pytest.approx(bits, abs=0.005)
        assert point.bits_per_element - body / point.numel == pytest.approx(32 / 4096, abs=0.001)  # offsets, header
    assert points["streams", "e4m3fn", "alpha"].tag_entropy_per_element == pytest.approx(1.25, abs=0.01)
    assert narrow.survivor_error < points["snap", "e2m1", "alpha"].survivor_error - 0.02
    assert narrow.bias < -0.1  # what that scale costs: large survivors saturate


def test_four_bits_on_the_whole_tensor() -> None:
    """.310 of the same tensor unpruned is the best 4-bit format's, e3m0; e2m1 has .413."""
    found = accel.recommend(
        lognormal(10**6, 2.0), error="relative", sparsities=[0.0], formats=["e3m0", "e2m1"], codecs=["dense"]
    )
    errors = {point.format: point.relative_error for point in found.points}
    assert errors["e3m0"] == pytest.approx(0.310, abs=0.002)
    assert errors["e2m1"] == pytest.approx(0.413, abs=0.002)


def test_alpha_is_exact_but_where_it_is_rounded(tried: accel.Recommendation) -> None:
    for point in tried.points:
        if point.way == "none":
            assert (point.alpha, point.alpha_bias) == (0.0, None)
        elif point.way == "rounded":
            kept = float(accel.quantize(np.array([point.alpha], np.float32), point.format, scale=point.scale)[0])
            assert point.alpha_bias == kept / point.alpha - 1
            assert point.alpha_bias != 0
        else:
            assert point.alpha_bias == 0.0
    assert {point.way for point in tried.points} == {"none", *WAYS}


def test_rounding_alpha_biases_e4m3_by_up_to_a_sixteenth() -> None:
    x = lognormal(4096, 2.0)
    biases = []
    for sparsity in np.linspace(0.5, 0.9, 17):
        options: dict[str, Any] = {"formats": ["e4m3fn"], "codecs": ["bitmask"], "alphas": ["rounded", "snap"]}
        found = accel.recommend(x, sparsities=[sparsity], **options)
        biases += [point.alpha_bias for point in found.points if point.way == "rounded"]
    assert min(biases) < -0.03
    assert max(map(abs, biases)) <= 2.0**-4


@pytest.mark.parametrize("way", WAYS)
def test_the_bias_of_pruning_is_noise_of_the_stated_size(small: torch.Tensor, way: str) -> None:
    """In bfloat16 rounding adds less than 2^-8; 30 seeds: the mean within 5 standard errors, the spread as stated."""
    points = [
        accel.recommend(small, sparsities=[0.8], formats=["bf16"], codecs=["bitmask", "alpha"], alphas=[way, "snap"],
                        seed=seed).points[0]
        for seed in range(30)
    ]  # fmt: skip
    assert {point.way for point in points} == {way}
    biases = np.array([point.bias for point in points])
    (error,) = {round(point.bias_standard_error, 12) for point in points}
    assert abs(biases.mean()) < 5 * error / math.sqrt(30) + 2.0**-8
    assert error > 2.0**-8
    assert biases.std() == pytest.approx(error, rel=0.5)


def test_bits_are_those_of_the_stream_and_alpha_comes_back(tried: accel.Recommendation, small: torch.Tensor) -> None:
    for point in tried.points:
        packed = point.pack(small, seed=3)
        assert sum(point.bits_by_part.values()) == 8 * len(packed.to_bytes())
        assert point.bits_by_part == packed.bits_by_part
        assert point.bits_per_element == packed.nbits / small.numel()
        if point.codec == "alpha_entropy":
            continue  # has unpacking tests of its own
        back = accel.unpack(packed).double()
        assert point.rms_error == pytest.approx(float((back - small).norm() / small.double().norm()), rel=1e-9)
        is_zero = accel.unpack(packed).view(torch.int32) == 0  # -0 is stored like any other value
        assert point.achieved == pytest.approx(float(is_zero.double().mean()), abs=1e-12)
        assert point.bias == pytest.approx(float(back.abs().sum() / small.double().abs().sum()) - 1, abs=1e-12)
        if point.way in ("snap", "reserved", "streams"):
            is_alpha = accel.prune(small, point.alpha, seed=3).abs() == point.alpha
            assert bool((back[is_alpha].abs() == point.alpha).all())


def test_ways_and_codecs_go_together(tried: accel.Recommendation) -> None:
    for point in tried.points:
        tags = accel.find_codec(point.codec).tags_alpha
        assert {"streams": tags, "reserved": not tags, "rounded": not tags, "none": not tags, "snap": True}[point.way]
        if point.way == "snap":
            on_grid = accel.quantize(np.array([point.alpha], np.float32), point.format, scale=point.scale)
            assert float(on_grid[0]) == point.alpha > 0


@pytest.mark.parametrize("error", ["rms", "relative"])
def test_the_scale_is_the_best_power_of_two(small: torch.Tensor, error: str) -> None:
    (point,) = accel.recommend(
        small, error=error, sparsities=[0.9], formats=["e3m2"], codecs=["alpha"], alphas=["streams"]
    ).points
    pruned = accel.prune(small, point.alpha)
    survivors = pruned[pruned.abs() > point.alpha].double()

    def loss(exponent: int) -> float:
        difference = (accel.quantize(survivors.float(), "e3m2", scale=2.0**exponent) - survivors).abs()
        return float(difference.square().sum() if error == "rms" else (difference / survivors.abs()).mean())

    losses = {exponent: loss(exponent) for exponent in range(-20, 20)}
    assert losses[round(math.log2(point.scale))] <= 1.001 * min(losses.values())


# --- the front and the limits ---


def of_numbers(numbers: list[tuple[int, int, bool]], **limits: float | None) -> accel.Recommendation:
    """Points of so many bits an element and such an rms error; True: of the naive way."""
    any_format = accel.format("e4m3fn")
    points = tuple(
        accel.Point(
            0.5, 0.5, "rounded" if naive else "snap", "e4m3fn", "alpha", 1.0, 1.0, error / 8, 0.1, 0.1, 0.9, 0.0, 0.0,
            0.0, 1, {"payload": bits}, 1.0, any_format,
        )  # type: ignore[arg-type]
        for bits, error, naive in numbers
    )  # fmt: skip
    return accel.Recommendation("numbers", "rms", limits.get("bits"), limits.get("error"), points)


def beats(one: accel.Point, other: accel.Point) -> bool:
    pair = (one.bits_per_element, one.rms_error), (other.bits_per_element, other.rms_error)
    return pair[0] != pair[1] and pair[0][0] <= pair[1][0] and pair[0][1] <= pair[1][1]


NUMBERS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.booleans()), min_size=1, max_size=25).filter(
    lambda numbers: not all(naive for *_, naive in numbers)
)
LIMITS = st.one_of(st.none(), st.integers(1, 14))


@FIXED
@given(NUMBERS)
def test_nothing_beats_the_front_and_the_front_beats_the_rest(numbers: list[tuple[int, int, bool]]) -> None:
    found = of_numbers(numbers)
    front, sound = found.pareto, [point for point in found.points if point.way != "rounded"]
    assert not any(beats(point, member) for point in sound for member in front)
    for point in sound:
        same = [(m.bits_per_element, m.rms_error) == (point.bits_per_element, point.rms_error) for m in front]
        assert any(same) or any(beats(member, point) for member in front)
    assert all(point.way != "rounded" for point in front)
    assert [point.bits_per_element for point in front] == sorted({point.bits_per_element for point in front})


@FIXED
@given(NUMBERS, LIMITS, LIMITS)
def test_the_best_keeps_the_limits(
    numbers: list[tuple[int, int, bool]], budget: int | None, eighths: int | None
) -> None:
    largest = None if eighths is None else eighths / 8
    found = of_numbers(numbers, bits=budget, error=largest)
    allowed = [
        (point.bits_per_element, point.rms_error)
        for point in found.points
        if point.way != "rounded"
        and (budget is None or point.bits_per_element <= budget)
        and (largest is None or point.rms_error <= largest)
    ]
    if found.best is None:
        assert (budget is None and largest is None) or not allowed
        assert found.explanation.startswith("No limit" if budget is None and largest is None else "Nothing that")
        return
    best = (found.best.bits_per_element, found.best.rms_error)
    assert best in allowed
    by_error = min(allowed, key=lambda pair: (pair[1], pair[0]))
    assert best == (by_error if largest is None else min(allowed))


def test_nothing_fits(tried: accel.Recommendation) -> None:
    for limits, reason in (
        ({"budget_bits": 0.01}, "the fewest bits an element are "),
        ({"budget_bits": None, "max_error": 1e-6}, "the smallest rms error is "),
        ({"budget_bits": 1.0, "max_error": 0.05}, "that error takes "),
        ({"budget_bits": 0.01, "max_error": 1e-6}, " and the smallest rms error is "),
    ):
        found = replace(tried, **limits)
        assert found.best is None
        assert reason in found.explanation
    assert tried.best is not None
    assert str(tried.best) in tried.explanation
    assert len(tried.best.row()) == len(accel.Point.COLUMNS)


# --- what it takes ---


def test_dtypes_and_shapes_of_one_tensor_give_one_answer(small: torch.Tensor) -> None:
    options: dict[str, Any] = {"sparsities": [0.8], "formats": ["e4m3fn"], "codecs": ["bitmask"], "alphas": ["snap"]}
    (expected,) = accel.recommend(small, **options).points
    for same in (small.numpy(), small.double(), small.t().contiguous().t(), small.clone().requires_grad_()):
        assert accel.recommend(same, **options).points == (expected,)
    (flat,) = accel.recommend(small.reshape(-1), **options).points
    assert (flat.rms_error, flat.alpha) == (expected.rms_error, expected.alpha)
    (half,) = accel.recommend(small.bfloat16(), **options).points
    assert half.rms_error == pytest.approx(expected.rms_error, rel=0.2)


def test_a_fit_is_sampled() -> None:
    options: dict[str, Any] = {"sparsities": [0.85], "formats": ["bf16"], "codecs": ["alpha"], "alphas": ["streams"]}
    found = accel.recommend(Fit(-3.0, 2.0, 0.0), **options)
    (point,) = found.points
    assert point.numel == SAMPLE
    assert str(SAMPLE) in found.source
    assert point.alpha == pytest.approx(26.692 * math.exp(-3), rel=0.01)  # (1) of the paper, solved elsewhere
    assert found == accel.recommend(Fit(-3.0, 2.0, 0.0), **options)
    (already,) = accel.recommend(Fit(0.0, 1.0, 0.9), **{**options, "codecs": ["bitmask"]}).points
    assert (already.way, already.alpha) == ("none", 0.0)
    assert already.achieved == pytest.approx(0.9, abs=1e-5)


def test_a_codec_or_format_that_cannot_is_left_out_and_named() -> None:
    long_row = lognormal((1 << 20) + 1, 1.0)
    options: dict[str, Any] = {"sparsities": [0.5], "formats": ["int8"], "alphas": ["snap", "reserved"]}
    found = accel.recommend(long_row, codecs=["bitmask", "csr"], **options)
    assert {(point.way, point.codec) for point in found.points} == {("snap", "bitmask")}
    format_reason, codec_reason = sorted(found.refused, key=lambda reason: reason.startswith("csr"))
    assert "alpha_codes need" in format_reason
    assert codec_reason.startswith("csr, snap, 50 % zeros: ")


def test_the_threshold_is_the_solution() -> None:
    magnitudes = np.abs(lognormal(1000, 3.0).double().numpy())
    alpha = threshold_of(magnitudes, 0.7)
    assert np.maximum(0, 1 - magnitudes / alpha).mean() == pytest.approx(0.7, abs=1e-12)
    assert threshold_of(np.array([0.0, 0.0, 1.0]), 0.6) == 0.0


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (None, {"budget_bits": 0}, "budget_bits must be a positive finite number"),
        (None, {"budget_bits": "2"}, "budget_bits must be a positive finite number"),
        (None, {"max_error": math.nan}, "max_error must be a positive finite number"),
        (None, {"error": "mse"}, "unknown error 'mse'"),
        (None, {"sparsities": [1.0]}, "sparsities must lie in"),
        (None, {"sparsities": []}, "sparsities must have at least one"),
        (None, {"sparsities": 0.5}, "sparsities must be a list"),
        (None, {"formats": "e2m1"}, "formats must be a list"),
        (None, {"formats": ["e4m3fm"]}, "formats: unknown format 'e4m3fm'"),
        (None, {"formats": ["mxfp4"]}, "formats: .* takes a scalar format"),
        (None, {"formats": ["uint8"]}, "formats must be signed"),
        (None, {"codecs": ["bitmsk"]}, "codecs: unknown codec 'bitmsk'"),
        (None, {"alphas": ["snapped"]}, "unknown alphas 'snapped'"),
        (None, {"alphas": ["streams"], "codecs": ["bitmask"], "sparsities": [0.5]}, "no combination of alphas"),
        (None, {"alphas": ["rounded"], "sparsities": [0.5]}, "no combination of alphas"),
        (None, {"seed": -1}, "seed must be an integer"),
        (torch.empty(0), {}, "x must have at least one element"),
        (torch.zeros(3), {}, "x must hold a nonzero"),
        (torch.tensor([1.0, math.nan]), {}, "x must be finite"),
        (torch.tensor([1e300], dtype=torch.float64), {}, "x must be finite, also as float32"),
        (torch.arange(3), {}, "x must be float32"),
        ([1.0, 2.0], {}, "x must be a torch tensor or a NumPy array"),
        (Fit(0.0, -1.0), {}, "a sigma that is finite and >= 0"),
        (Fit(0.0, 1.0, 1.0), {}, "zero_share"),
        (Fit(0.0, 60.0), {}, "passes the range of float32"),
    ],
)
def test_bad_arguments_are_named(x: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        accel.recommend(
            torch.tensor([1.0, -2.0, 3.0]) if x is None else x,
            **{"formats": ["e2m1"], "codecs": ["bitmask"], **options},
        )
