from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import nn

import accel
import models
from fpsim import checkpoint, data, run_directory, runner
from fpsim.config import load_config, parse_config
from fpsim.emulation import NonFiniteError
from fpsim.errors import ConfigError, FpsimError, RunError
from fpsim.ranks import Ranks
from fpsim.report import load_results
from fpsim.runner import resume, run
from fpsim.session import Session
from fpsim.training import data_order, generator
from tests.fpsim.runs import ADAM, DATA, EMULATED, FILES, LINES, SGD, STEPS, STEPS_PER_EPOCH, outcome, settings

pytestmark = pytest.mark.usefixtures("restored_threads")


def assert_same(folder: Path, expected: dict[str, Any]) -> None:
    found = outcome(folder)
    assert [key for key in expected if found[key] != expected[key]] == []


class Killed(BaseException):
    """Nothing in the product catches this: the process might as well be gone."""


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Iterator[None]:
    """The run dies at the beginning of the step that follows `steps` steps."""
    train_step, done = runner._train_step, 0

    def step(session: Any) -> dict[str, Any]:
        nonlocal done
        if done == steps:
            raise Killed
        done += 1
        return train_step(session)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_train_step", step)
        with pytest.raises(Killed):
            yield


def noisy_mlp(image_shape: tuple[int, int, int], classes: int, hidden: list[int]) -> nn.Module:
    """Layers that draw from torch's generator, and layers with buffers."""
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, hidden[0]),
        nn.BatchNorm1d(hidden[0]),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(hidden[0], hidden[1]),
        nn.ReLU(),
        nn.Linear(hidden[1], classes),
    )


plain_mlp = models.MODELS["mlp"]


@pytest.fixture(autouse=True)
def _noisy_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "mlp", noisy_mlp)


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_the_documented_files(tmp_path: Path) -> None:
    config = parse_config(settings())
    result = run(config, tmp_path / "made" / "run", quiet=True)
    folder = tmp_path / "made" / "run"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-10", "step-9"]
    assert load_config(folder / "config.yaml") == config

    results = load_results(folder)
    assert results == result.results
    assert (results["name"], results["seed"], results["status"], results["emulated"]) == ("tiny", 7, "completed", True)
    assert (results["epochs"], results["steps"]) == (2, STEPS)
    assert (
        results["test_accuracy_percent"] == result.accuracy_percent == results["history"][-1]["test_accuracy_percent"]
    )
    accuracies: list[Any] = [row["test_accuracy_percent"] for row in result.results["history"]]
    assert results["best_test_accuracy_percent"] == max(accuracies)
    assert results["ledger"]["sampled_steps"] == result.ledger.steps == [0, 4, 8, 9]
    assert [row["steps"] for row in results["gradients"]] == [STEPS, STEPS]
    assert (result.run_dir, result.results_path) == (folder, folder / "results.json")
    assert result.metrics_path == folder / "metrics.jsonl"
    assert json.loads((folder / "env.json").read_text())["threads"] == 1
    records = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert {row["step"] for row in records} == {0, 4, 8, 9}
    assert accel.Ledger.from_data(records).records == result.ledger.records


def test_metrics_and_tables_agree(tmp_path: Path) -> None:
    folder = run(settings(), tmp_path / "run", quiet=True).run_dir
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected_kinds = (["step"] * STEPS_PER_EPOCH + ["epoch"]) * 2
    assert [row["kind"] for row in rows] == expected_kinds
    for kind, name in (("step", "steps.csv"), ("epoch", "epochs.csv")):
        with (folder / name).open(newline="") as file:
            table = list(csv.DictReader(file))
        chosen = [
            {key: "" if value is None else str(value) for key, value in row.items() if key != "kind"}
            for row in rows
            if row["kind"] == kind
        ]
        assert table == chosen
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert [row["epoch"] for row in steps] == [1] * 5 + [2] * 5
    for number, epoch in enumerate(epochs):
        own = steps[number * STEPS_PER_EPOCH : (number + 1) * STEPS_PER_EPOCH]
        assert epoch["train_loss"] == pytest.approx(sum(row["loss"] for row in own) / len(own), rel=1e-12)
        accuracy = sum(row["accuracy_percent"] for row in own) / len(own)
        assert epoch["train_accuracy_percent"] == pytest.approx(accuracy, rel=1e-12)
    results = json.loads((folder / "results.json").read_text())
    assert results["history"] == [{key: value for key, value in row.items() if key != "kind"} for row in epochs]


