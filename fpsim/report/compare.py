"""Every number of the report, computed once from the runs' results."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from fpsim.report.document import DOCUMENT_VERSION
from fpsim.report.results import Bits, Results, TensorRecord

BITS_PER_MIB = 8 * 2**20
ROLES = ("weight", "master", "optimizer_state", "weight_gradient", "activation", "norm_input", "gradient")
SPARSITIES = ("asked_percent", "achieved_percent", "lognormal_percent", "lognormal_miss_points")
PASSES = ("forward", "dgrad", "wgrad", "update")
COPIED = (
    "name", "config_hash", "status", "seed", "emulated", "epochs", "steps", "wall_seconds", "model", "parameters",
    "data", "test_accuracy_percent", "best_test_accuracy_percent", "history", "environment",
)  # fmt: skip
RECORDED = ("over_time", "distributions", "formats", "machines", "config")
LIKE_FOR_LIKE = ("model", "parameters", "data", "seed", "epochs", "steps")


def comparison(results: Sequence[Results]) -> dict[str, Any]:
    """The runs beside each other, in the order given: plain data, from which the text, the page and all other formats
    are made. `fpsim.report.document` describes every field."""
    labels = _labels(results)
    float32_runs = [index for index, result in enumerate(results) if not result["emulated"]]
    return {
        "schema_version": DOCUMENT_VERSION,
        "runs": [_run(results, labels, index, float32_runs) for index in range(len(results))],
    }


def _run(results: Sequence[Results], labels: list[str], index: int, float32_runs: list[int]) -> dict[str, Any]:
    result = results[index]
    ledger = result["ledger"]
    gradients = _gradients(result)
    pruned = [row for row in gradients if row["asked_percent"] is not None]
    footprint, traffic = ledger["footprint_bits"], ledger["traffic_bits_per_step"]
    return {
        **{key: value for key, value in result.items() if key in COPIED},
        "label": labels[index],
        "group": _group(results, labels, index),
        "baseline": _baseline(results, labels, index, float32_runs) if result["emulated"] else None,
        "sampled_steps": len(ledger["sampled_steps"]),
        "footprint": {"total": _sizes(footprint["total"]), "by_role": _table_of_sizes(footprint["by_role"], ROLES)},
        "traffic": {
            "total": _sizes(traffic["total"]),
            "by_role": _table_of_sizes(traffic["by_role"], ROLES),
            "by_pass": _table_of_sizes(traffic["by_pass"], PASSES),
        },
        "sparsity": {key: _mean(pruned, key) for key in SPARSITIES},
        "weight_pruning": result.get("weight_pruning"),
        "communication": result.get("communication"),
        "notes": result.get("notes", []),
        "gradient_bits": _mean(gradients, "bits_per_element"),
        "pruned_gradient_bits": _mean(pruned, "bits_per_element"),
        "pruned_tag_entropy": _mean(pruned, "tag_entropy"),
        "pruned_order0_entropy": _mean(pruned, "order0_entropy"),
        "pruned_other_codecs": {
            codec: _mean([{"numel": row["numel"], codec: row["other_codecs"].get(codec)} for row in pruned], codec)
            for codec in dict.fromkeys(codec for row in pruned for codec in row["other_codecs"])
        },
        "gradients": gradients,
        "tensors": ledger["tensors"],
        **{key: result.get(key) for key in RECORDED},
    }


def _group(results: Sequence[Results], labels: list[str], index: int) -> str:
    """The name of the runs that are this one with other seeds; its own label where there is none."""

    def without_seed(result: Results) -> dict[str, Any] | None:
        config = result.get("config")
        return None if config is None else {**config, "seed": None}

    own = without_seed(results[index])
    same = [number for number, result in enumerate(results) if own is not None and without_seed(result) == own]
    first = same[0] if same else index
    return f"{results[first]['name']} ({len(same)} seeds)" if len(same) > 1 else labels[index]


def _seed(run: Results) -> str:
    return f" seed {run['seed']}"


def _arithmetic(run: Results) -> str:
    return " emulated" if run["emulated"] else " float32"


def _labels(results: Sequence[Results]) -> list[str]:
    """One distinct label per run: its name; where names repeat with what tells them apart: seed, arithmetic, or both;
    else with the configuration's hash and, if need be, a number."""
    same_name: dict[str, list[Results]] = defaultdict(list)
    for result in results:
        same_name[result["name"]].append(result)

    def label(result: Results) -> str:
        same = same_name[result["name"]]
        for told in (lambda run: "", _seed, _arithmetic, lambda run: f"{_arithmetic(run)}{_seed(run)}"):
            if len({told(run) for run in same}) == len(same):
                return f"{result['name']}{told(result)}"
        return f"{result['name']} {result['config_hash']}"

    labels = [label(result) for result in results]
    repeated = {label for label, count in Counter(labels).items() if count > 1}
    return [
        f"{label} #{labels[: index + 1].count(label)}" if label in repeated else label
        for index, label in enumerate(labels)
    ]


