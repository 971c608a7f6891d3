"""A run: a configuration trained to its end in a directory of its own, resumable from any moment.

runs/<name>/<UTC time>-<config hash>/
    config.yaml      the resolved configuration        env.json      versions, machine, threads, commit
    metrics.jsonl    one line a step and an epoch       steps.csv, epochs.csv   the same as tables
    ledger.jsonl     what sampled steps stored and moved, tensor by tensor
    products.jsonl   what sampled steps multiplied, layer by layer
    weights.jsonl    what every renewal of the weights' masks did
    gradients.jsonl  how the gradients of sampled steps are distributed    gradients.safetensors   samples of the latest
    log.txt          what happened                      checkpoints/step-N/
    results.json     what `fpsim report` reads
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

import accel
import models
from fpsim import checkpoint, data
from fpsim.config import Config, config_hash, config_to_yaml, load_config, parse_config
from fpsim.config.schema import Emulation, Ledger
from fpsim.emulation import Emulator, emulate
from fpsim.errors import ConfigError, NonFiniteError, Problem, RunError
from fpsim.files import write_bytes, write_json, write_text
from fpsim.layers import PatternError
from fpsim.progress import Progress
from fpsim.training import (
    build_optimizer,
    check_gradients,
    count_correct,
    cross_entropy,
    data_order,
    evaluate,
    first_non_finite_layer,
    generator,
    learning_rate_factor,
)

RESULTS_VERSION = 1
CONFIG_FILE, ENVIRONMENT_FILE, RESULTS_FILE = "config.yaml", "env.json", "results.json"
METRICS_FILE, LEDGER_FILE, GRADIENTS_FILE = "metrics.jsonl", "ledger.jsonl", "gradients.jsonl"
WEIGHTS_FILE, PRODUCTS_FILE = "weights.jsonl", "products.jsonl"
# files to which a run adds line by line
LINES = (METRICS_FILE, LEDGER_FILE, PRODUCTS_FILE, GRADIENTS_FILE, WEIGHTS_FILE)
SAMPLES_FILE = "gradients.safetensors"
PACKAGES = ("fpsim", "torch", "numpy", "numba", "scipy")


@dataclass(frozen=True)
class RunResult:
    """How a run ended. results: the content of results.json; paths of what it left in `run_dir`."""

    accuracy_percent: float
    results: dict[str, Any]
    ledger: accel.Ledger
    run_dir: Path
    results_path: Path
    metrics_path: Path


def run(
    config: Config | Mapping[str, Any] | str | Path,
    run_dir: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> RunResult:
    """Train a configuration (an object, a mapping, a file or the name of an experiment) to its end.

    run_dir: a new directory; by default `<output>/<name>/<UTC time>-<config hash>`. quiet: no progress.
    Raises ConfigError for the user's mistakes (an existing directory included), RunError for a run that fails.
    """
    if isinstance(config, str | Path):
        config = load_config(config, overrides)
    elif overrides or not isinstance(config, Config):
        config = parse_config(config.model_dump() if isinstance(config, Config) else config, overrides)
    session = _Session(config, _new_directory(config, run_dir), quiet)
    try:
        session.folder.mkdir(parents=True)
    except OSError as error:
        reason = "exists already" if isinstance(error, FileExistsError) else error.strerror
        message = f"run directory cannot be made: {reason}"
        if run_dir is not None:
            raise ConfigError([Problem("", message, str(session.folder))]) from error
        raise config.problem("output", f"{session.folder}: {message}") from error
    return _train(session, resuming=False)


def resume(run_dir: str | Path, *, quiet: bool = False) -> RunResult:
    """Go on with an interrupted run from its newest checkpoint: the same metrics and weights as without interruption.

    Raises ConfigError for what is not a run directory, RunError for a run that fails or whose checkpoint is damaged.
    """
    return _train(_session_of(run_folder(run_dir), quiet), resuming=True)


def opened(run_dir: str | Path) -> _Session:
    """A run as its newest checkpoint holds it, to look into: its directory stays as it is.

    Raises ConfigError for what is not a run directory, RunError for one without a checkpoint or with a damaged one.
    """
    folder = run_folder(run_dir)
    saved = checkpoint.newest(folder)
    session = _session_of(folder, quiet=True)
    session.load(saved)
    return session


def _session_of(folder: Path, quiet: bool) -> _Session:
    """A session of a run that was begun, with its own number of threads."""
    try:
        threads = int(json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))["threads"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / ENVIRONMENT_FILE}: cannot be read: {error}") from error
    return _Session(load_config(folder / CONFIG_FILE, [f"threads={threads}"]), folder, quiet)


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


class _Session:
    """Everything that one run works with; built alike for a new run and for a resumed one."""

    def __init__(self, config: Config, folder: Path, quiet: bool) -> None:
        self.config, self.folder = config, folder
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        try:
            self.dataset = data.load(config.data, config.seed)
        except data.DataError as error:
            key = next((f"data.{key}" for key in ("root", "path") if hasattr(config.data, key)), "data")
            raise config.problem(key, str(error)) from error
        self.steps_per_epoch = len(self.dataset.train) // config.training.batch_size
        if self.steps_per_epoch == 0:
            raise config.problem(
                "training.batch_size",
                f"larger than the training set of {len(self.dataset.train)} (got {config.training.batch_size})",
            )
        self.total_steps = self.steps_per_epoch * config.training.epochs
        options = config.model.model_dump(exclude={"name"})
        try:
            self.model = models.build(
                config.model.name, input_shape=self.dataset.input_shape, classes=self.dataset.classes, **options
            )
        except ValueError as error:
            raise config.problem("model", str(error)) from error
        except RuntimeError as error:  # PyTorch's, for a tensor that is larger than the memory
            raise config.problem("model", f"cannot be built: {str(error).splitlines()[0]}") from error
        self.model.train()
        self.optimizer = build_optimizer(config.training.optimizer, self.model)
        self.emulator = self._emulate()
        self.progress = Progress(config.name, self.total_steps, quiet)
        self.step = 0
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.history: list[dict[str, Any]] = []
        self.epoch_loss, self.epoch_correct = 0.0, 0
        self.ledger_rows, self.product_rows, self.gradient_rows, self.weight_rows = 0, 0, 0, 0

    def _emulate(self) -> Emulator:
        spec = self.config.emulation or Emulation(ledger=Ledger())
        try:
            return emulate(
                self.model,
                spec,
                seed=self.config.seed,
                optimizer=self.optimizer,
                steps_per_epoch=self.steps_per_epoch,
            )
        except PatternError as error:
            raise self.config.problem(f"emulation.{error.path}", str(error)) from error

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def append(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add one line a row to a JSONL file of the run."""
        with (self.folder / file).open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)

    def save(self, folder: Path) -> None:
        """Write a checkpoint below `folder`, and what is new of the ledger and of the gradients' distributions."""
        ledger, distributions = self.emulator.ledger, self.emulator.distributions
        self.append(LEDGER_FILE, ledger.to_data(self.ledger_rows))
        self.append(PRODUCTS_FILE, ledger.products_to_data(self.product_rows))
        self.append(GRADIENTS_FILE, distributions.rows[self.gradient_rows :])
        self.ledger_rows, self.product_rows = len(ledger.records), len(ledger.products)
        self.gradient_rows = len(distributions.rows)
        weight_pruning = self.emulator.weight_pruning
        if weight_pruning is not None:
            self.append(WEIGHTS_FILE, weight_pruning.rows[self.weight_rows :])
            self.weight_rows = len(weight_pruning.rows)
        state = {
            "seconds": self.seconds,
            "history": self.history,
            "epoch_loss": self.epoch_loss,
            "epoch_correct": self.epoch_correct,
            "bytes": {name: (self.folder / name).stat().st_size for name in LINES},
            "input_shape": self.dataset.input_shape,
            "classes": self.dataset.classes,
            "steps_per_epoch": self.steps_per_epoch,
            "emulator": self.emulator.state_dict(),
        }
        checkpoint.save(folder, self.step, self.model, self.optimizer, state, self.emulator.tensors())

    def save_samples(self) -> None:
        """Write the samples of the latest recorded step, if there are any since the run was begun or resumed."""
        if self.emulator.distributions.samples:
            write_bytes(self.folder / SAMPLES_FILE, save_safetensors(self.emulator.distributions.samples))

    def restore(self) -> None:
        """Take up the newest checkpoint, if there is one, and cut metrics and ledger back to it."""
        folder = self.folder / "checkpoints"
        checkpoint.clean(folder)
        saved = checkpoint.checkpoints(folder)
        if not saved:
            for name in LINES:
                (self.folder / name).write_bytes(b"")
            return
        state = self.load(saved[-1])
        with _fitting(saved[-1]):
            for name in LINES:
                if name not in state["bytes"]:  # a run of an earlier fpsim
                    (self.folder / name).write_bytes(b"")
            for name, size in state["bytes"].items():
                _truncate(self.folder / name, size)
            rows_of(self.folder / METRICS_FILE)
            saved_ledger = ledger_of(self.folder)
            self.emulator.ledger.records[:] = saved_ledger.records
            self.emulator.ledger.products[:] = saved_ledger.products
            self.emulator.distributions.rows[:] = rows_of(self.folder / GRADIENTS_FILE)
            if self.emulator.weight_pruning is not None:
                self.emulator.weight_pruning.rows[:] = rows_of(self.folder / WEIGHTS_FILE)
                self.weight_rows = len(self.emulator.weight_pruning.rows)
        self.ledger_rows, self.product_rows = len(saved_ledger.records), len(saved_ledger.products)
        self.gradient_rows = len(self.emulator.distributions.rows)

    def load(self, saved: Path) -> dict[str, Any]:
        """Take up a checkpoint, without the files of the run; returns its state."""
        state, tensors = checkpoint.load(saved, self.model, self.optimizer)
        with _fitting(saved):
            self.step, self.seconds_before, self.history = state["step"], state["seconds"], state["history"]
            self.epoch_loss, self.epoch_correct = state["epoch_loss"], state["epoch_correct"]
            self.emulator.load_state_dict(state["emulator"], tensors)
        return state


