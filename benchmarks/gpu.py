"""Elementwise operations and codecs on a CUDA device over a device-to-device copy of the same float32 tensor.

Times are of CUDA events around CALLS calls, operation and copy alternating; "host us" is what a call of a small tensor
costs the host, which does not wait. Codecs: of the tensor that benchmarks/packing.py packs; their loops alone, streams
staying on the device (packing waits once, for the length), and `accel.pack` and `accel.unpack` as a whole, streams on
the host, beside copying the float32 tensor there and back. Without a CUDA device: one line on stderr, exit code 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accel  # before torch: see accel/kernels/openmp.py

# isort: split
import torch
from packing import sample
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


def measure_elementwise(elements: int, repeats: int) -> list[dict[str, object]]:
    """Prints the table and returns its figures."""
    small = torch.randn(64, 64, device="cuda")
    x = torch.randn(elements // 1024, 1024, device="cuda")
    out = torch.empty_like(x)
    host = operations(small, torch.empty_like(small))
    rows, figures = [], []
    for name, call in operations(x, out).items():
        operation, copy = beside_copy(call, x, out, repeats)
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
    return figures


def beside_copy(call: Callable[[], object], x: torch.Tensor, out: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Median milliseconds of the call and of the copy, alternating."""
    for _ in range(3):
        call()
    times: dict[str, list[float]] = {"operation": [], "copy": []}
    for _ in range(repeats):
        times["operation"].append(milliseconds(call))
        times["copy"].append(milliseconds(lambda: out.copy_(x)))
    return statistics.median(times["operation"]), statistics.median(times["copy"])


def measure_codecs(elements: int, repeats: int) -> list[dict[str, object]]:
    """Prints the table and returns its figures."""
    from accel.codecs.cuda import LAYOUTS

    here, alpha = sample(elements)
    x = here.cuda()
    to_host_and_back = fastest(lambda: x.copy_(x.cpu()))
    figures = [measure_codec(codec, here, x, alpha, repeats) for codec in LAYOUTS]
    rows = []
    for found in figures:
        copy = found["copy_median_milliseconds"]
        on_device = found["pack_milliseconds"], found["unpack_milliseconds"]
        whole = found["pack_to_host_milliseconds"], found["unpack_from_host_milliseconds"], to_host_and_back
        rows.append([
            str(found["codec"]),
            f"{found['bits_per_element']:.3f}",
            *(f"{time:.3f} ({time / copy:.2f})" for time in on_device),
            f"{copy:.3f}",
            *(f"{time:.1f}" for time in whole),
        ])  # fmt: skip
    title = f"Codecs, ms ({100 * float((x == 0).float().mean()):.1f} % zeros); multiples of the copy"
    columns = ["codec", "bits an element", "pack", "unpack", "copy"]
    print_table(title, [*columns, "accel.pack", "accel.unpack", "tensor to host and back"], rows)
    return [{**found, "tensor_to_host_and_back_milliseconds": to_host_and_back} for found in figures]


def measure_codec(codec: str, here: torch.Tensor, x: torch.Tensor, alpha: float, repeats: int) -> dict[str, Any]:
    """here: the tensor x on the host."""
    from accel.codecs.cuda import pack_blocks, unpack_blocks

    fmt = accel.format("e4m3fn" if "alpha" in codec else {"base": "e4m3fn", "alpha_codes": True})
    packed, out = accel.pack(x, codec, fmt, alpha=alpha), torch.empty_like(x)
    assert packed.to_bytes() == accel.pack(here, codec, fmt, alpha=alpha).to_bytes()
    header = packed.header
    marks = header.cut, header.fmt, header.scale, header.alpha
    body, offsets, _, _ = pack_blocks(x, *marks)
    packing, copy = beside_copy(partial(pack_blocks, x, *marks), x, out, repeats)
    unpacking, _ = beside_copy(partial(unpack_blocks, body, offsets, *marks, out), x, out, repeats)
    out.zero_()
    unpack_blocks(body, offsets, *marks, out)
    assert torch.equal(out, x)
    return {
        "codec": codec,
        "bits_per_element": packed.nbits / x.numel(),
        "pack_milliseconds": packing,
        "unpack_milliseconds": unpacking,
        "copy_median_milliseconds": copy,
        "pack_to_host_milliseconds": fastest(lambda: accel.pack(x, codec, fmt, alpha=alpha)),
        "unpack_from_host_milliseconds": fastest(lambda: accel.unpack(packed, out=out)),
    }


def fastest(call: Callable[[], object], repeats: int = 3) -> float:
    """Milliseconds of a call that waits for the device, the shortest."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 26, help="of the float32 tensor (%(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="timed repeats (%(default)s)")
    parser.add_argument("--codecs", action="store_true", help="only the codecs")
    parser.add_argument("--json", type=Path, help="where the figures go (results/gpu-<device>.json)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    described = machine() | {"device": device, "elements": arguments.elements}
    print_lines(described)
    rows = {} if arguments.codecs else {"rows": measure_elementwise(arguments.elements, arguments.repeats)}
    codecs = measure_codecs(arguments.elements, arguments.repeats)
    write_json(arguments.json or results_path("gpu", device), {"machine": described, **rows, "codecs": codecs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
