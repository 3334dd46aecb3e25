"""`layercard verify`: whether an adapter or configuration adapts what it was meant to."""

import math
import re
from pathlib import Path
from typing import Any

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.errors import ModelError, PlacementError
from layercard.files import read_json, shown
from layercard.settings import LoadSettings, setting


def verify(
    adapter: Path = setting(
        ...,
        "An adapter's folder, a configuration of PEFT's as JSON, or YAML or JSON of axolotl, LLaMA-Factory, ms-swift or TRL.",
        argument=True,
        metavar="ADAPTER_OR_CONFIG",
    ),
    model: str = setting(..., "The base model: a hub id, a local folder or a config.json.", metavar="MODEL"),
    placement: Path | None = setting(None, "The placement to follow; the one in the adapter's folder when not given."),
    layers: str | None = setting(None, "The layers to adapt, such as 12-16,20; the configuration's own when not given.", metavar="LIST"),
    serve: str | None = setting(None, "Say, too, what this server makes of the adapter: vllm.", choices=("vllm",), metavar="SERVER"),
    weights: bool = setting(False, "Read the model's weights too, and compare their fingerprint with the placement's."),
    dtype: str = opt.DTYPE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Check where an adapter or configuration lands in a model.

    What it asks for, what PEFT adapts, what its weights hold, and whether they have an effect. The model is built without weights, so
    the check takes seconds. Exits with 2 where something is not as planned.
    """
    if placement is not None and layers is not None:
        raise PlacementError("both --placement and --layers are given; a placement names its layers, so give one of them")
    given_layers = None if layers is None else parse_layers(layers)
    check_kind(adapter)
    from layercard.adapters.files import read_adapter, saved_placement
    from layercard.adapters.verify import base_difference, verify_adapter, verify_config
    from layercard.card.card import rounding_between
    from layercard.card.numbers import listed
    from layercard.export.read import peft_config
    from layercard.models.load import describe
    from layercard.models.skeleton import skeleton
    from layercard.report.terminal import pairs
    from layercard.selection.placement import Placement

    chosen = Placement.load(placement) if placement is not None else None if layers is not None else saved_placement(adapter)
    if weights and chosen is None:
        raise PlacementError("--weights compares with a placement's fingerprint, and there is no placement; give --placement FILE")
    # A file is an adapter's configuration if it names PEFT's type; any other file should be a trainer's configuration.
    of_peft = not adapter.is_file() or (
        adapter.suffix.lower() == ".json"
        and not {"peft_type", "lora_parameters"}.isdisjoint(read_json(adapter, PlacementError, "configuration"))
    )
    with Display() as display:
        empty = skeleton(model)
        # The fingerprint takes the weights: read them where asked, or where names leave open whether it is the adapter's base model.
        fingerprint = None
        if chosen is not None and (weights or (of_peft and base_difference(read_adapter(adapter, empty).config, chosen, model, None))):
            try:
                described = describe(opt.load(model, LoadSettings("cpu", dtype), display))
                is_same = rounding_between(chosen.model, described) < math.inf
                fingerprint = chosen.model["fingerprint"] if is_same else described["fingerprint"]
            except ModelError:
                if weights:
                    raise
        how: dict[str, Any] = {"placement": chosen, "layers": given_layers, "name": model, "serve": serve or ""}
        if of_peft:
            result = verify_adapter(empty, adapter, fingerprint=fingerprint, **how)
        else:
            result = verify_config(empty, peft_config(adapter, empty), source=str(adapter), **how)
    value = result.to_json()
    asked = [f"{name} {_short(choice)}" for name, choice in value["asked"].items()]
    rows = {
        "Adapter": f"{result.source} · {result.method}",
        "Model": f"{result.model['name']} · {result.model['layers']} layers",
        "Asks for": "; ".join(asked) or "nothing by name",
    }
    if result.planned_layers is not None:
        rows["Planned"] = f"layers {listed(result.planned_layers)}"
    rows["Adapts"] = f"{len(result.adapted)} modules and parameters, in layers {listed(result.adapted_layers) or 'none'}"
    if result.saved is not None:
        rows["Weights"] = f"of {len(result.saved)} modules"
    if result.notes:
        rows["Notes"] = "\n".join(result.notes)
    rows["Verdict"] = "\n".join(f"✗ {each}" for each in result.differences) or "as planned"
    then = ("merge", adapter, "--model", model, "-o", "merged") if adapter.is_dir() else ("cost", model, "--meta")
    show_result(value, as_json, pairs(rows), then=() if result.differences else then)
    result.check()


def check_kind(path: Path) -> None:
    """Refuse a file of layercard's own, which is neither an adapter nor a trainer's configuration."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return
    schema = str(read_json(path, PlacementError, "configuration").get("schema", ""))
    if schema.startswith("layercard"):
        raise PlacementError(f"{path} is a file of layercard ({schema}); an adapter's folder or a configuration is needed")


def parse_layers(text: str) -> list[int]:
    """Layer indices from a list of numbers and stretches.

    >>> parse_layers("12-14, 20")
    [12, 13, 14, 20]
    """
    layers: set[int] = set()
    for part in (each.strip() for each in text.split(",") if each.strip()):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise PlacementError(f"--layers has {shown(part)}; write layers and stretches of them such as 12-16,20")
        layers |= set(range(first, last + 1))
    if not layers:
        raise PlacementError(f"--layers is {text!r}, which names no layer; write numbers and stretches such as 12-16,20")
    return sorted(layers)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 70 else f"{text[:60]}… ({len(value)} in all)"
