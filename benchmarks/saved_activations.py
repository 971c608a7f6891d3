"""Memory of a training step with the activations that autograd saves kept packed, beside what the ledger predicts.

Each configuration trains in a process of its own. There every block of 64 KiB and more is a mapping of its own
(MALLOC_MMAP_THRESHOLD_), which free() hands back at once, so that the resident size follows what is alive; Linux keeps
its peak (VmHWM), which is reset before each part of a step (/proc/self/clear_refs). All figures are beyond what was
resident before the step: weights and optimizer state. Step times alternate in one process, as in the other benchmarks.
"""

from __future__ import annotations

import accel  # before torch: see accel/kernels/openmp.py  # noqa: F401

# isort: split
import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timing import alternate, machine, print_lines, print_table, results_path, show_progress, write_json
from torch import Tensor
from torch.nn import functional

import models
from accel.ledger import peak
from fpsim.emulation import Emulator, emulate
from fpsim.layers import matrix_layers
from fpsim.memory import keep_freed_memory

MIB = 1 << 20
WARM_UPS, MEASURED_STEPS = 2, 3
SEEDS = (0, 1, 2)
OTHER_WORDS = "emulated, not packed, other random words"

EMULATED = {"accelerator": "fp8-training"}
FLOAT32_GRADIENTS = EMULATED | {"gradients": None}  # nothing random: what packing changes is seen alone
EXACT = {"saved_activations": {"format": None, "codec": "bitmask"}}
ROUNDED = {"saved_activations": {"format": "e4m3fn", "codec": "bitmask"}}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, packed exactly": EXACT,
    "emulated": EMULATED,
    "emulated, packed exactly": EMULATED | EXACT,
    "emulated, packed in e4m3fn": EMULATED | ROUNDED,
}


@dataclass(frozen=True)
class Case:
    """A network and a batch."""

    model: str
    input_shape: tuple[int, int, int]
    batch: int
    options: dict[str, Any]


CASES = {
    "MLP 4 x 1024, batch 4096, 1x28x28": Case("mlp", (1, 28, 28), 4096, {"hidden": [1024] * 4}),
    "ResNet18 width 32, batch 128, 3x32x32": Case("resnet18", (3, 32, 32), 128, {"width": 32}),
}
QUICK_CASES = {
    "MLP 3 x 512, batch 2048, 1x28x28": Case("mlp", (1, 28, 28), 2048, {"hidden": [512] * 3}),
    "ResNet18 width 8, batch 64, 3x32x32": Case("resnet18", (3, 32, 32), 64, {"width": 8}),
}


class Trainer:
    """A network, its optimizer, its emulation and one batch."""

    def __init__(self, case: Case, configuration: dict[str, Any], seed: int = 0, words: int = 0) -> None:
        """seed: of weights and batch; words: of the emulation's random words."""
        torch.manual_seed(seed)
        self.model = models.build(case.model, input_shape=case.input_shape, classes=10, **case.options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.emulator: Emulator = emulate(self.model, configuration, seed=words, optimizer=self.optimizer)
        self.images = torch.randn(case.batch, *case.input_shape)
        self.labels = torch.randint(0, 10, (case.batch,))

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.model(self.images), self.labels)

    def update(self) -> None:
        self.optimizer.step()
        self.emulator.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.update()


# --- memory, in a process of its own ------------------------------------------------------------------------------


