"""Figure 5: what pruning rules achieve on real gradients, and what pruned trainings are worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from fpsim import figures
from fpsim.config import load_config
from fpsim.figures import gradient_formats, pruned_training, runs
from fpsim.layers import format_of
from tests.fpsim.command_line import command

CONFIG = """
name: tiny
threads: 1
data: {name: synthetic, train_samples: 32, test_samples: 16, image_size: 8, channels: 3, classes: 4}
model: {name: resnet18, width: 2}
training: {epochs: 1, batch_size: 8, optimizer: {name: sgd, learning_rate: 0.05}}
"""


reproduce = partial(command, "reproduce")


def test_achieved_against_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures.achieved_sparsity, "SHOWN", ("resnet18", "mlp"))
    monkeypatch.setattr(figures.achieved_sparsity, "EPOCHS", 2)
    monkeypatch.setattr(figures.achieved_sparsity, "ASKED", (0.6, 0.9))
    monkeypatch.setitem(figures.neural_gradients.NETWORKS, "resnet18", {"width": 2})
    fig = figures.FIGURES["fig5-right"]
    monkeypatch.setitem(figures.FIGURES, "fig5-right", type(fig)(**{**vars(fig), "train_limit": 128}))
    _, err, code = reproduce(capsys, monkeypatch, "fig5-right", "--output", tmp_path, "--seed", 1)
    assert (err, code) == ("", 0)
    written = json.loads((tmp_path / "fig5-right.json").read_text())
    assert written["results"]["steps"] == 4
    found = {(row["network"], row["rule"], row["asked"]): row for row in written["rows"]}
    assert len(found) == 2 * 4 * 2
    for (_, rule, asked), row in found.items():
        assert row["lowest"] <= row["achieved"] <= row["highest"]
        if rule == "empirical":
            assert row["achieved"] == pytest.approx(asked, abs=0.02)
    assert abs(found["resnet18", "atp", 0.9]["achieved"] - 0.9) > 0.1  # of a normal it would be .54
    assert imread(tmp_path / "fig5-right.png").shape[2] == 4


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pruned_training, "SEEDS", {"resnet18": 2})
    monkeypatch.setattr(pruned_training, "ASKED", (0.8,))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.usefixtures("restored_threads")
def test_accuracy_against_achieved(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("fig5-left", "--config", small / "tiny.yaml", "--output", small / "out", "--seed", 3)
    out, err, code = reproduce(capsys, monkeypatch, *arguments)
    assert (err, code) == ("", 0)
    assert out.splitlines()[1].startswith("1 of 10: resnet18-none-0.0-3: ")
    written = json.loads((small / "out" / "fig5-left.json").read_text())
    assert [row["seed"] for row in written["rows"]] == [3, 4] * 5
    for row in written["rows"]:
        folder = small / "out" / "fig5-left-runs" / f"resnet18-{row['method']}-{row['asked']}-{row['seed']}"
        assert row["accuracy_percent"] == json.loads((folder / "results.json").read_text())["test_accuracy_percent"]
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        zeros = [step["gradient_sparsity"] for step in steps if step["kind"] == "step"]
        assert row["achieved"] == pytest.approx(np.mean(zeros))
        if row["method"] == "topk":
            assert row["achieved"] == pytest.approx(0.8, abs=0.01)
    for one in written["results"]["networks"]:
        shown = [row for row in written["rows"] if row["method"] == one["method"]]
        accuracies = [row["accuracy_percent"] for row in shown]
        assert one["accuracy_percent"] == pytest.approx(np.mean(accuracies))
        assert one["deviation"] == pytest.approx(np.std(accuracies, ddof=1))
        assert one["seeds"] == 2
        if one["method"] == "none":
            assert (one["difference_to_plain"], one["standard_error"]) == (0, 0)
    assert imread(small / "out" / "fig5-left.png").shape[2] == 4


@pytest.mark.usefixtures("restored_threads")
def test_finished_runs_stay_and_unfinished_ones_go_on(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruned_training, "METHODS", {})
    arguments = ("fig5-left", "--config", small / "tiny.yaml", "--output", small)
    reproduce(capsys, monkeypatch, *arguments)
    first = (small / "fig5-left.json").read_bytes()
    trained: list[Path] = []
    for name in ("run", "resume"):
        monkeypatch.setattr(runs, name, noting(getattr(runs, name), trained))
    unfinished = small / "fig5-left-runs" / "resnet18-none-0.0-1"
    (unfinished / "results.json").unlink()
    assert reproduce(capsys, monkeypatch, *arguments)[2] == 0
    assert trained == [unfinished]
    again, before = json.loads((small / "fig5-left.json").read_bytes()), json.loads(first)
    for row in (*again["rows"], *before["rows"]):
        row.pop("seconds")
    assert again == before


def noting(train: Callable[..., Any], trained: list[Path]) -> Callable[..., Any]:
    """`train`, which also says what folder it was given."""

    def noted(*arguments: Any, **options: Any) -> Any:
        trained.append(Path(arguments[-1]))
        return train(*arguments, **options)

    return noted


@pytest.mark.usefixtures("restored_threads")
def test_runs_of_another_configuration_are_not_taken(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruned_training, "METHODS", {})
    arguments = ("fig5-left", "--config", small / "tiny.yaml", "--output", small)
    reproduce(capsys, monkeypatch, *arguments)
    (small / "tiny.yaml").write_text(CONFIG.replace("0.05", "0.1"))
    _, err, code = reproduce(capsys, monkeypatch, *arguments)
    assert code == 2
    assert "resnet18-none-0.0-0: holds a run of another configuration: remove it, or choose another --output" in err


@pytest.mark.usefixtures("restored_threads")
def test_accuracy_by_format(small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_formats, "SEEDS", 1)
    monkeypatch.setattr(gradient_formats, "FIXED", {8: (5, 4), 4: (2,)})
    arguments = ("gradient-formats", "--config", small / "tiny.yaml", "--output", small / "out")
    out, err, code = reproduce(capsys, monkeypatch, *arguments)
    assert (err, code) == ("", 0)
    written = json.loads((small / "out" / "gradient-formats.json").read_text())
    methods = [(row["bits"], row["method"]) for row in written["rows"]]
    assert methods == [(32, "fp32"), (8, "e5m2"), (8, "e4m3"), (8, "adaptive"), (4, "e2m1"), (4, "adaptive")]
    for row in written["rows"]:
        folder = small / "out" / "gradient-formats-runs" / f"resnet18-{row['bits']}-{row['method']}-0"
        config = load_config(folder / "config.yaml")
        gradients = config.emulation.gradients if config.emulation else None
        assert (gradients is None) == (row["method"] == "fp32")
        assert bool(row["formats"]) == (row["method"] == "adaptive")
        if gradients is not None:
            assert format_of(gradients).bits == row["bits"]
    assert len(out.splitlines()) == 1 + 6 + 4
    assert imread(small / "out" / "gradient-formats.png").shape[2] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fig2", "--config", "quickstart"],
            "--config: fig2 takes none: no experiment is behind it (got 'quickstart')",
        ),
        (["fig5-left", "--config", "nothing"], "nothing"),
        (["fig5-left", "--data", "mnist5k", "--data", "digits"], "--data: fig5-left takes 1 image set (got 2)"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err, code = reproduce(capsys, monkeypatch, *arguments)
    assert code == 2
    assert message in err
