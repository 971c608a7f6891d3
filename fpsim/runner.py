"""A run: a configuration trained to its end in a directory of its own (`fpsim.run_directory`), resumable from any
moment."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accel
from fpsim import checkpoint
from fpsim.config import Config, load_config, parse_config
from fpsim.environment import environment
from fpsim.errors import ConfigError, NonFiniteError, Problem, RunError, reason_of
from fpsim.event_files import EventFiles, check_installed, event_files
from fpsim.files import write_json, write_text
from fpsim.not_finite import not_finite_in_evaluation, save_failed
from fpsim.own import modules_of
from fpsim.profile import StepProfiler
from fpsim.ranges import END, OPTIMIZER, span
from fpsim.ranks import ALONE, Ranks, joined
from fpsim.run_directory import (
    CONFIG_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    begun,
    environment_of,
    locked,
    new_directory,
    rows_of,
    run_folder,
)
from fpsim.run_results import results_of
from fpsim.session import Session, forward_and_backward, set_learning_rate
from fpsim.stop_signals import stop_signals
from fpsim.training import check_gradients, evaluate


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
    profile: bool = False,
) -> RunResult:
    """Train a configuration (an object, a mapping, a file or the name of an experiment) to its end.

    run_dir: a new directory; by default `<output>/<name>/<UTC time>-<config hash>`. quiet: no progress. profile: some
    steps are profiled (see `fpsim.profile`), which leaves the results as they are.
    Raises ConfigError for the user's mistakes (an existing directory included), RunError for a run that fails.
    """
    if isinstance(config, str | Path):
        config = load_config(config, overrides)
    elif overrides or not isinstance(config, Config):
        config = parse_config(config.model_dump() if isinstance(config, Config) else config, overrides)
    with joined() as ranks, ExitStack() as stack:
        folder = Path()
        with ranks.together():
            if ranks.is_first:
                folder = new_directory(config, run_dir)
        folder = Path(ranks.gathered(str(folder).encode())[0].decode())
        with ranks.together():
            config.check_parts(ranks.count)
            check_installed(config)
            session = Session(config, folder, quiet, ranks)
            profiler = StepProfiler(folder, session.total_steps) if profile and ranks.is_first else None
        with ranks.together():
            if ranks.is_first:
                noted = {**environment(ranks.count), "modules": modules_of(config)}
                stack.enter_context(begun(folder, config, noted, is_given=run_dir is not None))
        session.exchange.connect()
        return _train(session, "started", profiler)


def resume(run_dir: str | Path, *, quiet: bool = False) -> RunResult:
    """Go on with an interrupted run from its newest whole checkpoint: the same metrics and weights as without
    interruption.

    Raises ConfigError for what is not a run directory, or where another process writes or another number of ranks
    began; RunError for a run that fails or whose checkpoints are all damaged.
    """
    with joined() as ranks, ExitStack() as stack:
        with ranks.together():
            folder = run_folder(run_dir)
            if (begun_with := environment_of(folder)["world_size"]) != ranks.count:
                message = f"was begun with world size {begun_with}: go on with the same (got {ranks.count})"
                raise ConfigError([Problem("", message, str(folder))])
            if ranks.is_first:
                stack.enter_context(locked(folder))
            session = _session_of(folder, quiet, ranks)
        session.restore()
        session.exchange.connect()
        return _train(session, "resumed")


def opened(run_dir: str | Path) -> Session:
    """A run as its newest checkpoint holds it, to look into: its directory stays as it is.

    Raises ConfigError for what is not a run directory, RunError for one without a checkpoint or with a damaged one.
    """
    folder = run_folder(run_dir)
    saved = checkpoint.newest(folder)
    session = _session_of(folder, True, ALONE)
    session.load(saved)
    return session


def _session_of(folder: Path, quiet: bool, ranks: Ranks) -> Session:
    """A session of a run that was begun, with its own number of threads."""
    config = load_config(folder / CONFIG_FILE, [f"threads={environment_of(folder)['threads']}"])
    return Session(config, folder, quiet, ranks)


def _train(session: Session, begun_as: str, profiler: StepProfiler | None = None) -> RunResult:
    """Raises RunError, with how to go on, for a run that cannot; on ranks beyond the first ToldError, where all end."""
    folder, ranks = session.folder, session.ranks
    with (
        _stop_signals(ranks) as stopped,
        session.progress,
        event_files(session) as events,
        profiler or nullcontext(),
    ):
        session.log(begun_as, step=session.step, total_steps=session.total_steps, data=session.dataset.description)
        session.progress.note(f"{folder}: {session.dataset.description}")
        for note in session.notes:
            session.progress.note(f"note: {note}")
        try:
            _train_steps(session, stopped, events, profiler)
            results = results_of(session)
            if ranks.is_first:
                write_json(folder / RESULTS_FILE, results)
                _write_tables(folder)
        except NonFiniteError as error:
            try:
                text = save_failed(session, error)
            except OSError as failure:
                text = f"{error}; the state at that moment cannot be saved: {failure.strerror or failure}"
            raise ranks.told_by_first(RunError(text)) from error
        except OSError as error:
            reason = reason_of(error)
            saved = checkpoint.checkpoints(folder / "checkpoints")
            step = saved[-1].name.removeprefix("step-") if saved else "0"
            session.log("failed", level="error", reason=reason, step=session.step)
            raise RunError(
                f"{reason}; the run stopped at step {session.step} and is saved as of step {step}, "
                f"go on with: fpsim resume {folder}"
            ) from error
        session.log("completed", test_accuracy_percent=results["test_accuracy_percent"], seconds=session.seconds)
    paths = (folder / RESULTS_FILE, folder / METRICS_FILE)
    return RunResult(results["test_accuracy_percent"], results, session.emulator.ledger, folder, *paths)


def _train_steps(
    session: Session, stopped: list[str], events: EventFiles | None, profiler: StepProfiler | None
) -> None:
    """All steps from the session's on, with metrics, evaluation and checkpoints. RunError when a signal stops it."""
    folder, spec, ranks = session.folder / "checkpoints", session.config.training.checkpoint, session.ranks
    while session.step < session.total_steps:
        with nullcontext() if profiler is None else profiler.step():
            row = _train_step(session)
        session.append(METRICS_FILE, [row])
        if events is not None:
            events.step(row)
        epoch_ended = session.step % session.steps_per_epoch == 0
        if epoch_ended:
            end = _end_epoch(session, row)
            session.append(METRICS_FILE, [end])
            if events is not None:
                events.epoch(end)
            session.progress.epoch(end)
            session.log("epoch", **{key: value for key, value in end.items() if key != "kind"})
        (stops,) = ranks.totals(len(stopped))
        if stops or epoch_ended or session.step % spec.every_steps == 0:
            if events is not None:
                events.flush()
            session.save_samples()  # first: what a kill leaves out between the two is done again
            session.save(folder)
            if ranks.is_first:
                checkpoint.prune(folder, spec.keep)
        if stops and session.step < session.total_steps:
            by = stopped[0] if stopped else "another rank"
            session.log("stopped", level="warning", by=by, step=session.step)
            raise ranks.told_by_first(
                RunError(
                    f"stopped by {by} at step {session.step} of {session.total_steps}; the state is saved, "
                    f"go on with: fpsim resume {session.folder}"
                )
            )


