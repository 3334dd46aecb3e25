"""`layercard push`: a card to a repository on the hub."""

import re
from typing import Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import emit_json, out
from layercard.errors import HubError


def push(
    card: opt.CardPath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="OWNER/NAME of a data set repository, or NAME for the token's owner.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Write to this branch, made where it is not there.")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Licence of the card, as the hub names it: cc-by-4.0.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another card there, or write beside other files.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Put a card on the Hugging Face hub, as a small data set repository with a page that shows it.

    Written are the card, its page and two pictures, in one commit. Folders on this machine that the card names are left out: of a local
    model or data file only its own name is written.
    """
    if license_id is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_id):
        raise HubError(f"--license {license_id!r} is no licence as the hub names them; write one such as cc-by-4.0 or apache-2.0")
    from layercard.card.card import LayerCard
    from layercard.report.hub import push as push_card

    pushed = push_card(LayerCard.load(card), name, private=private, revision=revision, license_id=license_id, force=force)
    if as_json:
        emit_json({"name": pushed.name, "url": pushed.url, "commit": pushed.commit})
        return
    console = out()
    console.print(f"{pushed.url}: written", soft_wrap=True)
    console.print(f"next: layercard pull {pushed.name} -o card.json", style="dim", soft_wrap=True)
