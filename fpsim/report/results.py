"""results.json: what a run leaves behind for the report, and how it is read back."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails, from_json
from typing_extensions import TypedDict

from fpsim.errors import ConfigError, Problem

SCHEMA_VERSION = 1
FILE_NAME = "results.json"


class Bits(TypedDict):
    """The same tensors as this run stores them, and as a dense float32 or bfloat16 run would."""

    encoded: float
    fp32: float
    bf16: float


class Footprint(TypedDict):
    """Bits alive at once, peak over a step."""

    total: Bits
    by_role: dict[str, Bits]


class Traffic(TypedDict):
    """Bits read and written in one step."""

    total: Bits
    by_role: dict[str, Bits]
    by_pass: dict[str, Bits]


class EncodedBits(TypedDict):
    """One tensor's stream, part by part."""

    header: float
    offsets: float
    metadata: float
    payload: float
    total: float


class TensorRecord(TypedDict):
    """One tensor of one layer, means over the sampled steps; entropies are None where they were not counted."""

    layer: str
    role: str
    format: str
    codec: str
    numel: float
    nonzeros: float
    alphas: float
    survivors: float
    value_bits: int
    bits: EncodedBits
    bits_per_element: float
    tag_entropy_bits_per_element: float | None
    order0_entropy_bits_per_element: float | None
    other_codecs_bits_per_element: dict[str, float]


class LedgerSummary(TypedDict):
    """What was stored and moved, counted on the sampled steps."""

    sampled_steps: list[int]
    footprint_bits: Footprint
    traffic_bits_per_step: Traffic
    tensors: list[TensorRecord]


class EpochRecord(TypedDict):
    """Metrics at the end of one epoch; None where an epoch measured nothing of the kind."""

    epoch: int
    step: int
    learning_rate: float
    train_loss: float | None
    train_accuracy_percent: float | None
    test_loss: float | None
    test_accuracy_percent: float | None
    gradient_sparsity: float | None
    weight_sparsity: NotRequired[float | None]


class PrunedGradient(TypedDict):
    """One layer's pruned neural gradient, means over every step; the lognormal rule saw the same tensors.

    bias, cosine: means over the recorded steps.
    """

    layer: str
    asked_sparsity: float
    achieved_sparsity: float
    achieved_std: float
    lognormal_rule_sparsity: float | None
    alpha_share_of_nonzeros: float | None
    alpha: NotRequired[float]
    alpha_kept: NotRequired[str]
    bias: NotRequired[float | None]
    bias_standard_error: NotRequired[float | None]
    cosine: NotRequired[float | None]
    steps: int


class GradientFormat(TypedDict):
    """The format at the end of a layer that chooses its gradient's; sigma_log2: the spread of log2|dY| it follows.

    renewals, changes: how often it was chosen anew, and how often that led to other exponent bits.
    """

    layer: str
    format: str
    sigma_log2: float | None
    renewals: int
    changes: int


class PrunedWeight(TypedDict):
    """One layer's weight under the mask that a run ends with."""

    layer: str
    numel: int
    zeros: int


class Renewal(TypedDict):
    """One renewal of the masks: how many weights it pruned, and took back."""

    step: int
    sparsity: float
    pruned: int
    returned: int


class SnrHistogram(TypedDict):
    """How many weights have floor(log2 snr) = lowest, lowest + 1, ...; those beyond are in the first and the last."""

    lowest: int
    counts: list[int]


class PrunedWeights(TypedDict):
    """What weight pruning did. returned: weights that a renewal of the masks took back, over all renewals.

    threshold, parts, false_prune_rate, log2_snr (of the latest renewal): for snr, from the first renewal on; parts is
    None for ema.
    """

    name: str
    sparsity: float
    renewals: int
    returned: int
    layers: list[PrunedWeight]
    history: list[Renewal]
    threshold: NotRequired[float]
    parts: NotRequired[int | None]
    false_prune_rate: NotRequired[float]
    log2_snr: NotRequired[SnrHistogram]


class Communication(TypedDict):
    """What each of several ranks sent of its weight gradients, and what float32 would have sent: bytes a step, counted
    on the streams. codec: None for float32."""

    ranks: int
    format: str
    codec: str | None
    sent_bytes_per_step: float
    float32_bytes_per_step: float


class Series(TypedDict):
    """One encoded tensor of one layer over the sampled steps; None where a step has none.

    cosine: between dY and the pruned and rounded dY, of a step's first micro-batch; of pruned gradients.
    """

    layer: str
    role: str
    sparsity: list[float | None]
    bits_per_element: list[float | None]
    cosine: NotRequired[list[float | None]]


class OverTime(TypedDict):
    """What the ledger counted, step by step. steps: from 0."""

    steps: list[int]
    series: list[Series]


class Log2Histogram(TypedDict):
    """How many have log2|x| in each of the equal bins from `lowest` to `highest`."""

    lowest: float
    highest: float
    counts: list[int]


class Sample(TypedDict):
    """The nonzeros of a sample of at most 4096 elements: moments of x and of log2|x|.

    quantiles (of x), log2_quantiles (of log2|x|): in standard deviations from their means, at the probabilities that a
    normal has below `sigmas`: a normal's, and a lognormal's, are equal to them.
    """

    count: int
    mean: float
    std: float
    mean_log2: float
    std_log2: float
    log2_histogram: Log2Histogram
    sigmas: list[float]
    quantiles: list[float]
    log2_quantiles: list[float]


