"""The comparison document, which `fpsim report --format json` prints: every field, with its unit."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from fpsim.report.results import (
    DIALECT,
    Communication,
    EpochRecord,
    MachineCosts,
    Numbers,
    OverTime,
    PrunedWeights,
    TensorDistribution,
    TensorRecord,
    documented,
)

DOCUMENT_VERSION = 1


@documented
class Sizes(TypedDict):
    """The same tensors as a run stores them, and dense."""

    encoded_mib: float
    """MiB of the run's streams."""
    fp32_mib: float
    """MiB in dense float32."""
    bf16_mib: float
    """MiB in dense bfloat16; master copies and optimizer state stay float32."""
    fp32_ratio: float | None
    """Dense float32 over encoded: above 1 is a saving."""
    bf16_ratio: float | None
    """Dense bfloat16 over encoded."""


@documented
class FootprintSizes(TypedDict):
    """Alive at once, peak over a step."""

    total: Sizes
    """Of all tensors."""
    by_role: dict[str, Sizes]
    """By what the tensors are."""


@documented
class TrafficSizes(TypedDict):
    """Read and written in a step."""

    total: Sizes
    """Of all tensors."""
    by_role: dict[str, Sizes]
    """By what the tensors are."""
    by_pass: dict[str, Sizes]
    """By pass: forward, dgrad, wgrad, update."""


@documented
class Baseline(TypedDict):
    """The float32 run that a run is measured against."""

    label: str
    """Its label."""
    differences: dict[str, Any]
    """What it differs in, beside the arithmetic: [this run's, the baseline's] by key; empty where it is like for
    like."""
    accuracy_difference_points: float | None
    """Final test accuracy of this run less that of the baseline."""


@documented
class Sparsities(TypedDict):
    """Shares of zeros in the pruned gradients, means over the layers weighted by elements; null where nothing is
    pruned."""

    asked_percent: float | None
    """Asked for."""
    achieved_percent: float | None
    """Achieved."""
    lognormal_percent: float | None
    """What the lognormal rule would have achieved."""
    lognormal_miss_points: float | None
    """The latter less what was asked."""


@documented
class LayerGradient(TypedDict):
    """One layer's neural gradient: how it was pruned (null where it was not) and stored (null where no step was
    sampled)."""

    layer: str
    """Name of the module."""
    asked_percent: float | None
    """Share of zeros asked for."""
    achieved_percent: float | None
    """Share of zeros, mean over every step."""
    achieved_std_points: float | None
    """Standard deviation of that over the steps."""
    miss_points: float | None
    """Achieved less asked."""
    alpha_kept: str | None
    """How +-alpha stays exact: streams, reserved, snap, or none."""
    bias_percent: float | None
    """Sum of the pruned magnitudes over that of the exact ones, minus 1."""
    bias_error_points: float | None
    """Standard error of that."""
    cosine: float | None
    """Between the gradient and the pruned and rounded one."""
    lognormal_percent: float | None
    """What the lognormal rule would have achieved."""
    lognormal_miss_points: float | None
    """The latter less what was asked."""
    numel: float | None
    """Elements."""
    format: str | None
    """The number format."""
    codec: str | None
    """The sparse encoding."""
    bits_per_element: float | None
    """Bits of the stream over the elements."""
    tag_entropy: float | None
    """Bits an element."""
    order0_entropy: float | None
    """Bits an element."""
    other_codecs: dict[str, float]
    """Bits an element under other codecs, by name."""


@documented
class ComparedRun(TypedDict):
    """One run; what is described in results.json (`fpsim schema results`) is as it is there."""

    label: str
    """What the run is called in this report: no other has the same."""
    group: str
    """One name for runs that differ in the seed alone."""
    name: str
    """Of the run."""
    config_hash: str
    """As in results.json."""
    status: str
    """As in results.json."""
    seed: int
    """As in results.json."""
    emulated: bool
    """Whether hardware was emulated."""
    epochs: int
    """As in results.json."""
    steps: int
    """As in results.json."""
    wall_seconds: float
    """As in results.json."""
    model: str
    """As in results.json."""
    parameters: int
    """As in results.json."""
    data: str
    """As in results.json."""
    test_accuracy_percent: float | None
    """As in results.json."""
    best_test_accuracy_percent: float | None
    """As in results.json."""
    history: list[EpochRecord]
    """As in results.json."""
    environment: dict[str, Any]
    """As in results.json."""
    baseline: Baseline | None
    """Null for a float32 run, and where there is none beside it."""
    sampled_steps: int
    """How many steps the ledger sampled."""
    footprint: FootprintSizes
    """Alive at once."""
    traffic: TrafficSizes
    """Moved in a step."""
    sparsity: Sparsities
    """Of the pruned gradients."""
    weight_pruning: PrunedWeights | None
    """As in results.json."""
    communication: Communication | None
    """As in results.json."""
    notes: list[str]
    """As in results.json."""
    gradient_bits: float | None
    """Bits an element of all neural gradients, mean weighted by elements."""
    pruned_gradient_bits: float | None
    """The same of the pruned ones."""
    pruned_tag_entropy: float | None
    """Bits an element of the pruned ones."""
    pruned_order0_entropy: float | None
    """Bits an element of the pruned ones."""
    pruned_other_codecs: dict[str, float | None]
    """Bits an element of the pruned ones under other codecs."""
    gradients: list[LayerGradient]
    """One entry a layer."""
    tensors: list[TensorRecord]
    """The ledger's, as in results.json."""
    over_time: OverTime | None
    """As in results.json."""
    distributions: list[TensorDistribution] | None
    """As in results.json."""
    formats: dict[str, Numbers] | None
    """As in results.json."""
    machines: list[MachineCosts] | None
    """As in results.json, or on the machines that were asked for."""
    config: dict[str, Any] | None
    """As in results.json."""


@documented
class Comparison(TypedDict):
    """Runs side by side. A new schema version means that a field is gone or means something else."""

    schema_version: int
    """1."""
    runs: list[ComparedRun]
    """In the order given."""


def document_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of the document."""
    return {"$schema": DIALECT, **TypeAdapter(Comparison).json_schema(), "title": "fpsim report --format json"}
