"""`fpsim estimate`: what it prints and writes, and that it says what the machine model says of the run's ledger."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

import accel
from fpsim.config import parse_config
from fpsim.config.presets import preset_folder
from fpsim.run_directory import ledger_of
from fpsim.runner import run
from tests.fpsim.command_line import command

MACHINES = ["edge-npu", "tpu-like", "tensor-core-gpu"]
CHOSEN = [word for name in MACHINES for word in ("--machine", name)]

estimate = partial(command, "estimate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate") / "run"
    gradients = {"format": "e5m2", "codec": "alpha", "pruning": {"sparsity": 0.8}}
    tensor = {"format": "e4m3fn"}
    run(
        parse_config({
            "name": "tiny",
            "data": {"name": "mnist5k", "train_limit": 128, "test_limit": 32},
            "model": {"name": "lenet"},
            "training": {"epochs": 1, "batch_size": 32, "optimizer": {"name": "sgd", "learning_rate": 0.05}},
            "emulation": {
                "weights": tensor, "activations": tensor, "gradients": gradients, "ledger": {"every_steps": 2},
                "accelerator": "tpu-like",
            },
        }),
        folder, quiet=True,
    )  # fmt: skip
    return folder


def of_machine(name: str, folder: Path) -> Any:
    return accel.machine(preset_folder() / "accelerators" / f"{name}.yaml").estimate(ledger_of(folder))


def test_it_says_what_the_machine_model_says_of_the_ledger(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    out, err, code = estimate(capsys, monkeypatch, finished, *CHOSEN, "--json", "--output", tmp_path / "out")
    assert code == 0
    data = json.loads(out)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert data == json.loads((tmp_path / "out" / "estimate.json").read_text())
    assert [one["machine"]["name"] for one in data["machines"]] == MACHINES
    for name, one in zip(MACHINES, data["machines"], strict=True):
        direct = of_machine(name, finished)
        assert one == json.loads(json.dumps(direct.to_data()))
        assert len(one["rows"]) > 3 * 5
    assert data["steps"] == 4
    seconds = {(row["machine"], row["scheme"]): row["seconds"] for row in data["comparison"]}
    assert len(seconds) == 9
    whole = {(row["machine"], row["scheme"]): row["seconds"] for row in data["training"]}
    assert whole == pytest.approx({key: 4 * value for key, value in seconds.items()})

    rows = list(csv.DictReader((tmp_path / "out" / "estimate.csv").read_text().splitlines()))
    for key, value in seconds.items():
        some = [row for row in rows if (row["machine"], row["scheme"]) == key]
        assert sum(float(row["seconds"]) for row in some) == pytest.approx(value)
    fields = ("bytes_hbm", "cycles_compute", "pj_mac", "bound_by", "utilisation")
    forward = next(
        row for row in rows if (row["machine"], row["layer"], row["pass"]) == ("tpu-like", "conv2", "forward")
    )
    assert all(forward[field] for field in fields)
    for name in ("roofline", "costs"):
        assert imread(tmp_path / "out" / f"{name}.png").std() > 0.05
        assert (tmp_path / "out" / f"{name}.svg").read_text().count("</text>") > 20
    assert len(err.splitlines()) == 6


def test_the_tables(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, err, code = estimate(capsys, monkeypatch, finished, *CHOSEN)
    assert (err, code) == ("", 0)
    for name in MACHINES:
        for scheme in ("encoded", "fp32", "bf16"):
            assert sum(line.split()[:2] == [name, scheme] for line in out.splitlines()) == 1
        assert f"{name}, by layer" in out
        total = of_machine(name, finished).totals()["encoded"]
        line = next(line.split() for line in out.splitlines() if line.split()[:2] == [name, "encoded"])
        assert float(line[2]) == pytest.approx(1e3 * total.seconds, rel=1e-3)
        assert float(line[3]) == pytest.approx(1e3 * total.joules, rel=1e-3)
        assert line[5:8] == ["1.00"] * 3
    layers = [line.split()[0] for line in out.splitlines() if line.startswith(("conv", "fc"))]
    assert layers == ["conv1", "conv2", "fc1", "fc2", "fc3"] * 3
    assert "could win" in out
    assert "the 4 steps of the training:" in out


def test_the_machine_of_the_run_is_the_default(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = estimate(capsys, monkeypatch, finished)
    assert "tpu-like, by layer" in out
    assert "edge-npu" not in out


def test_a_machine_that_builds_on_another(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "accelerator: tpu-like\nmachine:\n  name: tpu-like\n  clock_mhz: 470\n  array:\n    precisions:\n"
    (tmp_path / "half.yaml").write_text(text + "    - {bits: 16, pj_per_mac: 1}\n")
    arguments = (finished, "--machine", tmp_path / "half.yaml", "--json")
    half = json.loads(estimate(capsys, monkeypatch, *arguments)[0])["machines"][0]
    assert half["machine"]["clock_mhz"] == 470
    assert half["absent"] == {"fp32": "machine 'tpu-like' has no precision of 32 bits or more"}
    out, _, code = estimate(capsys, monkeypatch, *arguments[:-1])
    assert code == 0
    assert "no fp32: machine 'tpu-like' has no precision" in out
    whole = of_machine("tpu-like", finished).totals()["bf16"]
    assert half["totals"]["bf16"]["seconds"] == pytest.approx(2 * whole.seconds)


def failing(capsys: Any, monkeypatch: Any, *arguments: Any) -> tuple[str, int]:
    out, err, code = estimate(capsys, monkeypatch, *arguments)
    assert out == ""
    assert "Traceback" not in err
    return err, code


def test_mistakes(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = partial(failing, capsys, monkeypatch)
    err, code = fail(finished, "--machine", "edge-nqu")
    assert code == 2
    assert err.startswith("--machine: no such file")
    assert "did you mean 'edge-npu'" in err
    err, code = fail(finished, "--machine", "fp8-training")
    assert (err, code) == ("--machine: 'fp8-training' describes no machine: it has no key `machine`\n", 2)
    err, code = fail(finished, "--machine", "edge-npu", "--machine", "edge-npu")
    assert (err, code) == ("--machine: names the machine 'edge-npu' twice\n", 2)
    text = (preset_folder() / "accelerators" / "edge-npu.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(text.replace("bytes_per_cycle: 12.8", "bytes_per_cycle: 0"))
    err, code = fail(finished, "--machine", tmp_path / "bad.yaml")
    line = text[: text.index("bytes_per_cycle: 12.8")].count("\n") + 1
    assert code == 2
    assert f"bad.yaml:{line}:24: emulation.machine.levels.1.bytes_per_cycle: must be > 0 (got 0)" in err
    (tmp_path / "narrow.yaml").write_text(
        "accelerator: edge-npu\nmachine: {array: {precisions: [{bits: 4, pj_per_mac: 1}]}}\n"
    )
    err, code = fail(finished, "--machine", tmp_path / "narrow.yaml")
    assert code == 2
    assert "e4m3fn" in err
    assert fail(tmp_path, "--machine", "edge-npu")[1] == 2
    (tmp_path / "file").write_text("")
    _, err, code = estimate(capsys, monkeypatch, finished, "--output", tmp_path / "file")
    assert code == 2
    assert "--output: cannot be written: " in err


def test_runs_that_cannot_be_estimated(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = partial(failing, capsys, monkeypatch)
    other = tmp_path / "run"
    other.mkdir()
    for name in ("config.yaml", "ledger.jsonl"):
        (other / name).write_bytes((finished / name).read_bytes())
    err, code = fail(other, "--machine", "edge-npu")  # of a version that counted no products; not finished
    assert code == 2
    assert err.startswith(f"{other}: the ledger has no products")
    products = (finished / "products.jsonl").read_text()
    (other / "products.jsonl").write_text(products[:-20])
    err, code = fail(other, "--machine", "edge-npu")
    assert code == 1
    assert err.startswith(f"fpsim: {other}/products.jsonl:{products.count(chr(10))}: damaged")
    (other / "products.jsonl").write_text('{"x": 1}\n')
    err, code = fail(other, "--machine", "edge-npu")
    assert code == 1
    assert "ledger.jsonl or products.jsonl is damaged" in err
    (other / "products.jsonl").write_text(products)
    out, err, code = estimate(capsys, monkeypatch, other, "--machine", "edge-npu")
    assert (err, code) == ("", 0)
    assert "steps of the training" not in out
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text[: text.index("  machine:")] + text[text.index("  ledger:") :])
    err, code = fail(other)
    assert (err, code) == ("--machine: is needed: the run's configuration describes no machine\n", 2)
