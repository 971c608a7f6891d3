"""Elementwise operations on a CUDA device over a device-to-device copy of the same float32 tensor.

Times are of CUDA events around CALLS calls, operation and copy alternating; "host us" is what a call of a small tensor
costs the host, which does not wait. Without a CUDA device: one line on stderr, exit code 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import accel  # before torch: see accel/kernels/openmp.py

# isort: split
import torch
from timing import machine, print_lines, print_table, results_path, write_json

CALLS = 10  # in one timing, so that the device never waits for the host
LEAST_SHARE_OF_COPY = 0.85  # of the copy's bandwidth, for operations that read and write the float32 tensor once


def operations(x: torch.Tensor, out: torch.Tensor) -> dict[str, Callable[[], object]]:
    rows: dict[str, Callable[[], object]] = {}
    for fmt in ("e4m3fn", "e5m2", "bf16", "int8"):
        rows[f"quantize nearest_even {fmt}"] = partial(accel.quantize, x, fmt, out=out)
    for rounding in ("stochastic", "up"):
        rows[f"quantize {rounding} e4m3fn"] = partial(accel.quantize, x, "e4m3fn", rounding=rounding, out=out)
    channels = torch.linspace(0.5, 2, x.shape[0], device="cuda")[:, None]
    rows["quantize nearest_even e4m3fn, one scale"] = partial(accel.quantize, x, "e4m3fn", scale=0.3, out=out)
    rows["quantize nearest_even e4m3fn, a scale a row"] = partial(accel.quantize, x, "e4m3fn", scale=channels, out=out)
    rows["prune"] = partial(accel.prune, x, 0.5, out=out)
    for rounding in ("nearest_even", "stochastic"):
        rows[f"prune_quantize {rounding} e5m2"] = partial(
            accel.prune_quantize, x, 0.5, "e5m2", rounding=rounding, out=out
        )
    rows["encode e4m3fn"] = partial(accel.encode, x, "e4m3fn")
    codes = accel.encode(x, "e4m3fn")
    rows["decode e4m3fn"] = partial(accel.decode, codes, "e4m3fn")
    for fmt in ("mxfp8_e4m3fn", "mxfp4", "nvfp4"):
        rows[f"quantize {fmt}"] = partial(accel.quantize, x, fmt, out=out)
    rows["quantize mxfp4 along axis 0"] = partial(accel.quantize, x, {"base": "mxfp4", "axis": 0}, out=out)
    rows["largest_magnitude"] = partial(accel.largest_magnitude, x)
    return rows


def host_microseconds(call: Callable[[], object], repeats: int = 200) -> float:
    """What a call costs the host, which does not wait for the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * seconds / repeats


def milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / CALLS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 26, help="of the float32 tensor (%(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="timed repeats (%(default)s)")
    parser.add_argument("--json", type=Path, help="where the figures go (results/elementwise-<device>.json)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    described = machine() | {"device": device, "elements": arguments.elements}
    print_lines(described)
    small = torch.randn(64, 64, device="cuda")
    x = torch.randn(arguments.elements // 1024, 1024, device="cuda")
    out = torch.empty_like(x)
    host = operations(small, torch.empty_like(small))
    rows, figures = [], []
    for name, call in operations(x, out).items():
        for _ in range(3):
            call()
        times: dict[str, list[float]] = {"operation": [], "copy": []}
        for _ in range(arguments.repeats):
            times["operation"].append(milliseconds(call))
            times["copy"].append(milliseconds(lambda: out.copy_(x)))
        operation, copy = statistics.median(times["operation"]), statistics.median(times["copy"])
        share = copy / operation
        met = "yes" if share >= LEAST_SHARE_OF_COPY else "no"
        calling = host_microseconds(host[name])
        rows.append([name, f"{operation:.3f}", f"{copy:.3f}", f"{share:.2f}", met, f"{calling:.0f}"])
        figures.append({
            "operation": name,
            "median_milliseconds": operation,
            "copy_median_milliseconds": copy,
            "host_microseconds": calling,
        })  # fmt: skip
    title = f"Share of the copy's bandwidth (target: at least {LEAST_SHARE_OF_COPY})"
    print_table(title, ["operation", "ms", "copy ms", "share", "met", "host us"], rows)
    write_json(arguments.json or results_path("elementwise", device), {"machine": described, "rows": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
