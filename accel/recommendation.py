"""What to store a tensor as: sparsity, value format, codec and the way to keep +-alpha, chosen together.

`recommend` tries every combination on the tensor itself: it prunes by `accel.prune`, rounds by `accel.quantize`, counts
the bits of the stream that `accel.pack` makes, and measures what was lost. Four ways to treat +-alpha, the value of all
elements that pruning neither zeroes nor keeps:

    snap      alpha moves to the nearest number (never 0) on the format's scaled grid, then x is pruned; any codec. In
              a coarse format that may be far, and so may the sparsity be: it is reported as achieved
    reserved  two codes of the format mean +-alpha (`alpha_codes`), alpha is a float32; codecs without tags
    streams   +-alpha leaves the format (codecs with tags): the format holds the survivors |x| > alpha alone
    rounded   a real alpha, rounded with everything else: biased by q(alpha) / alpha - 1. To compare with, never advised

The scale is found by one rule: the power of two that makes the error of the values that pass through the format
smallest; the larger one of equals, and the nearest to 1 where the format's normal range holds them all. Those values
are the survivors for `reserved` and `streams`, the survivors and +-alpha for `snap` and `rounded`: what `streams` gains
in a narrow format comes from there. (The search takes magnitudes that share exponent and 10 bits of mantissa for their
mean; the errors that are reported are measured on every element.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from accel.arguments import checked_choice, checked_tensor, checked_words, scalar_format
from accel.codecs import CodecError, Packed, count_blocks, find_codec, footprint, footprint_of_blocks, pack
from accel.codecs.codec import Codec
from accel.formats import Format
from accel.operations import prune, prune_quantize, quantize
from accel.presets import Spec
from accel.threshold import threshold_of

WAYS = ("snap", "reserved", "streams")
NAIVE = "rounded"
UNPRUNED = "none"  # the way of points whose alpha is 0
ERRORS = {"rms": "rms_error", "relative": "relative_error"}
SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
FORMATS = (
    "e2m1", "e3m0", "e2m2", "e3m1", "e4m0", "e2m3", "e3m2", "e4m1", "e3m3", "e4m2", "e3m4", "e4m3fn", "e5m2", "bf16",
)  # fmt: skip
CODEC_NAMES = ("dense", "bitmask", "bitmask2", "rle", "coo", "csr", "alpha_tag", "alpha", "alpha_entropy")
SAMPLE = 1 << 18  # elements that are drawn of a lognormal
FLOAT32_MAX = float(np.finfo(np.float32).max)
DROPPED_BITS = 13  # of float32's mantissa, in the search for the scale


@runtime_checkable
class Lognormal(Protocol):
    """Magnitudes with ln|x| ~ N(mu, sigma^2), natural logarithm. Also read where it is there: `zero_share`."""

    @property
    def mu(self) -> float: ...
    @property
    def sigma(self) -> float: ...


@dataclass(frozen=True)
class Point:
    """One combination, and what it does to the tensor x of `numel` elements; y is the result, T(x) x pruned.

    sparsity: that was asked. achieved: share of zeros in y, values that were rounded to +0 included; -0 is stored.
    way: of keeping +-alpha; `none` where nothing had to be pruned (alpha 0). scale: of the format.
    rms_error: ||y - x|| / ||x||, pruning and rounding. cosine: between x and y, 0 where y is all zeros.
    relative_error: mean of |y - T(x)| / |T(x)| over the nonzeros of T(x), rounding alone, +-alpha among them.
    survivor_error: the same over those that are not +-alpha; 0 where there are none.
    bias: sum|y| / sum|x| - 1. bias_standard_error: of the part of it that is noise of pruning, sqrt(sum of
        |x| (alpha - |x|) over |x| < alpha) / sum|x|, as |T(x)| has that variance.
    alpha_bias: mean|y| / alpha - 1 over the elements that pruning made +-alpha; None where there are none.
    bits_by_part: of the real stream of y (header, offsets, metadata, payload). tag_entropy_bits: see `Footprint`.
    value_format: `format` as it is packed, with alpha_codes for `reserved`.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "sparsity", "achieved", "+-alpha", "format", "codec", "bits/element", "tag entropy", "rms error",
        "relative error", "cosine", "bias", "alpha bias",
    )  # fmt: skip

    sparsity: float
    achieved: float
    way: str
    format: str
    codec: str
    alpha: float
    scale: float
    rms_error: float
    relative_error: float
    survivor_error: float
    cosine: float
    bias: float
    bias_standard_error: float
    alpha_bias: float | None
    numel: int
    bits_by_part: dict[str, float]
    tag_entropy_bits: float
    value_format: Format = field(repr=False)

    @property
    def bits_per_element(self) -> float:
        """Length of the stream over numel, header and offsets included."""
        return sum(self.bits_by_part.values()) / self.numel

    @property
    def tag_entropy_per_element(self) -> float:
        return self.tag_entropy_bits / self.numel

    def pack(self, x: torch.Tensor | npt.NDArray[np.floating], *, seed: int = 0) -> Packed:
        """The stream of x, pruned and rounded as this point says; with recommend's x and seed, that of `bits_by_part`.

        Raises ValueError or TypeError as `recommend` does for x, CodecError where the codec cannot hold the result.
        """
        tensor, _ = _tensor_of(x, seed)
        if self.way in (NAIVE, UNPRUNED):
            result = quantize(prune(tensor, self.alpha, seed=seed), self.value_format, scale=self.scale)
        else:
            result, _ = prune_quantize(tensor, self.alpha, self.value_format, scale=self.scale, seed=seed)
        return pack(result, self.codec, self.value_format, self.scale, self.alpha)

    def row(self) -> tuple[str, ...]:
        """The cells of COLUMNS as plain text."""
        noise = f" +- {100 * self.bias_standard_error:.2f}" if self.bias_standard_error else ""
        return (
            f"{100 * self.sparsity:g} %", f"{100 * self.achieved:.1f} %", self.way, self.format, self.codec,
            f"{self.bits_per_element:.3f}", f"{self.tag_entropy_per_element:.3f}", f"{self.rms_error:.4f}",
            f"{self.relative_error:.4f}", f"{self.cosine:.4f}", f"{100 * self.bias:+.2f}{noise} %",
            "-" if self.alpha_bias is None else f"{100 * self.alpha_bias:+.2f} %",
        )  # fmt: skip

    def __str__(self) -> str:
        """The point in words."""
        keeping = {
            UNPRUNED: "",
            "snap": f", alpha {self.alpha:.4g} on the format's grid",
            "reserved": f", alpha {self.alpha:.4g} in two codes of the format",
            "streams": f", alpha {self.alpha:.4g} outside the format",
            NAIVE: f", alpha {self.alpha:.4g} rounded",
        }[self.way]
        pruned = "no pruning" if self.way == UNPRUNED else f"{100 * self.achieved:.1f} % zeros"
        return (
            f"{pruned}{keeping}, values in {self.format} (scale 2^{math.log2(self.scale):.0f}), codec {self.codec}: "
            f"{self.bits_per_element:.3f} bits an element, rms error {self.rms_error:.4f}, "
            f"relative error {self.relative_error:.4f}"
        )


