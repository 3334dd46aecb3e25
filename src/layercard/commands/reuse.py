"""Cards that need not be made again: kept in a folder by the fingerprints of model and records, or found on the hub."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
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


def card_folder(chosen: Path | None = None) -> Path:
    """Where cards are kept: the folder chosen, else `cards` in the cache folder (`LAYERCARD_CACHE`, or the platform's)."""
    return cache_root() / "cards" if chosen is None else chosen


def keep(card: LayerCard, folder: Path) -> Path:
    """Write a card where `reusable` finds it, in place of one of the same model, records and settings.

    Raises:
        OutputError: The folder cannot be written.
    """
    settings = hashlib.sha256(json.dumps(_deciding(card.settings), sort_keys=True).encode()).hexdigest()[:16]
    path = folder / card.model.fingerprint / f"{card.data.fingerprint}-{settings}.json"
    return write_json(path, card.to_json(), force=True)


def misfit(card: LayerCard, fingerprint: str, dataset: Dataset, settings: ProfileSettings) -> str:
    """Why a card cannot stand for the one that would be made; empty where it can.

    What was timed (`settings.cost`) does not count: it is measured anew where it is wanted. `fingerprint` is that of the model at hand.
    """
    if card.model.fingerprint != fingerprint:
        return f"it is of other weights ({card.model.fingerprint})"
    if card.data.fingerprint != dataset.fingerprint:
        return f"it is of other records ({card.data.records} of {_short(card.data.source)})"
    made_with = _deciding(card.settings)
    pairs = [(name, made_with[name], value) for name, value in _deciding(asdict(settings)).items()]
    other = [f"{name} {_short(before)} instead of {value}" for name, before, value in pairs if before != value]
    return f"it was made with {', '.join(other)}" if other else ""


def reusable(
    base: BaseModel, dataset: Dataset, settings: ProfileSettings, folder: Path, progress: Progress | None = None
) -> tuple[LayerCard | None, str, list[str]]:
    """A card that stands for the one that would be made, from the folder or else from the hub; `None` where there is none.

    The card comes under the names that model and records have here, and with a cost exactly where one is wanted: that of a card from the
    folder is taken over, else the training steps are timed here.

    Returns:
        The card, where it is from, and why each of the cards that were looked at before does not fit.
    """
    reasons: list[str] = []
    for source, card, timed_here in _candidates(base.fingerprint, folder, reasons):
        problem = misfit(card, base.fingerprint, dataset, settings)
        if problem:
            reasons.append(f"{source}: {problem}")
            continue
        cost = card.cost if timed_here and settings.cost else None
        if settings.cost and cost is None:
            cost = step_cost(base, dataset, settings, progress)
        as_made_here: dict[str, Any] = {
            "model": ModelInfo(**describe(base)),
            "data": card.data.model_copy(update={"source": dataset.source}),
            "settings": {**card.settings, "cost": settings.cost},
            "phases": card.phases if settings.cost else (),
        }
        return card.model_copy(update=as_made_here).with_cost(cost), source, reasons
    return None, "", reasons


def _candidates(fingerprint: str, folder: Path, reasons: list[str]) -> Iterator[tuple[str, LayerCard, bool]]:
    """Cards of a model with where they are from and whether this machine made them; why others cannot be read goes to `reasons`."""

    def tried(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (CardError, HubError) as error:
            reasons.append(str(error))
            return None

    for path in sorted((folder / fingerprint).glob("*.json")):
        if (card := tried(partial(LayerCard.load, path))) is not None:
            yield str(path), card, True
    for name in tried(partial(find, fingerprint)) or []:
        if (card := tried(partial(pull, name))) is not None:
            yield f"{name} on the hub", card, False


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide about a card's numbers, `None` where one is not there: neither those of a probe that does not run, nor
    whether steps are timed."""
    probe = settings.get("probe")
    idle = {"cost"} | ({"probe_steps"} if probe != "train" else set()) | ({"probe_records", "probe_layers"} if probe == "none" else set())
    return {name: None if name in idle else settings.get(name) for name in asdict(ProfileSettings())}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
