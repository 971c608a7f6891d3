"""The HTML report in a real browser: it draws, follows its controls, and can be read in any window and by anyone."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

import fpsim
from fpsim.report import report

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
PLOTS = (
    "accuracy", "pareto", "sizes", "heatmap", "codecs", "sparsity", "weights", "snr", "machines", "roofline", "line",
    "density", "qq",
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "name": "small",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [32, 24]},
    "training": {"epochs": 3, "batch_size": 64, "micro_batches": 4, "optimizer": {"name": "sgd", "learning_rate": 0.2}},
    "threads": 1,
}
EMULATION = {
    "exclude": ["last"],
    "weights": {"format": "e4m3fn", "scale": "amax", "codec": "bitmask"},
    "activations": {"format": "e4m3fn", "scale": "amax"},
    "gradients": {"format": "e5m2", "scale": "amax", "codec": "alpha", "pruning": {"sparsity": 0.8}},
    "ledger": {"every_steps": 8},
}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of real runs: two seeds, one that prunes its weights, one in float32."""
    place, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    emulated = {**SETTINGS, "emulation": EMULATION}
    runs = {
        "seed0": emulated,
        "seed1": {**emulated, "seed": 1},
        "pruned": {**emulated, "name": "pruned", "emulation": {**EMULATION, "weight_pruning": {"name": "snr"}}},
        "float32": {**SETTINGS, "name": "float32"},
    }
    for name, settings in runs.items():
        fpsim.run(settings, place / name, quiet=True)
    torch.set_num_threads(threads)
    report([place / name for name in runs], place)
    return place / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None and not os.environ.get("CI"):
        pytest.skip("needs Chromium (apt-get install chromium), or its path in CHROMIUM")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        found.close()


