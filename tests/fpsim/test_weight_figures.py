"""`fpsim reproduce snr`: what is trained, at which sparsities, and what is written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from fpsim.config import load_config, load_section, preset_folder
from fpsim.figures.weight_sparsity import Plan
from tests.fpsim.command_line import command

pytestmark = pytest.mark.usefixtures("restored_threads")

EXPERIMENT = """
name: tiny
threads: 1
data: {name: digits}
model: {name: mlp}
training: {epochs: 3, batch_size: 16, micro_batches: 4, optimizer: {name: sgd, learning_rate: 0.05}}
"""
PLAN = """
cases:
  - {experiment: tiny.yaml, data: [wine], networks: [{name: mlp, hidden: [8]}]}
snr: [{}, {agreement: either, threshold: {false_prune_rate: 0.7}}]
sparsities: [0.5, 0.9]
seeds: 2
"""
METHODS = ["dense", "snr", "snr-0.7-either", "dpf@0.5", "dpf@0.9"]
RIVALS = ["dpf@snr", "gmp@snr", "dpf@snr-0.7-either", "gmp@snr-0.7-either"]

reproduce = partial(
    command,
    "reproduce",
)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "plan.yaml"


def test_rivals_train_at_the_sparsity_that_snr_ends_with(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err, code = reproduce(capsys, monkeypatch, "snr", "--config", plan, "--output", "out", "--seed", 5)
    assert (err, code) == ("", 0)
    written = json.loads(Path("out/snr.json").read_text())
    rows: dict[tuple[str, int], dict[str, Any]] = {(row["method"], row["seed"]): row for row in written["rows"]}
    assert set(rows) == {(method, seed) for method in METHODS + RIVALS for seed in (5, 6)}
    for (method, seed), row in rows.items():
        folder = Path("out/snr-runs") / f"wine-mlp-{method}-{seed}"
        results = json.loads((folder / "results.json").read_text())
        assert (row["accuracy_percent"], results["seed"]) == (results["test_accuracy_percent"], seed)
        emulation = load_config(folder / "config.yaml").emulation
        assert emulation is not None
        pruning = emulation.weight_pruning
        assert pruning is not None
        kind, _, at = method.partition("@")
        assert pruning.name == kind.partition("-")[0]
        if kind == "dense":
            assert (row["achieved"], results["weight_pruning"]) == (0, None)
            continue
        assert row["achieved"] == results["weight_pruning"]["sparsity"]
        if at:
            asked = rows[at, seed]["achieved"] if at in METHODS else float(at)
            assert pruning.sparsity == asked  # type: ignore[union-attr]
            assert row["achieved"] == pytest.approx(asked, abs=0.01)
    over_time = {(one["method"], one["seed"]): one for one in written["results"]["over_time"]}
    assert set(over_time) == {(method, seed) for method in METHODS[1:3] for seed in (5, 6)}
    for key, one in over_time.items():
        assert one["epochs"] == [1, 2]
        assert one["sparsity"][-1] == rows[key]["achieved"]
        assert set(one["layers"]) == {"1", "3"}
    assert over_time["snr", 5]["sparsity"] != over_time["snr-0.7-either", 5]["sparsity"]
    for one in written["results"]["cases"]:
        shown = [rows[one["method"], seed]["accuracy_percent"] for seed in (5, 6)]
        plain = [rows["dense", seed]["accuracy_percent"] for seed in (5, 6)]
        assert one["difference_to_plain"] == pytest.approx(np.mean(np.subtract(shown, plain)))
    assert imread("out/snr.png").shape[2] == 4
    first = Path("out/snr.csv").read_bytes()
    assert len(out.splitlines()) == 1 + 18 + 4
    again, _, _ = reproduce(capsys, monkeypatch, "snr", "--config", plan, "--output", "out", "--seed", 5)
    assert Path("out/snr.csv").read_bytes() == first
    assert "dense-5: " in again


def test_data_replace_those_of_the_first_case(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.write_text(
        PLAN.replace("seeds: 2", "seeds: 1").replace("0.5, 0.9", "0.5").replace(", {name: mlp, hidden: [8, 8]}", "")
    )
    arguments = ("snr", "--config", plan, "--output", "out", "--data", "wine", "--data", "breast_cancer")
    assert reproduce(capsys, monkeypatch, *arguments)[2] == 0
    written = json.loads(Path("out/snr.json").read_text())
    assert {row["data"] for row in written["rows"]} == {"wine", "breast_cancer"}
    assert written["results"]["data"] == "wine, breast_cancer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[wine]", "[vine]"), "data.name: must be 'mnist5k', "),
        (("tiny.yaml", "tinny.yaml"), "no such file, nor one of the experiments "),
        (("snr: [{}", "snr: [{beta: 2}"), "plan.yaml:4:14: snr.0.beta: must be < 1 (got 2)"),
        (("seeds: 2", "seeds: 0"), "plan.yaml:6:8: seeds: must be >= 1 (got 0)"),
        (("[0.5, 0.9]", "[0.5, 0.5]"), "0.5 is there twice"),
        (("seeds: 2", "sedes: 2"), "plan.yaml:6:1: sedes: unknown key; did you mean 'seeds'?"),
        (("[8]", "[-8]"), "plan.yaml:3:75: cases.0.networks.0.hidden.0: must be >= 1 (got -8)"),
        (
            ("hidden: [8]}", "hidden: [8]}, {name: mlp, hidden: [4]}"),
            "wine with mlp is there twice: a run is named by that",
        ),
    ],
)
def test_mistakes_in_a_plan(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, str], message: str,
) -> None:  # fmt: skip
    plan.write_text(plan.read_text().replace(*change))
    _, err, code = reproduce(capsys, monkeypatch, "snr", "--config", plan, "--output", "out")
    assert code == 2
    assert message in err


@pytest.mark.parametrize("name", ["snr", "snr_full"])
def test_plans_that_come_along_are_of_known_experiments(name: str) -> None:
    plan = load_section(Plan, name, "figures")
    for case in plan.cases:
        assert load_config(case.experiment).training.micro_batches >= 4
    assert (preset_folder() / "figures" / f"{name}.yaml").is_file()
