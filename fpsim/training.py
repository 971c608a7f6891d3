"""The parts of a training loop: optimizer, learning-rate schedule, data order, evaluation, checks for NaN."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from fpsim.config.schema import Adam, ConstantSchedule, CosineSchedule, Sgd, StepSchedule
from fpsim.data import Split
from fpsim.errors import NonFiniteError
from fpsim.ranks import ALONE, Ranks

EVALUATION_BATCH = 250


def build_optimizer(spec: Sgd | Adam, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a configuration, over all parameters of the model."""
    if isinstance(spec, Sgd):
        return torch.optim.SGD(
            model.parameters(),
            lr=spec.learning_rate,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
        )
    first, second = spec.betas
    return torch.optim.Adam(
        model.parameters(),
        lr=spec.learning_rate,
        betas=(first, second),
        eps=spec.epsilon,
        weight_decay=spec.weight_decay,
    )


def learning_rate_factor(
    schedule: ConstantSchedule | CosineSchedule | StepSchedule, step: int, steps_per_epoch: int, total_steps: int
) -> float:
    """What the learning rate is multiplied by at a step (counted from 0)."""
    if isinstance(schedule, ConstantSchedule):
        return 1.0
    if isinstance(schedule, StepSchedule):
        return schedule.factor ** sum(step >= m * steps_per_epoch for m in schedule.milestones_epochs)
    warmup_steps = schedule.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return min((step + 1) / warmup_steps, 1.0)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return schedule.final_factor + (1 - schedule.final_factor) * (1 + math.cos(math.pi * progress)) / 2


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator whose state depends on the run's seed and on what it is for, and on nothing else."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=1)
def data_order(seed: int, epoch: int, samples: int) -> Tensor:
    """The order in which an epoch (counted from 0) visits the training samples."""
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Of logits [..., classes] by labels [...]: an image has one label, a text one at every character."""
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def count_correct(logits: Tensor, labels: Tensor) -> int:
    """How many of labels [...] have the largest of their logits [..., classes]."""
    return int((logits.detach().argmax(-1) == labels).sum())


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, ranks: Ranks = ALONE) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in percent) over a whole split, the model in evaluation mode meanwhile.

    Of several ranks, each evaluates every so many batches. The first is NaN where the model does not take what is not
    finite, as emulation does not.
    """
    was_training = model.training
    model.eval()
    loss, correct, count = 0.0, 0, 0
    try:
        for indices in torch.arange(len(split)).split(EVALUATION_BATCH)[ranks.number :: ranks.count]:
            inputs, labels = split.batch(indices)
            count += labels.numel()
            try:
                logits = model(inputs)
            except NonFiniteError:  # not raised here: the other ranks wait for the sums
                loss = math.nan
                break
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            correct += count_correct(logits, labels)
    finally:
        model.train(was_training)
    loss, total_correct, total = ranks.totals(loss, correct, count)
    return loss / total, 100 * total_correct / total


def check_gradients(model: nn.Module, step: int) -> None:
    """Raise NonFiniteError where a weight gradient is NaN or infinite: the layer that backward reached first."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if not named or bool(torch.isfinite(nn.utils.get_total_norm([gradient for _, gradient in named]))):
        return
    for name, gradient in reversed(named):
        if not bool(torch.isfinite(gradient).all()):
            layer, _, parameter = name.rpartition(".")
            role, value = f"{parameter} gradient", model.get_parameter(name)
            raise NonFiniteError(role, layer, step, {role: gradient, parameter: value})


def first_non_finite(model: nn.Module, inputs: Tensor, random_state: Tensor, step: int) -> NonFiniteError | None:
    """What is NaN or infinite first when the model runs on `inputs`; None when all that its modules see is finite.

    It is the input of a module (role activation), else one of its parameters as it uses them, else its output; beside
    it go the others. random_state: of torch, when the run under question began. The model is left as it was.
    """
    found: list[NonFiniteError] = []
    used: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def before(module: nn.Module, arguments: tuple[object, ...]) -> None:
            used.clear()
            used.update({key: p for key, p in module._parameters.items() if p is not None})

        def after(module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
            if found or not isinstance(output, Tensor) or bool(torch.isfinite(output).all()):
                return
            x = arguments[0] if arguments else None
            seen = {**({"activation": x} if isinstance(x, Tensor) else {}), **used, "output": output}
            role = next(role for role, tensor in seen.items() if not bool(torch.isfinite(tensor).all()))
            found.append(NonFiniteError(role, name, step, seen))

        yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    with _as_it_was(model, random_state):
        handles = [handle for name, module in leaves for handle in watch(name, module)]
        try:
            model(inputs)
        except NonFiniteError as error:
            found.append(error)
        finally:
            for handle in handles:
                handle.remove()
    return found[0] if found else None


@contextmanager
def _as_it_was(model: nn.Module, random_state: Tensor) -> Iterator[None]:
    """Without gradients, from that random state of torch; buffers and random state are put back."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(random_state)
            yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
