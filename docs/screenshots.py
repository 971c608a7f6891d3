"""The pictures of the report in docs/images: `python docs/screenshots.py REPORT.html`, with playwright and Chromium.

wide: 1280 pixels, light. dark: the same in dark colours, further down. narrow: a telephone's 400 pixels.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).with_name("images")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
DRAWN = "visible.size > 0 && [...visible].every((name) => !stale.has(name))"


def picture(browser: Browser, report: Path, name: str, top: str, width: int, height: int, scheme: str) -> None:
    """The window as it is when the page is scrolled to the element `top`."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(report.resolve().as_uri())
    page.evaluate(f"document.querySelector('{top}').scrollIntoView()")
    page.wait_for_function(DRAWN)
    page.wait_for_timeout(300)
    page.screenshot(path=FOLDER / f"report-{name}.png")
    context.close()


def main() -> None:
    report = Path(sys.argv[1])
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        picture(browser, report, "wide", "header", 1280, 1000, "light")
        picture(browser, report, "dark", "#figure-heatmap", 1280, 1150, "dark")
        picture(browser, report, "tensors", "#tensors", 1280, 1150, "light")
        picture(browser, report, "narrow", "#accuracy", 400, 900, "light")
        browser.close()


if __name__ == "__main__":
    main()