def _train_step(session: Session) -> dict[str, Any]:
    """One step: its row for the metrics. Raises NonFiniteError before the weights are updated."""
    emulator, step = session.emulator, session.step
    if step == session.total_steps - 1:
        emulator.sample_this_step()
    learning_rate = set_learning_rate(session)
    loss_value, correct, labels = forward_and_backward(session)
    check_gradients(session.model, step)
    with span(OPTIMIZER):
        session.optimizer.step()
    with span(END):
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


def _end_epoch(session: Session, row: dict[str, Any]) -> dict[str, Any]:
    """Evaluate: the epoch's row for the metrics. Raises NonFiniteError when the test loss is not finite."""
    session.ranks.share_first(list(session.model.buffers()))
    test_loss, test_accuracy = evaluate(session.model, session.dataset.test, session.ranks)
    if not math.isfinite(test_loss):
        raise not_finite_in_evaluation(session, test_loss)
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


def _stop_signals(ranks: Ranks) -> AbstractContextManager[list[str]]:
    """Names of the stop signals received: SIGINT and SIGTERM end the run after the step under way.

    A second one ends a rank alone at once; of several each gets one from the terminal and one from its launcher.
    """
    is_alone = ranks.count == 1
    announcement = f"stopping after this step{' (once more to stop at once)' * is_alone}"
    return stop_signals(announcement if ranks.is_first else None, twice_ends=is_alone)


def _write_tables(folder: Path) -> None:
    rows = rows_of(folder / METRICS_FILE)
    for kind, name in (("step", "steps.csv"), ("epoch", "epochs.csv")):
        chosen = [{key: value for key, value in row.items() if key != "kind"} for row in rows if row["kind"] == kind]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(chosen[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(chosen)
        write_text(folder / name, text.getvalue())
