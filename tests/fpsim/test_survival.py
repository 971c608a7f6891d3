"""Runs that go wrong: what is left of them, what they say, and that they end as if nothing had happened."""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from fpsim import checkpoint
from fpsim.errors import ConfigError
from fpsim.runner import resume, run
from fpsim.session import Session
from tests.fpsim.runs import STEPS, outcome, settings

pytestmark = pytest.mark.usefixtures("restored_threads")

LAUNCH = [sys.executable, "-m", "fpsim"]


def events(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]


def limited_files(size: int) -> Any:
    """Before exec: no file of this process may grow beyond `size` bytes, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", checkpoint.FILES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    expected = outcome(run(settings(), tmp_path / "whole", quiet=True).run_dir)
    folder = run(settings(), tmp_path / "run", quiet=True).run_dir
    newest = checkpoint.newest(folder)
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    (folder / "results.json").unlink()
    resume(folder, quiet=True)
    assert f"fpsim: warning: {newest / file}: damaged" in capsys.readouterr().err
    aside = newest.with_name(f"{newest.name}.damaged")
    assert aside.is_dir()
    assert "checkpoint damaged" in events(folder)
    aside.rename(tmp_path / "aside")
    found = outcome(folder)
    assert [key for key in expected if found[key] != expected[key]] == []


def test_what_a_kill_left_half_written_is_gone(tmp_path: Path) -> None:
    folder = run(settings(), tmp_path / "run", quiet=True).run_dir
    expected = outcome(folder)
    (folder / ".distributions.safetensors.123.tmp").touch()
    resume(folder, quiet=True)
    assert outcome(folder) == expected


class Killed(BaseException):
    """Nothing in the product catches this: the process might as well be gone."""


@pytest.mark.parametrize("last_call", ["save", "save_samples"])
def test_killed_before_the_last_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_call: str
) -> None:
    """Checkpoint and samples belong together: what a kill leaves out between the two is done again."""
    expected = outcome(run(settings(), tmp_path / "whole", quiet=True).run_dir)
    original = getattr(Session, last_call)

    def die(session: Session, *arguments: Any) -> None:
        if session.step == STEPS:
            raise Killed
        original(session, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Session, last_call, die)
        with pytest.raises(Killed):
            run(settings(), tmp_path / "run", quiet=True)
    resume(tmp_path / "run", quiet=True)
    found = outcome(tmp_path / "run")
    assert [key for key in expected if found[key] != expected[key]] == []


# --- a second writer ----------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    folder = run(settings(), tmp_path / "run", quiet=True).run_dir
    before = (folder / "log.jsonl").read_bytes()
    with FileLock(folder / ".lock"), pytest.raises(ConfigError, match="another process is writing"):
        resume(folder, quiet=True)
    assert (folder / "log.jsonl").read_bytes() == before
    resume(folder, quiet=True)


def test_a_run_locks_its_directory_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def save(*arguments: Any) -> None:
        with pytest.raises(ConfigError, match="another process is writing"):
            resume(tmp_path / "run", quiet=True)
        seen.append(True)

    monkeypatch.setattr("fpsim.session.Session.save", save)
    run(settings(), tmp_path / "run", quiet=True)
    assert seen


# --- disks and permissions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3000, 9000, 14000])  # of metrics, of a checkpoint, of a later line
def test_a_full_disk_leaves_a_run_that_goes_on(tmp_path: Path, size: int) -> None:
    """The kernel refuses to write; then the same run goes on where it may."""
    expected = outcome(run(settings(), tmp_path / "whole", quiet=True).run_dir)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings()))
    folder = tmp_path / "run"
    ended = subprocess.run(
        [*LAUNCH, "run", str(tmp_path / "run.yaml"), "--run-dir", str(folder), "--quiet"],
        preexec_fn=limited_files(size), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("fpsim: ")
    assert "File too large" in line
    assert line.endswith(f"go on with: fpsim resume {folder}")
    assert not list((folder / "checkpoints").glob(".step-*"))
    resume(folder, quiet=True)
    found = outcome(folder)
    assert [key for key in expected if found[key] != expected[key]] == []


def without_override() -> None:
    """Before exec: permissions hold for root, too."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_without_permission(tmp_path: Path) -> None:
    """One line each, and the run stays what it was."""
    folder = run(settings(), tmp_path / "run", quiet=True).run_dir
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings()))
    before = outcome(folder)
    for arguments, closed, code in (
        (["resume", str(folder), "--quiet"], folder, 1),
        (["run", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "other"), "--quiet"], tmp_path, 2),
    ):
        closed.chmod(0o555)
        ended = subprocess.run(
            [*LAUNCH, *arguments], preexec_fn=without_override, capture_output=True, text=True, check=False, timeout=120
        )
        closed.chmod(0o755)
        assert ended.returncode == code, ended.stderr
        (line,) = ended.stderr.splitlines()
        assert "ermission denied" in line
    assert outcome(folder) == before
    assert not (tmp_path / "other").exists()


def test_a_signal_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(training={"epochs": 2000})))
    folder = tmp_path / "run"
    command = [*LAUNCH, "run", str(tmp_path / "run.yaml"), "--run-dir", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 2," in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert rest.rstrip().endswith(f"go on with: fpsim resume {folder}")
    assert events(folder)[-1] == "stopped"
    assert checkpoint.newest(folder).is_dir()
