"""The report as Markdown, CSV and JSON; the JSON Schemas of its documents; `fpsim compare`."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

import fpsim
from fpsim.config import preset_folder
from fpsim.differences import differences
from fpsim.errors import ConfigError
from fpsim.report import compared, comparison, report_as, tables
from fpsim.report.document import document_schema
from fpsim.report.formats import render_csv, render_markdown
from fpsim.report.results import results_schema
from tests.fpsim.command_line import command

SETTINGS: dict[str, Any] = {
    "name": "small",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [32, 24]},
    "training": {"epochs": 1, "batch_size": 64, "optimizer": {"name": "sgd", "learning_rate": 0.2}},
    "threads": 1,
}
EMULATION: dict[str, Any] = {
    "exclude": ["last"],
    "weights": {"format": "e4m3fn", "scale": "amax"},
    "activations": {"format": "e4m3fn", "scale": "amax"},
    "gradients": {"format": "e5m2", "scale": "amax", "codec": "alpha", "pruning": {"sparsity": 0.8}},
}
RUNS: dict[str, dict[str, Any]] = {
    "emulated": {**SETTINGS, "emulation": EMULATION},
    "again": {**SETTINGS, "emulation": EMULATION},
    "sparser": {
        **SETTINGS,
        "emulation": {**EMULATION, "gradients": {**EMULATION["gradients"], "pruning": {"sparsity": 0.9}}},
    },
    "pruned": {
        **SETTINGS,
        "name": "pruned",
        "emulation": {**EMULATION, "weight_pruning": {"name": "magnitude", "sparsity": 0.5, "at_epochs": 0}},
    },
    "float32": {**SETTINGS, "name": "float32"},
    "deeper": {**SETTINGS, "name": "deeper", "model": {"name": "mlp", "hidden": [32, 24, 16]}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    for name, settings in RUNS.items():
        fpsim.run(settings, place / name, quiet=True)
    torch.set_num_threads(threads)
    return place


@pytest.fixture(scope="module")
def document(runs: Path) -> Any:
    return compared([runs / name for name in ("emulated", "pruned", "float32")])


# --- formats --------------------------------------------------------------------------------------------------------


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, as a reader of Markdown shows them."""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for token, inline in pairwise(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in inline.children or []))
    return found


def test_markdown_has_the_tables_of_the_terminal(document: Any) -> None:
    expected = [tables.runs_table(document)]
    for run in document["runs"][:2]:
        expected += [table for table in tables.tables_of(run) if table.rows]
    found = markdown_tables(render_markdown(document))
    assert found == [[list(table.header), *map(list, table.rows)] for table in expected]


def test_markdown_keeps_hostile_names_as_text(document: Any) -> None:
    hostile = "<b>|x|</b> *a* _b_ `c` [d](e) \\ # ~~s~~ $m$ & layer_1\nnew"
    changed = json.loads(json.dumps(document))
    changed["runs"][0]["label"] = changed["runs"][0]["gradients"][0]["layer"] = hostile
    text = render_markdown(changed)
    shown = " ".join(hostile.split())
    first, *_ = found = markdown_tables(text)
    assert first[0][1] == shown
    assert any(row[0] == shown for table in found for row in table)
    assert not re.search(r"<b>|<em>|<code>|<a ", MarkdownIt("commonmark").enable("table").render(text).split("<h3>")[0])


@pytest.mark.parametrize("label", ["- a", "+ a", "# a", "1. a", "12) a", "> a"])
def test_a_note_begins_no_list(label: str, document: Any) -> None:
    changed = json.loads(json.dumps(document))
    changed["runs"][0]["label"] = label
    tokens = MarkdownIt("commonmark").enable("table").parse(render_markdown(changed))
    kinds = {token.type for token in tokens}
    assert not kinds & {"bullet_list_open", "ordered_list_open", "blockquote_open"}
    assert sum(token.type == "heading_open" and token.tag == "h1" for token in tokens) == 1


