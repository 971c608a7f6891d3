"""Matrix products of emulated datapaths over torch.matmul in float32, square and in the shapes of ResNet18's layers.

Operands are e4m3fn numbers, of which some sums leave fp16: every special case is in.
"""

from __future__ import annotations

import accel  # before torch: see accel/kernels/openmp.py

# isort: split
from typing import Any

import torch
from timing import Comparison, alternate, keep, machine, print_lines, print_table, selection

SQUARES = {f"{n} x {n} x {n}": (n, n, n) for n in (512, 1024, 2048)}
LAYERS = {  # im2col of ResNet18's convolutions on 8 images of 32x32: (N H W, C R S, K)
    "ResNet18 stage 1, 8192 x 576 x 64": (8192, 576, 64),
    "ResNet18 stage 2, 2048 x 1152 x 128": (2048, 1152, 128),
    "ResNet18 stage 3, 512 x 2304 x 256": (512, 2304, 256),
    "ResNet18 stage 4, 128 x 4608 x 512": (128, 4608, 512),
}
SHAPES = {**SQUARES, **LAYERS}
QUICK = "1024 x 1024 x 1024"
UNITS: dict[str, tuple[Any, float]] = {  # name: (unit, target ratio of torch.matmul's speed)
    "fp16-acc": ("fp16-acc", 0.15),
    "bf16-acc": ("bf16-acc", 0.15),
    "fp16-acc, chunks of 64 into fp32": ({"base": "fp16-acc", "chunk": 64, "outer": "fp32"}, 0.15),
    "fp22": ("fp22", 0.06),
    "fp32": ("fp32", 0.06),
    "fp22 toward zero": ({"base": "fp22", "rounding": "toward_zero"}, 0.06),
    "int8": ("int8", 0.06),
}
SLOW_UNITS: dict[str, Any] = {
    "hopper-fp8": "hopper-fp8",
    "fp16-acc stochastic": {"base": "fp16-acc", "rounding": "stochastic"},
}
SLOW_SHAPE = (128, 512, 128)


def operands(rows: int, length: int, columns: int, integers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b = torch.randn(rows, length) * 40, torch.randn(length, columns) * 40
    return (a.round(), b.round()) if integers else (accel.quantize(a, "e4m3fn"), accel.quantize(b, "e4m3fn"))


def measure(unit: Any, shape: tuple[int, int, int], repeats: int) -> Comparison:
    a, b = operands(*shape, unit == "int8")
    times = alternate(
        {"emulated": lambda: accel.matmul(a, b, unit), "torch": lambda: torch.matmul(a, b)}, repeats, warm_ups=2
    )
    return Comparison(times["emulated"], times["torch"])


def main() -> None:
    arguments = selection(__doc__, "shape", list(SHAPES), QUICK, 11, "calls of each kind")
    description = machine()
    print_lines(description)
    document: dict[str, Any] = {"machine": description, "products": {}}
    rows: list[list[str]] = []

    def add(
        name: str, shape_name: str, shape: tuple[int, int, int], compared: Comparison, target: float | None
    ) -> None:
        speed = 1 / compared.ratio_of_medians
        rate = shape[0] * shape[1] * shape[2] / compared.operation.median / 1e9
        document["products"].setdefault(shape_name, {})[name] = {
            **compared.figures(), "of_torch": speed, "target_of_torch": target,
        }  # fmt: skip
        rows.append([
            shape_name, name, f"{rate:.2f}", f"{speed:.4f}", "" if target is None else f"{target:g}",
            "" if target is None else "yes" if speed >= target else "no",
        ])  # fmt: skip

    for shape_name in arguments.chosen:
        for name, (unit, target) in UNITS.items():
            add(name, shape_name, SHAPES[shape_name], measure(unit, SHAPES[shape_name], arguments.repeats), target)
    slow_name = " x ".join(map(str, SLOW_SHAPE))
    for name, unit in SLOW_UNITS.items():
        add(name, slow_name, SLOW_SHAPE, measure(unit, SLOW_SHAPE, 3), None)
    columns = ["M x K x N", "datapath", "GMAC/s", "of torch.matmul", "target", "met"]
    print_table("Emulated matrix products, speed as a share of torch.matmul's in float32", columns, rows)
    keep(arguments, "matmul", document)


if __name__ == "__main__":
    main()
