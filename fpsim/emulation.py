"""Attach emulated number formats, pruning and the ledger to any torch model.

Every matrix layer (see `fpsim.layers`) gets three hooks, and nothing else of the model changes:

    before forward   its input X is rounded, and its weight W is replaced by the rounded one while it runs
    after forward    W is put back, and the gradient dY that arrives at its output is pruned and rounded
    so that          forward uses X and W, dgrad uses dY and W, wgrad uses dY and X, all as the hardware holds them

Rounding is straight-through: gradients pass it unchanged. The hooks on the model itself begin and end a forward pass:
while it runs, `saved_activations` packs what autograd saves (see `fpsim.saved`).
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import accel
from accel.effectual import count_matmul
from accel.ledger import Ledger, Stored, stored_plain
from accel.operations import BlockCodes
from fpsim.config import parse_emulation
from fpsim.config.schema import Datapath, Emulation, GradientSpec, Pruning, TensorSpec
from fpsim.errors import NonFiniteError, RunError
from fpsim.gradients.adaptive import LayerFormat
from fpsim.gradients.distribution import Distributions
from fpsim.gradients.equal_cosine import equal_cosine
from fpsim.gradients.pruning import LayerPruning
from fpsim.layers import (
    FLOAT32,
    NORMS,
    LayerSpec,
    along,
    channel_dim,
    format_of,
    input_dim,
    layer_specs,
    matrix_layers,
    output_dim,
    product_modules,
    pruned_layers,
    rounding_of,
    unsupported_layers,
)
from fpsim.products import AS_IT_IS, LayerCall, LayerProduct, Made, ModuleCall, Operand, Products
from fpsim.ranges import GRADIENTS, HOOKS, LEDGER, ROUNDING, SCALES, STATISTICS, span, spanned
from fpsim.ranks import ALONE, Ranks
from fpsim.recorder import Recorder, Scale, stored_tensor
from fpsim.saved import Kept, SavedTensors
from fpsim.scales import OF_SAMPLES, measured, sample, scale_of
from fpsim.weights.pruner import WeightPruner

OPERANDS = {"forward": ("activation", "weight"), "dgrad": ("gradient", "weight"), "wgrad": ("activation", "gradient")}
OPERANDS_OF_ACTIVATIONS = {**OPERANDS, "forward": ("activation", "activation"), "dgrad": ("gradient", "activation")}
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Words(TypedDict):
    """What the random words of a tensor's elements depend on, beside the element."""

    seed: int
    stream: int
    step: int


@dataclass(frozen=True)
class EncodedWeight:
    """A layer's weight as the hardware holds it. values: what its codes mean, float32. blocks: of a block format, the
    codes. stored: what the ledger counts for it."""

    values: Tensor
    spec: TensorSpec
    fmt: accel.Format | accel.BlockFormat
    scale: Scale
    blocks: BlockCodes | None
    stored: Stored


@dataclass(frozen=True)
class _Call:
    """What the hook on a layer's output must know of the forward pass. micro_batch: None where nothing is recorded."""

    stream: str
    channel_dim: int
    has_dgrad: bool
    has_wgrad: bool
    micro_batch: int | None


class _Multiplied(NamedTuple):
    """A product of a layer, with the masks of what is nonzero in its input and in its weight."""

    product: LayerProduct
    x: Tensor
    w: Tensor


class Multiplication(NamedTuple):
    """What stands behind a product of the ledger. x, w, dy: masks of what is nonzero; x and dy as samples, dy None in
    forward."""

    layer: str
    pass_name: str
    product: LayerProduct
    x: Tensor
    w: Tensor
    dy: Tensor | None


def emulate(
    model: nn.Module,
    spec: Emulation | Mapping[str, Any] | str,
    *,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    steps_per_epoch: int | None = None,
    ranks: Ranks = ALONE,
) -> Emulator:
    """Attach `spec` to `model` and return the handle; `handle.detach()` leaves the model as it was, bit for bit.

    spec: the `emulation` section of a configuration as an object or a mapping, or the name or path of an accelerator
    file. seed: of the random words. optimizer: its state is counted in the ledger when given. steps_per_epoch: for
    weight pruning that counts in epochs. ranks: the processes that train the model together, each on its part of every
    batch (see `fpsim.ranks`), and every layer on a part of its input of one size; the loss of a part is divided by
    their number, and the gradients of the weights are sums over them. Call `handle.step()` after every optimizer step.
    Raises ConfigError for a specification that is not valid, PatternError for a pattern that matches no layer,
    ValueError where steps_per_epoch is needed.
    """
    if isinstance(spec, str):
        spec = {"accelerator": spec}
    if not isinstance(spec, Emulation):
        spec = parse_emulation(spec)
    return Emulator(model, spec, seed, optimizer, steps_per_epoch, ranks)


