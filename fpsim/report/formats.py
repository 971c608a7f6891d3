"""The report as Markdown, CSV and JSON.

md      the tables and notes of the terminal's report
csv     a row for each run, layer and tensor, in numbers: what a table program or pandas reads
json    the comparison document (`fpsim schema report` describes it), from which all others are made
"""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from accel.ledger import ALWAYS_FLOAT32, DENSE_BITS
from fpsim.report import tables

RUN_COLUMNS = (
    "label", "name", "group", "seed", "config_hash", "status", "emulated", "model", "data", "epochs", "steps",
    "test_accuracy_percent",
)  # fmt: skip
TENSOR_COLUMNS = ("layer", "role", "format", "codec", "numel", "nonzeros", "alphas", "bits_per_element")
GRADIENT_COLUMNS = (
    "asked_percent", "achieved_percent", "achieved_std_points", "lognormal_percent", "bias_percent", "cosine",
    "alpha_kept",
)  # fmt: skip


def render_markdown(comparison: dict[str, Any]) -> str:
    """Headings, tables and notes in GitHub's Markdown."""
    emulated = [run for run in comparison["runs"] if run["emulated"]]
    parts = [f"# {_escaped(' · '.join(run['label'] for run in comparison['runs']))}"]
    parts.append(_table(tables.runs_table(comparison)))
    parts += [_line(tables.baseline_note(run)) for run in emulated]
    parts += [_line(note) for note in (*tables.run_notes(comparison), tables.ledger_note(comparison))]
    for run in emulated:
        parts.append(f"## {_escaped(run['label'])}")
        parts += [f"### {_escaped(table.title)}\n\n{_table(table)}" for table in tables.tables_of(run) if table.rows]
        parts += [_line(note) for note in tables.notes_of(run)]
    return "\n\n".join(parts) + "\n"


def _table(table: tables.Table) -> str:
    lines = [table.header, tuple(":---" if number == 0 else "---:" for number in range(len(table.header)))]
    rows = [tuple(map(_escaped, row)) for row in table.rows]
    if table.has_total:
        rows[-1] = tuple(f"**{cell}**" if cell else "" for cell in rows[-1])
    header = tuple(map(_escaped, lines[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, lines[1], *rows))


def _escaped(text: str) -> str:
    """With nothing in it that Markdown or HTML would take for their own, in one line."""
    marked = re.sub(r"[\\`*~$\[\]|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(text: str) -> str:
    """The same as a paragraph, which begins neither a list nor a heading."""
    return re.sub(r"^(\d*)([-+#.)])", r"\1\\\2", _escaped(text))


def render_csv(comparison: dict[str, Any]) -> str:
    """A row for each run, layer and tensor of the ledger: counts and bits are means over the sampled steps; what a run
    or a tensor does not have is empty. Percentages of a pruned gradient are in the row of that gradient."""
    rows = [row for run in comparison["runs"] for row in _rows(run)]
    columns = dict.fromkeys(key for row in rows for key in row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(columns), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    gradients = {row["layer"]: row for row in run["gradients"]}
    pruning = run["weight_pruning"]
    own = {key: run[key] for key in RUN_COLUMNS}
    own["weight_mask_zeros_percent"] = 100 * pruning["sparsity"] if pruning else None
    rows = []
    for tensor in run["tensors"]:
        bits, role = tensor["bits_per_element"], tensor["role"]
        pruned = gradients.get(tensor["layer"], {}) if role == "gradient" else {}
        dense = {scheme: 32 if role in ALWAYS_FLOAT32 else width for scheme, width in DENSE_BITS.items()}
        rows.append(
            {
                **own,
                **{key: tensor[key] for key in TENSOR_COLUMNS},
                "zeros_percent": 100 * (1 - tensor["nonzeros"] / tensor["numel"]) if tensor["numel"] else None,
                **{f"{scheme}_over_encoded": width / bits if bits else None for scheme, width in dense.items()},
                "tag_entropy_bits_per_element": tensor["tag_entropy_bits_per_element"],
                "order0_entropy_bits_per_element": tensor["order0_entropy_bits_per_element"],
                **{f"gradient_{key}": pruned.get(key) for key in GRADIENT_COLUMNS},
                **{
                    f"{name}_bits_per_element": other for name, other in tensor["other_codecs_bits_per_element"].items()
                },
            }
        )
    counted = {row["layer"] for row in rows if row["role"] == "gradient"}
    rows += [
        {**own, "layer": layer, "role": "gradient", **{f"gradient_{key}": row[key] for key in GRADIENT_COLUMNS}}
        for layer, row in gradients.items()
        if layer not in counted and row["asked_percent"] is not None
    ]
    return rows or [own]


def render_json(comparison: dict[str, Any]) -> str:
    """The document, indented."""
    return json.dumps(comparison, indent=1, allow_nan=False) + "\n"


FORMATS = {"md": render_markdown, "csv": render_csv, "json": render_json}
