"""Sweeps on real processes: workers and drivers that are killed, and what is left of it in the results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fpsim.run_directory import rows_of
from fpsim.runner import run
from fpsim.sweep import load_sweep

pytestmark = [
    pytest.mark.usefixtures("restored_threads"),
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks up which files a process has open"),
]

DEADLINE_SECONDS = 120
LATEST_STEP = 120
BASE: dict[str, Any] = {
    "name": "tiny",
    "threads": 1,
    "data": {"name": "synthetic", "train_samples": 256, "test_samples": 8, "image_size": 4},
    "model": {"name": "mlp", "hidden": [8]},
    "training": {
        "epochs": 3,  # of 64 steps
        "batch_size": 4,
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "checkpoint": {"every_steps": 4},
    },
}

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a Python module as a process in an empty directory, its output in files; kills what is left at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    started: list[subprocess.Popen[str]] = []

    def popen(name: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        with open(f"{name}.out", "w") as out, open(f"{name}.err", "w") as err:
            command = [sys.executable, "-m", *map(str, arguments)]
            env = {**os.environ, "PYTHONPATH": path, **environment}
            started.append(subprocess.Popen(command, stdout=out, stderr=err, text=True, env=env))
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def trial_in_progress(trials: Path, processes: Callable[[], list[int]]) -> tuple[int, Path] | None:
    """One of the processes and the trial that it has begun and saved, and that is far from its end."""
    for folder in trials.glob("*/checkpoints"):
        if 4 <= saved_step(folder) <= LATEST_STEP:
            for pid in processes():
                if any(folder.parent in file.parents for file in files_of(pid)):
                    return pid, folder.parent
    return None


def saved_step(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


def files_of(pid: int) -> list[Path]:
    """Of a run, a process holds at least the lock open."""
    try:
        return [Path(file.path) for file in psutil.Process(pid).open_files()]
    except psutil.Error:
        return []


def events(trial: Path) -> list[str]:
    return [row["event"] for row in rows_of(trial / "log.jsonl")]


def same(results: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on when and where a run was trained."""
    content = {key: value for key, value in results.items() if key not in ("wall_seconds", "environment")}
    copy: dict[str, Any] = json.loads(json.dumps(content))
    return copy


def write_sweep(folder: Path, **keys: Any) -> None:
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"name": "s", "base": BASE, "output": "out", **keys}))


def test_a_sweep_outlives_a_worker_a_failing_trial_and_its_driver(start: Start, tmp_path: Path) -> None:
    good = [{"seed": seed, "training.optimizer.learning_rate": rate} for seed in range(6) for rate in (0.1, 0.2)]
    bad = {"seed": 0, "training.optimizer.learning_rate": 1e30}
    write_sweep(tmp_path, list=[*good[:3], bad, *good[3:11]])
    start("scheduler", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard",
          "--scheduler-file", "scheduler.json")  # fmt: skip
    until(lambda: Path("scheduler.json").is_file() and Path("scheduler.json").read_text(), "no scheduler")
    address = json.loads(Path("scheduler.json").read_text())["address"]

    def worker(name: str) -> subprocess.Popen[str]:
        options = ("--no-nanny", "--nthreads", 1, "--no-dashboard", "--host", "127.0.0.1", "--local-directory", name)
        return start(name, "distributed.cli.dask_worker", address, *options)

    def drive(name: str) -> subprocess.Popen[str]:
        return start(name, "fpsim", "sweep", "sweep.yaml", DASK_SCHEDULER_ADDRESS=address)

    workers = {one.pid: one for one in (worker("one"), worker("two"))}
    trials, copies = tmp_path / "out" / "s" / "trials", tmp_path / "out" / "s" / "results"
    first = drive("first")
    killed, cut_off = until(lambda: trial_in_progress(trials, lambda: [*workers]), "no trial is in progress")
    workers.pop(killed).kill()
    third = worker("three")
    workers[third.pid] = third

    def enough() -> tuple[int, Path] | None:
        is_late = copies.is_dir() and len([*copies.glob("*.json")]) >= 4
        return trial_in_progress(trials, lambda: [*workers]) if is_late else None

    _, orphan = until(enough, "the sweep does not go on")
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = {path: path.stat().st_mtime_ns for path in copies.glob("*.json")}
    assert 4 <= len(kept) < 11

    second = drive("second")
    assert second.wait(DEADLINE_SECONDS) == 1, Path("second.err").read_text()
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert [event for event in events(cut_off) if event != "epoch"] == ["started", "resumed", "completed"]
    assert (orphan / "results.json").is_file()

    summary = json.loads(Path("out/s/results.json").read_text())
    statuses = [row["status"] for row in summary["trials"]]
    assert statuses == ["finished"] * 3 + ["failed"] + ["finished"] * 8
    failed = summary["trials"][3]
    assert "is not finite" in failed["error"]
    assert failed["attempts"] == 2
    assert f"failed: {failed['error']}" in Path("second.err").read_text()
    page, table = Path("out/s/report.html").read_text(), Path("second.out").read_text()
    for row in summary["trials"]:
        assert row["config_hash"] in page
        assert row["config_hash"] in table
    assert f"trial 4, failed: {failed['error'].split(';')[0]}" in page.replace("&#39;", "'")

    plan = load_sweep("sweep.yaml")
    assert [trial.config_hash for trial in plan.trials] == [row["config_hash"] for row in summary["trials"]]
    for number, trial in enumerate(plan.trials):
        if number != 3:
            plain = run(trial.config, tmp_path / "plain" / trial.config_hash, quiet=True)
            copy = json.loads((copies / f"{trial.config_hash}.json").read_text())
            assert same(copy["results"]) == same(plain.results)
            assert summary["trials"][number]["test_accuracy_percent"] == plain.accuracy_percent
    last = f"checkpoints/step-{plain.results['steps']}/model.safetensors"
    again = tmp_path / "plain" / cut_off.name / last
    assert (cut_off / last).read_bytes() == again.read_bytes()


