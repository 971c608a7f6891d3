"""Elementwise operations as multiples of copying the same tensor, which memory limits; peers in the same run.

An operation that fills an existing result is measured against `copy_`, one that returns a new tensor against `clone`.
Operation and copy share source and destination and alternate within each repeat.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from peers import Peer
from timing import (
    Call,
    Comparison,
    Times,
    alternate,
    compare,
    machine,
    print_lines,
    print_table,
    results_path,
    show_progress,
    write_json,
)

import accel
from accel import launch
from accel.block_formats import BlockFormat
from fpsim import lognormal

SEED = 1
LN_MEAN, LN_DEVIATION = -2.0, 1.5  # of |x|: neural gradients are close to lognormal; 7 % are subnormal in e4m3fn
SPARSITY = 0.8
ALPHA = float(lognormal.threshold(SPARSITY, LN_MEAN, LN_DEVIATION))
SCALE = 0.375

COLUMNS = 4096  # of the matrix that the operations read
CHANNELS, SIDE = 64, 32  # of the same elements as images
UNIT = COLUMNS * CHANNELS  # elements come in multiples of it: every shape fits, and every kernel runs on all threads
ELEMENTS = 1 << 24

REPEATS, QUICK_REPEATS = 15, 7
BUDGET_SECONDS = 3.0  # for the repeats of one comparison: slow peers get fewer
COLD_TARGET_SECONDS = 10.0
DISTURBED_PREEMPTIONS_PER_SECOND = 110  # seen on two cores: 15 to 90 alone, 130 to 230 beside one busy process

BLOCKS = ("mxfp8_e4m3fn", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4")


@dataclass(frozen=True)
class Operation:
    """A row. `fill` writes into an existing result (or returns no tensor), `make` returns a new one; None: it cannot.

    kernel: what it compiles, "" for nothing of its own. source, out: what is copied beside it. target: the largest
    ratio of `fill` to `copy_` allowed.
    """

    name: str
    kernel: str
    fill: Call | None
    make: Call | None
    source: torch.Tensor
    out: torch.Tensor
    target: float | None = None


def inputs(elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Source, of random sign and lognormal magnitude, and destination: float32, shape (elements / COLUMNS, COLUMNS)."""
    generator, shape = torch.Generator().manual_seed(SEED), (elements // COLUMNS, COLUMNS)
    source = torch.randn(shape, generator=generator).mul_(LN_DEVIATION).add_(LN_MEAN).exp_()
    source.mul_(torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1))
    return source, torch.zeros(shape)


