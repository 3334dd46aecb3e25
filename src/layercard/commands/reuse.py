"""Cards that need not be made again: kept in a folder by the fingerprints of model and records, or found on the hub."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from layercard.card.card import LayerCard, ModelInfo
from layercard.data.load import Dataset
from layercard.errors import CardError, HubError
from layercard.files import write_json
from layercard.models.embedded import cache_root
from layercard.models.load import BaseModel, Progress, describe
from layercard.profiling.profile import step_cost
from layercard.report.hub import find, pull
from layercard.settings import ProfileSettings


@dataclass(frozen=True)
class Found:
    """What there was to reuse.

    Attributes:
        card: The card that fits, or `None`.
        source: Where it is from.
        reasons: For each card of the model that was looked at before: where it is from, and why it does not fit.
    """

    card: LayerCard | None
    source: str
    reasons: tuple[str, ...]


def card_folder(chosen: Path | None = None) -> Path:
    """Where cards are kept: the folder chosen, else `cards` in the cache folder (`LAYERCARD_CACHE`, or the platform's)."""
    return cache_root() / "cards" if chosen is None else chosen


def keep(card: LayerCard, folder: Path) -> Path:
    """Write a card where `fitting` finds it, in place of one of the same model, records and settings.

    Raises:
        OutputError: The folder cannot be written.
    """
    settings = hashlib.sha256(json.dumps(_deciding(card.settings), sort_keys=True).encode()).hexdigest()[:16]
    path = folder / card.model.fingerprint / f"{card.data.fingerprint}-{settings}.json"
    return write_json(path, card.to_json(), force=True)


def misfit(card: LayerCard, fingerprint: str, dataset: Dataset, settings: ProfileSettings) -> str:
    """Why a card cannot stand for the one that would be made; empty where it can.

    What was timed (`settings.cost`) does not count: it is measured anew where it is wanted.

    Args:
        card: The card.
        fingerprint: Of the model at hand; it differs between dtypes too.
        dataset: The records at hand.
        settings: How a card would be made.
    """
    if card.model.fingerprint != fingerprint:
        return f"it is of other weights ({card.model.fingerprint})"
    if card.data.fingerprint != dataset.fingerprint:
        return f"it is of other records ({card.data.records} of {_short(card.data.source)})"
    wanted, found = _deciding(asdict(settings)), _deciding(card.settings)
    other = [f"{name} {_short(found[name])} instead of {value}" for name, value in wanted.items() if found[name] != value]
    return f"it was made with {', '.join(other)}" if other else ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def fitting(base: BaseModel, dataset: Dataset, settings: ProfileSettings, folder: Path, progress: Progress | None = None) -> Found:
    """A card that stands for the one that would be made, from the folder or else from the hub.

    The card comes under the names that model and records have here, and with a cost exactly where one is wanted: that of a card from the
    folder is taken over, else the training steps are timed here.
    """
    reasons: list[str] = []
    for source, card, timed_here in _candidates(base.fingerprint, folder, reasons):
        why = misfit(card, base.fingerprint, dataset, settings)
        if not why:
            cost = card.cost if settings.cost and timed_here else None
            cost = step_cost(base, dataset, settings, progress) if settings.cost and cost is None else cost
            return Found(_as_made_here(card, base, dataset, settings).with_cost(cost), source, tuple(reasons))
        reasons.append(f"{source}: {why}")
    return Found(None, "", tuple(reasons))


def _candidates(fingerprint: str, folder: Path, reasons: list[str]) -> Iterator[tuple[str, LayerCard, bool]]:
    """Cards of a model with where they are from and whether this machine made them; why others cannot be read goes to `reasons`."""
    for path in sorted((folder / fingerprint).glob("*.json")):
        card = _read(partial(LayerCard.load, path), reasons)
        if card is not None:
            yield str(path), card, True
    for name in _found(fingerprint, reasons):
        card = _read(partial(pull, name), reasons)
        if card is not None:
            yield f"{name} on the hub", card, False


def _read(read: Callable[[], LayerCard], reasons: list[str]) -> LayerCard | None:
    try:
        return read()
    except (CardError, HubError) as error:
        reasons.append(str(error))
        return None


def _found(fingerprint: str, reasons: list[str]) -> list[str]:
    try:
        return find(fingerprint)
    except HubError as error:
        reasons.append(str(error))
        return []


def _as_made_here(card: LayerCard, base: BaseModel, dataset: Dataset, settings: ProfileSettings) -> LayerCard:
    data = card.data.model_copy(update={"source": dataset.source})
    made_with = {**card.settings, "cost": settings.cost}
    timed = {"phases": card.phases if settings.cost else ()}
    return card.model_copy(update={"model": ModelInfo(**describe(base)), "data": data, "settings": made_with} | timed)


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide about a card's numbers, `None` where one is not there: neither those of a probe that does not run, nor
    whether steps are timed."""
    probe = settings.get("probe")
    idle = {"cost"} | ({"probe_steps"} if probe != "train" else set()) | ({"probe_records"} if probe == "none" else set())
    return {name: None if name in idle else settings.get(name) for name in asdict(ProfileSettings())}
