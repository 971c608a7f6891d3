"""Formats by name, and how a name, a text or a mapping becomes a format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache

from accel.block_formats import BLOCK_KEYS, BlockFormat, is_block_mapping
from accel.formats import FLOAT32, Format, check_widths, nearest

AnyFormat = Format | BlockFormat
Spec = str | Mapping[str, object] | Format | BlockFormat

_SCALARS = (
    FLOAT32,
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
    *(Format(f"binary8p{p}", 8 - p, p - 1, 1 << (7 - p), "p3109") for p in range(1, 8)),
    Format("e3m2", 3, 2, 3, "finite"),
    Format("e2m3", 2, 3, 1, "finite"),
    Format("e2m1", 2, 1, 1, "finite"),
    Format("e8m0fnu", 8, 0, 127, "scale", signed=False),
    Format("int16", 0, 15, -14, "integer"),
    Format("int8", 0, 7, -6, "integer"),
    Format("uint8", 0, 8, -7, "integer", signed=False),
    Format("int4", 0, 3, -2, "integer"),
)
_E8M0 = _SCALARS[-5]
_BY_NAME = {scalar.name: scalar for scalar in _SCALARS}
_MXINT8_ELEMENT = Format("fixed<8,6>", 0, 7, 0, "integer")  # OCP MX v1.0, section 5.3.4: int8 with a scale of 2^-6
_BLOCKS = (
    *(
        BlockFormat(name, element, _E8M0, 32)
        for name, element in (
            ("mxfp8_e4m3fn", _BY_NAME["e4m3fn"]),
            ("mxfp8_e5m2", _BY_NAME["e5m2"]),
            ("mxint8", _MXINT8_ELEMENT),
            ("mxfp6_e3m2", _BY_NAME["e3m2"]),
            ("mxfp6_e2m3", _BY_NAME["e2m3"]),
            ("mxfp4", _BY_NAME["e2m1"]),
        )
    ),
    BlockFormat("nvfp4", _BY_NAME["e2m1"], _BY_NAME["e4m3fn"], 16, scale_rule="amax", tensor_scale=True),
)

# Names as ml_dtypes, OCP, NVIDIA and torch write them.
_ALL: tuple[AnyFormat, ...] = (*_SCALARS, *_BLOCKS)
PRESETS = {preset.name: preset for preset in _ALL}
ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "e8m23": "fp32", "e8m10": "tf32", "e8m7": "bf16"}
ALIASES |= {"e5m10": "fp16", "e2m1fn": "e2m1", "e2m3fn": "e2m3", "e3m2fn": "e3m2", "e8m0": "e8m0fnu"}
ALIASES |= {"mxfp8": "mxfp8_e4m3fn", "mxfp6": "mxfp6_e3m2", "mxfp4_e2m1": "mxfp4"}

_KEYS = tuple(field.name for field in fields(Format))
GRAMMAR = (
    "eXmY with 0 <= X <= 8 and 0 <= Y <= 23 (and fn, fnuz or p3109 behind it), intN, uintN, fixed<N,F>, ufixed<N,F> or "
    "bfpN (block floating point with N-bit elements)"
)


def format(spec: Spec) -> AnyFormat:
    """The format that `spec` describes: a Format, or a BlockFormat.

    spec: a preset's name (`formats()`); `eXmY` with an optional policy suffix (`e3m4`, `e2m5fn`, `e5m2p3109`); `intN`,
    `uintN`, `fixed<N,F>`, `ufixed<N,F>` (two's complement of N bits, F of them a fraction); `bfpN` (blocks of 32 signed
    N-bit integers that share an e8m0 scale); a mapping; its JSON; or a format itself.
    A mapping has `exponent_bits`, `mantissa_bits` and optionally `bias`, `policy`, `subnormals`, `signed`,
    `alpha_codes`, `name`; or, for a block format, `element`, `block_size` and optionally `scale`, `scale_rule`, `axis`,
    `tensor_scale`, `padding`, `name`. A mapping with `base` takes what it does not say from that format.
    Defaults: bias 2^(E-1)-1 (2^(E-1) for fnuz and p3109, 1 for E = 0, a step of 1 for policy `integer`); policy `ieee`
    when 1 + E + M >= 8, E >= 2 and M >= 1, else `finite`; scale `e8m0fnu` with scale_rule `floor`.
    Raises ValueError that says what is wrong and what is allowed.
    """
    if isinstance(spec, Format | BlockFormat):
        return spec
    if isinstance(spec, str):
        return _named(spec)
    if not isinstance(spec, Mapping):
        raise ValueError(f"a format is a name, a mapping or a Format (got {type(spec).__name__})")
    options = {key: value for key, value in spec.items() if value is not None}
    if "base" in options:
        base = format(options.pop("base"))  # type: ignore[arg-type]
        options = {**to_mapping(base), "name": f"{base.name}*", **options}
    return _block(options) if is_block_mapping(options) else _scalar(options)


def formats() -> list[AnyFormat]:
    """The preset formats: scalar ones from the widest, then block formats."""
    return list(PRESETS.values())


def to_mapping(fmt: AnyFormat) -> dict[str, object]:
    """The mapping that `format` turns into `fmt` again."""
    if isinstance(fmt, Format):
        return {key: getattr(fmt, key) for key in _KEYS}
    values = {key: getattr(fmt, key) for key in BLOCK_KEYS}
    return values | {key: to_mapping(values[key]) for key in ("element", "scale")}


def to_text(spec: Spec) -> str:
    """A text that `format` turns into the same format: a preset's name, or JSON."""
    if isinstance(spec, str):
        return spec
    fmt = format(spec)
    return fmt.name if PRESETS.get(fmt.name) == fmt else json.dumps(to_mapping(fmt))


