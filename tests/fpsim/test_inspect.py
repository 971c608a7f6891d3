"""`fpsim inspect` on the three kinds of files, its numbers against the streams and the compressors themselves."""

from __future__ import annotations

import json
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save_file

import accel
from fpsim.inspect import pages, to_data
from tests.fpsim.command_line import command

SCALE, ALPHA = 2.0**-10, float(np.float32(0.004))


def pruned() -> torch.Tensor:
    """Survivors on SCALE times the grid of e4m3fn, alpha off it."""
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.empty(100, 200).log_normal_(0, 2, generator=generator) * 1e-3
    x = magnitude * torch.randn(100, 200, generator=generator).sign()
    return accel.prune_quantize(x, ALPHA, "e4m3fn", scale=SCALE, seed=1)[0]


inspect = partial(command, "inspect")


def test_a_packed_stream(tmp_path: Path) -> None:
    x = pruned()
    stream = accel.pack(x, "bitmask", {"base": "e4m3fn", "alpha_codes": True}, scale=SCALE, alpha=ALPHA)
    path = tmp_path / "x.fpsm"
    path.write_bytes(accel.pack(x, "alpha", "e4m3fn", scale=SCALE, alpha=ALPHA).to_bytes())
    (page,) = pages(path, "e5m2", None)
    assert (page.name, page.shape, page.format) == ("x.fpsm", (100, 200), "e4m3fn")
    assert (page.scale, page.alpha, page.relative_error) == (SCALE, ALPHA, 0.0)
    assert page.zeros == int((x == 0).sum())
    assert page.alphas == int((x.abs() == torch.tensor(ALPHA)).sum())
    sizes = {size.codec: size for size in page.sizes}
    for codec in ("alpha", "alpha_tag", "alpha_entropy"):
        assert sizes[codec].bits_by_part == accel.pack(x, codec, "e4m3fn", scale=SCALE, alpha=ALPHA).bits_by_part
    assert sizes["bitmask"].bits_by_part is not None
    assert sizes["bitmask"].bits_by_part["payload"] == stream.bits_by_part["payload"]
    assert "more than 2 nonzeros" in sizes["nm(2:4)"].reason
    packed = accel.pack(x, "alpha", "e4m3fn", scale=SCALE, alpha=ALPHA)
    assert sizes["alpha"].burst_bits == {size: 8 * packed.fetched_bytes(size) for size in (32, 64)}
    assert sizes["alpha"].closed_form_bits == pytest.approx(packed.nbits, rel=0.01)
    assert page.best.nbits == min(size.nbits for size in page.sizes)
    counted = accel.footprint(x, codec="alpha", fmt="e4m3fn", scale=SCALE, alpha=ALPHA)
    assert (page.tag_entropy_bits, page.order0_entropy_bits) == (counted.tag_entropy_bits, counted.order0_entropy_bits)
    codes = accel.encode(accel.quantize(x, "e4m3fn", scale=SCALE), "e4m3fn", scale=SCALE).numpy().tobytes()
    assert page.compressed_bits["zstd 3"] == 8 * len(zstandard.compress(codes, 3))
    magnitudes = x[x != 0].abs().double()
    assert page.octaves == {
        e: n for e in range(-40, 20) if (n := int(((magnitudes >= 2.0**e) & (magnitudes < 2.0 ** (e + 1))).sum()))
    }


def test_raw_values_are_rounded_and_their_alpha_found(tmp_path: Path) -> None:
    x = pruned()
    np.save(tmp_path / "x.npy", x.numpy())
    (page,) = pages(tmp_path / "x.npy", "e4m3fn", None)
    assert page.alpha == ALPHA  # though survivors that were rounded down are smaller
    assert page.relative_error < 2.0**-4
    save_file(
        {"w": torch.randn(50, 30), "steps": torch.arange(3), "half": torch.ones(4).half()}, tmp_path / "m.safetensors"
    )
    found = {page.name: page for page in pages(tmp_path / "m.safetensors", "e5m2", None)}
    assert set(found) == {"w", "half"}
    assert found["w"].alpha is None
    assert 0 < found["w"].relative_error < 2.0**-3
    assert found["half"].relative_error == 0
    assert json.loads(json.dumps(to_data(found["w"])))["best"] == "dense"
    (given,) = pages(tmp_path / "x.npy", "e4m3fn", 0.5)
    assert (given.alpha, given.alphas) == (0.5, int((x.abs() == 0.5).sum()))


def test_elements_that_are_not_finite_hide_no_rounding(tmp_path: Path) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[:2] = torch.tensor([torch.nan, torch.inf])
    np.save(tmp_path / "x.npy", x.numpy())
    (page,) = pages(tmp_path / "x.npy", "e4m3fn", None)
    assert page.not_finite == 2
    assert 0.01 < page.relative_error < 0.04


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros(5), np.array([np.nan, np.inf, 1.0]), np.array(3.0)])
def test_odd_tensors(values: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", values.astype(np.float32))
    (page,) = pages(tmp_path / "x.npy", "e5m2", None)
    assert page.shape == values.shape
    assert page.best.bits_by_part is not None


def test_the_page_and_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", pruned().numpy())
    text, err, code = inspect(capsys, monkeypatch, tmp_path / "x.npy")
    assert (err, code) == ("", 0)
    assert text.startswith("x.npy: 100x200, e4m3fn\n20000 elements, ")
    assert all(name in text for name in ("alpha_entropy", "bitmask2", "order-0 entropy", "zstd 3", "lz4", "2^-8"))
    text, _, _ = inspect(capsys, monkeypatch, tmp_path / "x.npy", "--json")
    (page,) = json.loads(text)
    assert page["best"] in accel.CODECS
    assert len(page["sizes"]) == len(accel.CODECS)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("none.npy", None, [], "none.npy: no such file"),
        ("x.txt", b"hello, world", [], "is neither a .npy nor a .safetensors file"),
        ("x.npy", b"\x93NUMPY", [], "x.npy: "),
        ("x.safetensors", b"hello, world", [], "x.safetensors: "),
        ("x.fpsm", b"FPSM" + zlib.compress(bytes(100)), [], "the stream"),
        ("x.npy", "floats", ["--alpha=-1"], "--alpha: must be positive and finite in float32 (got -1)"),
        ("ints", "ints", [], "values must be float64, float32 or float16 (got int64)"),
        ("floats", "floats", ["--format", "e4m3fm"], "--format: unknown format 'e4m3fm' (did you mean 'e4m3fn'?)"),
        ("floats", "floats", ["--format", "mxfp4"], "--format: must be a scalar format (got the block format 'mxfp4')"),
    ],
)
def test_wrong_files_and_options(
    name: str,
    content: object,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with path.open("wb") as file:
            np.save(file, np.ones(3, np.int64 if content == "ints" else np.float32))
    out, err, code = inspect(capsys, monkeypatch, path, *options)
    assert (out, code) == ("", 2)
    assert message in err
    assert "Traceback" not in err