def resident_bytes(what: str = "VmRSS") -> int:
    """The resident size of this process, or its peak (VmHWM) since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) << 10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measured_step(trainer: Trainer) -> dict[str, int]:
    """Bytes beyond those before the step: at the end of the forward pass, and the peak in it and in backward."""
    trainer.optimizer.zero_grad()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident_bytes()
    reset_peak()
    loss = trainer.loss()
    forward_peak = resident_bytes("VmHWM")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    kept = resident_bytes()
    reset_peak()
    loss.backward()
    backward_peak = resident_bytes("VmHWM")
    del loss
    trainer.update()
    return {"end_of_forward": kept - before, "forward": forward_peak - before, "backward": backward_peak - before}


def measure(case: Case, configuration: dict[str, Any]) -> dict[str, Any]:
    """The memory of some steps, and what the hooks and the ledger (in one step more) say of it, in bytes."""
    trainer = Trainer(case, configuration)
    for _ in range(WARM_UPS):
        trainer.step()
    steps = [measured_step(trainer) for _ in range(MEASURED_STEPS)]
    kept = {kind: asdict(kept) for kind, kept in trainer.emulator.saved_activations.items()}
    trainer.emulator.sample_this_step()
    trainer.step()
    ledger = trainer.emulator.ledger
    bits = peak([record for record in ledger.records if record.step == ledger.steps[-1]], "encoded")
    layers = matrix_layers(trainer.model)
    weights = [
        4 * layers[name].get_parameter("weight").numel()
        for name, spec in trainer.emulator.specs.items()
        if spec.weights is not None
    ]
    return {
        "steps": steps,
        "kept_by_kind": kept,
        "rounded_weights_bytes": sum(weights),
        "weight_gradients_bytes": sum(4 * p.numel() for p in trainer.model.parameters()),
        "ledger_peak_bytes_by_role": {role: value / 8 for role, value in bits.items()},
    }


def measured_alone(case: str, configuration: str) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", case, configuration]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
    finished = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def summary(figures: dict[str, Any]) -> dict[str, float]:
    """Medians over the steps, the peak of a whole step, and what counts say, in bytes."""
    steps = figures["steps"]
    peaks = [max(step["forward"], step["backward"]) for step in steps]
    roles = figures["ledger_peak_bytes_by_role"]
    return {
        "peak": statistics.median(peaks),
        "peak_spread": max(peaks) - min(peaks),
        **{part: statistics.median(step[part] for step in steps) for part in ("end_of_forward", "forward", "backward")},
        "counted_by_hooks": sum(kept["kept_bytes"] for kept in figures["kept_by_kind"].values()),
        "counted_as_plain_tensors": sum(kept["plain_bytes"] for kept in figures["kept_by_kind"].values()),
        "rounded_weights": figures["rounded_weights_bytes"],
        "weight_gradients": figures["weight_gradients_bytes"],
        "ledger": sum(value for role, value in roles.items() if role not in ("master", "optimizer_state")),
        "ledger_activations": roles.get("activation", 0.0) + roles.get("norm_input", 0.0),
    }


# --- gradients ----------------------------------------------------------------------------------------------------


def trained(case: Case, configuration: dict[str, Any], seed: int) -> dict[str, Any]:
    """The state of a network after two steps."""
    trainer = Trainer(case, configuration, seed)
    for _ in range(2):
        trainer.step()
    return trainer.model.state_dict()


def gradient(case: Case, configuration: dict[str, Any], seed: int, state: dict[str, Any], words: int = 0) -> Tensor:
    """Of all parameters, as one vector, on one batch."""
    trainer = Trainer(case, configuration, seed, words)
    trainer.model.load_state_dict(state)
    trainer.loss().backward()
    return torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None])


def error(of: Tensor, against: Tensor) -> dict[str, float]:
    """Relative L2 error and cosine."""
    return {
        "relative_l2": float((of - against).norm() / against.norm()),
        "cosine": float(functional.cosine_similarity(of.double(), against.double(), 0)),
    }


def gradient_errors(case: Case, seeds: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    """Of packing in e4m3fn, for each seed, and of other random words alone. Exact packing is checked to have none."""
    bases = {"float32": {}, "emulated, gradients in float32": FLOAT32_GRADIENTS, "emulated": EMULATED}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*bases, OTHER_WORDS)}
    for seed in seeds:
        state = trained(case, EMULATED, seed)
        for name, base in bases.items():
            plain = gradient(case, base, seed, state)
            if not torch.equal(plain, gradient(case, base | EXACT, seed, state)):
                raise SystemExit(f"exact packing changed the gradients ({name}, seed {seed})")
            found[name].append(error(gradient(case, base | ROUNDED, seed, state), plain))
        found[OTHER_WORDS].append(error(gradient(case, EMULATED, seed, state, words=1), plain))
    return found


# --- the report ---------------------------------------------------------------------------------------------------


def mib(value: float) -> str:
    return f"{value / MIB:.1f}"


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    return f"{form(statistics.mean(values))} ({form(min(values))} to {form(max(values))})"


def report(name: str, case: Case, repeats: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Measure one case and print its tables."""
    document: dict[str, Any] = {}
    for configuration in CONFIGURATIONS:
        show_progress(f"{name}: memory, {configuration}")
        figures = measured_alone(name, configuration)
        document[configuration] = {"summary_bytes": summary(figures), **figures}
    show_progress(f"{name}: step times")
    trainers = {key: Trainer(case, configuration) for key, configuration in CONFIGURATIONS.items()}
    times = alternate({key: trainer.step for key, trainer in trainers.items()}, repeats)
    del trainers
    rows, parts = [], []
    for key in CONFIGURATIONS:
        found = document[key]["summary_bytes"]
        base = "float32" if key.startswith("float32") else "emulated"
        ratio = times[key].median / times[base].median
        document[key] |= {"step": times[key].figures(), "step_over_unpacked": ratio}
        rows.append([
            key, mib(found["peak"]), mib(found["peak_spread"]), mib(found["ledger"]),
            mib(found["peak"] - found["ledger"]), f"{1e3 * times[key].median:.0f}", f"{ratio:.2f}",
        ])  # fmt: skip
        with_hooks = document[f"{base}, packed exactly"]["summary_bytes"]
        counted = found["counted_by_hooks"] or with_hooks["counted_as_plain_tensors"]
        parts.append([
            key, mib(found["end_of_forward"]), mib(counted), mib(found["rounded_weights"]),
            mib(found["end_of_forward"] - counted - found["rounded_weights"]), mib(found["ledger_activations"]),
            mib(found["forward"]), mib(found["backward"]), mib(found["weight_gradients"]),
        ])  # fmt: skip
    columns = ["MiB", "peak", "max - min", "ledger", "peak - ledger", "step ms", "over unpacked"]
    print_table(f"{name}: a step beyond weights and optimizer state", columns, rows)
    columns = [
        "MiB", "end of forward", "counted by hooks", "rounded weights", "rest", "ledger: activations, norm inputs",
        "peak in forward", "peak in backward", "weight gradients",
    ]  # fmt: skip
    print_table("Where it is", columns, parts)
    show_progress(f"{name}: gradients")
    document["gradient_errors"] = errors = gradient_errors(case, seeds)
    print_table(
        f"Gradient error of packing in e4m3fn, mean over {len(seeds)} seeds (lowest to highest)",
        ["against the unpacked run", "relative L2", "1 - cosine"],
        [
            [
                key,
                spread([one["relative_l2"] for one in found], "{:.3f}".format),
                spread([1 - one["cosine"] for one in found], "{:.1e}".format),
            ]
            for key, found in errors.items()
        ],
    )
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each kind (default 5)")
    parser.add_argument("--quick", action="store_true", help="smaller networks, one seed")
    parser.add_argument("--json", type=Path, help="where the figures go (of a whole run: results/)")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "CONFIGURATION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, configuration = arguments.measure
        print(json.dumps(measure((CASES | QUICK_CASES)[name], CONFIGURATIONS[configuration])))
        return
    keep_freed_memory()  # for the step times, as `fpsim run` does for every run
    description = machine()
    print_lines(description)
    cases, seeds = (QUICK_CASES, SEEDS[:1]) if arguments.quick else (CASES, SEEDS)
    document = {
        "machine": description,
        "method": " ".join((__doc__ or "").split()),
        "cases": {name: report(name, case, arguments.repeats, seeds) for name, case in cases.items()},
    }
    if arguments.json or not arguments.quick:
        write_json(arguments.json or results_path("saved_activations", description["processor"]), document)


if __name__ == "__main__":
    main()
