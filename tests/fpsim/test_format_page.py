from __future__ import annotations

import json
import math
from itertools import chain
from typing import Any

import numpy as np
import pytest

import accel
from fpsim.format_page import as_power, decimal, in_full, listed, print_list, print_page, properties, scale_formula

SMALL = [fmt for fmt in accel.formats() if isinstance(fmt, accel.Format) and fmt.bits <= 16]
EXTRA = [
    {"base": "e4m3fn", "alpha_codes": True},
    {"base": "e5m2", "alpha_codes": True},
    {"exponent_bits": 5, "mantissa_bits": 1, "policy": "ieee", "alpha_codes": True},
    {"base": "e2m1", "alpha_codes": True},
    {"base": "e4m3fnuz", "alpha_codes": True},
    {"base": "binary8p4", "alpha_codes": True},
    {"base": "e5m2", "subnormals": False},
    {"exponent_bits": 4, "mantissa_bits": 4, "signed": False, "policy": "ieee"},
    "e0m5",
    "fixed<8,4>",
]
ALL = [*SMALL, *(accel.format(spec) for spec in EXTRA)]


def page(fmt: accel.Format | accel.BlockFormat, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a format's page."""
    print_page(fmt)
    return capsys.readouterr().out.splitlines()


def said(lines: list[str], label: str) -> str:
    """What the page says under a label."""
    return next(line[len(label) :].strip() for line in lines if line.startswith(label + " "))


# --- as data --------------------------------------------------------------------------------------------------------


def test_properties_of_e4m3fn() -> None:
    """OCP OFP8, table 1."""
    assert properties(accel.format("e4m3fn")) == {
        "kind": "scalar",
        "name": "e4m3fn",
        "bits": 8,
        "signed": True,
        "exponent_bits": 4,
        "mantissa_bits": 3,
        "bias": 7,
        "policy": "fn",
        "subnormals": True,
        "max": 448.0,
        "min": -448.0,
        "min_normal": 2.0**-6,
        "min_subnormal": 2.0**-9,
        "eps": 0.125,
        "finite_numbers": 253,
        "dynamic_range_binades": math.log2(448 * 512),
        "dynamic_range_db": 20 * math.log10(448 * 512),
        "negative_zero": True,
        "infinity_codes": [],
        "nan_codes": [[0x7F, 0x7F], [0xFF, 0xFF]],
        "nan_code": 0x7F,
        "alpha_codes": [],
    }


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: f"{fmt.name}-{fmt.alpha_codes}")
def test_special_codes_and_counts_are_those_of_the_table(fmt: accel.Format) -> None:
    values, found = fmt.codes(), properties(fmt)
    special = set(chain(*(range(first, last + 1) for first, last in found["nan_codes"])))
    assert special.isdisjoint(found["alpha_codes"])
    assert special | set(found["alpha_codes"]) == set(np.flatnonzero(np.isnan(values)).tolist())
    assert found["infinity_codes"] == np.flatnonzero(np.isinf(values)).tolist()
    finite = values[np.isfinite(values)]
    assert found["finite_numbers"] == len(np.unique(finite))
    assert (found["max"], found["min"]) == (finite.max(), finite.min())
    assert found["min_subnormal"] == finite[finite > 0].min()
    assert found["negative_zero"] == bool((np.signbit(values) & (values == 0)).any())


def test_values_of_e2m1() -> None:
    """OCP MX v1.0, table 5."""
    values = in_full(accel.format("e2m1"))["values"]
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values == [*magnitudes, *(-value for value in magnitudes)]
    assert math.copysign(1, values[8]) == -1


def test_words_in_the_place_of_numbers() -> None:
    alpha = in_full(accel.format({"base": "e5m2", "alpha_codes": True}))["values"]
    assert alpha[0x7C:0x80] == ["Infinity", "NaN", "NaN", "alpha"]
    assert alpha[0xFC:] == ["-Infinity", "NaN", "NaN", "-alpha"]
    assert in_full(accel.format("e4m3fnuz"))["values"][0x80] == "NaN"
    assert "values" not in in_full(accel.format("fp16"))


