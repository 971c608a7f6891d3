"""Whether the emulator gives the very bits that independent implementations give: ml_dtypes, torch and gfloat.

`run` compares `accel` with all three and returns one row for each reference and format:

    ml_dtypes  its float8, float6 and float4 types, over float32 bit patterns: a sample, or in full all 2^32
    torch      its float8 types, bfloat16 and float16, over the same patterns, under the overflow rule that torch has
    gfloat     every format of up to 8 bits that gfloat can express, and some of 16: all rounding modes, both overflow
               policies, float32 and float64, stochastic rounding with given random bits

An emulator is three functions, so that a known wrong one can be handed in: the comparison must then fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module, metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import accel
from accel.formats import POLICIES, Format
from fpsim.errors import FpsimError

Array = npt.NDArray[Any]
Ranges = tuple[tuple[int, int], ...]

CHUNK = 1 << 15  # patterns compared at once: they stay in the processor's cache, and on one thread
PIECE = 1 << 25  # patterns in a piece of work
SAMPLE_STRIDE = 64  # the quick form takes every 64th pattern

ALL: Ranges = ((0, 1 << 32),)
FINITE: Ranges = ((0, 0x7F800000), (0x80000000, 0xFF800000))
POSITIVE: Ranges = ((1, 0x7F800000),)

# Format: (type, the patterns that are compared, overflow policy). ml_dtypes makes a NaN in FP6 and FP4 to -0, and OCP
# does not say what e8m0 makes of zero and negative numbers: those are left out.
ML_DTYPES = {
    "e4m3fn": ("float8_e4m3fn", ALL, "ieee"),
    "e5m2": ("float8_e5m2", ALL, "ieee"),
    "e4m3": ("float8_e4m3", ALL, "ieee"),
    "e3m4": ("float8_e3m4", ALL, "ieee"),
    "e4m3fnuz": ("float8_e4m3fnuz", ALL, "ieee"),
    "e5m2fnuz": ("float8_e5m2fnuz", ALL, "ieee"),
    "e4m3b11fnuz": ("float8_e4m3b11fnuz", ALL, "ieee"),
    "e8m0fnu": ("float8_e8m0fnu", POSITIVE, "ieee"),
    "e3m2": ("float6_e3m2fn", FINITE, "saturate"),
    "e2m3": ("float6_e2m3fn", FINITE, "saturate"),
    "e2m1": ("float4_e2m1fn", FINITE, "saturate"),
}
TORCH = {
    "e4m3fn": ("float8_e4m3fn", ALL),
    "e5m2": ("float8_e5m2", ALL),
    "e4m3fnuz": ("float8_e4m3fnuz", ALL),
    "e5m2fnuz": ("float8_e5m2fnuz", ALL),
    "e8m0fnu": ("float8_e8m0fnu", POSITIVE),
    "bf16": ("bfloat16", ALL),
    "fp16": ("float16", ALL),
}

SPECIALS = {
    np.dtype(np.float32): (0x0, 0x1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF),
    np.dtype(np.float64): (0x0, 0x1, 0x10 << 48, (0x7FF0 << 48) - 1, 0x7FF0 << 48, (0x7FF0 << 48) + 1, 0x7FF8 << 48),
}


@dataclass(frozen=True)
class Emulator:
    """What is compared: functions with the arguments of `accel.quantize`, `accel.encode` and `accel.decode`."""

    quantize: Callable[..., Array] = accel.quantize
    encode: Callable[..., Array] = accel.encode
    decode: Callable[..., Array] = accel.decode


ACCEL = Emulator()


@dataclass(frozen=True)
class Mismatch:
    """One input whose result differs, as bit patterns in hexadecimal (codes for `encode`, a code in for `decode`)."""

    format: str
    operation: str
    input: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class Outcome:
    """How many pairs of an input and a mode (and of a code and its value) were compared and differed, and the first."""

    pairs: int = 0
    mismatches: int = 0
    first: Mismatch | None = None

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(self.pairs + other.pairs, self.mismatches + other.mismatches, self.first or other.first)


@dataclass(frozen=True)
class Row:
    """The outcome for one reference and format, and the processor seconds that it took."""

    reference: str
    format: str
    modes: str
    pairs: int
    mismatches: int
    first: Mismatch | None
    seconds: float


@dataclass(frozen=True)
class Piece:
    """A part of a row's work."""

    row: tuple[str, str, str]  # reference, format, modes
    compare: Callable[[], Outcome]


