"""A latency measurement as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercard.report.terminal import pairs

MIB = 2**20


def latency_view(result: Mapping[str, Any]) -> RenderableType:
    """What was measured, and one row a variant: times with their ratio to the base model, memory."""
    where = f"{result['device']}" + (f", {result['threads']} threads" if result["threads"] else "")
    asked = f"{result['prompt_tokens']} tokens, then {result['new_tokens']} new ones · {result['batch_size']} at once"
    head = pairs(
        {
            "Latency": f"{result['model']['name']} · {result['model']['layers']} layers, {result['dtype']} · {where}",
            "Prompt": f"{asked} · {result['repeats']} rounds, variants in turn",
        }
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Variant", overflow="fold")
    for title in ("First\ntoken ms", "× base\n(range)", "Tokens/s", "× base\n(range)", "Memory\nMiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result["variants"]:
        base = row["kind"] == "base"
        table.add_row(
            Text(row["name"]),
            f"{1e3 * row['first_token_seconds']['value']:.1f}",
            "1" if base else _ratio(row["first_token_ratio"]),
            f"{row['tokens_per_second']['value']:.1f}",
            "1" if base else _ratio(row["tokens_per_second_ratio"]),
            f"{(row['weights_bytes'] + row['peak_bytes']) / MIB:,.1f}",
        )
    return Group(
        head, table, Text("Medians; ratios to the base model in the same round; memory: weights and the peak beside them.", style="dim")
    )


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f}–{found['high']:.2f})"
