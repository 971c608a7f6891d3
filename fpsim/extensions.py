"""Modules of the user's own that register codecs and policies: `fpsim --import MODULE ...`.

They come from the command line alone, or from the environment in which a process starts others; a file never decides
what is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fpsim.errors import ConfigError, Problem, place_of

ENVIRONMENT = "FPSIM_IMPORT"  # the modules, for processes that this one starts


def import_modules(names: Sequence[str]) -> None:
    """Import modules that lie in the current directory, or where Python looks. Raises ConfigError for one that cannot
    be imported."""
    if not names:
        return
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise _wrong(name, f"cannot be imported: {error}{place_of(error)}") from error
            raise _wrong(name, f"no module named {error.name!r} in {here} or where Python looks") from error
        except Exception as error:
            raise _wrong(name, f"cannot be imported: {type(error).__name__}: {error}{place_of(error)}") from error
    os.environ[ENVIRONMENT] = ",".join(dict.fromkeys([*imported(), *names]))


def import_of_environment() -> None:
    """Import what the process that started this one has imported. Raises ConfigError as `import_modules`."""
    import_modules(imported())


def imported() -> list[str]:
    """The modules that are imported so far."""
    return [name for name in os.environ.get(ENVIRONMENT, "").split(",") if name]


def _wrong(name: str, message: str) -> ConfigError:
    return ConfigError([Problem("--import", f"{name}: {message}")])
