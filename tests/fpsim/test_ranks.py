"""Two ranks on one machine: they decide as one rank does, add up, go on after a kill, fail together and end cleanly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from fpsim import checkpoint
from fpsim.errors import ConfigError
from fpsim.ranks import Ranks
from fpsim.run_directory import rows_of
from fpsim.runner import resume, run
from tests.fpsim.runs import STEPS, outcome, settings
from tests.fpsim.two_ranks import RUNS, SPECS

pytestmark = pytest.mark.usefixtures("restored_threads")

PROGRAM = Path(__file__).with_name("two_ranks.py")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def launched(command: list[str], seconds: int = 240) -> subprocess.CompletedProcess[str]:
    """A command's end, however many processes it starts."""
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            with_children = process.pid
            if process.poll() is None:
                os.killpg(with_children, 9)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What two_ranks.py found, and where its runs are: launched once, however many processes test."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-ranks"
    findings = folder / "findings.json"
    with FileLock(f"{folder}.lock"):
        if not findings.is_file():
            folder.mkdir(exist_ok=True)
            torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            ended = launched([*torchrun, str(PROGRAM), str(folder)])
            assert ended.returncode == 0, ended.stderr
    return json.loads(findings.read_text()), folder


def approximately(rows: Any) -> Any:
    """Numbers within a rounding error of float64 sums in another order."""
    if isinstance(rows, list):
        return [approximately(row) for row in rows]
    if isinstance(rows, dict):
        return {key: approximately(value) for key, value in rows.items()}
    return pytest.approx(rows, rel=1e-9, abs=1e-12) if isinstance(rows, float) else rows


# --- one tensor in two parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_two_ranks_decide_as_one(found: tuple[dict[str, Any], Path], name: str) -> None:
    """Each element of X and dY is rounded and pruned as in the whole tensor, given the same values; what is told of
    them is the same on both ranks, and that of the whole."""
    for one in found[0][f"decisions, {name}"]:
        assert isinstance(one, dict), one
        assert one["same elements"] == [True] * 4
        assert one["same samples"]
        assert one["sparsity"][0] == one["sparsity"][1]
        assert one["formats"][0] == one["formats"][1]
        assert one["together"] == approximately(one["alone"])
        of_dy = [[row for row in one[f"gradients {who}"] if row["role"] == "dY"] for who in ("together", "alone")]
        for row in of_dy[0] + of_dy[1]:  # exact to 1e-7
            row["mean_log2"], row["std_log2"] = round(row["mean_log2"], 6), round(row["std_log2"], 6)
            if row.get("cosine") is not None:
                row["cosine"] = round(row["cosine"], 9)
        assert of_dy[0] == of_dy[1]


@pytest.mark.parametrize("name", SPECS)
def test_the_sum_of_ledgers(found: tuple[dict[str, Any], Path], name: str) -> None:
    """Of what is cut, that of the whole; of what each rank holds, twice that."""
    one = found[0][f"decisions, {name}"][0]
    assert one["products together"] == one["products alone"]
    of_each = ("weight", "master", "weight_gradient", "optimizer_state")
    expected = [
        [layer, role, which, *(2 * count if role in of_each else count for count in counts)]
        for layer, role, which, *counts in one["ledger alone"]
    ]
    assert one["ledger together"] == expected


@pytest.mark.parametrize(("estimator", "parts"), [("microbatch", 2), ("microbatch", 1), ("per_sample", 1), ("ema", 1)])
def test_ranks_are_parts_of_a_batch_for_snr(found: tuple[dict[str, Any], Path], estimator: str, parts: int) -> None:
    for differences in found[0][f"snr, {estimator} {parts}"]:
        assert set(differences) == {"first.0", "second.0", "mask.0"}
        assert differences["mask.0"] == 0
        assert max(differences.values()) < 1e-7


