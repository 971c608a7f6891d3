"""Emulation in the Trainer of transformers: the same bits as in a loop by hand, also accumulated and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from fpsim.emulation import Emulator, emulate
from fpsim.errors import RunError
from fpsim.integrations.huggingface import EmulationCallback
from fpsim.training import cross_entropy

BATCHES, EPOCHS, BATCH, LENGTH, WORDS = 4, 2, 4, 8, 24
EMULATION: dict[str, Any] = {
    "weights": {"format": "e4m3fn", "scale": "amax", "granularity": "channel", "rounding": "stochastic"},
    "activations": {"format": "e4m3fn", "scale": "delayed"},
    "gradients": {
        "format": "e5m2",
        "rounding": "stochastic",
        "scale": "lognormal_mean",
        "pruning": {"sparsity": 0.7, "threshold": "lognormal"},
        "codec": "alpha",
    },
    "weight_pruning": {"name": "snr", "estimator": "ema"},
    "exclude": ["last"],
    "ledger": {"every_steps": 3},
}


def gpt2(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, **tokens, use_cache=False))  # type: ignore[no-any-return]


def bert() -> nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **rates, intermediate_size=32, max_position_embeddings=LENGTH, num_labels=3)
    return BertForSequenceClassification(config)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "bert": bert, "dropout": partial(gpt2, 0.1)}


def samples(name: str) -> list[dict[str, Tensor]]:
    words = torch.randint(WORDS, (BATCHES * BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    labels = words[:, 0] % 3 if name == "bert" else words
    return [{"input_ids": text, "labels": label} for text, label in zip(words, labels, strict=True)]


def trainer(name: str, place: Path, callback: TrainerCallback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(place),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.01,
        "optim": "adamw_torch",
        "max_grad_norm": 0.5,
        "seed": 9,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    arguments = TrainingArguments(**{**defaults, **options})
    return Trainer(
        MODELS[name](), arguments, train_dataset=samples(name), callbacks=[callback],
        compute_loss_func=lambda outputs, labels, num_items_in_batch: cross_entropy(outputs.logits, labels),
    )  # fmt: skip


def by_hand(name: str, accumulate: int = 1) -> tuple[nn.Module, Emulator]:
    """The same training without the Trainer."""
    model, rate, data = MODELS[name](), 0.01, samples(name)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    per_epoch = -(-BATCHES // accumulate)
    handle = emulate(model, EMULATION, seed=3, optimizer=optimizer, steps_per_epoch=per_epoch)
    done = 0
    for _ in range(EPOCHS):
        handle.next_epoch()
        for number in range(1, BATCHES + 1):
            some = data[(number - 1) * BATCH : number * BATCH]
            batch = {key: torch.stack([one[key] for one in some]) for key in some[0]}
            labels = batch.pop("labels")
            cross_entropy(model(**batch).logits, labels).backward()
            if number % accumulate == 0 or number == BATCHES:
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - done / (EPOCHS * per_epoch))
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                handle.step()
                optimizer.zero_grad()
                done += 1
    handle.detach()
    return model, handle


def assert_same(model: nn.Module, handle: Emulator | None, expected_model: nn.Module, expected: Emulator) -> None:
    assert handle is not None
    found, wanted = model.state_dict(), expected_model.state_dict()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    assert handle.ledger.to_data() == expected.ledger.to_data()
    assert handle.ledger.products_to_data() == expected.ledger.products_to_data()
    assert handle.distributions.rows == expected.distributions.rows
    assert {row["role"] for row in handle.distributions.rows} == {"X", "W", "dY", "dW"}
    assert handle.state_dict() == expected.state_dict()
    assert handle.statistics == expected.statistics


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_training_is_the_same_as_by_hand(name: str, tmp_path: Path) -> None:
    callback = EmulationCallback(EMULATION, seed=3)
    training = trainer(name, tmp_path, callback)
    training.train()
    assert_same(training.model, callback.handle, *by_hand(name))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in training.model.modules())
    assert callback.handle is not None
    assert len(callback.handle.statistics) == len(callback.handle.layers) - 1
    logs = [entry for entry in training.state.log_history if "loss" in entry]
    assert len(logs) == BATCHES * EPOCHS
    assert all(0.4 < entry["fpsim/gradient_sparsity"] < 1 for entry in logs)
    assert logs[-1]["fpsim/weight_sparsity"] > 0


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    callback = EmulationCallback(EMULATION, seed=3)
    training = trainer("bert", tmp_path, callback, gradient_accumulation_steps=3)
    training.train()
    assert_same(training.model, callback.handle, *by_hand("bert", 3))


@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_training_ends_the_same(step: int, tmp_path: Path) -> None:
    """In the middle of an epoch, and at its end; a checkpoint elsewhere is told by `resume_from`."""
    whole = EmulationCallback(EMULATION, seed=3)
    first = trainer("dropout", tmp_path / "a", whole, save_strategy="steps", save_steps=1)
    first.train()
    saved = tmp_path / "a" / f"checkpoint-{step}"
    assert {"fpsim.json", "fpsim.safetensors"} < {path.name for path in saved.iterdir()}
    again = EmulationCallback(EMULATION, seed=3)
    second = trainer("dropout", tmp_path / "a", again)
    second.train(resume_from_checkpoint=str(saved))
    assert whole.handle is not None
    assert_same(second.model, again.handle, first.model, whole.handle)

    moved = shutil.move(saved, tmp_path / "moved")
    lost = trainer("dropout", tmp_path / "a", EmulationCallback(EMULATION, seed=3))
    with pytest.raises(RunError, match=r"no fpsim\.json of these weights is in .*: give the checkpoint as resume_from"):
        lost.train(resume_from_checkpoint=str(moved))
    shutil.copytree(tmp_path / "a" / "checkpoint-1", saved)  # of other weights: not taken
    third = EmulationCallback(EMULATION, seed=3, resume_from=moved)
    training = trainer("dropout", tmp_path / "a", third)
    training.train(resume_from_checkpoint=str(moved))
    assert_same(training.model, third.handle, first.model, whole.handle)

    (moved / "fpsim.json").write_text(json.dumps({"weights": 3})[:-1])
    damaged = trainer("dropout", tmp_path / "a", EmulationCallback(EMULATION, resume_from=moved))
    with pytest.raises(RunError, match="the state of the emulation cannot be read"):
        damaged.train(resume_from_checkpoint=str(moved))


def test_autocast_is_refused(tmp_path: Path) -> None:
    training = trainer("bert", tmp_path, EmulationCallback(EMULATION), bf16=True)
    with pytest.raises(RunError, match="autocast"):
        training.train()


def test_the_emulation_can_be_kept(tmp_path: Path) -> None:
    callback = EmulationCallback("fp8-training", keep=True)
    training = trainer("bert", tmp_path, callback, max_steps=1)
    training.train()
    assert any(one._forward_pre_hooks for one in training.model.modules())
    assert callback.handle is not None
    callback.handle.detach()


def test_conv1d_is_a_linear_layer_turned_round() -> None:
    """The same output, gradients and ledger, whichever way its weight lies."""
    torch.manual_seed(0)
    turned, linear = nn.Sequential(Conv1D(6, 4)), nn.Sequential(nn.Linear(4, 6))
    linear[0].weight.data, linear[0].bias.data = turned[0].weight.data.t().contiguous(), turned[0].bias.data.clone()
    channel = {"format": "e4m3fn", "scale": "amax", "granularity": "channel"}
    blocks = {"format": {"element": "e2m1", "block_size": 2}}
    for weights in (channel, blocks):
        spec = {"weights": weights, "activations": {"format": "e4m3fn"}, "gradients": {"format": "e5m2"}}
        found = []
        for model in (turned, linear):
            model.zero_grad()
            handle, x = emulate(model, spec), torch.arange(12.0).view(3, 4).requires_grad_()
            y = model(x)
            y.square().sum().backward()
            handle.step()
            handle.detach()
            weight = model[0].weight.grad
            products = [vars(one) for one in handle.ledger.products]
            found.append((y, x.grad, weight.t() if model is turned else weight, handle.ledger.to_data(), products))
        (y, dx, dw, records, products), expected = found
        assert all(map(torch.allclose, (y, dx, dw), expected[:3]))
        assert records == expected[3]
        assert products == expected[4]
        assert {one["pass_name"] for one in products} == {"forward", "dgrad", "wgrad"}
    with pytest.raises(ValueError, match="is for linear layers and convolutions"):
        emulate(turned, {"datapath": {"forward": "fp32"}})
