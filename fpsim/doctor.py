"""`fpsim doctor`: whether fpsim works here, what it finds here, and what to do where something is wrong."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import accel  # before torch, see accel/kernels/openmp.py

# isort: split
import numba
import numpy as np
import torch
from torch import Tensor, nn

from accel.codecs import CODECS
from accel.kernels.jit import CACHE_FOLDER, CACHED
from fpsim import checkpoint, conformance, data
from fpsim.config import schema
from fpsim.console import print_table
from fpsim.data.errors import DataError, MissingError
from fpsim.emulation import emulate
from fpsim.environment import environment

State = Literal["ok", "warning", "failed"]
EXTRAS = {
    "cuda": ["numba-cuda"],
    "sweep": ["dask", "distributed"],
    "tensorboard": ["tensorboard"],
    "lightning": ["lightning"],
    "transformers": ["transformers", "accelerate"],
}
SHIPPED = (schema.Mnist5k(), schema.Digits(), schema.Wine(), schema.BreastCancer(), schema.Text(path=None))
LEAST_DISK, LEAST_MEMORY = 1e9, 1e9  # bytes
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. hint: what to do, where that is not "ok". seconds: that it took."""

    part: str
    name: str
    state: State
    found: str
    hint: str = ""
    seconds: float = 0.0


Found = tuple[str, State, str, str]  # name, state, found, hint


def examine(output: Path, folders: Sequence[Path] = ()) -> list[Check]:
    """Look at everything. output: the folder that runs would go to. folders: in which data sets are looked for.

    What goes wrong in a check is a failed check, never an exception.
    """
    parts: dict[str, Callable[[], Iterator[Found]]] = {
        "software": _software,
        "machine": lambda: _machine(output),
        "threads": _threads,
        "GPU": _gpu,
        "compiled kernels": _kernels,
        "data": lambda: _data(folders),
        "self-test": _self_test,
    }
    return [check for part, look in parts.items() for check in _timed(part, look)]


def _timed(part: str, look: Callable[[], Iterator[Found]]) -> Iterator[Check]:
    began = time.perf_counter()
    checks = look()
    while True:
        try:
            found = next(checks)
        except StopIteration:
            return
        except Exception as error:  # whatever it is, the rest is to be looked at
            yield _failed(part, error, time.perf_counter() - began)
            return
        now = time.perf_counter()
        yield Check(part, *found, seconds=now - began)
        began = now


def _failed(part: str, error: Exception, seconds: float) -> Check:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    hint = "report this with the output of `fpsim doctor --json`"
    return Check(part, "could not be finished", "failed", reason, hint, seconds)


# --- software ---------------------------------------------------------------------------------------------------------


def _software() -> Iterator[Found]:
    found = environment()
    yield "python", "ok", f"{found['python']} on {platform.platform()}", ""
    yield "fpsim", "ok", f"{found['fpsim']}, commit {found['commit'] or 'unknown: not a checkout'}", ""
    yield "libraries", "ok", ", ".join(f"{name} {found[name]}" for name in ("torch", "numpy", "numba", "scipy")), ""
    needed = _requirements()
    always = needed.get("", {})
    if problems := _problems(always, list(always)):
        yield "requirements", "failed", problems, "pip install --upgrade fpsim"
    else:
        yield "requirements", "ok", f"{len(always)} packages, all new enough", ""
    for extra, packages in EXTRAS.items():
        problems = _problems(needed.get(extra, {}), packages)
        installed = ", ".join(f"{name} {_version(name)}" for name in packages)
        missing = f"{problems} (optional: pip install 'fpsim[{extra}]')"
        yield f"extra {extra}", "ok", missing if problems else installed, ""


def _requirements() -> dict[str, dict[str, str]]:
    """Packages and the least version of each, by extra; "" are those that are always needed."""
    found: dict[str, dict[str, str]] = {}
    for line in metadata.requires("fpsim") or []:
        one = re.match(r"([\w.-]+)(?:\[[^]]*\])?(?:>=([\w.]+))?[^;]*(?:;.*extra == ['\"]([\w-]+)['\"])?", line)
        assert one is not None
        found.setdefault(one[3] or "", {})[one[1]] = one[2] or "0"
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _problems(least: dict[str, str], packages: list[str]) -> str:
    """What is wrong with installed packages, of which some have a least version; empty where nothing is."""
    found = []
    for name in packages:
        version = _version(name)
        if version is None:
            found.append(f"{name} is not installed")
        elif _numbers(version) < _numbers(least.get(name, "0")):
            found.append(f"{name} {version} is older than {least[name]}")
    return "; ".join(found)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]


