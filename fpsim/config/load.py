"""From YAML files and overrides to a validated Config, and back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fpsim.config.presets import Kind, find_file, preset_files
from fpsim.config.schema import (
    NOT_A_FORMAT,
    OWN_NAME,
    BlockFormatSpec,
    Config,
    Emulation,
    FormatChoice,
    FormatSpec,
    OwnData,
    OwnModel,
    Section,
    Source,
    known_format,
    number_format,
)
from fpsim.config.tree import (
    MAX_DEPTH,
    OVERRIDES,
    Node,
    Position,
    child,
    from_data,
    merge,
    problem,
    problem_in,
    shown,
    to_data,
    without,
)
from fpsim.config.tree import Path as KeyPath
from fpsim.config.yaml_loader import dump_yaml, parse_yaml, read_yaml
from fpsim.errors import ConfigError, Problem

if TYPE_CHECKING:
    import accel

AnySection = TypeVar("AnySection", bound=Section)

MAX_CHAIN = 16
MAC_FORMATS = ("accumulator", "a", "b", "product", "outer")  # keys of a multiply-accumulate unit that are formats
NO_RESULTS = ("output", "threads", "tensorboard")  # keys that change neither results nor name

# Keys that name files to build on; they are resolved away before validation.
BASE_KEYS: dict[KeyPath, tuple[str, Kind]] = {
    (): ("extends", "experiments"),
    ("emulation",): ("accelerator", "accelerators"),
}
_BASE_DESCRIPTIONS = {
    "extends": "Configurations to build on, merged in order: the name of an experiment, or a path from this file.",
    "accelerator": "Descriptions of hardware to build on, merged in order: names of presets, or paths from this file.",
}
_BASE_FORMAT = "The format that what is not said here is taken from: a name, a format file, or a description."


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, or of the experiment of that name.

    Args:
        path: a file, or the bare name of one in configs/experiments.
        overrides: "a.b.c=value", applied in order; a value is YAML, a part of the key may be a list index.
    Raises ConfigError with every problem found.
    """
    file = _file(path, "experiments")
    return _validated(_with_bases(read_yaml(file), (), (file.resolve(),)), overrides)


def load_section(section: type[AnySection], path: str | Path, kind: Kind, overrides: Sequence[str] = ()) -> AnySection:
    """A YAML file, or the preset of that kind and name, as a section that builds on no other file. Raises ConfigError
    with every problem found."""
    return section_of(section, load_tree(path, kind, overrides))


def load_tree(path: str | Path, kind: Kind, overrides: Sequence[str] = (), dotted: Sequence[str] = ()) -> Node:
    """The tree of the same file with the overrides applied, to be validated by `section_of`.

    dotted: keys of the top level with mappings whose own keys have dots: "set.a.b=1" changes the key "a.b" of `set`.
    Raises ConfigError.
    """
    tree = read_yaml(_file(path, kind))
    for override in overrides:
        tree = _overridden(tree, override, dotted)
    return tree


def experiment_tree(reference: Node, path: KeyPath) -> Node:
    """The tree of the experiment that the node at `path` names, from the file that it was written in, or is itself as a
    mapping; files that it extends are merged. Raises ConfigError."""
    if isinstance(reference.value, dict):
        return _with_bases(reference, (), ())
    file = _find(reference, "experiments", path)
    return _with_bases(read_yaml(file), (), (file.resolve(),))


def config_with(tree: Node, changes: Iterable[tuple[str, Node]]) -> Config:
    """The configuration of an experiment's tree after replacing the values at dotted keys, in order.

    Raises ConfigError with every problem found, placed where the values were written.
    """
    for key, value in changes:
        tree = _changed(tree, key.split("."), value)
    return _validated(tree, ())


def _file(path: str | Path, kind: Kind) -> Path:
    try:
        return find_file(str(path), kind, Path())
    except ValueError as error:
        raise ConfigError([Problem("", str(error))]) from None


