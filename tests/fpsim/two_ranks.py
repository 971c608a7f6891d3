"""What two ranks do, started by torchrun: each check's findings go into findings.json, which test_ranks.py reads."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import accel
from fpsim import runner, session
from fpsim.config import parse_config
from fpsim.config.schema import Communication
from fpsim.emulation import emulate
from fpsim.errors import FpsimError, ToldError
from fpsim.exchange import Exchange
from fpsim.ranks import Ranks, joined
from tests.fpsim.runs import settings

BATCH, CHANNELS = 16, 96
FORMATS: dict[str, dict[str, Any]] = {
    "nearest, amax": {"format": "e4m3fn", "scale": "amax"},
    "stochastic, power of two": {"format": "e5m2", "rounding": "stochastic", "scale": "power_of_two"},
    "amax a channel": {"format": "int8", "rounding": "stochastic", "scale": "amax", "granularity": "channel"},
    "lognormal mean": {"format": "e3m2", "rounding": "stochastic", "scale": "lognormal_mean"},
    "lognormal mean a channel": {"format": "e3m2", "scale": "lognormal_mean", "granularity": "channel"},
    "lognormal error": {"format": "e2m3", "rounding": "stochastic", "scale": "lognormal_error"},
    "delayed": {"format": "e4m3fn", "scale": "delayed"},
    "blocks": {"format": "mxfp4", "rounding": "stochastic"},
}
POLICIES: dict[str, dict[str, Any]] = {
    "homogeneous": {"sparsity": 0.8},
    "renewed every step": {"sparsity": 0.6, "refresh": 1},
    "lognormal rule": {"sparsity": 0.7, "threshold": "lognormal"},
    "heterogeneous": {"sparsity": 0.8, "policy": "heterogeneous"},
    "topk": {"sparsity": 0.9, "policy": "topk"},
    "atp": {"sparsity": 0.9, "policy": "atp"},
}
PRUNED = {"format": "e5m2", "rounding": "stochastic", "scale": "lognormal_mean", "codec": "alpha"}
SPECS: dict[str, dict[str, Any]] = {
    **{f"rounded: {name}": {"activations": spec, "gradients": spec} for name, spec in FORMATS.items()},
    **{f"pruned: {name}": {"gradients": {**PRUNED, "pruning": spec}} for name, spec in POLICIES.items()},
    "adapted": {
        "gradients": {"format": "e3m2", "scale": "lognormal_error", "rounding": "stochastic", "adapt": 1,
                      "pruning": {"sparsity": 0.5}},
    },
}  # fmt: skip


def through(spec: dict[str, Any], parts: list[tuple[Tensor, Tensor]], ranks: Ranks) -> tuple[Any, list[Tensor]]:
    """An emulated layer whose weight is 1: what it makes of X and dY, step by step."""
    model = nn.Sequential(nn.Linear(CHANNELS, CHANNELS, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(CHANNELS))
    handle = emulate(model, {**spec, "ledger": {"every_steps": 1}}, seed=5, ranks=ranks)
    made = []
    for x, dy in parts:
        x = x.clone().requires_grad_()
        y = model(x)
        y.backward(dy)
        assert x.grad is not None
        made += [y.detach(), x.grad]
        handle.step()
    return handle, made


def decisions(ranks: Ranks, spec: dict[str, Any]) -> dict[str, Any]:
    """Two steps on this rank's part, beside one rank's on the whole: what must be the same, element by element."""
    draw = torch.Generator().manual_seed(3)
    wholes = [
        tuple(torch.randn(BATCH, CHANNELS, generator=draw) * torch.randn(BATCH, 1, generator=draw).exp() for _ in "xy")
        for _ in range(2)
    ]
    alone, of_whole = through(spec, wholes, Ranks())  # type: ignore[arg-type]
    own = [tuple(one.chunk(ranks.count)[ranks.number] for one in pair) for pair in wholes]
    together, of_part = through(spec, own, ranks)  # type: ignore[arg-type]
    found: dict[str, Any] = {
        "same elements": [
            torch.equal(part, whole.chunk(ranks.count)[ranks.number])
            for part, whole in zip(of_part, of_whole, strict=True)
        ],
        "alone": alone.statistics,
        "together": together.statistics,
        "formats": [alone.gradient_formats, together.gradient_formats],
        "gradients alone": alone.distributions.rows,
        "gradients together": together.distributions.rows,
        "same samples": all(
            torch.equal(alone.distributions.samples[key], sample)
            for key, sample in together.distributions.samples.items()
            if key.startswith("dY")
        ),
        "sparsity": [alone.gradient_sparsity, together.gradient_sparsity],
    }
    ledgers = [
        accel.Ledger.from_data(*json.loads(one))
        for one in ranks.gathered(json.dumps([together.ledger.to_data(), together.ledger.products_to_data()]).encode())
    ]
    summed = accel.Ledger.summed(ledgers)
    for name, ledger in (("alone", alone.ledger), ("together", summed)):
        found[f"ledger {name}"] = [
            [r.layer, r.role, r.pass_name, r.stored.numel, r.stored.nonzeros, r.stored.alphas] for r in ledger.records
        ]
        found[f"products {name}"] = [
            [p.layer, p.pass_name, p.macs, p.effectual[1].first, p.effectual[1].second, p.effectual[1].both]
            for p in ledger.products
        ]
    return found


def weight_pruning(ranks: Ranks, estimator: str, micro_batches: int) -> dict[str, Any]:
    """The moments of a gradient's parts: those of this rank's micro-batches with all others', beside one rank's."""
    draw = torch.Generator().manual_seed(4)
    x, y = torch.randn(BATCH, 8, generator=draw), torch.randn(BATCH, 4, generator=draw)
    spec = {"weight_pruning": {"name": "snr", "estimator": estimator, "burn_in": 1}}

    def averages(group: Ranks, chunks: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4))
        handle = emulate(model, spec, ranks=group)
        positions = torch.arange(BATCH).view(chunks, group.count, -1)[:, group.number]
        for _ in range(3):
            for rows in positions:
                loss = (model(x[rows]) - y[rows]).square().mean() / (chunks * group.count)
                loss.backward()
            handle.step()
        return handle.tensors()

    whole, together = averages(Ranks(), micro_batches * ranks.count), averages(ranks, micro_batches)
    return {key: float((together[key].double() - whole[key].double()).abs().max()) for key in whole}


def exchange(ranks: Ranks, spec: dict[str, Any] | None) -> dict[str, Any]:
    """Three sums of a layer's gradients, beside what each rank would have sent, rounded by hand."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    described = None if spec is None else Communication.model_validate(spec)
    shared = Exchange(model, ranks, described, seed=9)
    shared.connect()
    named = list(model.named_parameters())
    wanted: dict[int, dict[str, Tensor]] = {r: {n: torch.zeros_like(p) for n, p in named} for r in range(ranks.count)}
    sums, by_hand, sizes = [], [], 0
    for step in range(3):
        shared.step = step
        inputs = [torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(2)]
        parts = []
        for x in inputs:  # what every rank's own gradient is
            copy = nn.Linear(64, 32)
            copy.load_state_dict(model.state_dict())
            copy(x).square().sum().backward()
            parts.append({name: p.grad for name, p in copy.named_parameters()})
        model.zero_grad()
        with shared.pass_over(is_last=True):
            shared.model(inputs[ranks.number]).square().sum().backward()
        for name, parameter in named:
            assert parameter.grad is not None
            total = torch.zeros_like(parameter)
            for rank, part in enumerate(parts):
                gradient = part[name]
                assert gradient is not None
                if spec is None:
                    total += gradient
                    continue
                gradient = gradient + wanted[rank][name]
                amax = float(gradient.abs().max())
                fmt = accel.format(spec["format"])
                scale = 2.0 ** torch.tensor(amax / fmt.max, dtype=torch.float64).log2().ceil().item()
                kept = gradient
                if sparsity := spec.get("sparsity"):
                    magnitudes = gradient.abs().flatten().sort().values
                    kept = torch.where(gradient.abs() < magnitudes[int(sparsity * magnitudes.numel())], 0.0, gradient)
                sent = accel.quantize(kept, spec["format"], scale=scale)
                if spec.get("error_feedback", True):
                    wanted[rank][name] = gradient - sent
                total += sent
                sizes += len(accel.pack(sent, spec["codec"], spec["format"], scale=scale).to_bytes()) * (
                    rank == ranks.number
                )
            sums.append(parameter.grad.clone())
            by_hand.append(total)
    shared.step = 3
    return {
        "same": [bool(torch.equal(one, other)) for one, other in zip(sums, by_hand, strict=True)],
        "largest_difference": max(float((a - b).abs().max()) for a, b in zip(sums, by_hand, strict=True)),
        "summary": shared.summary,
        "own_stream_bytes": sizes,
    }


