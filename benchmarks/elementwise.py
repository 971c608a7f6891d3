"""Elementwise operations as multiples of copying the same float32 tensor, which memory limits; peers in the same run.

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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Call, Comparison, compare, machine, print_lines, print_table, results_path, write_json

import accel
from fpsim import lognormal

SEED = 1
LN_MEAN, LN_DEVIATION = -2.0, 1.5  # of |x|: neural gradients are close to lognormal; 7 % are subnormal in e4m3fn
SPARSITY = 0.8
SCALE = 0.375
COLD_ELEMENTS = 1 << 17  # enough for the parallel form of a kernel
COLD_TARGET_SECONDS = 10.0
SLOW_PEER_REPEATS = 3
DISTURBED_PREEMPTIONS_PER_SECOND = 110  # seen on two cores: 15 to 90 alone, 130 to 230 beside one busy process


@dataclass(frozen=True)
class Operation:
    """A row. `fill` writes the shared destination (or nothing), `make` returns a new tensor; None: no such form.

    target: the largest ratio of `fill` to `copy_` allowed. kernel: what it compiles first; None marks a peer.
    """

    name: str
    kernel: str | None
    fill: Call | None
    make: Call | None
    target: float | None = None
    slow: bool = False


def inputs(elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Source, of random sign and lognormal magnitude, and destination: float32, shape (elements,)."""
    generator = torch.Generator().manual_seed(SEED)
    source = torch.randn(elements, generator=generator).mul_(LN_DEVIATION).add_(LN_MEAN).exp_()
    source.mul_(torch.randint(0, 2, (elements,), generator=generator).mul_(2).sub_(1))
    return source, torch.zeros(elements)


def operations(x: torch.Tensor, out: torch.Tensor) -> list[Operation]:
    """Every operation of `accel` that is measured."""
    alpha = float(lognormal.threshold(SPARSITY, LN_MEAN, LN_DEVIATION))
    code_out = out.view(torch.uint8)[: x.numel()]
    codes = x.to(torch.float8_e4m3fn).view(torch.uint8)

    def quantize(name: str, kernel: str, target: float, fmt: str, **options: Any) -> Operation:
        call = partial(accel.quantize, x, fmt, **options)
        return Operation(name, kernel, partial(call, out=out), call, target)

    def encode(fmt: str) -> Operation:
        call = partial(accel.encode, x, fmt)
        return Operation(f"encode {fmt}", "encode nearest_even", partial(call, out=code_out), call, 1.1)

    def prune_quantize(rounding: str) -> Operation:
        call = partial(accel.prune_quantize, x, alpha, "e5m2", rounding=rounding)
        return Operation(f"prune_quantize {rounding} e5m2", "prune_quantize", partial(call, out=out), call, 2.2)

    nearest, stochastic, prune = "quantize nearest_even", "quantize stochastic", partial(accel.prune, x, alpha)
    return [
        *(quantize(f"{nearest} {fmt}", nearest, 1.15, fmt) for fmt in ("e4m3fn", "e5m2", "bf16")),
        quantize(f"{nearest} e4m3fn, scale given", nearest, 1.15, "e4m3fn", scale=SCALE),
        *(quantize(f"{stochastic} {fmt}", stochastic, 2.2, fmt, rounding="stochastic") for fmt in ("e4m3fn", "e5m2")),
        Operation("prune", "prune", partial(prune, out=out), prune, 2.0),
        *(encode(fmt) for fmt in ("e4m3fn", "e5m2")),
        Operation("decode e4m3fn", "decode", None, partial(accel.decode, codes, "e4m3fn")),
        *(prune_quantize(rounding) for rounding in ("nearest_even", "stochastic")),
        Operation("count_blocks", "count_blocks", partial(accel.count_blocks, x, alpha), None),
    ]


