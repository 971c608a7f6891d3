"""Sweeps without a cluster: their trials, mistakes, what a worker does, and the numbers of their tables."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import statistics
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsim import runner
from fpsim.config import config_hash, config_to_yaml, load_config, parse_config, presets
from fpsim.config.presets import preset_folder
from fpsim.errors import ConfigError, RunError
from fpsim.run_directory import rows_of
from fpsim.runner import run
from fpsim.sweep import driver, load_sweep, read_outcomes, run_sweep, worker
from fpsim.sweep.cluster import lacking
from fpsim.sweep.outcome import Outcome, finish, run_dir
from fpsim.sweep.page import short_names
from fpsim.sweep.schema import json_schema
from fpsim.sweep.summary import csv_text, groups, non_dominated, summarize, write
from fpsim.sweep.trials import Plan, label
from tests.fpsim.command_line import command

pytestmark = pytest.mark.usefixtures("restored_threads")

sweep = partial(command, "sweep")

BASE: dict[str, Any] = {
    "name": "tiny",
    "threads": 1,
    "data": {"name": "synthetic", "train_samples": 24, "test_samples": 8, "image_size": 4},
    "model": {"name": "mlp", "hidden": [8]},
    "training": {"epochs": 2, "batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "emulation": {"weights": {"format": "e4m3fn"}},
}

Planned = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The sweep of the tiny base with these keys, from a file in an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def load(*overrides: str, **keys: Any) -> Plan:
        content = {"name": "s", "base": BASE, **keys}
        Path("sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return load_sweep("sweep.yaml", overrides)

    return load


def varied(plan: Plan) -> list[dict[str, Any]]:
    return [trial.varied for trial in plan.trials]


# --- trials ---------------------------------------------------------------------------------------------------------


def test_without_anything_to_vary_the_base_is_the_one_trial(planned: Planned) -> None:
    (trial,) = planned().trials
    assert trial.config == parse_config(BASE)
    assert (trial.config_hash, trial.varied) == (config_hash(parse_config(BASE)), {})


def test_a_grid_is_every_combination_in_the_order_of_the_file(planned: Planned) -> None:
    plan = planned(grid={"training.epochs": [2, 1], "seed": [0, 1], "emulation": [None, {"weights": None}]})
    assert varied(plan) == [
        {"training.epochs": epochs, "seed": seed, "emulation": emulation}
        for epochs in (2, 1)
        for seed in (0, 1)
        for emulation in (None, {"weights": None})
    ]
    assert [list(one) for one in varied(plan)] == [["training.epochs", "seed", "emulation"]] * 8
    for trial in plan.trials:
        assert trial.config.training.epochs == trial.varied["training.epochs"]
        assert trial.config.seed == trial.varied["seed"]
        assert (trial.config.emulation is None) == (trial.varied["emulation"] is None)


def test_list_grid_and_draws_multiply(planned: Planned) -> None:
    plan = planned(
        set={"training.batch_size": 4},
        list=[{"emulation": None}, {"emulation.weights.format": "e5m2"}],
        grid={"seed": [0, 1]},
        random={"samples": 3, "seed": 7, "keys": {"training.optimizer.learning_rate": {"uniform": [0.1, 0.2]}}},
    )
    assert len(plan.trials) == 2 * 2 * 3
    rates = [one.pop("training.optimizer.learning_rate") for one in map(dict, varied(plan))]
    assert len(set(rates)) == 3
    assert rates == rates[:3] * 4
    assert all(0.1 <= rate < 0.2 for rate in rates)
    assert [trial.config.seed for trial in plan.trials] == [0, 0, 0, 1, 1, 1] * 2
    assert [trial.config.emulation is None for trial in plan.trials] == [True] * 6 + [False] * 6
    assert {trial.config.training.batch_size for trial in plan.trials} == {4}


def test_later_parts_replace_below_earlier_ones(planned: Planned) -> None:
    plan = planned(
        set={"emulation": None}, list=[{"emulation.weights": {"format": "e5m2"}}],
        grid={"emulation.weights.rounding": ["stochastic"]},
    )  # fmt: skip
    emulation = plan.trials[0].config.emulation
    assert emulation is not None
    assert emulation.weights is not None
    assert (emulation.weights.format, emulation.weights.rounding) == ("e5m2", "stochastic")


DRAWS = {
    "training.optimizer.learning_rate": {"log_uniform": [1e-4, 1e-1]},
    "training.optimizer.momentum": {"uniform": [0.0, 0.9]},
    "training.batch_size": {"integers": [2, 5]},
    "emulation.weights.format": {"choice": ["e5m2", "e4m3fn", {"exponent_bits": 3, "mantissa_bits": 2}]},
}


def test_draws_are_those_of_their_seed_whatever_other_keys_there_are(planned: Planned) -> None:
    first = varied(planned(random={"samples": 40, "seed": 3, "keys": DRAWS}))
    assert first == varied(planned(random={"samples": 40, "seed": 3, "keys": DRAWS}))
    assert first != varied(planned(random={"samples": 40, "seed": 4, "keys": DRAWS}))
    for key in DRAWS:
        alone = planned(random={"samples": 40, "seed": 3, "keys": {key: DRAWS[key]}})
        drawn = dict.fromkeys(json.dumps(one[key]) for one in first)
        assert [json.dumps(one[key]) for one in varied(alone)] == list(drawn)
    rates = [one["training.optimizer.learning_rate"] for one in first]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert 10 < sum(rate < math.sqrt(1e-5) for rate in rates) < 30
    assert {one["training.batch_size"] for one in first} == {2, 3, 4, 5}
    assert len({json.dumps(one["emulation.weights.format"]) for one in first}) == 3


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 3)),
    samples=st.integers(0, 3),
)
def test_there_are_as_many_trials_as_the_product(
    tmp_path_factory: pytest.TempPathFactory, lengths: tuple[int, int, int], samples: int
) -> None:
    epochs, seeds, entries = lengths
    content: dict[str, Any] = {"name": "s", "base": {**BASE, "emulation": None}}
    content["grid"] = {"training.epochs": [*range(1, epochs + 1)], "seed": [*range(seeds)]}
    if entries:
        content["list"] = [{"model.hidden": [2 + width]} for width in range(entries)]
    if samples:
        rate = {"training.optimizer.learning_rate": {"log_uniform": [1e-3, 1]}}
        content["random"] = {"samples": samples, "keys": rate}
    file = tmp_path_factory.mktemp("product") / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    plan = load_sweep(file)
    assert len(plan.trials) == epochs * seeds * max(1, entries) * max(1, samples)
    assert len({trial.config_hash for trial in plan.trials}) == len(plan.trials)
    assert plan.notes == []


def test_trials_that_train_the_same_are_one_with_a_note(planned: Planned) -> None:
    plan = planned(grid={"threads": [1, 2], "seed": [0, 0, 1]})
    assert [label(one) for one in varied(plan)] == ["threads=1, seed=0", "threads=1, seed=1"]
    assert plan.notes[0] == "the trial threads=1, seed=0 trains the same as threads=1, seed=0: it is left out"
    assert "the trial threads=2, seed=1 trains the same as threads=1, seed=1: it is left out" in plan.notes
    assert len(plan.notes) == 4


def test_the_base_may_be_a_preset_or_a_file_beside_the_sweep(planned: Planned, tmp_path: Path) -> None:
    assert planned(base="digits").trials[0].config == load_config("digits")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "own.yaml").write_text("exponent_bits: 3\nmantissa_bits: 2\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    planned(base="tiny.yaml", grid={"emulation.weights.format": ["own.yaml"]})
    for name in ("tiny.yaml", "own.yaml", "sweep.yaml"):
        shutil.move(tmp_path / name, folder / name)
    (trial,) = load_sweep("elsewhere/sweep.yaml").trials
    assert trial.config.emulation is not None
    assert trial.config.emulation.weights is not None
    assert getattr(trial.config.emulation.weights.format, "exponent_bits", None) == 3
    extended = {"extends": "tiny.yaml", "seed": 5}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"name": "s", "base": extended}))
    assert load_sweep("elsewhere/sweep.yaml").trials[0].config == parse_config({**BASE, "seed": 5})


def test_overrides_change_keys_of_the_sweep(planned: Planned) -> None:
    plan = planned(
        "dask.workers=3", "set.training.epochs=1", "grid.seed=[4, 5]", "set.emulation.weights.format=e5m2",
        set={"training.epochs": 2},
    )  # fmt: skip
    assert plan.sweep.dask.workers == 3
    assert [trial.config.seed for trial in plan.trials] == [4, 5]
    assert {trial.config.training.epochs for trial in plan.trials} == {1}
    assert plan.sweep.set == {"training.epochs": 1, "emulation.weights.format": "e5m2"}


def test_presets_are_sweeps() -> None:
    found = [preset for preset in presets() if preset.kind == "sweeps"]
    assert [preset.name for preset in found] == ["digits_formats"]
    schema = jsonschema.Draft202012Validator(json_schema())
    for preset in found:
        assert len(load_sweep(preset.name).trials) == 9
        schema.validate(yaml.safe_load(preset.path.read_text()))
    assert json.loads((preset_folder() / "fpsim-sweep.schema.json").read_text()) == json_schema()


# --- mistakes -------------------------------------------------------------------------------------------------------

FILE = """\
name: s
base: digits
set:
  training.epochs: 1
