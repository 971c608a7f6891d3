from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import _profiler_enabled

from fpsim import profile, runner
from fpsim.config import parse_config
from fpsim.errors import ConfigError
from fpsim.profile import Range, summary
from fpsim.ranges import DATA, FORWARD, HOOKS, NOTHING, OPTIMIZER, PREFIX, ROUNDING, SCALES, STEP, span, spanned
from fpsim.runner import run
from tests.fpsim.command_line import command
from tests.fpsim.runs import EMULATED, outcome, settings

pytestmark = pytest.mark.usefixtures("restored_threads")

WEIGHTS = ROUNDING["weight"]


def nested(start: float) -> list[Range]:
    """A step of 100 us: 5 of data, 60 forward, of which 30 in hooks, of which 12 round a weight, of which 4 scale."""
    ranges = [
        (STEP, 0, 100),
        (DATA, 1, 6),
        (FORWARD, 10, 70),
        (HOOKS, 20, 50),
        (WEIGHTS, 25, 37),
        (SCALES, 26, 30),
        (OPTIMIZER, 80, 90),
    ]
    return [Range(name, start + first, start + last) for name, first, last in ranges]


def test_every_moment_counts_once() -> None:
    found = summary([*reversed(nested(0)), Range(FORWARD, 150, 170), *nested(200)])
    assert (found["steps"], found["milliseconds_per_step"]) == (2, pytest.approx(0.1))
    phases = {row["phase"]: row for row in found["phases"]}
    assert [phases[name]["milliseconds"] for name in (DATA, FORWARD, OPTIMIZER)] == pytest.approx([0.005, 0.06, 0.01])
    assert phases[profile.OTHER]["milliseconds"] == pytest.approx(0.025)
    assert phases[FORWARD]["network_milliseconds"] == pytest.approx(0.03)
    assert (phases[FORWARD]["calls"], phases["backward"]["calls"]) == (1, 0)
    kinds = {row["kind"]: (row["milliseconds"], row["share"], row["calls"]) for row in phases[FORWARD]["emulation"]}
    assert kinds == {
        WEIGHTS: pytest.approx((0.008, 0.08, 1)),
        SCALES: pytest.approx((0.004, 0.04, 1)),
        HOOKS: pytest.approx((0.018, 0.18, 1)),
    }
    assert found["emulation_milliseconds"] == pytest.approx(0.03)
    assert found["emulation_share"] == pytest.approx(0.3)
    assert sum(row["milliseconds"] for row in found["phases"]) == pytest.approx(0.1)


def test_a_range_costs_nothing_without_a_profiler() -> None:
    assert span("anything") is NOTHING

    @spanned(HOOKS)
    def doubled(x: int, *, more: int = 0) -> int:
        """What it does."""
        return 2 * x + more

    assert (doubled(3, more=1), doubled.__name__, doubled.__doc__) == (7, "doubled", "What it does.")


def test_profiling_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    run(settings(), tmp_path / "profiled", quiet=True, profile=True)
    run(settings(), tmp_path / "plain", quiet=True)
    profiled, plain = outcome(tmp_path / "profiled"), outcome(tmp_path / "plain")
    assert sorted({*profiled["files"]} - {*plain["files"]}) == ["profile.json", "trace.json"]
    del profiled["files"], plain["files"]
    assert [key for key in plain if profiled[key] != plain[key]] == []


def test_the_files_of_a_profile(tmp_path: Path) -> None:
    run(settings(), tmp_path / "run", quiet=True, profile=True)
    found = profile.load(tmp_path / "run")
    assert (found["first_step"], found["steps"]) == (3, 3)
    assert sum(row["milliseconds"] for row in found["phases"]) == pytest.approx(found["milliseconds_per_step"])
    for row in found["phases"]:
        parts = row["network_milliseconds"] + sum(kind["milliseconds"] for kind in row["emulation"])
        assert parts == pytest.approx(row["milliseconds"])
    calls = {row["kind"]: row["calls"] for row in found["emulation"]}
    emulated_layers = 2  # of three
    assert calls[ROUNDING["activation"]] == calls[ROUNDING["weight"]] == emulated_layers
    assert calls["pruning and rounding of gradients"] == emulated_layers
    assert calls["ledger"] > 0  # step 5 is sampled
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count(f"{PREFIX}{STEP}") == 3
    assert {f"{PREFIX}{name}" for name in ("data", "forward", "backward", "optimizer", "end of step")} <= {*names}
    assert not list((tmp_path / "run").glob(".*tmp*"))


@pytest.mark.parametrize(
    ("emulation", "kind"),
    [
        ({"datapath": {"forward": "fp22"}}, "products on emulated datapaths"),
        ({"datapath": {"dgrad": "fp22"}}, "products on emulated datapaths"),
        ({"datapath": {"wgrad": "fp22"}}, "products on emulated datapaths"),
        ({"weight_pruning": {"name": "dpf", "sparsity": 0.5, "ramp_epochs": 0.2}}, "pruning of weights"),
        ({"saved_activations": {}}, "packing of saved activations"),
        ({"ledger": {"every_steps": 1}}, "ledger"),
    ],
)
def test_every_kind_of_work_is_found(tmp_path: Path, emulation: dict[str, Any], kind: str) -> None:
    changes = {"model": {"name": "mlp", "hidden": [1024]}, "training": {"epochs": 1}}
    run(settings(emulation=emulation, **changes), tmp_path / "run", quiet=True, profile=True)
    found = {row["kind"]: row for row in profile.load(tmp_path / "run")["emulation"]}
    assert found[kind]["milliseconds"] > 0


def test_a_run_that_is_too_short_is_refused(tmp_path: Path) -> None:
    config = parse_config(settings(training={"epochs": 1, "batch_size": 16}))
    with pytest.raises(ConfigError, match=r"--profile: profiles steps 3 to 5 \(the run has 2\)"):
        run(config, tmp_path / "run", quiet=True, profile=True)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_profile_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = runner._train_step

    def step(session: Any) -> dict[str, Any]:
        if session.step == 3:
            assert _profiler_enabled()
            raise KeyboardInterrupt
        return train_step(session)

    monkeypatch.setattr(runner, "_train_step", step)
    with pytest.raises(KeyboardInterrupt):
        run(settings(), tmp_path / "run", quiet=True, profile=True)
    assert not _profiler_enabled()
    assert not (tmp_path / "run" / "profile.json").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings(emulation=EMULATED)))
    monkeypatch.chdir(tmp_path)
    out, err, code = command("run", capsys, monkeypatch, config, "--run-dir", "run", "--profile", "-q")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[2].startswith("steps 3 to 5: ")
    assert [line.split()[0] for line in lines if line.startswith(("data", "forward", "backward"))] == [
        "data", "forward", "backward",
    ]  # fmt: skip
    assert lines[-1].startswith("every operation: run/trace.json")
    assert max(map(len, lines[3:-1])) <= 80
    out, err, code = command("run", capsys, monkeypatch, config, "--run-dir", "json", "--profile", "-q", "--json")
    answer = json.loads(out)
    assert (code, err, answer["run_dir"]) == (0, "", "json")
    assert answer["profile"] == profile.load(tmp_path / "json")
    out, err, code = command("run", capsys, monkeypatch, config, "--profile", "--dry-run")
    assert (code, out) == (2, "")
    assert "leave out --profile" in err


def test_users_see_the_ranges_in_their_own_profiles() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, span("mine"):
        torch.ones(3) + 1
    assert [one.name for one in profile.ranges_of(profiler)] == ["mine"]
