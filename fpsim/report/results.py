"""results.json: what a run leaves behind for the report, and how it is read back."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails, from_json
from typing_extensions import TypedDict

from fpsim.errors import ConfigError, Problem

SCHEMA_VERSION = 1
DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILE_NAME = "results.json"

documented = with_config({"strict": True, "use_attribute_docstrings": True})  # a field's text is its description


@documented
class Bits(TypedDict):
    """The same tensors as this run stores them, and as a dense float32 or bfloat16 run would."""

    encoded: float
    """Bits of the run's streams."""
    fp32: float
    """Bits in dense float32."""
    bf16: float
    """Bits in dense bfloat16; master copies and optimizer state stay float32."""


@documented
class Footprint(TypedDict):
    """Bits alive at once, peak over a step, mean over the sampled steps."""

    total: Bits
    """Of all tensors."""
    by_role: dict[str, Bits]
    """By what the tensors are: weight, master, optimizer_state, weight_gradient, activation, norm_input, gradient."""


@documented
class Traffic(TypedDict):
    """Bits read and written in one step, mean over the sampled steps."""

    total: Bits
    """Of all tensors."""
    by_role: dict[str, Bits]
    """By what the tensors are, as in the footprint, and addend."""
    by_pass: dict[str, Bits]
    """By pass: forward, dgrad, wgrad, update."""


@documented
class EncodedBits(TypedDict):
    """One tensor's stream, part by part, in bits."""

    header: float
    """Of the stream's header."""
    offsets: float
    """Of the table of block offsets."""
    metadata: float
    """Of what says where the values are."""
    payload: float
    """Of the values."""
    total: float
    """Of all parts."""


@documented
class TensorRecord(TypedDict):
    """One tensor of one layer, means over the sampled steps."""

    layer: str
    """Name of the module."""
    role: str
    """What the tensor is, as in the footprint."""
    format: str
    """The number format; of a layer that changes it, all of them."""
    codec: str
    """The sparse encoding; plain for float32."""
    numel: float
    """Elements."""
    nonzeros: float
    """Elements that are not zero."""
    alphas: float
    """Elements that are +alpha or -alpha."""
    survivors: float
    """Other nonzeros."""
    value_bits: int
    """Bits of a value of the format."""
    bits: EncodedBits
    """The stream."""
    bits_per_element: float
    """All bits of the stream over the elements."""
    tag_entropy_bits_per_element: float | None
    """Least bits an element that coding {0, +alpha, -alpha, value} apart could reach with values stored raw; null where
    it was not counted."""
    order0_entropy_bits_per_element: float | None
    """Least bits an element that coding the codes alone could reach; null where they were not counted."""
    other_codecs_bits_per_element: dict[str, float]
    """What other codecs would take for the same tensor, by name."""


@documented
class LedgerSummary(TypedDict):
    """What was stored and moved, counted on the sampled steps."""

    sampled_steps: list[int]
    """Numbers of the steps, from 0."""
    footprint_bits: Footprint
    """Bits alive at once."""
    traffic_bits_per_step: Traffic
    """Bits moved in a step."""
    tensors: list[TensorRecord]
    """One entry a layer and role."""


@documented
class EpochRecord(TypedDict):
    """Metrics at the end of one epoch; null where an epoch measured nothing of the kind."""

    epoch: int
    """From 1."""
    step: int
    """Steps made so far."""
    learning_rate: float
    """Of the last step."""
    train_loss: float | None
    """Mean over the epoch's steps."""
    train_accuracy_percent: float | None
    """Mean over the epoch's steps."""
    test_loss: float | None
    """Over the test set."""
    test_accuracy_percent: float | None
    """Over the test set."""
    gradient_sparsity: float | None
    """Share of zeros in all pruned gradients of the last step."""
    weight_sparsity: NotRequired[float | None]
    """Share of zeros in all pruned weights."""


@documented
class PrunedGradient(TypedDict):
    """One layer's pruned neural gradient, means over every step; the lognormal rule saw the same tensors."""

    layer: str
    """Name of the module."""
    asked_sparsity: float
    """Share of zeros asked for."""
    achieved_sparsity: float
    """Share of zeros, those that the gradient had before included."""
    achieved_std: float
    """Standard deviation of that share over the steps."""
    lognormal_rule_sparsity: float | None
    """What the threshold of a fitted lognormal would have achieved; null before any fit."""
    alpha_share_of_nonzeros: float | None
    """Share of +-alpha among the nonzeros; null where there were none."""
    alpha: NotRequired[float]
    """The threshold in force at the end."""
    alpha_kept: NotRequired[str]
    """How +-alpha stays exact: streams, reserved, snap, or none."""
    bias: NotRequired[float | None]
    """Sum of the pruned and rounded magnitudes over that of the exact ones, minus 1; mean over the recorded steps."""
    bias_standard_error: NotRequired[float | None]
    """Of that mean."""
    cosine: NotRequired[float | None]
    """Between the gradient and the pruned and rounded one; mean over the recorded steps."""
    steps: int
    """Over which the means are."""