@dataclass(frozen=True)
class Recommendation:
    """All points that were tried, and the answer to what was asked.

    source: what was tried, in words. error: `rms` or `relative`, the error that the scales, `pareto` and `best` are
    about. budget_bits, max_error: the limits that were given. refused: combinations that cannot be, with the reason.
    """

    source: str
    error: str
    budget_bits: float | None
    max_error: float | None
    points: tuple[Point, ...] = field(repr=False)
    refused: tuple[str, ...] = ()

    def error_of(self, point: Point) -> float:
        return float(getattr(point, ERRORS[self.error]))

    @property
    def pareto(self) -> tuple[Point, ...]:
        """The points, from the fewest bits on, that no other beats in bits or error and equals in the other one.

        Of points that are equal in both the first; points of the way `rounded` take no part.
        """
        front: list[Point] = []
        for point in sorted(self._sound, key=lambda point: (point.bits_per_element, self.error_of(point))):
            if not front or self.error_of(point) < self.error_of(front[-1]):
                front.append(point)
        return tuple(front)

    @property
    def best(self) -> Point | None:
        """The point of `pareto` that is advised; None where there is none or no limit was given (see `explanation`).

        With max_error (whether or not a budget is given as well): the fewest bits an element among the points that
        keep the limits. With budget_bits alone: the smallest error among them.
        """
        if self.budget_bits is None and self.max_error is None:
            return None
        kept = [point for point in self.pareto if self._is_cheap(point) and self._is_exact(point)]
        if not kept:
            return None
        return kept[-1] if self.max_error is None else kept[0]

    @property
    def explanation(self) -> str:
        """One sentence: what `best` is, or why it is None."""
        if self.budget_bits is None and self.max_error is None:
            return "No limit was given, so nothing is advised: set budget_bits or max_error."
        limits = " and ".join(
            text
            for text in (
                "" if self.budget_bits is None else f"{self.budget_bits:g} bits an element",
                "" if self.max_error is None else f"{self.error} error {self.max_error:g}",
            )
            if text
        )
        if (best := self.best) is not None:
            aim = f"smallest {self.error} error" if self.max_error is None else "fewest bits"
            return f"The {aim} within {limits}: {best}."
        smallest, largest = self.pareto[0], self.pareto[-1]
        reasons = []
        if not any(map(self._is_cheap, self.pareto)):
            reasons.append(f"the fewest bits an element are {smallest.bits_per_element:.3f}")
        if not any(map(self._is_exact, self.pareto)):
            reasons.append(f"the smallest {self.error} error is {self.error_of(largest):.4f}")
        if not reasons:
            within = next(point for point in self.pareto if self._is_exact(point))
            reasons.append(f"that error takes {within.bits_per_element:.3f} bits an element")
        return f"Nothing that was tried keeps within {limits}: {' and '.join(reasons)}."

    @property
    def _sound(self) -> list[Point]:
        return [point for point in self.points if point.way != NAIVE]

    def _is_cheap(self, point: Point) -> bool:
        return self.budget_bits is None or point.bits_per_element <= self.budget_bits

    def _is_exact(self, point: Point) -> bool:
        return self.max_error is None or self.error_of(point) <= self.max_error


