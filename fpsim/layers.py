"""Which layers of a model are emulated, and how: layer patterns resolved against the modules."""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import accel
from accel.arguments import check_block
from fpsim.config.schema import (
    Datapath,
    DensePruning,
    Emulation,
    GradientSpec,
    SnrPruning,
    TensorSpec,
    WeightPruning,
    mac,
    number_format,
)

OTHERS = (nn.Embedding, nn.EmbeddingBag, nn.Bilinear)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def format_of(spec: TensorSpec) -> accel.Format | accel.BlockFormat:
    """The number format of a tensor specification."""
    return number_format(spec.format)


class PatternError(ValueError):
    """A pattern that matches no layer, or an option that does not fit the model. `path` is its place in the emulation
    section (`exclude.0`)."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class LayerSpec:
    """How the tensors of one matrix layer are represented, None is float32, and multiplied, None is by torch."""

    weights: TensorSpec | None
    activations: TensorSpec | None
    gradients: GradientSpec | None
    datapath: Datapath | None = None


FLOAT32 = LayerSpec(None, None, None)
OPERANDS = {
    "forward": ("activations", "weights"),
    "dgrad": ("gradients", "weights"),
    "wgrad": ("activations", "gradients"),
}


def matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that multiply by a weight matrix, by name, in module order.

    A module counts when it owns a parameter `weight` of two or more dimensions and is not an embedding, a bilinear
    layer or a normalisation: Linear, convolutions, and whatever else is built like them.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter)
        and weight.ndim >= 2
        and not isinstance(module, (*OTHERS, *NORMS))
    }


def unsupported_layers(model: nn.Module) -> list[str]:
    """Layers that multiply by a weight matrix in a way that emulation does not see: they stay float32."""
    opaque = (nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, opaque)
        or (isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and "weight" not in module._parameters)
        or (parametrize.is_parametrized(module, "weight") and not isinstance(module, NORMS))
    ]


def matching(pattern: str, layers: dict[str, nn.Module]) -> set[str]:
    """The names of the layers that a pattern means.

    `first` / `last`: the first / last layer; `type:NAME`: layers of a class; `re:REGEX`: names that match as a whole;
    anything else is a glob on names.
    """
    names = list(layers)
    if pattern in ("first", "last"):
        return {names[0 if pattern == "first" else -1]} if names else set()
    if pattern.startswith("type:"):
        return {name for name, module in layers.items() if type(module).__name__ == pattern[5:]}
    if pattern.startswith("re:"):
        return {name for name in names if re.fullmatch(pattern[3:], name)}
    return {name for name in names if fnmatch.fnmatchcase(name, pattern)}


def layer_specs(model: nn.Module, emulation: Emulation) -> dict[str, LayerSpec]:
    """How every matrix layer of the model is represented, by name.

    Raises PatternError for a pattern of `include`, `exclude` or `overrides` that matches no matrix layer, for a weight
    that does not fall into the blocks of its format, and for a datapath that cannot multiply what a layer's tensors
    are.
    """
    layers = matrix_layers(model)
    included = _chosen_by(emulation.include, "include", layers)
    excluded = _chosen_by(emulation.exclude, "exclude", layers)
    general = LayerSpec(emulation.weights, emulation.activations, emulation.gradients, emulation.datapath)
    specs = {name: general if name in included - excluded else FLOAT32 for name in layers}
    places = {name: {role: role for role in vars(FLOAT32)} for name in layers}
    for i, override in enumerate(emulation.overrides):
        for name in _chosen(override.match, f"overrides.{i}.match", layers):
            given = {role: getattr(override, role) for role in override.model_fields_set - {"match"}}
            specs[name] = LayerSpec(**{**vars(specs[name]), **given})
            places[name] |= {role: f"overrides.{i}.{role}" for role in given}
    for name, spec in specs.items():
        _check_blocks(name, layers[name], spec, places[name]["weights"])
        _check_datapath(name, layers[name], spec, places[name]["datapath"])
    return specs


def _check_blocks(name: str, layer: nn.Module, spec: LayerSpec, place: str) -> None:
    """Raises PatternError where the layer's weight does not fall into the blocks of its format."""
    fmt = None if spec.weights is None else along(format_of(spec.weights), input_dim(layer))
    if isinstance(fmt, accel.BlockFormat):
        try:
            check_block(fmt, layer.get_parameter("weight"), None)
        except ValueError as error:
            raise PatternError(f"{place}.format", f"{error} (weight of layer {name!r})") from None


def _check_datapath(name: str, layer: nn.Module, spec: LayerSpec, at: str) -> None:
    """Raises PatternError where the layer's products cannot be made by its units; `at`: where those are given."""
    for which, roles in OPERANDS.items():
        unit_spec = None if spec.datapath is None else getattr(spec.datapath, which)
        if unit_spec is None:
            continue
        unit, place = mac(unit_spec), f"{at}.{which}"
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            raise PatternError(place, f"is for linear layers and convolutions (layer {name!r}: {type(layer).__name__})")
        for role, operand in zip(roles, (unit.a, unit.b), strict=True):
            tensor: TensorSpec | None = getattr(spec, role)
            if tensor is None:
                if unit.is_integer:
                    message = f"the unit {unit.name!r} multiplies integers, its {role} are float32"
                    raise PatternError(place, f"{message} (layer {name!r})")
                continue
            sums_along_channels = (which, role) != ("forward", "weights")
            if tensor.granularity == "channel" and sums_along_channels:
                message = f"adds up products with the several scales of its {role}: their granularity must be 'tensor'"
                raise PatternError(place, f"{message} (layer {name!r})")
            fmt = format_of(tensor)
            keeps_alpha = (
                isinstance(tensor, GradientSpec) and tensor.pruning and accel.find_codec(tensor.codec).tags_alpha
            )
            if operand is not None and keeps_alpha:
                message = f"the unit {unit.name!r} takes {operand.name}, off whose grid +-alpha of the {role} may lie"
                raise PatternError(place, f"{message} (layer {name!r})")
            if operand is not None and not _holds(operand, fmt):
                message = (
                    f"the unit {unit.name!r} takes {operand.name}, its {role} are {fmt.name}, which it cannot hold"
                )
                raise PatternError(place, f"{message} (layer {name!r})")