def operations(x: torch.Tensor, out: torch.Tensor) -> list[Operation]:
    """Every operation of `accel` that is measured: those with a target, then by what they show."""
    codes = x.to(torch.float8_e4m3fn).view(torch.uint8)
    code_out = out.view(-1).view(torch.uint8)[: x.numel()].view(x.shape)
    x64, x16 = x.to(torch.float64), x.to(torch.bfloat16)
    images = out.view(-1, CHANNELS, SIDE, SIDE)
    channels_last, out_channels_last = (t.view(-1, SIDE, SIDE, CHANNELS).permute(0, 3, 1, 2) for t in (x, out))
    leaf = x.detach().requires_grad_()

    quantize = partial(rounded, accel.quantize)
    encode = partial(rounded, accel.encode, result=code_out)
    prune_quantize = partial(rounded, accel.prune_quantize, alpha=ALPHA)
    prune = partial(accel.prune, x, ALPHA)
    return [
        *(quantize(x, out, fmt, target=1.15) for fmt in ("e4m3fn", "e5m2", "bf16")),
        quantize(x, out, "e4m3fn", note=", scale given", target=1.15, scale=SCALE),
        *(quantize(x, out, fmt, rounding="stochastic", target=2.2) for fmt in ("e4m3fn", "e5m2")),
        Operation("prune", "prune", partial(prune, out=out), prune, x, out, 2.0),
        *(encode(x, out, fmt, target=1.1) for fmt in ("e4m3fn", "e5m2")),
        prune_quantize(x, out, "e5m2", target=2.2),
        prune_quantize(x, out, "e5m2", rounding="stochastic", target=2.2),
        *(quantize(x, out, fmt, target=2.0) for fmt in BLOCKS),
        Operation("log2_statistics", "log2_statistics", partial(accel.log2_statistics, x), None, x, out, 1.6),
        # other roundings, formats and scales
        *(quantize(x, out, "e4m3fn", rounding=other) for other in ("nearest_away", "toward_zero", "up", "down")),
        *(quantize(x, out, fmt) for fmt in ("int8", "e8m0fnu", "e8m3fnuz", "binary8p3", "bfp8")),
        quantize(x, out, "int8", rounding="stochastic"),
        *(quantize(x, out, fmt, rounding="stochastic") for fmt in BLOCKS),
        *(quantize(x, out, {"base": fmt, "axis": 0, "name": fmt}, note=", axis=0") for fmt in BLOCKS),
        quantize(
            x.view(CHANNELS, -1),
            out.view(CHANNELS, -1),
            "e4m3fn",
            note=", scale per channel",
            scale=scales(CHANNELS, 1),
        ),
        quantize(x, out, "e4m3fn", note=", scale per column", scale=scales(1, COLUMNS)),
        # other tensors
        quantize(x64, torch.empty_like(x64), "e4m3fn", note=", float64"),
        quantize(x16, torch.empty_like(x16), "e4m3fn", note=", bfloat16"),
        quantize(channels_last, out_channels_last, "e4m3fn", note=", channels_last"),
        quantize(channels_last, out_channels_last, "e4m3fn", rounding="stochastic", note=", channels_last"),
        quantize(channels_last, images, "e4m3fn", note=", channels_last to contiguous"),
        quantize(x.t(), out.view(COLUMNS, -1), "e4m3fn", note=", transposed to contiguous"),
        # codes, counts and gradients
        encode(x, out, "e4m3fn", rounding="stochastic"),
        encode(x, out, "int8"),
        rounded(accel.encode, x, out, "mxfp8_e4m3fn", has_out=False),
        rounded(accel.quantize_encode, x, out, "e4m3fn", has_out=False),
        Operation("decode e4m3fn", "decode", None, partial(accel.decode, codes, "e4m3fn"), x, out),
        Operation("count_blocks", "count_blocks", partial(accel.count_blocks, x, ALPHA), None, x, out),
        Operation("quantize e4m3fn, forward and backward", "", None, partial(straight_through, leaf, out), x, out),
    ]


def rounded(
    function: Callable[..., Any],
    x: torch.Tensor,
    out: torch.Tensor,
    fmt: Any,
    *,
    rounding: str = "nearest_even",
    note: str = "",
    target: float | None = None,
    result: torch.Tensor | None = None,
    has_out: bool = True,
    **options: Any,
) -> Operation:
    """The row of an operation that rounds. result: what it fills in the place of `out`; has_out: whether it can."""
    described = accel.format(fmt)
    make = partial(function, x, fmt=described, rounding=rounding, **options)
    fill = partial(make, out=out if result is None else result) if has_out else None
    name = f"{function.__name__} {rounding} {described.name}{note}"
    return Operation(name, kernel_of(function.__name__, described, rounding, x), fill, make, x, out, target)


def kernel_of(operation: str, fmt: accel.Format | BlockFormat, rounding: str, x: torch.Tensor) -> str:
    """What an operation compiles: a kernel of accel/kernels/cpu.py, and the types of its arguments where they vary."""
    if isinstance(fmt, BlockFormat):
        method, _ = launch.method_of(fmt.element, rounding, "saturate", 32, False)
        return f"{operation} {'columns' if fmt.axis == 0 else 'blocks'} {method}, scales {fmt.scale.name}"
    method, fields = launch.method_of(fmt, rounding, "saturate", 32, False, launch.work_dtype(x))
    width = "64-bit words" if isinstance(fields[0], np.uint64) else ""
    return ", ".join(part for part in (f"{operation} {method}", width, "float64" * (x.dtype == torch.float64)) if part)