@documented
class GradientFormat(TypedDict):
    """The format at the end of a layer that chooses its gradient's."""

    layer: str
    """Name of the module."""
    format: str
    """The one in force."""
    sigma_log2: float | None
    """The spread of log2|dY| that it follows; null before any fit."""
    renewals: int
    """How often it was chosen anew."""
    changes: int
    """How often that led to other exponent bits."""


@documented
class PrunedWeight(TypedDict):
    """One layer's weight under the mask that a run ends with."""

    layer: str
    """Name of the module."""
    numel: int
    """Elements."""
    zeros: int
    """Elements that the mask prunes."""


@documented
class Renewal(TypedDict):
    """One renewal of the masks."""

    step: int
    """Steps made before it."""
    sparsity: float
    """Share of zeros after it."""
    pruned: int
    """Weights that it pruned."""
    returned: int
    """Weights that it took back."""


@documented
class SnrHistogram(TypedDict):
    """How many weights have which floor(log2 snr); those beyond are in the first and the last."""

    lowest: int
    """Of the first count."""
    counts: list[int]
    """For lowest, lowest + 1, ..."""


@documented
class PrunedWeights(TypedDict):
    """What weight pruning did."""

    name: str
    """The method."""
    sparsity: float
    """Share of zeros at the end."""
    renewals: int
    """How often the masks were renewed."""
    returned: int
    """Weights that a renewal took back, over all renewals."""
    layers: list[PrunedWeight]
    """One entry a layer."""
    history: list[Renewal]
    """One entry a renewal."""
    threshold: NotRequired[float]
    """Of the signal-to-noise ratio; for snr, from the first renewal on, as the three below."""
    parts: NotRequired[int | None]
    """Of a batch, whose gradients are compared; null for whole gradients."""
    false_prune_rate: NotRequired[float]
    """Share of weights without any signal that the threshold prunes."""
    log2_snr: NotRequired[SnrHistogram]
    """At the latest renewal."""


@documented
class Communication(TypedDict):
    """What each of several ranks sent of its weight gradients: counted on the streams."""

    ranks: int
    """How many."""
    format: str
    """Of the values sent."""
    codec: str | None
    """Of the streams; null for float32."""
    sent_bytes_per_step: float
    """Bytes of a rank's streams."""
    float32_bytes_per_step: float
    """What float32 would have sent."""


@documented
class Series(TypedDict):
    """One encoded tensor of one layer over the sampled steps; null where a step has none."""

    layer: str
    """Name of the module."""
    role: str
    """weight, activation or gradient."""
    sparsity: list[float | None]
    """Share of zeros."""
    bits_per_element: list[float | None]
    """Bits of the stream over the elements."""
    cosine: NotRequired[list[float | None]]
    """Between a gradient and the pruned and rounded one, of a step's first micro-batch."""


@documented
class OverTime(TypedDict):
    """What the ledger counted, step by step."""

    steps: list[int]
    """Numbers of the sampled steps, from 0."""
    series: list[Series]
    """One entry a layer and role."""


@documented
class Log2Histogram(TypedDict):
    """How many elements have which log2|x|, in equal bins."""

    lowest: float
    """Where the first bin begins."""
    highest: float
    """Where the last bin ends."""
    counts: list[int]
    """Of each bin."""


@documented
class Sample(TypedDict):
    """The nonzeros of a sample of at most 4096 elements. Quantiles are in standard deviations from the mean: those of a
    normal (of x), or of a lognormal (of log2|x|), are equal to `sigmas`."""

    count: int
    """Nonzeros."""
    mean: float
    """Of x."""
    std: float
    """Of x."""
    mean_log2: float
    """Of log2|x|."""
    std_log2: float
    """Of log2|x|."""
    log2_histogram: Log2Histogram
    """Of log2|x|."""
    sigmas: list[float]
    """Standard deviations of a normal, at whose probabilities the quantiles are."""
    quantiles: list[float]
    """Of x."""
    log2_quantiles: list[float]
    """Of log2|x|."""


@documented
class TensorDistribution(TypedDict):
    """One tensor of the latest recorded step, before it was pruned and rounded."""

    layer: str
    """Name of the module."""
    role: str
    """weight, activation, gradient or weight_gradient."""
    step: int
    """Number of the step, from 0."""
    elements: int
    """All of them."""
    zeros: int
    """Elements that are zero."""
    mean_log2: float | None
    """Of log2|x| over all nonzeros; null where there are none."""
    std_log2: float | None
    """Of log2|x| over all nonzeros."""
    statistics: dict[str, float | None] | None
    """Kolmogorov-Smirnov D of seven distributions fitted to the sample, of gradients; null without a fit."""
    format: str | None
    """How it is stored; null for float32."""
    scale: float | None
    """What it is divided by before it is rounded, of several the median; null for float32 and for blocks."""
    scales: int | None
    """How many scales it has."""
    alpha: float | None
    """The threshold of pruning; null where nothing is pruned."""
    sample: Sample | None
    """Null where two different magnitudes are not there."""


