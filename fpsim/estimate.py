"""`fpsim estimate`: what a run's training step, and the whole training, cost on described machines.

    estimate.json    everything, by machine (see `accel.machine.Estimate`)
    estimate.csv     a row for each machine, layer, pass and scheme
    roofline.*       each layer and pass against its machine's peak rate and main memory, as PNG and SVG
    costs.*          time by what binds it, and energy by where it goes, of each machine and scheme

Nothing is trained: the ledger of the run says what was stored, moved and multiplied.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from accel.machine import Estimate, Row, compare
from fpsim.config import load_config
from fpsim.console import print_table
from fpsim.errors import ConfigError, Problem
from fpsim.files import write_bytes, write_json, write_text
from fpsim.machine_costs import machines_named
from fpsim.pictures import COLORS, picture
from fpsim.report.results import load_results
from fpsim.run_directory import CONFIG_FILE, RESULTS_FILE, ledger_of, run_folder

SCHEME_COLORS = dict(zip(("encoded", "fp32", "bf16"), COLORS, strict=False))
KIND_COLORS = {
    "array": COLORS[0], "memory at the array": COLORS[2], "memories between": COLORS[3], "main memory": COLORS[1],
    "codec": COLORS[4],
}  # fmt: skip
PASS_MARKERS = {"forward": "o", "dgrad": "s", "wgrad": "^"}


@dataclass(frozen=True)
class Estimated:
    """A run on several machines. steps: of the whole training, None while it is not finished."""

    run: Path
    steps: int | None
    estimates: list[Estimate]


def estimate(run_dir: str | Path, machines: list[str]) -> Estimated:
    """The run on the machines of accelerator files, by name or path; none: on that of its own configuration.

    Raises ConfigError for a place without a run, a file without a machine, a run without products, and a format that a
    machine does not take; RunError for a damaged ledger.
    """
    folder = run_folder(run_dir)
    config = load_config(folder / CONFIG_FILE)
    described = machines_named(machines)
    if not machines:
        own = None if config.emulation is None else config.emulation.machine
        if own is None:
            raise ConfigError([Problem("--machine", "is needed: the run's configuration describes no machine")])
        described = [own]
    ledger = ledger_of(folder)
    try:
        estimates = [machine.estimate(ledger) for machine in described]
    except ValueError as error:
        raise ConfigError([Problem("", str(error), str(folder))]) from None
    steps = load_results(folder)["steps"] if (folder / RESULTS_FILE).is_file() else None
    return Estimated(folder, steps, estimates)


# --- tables -----------------------------------------------------------------------------------------------------------


def show(estimated: Estimated) -> None:
    """Print the comparison of the machines, and a table of layers for each."""
    header = [
        "machine", "scheme", "ms a step", "mJ a step", "main memory MB", "x time", "x energy", "x traffic", "bound by",
    ]  # fmt: skip
    print_table(header, [_comparison(row, estimated) for row in compare(estimated.estimates)])
    print("x: over those of the run, encoded; dense fp32 and bf16 run on the same machine")
    for one in estimated.estimates:
        print()
        _show_layers(one)
    if estimated.steps is not None:
        for one in estimated.estimates:
            whole = one.training(estimated.steps)
            parts = [f"{_duration(total.seconds)} and {total.joules:.3g} J {scheme}" for scheme, total in whole.items()]
            print(f"{one.machine.name}: the {estimated.steps:,} steps of the training: {', '.join(parts)}")


def _comparison(row: dict[str, Any], estimated: Estimated) -> list[str]:
    total = next(one for one in estimated.estimates if one.machine.name == row["machine"]).totals()[row["scheme"]]
    bound = max(total.cycles_by_bound, key=lambda part: total.cycles_by_bound[part])
    share = total.cycles_by_bound[bound] / total.cycles if total.cycles else 0.0
    return [
        row["machine"], row["scheme"], _figure(1e3 * row["seconds"]), _figure(1e3 * row["joules"]),
        _figure(row["main_memory_bytes"] / 1e6),
        *(f"{row[f'{what}_over_encoded']:.2f}" for what in ("time", "energy", "traffic")),
        f"{bound}, {100 * share:.0f} % of the time",
    ]  # fmt: skip


def _show_layers(one: Estimate) -> None:
    header = [
        "layer", "MMAC", "effectual %", "us", "bound by", "utilisation %", "main memory kB", "uJ",
        *(f"x time {scheme}" for scheme in one.schemes[1:]),
    ]  # fmt: skip
    layers: dict[str, list[Row]] = defaultdict(list)
    for row in one.rows:
        layers[row.layer].append(row)
    print(f"{one.machine.name}, by layer, all passes of a step (by pass: --output)")
    print_table(header, [[layer, *_layer(rows, one)] for layer, rows in layers.items()])
    for scheme, reason in one.absent.items():
        print(f"no {scheme}: {reason}")
    if one.uncounted:
        print(f"not counted, as they multiply in another way than is seen: {', '.join(one.uncounted)}")
    if one.unrecorded:
        print(f"multiplied on chip, as their tensors are not in the ledger: {', '.join(one.unrecorded)}")
    macs = one.mac_time()
    print(
        f"time of the array: {macs.speedup:.2f} times less by skipping; {100 * macs.gradient_sparsity:.1f} % of the "
        f"multiplications by dY are by zeros, which could win {macs.upper_bound:.2f} times at most "
        f"({macs.machine_bound:.2f} on this array)"
    )


def _layer(rows: list[Row], one: Estimate) -> list[str]:
    costs = [row.costs["encoded"] for row in rows]
    bound: dict[str, float] = defaultdict(float)
    for cost in costs:
        bound[cost.binds] += cost.cycles
    cycles, macs = sum(cost.cycles for cost in costs), sum(row.macs for row in rows)
    busy = sum(cost.cycles_by_part["compute"] for cost in costs)
    main = one.machine.levels[-1].name
    others = (sum(row.costs[scheme].cycles for row in rows) / cycles if cycles else 1.0 for scheme in one.schemes[1:])
    ideal = sum(cost.ideal_compute_cycles for cost in costs)
    return [
        f"{macs / 1e6:.2f}" if macs else "",
        f"{100 * sum(row.effectual_macs for row in rows) / macs:.1f}" if macs else "",
        _figure(cycles / one.machine.clock_mhz),
        max(bound, key=lambda part: bound[part]),
        f"{100 * ideal / busy:.0f}" if busy else "",
        _figure(sum(cost.bytes_by_level[main] for cost in costs) / 1e3),
        _figure(sum(sum(cost.pj_by_part.values()) for cost in costs) / 1e6),
        *(f"{ratio:.2f}" for ratio in others),
    ]


def _figure(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def to_data(estimated: Estimated) -> dict[str, Any]:
    """Everything, as plain data."""
    return {
        "run": str(estimated.run),
        "steps": estimated.steps,
        "comparison": compare(estimated.estimates),
        "machines": [one.to_data() for one in estimated.estimates],
        "training": [
            {"machine": one.machine.name, "scheme": scheme, "seconds": total.seconds, "joules": total.joules}
            for one in estimated.estimates
            for scheme, total in (one.training(estimated.steps).items() if estimated.steps is not None else ())
        ],
    }


def rows(estimated: Estimated) -> list[dict[str, Any]]:
    """A row for each machine, layer, pass and scheme; level by level in columns of their own."""
    found = []
    for one in estimated.estimates:
        for row in one.rows:
            for scheme, cost in row.costs.items():
                found.append({
                    "machine": one.machine.name, "layer": row.layer, "pass": row.pass_name, "scheme": scheme,
                    "macs": row.macs, "effectual_macs": row.effectual_macs, "executed_macs": cost.executed_macs,
                    "cycles": cost.cycles, "seconds": cost.cycles / (one.machine.clock_mhz * 1e6),
                    "bound_by": cost.binds, "utilisation": cost.utilisation,
                    "pj": sum(cost.pj_by_part.values()),
                    **{f"cycles_{part}": cycles for part, cycles in cost.cycles_by_part.items()},
                    **{f"bytes_{level}": moved for level, moved in cost.bytes_by_level.items()},
                    **{f"pj_{part}": energy for part, energy in cost.pj_by_part.items()},
                })  # fmt: skip
    return found


def write(estimated: Estimated, folder: Path) -> list[Path]:
    """Write the files (see above): their paths. Raises ConfigError where they cannot be written."""
    table = rows(estimated)
    stream = io.StringIO()
    columns = dict.fromkeys(key for row in table for key in row)
    writer = csv.DictWriter(stream, fieldnames=list(columns), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(table)
    paths = [folder / "estimate.json", folder / "estimate.csv"]
    panels = len(estimated.estimates)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(paths[0], to_data(estimated))
        write_text(paths[1], stream.getvalue())
        for kind in ("png", "svg"):
            paths += [folder / f"roofline.{kind}", folder / f"costs.{kind}"]
            size = 9.5, 0.6 + 3.6 * -(-panels // 2)
            write_bytes(paths[-2], picture(lambda canvas: draw_roofline(canvas, estimated), kind, size))
            write_bytes(paths[-1], picture(lambda canvas: draw_costs(canvas, estimated), kind, (9.5, 2 + 0.9 * panels)))
    except OSError as error:
        raise ConfigError([Problem("--output", f"cannot be written: {error.strerror}", str(folder))]) from error
    return paths


# --- plots ------------------------------------------------------------------------------------------------------------


def draw_roofline(canvas: Figure, estimated: Estimated) -> None:
    """A panel a machine: what each layer and pass attains, under what its main memory and its array allow."""
    columns = min(2, len(estimated.estimates))
    panels = canvas.subplots(-(-len(estimated.estimates) // columns), columns, squeeze=False).flat
    for axes, one in zip(panels, estimated.estimates, strict=False):
        _draw_machine(axes, one)
    for axes in list(panels)[len(estimated.estimates) :]:
        axes.set_axis_off()
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, ncols=6, loc="outside lower left", fontsize=9)
    canvas.suptitle("Layers and passes of a training step, under the roofs of their machine", x=0.01, ha="left")


def _draw_machine(axes: Axes, one: Estimate) -> None:
    main, hertz = one.machine.levels[-1], one.machine.clock_mhz * 1e6
    points = {scheme: one.roofline(scheme) for scheme in one.schemes}
    axes.set_title(one.machine.name, fontsize=10)
    intensities = [point.macs_per_byte for shown in points.values() for point in shown]
    if not intensities:
        axes.text(0.5, 0.5, "nothing is multiplied from main memory", ha="center", transform=axes.transAxes)
        return
    low, high = 0.5 * min(intensities), 2 * max(intensities)
    for scheme, shown in points.items():
        color = SCHEME_COLORS[scheme]
        for peak in {point.peak_macs_per_second for point in shown}:
            knee = peak / (main.bytes_per_cycle * hertz)
            edges = sorted({low, max(low, min(knee, high)), high})
            roof = [min(peak, edge * main.bytes_per_cycle * hertz) for edge in edges]
            axes.plot(edges, roof, color=color, linewidth=1, alpha=0.7)
        for name, marker in PASS_MARKERS.items():
            some = [point for point in shown if point.pass_name == name]
            axes.plot(
                [point.macs_per_byte for point in some], [point.attained_macs_per_second for point in some],
                marker, color=color, markersize=4, alpha=0.7, label=f"{scheme}, {name}",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=f"MACs per byte of {main.name}", ylabel="MACs a second")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_costs(canvas: Figure, estimated: Estimated) -> None:
    """Bars of a step's time by what binds it and of its energy by where it goes, over those of fp32, or of encoded
    where the machine has none."""
    left, right = canvas.subplots(1, 2, sharey=True)
    names: list[str] = []
    for one in estimated.estimates:
        kinds, totals = _kinds(one), one.totals()
        base = totals.get("fp32", totals["encoded"])
        for scheme, total in totals.items():
            for axes, shares, whole in (
                (left, total.cycles_by_bound, base.cycles),
                (right, total.pj_by_part, base.joules * 1e12),
            ):
                begin = 0.0
                for part in (key for key in kinds if key in shares):
                    share = shares[part] / whole
                    axes.barh(len(names), share, left=begin, color=KIND_COLORS[kinds[part]], height=0.7)
                    begin += share
                axes.text(begin, len(names), f" {begin:.3g}", va="center", fontsize=8)
            names.append(f"{one.machine.name}, {scheme}")
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set_xlabel("time of a step, by what binds it; dense fp32 = 1")
    right.set_xlabel("energy of a step, by where it goes; dense fp32 = 1")
    for axes in (left, right):
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
    handles = [Patch(color=color, label=kind) for kind, color in KIND_COLORS.items()]
    canvas.legend(handles=handles, ncols=len(handles), loc="outside lower left", fontsize=9)
    canvas.suptitle("What a training step takes", x=0.01, ha="left")


def _kinds(one: Estimate) -> dict[str, str]:
    """What each part that may bind, or takes energy, is, the array first."""
    inner, *between, main = (level.name for level in one.machine.levels)
    levels = {inner: "memory at the array"} | dict.fromkeys(between, "memories between") | {main: "main memory"}
    return {"compute": "array", "mac": "array", **levels, "codec": "codec"}
