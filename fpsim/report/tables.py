"""The comparison as tables, cards and notes of finished strings; the terminal and the HTML only lay them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ABSENT = "–"

RunRow = tuple[str, Callable[[dict[str, Any]], str]]  # title, and the cell of a run


@dataclass(frozen=True)
class Table:
    """Rows of finished cells under a header; the first column names the row, the others are right-aligned."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    has_total: bool = False
    wraps: bool = False  # cells may hold text that wraps, not only numbers


@dataclass(frozen=True)
class Card:
    """One headline number."""

    title: str
    value: str
    detail: str


def number(value: float | None, decimals: int = 2, sign: str = "") -> str:
    """`value` with thousands separators; a dash where there is none."""
    return ABSENT if value is None else f"{value:{sign},.{decimals}f}"


def runs_table(comparison: dict[str, Any]) -> Table:
    """One column per run."""
    rows: list[RunRow] = [
        ("arithmetic", lambda run: "emulated" if run["emulated"] else "float32"),
        ("model", lambda run: f"{run['model']}, {run['parameters']:,} parameters"),
        ("data", lambda run: run["data"]),
        ("status", lambda run: run["status"]),
        ("seed", lambda run: str(run["seed"])),
        ("epochs (steps)", lambda run: f"{run['epochs']} ({run['steps']:,})"),
        ("test accuracy, final (%)", lambda run: number(run["test_accuracy_percent"])),
        ("test accuracy, best (%)", lambda run: number(run["best_test_accuracy_percent"])),
        ("final, against float32 (points)", _accuracy_difference),
        *_size_rows("peak footprint", "footprint"),
        *_size_rows("traffic per step", "traffic"),
        ("gradient sparsity asked (%)", lambda run: number(run["sparsity"]["asked_percent"], 1)),
        ("gradient sparsity achieved (%)", lambda run: number(run["sparsity"]["achieved_percent"], 1)),
        ("weight sparsity (%)", _weight_sparsity),
        ("bits per gradient element", lambda run: number(run["gradient_bits"])),
        ("wall time (s)", lambda run: number(run["wall_seconds"], 1)),
    ]
    runs = comparison["runs"]
    if any(run["communication"] for run in runs):
        rows += [
            ("ranks", lambda run: str((run["communication"] or {"ranks": 1})["ranks"])),
            ("weight gradients sent as", _sent_as),
            ("sent by a rank per step (KiB)", lambda run: number(_sent(run), 1)),
            ("float32 / sent", lambda run: number(_float32_over_sent(run))),
        ]
    return Table(
        title="Runs",
        header=("", *(run["label"] for run in runs)),
        rows=tuple((title, *(cell(run) for run in runs)) for title, cell in rows),
        wraps=True,
    )


