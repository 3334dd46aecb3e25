"""Cards and comparisons as tables: the one place that knows which quantity has which title and reading.

Everything here takes the JSON value of a file, never a live model, and a quantity that was not measured is `None`, not zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercard.card.numbers import Json, interval, profile_of, short
from layercard.errors import TrainingError
from layercard.files import read_json, shown
from layercard.records import Estimate

if TYPE_CHECKING:
    import pandas

COMPARISON = "layercard-compare/1"


@dataclass(frozen=True)
class Measure:
    """One quantity of a layer.

    Attributes:
        key: Its name in the card.
        title: Its name for people.
        reading: What it is and how to read its plot, in two sentences.
        wide: Whether it spans orders of magnitude, so that plots and bars are logarithmic.
    """

    key: str
    title: str
    reading: str
    wide: bool = False


MEASURES: dict[str, Measure] = {
    measure.key: measure
    for measure in (
        Measure(
            "gain_estimate",
            "Gain estimate",
            "What steps at this depth gain, times the share of all layers' work that this layer can do. Its order counts, not its size. "
            "Higher is better; layers whose bands overlap are equally good.",
        ),
        Measure(
            "step_probe",
            "Step probe",
            "Loss reduction on held-out records when the layer's own best step is put into its weights, without training. "
            "Higher is better; a value near zero means that the step helps only on the records it was made from.",
        ),
        Measure(
            "training_probe",
            "Training probe",
            "Loss reduction on held-out records after a few training steps of this layer alone, fewer for layers that were pruned early. "
            "It is the most direct measurement of performance and the most expensive.",
        ),
        Measure(
            "centrality",
            "Centrality",
            "Sum of the layer's squared coupling to all layers, itself included: how much of the others' work it can do. "
            "High in the middle of a plateau, low for a layer that works alone.",
        ),
        Measure(
            "resnorm",
            "Resnorm",
            "Projected residual norm: the part of the loss signal that a linear adapter in this layer can reach. "
            "Large in the first layers, which are also the hardest to optimise, so it does not rank layers by itself.",
        ),
        Measure(
            "resnorm_rank",
            "Resnorm, rank r",
            "The part of resnorm that an adapter of the card's rank can reach. "
            "Far below resnorm means that a higher rank would find more to learn here.",
        ),
        Measure(
            "residual_fraction",
            "Residual fraction",
            "Resnorm squared as a share of the whole output gradient's energy. "
            "Near 1 the layer's inputs explain its residual; near 0 the signal is noise to a linear adapter.",
        ),
        Measure(
            "gradient_norm",
            "Gradient norm",
            "Norm of the loss gradient with respect to the layer's weights, what gradient-based selectors sort by. "
            "Compare its order with the gain estimate's: they often disagree.",
            wide=True,
        ),
        Measure(
            "predicted_gain",
            "Quadratic gain",
            "Loss decrease that the local quadratic model predicts for the layer alone. "
            "It flatters the last layers and misjudges the first ones, so it is shown for comparison.",
        ),
        Measure(
            "activation_energy",
            "Activation energy",
            "Mean squared norm of the inputs of the layer's adapted maps. "
            "A spike is a massive activation: a few features dwarf all others and the layer is badly conditioned.",
            wide=True,
        ),
        Measure(
            "effective_rank",
            "Effective rank",
            "Number of directions that the layer's inputs really use. "
            "Near 1 a single direction carries everything, and an adapter's rank is of little use.",
        ),
        Measure(
            "condition",
            "Condition number",
            "Largest over smallest eigenvalue of the regularised input covariance. "
            "The higher it is, the slower plain gradient descent learns in this layer.",
            wide=True,
        ),
        Measure(
            "noise_amplification",
            "Noise amplification",
            "Energy of the noise in the layer's own step, as a multiple of the step's energy. "
            "Well above 1 the step is mostly noise: more records or a smaller learning rate help.",
            wide=True,
        ),
        Measure("forward_seconds", "Forward time", "Time of the block's forward pass. Usually the same for every block."),
        Measure(
            "backward_seconds",
            "Backward time",
            "Time of the block's backward pass. A placement pays it for every block above its lowest layer, adapted or not.",
        ),
        Measure("adapter_seconds", "Adapter time", "Extra time of an adapter in this block. A placement pays it for each layer."),
        Measure(
            "saved_bytes",
            "Saved activations",
            "Memory that the block keeps for backward. A placement pays it for every block above its lowest layer.",
        ),
    )
}


def unit_of(card: Json, key: str) -> str:
    """The unit of a quantity as the card itself gives it."""
    return str((card.get("units") or {}).get(key, ""))


def measured(card: Json) -> list[Measure]:
    """The quantities that at least one layer of the card has, in the order of the catalogue."""
    return [measure for measure in MEASURES.values() if any(profile_of(card, measure.key))]


def layer_rows(card: Json) -> list[dict[str, Any]]:
    """One flat row a layer: `layer`, and for each measured quantity `key`, `key_low` and `key_high`."""
    rows: list[dict[str, Any]] = []
    for index, layer in enumerate(card["layers"]):
        row: dict[str, Any] = {"layer": index}
        for measure in measured(card):
            found = Estimate.read(layer.get(measure.key))
            row[measure.key] = found.value if found else None
            row[f"{measure.key}_low"] = found.low if found else None
            row[f"{measure.key}_high"] = found.high if found else None
        rows.append(row)
    return rows


def layer_frame(card: Json) -> "pandas.DataFrame":
    """`layer_rows` as a data frame, indexed by layer."""
    import pandas as pd

    return pd.DataFrame(layer_rows(card)).set_index("layer")


def coupling_frame(card: Json) -> "pandas.DataFrame":
    """The coupling matrix, rows and columns named by layer."""
    import pandas as pd

    frame = pd.DataFrame(card["coupling"])
    return frame.rename_axis(index="layer", columns="layer")


def bar_fractions(values: Sequence[Estimate | None], *, wide: bool = False) -> list[float | None]:
    """Lengths of bars from 0 to 1: proportional to the values, or to their logarithm where they span orders of magnitude.

    Negative values get no bar. On a logarithmic scale the smallest positive value gets a short bar, not none.
    """
    positive = [found.value for found in values if found is not None and found.value > 0]
    if not positive:
        return [None if found is None else 0.0 for found in values]
    top, bottom = max(positive), min(positive)
    if wide and top > bottom:
        span = math.log(top) - math.log(bottom)
        return [_log_fraction(found, bottom, span) for found in values]
    return [None if found is None else max(found.value, 0.0) / top for found in values]


def _log_fraction(found: Estimate | None, bottom: float, span: float) -> float | None:
    if found is None:
        return None
    return 0.1 + 0.9 * (math.log(found.value) - math.log(bottom)) / span if found.value > 0 else 0.0


def read_comparison(path: str | Path) -> dict[str, Any]:
    """The JSON value of a comparison that `layercard compare` wrote.

    Raises:
        TrainingError: The file is missing, truncated or no comparison.
    """
    value = read_json(path, TrainingError, "comparison")
    rows = value.get("rows")
    whole = isinstance(rows, list) and all(isinstance(row, dict) and "name" in row and isinstance(row.get("layers"), list) for row in rows)
    if value.get("schema") != COMPARISON or not whole or not isinstance(value.get("model"), dict):
        found = shown(value.get("schema"))
        raise TrainingError(f"{path}: schema {found} or its rows are no {COMPARISON!r}; make it with `layercard compare`")
    return value


def comparison_rows(comparison: Json) -> list[dict[str, Any]]:
    """One flat row a placement: `name`, number of `layers`, and as numbers or `None` what was reached and what it cost."""
    keys = (
        "loss_reduction",
        "performance_kept",
        "train_seconds",
        "time_share",
        "peak_memory_bytes",
        "trainable_parameters",
        "adapter_bytes",
    )
    return [
        {"name": str(row["name"]), "layers": len(row["layers"]), **{key: Estimate.read(row.get(key)) for key in keys}}
        for row in comparison["rows"]
    ]


RUN_COLUMNS = ("Placement", "Layers", "Loss reduction", "Kept %", "Train s", "Time %", "Peak MiB", "Params", "File MiB")


def run_cells(row: Json) -> list[tuple[str, str]]:
    """A row of `comparison_rows` as texts and intervals, under `RUN_COLUMNS`."""
    measures = (
        ("loss_reduction", 1),
        ("performance_kept", 1),
        ("train_seconds", 1),
        ("time_share", 1),
        ("peak_memory_bytes", 2**20),
        ("trainable_parameters", None),
        ("adapter_bytes", 2**20),
    )
    cells = [(row["name"], ""), (str(row["layers"]), "")]
    for key, scale in measures:
        found = row[key]
        if found is None:
            cells.append(("–", ""))
        elif scale is None:
            cells.append((f"{int(found.value):,}", ""))
        else:
            cells.append((short(found.value / scale), interval(found)))
    return cells
