"""What a run works with from step to step: data, model, optimizer, emulation; how it is saved and taken up again."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from fpsim import checkpoint
from fpsim.config import Config
from fpsim.config.schema import Emulation, Ledger
from fpsim.emulation import Emulator, emulate
from fpsim.errors import NonFiniteError, RunError
from fpsim.files import write_bytes
from fpsim.layers import PatternError
from fpsim.own import build_model, load_data
from fpsim.progress import Progress
from fpsim.run_directory import (
    GRADIENTS_FILE,
    LEDGER_FILE,
    LINES,
    METRICS_FILE,
    PRODUCTS_FILE,
    SAMPLES_FILE,
    WEIGHTS_FILE,
    append,
    cut_back,
    ledger_of,
    log,
    rows_of,
)
from fpsim.training import (
    build_optimizer,
    count_correct,
    cross_entropy,
    data_order,
    first_non_finite_layer,
    generator,
)


class Session:
    """Everything that one run works with; built alike for a new run and for a resumed one."""

    def __init__(self, config: Config, folder: Path, quiet: bool) -> None:
        self.config, self.folder = config, folder
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.dataset = load_data(config)
        self.steps_per_epoch = len(self.dataset.train) // config.training.batch_size
        if self.steps_per_epoch == 0:
            raise config.problem(
                "training.batch_size",
                f"larger than the training set of {len(self.dataset.train)} (got {config.training.batch_size})",
            )
        self.total_steps = self.steps_per_epoch * config.training.epochs
        self.model = build_model(config, self.dataset.input_shape, self.dataset.classes)
        self.model.train()
        self.optimizer = build_optimizer(config.training.optimizer, self.model)
        self.emulator = self._emulate()
        self.progress = Progress(config.name, self.total_steps, quiet)
        self.step = 0
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.history: list[dict[str, Any]] = []
        self.epoch_loss, self.epoch_correct = 0.0, 0
        self.ledger_rows, self.product_rows, self.gradient_rows, self.weight_rows = 0, 0, 0, 0

    def _emulate(self) -> Emulator:
        spec = self.config.emulation or Emulation(ledger=Ledger())
        try:
            return emulate(
                self.model,
                spec,
                seed=self.config.seed,
                optimizer=self.optimizer,
                steps_per_epoch=self.steps_per_epoch,
            )
        except PatternError as error:
            raise self.config.problem(f"emulation.{error.path}", str(error)) from error

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def save(self, folder: Path) -> None:
        """Write a checkpoint below `folder`, and what is new of the ledger and of the gradients' distributions."""
        ledger, distributions = self.emulator.ledger, self.emulator.distributions
        append(self.folder / LEDGER_FILE, ledger.to_data(self.ledger_rows))
        append(self.folder / PRODUCTS_FILE, ledger.products_to_data(self.product_rows))
        append(self.folder / GRADIENTS_FILE, distributions.rows[self.gradient_rows :])
        self.ledger_rows, self.product_rows = len(ledger.records), len(ledger.products)
        self.gradient_rows = len(distributions.rows)
        weight_pruning = self.emulator.weight_pruning
        if weight_pruning is not None:
            append(self.folder / WEIGHTS_FILE, weight_pruning.rows[self.weight_rows :])
            self.weight_rows = len(weight_pruning.rows)
        state = {
            "seconds": self.seconds,
            "history": self.history,
            "epoch_loss": self.epoch_loss,
            "epoch_correct": self.epoch_correct,
            "bytes": {name: (self.folder / name).stat().st_size for name in LINES},
            "input_shape": self.dataset.input_shape,
            "classes": self.dataset.classes,
            "steps_per_epoch": self.steps_per_epoch,
            "emulator": self.emulator.state_dict(),
        }
        checkpoint.save(folder, self.step, self.model, self.optimizer, state, self.emulator.tensors())

    def save_samples(self) -> None:
        """Write the samples of the latest recorded step, if there are any since the run was begun or resumed."""
        if self.emulator.distributions.samples:
            write_bytes(self.folder / SAMPLES_FILE, save_safetensors(self.emulator.distributions.samples))

    def restore(self) -> None:
        """Take up the newest checkpoint that is whole, if there is any, and cut the files of the run back to it.

        Those that are damaged are set aside, with a warning. Raises RunError where none of several is whole.
        """
        checkpoint.clean(self.folder / "checkpoints")
        for path in self.folder.glob(".*.tmp"):  # of a kill in the middle of a write
            path.unlink()
        saved, damaged = checkpoint.newest_whole(self.folder)
        for path, reason in damaged:
            aside = checkpoint.set_aside(path)
            log(self.folder, "checkpoint damaged", level="warning", reason=reason, kept_as=str(aside))
            print(f"fpsim: warning: {reason}; going on from the checkpoint before it", file=sys.stderr)
        if saved is None:
            cut_back(self.folder, {})
            return
        state = self.load(saved)
        with _fitting(saved):
            cut_back(self.folder, state["bytes"])
            rows_of(self.folder / METRICS_FILE)
            saved_ledger = ledger_of(self.folder)
            self.emulator.ledger.records[:] = saved_ledger.records
            self.emulator.ledger.products[:] = saved_ledger.products
            self.emulator.distributions.rows[:] = rows_of(self.folder / GRADIENTS_FILE)
            if self.emulator.weight_pruning is not None:
                self.emulator.weight_pruning.rows[:] = rows_of(self.folder / WEIGHTS_FILE)
                self.weight_rows = len(self.emulator.weight_pruning.rows)
        self.ledger_rows, self.product_rows = len(saved_ledger.records), len(saved_ledger.products)
        self.gradient_rows = len(self.emulator.distributions.rows)

    def load(self, saved: Path) -> dict[str, Any]:
        """Take up a checkpoint, without the files of the run; returns its state."""
        state, tensors = checkpoint.load(saved, self.model, self.optimizer)
        with _fitting(saved):
            self.step, self.seconds_before, self.history = state["step"], state["seconds"], state["history"]
            self.epoch_loss, self.epoch_correct = state["epoch_loss"], state["epoch_correct"]
            self.emulator.load_state_dict(state["emulator"], tensors)
        return state


