"""A cost model as text for a terminal: what each part of a step takes, and what usual placements cost."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercard.cost.model import CostModel
from layercard.selection.strategies import strategy_layers

PLACEMENTS = ("first", "middle", "last", "uniform")
_SOURCES = {"measured": "measured", "rates": "estimated from FLOPs and bytes", "shapes": "relative, from shapes alone"}


def cost_view(cost: CostModel, k: int = 5) -> RenderableType:
    """Three parts: what was measured, the parts of a step, and all layers against the fixed strategies with k layers."""
    return Group(Text(header(cost)), Text(), parts_table(cost), Text(), placements_table(cost, k))


def header(cost: CostModel) -> str:
    """Two lines: model and batch, and what the figures come from."""
    several = f", {threads(cost.threads)}" if cost.threads else ""
    return (
        f"{cost.model or 'model'}: {len(cost.layers)} layers, {cost.dtype}, rank {cost.rank}; {cost.batch_size} records of {cost.tokens} "
        f"tokens, {cost.labelled_tokens} labelled\n{_SOURCES[cost.source]}{': ' if cost.device else ''}{cost.device}{several}"
    )


def parts_table(cost: CostModel) -> Table:
    """Time of each part of a step with all layers adapted; layers as their mean, lowest and highest."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Part of a step")
    for title in ("Forward", "Backward", "Adapter", "Kept", "Kept for adapter"):
        table.add_column(title, justify="right")
    table.add_row("embedding", seconds(cost.embedding_seconds, cost), "", "", size(cost.shared_bytes), "")
    layers = cost.layers
    names = ("forward_seconds", "backward_seconds", "adapter_seconds")
    for title, pick in (("layer, mean", _mean), ("lowest", min), ("highest", max)):
        times = (seconds(pick([getattr(layer, name) for layer in layers]), cost) for name in names)
        sizes = (size(pick([getattr(layer, name) for layer in layers])) for name in ("saved_bytes", "adapter_saved_bytes"))
        table.add_row(title, *times, *sizes)
    head = (seconds(cost.head_forward_seconds, cost), seconds(cost.head_backward_seconds, cost))
    table.add_row("head and loss", *head, "", size(cost.head_bytes), "")
    table.add_row("rest of the step", "", "", seconds(cost.overhead_seconds, cost), "", "")
    return table


def placements_table(cost: CostModel, k: int = 5) -> Table:
    """Step time, peak memory, adapter size and added latency of all layers and of the fixed strategies with k layers."""
    depth = len(cost.layers)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Placement")
    for title in ("Step", "% of all", "Peak memory", "% of all", "Adapter", "Added per token"):
        table.add_column(title, justify="right")
    every = range(depth)
    for name in ("all", *PLACEMENTS):
        layers = list(every) if name == "all" else strategy_layers(name, depth, min(k, depth))
        time, memory = cost.step_time(layers), cost.peak_memory(layers)
        table.add_row(
            name if name == "all" else f"{name} {len(layers)}",
            seconds(time, cost),
            f"{100 * time / cost.step_time(every):.0f}",
            size(memory),
            f"{100 * memory / cost.peak_memory(every):.0f}",
            size(cost.adapter_bytes(layers)),
            seconds(cost.inference_latency(layers), cost),
        )
    return table


def seconds(value: float, cost: CostModel) -> str:
    """A time with its unit, or a share of the step of all layers where nothing was measured."""
    if not cost.absolute:
        return f"{100 * value:.2f} %"
    if value >= 1 or value == 0:
        return f"{value:.2f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-4 else f"{1e6 * value:.1f} µs"


def where(cost: CostModel) -> str:
    """The device that a cost is of, with its threads where it has some."""
    return f"{cost.device or 'a device without a name'}{f', {threads(cost.threads)}' if cost.threads else ''}"


def threads(count: int) -> str:
    """A number of threads in words.

    >>> threads(1), threads(2)
    ('1 thread', '2 threads')
    """
    return f"{count} thread{'' if count == 1 else 's'}"


def size(value: float) -> str:
    """Bytes with a unit.

    >>> size(3_500_000), size(900)
    ('3.3 MiB', '0.9 KiB')
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value / 1024:.1f} KiB"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