def recommend(
    x: torch.Tensor | npt.NDArray[np.floating] | Lognormal,
    *,
    budget_bits: float | None = None,
    max_error: float | None = None,
    error: str = "rms",
    sparsities: Sequence[float] = SPARSITIES,
    formats: Sequence[Spec] = FORMATS,
    codecs: Sequence[str] = CODEC_NAMES,
    alphas: Sequence[str] = WAYS,
    seed: int = 0,
) -> Recommendation:
    """Try every (sparsity, way to keep +-alpha, format, codec) on x, and advise one within the limits.

    x: a tensor or array of floats, any shape, finite, not all zeros; every element is used, in float32 on the CPU. Or a
    lognormal, an object with `mu`, `sigma` (natural logarithm) and perhaps `zero_share`, such as
    `fpsim.lognormal.fit` returns: then SAMPLE elements, the quantiles (i + 1/2) / n of its magnitudes, and zeros, with
    signs that alternate along the quantiles, in a pseudo-random order fixed by `seed`.
    budget_bits: most bits an element, header and offsets of the stream included. max_error: largest `error`.
    error: `rms`, ||y - x|| / ||x||; or `relative`, the mean relative error of rounding over the nonzeros, which knows
    nothing of pruning (the sparsest point always wins): for a sparsity that is given. The scales make it small.
    sparsities: shares of zeros in [0, 1); alpha solves mean(max(0, 1 - |x| / alpha)) = sparsity, 0 where x is as sparse
    already, and then nothing is pruned. formats: signed scalar ones. codecs: of `CODECS`. alphas: `snap`, `reserved`,
    `streams`, and `rounded`, which is measured and never advised.
    Rounding is nearest-even and saturates. seed: of pruning. Raises ValueError or TypeError, naming the argument.
    """
    checked_words(seed, 0, 0, 0)
    budget_bits, max_error = _checked_limit("budget_bits", budget_bits), _checked_limit("max_error", max_error)
    checked_choice("error", error, ERRORS)
    asked = [_checked_sparsity(sparsity) for sparsity in _listed("sparsities", sparsities)]
    values = [_checked_format(spec) for spec in _listed("formats", formats)]
    encodings = [_checked_codec(name) for name in _listed("codecs", codecs)]
    for way in (ways := _listed("alphas", alphas)):
        checked_choice("alphas", way, (*WAYS, NAIVE))
    tensor, source = _tensor_of(x, seed)
    magnitudes = tensor.abs().double().reshape(-1).numpy()
    points: list[Point] = []
    refused: dict[str, None] = {}
    for sparsity in asked:
        pruned = _Pruned(tensor, threshold_of(magnitudes, sparsity), seed)
        for fmt in values:
            for way in ways if pruned.alpha else [UNPRUNED]:
                usable = [codec for codec in encodings if _goes_with(way, codec)]
                if not usable:
                    continue
                try:
                    kept = _keep(tensor, pruned, fmt, way, error, seed)
                except ValueError as reason:
                    refused[f"{way}, {fmt.name}: {reason}"] = None
                    continue
                for codec in usable:
                    try:
                        points.append(kept.point(sparsity, codec, fmt.name))
                    except CodecError as reason:
                        refused[f"{codec.name}, {way}, {100 * sparsity:g} % zeros: {reason}"] = None
    if not any(point.way != NAIVE for point in points):
        raise ValueError(
            f"no combination of alphas {list(ways)!r} and codecs {[codec.name for codec in encodings]!r} can be "
            f"advised{''.join(f'; {reason}' for reason in list(refused)[:1])}"
        )
    return Recommendation(source, error, budget_bits, max_error, tuple(points), tuple(refused))


