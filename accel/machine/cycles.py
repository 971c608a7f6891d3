"""Cycles of the multiply-accumulate array.

A systolic array of R x C elements takes (2R + C + T - 2) ceil(S_R / R) ceil(S_C / C) cycles for a matrix product: the
analytical form of SCALE-Sim (Samajdar et al., ISPASS 2020). S_R and S_C are the dimensions that lie along its rows and
columns, T is the one that streams by; which is which follows from the dataflow. For a product (M, K) x (K, N):

    output_stationary    S_R = M, S_C = N, T = K
    weight_stationary    S_R = K, S_C = N, T = M    (the second operand stays)
    input_stationary     S_R = K, S_C = M, T = N    (the first operand stays)
"""

from __future__ import annotations

import math
from collections.abc import Collection

from accel.ledger import Product
from accel.machine.description import Array, Machine, Precision

LAYOUT = {  # the dimensions of a product along the rows, along the columns and over time
    "output_stationary": ("rows", "columns", "length"),
    "weight_stationary": ("length", "columns", "rows"),
    "input_stationary": ("length", "rows", "columns"),
    None: ("rows", "columns", "length"),
}


def fold_cycles(rows: int, columns: int, time: int) -> int:
    """Cycles of one fold on an array of rows x columns: filling, `time` steps, and draining."""
    return 2 * rows + columns + time - 2


def systolic_cycles(array: Array, rows: int, columns: int, length: int, groups: int = 1) -> int:
    """Cycles of `groups` products (rows, length) x (length, columns) at one multiply-accumulate an element and cycle.

    The folds of all groups are spread over the arrays, ceil(folds / count) to each. The array needs a dataflow.
    """
    sizes = {"rows": rows, "columns": columns, "length": length}
    along_rows, along_columns, time = (sizes[name] for name in LAYOUT[array.dataflow])
    folds = groups * math.ceil(along_rows / array.rows) * math.ceil(along_columns / array.columns)
    return math.ceil(folds / array.count) * fold_cycles(array.rows, array.columns, time)


def dense_cycles(machine: Machine, precision: Precision, product: Product) -> int:
    """Cycles of a product whose zeros are multiplied as well."""
    if machine.array.dataflow is None:
        return math.ceil(product.macs / machine.peak_macs_per_cycle(precision))
    beats = systolic_cycles(machine.array, product.rows, product.columns, product.length, product.groups)
    return math.ceil(beats / precision.macs_per_cycle)


def macs_left(product: Product, roles: Collection[str], granularity: int) -> int:
    """Multiply-accumulates of a product without those whose operand has one of the roles and is zero.

    Raises ValueError where the product was not counted at this granularity.
    """
    first, second = (role in roles for role in product.operands)
    if not (first or second):
        return product.macs
    if granularity not in product.effectual:
        counted = ", ".join(map(str, product.effectual))
        raise ValueError(
            f"layer {product.layer!r}, {product.pass_name}: zeros were counted at the granularities {counted} (the "
            f"machine needs {granularity})"
        )
    effectual = product.effectual[granularity]
    if first and second:
        return effectual.both
    return effectual.first if first else effectual.second


def skipping_cycles(dense: float, macs: int, left: int, load_balance: float) -> float:
    """Cycles of a product of which `left` of its `macs` are done, at `dense` cycles without skipping.

    Skipping shortens each fold by the share of zeros, as far as the load is balanced. So the array's utilisation is at
    most what it is without, and what is left is never done faster than at the peak rate. It is never slower, either.
    """
    return min(dense, dense * left / macs / load_balance)
