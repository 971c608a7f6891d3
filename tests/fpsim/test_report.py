from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fpsim.errors import ConfigError
from fpsim.report import comparison, load_results, report
from fpsim.report.tables import baseline_note, miss_note

MIB = 8 * 2**20  # bits
SHORTCUTS = ("layer2.0.shortcut.0", "layer3.0.shortcut.0", "layer4.0.shortcut.0")
LAYERS = (
    "conv1",
    *(f"layer{stage}.{block}.conv{conv}" for stage in (1, 2, 3, 4) for block in (0, 1) for conv in (1, 2)),
    *SHORTCUTS,
    "fc",
)


def sizes(encoded: float, fp32: float) -> dict[str, float]:
    return {"encoded": encoded, "fp32": fp32, "bf16": fp32 / 2}


def tensor(layer: str, role: str, numel: int, zeros: float = 0.0, format: str = "float32") -> dict[str, Any]:
    """One tensor: four streams where it has zeros (60 % of its nonzeros +-alpha), dense where not."""
    bits = 32 if format == "float32" else 8
    nonzeros = numel * (1 - zeros)
    alphas, survivors = (0.6 * nonzeros, 0.4 * nonzeros) if zeros else (0.0, nonzeros)
    metadata = numel + nonzeros + alphas if zeros else 0.0
    payload = bits * (survivors if zeros else numel)
    total = 512 + metadata + payload
    return {
        "layer": layer, "role": role, "format": format, "codec": "alpha" if zeros else "dense", "numel": numel,
        "nonzeros": nonzeros, "alphas": alphas, "survivors": survivors, "value_bits": bits,
        "bits": {"header": 512.0, "offsets": 0.0, "metadata": metadata, "payload": payload, "total": total},
        "bits_per_element": total / numel,
        "tag_entropy_bits_per_element": 1.4 if zeros else None,
        "order0_entropy_bits_per_element": 1.25 if zeros else None,
        "other_codecs_bits_per_element": {"dense": 8.0, "bitmask": 1 + 8 * (1 - zeros)} if zeros else {},
    }  # fmt: skip


def float32_run() -> Any:
    accuracies = (88.0, 95.25, 97.5)
    return {
        "schema_version": 1, "name": "quickstart-fp32", "config_hash": "0f0f0f0f", "status": "completed", "seed": 0,
        "emulated": False, "epochs": 3, "steps": 186, "wall_seconds": 61.5, "model": "resnet18",
        "parameters": 701234, "data": "mnist5k: 4,000 train / 1,000 test images, 1 x 28 x 28, 10 classes",
        "test_accuracy_percent": 97.5, "best_test_accuracy_percent": 97.75, "test_loss": 0.09,
        "history": [
            {"epoch": epoch, "step": 62 * epoch, "learning_rate": 0.05, "train_loss": 1.0 / epoch,
             "train_accuracy_percent": accuracy - 1, "test_loss": 0.9 / epoch, "test_accuracy_percent": accuracy,
             "gradient_sparsity": None}
            for epoch, accuracy in enumerate(accuracies, start=1)
        ],
        "gradients": [],
        "ledger": {
            "sampled_steps": [0, 50, 100, 150, 185],
            "footprint_bits": {
                "total": sizes(64 * MIB, 64 * MIB),
                "by_role": {"gradient": sizes(4 * MIB, 4 * MIB), "weight": sizes(2 * MIB, 2 * MIB)},
            },
            "traffic_bits_per_step": {
                "total": sizes(240 * MIB, 240 * MIB),
                "by_role": {"weight": sizes(6 * MIB, 6 * MIB)},
                "by_pass": {"forward": sizes(60 * MIB, 60 * MIB)},
            },
            "tensors": [tensor(layer, role, 4096) for layer in LAYERS for role in ("weight", "activation", "gradient")],
        },
        "environment": {"python": "3.11.9", "torch": "2.9.0", "numba": "0.62.0", "threads": 2, "processor": "x86_64",
                        "commit": None},
    }  # fmt: skip


def emulated_run() -> Any:
    """float32_run with FP8 operands and gradients pruned to 80 % in every layer but the first and the last."""
    run = float32_run()
    pruned = LAYERS[1:-1]
    run |= {"name": "quickstart", "config_hash": "1a2b3c4d", "emulated": True, "wall_seconds": 1100.25,
            "test_accuracy_percent": 97.1, "best_test_accuracy_percent": 97.3}  # fmt: skip
    for entry, accuracy in zip(run["history"], (85.0, 94.0, 97.1), strict=True):
        entry |= {"test_accuracy_percent": accuracy, "gradient_sparsity": 0.8}
    run["gradients"] = [
        {"layer": layer, "asked_sparsity": 0.8, "achieved_sparsity": 0.8 + 0.001 * (index % 5), "achieved_std": 0.02,
         "lognormal_rule_sparsity": 0.76 + 0.004 * index, "alpha_share_of_nonzeros": 0.6, "steps": 186,
         "alpha_kept": "streams", "bias": 0.0012, "bias_standard_error": 0.0034, "cosine": 0.9}
        for index, layer in enumerate(pruned)
    ]  # fmt: skip
    run["ledger"]["tensors"] = [
        tensor(layer, role, 100352 if layer.startswith("layer1") else 25088)
        if layer not in pruned
        else tensor(layer, role, 100352 if layer.startswith("layer1") else 25088, zeros, format)
        for layer in LAYERS
        for role, zeros, format in (("weight", 0, "e4m3fn"), ("activation", 0, "e4m3fn"), ("gradient", 0.8, "e5m2"))
    ]
    run["ledger"]["footprint_bits"] = {
        "total": sizes(20 * MIB, 64 * MIB),
        "by_role": {
            "gradient": sizes(0.5 * MIB, 4 * MIB), "weight": sizes(0.625 * MIB, 2.5 * MIB),
            "master": sizes(2.5 * MIB, 2.5 * MIB), "optimizer_state": sizes(2.5 * MIB, 2.5 * MIB),
            "weight_gradient": sizes(2.5 * MIB, 2.5 * MIB), "activation": sizes(8 * MIB, 32 * MIB),
            "norm_input": sizes(3.375 * MIB, 18 * MIB),
        },
    }  # fmt: skip
    run["ledger"]["traffic_bits_per_step"] = {
        "total": sizes(75 * MIB, 240 * MIB),
        "by_role": {"weight": sizes(1.5 * MIB, 6 * MIB), "gradient": sizes(3 * MIB, 24 * MIB)},
        "by_pass": {"update": sizes(15 * MIB, 15 * MIB), "forward": sizes(15 * MIB, 60 * MIB)},
    }
    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to_directory(run: Any, directory: str | None = None) -> Path:
        run_dir = tmp_path / (directory or run["name"])
        run_dir.mkdir()
        (run_dir / "results.json").write_text(json.dumps(run), encoding="utf-8")
        return run_dir

    return to_directory


def two_layer_run() -> Any:
    run = emulated_run()
    run["gradients"] = [
        {**run["gradients"][0], "layer": "a", "asked_sparsity": 0.9, "achieved_sparsity": 0.91,
         "lognormal_rule_sparsity": 0.95},
        {**run["gradients"][0], "layer": "b", "asked_sparsity": 0.5, "achieved_sparsity": 0.48,
         "lognormal_rule_sparsity": 0.44},
    ]  # fmt: skip
    small, large = tensor("a", "gradient", 1000), tensor("b", "gradient", 3000)
    small |= {"bits_per_element": 2.0, "tag_entropy_bits_per_element": 1.0, "order0_entropy_bits_per_element": 0.5,
              "other_codecs_bits_per_element": {"dense": 8.0, "bitmask": 3.0}}  # fmt: skip
    large |= {"bits_per_element": 4.0, "tag_entropy_bits_per_element": 3.0, "order0_entropy_bits_per_element": 2.5,
              "other_codecs_bits_per_element": {"dense": 8.0}}  # fmt: skip
    unpruned = tensor("c", "gradient", 4000) | {"bits_per_element": 32.0}
    run["ledger"]["tensors"] = [small, large, unpruned]
    return run


def test_sizes_are_mebibytes_and_ratios_are_baseline_over_encoded() -> None:
    run = comparison([emulated_run()])["runs"][0]
    assert run["footprint"]["total"] == {
        "encoded_mib": 20.0, "fp32_mib": 64.0, "bf16_mib": 32.0, "fp32_ratio": 3.2, "bf16_ratio": 1.6,
    }  # fmt: skip
    assert run["traffic"]["total"]["fp32_ratio"] == 3.2
    assert run["footprint"]["by_role"]["gradient"]["fp32_ratio"] == 8.0
    assert list(run["footprint"]["by_role"])[:2] == ["weight", "master"]
    assert list(run["traffic"]["by_pass"]) == ["forward", "update"]


def test_means_over_layers_are_weighted_by_elements() -> None:
    run = comparison([two_layer_run()])["runs"][0]
    assert run["sparsity"] == pytest.approx(
        {
            "asked_percent": 60.0,  # (1000 * 90 + 3000 * 50) / 4000
            "achieved_percent": 58.75,
            "lognormal_percent": 56.75,
            "lognormal_miss_points": -3.25,
        }
    )
    assert run["pruned_gradient_bits"] == 3.5
    assert run["pruned_tag_entropy"] == 2.5
    assert run["pruned_order0_entropy"] == 2.0
    assert run["gradient_bits"] == 17.75  # with the 4000 elements that stay float32
    assert run["pruned_other_codecs"] == {"dense": 8.0, "bitmask": None}


def test_gradients_join_pruning_and_encoding() -> None:
    small, large, unpruned = comparison([two_layer_run()])["runs"][0]["gradients"]
    assert (small["miss_points"], small["lognormal_miss_points"]) == pytest.approx((1.0, 5.0))
    assert (large["miss_points"], large["lognormal_miss_points"]) == pytest.approx((-2.0, -6.0))
    assert (unpruned["asked_percent"], unpruned["bits_per_element"]) == (None, 32.0)


def test_miss_note_names_the_worst_layers() -> None:
    assert miss_note(comparison([two_layer_run()])["runs"][0]) == (
        "Largest miss of the sparsity asked: -2.0 points (b); the lognormal rule's: -6.0 points (b)."
    )


def test_accuracy_is_compared_with_the_float32_run_of_the_same_seed() -> None:
    other_seed = float32_run() | {"name": "other", "seed": 1, "test_accuracy_percent": 10.0}
    emulated, *baselines = comparison([emulated_run(), other_seed, float32_run()])["runs"]
    assert emulated["baseline"]["label"] == "quickstart-fp32"
    assert emulated["baseline"]["differences"] == {}
    assert emulated["baseline"]["accuracy_difference_points"] == pytest.approx(-0.4)
    assert [run["baseline"] for run in baselines] == [None, None]
    assert baseline_note(emulated).endswith("same model, data, seed, epochs and steps.")


def test_a_baseline_that_differs_is_said_to() -> None:
    emulated = comparison([emulated_run(), float32_run() | {"seed": 1, "epochs": 5}])["runs"][0]
    assert emulated["baseline"]["differences"] == {"seed": (0, 1), "epochs": (3, 5)}
    assert baseline_note(emulated) == (
        "quickstart against quickstart-fp32 is NOT like for like: seed 0 against 1; epochs 3 against 5."
    )


def test_runs_of_one_name_get_distinct_labels() -> None:
    runs = [emulated_run(), emulated_run(), emulated_run() | {"config_hash": "beef"}, float32_run()]
    labels = [run["label"] for run in comparison(runs)["runs"]]
    assert labels == ["quickstart 1a2b3c4d #1", "quickstart 1a2b3c4d #2", "quickstart beef", "quickstart-fp32"]


def test_labels_say_what_tells_runs_of_one_name_apart() -> None:
    one = emulated_run() | {"name": "mine"}
    by_arithmetic = [float32_run() | {"name": "mine"}, one]
    assert [run["label"] for run in comparison(by_arithmetic)["runs"]] == ["mine float32", "mine emulated"]
    by_seed = [*by_arithmetic, one | {"seed": 1}]
    both = ["mine float32 seed 0", "mine emulated seed 0", "mine emulated seed 1"]
    assert [run["label"] for run in comparison(by_seed)["runs"]] == both
    assert [run["label"] for run in comparison(by_seed[1:])["runs"]] == ["mine seed 0", "mine seed 1"]


def test_load_results_returns_what_was_written(write: Callable[..., Path]) -> None:
    assert load_results(write(emulated_run())) == emulated_run()