list:
  - emulation: null
  - emulation.weights.format: e5m2
grid:
  seed: [0, 1]
  training.batch_size:
    - 16
    - 32
random:
  samples: 2
  keys:
    training.optimizer.learning_rate: {uniform: [0.1, 0.2]}
dask:
  workers: 2
"""


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("name: s", "name: s/t", "1:7", "name: must match"),
        ("base: digits", "base: digit", "2:7", "base: no such file, nor one of .* did you mean 'digits'"),
        ("base: digits", "base: 3", "2:7", "base: must be the name of an experiment, a path or a mapping \\(got 3\\)"),
        ("base: digits", "base: {name: x}", "2:1", None),
        ("  training.epochs: 1", "  training.epoch: 1", "4:3", "training.epoch: unknown key; did you mean 'epochs'"),
        ("  training.epochs: 1", "  training..epochs: 1", "4:3", "a part of the key is empty"),
        ("  training.epochs: 1", "  extends: digits", "4:3", "extends: can be given only in a file"),
        ("  training.epochs: 1", "  seed: 1", "9:3", "grid.seed: `set` says this key as well"),
        ("  training.epochs: 1", "  training.epochs.x: 1", "4:3", "training.epochs is not a mapping"),
        ("format: e5m2", "format: e5m3x", "7:31", "emulation.weights.format: .*e5m3x.*; in the trial emulation"),
        ("    - 16", "    - 16.5", "11:7", "training.batch_size: must be an integer .*; in the trial emul"),
        ("  seed: [0, 1]", "  seed: 1", "9:9", "grid.seed: must be a list \\(got 1\\)"),
        ("  seed: [0, 1]", "  seed: []", "9:9", "grid.seed: must have at least 1 value"),
        ("  seed: [0, 1]", "  seeds: [0, 1]", "9:3", "seeds: unknown key; did you mean 'seed'"),
        ("  samples: 2", "  samples: 0", "14:12", "random.samples: must be >= 1"),
        ("uniform: [0.1, 0.2]", "uniform: [0.2, 0.1]", "16:49", "must be a lower and a higher number \\(got 0.2 and"),
        ("uniform: [0.1, 0.2]", "log_uniform: [0, 0.1]", "16:53", "must be above 0"),
        ("uniform: [0.1, 0.2]", "uniforn: [0.1, 0.2]", "16:40", "unknown key; did you mean 'uniform'"),
        ("uniform: [0.1, 0.2]", "uniform: [0, 1], choice: [1]", "16:39", "must say one of .* \\(got uniform, choice"),
        ("uniform: [0.1, 0.2]", "uniform: [-1, -0.5]", "16:49", "must be > 0"),
        ("  workers: 2", "  wokers: 2", "18:3", "dask.wokers: unknown key; did you mean 'workers'"),
        ("  workers: 2", "  resources: {GPU: 0}", "18:20", "dask.resources.GPU: must be > 0 \\(got 0\\)"),
        ("dask:", "retry: 1\ndask:", "17:1", "retry: unknown key; did you mean 'retries'"),
        ("  samples: 2", "  samples: 100000", "1:1", "800,000 trials, more than the 10,000 of a sweep"),
    ],
)  # fmt: skip
def test_a_mistake_is_placed_in_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    old: str, new: str, place: str, message: str | None,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert old in FILE
    Path("sweep.yaml").write_text(FILE.replace(old, new))
    out, err, code = sweep(capsys, monkeypatch, "sweep.yaml")
    assert (out, code) == ("", 2)
    first = err.splitlines()[0]
    assert first.startswith(f"sweep.yaml:{place}: "), err
    assert re.search(message or "data: missing.*; in the trial", first), err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_every_mistake_is_told_once_with_its_first_trial(planned: Planned) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(grid={"seed": [0, 1, 2], "training.epochs": [0, 1], "model.hidden": [[0], [1]]})
    assert [one.message for one in caught.value.problems] == [
        "must be >= 1 (got 0); in the trial seed=0, training.epochs=0, model.hidden=[0]",
        "must be >= 1 (got 0); in the trial seed=0, training.epochs=0, model.hidden=[0]",
    ]
    assert {one.path for one in caught.value.problems} == {"training.epochs", "model.hidden.0"}


def test_without_dask_one_line_says_what_to_install(
    planned: Planned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planned()
    monkeypatch.setitem(sys.modules, "distributed", None)
    out, err, code = sweep(capsys, monkeypatch, "sweep.yaml")
    assert (out, err, code) == ("", "a sweep needs Dask: pip install 'fpsim[sweep]'\n", 2)
    assert not (tmp_path / "runs").exists()
    out, err, code = sweep(capsys, monkeypatch, "sweep.yaml", "--dry-run")
    assert (err, code) == ("", 0)


def test_a_second_driver_and_a_folder_that_cannot_be_made(planned: Planned, tmp_path: Path) -> None:
    plan = planned()
    with (
        driver._sole_driver(plan),
        pytest.raises(ConfigError, match=r"runs/sweeps/s: another `fpsim sweep` is at work"),
    ):
        run_sweep(plan, quiet=True)
    plan = planned("output=sweep.yaml")
    with pytest.raises(ConfigError, match=r"sweep.yaml/s: cannot be written: Not a directory"):
        run_sweep(plan, quiet=True)


@pytest.mark.parametrize(
    ("offers", "resources", "lack"),
    [
        ([], {}, "a worker"),
        ([{}], {}, None),
        ([{}, {"GPU": 1}], {"GPU": 2}, "a worker with GPU=2"),
        ([{"GPU": 2}, {"slot": 1}], {"GPU": 1, "slot": 0.5}, "a worker with GPU=1, slot=0.5"),
        ([{}, {"GPU": 2, "slot": 1}], {"GPU": 2, "slot": 0.5}, None),
    ],
)
def test_what_trials_wait_for(offers: list[dict[str, float]], resources: dict[str, float], lack: str | None) -> None:
    class Client:
        def scheduler_info(self) -> dict[str, Any]:
            return {"workers": {f"tcp://{number}": {"resources": offer} for number, offer in enumerate(offers)}}

    assert lacking(Client(), resources) == lack  # type: ignore[arg-type]


# --- a worker -------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The events that a worker logs."""
    events: list[tuple[str, str]] = []

    class Worker:
        def log_event(self, topic: str, message: str) -> None:
            events.append((topic, message))

    monkeypatch.setattr("distributed.get_worker", Worker)
    return events


