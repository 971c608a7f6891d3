"""Emulation in the Trainer of transformers: one callback, nothing else of the training changes.

    pip install 'fpsim[transformers]'
    python examples/huggingface_gpt.py

A GPT-2 of two narrow layers learns the next character of the Python language reference that Python brings, in emulated
FP8 with gradients pruned to 80 % (`fpsim presets fp8-training`). Its Conv1D layers, linear layers whose weights lie
the other way round, are emulated like linear ones. The callback steps with the optimizer, once for all accumulated
batches, and saves its state beside every checkpoint of the Trainer (fpsim.json, fpsim.safetensors), from which
`train(resume_from_checkpoint=...)` goes on. Leave fp16 and bf16 off: the emulation refuses autocast.
"""

import tempfile
from types import SimpleNamespace

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fpsim import data
from fpsim.integrations.huggingface import EmulationCallback

text = data.load(SimpleNamespace(name="text", path=None, context=32, train_limit=640, test_limit=64), seed=0)
windows, _ = text.train.batch(torch.arange(len(text.train)))

torch.manual_seed(0)
sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=text.classes, **sizes, bos_token_id=0, eos_token_id=0)
emulation = EmulationCallback("fp8-training")
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=16, learning_rate=0.005, use_cpu=True,
        logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    samples = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=samples, callbacks=[emulation])
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} in the end")
for row in emulation.handle.statistics:
    print(f"layer {row['layer']}: {100 * row['achieved_sparsity']:.1f} % of the gradient is zero")
traffic = emulation.handle.ledger.traffic_bits_per_step()["total"]
print(f"traffic of a step: {traffic['fp32'] / traffic['encoded']:.2f} times less than float32")
