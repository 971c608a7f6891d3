"""`fpsim export`: what it writes gives back the same bits, takes what the ledger counts, and says what went wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import accel
import fpsim
from fpsim.emulation import Emulator, emulate
from fpsim.errors import RunError
from fpsim.own import build_model
from fpsim.packed_model import load_model, load_state, pack_weight, save_packed, unpack_weight
from tests.fpsim.command_line import command

export = partial(command, "export")

EMULATION: dict[str, Any] = {
    "weight_pruning": {"name": "dpf", "sparsity": 0.6, "ramp_epochs": 1, "interval": 1},
    "weights": {"format": "e4m3fn", "codec": "bitmask", "scale": "amax"},
    "overrides": [{"match": "last", "weights": {"format": "e3m2", "codec": "csr", "scale": "power_of_two"}}],
}
RUN: dict[str, Any] = {
    "name": "small",
    "threads": 1,
    "data": {"name": "digits"},
    "model": {"name": "resnet18", "width": 4},
    "training": {"epochs": 1, "batch_size": 128, "optimizer": {"name": "sgd", "learning_rate": 0.05}},
    "emulation": EMULATION,
}
MLP = {"name": "mlp", "hidden": [24, 16]}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 4, 2), nn.Flatten(), nn.Linear(100, 37), nn.Linear(37, 3)
    )


def emulated(weights: dict[str, Any]) -> Emulator:
    """A network in evaluation mode with three quarters of its weights zero."""
    model = network().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.masked_fill_(torch.rand(parameter.shape) < 0.75, 0.0)
    return emulate(model, {"weights": weights})


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


# --- one weight -----------------------------------------------------------------------------------------------------

SCALARS = ("fp32", "bf16", "fp16", "e5m2", "e4m3fn", "e3m2", "e2m1", "int8", "int4", "binary8p3")
BLOCKS = ("mxfp8_e4m3fn", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4")
OWN_BLOCKS: dict[str, dict[str, Any]] = {
    "padded": {"element": "e2m1", "scale": "e8m0fnu", "block_size": 16, "padding": "zeros"},
    "scale of 6 bits": {"element": "e3m2", "scale": "e4m1", "block_size": 8, "scale_rule": "amax"},
    "scale of 16 bits": {"element": "int4", "scale": "bf16", "block_size": 8, "scale_rule": "amax"},
}
SPECS: list[dict[str, Any]] = [
    *({"format": fmt, "codec": "bitmask", "scale": "none" if fmt == "fp32" else "amax"} for fmt in SCALARS),
    *({"format": "e4m3fn", "codec": codec} for codec in ("dense", "csr", "coo", "rle(4)", "bitmask2")),
    *({"format": fmt, "scale": "amax", "granularity": "channel", "codec": "csr"} for fmt in ("e4m3fn", "e2m1", "int8")),
    {"format": "e5m2", "scale": "power_of_two", "granularity": "channel", "rounding": "stochastic"},
    *({"format": fmt, "scale": "amax", "granularity": "channel"} for fmt in ("fp32", "e8m22", "e8m21", "fp16")),
    *({"format": fmt, "codec": "bitmask"} for fmt in BLOCKS),
    {"format": OWN_BLOCKS["padded"], "rounding": "stochastic"},
    {"format": "nvfp4", "rounding": "stochastic"},
    *({"format": fmt, "codec": codec} for fmt in OWN_BLOCKS.values() for codec in ("dense", "bitmask")),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_weight_comes_back_bit_for_bit_and_takes_what_the_ledger_counts(spec: dict[str, Any]) -> None:
    handle = emulated(spec)
    seen: dict[str, torch.Tensor] = {}
    for name, layer in handle.layers.items():

        def keep(module: nn.Module, inputs: Any, name: str = name) -> None:
            seen[name] = module._parameters["weight"].detach().clone()  # type: ignore[union-attr]

        layer.register_forward_pre_hook(keep)
    handle.model(torch.randn(2, 3, 6, 6))
    weights = handle.encoded_weights()
    assert list(weights) == list(handle.layers) == list(seen)
    for name, weight in weights.items():
        parts = pack_weight(weight)
        assert same(unpack_weight(parts), seen[name])
        every_scale = 32 if ".scales" in parts.tensors and spec["format"] in ("fp32", "e8m22") else 0
        assert parts.nbits == -(-weight.stored.nbits // 8) * 8 + every_scale  # a file has whole bytes


def test_training_stores_what_is_exported() -> None:
    """The ledger's records of the weights in a step are those of the weights that this step's layers have seen."""
    handle = emulate(network().train(), {"weights": {"format": "e4m3fn", "codec": "csr", "scale": "amax"}})
    handle.model(torch.randn(2, 3, 6, 6)).sum().backward()
    recorded = {
        record.layer: record.stored.bits_by_part
        for record in handle.ledger.records
        if (record.role, record.pass_name) == ("weight", "forward")
    }
    for name, weight in handle.encoded_weights().items():
        assert recorded[name] == weight.stored.bits_by_part
        assert pack_weight(weight).nbits == sum(recorded[name].values())


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`resnet`: pruned and rounded weights; `float32`: pruned alone; `mlp`: scales a channel, drawn at random."""
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    fpsim.run(RUN, folder / "resnet", quiet=True)
    pruned = {"weight_pruning": EMULATION["weight_pruning"]}
    fpsim.run({**RUN, "model": MLP, "emulation": pruned}, folder / "float32", quiet=True)
    drawn = {"format": "e4m3fn", "rounding": "stochastic", "scale": "amax", "granularity": "channel"}
    fpsim.run({**RUN, "model": MLP, "emulation": {**pruned, "weights": drawn}}, folder / "mlp", quiet=True)
    torch.set_num_threads(threads)
    return folder


