"""A training step whose products are emulated, over the same step with torch's, by multiply-accumulate unit.

Weights, activations and gradients are FP8 in both, so that operands are as short as the hardware's. Two copies of a
network train side by side on the same random batch, step by step in turn. GMAC/s: multiply-accumulates of all three
products over the time that the emulated step takes beyond the other.
"""

from __future__ import annotations

import accel  # noqa: F401  before torch: see accel/kernels/openmp.py

# isort: split
from collections.abc import Callable
from typing import Any

import torch
from timing import Comparison, alternate, keep, machine, print_lines, print_table, selection
from torch.nn import functional

import models
from fpsim.emulation import Emulator, emulate
from fpsim.memory import keep_freed_memory

# name: (network, options, image shape, batch size)
NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int], int]] = {
    "ResNet18 of width 16, batch 8": ("resnet18", {"width": 16}, (3, 32, 32), 8),
    "MobileNetV2 of width 16, batch 8": ("mobilenet_v2", {"width": 16}, (3, 32, 32), 8),
    "LeNet, batch 64": ("lenet", {}, (1, 28, 28), 64),
}
QUICK = "LeNet, batch 64"
FP8 = {
    "weights": {"format": "e4m3fn", "scale": 2.0**-4},
    "activations": {"format": "e4m3fn"},
    "gradients": {"format": "e5m2", "scale": 2.0**-10},
}
UNITS: dict[str, Any] = {
    "fp16-acc": {"base": "fp16-acc", "overflow": "saturate"},
    "fp22": "fp22",
    "fp16-acc, chunk 64": {"base": "fp16-acc", "overflow": "saturate", "chunk": 64},
    "hopper-fp8": "hopper-fp8",
}


def training_step(network: str, unit: Any) -> tuple[Callable[[], None], Emulator]:
    """One step on a fixed batch: forward, backward, SGD update."""
    name, options, shape, batch = NETWORKS[network]
    torch.manual_seed(0)
    model = models.build(name, input_shape=shape, classes=10, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    datapath = None if unit is None else {"forward": unit, "dgrad": unit, "wgrad": unit}
    emulator = emulate(model, {**FP8, "datapath": datapath, "ledger": {"every_steps": 1000}}, optimizer=optimizer)
    images, labels = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        emulator.step()

    return step, emulator


def main() -> None:
    arguments = selection(__doc__, "network", list(NETWORKS), QUICK, 10, "steps of each kind")
    keep_freed_memory()  # for both, as `fpsim run` does for every run
    description = machine()
    print_lines(description)
    document: dict[str, Any] = {"machine": description, "networks": {}}
    rows = []
    for network in arguments.chosen:
        for name, unit in UNITS.items():
            (emulated, emulator), (plain, _) = (training_step(network, kind) for kind in (unit, None))
            times = alternate({"emulated": emulated, "plain": plain}, arguments.repeats, warm_ups=2)
            comparison = Comparison(times["emulated"], times["plain"])
            macs = sum(product.macs for product in emulator.ledger.products)
            speed = macs / (times["emulated"].median - times["plain"].median) / 1e9
            figures = {**comparison.figures(), "macs_per_step": macs, "gmacs_per_second": speed}
            document["networks"].setdefault(network, {})[name] = figures
            rows.append([
                network, name, f"{macs / 1e9:.2f}", f"{1e3 * times['plain'].median:.1f}",
                f"{1e3 * times['emulated'].median:.1f}", f"{comparison.ratio_of_medians:.1f}", f"{speed:.1f}",
            ])  # fmt: skip
    columns = ["network", "unit", "GMAC a step", "torch ms", "emulated ms", "ratio of medians", "GMAC/s"]
    print_table("Training step with emulated products over the same with torch's", columns, rows)
    keep(arguments, "datapath", document)


if __name__ == "__main__":
    main()