def trained(plan: Plan, number: int = 0) -> dict[str, Any]:
    trial = plan.trials[number]
    answer: dict[str, Any] = json.loads(worker.train(config_to_yaml(trial.config), str(run_dir(plan, trial)), "topic"))
    return answer


def same(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key not in ("wall_seconds", "environment")}


def test_a_worker_trains_resumes_and_reads_what_is_finished(
    planned: Planned, tmp_path: Path, begun: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside the main thread; with the estimate of the machine that is asked for now."""
    plan = planned("set.training.checkpoint.every_steps=1", grid={"seed": [3]})
    (trial,) = plan.trials
    plain = run(trial.config, tmp_path / "plain", quiet=True)

    step = runner._train_step

    def cut_off(session: Any) -> dict[str, Any]:
        if session.step == 4:
            raise RunError("cut off")
        return step(session)

    monkeypatch.setattr(runner, "_train_step", cut_off)
    answers = [trained(plan)]
    assert answers == [{"error": "cut off", "is_mistake": False}]
    assert [one.status for one in read_outcomes(plan)] == ["begun"]
    monkeypatch.setattr(runner, "_train_step", step)

    thread = threading.Thread(target=lambda: answers.append(trained(plan)))
    thread.start()
    thread.join()
    assert same(answers[1]["results"]) == json.loads(json.dumps(same(plain.results)))
    assert answers[1]["estimate"] is None
    log = rows_of(run_dir(plan, trial) / "log.jsonl")
    assert [(row["event"], row["step"]) for row in log if "total_steps" in row] == [("started", 0), ("resumed", 4)]
    assert begun == [("topic", trial.config_hash)] * 2

    on_a_chip = planned(
        "set.training.checkpoint.every_steps=1", "set.emulation.accelerator=edge-npu", grid={"seed": [3]}
    )
    assert on_a_chip.trials[0].config_hash == trial.config_hash
    again = trained(on_a_chip)
    assert again["results"] == answers[1]["results"]
    assert rows_of(run_dir(plan, trial) / "log.jsonl") == log
    machine = on_a_chip.trials[0].config.emulation.machine  # type: ignore[union-attr]
    estimated = machine.estimate(plain.ledger).totals()["encoded"]
    (encoded,) = (one for one in again["estimate"]["schemes"] if one["scheme"] == "encoded")
    assert (encoded["seconds"], encoded["joules"]) == (estimated.seconds, estimated.joules)

    outcome = Outcome(trial, "new", attempts=2)
    finish(plan, outcome, answers[1])
    assert [(one.status, one.attempts) for one in read_outcomes(plan)] == [("finished", 2)]
    assert [one.status for one in read_outcomes(on_a_chip)] == ["begun"]


def test_a_worker_tells_mistakes_from_failures(planned: Planned, begun: list[tuple[str, str]]) -> None:
    plan = planned(grid={"data": [{"name": "mnist", "root": "nowhere"}]})
    answer = trained(plan)
    assert answer["is_mistake"]
    assert answer["error"].startswith("data.root: ")
    assert not run_dir(plan, plan.trials[0]).exists()
    plan = planned(set={"emulation": None}, grid={"training.optimizer.learning_rate": [1e30]})
    answer = trained(plan)
    assert not answer["is_mistake"]
    assert "is not finite at step 1" in answer["error"]
    Path("runs/sweeps/s/trials").rename("runs/sweeps/s/gone")
    Path("runs/sweeps/s/trials").write_text("")
    assert trained(plan) == {"error": trained(plan)["error"], "is_mistake": False}
    assert trained(plan)["error"].startswith("FileExistsError: ")


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(parse_config(BASE), tmp_path_factory.mktemp("sweep") / "run", quiet=True).results


def finished(plan: Plan, results: dict[str, Any], accuracies: list[float | None]) -> list[Outcome]:
    """Outcomes of these accuracies, None for a trial that failed."""
    outcomes = read_outcomes(plan)
    for outcome, accuracy in zip(outcomes, accuracies, strict=True):
        outcome.attempts = 1
        if accuracy is None:
            outcome.status, outcome.error = "failed", "a <b>reason</b>"
        else:
            own = {"config_hash": outcome.trial.config_hash, "test_accuracy_percent": accuracy}
            finish(plan, outcome, {"results": {**results, **own}, "estimate": None})
    return outcomes


def test_rows_groups_and_files(planned: Planned, results: dict[str, Any]) -> None:
    plan = planned(grid={"emulation": [None, {"weights": {"format": "e5m2"}}], "seed": [0, 1, 2]})
    outcomes = finished(plan, results, [90.0, 91.0, 95.0, 80.0, None, 84.0])
    summary = summarize(plan, outcomes)
    assert summarize(plan, read_outcomes(plan))["trials"][0] == summary["trials"][0]

    traffic = results["ledger"]["traffic_bits_per_step"]["total"]
    row = summary["trials"][0]
    assert (row["trial"], row["seed"], row["status"], row["attempts"], row["error"]) == (1, 0, "finished", 1, None)
    assert row["varied"] == {"emulation": None, "seed": 0}
    assert row["traffic_mib_per_step"] == pytest.approx(traffic["encoded"] / 8 / 2**20)
    assert row["traffic_fp32_ratio"] == pytest.approx(traffic["fp32"] / traffic["encoded"])
    assert row["gradient_bits_per_element"] == 32
    assert row["gradient_bits_fp32_ratio"] == 1
    assert (row["machine"], row["estimated_seconds_per_step"]) == (None, None)
    failed = summary["trials"][4]
    assert (failed["status"], failed["error"], failed["test_accuracy_percent"]) == ("failed", "a <b>reason</b>", None)

    first, second = summary["groups"]
    assert (first["varied"], first["n"], first["trials"]) == ({"emulation": None}, 3, [1, 2, 3])
    assert first["mean"]["test_accuracy_percent"] == 92.0
    assert first["deviation"]["test_accuracy_percent"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert (second["n"], second["trials"], second["mean"]["test_accuracy_percent"]) == (2, [4, 5, 6], 82.0)
    assert second["deviation"]["test_accuracy_percent"] == pytest.approx(math.sqrt(8))
    assert first["deviation"]["traffic_mib_per_step"] == 0
    assert "traffic_mib_per_step" in first["best_by"]
    assert second["best_by"] == []

    write(plan.folder, summary)
    assert json.loads((plan.folder / "results.json").read_text(), parse_constant=pytest.fail) == summary
    rows = list(csv.DictReader((plan.folder / "results.csv").read_text().splitlines()))
    assert [row["emulation"] for row in rows] == ["null"] * 3 + ['{"weights": {"format": "e5m2"}}'] * 3
    assert [row["seed"] for row in rows] == ["0", "1", "2"] * 2
    assert float(rows[2]["test_accuracy_percent"]) == 95.0
    page = (plan.folder / "report.html").read_text()
    assert "a &lt;b&gt;reason&lt;/b&gt;" in page
    assert "<b>" not in page
    assert not re.search(r"<script [^>]*src|<link|https?://(?!www\.w3\.org)", page)
    (svg,) = re.findall("<svg.*?</svg>", page, re.DOTALL)
    texts = " ".join(ElementTree.fromstring(svg).itertext())
    for title in ("traffic a step (MiB)", "bits a gradient element", "wall (s)", "test accuracy (%)"):
        assert title in texts


def test_a_sweep_of_which_nothing_is_finished_has_a_report_too(planned: Planned, results: dict[str, Any]) -> None:
    plan = planned(grid={"seed": [0, 1]})
    summary = summarize(plan, finished(plan, results, [None, None]))
    plan.folder.mkdir(parents=True)
    write(plan.folder, summary)
    assert "<svg" not in (plan.folder / "report.html").read_text()
    (group,) = summary["groups"]
    assert (group["n"], group["mean"]["wall_seconds"], group["best_by"]) == (0, None, [])


def test_one_trial_has_no_deviation(planned: Planned, results: dict[str, Any]) -> None:
    plan = planned()
    (group,) = summarize(plan, finished(plan, results, [50.0]))["groups"]
    assert group["deviation"]["test_accuracy_percent"] is None
    assert group["mean"]["test_accuracy_percent"] == 50.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8))
def test_non_dominated_points_by_brute_force(points: list[tuple[int, int]]) -> None:
    def dominates(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    assert non_dominated(points) == [not any(dominates(other, point) for other in points) for point in points]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 100)), min_size=1, max_size=8))
def test_groups_are_means_over_seeds(trials: list[tuple[str, float]]) -> None:
    empty = dict.fromkeys(
        key for key in summarize_keys() if key not in ("trial", "varied", "status", "test_accuracy_percent")
    )
    rows = [
        {**empty, "trial": number, "varied": {"x": x, "seed": number}, "status": "finished", "test_accuracy_percent": y}
        for number, (x, y) in enumerate(trials)
    ]
    found = groups(rows)
    assert [group["varied"]["x"] for group in found] == list(dict.fromkeys(x for x, _ in trials))
    for group in found:
        ours = [y for x, y in trials if x == group["varied"]["x"]]
        assert group["n"] == len(ours)
        assert group["mean"]["test_accuracy_percent"] == pytest.approx(statistics.fmean(ours))
        if len(ours) > 1:
            assert group["deviation"]["test_accuracy_percent"] == pytest.approx(statistics.stdev(ours))


def summarize_keys() -> list[str]:
    header = csv_text({"varied_keys": [], "trials": []}).splitlines()[0]
    return header.split(",")


def test_short_names() -> None:
    keys = ["emulation.weights.format", "emulation.gradients.format", "seed", "training.optimizer.name", "model.name"]
    assert short_names(keys) == ["weights.format", "gradients.format", "seed", "optimizer.name", "model.name"]
    assert short_names(["name", "model.name"]) == ["name", "model.name"]


def test_a_damaged_copy_and_one_of_another_configuration(planned: Planned, results: dict[str, Any]) -> None:
    plan = planned()
    (outcome,) = read_outcomes(plan)
    with pytest.raises(ConfigError, match="results of another configuration"):
        finish(plan, outcome, {"results": {**results, "config_hash": "00000000"}, "estimate": None})
    finished(plan, results, [50.0])
    (copy,) = (plan.folder / "results").iterdir()
    content = json.loads(copy.read_text())
    copy.write_text(json.dumps({**content, "schema_version": 2}))
    with pytest.raises(ConfigError, match=r"schema_version: must be 1 \(got 2\)"):
        read_outcomes(plan)
    copy.write_text(copy.read_text()[:-9])
    with pytest.raises(ConfigError, match=rf"{copy}: damaged, remove it"):
        read_outcomes(plan)


def test_a_dry_run_lists_the_trials_and_writes_nothing(
    planned: Planned, results: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(grid={"training.epochs": [1, 2], "seed": [0, 1]})
    assert not Path("runs").exists()
    out, err, code = sweep(capsys, monkeypatch, "sweep.yaml", "--dry-run")
    assert (err, code) == ("", 0)
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["trial", "hash", "epochs", "seed", "status"]
    assert lines[2] == ["2", plan.trials[1].config_hash, "1", "1", "new"]
    assert not Path("runs").exists()

    outcome = read_outcomes(plan)[3]
    own = {**results, "config_hash": outcome.trial.config_hash}
    finish(plan, outcome, {"results": own, "estimate": None})
    run_dir(plan, plan.trials[0]).mkdir(parents=True)
    out, err, code = sweep(capsys, monkeypatch, "sweep.yaml", "--dry-run", "--json")
    rows = json.loads(out)
    assert [row["status"] for row in rows] == ["begun", "new", "new", "finished"]
    assert rows[3]["varied"] == {"training.epochs": 2, "seed": 1}
