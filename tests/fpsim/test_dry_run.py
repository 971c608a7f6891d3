from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import accel
from fpsim import checkpoint, plan
from fpsim.config import config_hash, parse_config
from fpsim.errors import ConfigError
from fpsim.runner import run
from tests.fpsim.command_line import command
from tests.fpsim.runs import DATA, EMULATED, settings

pytestmark = pytest.mark.usefixtures("restored_threads")

BATCH = 8


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(**changes: Any) -> dict[str, Any]:
    return plan.plan(parse_config(settings(**changes)))


def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["layer"]: row for row in found["layers"]}


def test_the_plan_of_an_mlp_by_hand(tmp_path: Path) -> None:
    """16 inputs, 16 and 12 hidden, 4 classes, batches of 8."""
    found = planned()
    assert list(tmp_path.iterdir()) == []
    layers = rows(found)
    assert [row["weight_shape"] for row in layers.values()] == [[16, 16], [12, 16], [4, 12]]
    assert [row["type"] for row in layers.values()] == ["Linear"] * 3
    by_hand = [(16, 16), (16, 12), (12, 4)]
    for (name, row), (inputs, outputs) in zip(layers.items(), by_hand, strict=True):
        macs = BATCH * inputs * outputs
        has_dgrad = name != next(iter(layers))
        assert row["macs"] == {"forward": macs, "dgrad": macs * has_dgrad, "wgrad": macs}
        assert row["elements"] == {
            "weight": inputs * outputs, "activation": BATCH * inputs, "gradient": BATCH * outputs,
        }  # fmt: skip
        assert row["fp32_bytes"] == {role: 4 * count for role, count in row["elements"].items()}
    first, _, last = layers.values()
    assert first["dense_bytes"]["activation"] == accel.pack(torch.zeros(8, 16), "dense", "e4m3fn").nbits / 8
    gradient = accel.pack(torch.zeros(8, 16), "dense", "e5m2").nbits / 8
    assert first["dense_bytes"]["gradient"] == pytest.approx(gradient, abs=8)  # a header with alpha
    further_scales = 4 * 15  # one a channel
    weight = accel.pack(torch.zeros(16, 16), "dense", "e4m3fn").nbits / 8
    assert first["dense_bytes"]["weight"] == weight + further_scales
    assert last["dense_bytes"] == last["fp32_bytes"]
    assert found["totals"]["macs"]["forward"] == BATCH * (16 * 16 + 16 * 12 + 12 * 4)
    assert found["parameters"] == 16 * 16 + 16 + 16 * 12 + 12 + 12 * 4 + 4
    assert (found["steps_per_epoch"], found["steps"]) == (5, 10)
    assert found["config_hash"] == config_hash(parse_config(settings()))


def test_the_plan_of_a_lenet_by_hand() -> None:
    """Images of 16x16: convolutions on 16x16 (padded) and, pooled, 8x8 -> 4x4, pooled to 2x2."""
    data = {**DATA, "train_samples": 16, "image_size": 16}
    found = planned(data=data, model={"name": "lenet"}, training={"epochs": 1, "micro_batches": 2}, emulation=None)
    layers = rows(found)
    conv1, conv2 = BATCH * 16 * 16 * 6 * 25, BATCH * 4 * 4 * 16 * 6 * 25
    linear = [BATCH * 64 * 120, BATCH * 120 * 84, BATCH * 84 * 4]
    assert [row["macs"]["forward"] for row in layers.values()] == [conv1, conv2, *linear]
    assert [row["macs"]["wgrad"] for row in layers.values()] == [conv1, conv2, *linear]
    assert [row["macs"]["dgrad"] for row in layers.values()] == [0, conv2, *linear]
    assert layers["conv2"]["elements"] == {
        "weight": 16 * 6 * 25, "activation": BATCH * 6 * 8 * 8, "gradient": BATCH * 16 * 4 * 4,
    }  # fmt: skip
    assert layers["conv2"]["emulation"] == {}
    assert layers["conv2"]["by"] == []


