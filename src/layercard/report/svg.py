"""Two pictures of a card as SVG without scripts, styles or fonts of their own: for pages that show images only, such as the hub's.

Everything that a card says in words is left out or escaped; numbers are written by this module.
"""

import html
from collections.abc import Sequence

from layercard.card.numbers import Json, best_layers, profile_of, short
from layercard.records import Estimate
from layercard.report.frames import MEASURES

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 45
INK, BAND, GRID, MARK = "#1f4e79", "#b7cfe6", "#e2e2e2", "#c8501e"
LEVELS = 20
"""Shades of the heat map on each side of zero."""
SIDE = 520
"""Width of the coupling matrix in pixels."""


def depth_svg(card: Json, measure: str = "gain_estimate") -> str:
    """One measure over the layers, with its 95 % intervals as a band and the best layers as marked points.

    Args:
        card: JSON value of a card that was read by `LayerCard`.
        measure: One of `frames.MEASURES` that the card has.
    """
    found = [value for value in profile_of(card, measure) if value is not None]
    low = min(0.0, *(_ends(value)[0] for value in found))
    high = max(_ends(value)[1] for value in found)
    span = (high - low) or 1.0

    def at(layer: int, value: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (layer + 0.5) / len(found)
        return f"{across:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / span:.1f}"

    band = [at(layer, _ends(value)[1]) for layer, value in enumerate(found)]
    band += [at(layer, _ends(value)[0]) for layer, value in reversed(list(enumerate(found)))]
    line = " ".join(at(layer, value.value) for layer, value in enumerate(found))
    points = [at(layer, found[layer].value).split(",") for layer in best_layers(card, measure)]
    body = [
        *_rulers(low, span),
        *(_text(float(at(layer, low).split(",")[0]), HEIGHT - BOTTOM + 16, str(layer)) for layer in _ticks(len(found))),
        f'<polygon points="{" ".join(band)}" fill="{BAND}"/>',
        f'<polyline points="{line}" fill="none" stroke="{INK}" stroke-width="2"/>',
        *(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{MARK}"/>' for x, y in points),
        _text(WIDTH / 2, HEIGHT - 8, "layer (0 is at the input)"),
    ]
    return _picture(f"{MEASURES[measure].title} of each layer, with 95 % intervals; the best ones marked", WIDTH, HEIGHT, body)


def coupling_svg(card: Json) -> str:
    """The coupling matrix `ρ: [L, L]` as shades: red towards 1, blue towards −1, white at 0."""
    rows: Sequence[Sequence[float]] = card["coupling"]
    depth, cells = len(rows), dict[int, list[str]]()
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            cells.setdefault(round(max(-1.0, min(1.0, value)) * LEVELS), []).append(f"M{x} {y}h1v1h-1z")
    shades = (f'<path d="{"".join(found)}" fill="{_shade(level / LEVELS)}"/>' for level, found in sorted(cells.items()))
    step, offset = SIDE / depth, 45
    body = [
        f'<g transform="translate({offset} {TOP}) scale({step:.5f})" shape-rendering="crispEdges">{"".join(shades)}</g>',
        *(_text(offset + step * (layer + 0.5), TOP + SIDE + 16, str(layer)) for layer in _ticks(depth)),
        *(_text(offset - 6, TOP + step * (layer + 0.5) + 4, str(layer), "end") for layer in _ticks(depth)),
        *(
            f'<rect x="{offset + SIDE + 15}" y="{TOP + SIDE * (LEVELS - level) / (2 * LEVELS + 1):.1f}" width="14" '
            f'height="{SIDE / (2 * LEVELS + 1) + 0.5:.1f}" fill="{_shade(level / LEVELS)}"/>'
            for level in range(-LEVELS, LEVELS + 1)
        ),
        *(_text(offset + SIDE + 34, TOP + y, words, "start") for y, words in ((10, "1"), (SIDE / 2 + 4, "0"), (SIDE, "−1"))),
    ]
    return _picture("Coupling of the layers: how far one can do another's work", offset + SIDE + 60, TOP + SIDE + 30, body)


def _picture(title: str, width: float, height: float, body: Sequence[str]) -> str:
    named = html.escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="sans-serif" font-size="12"><title>{named}</title><rect width="100%" height="100%" fill="#ffffff"/>'
        f"{_text(width / 2, 22, title, size=14)}{''.join(body)}</svg>\n"
    )


def _text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#333333">{html.escape(words)}</text>'


def _rulers(low: float, span: float) -> list[str]:
    """Four lines across the picture with the values they stand for."""
    lines = []
    for part in range(5):
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part / 4
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{GRID}"/>')
        lines.append(_text(LEFT - 8, y + 4, short(low + span * part / 4), "end"))
    return lines


def _ticks(depth: int) -> range:
    """Layers that are numbered: at most some fifteen."""
    return range(0, depth, max(1, -(-depth // 15)))


def _ends(value: Estimate) -> tuple[float, float]:
    low, high = value.low, value.high
    return (value.value if low is None else low), (value.value if high is None else high)


def _shade(value: float) -> str:
    """A colour for −1 to 1, through white.

    >>> _shade(0.0), _shade(1.0)
    ('#ffffff', '#b2182b')
    """
    end = (178, 24, 43) if value > 0 else (33, 102, 172)
    return "#" + "".join(f"{round(255 + (channel - 255) * abs(value)):02x}" for channel in end)
