"""Emulation in Lightning's Trainer: the same bits as in a loop written by hand, also accumulated and resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fpsim.emulation import Emulator, emulate
from fpsim.errors import RunError
from fpsim.integrations.lightning import EmulationCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|isinstance.treespec|LeafSpec|logging interval|litlogger)"),
]

EMULATION: dict[str, Any] = {
    "weights": {"format": "e4m3fn", "scale": "delayed", "rounding": "stochastic"},
    "activations": {"format": "e4m3fn", "scale": "amax"},
    "gradients": {
        "format": "e5m2",
        "rounding": "stochastic",
        "scale": "lognormal_mean",
        "pruning": {"sparsity": 0.7, "threshold": "lognormal"},
        "codec": "alpha",
    },
    "weight_pruning": {"name": "snr", "estimator": "ema"},
    "exclude": ["*last"],
    "ledger": {"every_steps": 2},
}
BATCHES, EPOCHS, BATCH = 4, 3, 8


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = {"first": nn.Linear(12, 24), "relu": nn.ReLU(), "middle": nn.Linear(24, 16), "last": nn.Linear(16, 3)}
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


def samples() -> TensorDataset:
    drawn = torch.Generator().manual_seed(5)
    x = torch.randn(BATCHES * BATCH, 12, generator=drawn)
    return TensorDataset(x, x[:, :3].argmax(1))


class Module(LightningModule):
    def __init__(self, through: str = "") -> None:
        super().__init__()
        self.net = network()
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, number: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x) if self.through == "net" else self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    off = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "accelerator": "cpu", **dict.fromkeys(off, False)}
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def loader() -> DataLoader[Any]:
    return DataLoader(samples(), batch_size=BATCH)


def by_hand(accumulate: int = 1) -> tuple[nn.Module, Emulator]:
    """The same training without Lightning."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = emulate(model, EMULATION, seed=11, optimizer=optimizer, steps_per_epoch=-(-BATCHES // accumulate))
    for _ in range(EPOCHS):
        handle.next_epoch()
        for number, (x, y) in enumerate(loader(), start=1):
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if number % accumulate == 0 or number == BATCHES:
                optimizer.step()
                handle.step()
                optimizer.zero_grad()
    handle.detach()
    return model, handle


def assert_same(module: nn.Module, handle: Emulator | None, model: nn.Module, expected: Emulator) -> None:
    assert handle is not None
    for found, wanted in zip(module.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert handle.ledger.to_data() == expected.ledger.to_data()
    assert handle.ledger.products_to_data() == expected.ledger.products_to_data()
    assert handle.distributions.rows == expected.distributions.rows
    assert {row["role"] for row in handle.distributions.rows} == {"X", "W", "dY", "dW"}
    assert handle.statistics == expected.statistics
    assert handle.state_dict() == expected.state_dict()
    assert handle.weight_pruning is not None
    assert expected.weight_pruning is not None
    assert handle.weight_pruning.rows == expected.weight_pruning.rows
    assert handle.weight_pruning.sparsity > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_same_as_by_hand(accumulate: int) -> None:
    module, callback = Module("net"), EmulationCallback(EMULATION, seed=11, module="net")
    trainer(callback, accumulate_grad_batches=accumulate).fit(module, loader())
    assert_same(module.net, callback.handle, *by_hand(accumulate))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())
    assert module.optimizers(use_pl_optimizer=False)._optimizer_step_post_hooks == {}  # type: ignore[union-attr]


def test_the_module_itself_is_emulated_by_default() -> None:
    module, callback = Module(), EmulationCallback(EMULATION, seed=11, keep=True)
    trainer(callback, max_epochs=1).fit(module, loader())
    assert callback.handle is not None
    assert callback.handle.step_number == BATCHES
    assert [row["layer"] for row in callback.handle.statistics] == ["net.first", "net.middle"]
    assert module.net[0]._forward_pre_hooks


class Stateful(DataLoader[Any]):
    """Goes on in the middle of an epoch."""

    done = 0

    def __iter__(self) -> Any:
        begin, self.done = self.done % BATCHES, self.done % BATCHES
        for batch in list(super().__iter__())[begin:]:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Saver(Callback):
    """Saves after a step, or an epoch."""

    def __init__(self, file: Path, step: int | None = None, epoch: int | None = None) -> None:
        self.file, self.step, self.epoch = file, step, epoch

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)

    def on_train_epoch_end(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("place", [{"epoch": 0}, {"step": 6}])
def test_a_resumed_training_ends_the_same(tmp_path: Path, place: dict[str, int]) -> None:
    """After an epoch, and in the middle of one with a loader that goes on there."""
    file = tmp_path / "saved.ckpt"
    callback = EmulationCallback(EMULATION, seed=11, module="net")
    trainer(callback, Saver(file, **place)).fit(Module("net"), Stateful(samples(), batch_size=BATCH))
    module, again = Module("net"), EmulationCallback(EMULATION, seed=11, module="net")
    trainer(again).fit(module, Stateful(samples(), batch_size=BATCH), ckpt_path=file, weights_only=True)
    assert_same(module.net, again.handle, *by_hand())


def test_sparsities_reach_the_logger(tmp_path: Path) -> None:
    callback = EmulationCallback(EMULATION, seed=11, module="net")
    logger = CSVLogger(tmp_path, name="", version="log")
    trainer(callback, logger=logger, log_every_n_steps=1).fit(Module("net"), loader())
    header, *rows = (tmp_path / "log" / "metrics.csv").read_text().splitlines()
    assert {"fpsim/gradient_sparsity", "fpsim/weight_sparsity"} <= set(header.split(","))
    assert len(rows) == BATCHES * EPOCHS


def test_a_module_that_is_not_called_is_refused() -> None:
    module, callback = Module("net"), EmulationCallback(EMULATION)
    with pytest.raises(RunError, match="the emulated module, a Module, is not what the training calls"):
        trainer(callback).fit(module, loader())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())


def test_autocast_and_several_optimizers_are_refused() -> None:
    with pytest.raises(RunError, match="runs under autocast: emulation works on float32 tensors"):
        trainer(EmulationCallback(EMULATION), precision="bf16-mixed").fit(Module(), loader())

    class Two(Module):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    two = Two()
    two.automatic_optimization = False
    with pytest.raises(RunError, match="training has 2 optimizers: emulation takes one"):
        trainer(EmulationCallback(EMULATION)).fit(two, loader())


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("lightning", "lightning", "lightning"), ("huggingface", "transformers", "transformers")],
)
def test_without_the_package_the_error_says_how_to_install_it(module: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import fpsim.integrations.{module}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1].startswith(f"ImportError: fpsim.integrations.{module} needs ")
    assert ran.stderr.splitlines()[-1].endswith(f"pip install 'fpsim[{extra}]'")