def parse_config(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The configuration of plain data; files are looked up from the current directory. Raises ConfigError."""
    tree = from_data(mapping)
    if not isinstance(tree.value, dict):
        raise ConfigError([Problem("", f"the configuration must be a mapping (got {shown(mapping)})")])
    return _validated(_with_bases(tree, (), ()), overrides)


def load_format(text: str) -> accel.Format | accel.BlockFormat:
    """The number format of a name, a text that `accel.format` takes, a format file's name or path, or a mapping in
    YAML. Raises ConfigError."""
    try:
        written = parse_yaml(text, "<format>") if text.startswith("{") else Node(text)
        tree = Node({"format": _with_format(written, ("format",), ())})
        return number_format(section_of(FormatChoice, tree).format)
    except ConfigError as error:
        problems = [replace(one, path=one.path.removeprefix("format").lstrip(".")) for one in error.problems]
        raise ConfigError(problems) from None


def parse_emulation(mapping: Mapping[str, Any]) -> Emulation:
    """The `emulation` section alone, of plain data (`accelerator` included). Raises ConfigError."""
    rest = {"data": {"name": "synthetic"}, "model": {"name": "mlp"}}
    training = {"epochs": 1, "batch_size": 1, "optimizer": {"name": "sgd", "learning_rate": 1.0}}
    emulation = parse_config({**rest, "training": training, "emulation": mapping}).emulation
    if emulation is None:
        raise ConfigError([Problem("emulation", "must be a mapping (got null)")])
    return emulation


def config_to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back to an equal one."""
    return dump_yaml(config.model_dump())


def what_counts(config: Config) -> dict[str, Any]:
    """The configuration as plain data (JSON), without the keys that change neither results nor name."""
    return config.model_dump(mode="json", exclude=set(NO_RESULTS))


def config_hash(config: Config) -> str:
    """8 hex digits of the SHA-256 of everything that can change a run's results or its name."""
    data = config.model_dump(mode="json", exclude={**dict.fromkeys(NO_RESULTS, True), "emulation": {"machine"}})
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:8]


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a configuration file, for editors.

    A file may leave any key to the one that it extends, so only the top level of a file without `extends` has required
    keys; `load_config` checks the rest once everything is merged.
    """
    from accel.machine import Machine
    from fpsim.gradients.policies import BUILT_IN

    schema = Config.model_json_schema()
    machine = Machine.model_json_schema()
    schema["$defs"] |= machine.pop("$defs") | {"Machine": machine}
    emulation = schema["$defs"]["Emulation"]["properties"]
    described = {"anyOf": [{"$ref": "#/$defs/Machine"}, {"type": "null"}]}
    emulation["machine"] = {key: emulation["machine"][key] for key in ("description", "default")} | described
    policy = schema["$defs"]["Pruning"]["properties"]["policy"]
    policy["anyOf"] = [{"enum": list(BUILT_IN)}, {key: policy.pop(key) for key in OWN_NAME}]
    required = schema["required"]
    _relax(schema)
    for own in (OwnData, OwnModel):  # which take any key, and are told by their name
        schema["$defs"][own.__name__]["required"] = ["name"]
    formats = [{"$ref": f"#/$defs/{section.__name__}"} for section in (FormatSpec, BlockFormatSpec)]
    for section in (FormatSpec, BlockFormatSpec):
        base = {"anyOf": [{"type": "string"}, *formats, {"type": "null"}], "description": _BASE_FORMAT}
        schema["$defs"][section.__name__]["properties"]["base"] = base
    for path, (key, _) in BASE_KEYS.items():
        properties = (schema["$defs"]["Emulation"] if path else schema)["properties"]
        one_or_more: list[dict[str, Any]] = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
        properties[key] = {"anyOf": [*one_or_more, {"type": "null"}], "description": _BASE_DESCRIPTIONS[key]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "anyOf": [{"required": ["extends"]}, {"required": required}],
    }


def _relax(schema: Any) -> None:
    """Drops `required` in place, and lets a partial mapping match several members of a union."""
    if isinstance(schema, dict):
        if isinstance(schema.get("required"), list):
            del schema["required"]
        if "oneOf" in schema:
            schema["anyOf"] = schema.pop("oneOf")
        for value in schema.values():
            _relax(value)
    elif isinstance(schema, list):
        for value in schema:
            _relax(value)


# --- files that build on files --------------------------------------------------------------------------------------


def _with_bases(node: Node, path: KeyPath, chain: tuple[Path, ...]) -> Node:
    """The mapping `node` at `path`, laid on the files that its base key names; `chain`: the files being read."""
    if not isinstance(node.value, dict):
        return node
    key, kind = BASE_KEYS[path]
    reference = node.value.get(key)
    if reference is None:
        return node
    merged: Node | None = None
    for one in _references(reference, (*path, key)):
        file = _find(one, kind, (*path, key))
        _check_chain(file, chain, one, (*path, key))
        base = _with_bases(read_yaml(file), path, (*chain, file.resolve()))
        merged = base if merged is None else merge(merged, base, path)
    own = without(node, key)
    return own if merged is None else merge(merged, own, path)


def _references(node: Node, path: KeyPath) -> list[Node]:
    nodes = node.value if isinstance(node.value, list) else [] if node.value is None else [node]
    for one in nodes:
        if not isinstance(one.value, str) or not one.value:
            raise ConfigError([problem(path, f"must be a name or a path (got {shown(one.value)})", one.at)])
    if len({one.value for one in nodes}) < len(nodes):
        raise ConfigError([problem(path, "names a file twice", node.at)])
    return nodes


def _check_chain(file: Path, chain: tuple[Path, ...], reference: Node, path: KeyPath) -> None:
    if file.resolve() in chain:
        raise ConfigError([problem(path, f"{reference.value!r} builds on itself", reference.at)])
    if len(chain) >= MAX_CHAIN:
        raise ConfigError([problem(path, f"more than {MAX_CHAIN} files build on each other", reference.at)])


def _find(reference: Node, kind: Kind, path: KeyPath) -> Path:
    """The file that a node names, relative to the file that it was written in."""
    at = reference.at
    folder = Path(at.file).parent if at is not None and at is not OVERRIDES else Path()
    try:
        return find_file(reference.value, kind, folder)
    except ValueError as error:
        raise ConfigError([problem(path, str(error), at)]) from None


def _with_accelerator(tree: Node) -> Node:
    emulation = child(tree, "emulation")
    if emulation is None:
        return tree
    return Node({**tree.value, "emulation": _with_bases(emulation, ("emulation",), ())}, tree.at, tree.key_at)


def _with_formats(node: Node, path: KeyPath) -> Node:
    """Replaces the formats at and below `path` by what format files and their key `base` say of them."""
    if path[-1] == "format" or (path[-1] in MAC_FORMATS and "datapath" in path):
        return _with_format(node, path, ())
    if isinstance(node.value, list):
        return Node([_with_formats(item, (*path, i)) for i, item in enumerate(node.value)], node.at, node.key_at)
    if isinstance(node.value, dict):
        children = {key: _with_formats(item, (*path, key)) for key, item in node.value.items()}
        return Node(children, node.at, node.key_at)
    return node


def _with_format(node: Node, path: KeyPath, chain: tuple[Path, ...]) -> Node:
    """The format `node` without files and bases; `chain`: the files being read."""
    if isinstance(node.value, str):
        if not node.value.endswith((".yaml", ".yml")) and node.value not in preset_files("formats"):
            return node
        file = _find(node, "formats", path)
        _check_chain(file, chain, node, path)
        tree = read_yaml(file)
        named = Node({"name": Node(file.stem, node.at, node.key_at), **tree.value}, tree.at, tree.key_at)
        return _with_format(named, path, (*chain, file.resolve()))
    if not isinstance(node.value, dict):
        return node
    keys = {
        key: _with_format(value, (*path, key), chain) if key in ("base", "element", "scale") else value
        for key, value in node.value.items()
    }
    base = keys.pop("base", Node(None))
    return Node({**_format_keys(base, (*path, "base")), **keys}, node.at, node.key_at)


def _format_keys(base: Node, path: KeyPath) -> dict[str, Node]:
    """What a format takes from its base: all keys, and the name with a star."""
    if base.value is None:
        return {}
    if isinstance(base.value, str):
        try:
            base = _placed(from_data(_spelled_out(known_format(base.value))), base.at)
        except ValueError as error:
            raise ConfigError([problem(path, str(error), base.at)]) from None
    if not isinstance(base.value, dict):
        raise ConfigError([problem(path, f"{NOT_A_FORMAT} (got {shown(base.value)})", base.at)])
    keys: dict[str, Node] = base.value
    if "name" in keys and isinstance(keys["name"].value, str):
        keys = {**keys, "name": Node(f"{keys['name'].value}*", base.at, base.at)}
    return keys


def _spelled_out(name: str) -> dict[str, object]:
    """The mapping of the format of that name; its parts stay names where those say all."""
    import accel
    from accel.presets import to_mapping

    def is_said_by_name(part: accel.Format) -> bool:
        try:
            return accel.format(part.name) == part
        except ValueError:
            return False

    fmt = accel.format(name)
    keys = to_mapping(fmt)
    if isinstance(fmt, accel.BlockFormat):
        parts = {"element": fmt.element, "scale": fmt.scale}
        keys |= {key: part.name for key, part in parts.items() if is_said_by_name(part)}
    return keys


# --- overrides ------------------------------------------------------------------------------------------------------


def _overridden(tree: Node, override: str, dotted: Sequence[str] = ()) -> Node:
    """`tree` with one "a.b.c=value" applied; see `load_tree`. Raises ConfigError."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if len(parts) > 1 and parts[0] in dotted:
        parts = [parts[0], ".".join(parts[1:])]
    if not equals or not all(parts):
        raise ConfigError([problem((), f"an override must be key=value (got {shown(override)})", OVERRIDES)])
    try:
        value = parse_yaml(text, OVERRIDES.file)
    except ConfigError as error:
        raise ConfigError([problem(tuple(parts), one.message, OVERRIDES) for one in error.problems]) from None
    return _changed(tree, parts, _placed(value, OVERRIDES))