@contextmanager
def _fitting(saved: Path) -> Iterator[None]:
    """Raises RunError where a checkpoint is not one of this run."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise RunError(f"{saved}: does not fit this run: {error}") from error


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


def _truncate(path: Path, size: int) -> None:
    if path.stat().st_size < size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, at least {size} are expected")
    os.truncate(path, size)


def _train(session: _Session, resuming: bool) -> RunResult:
    config, folder = session.config, session.folder
    if resuming:
        session.restore()
    else:
        write_json(folder / ENVIRONMENT_FILE, environment())
        for name in LINES:
            (folder / name).write_bytes(b"")
        write_text(folder / CONFIG_FILE, config_to_yaml(config))
    with _logging(folder) as log, _stop_signals() as stopped, session.progress:
        begun = "resume" if resuming else "start"
        log.info("%s %s at step %d of %d", begun, folder, session.step, session.total_steps)
        log.info("data: %s", session.dataset.description)
        session.progress.note(f"{folder}: {session.dataset.description}")
        try:
            _train_steps(session, log, stopped)
        except NonFiniteError as error:
            session.save(folder / "failed")
            log.error("%s", error)
            raise RunError(
                f"{error}; the state at that moment is saved in {folder / 'failed' / f'step-{session.step}'}"
            ) from error
        results = _results(session)
        write_json(folder / RESULTS_FILE, results)
        _write_tables(folder)
        log.info("completed: test accuracy %.2f %%", results["test_accuracy_percent"])
    paths = (folder / RESULTS_FILE, folder / METRICS_FILE)
    return RunResult(results["test_accuracy_percent"], results, session.emulator.ledger, folder, *paths)


def _train_steps(session: _Session, log: logging.Logger, stopped: list[str]) -> None:
    """All steps from the session's on, with metrics, evaluation and checkpoints. RunError when a signal stops it."""
    folder, spec = session.folder / "checkpoints", session.config.training.checkpoint
    while session.step < session.total_steps:
        row = _train_step(session)
        session.append(METRICS_FILE, [row])
        epoch_ended = session.step % session.steps_per_epoch == 0
        if epoch_ended:
            end = _end_epoch(session, row)
            session.append(METRICS_FILE, [end])
            session.progress.epoch(end)
            log.info("epoch %s", end)
        if stopped or epoch_ended or session.step % spec.every_steps == 0:
            session.save(folder)
            session.save_samples()
            checkpoint.prune(folder, spec.keep)
        if stopped and session.step < session.total_steps:
            log.info("stopped by %s at step %d", stopped[0], session.step)
            raise RunError(
                f"stopped by {stopped[0]} at step {session.step} of {session.total_steps}; the state is saved, "
                f"go on with: fpsim resume {session.folder}"
            )


