"""Runs the products of a model on emulated multiply-accumulate units, forward and backward.

While a layer runs, `Products` sees the linear map or convolution by which it multiplies its weight, and puts the
emulated one in its place; in modules that the configuration names under `products`, matmul, bmm and
scaled_dot_product_attention as well. The rest stays torch's: biases and the softmax of attention are float32.

A unit sees the codes' own values of a tensor; the scales multiply the result, so they must not change along a sum (see
`fpsim.layers`). A tensor in a block format comes with the scales of its blocks, one in float32 as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import accel
from accel import Convolution
from accel.effectual import Counted, count_dgrad, count_forward, count_wgrad
from accel.ledger import Effectual
from fpsim.config.schema import Datapath, mac
from fpsim.errors import RunError
from fpsim.ranges import PRODUCTS, span
from fpsim.recorder import Scale

CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
TRANSPOSED: dict[Any, int] = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
MATMULS = ("matmul", "mm", "bmm", "linalg_matmul")
OTHER_PRODUCTS = (
    "einsum", "baddbmm", "addmm", "addbmm", "addmv", "addr", "mv", "dot", "vdot", "inner", "outer", "ger", "tensordot",
    "chain_matmul", "linalg_multi_dot", "linalg_vecdot", "linalg_matrix_power", "multi_dot", "matrix_power", "bilinear",
    "kron", "cov", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "multi_head_attention_forward", "_native_multi_head_attention", "__rmatmul__",
)  # fmt: skip

Words = Any  # seed, stream and step of random words, by name
WordsOf = Callable[[str], Words]  # of a pass


@dataclass(frozen=True)
class Operand:
    """How a rounded tensor lies on its format's grid. alpha: of a pruned gradient, off the grid or on it. tensor: the
    tensor, where that must be told from others."""

    fmt: accel.Format | accel.BlockFormat | None = None
    scale: Scale = None
    alpha: float = 0.0
    tensor: Tensor | None = None

    def codes(self, x: Tensor) -> Tensor:
        """The values of the codes of x, without the scale."""
        if self.scale is None or not isinstance(self.fmt, accel.Format):
            return x
        is_alpha = x.abs() == self.alpha if self.alpha else None
        on_grid = x if is_alpha is None else x.masked_fill(is_alpha, 0.0)
        codes = accel.encode(on_grid, self.fmt, scale=self.scale)
        values = accel.decode(codes, self.fmt, alpha=0.0 if self.fmt.alpha_codes else None)
        return values if is_alpha is None else torch.where(is_alpha, x / self.scale, values)


AS_IT_IS = Operand()


@dataclass
class LayerProduct:
    """What a layer does with its weight in one call, in all three passes: y = x * w, for a transposed convolution
    turned round, as for x @ w itself, which is only counted. spatial: size of the side that the kernel moves over.
    gradient: of dY, once that has arrived."""

    layer: str
    conv: Convolution
    is_transposed: bool
    spatial: tuple[int, ...]
    datapath: Datapath
    words: WordsOf
    x: Operand
    w: Operand
    gradient: Operand = AS_IT_IS

    def samples(self, x: Tensor) -> Tensor:
        """x or dy as (N, channels, *spatial)."""
        if not self.spatial:
            return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return x.unsqueeze(0) if x.ndim == len(self.spatial) + 1 else x

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x: samples."""
        if self.datapath.forward is None:
            return torch.ops.aten.convolution(x, w, None, *self._torch_arguments(x, w)) if self.spatial else x @ w.t()
        multiply = self._widened if self.is_transposed else self._narrowed
        with span(PRODUCTS):
            y = multiply(self.x.codes(x), self.w.codes(w), mac(self.datapath.forward), self.words("forward"))
        scale = self.w.scale
        if isinstance(scale, Tensor) and scale.numel() > 1:
            channels = scale.flatten().repeat(y.shape[1] // scale.numel())
            scale = channels.view(-1, *[1] * (y.ndim - 2))
        return _scaled(y, self.x.scale, scale)

    def dgrad(self, dy: Tensor, operand: Operand, x: Tensor, w: Tensor) -> Tensor:
        """The gradient by x, which is given for its shape."""
        if self.datapath.dgrad is None:
            return self._torch_gradients(dy, x, w, [True, False, False])[0] if self.spatial else dy @ w
        multiply = self._narrowed if self.is_transposed else self._widened
        with span(PRODUCTS):
            dx = multiply(operand.codes(dy), self.w.codes(w), self._unit("dgrad", operand), self.words("dgrad"))
        return _scaled(dx, operand.scale, self.w.scale)

    def wgrad(self, dy: Tensor, operand: Operand, x: Tensor, w: Tensor) -> Tensor:
        """The gradient by w, which is given for its shape."""
        if self.datapath.wgrad is None:
            return self._torch_gradients(dy, x, w, [False, True, False])[1] if self.spatial else dy.t() @ x
        unit, words = self._unit("wgrad", operand), self.words("wgrad")
        with span(PRODUCTS):
            wide, narrow, kernel = self.x.codes(x), operand.codes(dy), tuple(w.shape[2:])
            if self.is_transposed:
                wide, narrow, unit = narrow, wide, replace(unit, a=unit.b, b=unit.a)
            dw = accel.conv_wgrad(wide, narrow, self.conv, kernel, unit, **words)
        return _scaled(dw, operand.scale, self.x.scale)

    def _unit(self, which: str, gradient: Operand) -> accel.Mac:
        """Of a backward pass. Raises RunError for integers of a dY that is none."""
        unit = mac(getattr(self.datapath, which))
        if unit.is_integer and gradient is AS_IT_IS:
            message = f"needs a rounded dY for the integers of {unit.name!r}: it is float32 in evaluation, and where"
            raise RunError(f"layer {self.layer!r}, {which}: {message} the layer does more than multiply")
        return unit

    def count(self, which: str, x: Tensor, w: Tensor, dy: Tensor | None = None) -> Counted:
        """What a pass multiplies; all masks of nonzeros, x and dy samples."""
        if which == "wgrad" and dy is not None:
            kernel = tuple(w.shape[2:])
            if not self.is_transposed:
                return count_wgrad(x, dy, self.conv, kernel)
            found = count_wgrad(dy, x, self.conv, kernel)
            turned = {of: Effectual(one.second, one.first, one.both) for of, one in found.effectual.items()}
            return found._replace(rows=found.columns, columns=found.rows, effectual=turned)
        operand = x if dy is None else dy
        count = count_forward if (which == "forward") != self.is_transposed else count_dgrad
        return count(operand, w, self.conv)

    def _narrowed(self, x: Tensor, w: Tensor, unit: accel.Mac, words: Words) -> Tensor:
        return accel.conv_forward(x, w, self.conv, unit, **words)

    def _widened(self, y: Tensor, w: Tensor, unit: accel.Mac, words: Words) -> Tensor:
        return accel.conv_dgrad(y, w, self.conv, self.spatial, unit, **words)

    def _torch_arguments(self, x: Tensor, w: Tensor) -> tuple[Any, ...]:
        rest = [0] * len(self.spatial)
        if self.is_transposed:
            each = zip(self.spatial, x.shape[2:], w.shape[2:], *self.conv[:3], strict=True)
            rest = [size - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for size, n, k, s, p, d in each]
        return *self.conv[:3], self.is_transposed, rest, self.conv.groups

    def _torch_gradients(self, dy: Tensor, x: Tensor, w: Tensor, needed: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(dy, x, w, None, *self._torch_arguments(x, w), needed)


def _scaled(result: Tensor, first: Scale, second: Scale) -> Tensor:
    """An emulated result times the operands' scales: their product in float64, then one float32 multiplication
    (one of float64 where float32 does not hold their product)."""
    result = result.to(torch.float32)
    if first is None and second is None:
        return result
    one, other = (torch.as_tensor(1.0 if s is None else s, dtype=torch.float64) for s in (first, second))
    both = (one * other).to(result.device)
    is_normal = bool(((both >= 2.0**-126) & (both < 2.0**127)).all())
    return result * both.float() if is_normal else (result.double() * both).float()


class _LayerFunction(torch.autograd.Function):
    """A LayerProduct as autograd knows it, on tensors with or without a batch dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, product: LayerProduct) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.product = product
        samples = product.samples(x)
        with _named(product.layer, "forward"):
            y = product.forward(samples, w)
        shape = *x.shape[: x.ndim - len(samples.shape[1:])], *y.shape[1:]
        if y.shape == shape:
            return y
        strides = torch.empty(shape, device="meta").stride()  # not as a view: what follows may write in place
        return y.new_empty(0).set_(y.contiguous().untyped_storage(), 0, shape, strides)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x, w), product, dy = ctx.saved_tensors, ctx.product, gradients[0]
        arrived, product.gradient = product.gradient, AS_IT_IS
        rounded = arrived.tensor
        is_it = rounded is not None and rounded.data_ptr() == dy.data_ptr() and rounded.shape == dy.shape
        given = product.samples(dy), arrived if is_it else AS_IT_IS, product.samples(x), w
        dx, dw = None, None
        if ctx.needs_input_grad[0]:
            with _named(product.layer, "dgrad"):
                dx = product.dgrad(*given).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            with _named(product.layer, "wgrad"):
                dw = product.wgrad(*given)
        return dx, dw, None


@contextmanager
def _named(layer: str, which: str) -> Iterator[None]:
    """Raises RunError that names the layer where its unit cannot multiply."""
    try:
        yield
    except ValueError as error:
        raise RunError(f"layer {layer!r}, {which}: {error}") from error


class Made(NamedTuple):
    """A product that a layer has made: of the input x, with that result, by a node of autograd."""

    product: LayerProduct
    x: Tensor
    result: Tensor
    node: Any

    def is_still(self, output: Tensor) -> bool:
        """Whether the layer returns the result as it was, so that dY of the layer is that of the product."""
        return output is self.result and output.grad_fn is self.node


class LayerCall:
    """What a running layer's function calls go through. products: that it has made.

    weight: what the layer multiplies by. x, w: of its input and of that. datapath: None where torch multiplies.
    """

    def __init__(
        self, layer: str, weight: Tensor, datapath: Datapath | None, words: WordsOf, x: Operand, w: Operand
    ) -> None:
        self.layer, self.weight, self.words, self.x, self.w = layer, weight, words, x, w
        self.datapath = datapath or Datapath()
        self.products: list[Made] = []

    def __call__(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        spatial: tuple[int, ...] = ()
        output_padding: tuple[int, ...] = ()
        if func is functional.linear:
            x, w, bias = _linear_arguments(*args, **named)
            conv = Convolution()
        elif func in CONVOLUTIONS:
            x, w, bias, conv = _conv_arguments(CONVOLUTIONS[func], *args, **named)
            spatial = tuple(x.shape[x.ndim - len(conv.stride) :])
        elif func in TRANSPOSED:
            x, w, bias, conv, spatial, output_padding = _transposed_arguments(TRANSPOSED[func], *args, **named)
        elif func is torch.addmm and len(args) == 3 and not named:
            (bias, x, w), conv = args, Convolution()
        else:
            return func(*args, **named)
        is_emulated = self.datapath != Datapath()
        if func in TRANSPOSED and any(o >= s for o, s in zip(output_padding, conv.stride, strict=True)):
            if is_emulated:
                raise RunError(f"layer {self.layer!r} has output_padding of its stride or more: this is not emulated")
            return func(*args, **named)
        if w is not self.weight:
            return func(*args, **named)
        is_transposed = func in TRANSPOSED or func is torch.addmm
        product = LayerProduct(self.layer, conv, is_transposed, spatial, self.datapath, self.words, self.x, self.w)
        if is_emulated:
            y = _LayerFunction.apply(x, w, product)
            y = y if bias is None else y + bias.view(-1, *[1] * len(spatial))
        else:
            y = func(*args, **named)
        self.products.append(Made(product, x, y, y.grad_fn))
        return y


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _conv_arguments(
    dims: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Convolution]:  # fmt: skip
    dilation = _each(dilation, dims)
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [n // 2 for n in total]
        if any(n % 2 for n in total):  # one more zero at the end, as torch has it
            input = functional.pad(input, [end for n in reversed(total) for end in (0, n % 2)])
    return input, weight, bias, Convolution(_each(stride, dims), _each(padding, dims), dilation, groups)


def _transposed_arguments(
    dims: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Convolution, tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    conv = Convolution(_each(stride, dims), _each(padding, dims), _each(dilation, dims), groups)
    more = _each(output_padding, dims)
    sizes = zip(input.shape[-dims:], weight.shape[2:], *conv[:3], more, strict=True)
    spatial = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 + o for n, k, s, p, d, o in sizes)
    return input, weight, bias, conv, spatial, more


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


# --- products of two activations ------------------------------------------------------------------------------------


class _MatmulFunction(torch.autograd.Function):
    """a b as autograd knows it; leading dimensions that were broadcast are summed in float32 by backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, datapath: Datapath, words: WordsOf) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.datapath, ctx.words = datapath, words
        return _multiplied(a, b, datapath.forward, words("forward"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (a, b), dc, da, db = ctx.saved_tensors, gradients[0], None, None
        if ctx.needs_input_grad[0]:
            da = _multiplied(dc, b.mT, ctx.datapath.dgrad, ctx.words("dgrad")).sum_to_size(a.shape)
        if ctx.needs_input_grad[1]:
            db = _multiplied(a.mT, dc, ctx.datapath.wgrad, ctx.words("wgrad")).sum_to_size(b.shape)
        return da, db, None, None


def _factors(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The operands of a matmul, by place or by name."""
    values = [*args, *(named[key] for key in ("input", "self", "other", "mat2") if key in named)]
    return values[0], values[1]


def _multiplied(a: Tensor, b: Tensor, unit: Any, words: Words) -> Tensor:
    if unit is None:
        return a @ b
    with span(PRODUCTS):
        return accel.matmul(a, b, mac(unit), **words).to(torch.float32)


class ModuleCall:
    """What the function calls of a running module go through, for its products of activations.

    datapath: None where torch multiplies. words: of a product (its number in this call) and a pass. count: takes the
    pass and the masks of nonzeros of both operands of each product; None where nothing is counted. Raises RunError for
    products that cannot be emulated.
    """

    def __init__(
        self,
        name: str,
        datapath: Datapath | None,
        words: Callable[[int, str], Words],
        count: Callable[[str, Tensor, Tensor], None] | None,
    ) -> None:
        self.name, self.datapath, self.words, self.count = name, datapath, words, count
        self.made = 0

    def __call__(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        called = getattr(func, "__name__", "")
        is_attention = func is functional.scaled_dot_product_attention
        if self.datapath is not None:
            if called in OTHER_PRODUCTS:
                raise RunError(f"module {self.name!r} multiplies by {called}, which cannot be emulated: use matmul")
            if is_attention:
                return self._attention(*args, **named)
            if func is functional.linear:
                x, w, bias = _linear_arguments(*args, **named)
                y = self._matmul(x, w.mT)
                return y if bias is None else y + bias
            if called not in MATMULS:
                return func(*args, **named)
            if named.get("out") is not None:
                raise RunError(f"module {self.name!r} multiplies into `out`, which cannot be emulated")
            return self._matmul(*_factors(args, named))
        result = func(*args, **named)
        if is_attention:
            self._count_attention(result, *args, **named)
        elif called in MATMULS:
            self._count(result, *_factors(args, named))
        return result

    def _matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a b as `torch.matmul` has it."""
        for x in (a, b):
            if x.dtype != torch.float32:
                raise RunError(f"module {self.name!r} multiplies {x.dtype}: emulation works on float32 tensors")
        assert self.datapath is not None
        number = self.made
        self.made += 1
        left, right = a.unsqueeze(0) if a.ndim == 1 else a, b.unsqueeze(1) if b.ndim == 1 else b
        with _named(self.name, "forward"):
            c = _MatmulFunction.apply(left, right, self.datapath, lambda which: self.words(number, which))
        if a.ndim > 1 and b.ndim > 1:
            self._count(c, a, b)
        c = c.squeeze(-1) if b.ndim == 1 else c
        return c.squeeze(-2 if b.ndim > 1 else -1) if a.ndim == 1 else c

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """softmax(query key^T * scale + mask) value, with two emulated products; 0 for a query that no key is for."""
        if attn_mask is not None and is_causal:
            raise RunError(f"module {self.name!r}: attn_mask and is_causal exclude each other")
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scores = self._matmul(query, key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        has_no_key = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(has_no_key, 0.0).softmax(-1).masked_fill(has_no_key, 0.0)
        return self._matmul(functional.dropout(weights, dropout_p), value)

    def _count(self, c: Tensor, a: Tensor, b: Tensor) -> None:
        if self.count is None or a.ndim < 2 or b.ndim < 2:
            return
        masks = a.detach() != 0, b.detach() != 0
        self.count("forward", *masks)
        if c.requires_grad:
            c.register_hook(lambda dc: self._count_gradients(*masks, dc != 0, a.requires_grad, b.requires_grad))

    def _count_gradients(self, a: Tensor, b: Tensor, dc: Tensor, has_da: bool, has_db: bool) -> None:
        assert self.count is not None
        if has_da:
            self.count("dgrad", dc, b.mT)
        if has_db:
            self.count("wgrad", a.mT, dc)

    def _count_attention(
        self, result: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        """The products of a fused attention, whose weights are not seen: zero where the mask has it so."""
        if self.count is None:
            return
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        weights = torch.ones(*query.shape[:-1], key.shape[-2], dtype=torch.bool, device=query.device)
        if is_causal:
            weights = weights.tril()
        elif attn_mask is not None:
            weights = weights & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf)
        q, k, v = (x.detach() != 0 for x in (query, key, value))
        self.count("forward", q, k.mT)
        self.count("forward", weights, v)
        if result.requires_grad:
            has_scores = query.requires_grad or key.requires_grad

            def arrived(gradient: Tensor) -> None:
                self._count_gradients(weights, v, gradient != 0, has_scores, value.requires_grad)
                self._count_gradients(q, k.mT, weights, query.requires_grad, key.requires_grad)

            result.register_hook(arrived)


# --- the mode -------------------------------------------------------------------------------------------------------


class Products(TorchFunctionMode):
    """Sends the function calls of a model's forward pass through the innermost call of `running`."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[LayerCall | ModuleCall] = []
        self._depth = 0

    def begin_forward(self) -> None:
        """A forward pass begins, perhaps inside another one."""
        self._depth += 1
        if self._depth == 1:
            self.__enter__()

    def end_forward(self) -> None:
        """A forward pass has ended, or failed; without effect where none had begun."""
        if self._depth:
            self._depth -= 1
            if not self._depth:
                self.running.clear()
                self.__exit__(None, None, None)

    def leave(self, call: LayerCall | ModuleCall) -> None:
        """A call has ended, and those within it that were cut off; without effect where the forward pass was."""
        if call in self.running:
            del self.running[self.running.index(call) :]

    def close(self) -> None:
        """End every forward pass: those that an interrupt has cut off did not."""
        while self._depth:
            self.end_forward()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        return self.running[-1](func, args, named) if self.running else func(*args, **named)