def _changed(tree: Node, parts: Sequence[str], value: Node) -> Node:
    """`tree` with the value at `parts` replaced. Raises ConfigError, placed at the key of `value`."""
    if not all(parts):
        raise ConfigError([problem(tuple(parts), "a part of the key is empty", value.key_at)])
    if len(parts) > MAX_DEPTH:
        raise ConfigError([problem(tuple(parts[:3]), f"nested deeper than {MAX_DEPTH} levels", value.key_at)])
    if parts[0] == "extends":
        raise ConfigError([problem(("extends",), "can be given only in a file", value.key_at)])
    if any(part.isdecimal() for part in parts):
        tree = _with_accelerator(tree)
    return _replaced(tree, (), parts, value)


def _placed(node: Node, at: Position | None) -> Node:
    """The tree with every position set to `at`."""
    value = node.value
    if isinstance(value, dict):
        value = {key: _placed(item, at) for key, item in value.items()}
    elif isinstance(value, list):
        value = [_placed(item, at) for item in value]
    return Node(value, at, at)


def _replaced(node: Node, path: KeyPath, parts: Sequence[str], value: Node) -> Node:
    """`node` (at `path`) with the value below it at `parts` replaced."""
    if not parts:
        return value
    part, rest = parts[0], parts[1:]
    here = ".".join(map(str, path))
    if isinstance(node.value, list):
        if part not in map(str, range(len(node.value))):
            message = f"{here} is a list of {len(node.value)}: its indices count from 0 (got {shown(part)})"
            raise ConfigError([problem((*path, part), message, value.key_at)])
        items = list(node.value)
        items[int(part)] = _replaced(items[int(part)], (*path, int(part)), rest, value)
        return Node(items, node.at, node.key_at)
    if node.value is not None and not isinstance(node.value, dict):
        message = f"{here} is not a mapping (it is {shown(node.value)})"
        raise ConfigError([problem((*path, part), message, value.key_at)])
    children = node.value or {}
    below = children.get(part, Node(None, value.key_at, value.key_at))
    return Node({**children, part: _replaced(below, (*path, part), rest, value)}, node.at, node.key_at)