def run(
    full: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    workers: int = 2,
    emulator: Emulator = ACCEL,
) -> list[Row]:
    """Compare with every reference, on `workers` threads: a row for each reference and format.

    The emulator conforms where no row has mismatches. full: all 2^32 patterns instead of a sample, some minutes.
    progress: called with (pieces done, pieces in all, the row of the last). Raises FpsimError where ml_dtypes or gfloat
    is not installed.
    """
    pieces = all_pieces(full, emulator)
    outcomes = {piece.row: (Outcome(), 0.0) for piece in pieces}
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(_timed, piece.compare): piece for piece in pieces}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                row = waiting[future].row
                (outcome, seconds), (added, more) = outcomes[row], future.result()
                outcomes[row] = outcome + added, seconds + more
                if progress is not None:
                    progress(done, len(pieces), f"{row[0]} {row[1]}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [
        Row(*row, outcome.pairs, outcome.mismatches, outcome.first, seconds)
        for row, (outcome, seconds) in outcomes.items()
    ]


def all_pieces(full: bool = False, emulator: Emulator = ACCEL) -> list[Piece]:
    """The work of `run`."""
    stride = 1 if full else SAMPLE_STRIDE
    pieces = []
    for reference in [ml_dtypes_reference(name) for name in ML_DTYPES] + torch_references():
        row = (reference.source, reference.format.name, f"nearest_even, {reference.overflow}")
        pieces.append(Piece(row, partial(compare_landmarks, reference, emulator)))
        for low, high in reference.ranges:
            for start in range(low, high, PIECE * stride):
                stop = min(start + PIECE * stride, high)
                pieces.append(Piece(row, partial(compare_patterns, reference, start, stop, stride, emulator)))
    for family, formats in gfloat_families().items():
        row = (f"gfloat {metadata.version('gfloat')}", family, "every rounding and overflow, float32 and float64")
        pieces += [Piece(row, partial(compare_with_gfloat, fmt, emulator)) for fmt in formats]
    return pieces


def needed(module: str) -> Any:
    """An optional package; FpsimError that says how to get it."""
    try:
        return import_module(module)
    except ImportError:
        raise FpsimError(f"{module} is not installed, which this compares with: pip install 'fpsim[test]'") from None


def _timed(compare: Callable[[], Outcome]) -> tuple[Outcome, float]:
    start = time.thread_time()
    with np.errstate(all="ignore"):
        return compare(), time.thread_time() - start


# --- comparing ------------------------------------------------------------------------------------------------------


def differing(ours: Array, theirs: Array) -> npt.NDArray[np.bool_]:
    """Where floats differ in their bits, all NaNs being one."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return np.ones(theirs.shape, bool)
    unequal = _bits(ours) != _bits(theirs)
    return unequal & ~(np.isnan(ours) & np.isnan(theirs)) if unequal.any() else unequal


def outcome_of(fmt: Format, operation: str, inputs: Array, ours: Array, theirs: Array, wrong: Array) -> Outcome:
    """The outcome of comparing `ours` with `theirs`, whose entries differ where `wrong`."""
    mismatches = int(np.count_nonzero(wrong))
    if not mismatches:
        return Outcome(inputs.size)
    first = int(np.argmax(wrong))
    shown = [f"0x{int(_bits(array)[first]):0{2 * array.itemsize}x}" for array in (inputs, ours, theirs)]
    return Outcome(inputs.size, mismatches, Mismatch(fmt.name, operation, *shown))


def _bits(array: Array) -> Array:
    return array.view(f"u{array.itemsize}")


def landmarks(values: Array, dtype: npt.DTypeLike) -> Array:
    """Positive numbers of a format, midpoints, overflow, each with its neighbours at 1 and 2 ulp; specials; both signs.

    values: ascending numbers of the format, zero among them, as float64. The result is in `dtype`, float32 or float64.
    """
    kind = np.dtype(dtype)
    word = np.dtype(f"u{kind.itemsize}")
    sign = np.left_shift(np.ones(1, word), 8 * kind.itemsize - 1)
    values = np.append(values, [2 * values[-1] - values[-2], 3 * values[-1], 4 * values[-1]])
    points = _bits(np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(kind))
    near = (points[:, None] + np.array([-2, -1, 0, 1, 2]).astype(word)).reshape(-1)
    magnitudes = np.concatenate([near[near < sign], np.array(SPECIALS[kind], word)])
    return np.concatenate([magnitudes, magnitudes | sign]).view(kind)


def numbers_of(table: Array) -> Array:
    """The numbers from zero on (or from the smallest) of a table of all codes, ascending, as float64."""
    numbers = table[np.isfinite(table) & ~np.signbit(table)].astype(np.float64)
    return np.unique(np.append(numbers, 0.0))


# --- ml_dtypes and torch: types that cast float32 -------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A type of another library that is one of our formats.

    cast: from float32 to codes. table: the float32 value of every code. ranges: the float32 patterns that are compared.
    """

    source: str
    format: Format
    cast: Callable[[Array], Array]
    table: Array
    ranges: Ranges
    overflow: str