class Emulator:
    """What `emulate` returns: the hooks on one model, their state and what they counted.

    ledger: accel.Ledger of the sampled steps, of this rank's part. statistics: one row a pruned layer (see
    `LayerPruning.summary`). distributions: of the neural and weight gradients of the sampled steps. adapting: the
    layers that choose the format of their gradients. weight_pruning: what prunes the weights, if anything does.
    multiplications: None, or a list to which every product that the ledger enters is added with its masks.

    A delayed scale is that of the largest magnitude in the layer's tensors of that role in the steps before, as many as
    `scale_history` says; of the tensor itself in the first step, and where those are all 0. Evaluation uses it and
    leaves it.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Emulation,
        seed: int,
        optimizer: torch.optim.Optimizer | None,
        steps_per_epoch: int | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.spec, self.seed, self.ranks = model, spec, seed, ranks
        self.layers = matrix_layers(model)
        self.specs = layer_specs(model, spec)
        self.step_number = 0
        self.pruning = {
            name: LayerPruning(layer.gradients.pruning, _alpha_kept(layer.gradients))
            for name, layer in self.specs.items()
            if layer.gradients is not None and layer.gradients.pruning is not None
        }
        self.adapting = {
            name: LayerFormat(layer.gradients)
            for name, layer in self.specs.items()
            if layer.gradients is not None and layer.gradients.adapt is not None
        }
        self.weight_pruning: WeightPruner | None = None
        if spec.weight_pruning is not None:
            layers = pruned_layers(model, spec.weight_pruning)
            self.weight_pruning = WeightPruner(layers, spec.weight_pruning, steps_per_epoch, ranks)
        self._ran_in_forward: set[str] = set()
        # for delayed scales, by "layer/role": the largest magnitudes of the steps before, and of this one
        self._largest: dict[str, deque[float]] = {}
        self._largest_now: dict[str, float] = {}
        self._streams: dict[int, str] = {}
        self._occurrences: dict[str, int] = defaultdict(int)
        self._sampled = False
        self._rounded_inputs: dict[tuple[int, TensorSpec, int], tuple[weakref.ref[Tensor], int, Tensor, Scale]] = {}
        self._rounded_weights: dict[str, tuple[int, int, Tensor, Scale]] = {}
        self._samples: dict[str, tuple[np.ndarray, int]] = {}
        self._ran: set[str] = set()
        self._step_zeros, self._step_elements = 0, 0
        self._step_is_new = True
        self.distributions = Distributions()
        self.multiplications: list[Multiplication] | None = None
        self._recorder = Recorder(model, self.layers, optimizer)
        self._saved = None if spec.saved_activations is None else SavedTensors(model, spec.saved_activations)
        self._products = Products()
        self._multiplies = bool(spec.products) or any(layer.datapath is not None for layer in self.specs.values())
        self._handles = [
            model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            model.register_forward_hook(self._end_forward, always_call=True),
        ]
        for name, module in model.named_modules():
            if name in self.layers:
                self._attach(name, module)
            elif isinstance(module, NORMS):
                self._handles.append(module.register_forward_pre_hook(self._norm_hook(name), with_kwargs=True))
        for name, datapath in product_modules(model, spec).items():
            self._attach_products(name, model.get_submodule(name), datapath)
        if any(layer != FLOAT32 for layer in self.specs.values()) and (others := unsupported_layers(model)):
            warnings.warn(f"layers that cannot be emulated stay float32: {', '.join(others)}", stacklevel=3)

    # --- what the user calls --------------------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """What the sampled steps stored and moved."""
        return self._recorder.ledger

    @property
    def statistics(self) -> list[dict[str, Any]]:
        """Asked and achieved sparsity of every pruned layer so far."""
        return [pruning.summary(name) for name, pruning in self.pruning.items()]

    @property
    def gradient_formats(self) -> list[dict[str, Any]]:
        """The formats of the layers that choose them (see `LayerFormat.summary`)."""
        return [layer.summary(name) for name, layer in self.adapting.items()]

    @property
    def formats(self) -> dict[str, accel.Format | accel.BlockFormat]:
        """The formats that the layers' tensors are stored in, by name, those chosen on the way as they now are."""
        tensors = [one for spec in self.specs.values() for one in (spec.weights, spec.activations, spec.gradients)]
        found = [format_of(one) for one in tensors if one is not None]
        return {one.name: one for one in (*found, *(layer.format for layer in self.adapting.values()))}

    @property
    def saved_activations(self) -> dict[str, Kept]:
        """What the latest forward pass of training keeps for backward, by kind (see `fpsim.saved`); else empty."""
        return {} if self._saved is None else dict(self._saved.kept)

    @property
    def sampling(self) -> bool:
        """Whether the ledger records the current step: one step in `spec.ledger.every_steps`, or `sample_this_step`."""
        return self._sampled or self.step_number % self.spec.ledger.every_steps == 0

    def sample_this_step(self) -> None:
        """Have the ledger record the current step as well (the last of a run, say)."""
        self._sampled = True

    @spanned(HOOKS)
    def step(self) -> None:
        """End a training step: call it after the optimizer's step, and before the gradients are set to zero or None:
        on a sampled step they are recorded, too."""
        if self.sampling and self.model.training:
            self._recorder.update()
            for name in self.distributions.layers_of(self.step_number):
                weight = self.layers[name]._parameters["weight"]
                if weight is not None and weight.grad is not None and weight.numel():
                    self.distributions.record(self.step_number, name, "dW", weight.grad)
        if self.weight_pruning is not None and self.model.training:
            self.weight_pruning.end_step()
        self._equalise()
        for key, largest in self._largest_now.items():
            self._largest[key].append(largest)
        if self.step_number == 0:
            self._check_all_ran()
        self._begin_step(self.step_number + 1)

    @spanned(STATISTICS)
    def _equalise(self) -> None:
        """Ask the layers of each heterogeneous policy, whose thresholds are new, for the sparsities of one cosine."""
        groups: dict[Pruning, list[str]] = defaultdict(list)
        for name in self._samples:
            groups[self.pruning[name].spec].append(name)
        for spec, names in groups.items():
            samples, sizes = zip(*(self._samples[name] for name in names), strict=True)
            limits = spec.min_sparsity, spec.max_sparsity
            asked = equal_cosine(samples, sizes, spec.sparsity, spec.threshold, *limits)
            for name, sparsity in zip(names, asked.tolist(), strict=True):
                self.pruning[name].ask(sparsity, self._samples[name][0])
        self._samples.clear()

    def _begin_step(self, number: int) -> None:
        self.step_number = number
        self._sampled = False
        self._step_is_new = True
        self._recorder.begin_step(number)
        self.restart_step()

    def restart_step(self) -> None:
        """Begin the current step anew: its forward pass draws the same random words again, and counts again."""
        if self._saved is not None:
            self._saved.close()
        self._products.close()
        self._recorder.restart_step()
        if self.weight_pruning is not None:
            self.weight_pruning.restart_step()
        self.distributions.restart_step(self.step_number)
        self._largest_now.clear()
        self._samples.clear()
        self._occurrences.clear()
        self._rounded_inputs.clear()
        self._rounded_weights.clear()

    def next_epoch(self) -> None:
        """Begin a new epoch: thresholds and formats that are renewed once an epoch are renewed at the next step."""
        for pruning in self.pruning.values():
            pruning.epoch_is_new = True
        for adapting in self.adapting.values():
            adapting.epoch_is_new = True
        if self.weight_pruning is not None:
            self.weight_pruning.epoch_is_new = True

    @torch.no_grad()
    def masked_weight(self, name: str) -> Tensor:
        """A layer's weight with zeros where it is pruned, float32."""
        weight = self.layers[name]._parameters["weight"]
        assert weight is not None
        return (weight if self.weight_pruning is None else self.weight_pruning.masked(name, weight)).detach()

    @torch.no_grad()
    def encoded_weights(self) -> dict[str, EncodedWeight]:
        """The weights of the layers whose weights have a format, by layer: masked and rounded, as the next forward pass
        uses them (that of evaluation where the model is in that mode, which leaves the state as it is). Raises RunError
        where a codec cannot hold one."""
        found = {}
        for name, layer in self.layers.items():
            spec, weight = self.specs[name].weights, layer._parameters["weight"]
            if spec is None:
                continue
            assert isinstance(weight, nn.Parameter)
            values, scale = self._rounded_weight(name, self.specs[name], weight, output_dim(layer), input_dim(layer))
            fmt, blocks = along(format_of(spec), input_dim(layer)), None
            if isinstance(fmt, accel.BlockFormat):
                masked, words = self.masked_weight(name), self._words(f"{name}/weight")
                blocks = accel.encode(masked, fmt, **rounding_of(spec), **words)
            with _named(f"weight of layer {name!r}"):
                stored = self._stored(values, spec, scale, input_dim(layer))
            found[name] = EncodedWeight(values.detach(), spec, fmt, scale, blocks, stored)
        return found

    def detach(self) -> None:
        """Remove every hook. The model's parameters, buffers and modules are what they were without emulation."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.weight_pruning is not None:
            self.weight_pruning.detach()
        self._recorder.close()
        self._products.close()
        if self._saved is not None:
            self._saved.close()

    def state_dict(self) -> dict[str, Any]:
        """Step number, thresholds and statistics, as plain data (JSON), to which `tensors()` belong. The ledger has its
        own `to_data`."""
        return {
            "step": self.step_number,
            "pruning": {name: pruning.state_dict() for name, pruning in self.pruning.items()},
            "adapting": {name: layer.state_dict() for name, layer in self.adapting.items()},
            "largest": {key: (largest.maxlen, list(largest)) for key, largest in self._largest.items()},
            "weight_pruning": None if self.weight_pruning is None else self.weight_pruning.state_dict(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state: masks of the weights, and averages."""
        return {} if self.weight_pruning is None else self.weight_pruning.tensors()

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Go on from `state_dict()` and `tensors()`. Raises ValueError when the pruned layers are not the same."""
        adapting = state.get("adapting", {})  # a state of an earlier fpsim has none
        for key, saved, layers in (("pruning", state["pruning"], self.pruning), ("adapting", adapting, self.adapting)):
            if others := set(saved) ^ set(layers):
                raise ValueError(f"the saved state is of other layers ({key}): {sorted(others)}")
        self._begin_step(state["step"])
        for name, pruning in self.pruning.items():
            pruning.load_state_dict(state["pruning"][name])
        for name, layer in self.adapting.items():
            layer.load_state_dict(adapting[name])
        self._largest = {
            key: deque(largest, maxlen=steps) for key, (steps, largest) in state.get("largest", {}).items()
        }
        weights = state.get("weight_pruning")
        if (weights is None) != (self.weight_pruning is None):
            raise ValueError("the saved state is of other weight pruning")
        if self.weight_pruning is not None and weights is not None:
            self.weight_pruning.load(weights, tensors or {})

    @property
    def gradient_sparsity(self) -> float | None:
        """Share of zeros in all pruned gradients of the latest step, None where nothing is pruned."""
        return self._step_zeros / self._step_elements if self._step_elements else None

    # --- hooks ----------------------------------------------------------------------------------------------------

    def _attach(self, name: str, module: nn.Module) -> None:
        spec = self.specs[name]
        originals: list[nn.Parameter] = []
        calls: list[LayerCall] = []

        @spanned(HOOKS)
        def before(
            module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            weight, x = module._parameters["weight"], _input_of(arguments, named)
            if not isinstance(weight, nn.Parameter):
                raise RunError(
                    f"layer {name!r} is called with a weight that is not its parameter: it cannot be emulated"
                )
            self._check_call(name, spec, x)
            self._ran.add(name)
            self._check_samples(name)
            rounded_x, x_scale = self._rounded_input(name, spec, x, channel_dim(module, x))
            rounded_weight, w_scale = self._rounded_weight(name, spec, weight, output_dim(module), input_dim(module))
            if self._recording:
                self._record_operands(name, spec, x, x_scale, channel_dim(module, x), w_scale, input_dim(module))
                with _named(f"activations of layer {name!r}"):
                    x_stored = self._stored(rounded_x, spec.activations, x_scale, channel_dim(module, x))
                with _named(f"weight of layer {name!r}"):
                    w_stored = self._stored(rounded_weight, spec.weights, w_scale, input_dim(module))
                self._recorder.layer(name, x, x_stored, weight, w_stored)
            operands = _operand(spec.activations, x_scale), _operand(spec.weights, w_scale)
            calls.append(LayerCall(name, rounded_weight, spec.datapath, self._words_of_passes(name), *operands))
            self._enter(calls[-1], spec.datapath)
            originals.append(weight)
            module._parameters["weight"] = rounded_weight  # type: ignore[assignment]
            if arguments:
                return (rounded_x, *arguments[1:]), named
            return (), {**named, next(iter(named)): rounded_x}

        @spanned(HOOKS)
        def after(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if not originals:
                return  # the hook before has raised
            module._parameters["weight"] = originals.pop()
            products = calls.pop()
            self._leave(products, spec.datapath)
            if output is not None and spec.datapath is not None and not products.products:
                message = (
                    "does not multiply its weight by a linear map or a convolution: its datapath cannot be emulated"
                )
                raise RunError(f"layer {name!r} ({type(module).__name__}) {message}")
            by_sample = self.weight_pruning if self._counts_samples(name) else None
            made, products.products = products.products, []
            multiplied = (
                self._record_products(name, products.weight, made) if self._recording and output is not None else []
            )
            is_observed = self._trains and (spec.gradients is not None or self._recording or by_sample is not None)
            if output is None or not is_observed:  # None: the layer raised
                return
            if not isinstance(output, Tensor):
                if spec.gradients is None:
                    return
                raise RunError(f"layer {name!r} returns a {type(output).__name__}: its gradient cannot be emulated")
            if output.requires_grad:
                weight, x = module._parameters["weight"], _input_of(arguments, named)
                call = _Call(
                    stream=f"{name}/gradient{self._occurrence_of(name)}",
                    channel_dim=channel_dim(module, output),
                    has_dgrad=x.requires_grad,
                    has_wgrad=weight is not None and weight.requires_grad,
                    micro_batch=self._recorder.micro_batch if self._recording else None,
                )

                emulated = [one.product for one in made if spec.datapath is not None and one.is_still(output)]
                counted = []
                for one, by in zip(multiplied, made, strict=False):  # where nothing is recorded, multiplied is empty
                    if by.is_still(output):
                        counted.append(one)
                    elif by.result.requires_grad:  # the layer does more than multiply
                        by.result.register_hook(partial(self._record_gradient_products, name, [one], call))
                sampled = None if by_sample is None else x.detach()
                del made, x

                @spanned(HOOKS)
                def arrived(dy: Tensor) -> Tensor:
                    dy, operand = self._gradient(name, spec.gradients, dy, call)
                    for product in emulated:
                        product.gradient = operand
                    self._record_gradient_products(name, counted, call, dy)
                    if by_sample is not None and sampled is not None:
                        by_sample.samples(name, sampled, dy)
                    return dy

                output.register_hook(arrived)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))

    @spanned(STATISTICS)
    def _record_operands(
        self, name: str, spec: LayerSpec, x: Tensor, x_scale: Scale, x_dim: int, w_scale: Scale, w_dim: int
    ) -> None:
        """Enter X and W into the distributions, as they come to a layer in the first forward pass of a step."""
        if self._recorder.micro_batch:
            return
        for role, named, tensor, ranks, stored_as, scale, dim in (
            ("X", "activation", x.detach(), self.ranks, spec.activations, x_scale, x_dim),
            ("W", "weight", self.masked_weight(name), ALONE, spec.weights, w_scale, w_dim),
        ):
            if tensor.numel() == 0 and ranks.count == 1:  # several ranks must all see the same
                continue
            with _named(f"{named} of layer {name!r}"):
                self.distributions.record(self.step_number, name, role, tensor, ranks)
            if stored_as is not None:
                self.distributions.encoded(along(format_of(stored_as), dim), scale)

    def _attach_products(self, name: str, module: nn.Module, datapath: Datapath | None) -> None:
        calls: list[ModuleCall] = []

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if datapath is None and not self._recording:
                return
            if datapath is not None and torch._C._current_graph_task_id() != -1:
                message = "is recomputed in backward: activation checkpointing cannot be emulated"
                raise RunError(f"module {name!r} {message}")
            place = f"{name}/products{self._next_occurrence(f'{name}/products')}"
            count = partial(self._count_product, name, self._recorder.micro_batch) if self._recording else None
            words = lambda number, which: self._words(f"{place}/{number}/{which}{self._part}")  # noqa: E731
            calls.append(ModuleCall(name, datapath, words, count))
            self._enter(calls[-1], datapath)

        def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if calls:
                self._leave(calls.pop(), datapath)

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    @spanned(LEDGER)
    def _count_product(self, name: str, micro_batch: int, which: str, first: Tensor, second: Tensor) -> None:
        counted = count_matmul(first, second)
        self._recorder.product(name, which, OPERANDS_OF_ACTIVATIONS[which], counted, micro_batch)

    def _words_of_passes(self, name: str) -> Callable[[str], Words]:
        """The random words of a layer's products in its present call: of a pass."""
        occurrence = self._occurrence_of(name)
        return lambda which: self._words(f"{name}/{which}{occurrence}{self._part}")

    def _enter(self, call: LayerCall | ModuleCall, datapath: Datapath | None) -> None:
        """A layer or module begins. Where it is emulated it may be called by itself, outside the model's forward."""
        if datapath is not None:
            self._products.begin_forward()
        self._products.running.append(call)

    def _leave(self, call: LayerCall | ModuleCall, datapath: Datapath | None) -> None:
        self._products.leave(call)
        if datapath is not None:
            self._products.end_forward()

    @spanned(LEDGER)
    def _record_products(self, name: str, weight: Tensor, made: list[Made]) -> list[_Multiplied]:
        found = [_Multiplied(one.product, one.product.samples(one.x) != 0, weight.detach() != 0) for one in made]
        for one in found:
            self._record_product(name, "forward", one, self._recorder.micro_batch)
        return found

    @spanned(LEDGER)
    def _record_gradient_products(self, name: str, found: list[_Multiplied], call: _Call, dy: Tensor) -> None:
        for one in found:
            mask = one.product.samples(dy) != 0
            for which, is_made in (("dgrad", call.has_dgrad), ("wgrad", call.has_wgrad)):
                if is_made and call.micro_batch is not None:
                    self._record_product(name, which, one, call.micro_batch, mask)

    def _record_product(
        self, name: str, which: str, one: _Multiplied, micro_batch: int, dy: Tensor | None = None
    ) -> None:
        counted = one.product.count(which, one.x, one.w, dy)
        self._recorder.product(name, which, OPERANDS[which], counted, micro_batch)
        if self.multiplications is not None:
            self.multiplications.append(Multiplication(name, which, *one, dy))

    def _check_call(self, name: str, spec: LayerSpec, x: Any) -> None:
        if spec == FLOAT32:
            return
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise RunError(f"layer {name!r} gets {given}: emulation works on float32 tensors (turn autocast off)")
        if torch.is_autocast_enabled(x.device.type):
            raise RunError(f"layer {name!r} runs under autocast: emulation works on float32 tensors")
        if torch._C._current_graph_task_id() != -1:
            raise RunError(f"layer {name!r} is recomputed in backward: activation checkpointing cannot be emulated")

    def _counts_samples(self, name: str) -> bool:
        return self._trains and self.weight_pruning is not None and self.weight_pruning.wants_samples(name)

    def _check_samples(self, name: str) -> None:
        if self._counts_samples(name):
            if name in self._ran_in_forward:
                message = "its gradients by sample cannot be told apart: use estimator microbatch"
                raise RunError(f"layer {name!r} runs twice in a forward pass: {message}")
            self._ran_in_forward.add(name)

    def _check_all_ran(self) -> None:
        emulated = {name for name, spec in self.specs.items() if spec != FLOAT32}
        if idle := sorted(emulated - self._ran):
            message = f"layers that are to be emulated did not run as modules, and stay float32: {', '.join(idle)}"
            warnings.warn(message, stacklevel=3)

    def _norm_hook(self, name: str) -> Any:
        def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._recording:
                x = _input_of(arguments, named)
                stored = stored_plain(x.numel()) if self._saved is None else self._saved.stored(x)
                self._recorder.normalisation(name, x, stored)

        return before

    def _begin_forward(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._trains and self._step_is_new:
            self._step_zeros, self._step_elements = 0, 0
            self._step_is_new = False
            if self.weight_pruning is not None and self.weight_pruning.begin_step(self.step_number):
                self._rounded_weights.clear()
        self._ran_in_forward.clear()
        if self._recording:
            self._recorder.begin_forward()
        if self._recording or self._multiplies:
            self._products.begin_forward()
        if self._saved is not None:
            inputs = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
            self._saved.begin_forward(inputs, self._trains)

    def _end_forward(self, model: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self._saved is not None:
            self._saved.end_forward()
        self._products.end_forward()
        self._recorder.end_forward(output)
        self._rounded_inputs.clear()

    @property
    def _trains(self) -> bool:
        return self.model.training and torch.is_grad_enabled()

    @property
    def _recording(self) -> bool:
        return self.sampling and self._trains

    def _occurrence_of(self, name: str) -> str:
        count = self._occurrences[self._mode + name]
        if self._mode:  # each rank evaluates every so many batches
            count = (count - 1) * self.ranks.count + self.ranks.number + 1
        return f"{self._mode}/{count}" if count > 1 or self._mode else ""

    def _next_occurrence(self, name: str) -> str:
        self._occurrences[self._mode + name] += 1
        return self._occurrence_of(name)

    @property
    def _mode(self) -> str:
        return "" if self.model.training else "/evaluation"

    @property
    def _part(self) -> str:
        """Of the streams of words that products draw, which know nothing of other ranks' elements."""
        return f"/rank {self.ranks.number}" if self.ranks.number else ""

    def _ranks_of(self, role: str) -> Ranks:
        """Those that have a part each of a tensor of the role: a weight is whole on each, an evaluated batch on one."""
        return ALONE if role == "weight" or not self.model.training else self.ranks

    # --- rounding and pruning -------------------------------------------------------------------------------------

    def _rounded_input(self, name: str, spec: LayerSpec, x: Tensor, channel_dim: int) -> tuple[Tensor, Scale]:
        """X as the hardware holds it, and its scale: one tensor, however many layers read it in the same format."""
        stream = f"{name}/activation{self._next_occurrence(name)}"
        if spec.activations is None:
            return x, None
        key = id(x), spec.activations, channel_dim
        known = self._rounded_inputs.get(key)
        if known is None or known[0]() is not x or known[1] != _version(x):
            forget = weakref.ref(x, lambda _: self._rounded_inputs.pop(key, None))
            rounded = self._round(x, spec.activations, name, "activation", stream, channel_dim, channel_dim)
            known = forget, _version(x), *rounded
            self._rounded_inputs[key] = known
        if self._saved is not None:
            self._saved.lies_on_grid(known[2], along(format_of(spec.activations), channel_dim), known[3])
        return _StraightThrough.apply(x, known[2]) if x.requires_grad else known[2], known[3]

    def _rounded_weight(
        self, name: str, spec: LayerSpec, weight: nn.Parameter, output_dim: int, input_dim: int
    ) -> tuple[Tensor, Scale]:
        """W, masked, as the hardware holds it, and its scale: rounded once a step, however often the layer runs."""
        masked = weight if self.weight_pruning is None else self.weight_pruning.masked(name, weight)
        if spec.weights is None:
            if self._saved is not None:
                self._saved.leave(masked)
            return masked, None
        key = f"{self._mode}{name}" if spec.weights.scale == "delayed" else name  # evaluation leaves its history
        known = self._rounded_weights.get(key)
        if known is None or known[:2] != (weight.data_ptr(), _version(weight)):
            rounded = self._round(masked, spec.weights, name, "weight", f"{name}/weight", output_dim, input_dim)
            known = self._rounded_weights[key] = (weight.data_ptr(), _version(weight), *rounded)
        if self._saved is not None:
            self._saved.leave(known[2])
        return _StraightThrough.apply(masked, known[2]) if weight.requires_grad else known[2], known[3]

    def _round(
        self, x: Tensor, spec: TensorSpec, layer: str, role: str, stream: str, scale_dim: int, block_dim: int
    ) -> tuple[Tensor, Scale]:
        """x rounded, and its scale; scales a channel go along scale_dim, blocks of a block format along block_dim."""
        fmt, ranks = along(format_of(spec), block_dim), self._ranks_of(role)
        dim = scale_dim if spec.granularity == "channel" else None
        with torch.no_grad(), span(ROUNDING[role]):
            scale = None
            if spec.scale != "none":
                amax, drawn = self._measured(x.detach(), dim, layer, role, with_sample=spec.scale in OF_SAMPLES)
                scale = self._scale(drawn if dim is None else x.detach(), spec, fmt, dim, amax, layer, role)
            out, words = torch.empty_like(x), self._words(stream)
            options = {"scale": scale, "out": out, "offset": ranks.number * x.numel(), **rounding_of(spec)}
            with _named(f"{role} of layer {layer!r}"):
                return accel.quantize(x, fmt, **options, **words), scale

    @spanned(SCALES)
    def _measured(
        self, x: Tensor, dim: int | None, layer: str, role: str, *, with_sample: bool = True
    ) -> tuple[float | Tensor, Tensor]:
        """As `fpsim.scales.measured` of the ranks' parts. Raises NonFiniteError for a tensor that is not finite."""
        with _named(f"{role} of layer {layer!r}"):
            amax, drawn = measured(x, dim, self._ranks_of(role), with_sample=with_sample)
        if not (math.isfinite(amax) if isinstance(amax, float) else bool(torch.isfinite(amax).all())):
            seen = {"weight": self.layers[layer].get_parameter("weight"), role: x}
            raise NonFiniteError(role, layer, self.step_number, seen)
        return amax, drawn

    @spanned(SCALES)
    def _scale(
        self,
        x: Tensor,
        spec: TensorSpec,
        fmt: accel.Format | accel.BlockFormat,
        dim: int | None,
        amax: float | Tensor,
        layer: str,
        role: str,
    ) -> Scale:
        """The scale of x (or of a `sample` of it) of that largest magnitude, None for a block format."""
        if isinstance(fmt, accel.BlockFormat):
            return None
        if spec.scale == "delayed":
            assert isinstance(amax, float)
            amax = self._delayed(f"{layer}/{role}", amax, spec.scale_history)
        return scale_of(x, fmt, spec.scale, amax, dim, self._ranks_of(role))

    def _delayed(self, key: str, amax: float, steps: int) -> float:
        """The largest magnitude of the steps before, this tensor's where that is 0; its own counts from the next on."""
        before = self._largest.setdefault(key, deque(maxlen=steps))
        if self.model.training:
            self._largest_now[key] = max(self._largest_now.get(key, 0.0), amax)
        return max(before, default=0.0) or amax

    def _gradient(self, name: str, role: GradientSpec | None, dy: Tensor, call: _Call) -> tuple[Tensor, Operand]:
        """dY as the hardware holds it."""
        ranks = self._ranks_of("gradient")
        is_empty = dy.numel() == 0 and ranks.count == 1  # several ranks must all see the same
        if call.micro_batch == 0 and not is_empty:
            with _named(f"gradient of layer {name!r}"):
                self.distributions.record(self.step_number, name, "dY", dy, ranks)
        if role is None or is_empty:
            if call.micro_batch is not None:
                plain = stored_plain(dy.numel())
                self._recorder.gradient(name, plain, call.micro_batch, call.has_dgrad, call.has_wgrad)
            return dy, AS_IT_IS
        dim = call.channel_dim if role.granularity == "channel" else None
        with torch.no_grad(), span(GRADIENTS):
            amax, drawn = self._measured(dy, dim, name, "gradient")
            if dy.numel() == 0:
                return dy, AS_IT_IS
            drawn = sample(drawn)
            is_fixed = role.adapt is None
            fmt = format_of(role) if is_fixed else self.adapting[name].renew(drawn, self.step_number)
            fmt = along(fmt, call.channel_dim)
            scale = self._scale(drawn if dim is None else dy, role, fmt, dim, amax, name, "gradient")
            options: dict[str, Any] = {"scale": scale, "offset": ranks.number * dy.numel()}
            options |= {"out": torch.empty_like(dy), **rounding_of(role), **self._words(call.stream)}
            cosine = None
            if role.pruning is None:
                rounded = accel.quantize(dy, fmt, **options)
                alpha, counts = 0.0, accel.count_blocks(rounded) if call.micro_batch is not None else None
            else:
                pruning = self.pruning[name]
                alpha = min(pruning.threshold(drawn.numpy(), self.step_number), FLOAT32_MAX)
                if role.pruning.policy == "heterogeneous" and pruning.renewed_at == self.step_number:
                    self._samples[name] = drawn.numpy().copy(), dy.numel() * ranks.count
                if role.pruning.policy == "topk":
                    rounded = accel.quantize(torch.where(dy.abs() < alpha, 0.0, dy), fmt, **options)
                    alpha, counts = 0.0, accel.count_blocks(rounded)
                else:
                    alpha = _snap(alpha, fmt, scale) if pruning.alpha_kept == "snap" else float(np.float32(alpha))
                    rounded, counts = accel.prune_quantize(dy, alpha, fmt, **options)
                self._count_sparsity(pruning, counts.total, ranks)
                if call.micro_batch is not None:
                    cosine = pruning.measure(dy, rounded, ranks)
            if call.micro_batch == 0:
                self.distributions.encoded(fmt, scale, alpha=alpha, cosine=cosine)
        if call.micro_batch is not None and counts is not None:
            with _named(f"gradient of layer {name!r}"):
                stored = stored_tensor(rounded, counts, role, fmt, scale, alpha)
            self._recorder.gradient(name, stored, call.micro_batch, call.has_dgrad, call.has_wgrad)
        return rounded, Operand(fmt, scale, alpha, rounded)

    def _count_sparsity(self, pruning: LayerPruning, part: accel.Counts, ranks: Ranks) -> None:
        numel, nonzeros, alphas = (int(count) for count in ranks.totals(part.numel, part.nonzeros, part.alphas))
        total = accel.Counts(numel, nonzeros, alphas)
        pruning.record(total)
        self._step_zeros += total.numel - total.nonzeros
        self._step_elements += total.numel

    def _words(self, name: str) -> Words:
        stream = accel.stream_id(name)
        if self._streams.setdefault(stream, name) != name:
            raise RunError(f"random streams {name!r} and {self._streams[stream]!r} collide: rename one of the layers")
        return {"seed": self.seed, "stream": stream, "step": self.step_number}

    @spanned(LEDGER)
    def _stored(self, rounded: Tensor, spec: TensorSpec | None, scale: Scale, block_dim: int) -> Stored:
        if spec is None:
            return stored_plain(rounded.numel())
        values = rounded.detach()
        return stored_tensor(values, accel.count_blocks(values), spec, along(format_of(spec), block_dim), scale)


class _StraightThrough(torch.autograd.Function):
    """The rounded tensor forward, its gradient unchanged backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


@contextmanager
def _named(tensor: str) -> Iterator[None]:
    """Raises RunError, with the tensor's name, where its codec or its block format cannot hold it."""
    try:
        yield
    except ValueError as error:
        raise RunError(f"{tensor}: {error}") from error


def _alpha_kept(spec: GradientSpec) -> str:
    """How +-alpha stays exact: by streams of the codec, by reserved codes of the format, or on its grid by a snap."""
    fmt = format_of(spec)
    if spec.pruning is not None and spec.pruning.policy in ("topk", "none"):
        return "none"
    if accel.find_codec(spec.codec).tags_alpha:
        return "streams"
    return "reserved" if isinstance(fmt, accel.Format) and fmt.alpha_codes else "snap"


def _version(x: Tensor) -> int:
    """How often x was written in place; tensors of inference mode do not count it."""
    return 0 if x.is_inference() else x._version


def _operand(spec: TensorSpec | None, scale: Scale) -> Operand:
    return AS_IT_IS if spec is None else Operand(format_of(spec), scale)


def _input_of(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return arguments[0] if arguments else next(iter(named.values()))


def _snap(alpha: float, fmt: accel.Format | accel.BlockFormat, scale: Scale) -> float:
    """The value of the (scaled) format nearest to alpha, never 0 for a positive alpha."""
    if alpha == 0:
        return 0.0
    assert isinstance(fmt, accel.Format)  # pruning in a block format goes with a codec that tags alpha
    unit = 1.0 if scale is None else float(scale)
    snapped = float(accel.quantize(torch.tensor(alpha), fmt, scale=unit))
    return snapped if snapped > 0 else float(torch.tensor(fmt.min_subnormal) * unit)