class _Binned(NamedTuple):
    """Nonzero magnitudes, those that share exponent and leading mantissa bits together: their means and how many."""

    means: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    smallest: float
    largest: float


class _Pruned:
    """x pruned at alpha, its nonzeros one after another. Sums are in float64.

    index: flat positions of the nonzeros of T(x); values: T(x) there, float32; originals: x there; is_alpha: where
    T(x) is +-alpha. lost: sum of x^2 over the other elements.
    """

    def __init__(self, x: torch.Tensor, alpha: float, seed: int):
        flat = x.reshape(-1)
        self.alpha = float(np.float32(min(alpha, FLOAT32_MAX)))
        result = prune(flat, self.alpha, seed=seed) if self.alpha else flat
        self.shape = x.shape
        is_nonzero = result != 0
        self.index = is_nonzero.nonzero()[:, 0]
        self.values = result[self.index]
        self.originals = flat[self.index].double()
        self.is_alpha = self.values.abs() == self.alpha
        doubles = flat.double()
        self.square_sum = float(doubles.square().sum())
        self.sum = float(doubles.abs().sum())
        self.lost = float(doubles[~is_nonzero].square().sum())
        below = doubles.abs().clamp(max=self.alpha)
        self.bias_standard_error = math.sqrt(float((below * (self.alpha - below)).sum())) / self.sum

    @cached_property
    def magnitudes(self) -> torch.Tensor:
        return self.values.double().abs()

    @cached_property
    def binned(self) -> _Binned | None:
        return _binned(self.values)

    @cached_property
    def binned_survivors(self) -> _Binned | None:
        return _binned(self.values[~self.is_alpha])


