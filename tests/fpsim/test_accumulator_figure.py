"""`fpsim reproduce accumulators`: what is trained, with which units, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from fpsim.config import load_config, load_section
from fpsim.figures.accumulators import Plan
from tests.fpsim.command_line import command

pytestmark = pytest.mark.usefixtures("restored_threads")

EXPERIMENT = """
name: tiny
threads: 1
data: {name: digits}
model: {name: mlp, hidden: [8]}
training: {epochs: 1, batch_size: 64, optimizer: {name: sgd, learning_rate: 0.05}}
"""
PLAN = """
cases: [{experiment: tiny.yaml}]
units: [fp32, {name: narrow, accumulator: e8m1}, {accumulator: e8m1, chunk: 8}]
passes: [all, wgrad]
seeds: 2
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "plan.yaml"


def test_each_unit_stands_in_its_passes_with_each_seed(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("reproduce", capsys, monkeypatch, "accumulators", "--config", plan, "--output", "out", "--seed", 3)
    _, err, code = command(*arguments)
    assert (err, code) == ("", 0)
    written = json.loads(Path("out/accumulators.json").read_text())
    units = ["fp32", "narrow", "e8m1-accumulator-chunk-8"]
    runs = [("fp32", "all")] + [(unit, which) for unit in units[1:] for which in ("all", "wgrad")]
    assert {(row["method"], row["passes"], row["seed"]) for row in written["rows"]} == {
        (*run, seed) for run in runs for seed in (3, 4)
    }
    for row in written["rows"]:
        folder = Path("out/accumulators-runs") / f"mlp-{row['method']}-{row['passes']}-{row['seed']}"
        results = json.loads((folder / "results.json").read_text())
        assert (row["accuracy_percent"], results["seed"]) == (results["test_accuracy_percent"], row["seed"])
        emulation = load_config(folder / "config.yaml").emulation
        assert emulation is not None
        assert emulation.datapath is not None
        forward, wgrad = emulation.datapath.forward, emulation.datapath.wgrad
        assert (forward == "fp32") == (row["passes"] == "wgrad" or row["method"] == "fp32")
        assert (wgrad == "fp32") == (row["method"] == "fp32")
    means = {(one["method"], one["passes"]): one for one in written["results"]["units"]}
    assert list(means) == runs
    assert means["fp32", "all"]["difference_to_plain"] == 0
    assert means["narrow", "all"]["accuracy_percent"] != means["fp32", "all"]["accuracy_percent"]
    assert imread("out/accumulators.png").shape[2] == 4


def test_the_plan_that_is_committed() -> None:
    plan = load_section(Plan, "accumulators", "figures")
    assert plan.seeds == 3
    assert len(plan.units) > 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("chunk: 8", "chunk: 0", "plan.yaml:3:77: units.2.chunk: must be >= 1 (got 0)"),
        ("[all, wgrad]", "[all, update]", "plan.yaml:4:15: passes.1: must be 'all', 'forward', 'dgrad' or 'wgrad'"),
        ("name: narrow", "name: fp32", "plan.yaml:2:1: fp32 is there twice: a run is named by that"),
    ],
)
def test_mistakes_in_a_plan(
    plan: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.write_text(PLAN.replace(old, new))
    _, err, code = command("reproduce", capsys, monkeypatch, "accumulators", "--config", "plan.yaml")
    assert code == 2
    assert message in err