def test_gradient_sparsity_of_a_step_is_that_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the first step after an evaluation, where counting must begin anew."""
    elements: list[int] = []
    train_step = runner._train_step

    def step(session: Any) -> dict[str, Any]:
        row = train_step(session)
        elements.append(session.emulator._step_elements)
        return row

    monkeypatch.setattr(runner, "_train_step", step)
    run(settings(), tmp_path / "run", quiet=True)
    assert elements == [8 * (16 + 12)] * STEPS


def test_plain_float32_run(tmp_path: Path) -> None:
    results = run(settings(emulation=None), tmp_path / "run", quiet=True).results
    assert results["emulated"] is False
    assert results["gradients"] == []
    traffic = results["ledger"]["traffic_bits_per_step"]["total"]
    assert traffic["encoded"] == traffic["fp32"] > 0
    assert results["ledger"]["sampled_steps"] == [0, 9]


def test_the_same_configuration_gives_the_same_run(tmp_path: Path) -> None:
    first, second = (run(settings(), tmp_path / name, quiet=True).run_dir for name in "ab")
    assert_same(second, outcome(first))
    other = run(settings(seed=8), tmp_path / "c", quiet=True).run_dir
    assert outcome(other)["model.safetensors"] != outcome(first)["model.safetensors"]


def test_default_directory_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run(settings(emulation=None, output="out"), quiet=True).run_dir
    assert folder.parent == Path("out/tiny")
    assert folder.name.endswith("-" + load_results(folder)["config_hash"])


def test_overrides_apply_to_every_kind_of_configuration(tmp_path: Path) -> None:
    """An override that is given must not be dropped, whatever the configuration was given as."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings(emulation=None)))
    given: list[Any] = [settings(emulation=None), str(file), parse_config(settings(emulation=None))]
    for number, config in enumerate(given):
        result = run(config, tmp_path / str(number), overrides=["seed=99"], quiet=True)
        assert result.results["seed"] == 99


