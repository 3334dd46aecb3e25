"""Cards on the Hugging Face hub: each a small data set repository with the card, a README and two pictures.

A repository is written in one commit, so an interrupted upload leaves no half card. What comes from the hub may come from anyone: it is
read as JSON of limited size, validated as every card is, and refused where its texts hold control characters.
"""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import PureWindowsPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import DatasetInfo
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from layercard.card.card import LayerCard
from layercard.errors import CardError, HubError, one_line
from layercard.files import json_text, parse_json
from layercard.hub import hub_answers
from layercard.report.hub_page import COUPLING, DEPTH, fingerprint_tag, readme
from layercard.report.svg import coupling_svg, depth_svg

CARD_FILE = "card.json"
LARGEST = 32 * 2**20
"""Bytes of a card from the hub; those of models with 100 layers have some hundred thousand."""
OWN_FILES = frozenset({".gitattributes", "README.md", CARD_FILE, DEPTH, COUPLING})
"""What a card's repository holds."""
UNSEEN = ("Cc", "Cf", "Cs")
"""Unicode's categories of control and format characters and of halves of surrogate pairs."""


@dataclass(frozen=True)
class Pushed:
    """Where a card lies on the hub.

    Attributes:
        name: Full name of the repository, `OWNER/NAME`.
        url: Its page.
        commit: Id of the commit that holds the card.
    """

    name: str
    url: str
    commit: str


def push(
    card: LayerCard,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license_id: str | None = None,
    force: bool = False,
) -> Pushed:
    """Write a card to a data set repository, which is made where it is not there, in one commit.

    Folders of this machine are left out: of a local model or data file only its own name is written (`without_folders`).

    Args:
        card: The card.
        name: `OWNER/NAME`, or NAME for the owner of the token.
        private: Whether a new repository is private.
        revision: Branch, made where it is not there; the main one when not given.
        license_id: Licence of the card, as the hub names licences (`cc-by-4.0`).
        force: Whether to replace another card, or to write beside other files.

    Raises:
        HubError: No token, or one that may not write; the hub cannot be reached; the repository holds something else, or is public
            although it should be private.
    """
    _check_reachable()
    if get_token() is None:
        raise HubError("there is no token for the hub, and a card is written in your name; run `hf auth login`, or set HF_TOKEN")
    api, card = HfApi(endpoint=constants.ENDPOINT), without_folders(card)
    with _in_one_line(name):
        full = name if "/" in name else f"{api.whoami()['name']}/{name}"
    with _in_one_line(full):
        held, branch = _held(api, full, revision)
        if held is None:
            api.create_repo(full, repo_type="dataset", private=private, exist_ok=True)
        else:
            _check_free(held, full, private, force)
            if branch and not force:
                _check_same(held, card, full)
        if revision is not None:
            api.create_branch(full, branch=revision, repo_type="dataset", exist_ok=True)
        value = card.to_json()
        files = {
            CARD_FILE: json_text(value),
            DEPTH: depth_svg(value),
            COUPLING: coupling_svg(value),
            "README.md": readme(value, full, license_id),
        }
        commit = api.create_commit(
            full,
            operations=[CommitOperationAdd(path, text.encode("utf-8")) for path, text in files.items()],
            commit_message=f"Layer Card of {card.model.fingerprint}",
            repo_type="dataset",
            revision=revision,
        )
    return Pushed(full, f"{constants.ENDPOINT}/datasets/{full}", str(commit.oid))


def pull(name: str, *, revision: str | None = None) -> LayerCard:
    """The card of a repository.

    Args:
        name: `OWNER/NAME`.
        revision: Branch, tag or commit; the main branch when not given.

    Raises:
        HubError: The hub cannot be reached, has no such repository or revision, or there is no card in it.
        CardError: What is there is no whole card.
    """
    _check_reachable()
    with _in_one_line(name):
        data = _read(name, revision)
    source = f"{name} on the hub"
    value = parse_json(data, source, CardError, "card")
    _check_texts(value, source)
    return LayerCard.from_json(value, source)


def find(fingerprint: str, limit: int = 20) -> list[str]:
    """Names of the repositories with cards of a model, by its fingerprint; at most `limit`, in the order of the hub.

    Whoever writes a repository chooses its tags: `pull` the card and compare (`LayerCard.check_model`).

    Raises:
        HubError: The hub cannot be reached.
    """
    _check_reachable()
    with _in_one_line(fingerprint):
        found = HfApi(endpoint=constants.ENDPOINT).list_datasets(filter=fingerprint_tag(fingerprint), limit=limit)
        return [str(each.id) for each in islice(found, limit)]


def without_folders(card: LayerCard) -> LayerCard:
    """The card with absolute paths of this machine, as names of a model or of records, cut to their last part."""
    model, data, cost = card.model, card.data, card.cost
    return card.model_copy(
        update={
            "model": model.model_copy(update={"name": _own_name(model.name)}),
            "data": data.model_copy(update={"source": _own_name(data.source)}),
            "cost": None if cost is None else cost.model_copy(update={"model": _own_name(cost.model)}),
        }
    )