def scales(*shape: int) -> torch.Tensor:
    """No powers of two."""
    return torch.linspace(0.3, 3.0, int(np.prod(shape))).view(shape)


def straight_through(leaf: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    (result,) = torch.autograd.grad(accel.quantize(leaf, "e4m3fn"), leaf, gradient)
    return result


@dataclass(frozen=True)
class Measured:
    """An operation's two comparisons, None where it lacks the form."""

    operation: Operation
    out: Comparison | None
    allocating: Comparison | None

    @property
    def met(self) -> bool | None:
        """Whether the ratio of medians is within the target; None without a target or with a disturbed measurement."""
        if self.operation.target is None or self.out is None or self.disturbed:
            return None
        return self.out.ratio_of_medians <= self.operation.target

    @property
    def disturbed(self) -> bool:
        """Whether other processes took the cores: operation and copy then both wait for them, and the ratio nears 1."""
        return self.out is not None and self.out.preemptions_per_second > DISTURBED_PREEMPTIONS_PER_SECOND

    def row(self) -> list[str]:
        shown, target = self.out or self.allocating, self.operation.target
        assert shown
        return [
            self.operation.name,
            _ratios(self.out),
            _ratios(self.allocating),
            "" if target is None else f"<= {target:.2f}",
            "disturbed" if self.disturbed else {True: "yes", False: "NO", None: ""}[self.met],
            f"{shown.operation.median * 1e3:.2f}; {shown.baseline.median * 1e3:.2f}",
            f"{shown.operation.noise:.2f}; {shown.baseline.noise:.2f}",
        ]

    def figures(self) -> dict[str, object]:
        return {
            "operation": self.operation.name,
            "out_over_copy": self.out and self.out.figures(),
            "allocating_over_clone": self.allocating and self.allocating.figures(),
            "target_out_over_copy_ratio": self.operation.target,
            "met": self.met,
            "disturbed": self.disturbed,
        }


def _ratios(comparison: Comparison | None) -> str:
    return f"{comparison.ratio_of_medians:.2f}; {comparison.ratio_of_minima:.2f}" if comparison else "-"


def measure(operation: Operation, repeats: int) -> Measured:
    x, out = operation.source, operation.out
    show_progress(operation.name)
    return Measured(
        operation,
        compare(operation.fill, lambda: out.copy_(x), repeats, BUDGET_SECONDS) if operation.fill else None,
        compare(operation.make, x.clone, repeats, BUDGET_SECONDS) if operation.make else None,
    )


# --- peers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """A peer, our operation on the same work and copy_, which alternated; and where the peer's results are not ours.

    differing: results on landmarks of the format that differ from ours, by kind; None for nothing to compare.
    """

    peer: Peer
    times: dict[str, Times]
    differing: dict[str, int] | None
    landmarks: int

    @property
    def over_copy(self) -> float:
        return self.times["peer"].median / self.times["copy"].median

    @property
    def over_ours(self) -> float:
        return self.times["peer"].median / self.times["ours"].median

    def row(self) -> list[str]:
        form = "out=" if self.peer.fill else "allocating"
        differ = "-" if self.differing is None else f"{sum(self.differing.values())} of {self.landmarks}"
        where = ", ".join(f"{kind} {count}" for kind, count in (self.differing or {}).items())
        milliseconds = "; ".join(f"{times.median * 1e3:.2f}" for times in self.times.values())
        return [self.peer.name, form, f"{self.over_copy:.2f}", f"{self.over_ours:.1f}", differ, where, milliseconds]

    def figures(self) -> dict[str, object]:
        return {
            "peer": self.peer.name,
            "ours": self.peer.like,
            "allocates": self.peer.fill is None,
            "over_copy": self.over_copy,
            "over_ours": self.over_ours,
            "repeats": len(self.times["peer"].seconds),
            "times": {name: times.figures() for name, times in self.times.items()},
            "landmarks": self.landmarks,
            "differing_landmarks": self.differing,
        }


def measure_peer(peer: Peer, ours: Operation, repeats: int) -> Beside:
    """Both fill a tensor where the peer can, else both return a new one."""
    show_progress(peer.name)
    differing, landmarks = peers.differences(peer) if peer.fmt is not None else (None, 0)
    x, out = ours.source, ours.out
    mine = ours.fill if peer.fill else ours.make
    assert mine
    calls = {"peer": peer.fill or partial(peer.apply, x), "ours": mine, "copy": lambda: out.copy_(x)}
    return Beside(peer, alternate(calls, repeats, budget_seconds=BUDGET_SECONDS), differing, landmarks)


def measure_peers(
    x: torch.Tensor, out: torch.Tensor, ours: dict[str, Operation], repeats: int
) -> tuple[list[Beside], dict[str, str]]:
    """Those beside the operations `ours`; and why some do not run."""
    show_progress("peers: one compiles when it is imported first")
    found, missing = peers.find(x, out)
    measured = []
    for peer in found:
        if peer.like in ours:
            try:
                measured.append(measure_peer(peer, ours[peer.like], repeats))
            except Exception as error:  # a peer's failure is its result
                missing[peer.name] = peers.reason(error)
    return measured, missing


# --- first calls ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColdStart:
    """The first call of a kernel in a fresh process: with an empty cache of its own, then with what that left."""

    kernel: str
    empty_cache_seconds: float
    filled_cache_seconds: float

    @property
    def met(self) -> bool:
        return self.empty_cache_seconds <= COLD_TARGET_SECONDS

    def row(self) -> list[str]:
        met = "yes" if self.met else "NO"
        return [self.kernel, f"{self.empty_cache_seconds:.2f}", f"{self.filled_cache_seconds:.2f}", met]

    def figures(self) -> dict[str, object]:
        return asdict(self) | {"met": self.met}


def cold_starts(rows: list[Operation]) -> list[ColdStart]:
    """Every kernel's, each by the first of `rows` that needs it."""
    operation_of_kernel: dict[str, str] = {}
    for row in rows:
        if row.kernel:
            operation_of_kernel.setdefault(row.kernel, row.name)
    starts = []
    for kernel, name in operation_of_kernel.items():
        show_progress(kernel)
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--first-call", name]
            environment = os.environ | {"NUMBA_CACHE_DIR": cache}
            empty, filled = (
                float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(2)
            )
        starts.append(ColdStart(kernel, empty, filled))
    return starts


def first_call_seconds(name: str) -> float:
    """Seconds of the first call of the operation `name` in this process."""
    (call,) = (row.fill or row.make for row in operations(*inputs(UNIT)) if row.name == name)
    assert call
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- the run --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the rows with targets, without peers")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only the rows whose name holds TEXT, and their peers"
    )
    parser.add_argument("--cold", action="store_true", help="measure each kernel's first call too, cache empty")
    parser.add_argument("--elements", type=_elements, default=ELEMENTS, help=f"a multiple of {UNIT} (%(default)s)")
    parser.add_argument("--repeats", type=_positive, help=f"timed repeats ({REPEATS}; quick: {QUICK_REPEATS})")
    parser.add_argument(
        "--json", type=Path, help="where the figures go (of a whole run: results/elementwise-<processor>.json)"
    )
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_call:
        print(first_call_seconds(arguments.first_call))
        return

    x, out = inputs(arguments.elements)
    rows = [row for row in operations(x, out) if row.target is not None or not arguments.quick]
    rows = [row for row in rows if arguments.only in row.name]
    if not rows:
        parser.error(f"--only: no row's name holds {arguments.only!r}")
    repeats = arguments.repeats or (QUICK_REPEATS if arguments.quick else REPEATS)
    settings = machine() | {"elements": arguments.elements, "repeats": repeats}
    print_lines(settings)
    document: dict[str, object] = {"benchmark": "elementwise", "machine": settings}
    measured = [measure(row, repeats) for row in rows]
    document["rows"] = report_rows(measured)
    document["copy"] = report_copy([row.out for row in measured if row.out and row.operation.source is x], x)
    if not arguments.quick:
        beside, missing = measure_peers(x, out, {row.name: row for row in rows}, repeats)
        document["peers"] = report_peers(beside, missing)
        document["peers_missing"] = missing
        document["peer_versions"] = peers.versions()
    if arguments.cold:
        document["cold_starts"] = report_cold_starts(cold_starts(rows))
        document["cold_start_target_seconds"] = COLD_TARGET_SECONDS
    is_whole = not (arguments.quick or arguments.only)
    if arguments.json or is_whole:
        write_json(arguments.json or results_path("elementwise", settings["processor"]), document)