def test_a_run_closes_its_files(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    run(settings(emulation=None), tmp_path / "run", quiet=True)
    left = {os.path.realpath(f"/proc/self/fd/{number}") for number in set(os.listdir("/proc/self/fd")) - before}
    assert [path for path in left if str(tmp_path) in path] == []


# --- runs that cannot start -----------------------------------------------------------------------------------------


def test_an_existing_directory_is_refused_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"exists already.*fpsim resume"):
        run(settings(), folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_directory_that_appears_meanwhile_is_refused_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    load = data.load

    def slow_load(*arguments: Any) -> Any:
        folder.mkdir()
        return load(*arguments)

    monkeypatch.setattr(data, "load", slow_load)
    with pytest.raises(ConfigError, match="exists already"):
        run(settings(), folder, quiet=True)


def test_a_directory_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        run(settings(), tmp_path / "file" / "run", quiet=True)


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (("root: ROOT", "root: /nowhere/at/all"), "root", "data.root: /nowhere/at/all.*not found"),
        (("exclude: [last]", "exclude: [last, fc9]"), "fc9", "emulation.exclude.1: pattern 'fc9' matches no matrix"),
        (
            ("batch_size: 8", "batch_size: 50"),
            "50",
            r"training.batch_size: larger than the .* of 43 \(got 50\)",
        ),
        (("name: mlp", "name: lenet"), "name: lenet", "model: lenet needs images of at least 12x12"),
    ],
)
def test_a_failed_start_leaves_nothing_and_says_where(
    tmp_path: Path, change: tuple[str, str], key: str, message: str
) -> None:
    data = "name: mnist, root: ROOT" if "root" in key else ", ".join(f"{k}: {v}" for k, v in DATA.items())
    text = f"""\
data: {{{data}}}
model:
  name: mlp
training:
  epochs: 1
  batch_size: 8
  optimizer: {{name: sgd, learning_rate: 0.1}}
emulation:
  weights: {{format: e4m3fn}}
  exclude: [last]
"""
    assert change[0] in text
    text = text.replace(*change)
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        run(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (problem,) = caught.value.problems
    assert problem.file == str(file)
    assert problem.line is not None
    assert problem.column is not None
    assert text.splitlines()[problem.line - 1][problem.column - 1 :].startswith("/nowhere" if key == "root" else key)


# --- resume ---------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "sgd, empirical": settings(),
    "adam, lognormal, bitmask": settings(
        training={"optimizer": ADAM, "schedule": {"name": "step", "milestones_epochs": [1], "factor": 0.1}},
        emulation={
            "gradients": {
                "format": "e5m2",
                "scale": "power_of_two",
                "pruning": {"sparsity": 0.7, "threshold": "lognormal"},
                "codec": "bitmask",
            },
            "weights": {"format": "e3m4", "scale": "amax"},
            "ledger": {"every_steps": 3},
        },
    ),
    "formats and scales that remember": settings(
        emulation={
            "activations": {"format": "e4m3fn", "scale": "delayed", "scale_history": 3},
            "gradients": {"format": "e3m2", "scale": "lognormal_error", "adapt": 4},
            "ledger": {"every_steps": 4},
        }
    ),
    "weights pruned by snr, in steps, and rounded": settings(
        training={"micro_batches": 2},
        emulation={
            "weights": {"format": "e4m3fn", "scale": "amax", "codec": "bitmask"},
            "gradients": {"format": "e5m2", "scale": "amax", "pruning": {"sparsity": 0.5}, "codec": "alpha"},
            "weight_pruning": {"name": "snr", "burn_in": 2, "interval": 2},
        },
    ),
    "weights pruned by changes, at a rate of noise": settings(
        emulation={
            "weight_pruning": {
                "name": "snr",
                "estimator": "ema",
                "burn_in": 2,
                "interval": 3,
                "threshold": {"false_prune_rate": 0.9},
            }
        }
    ),
    "gmp": settings(
        emulation={
            "weight_pruning": {"name": "gmp", "sparsity": 0.8, "begin_epochs": 0.3, "ramp_epochs": 1, "interval": 2}
        }
    ),
    "float32, sgd without momentum": settings(
        training={"optimizer": {**SGD, "momentum": 0.0}}, emulation=None, data=DATA
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_step_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    expected = outcome(run(CASES[case], tmp_path / "whole", quiet=True).run_dir)
    for steps in range(STEPS):
        folder = tmp_path / f"killed-{steps}"
        with killed_after(monkeypatch, steps):
            run(CASES[case], folder, quiet=True)
        for name in LINES:
            with (folder / name).open("a") as lines:
                lines.write('{"kind": "step", "step": 99}\n{"kind": "st')
        torch.rand(3)
        resume(folder, quiet=True)
        assert_same(folder, expected)


def test_killed_while_samples_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "mlp", plain_mlp)
    pruning = {"name": "snr", "estimator": "per_sample", "scope": "layer", "exclude": ["last"]}
    case = settings(emulation={"weight_pruning": pruning})
    expected = outcome(run(case, tmp_path / "whole", quiet=True).run_dir)
    assert 0 < expected["results"]["weight_pruning"]["sparsity"] < 1
    for steps in (4, 6, 9):
        folder = tmp_path / f"killed-{steps}"
        with killed_after(monkeypatch, steps):
            run(case, folder, quiet=True)
        resume(folder, quiet=True)
        assert_same(folder, expected)


def test_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outcome(run(settings(), tmp_path / "whole", quiet=True).run_dir)
    folder = tmp_path / "killed"
    with killed_after(monkeypatch, 4):
        run(settings(), folder, quiet=True)
    for _ in range(2):  # from step 3 to 6, then to 9
        with killed_after(monkeypatch, 3):
            resume(folder, quiet=True)
    resume(folder, quiet=True)
    assert_same(folder, expected)


def test_stopped_at_any_step_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outcome(run(settings(), tmp_path / "whole", quiet=True).run_dir)
    received: list[str] = []

    @contextmanager
    def signals(ranks: Ranks) -> Iterator[list[str]]:
        yield received

    train_step = runner._train_step

    def stopped_in(last: int) -> Callable[[Any], dict[str, Any]]:
        def step(session: Any) -> dict[str, Any]:
            if session.step == last:
                received.append("SIGTERM")
            return train_step(session)

        return step

    for last in range(STEPS - 1):
        folder = tmp_path / f"stopped-{last}"
        received.clear()
        with monkeypatch.context() as patch:
            patch.setattr(runner, "_stop_signals", signals)
            patch.setattr(runner, "_train_step", stopped_in(last))
            message = f"stopped by SIGTERM at step {last + 1} of 10; .* fpsim resume {folder}"
            with pytest.raises(RunError, match=message):
                run(settings(), folder, quiet=True)
        assert not (folder / "results.json").exists()
        assert (folder / "checkpoints" / f"step-{last + 1}").is_dir()
        resume(folder, quiet=True)
        found = outcome(folder)
        assert found.pop("checkpoints")[0] == "step-10"  # beside the last but one, which depends on where it stopped
        assert [key for key in found if found[key] != expected[key]] == []

    received.clear()
    monkeypatch.setattr(runner, "_stop_signals", signals)
    monkeypatch.setattr(runner, "_train_step", stopped_in(STEPS - 1))
    assert run(settings(), tmp_path / "stopped-at-the-end", quiet=True).results["status"] == "completed"


@pytest.mark.parametrize("last_call", ["_end_epoch", "results_of", "_write_tables"])
def test_killed_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_call: str) -> None:
    """In the first evaluation, where the step is in the metrics and the epoch is not, or after the last step."""
    expected = outcome(run(settings(), tmp_path / "whole", quiet=True).run_dir)

    def die(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runner, last_call, die)
        with pytest.raises(Killed):
            run(settings(), tmp_path / "run", quiet=True)
    resume(tmp_path / "run", quiet=True)
    assert_same(tmp_path / "run", expected)


