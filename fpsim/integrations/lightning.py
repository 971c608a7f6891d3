"""Emulation in Lightning's Trainer: `Trainer(callbacks=[EmulationCallback("fp8-training")])`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fpsim.config.schema import Emulation
from fpsim.emulation import Emulator
from fpsim.errors import RunError
from fpsim.integrations.attachment import Attachment

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "fpsim.integrations.lightning needs the package lightning: pip install 'fpsim[lightning]'"
    ) from error


class EmulationCallback(Callback):
    """Emulates a LightningModule while it trains, as `fpsim.emulate` does.

    The emulation begins when training does and steps with the optimizer, once for all accumulated batches; thresholds
    that are renewed once an epoch are so at every epoch of the Trainer. Its state, ledger included, lies in the
    Trainer's checkpoints, and its sparsities go to the Trainer's logger as `fpsim/...`.

    spec, seed: as of `fpsim.emulate`. module: name of the submodule that `training_step` calls, where it is not the
    LightningModule itself. keep: leave the emulation on after training.
    Raises RunError for several optimizers, where `training_step` does not call the module, under autocast, and what
    `emulate` raises.
    """

    def __init__(
        self, spec: Emulation | Mapping[str, Any] | str, seed: int = 0, *, module: str = "", keep: bool = False
    ) -> None:
        self.module = module
        self._attachment = Attachment(spec, seed, keep)
        self._saved: Mapping[str, Any] = {}
        self._step_hook: Any = None

    @property
    def handle(self) -> Emulator | None:
        """What `emulate` returned, with the ledger and the statistics; None before training has begun."""
        return self._attachment.handle

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise RunError(f"training has {len(trainer.optimizers)} optimizers: emulation takes one")
        (optimizer,), batches = trainer.optimizers, trainer.num_training_batches
        steps = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None
        self._attachment.attach(pl_module.get_submodule(self.module), optimizer, steps)
        if self._saved:
            self._attachment.load(json.loads(self._saved["state"]), self._saved["tensors"])
            self._saved = {}
        self._step_hook = optimizer.register_step_post_hook(lambda *_: self._attachment.step())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.handle is not None
        self.handle.next_epoch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log_dict(self._attachment.scalars)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None
        self._attachment.detach()

    def state_dict(self) -> dict[str, Any]:
        """The emulation's state as JSON, which loads with weights_only=True, and its tensors; {} before it begins."""
        if self.handle is None:
            return {}
        return {"state": json.dumps(self._attachment.state()), "tensors": self._attachment.tensors()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict
