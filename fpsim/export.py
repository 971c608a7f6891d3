"""`fpsim export`: the pruned and rounded weights of a run, as packed streams and as a plain state dict.

    packed.safetensors    each weight that has a format as a stream (see `fpsim.packed_model`), for `fpsim.load_model`
    plain.safetensors     a state dict: each such weight K in torch's own type where the format has one (float8_e4m3fn,
                          bfloat16, ...), to be multiplied by K_scale where it has a scale; else as float32
    export.json           what each weight takes, beside float32

Weights are those of the run's newest checkpoint as evaluation sees them: masked, then rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import accel
from fpsim import checkpoint
from fpsim.config import Config, load_config, load_format
from fpsim.config.schema import Emulation
from fpsim.console import print_table
from fpsim.emulation import EncodedWeight, emulate
from fpsim.errors import ConfigError, Problem, RunError
from fpsim.files import write_bytes, write_json
from fpsim.own import build_model
from fpsim.packed_model import load_state, pack_weight, save_packed
from fpsim.run_directory import CONFIG_FILE, run_folder
from fpsim.training import build_optimizer

PACKED_FILE, PLAIN_FILE, TABLE_FILE = "packed.safetensors", "plain.safetensors", "export.json"
TORCH_DTYPES = {
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class Exported:
    """rows: one a packed weight, `counted_bits` by the ledger and `stored_bits` in the file. other_bits: of parameters
    and buffers that are not packed."""

    run: Path
    step: int
    files: list[Path]
    rows: list[dict[str, Any]]
    other_bits: int


def export(
    run_dir: str | Path, output: Path | None = None, fmt: str | None = None, codec: str | None = None,
    scale: str | None = None, granularity: str | None = None,
) -> Exported:  # fmt: skip
    """Write the three files into `output`, by default RUN/export.

    fmt, codec, scale, granularity: of weights, instead of what the run's configuration says in emulation.weights; a
    layer whose weights it excludes or overrides keeps what it says of that one. scale: None is the run's, `amax` where
    it has none. What is packed is read back and compared.
    Raises ConfigError for what is not a run, for weights that have no format, and for options that do not go together;
    RunError for a run without a checkpoint or with a damaged one, and for a weight that the codec cannot hold.
    """
    folder = run_folder(run_dir)
    given = {"format": fmt, "codec": codec, "scale": scale, "granularity": granularity}
    config = _with_weights(folder / CONFIG_FILE, {key: text for key, text in given.items() if text is not None})
    state, model, weights = _weights_of(config, folder)
    packed = {f"{name}.weight": weight for name, weight in weights.items()}
    parts = {key: pack_weight(weight) for key, weight in packed.items()}
    others = {key: tensor for key, tensor in model.items() if key not in packed}
    about = {**config.model.model_dump(), "input_shape": state["input_shape"], "classes": state["classes"]}
    output = folder / "export" if output is None else output
    output.mkdir(parents=True, exist_ok=True)
    files = [output / name for name in (PACKED_FILE, PLAIN_FILE, TABLE_FILE)]
    save_packed(files[0], parts, others, about)
    _check(files[0], {**others, **{key: weight.values for key, weight in packed.items()}})
    write_bytes(files[1], save(_plain(packed, others)))
    rows = [_row(key, weight, parts[key].nbits) for key, weight in packed.items()]
    found = Exported(folder, state["step"], files, rows, 8 * sum(tensor.nbytes for tensor in others.values()))
    write_json(files[2], to_data(found))
    return found


def _with_weights(file: Path, given: dict[str, str]) -> Config:
    """The run's configuration, with what is given of its weights."""
    config = load_config(file)
    is_float32 = config.emulation is None or config.emulation.weights is None
    if is_float32 and given and "format" not in given:
        raise ConfigError([Problem("--format", "is needed: the run's weights are float32")])
    if is_float32 and given and isinstance(load_format(given["format"]), accel.Format):
        given = {"scale": "amax", **given}
    return load_config(file, [f"emulation.weights.{key}={text}" for key, text in given.items()])


