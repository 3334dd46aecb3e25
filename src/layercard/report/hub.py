"""Cards on the Hugging Face hub: each a small data set repository with the card and a README.

A repository is written in one commit, so an interrupted upload leaves no half card. What comes from the hub may come from anyone: it is
read as JSON of limited size, validated as every card is, and refused where its texts hold control characters.
"""

import html
import json
import re
import unicodedata
from collections.abc import Callable
from itertools import islice
from pathlib import PureWindowsPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors as hub_errors, get_token
from huggingface_hub.hf_api import DatasetInfo
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from layercard.card.card import LayerCard
from layercard.card.numbers import stability_words, with_interval
from layercard.errors import HIDDEN, CardError, HubError, one_line
from layercard.files import json_text, parse_json
from layercard.hub import hub_answers, within
from layercard.report.terminal import bar
from layercard.report.words import bar_fractions, template, title_of

T = TypeVar("T")
SECONDS = 120.0
"""In which a question to the hub must be answered whole."""
CARD_FILE = "card.json"
CARD_FILES = frozenset({".gitattributes", "README.md", CARD_FILE})
"""What a card's repository holds."""
LARGEST = 32 * 2**20
"""Bytes of a card from the hub; those of models with 100 layers have some hundred thousand."""
TAG = "layercard"
LONGEST = 200
"""Characters of one text on the page before it is cut."""
COLUMNS = ("gain_estimate", "training_probe", "step_probe", "centrality", "resnorm")


