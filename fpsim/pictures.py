"""Pictures by matplotlib, as files: the same bytes for the same drawing, text kept as text."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe-Ito
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fpsim",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "axes.edgecolor": "#8a929b",
    "legend.frameon": False,
}
WIDTH_INCHES = 9.0


def picture(
    draw: Callable[[Figure], Any], kind: str, size_inches: tuple[float, float] | None = None, salt: str = "fpsim"
) -> bytes:
    """What `draw` draws on a canvas, as `png`, `svg` or `pdf`: the same bytes for the same drawing.

    salt: of the ids in an SVG, to be different in pictures of one page.
    """
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}[kind]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        canvas = Figure(figsize=size_inches, layout="constrained")
        draw(canvas)
        stream = BytesIO()
        canvas.savefig(stream, format=kind, dpi=110, metadata=metadata)
    return stream.getvalue()