@cache
def _named(text: str) -> AnyFormat:
    name = ALIASES.get(text, text)
    if name in PRESETS:
        return PRESETS[name]
    if text.startswith("{"):
        try:
            return format(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"a format's JSON is not valid: {error} (got {text!r})") from None
    if match := re.fullmatch(r"e(\d)m(\d|[12]\d)(fn|fnuz|p3109)?", name):
        return _scalar(
            {"name": name, "exponent_bits": int(match[1]), "mantissa_bits": int(match[2]), "policy": match[3]}
        )
    if match := re.fullmatch(r"(u?)(?:int(\d{1,4})|fixed<(\d{1,4}),(-?\d{1,4})>)", name):
        return _fixed(name, int(match[2] or match[3]), int(match[4] or 0), signed=not match[1])
    if match := re.fullmatch(r"bfp(\d{1,4})", name):
        bits = int(match[1])
        if not 2 <= bits <= 24:
            raise ValueError(f"format {name!r}: block floating point has elements of 2 to 24 bits (got {bits})")
        element = Format(f"e0m{bits - 1}", 0, bits - 1, 1, "finite")
        return BlockFormat(name, element, _E8M0, 32)
    raise ValueError(f"unknown format {text!r}{nearest(text, PRESETS)}; allowed: {', '.join(PRESETS)}, or {GRAMMAR}")


def _fixed(name: str, bits: int, fraction_bits: int, signed: bool) -> Format:
    mantissa_bits = bits - signed
    if not 1 <= mantissa_bits <= 23:
        raise ValueError(f"format {name!r}: integers of {1 + signed} to {23 + signed} bits are carried (got {bits})")
    return Format(name, 0, mantissa_bits, 1 - mantissa_bits + fraction_bits, "integer", signed=signed)


def _check_keys(options: Mapping[str, object], allowed: tuple[str, ...], needed: tuple[str, ...]) -> None:
    for key in options:
        if key not in allowed:
            names = ", ".join(sorted((*allowed, "base")))
            raise ValueError(f"format: unknown key {key!r}{nearest(key, allowed)}; allowed: {names}")
    for key in needed:
        if key not in options:
            raise ValueError(f"format: {key} is missing")


def _scalar(options: Mapping[str, object]) -> Format:
    options = {key: value for key, value in options.items() if value is not None}
    _check_keys(options, _KEYS, ("exponent_bits", "mantissa_bits"))
    e, m = options["exponent_bits"], options["mantissa_bits"]
    name = str(options.pop("name", None) or f"e{e}m{m}")
    check_widths(name, e, m)  # type: ignore[arg-type]
    assert isinstance(e, int)
    assert isinstance(m, int)
    wide = 1 + e + m >= 8 and e >= 2 and m >= 1
    policy = options.setdefault("policy", "ieee" if wide else "finite")
    half = 1 << max(e - 1, 0)
    usual = 1 - m if policy == "integer" else 1 if e == 0 else half if policy in ("fnuz", "p3109") else half - 1
    options.setdefault("bias", usual)
    options.setdefault("signed", policy != "scale")
    return Format(name, **options)  # type: ignore[arg-type]


def _block(options: Mapping[str, object]) -> BlockFormat:
    _check_keys(options, BLOCK_KEYS, ("element", "block_size"))
    parts = {key: format(options.get(key, "e8m0fnu")) for key in ("element", "scale")}  # type: ignore[arg-type]
    for key, part in parts.items():
        if not isinstance(part, Format):
            raise ValueError(f"format: {key} must be a scalar format (got the block format {part.name!r})")
    name = str(options.get("name") or f"block<{parts['element'].name},{options['block_size']}>")
    return BlockFormat(**{**options, **parts, "name": name})  # type: ignore[arg-type]