@pytest.mark.parametrize("fmt", [*accel.formats(), *ALL], ids=lambda fmt: fmt.name)
def test_all_of_it_is_json(fmt: accel.Format | accel.BlockFormat) -> None:
    found = in_full(fmt)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_properties_of_a_block_format() -> None:
    found = properties(accel.format({"base": "mxfp6", "block_size": 16, "name": "b"}))
    assert (found["kind"], found["name"], found["bits_per_element"], found["block_size"]) == ("block", "b", 6.5, 16)
    assert (found["element"]["name"], found["scale"]["name"]) == ("e3m2", "e8m0fnu")
    assert (found["scale_rule"], found["padding"]) == ("floor", "short")
    assert (found["axis"], found["tensor_scale"]) == (None, False)


@pytest.mark.parametrize(
    ("spec", "formula"),
    [
        ("mxfp4", "2^(floor(log2 amax) - 2)"),
        ("mxint8", "2^(floor(log2 amax))"),
        ("bfp8", "2^(floor(log2 amax) + 1)"),
        ({"base": "mxfp8_e4m3fn", "scale_rule": "ceil"}, "2^(ceil(log2 amax) - 8)"),
        (
            {"base": "mxfp8_e5m2", "scale_rule": "even"},
            "2^(floor(log2 a) - 15), where a is amax rounded half up to 2 mantissa bits",
        ),
        ({"base": "mxfp6", "scale_rule": "rceil"}, "2^ceil(log2(amax / 28))"),
        ("nvfp4", "amax / 6 / t rounded into e4m3fn, at least 0.015625"),
        ({"base": "nvfp4", "tensor_scale": False}, "amax / 6 rounded into e4m3fn, at least 0.015625"),
    ],
)
def test_scale_formula(spec: Any, formula: str) -> None:
    fmt = accel.format(spec)
    assert isinstance(fmt, accel.BlockFormat)
    assert scale_formula(fmt) == formula


def test_format_files_are_listed_with_their_path() -> None:
    rows = {row["name"]: row for row in listed()}
    assert rows["fp6-e3m2-b6"]["bias"] == 6
    assert rows["fp6-e3m2-b6"]["file"].endswith("fp6-e3m2-b6.yaml")
    assert rows["mxfp6-block16"]["bits_per_element"] == 6.5


# --- numbers as text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shortest", "power"),
    [
        (448.0, "448", "1.75 * 2^8"),
        (2.0**-9, "0.001953125", "2^-9"),
        (-6.0, "-6", "-1.5 * 2^2"),
        (2.0**-149, "1e-45", "2^-149"),
        (float(np.finfo(np.float32).max), "3.4028235e+38", "(2 - 2^-23) * 2^127"),
        (2.0**23, "8388608", "2^23"),
        (0.1 + 0.025, "0.125", "2^-3"),
    ],
)
def test_numbers_as_text(value: float, shortest: str, power: str) -> None:
    assert decimal(value) == shortest
    assert as_power(value) == power


@pytest.mark.parametrize("fmt", SMALL, ids=lambda fmt: fmt.name)
def test_decimals_are_exact(fmt: accel.Format) -> None:
    for value in fmt.codes()[:: 1 + (fmt.bits > 8) * 97].tolist():
        if math.isfinite(value):
            assert np.float32(decimal(value)) == value
            assert math.copysign(1, float(decimal(value))) == math.copysign(1, value)


# --- as pages -------------------------------------------------------------------------------------------------------


def test_page_of_e4m3fn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = page(accel.format("e4m3fn"), capsys)
    assert lines[0] == "e4m3fn: 8 bits, s eeee mmm"
    assert said(lines, "value") == "(-1)^s 2^(e - 7) (1 + m / 8); where e = 0: (-1)^s 2^-6 m / 8"
    assert said(lines, "policy").startswith("fn: no infinity; NaN is the last code of either sign")
    assert said(lines, "largest").split() == ["448", "1.75", "*", "2^8", "0x7e"]
    assert said(lines, "lowest").split() == ["-448", "-1.75", "*", "2^8", "0xfe"]
    assert said(lines, "smallest normal").split() == ["0.015625", "2^-6", "0x08"]
    assert said(lines, "smallest ").split() == ["0.001953125", "2^-9", "0x01", "subnormal"]
    assert said(lines, "zero") == "0x00, and -0 0x80"
    assert said(lines, "infinity") == "none"
    assert said(lines, "NaN") == "0x7f, 0xff"
    assert said(lines, "finite numbers") == "253 (0 and -0 counted once)"
    assert said(lines, "dynamic range") == "17.8 binades, 107.2 dB: largest over smallest"
    table = [line for line in lines if line.startswith("0x")]
    cells = [cell for line in table for cell in line.split("0x") if cell]
    assert sorted(int(cell[:2], 16) for cell in cells) == list(range(256))
    assert [cell.split() for cell in cells if cell.startswith("7f")] == [["7f", "0", "1111", "111", "NaN"]]
    assert [cell.split() for cell in cells if cell.startswith("a9")] == [["a9", "1", "0101", "001", "-0.28125"]]
    assert max(map(len, lines)) <= 100
    assert "Around zero, to scale, up to 2^-4" in lines


