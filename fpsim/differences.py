"""`fpsim compare A B`: what two runs differ in, from their configurations, environments and results.

The document (`--json`), `a` and `b` being the runs:

    runs         their directories, and how far each is: its status, or "unfinished"
    config       [{key, a, b}]: dotted keys of the resolved configurations that differ; `absent` names the run that
                 lacks the key, if one does
    environment  the same of env.json
    results      [{name, a, b, difference, ratio}]: b - a and b / a of what was measured; empty where one is unfinished
    epochs       [{epoch, a, b}]: test accuracy in percent
    layers       [{layer, role, name, a, b, difference, ratio}]: bits an element and sparsity of tensors that differ
    only         {a, b}: layers that one run alone has
    bits         metrics: `equal`, or the first `step` (and `kind` of row) at which they differ, and in which `keys`;
                 weights: of the newest checkpoints, if both are of one step: `equal`, or the `tensors` that differ
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fpsim import checkpoint
from fpsim.config import config_to_yaml, load_config
from fpsim.config.tree import to_data
from fpsim.config.yaml_loader import parse_yaml
from fpsim.console import plain_console, print_table
from fpsim.errors import ConfigError, Problem, RunError
from fpsim.report.results import Results, TensorRecord, load_results
from fpsim.run_directory import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, RESULTS_FILE, rows_of, run_folder

MEASURED = {
    "test accuracy, final (%)": "test_accuracy_percent",
    "test accuracy, best (%)": "best_test_accuracy_percent",
    "test loss": "test_loss",
    "wall time (s)": "wall_seconds",
}
MIB = 8 * 2**20
ABSENT = "–"


@dataclass(frozen=True)
class Run:
    """What lies in a run directory. results: None of a run that has not finished."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: Results | None


def differences(a: str | Path, b: str | Path) -> dict[str, Any]:
    """The document of two runs, or of the newest in two folders of runs. Raises ConfigError for what is not a run, and
    RunError for damaged files."""
    one, other = _read(a), _read(b)
    results: list[dict[str, Any]] = []
    epochs: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    only: dict[str, list[str]] = {"a": [], "b": []}
    if one.results is not None and other.results is not None:
        results = _measured(one.results, other.results)
        epochs = _epochs(one.results, other.results)
        layers, only = _layers(one.results, other.results)
    return {
        "runs": {
            key: {"directory": str(run.folder), "status": _status(run)} for key, run in (("a", one), ("b", other))
        },
        "config": _changed(one.config, other.config),
        "environment": _changed(one.environment, other.environment),
        "results": results,
        "epochs": epochs,
        "layers": layers,
        "only": only,
        "bits": {"metrics": _metrics(one.metrics, other.metrics), "weights": _weights(one.folder, other.folder)},
    }


def _read(place: str | Path) -> Run:
    folder = run_folder(place)
    config = to_data(parse_yaml(config_to_yaml(load_config(folder / CONFIG_FILE)), CONFIG_FILE))
    file = folder / ENVIRONMENT_FILE
    try:
        environment = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}", str(file))]) from None
    has_results = (folder / RESULTS_FILE).is_file()
    return Run(
        folder, config, environment, rows_of(folder / METRICS_FILE), load_results(folder) if has_results else None
    )


def _status(run: Run) -> str:
    return "unfinished" if run.results is None else run.results["status"]


# --- what differs -----------------------------------------------------------------------------------------------------


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The dotted keys at which two mappings differ, in the order of the first, then of the second."""
    one, other = _flat(a), _flat(b)
    changed = []
    for key in dict.fromkeys([*one, *other]):
        row = {"key": key, "a": one.get(key), "b": other.get(key)}
        if key not in one or key not in other:
            changed.append({**row, "absent": "a" if key not in one else "b"})
        elif one[key] != other[key]:
            changed.append(row)
    return changed


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; lists of mappings by their numbers, other lists as they are."""
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        data = {str(number): item for number, item in enumerate(data)}
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _measured(a: Results, b: Results) -> list[dict[str, Any]]:
    values: dict[str, list[float | None]] = {
        title: [run[key] for run in (a, b)]  # type: ignore[literal-required]
        for title, key in MEASURED.items()
    }
    ledgers = [run["ledger"] for run in (a, b)]
    for title, sizes in (
        ("peak footprint", [one["footprint_bits"] for one in ledgers]),
        ("traffic per step", [one["traffic_bits_per_step"] for one in ledgers]),
    ):
        values[f"{title} (MiB)"] = [one["total"]["encoded"] / MIB for one in sizes]
        for role in dict.fromkeys(role for one in sizes for role in one["by_role"]):
            bits = [one["by_role"].get(role) for one in sizes]
            values[f"{title}, {role.replace('_', ' ')} (MiB)"] = [
                None if one is None else one["encoded"] / MIB for one in bits
            ]
    for role in ("gradient", "activation", "weight"):
        for title, of in SHARES.items():
            values[f"{role} {title}"] = [
                _mean((tensor for tensor in one["tensors"] if tensor["role"] == role), of) for one in ledgers
            ]
    return [{"name": name, **_compared(*pair)} for name, pair in values.items()]


def _bits(tensor: TensorRecord) -> float:
    return tensor["numel"] * tensor["bits_per_element"]


def _zeros(tensor: TensorRecord) -> float:
    return 100 * (tensor["numel"] - tensor["nonzeros"])


SHARES = {"bits an element": _bits, "sparsity (%)": _zeros}


