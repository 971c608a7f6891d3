"""What results.json holds for the plots of the report: over time, distributions, formats, machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import nn

import fpsim
from fpsim.estimate import estimate
from fpsim.run_directory import ledger_of, rows_of
from fpsim.run_results import distributions

SETTINGS: dict[str, Any] = {
    "name": "small",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [32, 24]},
    "training": {"epochs": 1, "batch_size": 64, "micro_batches": 2, "optimizer": {"name": "sgd", "learning_rate": 0.2}},
    "threads": 1,
    "emulation": {
        "exclude": ["last"],
        "weights": {"format": "e4m3fn", "scale": "amax", "granularity": "channel"},
        "activations": {"format": "mxfp4", "scale": "none"},
        "gradients": {"format": "e5m2", "scale": "amax", "codec": "alpha", "pruning": {"sparsity": 0.8}},
        "ledger": {"every_steps": 8},
    },
}
STEPS = [0, 8, 16, 21]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    place = tmp_path_factory.mktemp("runs") / "run"
    fpsim.run(SETTINGS, place, quiet=True)
    torch.set_num_threads(threads)
    return place


@pytest.fixture(scope="module")
def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_over_time_is_what_the_ledger_counted(folder: Path, results: Any) -> None:
    over_time, ledger = results["over_time"], ledger_of(folder)
    assert over_time["steps"] == STEPS == ledger.steps
    layers = [row["layer"] for row in results["gradients"]]
    found = {(one["layer"], one["role"]): one for one in over_time["series"]}
    assert set(found) == {(layer, role) for layer in layers for role in ("weight", "activation", "gradient")}
    for (layer, role), one in found.items():
        for step, sparsity, bits in zip(STEPS, one["sparsity"], one["bits_per_element"], strict=True):
            where = {"gradient": "dgrad"}.get(role, "forward")
            stored = [
                record.stored
                for record in ledger.records
                if (record.step, record.layer, record.role, record.pass_name) == (step, layer, role, where)
            ]
            assert len(stored) == 2  # micro-batches
            numel = sum(tensor.numel for tensor in stored)
            assert sparsity == pytest.approx(1 - sum(tensor.nonzeros for tensor in stored) / numel, abs=1e-12)
            assert bits == pytest.approx(sum(tensor.nbits for tensor in stored) / numel, rel=1e-12)
        assert ("cosine" in one) == (role == "gradient")


def test_cosines_over_time_are_those_of_pruning(results: Any) -> None:
    """Theirs is the mean over both micro-batches, these are of the first."""
    for one in results["over_time"]["series"]:
        if one["role"] == "gradient":
            (row,) = [row for row in results["gradients"] if row["layer"] == one["layer"]]
            assert len(one["cosine"]) == len(STEPS)
            assert np.mean(one["cosine"]) == pytest.approx(row["cosine"], abs=0.05)


def test_distributions_are_those_of_the_samples(folder: Path, results: Any) -> None:
    samples = load_file(folder / "distributions.safetensors")
    roles = {"X": "activation", "W": "weight", "dY": "gradient", "dW": "weight_gradient"}
    found = {(one["role"], one["layer"]): one for one in results["distributions"]}
    assert len(found) == len(samples) == 4 * 3
    for name, tensor in samples.items():
        role, _, layer = name.partition(" ")
        one = found[roles[role], layer]
        values = tensor.double().numpy()
        values = values[values != 0]
        logs = np.log2(np.abs(values))
        sample = one["sample"]
        assert one["step"] == STEPS[-1]
        assert (one["statistics"] is None) == (role in "XW")
        assert sample["count"] == values.size == sum(sample["log2_histogram"]["counts"])
        assert (sample["mean"], sample["std"]) == pytest.approx((values.mean(), values.std()))
        assert (sample["mean_log2"], sample["std_log2"]) == pytest.approx((logs.mean(), logs.std()))
        counts, edges = np.histogram(logs, 60)
        assert sample["log2_histogram"] == {"lowest": edges[0], "highest": edges[-1], "counts": counts.tolist()}
        shares = stats.norm.cdf(sample["sigmas"])
        assert sample["quantiles"] == pytest.approx((np.quantile(values, shares) - values.mean()) / values.std())
        assert sample["log2_quantiles"] == pytest.approx((np.quantile(logs, shares) - logs.mean()) / logs.std())


def test_how_tensors_are_stored(folder: Path, results: Any) -> None:
    last = {(row["role"], row["layer"]): row for row in rows_of(folder / "distributions.jsonl")}
    pruned = [row["layer"] for row in results["gradients"]]
    for one in results["distributions"]:
        stored = one["format"], one["scales"]
        if one["layer"] not in pruned or one["role"] == "weight_gradient":
            assert stored == (None, None)
        elif one["role"] == "activation":
            assert stored == ("mxfp4", 1)
            assert one["scale"] is None
        elif one["role"] == "weight":
            assert stored in (("e4m3fn", 32), ("e4m3fn", 24))
            assert 0 < one["scale"] < 1
        else:
            assert stored == ("e5m2", 1)
            assert one["scale"] == last["dY", one["layer"]]["scale"] > 0
            assert one["alpha"] > 0


def test_the_numbers_of_formats(results: Any) -> None:
    assert set(results["formats"]) == {"e4m3fn", "e5m2", "mxfp4"}
    for name, dtype in (("e4m3fn", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)):
        codes = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
        expected = sorted(set(codes[np.isfinite(codes) & (codes > 0)]))
        assert results["formats"][name]["positive_numbers"] == expected
        info = ml_dtypes.finfo(dtype)
        assert results["formats"][name]["max"] == float(info.max)
        assert results["formats"][name]["min_normal"] == float(info.smallest_normal)
    assert results["formats"]["mxfp4"]["block_size"] == 32
    assert results["formats"]["mxfp4"]["positive_numbers"] == [0.5, 1, 1.5, 2, 3, 4, 6]


def test_machines_are_those_of_fpsim_estimate(folder: Path, results: Any) -> None:
    names = [one["machine"] for one in results["machines"]]
    assert names == ["edge-npu", "eyeriss-like", "tensor-core-gpu", "tpu-like"]
    for told in results["machines"]:
        (expected,) = estimate(folder, [told["machine"]]).estimates
        main = expected.machine.levels[-1]
        assert told["main_memory_bytes_per_second"] == main.bytes_per_cycle * expected.machine.clock_mhz * 1e6
        for scheme, total in expected.totals().items():
            own = told["totals"][scheme]
            assert (own["seconds"], own["joules"]) == pytest.approx((total.seconds, total.joules))
            assert own["main_memory_bytes"] == pytest.approx(total.bytes_by_level[main.name])
            assert sum(own["seconds_by_bound"].values()) == pytest.approx(own["seconds"])
            assert sum(own["joules_by_part"].values()) == pytest.approx(own["joules"])
            points = {(point.layer, point.pass_name): point for point in expected.roofline(scheme)}
            for row in told["rows"]:
                cost = row["schemes"][scheme]
                if point := points.get((row["layer"], row["pass"])):
                    attained = cost["executed_macs"] / cost["seconds"]
                    assert attained == pytest.approx(point.attained_macs_per_second)
                    assert cost["peak_macs_per_second"] == pytest.approx(point.peak_macs_per_second)


def test_the_configured_machine_is_the_only_one(tmp_path: Path) -> None:
    settings = {**SETTINGS, "emulation": {"accelerator": "edge-npu"}}
    found = fpsim.run(settings, tmp_path / "run", quiet=True).results["machines"]
    assert [one["machine"] for one in found] == ["edge-npu"]


def test_a_machine_that_cannot_run_it_says_why(tmp_path: Path) -> None:
    """Its array takes 8 bits at most, and the last layer is float32."""
    machine = {
        "name": "own",
        "clock_mhz": 1000.0,
        "array": {
            "rows": 8, "columns": 8, "dataflow": "weight_stationary", "precisions": [{"bits": 8, "pj_per_mac": 1.0}],
        },
        "levels": [
            {"name": "buffer", "size_kib": 64.0, "bytes_per_cycle": 64.0, "pj_per_byte": 5.0},
            {"name": "dram", "size_kib": None, "bytes_per_cycle": 32.0, "pj_per_byte": 160.0},
        ],
    }  # fmt: skip
    settings = {**SETTINGS, "emulation": {**SETTINGS["emulation"], "machine": machine}}
    (found,) = fpsim.run(settings, tmp_path / "run", quiet=True).results["machines"]
    assert found["machine"] == "own"
    assert "32" in found["error"]
    assert (found["rows"], found["totals"]) == ([], {})


def test_the_configuration_trains_the_same_again(results: Any, tmp_path: Path) -> None:
    again = fpsim.run(results["config"], tmp_path / "again", quiet=True)
    assert again.results["history"] == results["history"]
    assert again.results["over_time"] == results["over_time"]
    assert again.results["distributions"] == results["distributions"]


def test_tensors_of_one_magnitude_have_no_sample() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    nn.init.ones_(model[0].weight)
    handle = fpsim.emulate(model, {})
    model(torch.randn(16, 8)).sum().backward()
    handle.step()
    samples = {name: x.numpy() for name, x in handle.distributions.samples.items()}
    found = {one["role"]: one["sample"] for one in distributions(handle.distributions, samples)}
    assert found["weight"] is None
    assert found["gradient"] is None
    assert found["activation"] is not None
