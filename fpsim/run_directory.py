"""The directory of a run: what lies in it, how it comes to be, and how it is read.

runs/<name>/<UTC time>-<config hash>/
    config.yaml      the resolved configuration        env.json      versions, machine, threads, ranks, commit
    metrics.jsonl    one line a step and an epoch       steps.csv, epochs.csv   the same as tables
    ledger.jsonl     what sampled steps stored and moved, tensor by tensor
    products.jsonl   what sampled steps multiplied, layer by layer
    weights.jsonl    what every renewal of the weights' masks did
    distributions.jsonl       how the tensors of sampled steps are distributed
    distributions.safetensors samples of those of the latest one
    log.jsonl        what happened                      checkpoints/step-N/
    tensorboard/     event files, where they are wanted
    results.json     what `fpsim report` reads          .lock   held by the process that writes here
    failed/step-N/   the state of a run that met a NaN, and the tensor: not_finite.safetensors
    profile.json     of `fpsim run --profile`: where the time of a step goes     trace.json   the same for Perfetto
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

import accel
from fpsim.config import Config, config_hash, config_to_yaml
from fpsim.errors import ConfigError, Problem, RunError
from fpsim.files import write_json, write_text

CONFIG_FILE, ENVIRONMENT_FILE, RESULTS_FILE = "config.yaml", "env.json", "results.json"
METRICS_FILE, LEDGER_FILE, DISTRIBUTIONS_FILE = "metrics.jsonl", "ledger.jsonl", "distributions.jsonl"
WEIGHTS_FILE, PRODUCTS_FILE = "weights.jsonl", "products.jsonl"
# files to which a run adds line by line
LINES = (METRICS_FILE, LEDGER_FILE, PRODUCTS_FILE, DISTRIBUTIONS_FILE, WEIGHTS_FILE)
SAMPLES_FILE, LOG_FILE, LOCK_FILE = "distributions.safetensors", "log.jsonl", ".lock"
FAILED_FOLDER, NOT_FINITE_FILE = "failed", "not_finite.safetensors"
PROFILE_FILE, TRACE_FILE = "profile.json", "trace.json"


def find_run(place: str | Path) -> Path:
    """The run directory that `place` means: itself, or the newest run in a folder of runs. Raises ConfigError."""
    path = Path(place)
    if (path / CONFIG_FILE).is_file() or not path.is_dir():
        return path
    runs = [child for child in path.iterdir() if (child / CONFIG_FILE).is_file()]
    if not runs:
        raise ConfigError([Problem("", "holds neither a run nor runs", str(path))])
    return max(runs, key=lambda child: (child / CONFIG_FILE).stat().st_mtime_ns)


def run_folder(place: str | Path) -> Path:
    """The same, with a run's configuration in it. Raises ConfigError."""
    folder = find_run(place)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError([Problem("", f"no {CONFIG_FILE} in it: not a run directory", str(folder))])
    return folder


def new_directory(config: Config, given: str | Path | None) -> Path:
    """Where a run of the configuration goes: the given place, or one of its own. Raises ConfigError for what exists."""
    if given is not None:
        folder = Path(given)
    else:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        folder = Path(config.output) / config.name / f"{stamp}-{config_hash(config)}"
    if os.path.lexists(folder):
        message = "run directory exists already: choose another, or go on with it by `fpsim resume`"
        raise ConfigError([Problem("", message, str(folder))])
    return folder


@contextmanager
def begun(folder: Path, config: Config, environment: Mapping[str, Any], *, is_given: bool) -> Iterator[None]:
    """A new run directory, whole or not there, locked meanwhile. Raises ConfigError where it cannot be made: at the
    configuration's `output` unless the place is given."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(partial / ENVIRONMENT_FILE, environment)
        write_text(partial / CONFIG_FILE, config_to_yaml(config))
        for name in LINES:
            (partial / name).touch()
        lock = _lock(partial)
        if folder.exists():  # an empty one would be replaced
            raise FileExistsError(errno.EEXIST, "exists already")
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = "exists already" if error.errno in (errno.EEXIST, errno.ENOTEMPTY) else error.strerror
        message = f"run directory cannot be made: {reason}"
        if is_given:
            raise ConfigError([Problem("", message, str(folder))]) from error
        raise config.problem("output", f"{folder}: {message}") from error
    with lock:
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Meanwhile no other process writes in the run directory. Raises ConfigError where one does."""
    try:
        lock = _lock(folder)
    except Timeout:
        message = "another process is writing in this run directory: wait for its end, or stop it"
        raise ConfigError([Problem("", message, str(folder))]) from None
    with lock:
        yield


def _lock(folder: Path) -> AcquireReturnProxy:
    """Held until it is left, or until its process ends, however that ends. Raises Timeout where another holds it."""
    return FileLock(folder / LOCK_FILE).acquire(timeout=0)


def append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add one line a row to a JSONL file."""
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def log(folder: Path, event: str, *, level: str = "info", **fields: Any) -> None:
    """Add what happened to the log. What cannot be written is left out: a full disk shall not hide why a run stops."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    with suppress(OSError):
        append(folder / LOG_FILE, [{"time": time, "level": level, "event": event, **fields}])


def environment_of(folder: Path) -> dict[str, int]:
    """The `threads` and the `world_size` that a run was begun with. Raises RunError for a damaged file."""
    try:
        data = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        return {key: int(data[key]) for key in ("threads", "world_size")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / ENVIRONMENT_FILE}: cannot be read: {error}") from error


def ledger_of(run_dir: str | Path) -> accel.Ledger:
    """The ledger that a run has written so far; of a run of an earlier fpsim, without products. Raises ConfigError for
    a place without a run, RunError for a damaged file."""
    run = run_folder(run_dir)
    products = rows_of(run / PRODUCTS_FILE) if (run / PRODUCTS_FILE).is_file() else []
    try:
        return accel.Ledger.from_data(rows_of(run / LEDGER_FILE), products)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{run}: {LEDGER_FILE} or {PRODUCTS_FILE} is damaged: {error!r}") from error


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file. Raises RunError that names the file and the line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}:{number}: damaged: {error}") from error
    return rows


def cut_back(folder: Path, sizes: Mapping[str, int]) -> None:
    """Shorten the files of LINES to what they had, and make those that an earlier fpsim did not write.

    Raises RunError for a file that is shorter than that.
    """
    for name in LINES:
        (folder / name).touch()
    for name, size in sizes.items():
        if (found := (folder / name).stat().st_size) < size:
            raise RunError(f"{folder / name}: has {found} bytes, at least {size} are expected")
    for name in LINES:
        os.truncate(folder / name, sizes.get(name, 0))
