"""Keeps what autograd saves for backward in packed form, from the operation that saves it to the one that uses it.

Every float32 activation that an operation of a training forward pass saves becomes a stream of `accel.pack`:

    layer_input  the rounded input of a layer, in the layer's own format and scale: exact; of a block format an element
                 takes the exponent of its block's scale along (e8m3 for mxfp8_e4m3fn), or stays float32 (nvfp4)
    rounded      any other tensor that needs a gradient, where a format is given: rounded with a scale of `power_of_two`
                 for backward alone, forward has used the float32 tensor; where it is not finite, as float32
    float32      everything else: exact, only that a NaN becomes the canonical NaN
    plain        not packed: other types, fewer than SMALLEST elements or more than LARGEST, elements that share memory
                 (expanded tensors)

Not packed, and not counted, is what is alive without autograd: parameters, buffers and rounded weights, and the model's
inputs, which its caller holds.

A tensor that needs no gradient is never rounded: dropout's mask, LayerNorm's statistics. GroupNorm's and RMSNorm's do
need one in autograd's books, and are.

Hooks stay on when an interrupt (Ctrl-C) ends a forward pass, but then pack nothing; the next pass or step removes them.

Autograd does not check whether a tensor that a hook has taken was modified since. A packed tensor is what was saved; of
the others the check is made here. What is modified through `.data` escapes this check as it escapes autograd's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import accel
from accel.formats import FLOAT32
from accel.ledger import Stored, stored_encoded, stored_plain
from fpsim.config.schema import SavedActivations, number_format
from fpsim.ranges import SAVED, spanned
from fpsim.recorder import Scale, code_histogram
from fpsim.scales import largest_magnitude, scale_of

SMALLEST = 4096  # elements: packing and unpacking take 0.2 ms however few there are, too much for less than 16 KiB
LARGEST = 1 << 29  # elements, 2 GiB: no codec's stream of so many passes the 4 GiB that a stream may have
CALL = nn.Module._call_impl.__code__  # that runs a module's hooks and its forward

Kind = Literal["layer_input", "rounded", "float32", "plain"]
Key = tuple[StorageWeakRef, int, int, torch.Size, tuple[int, ...], bool]


@dataclass
class Kept:
    """What the latest forward pass keeps of one kind: tensors, their bytes as plain tensors and as they are kept.

    Of `plain` tensors all bytes of their storages, which they keep alive.
    """

    tensors: int = 0
    plain_bytes: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True)
class _Grid:
    """Where the values of a layer's rounded input lie, and the geometry of the whole input."""

    shape: torch.Size
    strides: tuple[int, ...]
    fmt: accel.Format
    scale: Scale


@dataclass(frozen=True)
class _Packing:
    """A tensor in packed form. A stream has one scale: of a tensor with several it holds the values without them."""

    kind: Kind
    stream: accel.Packed
    scale: Scale
    strides: tuple[int, ...]
    device: torch.device

    @property
    def nbytes(self) -> int:
        return self.stream.nbits // 8 + (self.scale.nbytes if isinstance(self.scale, Tensor) else 0)

    def restored(self) -> Tensor:
        values = accel.unpack(self.stream, out=torch.empty(self.stream.header.shape, device=self.device))
        if isinstance(self.scale, Tensor):
            values *= self.scale
        if values.stride() == self.strides:
            return values
        return torch.empty_strided(values.shape, self.strides, device=self.device).copy_(values)


@dataclass(frozen=True)
class _View:
    """A saved tensor: all or a part of a packed one."""

    packing: _Packing
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    @spanned(SAVED)
    def tensor(self) -> Tensor:
        return self.packing.restored().as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class _Left:
    """A saved tensor that is not packed. Detached: the saved output of an operation must not hold the operation."""

    detached: Tensor
    version: int

    def tensor(self) -> Tensor:
        if self.detached._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.detached.shape)} that backward needs was modified in place: it is at "
                f"version {self.detached._version}, version {self.version} was saved"
            )
        return self.detached


