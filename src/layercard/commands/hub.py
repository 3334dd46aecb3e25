"""`layercard push` and `layercard pull`: cards to and from the Hugging Face hub."""

import re
from pathlib import Path

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.errors import HubError
from layercard.settings import LoadSettings, setting


def pull(
    name: str | None = setting(None, "OWNER/NAME of a repository that `layercard push` made.", argument=True, metavar="[NAME]"),
    output: Path = setting(Path("card.json"), "Where to write the card.", metavar="CARD"),
    model: str | None = setting(None, "The card must be of this model's weights; without NAME, find one that is.", metavar="MODEL"),
    revision: str | None = setting(None, "Branch, tag or commit."),
    loading: LoadSettings = LoadSettings(),
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Take a card from the Hugging Face hub.

    It is checked as any file is. With --model the model's weights are read, and a card of other weights is refused. Whoever pushed a
    card vouches for its numbers, and nobody else.
    """
    if name is None and model is None:
        raise HubError("neither a repository nor --model is given; name one: layercard pull OWNER/NAME")
    if name is None and revision is not None:
        raise HubError("--revision is of a repository, but none is named; name one: layercard pull OWNER/NAME --revision …")
    opt.check_output(output, force)
    from layercard.report.hub import find, pull as pull_card

    described = None
    if model is not None:
        from layercard.models.load import describe

        with Display() as display:
            described = describe(opt.load(model, loading, display))
    if name is None and described is not None:
        names = find(described["fingerprint"])
        if not names:
            raise HubError(f"the hub has no card of {model}'s weights; make one with `layercard profile`, and push it")
        if len(names) > 1:
            raise HubError(f"the hub has {len(names)} cards of {model}'s weights: {', '.join(names)}; name the one you mean")
        name = names[0]
    card = pull_card(str(name), revision=revision)
    if described is not None:
        card.check_model(described)
    about = f"{card.model.name}, {card.model.layers} layers, {card.data.records} records of {card.data.source}"
    show_result(card, as_json, f"from {name}: {about}", output=output, force=force, then=("show", output))


def push(
    card: Path = opt.CARD,
    name: str = setting(..., "OWNER/NAME of a data set repository, or NAME for the token's owner.", argument=True),
    private: bool = setting(False, "Make a new repository private."),
    revision: str | None = setting(None, "Write to this branch, made where it is not there.", metavar="BRANCH"),
    license_id: str | None = setting(None, "Licence of the card, as the hub names it: cc-by-4.0.", metavar="ID", option="--license"),
    force: bool = setting(False, "Replace another card there, or write beside other files."),
    as_json: bool = opt.AS_JSON,
) -> None:
    """Put a card on the Hugging Face hub.

    It becomes a small data set repository with a page that shows it. Written are the card, its page and two pictures, in one commit.
    Folders on this machine that the card names are left out: of a local model or data file only its own name is written.
    """
    if license_id is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_id):
        raise HubError(f"--license {license_id!r} is not a licence as the hub names them; write one such as cc-by-4.0 or apache-2.0")
    from layercard.card.card import LayerCard
    from layercard.report.hub import push as push_card

    pushed = push_card(LayerCard.load(card), name, private=private, revision=revision, license_id=license_id, force=force)
    value = {"name": pushed.name, "url": pushed.url, "commit": pushed.commit}
    show_result(value, as_json, f"{pushed.url}: written", then=("pull", pushed.name, "-o", "card.json"))