def evaluated(run: Path, x: torch.Tensor, emulation: dict[str, Any]) -> torch.Tensor:
    """What a run's model gives in evaluation, emulated from the newest checkpoint's files."""
    config = fpsim.load_config(run / "config.yaml")
    checkpoint = next((run / "checkpoints").iterdir())
    model = build_model(config, (1, 8, 8), 10).eval()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    handle = emulate(model, emulation, seed=config.seed, steps_per_epoch=1)
    state = json.loads((checkpoint / "state.json").read_text())["emulator"]
    handle.load_state_dict(state, load_file(checkpoint / "emulator.safetensors"))
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_the_exported_model_is_plain_and_gives_the_same_outputs(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out, err, code = export(capsys, monkeypatch, runs / name, "--output", tmp_path, "--json")
    assert (err, code) == ("", 0)
    said = json.loads(out)
    assert said == json.loads((tmp_path / "export.json").read_text())
    model = fpsim.load_model(tmp_path / "packed.safetensors")
    assert not model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    emulation = fpsim.load_config(runs / name / "config.yaml").model_dump()["emulation"]
    with torch.no_grad():
        assert same(model(x), evaluated(runs / name, x, emulation))
    state = model.state_dict()
    numel = sum(tensor.numel() for tensor in state.values() if tensor.ndim > 1)
    zeros = sum(int((tensor == 0).sum()) for tensor in state.values() if tensor.ndim > 1)
    assert zeros == sum(row["zeros"] for row in said["weights"])
    assert zeros / numel > 0.59
    stored = load_file(tmp_path / "packed.safetensors")
    for row in said["weights"]:
        own = [tensor for key, tensor in stored.items() if key in (row["weight"], row["weight"] + ".scales")]
        assert row["stored_bits"] == row["counted_bits"] == 8 * sum(tensor.nbytes for tensor in own)
    assert said["packed_bits"] == sum(row["stored_bits"] for row in said["weights"])
    assert said["packed_bits"] + said["other_bits"] == 8 * sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_the_plain_state_dict_has_torchs_types(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    export(capsys, monkeypatch, runs / name, "--output", tmp_path)
    plain, packed = load_file(tmp_path / "plain.safetensors"), load_state(tmp_path / "packed.safetensors")
    layers = [key for key, tensor in packed.items() if tensor.ndim > 1]
    own = layers if name == "mlp" else layers[:-1]  # resnet's last is e3m2, which torch has not
    for key in packed:
        assert plain[key].dtype == (torch.float8_e4m3fn if key in own else packed[key].dtype)
        scale = plain[f"{key}_scale"] if key in own else 1.0
        assert same(plain[key].float() * scale, packed[key].float())
    assert set(plain) == set(packed) | {f"{key}_scale" for key in own}


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        (["--format", "e4m3fn"], {"format": "e4m3fn", "scale": "amax"}),
        (["--format", "e5m2", "--codec", "csr", "--scale", "none"], {"format": "e5m2", "codec": "csr"}),
        (["--format", "mxfp4", "--codec", "bitmask"], {"format": "mxfp4", "codec": "bitmask"}),
        (["--format", "fp6-e3m2-b6"], {"format": {"base": "e3m2", "bias": 6}, "scale": "amax"}),
        (
            ["--format", "int8", "--granularity", "channel"],
            {"format": "int8", "scale": "amax", "granularity": "channel"},
        ),
    ],
)
def test_a_format_for_weights_that_have_none(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], spec: dict[str, Any],
) -> None:  # fmt: skip
    _, err, code = export(capsys, monkeypatch, runs / "float32", "--output", tmp_path, *options)
    assert (err, code) == ("", 0)
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = evaluated(runs / "float32", x, {"weight_pruning": EMULATION["weight_pruning"], "weights": spec})
    with torch.no_grad():
        assert same(load_model(tmp_path / "packed.safetensors")(x), expected)


