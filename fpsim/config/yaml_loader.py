"""YAML text to a tree with positions, and plain data to YAML text.

Scalars follow the YAML 1.2 core schema (section 10.3.2): `1e-3` is a number, `on`, `1:30` and dates are strings, `0777`
is decimal. Duplicate keys, merge keys, foreign tags and several documents are refused; aliases are bounded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fpsim.config.tree import MAX_DEPTH, Node, Position, problem, shown
from fpsim.config.tree import Path as KeyPath
from fpsim.errors import ConfigError, Problem

MAX_BYTES = 1 << 20
MAX_NODES = 100_000

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = {
    "null": r"(?:~|null|Null|NULL|)\Z",
    "bool": r"(?:true|True|TRUE|false|False|FALSE)\Z",
    "int": r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z",
    "float": r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_A_CHARACTER = "half of a surrogate pair is no character"
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


class _Loader(yaml.SafeLoader):
    """Composes nodes by the core schema, within MAX_DEPTH and MAX_NODES."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        mark = self.peek_event().start_mark
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        if self.nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that the core schema would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _name, _pattern in _CORE_SCHEMA.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), None)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(_pattern), None)


def read_yaml(path: Path) -> Node:
    """The tree of a YAML file, whose top level must be a mapping. Raises ConfigError with file:line:column."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError([Problem("", f"cannot be read: {reason}", file=str(path))]) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError([Problem("", f"larger than {MAX_BYTES} bytes", file=str(path))])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        message = f"not UTF-8 text (got byte 0x{raw[error.start]:02x})"
        raise ConfigError([Problem("", message, str(path), line, column)]) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree.value, dict):
        message = f"the top level must be a mapping (got {shown(tree.value)})"
        raise ConfigError([problem((), message, tree.at or Position(str(path), 1, 1))])
    return tree


def parse_yaml(text: str, file: str) -> Node:
    """The tree of one YAML document (an empty one is null); `file` is the name for its positions.
    Raises ConfigError with every problem found."""
    lines = _LINE_BREAK.split(text)

    def position(line: int, column: int) -> Position:
        return Position(file, line + 1, column + 1, lines[line] if line < len(lines) else None)

    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        before = _LINE_BREAK.split(text[: error.position])
        message = f"the character {shown(text[error.position])} is not allowed in YAML"
        raise ConfigError([problem((), message, position(len(before) - 1, len(before[-1])))]) from None
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        message = ", ".join(part for part in (error.problem, error.context) if part) or "invalid YAML"
        raise ConfigError([problem((), message, position(*_place(error, text)))]) from None
    except (ValueError, OverflowError) as error:
        raise ConfigError([problem((), f"invalid YAML ({error})", position(loader.line, loader.column))]) from None
    if root is None:
        return Node(None)

    problems: list[Problem] = []
    open_nodes: set[int] = set()
    count = 0

    def start(node: yaml.Node) -> Position:
        return position(node.start_mark.line, node.start_mark.column)

    def convert(node: yaml.Node, path: KeyPath, key_at: Position | None = None) -> Node:
        nonlocal count
        count += 1
        at = start(node)
        if id(node) in open_nodes:
            raise ConfigError([problem(path, "an alias refers to a value that contains it", key_at or at)])
        if count > MAX_NODES:
            raise ConfigError([problem(path[:3], f"aliases expand to more than {MAX_NODES} values", key_at or at)])
        if len(path) > MAX_DEPTH:
            raise ConfigError([problem(path[:3], f"nested deeper than {MAX_DEPTH} levels", at)])
        open_nodes.add(id(node))
        value: Any = None
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            value = mapping(node, path)
        elif isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            value = [convert(item, (*path, index)) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_TAG) in {*_CORE_SCHEMA, "str"}:
            try:
                value = _scalar(node.tag.removeprefix(_TAG), node.value)
            except ValueError as error:
                problems.append(problem(path, str(error), at))
        else:
            problems.append(problem(path, f"the tag {shown(node.tag.replace(_TAG, '!!'))} is not supported", at))
        open_nodes.remove(id(node))
        return Node(value, at, key_at)

    def mapping(node: yaml.MappingNode, path: KeyPath) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key, key_at = key_node.value, start(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                got = shown(key) if isinstance(key, str) else f"a {key_node.id}"
                problems.append(problem(path, f"a key must be a string (got {got})", key_at))
            elif _SURROGATE.search(key):
                problems.append(problem(path, f"{_NOT_A_CHARACTER} (got {shown(key)})", key_at))
            elif key == "<<":
                problems.append(problem(path, "merge keys (<<) are not supported; use `extends`", key_at))
            elif key in children:
                first = children[key].key_at
                assert first is not None
                message = f"duplicate key (first given at line {first.line}, column {first.column})"
                problems.append(problem((*path, key), message, key_at))
            else:
                children[key] = convert(value_node, (*path, key), key_at)
        return children

    tree = convert(root, ())
    if problems:
        raise ConfigError(problems)
    return tree


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text that `parse_yaml` reads back to equal data; mappings keep their order."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120)
    return text


def _place(error: yaml.MarkedYAMLError, text: str) -> tuple[int, int]:
    """Line and column of a syntax error: where it was noticed; of what was begun and never closed, the beginning."""
    written = text.rstrip()
    marks = [mark for mark in (error.problem_mark, error.context_mark) if mark and mark.index < len(written)]
    if error.context == "while scanning a simple key":
        marks.reverse()
    if marks:
        return marks[0].line, marks[0].column
    before = _LINE_BREAK.split(written)
    return len(before) - 1, len(before[-1])


def _scalar(kind: str, text: str) -> Any:
    """A scalar of the core schema. Raises ValueError when the text is not one of its kind."""
    if kind == "str":
        if _SURROGATE.search(text):
            raise ValueError(f"{_NOT_A_CHARACTER} (got {shown(text)})")
        return text
    if not re.match(_CORE_SCHEMA[kind], text) and not (kind == "float" and re.match(_CORE_SCHEMA["int"], text)):
        raise ValueError(f"not a value of type {kind} (got {shown(text)})")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if len(text) > 64:
        raise ValueError(f"the integer has more than 64 digits (got {shown(text)})")
    return int(text[2:], {"0o": 8, "0x": 16}[text[:2]]) if text[:2] in {"0o", "0x"} else int(text)
