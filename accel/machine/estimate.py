"""What a training step costs on a described machine: cycles, bytes and energy, layer by layer and pass by pass.

The ledger says how many multiplications and streams there really were. The schemes:

    encoded     the run: operands at the bits of their values, streams as they are stored, zeros skipped
    fp32, bf16  the same layers dense on the same machine: every operand at 32 or 16 bits, no skipping, no codec

Array, memory levels and codec work at the same time (double buffering), so a pass of a layer takes as long as the
slowest of them, which is the one that binds; passes and layers follow one another. All numbers are of one step: sums
over its micro-batches, means over the sampled steps. A tensor's write counts where the ledger enters it: an activation
at the layer that reads it. Passes without a product (the update, additions, normalisations) are traffic alone: their
arithmetic is left out, as are leakage and the codec's energy. Products whose operands the ledger has no record of, such
as those inside attention, take float32 operands in the encoded scheme, and move nothing beyond the first level.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from accel.ledger import DENSE_BITS, PASSES, SCHEMES, Ledger, Product, Record, Stored, stored_plain
from accel.machine.cycles import dense_cycles, macs_left, skipping_cycles
from accel.machine.description import Machine, Precision
from accel.machine.traffic import Operand, array_bytes, reads_of, spilled_bytes, stream_bytes

BASELINES = tuple(DENSE_BITS)
UNCODED = ("plain", "dense")  # streams that no codec engine works on
PJ_PER_J = 1e12


@dataclass(frozen=True)
class Cost:
    """One layer in one pass of a step, under one scheme.

    executed_macs: multiply-accumulates that take cycles. dense_compute_cycles: what the array would take without
    skipping; ideal_compute_cycles: what the executed ones take at the peak rate. cycles_by_part: of "compute", each
    level, and "codec" if there is one; cycles is their largest, and binds names it. utilisation: ideal over actual
    cycles of the array, None without a product. pj_by_part: of "mac" and each level.
    """

    executed_macs: float
    ideal_compute_cycles: float
    dense_compute_cycles: float
    cycles_by_part: dict[str, float]
    cycles: float
    binds: str
    utilisation: float | None
    bytes_by_level: dict[str, float]
    pj_by_part: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One layer in one pass: its multiply-accumulates, those without a zero operand, and the cost by scheme."""

    layer: str
    pass_name: str
    macs: float
    effectual_macs: float
    costs: dict[str, Cost]


@dataclass(frozen=True)
class Total:
    """A step, or many: the time, how much of it each part binds, and what is moved and spent."""

    cycles: float
    seconds: float
    cycles_by_bound: dict[str, float]
    bytes_by_level: dict[str, float]
    pj_by_part: dict[str, float]
    joules: float

    def times(self, steps: float) -> Total:
        """The same for so many steps."""
        return Total(
            self.cycles * steps,
            self.seconds * steps,
            _scaled(self.cycles_by_bound, steps),
            _scaled(self.bytes_by_level, steps),
            _scaled(self.pj_by_part, steps),
            self.joules * steps,
        )


@dataclass(frozen=True)
class MacTime:
    """What zeros win of the array's time, with nothing else in the way.

    speedup: cycles of the array without skipping over those with it, in the encoded scheme. gradient_sparsity: zeros of
    dY, weighted by the multiply-accumulates of dgrad and wgrad. upper_bound: of that sparsity (`upper_bound`), for an
    array on which equal multiply-accumulates take equal time. machine_bound: the same on this machine, each product
    weighted by its cycles: it is the larger one where backward fills the array worse than forward. Both are for
    skipping dY alone; a machine that skips weights or activations as well may pass them.
    """

    speedup: float
    gradient_sparsity: float
    upper_bound: float
    machine_bound: float


