"""What a number is: scalar floating-point formats `s | e (E bits) | m (M bits)` whose values float32 can carry.

The value of a code is ``(-1)^s * 2^(max(e, 1) - bias) * ([e > 0] + m / 2^M)``; the policy says which codes are special.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt

FLOAT32_MAX_EXPONENT = 127
FLOAT32_MIN_NORMAL_EXPONENT = -126


@dataclass(frozen=True)
class Policy:
    """Which codes of a format are special. `reserved_top_codes(E, M)` magnitudes at the top are not finite numbers."""

    infinity: bool
    nan: str  # "top" (everything above the infinity), "last" (the last magnitude), "negative_zero" or "none"

    @property
    def negative_zero(self) -> bool:
        return self.nan != "negative_zero"

    def reserved_top_codes(self, mantissa_bits: int) -> int:
        return {"top": 1 << mantissa_bits, "last": 1, "negative_zero": 0, "none": 0}[self.nan]


POLICIES = {
    "ieee": Policy(infinity=True, nan="top"),
    "fn": Policy(infinity=False, nan="last"),
    "fnuz": Policy(infinity=False, nan="negative_zero"),
    "finite": Policy(infinity=False, nan="none"),
}


@dataclass(frozen=True)
class Format:
    """A scalar floating-point format with a sign, `exponent_bits` and `mantissa_bits`.

    `policy` names the special codes (`ieee`, `fn`, `fnuz`, `finite`). Without `subnormals` the exponent field 0 means
    zero. Raises ValueError, naming the format and the reason, for a format that float32 cannot carry.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    policy: str
    subnormals: bool = True

    def __post_init__(self) -> None:
        _check_widths(self.name, self.exponent_bits, self.mantissa_bits)
        if type(self.bias) is not int:
            raise ValueError(f"format {self.name!r}: bias must be an integer (got {self.bias!r})")
        if type(self.subnormals) is not bool:
            raise ValueError(f"format {self.name!r}: subnormals must be true or false (got {self.subnormals!r})")
        if not isinstance(self.policy, str) or self.policy not in POLICIES:
            raise ValueError(
                f"format {self.name!r}: unknown policy {self.policy!r}{nearest(self.policy, POLICIES)}; "
                f"allowed: {', '.join(POLICIES)}"
            )
        if self.exponent_bits + self.mantissa_bits == 0:
            raise ValueError(f"format {self.name!r}: exponent_bits + mantissa_bits must be at least 1 (got 0)")
        if self.policy == "ieee" and (self.exponent_bits == 0 or self.mantissa_bits == 0):
            raise ValueError(
                f"format {self.name!r}: policy 'ieee' needs exponent_bits >= 1 and mantissa_bits >= 1 for its infinity "
                f"and NaN codes (got E={self.exponent_bits}, M={self.mantissa_bits}); 'fn', 'fnuz' or 'finite' do not"
            )
        if self.exponent_bits == 0 and not self.subnormals:
            raise ValueError(
                f"format {self.name!r}: exponent_bits = 0 has only subnormals; subnormals: false leaves zero"
            )
        if self.max_code < 1 or (not self.subnormals and self.max_code < 1 << self.mantissa_bits):
            raise ValueError(f"format {self.name!r}: policy {self.policy!r} leaves no finite number besides zero")
        if self.min_exponent < FLOAT32_MIN_NORMAL_EXPONENT:
            raise ValueError(
                f"format {self.name!r} is not carried by float32: its normal numbers begin at 2^{self.min_exponent}, "
                f"float32's at 2^{FLOAT32_MIN_NORMAL_EXPONENT} (bias must be at most "
                f"{1 - FLOAT32_MIN_NORMAL_EXPONENT}, got {self.bias})"
            )
        exponent, significand = self._scaled(self.max_code)
        top = exponent + significand.bit_length() - 1
        if top > FLOAT32_MAX_EXPONENT:
            raise ValueError(
                f"format {self.name!r} is not carried by float32: its values reach up to 2^{top}, float32 ends below "
                f"2^{FLOAT32_MAX_EXPONENT + 1} (E={self.exponent_bits}, M={self.mantissa_bits}, bias={self.bias}, "
                f"policy={self.policy})"
            )

    def _scaled(self, code: int) -> tuple[int, int]:
        """(exponent, significand) of a magnitude code: its value is significand * 2^exponent."""
        e, m = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        hidden = (1 << self.mantissa_bits) if e else 0
        return max(e, 1) - self.bias - self.mantissa_bits, hidden | (m if e or self.subnormals else 0)

    def _value(self, code: int) -> float:
        exponent, significand = self._scaled(code)
        return float(np.ldexp(float(significand), exponent))

    @property
    def bits(self) -> int:
        """Width of a code in bits, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def has_infinity(self) -> bool:
        return POLICIES[self.policy].infinity

    @property
    def has_nan(self) -> bool:
        return POLICIES[self.policy].nan != "none"

    @property
    def has_negative_zero(self) -> bool:
        return POLICIES[self.policy].negative_zero

    @cached_property
    def max_code(self) -> int:
        """Magnitude code of the largest finite number."""
        codes = 1 << (self.exponent_bits + self.mantissa_bits)
        return codes - POLICIES[self.policy].reserved_top_codes(self.mantissa_bits) - 1

    @property
    def infinity_code(self) -> int | None:
        """Magnitude code of infinity, None where the format has none."""
        return self.max_code + 1 if self.has_infinity else None

    @property
    def nan_code(self) -> int | None:
        """The canonical NaN code (all of it, sign included), None where the format has none."""
        return {
            "top": self.max_code + 1 + (1 << self.mantissa_bits >> 1),
            "last": self.max_code + 1,
            "negative_zero": 1 << (self.bits - 1),
            "none": None,
        }[POLICIES[self.policy].nan]

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number (of the binade that holds the subnormals, for exponent_bits = 0)."""
        return 1 - self.bias

    @cached_property
    def max(self) -> float:
        """Largest finite number."""
        return self._value(self.max_code)

    @property
    def min_normal(self) -> float:
        """Smallest normal number, 2^(1 - bias). Values below it are subnormal (all are, for exponent_bits = 0)."""
        return float(np.ldexp(1.0, self.min_exponent))

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number (min_normal for a format without subnormals)."""
        return float(np.ldexp(1.0, self.min_exponent - (self.mantissa_bits if self.subnormals else 0)))

    @property
    def eps(self) -> float:
        """Distance from 1.0 to the next larger number of the format's precision, 2^-M."""
        return float(np.ldexp(1.0, -self.mantissa_bits))

    def codes(self) -> npt.NDArray[np.float32]:
        """The value of every code, in code order: float32 array of shape (2^bits,). ValueError above 16 bits."""
        if self.bits > 16:
            raise ValueError(f"format {self.name!r}: a table of 2^{self.bits} codes is not made; at most 16 bits")
        codes = np.arange(1 << (self.bits - 1), dtype=np.int64)
        e, m = codes >> self.mantissa_bits, codes & ((1 << self.mantissa_bits) - 1)
        significand = np.where(e > 0, m + (1 << self.mantissa_bits), m if self.subnormals else 0)
        exponent = np.maximum(e, 1) - self.bias - self.mantissa_bits
        with np.errstate(over="ignore"):  # codes above max_code are special, whatever their number would be
            magnitude = np.ldexp(significand.astype(np.float64), exponent).astype(np.float32)
        magnitude[self.max_code + 1 :] = np.nan
        if self.infinity_code is not None:
            magnitude[self.infinity_code] = np.inf
        negative = -magnitude if self.has_negative_zero else np.where(magnitude == 0, magnitude, -magnitude)
        values = np.concatenate([magnitude, negative])
        if not self.has_negative_zero:
            values[1 << (self.bits - 1)] = np.nan
        return values


