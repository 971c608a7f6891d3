"""Draws where the numbers of a scalar format lie: to scale around zero, and all of them by their logarithm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.text import Text

from accel import Format

MOST_DRAWN = 512  # numbers of a binade: more would lie closer than a line can show
NARROWEST = 24  # characters
COLORS = {False: "yellow", True: "cyan"}  # of short and tall marks
TALL, SHORT = (0x47, 0xB8), (0x44, 0xA0)  # dots of a Braille character: the left and the right column


class Binade(NamedTuple):
    """The positive numbers of a format from 2^exponent to below 2^(exponent + 1), 2^exponent / spaces apart."""

    exponent: int
    spaces: int
    numbers: int
    is_subnormal: bool


def binades(fmt: Format) -> list[Binade]:
    """The binades of a format, from that of its smallest number to that of its largest."""
    smallest = math.frexp(fmt.min_subnormal)[1] - 1
    found = []
    for exponent in range(smallest, fmt.max_exponent + 1):
        spaces = 1 << (min(exponent - smallest, fmt.mantissa_bits) if fmt.subnormals else fmt.mantissa_bits)
        numbers = min(spaces, int((math.ldexp(fmt.max, -exponent) - 1) * spaces) + 1)
        found.append(Binade(exponent, spaces, numbers, fmt.exponent_bits > 0 and exponent < fmt.min_exponent))
    return found


def number_line(fmt: Format, width: int, unicode: bool = True) -> list[Text]:
    """Lines of text, at most `width` characters wide, that draw a format and say what the marks mean.

    unicode: with Braille characters, which hold two marks side by side; else in ASCII.
    """
    width = max(width, NARROWEST)
    return [*_to_scale(fmt, width, unicode), Text(), *_by_logarithm(fmt, width, unicode), Text(), _legend(fmt, unicode)]


def _to_scale(fmt: Format, width: int, unicode: bool) -> list[Text]:
    """All numbers where there is room for them, else those around zero."""
    per_cell = 2 if unicode else 1
    centre = (width - 1) // 2 if fmt.signed else 0
    room = (centre or width - 1) * per_cell
    unit = math.ldexp(1.0, fmt.min_exponent - fmt.mantissa_bits)
    farthest = reach = max(fmt.max, -fmt.min)
    if 2 * reach > room * unit:
        reach = min(farthest, 4 * fmt.min_normal)
    if 2 * reach > room * unit and fmt.subnormals:
        reach = unit * 2 ** int(math.log2(room / 2))
    dots_per_unit = room * unit / reach
    dots_per_unit = int(dots_per_unit) if dots_per_unit > 1 else dots_per_unit

    def dot(value: float) -> int:
        return centre * per_cell + round(value / unit * dots_per_unit)

    marks = {dot(0.0): fmt.exponent_bits == 0} if fmt.has_zero else {}
    for value, is_tall in _drawn(fmt):
        if value <= reach:
            marks |= dict.fromkeys([dot(value), dot(-value)] if fmt.signed else [dot(value)], is_tall)
    if -reach <= fmt.min < -fmt.max:
        marks[dot(fmt.min)] = True
    powers = (2.0**exponent for exponent in range(math.frexp(reach)[1] - 1, binades(fmt)[0].exponent - 1, -1))
    ticked = [0.0, *(sign * value for value in (reach, *powers) for sign in ((1, -1) if fmt.signed else (1,)))]
    ticks = [(dot(value) // per_cell, _label(value)) for value in ticked]
    caption = "All numbers, to scale" if reach == farthest else f"Around zero, to scale, up to {_label(reach)}"
    return [Text(caption, "bold"), _row(marks, per_cell), *_axis(ticks, width, unicode)]


def _by_logarithm(fmt: Format, width: int, unicode: bool) -> list[Text]:
    """The positive numbers; binades are equally wide, or several of them share a character."""
    per_cell = 2 if unicode else 1
    found = binades(fmt)
    first = found[0].exponent
    cells, group = max(1, width // len(found)), -(-len(found) // width)  # characters a binade, binades a character
    marks: dict[int, bool] = {}
    for value, is_tall in _drawn(fmt):
        dot = int((math.log2(value) - first) * cells * per_cell / group + 1e-9)
        marks[dot] = marks.get(dot, False) or is_tall
    every = next(2**i for i in range(10) if 2**i * cells / group >= len("2^-149 "))
    places = [((b.exponent - first) * cells // group, f"2^{b.exponent}") for b in found if b.exponent % every == 0]
    caption = "All positive numbers, by logarithm"
    lines = [_row(marks, per_cell), *_axis(places, -(-len(found) * cells // group), unicode, centred=False)]
    if cells > len(str(max(binade.numbers for binade in found))):
        caption += ", with how many lie in each binade"
        lines.append(Text("".join(str(binade.numbers).ljust(cells) for binade in found).rstrip()))
    return [Text(caption, "bold"), *lines]


def _drawn(fmt: Format) -> Iterator[tuple[float, bool]]:
    """The positive numbers, thinned out where they are dense, and whether their mark is tall."""
    for binade in binades(fmt):
        every = max(1, binade.spaces // MOST_DRAWN)
        for i in range(0, binade.numbers, every):
            yield math.ldexp(1 + i / binade.spaces, binade.exponent), not binade.is_subnormal


def _row(marks: dict[int, bool], per_cell: int) -> Text:
    row = Text()
    for cell in range(max(marks) // per_cell + 1):
        here = [(side, marks[cell * per_cell + side]) for side in range(per_cell) if cell * per_cell + side in marks]
        is_tall = any(tall for _, tall in here)
        if not here:
            row.append(" ")
        elif per_cell == 1:
            row.append("|" if is_tall else ".", COLORS[is_tall])
        else:
            dots = sum((TALL if tall else SHORT)[side] for side, tall in here)
            row.append(chr(0x2800 + dots), COLORS[is_tall])
    return row


def _axis(ticks: Iterable[tuple[int, str]], width: int, unicode: bool, centred: bool = True) -> list[Text]:
    """A line with ticks, and their labels below; a tick whose label would touch an earlier one's is left out."""
    line, labels = ["─" if unicode else "-"] * width, [" "] * width
    for cell, label in ticks:
        start = min(max(cell - len(label) // 2, 0), width - len(label)) if centred else cell
        end = start + len(label)
        if end <= width and not "".join(labels[max(start - 1, 0) : end + 1]).strip():
            labels[start:end] = label
            line[cell] = "┴" if unicode else "+"
    return [Text("".join(line), "dim"), Text("".join(labels).rstrip(), "dim")]


def _label(value: float) -> str:
    mantissa, exponent = math.frexp(abs(value))
    if mantissa == 0.5 and not -2 <= exponent <= 14:
        return f"{'-' if value < 0 else ''}2^{exponent - 1}"
    return f"{value:g}"


def _legend(fmt: Format, unicode: bool) -> Text:
    tall, short = ("⡇", "⡄") if unicode else ("|", ".")
    legend = Text.assemble((tall, COLORS[True]), " number" if fmt.exponent_bits == 0 else " normal")
    names = ["subnormal"] * any(binade.is_subnormal for binade in binades(fmt)) + ["zero"] * fmt.has_zero
    if fmt.exponent_bits > 0 and names:
        legend += Text.assemble("   ", (short, COLORS[False]), f" {' or '.join(names)}")
    return legend + Text("   (each at least one; a binade: 2^k to 2^(k + 1))")