def test_products_inside_attention_by_hand(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    data = {"name": "text", "path": "text.txt", "context": 8}
    products = [{"match": "type:CausalSelfAttention", "datapath": {"forward": "fp22"}}]
    found = planned(
        data=data, model={"name": "gpt", "layers": 1, "heads": 2, "width": 16}, emulation={"products": products}
    )
    (row,) = found["products"]
    macs = 2 * BATCH * 8 * 8 * 16  # scores and sums of values
    assert row["macs"] == {"forward": macs, "dgrad": macs, "wgrad": macs}
    assert row["datapath"] == "forward fp22"
    assert found["totals"]["macs"]["forward"] == macs + sum(one["macs"]["forward"] for one in found["layers"])


def test_what_decides_how_a_layer_is_emulated(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [{"match": "re:.*5", "weights": {"format": "bf16"}}]
    emulation = {**EMULATED, "include": ["type:Linear"], "exclude": ["last"], "overrides": overrides}
    found = planned(emulation=emulation)
    first, _, last = found["layers"]
    assert (first["by"], last["by"]) == (["include type:Linear"], ["exclude last", "override re:.*5"])
    assert last["emulation"] == {"weights": "bf16, nearest_even, codec dense"}
    assert first["emulation"] == {
        "weights": "e4m3fn, stochastic, scale amax by channel, codec dense",
        "activations": "e4m3fn, nearest_even, scale power_of_two, codec dense",
        "gradients": "e5m2, pruned to 80 % zeros (homogeneous), stochastic, scale lognormal_mean, codec alpha",
    }
    plan.show(found)
    out = capsys.readouterr().out
    assert "A  weights:     e4m3fn, stochastic, scale amax by channel, codec dense" in out
    assert "B  weights:     bf16, nearest_even, codec dense" in out
    found = planned(emulation={**EMULATED, "include": ["first"], "exclude": []})
    assert [row["by"] for row in found["layers"]] == [["include first"], ["in no include"], ["in no include"]]


def test_time_and_disk(tmp_path: Path) -> None:
    found = planned()
    times, disk = found["time"], found["disk"]
    assert times["sampled_steps"] == 4  # 0, 4, 8 and the last, 9
    assert 0 < times["fastest_step"] <= times["step"] <= times["slowest_step"]
    expected = 6 * times["step"] + 4 * times["sampled_step"] + 2 * times["evaluation"]
    assert times["total"] == pytest.approx(expected)
    folder = run(settings(), tmp_path / "run", quiet=True).run_dir
    saved = checkpoint.checkpoints(folder / "checkpoints")[-1]
    size = sum(file.stat().st_size for file in saved.iterdir())
    assert disk["checkpoint"] <= size <= disk["checkpoint"] + 6000  # history and headers
    whole = sum(file.stat().st_size for file in folder.rglob("*"))
    assert 0.7 * whole < disk["run_directory"] < 1.5 * whole


def test_every_step_sampled_and_one_step_in_all() -> None:
    found = planned(emulation={"ledger": {"every_steps": 1}}, training={"epochs": 1, "batch_size": 43})
    assert found["steps"] == found["time"]["sampled_steps"] == 1


def test_the_schedule_of_weight_pruning(capsys: pytest.CaptureFixture[str]) -> None:
    pruning = {"name": "gmp", "sparsity": 0.8, "begin_epochs": 0.4, "ramp_epochs": 0.8, "interval": 2}
    found = planned(emulation={"weight_pruning": pruning})
    assert (found["weight_pruning"]["first_step"], found["weight_pruning"]["every_steps"]) == (2, 2)
    asked = {row["step"]: row["sparsity"] for row in found["weight_pruning"]["ramp"]}
    assert asked == {2: 0.0, 3: pytest.approx(0.8 * (1 - 0.75**3)), 4: pytest.approx(0.8 * (1 - 0.5**3)),
                     5: pytest.approx(0.8 * (1 - 0.25**3)), 6: 0.8}  # fmt: skip
    plan.show(found)
    assert "weight pruning: gmp, from step 2 on, every 2: 0 % at step 2, " in capsys.readouterr().out
    snr = planned(emulation={"weight_pruning": {"name": "snr"}}, training={"micro_batches": 2})["weight_pruning"]
    assert (snr["first_step"], snr["every_steps"], snr["ramp"]) == (5, 5, [])
    assert planned()["weight_pruning"] is None


def test_a_step_on_the_machine_of_the_emulation(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(emulation={**EMULATED, "accelerator": "edge-npu"})
    seconds = found["machine"]["seconds_per_step"]
    assert found["machine"]["name"] == "edge-npu"
    assert 0 < seconds["encoded"] < seconds["fp32"]
    plan.show(found)
    assert "a step on edge-npu: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emulation": {"exclude": ["fc9"]}}, "pattern 'fc9' matches no matrix layer"),
        ({"training": {"batch_size": 80}}, "larger than the training set of 43"),
        ({"data": {"name": "mnist", "root": "nowhere"}}, "data.root: .*nowhere.*not found"),
        ({"model": {"name": "lenet"}}, "lenet needs images of at least 12x12"),
    ],
)
def test_mistakes_are_those_of_a_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(**changes)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(settings()))
    out, err, code = command("run", capsys, monkeypatch, "tiny.yaml", "training.epochs=3", "--dry-run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("tiny (")
    assert lines[0].endswith("nothing is trained or written")
    assert any(line.startswith("training: 3 epochs of 5 steps, 15 in all, ") for line in lines)
    assert any(line.split()[:2] == ["total", "496"] for line in lines)
    out, err, code = command("run", capsys, monkeypatch, "tiny.yaml", "--dry-run", "--json", "--run-dir", "there")
    answer = json.loads(out)
    assert (code, err, answer["run_dir"]) == (0, "", "there")
    assert answer["layers"][0]["macs"]["forward"] == BATCH * 16 * 16
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    _, err, code = command("run", capsys, monkeypatch, "tiny.yaml", "--dry-run", "--run-dir", ".")
    assert code == 2
    assert "run directory exists already" in err
    _, err, code = command("run", capsys, monkeypatch, "tiny.yaml", "emulation.exclude=[nix]", "--dry-run")
    assert (code, "pattern 'nix' matches no matrix layer" in err) == (2, True)


def test_a_step_that_fails_is_told_as_in_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(emulation=None, training={"optimizer": {"name": "sgd", "learning_rate": 1e30}})
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    out, err, code = command("run", capsys, monkeypatch, "tiny.yaml", "--dry-run")
    assert (code, out) == (1, "")
    assert "is not finite at step 1" in err
