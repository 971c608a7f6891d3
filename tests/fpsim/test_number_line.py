from __future__ import annotations

import math

import numpy as np
import pytest

import accel
from fpsim.number_line import binades, number_line

SCALARS = [fmt for fmt in accel.formats() if isinstance(fmt, accel.Format)]
EXTRA = [
    {"base": "e4m3fn", "subnormals": False},
    {"base": "e5m2", "alpha_codes": True},
    {"exponent_bits": 1, "mantissa_bits": 0, "policy": "finite"},
    {"exponent_bits": 1, "mantissa_bits": 1},
    {"exponent_bits": 4, "mantissa_bits": 4, "signed": False},
    "e0m1",
    "e0m7",
    "e1m6",
    "e7m0",
    "int24",
    "ufixed<6,9>",
]
ALL = [*SCALARS, *(accel.format(spec) for spec in EXTRA)]


def scalar(spec: str | dict[str, object]) -> accel.Format:
    fmt = accel.format(spec)
    assert isinstance(fmt, accel.Format)
    return fmt


def lines(spec: str | dict[str, object], width: int, unicode: bool = False) -> list[str]:
    return [line.plain for line in number_line(scalar(spec), width, unicode)]


@pytest.mark.parametrize("fmt", [fmt for fmt in ALL if fmt.bits <= 16], ids=lambda fmt: fmt.name)
def test_binades_hold_the_positive_numbers_of_the_table(fmt: accel.Format) -> None:
    values = fmt.codes()
    positive = values[np.isfinite(values) & (values > 0)].astype(np.float64)
    exponents = np.frexp(positive)[1] - 1
    found = binades(fmt)
    assert {b.exponent: b.numbers for b in found if b.numbers} == {
        int(e): int(n) for e, n in zip(*np.unique(exponents, return_counts=True), strict=True)
    }
    assert [b.exponent for b in found] == list(range(exponents.min(), exponents.max() + 1))
    for binade in found:
        is_subnormal = fmt.exponent_bits > 0 and math.ldexp(1.0, binade.exponent) < fmt.min_normal
        assert binade.is_subnormal == is_subnormal


def test_binades_of_a_wide_format() -> None:
    found = binades(scalar("fp32"))
    assert [found[i].numbers for i in (0, 1, 22, 23, -1)] == [1, 2, 1 << 22, 1 << 23, 1 << 23]
    assert [found[i].exponent for i in (0, 22, 23, -1)] == [-149, -127, -126, 127]
    assert [binade.is_subnormal for binade in (found[22], found[23])] == [True, False]


def test_all_numbers_of_e2m1_to_scale() -> None:
    """61 characters: zero in the middle, 30 on either side, two for a step of 0.5."""
    caption, marks, axis, labels = lines("e2m1", 61)[:4]
    assert caption == "All numbers, to scale"
    assert {i: mark for i, mark in enumerate(marks) if mark != " "} == {
        30 + sign * int(4 * value): "." if value < 1 else "|"
        for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)
        for sign in (1, -1)
    }
    ticks = [i for i, mark in enumerate(axis) if mark == "+"]
    assert [(i - 30) / 4 for i in ticks] == [-6, -4, -2, -1, 0, 1, 2, 4, 6]
    assert labels.split() == ["-6", "-4", "-2", "-1", "0", "1", "2", "4", "6"]


def test_two_marks_share_a_character() -> None:
    """61 characters: 60 half characters on either side, 5 for a step of 0.5; the right half of 30 is 0.1."""
    marks = lines("e2m1", 61, unicode=True)[1]
    steps = [0, 1, 2, 3, 4, 6, 8, 12]
    dots = sorted({60 + sign * 5 * step for step in steps for sign in (1, -1)})
    expected = dict.fromkeys(range(61), 0x2800)
    for dot in dots:
        is_short = abs(dot - 60) < 10
        expected[dot // 2] += ((0x44 if is_short else 0x47), (0xA0 if is_short else 0xB8))[dot % 2]
    assert marks == "".join(chr(cell) if cell > 0x2800 else " " for cell in expected.values()).rstrip()


def test_e4m3fn_around_zero_and_by_logarithm() -> None:
    found = lines("e4m3fn", 18 * 8)
    assert found[0] == "Around zero, to scale, up to 2^-4"  # 4 times the smallest normal number, 2^-6
    centre, unit = 71, 2  # 71 characters on either side, of which 32 steps of 2^-9 take two each
    steps = [*range(16), *range(16, 33, 2)]
    tall = {centre + sign * unit * step for step in steps if step >= 8 for sign in (1, -1)}
    short = {centre + sign * unit * step for step in steps if step < 8 for sign in (1, -1)}
    assert {i for i, mark in enumerate(found[1]) if mark == "|"} == tall
    assert {i for i, mark in enumerate(found[1]) if mark == "."} == short
    marks = found[6]
    numbers = [m / 8 * 2**-6 for m in range(1, 8)] + [2.0**e * (1 + m / 8) for e in range(-6, 9) for m in range(8)]
    places = {int((math.log2(number) + 9) * 8) for number in numbers if number <= 448}
    assert {i for i, mark in enumerate(marks) if mark != " "} == places
    assert marks.rindex(".") == int((math.log2(7 * 2**-9) + 9) * 8)
    assert found[9].split() == ["1", "2", "4", *["8"] * 14, "7"]
    assert found[8].split() == [f"2^{e}" for e in range(-9, 9)]


def test_the_gap_around_zero_without_subnormals() -> None:
    marks = lines({"base": "e4m3fn", "subnormals": False}, 144)[1]
    centre = 71
    assert marks[centre] == "."
    assert set(marks[centre + 1 : centre + 16]) == {" "}
    assert marks[centre + 16] == "|"


def test_twos_complement_reaches_one_step_lower() -> None:
    found = lines("int4", 33)
    assert found[0] == "All numbers, to scale"
    assert {i for i, mark in enumerate(found[1]) if mark == "|"} == {16 + 2 * i for i in range(-8, 8)}
    assert found[-1].startswith("| number   (")


def test_an_unsigned_format_without_zero() -> None:
    found = lines("e8m0fnu", 100)
    places = {i for i, mark in enumerate(found[1]) if mark == "|"}
    assert places == {24, 48, 96}  # 2^-127, 2^-126 and 2^-125
    assert "subnormal" not in found[-1]
    assert "zero" not in found[-1]


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
def test_every_format_is_drawn_within_any_width(fmt: accel.Format) -> None:
    for width in (1, 24, 41, 80, 100, 317):
        for unicode in (False, True):
            text = [line.plain for line in number_line(fmt, width, unicode)]
            drawings = [*text[1:4], *text[6 : text.index("", 6)]]
            assert all(0 < len(line) <= max(width, 24) for line in drawings)
            assert unicode or "".join(text).isascii()