class Killed(BaseException):
    """Nothing in the product catches this: the process might as well be gone."""


COMMUNICATION = {"format": "e4m3fn", "rounding": "stochastic", "scale": "amax", "codec": "bitmask", "sparsity": 0.5}
RUNS: dict[str, dict[str, Any]] = {
    "plain": settings(training={"batch_size": 8}),
    "float32": settings(emulation=None),
    "accumulated": settings(training={"micro_batches": 2}),
    "sent rounded": settings(training={"communication": COMMUNICATION}),
    "pruned weights": settings(
        training={"micro_batches": 2},
        emulation={"weight_pruning": {"name": "snr", "burn_in": 2, "interval": 3, "threshold": 0.5}},
    ),
    "dropout and batch statistics": settings(model={"name": "resnet18", "width": 4}),
}


def trained(folder: Path, name: str) -> str:
    """A run by both ranks in `folder`/whole; one that dies at step 4 in `folder`/killed, and is resumed."""
    runner.run(RUNS[name], folder / name / "whole", quiet=True)
    train_step, done = runner._train_step, 0

    def step(one: session.Session) -> dict[str, Any]:
        nonlocal done
        done += 1
        if done > 4:
            raise Killed
        return train_step(one)

    runner._train_step = step
    try:
        runner.run(RUNS[name], folder / name / "killed", quiet=True)
    except Killed:
        pass
    finally:
        runner._train_step = train_step
    torch.distributed.barrier()
    runner.resume(folder / name / "killed", quiet=True)
    torch.distributed.barrier()
    return "done"


