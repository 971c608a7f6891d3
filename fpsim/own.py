"""Networks and data, the built-in ones or the user's own: `name: my.module:function` in a configuration.

The folder of the file that names the module, and the current directory, come first on `sys.path`, as a script's folder
does. A run notes in `env.json` where it found its modules, and looks there first when it goes on.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from torch import nn

import models
from fpsim import data
from fpsim.config import Config
from fpsim.config.schema import Own, OwnData, OwnModel
from fpsim.errors import ConfigError, place_of
from fpsim.extensions import imported
from fpsim.run_directory import CONFIG_FILE, ENVIRONMENT_FILE


def build_model(config: Config, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network of a configuration, freshly initialised from torch's global generator, for those data.

    Raises ConfigError for what cannot be imported, for options that do not fit, for whatever the user's function
    raises, and for what it returns unless that is an nn.Module.
    """
    if isinstance(config.model, OwnModel):
        return _built(config, "model", {"input_shape": input_shape, "classes": classes}, nn.Module, "an nn.Module")
    options = config.model.model_dump(exclude={"name"})
    try:
        return models.build(config.model.name, input_shape=input_shape, classes=classes, **options)
    except ValueError as error:
        raise config.problem("model", str(error)) from error
    except RuntimeError as error:  # PyTorch's, for a tensor that is larger than the memory
        raise config.problem("model", f"cannot be built: {str(error).splitlines()[0]}") from error


def load_data(config: Config) -> data.Dataset:
    """The data of a configuration. Raises ConfigError for those that are not there, and as `build_model` does."""
    if isinstance(config.data, OwnData):
        given = {"seed": config.seed}
        loaded: data.Dataset = _built(config, "data", given, data.Dataset, "an fpsim.data.Dataset")
        for name in ("train", "test"):
            if not isinstance(split := getattr(loaded, name), data.Split):
                message = f"{config.data.name} returned a Dataset whose {name} is {_a(split)}, not an fpsim.data.Split"
                raise config.problem("data.name", message)
        return loaded
    try:
        return data.load(config.data, config.seed)
    except data.DataError as error:
        key = next((f"data.{key}" for key in ("root", "path") if hasattr(config.data, key)), "data")
        raise config.problem(key, str(error)) from error


def modules_of(config: Config) -> dict[str, dict[str, str]]:
    """The user's own modules of a configuration whose model and data have been built, and those that were imported to
    register something: by name, the folder from which each was imported, its file, and the SHA-256 of that file. What a
    module imports in its turn is not among them."""
    names = {section.name.partition(":")[0] for section in (config.data, config.model) if isinstance(section, Own)}
    return {name: _about(name) for name in sorted({*names, *imported()})}


def _about(name: str) -> dict[str, str]:
    file = Path(sys.modules[name].__file__ or "")
    parents = name.count(".") + (file.name == "__init__.py")
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    return {"folder": str(file.parents[parents]), "file": str(file), "sha256": digest}


def _built(config: Config, key: str, given: dict[str, Any], kind: type, what: str) -> Any:
    """What the function of the section `key` returns, called with `given` and the section's options."""
    section: Own = getattr(config, key)
    function, options = _function(config, key), {**given, **section.options}
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function in C
        signature = None
    if signature is not None:
        _check_options(config, key, signature, options)
    try:
        built = function(**options)
    except Exception as error:
        raise _raised(config, key, f"{section.name} raised", error) from error
    if not isinstance(built, kind):
        raise config.problem(f"{key}.name", f"{section.name} returned {_a(built)}, not {what}")
    return built


def _function(config: Config, key: str) -> Callable[..., Any]:
    name, _, path = getattr(config, key).name.partition(":")
    noted = _noted(config.file_of(f"{key}.name"), name)
    _make_importable(config, key, name, [] if noted is None else [Path(noted["folder"])])
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise config.problem(f"{key}.name", f"no module named {error.name!r}") from error
        raise _raised(config, key, f"{name} cannot be imported:", error) from error
    if noted is not None and (now := _about(name))["sha256"] != noted["sha256"]:
        print(f"fpsim: warning: {now['file']} is not what it was when the run was begun", file=sys.stderr)
    where = name
    for part in path.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise config.problem(f"{key}.name", f"{where} has no attribute {part!r}{hint}")
        found, where = getattr(found, part), f"{where}.{part}"
    if not callable(found):
        raise config.problem(f"{key}.name", f"{name}:{path} is {_a(found)}, not a function")
    return found


def _make_importable(config: Config, key: str, name: str, folders: list[Path]) -> None:
    """Put the folders, the configuration's, and the current one first on the path. Raises ConfigError where a module
    that lies there has the name of another one that is in use."""
    file = config.file_of(f"{key}.name")
    folders = [*folders, *([] if file is None else [file.parent.absolute()]), Path.cwd()]
    for folder in reversed(folders):
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    package = name.partition(".")[0]
    spec = PathFinder.find_spec(package, [str(folder) for folder in folders])
    meant, loaded = getattr(spec, "origin", None), getattr(sys.modules.get(package), "__file__", None)
    if meant is not None and loaded is not None and not os.path.samefile(meant, loaded):
        message = f"{meant} cannot be imported: another module {package!r} is in use, {loaded}"
        raise config.problem(f"{key}.name", message)


def _noted(file: Path | None, name: str) -> dict[str, str] | None:
    """Where the run whose configuration the file is found a module; None where it is not one's, or says nothing."""
    if file is None or file.name != CONFIG_FILE:
        return None
    try:
        environment = json.loads(file.with_name(ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        noted: dict[str, str] | None = environment.get("modules", {}).get(name)
    except (OSError, ValueError, AttributeError):
        return None
    return noted


def _check_options(config: Config, key: str, signature: inspect.Signature, options: dict[str, Any]) -> None:
    """Raises ConfigError, at an option where it is one, for a function that cannot be called with the options."""
    name, given = getattr(config, key).name, getattr(config, key).given
    allowed = signature.parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in allowed.values()):
        for option in options:
            if option in allowed:
                continue
            if option in given:
                raise config.problem(f"{key}.name", f"{name} must take the argument {option!r}")
            near = get_close_matches(option, [one for one in allowed if one not in given], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise config.problem(f"{key}.{option}", f"unknown option of {name}{hint}")
    try:
        signature.bind(**options)
    except TypeError as error:
        raise config.problem(key, f"{name}: {error}") from error


def _raised(config: Config, key: str, what: str, error: Exception) -> ConfigError:
    """One line for an exception in the user's code, with the place where it was raised."""
    text = " ".join(str(getattr(error, "msg", error) or "").split())
    return config.problem(f"{key}.name", f"{what} {type(error).__name__}{': ' if text else ''}{text}{place_of(error)}")


def _a(value: Any) -> str:
    """The kind of a value, with its article."""
    kind = type(value).__name__
    return "None" if value is None else f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
