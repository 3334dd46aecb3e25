"""`layercard pull`: a card from the hub, by name or by the weights of its model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out
from layercard.errors import HubError
from layercard.files import refuse_existing

MOST = 5
"""Names that a message lists before the rest is counted only."""


def pull(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="OWNER/NAME of a repository that `layercard push` made.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CARD", help="Where to write the card.")] = Path("card.json"),
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The card must be of this model's weights; without NAME, find one that is."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit.")] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    trust_remote_code: opt.TrustRemoteCode = False,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Take a card from the Hugging Face hub, checked as any file is, and write it.

    With --model the model's weights are read, and a card of other weights is refused. Whoever pushed a card vouches for its numbers, and
    nobody else.
    """
    if name is None and model is None:
        raise HubError("neither a repository nor --model is given; name one: layercard pull OWNER/NAME")
    if name is None and revision is not None:
        raise HubError("--revision is of a repository, but none is named; name one: layercard pull OWNER/NAME --revision …")
    refuse_existing(output, force)
    from layercard.report.hub import find
    from layercard.report.hub import pull as pull_card

    described = None if model is None else _described(model, device, dtype, trust_remote_code)
    if name is None and described is not None:
        name = _only(find(described["fingerprint"]), str(model))
    card = pull_card(str(name), revision=revision)
    if described is not None:
        card.check_model(described)
    card.save(output, force=force)
    if as_json:
        emit_json(card.to_json())
        return
    console = out()
    about = f"{card.model.name}, {card.model.layers} layers, {card.data.records} records of {card.data.source}"
    console.print(f"{output}: from {name}: {about}", soft_wrap=True)
    console.print(f"next: layercard show {output}", style="dim", soft_wrap=True)


def _described(model: str, device: str, dtype: str, trust_remote_code: bool) -> dict[str, Any]:
    """Name, fingerprint and depth of a model, from its weights."""
    from layercard.models.load import describe, load_model

    with Display() as display:
        return describe(load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=display))


def _only(found: list[str], model: str) -> str:
    """The one repository that was found.

    Raises:
        HubError: There is none, or there are several.
    """
    if not found:
        raise HubError(f"the hub has no card of {model}'s weights; make one with `layercard profile`, and push it")
    if len(found) > 1:
        more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
        raise HubError(f"the hub has {len(found)} cards of {model}'s weights: {', '.join(found[:MOST])}{more}; name the one you mean")
    return found[0]
