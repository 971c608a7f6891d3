"""`fpsim inspect`: what a file of values or a packed stream holds, and what it takes under every codec."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np
import torch
import zstandard

import accel
from accel.codecs.packed import MAGIC
from fpsim.console import plain_console, print_table
from fpsim.errors import ConfigError, FpsimError, Problem
from fpsim.tensor_file import all_tensors, wrong_file

ALPHA_SHARE = 0.05  # of the nonzeros that have one of the smallest magnitudes, from which on it is taken for alpha
NEAR_SMALLEST = 1.5  # times the smallest magnitude
ZSTD_LEVEL = 3
BURSTS = (32, 64)  # bytes
BAR = 40  # characters


@dataclass(frozen=True)
class Size:
    """Bits of the whole tensor under one codec, by part; None and a reason where the codec cannot hold it.

    closed_form_bits: expected from the counts of zeros and +-alphas alone. burst_bits: what memory moves when each
    block is fetched alone, for each of BURSTS.
    """

    codec: str
    bits_by_part: dict[str, float] | None
    closed_form_bits: float | None = None
    burst_bits: dict[int, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def nbits(self) -> float:
        return math.inf if self.bits_by_part is None else sum(self.bits_by_part.values())


@dataclass(frozen=True)
class Page:
    """One tensor of a file.

    relative_error: of the rounding that put its finite elements into the format, 0 where they lay on its grid.
    not_finite: how many elements are infinite or NaN.
    octaves: how many values have 2^e <= |x| < 2^(e + 1), for each e that occurs. compressed_bits: of the dense codes.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    scale: float
    alpha: float | None
    relative_error: float
    not_finite: int
    zeros: int
    alphas: int
    octaves: dict[int, int]
    sizes: tuple[Size, ...]
    tag_entropy_bits: float
    order0_entropy_bits: float | None
    compressed_bits: dict[str, int]

    @property
    def best(self) -> Size:
        return min(self.sizes, key=lambda size: size.nbits)


def pages(path: Path, fmt: str, alpha: float | None) -> Iterator[Page]:
    """A page for each tensor of floating-point numbers in a .npy, .safetensors or packed file.

    fmt: the format in which codes are taken; a packed stream has its own. alpha: None looks for it: the most frequent
    of the smallest magnitudes, where many nonzeros have it. Raises ConfigError for a file or option that is wrong.
    """
    if alpha is not None and not 0 < alpha <= float(np.finfo(np.float32).max):
        raise ConfigError([Problem("--alpha", f"must be positive and finite in float32 (got {alpha:g})")])
    if _is_packed(path):
        try:
            packed = accel.Packed.from_bytes(path.read_bytes())
            values = accel.unpack(packed)
        except accel.CodecError as error:
            raise wrong_file(path, str(error)) from None
        header = packed.header
        found = float(header.alpha) or None
        yield _page(path.name, values, header.fmt, float(header.scale), found if alpha is None else alpha)
        return
    try:
        target = accel.format(fmt)
    except ValueError as error:
        raise ConfigError([Problem("--format", str(error))]) from None
    if isinstance(target, accel.BlockFormat):
        raise ConfigError([Problem("--format", f"must be a scalar format (got the block format {fmt!r})")])
    for name, values in all_tensors(path):
        yield _page(name, values.float(), target, None, alpha)


def show(page: Page) -> None:
    """Print a page."""
    console = plain_console()
    numel = math.prod(page.shape)
    console.print(f"{page.name}: {'x'.join(map(str, page.shape)) or 'a number'}, {page.format}", style="bold")
    per_element = max(numel, 1)
    facts = [f"{numel} elements", f"{100 * page.zeros / per_element:.2f} % zeros"]
    if page.alpha is not None:
        facts.append(f"{100 * page.alphas / per_element:.2f} % +-alpha (alpha {page.alpha:g})")
    facts.append(f"scale {page.scale:g}")
    if page.relative_error:
        facts.append(f"rounded here, relative error {page.relative_error:.2e}")
    if page.not_finite:
        facts.append(f"{page.not_finite} infinite or NaN")
    console.print(", ".join(facts) + "\n")
    _show_octaves(page, numel)
    rows = []
    for size in sorted(page.sizes, key=lambda size: size.nbits):
        parts = size.bits_by_part
        if parts is None or size.closed_form_bits is None:
            rows.append([size.codec, *["-"] * (6 + len(BURSTS)), "cannot hold it"])
            continue
        bits = [size.nbits, *parts.values(), size.closed_form_bits, *size.burst_bits.values()]
        cells = [f"{number / per_element:.4f}" for number in bits]
        rows.append([size.codec, *cells, "best" if size is page.best else ""])
    bursts = [f"{size} B bursts" for size in BURSTS]
    columns = ["codec", "bits an element", "header", "offsets", "metadata", "payload", "closed form", *bursts, ""]
    print_table(columns, rows)
    for size in page.sizes:
        if size.reason:
            console.print(size.reason)
    console.print()
    limits: dict[str, float | None] = {
        "entropy of the tags, values raw": page.tag_entropy_bits,
        "order-0 entropy": page.order0_entropy_bits,
        **{f"{name} of the dense codes": bits for name, bits in page.compressed_bits.items()},
    }
    held = [[name, "-" if bits is None else f"{bits / per_element:.4f}"] for name, bits in limits.items()]
    print_table(["to hold it against", "bits an element"], held)
    console.print()