class _Kept:
    """The result y of one way and format, and what it lost."""

    def __init__(self, pruned: _Pruned, way: str, fmt: Format, scale: float, values: torch.Tensor, tagged: float):
        self.pruned, self.way, self.fmt, self.scale, self.tagged = pruned, way, fmt, scale, tagged
        self.result = torch.zeros(pruned.shape)
        self.result.view(-1)[pruned.index] = values
        self.counts = count_blocks(self.result, tagged)
        total = self.counts.total
        kept = values.double()
        magnitudes, norm = kept.abs(), float(kept.norm())
        errors = (magnitudes - pruned.magnitudes).abs_().div_(pruned.magnitudes)
        survivors = errors[~pruned.is_alpha]
        squares = float((kept - pruned.originals).square_().sum()) + pruned.lost
        self.measured: dict[str, Any] = {
            "achieved": 1 - total.nonzeros / total.numel,
            "rms_error": math.sqrt(squares / pruned.square_sum),
            "relative_error": float(errors.mean()) if errors.numel() else 0.0,
            "survivor_error": float(survivors.mean()) if survivors.numel() else 0.0,
            "cosine": float(kept @ pruned.originals) / (norm * math.sqrt(pruned.square_sum)) if norm else 0.0,
            "bias": float(magnitudes.sum()) / pruned.sum - 1,
            "bias_standard_error": pruned.bias_standard_error,
            "alpha_bias": _mean_bias(magnitudes[pruned.is_alpha], pruned.alpha),
        }
        signed = replace(total, negative_alphas=int((self.result == -tagged).sum()) if tagged else 0)
        self.tag_entropy_bits = footprint(signed, codec="dense", fmt=fmt).tag_entropy_bits

    def point(self, sparsity: float, codec: Codec, name: str) -> Point:
        """CodecError for a codec that cannot hold the result."""
        shape = tuple(self.pruned.shape)
        if codec.is_counted:
            bits = footprint_of_blocks(self.counts, codec.name, self.fmt, shape).bits_by_part
        else:
            bits = pack(self.result, codec.name, self.fmt, self.scale, self.tagged).bits_by_part
        return Point(
            sparsity=sparsity, way=self.way, format=name, codec=codec.name, alpha=self.pruned.alpha, scale=self.scale,
            numel=self.result.numel(), bits_by_part=bits, tag_entropy_bits=self.tag_entropy_bits, value_format=self.fmt,
            **self.measured,
        )  # fmt: skip


def _keep(x: torch.Tensor, pruned: _Pruned, fmt: Format, way: str, error: str, seed: int) -> _Kept:
    """x pruned and rounded into a format. ValueError for a format that cannot give two codes to +-alpha."""
    if way in ("reserved", "streams"):
        own = scalar_format({"base": fmt, "alpha_codes": True}, "recommend") if way == "reserved" else fmt
        scale = _scale(pruned.binned_survivors, own, error)
        values = torch.where(pruned.is_alpha, pruned.values, quantize(pruned.values, own, scale=scale))
        return _Kept(pruned, way, own, scale, values, pruned.alpha)
    scale = _scale(pruned.binned, fmt, error)
    if way == "snap":
        pruned = _Pruned(x, _snapped(pruned.alpha, fmt, scale), seed)
    values = quantize(pruned.values, fmt, scale=scale)
    tagged = float(quantize(torch.tensor(pruned.alpha), fmt, scale=scale))
    return _Kept(pruned, way, fmt, scale, values, tagged)


def _goes_with(way: str, codec: Codec) -> bool:
    return way == "snap" or codec.tags_alpha == (way == "streams")


def _snapped(alpha: float, fmt: Format, scale: float) -> float:
    """The number of the scaled grid that is nearest to alpha, not 0."""
    return float(quantize(torch.tensor(alpha), fmt, scale=scale)) or fmt.min_subnormal * scale


def _binned(values: torch.Tensor) -> _Binned | None:
    """None of no values."""
    if not values.numel():
        return None
    magnitudes = values.abs().numpy()
    bins = (magnitudes.view(np.int32) >> DROPPED_BITS).astype(np.int64)
    counts = np.bincount(bins)
    present = counts > 0
    means = (np.bincount(bins, magnitudes.astype(np.float64))[present] / counts[present]).astype(np.float32)
    return _Binned(means, counts[present], float(magnitudes.min()), float(magnitudes.max()))


