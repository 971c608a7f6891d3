"""Enters the tensors of the sampled steps of a training into the ledger, as the hooks of the emulation meet them.

What costs what is said in `accel.ledger`. Beyond that table:

- a tensor that several layers read in one format is written once; each reader's dX beyond the first costs one write and
  one read of a float32 partial sum;
- the second operand of an addition, and every part of a concatenation, comes from memory once more, as the float32
  tensor that it is in the emulation; it is written for that unless a layer's input is stored as that very tensor. Its
  gradient likewise;
- a weight is stored and written once a step, however often its layer runs; a float32 weight is the master copy itself;
- `saved_activations` says how a tensor is stored that is kept for backward alone: the input of a normalisation. A
  layer's input X, which forward reads as well, is stored once, as the role `activations` of the layer says.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import accel
from accel.effectual import Counted
from accel.ledger import Ledger, Product, Stored, stored_blocks, stored_encoded, stored_plain
from accel.operations import with_padding
from fpsim.config.schema import TensorSpec
from fpsim.ranges import LEDGER, spanned

OFF_ANY_GRID = 1 + 2.0**-23  # a float32 number that no format of fewer than 23 mantissa bits has
HISTOGRAM_BITS = 8  # formats up to this width get an order-0 entropy

Scale = float | Tensor | None
_Place = tuple[int, torch.Size]  # of a tensor in memory


class Recorder:
    """What one step stores and moves. ledger: the records of all steps."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], optimizer: torch.optim.Optimizer | None) -> None:
        self.model, self.layers, self.optimizer = model, layers, optimizer
        self.ledger = Ledger()
        self.step = 0
        self.micro_batch = -1
        self._inputs: dict[_Place, tuple[Tensor, list[Stored]]] = {}  # holding a tensor keeps its place from others
        self._norm_inputs: dict[_Place, Tensor] = {}
        self._stored_weights: set[int] = set()
        self._last_layer = ""
        self._watcher = _AddendWatcher(self)

    def begin_step(self, step: int) -> None:
        """The coming forward pass is the first of a step."""
        self.step = step
        self.restart_step()

    def restart_step(self) -> None:
        """The current step begins anew: what it has entered so far is dropped."""
        self.close()
        self.micro_batch = -1
        self._stored_weights.clear()
        for entries in (self.ledger.records, self.ledger.products):
            while entries and entries[-1].step == self.step:
                entries.pop()

    def close(self) -> None:
        """End every forward pass: those that an interrupt has cut off did not."""
        while self._watcher.leave():
            pass
        self._forget_inputs()

    def begin_forward(self) -> None:
        """A forward pass begins: watch its additions."""
        self.micro_batch += 1
        self._last_layer = "(input)"
        self._watcher.__enter__()

    def end_forward(self, output: Any) -> None:
        """A forward pass has ended, or failed; without effect where none had begun."""
        if self._watcher.leave() and isinstance(output, Tensor):
            self.ledger.add(self.step, "(output)", "activation", "forward", stored_plain(output.numel()), writes=1)
        self._forget_inputs()

    def _forget_inputs(self) -> None:
        self._inputs.clear()
        self._norm_inputs.clear()

    @spanned(LEDGER)
    def normalisation(self, name: str, x: Tensor, stored: Stored) -> None:
        """A normalisation keeps its input x for backward: one tensor, however many normalise it."""
        add = partial(self.ledger.add, self.step, name, "norm_input", micro_batch=self.micro_batch)
        is_new = _place(x) not in self._norm_inputs
        self._norm_inputs[_place(x)] = x
        add("forward", stored, writes=int(is_new), resident=is_new)
        add("dgrad", stored, reads=int(x.requires_grad))

    @spanned(LEDGER)
    def layer(self, name: str, x: Tensor, x_stored: Stored, weight: nn.Parameter, w_stored: Stored) -> None:
        """A layer runs forward on x: X and W of all passes."""
        add = partial(self.ledger.add, self.step, name, micro_batch=self.micro_batch)
        has_dgrad, has_wgrad = int(x.requires_grad), int(weight.requires_grad)
        _, known = self._inputs.setdefault(_place(x), (x, []))
        is_written = self._last_layer != "(input)" or x.requires_grad  # else it is the model's input, and lies there
        is_new = all((one.format, one.codec) != (x_stored.format, x_stored.codec) for one in known)
        is_read_again = bool(known)
        known.append(x_stored)
        add(
            "activation", "forward", x_stored, reads=1, writes=int(is_new and is_written), resident=is_new,
            second_name_in=("fp32", "bf16") if is_read_again else (),
        )  # fmt: skip
        add("activation", "wgrad", x_stored, reads=has_wgrad)
        if is_read_again and has_dgrad:
            add("addend", "dgrad", stored_plain(x.numel()), reads=1, writes=1)
        master_in = ("fp32", *(["encoded"] if w_stored.is_float32 else [])) if has_wgrad else ()
        is_first = id(weight) not in self._stored_weights
        self._stored_weights.add(id(weight))
        add("weight", "forward", w_stored, reads=1, resident=is_first, second_name_in=master_in)
        add("weight", "dgrad", w_stored, reads=has_dgrad)
        if is_first and has_wgrad:
            add("weight", "update", w_stored, writes=1, second_name_in=master_in)
        self._last_layer = name

    @spanned(LEDGER)
    def gradient(self, name: str, stored: Stored, micro_batch: int, has_dgrad: bool, has_wgrad: bool) -> None:
        """dY arrives at a layer that ran in the given forward pass."""
        add = partial(self.ledger.add, self.step, name, "gradient", micro_batch=micro_batch)
        add("dgrad", stored, reads=int(has_dgrad), writes=1, resident=True)
        add("wgrad", stored, reads=int(has_wgrad))

    @spanned(LEDGER)
    def product(self, name: str, pass_name: str, operands: tuple[str, str], counted: Counted, micro_batch: int) -> None:
        """A layer or a module multiplies tensors of these roles."""
        self.ledger.products.append(Product(self.step, micro_batch, name, pass_name, operands, *counted))

    @spanned(LEDGER)
    def addends(self, tensors: list[Tensor]) -> None:
        """Tensors that an addition or a concatenation brings in from memory."""
        add = partial(self.ledger.add, self.step, self._last_layer, "addend", micro_batch=self.micro_batch)
        for tensor in tensors:
            _, known = self._inputs.get(_place(tensor), (tensor, []))
            is_kept_so = any(one.is_float32 for one in known)
            kept_as = ("fp32", "bf16", *(["encoded"] if is_kept_so else [])) if known else ()
            stored = stored_plain(tensor.numel())
            add("forward", stored, reads=1, writes=1, second_name_in=kept_as)
            if tensor.requires_grad:
                add("dgrad", stored, reads=1, writes=1)

    def is_layer_input(self, x: Tensor) -> bool:
        """Whether a layer of this forward pass has read x."""
        return _place(x) in self._inputs

    @spanned(LEDGER)
    def update(self) -> None:
        """The optimizer has made its step: weight gradients, master copies and optimizer state of all parameters."""
        counted: set[int] = set()
        for name, module in self.model.named_modules():
            own = [p for p in module._parameters.values() if p is not None and p.requires_grad and id(p) not in counted]
            counted.update(id(p) for p in own)
            if not own:
                continue
            add = partial(self.ledger.add, self.step, name)
            stored = stored_plain(sum(p.numel() for p in own))
            add("weight_gradient", "wgrad", stored, writes=1, resident=True)
            add("weight_gradient", "update", stored, reads=1)
            add("master", "update", stored, reads=1, writes=1, resident=True)
            outside = sum(p.numel() for p in own if not (name in self.layers and p is module._parameters["weight"]))
            if outside:  # biases and normalisation parameters are read where they are used, as they are
                add("master", "forward", stored_plain(outside), reads=1)
            if state := self._optimizer_state(own):
                add("optimizer_state", "update", stored_plain(state), reads=1, writes=1, resident=True)

    def _optimizer_state(self, parameters: list[nn.Parameter]) -> int:
        if self.optimizer is None:
            return 0
        states = (self.optimizer.state.get(p, {}) for p in parameters)
        return sum(v.numel() for state in states for v in state.values() if isinstance(v, Tensor) and v.ndim > 0)


