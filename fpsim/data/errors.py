"""What goes wrong with data files."""

from __future__ import annotations

from pathlib import Path

from fpsim.errors import FpsimError

LISTED = 12  # names shown of a folder's contents


class DataError(FpsimError):
    """Files that are missing, truncated, of another layout, or that hold values out of range."""


class MissingError(DataError):
    """Files that are not there."""


def missing(path: Path, expected: str) -> MissingError:
    """The error for a path that does not exist: what was looked for, what is there instead, what is expected."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there.is_dir():
        names = sorted(p.name for p in there.iterdir())
        shown = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        found = f"{there} holds {shown or 'nothing'}"
    else:
        found = f"{there} is a file"
    return MissingError(f"{path}: not found; {found}; expected {expected}")
