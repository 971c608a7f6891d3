"""A model's weights as packed streams in one safetensors file, and back: the same float32 numbers, bit for bit.

    K                 uint8: the stream (`accel.Packed`) of the weight `K` of the state dict, with format and scale
    K.scales          float32: the scales of its channels but the first, which the stream has; all of them where the
                      format has more than EXACT_BITS significant bits, whose products with a scale can coincide
    K.block_scales    uint8: of a block format, the codes of the blocks' scales, most significant bit first
    any other key     parameters and buffers as they are

The file's metadata has one entry `fpsim`, JSON: the version, how the weights are cut (`weights`), and what model takes
them (`model`, null for one that is not of this package). What lies in the file is what the ledger counts: a stream, 32
bits a further scale, the scales of blocks; the names and shapes that safetensors keeps come on top.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import accel
import models
from accel.operations import BlockCodes
from accel.presets import to_mapping
from fpsim.checkpoint import own
from fpsim.emulation import EncodedWeight
from fpsim.errors import RunError
from fpsim.files import write_bytes

VERSION = 1
KEY = "fpsim"
EXACT_BITS = 22  # a number of so many bits comes back from its float32 product with any scale


@dataclass(frozen=True)
class Parts:
    """A weight on its way into the file. description: of its cut, plain data; tensors: by suffix of the key."""

    description: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def nbits(self) -> int:
        """Of what is stored."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values())


def pack_weight(weight: EncodedWeight) -> Parts:
    """A weight in a format, as it is stored. Raises CodecError where the codec cannot hold it."""
    codec, fmt, blocks = weight.spec.codec, weight.fmt, weight.blocks
    if isinstance(fmt, accel.BlockFormat):
        assert blocks is not None
        whole = None if blocks.tensor_scale is None else float(blocks.tensor_scale)
        elements = accel.decode(blocks.codes, fmt.element, scale=whole)
        stream = accel.pack(elements, codec, fmt.element, scale=whole)
        description = {"format": to_mapping(fmt), "length": blocks.length, "scales_shape": list(blocks.scales.shape)}
        return Parts(description, {"": _bytes(stream), ".block_scales": _bits(blocks.scales, fmt.scale.bits)})
    scale = weight.scale
    if not isinstance(scale, Tensor) or scale.numel() == 1:
        return Parts({}, {"": _bytes(accel.pack(weight.values, codec, fmt, scale=_number(scale)))})
    is_exact = fmt.mantissa_bits < EXACT_BITS
    first = float(scale.flatten()[0]) if is_exact else None
    codes = accel.encode(weight.values, fmt, scale=scale)
    stream = accel.pack(accel.decode(codes, fmt, scale=first), codec, fmt, scale=first)
    tensors = {"": _bytes(stream), ".scales": scale.flatten()[int(is_exact) :].clone()}
    return Parts({"scales_shape": list(scale.shape)}, tensors)


def unpack_weight(parts: Parts) -> Tensor:
    """The float32 numbers that `pack_weight` was given. Raises CodecError for a stream that is damaged."""
    stream = accel.Packed.from_bytes(parts.tensors[""].numpy().tobytes())
    values, header, said = accel.unpack(stream), stream.header, parts.description
    if "format" in said:
        fmt = accel.format(said["format"])
        assert isinstance(fmt, accel.BlockFormat)
        whole = torch.tensor([float(header.scale)]) if fmt.tensor_scale else None
        codes = accel.encode(values, fmt.element, scale=None if whole is None else float(whole))
        scales = _from_bits(parts.tensors[".block_scales"], fmt.scale.bits, said["scales_shape"])
        values = accel.decode(BlockCodes(codes, scales, whole, said["length"]), fmt)
    elif ".scales" in parts.tensors:
        first, scales = float(header.scale), parts.tensors[".scales"]
        is_exact = header.fmt.mantissa_bits < EXACT_BITS
        scale = (torch.cat([torch.tensor([first]), scales]) if is_exact else scales).view(said["scales_shape"])
        values = accel.decode(accel.encode(values, header.fmt, scale=first), header.fmt, scale=scale)
    return values


def save_packed(
    path: Path, weights: Mapping[str, Parts], others: Mapping[str, Tensor], model: dict[str, Any] | None
) -> None:
    """Write the file, whole or not at all. weights, others: by key of the state dict, all of it together.

    model: the name, options, input_shape and classes that `models.build`, or the function of an import path, takes;
    None where something else builds it.
    """
    tensors = {f"{key}{suffix}": tensor for key, parts in weights.items() for suffix, tensor in parts.tensors.items()}
    tensors |= own(others)
    descriptions = {key: parts.description for key, parts in weights.items()}
    about = {"version": VERSION, "model": model, "weights": descriptions}
    write_bytes(path, save(tensors, metadata={KEY: json.dumps(about)}))


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of `save_packed`, packed weights as float32, for `load_state_dict` of the module.

    Raises RunError, naming the file, where it is missing, damaged or no such file.
    """
    return _read(Path(path))[1]


def load_model(path: str | Path, build: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The model in a file of `fpsim export`: a plain module, on the CPU, in evaluation mode, its weights as exported.

    build: the function that the run's configuration names by its import path. A file never decides what is imported.
    Raises RunError as `load_state` does, for weights without a model, and where `build` is needed or is not.
    """
    about, state = _read(Path(path))
    if about["model"] is None:
        raise RunError(f"{path}: holds the weights of a model that is not of this package: take load_state")
    try:
        options = dict(about["model"])
        name, shape = options.pop("name"), tuple(options.pop("input_shape"))
        if (":" in name) != (build is not None):
            what = "is of this package: leave out build" if build is not None else f"is of {name}: give it as build"
            raise RunError(f"{path}: its model {what}")
        function = partial(models.build, name) if build is None else build
        built = function(input_shape=shape, **options)
        built.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RunError(f"{path}: its model cannot be built: {error}") from error
    return built.eval()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(KEY)
            if metadata is None:
                raise RunError(f"{path}: was not written by `fpsim export`")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(metadata)
        if about["version"] > VERSION:
            raise RunError(f"{path}: is of version {about['version']}; this fpsim reads version {VERSION}")
        state = {}
        for key, description in about["weights"].items():
            suffixes = [suffix for suffix in ("", ".scales", ".block_scales") if key + suffix in tensors]
            parts = Parts(description, {suffix: tensors.pop(key + suffix) for suffix in suffixes})
            state[key] = unpack_weight(parts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    return about, {**tensors, **state}


def _number(scale: float | Tensor | None) -> float | None:
    return None if scale is None else float(scale)


def _bytes(stream: accel.Packed) -> Tensor:
    return torch.frombuffer(bytearray(stream.to_bytes()), dtype=torch.uint8)


def _bits(codes: Tensor, bits: int) -> Tensor:
    """Codes, `bits` bits each, one behind another."""
    shifts = np.arange(bits - 1, -1, -1)
    return torch.from_numpy(np.packbits(codes.numpy().reshape(-1, 1) >> shifts & 1))


def _from_bits(packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    count = int(np.prod(shape))
    flags = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits).astype(np.int64)
    return torch.from_numpy((flags << np.arange(bits - 1, -1, -1)).sum(axis=1)).view(shape)