def _mean(tensors: Iterable[TensorRecord], of: Callable[[TensorRecord], float]) -> float | None:
    """What `of` sums over the tensors, an element; None without elements."""
    known = list(tensors)
    elements = sum(tensor["numel"] for tensor in known)
    return sum(of(tensor) for tensor in known) / elements if elements else None


def _epochs(a: Results, b: Results) -> list[dict[str, Any]]:
    one, other = ({row["epoch"]: row["test_accuracy_percent"] for row in run["history"]} for run in (a, b))
    return [{"epoch": epoch, "a": one.get(epoch), "b": other.get(epoch)} for epoch in sorted({*one, *other})]


def _layers(a: Results, b: Results) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    one, other = _by_layer(a), _by_layer(b)
    rows = []
    for layer, role in one:
        if (layer, role) in other:
            for name, of in SHARES.items():
                values = [_mean(found[layer, role], of) for found in (one, other)]
                if values[0] != values[1]:
                    rows.append({"layer": layer, "role": role, "name": name, **_compared(*values)})
    names = [list(dict.fromkeys(layer for layer, _ in found)) for found in (one, other)]
    only = {"a": [x for x in names[0] if x not in names[1]], "b": [x for x in names[1] if x not in names[0]]}
    return rows, only


def _by_layer(run: Results) -> dict[tuple[str, str], list[TensorRecord]]:
    """A layer's tensors of a role: several where their codec changes."""
    found: dict[tuple[str, str], list[TensorRecord]] = {}
    for tensor in run["ledger"]["tensors"]:
        found.setdefault((tensor["layer"], tensor["role"]), []).append(tensor)
    return found


def _compared(a: float | None, b: float | None) -> dict[str, float | None]:
    if a is None or b is None:
        return {"a": a, "b": b, "difference": None, "ratio": None}
    return {"a": a, "b": b, "difference": b - a, "ratio": b / a if a else None}


def _metrics(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    for one, other in zip_longest(a, b):
        if json.dumps(one) != json.dumps(other):  # which tells -0 from 0
            row = one or other or {}
            keys = [key for key in row if (one or {}).get(key) != (other or {}).get(key)]
            return {"equal": False, "kind": row["kind"], "step": row["step"], "keys": keys if one and other else []}
    return {"equal": True}


def _weights(a: Path, b: Path) -> dict[str, Any] | None:
    """None where there are no checkpoints of one step."""
    newest = [checkpoint.checkpoints(folder / "checkpoints") for folder in (a, b)]
    if not all(newest) or newest[0][-1].name != newest[1][-1].name:
        return None
    one, other = (_tensors(found[-1] / checkpoint.MODEL_FILE) for found in newest)
    same = {name for name in one if name in other and _same_bits(one[name], other[name])}
    tensors = [name for name in dict.fromkeys([*one, *other]) if name not in same]
    return {"step": int(newest[0][-1].name.removeprefix("step-")), "equal": not tensors, "tensors": tensors}


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: cannot be read: {error}") from None


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
    )


# --- for a terminal ---------------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any]) -> None:
    """Print what differs, and say where nothing does."""
    console = plain_console()
    for key, run in found["runs"].items():
        console.print(f"{key}: {run['directory']} ({run['status']})")
    for title, key in (("configuration", "config"), ("environment", "environment")):
        console.print(f"\n{title}" if found[key] else f"\n{title}: the same", style="bold")
        if found[key]:
            print_table(["key", "a", "b"], [[row["key"], _value(row, "a"), _value(row, "b")] for row in found[key]])
    if found["results"]:
        console.print("\nresults", style="bold")
        cells = [
            [row["name"], *(_number(row[k]) for k in ("a", "b", "difference", "ratio"))] for row in found["results"]
        ]
        print_table(["", "a", "b", "b - a", "b / a"], cells)
    else:
        console.print("\nresults: not of both runs yet", style="bold")
    if any(row["a"] != row["b"] for row in found["epochs"]):
        console.print("\ntest accuracy (%) by epoch", style="bold")
        print_table(["epoch", "a", "b"], [[str(r["epoch"]), _number(r["a"]), _number(r["b"])] for r in found["epochs"]])
    if found["layers"]:
        console.print("\nlayers that differ", style="bold")
        cells = [
            [row["layer"], row["role"], row["name"], *(_number(row[column]) for column in ("a", "b", "ratio"))]
            for row in found["layers"]
        ]
        print_table(["layer", "tensor", "", "a", "b", "b / a"], cells)
    for key, layers in found["only"].items():
        if layers:
            console.print(f"\nonly {key} has the layers {', '.join(layers)}")
    console.print(f"\n{_told_of_metrics(found['bits']['metrics'])}")
    console.print(_told_of_weights(found["bits"]["weights"]))


def _told_of_metrics(metrics: Mapping[str, Any]) -> str:
    if metrics["equal"]:
        return "metrics: the same in every bit"
    if not metrics["keys"]:
        return f"metrics: the same in every bit as far as both go, before step {metrics['step']}"
    return f"metrics: differ from step {metrics['step']} on, in {', '.join(metrics['keys'])}"


def _told_of_weights(weights: Mapping[str, Any] | None) -> str:
    if weights is None:
        return "weights: no checkpoints of one step to compare"
    if weights["equal"]:
        return f"weights at step {weights['step']}: the same in every bit"
    shown = ", ".join(weights["tensors"][:6]) + (", ..." if len(weights["tensors"]) > 6 else "")
    return f"weights at step {weights['step']}: {len(weights['tensors'])} tensors differ: {shown}"


def _value(row: Mapping[str, Any], run: str) -> str:
    return "(absent)" if row.get("absent") == run else json.dumps(row[run])


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