def ml_dtypes_reference(name: str) -> Reference:
    ml_dtypes = needed("ml_dtypes")
    type_name, ranges, overflow = ML_DTYPES[name]
    fmt, dtype = _scalar(name), getattr(ml_dtypes, type_name)
    table = np.arange(1 << fmt.bits, dtype=np.uint8).view(dtype).astype(np.float32)
    return Reference(
        f"ml_dtypes {ml_dtypes.__version__}", fmt, lambda x: x.astype(dtype).view(np.uint8), table, ranges, overflow
    )


def torch_references() -> list[Reference]:
    return [torch_reference(name) for name, (type_name, _) in TORCH.items() if hasattr(torch, type_name)]


def torch_reference(name: str) -> Reference:
    """torch's float8 casts saturate or not, depending on the type and on torch's version: it is asked here."""
    type_name, ranges = TORCH[name]
    fmt, dtype = _scalar(name), getattr(torch, type_name)
    word = torch.uint8 if fmt.bits == 8 else torch.uint16
    codes = torch.from_numpy(np.arange(1 << fmt.bits, dtype=f"u{fmt.bits // 8}"))
    is_saturating = bool(torch.tensor(3e38).to(dtype).float().isfinite())
    return Reference(
        f"torch {torch.__version__.partition('+')[0]}",
        fmt,
        lambda x: torch.from_numpy(x).to(dtype).view(word).numpy(),
        codes.view(dtype).float().numpy(),
        ranges,
        "saturate" if is_saturating and not fmt.max > 3e38 else "ieee",
    )


def _scalar(name: str) -> Format:
    fmt = accel.format(name)
    assert isinstance(fmt, Format)
    return fmt