def test_csv_is_the_document_in_numbers(document: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(document))))
    assert len(rows) == sum(len(run["tensors"]) for run in document["runs"])
    tensors = [(run, tensor) for run in document["runs"] for tensor in run["tensors"]]
    for row, (run, tensor) in zip(rows, tensors, strict=True):
        assert (row["label"], row["layer"], row["role"]) == (run["label"], tensor["layer"], tensor["role"])
        assert float(row["bits_per_element"]) == tensor["bits_per_element"]
        assert float(row["zeros_percent"]) == pytest.approx(100 - 100 * tensor["nonzeros"] / tensor["numel"], abs=1e-9)
        assert float(row["fp32_over_encoded"]) == 32 / tensor["bits_per_element"]
        always = tensor["role"] in ("master", "optimizer_state")
        assert float(row["bf16_over_encoded"]) == (32 if always else 16) / tensor["bits_per_element"]
        gradient = next((g for g in run["gradients"] if g["layer"] == tensor["layer"]), {})
        asked = gradient.get("asked_percent") if tensor["role"] == "gradient" else None
        assert row["gradient_asked_percent"] == ("" if asked is None else str(asked))
        for codec, bits in tensor["other_codecs_bits_per_element"].items():
            assert float(row[f"{codec}_bits_per_element"]) == bits


def test_csv_has_what_no_step_was_sampled_for(document: Any) -> None:
    changed = json.loads(json.dumps(document))
    changed["runs"] = changed["runs"][:2]
    for run in changed["runs"]:
        run["tensors"] = []
    rows = list(csv.DictReader(io.StringIO(render_csv(changed))))
    pruned = [row for run in changed["runs"] for row in run["gradients"] if row["asked_percent"] is not None]
    assert [row["layer"] for row in rows] == [row["layer"] for row in pruned]
    assert rows[0]["gradient_asked_percent"] == "80.0"
    assert rows[-1]["weight_mask_zeros_percent"] == str(100 * changed["runs"][1]["weight_pruning"]["sparsity"])


def test_csv_quotes_what_it_must(document: Any) -> None:
    changed = json.loads(json.dumps(document))
    changed["runs"][0]["label"] = hostile = 'a, "b"\nc'
    rows = list(csv.DictReader(io.StringIO(render_csv(changed))))
    assert rows[0]["label"] == hostile


def test_a_run_without_tensors_has_a_row(document: Any) -> None:
    changed = json.loads(json.dumps(document))
    changed["runs"][2]["tensors"] = []
    assert list(csv.DictReader(io.StringIO(render_csv(changed))))[-1]["label"] == "float32"


@pytest.mark.parametrize("kind", ["md", "csv", "json"])
def test_to_stdout_or_to_a_file(
    kind: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (runs / "emulated").iterdir()}
    out, err, code = command("report", capsys, monkeypatch, runs / "emulated", "--format", kind)
    assert (err, code) == ("", 0)
    assert out == report_as(kind, [runs / "emulated"])
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "emulated").iterdir()}
    place = tmp_path / "new" / "folder"
    told, err, code = command("report", capsys, monkeypatch, runs / "emulated", "--format", kind, "--output", place)
    assert (told, err, code) == (f"{place}/report.{kind}\n", "", 0)
    assert (place / f"report.{kind}").read_text() == out


def test_the_page_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err, code = command("report", capsys, monkeypatch, runs / "float32", "--format", "html", "--output", tmp_path)
    assert (out, err, code) == (f"{tmp_path}/report.html\n", "", 0)
    assert (tmp_path / "report.html").read_text().lstrip().startswith("<!DOCTYPE html>")


def test_options_that_exclude_each_other(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err, code = command("report", capsys, monkeypatch, runs / "float32", "--format", "md", "--json")
    assert (out, err, code) == ("", "--json and --format md exclude each other\n", 2)
    out, err, code = command("report", capsys, monkeypatch, runs / "float32", "--format", "pdf")
    assert code == 2
    assert "'md', 'csv', 'json', 'html'" in " ".join(err.replace("│", "").split())


# --- machines -------------------------------------------------------------------------------------------------------


def test_machines_that_are_asked_for(runs: Path) -> None:
    (run,) = compared([runs / "emulated"], ["tpu-like", "edge-npu"])["runs"]
    assert [one["machine"] for one in run["machines"]] == ["tpu-like", "edge-npu"]
    (noted,) = compared([runs / "emulated"])["runs"]
    assert run["machines"][1] == noted["machines"][0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tpu-lik"], "did you mean 'tpu-like'"),
        (["fp8-training"], "'fp8-training' describes no machine"),
        (["tpu-like", "tpu-like"], "names the machine 'tpu-like' twice"),
    ],
)
def test_machines_that_are_none(runs: Path, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compared([runs / "emulated"], names)


def test_a_run_whose_ledger_is_gone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "emulated", tmp_path / "run")
    (tmp_path / "run" / "ledger.jsonl").unlink()
    compared([tmp_path / "run"])
    out, err, code = command("report", capsys, monkeypatch, tmp_path / "run", "--machine", "tpu-like")
    assert (out, code) == ("", 1)
    assert err == f"fpsim: {tmp_path}/run/ledger.jsonl: No such file or directory\n"


