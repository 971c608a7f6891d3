"""Emulation in the Trainer of transformers: `Trainer(..., callbacks=[EmulationCallback("fp8-training")])`.

Beside each checkpoint that the Trainer saves lie

    fpsim.json           the state of the emulation, its ledger, and the SHA-256 of the model's weights
    fpsim.safetensors    masks and averages of the weights
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from fpsim.checkpoint import own
from fpsim.config.schema import Emulation
from fpsim.emulation import Emulator
from fpsim.errors import RunError
from fpsim.files import write_bytes, write_json
from fpsim.integrations.attachment import Attachment, digest

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import has_length
except ImportError as error:
    raise ImportError(
        "fpsim.integrations.huggingface needs transformers and accelerate: pip install 'fpsim[transformers]'"
    ) from error

STATE_FILE, TENSORS_FILE = "fpsim.json", "fpsim.safetensors"


class EmulationCallback(TrainerCallback):
    """Emulates a model while the Trainer trains it, as `fpsim.emulate` does.

    The emulation begins when training does and steps with the optimizer, once for all accumulated batches; thresholds
    that are renewed once an epoch are so at every epoch of the Trainer. Its sparsities are logged as `fpsim/...`:
    reporters that the Trainer itself made (TensorBoard) log before its `callbacks`, and see them only where this one
    is put before them, `trainer.callback_handler.callbacks.insert(0, callback)`.

    spec, seed: as of `fpsim.emulate`. keep: leave the emulation on after training. resume_from: the checkpoint that
    training goes on from, where that lies neither in the Trainer's output_dir nor in its arguments.
    Raises RunError for a checkpoint without the emulation's state, under autocast, and what `emulate` raises.
    """

    def __init__(
        self,
        spec: Emulation | Mapping[str, Any] | str,
        seed: int = 0,
        *,
        keep: bool = False,
        resume_from: str | Path | None = None,
    ) -> None:
        self.resume_from = resume_from
        self._attachment = Attachment(spec, seed, keep)
        self._epoch: int | None = None

    @property
    def handle(self) -> Emulator | None:
        """What `emulate` returned, with the ledger and the statistics; None before training has begun."""
        return self._attachment.handle

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        model, optimizer, loader = rest["model"], rest["optimizer"], rest["train_dataloader"]
        steps = math.ceil(len(loader) / args.gradient_accumulation_steps) if has_length(loader) else None
        self._attachment.attach(model, getattr(optimizer, "optimizer", optimizer), steps)
        self._epoch = None
        if state.global_step:
            self._restore(args, state, model)

    def _restore(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        given = self.resume_from, args.resume_from_checkpoint, _checkpoint(args, state)
        places = [Path(place) for place in given if isinstance(place, str | Path)]
        weights = digest(model)
        for place in places:
            try:
                saved = json.loads((place / STATE_FILE).read_text(encoding="utf-8"))
                if saved["weights"] != weights:
                    continue
                tensors = load_file(place / TENSORS_FILE)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                raise RunError(f"{place}: the state of the emulation cannot be read: {error}") from error
            self._attachment.load(saved["state"], tensors)
            self._epoch = saved["epoch"]
            return
        looked = ", ".join(map(str, places))
        message = f"training goes on from step {state.global_step}, but no {STATE_FILE} of these weights is in {looked}"
        raise RunError(f"{message}: give the checkpoint as resume_from")

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """A new epoch, or the rest of one from which training goes on."""
        assert self.handle is not None
        if self._epoch != int(state.epoch):
            self.handle.next_epoch()
        self._epoch = int(state.epoch)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self._epoch = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        self._attachment.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        logs = rest["logs"]
        if "loss" in logs:
            logs.update(self._attachment.scalars)
            state.log_history[-1].update(self._attachment.scalars)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        if state.is_world_process_zero and not state.is_hyper_param_search:
            place = _checkpoint(args, state)
            write_bytes(place / TENSORS_FILE, save(own(self._attachment.tensors())))
            weights, content = digest(rest["model"]), self._attachment.state()
            write_json(place / STATE_FILE, {"weights": weights, "epoch": self._epoch, "state": content})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self._attachment.detach()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
