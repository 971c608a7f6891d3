"""`fpsim run --dry-run`: what a run would do, from its configuration and a few steps in memory, which are then dropped.

The elements and multiply-accumulates are those of the ledger's first step, which is one real batch, forward and
backward. The time is that of the steps after it on this machine as it is now; the first ones compile or load kernels
and are left out. Nothing is written, beside compiled kernels in numba's cache.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel.ledger import Ledger, Stored
from fpsim.config import Config, Emulation, GradientSpec, TensorSpec, config_hash
from fpsim.config.schema import Datapath, DensePruning, SnrPruning, mac
from fpsim.console import print_table
from fpsim.layers import LayerSpec, format_of, matching, product_modules
from fpsim.machine_costs import machine_costs, machines_of
from fpsim.run_directory import new_directory
from fpsim.run_results import distributions, over_time
from fpsim.session import Session, forward_and_backward, set_learning_rate
from fpsim.training import EVALUATION_BATCH, check_gradients, count_correct, cross_entropy
from fpsim.weights.masks import ramp

WARM_UP_STEPS, STEPS = 2, 3
METRICS_BYTES = 300  # of a step, in metrics.jsonl and steps.csv
ROLES = ("weight", "activation", "gradient")
ROLES_PASS = {"weight": "forward", "activation": "forward", "gradient": "dgrad"}  # where a tensor is entered once
PASSES = ("forward", "dgrad", "wgrad")
RAMP_POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def plan(config: Config, run_dir: str | Path | None = None) -> dict[str, Any]:
    """The plan of a run in such a directory, as plain data (JSON); times in seconds.

    Raises what the run would raise: ConfigError for the user's mistakes (an existing directory included), RunError for
    layers that cannot be emulated and for values that are not finite.
    """
    folder = new_directory(config, run_dir)
    session = Session(config, folder, quiet=True)
    times = _times(session)
    sampled = _sampled_steps(session)
    return {
        "name": config.name,
        "config_hash": config_hash(config),
        "run_dir": str(folder),
        "seed": config.seed,
        "data": session.dataset.description,
        "model": config.model.model_dump(),
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "training": config.training.model_dump(),
        "steps_per_epoch": session.steps_per_epoch,
        "steps": session.total_steps,
        **_emulation(session),
        "time": _expected(times, session, sampled),
        "disk": _disk(session, sampled),
        "weight_pruning": _weight_pruning(config, session.steps_per_epoch),
        "machine": _on_machine(config, session),
    }


# --- steps in memory --------------------------------------------------------------------------------------------------


def _times(session: Session) -> dict[str, list[float]]:
    """Seconds of steps that the ledger does not sample, of those it does, and of one batch of evaluation."""
    emulator, found = session.emulator, defaultdict[str, list[float]](list)
    for number in range(WARM_UP_STEPS + STEPS + 1):
        if number == WARM_UP_STEPS + STEPS:
            emulator.sample_this_step()
        kind = "sampled" if emulator.sampling else "plain"
        began = time.perf_counter()
        set_learning_rate(session)
        forward_and_backward(session)
        check_gradients(session.model, session.step)
        session.optimizer.step()
        emulator.step()
        if number >= WARM_UP_STEPS:
            found[kind].append(time.perf_counter() - began)
        session.step += 1
    session.model.eval()
    inputs, labels = session.dataset.test.batch(torch.arange(min(EVALUATION_BATCH, len(session.dataset.test))))
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            logits = session.model(inputs)
            cross_entropy(logits, labels), count_correct(logits, labels)
            found["evaluation"] = [time.perf_counter() - began]
    session.model.train()
    return found


def _sampled_steps(session: Session) -> int:
    """How many steps of the run the ledger samples: one in `every_steps`, and the last."""
    every, last = session.emulator.spec.ledger.every_steps, session.total_steps - 1
    return last // every + 1 + (last % every > 0)


def _expected(times: Mapping[str, list[float]], session: Session, sampled: int) -> dict[str, Any]:
    plain = times.get("plain") or times["sampled"]
    step, sampled_step = statistics.median(plain), statistics.median(times["sampled"])
    batches = math.ceil(len(session.dataset.test) / EVALUATION_BATCH)
    evaluation = batches * times["evaluation"][0]
    steps = (session.total_steps - sampled) * step + sampled * sampled_step
    return {
        "step": step,
        "fastest_step": min(plain),
        "slowest_step": max(plain),
        "measured_steps": len(plain),
        "warm_up_steps": WARM_UP_STEPS,
        "sampled_step": sampled_step,
        "sampled_steps": sampled,
        "evaluation": evaluation,
        "total": steps + session.config.training.epochs * evaluation,
    }


def _disk(session: Session, sampled: int) -> dict[str, int]:
    """Bytes of a checkpoint, and of the run directory when it is fullest: one checkpoint more than are kept."""
    emulator, config = session.emulator, session.config
    optimizer = [v for state in session.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    tensors = [*session.model.state_dict().values(), *optimizer, *emulator.tensors().values(), torch.get_rng_state()]
    checkpoint = sum(tensor.nbytes for tensor in tensors) + len(json.dumps(emulator.state_dict(), indent=1))
    last = session.step - 1
    rows = [row for row in (*emulator.ledger.to_data(), *emulator.ledger.products_to_data()) if row["step"] == last]
    rows += [row for row in emulator.distributions.rows if row["step"] == last]
    lines = sum(len(json.dumps(row)) + 1 for row in rows) * sampled
    results = _results_bytes(session, sampled)
    samples = sum(tensor.nbytes for tensor in emulator.distributions.samples.values())
    whole = (config.training.checkpoint.keep + 1) * checkpoint + lines + results + samples
    return {"checkpoint": checkpoint, "run_directory": whole + METRICS_BYTES * session.total_steps}


def _results_bytes(session: Session, sampled: int) -> int:
    emulator = session.emulator
    samples = {name: tensor.numpy() for name, tensor in emulator.distributions.samples.items()}
    once = {
        "ledger": emulator.ledger.summary(),
        "distributions": distributions(emulator.distributions, samples),
        "machines": machine_costs(machines_of(session.config), emulator.ledger),
    }
    steps = len(json.dumps(over_time(emulator.ledger, emulator.distributions), indent=1)) / len(emulator.ledger.steps)
    return len(json.dumps(once, indent=1)) + int(steps * sampled)


# --- layers -----------------------------------------------------------------------------------------------------------


def _emulation(session: Session) -> dict[str, Any]:
    emulator, emulation = session.emulator, session.config.emulation
    ledger = emulator.ledger
    first = Ledger(
        (record for record in ledger.records if record.step == 0),
        (product for product in ledger.products if product.step == 0),
    )
    macs: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(PASSES, 0))
    for product in first.products:
        macs[product.layer][product.pass_name] += product.macs
    layers: list[dict[str, Any]] = []
    for name, module in emulator.layers.items():
        treatment = _treatment(emulator.specs[name])
        sizes = {role: _sizes(first, name, role) for role in ROLES}
        layers.append(
            {
                "layer": name,
                "type": type(module).__name__,
                "weight_shape": list(module.get_parameter("weight").shape),
                "emulation": treatment,
                "by": _reasons(name, emulation, emulator.layers),
                **{
                    key: {role: sizes[role][key] for role in ROLES} for key in ("elements", "dense_bytes", "fp32_bytes")
                },
                "macs": macs[name],
            }
        )
    modules = {} if emulation is None else product_modules(session.model, emulation)
    products: list[dict[str, Any]] = [
        {"module": name, "datapath": _datapath(modules.get(name)), "macs": found}
        for name, found in macs.items()
        if name not in emulator.layers
    ]
    totals = {
        key: {name: sum(row[key][name] for row in layers) for name in ROLES}
        for key in ("elements", "dense_bytes", "fp32_bytes")
    }
    all_macs = {name: sum(row["macs"][name] for row in (*layers, *products)) for name in PASSES}
    return {"layers": layers, "products": products, "totals": {**totals, "macs": all_macs}}


def _sizes(ledger: Ledger, layer: str, role: str) -> dict[str, float]:
    """Of all a layer's tensors of a role in the step; those of one weight that runs several times count once."""
    stored = [
        record.stored
        for record in ledger.records
        if (record.layer, record.role, record.pass_name) == (layer, role, ROLES_PASS[role])
        and (role != "weight" or record.resident)
    ]
    elements = sum(one.numel for one in stored)
    return {"elements": elements, "dense_bytes": sum(map(_dense_bytes, stored)), "fp32_bytes": 4 * elements}