def _train_step(session: _Session) -> dict[str, Any]:
    """One step: its row for the metrics. Raises NonFiniteError before the weights are updated."""
    training, emulator, step = session.config.training, session.emulator, session.step
    if step == session.total_steps - 1:
        emulator.sample_this_step()
    factor = learning_rate_factor(training.schedule, step, session.steps_per_epoch, session.total_steps)
    learning_rate = training.optimizer.learning_rate * factor
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate
    loss_value, correct, labels = forward_and_backward(session)
    check_gradients(session.model, step)
    session.optimizer.step()
    emulator.step()
    session.epoch_loss += loss_value
    session.epoch_correct += correct
    session.step += 1
    row = {
        "kind": "step",
        "step": session.step,
        "epoch": step // session.steps_per_epoch + 1,
        "learning_rate": learning_rate,
        "loss": loss_value,
        "accuracy_percent": 100 * correct / labels,
        "gradient_sparsity": emulator.gradient_sparsity,
        "weight_sparsity": weight_pruning.sparsity if (weight_pruning := emulator.weight_pruning) else None,
    }
    session.progress.step(row)
    return row


def forward_and_backward(session: _Session) -> tuple[float, int, int]:
    """The passes of the session's next step, whose gradients they leave in the parameters: the loss, how many labels
    were met, and of how many. Raises NonFiniteError for a loss that is not finite."""
    config, model, emulator, step = session.config, session.model, session.emulator, session.step
    batch, parts = config.training.batch_size, config.training.micro_batches
    epoch, position = divmod(step, session.steps_per_epoch)
    if position == 0:
        emulator.next_epoch()
        session.epoch_loss, session.epoch_correct = 0.0, 0
    indices = data_order(config.seed, epoch, len(session.dataset.train))[position * batch : (position + 1) * batch]
    inputs, labels = session.dataset.train.batch(indices, generator(config.seed, "augment", step))
    session.optimizer.zero_grad()
    loss_value, correct = 0.0, 0
    for some, some_labels in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
        random_state = torch.get_rng_state()
        try:
            logits = model(some)
            loss = cross_entropy(logits, some_labels) / parts
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError("loss", "(last)", step)
        except NonFiniteError as error:
            emulator.restart_step()
            layer = first_non_finite_layer(model, some, random_state)
            raise error if layer is None else NonFiniteError("output", layer, step) from None
        loss.backward()
        loss_value += value
        correct += count_correct(logits, some_labels)
    return loss_value, correct, labels.numel()


