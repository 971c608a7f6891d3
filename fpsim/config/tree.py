"""Configuration as a tree of values that remember where they were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpsim.errors import ConfigError, Problem

MAX_DEPTH = 64

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Position:
    """A place in a source: `line` and `column` count from 1; None for a command-line override."""

    file: str
    line: int | None = None
    column: int | None = None
    source_line: str | None = None


OVERRIDES = Position("<overrides>")


@dataclass(frozen=True)
class Node:
    """A value (scalar, list of nodes or mapping of names to nodes) with the positions of the value and of its key."""

    value: Any
    at: Position | None = None
    key_at: Position | None = None


def from_data(data: Any, path: Path = ()) -> Node:
    """The tree of plain Python data, without positions. Raises ConfigError for a key that is not a string and for
    nesting deeper than MAX_DEPTH."""
    if len(path) > MAX_DEPTH:
        raise ConfigError([problem(path[:3], f"nested deeper than {MAX_DEPTH} levels")])
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str):
                raise ConfigError([problem(path, f"a key must be a string (got {shown(key)})")])
        return Node({str(key): from_data(value, (*path, key)) for key, value in data.items()})
    if isinstance(data, list | tuple):
        return Node([from_data(value, (*path, index)) for index, value in enumerate(data)])
    return Node(data)


def to_data(node: Node) -> Any:
    """The plain Python data of a tree."""
    if isinstance(node.value, dict):
        return {key: to_data(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [to_data(child) for child in node.value]
    return node.value


def merge(base: Node, over: Node, path: Path = ()) -> Node:
    """`over` laid on `base`, mapping by mapping; lists and scalars are replaced. Below the root, a mapping that is
    another thing than the base replaces it whole (see `_is_another_thing`); a machine's name is only what it is called.
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    if path and path[-1] != "machine" and _is_another_thing(base.value, over.value):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child, (*path, key)) if key in merged else child
    return Node(merged, over.at, over.key_at)


def _is_another_thing(base: Mapping[str, Node], over: Mapping[str, Node]) -> bool:
    """Whether `over` states another `name` (another optimizer, another model), or describes another kind of format."""
    if "name" in base and "name" in over and base["name"].value != over["name"].value:
        return True
    kinds = ("element", "exponent_bits")
    return "base" in over or any(new in over and old in base for new, old in (kinds, kinds[::-1]))


def without(node: Node, key: str) -> Node:
    """The mapping `node` without one of its keys."""
    return Node({name: child for name, child in node.value.items() if name != key}, node.at, node.key_at)


def child(node: Node, part: str | int) -> Node | None:
    """The node at a key or list index below `node`, None where there is none."""
    if isinstance(node.value, dict):
        return node.value.get(part)
    if isinstance(node.value, list) and isinstance(part, int) and 0 <= part < len(node.value):
        return node.value[part]
    return None


def problem(path: Path, message: str, at: Position | None = None) -> Problem:
    """A Problem about the value at `path`."""
    where = ".".join(_shown_key(part) for part in path)
    if at is None:
        return Problem(where, message)
    return Problem(where, message, at.file, at.line, at.column, at.source_line)


def problem_in(tree: Node, path: Path, message: str, *, at_key: bool = False) -> Problem:
    """A Problem placed at the value (or key) that `path` names in `tree`; where it is absent, at the key of the
    nearest mapping that should hold it."""
    node, found = tree, True
    for part in path:
        below = child(node, part)
        if below is None:
            found = False
            break
        node = below
    return problem(path, message, (node.key_at or node.at) if at_key or not found else node.at)


def shown(value: Any) -> str:
    """A short repr for messages."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "an integer of more than 256 bits"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shown_key(part: str | int) -> str:
    text = str(part)
    return text if text.isprintable() and 0 < len(text) <= 80 and not set(text) & set(" .:") else shown(text)