def _place(x: Tensor) -> _Place:
    return x.data_ptr(), x.shape


class _AddendWatcher(TorchDispatchMode):
    """Sees the additions and concatenations of a forward pass."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.depth = 0

    def __enter__(self) -> _AddendWatcher:
        self.depth += 1
        super().__enter__()
        return self

    def leave(self) -> bool:
        """Exit if entered, and say whether it was."""
        if not self.depth:
            return False
        self.depth -= 1
        self.__exit__(None, None, None)
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            left, right = args[:2]
            if isinstance(right, Tensor) and left.shape == right.shape and left.ndim > 1:
                self.recorder.addends([left if self.recorder.is_layer_input(left) else right])
        elif func is torch.ops.aten.cat.default:
            self.recorder.addends(list(args[0]))
        return result


@spanned(LEDGER)
def stored_tensor(
    x: Tensor,
    counts: accel.BlockCounts,
    spec: TensorSpec,
    fmt: accel.Format | accel.BlockFormat,
    scale: Scale,
    alpha: float = 0.0,
) -> Stored:
    """A tensor rounded into `fmt` (times `scale`), with its +-alpha, in the ledger's terms."""
    if isinstance(fmt, accel.BlockFormat):
        padded = with_padding(x, fmt)
        as_stored = counts if padded is x else accel.count_blocks(padded)
        return stored_blocks(as_stored, spec.codec, fmt, tuple(x.shape))
    scales = scale.numel() if isinstance(scale, Tensor) else 1
    histogram = code_histogram(x, fmt, scale, alpha)
    stream_bits = None if accel.find_codec(spec.codec).is_counted else packed_bits(x, spec.codec, fmt, scale, alpha)
    return stored_encoded(
        counts, spec.codec, fmt, tuple(x.shape), histogram=histogram, scales=scales, stream_bits=stream_bits
    )


