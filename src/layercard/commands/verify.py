"""`layercard verify`: whether an adapter or configuration adapts what it was meant to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out
from layercard.errors import ModelError, PlacementError
from layercard.files import read_json

if TYPE_CHECKING:
    from layercard.adapters.verify import Verification
    from layercard.selection.placement import Placement


def verify(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER_OR_CONFIG",
            help="An adapter's folder, a configuration of PEFT's as JSON, or YAML or JSON of axolotl, LLaMA-Factory, ms-swift or TRL.",
        ),
    ],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The base model: a hub id, a local folder or a config.json.")],
    placement: Annotated[
        Path | None,
        typer.Option("--placement", metavar="FILE", help="The placement to follow; the one in the adapter's folder when not given."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="LIST", help="The layers to adapt, such as 12-16,20; the configuration's own when not given."),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Read the model's weights too, and compare their fingerprint with the placement's.")
    ] = False,
    dtype: opt.Dtype = "float32",
    as_json: opt.AsJson = False,
) -> None:
    """Check where an adapter lands: what it asks for, what PEFT adapts, what its weights hold, and whether they have an effect.

    The model is built without weights, so the check takes seconds. Exits with 2 where something is not as planned.
    """
    if placement is not None and layers is not None:
        raise PlacementError("both --placement and --layers are given; a placement names its layers, so give one of them")
    wanted = None if layers is None else parse_layers(layers)
    from layercard.adapters.verify import own_placement
    from layercard.selection.placement import Placement

    chosen = Placement.load(placement) if placement is not None else None if layers is not None else own_placement(adapter)
    with Display() as display:
        fingerprint = _fingerprint(adapter, model, chosen, weights, dtype, display)
        found = _verified(adapter, model, chosen, wanted, fingerprint)
    if as_json:
        emit_json(found.to_json())
    else:
        out().print(_view(found.to_json()))
    found.check()


def parse_layers(text: str) -> list[int]:
    """Layer indices from a list of numbers and stretches.

    >>> parse_layers("12-14, 20")
    [12, 13, 14, 20]
    """
    found: list[int] = []
    for part in (each.strip() for each in text.split(",") if each.strip()):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or part.endswith("-"):
            raise PlacementError(f"--layers has {part!r}; write numbers and stretches such as 12-16,20")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise PlacementError(f"--layers is {text!r}, which names no layer; write numbers and stretches such as 12-16,20")
    return sorted(set(found))


def _verified(adapter: Path, model: str, chosen: "Placement | None", wanted: list[int] | None, fingerprint: str | None) -> "Verification":
    from layercard.adapters.verify import verify_adapter, verify_config
    from layercard.export.read import peft_config
    from layercard.models.skeleton import skeleton

    empty = skeleton(model)
    if _is_pefts(adapter):
        return verify_adapter(empty, adapter, placement=chosen, layers=wanted, name=model, fingerprint=fingerprint)
    return verify_config(empty, peft_config(adapter, empty), placement=chosen, layers=wanted, name=model, source=str(adapter))


def _is_pefts(path: Path) -> bool:
    """Whether a path is an adapter or a configuration of PEFT's; any other file should be a trainer's configuration."""
    if not path.is_file():
        return True
    return path.suffix.lower() == ".json" and "peft_type" in read_json(path, PlacementError, "configuration")


def _fingerprint(adapter: Path, model: str, chosen: "Placement | None", weights: bool, dtype: str, display: Display) -> str | None:
    """The model's fingerprint, where it is asked for, or where the names leave open whether it is the adapter's base model."""
    from layercard.adapters.files import read_adapter_config
    from layercard.adapters.verify import base_words
    from layercard.models.load import load_model

    if weights and chosen is None:
        raise PlacementError("--weights compares with a placement's fingerprint, and there is no placement; give --placement FILE")
    doubtful = _is_pefts(adapter) and base_words(read_adapter_config(adapter), chosen, model, None)
    if chosen is None or not (weights or doubtful):
        return None
    try:
        return load_model(model, dtype=dtype, device="cpu", progress=display).fingerprint
    except ModelError:
        if weights:
            raise
        return None  # the names alone tell then


def _view(found: dict[str, Any]) -> Any:
    from layercard.card.numbers import listed
    from layercard.report.terminal import pairs

    number = f"{len(found['adapted'])} modules and parameters"
    rows = {
        "Adapter": f"{found['source']} · {found['method']}",
        "Model": f"{found['model']['name']} · {found['model']['layers']} layers",
        "Asks for": "; ".join(f"{name} {_short(value)}" for name, value in found["asked"].items()) or "nothing by name",
    }
    if found["planned_layers"] is not None:
        rows["Planned"] = f"layers {listed(found['planned_layers'])}"
    rows["Adapts"] = f"{number}, in layers {listed(found['adapted_layers']) or 'none'}"
    if found["saved"] is not None:
        rows["Weights"] = f"of {len(found['saved'])} modules"
    if found["notes"]:
        rows["Notes"] = "\n".join(found["notes"])
    rows["Verdict"] = "\n".join(f"✗ {each}" for each in found["differences"]) or "as planned"
    return pairs(rows)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 70 else f"{text[:60]}… ({len(value)} in all)"