def test_options_replace_what_the_run_says_but_not_its_overrides(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, code = export(capsys, monkeypatch, runs / "resnet", "--output", tmp_path, "--format", "e5m2", "--json")
    assert code == 0
    found = [(row["format"], row["codec"]) for row in json.loads(out)["weights"]]
    assert found == [("e5m2", "bitmask")] * (len(found) - 1) + [("e3m2", "csr")]


def test_scales_a_channel_can_give_way(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--format", "mxfp4", "--scale", "none", "--granularity", "tensor", "--json")
    out, err, code = export(capsys, monkeypatch, runs / "mlp", "--output", tmp_path, *options)
    assert (err, code) == ("", 0)
    assert {row["format"] for row in json.loads(out)["weights"]} == {"mxfp4"}


def test_zeros_of_either_sign_are_zeros(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = export(capsys, monkeypatch, runs / "float32", "--output", tmp_path, "--format", "e2m1", "--json")
    state = load_state(tmp_path / "packed.safetensors")
    for row in json.loads(out)["weights"]:
        assert row["zeros"] == int((state[row["weight"]] == 0).sum())


def test_what_saturates_in_the_plain_file_is_what_saturates_in_the_run() -> None:
    handle = emulated({"format": "fp16", "scale": 1e-7, "overflow": "ieee"})
    weights = {f"{name}.weight": weight for name, weight in handle.encoded_weights().items()}
    assert any(bool(weight.values.isinf().any()) for weight in weights.values())
    plain = fpsim.export._plain(weights, {})  # type: ignore[attr-defined]
    for key, weight in weights.items():
        assert same(plain[key].float() * plain[f"{key}_scale"], weight.values)


def test_the_table(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, _, _ = export(capsys, monkeypatch, runs / "resnet")
    lines = out.splitlines()
    assert [word for word in lines[0].split() if word != "%"][:5] == ["weight", "shape", "zeros", "format", "codec"]
    said = json.loads((runs / "resnet" / "export" / "export.json").read_text())
    assert lines[1].split()[1] == "x".join(map(str, said["weights"][0]["shape"]))
    assert f"weights: {said['packed_bits'] // 8:,} bytes, of {said['float32_bits'] // 8:,} in float32" in out
    assert lines[-3:] == [
        str(runs / "resnet" / "export" / name) for name in ("packed.safetensors", "plain.safetensors", "export.json")
    ]


def test_weights_of_a_model_of_the_users_own(tmp_path: Path) -> None:
    handle = emulated({"format": "e4m3fn", "codec": "bitmask", "scale": "amax"})
    weights = {f"{name}.weight": weight for name, weight in handle.encoded_weights().items()}
    others = {key: tensor for key, tensor in handle.model.state_dict().items() if key not in weights}
    file = tmp_path / "own.safetensors"
    save_packed(file, {key: pack_weight(weight) for key, weight in weights.items()}, others, None)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = handle.model(x)
        plain = network().eval()
        plain.load_state_dict(load_state(file))
        assert same(plain(x), expected)
    with pytest.raises(RunError, match=r"own\.safetensors: holds the weights of a model that is not of this package"):
        load_model(file)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "options", "code", "message"),
    [
        ("float32", [], 2, "--format: is needed: the run's weights are float32"),
        ("float32", ["--codec", "csr"], 2, "--format: is needed: the run's weights are float32"),
        ("float32", ["--format", "e9m9"], 2, "format 'e9m9': exponent_bits must be an integer from 0 to 8 (got 9)"),
        ("resnet", ["--codec", "zip"], 2, "emulation.weights.codec: "),
        ("resnet", ["--codec", "nm(1:4)"], 1, "weight of layer "),
        ("resnet", ["--scale", "big"], 2, "emulation.weights.scale: must be none, amax, "),
        ("nothing", [], 2, "nothing: no config.yaml in it: not a run directory"),
    ],
)
def test_mistakes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    run: str, options: list[str], code: int, message: str,
) -> None:  # fmt: skip
    _, err, found = export(capsys, monkeypatch, runs / run, "--output", tmp_path / "out", *options)
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_and_one_of_an_earlier_fpsim(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text((runs / "resnet" / "config.yaml").read_text())
    assert "has no checkpoint yet" in export(capsys, monkeypatch, tmp_path)[1]
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-4" / "state.json").write_text('{"version": 1, "step": 4}')
    _, err, code = export(capsys, monkeypatch, tmp_path)
    assert (code, "step-4: was written by an earlier fpsim, it lacks 'input_shape'" in err) == (1, True)


@pytest.mark.parametrize("damage", ["stream", "file", "description", "missing", "other", "newer"])
def test_a_damaged_file(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                        monkeypatch: pytest.MonkeyPatch, damage: str) -> None:  # fmt: skip
    export(capsys, monkeypatch, runs / "resnet", "--output", tmp_path)
    file = tmp_path / "packed.safetensors"
    tensors, metadata = load_file(file), {}
    with fpsim.packed_model.safe_open(file, framework="pt") as content:  # type: ignore[attr-defined]
        metadata = content.metadata()
    about = json.loads(metadata["fpsim"])
    first = next(iter(about["weights"]))
    if damage == "stream":
        tensors[first][-1] ^= 1
    elif damage == "missing":
        del tensors[first]
    elif damage == "description":
        metadata = {"fpsim": json.dumps({**about, "weights": [first]})}
    elif damage == "newer":
        metadata = {"fpsim": json.dumps({**about, "version": 2})}
    elif damage == "other":
        metadata = {}
    save_file(tensors, file, metadata=metadata)
    if damage == "file":
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"packed\.safetensors: "):
        load_model(file)


def test_what_does_not_come_back_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fpsim.export.load_state  # type: ignore[attr-defined]
    monkeypatch.setattr("fpsim.export.load_state", lambda path: {k: t + 1 for k, t in real(path).items()})
    _, err, code = export(capsys, monkeypatch, runs / "resnet", "--output", tmp_path)
    assert (code, "does not come back as it was" in err) == (1, True)


def test_accel_has_no_say_in_a_stream_that_is_not_one() -> None:
    weight = next(iter(emulated({"format": "e4m3fn"}).encoded_weights().values()))
    parts = pack_weight(weight)
    parts.tensors[""][0] ^= 1
    with pytest.raises(accel.CodecError, match="not a packed tensor"):
        unpack_weight(parts)