@dataclass(frozen=True)
class RooflinePoint:
    """A layer and pass in the roofline of main memory; every multiply-accumulate is an executed one.

    macs_per_byte: of main memory. attainable: the lower of the peak rate and macs_per_byte times the bandwidth.
    """

    layer: str
    pass_name: str
    macs_per_byte: float
    attained_macs_per_second: float
    attainable_macs_per_second: float
    peak_macs_per_second: float


@dataclass(frozen=True)
class Estimate:
    """A training step on a machine.

    rows: in the ledger's order of layers. absent: the baselines that the machine cannot run, and why. uncounted: layers
    with weights whose products are not in the ledger, as they multiply in another way than it sees. unrecorded: the
    layers of products whose operands the ledger has no record of.

    gradient_macs, zero_gradient_macs: of dgrad and wgrad in a step, and those whose dY is zero. zero_gradient_cycles:
    the array's time for the latter without skipping.
    """

    machine: Machine
    sampled_steps: list[int]
    rows: list[Row]
    absent: dict[str, str]
    uncounted: list[str]
    unrecorded: list[str]
    gradient_macs: float
    zero_gradient_macs: float
    zero_gradient_cycles: float

    @property
    def schemes(self) -> list[str]:
        """The schemes that the machine can run."""
        return [scheme for scheme in SCHEMES if scheme not in self.absent]

    def totals(self) -> dict[str, Total]:
        """One step, by scheme."""
        return {scheme: self._total([row.costs[scheme] for row in self.rows]) for scheme in self.schemes}

    def training(self, steps: int) -> dict[str, Total]:
        """A whole training of so many steps, by scheme."""
        return {scheme: total.times(steps) for scheme, total in self.totals().items()}

    def mac_time(self) -> MacTime:
        """What skipping wins of the array's time, beside the most that zeros of dY could win."""
        costs = [row.costs["encoded"] for row in self.rows]
        dense = sum(cost.dense_compute_cycles for cost in costs)
        sparsity = self.zero_gradient_macs / self.gradient_macs if self.gradient_macs else 0.0
        left = dense - self.zero_gradient_cycles
        speedup = _ratio(dense, sum(cost.cycles_by_part["compute"] for cost in costs))
        return MacTime(speedup, sparsity, upper_bound(sparsity), _ratio(dense, left))

    def roofline(self, scheme: str = "encoded") -> list[RooflinePoint]:
        """The layers and passes that multiply, in the roofline of main memory."""
        main = self.machine.levels[-1]
        hertz = self.machine.clock_mhz * 1e6
        points = []
        for row in self.rows:
            cost = row.costs[scheme]
            if cost.executed_macs and cost.bytes_by_level[main.name]:
                intensity = cost.executed_macs / cost.bytes_by_level[main.name]
                peak = cost.executed_macs / cost.ideal_compute_cycles * hertz
                attained = cost.executed_macs / cost.cycles * hertz
                attainable = min(peak, intensity * main.bytes_per_cycle * hertz)
                points.append(RooflinePoint(row.layer, row.pass_name, intensity, attained, attainable, peak))
        return points

    def to_data(self) -> dict[str, Any]:
        """Everything as plain data (JSON): the fields, and what follows from them."""
        return {
            **asdict(self),
            "machine": self.machine.model_dump(),
            "totals": {scheme: asdict(total) for scheme, total in self.totals().items()},
            "mac_time": asdict(self.mac_time()),
            "roofline": {scheme: [asdict(point) for point in self.roofline(scheme)] for scheme in self.schemes},
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Estimate:
        """The estimate that `to_data` wrote."""
        rows = [
            Row(**{**row, "costs": {scheme: Cost(**cost) for scheme, cost in row["costs"].items()}})
            for row in data["rows"]
        ]
        names = (
            "sampled_steps",
            "absent",
            "uncounted",
            "unrecorded",
            "gradient_macs",
            "zero_gradient_macs",
            "zero_gradient_cycles",
        )
        return cls(machine=Machine.model_validate(data["machine"]), rows=rows, **{name: data[name] for name in names})

    def _total(self, costs: list[Cost]) -> Total:
        cycles = sum(cost.cycles for cost in costs)
        by_bound: dict[str, float] = defaultdict(float)
        for cost in costs:
            by_bound[cost.binds] += cost.cycles
        pj = _summed(cost.pj_by_part for cost in costs)
        seconds = cycles / (self.machine.clock_mhz * 1e6)
        moved = _summed(cost.bytes_by_level for cost in costs)
        return Total(cycles, seconds, dict(by_bound), moved, pj, sum(pj.values()) / PJ_PER_J)


def upper_bound(sparsity: float) -> float:
    """The most that skipping zeros of dY alone speeds up a step's multiply-accumulates, at this sparsity of dY.

    1 / (1/3 + 2/3 (1 - sparsity)): forward, a third of them or more, has no dY. sparsity: weighted by the
    multiply-accumulates of dgrad and wgrad over all layers, from 0 to 1.
    """
    return 1 / (1 / 3 + 2 / 3 * (1 - sparsity))


def compare(estimates: Iterable[Estimate]) -> list[dict[str, Any]]:
    """One row a machine and scheme: time, energy and traffic of a step, and the same over those of encoded."""
    rows = []
    for estimate in estimates:
        totals = estimate.totals()
        encoded, main = totals["encoded"], estimate.machine.levels[-1].name
        rows += [
            {
                "machine": estimate.machine.name,
                "scheme": scheme,
                "seconds": total.seconds,
                "joules": total.joules,
                "main_memory_bytes": total.bytes_by_level[main],
                "time_over_encoded": _ratio(total.cycles, encoded.cycles),
                "energy_over_encoded": _ratio(total.joules, encoded.joules),
                "traffic_over_encoded": _ratio(total.bytes_by_level[main], encoded.bytes_by_level[main]),
            }
            for scheme, total in totals.items()
        ]
    return rows


def estimate(machine: Machine, ledger: Ledger) -> Estimate:
    """The sampled steps of a ledger on a machine.

    Raises ValueError for a ledger without products, for one whose zeros were not counted at the machine's granularity,
    and where no precision of the machine takes a tensor's format.
    """
    if not ledger.products:
        raise ValueError(
            "the ledger has no products, so there is nothing to estimate: it is of a run before they were counted, or "
            "of one whose ledger sampled no step"
        )
    steps = sorted({product.step for product in ledger.products})
    absent = {
        scheme: f"machine {machine.name!r} has no precision of {DENSE_BITS[scheme]} bits or more"
        for scheme in BASELINES
        if machine.precision(DENSE_BITS[scheme]) is None
    }
    tally = _Tally()
    for (layer, pass_name), entries in _entries(ledger, steps).items():
        macs = sum(product.macs for _, products in entries for product in products)
        effectual = sum(macs_left(product, product.operands, 1) for _, products in entries for product in products)
        costs = {}
        for scheme in SCHEMES:
            if scheme not in absent:
                work = _Work([0.0] * len(machine.levels))
                for records, products in entries:
                    _add(work, tally, machine, scheme, records, products)
                costs[scheme] = _cost(machine, scheme, work, len(steps))
        tally.rows.append(Row(layer, pass_name, macs / len(steps), effectual / len(steps), costs))
    gradient = (tally.gradient_macs, tally.zero_gradient_macs, tally.zero_gradient_cycles)
    return Estimate(
        machine,
        steps,
        tally.rows,
        absent,
        _uncounted(ledger),
        list(tally.unrecorded),
        *(value / len(steps) for value in gradient),
    )


def _uncounted(ledger: Ledger) -> list[str]:
    counted = {product.layer for product in ledger.products}
    weighted = (record.layer for record in ledger.records if record.role == "weight")
    return list(dict.fromkeys(layer for layer in weighted if layer not in counted))


_Entries = tuple[list[Record], list[Product]]  # of a layer and pass in one micro-batch


@dataclass
class _Work:
    """What a layer does in a pass, summed over micro-batches and steps. level_bytes: from the array outward."""

    level_bytes: list[float]
    executed_macs: float = 0
    ideal_cycles: float = 0
    dense_cycles: float = 0
    cycles: float = 0
    mac_pj: float = 0
    decoded_bytes: float = 0
    encoded_bytes: float = 0


@dataclass
class _Tally:
    """What is summed over all rows, beside them."""

    rows: list[Row] = field(default_factory=list)
    unrecorded: dict[str, None] = field(default_factory=dict)
    gradient_macs: float = 0
    zero_gradient_macs: float = 0
    zero_gradient_cycles: float = 0


def _entries(ledger: Ledger, steps: list[int]) -> dict[tuple[str, str], list[_Entries]]:
    """By layer and pass, the records and products of each micro-batch of the steps."""
    found: dict[tuple[str, str], dict[tuple[int, int], _Entries]] = defaultdict(lambda: defaultdict(lambda: ([], [])))
    sampled = set(steps)
    for record in ledger.records:
        if record.step in sampled:
            found[record.layer, record.pass_name][record.step, record.micro_batch][0].append(record)
    for product in ledger.products:
        if product.macs:
            found[product.layer, product.pass_name][product.step, product.micro_batch][1].append(product)
    layers = dict.fromkeys(layer for layer, _ in found)
    keys = ((layer, pass_name) for layer in layers for pass_name in PASSES)
    return {key: list(found[key].values()) for key in keys if key in found}


def _add(
    work: _Work, tally: _Tally, machine: Machine, scheme: str, records: list[Record], products: list[Product]
) -> None:
    """Adds what one micro-batch of a layer does in a pass."""
    outer = range(1, len(machine.levels))
    reads: dict[int, list[int]] = {}  # by record number: of an operand's tensor, into each level before the outer ones
    for number, product in enumerate(products):
        indices = _indices(records, product, number)
        tensors = [records[index].stored for index in indices] or _float32_operands(product)
        first, second = (_operand(stored, scheme) for stored in tensors)
        precision = _precision(machine, product, tensors, (first, second))
        _add_macs(work, tally, machine, scheme, precision, product)
        work.level_bytes[0] += array_bytes(product, machine.array, first, second, machine.accumulator_bits)
        if not indices:
            tally.unrecorded[product.layer] = None
            continue
        for index in indices:
            reads.setdefault(index, [0] * len(machine.levels))
        for level in outer:
            size = machine.levels[level - 1].size_bytes
            found = reads_of(product, machine.array, first, second, machine.accumulator_bits, size)
            reads[indices[0]][level] += found.first
            reads[indices[1]][level] += found.second
            burst = machine.levels[level].burst_bytes
            work.level_bytes[level] += spilled_bytes(product, found.visits, machine.accumulator_bits, burst)
    for index, record in enumerate(records):
        writes = 0 if scheme in record.second_name_in else record.writes
        times = [record.reads * count for count in reads.get(index, [1] * len(machine.levels))]
        for level in outer:
            burst = machine.levels[level].burst_bytes
            work.level_bytes[level] += stream_bytes(record.bits(scheme), burst) * (times[level] + writes)
        if scheme == "encoded" and record.stored.codec not in UNCODED:
            work.decoded_bytes += _operand(record.stored, scheme).tensor_bytes * times[1]
            work.encoded_bytes += _operand(record.stored, scheme).tensor_bytes * writes


def _add_macs(
    work: _Work, tally: _Tally, machine: Machine, scheme: str, precision: Precision, product: Product
) -> None:
    peak = machine.peak_macs_per_cycle(precision)
    dense = dense_cycles(machine, precision, product)
    executed = spent = product.macs
    cycles: float = dense
    if scheme == "encoded":
        skips = machine.skips
        skipped = skips.roles("skipping")
        executed = macs_left(product, skipped, skips.granularity)
        spent = macs_left(product, skips.roles("gating", "skipping"), skips.granularity)
        if any(role in skipped for role in product.operands):
            cycles = skipping_cycles(dense, product.macs, executed, skips.load_balance)
        if "gradient" in product.operands:
            zeros = product.macs - macs_left(product, ("gradient",), 1)
            tally.gradient_macs += product.macs
            tally.zero_gradient_macs += zeros
            tally.zero_gradient_cycles += dense * zeros / product.macs
    work.executed_macs += executed
    work.ideal_cycles += executed / peak
    work.dense_cycles += dense
    work.cycles += cycles
    work.mac_pj += spent * precision.pj_per_mac


def _indices(records: list[Record], product: Product, number: int) -> list[int]:
    """Which records are the tensors of a product's operands, the `number`-th of its layer in this pass. Empty where the
    ledger does not have both.

    Of a layer that runs several times, backward takes the last run first: its products and gradients are entered in
    that order, its inputs and weights in that of forward.
    """
    found = []
    for role in product.operands:
        indices = [index for index, record in enumerate(records) if record.role == role]
        is_turned = product.pass_name != "forward" and role != "gradient"
        found.append(indices[::-1] if is_turned else indices)
    return [indices[min(number, len(indices) - 1)] for indices in found] if all(found) else []


def _float32_operands(product: Product) -> list[Stored]:
    elements = product.rows * product.length, product.length * product.columns
    return [stored_plain(product.groups * count) for count in elements]


def _operand(stored: Stored, scheme: str) -> Operand:
    return Operand(stored.numel, stored.value_bits if scheme == "encoded" else DENSE_BITS[scheme])


def _precision(
    machine: Machine, product: Product, tensors: list[Stored], operands: tuple[Operand, Operand]
) -> Precision:
    bits = [operand.value_bits for operand in operands]
    found = machine.precision(max(bits))
    if found is None:
        wider = bits.index(max(bits))
        widest = max(precision.bits for precision in machine.array.precisions)
        raise ValueError(
            f"layer {product.layer!r}, {product.pass_name}: machine {machine.name!r} multiplies up to {widest} bits, "
            f"too few for the {product.operands[wider]} in {tensors[wider].format} ({bits[wider]} bits)"
        )
    return found


def _cost(machine: Machine, scheme: str, work: _Work, steps: int) -> Cost:
    level_bytes = {level.name: total / steps for level, total in zip(machine.levels, work.level_bytes, strict=True)}
    cycles = {"compute": work.cycles / steps}
    cycles |= {level.name: level_bytes[level.name] / level.bytes_per_cycle for level in machine.levels}
    if machine.codec is not None and scheme == "encoded":
        decoding = work.decoded_bytes / machine.codec.decode_bytes_per_cycle
        encoding = work.encoded_bytes / machine.codec.encode_bytes_per_cycle
        cycles["codec"] = max(decoding, encoding) / steps
    binds = max(cycles, key=lambda part: cycles[part])
    pj = {"mac": work.mac_pj / steps}
    pj |= {level.name: level_bytes[level.name] * level.pj_per_byte for level in machine.levels}
    return Cost(
        executed_macs=work.executed_macs / steps,
        ideal_compute_cycles=work.ideal_cycles / steps,
        dense_compute_cycles=work.dense_cycles / steps,
        cycles_by_part=cycles,
        cycles=cycles[binds],
        binds=binds,
        utilisation=work.ideal_cycles / work.cycles if work.cycles else None,
        bytes_by_level=level_bytes,
        pj_by_part=pj,
    )


def _ratio(over: float, under: float) -> float:
    return over / under if under else (1.0 if not over else math.inf)


def _scaled(values: dict[str, float], factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in values.items()}


def _summed(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row.items():
            sums[name] += value
    return dict(sums)
