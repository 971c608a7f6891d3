"""Figure 3 of the source: the float for a tensor whose magnitudes are lognormal, and for one that is normal.

    fig3a  the error of a float of 8 bits against its exponent bits: formula, simulation, real formats
    fig3b  the best exponent bits against the width of a lognormal, for floats of 3 to 8 bits
    fig3c  the same against the standard deviation of a normal

All are from fpsim.float_choice, which says what the error and the floats are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from fpsim.arguments import Floats
from fpsim.figures.figure import Figure, Measured
from fpsim.float_choice import (
    Distribution,
    Lognormal,
    Normal,
    best_exponent_bits_of,
    closed_form_error,
    errors_of,
    grid_error,
    model_float,
    model_grid,
)
from fpsim.pictures import COLORS

BITS_3A = 8
SIGMAS_3A = (1.0, 2.0, 4.0)
SAMPLES = 1_000_000
SEED = 0
BITS_3B = (3, 4, 5, 6, 7, 8)
SIGMAS_3B = np.arange(25, 1201) / 100
BITS_3C = (4, 6, 8)
LOG2_SIGMAS_3C = np.arange(-64, 65) / 4
# model: its meaning, how its line is drawn
MODELS: dict[str, tuple[str, Literal["--", "-"]]] = {
    "closed_form": ("formula (7), the source's float without a scale", "--"),
    "numeric": ("real formats, at the best power-of-two scale", "-"),
}
SPREAD = "the standard deviation of log2|x|"


def measure_3a() -> Measured:
    """Rows: sigma_log2, exponent_bits and the mean relative errors; standard_error is the simulation's."""
    logs = np.random.default_rng(SEED).standard_normal(SAMPLES)
    rows: list[dict[str, Any]] = []
    for sigma in SIGMAS_3A:
        x = np.exp2(sigma * logs)
        real = errors_of(Lognormal(sigma), BITS_3A)
        for exponent_bits in range(1, BITS_3A):
            mantissa_bits = BITS_3A - 1 - exponent_bits
            errors = np.abs(model_float(x, exponent_bits, mantissa_bits) - x) / x
            rows.append(
                {
                    "sigma_log2": sigma,
                    "exponent_bits": exponent_bits,
                    "mantissa_bits": mantissa_bits,
                    "formula": float(closed_form_error(exponent_bits, mantissa_bits, Lognormal(sigma))),
                    "exact": float(grid_error(model_grid(exponent_bits, mantissa_bits), Lognormal(sigma))),
                    "simulated": float(errors.mean()),
                    "standard_error": float(errors.std() / np.sqrt(SAMPLES)),
                    "real_format": float(real[exponent_bits - 1]),
                }
            )
    worst = {
        f"mantissa_bits {least}": max(
            abs(row["formula"] - row["simulated"]) for row in rows if least <= row["mantissa_bits"]
        )
        for least in (0, 1)
    }
    return Measured(rows, {"samples": SAMPLES, "seed": SEED, "largest |formula - simulated| from": worst})


