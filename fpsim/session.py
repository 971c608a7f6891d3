"""What a run works with from step to step: data, model, optimizer, emulation; how it is saved and taken up again."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

import accel
from fpsim import checkpoint
from fpsim.config import Config
from fpsim.config.schema import Emulation, Ledger
from fpsim.emulation import Emulator, emulate
from fpsim.errors import NonFiniteError, RunError
from fpsim.exchange import Exchange
from fpsim.files import sync, write_bytes
from fpsim.layers import PatternError
from fpsim.own import build_model, load_data
from fpsim.progress import Progress
from fpsim.ranges import BACKWARD, DATA, FORWARD, span
from fpsim.ranks import ALONE, Ranks
from fpsim.run_directory import (
    DISTRIBUTIONS_FILE,
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
    first_non_finite,
    generator,
    learning_rate_factor,
)

NORMS_OVER_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Session:
    """Everything that one run works with; built alike for a new run and for a resumed one, and on every rank.

    Rank 0 alone writes.
    """

    def __init__(self, config: Config, folder: Path, quiet: bool, ranks: Ranks = ALONE) -> None:
        self.config, self.folder, self.ranks = config, folder, ranks
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
        if ranks.number:  # rank 0 goes on with the numbers that a rank alone would draw
            torch.manual_seed(generator(config.seed, "rank", ranks.number).initial_seed())
        self.optimizer = build_optimizer(config.training.optimizer, self.model)
        self.emulator = self._emulate()
        self.exchange = Exchange(self.model, ranks, config.training.communication, config.seed)
        self.progress = Progress(config.name, self.total_steps, quiet or not ranks.is_first)
        self.step = 0
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.history: list[dict[str, Any]] = []
        self.epoch_loss, self.epoch_correct = 0.0, 0
        self.ledger_rows, self.product_rows, self.distribution_rows, self.weight_rows = 0, 0, 0, 0

    def _emulate(self) -> Emulator:
        spec = self.config.emulation or Emulation(ledger=Ledger())
        try:
            return emulate(
                self.model,
                spec,
                seed=self.config.seed,
                optimizer=self.optimizer,
                steps_per_epoch=self.steps_per_epoch,
                ranks=self.ranks,
            )
        except PatternError as error:
            raise self.config.problem(f"emulation.{error.path}", str(error)) from error

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know."""
        ranks, training = self.ranks.count, self.config.training
        if ranks == 1:
            told = "training.communication is without effect: one rank sends nothing"
            return [told] if training.communication is not None else []
        notes = [f"{ranks} ranks: footprint, traffic and products are sums over them, each with weights of its own"]
        if any(isinstance(module, NORMS_OVER_BATCH) for module in self.model.modules()):
            part = training.batch_size // training.micro_batches // ranks
            notes.append(
                f"{ranks} ranks: batch normalisation takes the mean and the variance of each rank's {part} samples, "
                f"and evaluates with those that rank 0 has averaged: one rank would train otherwise"
            )
        return notes

    def append(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add one line a row to a JSONL file of the run."""
        if self.ranks.is_first:
            append(self.folder / file, rows)

    def log(self, event: str, *, level: str = "info", **fields: Any) -> None:
        """Add what happened to the log."""
        if self.ranks.is_first:
            log(self.folder, event, level=level, **fields)

    def save(self, folder: Path) -> None:
        """Write a checkpoint below `folder`, and what is new of the ledger and of the tensors' distributions."""
        self._sum_ledgers()
        of_ranks = self._of_ranks() if self.ranks.count > 1 else None
        ledger, distributions = self.emulator.ledger, self.emulator.distributions
        self.append(LEDGER_FILE, ledger.to_data(self.ledger_rows))
        self.append(PRODUCTS_FILE, ledger.products_to_data(self.product_rows))
        self.append(DISTRIBUTIONS_FILE, distributions.rows[self.distribution_rows :])
        self.ledger_rows, self.product_rows = len(ledger.records), len(ledger.products)
        self.distribution_rows = len(distributions.rows)
        weight_pruning = self.emulator.weight_pruning
        if weight_pruning is not None:
            self.append(WEIGHTS_FILE, weight_pruning.rows[self.weight_rows :])
            self.weight_rows = len(weight_pruning.rows)
        if not self.ranks.is_first:
            return
        for name in LINES:
            sync(self.folder / name)  # as far as the checkpoint counts on them
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
            "exchange": self.exchange.state_dict(),
        }
        checkpoint.save(folder, self.step, self.model, self.optimizer, state, self.emulator.tensors(), of_ranks)

    def _sum_ledgers(self) -> None:
        """What is new in rank 0's ledger becomes the sum over the ranks."""
        if self.ranks.count == 1:
            return
        ledger = self.emulator.ledger
        new = ledger.to_data(self.ledger_rows), ledger.products_to_data(self.product_rows)
        told = [json.loads(one) for one in self.ranks.gathered(json.dumps(new).encode())]
        if self.ranks.is_first:
            summed = accel.Ledger.summed([accel.Ledger.from_data(*one) for one in told])
            ledger.records[self.ledger_rows :] = summed.records
            ledger.products[self.product_rows :] = summed.products

    def _of_ranks(self) -> dict[str, Tensor]:
        """What each rank has of its own: the state of its random generator, and what it has not sent."""
        own = {"torch_random_state": torch.get_rng_state(), **self.exchange.left_out}
        told = [load_safetensors(one) for one in self.ranks.gathered(save_safetensors(own))]
        return {f"{rank}.{name}": tensor for rank, tensors in enumerate(told) for name, tensor in tensors.items()}

    def save_samples(self) -> None:
        """Write the samples of the latest recorded step, if there are any since the run was begun or resumed."""
        if self.emulator.distributions.samples and self.ranks.is_first:
            write_bytes(self.folder / SAMPLES_FILE, save_safetensors(self.emulator.distributions.samples))

    def restore(self) -> None:
        """Take up the newest checkpoint that is whole, if there is any, and cut the files of the run back to it.

        Those that are damaged are set aside, with a warning. Raises RunError where none of several is whole.
        """
        with self.ranks.together():
            if self.ranks.is_first:
                self._tidy()
        with self.ranks.together():
            saved, _ = checkpoint.newest_whole(self.folder)
            if saved is not None:
                self._take_up(saved)

    def _tidy(self) -> None:
        """Leave the run directory as its newest whole checkpoint wants it."""
        checkpoint.clean(self.folder / "checkpoints")
        for path in self.folder.glob(".*.tmp"):  # of a kill in the middle of a write
            path.unlink()
        saved, damaged = checkpoint.newest_whole(self.folder)
        for path, reason in damaged:
            aside = checkpoint.set_aside(path)
            self.log("checkpoint damaged", level="warning", reason=reason, kept_as=str(aside))
            print(f"fpsim: warning: {reason}; going on from the checkpoint before it", file=sys.stderr)
        if saved is None:
            cut_back(self.folder, {})
            return
        with _fitting(saved):
            cut_back(self.folder, checkpoint.read_state(saved)["bytes"])

    def _take_up(self, saved: Path) -> None:
        self.load(saved)
        if self.ranks.count > 1:
            own = checkpoint.of_rank(saved, self.ranks.number)
            torch.set_rng_state(own.pop("torch_random_state"))
            self.exchange.left_out = own
        with _fitting(saved):
            rows_of(self.folder / METRICS_FILE)
            saved_ledger = ledger_of(self.folder)
            self.emulator.ledger.records[:] = saved_ledger.records
            self.emulator.ledger.products[:] = saved_ledger.products
            self.emulator.distributions.rows[:] = rows_of(self.folder / DISTRIBUTIONS_FILE)
            if self.emulator.weight_pruning is not None:
                self.emulator.weight_pruning.rows[:] = rows_of(self.folder / WEIGHTS_FILE)
                self.weight_rows = len(self.emulator.weight_pruning.rows)
        self.ledger_rows, self.product_rows = len(saved_ledger.records), len(saved_ledger.products)
        self.distribution_rows = len(self.emulator.distributions.rows)

    def load(self, saved: Path) -> None:
        """Take up a checkpoint, without the files of the run."""
        state, tensors = checkpoint.load(saved, self.model, self.optimizer)
        with _fitting(saved):
            self.step, self.seconds_before, self.history = state["step"], state["seconds"], state["history"]
            self.epoch_loss, self.epoch_correct = state["epoch_loss"], state["epoch_correct"]
            self.emulator.load_state_dict(state["emulator"], tensors)
            if "exchange" in state:  # not of a run of an earlier fpsim
                self.exchange.load(state["exchange"])


