"""What the callbacks share: `emulate` on the model of a trainer, and its state for the trainer's checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import accel
from fpsim.config.schema import Emulation
from fpsim.emulation import Emulator, emulate
from fpsim.errors import RunError


class Attachment:
    """The emulation of a training that another library runs. handle: as `emulate` returned it, None before that;
    it stays when it is detached. scalars: of the latest step, for a logger. keep: `detach` leaves the hooks."""

    def __init__(self, spec: Emulation | Mapping[str, Any] | str, seed: int, keep: bool) -> None:
        self.spec, self.seed, self.keep = spec, seed, keep
        self.handle: Emulator | None = None
        self.scalars: dict[str, float] = {}
        self._has_run = False
        self._watch: Any = None

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_epoch: int | None) -> Emulator:
        """Emulate the model from now on, in place of an earlier one.

        Raises RunError where several processes train, and whatever `emulate` raises.
        """
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise RunError(f"{distributed.get_world_size()} processes train this model: emulation takes one")
        self._remove()
        self.handle = emulate(model, self.spec, seed=self.seed, optimizer=optimizer, steps_per_epoch=steps_per_epoch)
        self._watch = model.register_forward_pre_hook(self._runs)
        return self.handle

    def _runs(self, model: nn.Module, arguments: Any) -> None:
        self._has_run = True

    def step(self) -> None:
        """The optimizer has made a step, and the gradients are still there. Raises RunError where the model was not
        called since the one before."""
        assert self.handle is not None
        if not self._has_run:
            name = type(self.handle.model).__name__
            raise RunError(f"the emulated module, a {name}, is not what the training calls: name the one that is")
        self._has_run = False
        self.handle.step()
        pruner = self.handle.weight_pruning
        found = {
            "fpsim/gradient_sparsity": self.handle.gradient_sparsity,
            "fpsim/weight_sparsity": None if pruner is None else pruner.sparsity,
        }
        self.scalars = {name: value for name, value in found.items() if value is not None}

    def detach(self) -> None:
        """Remove the hooks, unless they are to be kept."""
        if not self.keep:
            self._remove()

    def _remove(self) -> None:
        if self.handle is not None:
            self.handle.detach()
            self._watch.remove()

    def state(self) -> dict[str, Any]:
        """All that the handle has come to, ledger and distributions included, as plain data; {} before it exists."""
        if self.handle is None:
            return {}
        pruner = self.handle.weight_pruning
        return {
            "emulator": self.handle.state_dict(),
            "ledger": self.handle.ledger.to_data(),
            "products": self.handle.ledger.products_to_data(),
            "distributions": self.handle.distributions.rows,
            "weights": None if pruner is None else pruner.rows,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that belong to `state`."""
        return {} if self.handle is None else self.handle.tensors()

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state` and `tensors` of an attachment to such a model. Raises RunError where they do not fit."""
        assert self.handle is not None
        try:
            self.handle.load_state_dict(state["emulator"], tensors)
            ledger = accel.Ledger.from_data(state["ledger"], state["products"])
            self.handle.ledger.records[:], self.handle.ledger.products[:] = ledger.records, ledger.products
            self.handle.distributions.rows[:] = state["distributions"]
            if self.handle.weight_pruning is not None:
                self.handle.weight_pruning.rows[:] = state["weights"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"the checkpoint's state of the emulation does not fit this training: {error}") from error


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, in hex."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
