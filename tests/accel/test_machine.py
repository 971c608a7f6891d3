"""Machines against counts by hand, a systolic array simulated register by register, and loops that move real tiles."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import accel
from accel.ledger import GRANULARITIES, Effectual, Ledger, Product, Stored, stored_encoded, stored_plain
from accel.machine import Cost, Estimate, compare, systolic_cycles, upper_bound
from accel.machine.cycles import fold_cycles, macs_left, skipping_cycles
from accel.machine.description import Array, Machine, Precision
from accel.machine.estimate import _indices
from accel.machine.traffic import Operand, Reads, array_bytes, reads_of

PRESETS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs" / "accelerators").glob("*.yaml")
    if "\nmachine:" in path.read_text("utf-8")
)
DATAFLOWS = ("output_stationary", "weight_stationary", "input_stationary")
OPERANDS = {"forward": ("activation", "weight"), "dgrad": ("gradient", "weight"), "wgrad": ("activation", "gradient")}


def spec(**changes: Any) -> dict[str, Any]:
    """A small machine: 2 x 2 elements at the peak rate, a 64 KiB buffer, memory in bursts of 64 bytes."""
    plain = {
        "name": "small",
        "clock_mhz": 100,
        "array": array(),
        "levels": [level("buffer", 64), level("dram", None, burst_bytes=64)],
    }
    return {**plain, **changes}


def array(rows: int = 2, columns: int = 2, dataflow: str | None = None, **changes: Any) -> dict[str, Any]:
    precisions = [{"bits": 8, "pj_per_mac": 1.0}, {"bits": 32, "macs_per_cycle": 0.5, "pj_per_mac": 4.0}]
    return {"rows": rows, "columns": columns, "dataflow": dataflow, "precisions": precisions, **changes}


def level(name: str, size_kib: float | None, **changes: Any) -> dict[str, Any]:
    return {"name": name, "size_kib": size_kib, "bytes_per_cycle": 4, "pj_per_byte": 2.0, **changes}


def systolic(rows: int, columns: int, dataflow: str, count: int = 1) -> Array:
    return Array(
        rows=rows, columns=columns, count=count, dataflow=dataflow, precisions=[Precision(bits=8, pj_per_mac=0)]
    )


def stored(numel: int, nbits: float, codec: str = "bitmask") -> Stored:
    """A tensor of 8-bit values whose stream has so many bits."""
    bits: dict[str, float] = {"header": 0, "offsets": 0, "metadata": 0, "payload": nbits}
    return Stored("e4m3fn", codec, 8, numel, numel, 0, bits, None, None, {})


def product(
    rows: int,
    columns: int,
    length: int,
    pass_name: str = "forward",
    *,
    layer: str = "a",
    groups: int = 1,
    effectual: dict[int, Effectual] | None = None,
    step: int = 0,
    micro_batch: int = 0,
) -> Product:
    macs = groups * rows * columns * length
    dense = {granularity: Effectual(macs, macs, macs) for granularity in GRANULARITIES}
    operands = OPERANDS[pass_name]
    return Product(step, micro_batch, layer, pass_name, operands, rows, columns, length, groups, effectual or dense)


def one_product(made: Product, first: Stored, second: Stored) -> Ledger:
    """A ledger of one product, whose operands are read once."""
    ledger = Ledger(products=[made])
    for role, tensor in zip(made.operands, (first, second), strict=True):
        ledger.add(made.step, made.layer, role, made.pass_name, tensor, micro_batch=made.micro_batch, reads=1)
    return ledger


def costs(estimate: Estimate, scheme: str = "encoded") -> dict[tuple[str, str], Cost]:
    return {(row.layer, row.pass_name): row.costs[scheme] for row in estimate.rows}


# --- cycles -------------------------------------------------------------------------------------------------------

LAYERS = [  # (M, N, K), (R, C), cycles as output, weight and input stationary, worked out apart from this code
    ("resnet18_conv1", (12544, 64, 147), (32, 32), (188944, 126380, 309680)),
    ("resnet18_layer1", (3136, 64, 576), (32, 32), (131320, 116280, 278712)),
    ("resnet18_layer2_first", (784, 128, 576), (32, 32), (67000, 63216, 99900)),
    ("resnet18_layer3", (196, 256, 2304), (16, 64), (124696, 167040, 201600)),
    ("resnet18_layer4", (49, 512, 4608), (128, 128), (19960, 62064, 32184)),
    ("resnet18_downsample", (784, 128, 64), (12, 14), (66000, 49200, 55104)),
    ("resnet18_fc", (1, 1000, 512), (128, 128), (7152, 12256, 5528)),
    ("alexnet_conv1", (3025, 96, 363), (12, 14), (706629, 664237, 887964)),
    ("alexnet_conv2_group", (729, 128, 1200), (12, 14), (753960, 765000, 869200)),
    ("alexnet_conv3", (169, 384, 2304), (16, 16), (620400, 743040, 681120)),
    ("alexnet_fc6", (4, 4096, 9216), (256, 256), (159712, 443520, 175032)),
    ("transformer_qkv", (1024, 2304, 768), (128, 128), (165600, 151848, 128928)),
    ("transformer_mlp", (1024, 3072, 768), (64, 32), (1422336, 1361664, 1240320)),
]


@pytest.mark.parametrize(("shape", "edges", "expected"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
def test_systolic_cycles_of_real_layers(
    shape: tuple[int, int, int], edges: tuple[int, int], expected: tuple[int, ...]
) -> None:
    found = tuple(systolic_cycles(systolic(*edges, dataflow), *shape) for dataflow in DATAFLOWS)
    assert found == expected


def simulate_output_stationary(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """a (R, T) enters from the left, b (T, C) from above, skewed; then the sums leave by the bottom row. Returns the
    product and the cycles."""
    (rows, time), columns = a.shape, b.shape[1]
    left, above, sums = (np.zeros((rows, columns), dtype=int) for _ in range(3))
    done, cycles = np.zeros((rows, columns), dtype=int), 0
    while done.min() < time:
        left, above = np.roll(left, 1, axis=1), np.roll(above, 1, axis=0)
        for i in range(rows):
            left[i, 0] = a[i, cycles - i] if 0 <= cycles - i < time else 0
        for j in range(columns):
            above[0, j] = b[cycles - j, j] if 0 <= cycles - j < time else 0
        sums += left * above
        done += [[0 <= cycles - i - j < time for j in range(columns)] for i in range(rows)]
        cycles += 1
    out = []
    for _ in range(rows):
        out.append(sums[-1].copy())
        sums = np.vstack([np.zeros((1, columns), dtype=int), sums[:-1]])
        cycles += 1
    return np.array(out[::-1]), cycles


def simulate_stationary(held: np.ndarray, stream: np.ndarray) -> tuple[np.ndarray, int]:
    """held (R, C) is shifted in row by row, stream (T, R) enters from the left, skewed, and sums run down. Returns
    stream @ held and the cycles."""
    (rows, columns), time = held.shape, stream.shape[0]
    array_, cycles = np.zeros((rows, columns), dtype=int), 0
    for row in held[::-1]:
        array_ = np.vstack([row, array_[:-1]])
        cycles += 1
    left, sums = np.zeros((rows, columns), dtype=int), np.zeros((rows, columns), dtype=int)
    out, beat = np.zeros((time, columns), dtype=int), 0
    last_beat = -1
    while last_beat != time - 1:
        left = np.roll(left, 1, axis=1)
        for i in range(rows):
            left[i, 0] = stream[beat - i, i] if 0 <= beat - i < time else 0
        sums = np.vstack([np.zeros((1, columns), dtype=int), sums[:-1]]) + left * array_
        for j in range(columns):
            if 0 <= beat - (rows - 1) - j < time:
                out[beat - (rows - 1) - j, j] = sums[-1, j]
        last_beat = beat - (rows - 1) - (columns - 1)
        beat, cycles = beat + 1, cycles + 1
    return out, cycles


@pytest.mark.parametrize(("rows", "columns", "time"), [(1, 1, 1), (2, 3, 4), (4, 2, 7), (3, 3, 1), (5, 4, 9)])
def test_a_fold_takes_as_long_as_a_simulated_array(rows: int, columns: int, time: int) -> None:
    numbers = np.random.default_rng(rows * 100 + columns * 10 + time)
    a, b = numbers.integers(-9, 9, (rows, time)), numbers.integers(-9, 9, (time, columns))
    result, cycles = simulate_output_stationary(a, b)
    np.testing.assert_array_equal(result, a @ b)
    assert cycles == fold_cycles(rows, columns, time)
    held, stream = numbers.integers(-9, 9, (rows, columns)), numbers.integers(-9, 9, (time, rows))
    result, cycles = simulate_stationary(held, stream)
    np.testing.assert_array_equal(result, stream @ held)
    assert cycles == fold_cycles(rows, columns, time)


def test_groups_and_arrays_share_folds() -> None:
    # 3 groups of ceil(5/2) ceil(4/2) = 6 folds of 2*2 + 2 + 7 - 2 = 11 cycles
    assert systolic_cycles(systolic(2, 2, "output_stationary"), 5, 4, 7, groups=3) == 198
    assert systolic_cycles(systolic(2, 2, "output_stationary", count=4), 5, 4, 7, groups=3) == 55


def test_cycles_follow_precision_and_dataflow() -> None:
    made = product(5, 4, 7)  # 140 multiply-accumulates, 6 folds of 11 cycles
    for dataflow, eight, thirty_two in ((None, 35, 70), ("output_stationary", 66, 132)):
        found = accel.machine(spec(array=array(dataflow=dataflow))).estimate(
            one_product(made, stored(35, 280), stored(28, 224))
        )
        (row,) = found.rows
        assert row.costs["encoded"].cycles_by_part["compute"] == eight
        assert row.costs["fp32"].cycles_by_part["compute"] == thirty_two
        assert row.costs["encoded"].utilisation == 35 / eight
        assert row.costs["fp32"].pj_by_part["mac"] == 4 * 140


def test_a_product_takes_the_narrowest_precision_of_its_wider_operand() -> None:
    found = accel.machine(spec()).estimate(one_product(product(5, 4, 7), stored(35, 280), stored_plain(28)))
    assert found.rows[0].costs["encoded"].pj_by_part["mac"] == 4 * 140


# --- zeros --------------------------------------------------------------------------------------------------------

COUNTED = {1: Effectual(300, 500, 200), 4: Effectual(700, 800, 600)}


@pytest.mark.parametrize(
    ("skips", "executed", "spent"),
    [
        ({}, 1000, 1000),
        ({"gradient": "skipping"}, 300, 300),
        ({"gradient": "skipping", "granularity": 4}, 700, 700),
        ({"weight": "skipping"}, 500, 500),
        ({"gradient": "skipping", "weight": "skipping"}, 200, 200),
        ({"gradient": "skipping", "weight": "gating"}, 300, 200),
        ({"gradient": "gating"}, 1000, 300),
        ({"activation": "skipping"}, 1000, 1000),
    ],
)
def test_zeros_save_by_role_and_granularity(skips: dict[str, Any], executed: int, spent: int) -> None:
    ledger = one_product(product(10, 10, 10, "dgrad", effectual=COUNTED), stored(100, 800), stored(100, 800))
    (row,) = accel.machine(spec(skips=skips)).estimate(ledger).rows
    cost = row.costs["encoded"]
    assert (row.macs, row.effectual_macs) == (1000, 200)
    assert cost.executed_macs == executed
    assert cost.cycles_by_part["compute"] == executed / 4
    assert cost.dense_compute_cycles == 250
    assert cost.pj_by_part["mac"] == spent
    dense = row.costs["fp32"]
    assert (dense.executed_macs, dense.pj_by_part["mac"]) == (1000, 4000)


def test_gating_changes_energy_alone() -> None:
    ledger = one_product(product(10, 10, 10, "wgrad", effectual=COUNTED), stored(100, 800), stored(100, 800))
    plain, gated = (
        costs(accel.machine(spec(skips={"gradient": method})).estimate(ledger))["a", "wgrad"]
        for method in ("none", "gating")
    )
    assert plain.pj_by_part.pop("mac") == 1000
    assert gated.pj_by_part.pop("mac") == 500
    assert plain == gated


@pytest.mark.parametrize(
    ("left", "load_balance", "cycles"),
    [(100, 1.0, 40), (100, 0.5, 80), (10, 1.0, 4), (900, 0.5, 400), (0, 1.0, 0)],
)
def test_skipping_scales_cycles_within_bounds(left: int, load_balance: float, cycles: float) -> None:
    assert skipping_cycles(400, 1000, left, load_balance) == cycles


def test_zeros_must_be_counted_at_the_granularity() -> None:
    with pytest.raises(ValueError, match=r"layer 'a', dgrad: .* granularities 1, 4 \(the machine needs 8\)"):
        macs_left(product(10, 10, 10, "dgrad", effectual=COUNTED), ("gradient",), 8)


def test_upper_bound() -> None:
    assert upper_bound(0.85) == pytest.approx(2.3076923)
    assert (upper_bound(0), upper_bound(1)) == (1, pytest.approx(3))


@st.composite
def backward_ledgers(draw: st.DrawFn) -> tuple[Ledger, bool]:
    """Layers with zeros of dY at random, and whether all of them have all three passes."""
    ledger = Ledger()
    first_has_dgrad = draw(st.booleans())
    for number in range(draw(st.integers(1, 4))):
        m, n, k = (draw(st.integers(1, 9)) for _ in range(3))
        macs, layer = m * n * k, f"layer{number}"
        passes = ["forward", "wgrad"] + ["dgrad"] * (number > 0 or first_has_dgrad)
        for pass_name in passes:
            left = draw(st.integers(0, macs))
            zeros = {"dgrad": Effectual(left, macs, left), "wgrad": Effectual(macs, left, left)}
            effectual = {1: zeros.get(pass_name, Effectual(macs, macs, macs))}
            shape = {"forward": (m, n, k), "dgrad": (m, k, n), "wgrad": (k, n, m)}[pass_name]
            made = product(*shape, pass_name, layer=layer, effectual=effectual)
            added = one_product(made, stored(9, 72), stored(9, 72))
            ledger.records += added.records
            ledger.products += added.products
    return ledger, first_has_dgrad


@settings(max_examples=60, deadline=None)
@given(drawn=backward_ledgers(), dataflow=st.sampled_from([None, *DATAFLOWS]))
def test_the_bound_is_never_exceeded_and_reached_by_an_ideal_machine(
    drawn: tuple[Ledger, bool], dataflow: str | None
) -> None:
    ledger, has_all_passes = drawn
    skips = {"gradient": "skipping"}
    ideal = accel.machine(spec(array=array(1, 1), skips=skips)).estimate(ledger).mac_time()
    assert ideal.upper_bound == upper_bound(ideal.gradient_sparsity)
    assert ideal.speedup <= ideal.upper_bound * (1 + 1e-12)
    assert ideal.speedup == pytest.approx(ideal.machine_bound)
    if has_all_passes:
        assert ideal.speedup == pytest.approx(ideal.upper_bound)
    real = accel.machine(spec(array=array(3, 2, dataflow), skips={**skips, "load_balance": 0.9}))
    found = real.estimate(ledger).mac_time()
    assert 1 <= found.speedup <= found.machine_bound * (1 + 1e-12)
    assert found.gradient_sparsity == ideal.gradient_sparsity


# --- traffic ------------------------------------------------------------------------------------------------------


def two_layers() -> Ledger:
    """Batches of 4 through layer a, 8 to 16 features, and b, 16 to 4."""
    x_a, w_a, dy_a, dw_a = stored(32, 200), stored(128, 1032), stored(64, 150), stored_plain(128)
    x_b, w_b, dy_b, dw_b = stored(64, 500), stored(64, 520), stored(16, 130), stored_plain(64)
    ledger = Ledger(
        products=[
            product(4, 16, 8, layer="a"),
            product(4, 4, 16, layer="b"),
            product(4, 16, 4, "dgrad", layer="b"),
            product(16, 4, 4, "wgrad", layer="b"),
            product(8, 16, 4, "wgrad", layer="a"),
        ]
    )
    for layer, x, w, dy, dw in (("a", x_a, w_a, dy_a, dw_a), ("b", x_b, w_b, dy_b, dw_b)):
        is_first = layer == "a"
        ledger.add(0, layer, "activation", "forward", x, reads=1, writes=int(not is_first))
        ledger.add(0, layer, "weight", "forward", w, reads=1)
        ledger.add(0, layer, "gradient", "dgrad", dy, reads=int(not is_first), writes=1)
        ledger.add(0, layer, "weight", "dgrad", w, reads=int(not is_first))
        ledger.add(0, layer, "gradient", "wgrad", dy, reads=1)
        ledger.add(0, layer, "activation", "wgrad", x, reads=1)
        ledger.add(0, layer, "weight_gradient", "wgrad", dw, writes=1)
        ledger.add(0, layer, "weight_gradient", "update", dw, reads=1)
        ledger.add(0, layer, "master", "update", dw, reads=1, writes=1)
        ledger.add(0, layer, "weight", "update", w, writes=1, second_name_in=("fp32",))
    return ledger


def test_traffic_of_two_layers_that_fit() -> None:
    found = accel.machine(spec()).estimate(two_layers())
    # streams in bursts of 64: x_a 64, w_a 192, dy_a 64, dw_a 512; x_b 64, w_b 128, dy_b 64, dw_b 256 bytes
    assert {key: cost.bytes_by_level["dram"] for key, cost in costs(found).items()} == {
        ("a", "forward"): 64 + 192,
        ("a", "dgrad"): 64,
        ("a", "wgrad"): 64 + 64 + 512,
        ("a", "update"): 512 + 2 * 512 + 192,
        ("b", "forward"): 2 * 64 + 128,
        ("b", "dgrad"): 2 * 64 + 128,
        ("b", "wgrad"): 64 + 64 + 256,
        ("b", "update"): 256 + 2 * 256 + 128,
    }
    # float32: x_a 128, w_a 512, dy_a 256; x_b 256, w_b 256, dy_b 64 bytes; the weight is the master copy
    assert {key: cost.bytes_by_level["dram"] for key, cost in costs(found, "fp32").items()} == {
        ("a", "forward"): 128 + 512,
        ("a", "dgrad"): 256,
        ("a", "wgrad"): 256 + 128 + 512,
        ("a", "update"): 512 + 2 * 512,
        ("b", "forward"): 2 * 256 + 256,
        ("b", "dgrad"): 2 * 64 + 256,
        ("b", "wgrad"): 64 + 256 + 256,
        ("b", "update"): 256 + 2 * 256,
    }
    total = found.totals()["encoded"]
    assert total.bytes_by_level["dram"] == 256 + 64 + 640 + 1728 + 256 + 256 + 384 + 896
    assert total.pj_by_part["dram"] == 2 * total.bytes_by_level["dram"]
    assert found.rows[0].costs["encoded"].cycles_by_part["dram"] == 256 / 4


def test_traffic_that_fits_is_the_ledgers() -> None:
    ledger = two_layers()
    totals = accel.machine(spec(levels=[level("buffer", 64), level("dram", None)])).estimate(ledger).totals()
    expected = ledger.traffic_bits_per_step()["total"]
    for scheme in ("fp32", "bf16"):
        assert totals[scheme].bytes_by_level["dram"] == expected[scheme] / 8
    assert 0 <= totals["encoded"].bytes_by_level["dram"] - expected["encoded"] / 8 < 20  # streams end in whole bytes


def test_what_the_array_reads_and_writes() -> None:
    made, x, w = product(4, 16, 8), Operand(32, 8), Operand(128, 8)
    # output stationary: x for 8 folds of columns, w for 2 of rows; else 4 folds of length move the 64 sums of 4 bytes:
    # 3 times written incomplete and read again
    for dataflow, expected in (
        (None, 32 * 8 + 128 * 2),
        ("output_stationary", 32 * 8 + 128 * 2),
        ("weight_stationary", 32 * 8 + 128 + 6 * 64 * 4),
        ("input_stationary", 32 + 128 * 2 + 6 * 64 * 4),
    ):
        machine = accel.machine(spec(array=array(dataflow=dataflow)))
        assert array_bytes(made, machine.array, x, w, 32) == expected
        assert costs(machine.estimate(two_layers()))["a", "forward"].bytes_by_level["buffer"] == expected


def test_tiles_that_do_not_fit_are_read_again() -> None:
    # 2 KiB for tiles: 16 x 16 sums of 4 bytes leave 1 KiB, for 16 x 32 and 32 x 16 operands of a byte. Sums stay, so
    # both operands come 4 times. The second level holds everything.
    levels = [level("buffer", 4), level("cache", 64, burst_bytes=32), level("dram", None, burst_bytes=64)]
    machine = accel.machine(spec(array=array(16, 16, precisions=[{"bits": 8, "pj_per_mac": 1}]), levels=levels))
    ledger = one_product(product(64, 64, 64), stored(4096, 32768), stored(4096, 1000))
    ledger.add(0, "a", "activation", "forward", stored(4096, 32768), writes=1)
    found = machine.estimate(ledger)
    assert costs(found)["a", "forward"].bytes_by_level == {
        "buffer": 4096 * 4 + 4096 * 4,
        "cache": 4096 * 4 + 128 * 4 + 4096,
        "dram": 4096 + 128 + 4096,
    }
    assert set(found.absent) == {"fp32", "bf16"}
    assert found.absent["bf16"] == "machine 'small' has no precision of 16 bits or more"


def moved_by_loops(
    sizes: dict[str, int], edges: dict[str, int], order: tuple[str, ...], held: tuple[int, int, int]
) -> float:
    """Bytes that tiles move when the loops over them are run, one tile of each matrix kept at a time."""
    ranges = {d: [(at, min(at + edges[d], sizes[d])) for at in range(0, sizes[d], edges[d])] for d in sizes}
    total = 0
    for matrix, size in zip((("rows", "length"), ("length", "columns"), ("rows", "columns")), held, strict=True):
        kept, elements = None, 0
        for tile in itertools.product(*(ranges[d] for d in order)):
            at = dict(zip(order, tile, strict=True))
            needed = tuple(at[d] for d in matrix)
            if needed != kept:
                elements += math.prod(end - start for start, end in needed)
                kept = needed
        is_sums = matrix == ("rows", "columns")
        total += size * (2 * (elements - sizes["rows"] * sizes["columns"]) if is_sums else elements)
    return total


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize(
    ("shape", "held", "capacity", "sums_leave"),
    [
        ((4, 6, 5), (1, 1, 4), 60, False),
        ((6, 4, 9), (1, 1, 1), 30, False),
        ((4, 6, 5), (1, 1, 4), 20, False),
        ((3, 8, 8), (1, 1, 1), 14, False),
        ((2, 5, 6), (4, 1, 2), 16, False),
        ((4, 4, 8), (4, 4, 1), 30, True),
        ((4, 4, 8), (4, 4, 1), 24, True),
    ],
)
def test_the_tiling_is_the_best_of_all_loops(
    dataflow: str, shape: tuple[int, int, int], held: tuple[int, int, int], capacity: int, sums_leave: bool
) -> None:
    sizes = dict(zip(("rows", "columns", "length"), shape, strict=True))
    m, n, k = shape
    first, second, sums = held
    best = min(
        moved_by_loops(sizes, dict(zip(sizes, edges, strict=True)), order, held)
        for edges in itertools.product(*(range(1, size + 1) for size in shape))
        if first * edges[0] * edges[2] + second * edges[2] * edges[1] + sums * edges[0] * edges[1] <= capacity
        for order in itertools.permutations(sizes)
    )
    operands = Operand(m * k, 8 * first), Operand(k * n, 8 * second)
    found = reads_of(product(*shape), systolic(1, 1, dataflow), *operands, 8 * sums, 2 * capacity)
    assert found.first * m * k * first + found.second * k * n * second + 2 * (found.visits - 1) * sums * m * n == best
    assert (found.visits > 1) == sums_leave


def test_sums_that_leave_are_written_and_read() -> None:
    # 24 bytes for tiles hold one step of length at a time: 4 values of 4 bytes, one of the other, 4 sums of a byte. So
    # the 16 sums, a burst, leave and come back 7 times.
    levels = [level("buffer", 48 / 1024), level("dram", None, burst_bytes=64)]
    machine = accel.machine(spec(array=array(1, 1, "output_stationary"), levels=levels, accumulator_bits=8))
    wide = replace(stored(32, 100), value_bits=32)
    cost = costs(machine.estimate(one_product(product(4, 4, 8), wide, wide)))["a", "forward"]
    assert cost.bytes_by_level["dram"] == 64 + 64 + 7 * 2 * 64


def test_an_unfolded_input_takes_its_share_of_the_tensor() -> None:
    # Each of 64 values meets 9 taps. The tensor fits in 300 bytes, beside 9 x 3 weights and 64 x 3 sums; unfolded, its
    # 576 elements do not.
    made, unit = product(64, 64, 9), systolic(1, 1, "output_stationary")
    weights = Operand(576, 8)
    assert reads_of(made, unit, Operand(64, 8), weights, 8, 2 * 300) == Reads(1, 1, 1)
    assert reads_of(made, unit, Operand(576, 8), weights, 8, 2 * 300) != Reads(1, 1, 1)


def test_streams_are_those_that_are_packed() -> None:
    x = torch.zeros(32)
    x[::3] = 1.0
    packed = accel.pack(x, "bitmask", "e4m3fn")
    fmt = accel.format("e4m3fn")
    assert isinstance(fmt, accel.Format)
    first = stored_encoded(accel.count_blocks(x), "bitmask", fmt, (32,))
    found = accel.machine(spec(levels=[level("buffer", 64), level("dram", None)])).estimate(
        one_product(product(4, 4, 8), first, stored(32, 256))
    )
    assert found.totals()["encoded"].bytes_by_level["dram"] == math.ceil(packed.nbits / 8) + 32


# --- time and totals ----------------------------------------------------------------------------------------------


def test_codec_engines_decode_what_is_read_and_encode_what_is_written() -> None:
    ledger = one_product(product(4, 16, 8), stored(32, 200), stored(128, 1024, "dense"))
    ledger.add(0, "a", "activation", "forward", stored(40, 200), writes=1)
    engines = {"decode_bytes_per_cycle": 0.25, "encode_bytes_per_cycle": 0.5}
    cost = costs(accel.machine(spec(codec=engines)).estimate(ledger))["a", "forward"]
    assert cost.cycles_by_part == {"compute": 128, "buffer": 128, "dram": (64 + 128 + 64) / 4, "codec": 128}
    slower = {**engines, "encode_bytes_per_cycle": 0.2}
    found = accel.machine(spec(codec=slower)).estimate(ledger)
    cost = costs(found)["a", "forward"]
    assert (cost.cycles_by_part["codec"], cost.cycles, cost.binds) == (200, 200, "codec")
    assert "codec" not in costs(found, "bf16")["a", "forward"].cycles_by_part


def test_steps_are_means_and_micro_batches_sums() -> None:
    once, twice = Ledger(), Ledger()
    for step, micro_batch, macs in ((0, 0, 8), (0, 1, 8), (7, 0, 10), (7, 1, 12)):
        made = product(1, 1, macs, step=step, micro_batch=micro_batch)
        one = one_product(made, stored(8, 64), stored(8, 64))
        twice.records += one.records
        twice.products += one.products
        if (step, micro_batch) == (0, 0):
            once = one
    single, mean = (accel.machine(spec()).estimate(ledger) for ledger in (once, twice))
    assert mean.sampled_steps == [0, 7]
    assert (single.rows[0].macs, mean.rows[0].macs) == (8, (8 + 8 + 10 + 12) / 2)
    assert costs(single)["a", "forward"].bytes_by_level["dram"] == 128
    assert costs(mean)["a", "forward"].bytes_by_level["dram"] == 256


def test_totals_and_training() -> None:
    found = accel.machine(spec()).estimate(two_layers())
    total = found.totals()["encoded"]
    rows = costs(found).values()
    assert (
        total.cycles == sum(max(cost.cycles_by_part.values()) for cost in rows) == sum(total.cycles_by_bound.values())
    )
    assert total.seconds == total.cycles / 100e6
    assert total.joules == pytest.approx(sum(sum(cost.pj_by_part.values()) for cost in rows) * 1e-12)
    training = found.training(1000)["encoded"]
    assert training.seconds == pytest.approx(1000 * total.seconds)
    assert training.bytes_by_level["dram"] == 1000 * total.bytes_by_level["dram"]


def test_comparison() -> None:
    ledger = two_layers()
    slow = spec(name="slow", clock_mhz=50)
    rows = compare(accel.machine(one).estimate(ledger) for one in (spec(), slow))
    assert [(row["machine"], row["scheme"]) for row in rows] == [
        (name, scheme) for name in ("small", "slow") for scheme in ("encoded", "fp32", "bf16")
    ]
    assert rows[3]["seconds"] == 2 * rows[0]["seconds"]
    assert rows[1]["traffic_over_encoded"] == rows[1]["main_memory_bytes"] / rows[0]["main_memory_bytes"] > 1


def test_roofline() -> None:
    found = accel.machine(spec()).estimate(two_layers())
    point = found.roofline()[0]
    assert (point.layer, point.pass_name, point.macs_per_byte) == ("a", "forward", 512 / 256)
    assert point.peak_macs_per_second == 4 * 100e6
    assert point.attainable_macs_per_second == 4 * 100e6  # 2 MACs per byte, 4 bytes per cycle: 8 a cycle, over the peak
    assert point.attained_macs_per_second == 512 / 128 * 100e6
    assert len(found.roofline("fp32")) == 5
    slow = spec(levels=[level("buffer", 64), level("dram", None, burst_bytes=64, bytes_per_cycle=1)])
    assert accel.machine(slow).estimate(two_layers()).roofline()[0].attainable_macs_per_second == 2 * 100e6


@pytest.mark.parametrize("path", PRESETS, ids=[path.stem for path in PRESETS])
def test_presets(path: Path) -> None:
    machine = accel.machine(path)
    assert machine.name == path.stem
    assert machine.source
    assert path.read_text("utf-8").startswith("# ")
    found = machine.estimate(two_layers())
    assert found.schemes == ["encoded", "fp32", "bf16"]
    for scheme in found.schemes:
        for point in found.roofline(scheme):
            assert point.attained_macs_per_second <= point.attainable_macs_per_second * (1 + 1e-9)
        assert all(0 < cost.utilisation <= 1 for cost in costs(found, scheme).values() if cost.utilisation is not None)
    assert found.totals()["encoded"].joules < found.totals()["fp32"].joules
    assert Estimate.from_data(json.loads(json.dumps(found.to_data()))) == found


def test_there_are_four_presets() -> None:
    assert [path.stem for path in PRESETS] == ["edge-npu", "eyeriss-like", "tensor-core-gpu", "tpu-like"]


# --- mistakes -----------------------------------------------------------------------------------------------------

FILE = """\
# A machine
machine:
  name: small
  clock_mhz: 1e2
  array:
    rows: 4
    columns: 4
    dataflow: output_stationary
    precisions:
      - {bits: 8, pj_per_mac: 1e-3}
      - {bits: 32, pj_per_mac: 4.0}
  skips:
    gradient: skipping
  levels:
    - name: buffer
      size_kib: 64
      bytes_per_cycle: 16
      pj_per_byte: 1.0
    - {name: dram, size_kib: null, bytes_per_cycle: 4, burst_bytes: 64, pj_per_byte: 100}
