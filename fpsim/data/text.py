"""Text, character by character: a local file, or the reference of the Python language that comes with Python."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fpsim.data.dataset import Dataset, limited
from fpsim.data.errors import DataError, missing

TEST_SHARE = 10  # the last tenth of the text is the test split


@dataclass(frozen=True)
class TextSplit:
    """A stretch of text: codes int64 [N] of its characters; sample i begins at starts[i] and has `context` of them."""

    codes: Tensor
    starts: Tensor
    context: int

    def __len__(self) -> int:
        return len(self.starts)

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.batch`. Nothing is augmented."""
        indices = indices if chosen is None else indices[chosen]
        windows = self.codes[self.starts[indices, None] + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]


def read(path: Path | None, context: int, train_limit: int | None, test_limit: int | None) -> Dataset:
    """The text of a UTF-8 file (None: Python's reference) in samples of `context` characters that follow one another.

    A label is the place of a character among all different ones of the text, sorted.
    """
    text, source = _python_reference() if path is None else (_decoded(path), path.name)
    characters = sorted(set(text))
    place = {character: i for i, character in enumerate(characters)}
    codes = torch.tensor([place[character] for character in text], dtype=torch.int64)
    test_count = len(codes) // TEST_SHARE
    if test_count <= context:
        least = TEST_SHARE * (context + 1)
        message = f"of {len(codes):,} characters is too short: a context of {context} needs at least {least:,}"
        raise DataError(f"{source} {message}")
    train = _split(codes[:-test_count], context, train_limit)
    test = _split(codes[-test_count:], context, test_limit)
    description = (
        f"text: {source}; {len(codes):,} characters, {len(characters)} different ones; "
        f"{len(train):,} train / {len(test):,} test samples of {context}"
    )
    return Dataset("text", train, test, len(characters), (context,), description, labels_per_sample=context)


def _split(codes: Tensor, context: int, limit: int | None) -> TextSplit:
    count = (len(codes) - 1) // context
    return TextSplit(codes, context * torch.from_numpy(limited(count, limit)), context)


def _decoded(path: Path) -> str:
    if not path.is_file():
        raise missing(path, "data.path to be a text file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error


def _python_reference() -> tuple[str, str]:
    """The language reference that Python's `help` shows (licence: PSF), and where it comes from.

    Its topics repeat each other: every paragraph comes once, so that the test split holds nothing of the train split.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraphs.values()), f"language reference shipped with Python {platform.python_version()}"