def test_workers_of_its_own(start: Start, tmp_path: Path) -> None:
    """One is killed, and started again; then a stop signal, and going on; at the end no process is left."""
    write_sweep(
        tmp_path, grid={"seed": [0, 1, 2]}, dask={"workers": 2, "threads_per_worker": 1, "resources": {"slot": 1}}
    )
    trials = tmp_path / "out" / "s" / "trials"
    driver = start("first", "fpsim", "sweep", "sweep.yaml")

    children: list[psutil.Process] = []

    def pids() -> list[int]:
        children[:] = psutil.Process(driver.pid).children()
        return [one.pid for one in children]

    def in_progress() -> tuple[int, Path] | None:
        return trial_in_progress(trials, pids)

    killed, cut_off = until(in_progress, "no trial is in progress")
    os.kill(killed, signal.SIGKILL)
    until(lambda: "resumed" in events(cut_off), "the trial does not go on")
    until(in_progress, "no trial is in progress")
    driver.terminate()
    assert driver.wait(DEADLINE_SECONDS) == 1
    lines = Path("first.err").read_text().splitlines()
    assert "fpsim: SIGTERM: stopping (once more to stop at once)" in lines
    assert lines[-1].startswith("fpsim: stopped by SIGTERM, ")
    assert lines[-1].endswith(" of 3 trials to go; go on with the same command")
    psutil.wait_procs(children, timeout=DEADLINE_SECONDS)
    assert not [one for one in children if one.is_running()]
    unfinished = json.loads(Path("out/s/results.json").read_text())["trials"]
    assert "unfinished" in [row["status"] for row in unfinished]

    again = start("second", "fpsim", "sweep", "sweep.yaml", "dask.workers=1", "--json")
    assert again.wait(DEADLINE_SECONDS) == 0, Path("second.err").read_text()
    summary = json.loads(Path("second.out").read_text())
    assert summary == json.loads(Path("out/s/results.json").read_text())
    assert [row["status"] for row in summary["trials"]] == ["finished"] * 3
    assert (summary["groups"][0]["n"], len(summary["groups"])) == (3, 1)
    lines = Path("second.err").read_text().splitlines()
    assert lines[-1].startswith("3 of 3: ")
    plain = run(load_sweep("sweep.yaml").trials[0].config, tmp_path / "plain", quiet=True)
    copy = json.loads(Path(f"out/s/results/{summary['trials'][0]['config_hash']}.json").read_text())
    assert same(copy["results"]) == same(plain.results)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://here"])
def test_a_scheduler_that_does_not_answer(start: Start, tmp_path: Path, address: str) -> None:
    write_sweep(tmp_path, dask={"scheduler": address})
    driver = start("driver", "fpsim", "sweep", "sweep.yaml", "-q", DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="1s")
    assert driver.wait(DEADLINE_SECONDS) == 2
    (line,) = Path("driver.err").read_text().splitlines()
    assert line.startswith(f"dask.scheduler: no scheduler answers at '{address}': ")
