"""Described accelerators: the time, traffic and energy of a ledger's training step on them."""

from accel.machine.cycles import systolic_cycles
from accel.machine.description import Machine
from accel.machine.estimate import Cost, Estimate, MacTime, RooflinePoint, Row, Total, compare, upper_bound
from accel.machine.reading import machine

__all__ = [
    "Cost",
    "Estimate",
    "MacTime",
    "Machine",
    "RooflinePoint",
    "Row",
    "Total",
    "compare",
    "machine",
    "systolic_cycles",
    "upper_bound",
]
