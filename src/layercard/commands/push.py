"""`layercard push`: a card to a repository on the hub."""

import re
from pathlib import Path

from layercard.commands import options as opt
from layercard.commands.terminal import show_result
from layercard.errors import HubError
from layercard.settings import setting


def push(
    card: Path = opt.CARD,
    name: str = setting(..., "OWNER/NAME of a data set repository, or NAME for the token's owner.", argument=True),
    private: bool = setting(False, "Make a new repository private."),
    revision: str | None = setting(None, "Write to this branch, made where it is not there.", metavar="BRANCH"),
    license_id: str | None = setting(None, "Licence of the card, as the hub names it: cc-by-4.0.", metavar="ID", option="--license"),
    force: bool = setting(False, "Replace another card there, or write beside other files."),
    as_json: bool = opt.AS_JSON,
) -> None:
    """Put a card on the Hugging Face hub, as a small data set repository with a page that shows it.

    Written are the card, its page and two pictures, in one commit. Folders on this machine that the card names are left out: of a local
    model or data file only its own name is written.
    """
    if license_id is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_id):
        raise HubError(f"--license {license_id!r} is not a licence as the hub names them; write one such as cc-by-4.0 or apache-2.0")
    from layercard.card.card import LayerCard
    from layercard.report.hub import push as push_card

    pushed = push_card(LayerCard.load(card), name, private=private, revision=revision, license_id=license_id, force=force)
    value = {"name": pushed.name, "url": pushed.url, "commit": pushed.commit}
    show_result(value, as_json, f"{pushed.url}: written", then=f"layercard pull {pushed.name} -o card.json")