def to_data(page: Page) -> dict[str, Any]:
    """The page as plain data (JSON)."""
    return {**asdict(page), "best": page.best.codec}


def _show_octaves(page: Page, numel: int) -> None:
    if not page.octaves:
        return
    most = max(page.octaves.values())
    rows = []
    for exponent in range(min(page.octaves), max(page.octaves) + 1):
        count = page.octaves.get(exponent, 0)
        rows.append([f"2^{exponent}", f"{100 * count / numel:.2f} %", "#" * math.ceil(BAR * count / most)])
    print_table(["magnitude from", "elements", ""], rows)
    plain_console().print()


def _is_packed(path: Path) -> bool:
    if not path.is_file():
        raise wrong_file(path, "no such file")
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _page(name: str, x: torch.Tensor, fmt: accel.Format, scale: float | None, alpha: float | None) -> Page:
    alpha = _likely_alpha(x) if alpha is None else float(np.float32(alpha))
    is_alpha = x.abs() == alpha if alpha else torch.zeros_like(x, dtype=torch.bool)
    scale = _scale_for(x, fmt) if scale is None else scale
    plain = accel.quantize(x, fmt, scale=scale)
    tagged = torch.where(is_alpha, x, plain)
    finite = x.isfinite()
    exact = x[finite].double()
    norm = float(exact.norm())
    error = float((tagged[finite].double() - exact).norm()) / norm if norm else 0.0
    sizes = []
    for codec in accel.CODECS.values():
        values, tag = (tagged, alpha) if codec.tags_alpha else (plain, None)
        try:
            packed = accel.pack(values, codec.name, fmt, scale=scale, alpha=tag)
        except accel.CodecError as reason:
            sizes.append(Size(codec.name, None, reason=str(reason)))
            continue
        total = accel.count_blocks(values, tag).total
        expected = accel.footprint(total, codec=codec.name, fmt=fmt, shape=tuple(x.shape)).nbits
        bursts = {size: 8 * packed.fetched_bytes(size) for size in BURSTS}
        sizes.append(Size(codec.name, packed.bits_by_part, expected, bursts))
    if all(size.bits_by_part is None for size in sizes):
        raise FpsimError(f"{name}: no codec can hold it: {sizes[0].reason}")
    limits = accel.footprint(tagged, codec="alpha", fmt=fmt, alpha=alpha, scale=scale)
    codes = accel.encode(plain, fmt, scale=scale).numpy().tobytes()
    exponents = np.frexp(np.abs(x[x.isfinite() & (x != 0)].numpy()))[1] - 1
    found, counts = np.unique(exponents, return_counts=True)
    return Page(
        name, tuple(x.shape), fmt.name, scale, alpha, error, x.numel() - int(finite.sum()),
        int((tagged.view(torch.int32) == 0).sum()), int(is_alpha.sum()),
        dict(zip(found.tolist(), counts.tolist(), strict=True)), tuple(sizes),
        limits.tag_entropy_bits, limits.order0_entropy_bits,
        {
            f"zstd {ZSTD_LEVEL}": 8 * len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(codes)),
            "lz4": 8 * len(lz4.frame.compress(codes)),
        },
    )  # fmt: skip


def _scale_for(x: torch.Tensor, fmt: accel.Format) -> float:
    """1 where x lies on the format's grid, else the least power of two that brings it into the format's range."""
    finite = x[x.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if largest <= fmt.max and torch.equal(accel.quantize(finite, fmt), finite):
        return 1.0
    return 2.0 ** max(math.ceil(math.log2(largest / fmt.max)), -100) if largest else 1.0


def _likely_alpha(x: torch.Tensor) -> float | None:
    """The most frequent of the smallest magnitudes, among which survivors that were rounded down may be."""
    magnitudes = x[x != 0].abs().numpy()
    if magnitudes.size == 0 or not np.isfinite(magnitudes.min()):
        return None
    values, counts = np.unique(magnitudes[magnitudes <= NEAR_SMALLEST * magnitudes.min()], return_counts=True)
    most = int(counts.argmax())
    return float(values[most]) if counts[most] >= ALPHA_SHARE * magnitudes.size else None