def test_killed_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be resumed has its environment: the configuration, which makes it a run, is written last."""

    def die(config: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "config_to_yaml", die)
        with pytest.raises(Killed):
            run(settings(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    run(settings(), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("write", ["write_json", "write_text"])
def test_killed_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    expected = outcome(run(settings(), tmp_path / "whole", quiet=True).run_dir)
    folder = tmp_path / "run"
    original = getattr(checkpoint, write)

    def die(path: Path, content: Any) -> None:
        if path.parent.name.startswith(".step-6."):
            raise Killed
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, write, die)
        with pytest.raises(Killed):
            run(settings(), folder, quiet=True)
    (partial,) = (folder / "checkpoints").glob(".*")
    partial.rename(partial.with_name(".step-6.1.tmp"))  # as another process would have left it
    resume(folder, quiet=True)
    assert_same(folder, expected)


def test_resume_of_a_completed_run_changes_nothing(tmp_path: Path) -> None:
    folder = run(settings(), tmp_path / "run", quiet=True).run_dir
    before = outcome(folder)
    resume(folder, quiet=True)
    assert_same(folder, before)


def test_resume_takes_the_newest_run_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that began last, whatever the names."""
    for name in ("b", "c", "a"):
        with killed_after(monkeypatch, 4):
            run(settings(), tmp_path / name, quiet=True)
    assert resume(tmp_path, quiet=True).run_dir == tmp_path / "a"


def test_resume_restores_the_thread_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    with killed_after(monkeypatch, 4):
        run(settings(threads=None), tmp_path / "run", quiet=True)
    torch.set_num_threads(1)
    assert resume(tmp_path / "run", quiet=True).results["environment"]["threads"] == 2
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["threads"] is None


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run nor runs"):
        resume(tmp_path)
    with pytest.raises(ConfigError, match="not a run directory"):
        resume(tmp_path / "nothing")


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"threads": "many"}'])
def test_resume_with_a_damaged_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    with killed_after(monkeypatch, 4):
        run(settings(), tmp_path / "run", quiet=True)
    file = tmp_path / "run" / "env.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(FpsimError, match=r"env\.json|threads"):
        resume(tmp_path / "run", quiet=True)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("damage", ["shorter", "missing"])
def test_resume_with_damaged_metrics_or_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    case = CASES["weights pruned by snr, in steps, and rounded"] if name == "weights.jsonl" else settings()
    with killed_after(monkeypatch, 4):
        run(case, tmp_path / "run", quiet=True)
    file = tmp_path / "run" / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 100)
    with pytest.raises(RunError, match=re.escape(name)):
        resume(tmp_path / "run", quiet=True)


