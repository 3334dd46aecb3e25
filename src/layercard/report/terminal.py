"""A card, a placement and a comparison as text for a terminal: rich tables that stay readable at 80 columns and in a pipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercard.card.numbers import Json, best_layers, interval, predicted_rows, profile_of, short, stability_words
from layercard.records import Estimate
from layercard.report.frames import MEASURES, RUN_COLUMNS, bar_fractions, comparison_rows, run_cells

_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class _Column:
    """A quantity's place in the table; of two, the one named first survives a narrow terminal."""

    key: str
    title: str
    bar: int = 0
    strip: int = 0

    @property
    def width(self) -> int:
        """Characters that it takes, with two spaces before it."""
        content = 7 + (self.bar + 1 if self.bar else 0) + (13 + self.strip if self.strip else 0)
        return 2 + max(content, len(self.title))


_COLUMNS = (
    _Column("gain_estimate", "Gain est.", strip=13),
    _Column("resnorm", "Resnorm", bar=8),
    _Column("training_probe", "Trained"),
    _Column("step_probe", "Step probe"),
    _Column("centrality", "Central."),
    _Column("activation_energy", "Act. energy", bar=6),
    _Column("effective_rank", "Eff. rank"),
    _Column("residual_fraction", "Residual fr."),
    _Column("predicted_gain", "Quad. gain"),
    _Column("gradient_norm", "Grad. norm"),
    _Column("condition", "Condition"),
)
_FIRST_WIDTH = 7