def set_learning_rate(session: Session) -> float:
    """Give the optimizer the learning rate of the session's next step, and return it."""
    training = session.config.training
    factor = learning_rate_factor(training.schedule, session.step, session.steps_per_epoch, session.total_steps)
    learning_rate = training.optimizer.learning_rate * factor
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def forward_and_backward(session: Session) -> tuple[float, int, int]:
    """The passes of the session's next step, whose gradients they leave in the parameters: the loss, how many labels
    were met, and of how many. Raises NonFiniteError for a loss that is not finite."""
    config, emulator, exchange, step = session.config, session.emulator, session.exchange, session.step
    batch, parts, ranks = config.training.batch_size, config.training.micro_batches, session.ranks
    epoch, position = divmod(step, session.steps_per_epoch)
    if position == 0:
        emulator.next_epoch()
        session.epoch_loss, session.epoch_correct = 0.0, 0
    own = [torch.arange(batch).view(parts, ranks.count, -1)[:, ranks.number].flatten()] if ranks.count > 1 else []
    with span(DATA):
        indices = data_order(config.seed, epoch, len(session.dataset.train))[position * batch : (position + 1) * batch]
        inputs, labels = session.dataset.train.batch(indices, generator(config.seed, "augment", step), *own)
    session.optimizer.zero_grad()
    loss_value, correct = 0.0, 0
    for number, (some, some_labels) in enumerate(zip(inputs.chunk(parts), labels.chunk(parts), strict=True), start=1):
        random_state = torch.get_rng_state()
        with exchange.pass_over(is_last=number == parts):
            try:
                with span(FORWARD):
                    logits = exchange.model(some)
                    loss = cross_entropy(logits, some_labels) / (parts * ranks.count)
                    value, right = ranks.totals(float(loss.detach()), count_correct(logits, some_labels))
                if not math.isfinite(value):
                    seen = {"loss": loss, "output": logits, "labels": some_labels}
                    raise NonFiniteError("loss", "(last)", step, seen)
            except NonFiniteError as error:
                emulator.restart_step()
                raise first_non_finite(session.model, some, random_state, step) or error from None
            with span(BACKWARD):
                loss.backward()
        loss_value += value
        correct += int(right)
    exchange.step = step + 1
    return loss_value, correct, labels.numel() * ranks.count


@contextmanager
def _fitting(saved: Path) -> Iterator[None]:
    """Raises RunError where a checkpoint is not one of this run."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise RunError(f"{saved}: does not fit this run: {error}") from error