def run_notes(comparison: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know of each run."""
    return [f"{run['label']}: {note}." for run in comparison["runs"] for note in run["notes"]]


def _sent_as(run: dict[str, Any]) -> str:
    told = run["communication"]
    return ABSENT if told is None else ", ".join(part for part in (told["format"], told["codec"]) if part)


def _sent(run: dict[str, Any]) -> float | None:
    told = run["communication"]
    return None if told is None else told["sent_bytes_per_step"] / 1024


def _float32_over_sent(run: dict[str, Any]) -> float | None:
    told = run["communication"]
    return (
        told["float32_bytes_per_step"] / told["sent_bytes_per_step"] if told and told["sent_bytes_per_step"] else None
    )


def footprint_table(run: dict[str, Any]) -> Table:
    """Peak footprint per role."""
    return _sizes_table("Peak footprint by role", "role", run["footprint"]["by_role"], run["footprint"]["total"])


def traffic_tables(run: dict[str, Any]) -> tuple[Table, Table]:
    """Traffic per step: per role, per pass."""
    traffic = run["traffic"]
    return (
        _sizes_table("Traffic per step by role", "role", traffic["by_role"], traffic["total"]),
        _sizes_table("Traffic per step by pass", "pass", traffic["by_pass"], traffic["total"]),
    )


def gradients_table(run: dict[str, Any]) -> Table:
    """One row per layer with a neural gradient; the last one is the pruned layers' mean, weighted by elements."""
    codecs = tuple(dict.fromkeys(codec for row in run["gradients"] for codec in row["other_codecs"]))
    rows = [
        (
            row["layer"],
            number(row["asked_percent"], 1),
            _mean_and_deviation(row["achieved_percent"], row["achieved_std_points"]),
            number(row["lognormal_percent"], 1),
            number(row["lognormal_miss_points"], 1, "+"),
            row["alpha_kept"] or ABSENT,
            _mean_and_error(row["bias_percent"], row["bias_error_points"]),
            number(row["cosine"], 3),
            row["format"] or ABSENT,
            row["codec"] or ABSENT,
            number(row["bits_per_element"]),
            number(row["tag_entropy"]),
            number(row["order0_entropy"]),
            *(number(row["other_codecs"].get(codec)) for codec in codecs),
        )
        for row in run["gradients"]
    ]
    sparsity = run["sparsity"]
    total = (
        "pruned layers",
        number(sparsity["asked_percent"], 1),
        number(sparsity["achieved_percent"], 1),
        number(sparsity["lognormal_percent"], 1),
        number(sparsity["lognormal_miss_points"], 1, "+"),
        "",
        "",
        "",
        "",
        "",
        number(run["pruned_gradient_bits"]),
        number(run["pruned_tag_entropy"]),
        number(run["pruned_order0_entropy"]),
        *(number(run["pruned_other_codecs"].get(codec)) for codec in codecs),
    )
    has_total = sparsity["asked_percent"] is not None
    header = (
        "layer", "asked (%)", "achieved (%)", "lognormal rule (%)", "its miss (points)", "±alpha exact by",
        "bias (%)", "cosine", "format", "codec", "encoded (bits)", "tag entropy (bits)", "order-0 entropy (bits)",
        *(f"{codec} (bits)" for codec in codecs),
    )  # fmt: skip
    return Table(
        title="Neural gradients by layer: sparsity (%) and bits per element",
        header=header,
        rows=(*rows, total) if has_total else tuple(rows),
        has_total=has_total,
    )


def weights_table(run: dict[str, Any]) -> Table:
    """One row per layer whose weights are pruned, and all of them; no rows where none is."""
    pruning = run["weight_pruning"] or {"layers": []}
    layers = pruning["layers"]
    rows = [_weights_row(layer["layer"], layer["numel"], layer["zeros"]) for layer in layers]
    if rows:
        rows.append(_weights_row("all", *(sum(layer[key] for layer in layers) for key in ("numel", "zeros"))))
    header = ("layer", "weights", "zeros", "sparsity (%)")
    return Table("Pruned weights by layer", header, tuple(rows), has_total=bool(rows))


def weights_note(run: dict[str, Any]) -> str | None:
    """What the renewals of the masks did, and what an snr threshold means."""
    pruning = run["weight_pruning"]
    if pruning is None:
        return None
    renewals, returned = pruning["renewals"], pruning["returned"]
    note = f"Weights pruned by {pruning['name']}: {renewals} renewals of the masks; {returned:,} weights returned."
    if "threshold" not in pruning:
        return note
    parts = "whole gradients" if pruning["parts"] is None else f"{pruning['parts']} parts a step"
    rate = f"{100 * pruning['false_prune_rate']:.1f} %"
    return f"{note} The threshold {pruning['threshold']:.3g} ({parts}) takes {rate} of pure noise for noise."


def cards(run: dict[str, Any]) -> tuple[Card, ...]:
    """The headline of one run."""
    baseline = run["baseline"]
    accuracy = f"best {number(run['best_test_accuracy_percent'])} %"
    if baseline:
        caveat = ", not like for like" if baseline["differences"] else ""
        accuracy = f"{_accuracy_difference(run)} points against {baseline['label']}{caveat}"
    headline = (Card("Test accuracy", f"{number(run['test_accuracy_percent'])} %", accuracy),)
    if not run["emulated"]:
        return headline
    return (
        *headline,
        Card("Bits per gradient element", number(run["gradient_bits"]), _bits_detail(run)),
        _ratio_card("Peak footprint", run["footprint"]["total"]),
        _ratio_card("Traffic per step", run["traffic"]["total"]),
        *_machine_cards(run),
    )


def _bits_detail(run: dict[str, Any]) -> str:
    bits = run["gradient_bits"]
    parts = [f"fp32 / encoded {number(32 / bits)}, bf16 / encoded {number(16 / bits)}" if bits else None]
    if run["pruned_gradient_bits"] is not None:
        parts.append(f"pruned layers {number(run['pruned_gradient_bits'])}")
        parts.append(f"tag entropy {number(run['pruned_tag_entropy'])}")
    return "; ".join(part for part in parts if part)


def _machine_cards(run: dict[str, Any]) -> list[Card]:
    """Time and energy of a step on the first machine that takes the run."""
    on = next((one for one in run["machines"] or [] if one["totals"]), None)
    if on is None:
        return []
    totals = on["totals"]
    cards = []
    for title, key, unit in (("Time", "seconds", "ms"), ("Energy", "joules", "mJ")):
        encoded = totals["encoded"][key]
        ratios = {scheme: number(total[key] / encoded) if encoded else ABSENT for scheme, total in totals.items()}
        detail = (
            f"bf16 / encoded {ratios.get('bf16', ABSENT)}; {1e3 * encoded:,.3g} {unit} estimated on {on['machine']}"
        )
        cards.append(Card(f"{title} of a step, fp32 / encoded", ratios.get("fp32", ABSENT), detail))
    return cards


def machine_tables(run: dict[str, Any]) -> list[Table]:
    """What a step takes on machines, and why one cannot run it; empty where none was estimated."""
    rows: list[tuple[str, ...]] = []
    for one in run["machines"] or []:
        if one["error"] is not None:
            rows.append((one["machine"], f"cannot run it: {one['error']}", *[ABSENT] * 6))
        encoded = one["totals"].get("encoded")
        for scheme, total in one["totals"].items():
            over = [
                number(total[key] / encoded[key]) if encoded[key] else ABSENT
                for key in ("seconds", "joules", "main_memory_bytes")
            ]
            measured = (1e3 * total["seconds"], 1e3 * total["joules"], total["main_memory_bytes"] / 1e6)
            rows.append((one["machine"], scheme, *(f"{value:,.4g}" for value in measured), *over))
    header = ("machine", "scheme", "ms", "mJ", "main memory (MB)", "x time", "x energy", "x traffic")
    title = "A step on described machines; x: over the encoded one"
    return [Table(title, header, tuple(rows), wraps=any(one["error"] for one in run["machines"] or []))] if rows else []


def tables_of(run: dict[str, Any]) -> list[Table]:
    """Every table of one run; those without rows have nothing to tell."""
    return [
        footprint_table(run), *traffic_tables(run), gradients_table(run), weights_table(run), *machine_tables(run),
    ]  # fmt: skip


def notes_of(run: dict[str, Any]) -> list[str]:
    """What is to be said of them."""
    return [note for note in (miss_note(run), weights_note(run)) if note is not None]


def baseline_note(run: dict[str, Any]) -> str:
    """What the accuracy of an emulated run is measured against, and whether that is like for like."""
    baseline = run["baseline"]
    if baseline is None:
        return f"{run['label']}: no float32 run beside it, so its accuracy has no baseline here."
    if not baseline["differences"]:
        return f"{run['label']} against {baseline['label']}: same model, data, seed, epochs and steps."
    pairs = "; ".join(f"{key} {ours} against {theirs}" for key, (ours, theirs) in baseline["differences"].items())
    return f"{run['label']} against {baseline['label']} is NOT like for like: {pairs}."


def miss_note(run: dict[str, Any]) -> str | None:
    """The largest misses of the sparsity asked, by the rule that ran and by the lognormal rule."""
    missed = [row for row in run["gradients"] if row["miss_points"] is not None]
    if not missed:
        return None
    worst = max(missed, key=lambda row: abs(row["miss_points"]))
    note = f"Largest miss of the sparsity asked: {worst['miss_points']:+.1f} points ({worst['layer']})"
    fitted = [row for row in missed if row["lognormal_miss_points"] is not None]
    if not fitted:
        return note + "."
    worst = max(fitted, key=lambda row: abs(row["lognormal_miss_points"]))
    return f"{note}; the lognormal rule's: {worst['lognormal_miss_points']:+.1f} points ({worst['layer']})."


def ledger_note(comparison: dict[str, Any]) -> str:
    """On how many steps the footprints, traffic and bits per element rest."""
    steps = "; ".join(f"{run['label']}: {run['sampled_steps']} of {run['steps']:,}" for run in comparison["runs"])
    return (
        f"Footprint, traffic and bits per element are counted on sampled steps ({steps}); sparsity on every step. "
        "A ratio above 1 is a saving, below 1 a loss. Sparsity counts the zeros that a gradient had before pruning "
        "(behind ReLU or pooling), so it may exceed what was asked."
    )


def _size_rows(title: str, part: str) -> tuple[RunRow, ...]:
    return (
        (f"{title} (MiB)", lambda run: number(run[part]["total"]["encoded_mib"])),
        (f"{title}, fp32 / encoded", lambda run: number(run[part]["total"]["fp32_ratio"])),
        (f"{title}, bf16 / encoded", lambda run: number(run[part]["total"]["bf16_ratio"])),
    )


def _weight_sparsity(run: dict[str, Any]) -> str:
    return number(100 * run["weight_pruning"]["sparsity"], 1) if run["weight_pruning"] else ABSENT


def _weights_row(name: str, numel: int, zeros: int) -> tuple[str, ...]:
    return name, f"{numel:,}", f"{zeros:,}", number(100 * zeros / numel, 1)


def _accuracy_difference(run: dict[str, Any]) -> str:
    return number(run["baseline"]["accuracy_difference_points"], 2, "+") if run["baseline"] else ABSENT


def _mean_and_deviation(mean: float | None, deviation: float | None) -> str:
    return ABSENT if mean is None else f"{number(mean, 1)} ± {number(deviation, 1)}"


def _mean_and_error(mean: float | None, error: float | None) -> str:
    """A mean and the standard error that it has, where more than one step was measured."""
    if mean is None:
        return ABSENT
    return number(mean, 2, "+") + ("" if error is None else f" ± {number(error)}")


def _ratio_card(title: str, sizes: dict[str, float | None]) -> Card:
    detail = f"bf16 / encoded {number(sizes['bf16_ratio'])}; {number(sizes['encoded_mib'])} MiB encoded"
    return Card(f"{title}, fp32 / encoded", number(sizes["fp32_ratio"]), detail)


def _sizes_table(
    title: str, first: str, sizes: dict[str, dict[str, float | None]], total: dict[str, float | None]
) -> Table:
    header = (first, "encoded (MiB)", "fp32 (MiB)", "bf16 (MiB)", "fp32 / encoded", "bf16 / encoded")
    keys = (("encoded_mib", 3), ("fp32_mib", 3), ("bf16_mib", 3), ("fp32_ratio", 2), ("bf16_ratio", 2))
    rows = tuple(
        (name.replace("_", " "), *(number(size[key], decimals) for key, decimals in keys))
        for name, size in [*sizes.items(), ("total", total)]
    )
    return Table(title, header, rows, has_total=True)
