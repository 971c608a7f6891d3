"""What a run records of its gradients' distributions, and what `fpsim analyze RUN` makes of it."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from scipy import stats
from torch import nn

import fpsim
from fpsim.runner import run
from tests.fpsim.command_line import command

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "threads": 1,
    "data": {"name": "synthetic", "train_samples": 48, "test_samples": 8, "image_size": 8, "classes": 4},
    "model": {"name": "mlp", "hidden": [12]},
    "training": {"epochs": 2, "batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "emulation": {
        "gradients": {"format": "e5m2", "scale": "amax", "pruning": {"sparsity": 0.5}},
        "ledger": {"every_steps": 4},
    },
}
RECORDED = [0, 4, 8, 11]  # every fourth of 12, and the last


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    place = tmp_path_factory.mktemp("runs") / "run"
    run(SETTINGS, place, quiet=True)
    torch.set_num_threads(threads)
    return place


fpsim_analyze = partial(command, "analyze")


def test_rows_are_what_numpy_and_scipy_find_in_the_exact_gradients() -> None:
    """Of dY before pruning and rounding, and of dW after backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    x, labels = torch.randn(16, 20), torch.randint(0, 4, (16,))
    gradients: dict[str, torch.Tensor] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def after(module: nn.Module, arguments: object, output: torch.Tensor) -> None:
            output.register_hook(lambda dy: gradients.update({f"dY {name}": dy.clone()}))

        return layer.register_forward_hook(after)

    hooks = [watch(name, layer) for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
    nn.functional.cross_entropy(model(x), labels).backward()
    for hook in hooks:
        hook.remove()
    expected = {**gradients, "X 0": x, "X 2": model[:2](x).detach()}
    expected |= {f"dW {layer}": model[layer].weight.grad.clone() for layer in (0, 2)}
    expected |= {f"W {layer}": model[layer].weight.detach().clone() for layer in (0, 2)}
    model.zero_grad()
    handle = fpsim.emulate(model, {})
    nn.functional.cross_entropy(model(x), labels).backward()
    handle.step()
    rows = {f"{row['role']} {row['layer']}": row for row in handle.distributions.rows}
    assert set(rows) == set(expected) == set(handle.distributions.samples)
    for name, row in rows.items():
        values = expected[name].double().numpy().ravel()
        assert torch.equal(handle.distributions.samples[name], expected[name].flatten())
        nonzeros = values[values != 0]
        logs = np.log2(np.abs(nonzeros))
        assert (row["step"], row["elements"], row["zeros"]) == (0, values.size, values.size - nonzeros.size)
        assert (row["mean_log2"], row["std_log2"]) == pytest.approx((logs.mean(), logs.std()), abs=1e-6)
        if row["role"] in ("X", "W"):
            assert row["statistics"] is None
            continue
        d = stats.kstest(nonzeros, "norm", (nonzeros.mean(), nonzeros.std())).statistic
        assert row["statistics"]["normal"] == pytest.approx(d, abs=1e-9)
        assert all(row["statistics"].values())


def test_pruning_and_micro_batches_leave_what_is_recorded() -> None:
    """The first micro-batch's dY, exact whatever becomes of it."""
    found = []
    for spec in ({}, {"gradients": {"format": "e5m2", "scale": "amax", "pruning": {"sparsity": 0.9}}}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 4))
        handle = fpsim.emulate(model, spec)
        for _ in range(2):
            model(torch.randn(64, 20)).square().sum().backward()
        handle.step()
        rows = [row for row in handle.distributions.rows if row["role"] == "dY"]
        keys = ("format", "scale", "scales", "alpha", "cosine")
        stored = [{key: row.pop(key) for key in keys if key in row} for row in rows]
        found.append(rows)
    assert (stored[0]["format"], stored[0]["scales"]) == ("e5m2", 1)
    assert stored[0]["scale"] > 0
    assert stored[0]["alpha"] > 0
    assert 0.1 < stored[0]["cosine"] < 1
    assert found[0] == found[1]
    assert len(found[0]) == 1


def test_gradients_of_zeros_have_no_fit() -> None:
    model = nn.Sequential(nn.Linear(20, 4))
    handle = fpsim.emulate(model, {})
    (model(torch.randn(64, 20)) * 0).sum().backward()
    handle.step()
    for row in (row for row in handle.distributions.rows if row["role"] in ("dY", "dW")):
        assert row["zeros"] == row["elements"]
        assert (row["mean_log2"], row["std_log2"], row["statistics"]) == (None, None, None)