def forward_and_backward(session: Session) -> tuple[float, int, int]:
    """The passes of the session's next step, whose gradients they leave in the parameters: the loss, how many labels
    were met, and of how many. Raises NonFiniteError for a loss that is not finite."""
    config, model, emulator, step = session.config, session.model, session.emulator, session.step
    batch, parts = config.training.batch_size, config.training.micro_batches
    epoch, position = divmod(step, session.steps_per_epoch)
    if position == 0:
        emulator.next_epoch()
        session.epoch_loss, session.epoch_correct = 0.0, 0
    indices = data_order(config.seed, epoch, len(session.dataset.train))[position * batch : (position + 1) * batch]
    inputs, labels = session.dataset.train.batch(indices, generator(config.seed, "augment", step))
    session.optimizer.zero_grad()
    loss_value, correct = 0.0, 0
    for some, some_labels in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
        random_state = torch.get_rng_state()
        try:
            logits = model(some)
            loss = cross_entropy(logits, some_labels) / parts
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError("loss", "(last)", step)
        except NonFiniteError as error:
            emulator.restart_step()
            layer = first_non_finite_layer(model, some, random_state)
            raise error if layer is None else NonFiniteError("output", layer, step) from None
        loss.backward()
        loss_value += value
        correct += count_correct(logits, some_labels)
    return loss_value, correct, labels.numel()


@contextmanager
def _fitting(saved: Path) -> Iterator[None]:
    """Raises RunError where a checkpoint is not one of this run."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise RunError(f"{saved}: does not fit this run: {error}") from error