@pytest.mark.parametrize("line", ["#", "{}", '{"stored": {}}', "[]", "1"])
def test_resume_with_a_ledger_of_another_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    with killed_after(monkeypatch, 4):
        run(settings(), tmp_path / "run", quiet=True)
    file = tmp_path / "run" / "ledger.jsonl"
    file.write_text((line + "\n") * file.stat().st_size)
    with pytest.raises(RunError, match=str(tmp_path / "run")):
        resume(tmp_path / "run", quiet=True)


def test_resume_with_a_checkpoint_that_holds_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killed_after(monkeypatch, 4):
        run(settings(), tmp_path / "run", quiet=True)
    session = Session(parse_config(settings()), tmp_path / "unused", quiet=True)
    checkpoint.save(tmp_path / "run" / "checkpoints", 4, session.model, session.optimizer, {}, {})
    with pytest.raises(RunError, match="step-4: does not fit this run"):
        resume(tmp_path / "run", quiet=True)


def test_resume_refuses_a_checkpoint_of_another_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the weights fit: another emulation would go on with thresholds that are not its own."""
    with killed_after(monkeypatch, 4):
        run(settings(), tmp_path / "run", quiet=True)
    file = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["emulation"]["exclude"] = []
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(FpsimError, match="other layers"):
        resume(tmp_path / "run", quiet=True)


# --- runs that fail -------------------------------------------------------------------------------------------------


def first_non_finite(model: nn.Sequential, images: torch.Tensor) -> str:
    """By hand, for a network that is one sequence."""
    x = images
    for name, module in model.named_children():
        x = module(x)
        if not bool(torch.isfinite(x).all()):
            return name
    raise AssertionError("all finite")


@pytest.fixture
def plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "mlp", models.MLP)


@pytest.mark.usefixtures("plain_network")
def test_a_loss_that_overflows(tmp_path: Path) -> None:
    config = settings(emulation=None, training={"optimizer": {**SGD, "learning_rate": 1e30}})
    folder = tmp_path / "run"
    with pytest.raises(RunError, match="step 1") as caught:
        run(config, folder, quiet=True)
    cause = caught.value.__cause__
    assert isinstance(cause, NonFiniteError)
    assert not (folder / "results.json").exists()
    assert str(folder / "failed" / "step-1") in str(caught.value)
    assert "not finite" in (folder / "log.jsonl").read_text()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1

    parsed = parse_config(config)
    session = Session(parsed, tmp_path / "unused", quiet=True)
    checkpoint.load(folder / "failed" / "step-1", session.model, session.optimizer)
    indices = data_order(parsed.seed, 0, 43)[8:16]
    images, _ = session.dataset.train.batch(indices, generator(parsed.seed, "augment", 1))
    session.emulator.detach()
    assert isinstance(session.model, nn.Sequential)
    assert cause.layer == first_non_finite(session.model, images)


@pytest.mark.parametrize("emulation", [None, EMULATED, {**EMULATED, "exclude": ["first", "last"]}])
@pytest.mark.parametrize("parameter", ["1.weight", "1.bias", "3.weight", "3.bias", "5.weight"])
@pytest.mark.usefixtures("plain_network")
def test_a_nan_is_blamed_on_the_layer_where_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulation: dict[str, Any] | None, parameter: str
) -> None:
    train_step = runner._train_step

    def step(session: Any) -> dict[str, Any]:
        if session.step == 3:
            session.model.get_parameter(parameter).data[0] = float("nan")
        return train_step(session)

    monkeypatch.setattr(runner, "_train_step", step)
    with pytest.raises(RunError, match=f"of layer '{parameter[0]}' is not finite at step 3 .*failed/step-3"):
        run(settings(emulation=emulation), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "failed" / "step-3" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("scale", ["none", "lognormal_mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.usefixtures("plain_network")
def test_a_neural_gradient_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str, value: float
) -> None:
    train_step = runner._train_step

    def step(session: Any) -> dict[str, Any]:
        if session.step == 3:
            layer = session.model.get_submodule("4")  # the ReLU behind layer 3
            layer.register_forward_hook(lambda module, x, y: y.register_hook(lambda dy: dy.fill_(value)) and None)
        return train_step(session)

    monkeypatch.setattr(runner, "_train_step", step)
    emulation = {**EMULATED, "gradients": {**EMULATED["gradients"], "scale": scale}}
    with pytest.raises(RunError, match="gradient of layer '3' is not finite at step 3"):
        run(settings(emulation=emulation), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "failed" / "step-3").is_dir()


@pytest.mark.usefixtures("plain_network")
def test_a_weight_gradient_that_is_not_finite_keeps_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = runner._train_step
    weights: dict[str, torch.Tensor] = {}

    def step(session: Any) -> dict[str, Any]:
        if session.step == 3:
            session.model.get_parameter("3.weight").register_hook(lambda gradient: gradient * float("nan"))
            weights.update({name: value.clone() for name, value in session.model.state_dict().items()})
        return train_step(session)

    monkeypatch.setattr(runner, "_train_step", step)
    with pytest.raises(RunError, match=r"^weight gradient of layer '3' is not finite at step 3 "):
        run(settings(emulation=None), tmp_path / "run", quiet=True)
    saved = checkpoint.load_file(tmp_path / "run" / "failed" / "step-3" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in weights.items())


@pytest.mark.parametrize("emulation", [None, EMULATED])
@pytest.mark.usefixtures("plain_network")
def test_weights_that_overflow_in_the_last_step_are_no_result(tmp_path: Path, emulation: dict[str, Any] | None) -> None:
    """The evaluation meets the infinity first; the state that the message promises is the one that is saved."""
    training = {"epochs": 1, "batch_size": 43, "optimizer": {**SGD, "learning_rate": 1e30}}
    failed = tmp_path / "run" / "failed" / "step-1"
    with pytest.raises(RunError, match=rf"not finite at step 1 \(.*\); the state at that moment is saved in {failed},"):
        run(settings(training=training, emulation=emulation), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "results.json").exists()
    parsed = parse_config(settings(training=training, emulation=emulation))
    session = Session(parsed, tmp_path / "unused", quiet=True)
    assert checkpoint.load(failed, session.model, session.optimizer)[0]["step"] == 1
    assert max(float(p.detach().abs().max()) for p in session.model.parameters()) > 1e20  # the update is in it


def failed_at_step_3(
    folder: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Any], None], **changes: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a run saves that meets what `plant` does to its session before step 3, and its last line of the log."""
    train_step = runner._train_step

    def step(session: Any) -> dict[str, Any]:
        if session.step == 3:
            plant(session)
        return train_step(session)

    monkeypatch.setattr(runner, "_train_step", step)
    with pytest.raises(RunError) as caught:
        run(settings(**changes), folder, quiet=True)
    file = folder / "failed" / "step-3" / "not_finite.safetensors"
    assert str(caught.value).endswith(f", the tensor in {file}")
    assert len(str(caught.value).splitlines()) == 1
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    tensors = checkpoint.load_file(file)
    found = tensors[last["role"]]
    counts = int(found.isnan().sum()), int(found.isinf().sum()), found.numel()
    assert (last["nan"], last["inf"], last["elements"]) == counts
    assert (last["event"], last["level"], last["step"], last["tensor"]) == ("not finite", "error", 3, str(file))
    with safe_open(file, "pt") as opened:
        kept = {key: str(last[key]) for key in ("layer", "role", "step", "nan", "inf", "elements")}
        assert opened.metadata() == kept
    return tensors, last