def _end_epoch(session: _Session, row: dict[str, Any]) -> dict[str, Any]:
    """Evaluate: the epoch's row for the metrics. Raises NonFiniteError when the test loss is not finite."""
    test_loss, test_accuracy = evaluate(session.model, session.dataset.test)
    if not math.isfinite(test_loss):
        raise NonFiniteError("test loss", "(last)", session.step)
    batch, per_sample = session.config.training.batch_size, session.dataset.labels_per_sample
    seen = session.steps_per_epoch * batch * per_sample
    end = {
        "epoch": row["epoch"],
        "step": session.step,
        "learning_rate": row["learning_rate"],
        "train_loss": session.epoch_loss / session.steps_per_epoch,
        "train_accuracy_percent": 100 * session.epoch_correct / seen,
        "test_loss": test_loss,
        "test_accuracy_percent": test_accuracy,
        "gradient_sparsity": row["gradient_sparsity"],
        "weight_sparsity": row["weight_sparsity"],
    }
    session.history.append(end)
    return {"kind": "epoch", **end}


def _results(session: _Session) -> dict[str, Any]:
    config, last = session.config, session.history[-1]
    return {
        "schema_version": RESULTS_VERSION,
        "name": config.name,
        "config_hash": config_hash(config),
        "status": "completed",
        "seed": config.seed,
        "emulated": config.emulation is not None,
        "epochs": config.training.epochs,
        "steps": session.total_steps,
        "wall_seconds": session.seconds,
        "model": config.model.name,
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "data": session.dataset.description,
        "test_accuracy_percent": last["test_accuracy_percent"],
        "best_test_accuracy_percent": max(row["test_accuracy_percent"] for row in session.history),
        "test_loss": last["test_loss"],
        "history": session.history,
        "gradients": session.emulator.statistics,
        "gradient_formats": session.emulator.gradient_formats,
        "weight_pruning": weight_pruning.summary if (weight_pruning := session.emulator.weight_pruning) else None,
        "ledger": session.emulator.ledger.summary(),
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """What a result depends on beside the configuration: versions, machine, threads, commit."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {
        **found,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "world_size": 1,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit of the source checkout that runs, with "+changes" where files differ; None outside a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes.strip() else "")


def _new_directory(config: Config, given: str | Path | None) -> Path:
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
def _logging(folder: Path) -> Iterator[logging.Logger]:
    log = logging.Logger(f"fpsim.{folder}")
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield log
    finally:
        handler.close()


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Names of the stop signals received: SIGINT and SIGTERM end the run after the step under way."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        print(f"fpsim: {received[0]}: stopping after this step (once more to stop at once)", file=sys.stderr)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_tables(folder: Path) -> None:
    rows = rows_of(folder / METRICS_FILE)
    for kind, name in (("step", "steps.csv"), ("epoch", "epochs.csv")):
        chosen = [{key: value for key, value in row.items() if key != "kind"} for row in rows if row["kind"] == kind]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(chosen[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(chosen)
        write_text(folder / name, text.getvalue())
