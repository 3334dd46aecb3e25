"""Cards, placements and results as text for a terminal: rich tables that stay readable at 80 columns and in a pipe.

What files say is put into `Text`, which is shown as it is and never read as markup.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercard.card.card import LayerCard
from layercard.card.numbers import PREDICTED, Json, interval, listed, percent, predicted_rows, reasons_apart, short, stability_words
from layercard.cost.model import CostModel
from layercard.records import Estimate
from layercard.report.roi import RATIOS, SHOWN, Roi
from layercard.report.words import MEASURES, amount, bar_fractions, counted, duration, seconds, signed, size, title_of
from layercard.selection.placement import Placement
from layercard.selection.strategies import strategy_layers
from layercard.trials.records import Comparison

if TYPE_CHECKING:
    from layercard.cost.training import TrainingPlan

MIB = 2**20
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_VERDICTS = {"reuse the card": "bold green", "profile again": "bold red", "not enough evidence": "bold yellow"}
_HEAT = ((0.9, "black on green"), (0.7, "green"), (0.5, "yellow"), (-1.0, "red"))
"""Styles of rank correlations, from the highest down."""


def pairs(rows: Mapping[str, str]) -> Table:
    """Names and values under each other, without a frame."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _table(*titles: str, text: Collection[str] = (), dense: bool = False, title: str | None = None) -> Table:
    """An empty table whose columns are numbers but for those of `text`, else the first; a `dense` one is closer set."""
    options: dict[str, Any] = {"padding": (0, 1, 0, 0)} if dense else {}
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, **options)
    for name in titles:
        table.add_column(name, justify="left" if name in (text or titles[:1]) else "right", overflow="fold")
    return table


# ---- a card


class _Column(NamedTuple):
    """A measure's place in the table of a card, with the widths of its bar or of the strip with its interval."""

    key: str
    title: str
    bar: int = 0
    strip: int = 0


# Of two columns the one named first survives a narrow terminal.
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