def inputs_of_step_3() -> torch.Tensor:
    config = parse_config(settings())
    dataset = data.load(config.data, config.seed)
    images, _ = dataset.train.batch(data_order(7, 0, 43)[24:32], generator(7, "augment", 3))
    return images.flatten(1)


def set_entry(parameter: str, value: float) -> Callable[[Any], None]:
    def plant(session: Any) -> None:
        session.model.get_parameter(parameter).data.view(-1)[5] = value

    return plant


@pytest.mark.usefixtures("plain_network")
@pytest.mark.parametrize("emulation", [None, EMULATED])
def test_a_weight_is_saved_as_its_layer_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulation: dict[str, Any] | None
) -> None:
    plant = set_entry("1.weight", float("inf"))
    tensors, last = failed_at_step_3(tmp_path / "run", monkeypatch, plant, emulation=emulation)
    assert (last["layer"], last["role"], last["nan"], last["inf"], last["elements"]) == ("1", "weight", 0, 1, 16 * 16)
    saved = checkpoint.load_file(tmp_path / "run" / "failed" / "step-3" / "model.safetensors")
    assert torch.equal(tensors["weight"], saved["1.weight"])
    if emulation is None:
        assert torch.equal(tensors["activation"], inputs_of_step_3())


@pytest.mark.usefixtures("plain_network")
def test_an_output_is_saved_with_what_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite inputs and weights whose products overflow; the ReLU behind writes in place, after it was seen."""

    def plant(session: Any) -> None:
        session.model.get_parameter("1.weight").data[2:4] = torch.tensor([[3e38], [-3e38]])
        session.model[2].inplace = True

    tensors, last = failed_at_step_3(tmp_path / "run", monkeypatch, plant, emulation=None)
    assert (last["layer"], last["role"], last["elements"]) == ("1", "output", 8 * 16)
    assert set(tensors) == {"activation", "weight", "bias", "output"}
    assert torch.equal(tensors["activation"], inputs_of_step_3())
    again = torch.nn.functional.linear(tensors["activation"], tensors["weight"], tensors["bias"])
    assert torch.equal(tensors["output"].nan_to_num(7), again.nan_to_num(7))
    assert float(tensors["output"].min()) == -math.inf


@pytest.mark.usefixtures("plain_network")
def test_a_rounded_weight_that_overflows_is_saved_as_it_was_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulation = {"weights": {"format": "e5m2", "overflow": "ieee"}}
    tensors, last = failed_at_step_3(
        tmp_path / "run", monkeypatch, set_entry("3.weight", 1e6), emulation=emulation
    )  # fmt: skip
    assert (last["layer"], last["role"], last["inf"]) == ("3", "weight", 1)
    dense = checkpoint.load_file(tmp_path / "run" / "failed" / "step-3" / "model.safetensors")["3.weight"]
    assert torch.equal(tensors["weight"], accel.quantize(dense, "e5m2", overflow="ieee"))


@pytest.mark.usefixtures("plain_network")
def test_an_activation_that_no_module_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer gets is looked at before what it makes of it."""

    def plant(session: Any) -> None:
        def poisoned(module: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            x = arguments[0].clone()
            x[0, :3] = float("nan")
            return (x,)

        session.model[3].register_forward_pre_hook(poisoned)

    tensors, last = failed_at_step_3(tmp_path / "run", monkeypatch, plant, emulation=None)
    assert (last["layer"], last["role"], last["nan"], last["inf"]) == ("3", "activation", 3, 0)
    assert tensors["activation"].isnan().nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]


