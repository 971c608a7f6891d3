"""results.json of a run: what it came to, put together from its session when it has ended.

`fpsim.report.results` describes every field.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from scipy.special import ndtr

import accel
from fpsim.arguments import Floats
from fpsim.config import config_hash, what_counts
from fpsim.environment import environment
from fpsim.gradients.distribution import Distributions
from fpsim.machine_costs import machine_costs, machines_of
from fpsim.report.results import SCHEMA_VERSION
from fpsim.run_directory import SAMPLES_FILE
from fpsim.session import Session

ROLES = {"X": "activation", "W": "weight", "dY": "gradient", "dW": "weight_gradient"}
PASS_OF_ROLE = {"gradient": "dgrad", "activation": "forward", "weight": "forward"}  # in which it stands once a use
BINS = 60  # of a histogram of log2|x|
SIGMAS = [step / 5 for step in range(-16, 17)]  # standard deviations at which quantiles are taken
LISTED_BITS = 8  # the widest format whose numbers are listed


def results_of(session: Session) -> dict[str, Any]:
    """The content of results.json; on ranks beyond the first without what rank 0 alone has."""
    config, last, emulator = session.config, session.history[-1], session.emulator
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "config_hash": config_hash(config),
        "status": "completed",
        "seed": config.seed,
        "emulated": config.emulation is not None,
        "epochs": config.training.epochs,
        "steps": session.total_steps,
        "wall_seconds": session.seconds,
        "model": config.model.name,
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "data": session.dataset.description,
        "test_accuracy_percent": last["test_accuracy_percent"],
        "best_test_accuracy_percent": max(row["test_accuracy_percent"] for row in session.history),
        "test_loss": last["test_loss"],
        "history": session.history,
        "gradients": emulator.statistics,
        "gradient_formats": emulator.gradient_formats,
        "weight_pruning": weight_pruning.summary if (weight_pruning := emulator.weight_pruning) else None,
        "ledger": emulator.ledger.summary(),
        "communication": session.exchange.summary,
        "notes": session.notes,
        **(_recorded(session) if session.ranks.is_first else {}),
        "config": what_counts(config),
        "environment": environment(session.ranks.count),
    }


def _recorded(session: Session) -> dict[str, Any]:
    emulator, file = session.emulator, session.folder / SAMPLES_FILE
    samples = load_file(file) if file.is_file() else {}
    return {
        "over_time": over_time(emulator.ledger, emulator.distributions),
        "distributions": distributions(emulator.distributions, samples),
        "formats": {name: _format(fmt) for name, fmt in emulator.formats.items()},
        "machines": machine_costs(machines_of(session.config), emulator.ledger),
    }


def over_time(ledger: accel.Ledger, recorded: Distributions) -> dict[str, Any]:
    """Sparsity and bits an element of every layer's encoded tensors, and the cosine of its pruned gradient, step by
    sampled step: None where a step has none."""
    steps = ledger.steps
    place = {step: number for number, step in enumerate(steps)}
    sums: dict[tuple[str, str], Floats] = defaultdict(lambda: np.zeros((3, len(steps))))
    for record in ledger.records:
        if PASS_OF_ROLE.get(record.role) == record.pass_name and not record.stored.is_float32:
            counts = record.stored.numel, record.stored.nonzeros, record.stored.nbits
            sums[record.layer, record.role][:, place[record.step]] += counts
    cosines: dict[str, list[float | None]] = defaultdict(lambda: [None] * len(steps))
    for row in recorded.rows:
        if row.get("cosine") is not None and row["step"] in place:
            cosines[row["layer"]][place[row["step"]]] = row["cosine"]
    series = []
    for (layer, role), (numel, nonzeros, bits) in sums.items():
        found: dict[str, Any] = {
            "layer": layer,
            "role": role,
            "sparsity": _shares(numel - nonzeros, numel),
            "bits_per_element": _shares(bits, numel),
        }
        if role == "gradient" and layer in cosines:
            found["cosine"] = cosines[layer]
        series.append(found)
    return {"steps": steps, "series": series}


def _shares(part: Floats, whole: Floats) -> list[float | None]:
    return [float(some / all_) if all_ else None for some, all_ in zip(part, whole, strict=True)]


def distributions(recorded: Distributions, samples: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """How every tensor of the latest recorded step is distributed, and stored; given its samples by "role layer"."""
    latest = {f"{row['role']} {row['layer']}": row for row in recorded.rows}
    return [_distribution(latest[name], samples[name]) for name in latest if name in samples]


def _distribution(row: dict[str, Any], sample: Floats) -> dict[str, Any]:
    return {
        "layer": row["layer"],
        "role": ROLES[row["role"]],
        "step": row["step"],
        "elements": row["elements"],
        "zeros": row["zeros"],
        "mean_log2": row["mean_log2"],
        "std_log2": row["std_log2"],
        "statistics": row["statistics"],
        "format": row.get("format"),
        "scale": row.get("scale"),
        "scales": row.get("scales"),
        "alpha": row.get("alpha") or None,
        "sample": _sample(sample.astype(np.float64)),
    }


def _sample(x: Floats) -> dict[str, Any] | None:
    """The nonzeros of a sample: a histogram of log2|x|, moments of x, quantiles of both in standard deviations from
    their means. None where two different magnitudes are not there."""
    values = x[x != 0]
    if not np.isfinite(values).all() or values.size < 2 or np.ptp(np.abs(values)) == 0:
        return None
    logs = np.log2(np.abs(values))
    counts, edges = np.histogram(logs, BINS)
    shares = ndtr(SIGMAS)
    return {
        "count": int(values.size),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "mean_log2": float(logs.mean()),
        "std_log2": float(logs.std()),
        "log2_histogram": {"lowest": float(edges[0]), "highest": float(edges[-1]), "counts": counts.tolist()},
        "sigmas": SIGMAS,
        "quantiles": _standardized(values, shares),
        "log2_quantiles": _standardized(logs, shares),
    }


def _standardized(values: Floats, shares: Floats) -> list[float]:
    deviation = values.std()
    return [float(one) for one in (np.quantile(values, shares) - values.mean()) / (deviation or math.inf)]


def _format(fmt: accel.Format | accel.BlockFormat) -> dict[str, Any]:
    """What a number line needs: of a block format its elements'."""
    element = fmt.element if isinstance(fmt, accel.BlockFormat) else fmt
    numbers = None
    if element.bits <= LISTED_BITS:
        numbers = sorted({float(value) for value in element.codes() if 0 < value < math.inf})
    return {
        "bits": element.bits,
        "block_size": fmt.block_size if isinstance(fmt, accel.BlockFormat) else None,
        "max": element.max,
        "min_normal": element.min_normal,
        "min_subnormal": element.min_subnormal,
        "positive_numbers": numbers,
    }
