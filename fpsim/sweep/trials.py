"""From a sweep's file to its trials, every one of them a valid configuration."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random as Generator
from typing import Any

from fpsim.config import Config, config_hash, config_with, experiment_tree, load_tree, section_of
from fpsim.config.tree import Node, child, problem, to_data
from fpsim.errors import ConfigError, Problem
from fpsim.sweep.schema import Sweep

MOST_TRIALS = 10_000
Changes = dict[str, Node]


@dataclass(frozen=True)
class Trial:
    """One configuration of a sweep. varied: the dotted keys in which trials differ, and their values in this one."""

    config_hash: str
    config: Config
    varied: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A sweep's file and its trials. notes: which trials were left out, being the same as others."""

    sweep: Sweep
    trials: list[Trial]
    notes: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.sweep.output) / self.sweep.name


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """The sweep of a YAML file, or of the preset of that name, with all its trials in order.

    overrides: "key=value" for keys of the sweep's file, such as "dask.workers=4" or "set.training.epochs=1".
    Trials that would train the same (equal hashes) are one trial, and a note says so. Raises ConfigError with every
    problem found, of the file and of any trial.
    """
    tree = load_tree(path, "sweeps", overrides, dotted=("set", "grid"))
    sweep = section_of(Sweep, tree)
    _check_keys(tree)
    _check_number(tree, sweep)
    always = _changes(child(tree, "set"))
    base = child(tree, "base")
    assert base is not None
    experiment = experiment_tree(base, ("base",))
    trials: dict[str, Trial] = {}
    problems: dict[Problem, Problem] = {}
    notes = []
    for varied in combinations(tree, sweep):
        shown = {key: to_data(node) for key, node in varied.items()}
        try:
            config = config_with(experiment, [*always.items(), *varied.items()])
            config.check_parts(1)
        except ConfigError as error:
            for one in error.problems:
                problems.setdefault(one, replace(one, message=f"{one.message}; in the trial {label(shown)}"))
            continue
        trial = Trial(config_hash(config), config, shown)
        if trial.config_hash in trials:
            first = label(trials[trial.config_hash].varied)
            notes.append(f"the trial {label(shown)} trains the same as {first}: it is left out")
        else:
            trials[trial.config_hash] = trial
    if problems:
        raise ConfigError(problems.values())
    return Plan(sweep, list(trials.values()), notes)


def combinations(tree: Node, sweep: Sweep) -> Iterator[Changes]:
    """What each trial changes, with the places where it was written: the list varies slowest, then the grid, its last
    key fastest within it, then the draws."""
    listed = child(tree, "list")
    entries = [{}] if listed is None else [_changes(entry) for entry in listed.value]
    grid = _changes(child(tree, "grid"))
    points = [
        {key: _keyed(value, grid[key]) for key, value in zip(grid, values, strict=True)}
        for values in itertools.product(*(node.value for node in grid.values()))
    ]
    for parts in itertools.product(entries, points, _draws(tree, sweep)):
        yield {key: value for part in parts for key, value in part.items()}


def label(varied: dict[str, Any]) -> str:
    """What a trial changes, as one line of text."""
    return ", ".join(f"{key}={text(value)}" for key, value in varied.items()) or "of the base alone"


def text(value: Any) -> str:
    """A value as in a table: strings as they are, floats in six digits, the rest as JSON."""
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _changes(node: Node | None) -> Changes:
    return {} if node is None else node.value


def _keyed(value: Node, key: Node) -> Node:
    """The value with the place of the key above it for its own."""
    return Node(value.value, value.at, key.key_at)


def _draws(tree: Node, sweep: Sweep) -> list[Changes]:
    """One mapping a sample; [{}] where nothing is random. Every key has a stream of random numbers of its own."""
    if sweep.random is None:
        return [{}]
    keys = _changes(_random_keys(tree))
    streams = {key: Generator(f"{sweep.random.seed} {key}") for key in keys}
    return [
        {key: _keyed(_drawn(node, streams[key].random()), node) for key, node in keys.items()}
        for _ in range(sweep.random.samples)
    ]


def _drawn(draw: Node, share: float) -> Node:
    """The value at a share (0 <= share < 1) of the way through the range, or through the choice."""
    ((kind, given),) = ((kind, node) for kind, node in draw.value.items() if node.value is not None)
    if kind == "choice":
        chosen: Node = given.value[int(share * len(given.value))]
        return chosen
    low, high = to_data(given)
    if kind == "integers":
        return Node(low + int(share * (high - low + 1)), given.at)
    if kind == "log_uniform":
        return Node(math.exp(math.log(low) + share * (math.log(high) - math.log(low))), given.at)
    return Node(low + share * (high - low), given.at)


def _random_keys(tree: Node) -> Node | None:
    random = child(tree, "random")
    return None if random is None else child(random, "keys")


def _check_keys(tree: Node) -> None:
    """Raises ConfigError for a key that two parts of the sweep change."""
    listed = child(tree, "list")
    parts = {
        "set": _changes(child(tree, "set")),
        "list": {key: node for entry in (listed.value if listed else []) for key, node in entry.value.items()},
        "grid": _changes(child(tree, "grid")),
        "random": _changes(_random_keys(tree)),
    }
    problems = [
        problem((later, key), f"`{earlier}` says this key as well", parts[later][key].key_at)
        for earlier, later in itertools.combinations(parts, 2)
        for key in parts[later]
        if key in parts[earlier]
    ]
    if problems:
        raise ConfigError(problems)


def _check_number(tree: Node, sweep: Sweep) -> None:
    """Raises ConfigError for more trials than anybody means."""
    samples = 1 if sweep.random is None else sweep.random.samples
    trials = max(1, len(sweep.list)) * math.prod(map(len, sweep.grid.values())) * samples
    if trials > MOST_TRIALS:
        raise ConfigError([problem((), f"{trials:,} trials, more than the {MOST_TRIALS:,} of a sweep", tree.at)])