class Pushed(NamedTuple):
    """Where a card lies on the hub: the repository's full name `OWNER/NAME`, its page, and the id of the commit that holds the card."""

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
        private: Make a new repository private.
        revision: Branch, made where it is not there; the main one when not given.
        license_id: Licence of the card, as the hub names licences (`cc-by-4.0`).
        force: Replace another card, or write beside other files.

    Raises:
        HubError: No token, or one that may not write; the hub cannot be reached; the repository holds something else, or is public
            although it should be private.
    """
    _check_reachable()
    if get_token() is None:
        raise HubError("there is no token for the hub, and a card is written in your name; run `hf auth login`, or set HF_TOKEN")
    api, card = HfApi(endpoint=constants.ENDPOINT), without_folders(card)
    full = name if "/" in name else f"{_asked(name, api.whoami)['name']}/{name}"

    def write() -> str:
        # What is there: the repository at the branch, else at its main one, else nothing.
        try:
            there, branch_exists = api.dataset_info(full, revision=revision), True
        except hub_errors.RevisionNotFoundError:
            there, branch_exists = api.dataset_info(full), False
        except hub_errors.RepositoryNotFoundError:
            there, branch_exists = None, False
        if there is None:
            api.create_repo(full, repo_type="dataset", private=private, exist_ok=True)
        else:
            _check_replaceable(there, card, full, private=private, force=force, branch_exists=branch_exists)
        if revision is not None:
            api.create_branch(full, branch=revision, repo_type="dataset", exist_ok=True)
        files = {CARD_FILE: json_text(card.to_json()), "README.md": readme(card, full, license_id)}
        commit = api.create_commit(
            full,
            operations=[CommitOperationAdd(path, text.encode("utf-8")) for path, text in files.items()],
            commit_message=f"Layer Card of {card.model.fingerprint}",
            repo_type="dataset",
            revision=revision,
        )
        return str(commit.oid)

    return Pushed(full, f"{constants.ENDPOINT}/datasets/{full}", _asked(full, write))


def pull(name: str, *, revision: str | None = None) -> LayerCard:
    """The card of a repository.

    Args:
        name: `OWNER/NAME`.
        revision: Branch, tag or commit; the main branch when not given.

    Raises:
        HubError: The hub cannot be reached, has no such repository or revision, or there is no card in it.
        CardError: What is there is not a whole card.
    """
    _check_reachable()
    data = _asked(name, lambda: _read(name, revision))
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
    api, tag = HfApi(endpoint=constants.ENDPOINT), fingerprint_tag(fingerprint)
    return _asked(fingerprint, lambda: [str(each.id) for each in islice(api.list_datasets(filter=tag, limit=limit), limit)])


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


def _check_replaceable(there: DatasetInfo, card: LayerCard, name: str, *, private: bool, force: bool, branch_exists: bool) -> None:
    """Refuse to write beside other files or over another card, and to believe a public repository private.

    Raises:
        HubError: One of these.
    """
    if private and not there.private:
        raise HubError(f"{name} exists and is public, and --private is for new repositories; change it on its page, or name another")
    files = {file.rfilename for file in there.siblings or ()}
    other = sorted(files - (CARD_FILES if CARD_FILE in files else {".gitattributes"}))
    if other and not force:
        raise HubError(f"{name} exists and holds {other[0]}, which is of no card; name a new repository, or pass --force to write there")
    if force or not branch_exists or CARD_FILE not in files:
        return
    try:
        old = pull(name, revision=there.sha)
    except CardError:
        raise HubError(f"{name} holds a {CARD_FILE} that is not a card; name another repository, or pass --force to replace it") from None
    if old != card:
        raise HubError(f"{name} holds another card, of {old.model.fingerprint}; name another repository, or pass --force to replace it")


def _read(name: str, revision: str | None) -> bytes:
    """The card's file, no more of it than a card can have.

    Raises:
        HubError: It is larger.
    """
    validate_repo_id(name)
    url = f"{constants.ENDPOINT}/datasets/{name}/resolve/{quote(revision or 'main', safe='')}/{CARD_FILE}"
    data = bytearray()
    with get_session().stream("GET", url, headers=build_hf_headers(), timeout=30.0, follow_redirects=True) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        for part in response.iter_bytes():
            data += part
            if len(data) > LARGEST:
                raise HubError(f"{CARD_FILE} of {name} is larger than {LARGEST // 2**20} MiB, which no card is; name another repository")
    return bytes(data)


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
        elif isinstance(part, str) and any(unicodedata.category(character) in HIDDEN for character in part):
            raise CardError(f"{source} holds control characters in {ascii(part)[:60]}, which no card does; name another card")


def _asked(name: str, ask: Callable[[], T]) -> T:
    """What the hub answers within `SECONDS`; what its client raises becomes one line.

    Raises:
        HubError: For each of its errors, or no answer in time.
    """
    try:
        return within(SECONDS, ask)
    except (HubError, CardError):
        raise
    except Exception as error:  # the client, its network library and its validators each raise their own kinds
        raise HubError(_words(error, name)) from error


def _words(error: Exception, name: str) -> str:
    """What is wrong in one line, with how to mend it."""
    hub = f"the hub at {constants.ENDPOINT}"
    sentences = {
        hub_errors.OfflineModeIsEnabled: f"{hub} cannot be reached: HF_HUB_OFFLINE is set; unset it",
        hub_errors.HFValidationError: f"{name!r} is not a name of a repository; write OWNER/NAME in letters, digits, '-', '_' and '.'",
        hub_errors.GatedRepoError: f"{name} is gated; ask for access on its page {constants.ENDPOINT}/datasets/{name}",
        hub_errors.RepositoryNotFoundError: f"{name}: no such repository on {hub}, or it is private; check the name or run `hf auth login`",
        hub_errors.RevisionNotFoundError: f"{name} has no such revision; name a branch, tag or commit that it has",
        hub_errors.EntryNotFoundError: f"{name} holds no card ({CARD_FILE}); name a repository that `layercard push` made",
    }
    for kind, sentence in sentences.items():
        if isinstance(error, kind):
            return sentence
    if not isinstance(error, hub_errors.HfHubHTTPError):
        return f"{hub} stopped answering about {name} ({one_line(error, 120)}); try again"
    status = error.response.status_code
    if status == 401:
        return f"{hub} does not accept the token; run `hf auth login` again, or mend HF_TOKEN"
    if status == 403:
        return f"the token may not do this with {name}; use one with write access to it"
    detail = " ".join((error.server_message or "").split())[:120] or "without a reason"
    return f"{hub} answers {status} about {name} ({detail}); try again later"


# ---- the page of a card


def fingerprint_tag(fingerprint: str) -> str:
    """The tag by which cards of a model are found; letters, digits and hyphens only.

    >>> fingerprint_tag("0123456789abcdef")
    'layercard-0123456789abcdef'
    """
    return f"{TAG}-{re.sub(r'[^a-z0-9]', '', fingerprint.lower())[:64]}"


def readme(card: LayerCard, name: str, license_id: str | None = None) -> str:
    """The README of a card's repository (`templates/readme.md.j2`): YAML for the hub's search, then the card in words and tables.

    What a card says in words may come from anyone, so it is shown as text: no line of it becomes markup, a link or YAML.

    Args:
        card: The card.
        name: Name of the repository.
        license_id: Licence of the card, as the hub names licences; none is said when not given.
    """
    model, data, settings = card.model, card.data, card.settings
    made = ", ".join(f"{key} {settings[key]}" for key in ("rank", "ridge", "probe", "seed", "dtype") if settings.get(key) is not None)
    facts = {
        "Records": f"{data.records:,} from {data.source}: {data.tokens:,} tokens, {data.labelled_tokens:,} labelled",
        "Records' fingerprint": data.fingerprint,
        "Made with": f"{made}; layercard {card.versions.get('layercard', 'of an unknown version')}",
        "Ranking": stability_words(card.stability),
    }
    # Two pictures of characters: a bar for each layer, and a shade for each two layers, layer 0 at the top and at the left.
    best, gains = card.best_layers(), card.profile("gain_estimate")
    bars = [
        f"{'▲' if layer in best else ' '}{layer:>4} {bar(fraction or 0.0, 40)} {with_interval(gain)}"
        for layer, (gain, fraction) in enumerate(zip(gains, bar_fractions(gains), strict=True))
    ]
    shades = [
        f"{layer:>4} " + "".join("-" if value < -0.05 else " ░▒▓█"[round(4 * min(1.0, max(0.0, value)))] for value in row)
        for layer, row in enumerate(card.coupling)
    ]
    profiles = {title_of(key): card.profile(key) for key in COLUMNS}
    profiles = {title: profile for title, profile in profiles.items() if any(profile[layer] for layer in best)}
    tag = fingerprint_tag(model.fingerprint)
    # The last part of the model's name, as far as a tag can hold it.
    name_tag = re.sub(r"[^A-Za-z0-9._-]+", "-", _line(model.name).rpartition("/")[2]).strip("-.")
    page = template("readme.md.j2", html=False, plain=_plain, quoted=_quoted).render(
        title=f"Layer Card of {_line(model.name)}",
        tags=(TAG, tag, name_tag),
        fingerprint=tag.removeprefix(f"{TAG}-"),
        columns=list(profiles),
        rows=[[str(layer), *(with_interval(profile[layer]) for profile in profiles.values())] for layer in best],
        warnings=card.warnings,
        model=model,
        data=data,
        facts=facts,
        gains=bars,
        coupling=shades,
        name=name,
        license_id=license_id,
    )
    return page + "\n"


def _line(value: object) -> str:
    """A text on one line, without characters that cannot be seen, cut where it is long."""
    words = " ".join("".join(character if character.isprintable() else " " for character in str(value)).split())
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…"


def _quoted(value: str) -> str:
    """A YAML string: that of JSON is one."""
    return json.dumps(_line(value), ensure_ascii=False)


def _plain(value: object) -> str:
    """A text that Markdown and HTML show as it is.

    >>> _plain("<b>[a](https://x)|`c`")
    '&lt;b&gt;\\\\[a\\\\](https&#58;//x)\\\\|\\\\`c\\\\`'
    """
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.escape(_line(value), quote=False)).replace(":", "&#58;").replace("@", "&#64;")