def opened(browser: Browser, file: Path, *, width: int = 1280, height: int = 900, **settings: Any) -> Page:
    page = browser.new_context(viewport={"width": width, "height": height}, **settings).new_page()
    page.set_default_timeout(10_000)
    told: list[str] = []

    def keep(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            told.append(message.text)

    page.on("console", keep)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: told.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(file.as_uri())
    page.locator("#controls").wait_for()
    page.told = told  # type: ignore[attr-defined]
    return page


def drawn(page: Page, name: str) -> Any:
    """The ECharts option of a plot, scrolled to and drawn."""
    page.locator(f"#figure-{name}").scroll_into_view_if_needed()
    page.wait_for_function(f"charts['{name}'] !== undefined && !stale.has('{name}')")
    return json.loads(page.evaluate(f"JSON.stringify(charts['{name}'].getOption())"))


def names_of(option: Any) -> set[str]:
    return {series["name"] for series in option["series"] if series.get("name") and not series["name"].startswith("\0")}


def values_of(page: Page, name: str) -> list[list[str]]:
    """The table below a plot, opened by the keyboard; its header first."""
    summary = page.locator(f"#values-{name} > summary")
    summary.focus()
    page.keyboard.press("Enter")
    rows = page.locator(f"#values-{name} tr")
    rows.nth(1).wait_for()
    found = page.eval_on_selector_all(
        f"#values-{name} tr", "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    summary.press("Enter")
    rows.nth(1).wait_for(state="detached")
    return found


def colors_of(page: Page, canvas: str) -> int:
    """How many there are on a canvas."""
    pixels = "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer"
    found: int = page.locator(canvas).first.evaluate(f"canvas => new Set(new Uint32Array({pixels})).size")
    return found


def test_every_section_is_there_with_plots_and_no_complaint(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    page.locator("#run").select_option(label="pruned")
    for name in PLOTS:
        assert page.locator(f"#figure-{name}").is_visible(), name
        assert any(series["data"] for series in drawn(page, name)["series"]), name
        if name == "heatmap":
            assert colors_of(page, "#plot-heatmap canvas") > 20
        else:
            assert page.locator(f"#plot-{name} svg path").count() > 8, name
        header, *rows = values_of(page, name)
        assert len(rows) >= 2, name
        assert {len(row) for row in rows} == {len(header)}, name
    links = page.eval_on_selector_all("nav a:not([hidden])", "links => links.map(a => a.hash.slice(1))")
    assert links == ["summary", "accuracy", "storage", "weights", "machines", "tensors", "configuration"]
    assert all(page.locator(f"h2#{link}").is_visible() for link in links)
    assert page.told == []  # type: ignore[attr-defined]


def test_plots_show_what_the_runs_say(browser: Browser, page_file: Path) -> None:
    """Values of plots against results.json, as the browser shows them: four digits."""
    page = opened(browser, page_file)
    results = {name: json.loads((page_file.parent / name / "results.json").read_text()) for name in ("seed0", "seed1")}
    finals = [result["test_accuracy_percent"] for result in results.values()]
    last = [row for row in values_of(page, "accuracy") if row[0] == "small (2 seeds)"][-1]
    assert float(last[2]) == pytest.approx(sum(finals) / 2, rel=1e-3)
    assert float(last[3]) == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5, rel=1e-3, abs=1e-9)
    assert last[4] == "2"
    traffic = results["seed0"]["ledger"]["traffic_bits_per_step"]["total"]
    sizes = {row[0]: float(row[-1]) for row in values_of(page, "sizes")[1:]}
    assert sizes["small seed 0"] == pytest.approx(traffic["encoded"] / 8 / 2**20, rel=1e-3)
    assert sizes["dense float32"] == pytest.approx(traffic["fp32"] / 8 / 2**20, rel=1e-3)
    (series,) = [
        one
        for one in results["seed0"]["over_time"]["series"]
        if (one["layer"], one["role"]) == (results["seed0"]["gradients"][0]["layer"], "gradient")
    ]
    (row,) = [row for row in values_of(page, "heatmap") if row[0] == series["layer"]]
    assert [float(cell) for cell in row[1:]] == pytest.approx([100 * share for share in series["sparsity"]], rel=1e-3)
    machine = results["seed0"]["machines"][0]
    (row,) = [row for row in values_of(page, "machines") if row[0] == f"{machine['machine']}, encoded"]
    assert float(row[1]) == pytest.approx(1e3 * machine["totals"]["encoded"]["seconds"], rel=1e-3)


def test_a_run_is_switched_off_and_on(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    assert names_of(drawn(page, "accuracy")) == {"small (2 seeds)", "pruned", "float32"}
    page.get_by_label("pruned", exact=True).uncheck()
    assert names_of(drawn(page, "accuracy")) == {"small (2 seeds)", "float32"}
    assert names_of(drawn(page, "pareto")) == {"small (2 seeds)", "float32"}
    page.get_by_label("small seed 1", exact=True).uncheck()
    assert [row[4] for row in values_of(page, "accuracy") if row[0].startswith("small")] == ["1"] * 3
    bars = drawn(page, "sizes")["yAxis"][0]["data"]
    assert bars == ["small seed 0", "float32", "dense bfloat16", "dense float32"]
    for label in ("pruned", "small seed 1"):
        page.get_by_label(label, exact=True).check()
    assert names_of(drawn(page, "accuracy")) == {"small (2 seeds)", "pruned", "float32"}


def test_choices_change_what_is_drawn(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    assert not page.locator("#figure-snr").is_visible()
    assert page.locator("details.of-run:visible").count() == 1
    page.locator("#run").select_option(label="pruned")
    assert page.locator("#figure-snr").is_visible()
    assert "Tables of pruned" in page.locator("details.of-run:visible").inner_text()
    assert "pruned" in page.locator("section.of-run:visible").inner_text()

    costs = page.locator("#cost option").all_inner_texts()
    assert costs[:3] == ["traffic of a step (MiB)", "peak footprint (MiB)", "bits a gradient element"]
    before = drawn(page, "pareto")["xAxis"]
    page.locator("#cost").select_option(label="bits a gradient element")
    assert drawn(page, "pareto")["xAxis"][0]["name"] != before[0]["name"]
    page.locator("#size").select_option(label="traffic of a step, by pass")
    assert names_of(drawn(page, "sizes")) == {"forward", "dgrad", "wgrad", "update"}
    sparsity = values_of(page, "heatmap")
    page.locator("#metric").select_option(label="gradient cosine")
    cosines = [float(cell) for row in values_of(page, "heatmap")[1:] for cell in row[1:]]
    assert all(0 < cosine <= 1 for cosine in cosines)
    assert values_of(page, "heatmap") != sparsity
    page.locator("#machine").select_option(label="tpu-like")
    assert drawn(page, "roofline")["xAxis"][0]["name"] == "MACs per byte of hbm"
    page.locator("#machine-what").select_option(label="energy")
    assert "mJ" in values_of(page, "machines")[0][1]


def test_a_click_on_the_heatmap_chooses_the_layer(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    drawn(page, "heatmap")
    layers = page.evaluate("charts.heatmap.getOption().yAxis[0].data")
    for number, layer in enumerate(layers):
        x, y = page.evaluate(f"charts.heatmap.convertToPixel({{ seriesIndex: 0 }}, [1, {number}])")
        page.locator("#plot-heatmap").click(position={"x": x, "y": y})
        assert page.locator("#layer").input_value() == layer


def test_number_lines_lie_where_the_format_has_numbers(browser: Browser, page_file: Path) -> None:
    """Ticks of the weights' e4m3fn: all positive numbers of the format times the scale that the run chose."""
    page = opened(browser, page_file)
    results = json.loads((page_file.parent / "seed0" / "results.json").read_text())
    weight = next(one for one in results["distributions"] if one["role"] == "weight" and one["format"] == "e4m3fn")
    page.locator("#layer").select_option(weight["layer"])
    page.locator("#tensor").select_option("weight")
    ticks = [
        point for series in drawn(page, "line")["series"] if "numbers" in series["name"] for point in series["data"]
    ]
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = torch.log2(codes.double() * weight["scale"]).tolist()
    assert sorted(point[0] for point in ticks) == pytest.approx(expected, abs=1e-4)
    assert f"e4m3fn, scale {weight['scale']:.3}"[:20] in page.locator("#note-line").inner_text()


def test_hover_and_zoom(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    drawn(page, "accuracy")
    line = "charts.accuracy.getOption().series.find((one) => one.type === 'line')"
    epoch, value, *_ = page.evaluate(f"{line}.data.at(-1)")
    x, y = page.evaluate(f"charts.accuracy.convertToPixel({{ xAxisIndex: 0, yAxisIndex: 0 }}, [{epoch}, {value}])")
    plot = page.locator("#plot-accuracy")
    plot.hover(position={"x": x, "y": y})
    tip = plot.locator("xpath=./div[contains(@style, 'pointer-events')]")
    tip.wait_for(state="visible")
    assert f"{value:.4g}" in tip.inner_text()
    before = page.evaluate("charts.accuracy.getOption().dataZoom[0]")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    page.wait_for_function("charts.accuracy.getOption().dataZoom[0].start > 0")
    assert before["start"] == 0
    page.mouse.wheel(0, 400)  # without Ctrl the page scrolls
    page.wait_for_function("scrollY > 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser: Browser, page_file: Path, scheme: Any) -> None:
    page = opened(browser, page_file, color_scheme=scheme)
    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3"
    assert (page.evaluate(shade) > 200) == (scheme == "light")
    ink = drawn(page, "accuracy")["textStyle"]["color"]
    page.get_by_role("button", name="Dark or light").click()
    assert (page.evaluate(shade) > 200) == (scheme == "dark")
    assert drawn(page, "accuracy")["textStyle"]["color"] != ink
    assert page.told == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(browser: Browser, page_file: Path, scheme: Any) -> None:
    """By axe's rules (WCAG 2 A and AA, and best practice), tables opened."""
    page = opened(browser, page_file, color_scheme=scheme)
    for summary in page.locator("details.of-run > summary:visible").all():
        summary.click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_reaches_everything(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached[0] == "To the summary"
    expected = {"shown-0", "shown-3", "run", "theme", "cost", "size", "metric", "codec-role", "machine", "layer"}
    assert expected <= set(reached)
    page.locator("#shown-2").focus()
    page.keyboard.press("Space")
    assert names_of(drawn(page, "accuracy")) == {"small (2 seeds)", "float32"}


@pytest.mark.parametrize("width", [360, 800, 1920])
def test_any_window_is_wide_enough(browser: Browser, page_file: Path, width: int) -> None:
    page = opened(browser, page_file, width=width)
    for name in (name for name in PLOTS if name != "snr"):
        drawn(page, name)
        box = page.locator(f"#plot-{name} > div").first.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 700, "height": 900})
    page.wait_for_function("charts.sizes.getWidth() < 700")


def test_it_prints_with_every_plot(browser: Browser, page_file: Path) -> None:
    """In light colours, without controls; afterwards it is on the screen as it was."""
    page = opened(browser, page_file, color_scheme="dark")
    printed = page.pdf(format="A4", print_background=True)
    pages = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert pages >= 5
    assert set(page.evaluate("Object.keys(charts)")) == set(PLOTS) - {"snr"}
    assert page.locator("canvas.printed").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert colors_of(page, "canvas.printed") > 20
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.told == []  # type: ignore[attr-defined]


def test_tables_are_there_without_javascript(browser: Browser, page_file: Path) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(page_file.as_uri())
    text = page.locator("body").inner_text()
    assert "The plots need JavaScript; the tables do not." in text
    assert page.locator("section.of-run:visible").count() == 4
    assert not page.locator("#controls").is_visible()


def test_a_run_of_an_earlier_fpsim_has_what_it_noted(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    """Neither steps over time nor distributions nor machines: no empty plots, no headings without any."""
    results = json.loads((page_file.parent / "float32" / "results.json").read_text())
    for key in ("over_time", "distributions", "formats", "machines", "config", "weight_pruning"):
        results.pop(key)
    (tmp_path / "results.json").write_text(json.dumps(results))
    report([tmp_path])
    page = opened(browser, tmp_path / "report.html")
    assert {name for name in PLOTS if page.locator(f"#figure-{name}").is_visible()} == {"accuracy", "pareto", "sizes"}
    links = page.eval_on_selector_all("nav a:not([hidden])", "links => links.map(a => a.hash.slice(1))")
    assert links == ["summary", "accuracy", "storage", "configuration"]
    assert page.locator("h2:visible").count() == len(links)
    assert page.told == []  # type: ignore[attr-defined]


def test_hostile_names_stay_text(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=window.hit=1></script><b>"
    results = json.loads((page_file.parent / "seed0" / "results.json").read_text().replace('"0"', json.dumps(hostile)))
    results["name"] = hostile
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(results))
    report([run])
    page = opened(browser, run / "report.html")
    for name in (name for name in PLOTS if name not in ("weights", "snr")):
        drawn(page, name)
        box = page.locator(f"#plot-{name}").bounding_box()
        assert box is not None
        for part in (0.3, 0.5, 0.7):
            page.mouse.move(box["x"] + part * box["width"], box["y"] + 0.5 * box["height"])
        values_of(page, name)
    assert page.evaluate("window.hit") is None
    assert page.locator("img").count() == 0
    assert page.told == []  # type: ignore[attr-defined]
