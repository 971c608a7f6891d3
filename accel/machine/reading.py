"""Reads a machine from the key `machine` of a YAML file; mistakes are named with the file and line.

Numbers are those of YAML 1.2, where `1e-3` is one (PyYAML's YAML 1.1 takes it for a string).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from accel.formats import nearest
from accel.machine.description import Machine

KEY = "machine"
Location = tuple[str | int, ...]


class MachineError(ValueError):
    """Mistakes in a machine. `mistakes`: of each, its location below the machine and what is allowed there."""

    def __init__(self, message: str, mistakes: Sequence[tuple[Location, str]]) -> None:
        super().__init__(message)
        self.mistakes = mistakes


class _Loader(yaml.SafeLoader):
    """SafeLoader, and numbers with an exponent but no point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


def machine(spec: str | PathLike[str] | Mapping[str, Any] | Machine) -> Machine:
    """The machine that a YAML file describes under its key `machine`, or a mapping of the keys below it.

    Raises ValueError with a line for each mistake: the key, what is allowed and what was given, and of a file its name
    and the line.
    """
    if isinstance(spec, Machine):
        return spec
    if isinstance(spec, Mapping):
        return _validated(dict(spec), lambda location: "")
    if not isinstance(spec, str | PathLike):
        raise ValueError(f"a machine is the path of a file, a mapping or a Machine (got {type(spec).__name__})")
    data, lines = _read(Path(spec))
    return _validated(data, lambda location: f"{spec}:{_line(lines, (KEY, *location))}: ")


def _read(path: Path) -> tuple[Any, dict[Location, int]]:
    """The value of the key `machine` of a file, and the line of everything in the file."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    loader = _Loader(text)
    lines: dict[Location, int] = {}

    def value_of(node: yaml.Node, location: Location) -> Any:
        lines.setdefault(location, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                line = key_node.start_mark.line + 1
                if key in found:
                    raise ValueError(f"{path}:{line}: {_name((*location, key))}: given twice")
                lines[*location, key] = line
                found[key] = value_of(value_node, (*location, key))
            return found
        if isinstance(node, yaml.SequenceNode):
            return [value_of(item, (*location, index)) for index, item in enumerate(node.value)]
        return loader.construct_object(node)

    try:
        root = loader.get_single_node()
        data = None if root is None else value_of(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ValueError(f"{path}:{line}: invalid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}:1: invalid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or data.get(KEY) is None:
        raise ValueError(f"{path}:1: {KEY}: missing; this key describes the machine")
    return data[KEY], lines


def _line(lines: dict[Location, int], location: Location) -> int:
    """The line of the nearest thing that is there."""
    while location not in lines:
        location = location[:-1]
    return lines[location]


def _name(location: Location) -> str:
    return ".".join(map(str, location))


def _validated(data: Any, place: Callable[[Location], str]) -> Machine:
    """place: the text before an error at a location below the machine."""
    try:
        return Machine.model_validate(data)
    except ValidationError as error:
        found = [_mistake(one) for one in error.errors(include_url=False)]
    messages = [f"{place(location)}{_name((KEY, *location))}: {message}" for location, message in found]
    raise MachineError("\n".join(messages), found) from None


_REQUIREMENTS = {
    "finite_number": "must be finite",
    "float_type": "must be a number",
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "int_type": "must be an integer",
    "less_than_equal": "must be <= {le:g}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_short": "must have {min_length} or more",
}


def _mistake(error: Any) -> tuple[Location, str]:
    """Where a pydantic error is, and what is allowed there."""
    location, kind, given, context = error["loc"], error["type"], error["input"], error.get("ctx", {})
    if kind == "section":
        return (*location, *_parts(context["at"])), context["message"]
    if kind == "value_error":
        return location, str(context["error"])
    if kind == "missing":
        return location, "missing; this key is required"
    if kind == "extra_forbidden":
        allowed = list(_fields(location[:-1]))
        return location, f"unknown key{nearest(location[-1], allowed)}; allowed: {', '.join(allowed)}"
    message = _REQUIREMENTS[kind].format(**context) if kind in _REQUIREMENTS else error["msg"]
    if kind == "too_short":
        return location, f"{message} (got {len(given)})"
    hint = nearest(given, re.findall("'([^']+)'", context["expected"])) if kind == "literal_error" else ""
    return location, f"{message} (got {given!r}){hint}"


def _parts(key: str) -> Location:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _fields(location: Location) -> Mapping[str, Any]:
    """The fields of the section at a location below the machine."""
    fields: Any = Machine.model_fields
    for part in location:
        if isinstance(part, str):
            fields = _section(fields[part].annotation).model_fields
    return fields


def _section(annotation: Any) -> Any:
    """The model in an annotation such as `list[Level]` or `Codec | None`."""
    members = getattr(annotation, "__args__", (annotation,))
    return members[0]