def test_layers_in_half_precision_are_recorded_in_float32() -> None:
    model = nn.Sequential(nn.Linear(20, 4)).bfloat16()
    handle = fpsim.emulate(model, {})
    model(torch.randn(64, 20).bfloat16()).square().sum().backward()
    handle.step()
    assert {sample.dtype for sample in handle.distributions.samples.values()} == {torch.float32}
    assert [row["role"] for row in handle.distributions.rows] == ["X", "W", "dY", "dW"]


def test_a_layer_that_did_not_run_is_not_recorded() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(20, 4), nn.Linear(20, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Model()
    model.idle.weight.grad = torch.ones(4, 20)
    handle = fpsim.emulate(model, {})
    model(torch.randn(64, 20)).square().sum().backward()
    handle.step()
    assert {row["layer"] for row in handle.distributions.rows} == {"used"}


def test_a_run_leaves_rows_and_samples(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "distributions.jsonl").read_text().splitlines()]
    by_step = defaultdict(list)
    for row in rows:
        by_step[row["step"]].append((row["role"], row["layer"]))
    assert list(by_step) == RECORDED
    layers = sorted({layer for _, layer in by_step[0]})
    assert all(
        sorted(found) == sorted((role, layer) for role in ("W", "X", "dW", "dY") for layer in layers)
        for found in by_step.values()
    )
    samples = load_file(folder / "distributions.safetensors")
    assert sorted(samples) == sorted(f"{role} {layer}" for role in ("W", "X", "dW", "dY") for layer in layers)
    last = {f"{row['role']} {row['layer']}": row for row in rows if row["step"] == RECORDED[-1]}
    for name, sample in samples.items():
        assert sample.numel() == min(last[name]["elements"], 4096)


def test_the_table_and_the_plot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err, code = fpsim_analyze(capsys, monkeypatch, folder, "--sparsity", 0.8, "--plot", tmp_path / "out.png")
    assert (err, code) == ("", 0)
    lines = out.splitlines()
    assert lines[0] == f"{folder}: 4 recorded steps, 0 to 11"
    names = [line.split("  ")[0] for line in lines[3:7]]
    assert (names[0], names[-1]) == ("dY (all layers)", "dW (all layers)")
    assert all(name.startswith("dY ") for name in names[1:-1])
    assert sum(line.startswith("dY ") and "for 80 % zeros" in line for line in lines) == 2
    assert imread(tmp_path / "out.png").shape[2] == 4


def test_the_json_holds_means_over_the_steps(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err, code = fpsim_analyze(capsys, monkeypatch, folder.parent, "--json")  # the newest run in a folder
    assert (err, code) == ("", 0)
    written = json.loads(out)
    rows = [json.loads(line) for line in (folder / "distributions.jsonl").read_text().splitlines()]
    assert written["steps"] == RECORDED
    for one in written["over_time"]:
        shown = [row for row in rows if row["role"] == one["role"] and one["layer"] in (row["layer"], "(all layers)")]
        d = [row["statistics"]["lognormal"] for row in shown]
        assert one["D"]["lognormal"] == pytest.approx([np.mean(d), np.std(d)])
        assert one["gradients"] == len(shown) == sum(one["best_in"].values())
        if one["layer"] != "(all layers)":
            assert one["std_log2"] == [shown[0]["std_log2"], shown[-1]["std_log2"]]
    assert {page["name"].split()[0] for page in written["last"]} == {"dY"}


def test_one_weight_gradient_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(name for name in load_file(folder / "distributions.safetensors") if name.startswith("dW"))
    out, err, code = fpsim_analyze(capsys, monkeypatch, folder, "--json", "--tensor", name)
    assert (err, code) == ("", 0)
    assert [page["name"] for page in json.loads(out)["last"]] == [name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "distributions.jsonl").unlink(),
            "has no distributions.jsonl: the run was made by an fpsim that",
        ),
        (
            lambda run: (run / "distributions.jsonl").write_text(""),
            "distributions.jsonl: is empty: nothing was recorded",
        ),
        (lambda run: (run / "distributions.jsonl").write_text("{\n"), "distributions.jsonl:1: damaged"),
        (lambda run: (run / "distributions.safetensors").unlink(), "distributions.safetensors: no such file"),
        (lambda run: (run / "config.yaml").unlink(), "holds neither a run nor runs"),
    ],
)
def test_damaged_runs(
    damage: Any, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    damage(copy)
    out, err, code = fpsim_analyze(capsys, monkeypatch, copy)
    assert (out, code) == ("", 2)
    assert message in err
    assert len(err.splitlines()) == 1