class SavedTensors:
    """The hooks on what autograd saves during the forward passes of one model. kept: by kind, of the latest pass."""

    def __init__(self, model: nn.Module, spec: SavedActivations) -> None:
        self.model, self.spec = model, spec
        self.kept: dict[str, Kept] = {}
        self._running: list[saved_tensors_hooks | None] = []
        self._alive: set[StorageWeakRef] = set()
        self._grids: dict[StorageWeakRef, _Grid] = {}
        self._packings: dict[Key, _Packing] = {}
        self._plain: set[StorageWeakRef] = set()  # what is kept as it is, all of a storage

    @property
    def is_active(self) -> bool:
        """Whether what is saved now is packed."""
        return any(hooks is not None for hooks in self._running)

    def begin_forward(self, inputs: Iterable[Tensor], is_training: bool) -> None:
        """A forward pass begins, perhaps inside another one: pack from here on, if it trains."""
        while self._running and len(self._running) >= self._calls():
            self.end_forward()  # an interrupt has cut it off
        if self.is_active or not is_training:
            self._running.append(None)
            return
        self.kept = {}
        for tensors in (self.model.parameters(), self.model.buffers(), inputs):
            for tensor in tensors:
                self._leave(tensor)
        hooks = saved_tensors_hooks(self._pack, lambda saved: saved.tensor())
        hooks.__enter__()
        self._running.append(hooks)

    def end_forward(self) -> None:
        """A forward pass has ended, or failed; without effect where none had begun."""
        if self._running and (hooks := self._running.pop()) is not None:
            hooks.__exit__()
            self._alive.clear()
            self._grids.clear()
            self._packings.clear()
            self._plain.clear()

    def close(self) -> None:
        """End every forward pass: those that an interrupt has cut off did not."""
        while self._running:
            self.end_forward()

    def leave(self, x: Tensor) -> None:
        """Do not pack x in this forward pass: others keep it alive."""
        if self.is_active:
            self._leave(x)

    def _leave(self, x: Tensor) -> None:
        if x.layout == torch.strided:
            self._alive.add(StorageWeakRef(x.untyped_storage()))

    def lies_on_grid(self, x: Tensor, fmt: accel.Format | accel.BlockFormat, scale: Scale) -> None:
        """x, which fills its storage, was rounded into fmt with that scale: where it is saved it is packed so."""
        if not self.is_active:
            return
        if isinstance(fmt, accel.BlockFormat):  # an element times a power of two, where that is what the scales are
            bits = fmt.element.mantissa_bits
            fmt = accel.Format(f"e8m{bits}", 8, bits, 127, "ieee")
        self._grids[StorageWeakRef(x.untyped_storage())] = _Grid(x.shape, x.stride(), fmt, scale)

    def stored(self, x: Tensor) -> Stored:
        """x in the ledger's terms, as it is kept if an operation saves it now."""
        if not self.is_active or not self._is_packed(x):
            return stored_plain(x.numel())
        packing = self._packing(_whole(x), x.requires_grad, None)
        values, fmt, scale = packing.restored(), packing.stream.header.fmt, packing.scale
        return stored_encoded(
            accel.count_blocks(values), self.spec.codec, fmt, tuple(x.shape),
            histogram=code_histogram(values, fmt, scale, 0.0), stream_bits=packing.stream.bits_by_part,
        )  # fmt: skip

    @spanned(SAVED)
    def _pack(self, x: Tensor) -> _View | _Left:
        if not self._calls():
            return _Left(x.detach(), x._version)
        if not self._is_packed(x):
            self._count_plain(x)
            return _Left(x.detach(), x._version)
        grid = self._grids.get(StorageWeakRef(x.untyped_storage()))
        whole = _whole(x) if grid is None else x.detach().as_strided(grid.shape, grid.strides, 0)
        packing = self._packing(whole, x.requires_grad, grid)
        return _View(packing, x.shape, x.stride(), int(x.storage_offset() - whole.storage_offset()))

    def _is_packed(self, x: Tensor) -> bool:
        return (
            type(x) is Tensor
            and x.dtype == torch.float32
            and x.layout == torch.strided
            and SMALLEST <= x.numel() <= LARGEST
            and not _shares_memory(x)
            and not x.is_neg()
            and not self._is_left(x)
        )

    def _is_left(self, x: Tensor) -> bool:
        return StorageWeakRef(x.untyped_storage()) in self._alive

    def _calls(self) -> int:
        """How many calls of the model are running now."""
        frame, found = sys._getframe(1), 0
        while frame is not None:
            found += frame.f_code is CALL and frame.f_locals["self"] is self.model
            frame = frame.f_back  # type: ignore[assignment]
        return found

    def _packing(self, x: Tensor, needs_gradient: bool, grid: _Grid | None) -> _Packing:
        """x in packed form: made once, however often it is saved."""
        key = _key(x, needs_gradient and self.spec.format is not None)
        packing = self._packings.get(key)
        if packing is None:
            packing = self._packings[key] = (
                (None if grid is None else self._on_grid(x, grid))
                or (self._rounded(x) if needs_gradient and grid is None else None)
                or self._packed("float32", x, x, FLOAT32, None)
            )
            self._count(packing.kind, x.nbytes, packing.nbytes)
        return packing

    def _on_grid(self, x: Tensor, grid: _Grid) -> _Packing | None:
        """x in the format that it was rounded into, which is checked; None where it is not in that, as a layer may have
        modified it and a block format's scales may be no powers of two."""
        fmt, scale = grid.fmt, grid.scale
        try:
            if not isinstance(scale, Tensor):
                return self._packed("layer_input", x, x, fmt, scale)
            values = accel.decode(accel.encode(x, fmt, scale=scale), fmt)
        except ValueError:
            return None
        is_exact = torch.equal((values * scale).view(torch.int32), x.contiguous().view(torch.int32))
        return self._packed("layer_input", x, values, fmt, scale) if is_exact else None

    def _rounded(self, x: Tensor) -> _Packing | None:
        """x in the format that was asked for; None where there is none or x is not finite."""
        if self.spec.format is None:
            return None
        fmt, amax = number_format(self.spec.format), largest_magnitude(x)
        assert isinstance(fmt, accel.Format)
        assert isinstance(amax, float)
        if not math.isfinite(amax):
            return None
        scale = scale_of(x, fmt, "power_of_two", amax)
        if not bool(accel.quantize(torch.tensor(amax), fmt, scale=scale).isfinite()):  # beyond float32's largest
            return None
        return self._packed("rounded", x, accel.quantize(x, fmt, scale=scale, out=torch.empty_like(x)), fmt, scale)

    def _packed(self, kind: Kind, x: Tensor, values: Tensor, fmt: accel.Format, scale: Scale) -> _Packing:
        one = None if isinstance(scale, Tensor) else scale
        return _Packing(kind, accel.pack(values, self.spec.codec, fmt, one), scale, x.stride(), x.device)

    def _count_plain(self, x: Tensor) -> None:
        if x.layout == torch.strided and not self._is_left(x):
            storage = x.untyped_storage()
            if StorageWeakRef(storage) not in self._plain:
                self._plain.add(StorageWeakRef(storage))
                self._count("plain", storage.nbytes(), storage.nbytes())

    def _count(self, kind: Kind, plain_bytes: int, kept_bytes: int) -> None:
        kept = self.kept.setdefault(kind, Kept())
        kept.tensors += 1
        kept.plain_bytes += plain_bytes
        kept.kept_bytes += kept_bytes


def _shares_memory(x: Tensor) -> bool:
    """Whether elements of x lie in one place: along a dimension, or because more are there than places."""
    places = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return places < x.numel() or any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def _whole(x: Tensor) -> Tensor:
    """All of x's storage where x has as many elements, so that its other shapes are views of one; else x."""
    elements = x.untyped_storage().nbytes() // x.itemsize
    return x.detach().as_strided((elements,), (1,), 0) if elements == x.numel() else x.detach()


def _key(x: Tensor, is_rounded: bool) -> Key:
    """What tells one saved tensor from another. The weak reference keeps a storage's address from being used again."""
    return StorageWeakRef(x.untyped_storage()), x._version, int(x.storage_offset()), x.shape, x.stride(), is_rounded