def _dense_bytes(stored: Stored) -> float:
    """Of the stream of codec dense in the tensor's format, with its header and scales; of float32 without."""
    if stored.is_float32:
        return 4 * stored.numel
    return (stored.nbits if stored.codec == "dense" else stored.other_codecs_bits["dense"]) / 8


def _reasons(name: str, emulation: Emulation | None, layers: dict[str, nn.Module]) -> list[str]:
    """The patterns that decide how a layer is emulated."""
    if emulation is None:
        return []
    excluding = [f"exclude {one}" for one in emulation.exclude if name in matching(one, layers)]
    including = [f"include {one}" for one in emulation.include if name in matching(one, layers)]
    overriding = [f"override {one.match}" for one in emulation.overrides if name in matching(one.match, layers)]
    return [*(excluding or including or ["in no include"]), *overriding]


def _treatment(spec: LayerSpec) -> dict[str, str]:
    """What is not float32 of a layer, in words."""
    found = {role: _tensor(getattr(spec, role)) for role in ("weights", "activations", "gradients")}
    found["products"] = _datapath(spec.datapath)
    return {role: text for role, text in found.items() if text}


def _tensor(spec: TensorSpec | None) -> str:
    if spec is None:
        return ""
    words = [format_of(spec).name]
    if isinstance(spec, GradientSpec) and spec.pruning is not None:
        words.append(f"pruned to {100 * spec.pruning.sparsity:g} % zeros ({spec.pruning.policy})")
    if isinstance(spec, GradientSpec) and spec.adapt is not None:
        words.append(f"adapted every {'epoch' if spec.adapt == 'epoch' else f'{spec.adapt} steps'}")
    words.append(spec.rounding)
    if spec.scale != "none":
        words.append(f"scale {spec.scale}{' by channel' if spec.granularity == 'channel' else ''}")
    if spec.overflow != "saturate":
        words.append(f"overflow {spec.overflow}")
    if spec.flush_subnormals:
        words.append("subnormals flushed")
    return ", ".join([*words, f"codec {spec.codec}"])