@documented
class Numbers(TypedDict):
    """The numbers of a format, of a block format those of its elements."""

    bits: int
    """Of a number."""
    block_size: int | None
    """Elements that share a scale; null for scalar formats."""
    max: float
    """The largest number."""
    min_normal: float
    """The smallest normal number."""
    min_subnormal: float
    """The smallest positive number."""
    positive_numbers: list[float] | None
    """All of them, ascending, up to 8 bits; null beyond."""


@documented
class MachineTotal(TypedDict):
    """A step under one scheme."""

    seconds: float
    """Time."""
    joules: float
    """Energy."""
    main_memory_bytes: float
    """Read from and written to main memory."""
    seconds_by_bound: dict[str, float]
    """Time by what binds it: compute, a memory level, codec."""
    joules_by_part: dict[str, float]
    """Energy by where it goes: mac, a memory level."""


@documented
class MachineCost(TypedDict):
    """A layer in a pass of a step under one scheme."""

    seconds: float
    """Time."""
    joules: float
    """Energy."""
    main_memory_bytes: float
    """Read from and written to main memory."""
    bound_by: str
    """What binds the time."""
    executed_macs: float
    """Multiply-accumulates that take cycles."""
    peak_macs_per_second: float | None
    """Of the array at the precision of the operands; null without a product."""


MachineRow = TypedDict(
    "MachineRow",
    {
        "layer": Annotated[str, Field(description="Name of the module.")],
        "pass": Annotated[str, Field(description="forward, dgrad, wgrad or update.")],
        "macs": Annotated[float, Field(description="Multiply-accumulates.")],
        "effectual_macs": Annotated[float, Field(description="Those without a zero operand.")],
        "schemes": Annotated[dict[str, MachineCost], Field(description="By scheme: encoded, fp32, bf16.")],
    },
)  # `pass` cannot be an attribute
MachineRow.__doc__ = "One layer in one pass of a step."


@documented
class MachineCosts(TypedDict):
    """A step of the run on one machine (see `accel.machine`), as `encoded`, and dense in `fp32` and `bf16`."""

    machine: str
    """Its name."""
    main_memory: str
    """Name of its outermost level."""
    main_memory_bytes_per_second: float
    """Bandwidth."""
    error: str | None
    """Why it cannot run it; null else."""
    totals: dict[str, MachineTotal]
    """By scheme."""
    rows: list[MachineRow]
    """By layer and pass."""


@documented
class Results(TypedDict):
    """results.json: what a run came to. A new schema version means that a field is gone or means something else; what
    is only added keeps the version. A run that did not complete may lack its accuracy."""

    schema_version: int
    """1."""
    name: str
    """Of the run."""
    config_hash: str
    """8 hex digits of the SHA-256 of all that can change the results."""
    status: str
    """completed."""
    seed: int
    """Of the run."""
    emulated: bool
    """Whether hardware was emulated; else everything was float32."""
    epochs: int
    """Trained."""
    steps: int
    """Of the optimizer."""
    wall_seconds: float
    """Time that the training took, all resumptions together."""
    model: str
    """The network."""
    parameters: int
    """Trainable and other parameters of the network."""
    data: str
    """What it was trained and tested on."""
    test_accuracy_percent: float | None
    """At the end."""
    best_test_accuracy_percent: float | None
    """Of all epochs."""
    test_loss: float | None
    """At the end."""
    history: list[EpochRecord]
    """One entry an epoch."""
    gradients: list[PrunedGradient]
    """One entry a layer whose neural gradient is pruned."""
    gradient_formats: NotRequired[list[GradientFormat]]
    """One entry a layer that chooses its format."""
    weight_pruning: NotRequired[PrunedWeights | None]
    """Null where no weights are pruned."""
    ledger: LedgerSummary
    """What was stored and moved."""
    communication: NotRequired[Communication | None]
    """Null for one rank."""
    notes: NotRequired[list[str]]
    """What a reader must know."""
    over_time: NotRequired[OverTime | None]
    """What the ledger counted, step by step."""
    distributions: NotRequired[list[TensorDistribution]]
    """One entry a layer and tensor."""
    formats: NotRequired[dict[str, Numbers]]
    """The formats of the run's tensors, by name."""
    machines: NotRequired[list[MachineCosts]]
    """On the configured machine, else on all that come with fpsim."""
    config: NotRequired[dict[str, Any]]
    """The resolved configuration (`fpsim schema` describes it), without the keys that change no result."""
    environment: dict[str, Any]
    """Versions, processor, threads, ranks (world_size) and commit that the run ended with."""


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
        data = from_json(file.read_bytes(), allow_inf_nan=False)
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


def results_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of results.json."""
    return {"$schema": DIALECT, **TypeAdapter(Results).json_schema(), "title": "fpsim results.json"}


def _problem(file: Path, item: ErrorDetails) -> Problem:
    got = "" if item["type"] == "missing" else f" (got {item['input']!r:.80})"
    return Problem(".".join(map(str, item["loc"])), f"{item['msg'].lower()}{got}", str(file))


def _error(place: Path, message: str, field: str = "") -> ConfigError:
    return ConfigError([Problem(field, message, str(place))])
