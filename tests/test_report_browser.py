"""The report in a real browser, from the disk and without network: everything is drawn, and the calculator follows what is typed.

Needs the Python package `playwright` and a Chromium (`CHROMIUM`, else `/usr/bin/chromium`). With `AXE`, a path to `axe.min.js`, axe-core
looks at the page too.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layercard.files import write_text
from layercard.report.page import report_page
from layercard.report.roi import RoiInputs, ratios_of, roi
from layercard.report.trials import grouped
from test_report_page import full

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs a Chromium at {CHROMIUM}"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 64 layers and 12 runs."""
    return write_text(tmp_path_factory.mktemp("report") / "report.html", report_page(full(64)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as machine:
        found = machine.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_everything_is_drawn_without_a_word(browser: Any, report: Path, width: int, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, bypass_csp="AXE" in os.environ
    )
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    page.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
    page.wait_for_function("document.querySelectorAll('.plot').length == document.querySelectorAll('.plot[data-drawn]').length")
    plots = page.locator(".plot").count()
    assert page.locator(".plot[data-drawn] .main-svg").count() >= plots > 15
    assert said == []
    assert asked == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if "AXE" in os.environ:
        page.evaluate(Path(os.environ["AXE"]).read_text(encoding="utf-8"))
        found = page.evaluate("axe.run()")["violations"]
        assert [(one["impact"], one["id"]) for one in found if one["impact"] in ("serious", "critical")] == []
    context.close()


def test_the_calculator_follows_what_is_typed(browser: Any, report: Path) -> None:
    sources, page = full(64), browser.new_page()
    page.goto(report.as_uri())
    page.fill("#roi-gpu_price_per_hour", "7")
    page.fill("#roi-gpu_watts", "400")
    ratios = ratios_of(sources.placement.layers, sources.card, grouped(sources.trials))
    expected = roi(RoiInputs(gpu_price_per_hour=7, gpu_watts=400), ratios).results
    for name in ("saved_month", "energy_saved", "payback_months"):
        cell = page.locator(f'td[data-result="{name}"][data-end="mid"]')
        assert float(cell.get_attribute("data-exact")) == expected[name].mid
    page.fill("#roi-gpus", "0")
    assert "GPUs a run" in page.inner_text("#roi-hint")
    assert page.get_attribute("#roi-gpus", "aria-invalid") == "true"
    page.close()
