"""What `fpsim formats` says of number formats: plain data for JSON, and pages for a terminal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

import accel
from accel import BlockFormat, Format
from accel.block_formats import PADDINGS, SCALE_RULES
from accel.formats import POLICIES
from accel.presets import GRAMMAR
from fpsim.config import Preset, load_format, presets
from fpsim.console import plain_console, print_table
from fpsim.number_line import binades, number_line

TABLE_BITS = 8  # the widest format whose codes are listed
FLOAT32_MAX = float(np.finfo(np.float32).max)
GAP = "   "  # between the columns of a table of codes

AnyFormat = Format | BlockFormat


# --- as data --------------------------------------------------------------------------------------------------------


def listed() -> list[dict[str, Any]]:
    """The properties of every preset, and of every format file that comes with fpsim."""
    of_files = [properties(load_format(file.name)) | {"file": str(file.path)} for file in _format_files()]
    return [properties(fmt) for fmt in accel.formats()] + of_files


def properties(fmt: AnyFormat) -> dict[str, Any]:
    """What a format is. Codes are integers; `nan_codes` are ranges, both ends included."""
    if isinstance(fmt, BlockFormat):
        return {
            "kind": "block",
            "name": fmt.name,
            "bits_per_element": fmt.bits_per_element,
            "element": properties(fmt.element),
            "scale": properties(fmt.scale),
            "block_size": fmt.block_size,
            "scale_rule": fmt.scale_rule,
            "scale_formula": scale_formula(fmt),
            "axis": fmt.axis,
            "tensor_scale": fmt.tensor_scale,
            "padding": fmt.padding,
        }
    span = fmt.max / fmt.min_subnormal
    return {
        "kind": "scalar",
        "name": fmt.name,
        "bits": fmt.bits,
        "signed": fmt.signed,
        "exponent_bits": fmt.exponent_bits,
        "mantissa_bits": fmt.mantissa_bits,
        "bias": fmt.bias,
        "policy": fmt.policy,
        "subnormals": fmt.subnormals,
        "max": fmt.max,
        "min": fmt.min,
        "min_normal": fmt.min_normal if fmt.min_normal <= fmt.max else None,
        "min_subnormal": fmt.min_subnormal,
        "eps": fmt.eps,
        "finite_numbers": _finite_numbers(fmt),
        "dynamic_range_binades": math.log2(span),
        "dynamic_range_db": 20 * math.log10(span),
        "negative_zero": fmt.has_negative_zero,
        "infinity_codes": [] if fmt.infinity_code is None else _both_signs(fmt, fmt.infinity_code),
        "nan_codes": _nan_codes(fmt),
        "nan_code": fmt.nan_code,
        "alpha_codes": [] if fmt.alpha_code is None else _both_signs(fmt, fmt.alpha_code),
    }


def in_full(fmt: AnyFormat) -> dict[str, Any]:
    """The same with how many numbers lie in each binade and, up to 8 bits, what every code means, in code order."""
    if isinstance(fmt, BlockFormat):
        return properties(fmt) | {"element": in_full(fmt.element)}
    line = [{"exponent": b.exponent, "numbers": b.numbers, "subnormal": b.is_subnormal} for b in binades(fmt)]
    table = {"values": _meanings(fmt)} if fmt.bits <= TABLE_BITS else {}
    return properties(fmt) | {"binades": line} | table


def scale_formula(fmt: BlockFormat) -> str:
    """How a block's scale s follows from its largest magnitude amax (and the tensor's scale t)."""
    element = fmt.element
    bits = element.mantissa_bits if element.exponent_bits else element.mantissa_bits - 1
    share = f"amax / {decimal(element.max)}" + " / t" * fmt.tensor_scale
    minus_emax = _minus(element.max_exponent)
    return {
        "floor": f"2^(floor(log2 amax){minus_emax})",
        "ceil": f"2^(ceil(log2 amax){minus_emax})",
        "even": f"2^(floor(log2 a){minus_emax}), where a is amax rounded half up to {bits} mantissa bits",
        "rceil": f"2^ceil(log2({share}))",
        "amax": f"{share} rounded into {fmt.scale.name}, at least {decimal(fmt.scale.min_normal)}",
    }[fmt.scale_rule]


def _minus(value: int) -> str:
    return f" {'-' if value > 0 else '+'} {abs(value)}" * (value != 0)


def _format_files() -> list[Preset]:
    return [preset for preset in presets() if preset.kind == "formats"]


def _finite_numbers(fmt: Format) -> int:
    positive = fmt.max_code - fmt.min_code + 1
    return positive * (2 if fmt.signed else 1) + fmt.has_zero + (fmt.min < -fmt.max)


def _both_signs(fmt: Format, code: int) -> list[int]:
    return [code, code | fmt.sign_code] if fmt.signed else [code]


def _nan_codes(fmt: Format) -> list[list[int]]:
    if fmt.nan_code is None:
        return []
    if POLICIES[fmt.policy].nan == "negative_zero":
        return [[fmt.nan_code, fmt.nan_code]]
    first, last = fmt.max_code + 1 + fmt.has_infinity, (1 << fmt.magnitude_bits) - 1 - fmt.alpha_codes
    return [[first | sign, last | sign] for sign in _both_signs(fmt, 0)]


def _meanings(fmt: Format) -> list[float | str]:
    """What every code means: a number, or a word."""
    words = {math.inf: "Infinity", -math.inf: "-Infinity"}
    meanings = ["NaN" if math.isnan(value) else words.get(value, value) for value in fmt.codes().tolist()]
    if fmt.alpha_code is not None:
        meanings[fmt.alpha_code], meanings[fmt.alpha_code | fmt.sign_code] = "alpha", "-alpha"
    return meanings


# --- as pages -------------------------------------------------------------------------------------------------------


def print_list() -> None:
    """Tables of the scalar formats, the block formats and the format files."""
    console = plain_console()
    scalars = [fmt for fmt in accel.formats() if isinstance(fmt, Format)]
    blocks = [fmt for fmt in accel.formats() if isinstance(fmt, BlockFormat)]
    header = ["format", "bits", "layout", "bias", "policy", "largest", "smallest normal", "smallest", "eps", "special"]
    print_table(header, [_scalar_row(fmt) for fmt in scalars])
    console.print()
    for name, policy in POLICIES.items():
        console.print(f"{name:8} {policy.meaning}")
    console.print()
    header = ["block format", "bits per element", "element", "scale", "block size", "rule", "axis", "tensor scale"]
    print_table(header, [_block_row(fmt) for fmt in blocks])
    console.print()
    for name, meaning in SCALE_RULES.items():
        console.print(f"{name:8} {meaning}")
    console.print()
    print_table(["format file", "what it is"], [(file.name, file.summary) for file in _format_files()])
    console.print()
    text = f"fpsim formats NAME shows one of them, a file by its path, a mapping as in YAML, or any {GRAMMAR}."
    console.print(text, soft_wrap=False)


def print_page(fmt: AnyFormat) -> None:
    """The properties of a format, the values of its codes, and its number line."""
    console = plain_console()
    if isinstance(fmt, BlockFormat):
        console.print(Text(f"{fmt.name}: blocks of {fmt.element.name} that share a scale {fmt.scale.name}", "bold"))
        _print_lines(console, _block_lines(fmt))
        console.print()
        fmt = fmt.element
    console.print(Text(f"{fmt.name}: {fmt.bits} bits, {_layout(fmt)}", "bold"))
    _print_lines(console, _scalar_lines(fmt))
    if fmt.bits <= TABLE_BITS:
        console.print()
        _print_codes(console, fmt)
    console.print()
    for line in number_line(fmt, console.width, console.encoding.startswith("utf")):
        console.print(line)


def decimal(value: float) -> str:
    """The shortest decimal that is this float32 number and no other."""
    is_short_integer = value.is_integer() and 0 < abs(value) < 1 << 24
    return str(int(value)) if is_short_integer else str(np.float32(value)).removesuffix(".0")


def as_power(value: float) -> str:
    """A number by its power of two: 1.75 * 2^8."""
    mantissa, exponent = math.frexp(abs(value))
    sign, significand, power = "-" if value < 0 else "", 2 * mantissa, f"2^{exponent - 1}"
    gap = math.log2(2 - significand)
    if significand > 1.99 and gap.is_integer():
        return f"{sign}(2 - 2^{gap:.0f}) * {power}"
    return f"{sign}{power}" if significand == 1 else f"{sign}{significand:.10g} * {power}"


def code_text(fmt: Format, code: int) -> str:
    """A code in hexadecimal."""
    return f"0x{code:0{-(-fmt.bits // 4)}x}"


def _scalar_row(fmt: Format) -> tuple[str, ...]:
    normal = decimal(fmt.min_normal) if fmt.min_normal <= fmt.max else "-"
    numbers = (decimal(fmt.max), normal, decimal(fmt.min_subnormal), decimal(fmt.eps))
    special = {"Inf": fmt.has_infinity, "NaN": fmt.has_nan, "-0": fmt.has_negative_zero}
    words = " ".join(word for word, has in special.items() if has)
    return (fmt.name, str(fmt.bits), _layout(fmt), str(fmt.bias), fmt.policy, *numbers, words or "-")


def _block_row(fmt: BlockFormat) -> tuple[str, ...]:
    parts = (fmt.name, f"{fmt.bits_per_element:g}", fmt.element.name, fmt.scale.name, str(fmt.block_size))
    axis = "channels" if fmt.axis is None else str(fmt.axis)
    return (*parts, fmt.scale_rule, axis, "float32" if fmt.tensor_scale else "-")


def _layout(fmt: Format) -> str:
    """The fields of a code: a letter a bit where they are few, else letters with widths."""
    if fmt.bits <= TABLE_BITS:
        return _fields(fmt, "s" * fmt.signed + "e" * fmt.exponent_bits + "m" * fmt.mantissa_bits)
    return "s " * fmt.signed + f"e{fmt.exponent_bits} " * (fmt.exponent_bits > 0) + f"m{fmt.mantissa_bits}"


def _scalar_lines(fmt: Format) -> list[tuple[str, str]]:
    """The properties of a scalar format: labels and what they are."""
    span = fmt.max / fmt.min_subnormal
    zero = code_text(fmt, 0) + f", and -0 {code_text(fmt, fmt.sign_code)}" * fmt.has_negative_zero
    infinities = [code_text(fmt, code) for code in _both_signs(fmt, fmt.infinity_code or 0)]
    lines = [
        ("value", _value_formula(fmt)),
        ("policy", f"{fmt.policy}: {POLICIES[fmt.policy].meaning}"),
        *_number_lines(fmt),
        ("zero", zero if fmt.has_zero else "none"),
        ("infinity", ", and -infinity ".join(infinities) if fmt.has_infinity else "none"),
        ("NaN", _nan_text(fmt)),
        ("finite numbers", f"{_finite_numbers(fmt):,}" + " (0 and -0 counted once)" * fmt.has_negative_zero),
        ("dynamic range", f"{math.log2(span):.1f} binades, {20 * math.log10(span):.1f} dB: largest over smallest"),
    ]
    if fmt.alpha_code is not None:
        alpha, minus_alpha = (code_text(fmt, code) for code in _both_signs(fmt, fmt.alpha_code))
        lines.append(("alpha", f"{alpha}, and -alpha {minus_alpha}: a float32 number that is kept beside the tensor"))
    return lines


def _number_lines(fmt: Format) -> list[tuple[str, str]]:
    """The landmarks of a format, in columns: decimal, by power of two, code."""
    lowest_code = fmt.sign_code if fmt.policy == "integer" else fmt.sign_code | fmt.max_code
    has_subnormals = fmt.exponent_bits > 0 and fmt.min_subnormal < fmt.min_normal
    kind = "  subnormal" if has_subnormals else "  normal" if fmt.exponent_bits else ""
    numbers = [("largest", fmt.max, code_text(fmt, fmt.max_code))]
    if fmt.signed:
        numbers.append(("lowest", fmt.min, code_text(fmt, lowest_code)))
    if has_subnormals and fmt.min_normal <= fmt.max:
        numbers.append(("smallest normal", fmt.min_normal, code_text(fmt, 1 << fmt.mantissa_bits)))
    numbers.append(("smallest", fmt.min_subnormal, code_text(fmt, fmt.min_code) + kind))
    if fmt.exponent_bits:
        numbers.append(("eps", fmt.eps, "from 1 to the next number"))

    def power(value: float) -> str:
        step = fmt.min_subnormal
        return as_power(value) if fmt.exponent_bits else f"{value / step:.0f} * {as_power(step)}"

    wide = max(len(decimal(value)) for _, value, _ in numbers)
    wider = max(len(power(value)) for _, value, _ in numbers)
    return [(label, f"{decimal(value):{wide}}  {power(value):{wider}}  {note}") for label, value, note in numbers]


def _value_formula(fmt: Format) -> str:
    """The value of a code, by its fields."""
    sign, step = "(-1)^s " if fmt.signed else "", as_power(fmt.min_subnormal)
    if fmt.policy == "scale":
        return f"2^(e{_minus(fmt.bias)})"
    if fmt.policy == "integer":
        return f"{step} times the code as an integer" + " in two's complement" * fmt.signed
    if fmt.exponent_bits == 0:
        return f"{sign}{step} m"
    steps = 1 << fmt.mantissa_bits
    normal = f"2^(e{_minus(fmt.bias)})" + f" (1 + m / {steps})" * (steps > 1)
    below = f"{sign}2^{fmt.min_exponent} m / {steps}" if fmt.subnormals and steps > 1 else "0"
    return f"{sign}{normal}; where e = 0: {below}"


def _nan_text(fmt: Format) -> str:
    if fmt.nan_code is None:
        return "none"
    ranges = ["-".join(dict.fromkeys(code_text(fmt, code) for code in ends)) for ends in _nan_codes(fmt)]
    canonical = f"; the canonical one is {code_text(fmt, fmt.nan_code)}" * ("-" in ranges[0])
    return ", ".join(ranges) + canonical


def _block_lines(fmt: BlockFormat) -> list[tuple[str, str]]:
    """The properties of a block format: labels and what they are."""
    element, scale = fmt.element, fmt.scale
    times, divisor = (" t", "(s t)") if fmt.tensor_scale else ("", "s")
    tensor_scale = f"t = amax(x) / ({decimal(element.max)} * {decimal(scale.max)}), a float32 number"
    scales = f"from {as_power(scale.min_normal)} to {as_power(scale.max)}"
    smallest, largest = element.min_subnormal * scale.min_normal, element.max * scale.max
    axis = "a layer's channels (of a bare tensor: the last axis)" if fmt.axis is None else f"axis {fmt.axis}"
    beyond = ", beyond float32" * (largest > FLOAT32_MAX)
    return [
        ("element", f"{element.name}, {element.bits} bits: up to {decimal(element.max)}"),
        ("scale", f"{scale.name}, {scale.bits} bits: {scales}"),
        ("tensor scale", tensor_scale if fmt.tensor_scale else "none"),
        ("block", f"{fmt.block_size} elements along {axis}"),
        ("padding", f"{fmt.padding}: {PADDINGS[fmt.padding]}"),
        ("bits per element", f"{fmt.bits_per_element:g} = {element.bits} + {scale.bits} / {fmt.block_size}"),
        ("value", f"s{times} Q(x / {divisor}), Q rounding into {element.name}"),
        ("scale rule", f"{fmt.scale_rule}: s = {scale_formula(fmt)}"),
        ("", f"amax: the largest magnitude in the block; s is kept {scales}" + "; a NaN makes it NaN" * scale.has_nan),
        ("magnitudes", f"from {as_power(smallest)}{times} to {as_power(largest)}{times}{beyond}, and 0"),
    ]


def _print_lines(console: Console, lines: list[tuple[str, str]]) -> None:
    for label, text in lines:
        console.print(Text.assemble((f"{label:16} ", "dim"), text))


def _print_codes(console: Console, fmt: Format) -> None:
    """Code, fields and value of every code, down the columns."""
    meanings = [value if isinstance(value, str) else decimal(value) for value in _meanings(fmt)]
    widest = max(len("value"), *map(len, meanings))
    digits = max(len("code"), len(code_text(fmt, 0)))
    cells = [
        f"{code_text(fmt, code):{digits}} {_fields(fmt, f'{code:0{fmt.bits}b}')} {meaning:<{widest}}"
        for code, meaning in enumerate(meanings)
    ]
    columns = max(1, (console.width + len(GAP)) // (len(cells[0]) + len(GAP)))
    binade = min(1 << fmt.mantissa_bits, len(cells) // 2)
    rows = -(-len(cells) // columns // binade) * binade  # a column begins where a mantissa does
    header = f"{'code':{digits}} {_layout(fmt)} {'value':{widest}}"
    console.print(Text(GAP.join([header] * -(-len(cells) // rows)).rstrip(), "bold"))
    for row in range(rows):
        console.print(Text(GAP.join(cells[row::rows]).rstrip()))


def _fields(fmt: Format, digits: str) -> str:
    """The binary digits of a code, with a space between sign, exponent and mantissa."""
    sign, exponent = int(fmt.signed), int(fmt.signed) + fmt.exponent_bits
    return " ".join(part for part in (digits[:sign], digits[sign:exponent], digits[exponent:]) if part)