def _own_name(name: str) -> str:
    """The last part of a path.

    >>> _own_name("/home/ann/models/small"), _own_name("ann/small"), _own_name("C:\\\\data\\\\e2e.jsonl")
    ('small', 'ann/small', 'e2e.jsonl')
    """
    absolute = name.startswith(("/", "~", ".")) or PureWindowsPath(name).is_absolute()
    return PureWindowsPath(name).name or name if absolute else name


def _check_reachable() -> None:
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"the hub at {constants.ENDPOINT} cannot be reached: HF_HUB_OFFLINE is set; unset it")
    if not hub_answers():
        raise HubError(f"the hub at {constants.ENDPOINT} cannot be reached; check the network, or HF_ENDPOINT")


def _held(api: HfApi, name: str, revision: str | None) -> tuple[DatasetInfo | None, bool]:
    """What a repository holds, `None` where there is none; and whether it has the branch, else that is of its main one."""
    try:
        return api.dataset_info(name, revision=revision), True
    except RevisionNotFoundError:
        return api.dataset_info(name), False
    except RepositoryNotFoundError:
        return None, False


def _check_free(held: DatasetInfo, name: str, private: bool, force: bool) -> None:
    """Refuse to write beside what belongs to no card, and to believe a public repository private.

    Raises:
        HubError: One of these.
    """
    if private and not held.private:
        raise HubError(f"{name} exists and is public, and --private is for new repositories; change it on its page, or name another")
    files = {each.rfilename for each in held.siblings or ()}
    other = sorted(files - (OWN_FILES if CARD_FILE in files else {".gitattributes"}))
    if other and not force:
        raise HubError(f"{name} exists and holds {other[0]}, which is of no card; name a new repository, or pass --force to write there")


def _check_same(held: DatasetInfo, card: LayerCard, name: str) -> None:
    """Refuse to write over another card.

    Raises:
        HubError: There is one.
    """
    if CARD_FILE not in {each.rfilename for each in held.siblings or ()}:
        return
    try:
        there = pull(name, revision=held.sha)
    except CardError:
        raise HubError(f"{name} holds a {CARD_FILE} that is no card; name another repository, or pass --force to replace it") from None
    if there != card:
        raise HubError(f"{name} holds another card, of {there.model.fingerprint}; name another repository, or pass --force to replace it")


def _read(name: str, revision: str | None) -> bytes:
    """The card's file, no more of it than a card can have.

    Raises:
        HubError: It is larger.
    """
    validate_repo_id(name)
    url = f"{constants.ENDPOINT}/datasets/{name}/resolve/{quote(revision or 'main', safe='')}/{CARD_FILE}"
    found = bytearray()
    with get_session().stream("GET", url, headers=build_hf_headers(), timeout=30.0, follow_redirects=True) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        for part in response.iter_bytes():
            found += part
            if len(found) > LARGEST:
                raise HubError(f"{CARD_FILE} of {name} is larger than {LARGEST // 2**20} MiB, which no card is; name another repository")
    return bytes(found)


def _check_texts(value: dict[str, Any], source: str) -> None:
    """Refuse characters that cannot be seen: terminals obey some, and half a character cannot be written again.

    Raises:
        CardError: There are some.
    """
    waiting: list[Any] = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and any(unicodedata.category(character) in UNSEEN for character in part):
            raise CardError(f"{source} holds control characters in {ascii(part)[:60]}, which no card does; name another card")


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line.

    Raises:
        HubError: For each of its errors.
    """
    try:
        yield
    except (HubError, CardError):
        raise
    except Exception as error:  # the client, its network library and its validators each raise their own kinds
        raise HubError(_words(error, name)) from error


def _words(error: Exception, name: str) -> str:
    hub = f"the hub at {constants.ENDPOINT}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{hub} cannot be reached: HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, HFValidationError):
        return f"{name!r} is no name of a repository; write OWNER/NAME in letters, digits, '-', '_' and '.'"
    if isinstance(error, GatedRepoError):
        return f"{name} is gated; ask for access on its page {constants.ENDPOINT}/datasets/{name}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name}: no such repository on {hub}, or it is private; check the name, or run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such revision; name a branch, tag or commit that it has"
    if isinstance(error, EntryNotFoundError):
        return f"{name} holds no card ({CARD_FILE}); name a repository that `layercard push` made"
    if not isinstance(error, HfHubHTTPError):
        detail = one_line(error, 120)
        return f"{hub} stopped answering about {name} ({detail}); try again"
    status = error.response.status_code
    if status == 401:
        return f"{hub} does not accept the token; run `hf auth login` again, or mend HF_TOKEN"
    if status == 403:
        return f"the token may not do this with {name}; use one with write access to it"
    detail = " ".join((error.server_message or "").split())[:120] or "without a reason"
    return f"{hub} answers {status} about {name} ({detail}); try again later"
