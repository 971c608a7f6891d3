"""Whether a codec keeps its word: what a codec of one's own should pass before it is relied on."""

from __future__ import annotations

import numpy as np
import torch

import accel.operations
from accel.codecs.codec import Codec, CodecError
from accel.codecs.footprint import footprint
from accel.codecs.packed import Packed, pack, unpack, unpack_slice
from accel.codecs.registry import find_codec

FORMATS = ("e4m3fn", "e2m1", "bf16")
SHAPES = ((0,), (1,), (203,), (29, 7), (5, 1031))
ZERO_SHARES = (0.0, 0.3, 0.9, 0.99, 1.0)
BLOCKS = (8, 96, 4096)
ALPHA = 0.75  # on no grid of the formats above but bf16's
SEED = 0


def check_codec(codec: Codec | str) -> int:
    """Pack and unpack tensors of three formats, five shapes, five shares of zeros and three sizes of blocks, with
    +-alpha for a codec that tags it: how many. codec: registered, or its name.

    Raises CodecError, saying what of which tensor, where a tensor does not come back bit for bit, whole or a slice of
    it; where the stream is not as long as `footprint` says; and where the loops write more than `streams` says.
    """
    name = codec.name if isinstance(codec, Codec) else codec
    tags_alpha = find_codec(name).tags_alpha
    random = np.random.default_rng(SEED)
    count = 0
    for fmt in FORMATS:
        for shape in SHAPES:
            for zeros in ZERO_SHARES:
                for alpha in (None, ALPHA) if tags_alpha else (None,):
                    x = _tensor(random, fmt, shape, zeros, alpha)
                    for block in BLOCKS:
                        _check(name, x, fmt, alpha, block, f"{fmt}, shape {shape}, {zeros:.0%} zeros, block {block}")
                        count += 1
    return count


def _tensor(
    random: np.random.Generator, fmt: str, shape: tuple[int, ...], zeros: float, alpha: float | None
) -> torch.Tensor:
    x = accel.operations.quantize(torch.from_numpy(random.standard_normal(shape).astype(np.float32)), fmt)
    keep = torch.from_numpy(random.random(shape) >= zeros)
    x = torch.where(keep, x, torch.zeros(()))
    if alpha is not None:
        x = torch.where((x != 0) & torch.from_numpy(random.random(shape) < 0.5), x.sign() * alpha, x)
    return x


def _check(name: str, x: torch.Tensor, fmt: str, alpha: float | None, block: int, what: str) -> None:
    packed = pack(x, name, fmt, alpha=alpha, block=block)
    data = packed.to_bytes()
    back = unpack(Packed.from_bytes(data))
    if back.shape != x.shape or not torch.equal(back.view(torch.int32), x.view(torch.int32)):
        raise CodecError(f"codec {name!r}: a tensor does not come back: {what}")
    begin, end = x.numel() // 3, x.numel() - x.numel() // 4
    if not torch.equal(unpack_slice(packed, begin, end), x.flatten()[begin:end]):
        raise CodecError(f"codec {name!r}: a slice does not come back: {what}")
    counted = footprint(x, codec=name, fmt=fmt, alpha=alpha, block=block).nbits
    if counted != 8 * len(data):
        raise CodecError(f"codec {name!r}: a stream takes {8 * len(data)} bits, not {counted} as counted: {what}")
