"""The driver of a sweep: hands the trials that are not finished to Dask's workers and takes their answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from fpsim.config import config_to_yaml
from fpsim.errors import ConfigError, FpsimError, Problem, RunError
from fpsim.stop_signals import stop_signals
from fpsim.sweep.cluster import check_installed, connected, lacking
from fpsim.sweep.outcome import Outcome, finish, read_outcomes, run_dir
from fpsim.sweep.progress import Progress, showing
from fpsim.sweep.summary import summarize, write
from fpsim.sweep.trials import Plan
from fpsim.sweep.worker import train

if TYPE_CHECKING:
    from distributed import Client, Future

POLL_SECONDS = 0.2
STOPPING = "stopping (once more to stop at once)"


def run_sweep(plan: Plan, *, quiet: bool = False) -> dict[str, Any]:
    """Train the trials of a sweep that are not finished, and write results.json, results.csv and report.html: the
    content of the first (see `summarize`).

    A trial that fails is begun again `retries` times and then left; the others go on. quiet: no progress on stderr.
    Raises ConfigError where Dask is not installed, where no scheduler answers, where the folder cannot be written and
    while another driver works in it; RunError where the sweep is stopped by SIGINT or SIGTERM or its scheduler is lost,
    after writing what there is.
    """
    check_installed()
    with _sole_driver(plan):
        outcomes = read_outcomes(plan)
        failure = None
        with stop_signals(STOPPING) as stopped, showing(plan, outcomes, quiet) as progress:
            try:
                _train_all(plan, [one for one in outcomes if one.status != "finished"], progress, stopped)
            except RunError as error:
                failure = error
        summary = summarize(plan, outcomes)
        write(plan.folder, summary)
    if failure is not None:
        raise failure
    return summary


def _train_all(plan: Plan, wanted: list[Outcome], progress: Progress, stopped: list[str]) -> None:
    if not wanted:
        return
    by_hash = {outcome.trial.config_hash: outcome for outcome in wanted}
    topic = f"fpsim-sweep-{plan.sweep.name}"
    messages: SimpleQueue[Any] = SimpleQueue()  # futures that are done, and hashes of trials that a worker has begun
    with connected(plan.sweep.dask, len(wanted)) as client:
        client.subscribe_topic(topic, lambda event: messages.put(event[1]))
        pending: dict[Future[str], Outcome] = {}

        def begin(outcome: Outcome) -> None:
            outcome.attempts += 1
            future = _submitted(client, plan, outcome, topic)
            pending[future] = outcome
            future.add_done_callback(messages.put)

        if (lack := lacking(client, plan.sweep.dask.resources)) is not None:
            progress.note(f"waiting for {lack}")
        for outcome in wanted:
            begin(outcome)
        while pending:
            message = _next(messages)
            if stopped:
                raise RunError(f"stopped by {stopped[0]}, {_how_to_go_on(plan, pending)}")
            if message in pending:
                if message.cancelled():
                    raise RunError(f"the Dask scheduler was lost, {_how_to_go_on(plan, pending)}")
                outcome = pending.pop(message)
                try_again = _settle(plan, outcome, message)
                progress.show(outcome)
                if try_again:
                    outcome.status = "begun"
                    begin(outcome)
            elif message in by_hash and by_hash[message] in pending.values():
                by_hash[message].status = "running"
                progress.show(by_hash[message])


def _next(messages: SimpleQueue[Any]) -> Any:
    """The next message; None where there is none for a while."""
    try:
        return messages.get(timeout=POLL_SECONDS)
    except Empty:
        return None


def _submitted(client: Client, plan: Plan, outcome: Outcome, topic: str) -> Future[str]:
    """The trial's training, as a task whose key says all: that of a driver that died is taken over."""
    arguments = config_to_yaml(outcome.trial.config), str(run_dir(plan, outcome.trial)), topic
    digest = hashlib.sha256(json.dumps([*arguments, outcome.attempts]).encode()).hexdigest()[:16]
    key = f"{plan.sweep.name}-{outcome.trial.config_hash}-{digest}"
    return client.submit(train, *arguments, key=key, resources=plan.sweep.dask.resources or None)


def _settle(plan: Plan, outcome: Outcome, done: Future[str]) -> bool:
    """Writes into the outcome how an attempt ended: whether there is to be another."""
    error = done.exception()
    answer = json.loads(done.result()) if error is None else {"error": _death(error), "is_mistake": False}
    if "error" not in answer:
        try:
            finish(plan, outcome, answer)
            return False
        except FpsimError as failure:
            answer = {"error": str(failure), "is_mistake": True}
    outcome.status, outcome.error = "failed", str(answer["error"])
    return not answer["is_mistake"] and outcome.attempts <= plan.sweep.retries


def _death(error: BaseException) -> str:
    """Of a task that gave no answer: its worker died again and again, or cannot import fpsim."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _how_to_go_on(plan: Plan, pending: Sized) -> str:
    return f"{len(pending)} of {len(plan.trials)} trials to go; go on with the same command"


@contextmanager
def _sole_driver(plan: Plan) -> Iterator[None]:
    """Raises ConfigError for a folder that cannot be made, or in which another driver is at work."""
    lock = FileLock(plan.folder / ".lock")
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError([Problem("", "another `fpsim sweep` is at work in it", str(plan.folder))]) from None
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be written: {error.strerror}", str(plan.folder))]) from error
    try:
        yield
    finally:
        lock.release()