class TensorDistribution(TypedDict):
    """One tensor of the latest recorded step before it was pruned and rounded; mean and deviation of log2|x| over all
    nonzeros; statistics: D of seven distributions, of gradients.

    format, scale (of several the median, with their number in `scales`; None for blocks), alpha: how it was stored;
    None for float32. sample: None where two different magnitudes are not there.
    """

    layer: str
    role: str
    step: int
    elements: int
    zeros: int
    mean_log2: float | None
    std_log2: float | None
    statistics: dict[str, float | None] | None
    format: str | None
    scale: float | None
    scales: int | None
    alpha: float | None
    sample: Sample | None


class Numbers(TypedDict):
    """The numbers of a format, of a block format those of its elements; positive_numbers: up to 8 bits."""

    bits: int
    block_size: int | None
    max: float
    min_normal: float
    min_subnormal: float
    positive_numbers: list[float] | None


class MachineTotal(TypedDict):
    """A step under one scheme, and its parts by what binds them and by where the energy goes."""

    seconds: float
    joules: float
    main_memory_bytes: float
    seconds_by_bound: dict[str, float]
    joules_by_part: dict[str, float]


class MachineCost(TypedDict):
    """A layer in a pass of a step under one scheme. peak_macs_per_second: at its precision, None without a product."""

    seconds: float
    joules: float
    main_memory_bytes: float
    bound_by: str
    executed_macs: float
    peak_macs_per_second: float | None


MachineRow = TypedDict(
    "MachineRow",
    {"layer": str, "pass": str, "macs": float, "effectual_macs": float, "schemes": dict[str, MachineCost]},
)
MachineRow.__doc__ = "One layer in one pass: multiply-accumulates, those without a zero operand, costs by scheme."


class MachineCosts(TypedDict):
    """A step of the run on one machine (see `accel.machine`), as `encoded`, and dense in `fp32` and `bf16`.

    error: why the machine cannot run it; None else.
    """

    machine: str
    main_memory: str
    main_memory_bytes_per_second: float
    error: str | None
    totals: dict[str, MachineTotal]
    rows: list[MachineRow]


@with_config({"strict": True})
class Results(TypedDict):
    """The whole of results.json, schema version 1; a run that did not complete may lack its accuracy."""

    schema_version: int
    name: str
    config_hash: str
    status: str
    seed: int
    emulated: bool
    epochs: int
    steps: int
    wall_seconds: float
    model: str
    parameters: int
    data: str
    test_accuracy_percent: float | None
    best_test_accuracy_percent: float | None
    test_loss: float | None
    history: list[EpochRecord]
    gradients: list[PrunedGradient]
    gradient_formats: NotRequired[list[GradientFormat]]
    weight_pruning: NotRequired[PrunedWeights | None]
    ledger: LedgerSummary
    communication: NotRequired[Communication | None]
    notes: NotRequired[list[str]]
    over_time: NotRequired[OverTime]
    distributions: NotRequired[list[TensorDistribution]]
    formats: NotRequired[dict[str, Numbers]]
    machines: NotRequired[list[MachineCosts]]
    config: NotRequired[dict[str, Any]]
    environment: dict[str, Any]


def load_results(run_dir: Path) -> Results:
    """Read and check `run_dir`/results.json.

    Raises ConfigError where the directory or the file is missing, is not JSON, lacks a field or holds a wrong one, or
    has another schema version than this fpsim reads.
    """
    if not run_dir.is_dir():
        siblings = [path.name for path in run_dir.parent.iterdir()] if run_dir.parent.is_dir() else []
        nearest = get_close_matches(run_dir.name, siblings, n=1)
        raise _error(run_dir, "no such run directory" + (f"; did you mean '{nearest[0]}'?" if nearest else ""))
    file = run_dir / FILE_NAME
    try:
        data = from_json(file.read_bytes())
    except FileNotFoundError:
        message = f"no {FILE_NAME} in it: not a run directory, or a run that has not finished (see `fpsim resume`)"
        raise _error(run_dir, message) from None
    except OSError as error:
        raise _error(file, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _error(file, f"not valid JSON: {error}") from error
    return checked_results(data, file)


def checked_results(data: Any, file: Path) -> Results:
    """The content of a results.json, read from `file`. Raises ConfigError where it lacks a field or holds a wrong one,
    or has another schema version than this fpsim reads."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise _error(file, f"expected schema_version {SCHEMA_VERSION}, got {version!r}", "schema_version")
    try:
        return TypeAdapter(Results).validate_python(data)
    except ValidationError as error:
        raise ConfigError(_problem(file, item) for item in error.errors()) from error


def _problem(file: Path, item: ErrorDetails) -> Problem:
    got = "" if item["type"] == "missing" else f" (got {item['input']!r:.80})"
    return Problem(".".join(map(str, item["loc"])), f"{item['msg'].lower()}{got}", str(file))


def _error(place: Path, message: str, field: str = "") -> ConfigError:
    return ConfigError([Problem(field, message, str(place))])