def compare_patterns(
    reference: Reference, start: int, stop: int, stride: int = 1, emulator: Emulator = ACCEL
) -> Outcome:
    """quantize and encode on every `stride`-th float32 pattern from `start` to `stop`, with low bits that vary."""
    count = -(-(stop - start) // stride)
    steps = np.arange(min(CHUNK, count), dtype=np.uint32)
    offsets = steps * np.uint32(stride) + steps * np.uint32(37) % np.uint32(stride)
    outcome = Outcome()
    for done in range(0, count, steps.size):
        x = offsets + np.uint32(start + done * stride)
        if stride > 1 or count - done < steps.size:
            x = x[: count - done]
            x = x[x < stop]
        outcome += _compare_inputs(reference, x.view(np.float32), emulator)
    return outcome


def compare_landmarks(reference: Reference, emulator: Emulator = ACCEL) -> Outcome:
    """quantize and encode on the landmarks of a format, and decode on all its codes."""
    patterns = _bits(landmarks(numbers_of(reference.table), np.float32))
    within = np.logical_or.reduce([(patterns >= low) & (patterns < high) for low, high in reference.ranges])
    outcome = _compare_inputs(reference, patterns[within].view(np.float32), emulator)
    return outcome + _compare_codes(reference.format, reference.table, emulator)


def _compare_inputs(reference: Reference, x: Array, emulator: Emulator) -> Outcome:
    fmt, overflow = reference.format, reference.overflow
    codes = reference.cast(x)
    values = reference.table[codes]
    quantized = emulator.quantize(x, fmt, overflow=overflow)
    encoded = emulator.encode(x, fmt, overflow=overflow)
    wrong_value, wrong_code = differing(quantized, values), encoded != codes
    if wrong_code.any():
        wrong_code &= ~(np.isnan(reference.table[encoded]) & np.isnan(values))
    if wrong_code.any() and not wrong_value.any():
        return outcome_of(fmt, f"encode nearest_even {overflow}", x, encoded, codes, wrong_code)
    return outcome_of(fmt, f"quantize nearest_even {overflow}", x, quantized, values, wrong_value | wrong_code)


def _compare_codes(fmt: Format, table: Array, emulator: Emulator) -> Outcome:
    codes = np.arange(1 << fmt.bits, dtype=np.uint8 if fmt.bits <= 8 else np.uint16)
    decoded = emulator.decode(codes, fmt)
    return outcome_of(fmt, "decode", codes, decoded, table, differing(decoded, table))


# --- gfloat: any format, any mode -----------------------------------------------------------------------------------

MODES = {
    "nearest_even": "TiesToEven",
    "nearest_away": "TiesToAway",
    "toward_zero": "TowardZero",
    "up": "TowardPositive",
    "down": "TowardNegative",
    "stochastic": "StochasticFastest",
}
MIRRORED = {"up": "down", "down": "up"}
RANDOM_BITS = (1, 7, 32)
WIDE = ("fp16", "bf16", "int16")  # formats of 16 bits that are compared as well
LANDMARK_VALUES = 512  # of a wide format
RANDOM_INPUTS = 256
SEED = 1


@dataclass(frozen=True)
class Rounding:
    mode: str
    overflow: str
    random_bits: int = 32

    def __str__(self) -> str:
        return f"{self.mode}{f' with {self.random_bits} bits' if self.mode == 'stochastic' else ''} {self.overflow}"


ROUNDINGS = [
    Rounding(mode, overflow, random_bits)
    for mode in MODES
    for overflow in ("saturate", "ieee")
    for random_bits in (RANDOM_BITS if mode == "stochastic" else (32,))
]


def gfloat_families() -> dict[str, list[Format]]:
    """The formats of up to 8 bits that gfloat can express, with the usual bias and 3 less and more, by policy."""
    families: dict[str, list[Format]] = {"presets of 16 bits": [_scalar(name) for name in WIDE]}
    for policy in POLICIES:
        for signed in (True, False):
            formats = list(_small_formats(policy, signed))
            if formats:
                families[f"{len(formats)} {policy}{'' if signed else ', unsigned'}"] = formats
    return families


def _small_formats(policy: str, signed: bool) -> Iterator[Format]:
    for bits in range(1, 9 - signed):
        for e in range(bits + 1):
            half, m = 1 << max(e - 1, 0), bits - e
            usual = 1 - m if policy == "integer" else 1 if e == 0 else half - (policy not in ("fnuz", "p3109"))
            for bias in (usual - 3, usual, usual + 3):
                for subnormals in (True, False):
                    name = f"e{e}m{m} {policy} bias {bias}{'' if subnormals else ' without subnormals'}"
                    try:
                        yield Format(name, e, m, bias, policy, subnormals, signed)
                    except ValueError:  # float32 does not carry it, or the policy does not go with these widths
                        continue


@cache
def described_to_gfloat(fmt: Format) -> tuple[Any, Array]:
    """(gfloat's description of a format, the values of its codes according to gfloat).

    gfloat's own formula of the largest number does not hold for one exponent bit; here its table says it.
    """
    gfloat = needed("gfloat")
    policy = POLICIES[fmt.policy]
    high_nans = {"top": (1 << fmt.mantissa_bits) - 1, "last": 1}.get(policy.nan, 0)
    has_field_zero = fmt.policy != "scale" and (fmt.subnormals or fmt.mantissa_bits == 0)
    description = {
        "name": fmt.name,
        "k": fmt.bits,
        "precision": fmt.mantissa_bits + 1,
        "bias": fmt.bias,
        "is_signed": fmt.signed,
        "domain": gfloat.Domain.Extended if policy.infinity else gfloat.Domain.Finite,
        "has_nz": fmt.signed and policy.nan != "negative_zero" and fmt.policy != "integer",
        "num_high_nans": high_nans,
        "has_subnormals": has_field_zero,
        "is_twos_complement": fmt.policy == "integer" and fmt.signed,
    }
    plain = gfloat.FormatInfo(**description)
    if fmt.bits <= 8:  # gfloat's two ways to decode: of every code, and of an array (which misses a NaN where E = 0)
        table = np.array([gfloat.decode_float(plain, code).fval for code in range(1 << fmt.bits)])
    else:
        table = gfloat.decode_ndarray(plain, np.arange(1 << fmt.bits))
    finite = table[np.isfinite(table)]
    limited = type("LimitedFormat", (gfloat.FormatInfo,), {"max": finite.max(), "min": finite.min()})
    if not fmt.subnormals:  # with us the exponent field 0 is zero then, with gfloat another binade
        field_is_zero = np.arange(table.size) & ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits == 0
        is_negative = np.arange(table.size) & fmt.sign_code != 0
        zeros = np.where(is_negative & description["has_nz"], -0.0, 0.0)
        table = np.where(field_is_zero & ~np.isnan(table), zeros, table)
    return limited(**description), table.astype(np.float32)


def compare_with_gfloat(fmt: Format, emulator: Emulator = ACCEL) -> Outcome:
    """The code table, then quantize and encode in every mode, on float32 and float64: landmarks and random inputs."""
    _, table = described_to_gfloat(fmt)
    random = np.random.default_rng(SEED)
    numbers = numbers_of(table)
    if numbers.size > LANDMARK_VALUES:
        chosen = random.choice(numbers.size, LANDMARK_VALUES, replace=False)
        numbers = np.unique(np.concatenate([numbers[chosen], numbers[:4], numbers[-4:]]))
    outcome = _compare_codes(fmt, table, emulator)
    for dtype in (np.float32, np.float64):
        exponents = random.uniform(np.log2(fmt.min_subnormal) - 40, np.log2(fmt.max) + 4, RANDOM_INPUTS)
        samples = np.exp2(np.clip(exponents, -149, 127)) * random.choice([-1, 1], RANDOM_INPUTS)
        x = np.concatenate([landmarks(numbers, dtype), samples.astype(dtype)])
        words = random_words(x.size, SEED)
        for rounding in ROUNDINGS:
            outcome += _compare_rounding(fmt, x, rounding, words, emulator)
    return outcome


def _compare_rounding(fmt: Format, x: Array, rounding: Rounding, words: Array, emulator: Emulator) -> Outcome:
    _, table = described_to_gfloat(fmt)
    expected = expected_by_gfloat(fmt, x.astype(np.float64), rounding, words).astype(x.dtype)
    options = {"rounding": rounding.mode, "overflow": rounding.overflow, "random_bits": rounding.random_bits}
    quantized = emulator.quantize(x, fmt, seed=SEED, **options)
    wrong = differing(quantized, expected)
    if wrong.any():
        return outcome_of(fmt, f"quantize {rounding}", x, quantized, expected, wrong)
    encodable = np.where(np.isnan(x) & ~fmt.has_nan, x.dtype.type(0), x)
    encoded = emulator.encode(encodable, fmt, seed=SEED, **options)
    meant = table[encoded].astype(x.dtype)
    wrong = differing(meant, expected) & (fmt.has_nan | ~np.isnan(x))
    return outcome_of(fmt, f"encode {rounding} (as values)", x, meant, expected, wrong)


def expected_by_gfloat(fmt: Format, x: Array, rounding: Rounding, words: Array) -> Array:
    """x, float64, rounded by gfloat, and by our rules where gfloat has none: NaN, negative numbers of unsigned formats.

    NaN stays NaN. A negative number that an unsigned format does not round to zero becomes 0 under `saturate`, else NaN
    where the format has one, but 0 where the mode rounds it up. A scale format makes NaN of zero and negatives.
    """
    info, _ = described_to_gfloat(fmt)
    expected = np.full(x.shape, np.nan)
    positive = ~np.isnan(x) & ~np.signbit(x) & ((x > 0) | (fmt.policy != "scale"))
    negative = ~np.isnan(x) & np.signbit(x) & (fmt.policy != "scale")
    if fmt.signed:
        known = positive | negative
        expected[known] = _rounded_by_gfloat(fmt, x[known], rounding, words[known])
        return expected
    expected[positive] = _rounded_by_gfloat(fmt, x[positive], rounding, words[positive])
    mirrored = Rounding(MIRRORED.get(rounding.mode, rounding.mode), "saturate", rounding.random_bits)
    is_lost = _rounded_by_gfloat(fmt, -x[negative], mirrored, words[negative]) != 0
    goes_to_zero = np.isfinite(x[negative]) & (rounding.mode in ("toward_zero", "up"))
    becomes_nan = is_lost & ~goes_to_zero & (rounding.overflow == "ieee") & (info.num_nans > 0)
    expected[negative] = np.where(becomes_nan, np.nan, 0.0)
    return expected


def _rounded_by_gfloat(fmt: Format, x: Array, rounding: Rounding, words: Array) -> Array:
    """x, without NaN, rounded by gfloat, made to differ where our rules do:

    a format without infinity and NaN saturates; a tie between powers of two (M = 0) goes to the larger, except in
    p3109; without subnormals, numbers below the smallest normal one round to it or to zero; a scale format has a
    smallest number, and to nearest only that number itself and what lies below become it; random bits are added to the
    first 32 bits of the fraction. gfloat scales x in float64, so what is far below every format comes as 2^-1000.
    """
    gfloat = needed("gfloat")
    info, _ = described_to_gfloat(fmt)
    saturates = rounding.overflow == "saturate" or not (info.num_infs or info.num_nans)
    smallest = fmt.min_normal
    is_small = np.abs(x) < smallest
    x = np.where((x != 0) & (np.abs(x) < 2.0**-1000), np.copysign(2.0**-1000, x), x)
    drawn = None
    if rounding.mode == "stochastic":
        x = _first_32_bits(fmt, x)
        drawn = (words >> np.uint32(32 - rounding.random_bits)).astype(np.int64)

    def by_gfloat(info: Any, x: Array, mode: str) -> Array:
        round_mode = gfloat.RoundMode[MODES[mode]]
        return gfloat.round_ndarray(info, x, round_mode, saturates, drawn, rounding.random_bits)

    if fmt.policy == "scale":
        if rounding.mode == "nearest_even":
            x = np.where((x > smallest) & (x < 2 * smallest), 2 * smallest, x)
        mode = "nearest_away" if rounding.mode == "nearest_even" else rounding.mode
        return np.where(x <= smallest, smallest, by_gfloat(info, np.maximum(x, smallest), mode))
    result = by_gfloat(info, x, rounding.mode)
    if fmt.mantissa_bits == 0 and rounding.mode == "nearest_even" and fmt.policy != "p3109":
        result = np.where(is_small, result, by_gfloat(info, x, "nearest_away"))
    if not fmt.subnormals:
        powers = Format("zero and the smallest", 1, 0, fmt.bias, "finite", signed=fmt.signed)
        coarse = by_gfloat(described_to_gfloat(powers)[0], np.where(is_small, x, 0.0), rounding.mode)
        result = np.where(is_small, coarse if info.has_nz else coarse + 0.0, result)
    return result


def _first_32_bits(fmt: Format, x: Array) -> Array:
    """x cut to 32 bits behind the bits that the format keeps."""
    exponents = np.frexp(x)[1] - 1
    is_small = np.abs(x) < fmt.min_normal
    if fmt.policy != "scale":
        exponents = np.where(is_small, fmt.min_exponent + (0 if fmt.subnormals else fmt.mantissa_bits), exponents)
    last = exponents - fmt.mantissa_bits - 32
    return np.where(np.isfinite(x), np.ldexp(np.trunc(np.ldexp(x, -last)), last), x)


def random_words(count: int, seed: int = 0, stream: int = 0, step: int = 0, offset: int = 0) -> Array:
    """The random words of the elements offset .. offset + count, by the definition in accel/random.py, in NumPy."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    index = np.arange(offset, offset + count, dtype=np.uint64)
    group, lane = (index // 64) * 16 + index % 16, (index // 16) % 4
    c0, c1 = group & low, group >> shift
    c2, c3 = np.full_like(index, stream), np.full_like(index, step)
    k0, k1 = np.uint64(seed) & low, np.uint64(seed) >> shift
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (right >> shift) ^ c1 ^ k0, right & low, (left >> shift) ^ c3 ^ k1, left & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.choose(lane.astype(np.int64), [c0, c1, c2, c3]).astype(np.uint32)