def packed_bits(x: Tensor, codec: str, fmt: accel.Format, scale: Scale, alpha: float) -> dict[str, float]:
    """Bits by part of the stream of a rounded tensor. Raises CodecError where the codec cannot hold it.

    A stream has one scale: of a tensor with several, the codes' own values are packed, with an alpha off their grid.
    """
    if not isinstance(scale, Tensor) or scale.numel() == 1:
        one = None if scale is None else float(scale)
        return accel.pack(x, codec, fmt, scale=one, alpha=alpha).bits_by_part
    if alpha == 0:
        return accel.pack(accel.decode(accel.encode(x, fmt, scale=scale), fmt), codec, fmt).bits_by_part
    is_alpha, mark = x.abs() == alpha, OFF_ANY_GRID
    values = accel.decode(accel.encode(x.masked_fill(is_alpha, 0.0), fmt, scale=scale), fmt)
    return accel.pack(torch.where(is_alpha, x.sign() * mark, values), codec, fmt, alpha=mark).bits_by_part


def code_histogram(x: Tensor, fmt: accel.Format, scale: Scale, alpha: float) -> tuple[int, ...] | None:
    """How often each code occurs in a rounded tensor; an alpha that lies off the grid counts as codes of its own."""
    if fmt.bits > HISTOGRAM_BITS or x.numel() == 0 or (not fmt.has_nan and bool(x.isnan().any())):
        return None
    tagged: list[int] = []
    if alpha:
        positive, negative = x == alpha, x == -alpha
        tagged = [int(torch.count_nonzero(positive)), int(torch.count_nonzero(negative))]
        x = x.masked_fill(positive | negative, 0.0)
    histogram = accel.count_codes(accel.encode(x, fmt, scale=scale))
    histogram[0] -= sum(tagged)
    return tuple(count for count in [*histogram.tolist(), *tagged] if count)