def _datapath(datapath: Datapath | None) -> str:
    units = {name: getattr(datapath, name, None) for name in PASSES}
    return ", ".join(f"{name} {mac(unit).name}" for name, unit in units.items() if unit is not None)


# --- weight pruning, machine ------------------------------------------------------------------------------------------


def _weight_pruning(config: Config, steps_per_epoch: int) -> dict[str, Any] | None:
    spec = None if config.emulation is None else config.emulation.weight_pruning
    if spec is None or isinstance(spec, DensePruning):
        return None
    if isinstance(spec, SnrPruning):
        rows = {"burn_in": spec.burn_in, "interval": spec.interval or spec.burn_in}
        in_steps = {key: steps_per_epoch if value == "epoch" else value for key, value in rows.items()}
        return {"name": spec.name, "first_step": in_steps["burn_in"], "every_steps": in_steps["interval"], "ramp": []}
    begin, end = (round(epochs * steps_per_epoch) for epochs in spec.epochs_of_ramp)
    steps = dict.fromkeys(round(begin + share * (end - begin)) for share in RAMP_POINTS)
    asked = [{"step": step, "sparsity": ramp(step, begin, end, spec.sparsity)} for step in steps]
    return {"name": spec.name, "first_step": begin, "every_steps": spec.interval, "ramp": asked}


def _on_machine(config: Config, session: Session) -> dict[str, Any] | None:
    machine = None if config.emulation is None else config.emulation.machine
    if machine is None:
        return None
    try:
        totals = machine.estimate(session.emulator.ledger).totals()
    except ValueError as error:
        return {"name": machine.name, "seconds_per_step": {}, "problem": str(error)}
    seconds = {scheme: total.seconds for scheme, total in totals.items()}
    return {"name": machine.name, "seconds_per_step": seconds, "problem": None}


# --- tables -----------------------------------------------------------------------------------------------------------


def show(plan: dict[str, Any]) -> None:
    """Print the plan."""
    training = plan["training"]
    optimizer, schedule = training["optimizer"], training["schedule"]["name"]
    parts = f" in {training['micro_batches']} parts" if training["micro_batches"] > 1 else ""
    print(f"{plan['name']} ({plan['config_hash']}), a dry run: nothing is trained or written")
    print(f"would be in {plan['run_dir']}")
    print(f"data: {plan['data']}")
    print(f"model: {_options(plan['model'])}; {plan['parameters']:,} parameters")
    print(
        f"training: {training['epochs']} epochs of {plan['steps_per_epoch']:,} steps, {plan['steps']:,} in all, "
        f"batches of {training['batch_size']}{parts}, {_options(optimizer)}, schedule {schedule}, seed {plan['seed']}"
    )
    print()
    _show_emulation(plan["layers"], plan["products"])
    print()
    _show_sizes(plan)
    print()
    _show_costs(plan)


