"""What a multiply-accumulate unit computes: `Mac`, and how a name or a mapping becomes one.

An output element is a sum of K products. In the order of K:

    sequential       acc = R(acc + a_k b_k), one after another, from 0
    terms > 1        a fused dot product: `terms` products and acc together. Each is cut (toward zero) to a multiple of
                     2^(e - fraction_bits), e the largest exponent among them, then all are added exactly, and the sum
                     is rounded once. The exponent of a product is the sum of its operands' exponents,
                     those of float32: a subnormal operand has the exponent of its first bit. Zeros have none; an
                     infinite operand's product has its own, if its format makes it finite.
    chunk            after every `chunk` products the accumulator is added to an outer one, which has a format and
                     begins at 0, and starts again from 0 (Wang et al. 2018); the result is the outer one

R rounds the exact sum into the accumulator's format. A product is exact unless it has a format of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from accel.formats import Format, nearest
from accel.presets import format, to_mapping
from accel.rounding import OVERFLOWS

ROUNDINGS = ("nearest_even", "toward_zero", "stochastic")
INT32 = "int32"
MAX_TERMS = 64
MAX_FRACTION_BITS = 40  # so that 64 aligned addends and their sum are exact in float64
MAX_STOCHASTIC_BITS = 50  # of an accumulator and its draws together, which float64 keeps


@dataclass(frozen=True)
class Mac:
    """A multiply-accumulate unit (see above).

    accumulator: a scalar format with an exponent and a sign, or "int32" for integer operands: an exact sum. a, b: the
    operands' formats, into which they are rounded to nearest even, saturating; None takes them as they are. product:
    its format, rounded to nearest even, with `overflow`; None: exact. rounding, overflow: of every sum (see
    `accel.quantize`). random_bits: that a stochastic sum draws. outer: the outer accumulator's format, None for the
    accumulator's.
    Raises ValueError, naming the key, for what cannot be.
    """

    name: str
    accumulator: Format | str
    rounding: str = "nearest_even"
    overflow: str = "ieee"
    random_bits: int = 16
    a: Format | None = None
    b: Format | None = None
    product: Format | None = None
    terms: int = 1
    fraction_bits: int | None = None
    chunk: int | None = None
    outer: Format | None = None

    def __post_init__(self) -> None:
        for key, allowed in (("rounding", ROUNDINGS), ("overflow", OVERFLOWS)):
            value = getattr(self, key)
            if value not in allowed:
                raise self._wrong(f"unknown {key} {value!r}{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
        for key, low, high in (("terms", 1, MAX_TERMS), ("fraction_bits", 1, MAX_FRACTION_BITS), ("chunk", 1, None)):
            value = getattr(self, key)
            if value is None and key != "terms":
                continue
            if type(value) is not int or value < low or (high is not None and value > high):
                limit = f"from {low} to {high}" if high is not None else f"of {low} or more"
                raise self._wrong(f"{key} must be an integer {limit} (got {value!r})")
        if type(self.random_bits) is not int or not 1 <= self.random_bits <= 32:
            raise self._wrong(f"random_bits must be an integer from 1 to 32 (got {self.random_bits!r})")
        if (self.terms > 1) != (self.fraction_bits is not None):
            raise self._wrong(f"terms above 1 and fraction_bits go together (got {self.terms}, {self.fraction_bits})")
        if self.chunk is not None and self.chunk % self.terms:
            raise self._wrong(f"chunk must be a multiple of terms (got {self.chunk} and {self.terms})")
        if self.outer is not None and self.chunk is None:
            raise self._wrong("outer needs a chunk")
        if self.is_integer:
            self._check_integer()
        else:
            self._check_floats()

    def _check_integer(self) -> None:
        others = {"rounding": "nearest_even", "overflow": "ieee", "product": None, "terms": 1, "chunk": None}
        for key, default in others.items():
            if getattr(self, key) != default:
                raise self._wrong(f"{key} is for floating-point accumulators; a sum in int32 is exact")
        for key in ("a", "b"):
            fmt = getattr(self, key)
            if fmt is None or fmt.policy != "integer" or fmt.mantissa_bits > 8 or fmt.min_subnormal != 1:
                raise self._wrong(f"{key} must be an integer format of 8 bits or fewer (got {_shown(fmt)})")

    def _check_floats(self) -> None:
        for key in ("accumulator", "outer", "product"):
            fmt = getattr(self, key)
            if fmt is None and key != "accumulator":
                continue
            if not isinstance(fmt, Format):
                raise self._wrong(f"{key} must be a scalar format, or an accumulator 'int32' (got {fmt!r})")
            if not fmt.has_negative_zero or fmt.alpha_codes or not fmt.exponent_bits:
                raise self._wrong(
                    f"{key} must be a signed floating-point format with -0 and without alpha_codes (got {fmt.name!r})"
                )
        for key in ("a", "b"):
            fmt = getattr(self, key)
            if fmt is not None and (not isinstance(fmt, Format) or fmt.alpha_codes or fmt.policy == "scale"):
                raise self._wrong(f"{key} must be a scalar format of numbers without alpha_codes (got {_shown(fmt)})")
        bits = max(fmt.mantissa_bits + 1 for fmt in (self.accumulator, self.outer) if isinstance(fmt, Format))
        if self.rounding == "stochastic" and bits + self.random_bits > MAX_STOCHASTIC_BITS:
            raise self._wrong(
                f"random_bits may be {MAX_STOCHASTIC_BITS - bits} for an accumulator of {bits} significant bits: more "
                f"cannot be exact (got {self.random_bits})"
            )

    @property
    def is_integer(self) -> bool:
        """Whether sums are in int32."""
        return self.accumulator == INT32

    def _wrong(self, reason: str) -> ValueError:
        return ValueError(f"mac {self.name!r}: {reason}")


def _shown(fmt: object) -> str:
    return repr(getattr(fmt, "name", fmt))


_DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {"accumulator": "fp32"},
    "bf16-acc": {"accumulator": "bf16"},
    "fp16-acc": {"accumulator": "fp16"},
    "fp22": {"accumulator": "e8m13"},
    "hopper-fp8": {"accumulator": "e8m13", "rounding": "toward_zero", "terms": 32, "fraction_bits": 13},
    "int8": {"accumulator": INT32, "a": "int8", "b": "int8"},
}
SOURCES = {
    "fp32": "sums in float32, one after another",
    "bf16-acc": "sums in bfloat16, one after another",
    "fp16-acc": "sums in float16, one after another",
    "fp22": "sums in 22 bits (8 of exponent, 13 of mantissa), one after another",
    "hopper-fp8": "32 aligned products of which 14 bits are kept, summed into 22 bits: DeepSeek-V3 technical report "
    "(2024), section 3.5.2, on FP8 tensor cores of the H800",
    "int8": "exact sums in 32-bit integers",
}
KEYS = tuple(field.name for field in fields(Mac))
_FORMAT_KEYS = ("accumulator", "a", "b", "product", "outer")


def mac(spec: str | Mapping[str, object] | Mac) -> Mac:
    """The unit of a name (`macs()`), or of a mapping of Mac's fields; `base` takes what it does not say from another,
    None being said.

    Formats may be names, texts or mappings (see `accel.format`). Raises ValueError that says what is wrong and what is
    allowed.
    """
    if isinstance(spec, Mac):
        return spec
    if isinstance(spec, str):
        return _named(spec)
    if not isinstance(spec, Mapping):
        raise ValueError(f"a mac is a name, a mapping or a Mac (got {type(spec).__name__})")
    options = dict(spec)
    name = options.pop("name", None)
    base: Any = options.pop("base", None)
    if base is not None:
        known = mac(base)
        options = {**{key: getattr(known, key) for key in KEYS if key != "name"}, **options}
    options = {key: value for key, value in options.items() if value is not None}
    unknown = [key for key in options if key not in KEYS]
    if unknown:
        raise ValueError(f"mac: unknown key {unknown[0]!r}{nearest(str(unknown[0]), KEYS)}; allowed: {', '.join(KEYS)}")
    if "accumulator" not in options:
        raise ValueError("mac: accumulator is missing; this key is required")
    for key in _FORMAT_KEYS:
        if options.get(key) is not None and not (key == "accumulator" and options[key] == INT32):
            options[key] = _format_of(key, options[key])
    given: dict[str, Any] = options
    return Mac(str(name) if name is not None else _name_of(given), **given)


def macs() -> list[Mac]:
    """The preset units."""
    return [_named(name) for name in _DESCRIPTIONS]


@cache
def _named(text: str) -> Mac:
    if text not in _DESCRIPTIONS:
        raise ValueError(f"unknown mac {text!r}{nearest(text, _DESCRIPTIONS)}; allowed: {', '.join(_DESCRIPTIONS)}")
    return mac({"name": text, **_DESCRIPTIONS[text]})


def _format_of(key: str, spec: object) -> Format:
    try:
        fmt = format(spec)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"mac: {key}: {error}") from None
    if not isinstance(fmt, Format):
        raise ValueError(f"mac: {key} must be a scalar format (got the block format {fmt.name!r})")
    return fmt


def _name_of(options: Mapping[str, Any]) -> str:
    accumulator = options["accumulator"]
    parts = [f"{accumulator if isinstance(accumulator, str) else accumulator.name} accumulator"]
    parts += [f"{key} {options[key]}" for key in ("terms", "chunk") if options.get(key) not in (None, 1)]
    return ", ".join(parts)


def to_description(unit: Mac) -> dict[str, object]:
    """The mapping that `mac` turns into `unit` again, plain data."""
    found = {key: getattr(unit, key) for key in KEYS if getattr(unit, key) is not None}
    return {key: to_mapping(value) if isinstance(value, Format) else value for key, value in found.items()}


AnyMac = str | Mapping[str, object] | Mac