def draw_3a(canvas: Canvas, measured: Measured) -> None:
    canvas.suptitle(
        f"Which float of {BITS_3A} bits? Mean relative error of rounding a lognormal tensor, by exponent bits\n"
        "few: too narrow a range, elements underflow and overflow; many: too few mantissa bits",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    axes = canvas.add_subplot()
    for sigma, color in zip(SIGMAS_3A, COLORS, strict=False):
        shown = [row for row in measured.rows if row["sigma_log2"] == sigma]
        at = [row["exponent_bits"] for row in shown]
        axes.plot(at, [row["formula"] for row in shown], color=color, linestyle="--", linewidth=1.2)
        axes.plot(at, [row["simulated"] for row in shown], color=color, linestyle="", marker="o", markersize=5)
        axes.plot(
            at, [row["real_format"] for row in shown], color=color, linewidth=1.2, marker="s", markersize=7,
            markerfacecolor="none",
        )  # fmt: skip
        axes.annotate(
            f"s = {sigma:g}", (1, shown[0]["real_format"]), xytext=(-8, 0), textcoords="offset points", color=color,
            ha="right", va="center",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"])
    axes.set_xticks(range(1, BITS_3A), [f"{e}\ne{e}m{BITS_3A - 1 - e}" for e in range(1, BITS_3A)])
    axes.set(xlim=(0.4, BITS_3A - 0.6), xlabel="exponent bits", ylabel="mean of |q - x| / |x| (log scale)")
    meanings = [
        Line2D([], [], color="black", linestyle="--", label="formula (7), the source's float"),
        Line2D([], [], color="black", linestyle="", marker="o", label=f"that float simulated, {SAMPLES:,} elements"),
        Line2D(
            [], [], color="black", marker="s", markersize=7, markerfacecolor="none",
            label="real format (subnormals), best power-of-two scale",
        ),
    ]  # fmt: skip
    axes.legend(handles=meanings, loc="upper right", title=f"colour: s, {SPREAD}", alignment="left")


def measure_3b() -> Measured:
    """Rows: for each number of bits and model, the width sigma_log2 from which on exponent_bits are the best."""
    return _measure_steps("sigma_log2", SIGMAS_3B, Lognormal(SIGMAS_3B), BITS_3B)


def draw_3b(canvas: Canvas, measured: Measured) -> None:
    canvas.suptitle(
        "The wider a lognormal tensor, the more exponent bits it wants\n"
        f"the split with the least mean relative error, against s, {SPREAD}",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    for position, bits in enumerate(BITS_3B):
        axes = canvas.add_subplot(2, 3, position + 1)
        for number, model in enumerate(MODELS):
            _draw_steps(axes, measured, bits, model, "sigma_log2", number)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlim=(measured.rows[0]["sigma_log2"], measured.results["to sigma_log2"]))
        _name_panel(axes, bits, BITS_3B[-1], is_left=position % 3 == 0)
        if position >= 3:
            axes.set_xlabel("s (log scale)")
    _draw_legend(canvas)


def measure_3c() -> Measured:
    """Rows: the same against log2_sigma, sigma the standard deviation of a normal."""
    return _measure_steps("log2_sigma", LOG2_SIGMAS_3C, Normal(np.exp2(LOG2_SIGMAS_3C)), BITS_3C)


def draw_3c(canvas: Canvas, measured: Measured) -> None:
    canvas.suptitle(
        "If the tensor were normal: without a scale, the larger, the FEWER exponent bits (6 and 8 bits), up to 1 to 4\n"
        "with a scale its size does not matter at all: log2|x| spreads by 1.60 in every normal",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    left, right = measured.rows[0]["log2_sigma"], measured.results["to log2_sigma"]
    for position, bits in enumerate(BITS_3C):
        axes = canvas.add_subplot(1, len(BITS_3C), position + 1)
        axes.axvspan(left, 0, color="#fde68a", alpha=0.35, linewidth=0, zorder=0)
        _draw_steps(axes, measured, bits, "closed_form", "log2_sigma", 0)
        real = {row["exponent_bits"] for row in _rows_of(measured, bits, "numeric")}
        axes.hlines(sorted(real), left, right, color=COLORS[1], linewidth=1.8)
        if len(real) > 1:
            axes.axhspan(min(real), max(real), color=COLORS[1], alpha=0.25, linewidth=0)
            axes.annotate(
                f"{min(real)} or {max(real)}: where it lies\nbetween two powers of two", (right, max(real)),
                xytext=(-4, 8), textcoords="offset points", ha="right", color=COLORS[1], fontsize=9,
            )  # fmt: skip
        axes.set(xlim=(left, right))
        axes.set_xticks([-12, -6, 0, 6, 12], ["2^-12", "2^-6", "1", "2^6", "2^12"])
        _name_panel(axes, bits, BITS_3C[-1], is_left=position == 0)
        axes.set_xlabel("standard deviation of x (log scale)", fontsize=9)
        if position == 0:
            axes.annotate(
                "neural gradients\nare small: here", (left, 7.4), xytext=(4, 0), textcoords="offset points", va="top",
                fontsize=9, color="#92400e",
            )  # fmt: skip
    _draw_legend(canvas)


def _measure_steps(key: str, values: Floats, distribution: Distribution, widths: Sequence[int]) -> Measured:
    """One row for each change of the best exponent bits along `values`, the first value included."""
    rows = []
    for bits in widths:
        for model in MODELS:
            best = best_exponent_bits_of(distribution, bits, model)
            first = np.flatnonzero(np.diff(best, prepend=-1))
            rows += [
                {"bits": bits, "model": model, key: float(values[i]), "exponent_bits": int(best[i])} for i in first
            ]
    return Measured(rows, {f"to {key}": float(values[-1]), f"step of {key}": float(values[1] - values[0])})


def _rows_of(measured: Measured, bits: int, model: str) -> list[dict[str, Any]]:
    return [row for row in measured.rows if row["bits"] == bits and row["model"] == model]


def _draw_steps(axes: Axes, measured: Measured, bits: int, model: str, key: str, number: int) -> None:
    shown = _rows_of(measured, bits, model)
    shown = [*shown, {**shown[-1], key: measured.results[f"to {key}"]}]
    axes.step(
        [row[key] for row in shown], [row["exponent_bits"] + 0.06 * (0.5 - number) for row in shown], where="post",
        color=COLORS[number], linestyle=MODELS[model][1], linewidth=1.8,
    )  # fmt: skip


def _name_panel(axes: Axes, bits: int, most: int, is_left: bool) -> None:
    axes.set_title(f"{bits} bits, one of them the sign", loc="left", fontsize=10)
    axes.set(ylim=(0.5, most - 0.5))
    axes.set_yticks(range(1, most))
    if is_left:
        axes.set_ylabel("best exponent bits")


def _draw_legend(canvas: Canvas) -> None:
    lines = [
        Line2D([], [], color=COLORS[number], linestyle=dashes, linewidth=1.8, label=label)
        for number, (label, dashes) in enumerate(MODELS.values())
    ]
    canvas.legend(handles=lines, loc="outside lower left", ncols=2)


FIGURES = (
    Figure("fig3a", "Mean relative error of 8-bit floats against their exponent bits", measure_3a, draw_3a),
    Figure("fig3b", "Best exponent bits of a lognormal against its width", measure_3b, draw_3b, (9.0, 5.6)),
    Figure("fig3c", "Best exponent bits of a normal against its width", measure_3c, draw_3c, (9.0, 3.9)),
)
