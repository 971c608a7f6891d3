"""pack and unpack of every codec as multiples of copying the same float32 tensor, zstd and lz4 beside them.

The tensor: lognormal values (sigma 2, natural log), pruned stochastically to 85 % zeros, the survivors in e4m3fn; for
nm, the first two nonzeros of each four. `unpack` fills an existing tensor; `pack` returns a stream. zstd and lz4
compress and decompress the dense codes, one byte an element.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import accel  # before torch: see accel/kernels/openmp.py

# isort: split
import lz4.frame
import torch
import zstandard
from timing import compare, machine, print_lines, print_table, results_path, show_progress, write_json

SPARSITY, SIGMA = 0.85, 2.0
COLUMNS = 1024  # of the matrix
PACK_TARGETS = {"alpha": 2.0, "bitmask": 1.6}  # largest multiples of the copy
UNPACK_TARGETS = {"alpha": 2.2, "bitmask": 1.7}
SLOW_SECONDS = 3.0  # rows of more than this get fewer repeats


def sample(elements: int) -> tuple[torch.Tensor, float]:
    """(the pruned tensor, alpha)"""
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.empty(elements).log_normal_(0, SIGMA, generator=generator)
    magnitude *= 448 / magnitude.max()
    low, high = float(magnitude.min()), float(magnitude.max())
    part = magnitude[: 1 << 20]
    for _ in range(40):
        alpha = (low * high) ** 0.5
        low, high = (alpha, high) if float((1 - part / alpha).clamp(min=0).mean()) < SPARSITY else (low, alpha)
    signs = torch.randint(0, 2, (elements,), generator=generator) * 2 - 1
    alpha = float(torch.tensor(alpha))
    pruned, _ = accel.prune_quantize(magnitude * signs, alpha, "e4m3fn")
    return pruned, alpha


def two_of_four(x: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(-1, 4)
    return torch.where((groups != 0).cumsum(1) <= 2, groups, 0.0).reshape(-1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the rows with targets")
    parser.add_argument("--elements", type=int, default=1 << 24, help=f"a multiple of {COLUMNS} (%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats (%(default)s)")
    parser.add_argument("--json", type=Path, help="where the figures go (results/packing-<processor>.json)")
    arguments = parser.parse_args()
    described = machine() | {"elements": arguments.elements, "repeats": arguments.repeats}
    print_lines(described)
    x, alpha = sample(arguments.elements)
    out = torch.empty_like(x)
    rows, figures = [], []

    def measure(name: str, bits: float, pack: Callable[[], object], unpack: Callable[[], object]) -> None:
        show_progress(name)
        cells = [name, f"{bits / x.numel():.3f}"]
        for step, call, targets in (("pack", pack, PACK_TARGETS), ("unpack", unpack, UNPACK_TARGETS)):
            found = compare(call, lambda: out.copy_(x), arguments.repeats, budget_seconds=SLOW_SECONDS)
            target, ratio = targets.get(name), found.ratio_of_medians
            met = "" if target is None else "yes" if ratio <= target else "NO"
            cells += [f"{ratio:.2f}; {found.ratio_of_minima:.2f}", "" if target is None else f"<= {target}", met]
            figures.append({"codec": name, "step": step, "bits": bits, "target": target, **found.figures()})
        rows.append(cells)

    for name, codec in accel.CODECS.items():
        if arguments.quick and name not in PACK_TARGETS:
            continue
        fmt = "e4m3fn" if codec.tags_alpha else {"base": "e4m3fn", "alpha_codes": True}
        tensor = (two_of_four(x) if name == "nm" else x).reshape(-1, COLUMNS)
        packed = accel.pack(tensor, name, fmt, alpha=alpha)
        assert torch.equal(accel.unpack(packed), tensor)
        measure(
            name,
            packed.nbits,
            lambda tensor=tensor, name=name, fmt=fmt: accel.pack(tensor, name, fmt, alpha=alpha),
            lambda packed=packed: accel.unpack(packed, out=out.view(-1, COLUMNS)),
        )
    if not arguments.quick:
        dense = accel.pack(x, "dense", {"base": "e4m3fn", "alpha_codes": True}, alpha=alpha).to_bytes()
        codes = dense[len(dense) - x.numel() :]
        squeeze, stretch = zstandard.ZstdCompressor(level=3).compress, zstandard.ZstdDecompressor().decompress
        by_zstd, by_lz4 = squeeze(codes), lz4.frame.compress(codes)
        measure("zstd 3 of dense codes", 8 * len(by_zstd), lambda: squeeze(codes), lambda: stretch(by_zstd))
        measure(
            "lz4 of dense codes",
            8 * len(by_lz4),
            lambda: lz4.frame.compress(codes),
            lambda: lz4.frame.decompress(by_lz4),
        )
    title = f"Multiples of copying the tensor ({100 * float((x == 0).float().mean()):.1f} % zeros): medians; fastest"
    print_table(title, ["codec", "bits an element", "pack", "target", "met", "unpack", "target", "met"], rows)
    write_json(
        arguments.json or results_path("packing", described["processor"]),
        {"benchmark": "packing", "machine": described, "rows": figures},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