def bar(fraction: float, width: int, *, ascii_only: bool = False) -> str:
    """A bar of `width` characters, filled to `fraction` in steps of an eighth.

    >>> bar(0.5, 4), bar(1.0, 2), bar(0.5, 4, ascii_only=True)
    ('██  ', '██', '##  ')
    """
    if ascii_only:
        return ("#" * round(fraction * width)).ljust(width)
    full, rest = divmod(round(max(0.0, min(1.0, fraction)) * width * 8), 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def strip(estimate: Estimate, bounds: tuple[float, float], width: int, *, ascii_only: bool = False) -> str:
    """A number and its interval on an axis from `bounds[0]` to `bounds[1]`, `width` characters wide.

    >>> strip(Estimate(value=5.0, low=2.0, high=7.0), (0.0, 10.0), 11)
    '  ───●──   '
    """
    bottom, top = bounds
    line, dot = ("-", "o") if ascii_only else ("─", "●")

    def place(value: float | None) -> int:
        point = estimate.value if value is None else value
        return round((point - bottom) / (top - bottom) * (width - 1)) if top > bottom else width // 2

    low, middle, high = place(estimate.low), place(estimate.value), place(estimate.high)
    return "".join(dot if position == middle else line if low <= position <= high else " " for position in range(width))


def card_view(card: LayerCard, console: Console) -> RenderableType:
    """The whole card: what it is of, one row a layer, warnings in words."""
    model, data, settings = card.model, card.data, card.settings
    cut = f", {data.truncated} cut" if data.truncated else ""
    tokens = f"{data.tokens:,} tokens, {data.labelled_tokens:,} labelled"
    ridge = Estimate.read(settings.get("ridge"))
    made = f"rank {settings.get('rank')} · ridge {short(ridge.value) if ridge else settings.get('ridge')}"
    header = {
        "Layer Card": f"{model.name} · {model.layers} layers · weights {model.fingerprint[:12]}",
        "Data": f"{data.source} · {data.records:,} records{cut} · {tokens}",
        "Made with": f"{made} · {settings.get('dtype')} on {settings.get('device')} · seed {settings.get('seed')}"
        + (" · cross-fitted" if card.cross_fitted else ""),
        "Ranking": stability_words(card.stability),
    }
    warnings = [Text.assemble(("! ", "bold yellow"), warning) for warning in card.warnings]
    advice = Text.assemble(("▲", "bold green"), (" best single layers; a set of layers should spread: layercard select", "dim"))
    return Group(pairs(header), layer_table(card, console), *warnings, advice)


def layer_table(card: LayerCard, console: Console) -> Table:
    """One row a layer, with as many measures as the console is wide."""
    ascii_only, used = console.options.ascii_only, 7
    columns: list[_Column] = []
    for column in _COLUMNS:
        content = 7 + (column.bar + 1 if column.bar else 0) + (13 + column.strip if column.strip else 0)
        width = 2 + max(content, len(column.title))  # two spaces before it
        if not any(card.profile(column.key)):
            continue
        if columns and used + width > console.width:
            break
        columns.append(column)
        used += width
    table = Table(box=box.ASCII if ascii_only else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("Layer", justify="right", no_wrap=True)
    cells: list[list[Text]] = [[] for _ in card.layers]
    for column in columns:
        table.add_column(f"{column.title:>7}", no_wrap=True, justify="left" if column.bar or column.strip else "right")
        values = card.profile(column.key)
        ends = [end for value in values if value for end in (value.value, value.low, value.high) if end is not None]
        for row, value, fraction in zip(cells, values, bar_fractions(values, wide=MEASURES[column.key].wide), strict=True):
            text = Text("      -", style="dim") if value is None else Text(f"{short(value.value):>7}")
            if value is not None and column.bar:
                text.append(" " + bar(fraction or 0.0, column.bar, ascii_only=ascii_only), style="not bold cyan")
            if value is not None and column.strip:
                text.append(f" {interval(value):<11} ", style="not bold dim")
                text.append(strip(value, (min(ends), max(ends)), column.strip, ascii_only=ascii_only), style="not bold cyan")
            row.append(text)
    best = card.best_layers()
    for layer, row in enumerate(cells):
        mark = Text.assemble(("^ " if ascii_only else "▲ ") if layer in best else "", f"{layer:>2}")
        table.add_row(mark, *row, style="bold green" if layer in best else None)
    return table


# ---- placements, fronts and comparisons


def placement_view(placement: Placement) -> RenderableType:
    """A placement: its layers on the depth of the model, what is predicted, and why each layer was taken."""
    depth, layers = int(placement.model["layers"]), placement.layers
    rows = {
        "Placement": f"{len(layers)} of {depth} layers of {placement.model['name']}, chosen for {placement.objective}",
        "Layers": " ".join(map(str, layers)),
        "Depth": "".join("■" if layer in layers else "·" for layer in range(depth)) + "  input left, output right",
    }
    common, special = reasons_apart(placement.reasons)
    rows |= predicted_rows(placement.predicted) | ({"Why": common} if common else {})
    table = _table("Layer", "Why", text=["Why"])
    for layer, reason in special.items():
        table.add_row(layer, Text(reason))
    return Group(pairs(rows), table) if special else pairs(rows)


def front_view(front: Any) -> RenderableType:
    """A `Front`: each front and the plain placements, one row a placement."""
    titles = {"time": "step time", "memory": "peak memory"}
    named = {f"Least {titles[name]} for each performance kept": points for name, points in front.fronts.items()}
    tables = []
    for title, points in [*named.items(), ("Plain placements", front.baselines)]:
        names = ["Name"] * (points is front.baselines)
        table = _table(*names, "Keeps", "Time", "Memory", "Layers", "Which", text=("Name", "Which"), title=title)
        for point in points:
            performance = Estimate.read(point["performance_kept"])
            shares = [f"{100 * point[key]['share']:.0f}%" for key in ("step_time", "peak_memory")]
            cells = ["–" if performance is None else percent(performance), *shares, str(len(point["layers"])), listed(point["layers"], " ")]
            table.add_row(*(Text(cell) for cell in ([str(point["name"])] if names else []) + cells))
        tables.append(table)
    source = {"shapes": "estimated from shapes alone", "measured": "modelled from what was measured"}.get(front.cost_source, "modelled")
    note = f"In % of all layers. Performance is {PREDICTED}; costs are {source}."
    return Group(*tables, Text(note, style="dim"))


def comparison_table(comparison: Comparison) -> Table:
    """One row a placement: what it keeps of the performance of all layers, and what it costs."""
    columns = {
        "Loss reduction": ("loss_reduction", 1),
        "Kept %": ("performance_kept", 1),
        "Train s": ("train_seconds", 1),
        "Time %": ("time_share", 1),
        "Peak MiB": ("peak_memory_bytes", MIB),
        "Params": ("trainable_parameters", 0),
        "File MiB": ("adapter_bytes", MIB),
    }
    table = _table("Placement", "Layers", *(name.replace(" ", "\n") for name in columns), dense=True)
    for row in comparison.rows:
        cells = [row.name, str(len(row.layers))]
        for key, scale in columns.values():
            value = Estimate.read(getattr(row, key))
            cells.append("–" if value is None else short(value.value / scale) if scale else f"{int(value.value):,}")
        table.add_row(*map(Text, cells))
    return table


def transfer_view(result: Any) -> RenderableType:
    """A `Transfer`: what was compared, one pair in detail or several as matrices, and the verdicts."""
    header = {"Model": f"{result.model['name']} · {result.model['layers']} layers"}
    for card in result.cards:
        stable = card["stability"].get("gain_estimate")
        halves = "" if stable is None else f" · its halves agree with Spearman {stable:.2f}"
        header[card["name"]] = f"{card['data']['source']} · {card['data']['records']:,} records{halves}"
    several = len(result.cards) > 2
    if several:
        names, title = [card["name"] for card in result.cards], title_of(result.measure).lower()
        body: list[RenderableType] = [
            _matrix(f"Spearman: {title}", names, result.matrix, _correlation),
            Text(""),
            _matrix("Points lost with layers from ↓ on →", names, result.lost, _points_lost),
            Text(""),
        ]
    else:
        body = _pair_view(result.pairs[0])
    verdicts = []
    for pair in result.pairs:
        name, word = f"{pair.a}, {pair.b}: " if several else "Verdict: ", pair.verdict.word
        verdicts.append(Text.assemble((name, "bold"), (word, _VERDICTS.get(word, "bold")), f": {pair.verdict.reason}"))
    return Group(pairs(header), Text(""), *body, *verdicts)


def _pair_view(pair: Any) -> list[RenderableType]:
    # Layers next to each other are alike, so the p value for independent layers is there to be distrusted.
    table = _table("Measure", "Spearman", "95 % interval", "p", "p if layers\nwere independent", dense=True)
    for key, agreement in pair.measures.items():
        between = f"{signed(agreement.low)} to {signed(agreement.high)}"
        plain = f"{agreement.p_plain:.3f}" if agreement.p_plain >= 0.001 else short(agreement.p_plain)
        table.add_row(title_of(key), _correlation(agreement.value), between, f"{agreement.p:.3f}", plain)
    top = pair.top
    which = f": {' '.join(map(str, top.layers))}" if top.layers else ""
    rows = {f"Best {top.k} layers": f"{top.shared} shared{which} (by chance {top.expected:.1f})"}
    for swap in pair.swaps:
        lost = swap.lost
        rows[f"{swap.source} → {swap.target}"] = (
            f"layers {' '.join(map(str, swap.layers))} keep {swap.kept:.1f} % of all layers' performance, "
            f"its own {' '.join(map(str, swap.own))} {swap.kept_own:.1f} %: "
            f"{signed(lost.value, 1)} points lost ({signed(lost.low, 1)} to {signed(lost.high, 1)})"
        )
    return [table, Text(""), pairs(rows)]


def _correlation(value: float) -> Text:
    return Text(signed(value), style=next((style for bound, style in _HEAT if value >= bound), "red"))


def _points_lost(value: float) -> Text:
    return Text(signed(value, 1), style="red" if value > 2 else "yellow" if value > 1 else "green")


def _matrix(corner: str, names: Sequence[str], values: Sequence[Sequence[float]], cell: Callable[[float], Text]) -> Table:
    table = _table(corner, *names, dense=True)
    for row, (name, cells) in enumerate(zip(names, values, strict=True)):
        table.add_row(name, *(Text("·", style="dim") if column == row else cell(value) for column, value in enumerate(cells)))
    return table


# ---- cost, latency and money


def cost_view(cost: CostModel, k: int = 5) -> RenderableType:
    """What was measured, the parts of a step, and all layers against the fixed strategies with k layers."""
    source = {"measured": "measured", "rates": "estimated from FLOPs and bytes", "shapes": "relative, from shapes alone"}[cost.source]
    device = f": {cost.device}" if cost.device else ""
    threads = f", {counted(cost.threads, 'thread')}" if cost.threads else ""
    header = (
        f"{cost.model or 'model'}: {len(cost.layers)} layers, {cost.dtype}, rank {cost.rank}; {cost.batch_size} records of {cost.tokens} "
        f"tokens, {cost.labelled_tokens} labelled\n{source}{device}{threads}"
    )
    parts = _table("Part of a step", "Forward", "Backward", "Adapter", "Kept", "Kept for adapter")
    parts.add_row("embedding", seconds(cost.embedding_seconds, cost), "", "", size(cost.shared_bytes), "")
    summaries: dict[str, Callable[[list[float]], float]] = {
        "layer, mean": lambda values: sum(values) / len(values),
        "lowest": min,
        "highest": max,
    }
    for title, summary in summaries.items():
        times = ("forward_seconds", "backward_seconds", "adapter_seconds")
        sizes = ("saved_bytes", "adapter_saved_bytes")
        row = [seconds(summary([getattr(layer, name) for layer in cost.layers]), cost) for name in times]
        parts.add_row(title, *row, *(size(summary([getattr(layer, name) for layer in cost.layers])) for name in sizes))
    head = seconds(cost.head_forward_seconds, cost), seconds(cost.head_backward_seconds, cost)
    parts.add_row("head and loss", *head, "", size(cost.head_bytes), "")
    parts.add_row("rest of the step", "", "", seconds(cost.overhead_seconds, cost), "", "")

    placements, depth = _table("Placement", "Step", "% of all", "Peak memory", "% of all", "Adapter", "Added per token"), len(cost.layers)
    for name in ("all", "first", "middle", "last", "uniform"):
        layers = list(range(depth)) if name == "all" else strategy_layers(name, depth, min(k, depth))
        time, memory = cost.step_time(layers), cost.peak_memory(layers)
        placements.add_row(
            name if name == "all" else f"{name} {len(layers)}",
            seconds(time, cost),
            f"{100 * time / cost.step_time(range(depth)):.0f}",
            size(memory),
            f"{100 * memory / cost.peak_memory(range(depth)):.0f}",
            size(cost.adapter_bytes(layers)),
            seconds(cost.inference_latency(layers), cost),
        )
    return Group(Text(header), Text(), parts, Text(), placements)


def explain_view(cost: CostModel, layers: Sequence[int], padding: float | None = None) -> RenderableType:
    """Where the time of a training step goes with adapters in `layers`, and what makes each part smaller.

    `padding` is the share of the batch's positions that hold no token; `None` where that is not known.
    """
    parts, lowest, depth = cost.step_parts(layers), min(layers), len(cost.layers)
    total = sum(parts.values())
    above, below = (
        f"layer {first}" if first == last else f"layers {first}–{last}" for first, last in ((lowest, depth - 1), (0, lowest - 1))
    )
    rows = {
        "embedding": ("embedding", ""),
        "forward below": (f"forward, {below}", "computed once a record, by the prefix cache (from the second epoch on)"),
        "forward above": (f"forward, {above}", "only fewer tokens make it smaller: no padding, shorter records"),
        "backward above": (f"backward, {above}", "a higher lowest layer: backward stops there"),
        "adapters": (f"adapters, {counted(len(set(layers)), 'layer')}", "fewer layers or modules; one function for module and adapter"),
        "head and loss": ("head and loss", "computed where there is a label, and nowhere else"),
        "update and rest": ("update and the rest", "larger batches"),
    }
    table = _table("Part of a step", "Time", "%", "What makes it smaller", text=("Part of a step", "What makes it smaller"))
    for name, value in parts.items():
        if value > 0:
            title, remedy = rows[name]
            table.add_row(title, seconds(value, cost), f"{100 * value / total:.0f}", remedy)
    table.add_row("all", seconds(total, cost), "100", "")
    lines = [
        f"Adapters in {counted(len(set(layers)), 'layer')} of {depth}, the lowest is {lowest}. Training as stock PEFT does it.",
        "LoRA spares the gradients of frozen weights, not the forward pass and not the backward pass above the lowest adapter.",
    ]
    if padding:
        lines.append(f"{padding:.0%} of all positions are padding, which every layer computes too; layercard train leaves it out.")
    every = cost.step_time(range(depth))
    if total < every:
        lines.append(f"With adapters in all layers a step takes {seconds(every, cost)}, {every / total:.1f} times as long.")
    return Group(Text("\n".join(lines)), Text(), table)


def plan_view(plan: "TrainingPlan") -> RenderableType:
    """The forecasts of a plan, one row a placement; what it takes when it is streamed stands beside it."""
    work = plan.workload
    header = (
        f"{plan.model.get('name') or 'model'}: {work.steps:,} steps of {work.tokens:,.0f} tokens ({work.epochs:g} "
        f"epoch{'' if work.epochs == 1 else 's'} over {work.records:,} records), {counted(work.evaluations, 'evaluation')}\n"
        f"{'measured' if plan.source == 'measured' else 'estimated'} on {plan.device}; {size(plan.memory_bytes)} of memory"
    )
    streamed = {(row.layers, row.modules): row for row in plan.rows if row.stream}
    priced = ["Price"] if plan.price_per_hour is not None else []
    table = _table("Training", "Step", "Later", "In all", *priced, "Adds", "In memory", "Streamed", "Fits", dense=True)
    for row in plan.rows:
        if row.stream:
            continue
        other, price = streamed.get((row.layers, row.modules)) if row.fast else None, plan.price(row)
        fits = "yes" if plan.fits(row) else "streamed" if other is not None and plan.fits(other) else "no"
        table.add_row(
            Text(row.name),
            f"{row.first_step_seconds:.3g} s",
            f"{row.later_step_seconds:.3g} s" if row.later_step_seconds < row.first_step_seconds else "",
            duration(row.seconds),
            *([] if price is None else [f"{price:.2f}"]),
            size(row.memory_bytes),
            size(row.resident_bytes),
            "" if other is None else size(other.resident_bytes),
            Text(fits, {"yes": "green", "no": "red"}.get(fits, "yellow")),
        )
    remarks = [
        "Step: on new records; Later: in later epochs. Adds: above the frozen model. Streamed: with --stream, weights read from disk"
    ]
    if plan.margin is not None:
        remarks.append(f"times are predicted, not measured: they may be off by a factor of {plan.margin:g} either way (docs/cost.md)")
    return Group(Text(header), Text(), table, *(Text(remark) for remark in (*remarks, *plan.notes)))


def latency_view(result: Json) -> RenderableType:
    """A latency measurement: one row a variant, times with their ratio to the base model, memory."""
    where = f"{result['device']}" + (f", {result['threads']} threads" if result["threads"] else "")
    asked = f"{result['prompt_tokens']} tokens, then {result['new_tokens']} new ones · {result['batch_size']} at once"
    head = {
        "Latency": f"{result['model']['name']} · {result['model']['layers']} layers, {result['dtype']} · {where}",
        "Prompt": f"{asked} · {result['repeats']} rounds, variants in turn",
    }
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Variant", overflow="fold")
    several = result["repeats"] > 1
    times_base = "× base\n(range)" if several else "× base"
    for title in ("First\ntoken ms", times_base, "Tokens/s", times_base, "Memory\nMiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result["variants"]:
        base = row["kind"] == "base"
        ratios = [{"value": 1}] * 2 if base else [row["first_token_ratio"], row["tokens_per_second_ratio"]]
        ranges = [f" ({ratio['low']:.2f}–{ratio['high']:.2f})" if several and not base else "" for ratio in ratios]
        first, speed = ("1" if base else f"{ratio['value']:.2f}{ends}" for ratio, ends in zip(ratios, ranges, strict=True))
        memory = f"{(row['weights_bytes'] + row['peak_bytes']) / MIB:,.1f}"
        times = f"{1e3 * row['first_token_seconds']['value']:.1f}", f"{row['tokens_per_second']['value']:.1f}"
        table.add_row(Text(row["name"]), times[0], first, times[1], speed, memory)
    timed = f"Medians of {result['repeats']} rounds, with the range" if several else "One round, so without a range"
    note = f"{timed}; ratios to the base model in the same round; memory: weights and the peak beside them."
    return Group(pairs(head), table, Text(note, style="dim"))


def roi_view(saved: Roi) -> RenderableType:
    """What is saved, the ratios that it follows from, and what is assumed."""
    assumed = saved.with_assumptions
    first = f"{saved.ratios.placement} against all layers"
    table = _table(first, "Low", "Mid", "High", *(["Assumed"] if assumed else []), "Unit", text=(first, "Unit"))
    for formula in SHOWN:
        ends = saved.results[formula.name]
        cells = [amount(ends.low), amount(ends.mid), amount(ends.high), *([amount(assumed[formula.name].mid)] if assumed else [])]
        table.add_row(formula.title, *cells, Text(formula.unit.replace("money", saved.inputs.currency)))
    rows = {}
    for name in RATIOS:
        ratio = getattr(saved.ratios, name)
        between = f" ({ratio.low:.2f}–{ratio.high:.2f})" if ratio.low < ratio.high else ""
        rows[name.replace("_", " ").capitalize()] = f"{ratio.mid:.2f}{between} of all layers: {ratio.source}"
    notes = [Text.assemble(("! ", "bold yellow"), text) for text in saved.assumptions]
    return Group(table, Text(), pairs(rows), Text(), *notes)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Columns and rows of a result as they are, numbers to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        numeric = all(isinstance(row[place], int | float | None) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(Text("–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)) for value in row))
    return table
