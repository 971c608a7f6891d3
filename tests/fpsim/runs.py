"""A tiny run, and what of it must not depend on interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fpsim import checkpoint

FILES = [
    ".lock",
    "checkpoints",
    "config.yaml",
    "distributions.jsonl",
    "distributions.safetensors",
    "env.json",
    "epochs.csv",
    "ledger.jsonl",
    "log.jsonl",
    "metrics.jsonl",
    "products.jsonl",
    "results.json",
    "steps.csv",
    "weights.jsonl",
]
LINES = ("metrics.jsonl", "ledger.jsonl", "products.jsonl", "distributions.jsonl", "weights.jsonl")
VARYING = ("env.json", "log.jsonl", "results.json")  # times, and the machine
STEPS, STEPS_PER_EPOCH = 10, 5
DATA = {"name": "synthetic", "train_samples": 43, "test_samples": 16, "image_size": 4, "classes": 4}
SGD = {"name": "sgd", "learning_rate": 0.05}
ADAM = {"name": "adam", "learning_rate": 0.01}
EMULATED: dict[str, Any] = {
    "weights": {"format": "e4m3fn", "scale": "amax", "granularity": "channel", "rounding": "stochastic"},
    "activations": {"format": "e4m3fn", "scale": "power_of_two"},
    "gradients": {
        "format": "e5m2",
        "rounding": "stochastic",
        "scale": "lognormal_mean",
        "pruning": {"sparsity": 0.8, "refresh": 3},
        "codec": "alpha",
    },
    "exclude": ["last"],
    "ledger": {"every_steps": 4},
}


def settings(**changes: Any) -> dict[str, Any]:
    """A run of 10 steps in 2 epochs, a checkpoint every 3 steps."""
    training = {
        "epochs": 2,
        "batch_size": 8,
        "optimizer": SGD,
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "checkpoint": {"every_steps": 3, "keep": 2},
    }
    return {
        "name": "tiny",
        "seed": 7,
        "threads": 1,
        "data": {**DATA, "augment": True},
        "model": {"name": "mlp", "hidden": [16, 12]},
        "training": {**training, **changes.pop("training", {})},
        "emulation": EMULATED,
        **changes,
    }


def outcome(folder: Path) -> dict[str, Any]:
    """Everything in a run directory that must not depend on interruptions."""
    results = json.loads((folder / "results.json").read_text())
    for key in ("wall_seconds", "environment"):
        del results[key]
    newest = checkpoint.checkpoints(folder / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    del state["seconds"]
    return {
        "results": results,
        "state": state,
        **{name: (newest / name).read_bytes() for name in checkpoint.FILES[:3]},
        **{name: (folder / name).read_bytes() for name in FILES if name not in ("checkpoints", *VARYING)},
        "files": sorted(path.name for path in folder.iterdir()),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }
