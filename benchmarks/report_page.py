"""The report's page of a large run in Chromium: its size, and how long until it can be used.

The run is made up: so many layers, three tensors each, over so many recorded steps, on four machines. `ready` is from
opening the file until its controls work and what is in the window is drawn; `heatmap` from the jump there until its
cells are drawn; `switch` from a click on a run's box until the plots in the window are new. Exit code 2 without
playwright (in the extra `test`) or Chromium.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from timing import keep, machine, print_lines, print_table, selection

from fpsim.files import write_json
from fpsim.report import report

SIZES = {"20 layers x 50 steps": (20, 50), "100 layers x 500 steps": (100, 500)}
QUICK = "20 layers x 50 steps"
EPOCHS = 50
ROLES = ("weight", "activation", "gradient")
CODECS = ("dense", "bitmask", "coo", "alpha_tag")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
DRAWN = "visible.size > 0 && [...visible].every((name) => !stale.has(name))"
MIB = float(8 * 2**20)


def results(layers: int, steps: int) -> dict[str, Any]:
    """The results.json of a run of that size, every part of the report in it."""
    random = np.random.default_rng(0)
    names = [f"features.stage{number // 10}.block{number % 10}.conv" for number in range(layers)]
    share = lambda: {"encoded": 30 * MIB, "fp32": 90 * MIB, "bf16": 45 * MIB}  # noqa: E731
    ledger = {
        "sampled_steps": list(range(steps)),
        "footprint_bits": {"total": share(), "by_role": {role: share() for role in ROLES}},
        "traffic_bits_per_step": {
            "total": share(),
            "by_role": {role: share() for role in ROLES},
            "by_pass": {which: share() for which in ("forward", "dgrad", "wgrad", "update")},
        },
        "tensors": [tensor(name, role, random) for name in names for role in ROLES],
    }
    series = [
        {"layer": name, "role": role, "sparsity": random.random(steps).tolist(),
         "bits_per_element": (1 + 7 * random.random(steps)).tolist()}
        | ({"cosine": random.random(steps).tolist()} if role == "gradient" else {})
        for name in names
        for role in ROLES
    ]  # fmt: skip
    history = [
        {"epoch": epoch, "step": epoch * 100, "learning_rate": 0.1, "train_loss": 1.0, "train_accuracy_percent": 50.0,
         "test_loss": 1.0, "test_accuracy_percent": 90 - 50 / epoch, "gradient_sparsity": 0.8, "weight_sparsity": 0.5}
        for epoch in range(1, EPOCHS + 1)
    ]  # fmt: skip
    pruning = {
        "name": "snr", "sparsity": 0.5, "renewals": EPOCHS, "returned": 5, "threshold": 1.0, "parts": 4,
        "false_prune_rate": 0.5, "log2_snr": {"lowest": -20, "counts": [1000] * 30},
        "layers": [{"layer": name, "numel": 1000, "zeros": 500} for name in names],
        "history": [
            {"step": 100 * epoch, "sparsity": epoch / 100, "pruned": 9, "returned": 3} for epoch in range(EPOCHS)
        ],
    }  # fmt: skip
    return {
        "schema_version": 1, "name": "large", "config_hash": "00000000", "status": "completed", "seed": 0,
        "emulated": True, "epochs": EPOCHS, "steps": 100 * EPOCHS, "wall_seconds": 1.0, "model": "large",
        "parameters": 10**8, "data": "none", "test_accuracy_percent": 89.0, "best_test_accuracy_percent": 89.0,
        "test_loss": 1.0, "history": history,
        "gradients": [
            {"layer": name, "asked_sparsity": 0.8, "achieved_sparsity": 0.8, "achieved_std": 0.01, "steps": 5,
             "lognormal_rule_sparsity": 0.77, "alpha_share_of_nonzeros": 0.6, "alpha_kept": "streams", "cosine": 0.9}
            for name in names
        ],
        "weight_pruning": pruning, "ledger": ledger, "over_time": {"steps": list(range(steps)), "series": series},
        "distributions": [distribution(name, role, random) for name in names for role in (*ROLES, "weight_gradient")],
        "formats": {"e4m3fn": {"bits": 8, "block_size": None, "max": 448.0, "min_normal": 2.0**-6,
                               "min_subnormal": 2.0**-9, "positive_numbers": sorted(random.random(126).tolist())}},
        "machines": [on_machine(f"machine {number}", names, random) for number in range(4)],
        "config": {"name": "large", "seed": 0}, "environment": {"world_size": 1},
    }  # fmt: skip


def tensor(layer: str, role: str, random: np.random.Generator) -> dict[str, Any]:
    return {
        "layer": layer, "role": role, "format": "e4m3fn", "codec": "alpha", "numel": 1e6, "nonzeros": 2e5,
        "alphas": 1e5, "survivors": 1e5, "value_bits": 8,
        "bits": dict.fromkeys(("header", "offsets", "metadata", "payload", "total"), 1e6),
        "bits_per_element": 1 + float(random.random()), "tag_entropy_bits_per_element": 0.9 + float(random.random()),
        "order0_entropy_bits_per_element": 0.8 + float(random.random()),
        "other_codecs_bits_per_element": {codec: 2 + 6 * float(random.random()) for codec in CODECS},
    }  # fmt: skip


def distribution(layer: str, role: str, random: np.random.Generator) -> dict[str, Any]:
    quantiles = sorted(random.standard_normal(33).tolist())
    return {
        "layer": layer, "role": role, "step": 1, "elements": 10**6, "zeros": 10, "mean_log2": -9.0, "std_log2": 2.0,
        "statistics": dict.fromkeys(("normal", "lognormal", "laplace", "uniform", "cauchy"), 0.123456),
        "format": "e4m3fn", "scale": 0.0123, "scales": 1, "alpha": 0.01,
        "sample": {
            "count": 4096, "mean": 0.01, "std": 0.1, "mean_log2": -9.0, "std_log2": 2.0,
            "log2_histogram": {"lowest": -18.0, "highest": 0.0, "counts": random.integers(0, 200, 60).tolist()},
            "sigmas": np.linspace(-3.2, 3.2, 33).tolist(), "quantiles": quantiles, "log2_quantiles": quantiles,
        },
    }  # fmt: skip


def on_machine(name: str, layers: list[str], random: np.random.Generator) -> dict[str, Any]:
    def cost() -> dict[str, Any]:
        seconds, moved = 1e-4 * (1 + float(random.random())), 1e5 * (1 + float(random.random()))
        return {"seconds": seconds, "joules": 1e-3, "main_memory_bytes": moved, "bound_by": "dram",
                "executed_macs": 1e7, "peak_macs_per_second": 4e11}  # fmt: skip

    total = {"seconds": 0.1, "joules": 0.2, "main_memory_bytes": 1e8,
             "seconds_by_bound": {"dram": 0.06, "compute": 0.04},
             "joules_by_part": {"dram": 0.15, "mac": 0.05}}  # fmt: skip
    schemes = ("encoded", "fp32", "bf16")
    return {
        "machine": name, "main_memory": "dram", "main_memory_bytes_per_second": 1e11, "error": None,
        "totals": dict.fromkeys(schemes, total),
        "rows": [
            {"layer": layer, "pass": which, "macs": 1e7, "effectual_macs": 5e6,
             "schemes": {scheme: cost() for scheme in schemes}}
            for layer in layers
            for which in ("forward", "dgrad", "wgrad")
        ],
    }  # fmt: skip


def measured(browser: Any, file: Path) -> dict[str, float]:
    """Milliseconds of each wait, in a window of its own."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    found = {}

    def waiting(name: str, begin: Any, condition: str) -> None:
        began = time.perf_counter()
        begin()
        page.wait_for_function(condition)
        found[name] = 1e3 * (time.perf_counter() - began)

    waiting("ready", lambda: page.goto(file.as_uri()), DRAWN)
    waiting(
        "heatmap", lambda: page.evaluate("element('figure-heatmap').scrollIntoView()"), f"charts.heatmap && {DRAWN}"
    )
    waiting("metric", lambda: page.locator("#metric").select_option(index=1), DRAWN)
    page.evaluate("element('summary').scrollIntoView()")
    waiting("switch", lambda: page.locator("#shown-0").click(), DRAWN)
    page.close()
    return found