def _weights_of(config: Config, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, EncodedWeight]]:
    """The newest checkpoint of a run: its state, the model's state dict with weights masked, and the weights in a
    format, by layer."""
    saved = checkpoint.newest(folder)
    about = checkpoint.read_state(saved)
    try:
        shape, classes, steps = tuple(about["input_shape"]), about["classes"], about["steps_per_epoch"]
    except KeyError as error:
        raise RunError(f"{saved}: was written by an earlier fpsim, it lacks {error}") from None
    with torch.random.fork_rng():
        model = build_model(config, shape, classes).eval()
        optimizer = build_optimizer(config.training.optimizer, model)
        state, tensors = checkpoint.load(saved, model, optimizer)
    handle = emulate(model, config.emulation or Emulation(), seed=config.seed, steps_per_epoch=steps)
    try:
        handle.load_state_dict(state["emulator"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{saved}: does not fit this run: {error}") from error
    weights = handle.encoded_weights()
    if not weights:
        raise ConfigError([Problem("--format", "is needed: the run's weights are float32")])
    masked = {f"{name}.weight": handle.masked_weight(name) for name in handle.layers}
    return state, {**model.state_dict(), **masked}, weights


def _check(path: Path, expected: dict[str, Tensor]) -> None:
    """Raises RunError where a file does not give back the same bits."""
    found = load_state(path)
    for key, tensor in expected.items():
        if not torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (found[key], tensor))):
            raise RunError(f"{path}: {key} does not come back as it was")


def _plain(weights: dict[str, EncodedWeight], others: dict[str, Tensor]) -> dict[str, Tensor]:
    found = checkpoint.own(others)
    for key, weight in weights.items():
        name = weight.fmt.name
        dtype = TORCH_DTYPES.get(name)
        if dtype is None or accel.format(name) != weight.fmt:
            found[key] = weight.values.contiguous().clone()
            continue
        found[key] = accel.encode(weight.values, weight.fmt, scale=weight.scale, overflow=weight.spec.overflow).view(
            dtype
        )
        scale = torch.as_tensor(1.0 if weight.scale is None else weight.scale, dtype=torch.float32)
        if weight.scale is not None:
            found[f"{key}_scale"] = scale.clone()
        if not torch.allclose(found[key].float() * scale, weight.values, rtol=0, atol=0, equal_nan=True):
            raise RunError(f"{key} does not come back from {dtype}")
    return found


def _row(key: str, weight: EncodedWeight, stored_bits: int) -> dict[str, Any]:
    stored = weight.stored
    return {
        "weight": key,
        "shape": list(weight.values.shape),
        "zeros": int((weight.values == 0).sum()),
        "format": stored.format,
        "codec": stored.codec,
        "stored_bits": stored_bits,
        "counted_bits": stored.nbits,
    }


def to_data(exported: Exported) -> dict[str, Any]:
    """What the table says, as plain data; bits."""
    packed = sum(row["stored_bits"] for row in exported.rows)
    float32 = sum(32 * math.prod(row["shape"]) for row in exported.rows)
    return {
        "run": str(exported.run),
        "step": exported.step,
        "weights": exported.rows,
        "packed_bits": packed,
        "float32_bits": float32,
        "other_bits": exported.other_bits,
    }


def show(exported: Exported) -> None:
    """Print the table, and the files."""
    data = to_data(exported)
    cells = []
    for row in exported.rows:
        numel = math.prod(row["shape"])
        shape, bits = "x".join(map(str, row["shape"])), row["stored_bits"]
        cells.append(
            (row["weight"], shape, f"{100 * row['zeros'] / max(numel, 1):.1f}", row["format"], row["codec"],
             f"{bits // 8:,}", f"{bits / max(numel, 1):.2f}")
        )  # fmt: skip
    print_table(["weight", "shape", "zeros %", "format", "codec", "bytes", "bits an element"], cells)
    packed, float32, other = (data[f"{key}_bits"] // 8 for key in ("packed", "float32", "other"))
    ratio = (float32 + other) / (packed + other)
    print(
        f"weights: {packed:,} bytes, of {float32:,} in float32; with {other:,} of other tensors {ratio:.2f} times less"
    )
    for file in exported.files:
        print(file)
