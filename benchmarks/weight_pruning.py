"""A training step whose weights are pruned by the snr of their gradients, over the plain float32 step, by estimator.

Two copies of a network train side by side on the same random batch, step by step in turn, both in the same
micro-batches; masks are renewed once in the run. Everything else of the emulation is off but the ledger, which counts
one step in 50.
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
from fpsim.emulation import emulate
from fpsim.memory import keep_freed_memory

TARGET = 1.10  # of microbatch and ema, ratio of performance; per_sample has none
# name: (network, options, image shape, batch size)
NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int], int]] = {
    "ResNet18 of width 16, batch 128": ("resnet18", {"width": 16}, (3, 32, 32), 128),
    "ResNet18 of width 64, batch 128": ("resnet18", {"width": 64}, (3, 32, 32), 128),
    "LeNet, batch 128": ("lenet", {}, (1, 28, 28), 128),
    "MLP 256-128, batch 128": ("mlp", {"hidden": [256, 128]}, (1, 28, 28), 128),
}
QUICK = "ResNet18 of width 16, batch 128"
ESTIMATORS = {"microbatch": 4, "ema": 1, "per_sample": 1}  # micro-batches of a step


def training_step(network: str, parts: int, estimator: str | None, renewal: int) -> Callable[[], None]:
    """One step on a fixed batch: forward and backward of its parts, SGD update."""
    name, options, shape, batch = NETWORKS[network]
    torch.manual_seed(0)
    model = models.build(name, input_shape=shape, classes=10, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    spec = {"weight_pruning": {"name": "snr", "estimator": estimator, "burn_in": renewal}}
    emulator = None if estimator is None else emulate(model, spec, optimizer=optimizer)
    images, labels = torch.randn(batch, *shape).chunk(parts), torch.randint(0, 10, (batch,)).chunk(parts)

    def step() -> None:
        optimizer.zero_grad()
        for some, right in zip(images, labels, strict=True):
            (functional.cross_entropy(model(some), right) / parts).backward()
        optimizer.step()
        if emulator is not None:
            emulator.step()

    return step


def main() -> None:
    what = "steps of each kind; one ledger sample in 50"
    arguments = selection(__doc__, "network", list(NETWORKS), QUICK, 50, what)
    keep_freed_memory()  # for both, as `fpsim run` does for every run
    description = machine()
    print_lines(description)
    document: dict[str, Any] = {"machine": description, "networks": {}}
    rows = []
    for network in arguments.chosen:
        for estimator, parts in ESTIMATORS.items():
            if estimator == "per_sample" and NETWORKS[network][0] == "resnet18":
                continue  # batch normalisation mixes the samples
            plain, pruned = (training_step(network, parts, one, arguments.repeats // 2) for one in (None, estimator))
            times = alternate({"pruned": pruned, "plain": plain}, arguments.repeats, warm_ups=3)
            comparison = Comparison(times["pruned"], times["plain"])
            mean_ratio = sum(times["pruned"].seconds) / sum(times["plain"].seconds)
            target = None if estimator == "per_sample" else TARGET
            document["networks"].setdefault(network, {})[estimator] = {
                **comparison.figures(), "micro_batches": parts, "ratio_of_means": mean_ratio, "target_ratio": target,
            }  # fmt: skip
            rows.append([
                network, estimator, str(parts), f"{1e3 * times['plain'].median:.2f}",
                f"{1e3 * times['pruned'].median:.2f}", f"{comparison.ratio_of_medians:.3f}", f"{mean_ratio:.3f}",
                "" if target is None else f"{target:.2f}",
                "" if target is None else "yes" if comparison.ratio_of_medians <= target else "no",
            ])  # fmt: skip
    columns = ["network", "estimator", "parts", "plain ms", "pruned ms", "medians", "means", "target", "met"]
    print_table("Training step with weights pruned by snr, over the plain step of the same parts", columns, rows)
    keep(arguments, "weight_pruning", document)


if __name__ == "__main__":
    main()
