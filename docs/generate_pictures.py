"""Draw the pictures of a card in docs/images/ from a committed card, in light and in dark; needs Chromium and playwright.

python docs/generate_pictures.py
"""

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "benchmarks" / "results" / "placements" / "cards" / "e2e.json"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
COLOURS = {"light": ("#ffffff", "#24292f", "#d8dee4"), "dark": ("#0d1117", "#e6edf3", "#30363d")}
"""Background, text and grid lines."""
WIDTH, HEIGHT = 880, 300
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: {background}; color: {text}; font: 15px system-ui, sans-serif; }}
main {{ display: grid; grid-template-columns: 1.6fr 1fr; gap: 8px; padding: 12px 16px; box-sizing: border-box; width: {width}px; }}
h2 {{ font-size: 15px; margin: 0 0 4px; font-weight: 600; }}
.plot {{ height: {plot}px; }}
</style><main>
<section><h2>What each layer could gain</h2><div class="plot" id="gain"></div></section>
<section><h2>Which layers do the same</h2><div class="plot" id="coupling"></div></section>
</main><script>{plotly}</script><script>
const figures = {figures};
for (const [name, figure] of Object.entries(figures)) {{
  const axis = {{ gridcolor: "{grid}", linecolor: "{grid}", zerolinecolor: "{grid}" }};
  const layout = {{ ...figure.layout, paper_bgcolor: "{background}", plot_bgcolor: "{background}", font: {{ color: "{text}", size: 13 }} }};
  layout.xaxis = {{ ...layout.xaxis, ...axis }};
  layout.yaxis = {{ ...layout.yaxis, ...axis }};
  Plotly.newPlot(name, figure.data, layout, {{ staticPlot: true, responsive: true }});
}}
</script>"""


def page(scheme: str) -> str:
    """The two figures of the card as a page."""
    from layercard import LayerCard, plots, select
    from layercard.report.page import plotly_js

    card = LayerCard.load(CARD)
    chosen = select(card)
    figures = {"gain": plots.depth_profile(card, "gain_estimate", chosen), "coupling": plots.coupling(card, chosen)}
    background, text, grid = COLOURS[scheme]
    drawn = json.dumps({name: json.loads(figure.to_json()) for name, figure in figures.items()})
    return PAGE.format(
        background=background, text=text, grid=grid, figures=drawn, plotly=plotly_js(), width=WIDTH, plot=HEIGHT - 48, height=HEIGHT
    )


def main() -> None:
    """Write both pictures."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as machine:
        browser = machine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in COLOURS:
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=2)
            tab.set_content(page(scheme))
            tab.wait_for_selector("#coupling .main-svg")
            tab.wait_for_timeout(500)
            tab.screenshot(path=ROOT / "docs" / "images" / f"card-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