# --- schemas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "schema"), [("results", results_schema), ("report", document_schema)])
def test_schemas_are_committed_and_describe_every_field(
    name: str, schema: Callable[[], Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = schema()
    out, err, code = command("schema", capsys, monkeypatch, name)
    assert (json.loads(out), err, code) == (expected, "", 0)
    assert json.loads((preset_folder() / f"fpsim-{name}.schema.json").read_text()) == expected
    jsonschema.Draft202012Validator.check_schema(expected)
    for section in (expected, *expected["$defs"].values()):
        assert section["description"]
        for key, field in section["properties"].items():
            assert field["description"].endswith("."), key


def test_results_and_reports_are_as_described(runs: Path) -> None:
    """And have no field beside."""
    strict = [json.loads(json.dumps(schema())) for schema in (results_schema, document_schema)]
    for schema in strict:
        for section in (schema, *schema["$defs"].values()):
            section["additionalProperties"] = False
    results, document = map(jsonschema.Draft202012Validator, strict)
    for name in RUNS:
        results.validate(json.loads((runs / name / "results.json").read_text()))
    document.validate(json.loads(report_as("json", [runs / name for name in RUNS])))
    document.validate(json.loads(json.dumps(comparison([]))))


def test_schemas_of_what_is_unknown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("schema", capsys, monkeypatch, "report")[2] == 0
    assert command("schema", capsys, monkeypatch, "reports")[2] == 2


# --- compare --------------------------------------------------------------------------------------------------------

fpsim_compare = partial(command, "compare")


def test_runs_of_one_configuration_are_the_same(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = differences(runs / "emulated", runs / "again")
    assert (found["config"], found["environment"], found["layers"]) == ([], [], [])
    assert found["only"] == {"a": [], "b": []}
    assert all(row["difference"] == 0 for row in found["results"] if row["name"] != "wall time (s)")
    assert found["bits"] == {"metrics": {"equal": True}, "weights": {"step": 22, "equal": True, "tensors": []}}
    out, err, code = fpsim_compare(capsys, monkeypatch, runs / "emulated", runs / "again")
    assert (err, code) == ("", 0)
    for line in ("configuration: the same", "environment: the same", "metrics: the same in every bit"):
        assert line in out.splitlines()
    assert "weights at step 22: the same in every bit" in out
    assert "by epoch" not in out


def test_what_a_sparsity_changes(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = differences(runs / "emulated", runs / "sparser")
    assert found["config"] == [{"key": "emulation.gradients.pruning.sparsity", "a": 0.8, "b": 0.9}]
    results = {row["name"]: row for row in found["results"]}
    sparsity, bits = results["gradient sparsity (%)"], results["gradient bits an element"]
    assert sparsity["difference"] == sparsity["b"] - sparsity["a"] > 3
    assert bits["ratio"] == bits["b"] / bits["a"] < 1
    assert {row["role"] for row in found["layers"]} >= {"gradient"}
    metrics, weights = found["bits"]["metrics"], found["bits"]["weights"]
    assert (metrics["equal"], metrics["kind"], metrics["step"]) == (False, "step", 1)
    assert metrics["keys"] == ["gradient_sparsity"]
    assert not weights["equal"]
    out, err, code = fpsim_compare(capsys, monkeypatch, runs / "emulated", runs / "sparser")
    assert (err, code) == ("", 0)
    assert re.search(r"emulation\.gradients\.pruning\.sparsity +0\.8 +0\.9", out)
    assert "metrics: differ from step 1 on, in gradient_sparsity" in out


def test_numbers_are_those_of_the_results(runs: Path) -> None:
    found = {row["name"]: row for row in differences(runs / "emulated", runs / "pruned")["results"]}
    for key, run in (("a", "emulated"), ("b", "pruned")):
        results = json.loads((runs / run / "results.json").read_text())
        assert found["test accuracy, final (%)"][key] == results["test_accuracy_percent"]
        traffic = results["ledger"]["traffic_bits_per_step"]["total"]["encoded"]
        assert found["traffic per step (MiB)"][key] == traffic / 8 / 2**20
        weights = [tensor for tensor in results["ledger"]["tensors"] if tensor["role"] == "weight"]
        zeros = sum(tensor["numel"] - tensor["nonzeros"] for tensor in weights)
        assert found["weight sparsity (%)"][key] == pytest.approx(100 * zeros / sum(t["numel"] for t in weights))


def test_keys_and_layers_that_one_run_lacks(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = differences(runs / "float32", runs / "deeper")
    assert {row["key"]: (row["a"], row["b"]) for row in found["config"]} == {
        "name": ("float32", "deeper"), "model.hidden": ([32, 24], [32, 24, 16]),
    }  # fmt: skip
    assert found["only"]["a"] == []
    assert len(found["only"]["b"]) == 1
    out, _, code = fpsim_compare(capsys, monkeypatch, runs / "float32", runs / "deeper")
    assert code == 0
    assert f"only b has the layers {found['only']['b'][0]}" in out
    changed = differences(runs / "emulated", runs / "float32")["config"]
    assert {"key": "emulation", "a": None, "b": None, "absent": "a"} in changed
    assert {row["key"] for row in changed if row.get("absent") == "b"} >= {"emulation.weights.format"}


def test_a_run_that_has_not_finished(runs: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """And whose metrics end early, with a checkpoint of other weights and another environment."""
    shutil.copytree(runs / "emulated", tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n")
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    (tmp_path / "run" / "env.json").write_text(json.dumps({**environment, "torch": "0.1"}))
    (newest,) = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]
    weights = load_file(newest / "model.safetensors")
    name = next(iter(weights))
    weights[name] = -weights[name]
    save_file(weights, newest / "model.safetensors")
    found = differences(runs / "emulated", tmp_path)
    assert found["runs"]["b"] == {"directory": str(tmp_path / "run"), "status": "unfinished"}
    assert (found["results"], found["epochs"], found["layers"]) == ([], [], [])
    assert found["environment"] == [{"key": "torch", "a": environment["torch"], "b": "0.1"}]
    assert found["bits"]["metrics"] == {"equal": False, "kind": "step", "step": 6, "keys": []}
    assert found["bits"]["weights"] == {"step": 22, "equal": False, "tensors": [name]}
    out, err, code = fpsim_compare(capsys, monkeypatch, runs / "emulated", tmp_path)
    assert (err, code) == ("", 0)
    for text in (
        "results: not of both runs yet",
        "the same in every bit as far as both go",
        f"1 tensors differ: {name}",
    ):
        assert text in out


def test_tensors_of_two_codecs_count_both(runs: Path, tmp_path: Path) -> None:
    """A layer whose codec changes has two entries: an element of all is compared."""
    shutil.copytree(runs / "emulated", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    tensors = results["ledger"]["tensors"]
    first = next(tensor for tensor in tensors if tensor["role"] == "gradient" and tensor["codec"] == "alpha")
    tensors.append({**first, "codec": "dense", "bits_per_element": 3 * first["bits_per_element"]})
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    found = differences(runs / "emulated", tmp_path / "run")["layers"]
    assert [(row["layer"], row["role"], row["name"]) for row in found] == [
        (first["layer"], "gradient", "bits an element")
    ]
    assert found[0]["ratio"] == pytest.approx(2)


def test_damaged_runs_are_told_in_a_line(runs: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    shutil.copytree(runs / "emulated", tmp_path / "run")
    (newest,) = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]
    (newest / "model.safetensors").write_bytes(b"short")
    out, err, code = fpsim_compare(capsys, monkeypatch, runs / "emulated", tmp_path / "run")
    assert (out, code) == ("", 1)
    assert err.startswith(f"fpsim: {newest}/model.safetensors: cannot be read: ")
    text = (tmp_path / "run" / "results.json").read_text()
    (tmp_path / "run" / "results.json").write_text(re.sub(r'"test_loss": [\d.]+', '"test_loss": NaN', text, count=1))
    for verb in (("report", tmp_path / "run", "--format", "json"), ("compare", tmp_path / "run", runs / "emulated")):
        out, err, code = command(str(verb[0]), capsys, monkeypatch, *verb[1:])
        assert (out, code) == ("", 2)
        assert "results.json: not valid JSON" in err


def test_the_json_of_compare(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, err, code = fpsim_compare(capsys, monkeypatch, runs / "emulated", runs / "sparser", "--json")
    assert (json.loads(out), err, code) == (differences(runs / "emulated", runs / "sparser"), "", 0)


def test_what_cannot_be_compared(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err, code = fpsim_compare(capsys, monkeypatch, runs / "emulated", tmp_path / "nowhere")
    assert (out, code) == ("", 2)
    assert err == f"{tmp_path}/nowhere: no config.yaml in it: not a run directory\n"
