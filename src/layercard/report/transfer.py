"""A comparison of cards (`layercard transfer`) as text for a terminal."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercard.card.numbers import Json, short
from layercard.report.frames import MEASURES
from layercard.report.terminal import pairs

_VERDICTS = {"reuse the card": "bold green", "profile again": "bold red", "not enough evidence": "bold yellow"}
_HEAT = ((0.9, "black on green"), (0.7, "green"), (0.5, "yellow"), (-1.0, "red"))
"""Styles of rank correlations, from the highest down."""


def transfer_view(result: Json) -> RenderableType:
    """What was compared, one pair in detail or several as matrices, and the verdicts."""
    many = len(result["cards"]) > 2
    parts: list[RenderableType] = [_header(result), Text("")]
    if many:
        parts += [_rank_matrix(result), Text(""), _lost_matrix(result), Text("")]
    else:
        parts += [_measures(result["pairs"][0]), Text(""), _details(result["pairs"][0])]
    parts += [_verdict(pair, named=many) for pair in result["pairs"]]
    return Group(*parts)


def _header(result: Json) -> Table:
    model = result["model"]
    rows = {"Model": f"{model['name']} · {model['layers']} layers"}
    for card in result["cards"]:
        data = card["data"]
        stable = card["stability"].get("gain_estimate")
        halves = "" if stable is None else f" · its halves agree with Spearman {stable:.2f}"
        rows[card["name"]] = f"{data['source']} · {data['records']:,} records{halves}"
    return pairs(rows)


def _measures(pair: Json) -> Table:
    """One row a measure; layers next to each other are alike, so the p value for independent layers is there to be distrusted."""
    table = _table("Measure", "Spearman", "95 % interval", "p", "p if layers\nwere independent")
    for key, found in pair["measures"].items():
        title = MEASURES[key].title if key in MEASURES else key
        value = Text(signed(found["value"]), style=_style(found["value"]))
        table.add_row(title, value, f"{signed(found['low'])} to {signed(found['high'])}", f"{found['p']:.3f}", _p(found["p_plain"]))
    return table


def _details(pair: Json) -> Table:
    top = pair["top"]
    which = f": {' '.join(map(str, top['layers']))}" if top["layers"] else ""
    rows = {f"Best {top['k']} layers": f"{top['shared']} shared{which} (by chance {top['expected']:.1f})"}
    for swap in pair["swaps"]:
        lost = swap["lost"]
        rows[f"{swap['source']} → {swap['target']}"] = (
            f"layers {' '.join(map(str, swap['layers']))} keep {swap['kept']:.1f} % of all layers' performance, "
            f"its own {' '.join(map(str, swap['own']))} {swap['kept_own']:.1f} %: "
            f"{signed(lost['value'], 1)} points lost ({signed(lost['low'], 1)} to {signed(lost['high'], 1)})"
        )
    return pairs(rows)


def _rank_matrix(result: Json) -> Table:
    title = MEASURES[result["measure"]].title if result["measure"] in MEASURES else result["measure"]
    return _matrix(result, f"Spearman: {title.lower()}", result["matrix"], lambda value: Text(signed(value), style=_style(value)))


def _lost_matrix(result: Json) -> Table:
    def cell(value: float) -> Text:
        return Text(signed(value, 1), style="red" if value > 2 else "yellow" if value > 1 else "green")

    return _matrix(result, "Points lost with layers from ↓ on →", result["lost"], cell)


def _matrix(result: Json, corner: str, values: Sequence[Sequence[float]], cell: Callable[[float], Text]) -> Table:
    names = [card["name"] for card in result["cards"]]
    table = _table(corner, *names)
    for at, (name, row) in enumerate(zip(names, values, strict=True)):
        table.add_row(name, *(Text("·", style="dim") if other == at else cell(value) for other, value in enumerate(row)))
    return table


def _verdict(pair: Json, *, named: bool) -> Text:
    word, reason = pair["verdict"]["word"], pair["verdict"]["reason"]
    name = f"{pair['a']}, {pair['b']}: " if named else "Verdict: "
    return Text.assemble((name, "bold"), (word, _VERDICTS.get(word, "bold")), f": {reason}")


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _style(rho: float) -> str:
    return next((style for bound, style in _HEAT if rho >= bound), "red")


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else short(value)


def signed(value: float, digits: int = 2) -> str:
    """A number with a real minus sign, and none on zero.

    >>> signed(-0.25), signed(-0.001), signed(1.25, 1)
    ('−0.25', '0.00', '1.2')
    """
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")
