"""Pages in a real Chromium, for tests: at the widths and colours that people read them in, with what axe-core and the eye would mark.

Needs the dev extra (playwright and axe-core come with it) and a Chromium: `CHROMIUM`, else `/usr/bin/chromium`; tests skip without.

```python
from browser import NEEDS_BROWSER, VIEWS, chromium, opened, problems

pytestmark = NEEDS_BROWSER

@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_a_page_is_good_to_read(width, scheme):
    with chromium() as browser, opened(browser, path.as_uri(), width, scheme) as page:
        assert problems(page) == []
```
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
"""A desk and a phone, light and dark."""
_MISSING = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
NEEDS_BROWSER = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(_MISSING), reason=f"needs {' and '.join(_MISSING)}: pip install -e .[dev]"),
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs a Chromium at {CHROMIUM}"),
]
"""Marks of a test file that opens pages: `pytestmark = NEEDS_BROWSER`."""

# Words that cannot be read: over the edge of the page, cut off by a box that hides what is too large, or on top of other words. Boxes
# that scroll may be wider than they show.
_LAYOUT = """
() => {
  const wrong = [], width = document.documentElement.clientWidth, boxes = [];
  if (document.documentElement.scrollWidth > width) wrong.push(`the page is ${document.documentElement.scrollWidth} px wide`);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement, text = node.textContent.trim();
    if (!text || !parent.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (parent.closest("script, style, option, .skip, [aria-hidden=true]")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const rects = [...range.getClientRects()].filter((r) => r.width > 1 && r.height > 1);
    if (!rects.length) continue;
    let scrolls = false, clipped = false;
    for (let box = parent; box && box !== document.body; box = box.parentElement) {
      const style = getComputedStyle(box), around = box.getBoundingClientRect();
      const unseen = /hidden|clip/.test(style.overflow) && (around.width <= 1 || around.height <= 1);  // for screen readers alone
      if (unseen || /auto|scroll/.test(style.overflowX + style.overflowY)) { scrolls = true; break; }
      if (/hidden|clip/.test(style.overflowX) && rects.some((r) => r.right > around.right + 2 || r.left < around.left - 2)) clipped = true;
      if (/hidden|clip/.test(style.overflowY) && rects.some((r) => r.bottom > around.bottom + 3 || r.top < around.top - 3)) clipped = true;
    }
    if (clipped) wrong.push(`cut: ${text.slice(0, 60)}`);
    if (!scrolls && rects.some((r) => r.right > width + 1 || r.left < -1)) wrong.push(`outside: ${text.slice(0, 60)}`);
    if (!scrolls) for (const r of rects) boxes.push([r, text, parent]);
  }
  boxes.sort((a, b) => a[0].top - b[0].top);
  for (let i = 0; i < boxes.length; i++)
    for (let j = i + 1; j < boxes.length && boxes[j][0].top < boxes[i][0].bottom - 3; j++) {
      const [a, first, one] = boxes[i], [b, second, other] = boxes[j];
      if (one === other || one.contains(other) || other.contains(one)) continue;
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left), down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 3 && down > 4) wrong.push(`overlap: ${first.slice(0, 40)} / ${second.slice(0, 40)}`);
    }
  return [...new Set(wrong)];
}
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as machine:
        browser = machine.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, address: str, width: int = 1280, scheme: str = "light", *, offline: bool = False) -> Iterator[Any]:
    """A page at an address; it must end without an error in its console and without asking for anything elsewhere."""
    # axe-core comes in from outside, which a page's own policy forbids.
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=offline, bypass_csp=True)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else wrong.append(asked.url))
    page.goto(address)
    yield page
    context.close()
    assert wrong == []


def accessibility(page: Any) -> list[str]:
    """What axe-core calls serious or critical: rule, and the first places."""
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    violations = page.evaluate("axe.run()")["violations"]
    serious = [each for each in violations if each["impact"] in ("serious", "critical")]
    return [f"{each['id']}: {', '.join(str(node['target']) for node in each['nodes'][:4])}" for each in serious]


def problems(page: Any) -> list[str]:
    """What a reader could not read: words that are cut, outside or on top of others, and what axe-core finds."""
    return [*page.evaluate(_LAYOUT), *accessibility(page)]