def _check_widths(name: str, exponent_bits: int, mantissa_bits: int) -> None:
    for field, value, most in (("exponent_bits", exponent_bits, 8), ("mantissa_bits", mantissa_bits, 23)):
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"format {name!r}: {field} must be an integer from 0 to {most} (got {value!r})")


def nearest(name: object, allowed: Iterable[object]) -> str:
    """ " (did you mean 'x'?)" for the allowed name nearest to one that is unknown, "" where none is near."""
    close = difflib.get_close_matches(str(name), [str(key) for key in allowed], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# Names as ml_dtypes, OCP and torch write them.
PRESETS = {
    preset.name: preset
    for preset in (
        Format("fp32", 8, 23, 127, "ieee"),
        Format("tf32", 8, 10, 127, "ieee"),
        Format("bf16", 8, 7, 127, "ieee"),
        Format("fp16", 5, 10, 15, "ieee"),
        Format("e5m2", 5, 2, 15, "ieee"),
        Format("e4m3", 4, 3, 7, "ieee"),
        Format("e3m4", 3, 4, 3, "ieee"),
        Format("e4m3fn", 4, 3, 7, "fn"),
        Format("e5m2fnuz", 5, 2, 16, "fnuz"),
        Format("e4m3fnuz", 4, 3, 8, "fnuz"),
        Format("e4m3b11fnuz", 4, 3, 11, "fnuz"),
        Format("e3m2", 3, 2, 3, "finite"),
        Format("e2m3", 2, 3, 1, "finite"),
        Format("e2m1", 2, 1, 1, "finite"),
    )
}
ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "e8m23": "fp32", "e8m10": "tf32", "e8m7": "bf16"}
ALIASES |= {"e5m10": "fp16", "e2m1fn": "e2m1", "e2m3fn": "e2m3", "e3m2fn": "e3m2"}
_KEYS = {"name", *(field.name for field in fields(Format))}