@pytest.mark.parametrize(
    ("spec", "label", "text"),
    [
        ("e5m2", "NaN", "0x7d-0x7f, 0xfd-0xff; the canonical one is 0x7e"),
        ("e5m2", "infinity", "0x7c, and -infinity 0xfc"),
        ("e4m3fnuz", "zero", "0x00"),
        ("binary8p1", "value", "(-1)^s 2^(e - 64); where e = 0: 0"),
        ({"base": "e5m2", "subnormals": False}, "value", "(-1)^s 2^(e - 15) (1 + m / 4); where e = 0: 0"),
        ("e8m0fnu", "value", "2^(e - 127)"),
        ("e8m0fnu", "zero", "none"),
        ("int8", "value", "2^0 times the code as an integer in two's complement"),
        ("int8", "lowest", "-128  -128 * 2^0  0x80"),
        ("uint8", "value", "2^0 times the code as an integer"),
        ("e0m3", "value", "(-1)^s 2^-3 m"),
        ({"base": "e4m3fn", "alpha_codes": True}, "NaN", "none"),
        (
            {"base": "e4m3fn", "alpha_codes": True},
            "alpha",
            "0x7f, and -alpha 0xff: a float32 number that is kept beside the tensor",
        ),
        ({"base": "e4m3", "bias": -3}, "value", "(-1)^s 2^(e + 3) (1 + m / 8); where e = 0: (-1)^s 2^4 m / 8"),
    ],
)
def test_lines_of_a_page(spec: Any, label: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(page(accel.format(spec), capsys), label) == text


def test_page_of_nvfp4(capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(accel.format("nvfp4"), capsys)
    assert lines[0] == "nvfp4: blocks of e2m1 that share a scale e4m3fn"
    assert said(lines, "bits per element") == "4.5 = 4 + 8 / 16"
    assert said(lines, "value") == "s t Q(x / (s t)), Q rounding into e2m1"
    assert said(lines, "scale rule") == "amax: s = amax / 6 / t rounded into e4m3fn, at least 0.015625"
    assert said(lines, "tensor scale") == "t = amax(x) / (6 * 448), a float32 number"
    assert said(lines, "magnitudes") == "from 2^-7 t to 1.3125 * 2^11 t, and 0"  # 0.5 * 2^-6; 6 * 448 = 2688
    assert "e2m1: 4 bits, s ee m" in lines


def test_page_of_mxfp4(capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(accel.format("mxfp4"), capsys)
    assert said(lines, "scale ") == "e8m0fnu, 8 bits: from 2^-127 to 2^127"
    assert said(lines, "block") == "32 elements along a layer's channels (of a bare tensor: the last axis)"
    assert said(lines, "padding") == "short: a last block that is not full holds fewer elements"
    assert said(lines, "magnitudes") == "from 2^-128 to 1.5 * 2^129, beyond float32, and 0"


@pytest.mark.parametrize("fmt", [*accel.formats(), *ALL], ids=lambda fmt: fmt.name)
def test_every_page_is_printed(fmt: accel.Format | accel.BlockFormat, capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(fmt, capsys)
    assert lines[0].startswith(f"{fmt.name}: ")
    assert "\x1b" not in "".join(lines)


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    print_list()
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "e4m3fn 8 s eeee mmm 7 fn 448 0.015625 0.001953125 0.125 NaN -0" in rows
    assert "int8 8 s mmmmmmm -6 integer 127 - 1 1 -" in rows
    assert "nvfp4 4.5 e2m1 e4m3fn 16 amax channels float32" in rows
    assert "mxfp4 4.25 e2m1 e8m0fnu 32 floor channels -" in rows


def test_ascii_where_the_terminal_has_no_unicode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console.Console.encoding", "ascii")
    assert "".join(page(accel.format("e2m1"), capsys)).isascii()