def _scale(binned: _Binned | None, fmt: Format, error: str) -> float:
    """The power of two that makes the error of rounding those values smallest; 1 where there are none."""
    if binned is None:
        return 1.0
    highest = _carried(math.ceil(math.log2(binned.largest / fmt.max)))  # from here on nothing saturates
    lowest = _carried(math.floor(math.log2(binned.smallest / fmt.min_normal)))  # and from here down nothing underflows
    if highest <= lowest:
        return 2.0 ** min(max(0, highest), lowest)
    exact = binned.means.astype(np.float64)
    weights, power = (binned.counts, 2) if error == "rms" else (binned.counts / exact, 1)
    errors = {}
    for exponent in range(highest, lowest - 1, -1):
        rounded = quantize(binned.means, fmt, scale=2.0**exponent)
        errors[exponent] = float(weights @ np.abs(rounded - exact) ** power)
    return 2.0 ** min(errors, key=errors.__getitem__)


def _carried(exponent: int) -> int:
    """The nearest exponent of a normal float32."""
    return min(max(exponent, -126), 127)


def _mean_bias(magnitudes: torch.Tensor, alpha: float) -> float | None:
    return float(magnitudes.mean()) / alpha - 1 if magnitudes.numel() else None


# --- arguments ------------------------------------------------------------------------------------------------------


def _tensor_of(x: Any, seed: int) -> tuple[torch.Tensor, str]:
    """x in float32 on the CPU, contiguous, and what it is in words."""
    if not isinstance(x, torch.Tensor | np.ndarray) and isinstance(x, Lognormal):
        return _sample(x, seed)
    tensor = checked_tensor(x)
    if not tensor.numel():
        raise ValueError("x must have at least one element, got none")
    is_wide = tensor.dtype == torch.float64
    tensor = tensor.detach().to("cpu", torch.float32).contiguous()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"x must be finite{', also as float32' if is_wide else ''}: it holds a NaN or an infinity")
    if not bool(tensor.any()):
        raise ValueError("x must hold a nonzero: every element is 0")
    return tensor, f"a tensor of shape {tuple(tensor.shape)}"


def _sample(fit: Lognormal, seed: int) -> tuple[torch.Tensor, str]:
    mu, sigma, zero_share = (float(number) for number in (fit.mu, fit.sigma, getattr(fit, "zero_share", 0.0)))
    if not math.isfinite(mu) or not (0 <= sigma < math.inf) or not 0 <= zero_share < 1:
        raise ValueError(
            "x as a lognormal must have a finite mu, a sigma that is finite and >= 0 and a zero_share in [0, 1) "
            f"(got mu={mu!r}, sigma={sigma!r}, zero_share={zero_share!r})"
        )
    nonzeros = max(round((1 - zero_share) * SAMPLE), 1)
    places = (torch.arange(nonzeros, dtype=torch.float64) + 0.5) / nonzeros
    magnitudes = torch.exp(mu + sigma * torch.special.ndtri(places)).float()
    if not bool(magnitudes.isfinite().all() and (magnitudes > 0).all()):
        raise ValueError(f"x: a lognormal with mu={mu!r} and sigma={sigma!r} passes the range of float32")
    magnitudes[1::2] *= -1
    sample = torch.cat([magnitudes, torch.zeros(SAMPLE - nonzeros)])
    order = np.random.default_rng(seed).permutation(SAMPLE)
    zeros = f" and {100 * zero_share:g} % zeros" if zero_share else ""
    return sample[order], f"a sample of {SAMPLE} elements, lognormal with mu {mu:g} and sigma {sigma:g}{zeros}"


def _checked_limit(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number or None (got {value!r})")
    return float(value)


def _checked_sparsity(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value < 1:
        raise ValueError(f"sparsities must lie in [0, 1) (got {value!r})")
    return float(value)


def _checked_format(spec: Spec) -> Format:
    try:
        fmt = scalar_format(spec, "recommend")
    except ValueError as error:
        raise ValueError(f"formats: {error}") from None
    if not fmt.signed or fmt.alpha_codes:
        raise ValueError(f"formats must be signed and without alpha_codes (got {fmt.name!r})")
    return fmt


def _checked_codec(name: str) -> Codec:
    try:
        return find_codec(name)
    except CodecError as error:
        raise ValueError(f"codecs: {error}") from None


def _listed(name: str, values: Any) -> list[Any]:
    """The values of an argument that takes several."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list (got {values!r})")
    listed = list(values)
    if not listed:
        raise ValueError(f"{name} must have at least one entry, got none")
    return listed