def main() -> None:
    arguments = selection(__doc__, "size", list(SIZES), QUICK, 5, "openings of each")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("needs playwright and Chromium")
        sys.exit(2)
    description = machine()
    print_lines(description)
    document: dict[str, Any] = {"machine": description, "sizes": {}}
    rows = []
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name in arguments.chosen:
            layers, steps = SIZES[name]
            run = Path(place) / str(layers)
            run.mkdir()
            write_json(run / "results.json", results(layers, steps))
            began = time.perf_counter()
            report([run])
            written = time.perf_counter() - began
            size = (run / "report.html").stat().st_size
            times = [measured(browser, run / "report.html") for _ in range(arguments.repeats + 1)][1:]
            waits = {wait: [one[wait] for one in times] for wait in times[0]}
            document["sizes"][name] = {"bytes": size, "write_seconds": written, "wait_milliseconds": waits}
            rows.append(
                [name, f"{size / 1e6:.2f}", f"{written:.2f}"]
                + [f"{np.median(seen):.0f} ({min(seen):.0f} to {max(seen):.0f})" for seen in waits.values()]
            )
        browser.close()
    columns = ["run", "MB", "s to write", *(f"{wait} ms" for wait in waits)]
    print_table("The report's page in Chromium: medians, fastest and slowest", columns, rows)
    keep(arguments, "report_page", document)


if __name__ == "__main__":
    main()