# --- what ranks send ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "e5m2", "no feedback", "sparse"])
def test_sums_of_what_ranks_send(found: tuple[dict[str, Any], Path], name: str) -> None:
    """As rounded, left out and added up by hand, in the order of the ranks; the bytes are those of the streams."""
    weights, biases = 64 * 32, 32
    for one in found[0][f"exchange, {name}"]:
        assert one["same"] == [True] * 6, one
        told = one["summary"]
        assert told["ranks"] == 2
        assert told["float32_bytes_per_step"] == 4 * (weights + biases)
        lengths = 2 * 2 * 8  # of two streams of each rank, as int64, all-reduced
        in_streams = one["own_stream_bytes"] / 3 + lengths
        expected = told["float32_bytes_per_step"] if name == "float32" else in_streams
        assert told["sent_bytes_per_step"] == pytest.approx(expected, rel=0.02)  # as many bytes as the longest has


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_of_two_ranks_ends_the_same(found: tuple[dict[str, Any], Path], name: str) -> None:
    assert found[0][f"run, {name}"] == ["done", "done"]
    whole, killed = (outcome(found[1] / name / which) for which in ("whole", "killed"))
    assert [key for key in whole if whole[key] != killed[key]] == []
    places = [found[1] / name / which / "checkpoints" / f"step-{STEPS}" for which in ("whole", "killed")]
    assert (
        places[0].joinpath(checkpoint.RANKS_FILE).read_bytes() == places[1].joinpath(checkpoint.RANKS_FILE).read_bytes()
    )


@pytest.mark.parametrize("name", ["plain", "float32", "accumulated", "pruned weights"])
def test_two_ranks_train_as_one(found: tuple[dict[str, Any], Path], tmp_path: Path, name: str) -> None:
    """Without batch normalisation: within a float's tolerance, but where a value lies on the edge of two decisions."""
    config = {**RUNS[name], "training": {**RUNS[name]["training"]}}
    if name == "pruned weights":  # whose parts of a batch are micro-batches and ranks
        config["training"]["micro_batches"] = 4
    alone = run(config, tmp_path / "alone", quiet=True).run_dir
    together = found[1] / name / "whole"
    ours, theirs = ([row for row in rows_of(f / "metrics.jsonl") if row["kind"] == "step"] for f in (together, alone))
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        if name != "accumulated":
            assert one["gradient_sparsity"] == pytest.approx(other["gradient_sparsity"], abs=0.01) or name == "float32"
    assert ours[0]["gradient_sparsity"] == theirs[0]["gradient_sparsity"]
    weights, others = (load_file(checkpoint.newest(f) / checkpoint.MODEL_FILE) for f in (together, alone))
    for key, weight in weights.items():
        assert torch.allclose(weight, others[key], rtol=0.02, atol=2e-3), key


def test_what_batch_normalisation_changes_is_said(found: tuple[dict[str, Any], Path]) -> None:
    results = json.loads((found[1] / "dropout and batch statistics" / "whole" / "results.json").read_text())
    assert any(
        "batch normalisation takes the mean and the variance of each rank's 4 samples" in n for n in results["notes"]
    )
    plain = json.loads((found[1] / "plain" / "whole" / "results.json").read_text())
    assert not any("batch normalisation" in note for note in plain["notes"])
    assert plain["communication"]["format"] == "fp32"
    assert plain["environment"]["world_size"] == 2


def test_what_one_rank_sends_rounded_is_told(found: tuple[dict[str, Any], Path]) -> None:
    told = json.loads((found[1] / "sent rounded" / "whole" / "results.json").read_text())["communication"]
    assert (told["format"], told["codec"]) == ("e4m3fn", "bitmask")
    assert 0 < told["sent_bytes_per_step"] < 0.5 * told["float32_bytes_per_step"]


def test_rounded_and_sparse_gradients_train_as_well(found: tuple[dict[str, Any], Path]) -> None:
    """Three seeds of the digits' MLP, nine tenths of each gradient left out: the mean accuracy is within the spread."""
    plain, rounded = (found[0][f"accuracy, {name}"][0] for name in ("float32", "rounded"))
    assert min(plain) > 85
    spread = max(*plain, *rounded) - min(*plain, *rounded)
    assert abs(sum(plain) - sum(rounded)) / 3 <= min(spread, 2.0), (plain, rounded)
    told = json.loads((found[1] / "rounded-0" / "results.json").read_text())["communication"]
    assert told["sent_bytes_per_step"] < told["float32_bytes_per_step"] / 8


# --- failing together -----------------------------------------------------------------------------------------------


