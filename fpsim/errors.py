"""The errors that fpsim shows to its users instead of a traceback."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDEST_SOURCE_LINE = 160
WIDEST_MESSAGE = 600
MOST_SHOWN = 50
NOT_THE_USERS = (
    "<frozen ",
    *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
    str(Path(__file__).parent),
)  # where files lie that are no code of the user's


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where: `line` and `column` count from 1; None where there is no file."""

    path: str
    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None
    source_line: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        summary = _one_line(": ".join(part for part in (place, self.path, self.message) if part))
        if self.source_line is None or self.column is None or self.column > WIDEST_SOURCE_LINE:
            return summary
        source = "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in self.source_line[:WIDEST_SOURCE_LINE])
        indent = "".join("\t" if c == "\t" else " " for c in self.source_line[: self.column - 1])
        return f"{summary}\n    {source}\n    {indent}^"


def _one_line(text: str) -> str:
    """A text that a terminal shows as one line of bearable length: what is not printable is escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    half = WIDEST_MESSAGE // 2
    return text if len(text) <= WIDEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


class FpsimError(Exception):
    """Base of the errors that end a command with one clear message."""


class ConfigError(FpsimError):
    """The user's mistake (exit code 2). `problems` holds every one that was found; the text shows the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:MOST_SHOWN]]
        if len(self.problems) > MOST_SHOWN:
            lines.append(f"... and {len(self.problems) - MOST_SHOWN} more")
        super().__init__("\n".join(lines))


class RunError(FpsimError):
    """A run that failed (exit code 1)."""


class ToldError(FpsimError):
    """What ends this rank, and another one tells: this one ends silently, with exit code 0, so that a launcher leaves
    the other the time to do so."""


class NonFiniteError(RunError):
    """A NaN or an infinity where training cannot go on.

    layer, role, step: where it was seen first; role is activation, weight, output, gradient, weight gradient or loss
    (or another parameter of the layer, or its gradient). tensors: copies of the tensor of that role, as it was seen,
    and of those it came from. nan, inf, elements: counts of the tensor.
    """

    def __init__(self, role: str, layer: str, step: int, tensors: Mapping[str, Any]) -> None:
        self.layer, self.role, self.step = layer, role, step
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        tensor = self.tensors[role]
        self.nan, self.inf, self.elements = int(tensor.isnan().sum()), int(tensor.isinf().sum()), tensor.numel()
        counts = f"{self.nan:,} NaN, {self.inf:,} inf of {self.elements:,}"
        super().__init__(f"{role} of layer {layer!r} is not finite at step {step} ({counts})")


def place_of(error: BaseException) -> str:
    """Where an exception of the user's code was raised, as " (FILE:LINE)"; "" where that is not known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_THE_USERS)] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def reason_of(error: OSError) -> str:
    """What an OSError says, in one line: the file, where it has one, and why."""
    return f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
