from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accel
from accel.kernels import cpu

Floats = npt.NDArray[np.float32]


def words(count: int, offset: int = 0, seed: int = 0, stream: int = 0, step: int = 0) -> npt.NDArray[np.uint32]:
    out = np.empty(count, np.uint32)
    cpu.random_words.serial(0, count, out, offset, np.uint64(seed), np.uint64(stream), np.uint64(step))
    return out


def operator_t(x: Floats, alpha: float, drawn: npt.NDArray[np.uint32]) -> Floats:
    """The definition, in NumPy: eps = (word >> 8) 2^-24, one float32 product; every zero becomes +0."""
    a = np.float32(alpha)
    threshold = a * ((drawn >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))
    small = np.where(np.abs(x) >= threshold, np.copysign(a, x), np.float32(0))
    return np.where(x == 0, np.float32(0), np.where(np.abs(x) < a, small, x))


def gradients(count: int, seed: int = 0) -> Floats:
    """Lognormal magnitudes over 10 binades and more, a quarter zeros of either sign, a few specials."""
    random = np.random.default_rng(seed)
    x = (np.exp(random.normal(-6, 2, count)) * random.choice([-1, 0, 1, 1], count)).astype(np.float32)
    x[: count // 100] = random.choice(
        np.array([-0.0, 1e-42, -1e-42, np.inf, -np.inf, np.nan, 3e38], np.float32), count // 100
    )
    return x


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**32 - 1),
    offset=st.integers(0, 2**62 - 1000),
    alpha=st.floats(0, 2.0**127, width=32) | st.floats(2.0**-13, 1, width=32) | st.just(0.0) | st.just(2.0**-146),
)
def test_prune_is_the_operator_t(seed: int, stream: int, step: int, offset: int, alpha: float) -> None:
    x = np.concatenate(
        [gradients(300, seed % 1000), np.float32([alpha, -alpha]), np.nextafter(np.float32([alpha]), np.float32(0))]
    )
    pruned = accel.prune(x, alpha, seed=seed, stream=stream, step=step, offset=offset)
    expected = operator_t(x, alpha, words(x.size, offset, seed, stream, step))
    nan = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(pruned), nan)
    np.testing.assert_array_equal(pruned.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_alpha_zero_changes_nothing_but_the_sign_of_zeros() -> None:
    x = gradients(1000)
    zeros = x == 0
    assert np.signbit(x[zeros]).any()
    pruned = accel.prune(x, 0.0)
    assert pruned[~zeros].tobytes() == x[~zeros].tobytes()
    assert not pruned[zeros].view(np.uint32).any()


@pytest.mark.parametrize("alpha", [0.0, 2.0**-149, 0.1])
def test_zeros_stay_zero_and_are_positive(alpha: float) -> None:
    x = np.float32([0.0, -0.0] * 50_000)
    assert not accel.prune(x, alpha).view(np.uint32).any()
    fused, counts = accel.prune_quantize(torch.from_numpy(x), alpha, "e5m2", rounding="stochastic")
    assert not fused.view(torch.int32).any()
    assert counts.total == accel.Counts(numel=100_000, nonzeros=0, alphas=0)


@pytest.mark.parametrize("x", [0.001, -0.01, 0.05, 0.0999, 2.0**-20, 0.1, -0.25])
@pytest.mark.parametrize("alpha", [0.1, 0.0625])
def test_pruning_is_unbiased(x: float, alpha: float) -> None:
    """The mean lies within 5 standard errors of x; pruned elements are 0 or alpha."""
    count = 1 << 18
    pruned = accel.prune(np.full(count, x, np.float32), alpha, seed=5)
    if abs(x) >= alpha:
        np.testing.assert_array_equal(pruned, np.float32(x))
        return
    probability = abs(np.float32(x)) / np.float32(alpha)
    assert set(np.abs(pruned).tolist()) <= {0.0, float(np.float32(alpha))}
    lifted = float((pruned == math.copysign(float(np.float32(alpha)), x)).mean())
    assert abs(lifted - probability) < 5 * math.sqrt(probability * (1 - probability) / count)


def test_sparsity_is_the_mean_of_the_zero_probability() -> None:
    x = gradients(1 << 18)[1 << 12 :]
    alpha = 0.01
    probability = np.maximum(0.0, 1 - np.abs(x.astype(np.float64)) / alpha)
    zeros = int((accel.prune(x, alpha, seed=6) == 0).sum())
    spread = math.sqrt(float((probability * (1 - probability)).sum()))
    assert spread > 50
    assert abs(zeros - float(probability.sum())) < 5 * spread


OFF_GRID, ON_GRID = 0.0107, 2.0**-7
FUSED = {
    "nearest": {"fmt": "e5m2"},
    "stochastic": {"fmt": "e5m2", "rounding": "stochastic"},
    "few bits": {"fmt": "e4m3fn", "rounding": "stochastic", "random_bits": 3, "scale": 0.01},
    "alpha smallest normal": {"fmt": "e5m2", "rounding": "stochastic", "scale": 2.0**7},  # ON_GRID is 2^-14 scaled
    "alpha subnormal": {"fmt": "e5m2", "rounding": "stochastic", "scale": 2.0**8},
    "ieee": {"fmt": "e4m3fnuz", "overflow": "ieee", "flush_subnormals": "output"},
    "channels": {"fmt": "e4m3fn", "rounding": "stochastic", "scale": torch.tensor([0.01, 0.5, 3e-4])[:, None]},
}


@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("alpha", [OFF_GRID, ON_GRID, 0.0])
def test_fused_equals_prune_then_quantize_of_the_survivors(options: dict[str, object], alpha: float) -> None:
    x = torch.from_numpy(gradients(60_000)).reshape(3, 20_000)
    key = {"seed": 1, "stream": 2, "step": 3, "offset": 77}
    fused, counts = accel.prune_quantize(x, alpha, **options, **key)
    pruned = accel.prune(x, alpha, **key)
    quantized = accel.quantize(pruned, **options, **key)
    if alpha:
        quantized = torch.where(pruned.abs() == np.float32(alpha), pruned, quantized)
    assert torch.equal(fused.isnan(), quantized.isnan())
    assert torch.equal(fused.view(torch.int32)[~fused.isnan()], quantized.view(torch.int32)[~fused.isnan()])
    expected = accel.count_blocks(fused, alpha)
    np.testing.assert_array_equal(counts.nonzeros, expected.nonzeros)
    np.testing.assert_array_equal(counts.alphas, expected.alphas)
    assert (counts.numel, counts.block) == (expected.numel, expected.block)
    assert counts.total.nonzeros == int((fused.view(torch.int32) != 0).sum())
    assert counts.total.alphas == (int((fused.abs() == np.float32(alpha)).sum()) if alpha else 0)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_fused_equals_the_two_calls_for_alpha_on_the_grid(rounding: str) -> None:
    x = torch.from_numpy(gradients(50_000)[500:])
    fused, _ = accel.prune_quantize(x, ON_GRID, "e5m2", rounding=rounding, seed=8)
    assert torch.equal(fused, accel.quantize(accel.prune(x, ON_GRID, seed=8), "e5m2", rounding=rounding, seed=8))


@pytest.mark.parametrize(("fmt", "nonzeros"), [("e4m3fnuz", 1), ("e4m3fn", 2)])
def test_fused_without_threshold_is_quantize_of_positive_zeros(fmt: str, nonzeros: int) -> None:
    """-1e-9 rounds to -0, which e4m3fnuz does not have and e4m3fn keeps and stores; a -0 that comes in is a zero."""
    x = torch.tensor([-0.0, 0.0, 1.3, -1e-9])
    fused, counts = accel.prune_quantize(x, 0.0, fmt)
    expected = accel.quantize(torch.tensor([0.0, 0.0, 1.3, -1e-9]), fmt)
    assert torch.equal(fused.view(torch.int32), expected.view(torch.int32))
    assert counts.total == accel.Counts(numel=4, nonzeros=nonzeros, alphas=0)


@pytest.mark.parametrize("x", [0.003, 0.0106, OFF_GRID, 0.0108, -0.0131, 0.9])
def test_fused_is_unbiased_for_alpha_off_the_grid(x: float) -> None:
    count = 1 << 18
    fused, _ = accel.prune_quantize(torch.full((count,), x), OFF_GRID, "e5m2", rounding="stochastic", seed=9)
    values = fused.double()
    standard_error = max(float(values.std()), 1e-12) / math.sqrt(count)
    assert abs(float(values.mean()) - float(np.float32(x))) < 5 * standard_error + 1e-9


def test_bits_do_not_depend_on_pieces_or_threads(restored_threads: None) -> None:
    x = torch.from_numpy(gradients(100_003)[2000:])
    key = {"seed": 1, "stream": 2, "step": 3}

    def both(piece: torch.Tensor, offset: int) -> torch.Tensor:
        fused, _ = accel.prune_quantize(piece, OFF_GRID, "e5m2", rounding="stochastic", offset=offset, **key)
        return torch.stack([accel.prune(piece, OFF_GRID, offset=offset, **key), fused])

    torch.set_num_threads(1)
    whole = both(x, 500)
    _, serial = accel.prune_quantize(x, OFF_GRID, "e5m2")
    torch.set_num_threads(2)
    assert torch.equal(both(x, 500), whole)
    _, parallel = accel.prune_quantize(x, OFF_GRID, "e5m2")
    np.testing.assert_array_equal(parallel.nonzeros, serial.nonzeros)
    np.testing.assert_array_equal(parallel.alphas, serial.alphas)
    for pieces in (7, 100):
        cuts = np.linspace(0, x.numel(), pieces + 1).astype(int).tolist()
        parts = [both(x[low:high], 500 + low) for low, high in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("alpha", [-0.1, math.inf, math.nan, 1e39, "much", None])
def test_what_is_no_threshold_is_refused(alpha: object) -> None:
    with pytest.raises((ValueError, TypeError), match="alpha"):
        accel.prune(torch.ones(3), alpha)  # type: ignore[arg-type]


def test_16_bit_tensors_need_a_threshold_that_they_hold() -> None:
    x = torch.full((1000,), 0.0625, dtype=torch.bfloat16)
    pruned = accel.prune(x, 0.125, seed=1)
    assert pruned.dtype == torch.bfloat16
    assert torch.equal(pruned.float(), accel.prune(x.float(), 0.125, seed=1))
    with pytest.raises(ValueError, match=r"alpha = 0\.1\d* is not a value of torch\.bfloat16"):
        accel.prune(x, 0.1)
    with pytest.raises(ValueError, match=r"alpha = 0\.1\d* is not a value of torch\.bfloat16"):
        accel.prune(x, 0.1, out=torch.empty_like(x))
    wide = accel.prune(x, 0.1, out=torch.empty(1000))
    assert set(wide.unique().tolist()) == {0.0, float(np.float32(0.1))}