# --- validation -----------------------------------------------------------------------------------------------------


def _validated(tree: Node, overrides: Sequence[str]) -> Config:
    for override in overrides:
        tree = _overridden(tree, override)
    tree = _with_accelerator(tree)
    if (emulation := child(tree, "emulation")) is not None:
        tree = Node({**tree.value, "emulation": _with_formats(emulation, ("emulation",))}, tree.at, tree.key_at)
    config = section_of(Config, tree)
    config._source = Source(tree)
    return config


def section_of(section: type[AnySection], tree: Node) -> AnySection:
    """The section that a tree which builds on no file describes. Raises ConfigError with every problem found."""
    try:
        return section.model_validate(to_data(tree))
    except ValidationError as error:
        errors = error.errors(include_url=False)
    newer = [one for one in errors if one["type"] == "newer_version"]
    problems = [_problem(section, tree, one) for one in newer or errors]
    raise ConfigError(sorted(problems, key=lambda one: (one.file or "", one.line or 0, one.column or 0)))


def _problem(section: type[Section], tree: Node, error: ErrorDetails) -> Problem:
    path, models = _walk(section, error["loc"])
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        base_keys = [key for place, (key, _) in BASE_KEYS.items() if place == path[:-1]]
        base_keys += ["base"] if models[0] in (FormatSpec, BlockFormatSpec) else []
        message = "unknown key" + _suggestion(path[-1], [*models[0].model_fields, *base_keys])
        return problem_in(tree, path, message, at_key=True)
    if kind == "union_tag_not_found" and not isinstance(given, Mapping):
        return problem_in(tree, path, f"must be a mapping (got {shown(given)})")
    if kind in {"missing", "union_tag_not_found"}:
        path = path if kind == "missing" else (*path, "name")
        return problem_in(tree, path, "missing; this key is required")
    if kind == "union_tag_invalid":
        return problem_in(
            tree, (*path, "name"), _choice(context["tag"], " or ".join(context["expected_tags"].rsplit(", ", 1)))
        )
    if kind == "literal_error":
        return problem_in(tree, path, _choice(given, re.sub("True|False", lambda m: m[0].lower(), context["expected"])))
    if kind == "section":
        at = context["at"]
        if isinstance(at, str):
            at = [int(part) if part.isdecimal() else part for part in at.split(".") if part]
        return problem_in(tree, (*path, *at), context["message"])
    if kind == "newer_version":
        return problem_in(tree, path, context["message"])
    if kind == "value_error":
        return problem_in(tree, path, " ".join(str(context["error"]).split()))
    return problem_in(tree, path, f"{_requirement(error)} (got {shown(given)})")


