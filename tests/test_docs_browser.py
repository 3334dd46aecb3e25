"""The documentation and the README in a real browser: nothing cut, nothing outside, formulas set, no serious word of axe-core."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from browser import NEEDS_BROWSER, VIEWS, chromium, opened, problems

pytestmark = NEEDS_BROWSER
ROOT = Path(__file__).resolve().parents[1]
PAGES = ["index", "tutorial", "run", "data", "card", "slow", "fast", "maths", "benchmarks", "comparison", "cost", "cli"]
README = """<!doctype html><html lang="en"><meta charset="utf-8"><title>README</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem; }
html { background: light-dark(#fff, #0d1117); color: light-dark(#1f2328, #f0f6fc); }
pre, .table { overflow-x: auto; } pre { padding: 0.8rem; background: light-dark(#f6f8fa, #161b22); } img { max-width: 100%; }
table { border-collapse: collapse; } th, td { border: 1px solid #8888; padding: 0.3rem 0.6rem; } a { color: light-dark(#0550ae, #79c0ff); }
code { overflow-wrap: anywhere; }
</style><body><main>"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The built documentation, and the README as a page of HTML, served on this machine."""
    pytest.importorskip("material", reason="needs the extra docs")
    import markdown

    site = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(site)], cwd=ROOT, check=True, capture_output=True)
    text = markdown.markdown((ROOT / "README.md").read_text(encoding="utf-8"), extensions=["tables", "fenced_code"])
    text = re.sub(r"(<table>.*?</table>)", r'<div class="table" tabindex="0">\1</div>', text, flags=re.DOTALL).replace(
        "<pre>", '<pre tabindex="0">'
    )
    (site / "readme.html").write_text(f"{README}{text}</main>", encoding="utf-8")
    (site / "docs").mkdir(exist_ok=True)
    shutil.copytree(ROOT / "docs" / "images", site / "docs" / "images")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_pages_are_good_to_read(address: str, width: int, scheme: str) -> None:
    wrong = {}
    with chromium() as browser, opened(browser, address, width, scheme) as page:
        for name in [*PAGES, "readme"]:
            page.goto(f"{address}{name}.html")
            page.wait_for_load_state("networkidle")
            found = [each for each in problems(page) if each != "outside: layercard"]  # the title in the drawer that is closed
            if found:
                wrong[name] = found[:6]
            formulas = page.locator(".arithmatex")
            assert page.locator(".arithmatex .katex").count() >= formulas.count(), name
            assert page.locator(".katex-error").count() == 0, name
    assert wrong == {}
