"""What a run's training step costs on machines, as short plain data for results and reports.

`accel.machine` has everything that stands behind it, and `fpsim estimate` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence

import accel
from accel.machine import Estimate, Row
from fpsim.config import Config, parse_emulation, presets
from fpsim.errors import ConfigError, Problem
from fpsim.report.results import MachineCosts, MachineRow, MachineTotal


def machine_named(name: str) -> accel.Machine:
    """The machine of an accelerator file, by name or path, which may build on others. Raises ConfigError."""
    try:
        found: accel.Machine | None = parse_emulation({"accelerator": name}).machine
    except ConfigError as error:
        problems = [Problem("--machine", one.message) if one.file is None else one for one in error.problems]
        raise ConfigError(problems) from None
    if found is None:
        raise ConfigError([Problem("--machine", f"{name!r} describes no machine: it has no key `machine`")])
    return found


def machines_named(names: Sequence[str]) -> list[accel.Machine]:
    """The machines of accelerator files, each once. Raises ConfigError."""
    found = [machine_named(name) for name in names]
    known = [machine.name for machine in found]
    if twice := [name for number, name in enumerate(known) if name in known[:number]]:
        raise ConfigError([Problem("--machine", f"names the machine {twice[0]!r} twice")])
    return found


def machines_of(config: Config) -> list[accel.Machine]:
    """The machine that a configuration describes, else all that come with fpsim."""
    if config.emulation is not None and config.emulation.machine is not None:
        return [config.emulation.machine]
    described = (parse_emulation({"accelerator": one.name}).machine for one in presets() if one.kind == "accelerators")
    return [machine for machine in described if machine is not None]


def machine_costs(machines: Sequence[accel.Machine], ledger: accel.Ledger) -> list[MachineCosts]:
    """A step of the ledger on each machine: totals by scheme, layers and passes; the `error` of a machine that does not
    take the run's formats. Empty where the ledger has no products."""
    return [_costs(machine, ledger) for machine in machines] if ledger.products else []


def _costs(machine: accel.Machine, ledger: accel.Ledger) -> MachineCosts:
    main, hertz = machine.levels[-1], machine.clock_mhz * 1e6
    costs: MachineCosts = {
        "machine": machine.name,
        "main_memory": main.name,
        "main_memory_bytes_per_second": main.bytes_per_cycle * hertz,
        "error": None,
        "totals": {},
        "rows": [],
    }
    try:
        found = machine.estimate(ledger)
    except ValueError as error:
        return {**costs, "error": str(error)}
    totals: dict[str, MachineTotal] = {
        scheme: {
            "seconds": total.seconds,
            "joules": total.joules,
            "main_memory_bytes": total.bytes_by_level[main.name],
            "seconds_by_bound": {part: cycles / hertz for part, cycles in total.cycles_by_bound.items()},
            "joules_by_part": {part: pj / 1e12 for part, pj in total.pj_by_part.items()},
        }
        for scheme, total in found.totals().items()
    }
    return {**costs, "totals": totals, "rows": [_row(row, found) for row in found.rows]}


def _row(row: Row, found: Estimate) -> MachineRow:
    main, hertz = found.machine.levels[-1].name, found.machine.clock_mhz * 1e6
    return {
        "layer": row.layer,
        "pass": row.pass_name,
        "macs": row.macs,
        "effectual_macs": row.effectual_macs,
        "schemes": {
            scheme: {
                "seconds": cost.cycles / hertz,
                "joules": sum(cost.pj_by_part.values()) / 1e12,
                "main_memory_bytes": cost.bytes_by_level[main],
                "bound_by": cost.binds,
                "executed_macs": cost.executed_macs,
                "peak_macs_per_second": (
                    cost.executed_macs / cost.ideal_compute_cycles * hertz if cost.ideal_compute_cycles else None
                ),
            }
            for scheme, cost in row.costs.items()
        },
    }