_REQUIREMENTS = {
    "bool_type": "must be true or false",
    "finite_number": "must be finite",
    "float_type": "must be a number",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "int_type": "must be an integer",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "list_type": "must be a list",
    "model_attributes_type": "must be a mapping",
    "model_type": "must be a mapping",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_long": "must have at most {max_length} values",
    "too_short": "must have at least {min_length} values",
}


def _requirement(error: ErrorDetails) -> str:
    text = _REQUIREMENTS.get(error["type"])
    if text is None:
        return error["msg"]
    limits = {key: f"{value:g}" if isinstance(value, float) else value for key, value in error.get("ctx", {}).items()}
    return text.format(**limits)


def _choice(given: Any, allowed: str) -> str:
    """`allowed` as pydantic writes it: quoted names with commas."""
    names = re.findall("'([^']+)'", allowed)
    return f"must be {allowed} (got {shown(given)}){_suggestion(given, names)}"


def _suggestion(given: Any, names: Sequence[str]) -> str:
    near = get_close_matches(given, names, n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _walk(section: type[Section], location: tuple[int | str, ...]) -> tuple[KeyPath, list[type[Section]]]:
    """The path of a pydantic error without the tags of unions, and the models that may stand there (for an unknown key:
    the model that does not have it)."""
    path: KeyPath = ()
    models = [section]
    is_union = is_key = False
    for part in location:
        if is_union and isinstance(part, str):
            names = [(model.__name__, getattr(model.model_fields.get("name"), "default", None)) for model in models]
            models = [model for model, tags in zip(models, names, strict=True) if part in tags]
            is_union = False
            continue
        path = (*path, part)
        if isinstance(part, int) or is_key:
            is_key = False
            continue
        field = models[0].model_fields.get(part) if models else None
        if field is None:
            break
        is_key = get_origin(field.annotation) is dict
        options = _options(field.annotation)
        models = [option for option in options if isinstance(option, type) and issubclass(option, Section)]
        is_union = len(options) > 1
    return path, models


def _options(annotation: Any) -> list[Any]:
    """The types that a value (or item of a list or mapping) may have, None left out."""
    origin = get_origin(annotation)
    if origin is Annotated or origin is list:
        return _options(get_args(annotation)[0])
    if origin is dict:
        return _options(get_args(annotation)[1])
    if origin is Union or origin is UnionType:
        return [option for argument in get_args(annotation) for option in _options(argument)]
    return [] if annotation is NoneType else [annotation]