def bar(fraction: float, width: int, *, ascii_only: bool = False) -> str:
    """A bar of `width` characters, filled to `fraction` in steps of an eighth.

    >>> bar(0.5, 4), bar(1.0, 2), bar(0.5, 4, ascii_only=True)
    ('██  ', '██', '##  ')
    """
    if ascii_only:
        return ("#" * round(fraction * width)).ljust(width)
    eighths = round(max(0.0, min(1.0, fraction)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def strip(found: Estimate, bounds: tuple[float, float], width: int, *, ascii_only: bool = False) -> str:
    """A number and its interval on an axis from `bounds[0]` to `bounds[1]`, `width` characters wide.

    >>> strip(Estimate(value=5.0, low=2.0, high=7.0), (0.0, 10.0), 11)
    '  ───●──   '
    """
    bottom, top = bounds
    line, dot = ("-", "o") if ascii_only else ("─", "●")

    def place(value: float | None) -> int:
        at = found.value if value is None else value
        return round((at - bottom) / (top - bottom) * (width - 1)) if top > bottom else width // 2

    low, middle, high = place(found.low), place(found.value), place(found.high)
    return "".join(dot if at == middle else line if low <= at <= high else " " for at in range(width))


def card_view(card: Json, console: Console) -> RenderableType:
    """The whole card: what it is of, one row a layer, warnings in words."""
    parts: list[RenderableType] = [_header(card), layer_table(card, console)]
    parts.extend(_warnings(card))
    parts.append(Text.assemble(("★", "bold green"), (" best single layers; a set of layers should spread: layercard select", "dim")))
    return Group(*parts)


def layer_table(card: Json, console: Console) -> Table:
    """One row a layer, with as many quantities as the console is wide."""
    ascii_only = console.options.ascii_only
    columns = _fitting(card, console.width)
    table = Table(box=box.ASCII if ascii_only else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("Layer", justify="right", no_wrap=True)
    cells: list[list[Text]] = [[] for _ in card["layers"]]
    for column in columns:
        values = profile_of(card, column.key)
        table.add_column(f"{column.title:>7}", no_wrap=True, justify="left" if column.bar or column.strip else "right")
        fractions = bar_fractions(values, wide=MEASURES[column.key].wide)
        bounds = _bounds(values)
        for row, found, fraction in zip(cells, values, fractions, strict=True):
            text = _value(found)
            if found is not None and column.bar:
                text.append(" " + bar(fraction or 0.0, column.bar, ascii_only=ascii_only), style="not bold cyan")
            if found is not None and column.strip:
                text.append(f" {interval(found):<11} ", style="not bold dim")
                text.append(strip(found, bounds, column.strip, ascii_only=ascii_only), style="not bold cyan")
            row.append(text)
    best = best_layers(card)
    for index in range(len(card["layers"])):
        mark = Text.assemble(("* " if ascii_only else "★ ") if index in best else "", f"{index:>2}")
        table.add_row(mark, *cells[index], style="bold green" if index in best else None)
    return table


def _fitting(card: Json, width: int) -> list[_Column]:
    taken: list[_Column] = []
    used = _FIRST_WIDTH
    for column in _COLUMNS:
        if not any(profile_of(card, column.key)):
            continue
        if taken and used + column.width > width:
            break
        taken.append(column)
        used += column.width
    return taken


def _value(found: Estimate | None) -> Text:
    return Text("      -", style="dim") if found is None else Text(f"{short(found.value):>7}")


def _bounds(values: Sequence[Estimate | None]) -> tuple[float, float]:
    """The smallest and largest end of any interval."""
    ends = [end for v in values if v is not None for end in (v.value, v.low, v.high) if end is not None]
    return (min(ends), max(ends)) if ends else (0.0, 0.0)


def _header(card: Json) -> Table:
    model, data, settings = card["model"], card["data"], card["settings"]
    cut = f", {data['truncated']} cut" if data.get("truncated") else ""
    tokens = f"{data['tokens']:,} tokens, {data['labelled_tokens']:,} labelled"
    ridge = Estimate.read(settings.get("ridge"))
    made = [
        f"rank {settings.get('rank')}",
        f"ridge {short(ridge.value) if ridge else settings.get('ridge')}",
        f"{settings.get('dtype')} on {settings.get('device')}",
        f"seed {settings.get('seed')}",
    ]
    return pairs(
        {
            "Layer Card": f"{model['name']} · {model['layers']} layers · weights {str(model['fingerprint'])[:12]}",
            "Data": f"{data['source']} · {data['records']:,} records{cut} · {tokens}",
            "Made with": " · ".join(made),
            "Ranking": stability_words(card),
        }
    )


def _warnings(card: Json) -> list[RenderableType]:
    return [Text.assemble(("! ", "bold yellow"), str(warning)) for warning in card.get("warnings") or []]


def pairs(rows: Mapping[str, str]) -> Table:
    """Names and values under each other, without a frame; values are shown as they are, never read as markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def placement_view(placement: Json) -> RenderableType:
    """A placement: its layers on the depth of the model, what is predicted, and why each layer was taken."""
    depth, layers = int(placement["model"]["layers"]), list(placement["layers"])
    rows = {
        "Placement": f"{len(layers)} of {depth} layers of {placement['model']['name']}, chosen for {placement['objective']}",
        "Layers": " ".join(map(str, layers)),
        "Depth": depth_strip(layers, depth) + "  input left, output right",
    }
    rows |= predicted_rows(placement.get("predicted") or {})
    reasons = placement.get("reasons") or {}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Layer", justify="right")
    table.add_column("Why")
    for layer in layers:
        table.add_row(str(layer), Text(str(reasons.get(str(layer), "-"))))
    return Group(pairs(rows), table)


def depth_strip(layers: Sequence[int], depth: int) -> str:
    """The chosen layers on a strip from input to output.

    >>> depth_strip([1, 3], 5)
    '·■·■·'
    """
    return "".join("■" if index in layers else "·" for index in range(depth))


def comparison_table(comparison: Json) -> Table:
    """One row a placement: what it keeps of the performance of all layers, and what it costs."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for at, name in enumerate(RUN_COLUMNS):
        table.add_column(name.replace(" ", "\n"), justify="right" if at else "left", overflow="fold")
    for row in comparison_rows(comparison):
        table.add_row(*(Text(text) for text, _ in run_cells(row)))
    return table


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Columns and rows of a result as they are, numbers to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for at, column in enumerate(columns):
        numeric = all(isinstance(row[at], int | float | None) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left", no_wrap=at == 0)
    for row in rows:
        table.add_row(*(Text("–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)) for value in row))
    return table