@pytest.mark.usefixtures("plain_network")
def test_a_neural_gradient_is_saved_as_it_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[torch.Tensor] = []

    def plant(session: Any) -> None:
        def poisoned(dy: torch.Tensor) -> torch.Tensor:
            dy = dy.clone()
            dy[1, 2], dy[3, 4] = float("inf"), float("nan")
            arrived.append(dy.clone())
            return dy

        session.model[4].register_forward_hook(lambda module, x, y: y.register_hook(poisoned) and None)

    tensors, last = failed_at_step_3(tmp_path / "run", monkeypatch, plant)
    assert (last["layer"], last["role"], last["elements"]) == ("3", "gradient", 8 * 12)
    behind_relu = tensors["gradient"]
    passed = behind_relu != 0
    assert torch.equal(behind_relu[passed].nan_to_num(7, 8), arrived[0][passed].nan_to_num(7, 8))
    saved = checkpoint.load_file(tmp_path / "run" / "failed" / "step-3" / "model.safetensors")
    assert torch.equal(tensors["weight"], saved["3.weight"])


@pytest.mark.usefixtures("plain_network")
def test_a_weight_gradient_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plant(session: Any) -> None:
        poison = torch.zeros(12, 16).index_put_((torch.tensor([1]), torch.tensor([2])), torch.tensor(float("nan")))
        session.model.get_parameter("3.weight").register_hook(lambda gradient: gradient + poison)

    tensors, last = failed_at_step_3(tmp_path / "run", monkeypatch, plant, emulation=None)
    assert (last["layer"], last["role"], last["nan"], last["inf"]) == ("3", "weight gradient", 1, 0)
    assert tensors["weight gradient"].isnan().nonzero().tolist() == [[1, 2]]
    saved = checkpoint.load_file(tmp_path / "run" / "failed" / "step-3" / "model.safetensors")
    assert torch.equal(tensors["weight"], saved["3.weight"])