def format(spec: str | Mapping[str, object] | Format) -> Format:
    """The format that `spec` describes.

    spec: a preset's name (`formats()`), any `eXmY` string with an optional policy suffix (`e3m4`, `e2m5fn`), a mapping
    with `exponent_bits`, `mantissa_bits` and optionally `bias`, `policy`, `subnormals`, `name`, or a Format.
    Defaults: bias 2^(E-1)-1 (2^(E-1) for fnuz, 1 for E = 0); policy `ieee` when 1 + E + M >= 8, E >= 2 and M >= 1, else
    `finite`. Raises ValueError that says what is wrong and what is allowed.
    """
    if isinstance(spec, Format):
        return spec
    if isinstance(spec, str):
        name = ALIASES.get(spec, spec)
        if name in PRESETS:
            return PRESETS[name]
        match = re.fullmatch(r"e(\d)m(\d|[12]\d)(fn|fnuz)?", name)
        if not match:
            raise ValueError(
                f"unknown format {spec!r}{nearest(spec, PRESETS)}; allowed: {', '.join(PRESETS)}, "
                "or eXmY with 0 <= X <= 8 and 0 <= Y <= 23"
            )
        return _described(name, int(match[1]), int(match[2]), policy=match[3])
    if not isinstance(spec, Mapping):
        raise ValueError(f"a format is a name, a mapping or a Format (got {type(spec).__name__})")
    for key in spec:
        if key not in _KEYS:
            raise ValueError(
                f"format: unknown key {key!r}{nearest(str(key), _KEYS)}; allowed: {', '.join(sorted(_KEYS))}"
            )
    options = {key: value for key, value in spec.items() if value is not None}
    for key in ("exponent_bits", "mantissa_bits"):
        if key not in options:
            raise ValueError(f"format: {key} is missing")
    name = str(options.pop("name", None) or f"e{options['exponent_bits']}m{options['mantissa_bits']}")
    return _described(name, **options)  # type: ignore[arg-type]


def formats() -> list[Format]:
    """The preset formats, widest first."""
    return list(PRESETS.values())


def _described(
    name: str,
    exponent_bits: int,
    mantissa_bits: int,
    bias: int | None = None,
    policy: str | None = None,
    subnormals: bool = True,
) -> Format:
    _check_widths(name, exponent_bits, mantissa_bits)
    if policy is None:
        wide = 1 + exponent_bits + mantissa_bits >= 8 and exponent_bits >= 2 and mantissa_bits >= 1
        policy = "ieee" if wide else "finite"
    if bias is None:
        half = 1 << max(exponent_bits - 1, 0)
        bias = 1 if exponent_bits == 0 else half if policy == "fnuz" else half - 1
    return Format(name, exponent_bits, mantissa_bits, bias, policy, subnormals)