def accuracies(folder: Path, communication: dict[str, Any] | None) -> list[float]:
    """Of the digits' MLP, by seed, its gradients sent in this way."""
    training = {"epochs": 4, "batch_size": 32, "communication": communication, "checkpoint": {"every_steps": 1000}}
    digits = {"data": {"name": "digits"}, "model": {"name": "mlp", "hidden": [64]}, "emulation": None}
    way = "float32" if communication is None else "rounded"
    return [
        runner.run(
            settings(**digits, training=training, seed=seed), folder / f"{way}-{seed}", quiet=True
        ).accuracy_percent
        for seed in range(3)
    ]


def told(ranks: Ranks, act: Callable[[], Any]) -> str:
    """What an error says on this rank."""
    try:
        act()
    except ToldError:
        return "ToldError"
    except FpsimError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.distributed.barrier()
    return "nothing"


def not_finite(ranks: Ranks, folder: Path) -> str:
    """NaN in what a layer makes of rank 1's part alone."""

    def spoil(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output * float("nan")

    def poisoned(one: session.Session) -> Any:
        if one.step == 3 and ranks.number == 1:
            one.model.get_submodule("2").register_forward_hook(spoil)
        return forward_and_backward(one)

    forward_and_backward = session.forward_and_backward
    runner.forward_and_backward = poisoned
    try:
        return told(ranks, lambda: runner.run(settings(), folder / "not finite", quiet=True))
    finally:
        runner.forward_and_backward = forward_and_backward


def unequal_parts(ranks: Ranks, rows: list[int], pruned: bool) -> str:
    """A layer that meets other numbers of rows on the two ranks, in forward and (pruned) in backward alone."""
    spec: dict[str, Any] = {"activations": {"format": "e4m3fn", "scale": "amax"}}
    if pruned:
        spec = {"gradients": {**PRUNED, "pruning": {"sparsity": 0.5}}}
    model = nn.Sequential(nn.Linear(CHANNELS, CHANNELS))
    emulate(model, spec, ranks=ranks)
    return told(ranks, lambda: model(torch.randn(rows[ranks.number], CHANNELS)).sum().backward())


def missing_on_one(ranks: Ranks, folder: Path) -> str:
    """Data that rank 1 alone does not find."""
    root = {"name": "digits"} if ranks.is_first else {"name": "cifar10", "root": str(folder / "nowhere")}
    config = parse_config(settings(data=root, name="missing"))
    return told(ranks, lambda: runner.run(config, folder / "missing", quiet=True))


def stopped_on_one(ranks: Ranks, folder: Path) -> str:
    """A stop signal that rank 1 alone gets."""
    train_step = runner._train_step

    def step(one: session.Session) -> dict[str, Any]:
        row = train_step(one)
        if one.step == 4 and ranks.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    runner._train_step = step
    try:
        return told(ranks, lambda: runner.run(settings(), folder / "stopped", quiet=True))
    finally:
        runner._train_step = train_step


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    findings: dict[str, Any] = {}
    with joined() as ranks:

        def check(name: str, act: Callable[[], Any]) -> None:
            try:
                found = act()
            except Exception:
                found = traceback.format_exc()
            findings[name] = [json.loads(one) for one in ranks.gathered(json.dumps(found).encode())]

        for name, spec in SPECS.items():
            check(f"decisions, {name}", lambda spec=spec: decisions(ranks, spec))  # type: ignore[misc]
        for estimator, parts in (("microbatch", 2), ("microbatch", 1), ("per_sample", 1), ("ema", 1)):
            check(
                f"snr, {estimator} {parts}",
                lambda estimator=estimator, parts=parts: weight_pruning(ranks, estimator, parts),  # type: ignore[misc]
            )
        plain = {"format": "e5m2", "scale": "power_of_two", "codec": "dense"}
        for name, one in {
            "float32": None,
            "e5m2": plain,
            "no feedback": {**plain, "error_feedback": False},
            "sparse": {**plain, "sparsity": 0.9, "codec": "bitmask"},
        }.items():
            check(f"exchange, {name}", lambda one=one: exchange(ranks, one))  # type: ignore[misc]
        for name in RUNS:
            check(f"run, {name}", lambda name=name: trained(folder, name))  # type: ignore[misc]
        for name, one in {"float32": None, "rounded": {**COMMUNICATION, "sparsity": 0.9}}.items():
            check(f"accuracy, {name}", lambda one=one: accuracies(folder, one))  # type: ignore[misc]
        check("not finite", lambda: not_finite(ranks, folder))
        for pruned in (False, True):
            for name, rows in {"few": [2, 3], "many": [64, 96], "none": [4, 0]}.items():
                check(
                    f"unequal parts, {name}{', pruned' * pruned}",
                    lambda rows=rows, pruned=pruned: unequal_parts(ranks, rows, pruned),  # type: ignore[misc]
                )
        check("missing on one", lambda: missing_on_one(ranks, folder))
        check("stopped on one", lambda: stopped_on_one(ranks, folder))
        if ranks.is_first:
            (folder / "findings.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    main()