def test_ranks_fail_together(found: tuple[dict[str, Any], Path]) -> None:
    """What one rank alone meets, rank 0 tells and all end by, with one exit code."""
    findings, folder = found
    first, other = findings["not finite"]
    assert first.startswith("RunError: output of layer '2' is not finite at step 3 (")
    assert other == "ToldError"
    (tensor,) = (folder / "not finite" / "failed" / "step-3").glob("not_finite.safetensors")
    assert bool(load_file(tensor)["output"].isnan().all())  # of rank 1, which has it
    first, other = findings["missing on one"]
    assert first.startswith("ConfigError: rank 1: data.root: ")
    assert other == "ToldError"
    assert not (folder / "missing").exists()
    first, other = findings["stopped on one"]
    assert first.startswith(f"RunError: stopped by another rank at step 4 of {STEPS}; ")
    assert other == "ToldError"
    assert checkpoint.newest(folder / "stopped").name == "step-4"


@pytest.mark.parametrize(("name", "sizes"), [("few", (192, 288)), ("many", (6144, 9216)), ("none", (0, 384))])
@pytest.mark.parametrize("kind", ["", ", pruned"])
def test_parts_of_other_sizes_are_refused(
    found: tuple[dict[str, Any], Path], name: str, sizes: tuple[int, int], kind: str
) -> None:
    for told in found[0][f"unequal parts, {name}{kind}"]:
        expected = f"ranks have parts of one size each: these have {sizes[0]} to {sizes[1]} elements"
        assert told == f"RunError: activation of layer '0': {expected}"


def test_a_run_goes_on_with_as_many_ranks(found: tuple[dict[str, Any], Path]) -> None:
    with pytest.raises(ConfigError, match=r"was begun with world size 2: go on with the same \(got 1\)"):
        resume(found[1] / "plain" / "whole")


def test_a_batch_that_two_ranks_cannot_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpsim.runner.joined", lambda: _several())
    with pytest.raises(ConfigError, match=r"training\.batch_size: must be a multiple of 3 ranks times 2 .*\(got 8\)"):
        run(settings(training={"micro_batches": 2}), tmp_path / "run", quiet=True)


class _several:
    """A stand-in for three ranks, of which this one meets an error at once."""

    def __enter__(self) -> Any:
        class Three(Ranks):
            def gathered(self, data: bytes, sizes: list[int] | None = None) -> list[bytes]:
                return [data, b"[]", b"[]"]

        return Three(0, 3)

    def __exit__(self, *arguments: object) -> None:
        pass


# --- the command line -----------------------------------------------------------------------------------------------


def test_nproc(tmp_path: Path) -> None:
    """One line of mistakes, exit codes, a run stopped by a signal to its launcher, and resumed on as many ranks."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(training={"epochs": 400})))
    command = ["fpsim", "run", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"), "--nproc", "2"]
    refused = launched([*command, "training.batch_size=7"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert (
        refused.stderr
        == "<overrides>: training.batch_size: must be a multiple of 2 ranks times 1 micro-batches (got 7)\n"
    )
    assert not (tmp_path / "run").exists()
    with subprocess.Popen(
        [sys.executable, "-m", *command], env=environment(), stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told += line
            if "epoch 2," in line:
                process.terminate()
                break
        told += process.stderr.read()
        assert process.wait(timeout=60) == 1, told
    assert told.rstrip().endswith(f"go on with: fpsim resume {tmp_path / 'run'}"), told
    assert "Traceback" not in told
    config = tmp_path / "run" / "config.yaml"
    step = checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["step"]
    text = config.read_text().replace("epochs: 400", f"epochs: {step // 5 + 1}")
    config.write_text(text)  # a shorter end, for the test
    ended = launched(["fpsim", "resume", str(tmp_path / "run"), "--quiet"])
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 2
    assert ended.stderr == ""


@pytest.mark.exhaustive
def test_ranks_end_cleanly_forty_times(tmp_path: Path) -> None:
    """A thread of gloo that outlives its group aborts the interpreter after correct results, now and then."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(training={"epochs": 1})))
    begun = time.monotonic()
    for number in range(40):
        folder = tmp_path / f"{number}"
        ended = launched(["fpsim", "run", str(tmp_path / "run.yaml"), "--run-dir", str(folder), "--nproc", "2", "-q"])
        assert (ended.returncode, ended.stderr) == (0, ""), f"launch {number}: {ended.stderr}"
        assert (folder / "results.json").is_file()
    print(f"40 launches, no abort, {time.monotonic() - begun:.0f} s")