def message_of(run_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_results(run_dir)
    return str(caught.value)


def test_missing_run_directory_suggests_its_neighbour(write: Callable[..., Path]) -> None:
    run_dir = write(emulated_run())
    message = message_of(run_dir.with_name("quickstrat"))
    assert "quickstrat" in message
    assert "no such run directory; did you mean 'quickstart'?" in message


def test_directory_without_results(tmp_path: Path) -> None:
    assert "no results.json in it" in message_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1', b"[" * 100_000])
def test_results_that_are_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    assert "not valid JSON" in message_of(tmp_path)


@pytest.mark.parametrize(("version", "shown"), [(2, "2"), ("1", "'1'"), (None, "None")])
def test_another_schema_version(write: Callable[..., Path], version: Any, shown: str) -> None:
    message = message_of(write(emulated_run() | {"schema_version": version}))
    assert f"expected schema_version 1, got {shown}" in message


def test_every_broken_field_is_named(write: Callable[..., Path]) -> None:
    run = emulated_run()
    del run["seed"]
    run["epochs"] = "three"
    run["ledger"]["footprint_bits"]["total"]["fp32"] = None
    message = message_of(write(run))
    for field in ("seed", "epochs", "ledger.footprint_bits.total.fp32"):
        assert f"{field}: " in message
    assert "'three'" in message


def test_results_that_are_a_list(write: Callable[..., Path]) -> None:
    assert "schema_version" in message_of(write([1], "list"))


class Page(HTMLParser):
    """Collects tags, and what would be loaded from elsewhere; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def numbers_of(text: str) -> Any:
    """What the plots of a page are drawn from."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found[0])


def test_html_is_self_contained(write: Callable[..., Path]) -> None:
    run_dir = write(emulated_run())
    report([run_dir, write(float32_run())])
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    assert page.tags.count("script") == 4  # theme, numbers, plotting library, plots
    references = [value or "" for name, value in page.attributes if name in {"href", "xlink:href", "src", "srcset"}]
    assert references
    assert all(reference.startswith("#") for reference in references)
    style = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert not re.search(r"url\(|@import", "".join(style))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in references} <= set(ids)
    for layer in LAYERS[1:-1]:
        assert text.count(layer) >= 3  # in the table, and in the numbers of two plots


def test_the_plots_have_the_numbers_of_the_comparison(write: Callable[..., Path]) -> None:
    run_dir = write(emulated_run())
    report([run_dir])
    (drawn,) = numbers_of((run_dir / "report.html").read_text(encoding="utf-8"))["runs"]
    (run,) = comparison([emulated_run()])["runs"]
    assert drawn["traffic"]["by_role"]["gradient"]["encoded_mib"] == pytest.approx(3.0)
    achieved = [(row["layer"], row["achieved_percent"]) for row in run["gradients"] if row["achieved_percent"]]
    found = {row["layer"]: row["achieved_percent"] for row in drawn["gradients"]}
    assert len(achieved) == len(LAYERS) - 2
    for layer, percent in achieved:
        assert found[layer] == pytest.approx(percent, rel=1e-4)


def test_many_steps_over_time_are_thinned(write: Callable[..., Path]) -> None:
    """To the first of every so many, so that the page stays below 5 MB."""
    steps, layers = list(range(0, 60_000, 10)), [f"layer{number}" for number in range(100)]
    series = [
        {"layer": layer, "role": role, "sparsity": [0.123456789] * len(steps), "bits_per_element": [1.5] * len(steps)}
        for layer in layers
        for role in ("gradient", "activation", "weight")
    ]
    run_dir = write(emulated_run() | {"over_time": {"steps": steps, "series": series}})
    report([run_dir])
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    over_time = numbers_of(text)["runs"][0]["over_time"]
    assert over_time["every"] == 12
    assert over_time["steps"] == steps[::12]
    assert over_time["series"][7]["sparsity"] == [0.1235] * 500
    assert len(text) < 5e6


def pruned_run() -> Any:
    """emulated_run with two layers whose weights snr has pruned twice."""
    run = emulated_run()
    run["weight_pruning"] = {
        "name": "snr", "sparsity": 0.6, "renewals": 2, "returned": 1234, "threshold": 1.0, "parts": 4,
        "false_prune_rate": 0.5057, "log2_snr": {"lowest": -1, "counts": [700, 200, 100]},
        "layers": [{"layer": "first", "numel": 3000, "zeros": 2100}, {"layer": "second", "numel": 1000, "zeros": 300}],
        "history": [{"step": 62, "sparsity": 0.5, "pruned": 2000, "returned": 0},
                    {"step": 124, "sparsity": 0.6, "pruned": 1634, "returned": 1234}],
    }  # fmt: skip
    return run


def test_pruned_weights_are_told_and_drawn(write: Callable[..., Path]) -> None:
    run_dir = write(pruned_run())
    text = " ".join(report([run_dir]).split())
    assert "weight sparsity (%) 60.0" in text
    for row in ("first 3,000 2,100 70.0", "second 1,000 300 30.0", "all 4,000 2,400 60.0"):
        assert row in text
    assert "Weights pruned by snr: 2 renewals of the masks; 1,234 weights returned." in text
    assert "The threshold 1 (4 parts a step) takes 50.6 % of pure noise for noise." in text
    pruning = numbers_of((run_dir / "report.html").read_text(encoding="utf-8"))["runs"][0]["weight_pruning"]
    assert pruning["log2_snr"]["counts"] == [700, 200, 100]
    assert [row["sparsity"] for row in pruning["history"]] == [0.5, 0.6]