def _options(section: Mapping[str, Any]) -> str:
    options = [f"{key} {value}" for key, value in section.items() if key != "name" and value is not None]
    return f"{section['name']} ({', '.join(options)})" if options else str(section["name"])


def _show_emulation(layers: list[dict[str, Any]], products: list[dict[str, Any]]) -> None:
    names: dict[str, str] = {}
    for row in layers:
        if row["emulation"]:
            names.setdefault(json.dumps(row["emulation"]), chr(ord("A") + len(names)))
    for text, name in names.items():
        for role, words in json.loads(text).items():
            print(f"{name}  {role + ':':12} {words}")
    rows = [
        [
            row["layer"],
            row["type"],
            "x".join(map(str, row["weight_shape"])),
            names.get(json.dumps(row["emulation"]), "float32"),
            ", ".join(row["by"]),
        ]
        for row in layers
    ]
    print_table(["layer", "type", "weight", "as", "by"], rows)
    for row in products:
        if row["datapath"]:
            print(f"products inside {row['module']}: {row['datapath']}")


def _show_sizes(plan: dict[str, Any]) -> None:
    print("a step: elements of what each layer reads, and gets as gradient; millions of multiply-accumulates")
    totals = plan["totals"]
    header = ["layer", "weight", "activation", "gradient", *PASSES]
    rows = [[row["layer"], *_counts(row["elements"]), *_millions(row["macs"])] for row in plan["layers"]]
    rows += [[row["module"], "", "", "", *_millions(row["macs"])] for row in plan["products"]]
    _print_numbers(header, [*rows, ["total", *_counts(totals["elements"]), *_millions(totals["macs"])]])
    print()
    print("the same tensors in kB: dense in the layer's formats, and in float32")
    header = ["layer", *ROLES, "all", "float32", "float32 / all"]
    sized = [*plan["layers"], {"layer": "total", **totals}]
    _print_numbers(header, [[row["layer"], *_kilobytes(row)] for row in sized])


def _counts(elements: Mapping[str, int]) -> list[str]:
    return [f"{elements[role]:,}" for role in ROLES]


def _millions(macs: Mapping[str, int]) -> list[str]:
    return [f"{macs[name] / 1e6:,.4g}" if macs[name] < 1e10 else f"{macs[name] / 1e6:,.0f}" for name in PASSES]


def _kilobytes(row: Mapping[str, Any]) -> list[str]:
    dense, plain = (sum(row[key].values()) for key in ("dense_bytes", "fp32_bytes"))
    sizes = [*(row["dense_bytes"][role] for role in ROLES), dense, plain]
    return [*(f"{size / 1e3:,.1f}" for size in sizes), f"{plain / dense:.2f}" if dense else ""]


def _print_numbers(header: list[str], rows: Iterable[list[str]]) -> None:
    """A table whose columns, but the first, are flush right."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    aligned = [[row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))] for row in table]
    print_table(aligned[0], aligned[1:])


def _show_costs(plan: dict[str, Any]) -> None:
    times, disk = plan["time"], plan["disk"]
    print(
        f"time: {_duration(times['total'])} on this machine: a step takes {_duration(times['step'])} "
        f"({_duration(times['fastest_step'])} to {_duration(times['slowest_step'])} in {times['measured_steps']} steps "
        f"after {times['warm_up_steps']} of warm-up), {_duration(times['sampled_step'])} where the ledger samples "
        f"({times['sampled_steps']} of {plan['steps']:,} steps), an evaluation {_duration(times['evaluation'])}"
    )
    print(f"disk: a checkpoint {_size(disk['checkpoint'])}, the run directory up to {_size(disk['run_directory'])}")
    if (pruning := plan["weight_pruning"]) is not None:
        ramped = ", ".join(f"{100 * point['sparsity']:.0f} % at step {point['step']:,}" for point in pruning["ramp"])
        when = f"from step {pruning['first_step']:,} on, every {pruning['every_steps']:,}"
        print(f"weight pruning: {pruning['name']}, {when}{': ' if ramped else ''}{ramped}")
    if (machine := plan["machine"]) is not None:
        seconds = [f"{_duration(value)} {scheme}" for scheme, value in machine["seconds_per_step"].items()]
        print(f"a step on {machine['name']}: {machine['problem'] or ', '.join(seconds)}")


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} us"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