def _baseline(
    results: Sequence[Results], labels: list[str], index: int, float32_runs: list[int]
) -> dict[str, Any] | None:
    """The float32 run that has most in common with this one, what they differ in, and the accuracy between them."""
    if not float32_runs:
        return None
    run: Any = results[index]

    def differences(other: int) -> dict[str, tuple[Any, Any]]:
        reference: Any = results[other]
        return {key: (run[key], reference[key]) for key in LIKE_FOR_LIKE if run[key] != reference[key]}

    nearest = min(float32_runs, key=lambda other: len(differences(other)))
    ours, theirs = run["test_accuracy_percent"], results[nearest]["test_accuracy_percent"]
    return {
        "label": labels[nearest],
        "differences": differences(nearest),
        "accuracy_difference_points": None if ours is None or theirs is None else ours - theirs,
    }


def _sizes(bits: Bits) -> dict[str, float | None]:
    encoded = bits["encoded"]
    return {
        "encoded_mib": encoded / BITS_PER_MIB,
        "fp32_mib": bits["fp32"] / BITS_PER_MIB,
        "bf16_mib": bits["bf16"] / BITS_PER_MIB,
        "fp32_ratio": bits["fp32"] / encoded if encoded else None,
        "bf16_ratio": bits["bf16"] / encoded if encoded else None,
    }


def _table_of_sizes(bits: dict[str, Bits], order: Sequence[str]) -> dict[str, dict[str, float | None]]:
    keys = [key for key in order if key in bits] + [key for key in bits if key not in order]
    return {key: _sizes(bits[key]) for key in keys}


def _gradients(result: Results) -> list[dict[str, Any]]:
    """One entry per layer that has a neural gradient, in the ledger's order: pruning and encoding joined."""
    recorded = {record["layer"]: record for record in result["ledger"]["tensors"] if record["role"] == "gradient"}
    pruned = {entry["layer"]: entry for entry in result["gradients"]}
    rows = []
    for layer in dict.fromkeys([*recorded, *pruned]):
        entry, record = pruned.get(layer), recorded.get(layer)
        asked = entry["asked_sparsity"] if entry else None
        lognormal = entry["lognormal_rule_sparsity"] if entry else None
        rows.append(
            {
                "layer": layer,
                "asked_percent": _percent(asked),
                "achieved_percent": _percent(entry["achieved_sparsity"] if entry else None),
                "achieved_std_points": _percent(entry["achieved_std"] if entry else None),
                "miss_points": _percent(entry["achieved_sparsity"] - entry["asked_sparsity"] if entry else None),
                "alpha_kept": entry.get("alpha_kept") if entry else None,
                "bias_percent": _percent(entry.get("bias") if entry else None),
                "bias_error_points": _percent(entry.get("bias_standard_error") if entry else None),
                "cosine": entry.get("cosine") if entry else None,
                "lognormal_percent": _percent(lognormal),
                "lognormal_miss_points": _percent(None if lognormal is None or asked is None else lognormal - asked),
                **_encoding(record),
            }
        )
    return rows


def _encoding(record: TensorRecord | None) -> dict[str, Any]:
    return {
        "numel": record["numel"] if record else None,
        "format": record["format"] if record else None,
        "codec": record["codec"] if record else None,
        "bits_per_element": record["bits_per_element"] if record else None,
        "tag_entropy": record["tag_entropy_bits_per_element"] if record else None,
        "order0_entropy": record["order0_entropy_bits_per_element"] if record else None,
        "other_codecs": record["other_codecs_bits_per_element"] if record else {},
    }


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _mean(rows: Iterable[dict[str, Any]], key: str) -> float | None:
    """Mean of `key` weighted by elements; None unless every row has it."""
    weighted = [(row["numel"], row[key]) for row in rows]
    if not weighted or any(numel is None or value is None for numel, value in weighted):
        return None
    elements = sum(numel for numel, _ in weighted)
    return sum(numel * value for numel, value in weighted) / elements if elements else None