def report_rows(measured: list[Measured]) -> list[dict[str, object]]:
    print_table(
        "Multiples of copying the tensor: ratio of medians; ratio of fastest repeats",
        ["operation", "out= / copy_", "allocating / clone", "target", "met", "operation; copy [ms]", "noise"],
        [row.row() for row in measured],
    )
    print_lines(
        {
            "met": "the ratio of medians of out= / copy_ is within the target",
            "noise": "slowest over fastest repeat, of operation and copy",
            "disturbed": "other processes took the cores, which brings ratios nearer to 1: no verdict; "
            f"{sum(row.disturbed for row in measured)} of {len(measured)} rows",
        }
    )
    return [row.figures() for row in measured]


def report_copy(comparisons: list[Comparison], x: torch.Tensor) -> dict[str, float]:
    """How fast the copies of x were, over the whole run."""
    seconds = [second for comparison in comparisons for second in comparison.baseline.seconds]
    if not seconds:
        return {}
    median, fastest, slowest = statistics.median(seconds), min(seconds), max(seconds)
    rate = 2e-9 * x.nbytes / median
    times = f"median {median * 1e3:.2f} ms, {fastest * 1e3:.2f} to {slowest * 1e3:.2f} ms; {rate:.1f} GB/s"
    print_lines({"copy_ of the float32 tensor over the whole run": f"{times} read and written"})
    return {"median_seconds": median, "min_seconds": fastest, "max_seconds": slowest}


def report_peers(beside: list[Beside], missing: dict[str, str]) -> list[dict[str, object]]:
    columns = ["peer", "form", "over copy_", "over ours", "differ", "where", "peer; ours; copy_ [ms]"]
    print_table("Peers in the same run: ratios of medians", columns, [peer.row() for peer in beside])
    print_lines(
        {
            "over ours": "over our row on the same work, in the same form",
            "differ": "results that are not ours, on landmarks of the format",
        }
    )
    print_lines(peers.versions() | missing)
    return [peer.figures() for peer in beside]


def report_cold_starts(starts: list[ColdStart]) -> list[dict[str, object]]:
    print_table(
        f"First call of a kernel in a fresh process, seconds (target, empty cache: <= {COLD_TARGET_SECONDS:g})",
        ["kernel", "empty cache", "filled cache", "met"],
        [start.row() for start in starts],
    )
    return [start.figures() for start in starts]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer (got {text!r})")
    return int(text)


def _elements(text: str) -> int:
    if _positive(text) % UNIT:
        raise argparse.ArgumentTypeError(f"must be a multiple of {UNIT} (got {text!r})")
    return int(text)


if __name__ == "__main__":
    main()