"""


def test_a_file_is_read_by_yaml_12(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("weights: {format: e4m3fn}\n" + FILE)
    machine = accel.machine(str(path))
    assert (machine.clock_mhz, machine.array.precisions[0].pj_per_mac) == (100, 0.001)
    assert yaml.safe_load("1e-3") == "1e-3"  # the loader of others is as it was
    assert accel.machine(machine) is machine
    assert accel.machine(machine.model_dump()) == machine


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("bytes_per_cycle: 16", "bytes_per_cycle: 0", "17: machine.levels.0.bytes_per_cycle: must be > 0 (got 0)"),
        ("bytes_per_cycle: 4,", "bytes_per_cycle: -1,", "19: machine.levels.1.bytes_per_cycle: must be > 0 (got -1)"),
        (
            "output_stationary",
            "output_stationery",
            "8: machine.array.dataflow: must be 'weight_stationary', 'output_stationary' or 'input_stationary' "
            "(got 'output_stationery') (did you mean 'output_stationary'?)",
        ),
        ("bits: 32", "bits: 8", "11: machine.array.precisions.1.bits: must differ from those before (got 8 again)"),
        ("rows: 4", "rows: 4.5", "6: machine.array.rows: must be an integer (got 4.5)"),
        ("clock_mhz: 1e2", "clock_mhz: .inf", "4: machine.clock_mhz: must be finite (got inf)"),
        ("  clock_mhz: 1e2\n", "", "2: machine.clock_mhz: missing; this key is required"),
        (
            "    columns: 4\n",
            "    columns: 4\n    colums: 4\n",
            "8: machine.array.colums: unknown key (did you mean 'columns'?); "
            "allowed: rows, columns, count, dataflow, precisions",
        ),
        (
            "gradient: skipping",
            "granularity: 3",
            "13: machine.skips.granularity: must be one of 1, 4, 8, 16, 32 (got 3)",
        ),
        ("gradient: skipping", "load_balance: 1.1", "13: machine.skips.load_balance: must be <= 1 (got 1.1)"),
        (
            "size_kib: 64",
            "size_kib: 0.1",
            "16: machine.levels.0.size_kib: must be >= 0.375: twice, for double buffering, a tile of 4 x 4 of each "
            "operand at the widest precision and of the sums (got 0.1)",
        ),
        (
            "size_kib: 64",
            "size_kib: null",
            "16: machine.levels.0.size_kib: must be a number: only the last level is main memory",
        ),
        (
            "size_kib: null",
            "size_kib: 128",
            "19: machine.levels.1.size_kib: must be null: the last level is main memory (got 128)",
        ),
        (
            "    - name: buffer\n      size_kib: 64\n      bytes_per_cycle: 16\n      pj_per_byte: 1.0\n",
            "",
            "14: machine.levels: must have 2 or more (got 1)",
        ),
        (
            "    - {name: dram",
            "    - {name: l2, size_kib: 32, bytes_per_cycle: 4, pj_per_byte: 2}\n    - {name: dram",
            "19: machine.levels.1.size_kib: must be > 64, the size of the level before (got 32)",
        ),
        (
            "name: dram",
            "name: buffer",
            "19: machine.levels.1.name: must differ from compute, codec, mac, buffer (got 'buffer')",
        ),
        ("    rows: 4\n", "    rows: 4\n    rows: 5\n", "7: machine.array.rows: given twice"),
        ("  name: small", "  name: [", "5: invalid YAML: expected ',' or ']', but got ':'"),
        ("machine:", "machinery:", "1: machine: missing; this key describes the machine"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = tmp_path / "m.yaml"
    assert FILE.count(old) == 1
    path.write_text(FILE.replace(old, new))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        accel.machine(path)
    assert str(caught.value) == f"{path}:{expected}"


def test_a_mistake_in_a_mapping() -> None:
    with pytest.raises(ValueError, match=r"\Amachine\.clock_mhz: must be > 0 \(got 0\)\Z"):
        accel.machine(spec(clock_mhz=0))
    with pytest.raises(ValueError, match="a machine is the path of a file, a mapping or a Machine"):
        accel.machine(3)  # type: ignore[arg-type]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read: No such file"):
        accel.machine(tmp_path / "none.yaml")


def test_editors_show_every_key() -> None:
    schema = Machine.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    assert all("description" in field for section in sections for field in section["properties"].values())


def test_operands_without_a_record_are_float32_and_stay_on_chip() -> None:
    scores = Product(0, 0, "attention", "forward", ("activation", "activation"), 4, 4, 8, 2, {1: Effectual(9, 9, 9)})
    machine = accel.machine(spec())
    known, both = (machine.estimate(Ledger(two_layers().records, made)) for made in (two_layers().products, [scores]))
    cost = costs(both)["attention", "forward"]
    assert (known.unrecorded, both.unrecorded) == ([], ["attention"])
    assert (cost.cycles_by_part["compute"], cost.pj_by_part["mac"]) == (256 / 2, 4 * 256)
    assert cost.bytes_by_level == {"buffer": 2 * (32 * 2 + 32 * 2) * 4, "dram": 0}


def test_a_layer_that_runs_twice_is_taken_backwards() -> None:
    """As it is entered: inputs in the order of forward, gradients and products in that of backward."""
    ledger = Ledger()
    for role, numel in (("activation", 1), ("activation", 2), ("gradient", 20), ("gradient", 10)):
        ledger.add(0, "a", role, "wgrad", stored_plain(numel), reads=1)
    second = Product(0, 0, "a", "wgrad", ("activation", "gradient"), 4, 4, 8, 1, {1: Effectual(9, 9, 9)})
    found = [_indices(ledger.records, second, number) for number in (0, 1)]
    assert [[ledger.records[index].stored.numel for index in indices] for indices in found] == [[2, 20], [1, 10]]
    forward = replace(second, pass_name="forward", operands=("activation", "activation"))
    assert _indices(ledger.records, forward, 0) == [0, 0]


def test_layers_that_multiply_unseen_are_named() -> None:
    ledger = two_layers()
    without = [product for product in ledger.products if product.layer != "b"]
    assert accel.machine(spec()).estimate(Ledger(ledger.records, without)).uncounted == ["b"]
    nothing = replace(ledger.products[0], layer="b", rows=0)
    estimate = accel.machine(spec()).estimate(Ledger(ledger.records, [*without, nothing]))
    assert estimate.uncounted == []
    assert Estimate.from_data(estimate.to_data()) == estimate


def test_ledgers_that_cannot_be_estimated() -> None:
    machine = accel.machine(spec(array=array(precisions=[{"bits": 16, "pj_per_mac": 1.0}])))
    ledger = two_layers()
    with pytest.raises(ValueError, match="the ledger has no products"):
        machine.estimate(Ledger(ledger.records))
    message = (
        r"layer 'a', forward: machine 'small' multiplies up to 16 bits, too few for the weight in fp32 \(32 bits\)"
    )
    with pytest.raises(ValueError, match=message):
        machine.estimate(one_product(product(4, 16, 8), stored(32, 256), stored_plain(128)))
