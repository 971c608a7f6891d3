"""How the trials of a sweep stand, and the driver's own copies of their results:

<output>/<sweep>/
    trials/<config hash>/        the run directory of a trial, on the file system of its worker
    results/<config hash>.json   what a finished trial answered: its results.json and the estimate of its step
    results.json, results.csv    a row a trial, and groups of trials that differ in the seed alone
    report.html                  the same as tables and plots
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fpsim.config import Config
from fpsim.errors import ConfigError, Problem
from fpsim.files import write_json
from fpsim.report.results import checked_results
from fpsim.sweep.trials import Plan, Trial

COPY_VERSION = 1
Status = Literal["new", "begun", "running", "finished", "failed"]


@dataclass
class Outcome:
    """How a trial stands. attempts: how often its training was asked for by the command that ended it; error: why it
    failed; answer: `results` and `estimate` of a finished trial (see `fpsim.sweep.worker`)."""

    trial: Trial
    status: Status
    attempts: int = 0
    error: str | None = None
    answer: dict[str, Any] | None = None


def run_dir(plan: Plan, trial: Trial) -> Path:
    """The trial's run directory, as this machine and workers with the same file system see it."""
    return (plan.folder / "trials" / trial.config_hash).resolve()


def read_outcomes(plan: Plan) -> list[Outcome]:
    """How each trial stands by the files of this machine. Raises ConfigError for a copy that is damaged."""
    return [_outcome(plan, trial) for trial in plan.trials]


def finish(plan: Plan, outcome: Outcome, answer: dict[str, Any]) -> None:
    """Take up what a worker answered of a finished trial, and write the copy. Raises ConfigError for results that are
    not the trial's."""
    file = _copy(plan, outcome.trial)
    _check(answer["results"], outcome.trial, file)
    content = {"schema_version": COPY_VERSION, "attempts": outcome.attempts, **answer}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)
    outcome.status, outcome.error, outcome.answer = "finished", None, answer


def _outcome(plan: Plan, trial: Trial) -> Outcome:
    file = _copy(plan, trial)
    unfinished = Outcome(trial, "begun" if run_dir(plan, trial).is_dir() else "new")
    if not file.is_file():
        return unfinished
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, attempts = content["schema_version"], content["attempts"]
        answer = {key: content[key] for key in ("results", "estimate")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([Problem("", f"damaged, remove it: {error!r}", str(file))]) from None
    if version != COPY_VERSION:
        raise ConfigError([Problem("schema_version", f"must be {COPY_VERSION} (got {version!r})", str(file))])
    _check(answer["results"], trial, file)
    if machine(trial.config) != (answer["estimate"] and answer["estimate"]["machine"]):
        return unfinished  # its step is to be estimated on another machine
    return Outcome(trial, "finished", attempts, answer=answer)


def machine(config: Config) -> dict[str, Any] | None:
    """The description of the machine that the configuration's step is estimated on."""
    described = None if config.emulation is None else config.emulation.machine
    return None if described is None else described.model_dump(mode="json")


def _copy(plan: Plan, trial: Trial) -> Path:
    return plan.folder / "results" / f"{trial.config_hash}.json"


def _check(results: Any, trial: Trial, file: Path) -> None:
    found = checked_results(results, file)["config_hash"]
    if found != trial.config_hash:
        message = f"results of another configuration, or of another fpsim (got {found}, not {trial.config_hash})"
        raise ConfigError([Problem("config_hash", message, str(file))])
