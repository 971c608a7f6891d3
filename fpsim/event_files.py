"""Event files for TensorBoard in a run's folder `tensorboard`: what `tensorboard: true` adds to a run.

every step            loss, accuracy_percent, learning_rate, gradient_sparsity, weight_sparsity
every epoch           test_loss, test_accuracy_percent
when the ledger       of each layer with a format: sparsity and bits an element, in memory, of its gradient,
counts a step         activation and weight; bias and cosine of the pruned gradient (mean over micro-batches);
                      histograms of log2|x| over the nonzeros of samples of dY and of the weight
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from torch import Tensor

from fpsim.config import Config
from fpsim.emulation import Emulator
from fpsim.run_results import PASS_OF_ROLE
from fpsim.scales import sample
from fpsim.session import Session

FOLDER = "tensorboard"
STEP = ("loss", "accuracy_percent", "learning_rate", "gradient_sparsity", "weight_sparsity")
EPOCH = ("test_loss", "test_accuracy_percent")
BINS = 64


def check_installed(config: Config) -> None:
    """Raises ConfigError, with how to install it, where the configuration wants TensorBoard and it is missing."""
    if config.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            message = "needs the package tensorboard: pip install 'fpsim[tensorboard]'"
            raise config.problem("tensorboard", message) from error


@contextmanager
def event_files(session: Session) -> Iterator[EventFiles | None]:
    """What writes the session's event files, from its present step on; None where they are not wanted, and on ranks
    beyond the first.

    Events of later steps, which an interrupted run has left behind, are hidden by TensorBoard.
    """
    check_installed(session.config)
    if not session.config.tensorboard or not session.ranks.is_first:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = session.folder / FOLDER
    while list(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)  # files are read in the order of their names, which count seconds
    with SummaryWriter(str(folder), purge_step=session.step + 1 if folder.exists() else None) as writer:
        yield EventFiles(writer, session.emulator)


class EventFiles:
    """Writes what an emulator and the rows of the metrics say to a SummaryWriter."""

    def __init__(self, writer: Any, emulator: Emulator) -> None:
        self.writer, self.emulator = writer, emulator
        self._measured = self._tallies()

    def _tallies(self) -> dict[tuple[str, str], tuple[int, float]]:
        return {
            (name, key): (tally.count, tally.total)
            for name, pruning in self.emulator.pruning.items()
            for key, tally in (("bias", pruning.bias), ("cosine", pruning.cosine))
        }

    def step(self, row: dict[str, Any]) -> None:
        """Add a step that has just ended, given its row."""
        step = row["step"]
        self._scalars({key: row[key] for key in STEP}, step)
        records = self.emulator.ledger.records
        recorded = list(takewhile(lambda record: record.step == step - 1, reversed(records)))
        if not recorded:
            return
        stored = defaultdict(list)
        for record in recorded:
            if PASS_OF_ROLE.get(record.role) == record.pass_name and not record.stored.is_float32:
                stored[record.role, record.layer].append(record.stored)
        for (role, layer), tensors in stored.items():
            numel = sum(tensor.numel for tensor in tensors)
            zeros, bits = numel - sum(tensor.nonzeros for tensor in tensors), sum(tensor.nbits for tensor in tensors)
            if numel:
                values = {f"{role}_sparsity/{layer}": zeros / numel, f"{role}_bits_per_element/{layer}": bits / numel}
                self._scalars(values, step)
        before, self._measured = self._measured, self._tallies()
        for (layer, key), (count, total) in self._measured.items():
            old_count, old_total = before[layer, key]
            if count > old_count:
                self._scalars({f"gradient_{key}/{layer}": (total - old_total) / (count - old_count)}, step)
        for layer in self.emulator.distributions.layers_of(step - 1):
            self._histogram(f"log2_gradient/{layer}", self.emulator.distributions.samples[f"dY {layer}"], step)
        for layer in self.emulator.layers:
            self._histogram(f"log2_weight/{layer}", sample(self.emulator.masked_weight(layer)), step)

    def epoch(self, row: dict[str, Any]) -> None:
        """Add an epoch that has just ended, given its row."""
        self._scalars({key: row[key] for key in EPOCH}, row["step"])

    def flush(self) -> None:
        """Have what was added so far in the file, so that a checkpoint has nothing before it that could be lost."""
        self.writer.flush()

    def _scalars(self, values: Mapping[str, float | None], step: int) -> None:
        for tag, value in values.items():
            if value is not None:
                self.writer.add_scalar(tag, value, step)

    def _histogram(self, tag: str, x: Tensor, step: int) -> None:
        magnitudes = x.detach().abs().flatten()
        if (magnitudes := magnitudes[magnitudes > 0]).numel():
            self.writer.add_histogram(tag, magnitudes.log2(), step, bins=BINS)