# --- machine ----------------------------------------------------------------------------------------------------------


def _machine(output: Path) -> Iterator[Found]:
    yield "processor", "ok", f"{environment()['processor']}, {_cores()} cores for this process", ""
    total, available = _memory()
    hint = "other processes hold most of it: stop some, or take a smaller batch" if available < LEAST_MEMORY else ""
    shown = f"{available / GIB:.1f} GiB available of {total / GIB:.1f} GiB"
    yield "memory", "warning" if hint else "ok", shown, hint
    yield _disk(output)
    distributed = torch.distributed
    if not distributed.is_available():
        yield "ranks", "warning", "torch has no torch.distributed", "install a build of torch with it for several ranks"
        return
    has = {
        "gloo": distributed.is_gloo_available(),
        "nccl": distributed.is_nccl_available(),
        "mpi": distributed.is_mpi_available(),
    }
    backends = ", ".join(f"{name} {'yes' if is_there else 'no'}" for name, is_there in has.items())
    yield "ranks", "ok", f"backends of torch.distributed: {backends}", ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> tuple[int, int]:
    """Bytes in all, and that a new process could have."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return total, total
    available = re.search(r"MemAvailable:\s+(\d+) kB", lines)
    return total, total if available is None else 1024 * int(available[1])


def _disk(output: Path) -> Found:
    place = next(one for one in (output, *output.absolute().parents) if one.exists())
    free = shutil.disk_usage(place).free
    shown = f"{free / GIB:.1f} GiB free for runs in {output.absolute()}"
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return "disk", "failed", f"{place}: {error.strerror}", "choose another folder: fpsim run CONFIG output=FOLDER"
    if free < LEAST_DISK:
        return "disk", "warning", shown, "delete old runs, or choose another folder: fpsim run CONFIG output=FOLDER"
    return "disk", "ok", shown, ""


def _threads() -> Iterator[Found]:
    threads, cores, asked = torch.get_num_threads(), _cores(), os.environ.get("OMP_NUM_THREADS")
    shown = f"{threads}, OMP_NUM_THREADS {asked or 'not set'}"
    hint = f"more than the {cores} cores: set OMP_NUM_THREADS={cores}, or threads={cores} of a run"
    yield "torch", "warning" if threads > cores else "ok", shown, hint if threads > cores else ""
    accel.quantize(torch.ones(1 << 18), "e4m3fn")  # numba chooses when a loop runs
    try:
        layer = numba.threading_layer()
    except ValueError:  # loops on one thread need none
        yield "numba", "ok", f"{numba.get_num_threads()}, no threading layer", ""
        return
    hint = "" if layer == "omp" else "torch and numba have threads of their own, which wait for each other: see OpenMP"
    yield "numba", "ok" if layer == "omp" else "warning", f"{numba.get_num_threads()}, threading layer {layer}", hint


def _gpu() -> Iterator[Found]:
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0":
        hint = "for tests alone: unset NUMBA_ENABLE_CUDASIM"
        yield "simulator", "warning", "kernels for GPUs run in Python, NUMBA_ENABLE_CUDASIM is set", hint
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").is_file():
            shown = f"a driver is loaded, which torch {torch.__version__} cannot use"
            yield "torch", "warning", shown, "install a build of torch for CUDA (pytorch.org), if GPUs are to be used"
        else:
            yield "torch", "ok", "none: everything runs on the CPU", ""
        return
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = ", ".join(f"{one.name} ({one.total_memory / GIB:.0f} GiB)" for one in devices)
    yield "torch", "ok", f"{names}, CUDA {torch.version.cuda}", ""
    if _numba_sees_gpu():
        yield "numba", "ok", f"numba-cuda {_version('numba-cuda')} sees it", ""
    else:
        yield "numba", "warning", "sees none, so emulation works on the CPU alone", "pip install 'fpsim[cuda]'"


def _numba_sees_gpu() -> bool:
    try:
        from numba import cuda
    except ImportError:
        return False
    return bool(cuda.is_available())


def _kernels() -> Iterator[Found]:
    if CACHED:
        count = sum(1 for file in Path(CACHE_FOLDER).rglob("*") if file.suffix == ".nbc")
        shown = f"{count or 'none yet, so that the self-test takes a minute'}, in {CACHE_FOLDER}"
        yield "cache", "ok", shown, ""
        return
    hint = "each process compiles them again, seconds for each: set NUMBA_CACHE_DIR to a folder that can be written"
    yield "cache", "warning", f"{CACHE_FOLDER} cannot be written", hint


# --- data -------------------------------------------------------------------------------------------------------------


def _data(folders: Sequence[Path]) -> Iterator[Found]:
    for spec in SHIPPED:
        try:
            yield spec.name, "ok", data.load(spec, 0).description.removeprefix(f"{spec.name}: "), ""
        except Exception as error:  # of the package that ships it
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            yield spec.name, "failed", reason, "install fpsim's requirements again: pip install --force-reinstall fpsim"
    for folder in folders:
        yield from _local(folder)


def _local(folder: Path) -> Iterator[Found]:
    """What the readers of data sets in files say of a folder, and of its first images."""
    root = str(folder)
    specs = {
        "mnist or fashion_mnist": schema.Mnist(root=root),  # the files do not tell which
        "cifar10": schema.Cifar10(root=root),
        "cifar100": schema.Cifar100(root=root),
        "imagefolder": schema.ImageFolder(root=root),
    }
    absent = []
    for name, spec in specs.items():
        try:
            dataset = data.load(spec, 0)
            for split in (dataset.train, dataset.test):
                split.batch(torch.arange(1))
            yield name, "ok", f"{folder}: {dataset.description.partition(': ')[2]}", ""
        except MissingError as error:
            absent.append(re.sub("; .*; ", ", ", str(error)))
        except DataError as error:
            yield name, "failed", str(error), "get the files again as they are published"
    if len(absent) == len(specs):
        yield "in files", "warning", f"no data set in {folder}", "\n".join(absent)


# --- self-test --------------------------------------------------------------------------------------------------------


def _self_test() -> Iterator[Found]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield _rounding()
        yield _codecs()
        model, optimizer = _network()
        emulator = emulate(model, "fp8-training", optimizer=optimizer)
        yield _step(model, optimizer, emulator)
        yield _checkpoint(model, optimizer, emulator.state_dict())
        if torch.cuda.is_available() and _numba_sees_gpu():
            yield _same_on_gpu()


def _rounding(emulator: conformance.Emulator = conformance.ACCEL) -> Found:
    """On the landmarks of each format: its values, midpoints, neighbours and special values."""
    references = conformance.torch_references()
    if _version("ml_dtypes"):
        references += map(conformance.ml_dtypes_reference, conformance.ML_DTYPES)
    outcome = conformance.Outcome()
    with np.errstate(all="ignore"):
        for reference in references:
            outcome += conformance.compare_landmarks(reference, emulator)
    sources = " and ".join(dict.fromkeys(reference.source for reference in references))
    if outcome.first is not None:
        first = outcome.first
        wrong = f"{first.format}: {first.operation} {first.input}: {first.ours}, not {first.theirs}"
        return "rounding", "failed", f"{outcome.mismatches:,} of {outcome.pairs:,} differ, {wrong}", _conformance_hint()
    return "rounding", "ok", f"{outcome.pairs:,} roundings as those of {sources}", ""


def _conformance_hint() -> str:
    return f"`fpsim conformance` shows all; delete {CACHE_FOLDER}, and report it if they differ again"


def _codecs() -> Found:
    """A tensor that all can hold: half of every four are zeros, and some values are +-alpha."""
    alpha, fmt = 1.5, "e4m3fn"
    x = accel.quantize(torch.randn(128, 128), fmt)
    x = torch.where(x.abs() < 0.5, torch.where(x < 0, -alpha, alpha), x)
    x.view(-1, 4)[:, 1::2] = 0.0
    wrong = []
    for name, codec in CODECS.items():
        stream = accel.pack(x, name, fmt, alpha=alpha if codec.tags_alpha else 0.0)
        if not torch.equal(accel.unpack(stream), x):
            wrong.append(name)
    if wrong:
        hint = f"delete {CACHE_FOLDER}, and report it if it fails again"
        return "codecs", "failed", f"not what was packed comes out of {', '.join(wrong)}", hint
    return "codecs", "ok", f"{len(CODECS)} give back what was packed: {', '.join(CODECS)}", ""


def _network() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, emulator: Any) -> Found:
    before = [p.detach().clone() for p in model.parameters()]
    loss = nn.functional.cross_entropy(model(torch.randn(256, 64)), torch.randint(10, (256,)))
    loss.backward()
    optimizer.step()
    emulator.step()
    has_learned = all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    sparsity = emulator.gradient_sparsity or 0.0
    value = float(loss.detach())
    shown = f"fp8-training: loss {value:.3f}, {100 * sparsity:.1f} % of dY pruned where 80 % is asked"
    if not (math.isfinite(value) and has_learned and 0.7 < sparsity < 0.9):
        return "training step", "failed", shown, f"delete {CACHE_FOLDER}, and report it if it fails again"
    return "training step", "ok", shown, ""


def _checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        saved = checkpoint.save(Path(folder), 1, model, optimizer, {"emulator": state}, {})
        other, other_optimizer = _network()
        loaded, _ = checkpoint.load(saved, other, other_optimizer)
        size = sum(file.stat().st_size for file in saved.iterdir())
    pairs = [(value, other.state_dict()[name]) for name, value in model.state_dict().items()]
    momenta = (
        (one["momentum_buffer"], two["momentum_buffer"])
        for one, two in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True)
    )
    if loaded["emulator"] != state or not all(torch.equal(one, two) for one, two in (*pairs, *momenta)):
        hint = f"the disk of {tempfile.gettempdir()} may be damaged: set TMPDIR to another folder and try again"
        return "checkpoint", "failed", "what is loaded is not what was saved", hint
    return "checkpoint", "ok", f"{size:,} bytes saved and loaded, bit for bit", ""


def _same_on_gpu() -> Found:
    x = torch.randn(1 << 16)
    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "e4m3fn": lambda x: accel.quantize(x, "e4m3fn"),
        "e5m2, stochastic": lambda x: accel.quantize(x, "e5m2", rounding="stochastic", seed=1),
        "mxfp8_e4m3fn": lambda x: accel.quantize(x, "mxfp8_e4m3fn"),
        "pruning": lambda x: accel.prune_quantize(x, 1.5, "e5m2", rounding="stochastic", seed=1)[0],
    }
    wrong = [name for name, make in operations.items() if not torch.equal(make(x), make(x.cuda()).cpu())]
    if wrong:
        hint = "report this with the output of `fpsim doctor --json`; until then run on the CPU: CUDA_VISIBLE_DEVICES="
        return "CPU and GPU", "failed", f"their bits differ: {', '.join(wrong)}", hint
    return "CPU and GPU", "ok", f"the same bits: {', '.join(operations)}", ""


# --- output -----------------------------------------------------------------------------------------------------------


def to_data(checks: Sequence[Check]) -> dict[str, Any]:
    """Everything, as plain data (JSON)."""
    counts: dict[str, Any] = {state: sum(one.state == state for one in checks) for state in get_args(State)}
    return {**counts, "seconds": sum(one.seconds for one in checks), "checks": [asdict(one) for one in checks]}


def show(checks: Sequence[Check]) -> None:
    """Print a table of the checks, and how many are not in order."""
    rows = [[one.state, f"{one.part}: {one.name}", f"{one.seconds:4.1f}", one.found] for one in checks]
    print_table(["", "check", "   s", "found"], rows, wrapped="found")
    for one in checks:
        for line in one.hint.splitlines():
            print(f"{one.state}, {one.part}: {one.name}: {line}")
    found = to_data(checks)
    print(f"failed: {found['failed']}, warnings: {found['warning']}, ok: {found['ok']}; {found['seconds']:.1f} s")
