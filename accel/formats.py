"""What a number is: scalar formats `s | e (E bits) | m (M bits)` whose values float32 can carry.

The value of a code is ``(-1)^s * 2^(max(e, 1) - bias) * ([e > 0] + m / 2^M)``; the policy says which codes are special.
With E = 0 the numbers are equally spaced: sign and magnitude, or two's complement under the policy `integer`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FLOAT32_MAX_EXPONENT = 127
FLOAT32_MIN_EXPONENT = -149
TABLE_BITS = 16  # the widest format whose codes are listed


@dataclass(frozen=True)
class Policy:
    """Which codes of a format are special.

    nan: where NaN lies: "top" (everything above the infinity), "last" (the last magnitude), "negative_zero", or "none".
    """

    infinity: bool
    nan: str
    meaning: str

    @property
    def negative_zero(self) -> bool:
        return self.nan != "negative_zero"


POLICIES = {
    "ieee": Policy(True, "top", "infinities and NaNs in the top exponent, as IEEE 754"),
    "fn": Policy(False, "last", "no infinity; NaN is the last code of either sign (OCP OFP8 e4m3)"),
    "fnuz": Policy(False, "negative_zero", "no infinity, no -0: its code is the only NaN"),
    "finite": Policy(False, "none", "numbers only (OCP MX FP6 and FP4)"),
    "p3109": Policy(True, "negative_zero", "the last code of either sign is infinity, the code of -0 NaN (IEEE P3109)"),
    "scale": Policy(False, "last", "unsigned powers of two without zero; the last code is NaN (OCP MX e8m0)"),
    "integer": Policy(False, "none", "two's complement"),
}


@dataclass(frozen=True)
class Format:
    """A scalar number format with `exponent_bits`, `mantissa_bits` and, where it is `signed`, a sign bit.

    policy: the special codes, see POLICIES. Without `subnormals` the exponent field 0 means zero. With `alpha_codes`
    two code points mean +-alpha, a float32 register beside the tensor: the last NaN of either sign where the policy has
    them (`ieee`, `fn`), else the largest finite number of either sign (`fnuz`, `finite`, `p3109`).
    Raises ValueError, naming the format and the reason, for a format that cannot be or that float32 cannot carry.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    policy: str
    subnormals: bool = True
    signed: bool = True
    alpha_codes: bool = False

    def __post_init__(self) -> None:
        check_widths(self.name, self.exponent_bits, self.mantissa_bits)
        if type(self.bias) is not int:
            raise self._wrong(f"bias must be an integer (got {self.bias!r})")
        for key in ("subnormals", "signed", "alpha_codes"):
            if type(getattr(self, key)) is not bool:
                raise self._wrong(f"{key} must be true or false (got {getattr(self, key)!r})")
        if not isinstance(self.policy, str) or self.policy not in POLICIES:
            raise self._wrong(
                f"unknown policy {self.policy!r}{nearest(self.policy, POLICIES)}; allowed: {', '.join(POLICIES)}"
            )
        self._check_policy()
        if self.max_code < self.min_code or (not self.subnormals and self.max_code < 1 << self.mantissa_bits):
            raise self._wrong(f"policy {self.policy!r} leaves no finite number besides zero")
        self._check_carrier()

    def _check_policy(self) -> None:
        e, m, policy = self.exponent_bits, self.mantissa_bits, self.policy
        if e + m == 0:
            raise self._wrong("exponent_bits + mantissa_bits must be at least 1 (got 0)")
        if policy == "ieee" and (e == 0 or m == 0):
            raise self._wrong(
                "policy 'ieee' needs exponent_bits >= 1 and mantissa_bits >= 1 for its infinity and NaN codes "
                f"(got E={e}, M={m}); 'fn', 'fnuz' or 'finite' do not"
            )
        if policy == "scale" and (m > 0 or self.signed or not self.subnormals):
            raise self._wrong(
                "policy 'scale' needs mantissa_bits = 0, signed: false and subnormals left true "
                f"(got M={m}, signed={self.signed}, subnormals={self.subnormals})"
            )
        if policy == "integer" and e > 0:
            raise self._wrong(f"policy 'integer' needs exponent_bits = 0 (got {e})")
        if not self.signed and not POLICIES[policy].negative_zero:
            raise self._wrong(f"policy {policy!r} puts NaN at the code of -0, which an unsigned format lacks")
        if e == 0 and not self.subnormals:
            raise self._wrong("exponent_bits = 0 has only subnormals; subnormals: false leaves zero")
        if self.alpha_codes and (policy in ("scale", "integer") or not self.signed):
            raise self._wrong("alpha_codes need a signed format of policy ieee, fn, fnuz, finite or p3109")

    def _check_carrier(self) -> None:
        exponent, significand = self._scaled(self.max_code)
        top = exponent + significand.bit_length() - 1
        described = (
            f"E={self.exponent_bits}, M={self.mantissa_bits}, bias={self.bias}, policy={self.policy}, "
            f"subnormals={self.subnormals}"
        )
        if top > FLOAT32_MAX_EXPONENT:
            raise self._wrong(
                f"is not carried by float32: its values reach up to 2^{top}, float32 ends below "
                f"2^{FLOAT32_MAX_EXPONENT + 1} ({described})"
            )
        finest = self.min_exponent - self.mantissa_bits
        if finest < FLOAT32_MIN_EXPONENT:
            raise self._wrong(
                f"is not carried by float32: its values are multiples of 2^{finest}, float32's of "
                f"2^{FLOAT32_MIN_EXPONENT} ({described})"
            )

    def _wrong(self, reason: str) -> ValueError:
        verb = "" if reason.startswith("is ") else ":"
        return ValueError(f"format {self.name!r}{verb} {reason}")

    def _scaled(self, code: int) -> tuple[int, int]:
        """(exponent, significand) of a magnitude code: its value is significand * 2^exponent."""
        if self.policy == "scale":
            return code - self.bias, 1
        e, m = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        hidden = (1 << self.mantissa_bits) if e else 0
        return max(e, 1) - self.bias - self.mantissa_bits, hidden | (m if e or self.subnormals else 0)

    def _value(self, code: int) -> float:
        exponent, significand = self._scaled(code)
        return float(np.ldexp(float(significand), exponent))

    @property
    def bits(self) -> int:
        """Width of a code in bits, the sign included."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def magnitude_bits(self) -> int:
        """Width of a code in bits without the sign."""
        return self.exponent_bits + self.mantissa_bits

    @property
    def sign_code(self) -> int:
        """The sign bit of a code, 0 for an unsigned format."""
        return 1 << self.magnitude_bits if self.signed else 0

    @property
    def has_infinity(self) -> bool:
        return POLICIES[self.policy].infinity

    @property
    def has_nan(self) -> bool:
        return self.nan_code is not None

    @property
    def has_negative_zero(self) -> bool:
        return self.signed and POLICIES[self.policy].negative_zero and self.policy != "integer"

    @property
    def has_zero(self) -> bool:
        return self.policy != "scale"

    @cached_property
    def max_code(self) -> int:
        """Magnitude code of the largest finite number."""
        policy = POLICIES[self.policy]
        reserved = {"top": 1 << self.mantissa_bits, "last": 1, "negative_zero": int(policy.infinity), "none": 0}
        taken_by_alpha = self.alpha_codes and policy.nan in ("negative_zero", "none")
        return (1 << self.magnitude_bits) - reserved[policy.nan] - 1 - taken_by_alpha

    @property
    def min_code(self) -> int:
        """Magnitude code of the smallest positive number."""
        return 0 if not self.has_zero else 1 if self.subnormals else 1 << self.mantissa_bits

    @property
    def alpha_code(self) -> int | None:
        """Magnitude code of alpha, None unless the format has `alpha_codes`."""
        if not self.alpha_codes:
            return None
        last = (1 << self.magnitude_bits) - 1
        return last if self.policy in ("ieee", "fn") else self.max_code + 1

    @property
    def infinity_code(self) -> int | None:
        """Magnitude code of infinity, None where the format has none."""
        if not self.has_infinity:
            return None
        return (1 << self.magnitude_bits) - (1 << self.mantissa_bits if self.policy == "ieee" else 1)

    @property
    def nan_code(self) -> int | None:
        """The canonical NaN code (all of it, sign included), None where the format has none."""
        match POLICIES[self.policy].nan:
            case "top" if not (self.alpha_codes and self.mantissa_bits == 1):
                return self.max_code + 1 + (1 << self.mantissa_bits >> 1)
            case "last" if not self.alpha_codes:
                return self.max_code + 1
            case "negative_zero":
                return self.sign_code
        return None

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number (of the binade that holds the subnormals, for exponent_bits = 0)."""
        return -self.bias if self.policy == "scale" else 1 - self.bias

    @cached_property
    def max(self) -> float:
        """Largest finite number."""
        return self._value(self.max_code)

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number: floor(log2(max))."""
        exponent, significand = self._scaled(self.max_code)
        return exponent + significand.bit_length() - 1

    @property
    def min(self) -> float:
        """Lowest finite number: -max, 0 for an unsigned format, one step below -max in two's complement."""
        if not self.signed:
            return 0.0 if self.has_zero else self.min_normal
        return -self.max - (self.min_subnormal if self.policy == "integer" else 0.0)

    @property
    def min_normal(self) -> float:
        """Smallest normal number, 2^min_exponent. Values below it are subnormal (all are, for exponent_bits = 0)."""
        return float(np.ldexp(1.0, self.min_exponent))

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number (min_normal for a format without subnormals)."""
        return float(np.ldexp(1.0, self.min_exponent - (self.mantissa_bits if self.subnormals else 0)))

    @property
    def eps(self) -> float:
        """Distance from 1.0 to the next larger number of the format's precision, 2^-M; for E = 0, the step."""
        return float(np.ldexp(1.0, -self.mantissa_bits)) if self.exponent_bits else self.min_subnormal

    def codes(self, alpha: float | None = None) -> npt.NDArray[np.float32]:
        """The value of every code, in code order: float32 array of shape (2^bits,). ValueError above 16 bits.

        alpha: the value of the alpha codes of a format that has them; NaN where it is not given.
        """
        if self.bits > TABLE_BITS:
            raise ValueError(
                f"format {self.name!r}: a table of 2^{self.bits} codes is not made; at most {TABLE_BITS} bits"
            )
        codes = np.arange(1 << self.magnitude_bits, dtype=np.int64)
        if self.policy == "scale":
            significand, exponent = np.ones(codes.shape, np.int64), codes - self.bias
        else:
            e, m = codes >> self.mantissa_bits, codes & ((1 << self.mantissa_bits) - 1)
            significand = np.where(e > 0, m + (1 << self.mantissa_bits), m if self.subnormals else 0)
            exponent = np.maximum(e, 1) - self.bias - self.mantissa_bits
        with np.errstate(over="ignore"):  # codes above max_code are special, whatever their number would be
            magnitude = np.ldexp(significand.astype(np.float64), exponent).astype(np.float32)
        magnitude[self.max_code + 1 :] = np.nan
        if self.infinity_code is not None:
            magnitude[self.infinity_code] = np.inf
        if self.alpha_code is not None and alpha is not None:
            magnitude[self.alpha_code] = alpha
        if not self.signed:
            return magnitude
        if self.policy == "integer":
            return np.concatenate([magnitude, magnitude - np.float32(1 << self.mantissa_bits) * self.min_subnormal])
        negative = -magnitude if self.has_negative_zero else np.where(magnitude == 0, magnitude, -magnitude)
        values = np.concatenate([magnitude, negative])
        if not self.has_negative_zero:
            values[self.sign_code] = np.nan
        return values


def check_widths(name: str, exponent_bits: int, mantissa_bits: int) -> None:
    """ValueError, naming the format and the field, for widths that no format has."""
    for field, value, most in (("exponent_bits", exponent_bits, 8), ("mantissa_bits", mantissa_bits, 23)):
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"format {name!r}: {field} must be an integer from 0 to {most} (got {value!r})")


def nearest(name: object, allowed: Iterable[object]) -> str:
    """ " (did you mean 'x'?)" for the allowed name nearest to one that is unknown, "" where none is near."""
    close = difflib.get_close_matches(str(name), [str(key) for key in allowed], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


FLOAT32 = Format("fp32", 8, 23, 127, "ieee")