def torch_peers(x: torch.Tensor, out: torch.Tensor) -> list[Operation]:
    """torch's float8 casts there and back, and its random numbers alone."""

    def cast(dtype: torch.dtype) -> Operation:
        codes = torch.empty(x.shape, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        return Operation(
            f"torch {name} there and back",
            None,
            lambda: out.copy_(codes.copy_(x)),
            lambda: x.to(dtype).to(torch.float32),
        )

    return [
        cast(torch.float8_e4m3fn),
        cast(torch.float8_e5m2),
        Operation("torch.rand alone", None, lambda: torch.rand(x.shape, out=out), lambda: torch.rand(x.shape)),
    ]


def ml_dtypes_peers(x: torch.Tensor, out: torch.Tensor) -> list[Operation]:
    """ml_dtypes' casts there and back (NumPy: one thread). ImportError where it is not installed."""
    import ml_dtypes

    def cast(dtype: type) -> Operation:
        source, target = x.numpy(), out.numpy()
        codes: np.ndarray = np.empty(source.shape, dtype)

        def fill() -> None:
            np.copyto(codes, source, casting="unsafe")
            np.copyto(target, codes, casting="unsafe")

        name = f"ml_dtypes {dtype.__name__} there and back"
        return Operation(name, None, fill, lambda: source.astype(dtype).astype(np.float32), slow=True)

    return [cast(ml_dtypes.float8_e4m3fn), cast(ml_dtypes.float8_e5m2)]


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
        target = self.operation.target
        return [
            self.operation.name,
            _ratios(self.out),
            _ratios(self.allocating),
            "" if target is None else f"<= {target:.2f}",
            "disturbed" if self.disturbed else {True: "yes", False: "NO", None: ""}[self.met],
            _milliseconds(self.out),
            _noise(self.out),
        ]

    def figures(self) -> dict[str, object]:
        return {
            "operation": self.operation.name,
            "peer": self.operation.kernel is None,
            "out_over_copy": self.out and self.out.figures(),
            "allocating_over_clone": self.allocating and self.allocating.figures(),
            "target_out_over_copy_ratio": self.operation.target,
            "met": self.met,
            "disturbed": self.disturbed,
        }


def _ratios(comparison: Comparison | None) -> str:
    return f"{comparison.ratio_of_medians:.2f}; {comparison.ratio_of_minima:.2f}" if comparison else "-"


def _noise(comparison: Comparison | None) -> str:
    return f"{comparison.operation.noise:.2f}; {comparison.baseline.noise:.2f}" if comparison else "-"


def _milliseconds(comparison: Comparison | None) -> str:
    return f"{comparison.operation.median * 1e3:.2f}; {comparison.baseline.median * 1e3:.2f}" if comparison else "-"


def measure(operation: Operation, x: torch.Tensor, out: torch.Tensor, repeats: int) -> Measured:
    repeats = min(repeats, SLOW_PEER_REPEATS) if operation.slow else repeats
    return Measured(
        operation,
        compare(operation.fill, lambda: out.copy_(x), repeats) if operation.fill else None,
        compare(operation.make, x.clone, repeats) if operation.make else None,
    )


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


def cold_starts() -> list[ColdStart]:
    """Every kernel's, each by the first operation that needs it."""
    operation_of_kernel: dict[str, str] = {}
    for row in operations(*inputs(1)):
        operation_of_kernel.setdefault(str(row.kernel), row.name)
    starts = []
    for kernel, name in operation_of_kernel.items():
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
    (call,) = (row.fill or row.make for row in operations(*inputs(COLD_ELEMENTS)) if row.name == name)
    assert call
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=_positive, default=1 << 24, help="of the float32 tensor (%(default)s)")
    parser.add_argument("--repeats", type=_positive, default=15, help="timed repeats (%(default)s)")
    parser.add_argument("--json", type=Path, help="where the figures go (results/elementwise-<processor>.json)")
    parser.add_argument("--cold", action="store_true", help="measure each kernel's first call too, cache empty")
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_call:
        print(first_call_seconds(arguments.first_call))
        return

    described = machine()
    print_lines(described | {"elements": arguments.elements, "repeats": arguments.repeats})
    x, out = inputs(arguments.elements)
    rows = operations(x, out) + torch_peers(x, out)
    skipped = {}
    try:
        rows += ml_dtypes_peers(x, out)
    except ImportError as error:
        skipped["ml_dtypes"] = str(error)
    measured = [measure(row, x, out, arguments.repeats) for row in rows]
    copies = [second for row in measured if row.out for second in row.out.baseline.seconds]
    copy_seconds = statistics.median(copies)

    print_table(
        "Multiples of copying the float32 tensor: ratio of medians; ratio of fastest repeats",
        ["operation", "out= / copy_", "allocating / clone", "target", "met", "out=; copy_ [ms]", "noise out=; copy_"],
        [row.row() for row in measured],
    )
    print_lines({f"skipped {name}": reason for name, reason in skipped.items()})
    print_lines(
        {
            "met": "the ratio of medians of out= / copy_ is within the target",
            "noise": "slowest over fastest repeat",
            "disturbed": "other processes took the cores, which brings ratios nearer to 1: no verdict; "
            f"{sum(row.disturbed for row in measured)} of {len(measured)} rows",
            "copy_ over the whole run": f"median {copy_seconds * 1e3:.2f} ms, {min(copies) * 1e3:.2f} to "
            f"{max(copies) * 1e3:.2f} ms; {8e-9 * arguments.elements / copy_seconds:.1f} GB/s read and written",
        }
    )
    document: dict[str, object] = {
        "benchmark": "elementwise",
        "machine": described,
        "elements": arguments.elements,
        "rows": [row.figures() for row in measured],
        "skipped": skipped,
        "copy_over_the_whole_run": {
            "median_seconds": copy_seconds,
            "min_seconds": min(copies),
            "max_seconds": max(copies),
        },
    }
    if arguments.cold:
        starts = cold_starts()
        print_table(
            f"First call of a kernel in a fresh process, seconds (target, empty cache: <= {COLD_TARGET_SECONDS:g})",
            ["kernel", "empty cache", "filled cache", "met"],
            [start.row() for start in starts],
        )
        document["cold_starts"] = [start.figures() for start in starts]
        document["cold_start_target_seconds"] = COLD_TARGET_SECONDS
    write_json(arguments.json or results_path("elementwise", described["processor"]), document)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer (got {text!r})")
    return int(text)


if __name__ == "__main__":
    main()