def _holds(wide: accel.Format, fmt: accel.Format | accel.BlockFormat) -> bool:
    """Whether every number of fmt is one of `wide`."""
    if not isinstance(fmt, accel.Format) or fmt == wide:
        return fmt == wide
    if fmt.bits > 16:
        return False
    values = accel.decode(torch.arange(1 << fmt.bits, dtype=torch.int32), fmt, alpha=0.0 if fmt.alpha_codes else None)
    values = values[values.isfinite()]
    return torch.equal(accel.quantize(values, wide), values)


def product_modules(model: nn.Module, emulation: Emulation) -> dict[str, Datapath | None]:
    """The modules that may multiply activations, by name, and what multiplies there; None is torch.

    Those that `products` names, and all of other classes than torch.nn's.
    Raises PatternError for a pattern of `products` that matches no module but matrix layers.
    """
    layers = matrix_layers(model)
    modules = {name: module for name, module in model.named_modules() if name not in layers}
    own = (name for name, module in modules.items() if not type(module).__module__.startswith("torch.nn."))
    found: dict[str, Datapath | None] = dict.fromkeys(own)
    for i, products in enumerate(emulation.products):
        names = matching(products.match, modules)
        if not names:
            message = f"pattern {products.match!r} matches no module that is not a matrix layer"
            raise PatternError(f"products.{i}.match", message)
        found |= dict.fromkeys(names, products.datapath)
    return found


def pruned_layers(model: nn.Module, spec: WeightPruning) -> dict[str, nn.Module]:
    """The matrix layers whose weights are pruned: those that train and are not excluded.

    Raises PatternError for a pattern of `exclude` that matches no matrix layer, for nothing left to prune, and for
    per-sample gradients of a model with batch normalisation.
    """
    if isinstance(spec, DensePruning):
        return {}
    layers = matrix_layers(model)
    excluded = _chosen_by(spec.exclude, "weight_pruning.exclude", layers)
    pruned = {
        name: module
        for name, module in layers.items()
        if name not in excluded and module.get_parameter("weight").requires_grad
    }
    if not pruned:
        raise PatternError("weight_pruning", "leaves no layer whose weights train and could be pruned")
    batch_norms = [
        name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    if isinstance(spec, SnrPruning) and spec.estimator == "per_sample" and batch_norms:
        message = f"per_sample is not for models with batch normalisation ({batch_norms[0]}), which mixes the samples"
        raise PatternError("weight_pruning.estimator", f"{message}: use microbatch")
    return pruned


def _chosen_by(patterns: list[str], path: str, layers: dict[str, nn.Module]) -> set[str]:
    return set().union(*(_chosen(pattern, f"{path}.{i}", layers) for i, pattern in enumerate(patterns)))


def _chosen(pattern: str, path: str, layers: dict[str, nn.Module]) -> set[str]:
    names = matching(pattern, layers)
    if not names:
        raise PatternError(path, _no_match(pattern, layers))
    return names


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """The channel dimension of a layer's input or output: before the spatial ones of a convolution, else the last."""
    return x.ndim - 1 - (len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0)


def is_turned_linear(module: nn.Module) -> bool:
    """Whether a layer is a Conv1D of transformers, as in GPT-2: x W + b, where a weight has a row for each input."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def output_dim(module: nn.Module) -> int:
    """The dimension of a layer's weight that counts its outputs."""
    return 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) or is_turned_linear(module) else 0


def input_dim(module: nn.Module) -> int:
    """The dimension of a layer's weight that counts its inputs."""
    return 1 - output_dim(module)


def rounding_of(spec: TensorSpec) -> dict[str, Any]:
    """How the values of a tensor are rounded, as `accel.quantize` takes it."""
    return {
        "rounding": spec.rounding,
        "overflow": spec.overflow,
        "random_bits": spec.random_bits,
        "flush_subnormals": spec.flush_subnormals,
    }


def along(fmt: accel.Format | accel.BlockFormat, dim: int) -> accel.Format | accel.BlockFormat:
    """A format for one tensor: blocks whose axis is open go along `dim`."""
    return replace(fmt, axis=dim) if isinstance(fmt, accel.BlockFormat) and fmt.axis is None else fmt


def _no_match(pattern: str, layers: dict[str, nn.Module]) -> str:
    candidates = list(layers)
    if pattern.startswith("type:"):
        candidates = sorted({f"type:{type(module).__name__}" for module in layers.values()})
    close = difflib.get_close_matches(pattern, candidates, n=1, cutoff=0.5)
    shown = ", ".join(candidates[:12]) + (", ..." if len(candidates) > 12 else "")
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"pattern {pattern!r} matches no matrix layer (layers: {shown or 'none'}){hint}"
