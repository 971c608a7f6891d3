"""What a training step stores and moves, counted layer by layer on real tensors, beside dense float32 and bfloat16.

The passes of one step of a layer Y = f(X, W), and what each reads and writes:

    forward   reads X, W            writes Y (the X of the next layer)
    dgrad     reads dY, W           writes dX (the dY of the layer before); the first layer has none
    wgrad     reads dY, X           writes dW
    update    reads W, dW, state    writes W, state

A tensor that one layer writes and the next reads is one tensor, encoded once. Element-wise layers are fused into the
producer; a tensor that they keep for backward (the input of a normalisation) costs its own write, read and storage.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from accel.block_formats import BlockFormat
from accel.codecs import CODECS, BlockCounts, Counts, footprint, footprint_of_blocks
from accel.formats import Format

ROLES = ("weight", "master", "optimizer_state", "weight_gradient", "activation", "norm_input", "addend", "gradient")
PASSES = ("forward", "dgrad", "wgrad", "update")
SCHEMES = ("encoded", "fp32", "bf16")
DENSE_BITS = {"fp32": 32, "bf16": 16}
ALWAYS_FLOAT32 = ("master", "optimizer_state")  # also on a bfloat16 machine
PARTS = ("header", "offsets", "metadata", "payload")
GRANULARITIES = (1, 4, 8, 16, 32)  # of the vectors of zeros that are counted
COUNTED = tuple(name for name, codec in CODECS.items() if codec.is_counted)


@dataclass(frozen=True)
class Stored:
    """How one tensor is stored: its counts, its bits part by part, and what it would take otherwise.

    Entropies are in bits over the whole tensor, None where they were not counted.
    """

    format: str
    codec: str
    value_bits: int
    numel: int
    nonzeros: int
    alphas: int
    bits_by_part: dict[str, float]
    tag_entropy_bits: float | None
    order0_entropy_bits: float | None
    other_codecs_bits: dict[str, float]

    @property
    def nbits(self) -> float:
        return sum(self.bits_by_part.values())

    @property
    def is_float32(self) -> bool:
        return self.format == "fp32" and self.codec == "plain"


def stored_encoded(
    counts: BlockCounts,
    codec: str,
    fmt: Format,
    shape: tuple[int, ...],
    *,
    histogram: tuple[int, ...] | None = None,
    scales: int = 1,
    stream_bits: Mapping[str, float] | None = None,
) -> Stored:
    """A tensor of these counts in `fmt` under `codec`: the length of its real stream, and that of other codecs.

    histogram: how often each distinct code occurs, for the order-0 entropy. scales: how many scales the tensor has;
    the header holds one, each further one adds 32 bits to it. stream_bits: bits by part of the real stream, needed for
    a codec whose length does not follow from counts; such codecs are not among the others.
    """
    total = counts.total
    footprints = {name: footprint_of_blocks(counts, name, fmt, shape) for name in COUNTED}
    further_scales = 32 * (scales - 1)
    bits = dict(footprints[codec].bits_by_part if stream_bits is None else stream_bits)
    bits["header"] += further_scales
    others = {name: other.nbits + further_scales for name, other in footprints.items() if name != codec}
    order0 = None
    if histogram is not None:
        with_codes = Counts(total.numel, total.nonzeros, total.alphas, code_histogram=histogram)
        order0 = footprint(with_codes, codec=codec, fmt=fmt).order0_entropy_bits
    return Stored(
        fmt.name, codec, fmt.bits, total.numel, total.nonzeros, total.alphas, bits,
        footprints["dense"].tag_entropy_bits, order0, others,
    )  # fmt: skip


def stored_blocks(counts: BlockCounts, codec: str, fmt: BlockFormat, shape: tuple[int, ...]) -> Stored:
    """A tensor in a block format: the elements' codes under a codec of COUNTED, and the blocks' scales as metadata.

    counts: of the tensor as it is stored (`BlockFormat.stored_shape`), with the zeros that fill its last blocks. The
    codes' entropy is not counted.
    """
    elements = stored_encoded(counts, codec, fmt.element, fmt.stored_shape(shape))
    scale_bits = fmt.block_count(shape) * fmt.scale.bits
    bits = {**elements.bits_by_part, "metadata": elements.bits_by_part["metadata"] + scale_bits}
    others = {name: other + scale_bits for name, other in elements.other_codecs_bits.items()}
    entropy = None if elements.tag_entropy_bits is None else elements.tag_entropy_bits + scale_bits
    return replace(
        elements, format=fmt.name, numel=math.prod(shape), bits_by_part=bits, tag_entropy_bits=entropy,
        other_codecs_bits=others,
    )  # fmt: skip


def stored_plain(numel: int, nonzeros: int | None = None) -> Stored:
    """A float32 tensor as it lies in memory: 32 bits an element, no header."""
    bits: dict[str, float] = {"header": 0, "offsets": 0, "metadata": 0, "payload": 32 * numel}
    return Stored("fp32", "plain", 32, numel, numel if nonzeros is None else nonzeros, 0, bits, None, None, {})


@dataclass(frozen=True)
class Record:
    """One tensor of one layer in one pass of one step: how often it is read and written as a whole.

    micro_batch: number of the forward pass within the step.
    resident: it takes memory of its own between passes. second_name_in: the schemes in which another record's tensor
    serves (the weights of a float32 run are the optimizer's master copy): there it costs no write and no memory.
    """

    step: int
    micro_batch: int
    layer: str
    role: str
    pass_name: str
    reads: int
    writes: int
    resident: bool
    second_name_in: tuple[str, ...]
    stored: Stored

    def bits(self, scheme: str) -> float:
        """Bits of the tensor: as `encoded`, or dense in `fp32` or `bf16`."""
        if scheme == "encoded":
            return self.stored.nbits
        return self.stored.numel * (32 if self.role in ALWAYS_FLOAT32 else DENSE_BITS[scheme])

    def traffic(self, scheme: str) -> float:
        """Bits read and written."""
        writes = 0 if scheme in self.second_name_in else self.writes
        return self.bits(scheme) * (self.reads + writes)

    def resident_bits(self, scheme: str) -> float:
        return self.bits(scheme) if self.resident and scheme not in self.second_name_in else 0.0


class Effectual(NamedTuple):
    """How many multiply-accumulates of a product have a nonzero first operand, second operand, both."""

    first: int
    second: int
    both: int


@dataclass(frozen=True)
class Product:
    """The multiplications of one layer in one pass of one step: `groups` matrix products (rows, length) x (length,
    columns).

    Of a convolution, as if its input were unfolded: every tap counts, also those that meet the padding, whose operand
    is a zero of X. dgrad is the product of dY and W before its results are added up at their places.

    operands: the roles of the first and the second. effectual: by granularity, a number of GRANULARITIES: a vector of
    so many neighbours along the channels (the input channels of a weight) is zero where all of them are, and counts as
    nonzero as a whole otherwise.
    """

    step: int
    micro_batch: int
    layer: str
    pass_name: str
    operands: tuple[str, str]
    rows: int
    columns: int
    length: int
    groups: int
    effectual: dict[int, Effectual]

    @property
    def macs(self) -> int:
        """Multiply-accumulates, with zeros."""
        return self.groups * self.rows * self.columns * self.length


class Ledger:
    """The records and products of the sampled steps of a run, in the order in which they were made."""

    def __init__(self, records: Iterable[Record] = (), products: Iterable[Product] = ()) -> None:
        self.records, self.products = list(records), list(products)

    def add(
        self,
        step: int,
        layer: str,
        role: str,
        pass_name: str,
        stored: Stored,
        *,
        micro_batch: int = 0,
        reads: int = 0,
        writes: int = 0,
        resident: bool = False,
        second_name_in: Iterable[str] = (),
    ) -> None:
        """Enter one record. Raises ValueError for an unknown role or pass."""
        if role not in ROLES or pass_name not in PASSES:
            raise ValueError(f"role must be one of {ROLES} and pass one of {PASSES} (got {role!r}, {pass_name!r})")
        self.records.append(
            Record(step, micro_batch, layer, role, pass_name, reads, writes, resident, tuple(second_name_in), stored)
        )

    @classmethod
    def summed(cls, ledgers: Sequence[Ledger]) -> Ledger:
        """What several devices stored and moved together, which each made the same steps on a part of every batch.

        Bits and elements add up, a weight's as well, which each device holds; so do products, as further groups.
        Raises ValueError for ledgers of other tensors or products than the first's.
        """
        rows = zip(*(ledger.records for ledger in ledgers), strict=True)
        products = zip(*(ledger.products for ledger in ledgers), strict=True)
        return cls([_summed_record(same) for same in rows], [_summed_product(same) for same in products])

    @property
    def steps(self) -> list[int]:
        """The sampled steps."""
        return sorted({record.step for record in self.records})

    def traffic_bits_per_step(self) -> dict[str, Any]:
        """Bits moved in a step, mean over the sampled steps: {total, by_role, by_pass}, each {encoded, fp32, bf16}."""
        return {
            "total": self._mean_traffic(lambda record: "total").get("total", dict.fromkeys(SCHEMES, 0.0)),
            "by_role": self._mean_traffic(lambda record: record.role),
            "by_pass": self._mean_traffic(lambda record: record.pass_name),
        }

    def _mean_traffic(self, key: Any) -> dict[str, dict[str, float]]:
        sums: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(SCHEMES, 0.0))
        for record in self.records:
            for scheme in SCHEMES:
                sums[key(record)][scheme] += record.traffic(scheme)
        return {name: {scheme: bits / len(self.steps) for scheme, bits in row.items()} for name, row in sums.items()}

    def footprint_bits(self) -> dict[str, Any]:
        """Bits alive at once, at the peak of a step, mean over the sampled steps: {total, by_role}.

        Alive all the time: weights, master copies, optimizer state. Backward frees each layer's saved activations and
        normalisation inputs behind it and leaves its weight gradients, with one layer's dY in flight; micro-batches
        follow one another.
        """
        by_role: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(SCHEMES, 0.0))
        by_step: dict[int, list[Record]] = defaultdict(list)
        for record in self.records:
            by_step[record.step].append(record)
        for records in by_step.values():
            for scheme in SCHEMES:
                for role, bits in peak(records, scheme).items():
                    by_role[role][scheme] += bits / len(by_step)
        total = {scheme: sum(row[scheme] for row in by_role.values()) for scheme in SCHEMES}
        return {"total": total, "by_role": dict(by_role)}

    def tensors(self) -> list[dict[str, Any]]:
        """One row a layer and role, means over the sampled steps: counts, bits by part, bits per element, entropies.

        format: all that the tensor was stored in, the first one first.
        """
        groups: dict[tuple[str, str, str], list[Stored]] = defaultdict(list)
        for record in self.records:
            groups[record.layer, record.role, record.stored.codec].append(record.stored)
        return [_tensor_row(*key, stored) for key, stored in groups.items()]

    def summary(self) -> dict[str, Any]:
        """Everything above, as plain data for reports."""
        return {
            "sampled_steps": self.steps,
            "footprint_bits": self.footprint_bits(),
            "traffic_bits_per_step": self.traffic_bits_per_step(),
            "tensors": self.tensors(),
        }

    def to_data(self, first: int = 0) -> list[dict[str, Any]]:
        """The records from number `first` on, as plain data (JSON)."""
        return [asdict(record) for record in self.records[first:]]

    def products_to_data(self, first: int = 0) -> list[dict[str, Any]]:
        """The products from number `first` on, as plain data (JSON)."""
        return [asdict(product) for product in self.products[first:]]

    @classmethod
    def from_data(cls, data: Iterable[Mapping[str, Any]], products: Iterable[Mapping[str, Any]] = ()) -> Ledger:
        """The ledger that `to_data` and `products_to_data` wrote."""
        rows = ({**row, "stored": Stored(**row["stored"])} for row in data)
        records = (Record(**{**row, "second_name_in": tuple(row["second_name_in"])}) for row in rows)
        return cls(records, map(_product_from, products))


def _product_from(row: Mapping[str, Any]) -> Product:
    effectual = {int(granularity): Effectual(*counts) for granularity, counts in row["effectual"].items()}
    return Product(**{**row, "operands": tuple(row["operands"]), "effectual": effectual})


def peak(records: Iterable[Record], scheme: str) -> dict[str, float]:
    """The largest set of tensors alive at once in one step, as bits by role (see `Ledger.footprint_bits`)."""
    alive: dict[str, float] = defaultdict(float)
    saved: dict[int, list[tuple[str, str, float]]] = defaultdict(list)  # of a micro-batch, in forward order
    in_flight: dict[tuple[int, str], float] = defaultdict(float)  # dY of a micro-batch and layer
    left: dict[str, float] = defaultdict(float)  # weight gradient of a layer
    for record in records:
        bits = record.resident_bits(scheme)
        if record.role in ("activation", "norm_input"):
            if record.pass_name == "forward":
                saved[record.micro_batch].append((record.layer, record.role, bits))
        elif record.role == "weight_gradient":
            left[record.layer] += bits
        elif record.role == "gradient":
            key = record.micro_batch, record.layer
            in_flight[key] = max(in_flight[key], bits)
        else:
            alive[record.role] += bits
    moments = [dict(alive)]
    for micro_batch, tensors in saved.items():
        for _, role, bits in tensors:
            alive[role] += bits
        for layer, role, bits in reversed(tensors):
            alive["weight_gradient"] += left.pop(layer, 0.0)
            moments.append({**alive, "gradient": in_flight[micro_batch, layer]})
            alive[role] -= bits
    alive["weight_gradient"] += sum(left.values())
    moments.append(dict(alive))
    return max(moments, key=lambda moment: sum(moment.values()))


def _summed_record(records: tuple[Record, ...]) -> Record:
    first, stored = records[0], [record.stored for record in records]
    if any(replace(record, stored=first.stored) != first for record in records):
        raise ValueError(f"the devices did not store the same tensors: {first.layer} {first.role} differs")

    def total(values: Iterable[float | None]) -> float | None:
        known = list(values)
        return None if None in known else sum(value for value in known if value is not None)

    one = stored[0]
    return replace(
        first,
        stored=replace(
            one,
            numel=sum(s.numel for s in stored),
            nonzeros=sum(s.nonzeros for s in stored),
            alphas=sum(s.alphas for s in stored),
            bits_by_part={part: sum(s.bits_by_part[part] for s in stored) for part in PARTS},
            tag_entropy_bits=total(s.tag_entropy_bits for s in stored),
            order0_entropy_bits=total(s.order0_entropy_bits for s in stored),
            other_codecs_bits={name: sum(s.other_codecs_bits[name] for s in stored) for name in one.other_codecs_bits},
        ),
    )


def _summed_product(products: tuple[Product, ...]) -> Product:
    first = products[0]
    if any(replace(p, effectual=first.effectual) != first for p in products):
        raise ValueError(f"the devices did not make the same products: {first.layer} {first.pass_name} differs")
    effectual = {
        of: Effectual(*(sum(counts) for counts in zip(*(p.effectual[of] for p in products), strict=True)))
        for of in first.effectual
    }
    return replace(first, groups=sum(p.groups for p in products), effectual=effectual)


def _tensor_row(layer: str, role: str, codec: str, stored: list[Stored]) -> dict[str, Any]:
    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    numel = float(np.mean([s.numel for s in stored]))
    bits = {part: float(np.mean([s.bits_by_part[part] for s in stored])) for part in PARTS}
    total = sum(bits.values())
    others = {
        name: mean(s.other_codecs_bits[name] / max(s.numel, 1) for s in stored) for name in stored[0].other_codecs_bits
    }
    nonzeros, alphas = float(np.mean([s.nonzeros for s in stored])), float(np.mean([s.alphas for s in stored]))
    return {
        "layer": layer,
        "role": role,
        "format": ", ".join(dict.fromkeys(s.format for s in stored)),
        "codec": codec,
        "numel": numel,
        "nonzeros": nonzeros,
        "alphas": alphas,
        "survivors": nonzeros - alphas,
        "value_bits": stored[0].value_bits,
        "bits": {**bits, "total": total},
        "bits_per_element": total / max(numel, 1),
        "tag_entropy_bits_per_element": mean(
            None if s.tag_entropy_bits is None else s.tag_entropy_bits / max(s.numel, 1) for s in stored
        ),
        "order0_entropy_bits_per_element": mean(
            None if s.order0_entropy_bits is None else s.order0_entropy_bits / max(s.numel, 1) for s in stored
        ),
        "other_codecs_bits_per_element": others,
    }