@pytest.mark.parametrize("emulation", [None, EMULATED])
@pytest.mark.usefixtures("plain_network")
def test_what_evaluation_meets_is_traced_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulation: dict[str, Any] | None
) -> None:
    end_epoch = runner._end_epoch

    def end(session: Any, row: dict[str, Any]) -> dict[str, Any]:
        session.model.get_parameter("3.bias").data[1] = float("nan")
        return end_epoch(session, row)

    monkeypatch.setattr(runner, "_end_epoch", end)
    with pytest.raises(RunError, match=r"^bias of layer '3' is not finite at step 5 \(1 NaN, 0 inf of 12\)"):
        run(settings(emulation=emulation), tmp_path / "run", quiet=True)
    saved = checkpoint.load_file(tmp_path / "run" / "failed" / "step-5" / "not_finite.safetensors")
    assert saved["bias"].isnan().nonzero().tolist() == [[1]]
    assert saved["activation"].shape == (16, 16)


def test_the_search_for_the_layer_repeats_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout and stochastic rounding draw the same again; the running statistics are those of one step."""
    runs: list[torch.Tensor] = []
    means: list[torch.Tensor] = []

    def watch(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        runs.append(output.detach().clone())

    def step(session: Any) -> dict[str, Any]:
        if session.step == 3:
            session.model.get_submodule("5").register_forward_hook(watch)
            norm = session.model.get_submodule("2")
            norm.register_forward_hook(lambda module, x, y: means.append(module.running_mean.clone()))
            session.model.get_parameter("7.bias").data[0] = float("nan")
        return train_step(session)

    train_step = runner._train_step
    monkeypatch.setattr(runner, "_train_step", step)
    stochastic = {"format": "e4m3fn", "scale": "power_of_two", "rounding": "stochastic"}
    with pytest.raises(RunError, match=r"^bias of layer '7' is not finite at step 3 "):
        run(settings(emulation={**EMULATED, "activations": stochastic}), tmp_path / "run", quiet=True)
    first, second = runs
    assert torch.equal(first, second)
    saved = checkpoint.load_file(tmp_path / "run" / "failed" / "step-3" / "model.safetensors")
    assert torch.equal(saved["2.running_mean"], means[0])
    assert int(saved["2.num_batches_tracked"]) == 4


# --- real processes and signals -------------------------------------------------------------------------------------

LONG = settings(
    training={"epochs": 100, "checkpoint": {"every_steps": 7, "keep": 2}},
    emulation={**EMULATED, "ledger": {"every_steps": 97}},
)


def interrupted(arguments: list[str], folder: Path, steps: int, number: int) -> tuple[int, str]:
    """Exit code and stderr of a process that gets the signal once its newest checkpoint is past `steps` steps."""
    command = [sys.executable, "-m", "fpsim", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not any(int(path.name[5:]) > steps for path in checkpoint.checkpoints(folder / "checkpoints")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert not (folder / "results.json").exists()
    return process.returncode, err


@pytest.mark.usefixtures("plain_network")
def test_signals_and_a_kill(tmp_path: Path) -> None:
    """One run, stopped by SIGTERM, resumed, stopped by SIGINT, resumed, killed, and resumed to its end."""
    config, folder = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(LONG))
    begin, go_on = ["run", str(config), "--run-dir", str(folder), "-q"], ["resume", str(folder), "-q"]
    for arguments, steps, number in ((begin, 10, signal.SIGTERM), (go_on, 100, signal.SIGINT)):
        code, err = interrupted(arguments, folder, steps, number)
        assert code == 1
        warning, message = err.splitlines()
        assert warning == f"fpsim: {number.name}: stopping after this step (once more to stop at once)"
        stopped_at = int(checkpoint.checkpoints(folder / "checkpoints")[-1].name[5:])
        assert message.startswith(f"fpsim: stopped by {number.name} at step {stopped_at} of 500; ")
        assert message.endswith(f"fpsim resume {folder}")
    assert interrupted(go_on, folder, 200, signal.SIGKILL) == (-signal.SIGKILL, "")
    resume(folder, quiet=True)
    assert_same(folder, outcome(run(config, tmp_path / "whole", quiet=True).run_dir))