def test_html_is_the_same_every_time(write: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = write(emulated_run())
    for directory in ("once", "twice"):
        report([run_dir], tmp_path / directory)
    assert (tmp_path / "once/report.html").read_bytes() == (tmp_path / "twice/report.html").read_bytes()
    assert [path.name for path in (tmp_path / "once").iterdir()] == ["report.html"]


def test_output_that_is_a_file_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"taken/report.html: the report cannot be written: File exists"):
        report([write(emulated_run())], tmp_path / "taken")


def test_a_report_needs_a_run() -> None:
    with pytest.raises(ValueError, match="at least one run directory"):
        report([])


def test_names_are_escaped_in_html_and_plain_in_text(write: Callable[..., Path]) -> None:
    run = emulated_run() | {"name": "<script>alert(1)</script> $x_ [red]"}
    run["gradients"][0]["layer"] = run["ledger"]["tensors"][3]["layer"] = "<b>$_{"
    run_dir = write(run, "hostile")
    text = report([run_dir], width=200)
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    tags = Page(html).tags
    assert tags.count("script") == 4
    assert tags.count("b") == 0
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x_ [red]" in html
    assert numbers_of(html)["runs"][0]["label"] == run["name"]
    assert "<script>alert(1)</script> $x_ [red]" in text


def line_with(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.strip().startswith(name))


def test_text_of_an_emulated_run_beside_its_baseline(write: Callable[..., Path]) -> None:
    emulated, baseline = write(emulated_run()), write(float32_run())
    text = report([baseline, emulated])
    assert text.splitlines()[-1] == str(emulated / "report.html")
    assert line_with(text, "test accuracy, final (%)")[-2:] == ["97.50", "97.10"]
    assert line_with(text, "final, against float32 (points)")[-1] == "-0.40"
    assert line_with(text, "peak footprint (MiB)")[-2:] == ["64.00", "20.00"]
    assert line_with(text, "traffic per step, bf16 / encoded")[-2:] == ["0.50", "1.60"]
    assert line_with(text, "optimizer state") == ["optimizer", "state", "2.500", "2.500", "1.250", "1.00", "0.50"]
    assert line_with(text, "layer1.0.conv2") == [
        "layer1.0.conv2", "80.0", "80.1", "±", "2.0", "76.4", "-3.6", "streams", "+0.12", "±", "0.34", "0.900", "e5m2",
        "alpha", "1.97", "1.40", "1.25", "8.00", "2.60",
    ]  # fmt: skip
    assert "5 of 186" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_number_is_cut_at_any_width(write: Callable[..., Path], width: int) -> None:
    run = emulated_run()
    run["ledger"]["footprint_bits"]["total"] = sizes(1234567.25 * MIB, 7654321.5 * MIB)
    text = report([write(run)], width=width)
    assert "1,234,567.250" in text
    assert "layer4.1.conv2" in text
    assert "…" not in text


def test_color_is_asked_for(write: Callable[..., Path]) -> None:
    assert "\x1b[1m" in report([write(emulated_run())], color=True)


def test_a_float32_run_alone(write: Callable[..., Path]) -> None:
    run_dir = write(float32_run())
    text = report([run_dir])
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert line_with(text, "test accuracy, final (%)")[-1] == "97.50"
    assert "lognormal rule" not in text
    assert [run["emulated"] for run in numbers_of(html)["runs"]] == [False]


def test_several_emulated_runs_have_a_section_each(write: Callable[..., Path]) -> None:
    second = emulated_run() | {"name": "second"}
    run_dir = write(emulated_run())
    text = report([run_dir, write(second), write(float32_run())])
    assert len(numbers_of((run_dir / "report.html").read_text(encoding="utf-8"))["runs"]) == 3
    assert text.count("Neural gradients by layer") == 2


def test_a_run_that_stopped_before_anything_was_measured(write: Callable[..., Path]) -> None:
    run = copy.deepcopy(emulated_run())
    run |= {"status": "interrupted", "test_accuracy_percent": None, "best_test_accuracy_percent": None,
            "test_loss": None, "history": [], "gradients": [], "steps": 0}  # fmt: skip
    nothing = sizes(0.0, 0.0)
    run["ledger"] = {
        "sampled_steps": [], "tensors": [], "footprint_bits": {"total": nothing, "by_role": {}},
        "traffic_bits_per_step": {"total": nothing, "by_role": {}, "by_pass": {}},
    }  # fmt: skip
    run_dir = write(run)
    text = report([run_dir, write(float32_run())])
    assert line_with(text, "status")[-2:] == ["interrupted", "completed"]
    assert "0 of 0" in text
    assert numbers_of((run_dir / "report.html").read_text(encoding="utf-8"))["runs"][0]["history"] == []
