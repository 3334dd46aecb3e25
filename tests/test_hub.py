"""Cards on the hub, against a server on this machine: pushed, found and pulled; whatever comes from there is distrusted."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hypothesis import given, settings, strategies as st

from cards import fake_card
from hub_server import Hub, Repository, served
from layercard.card.card import LayerCard
from layercard.commands.reuse import keep, misfit, reusable
from layercard.cost.model import CostModel
from layercard.data.load import load_data
from layercard.errors import CardError, HubError
from layercard.models.load import BaseModel
from layercard.profiling.profile import profile_records as profile
from layercard.report.hub import LARGEST, find, pull, push, readme, without_folders
from layercard.settings import ProfileSettings
from tiny import tiny_records

FINGERPRINT = "0123456789abcdef"
NASTY = "x](javascript:1)</title><script>alert(1)</script>\n---\n# | `a` ![b](https://c.d) @bob"
QUICK = {"batch_size": 4, "label_samples": 1, "probe": "none", "rank": 2, "cost": False}
Layercard = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, with this process as its client, in the name of ann."""
    with served() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield found


def card_of(**changes: Any) -> LayerCard:
    return LayerCard.from_json(fake_card(depth=6, **changes))


def put(hub: Hub, name: str, content: bytes, **files: bytes) -> None:
    """A repository that somebody wrote by other means."""
    hub.repositories[name] = Repository(branches={"main": {"card.json": content, **files}})


def test_a_card_comes_back_as_it_was_pushed(hub: Hub) -> None:
    card = card_of()
    pushed = push(card, "card-one", license_id="cc-by-4.0")
    assert (pushed.name, pushed.url) == ("ann/card-one", f"{hub.url}/datasets/ann/card-one")
    assert pull("ann/card-one") == card
    repository = hub.repositories["ann/card-one"]
    assert repository.commits == [("main", f"Layer Card of {FINGERPRINT}")]
    assert pull("ann/card-one", revision=pushed.commit) == card
    files = repository.branches["main"]
    assert set(files) == {".gitattributes", "card.json", "README.md"}
    page = files["README.md"].decode()
    assert 'license: "cc-by-4.0"' in page
    assert find(FINGERPRINT) == ["ann/card-one"]
    assert find("f" * 16) == []


def test_a_card_goes_to_a_branch_or_a_private_repository(hub: Hub) -> None:
    card, other = card_of(), card_of(warnings=[])
    push(card, "ann/one")
    push(other, "ann/one", revision="other")
    assert (pull("ann/one"), pull("ann/one", revision="other")) == (card, other)
    with pytest.raises(HubError, match="holds another card"):
        push(card, "ann/one", revision="other")
    push(card, "ann/two", private=True)
    assert hub.repositories["ann/two"].private
    assert not hub.repositories["ann/one"].private
    with pytest.raises(HubError, match=r"ann/one exists and is public, and --private"):
        push(card, "ann/one", private=True)
    assert find(FINGERPRINT) == ["ann/one"]


def test_what_is_there_is_kept(hub: Hub) -> None:
    card, other = card_of(), card_of(model={"name": "other", "fingerprint": "f" * 16, "layers": 6})
    push(card, "ann/one")
    assert push(card, "ann/one").name == "ann/one"
    with pytest.raises(HubError, match=r"ann/one holds another card, of 0123456789abcdef; name another repository, or pass --force"):
        push(other, "ann/one")
    push(other, "ann/one", force=True)
    assert pull("ann/one") == other
    put(hub, "ann/corpus", b"{}", **{"train.parquet": b"rows"})
    with pytest.raises(HubError, match=r"holds train\.parquet, which is of no card"):
        push(card, "ann/corpus")
    hub.repositories["ann/page"] = Repository(branches={"main": {"README.md": b"mine"}})
    with pytest.raises(HubError, match=r"holds README\.md, which is of no card"):
        push(card, "ann/page")
    put(hub, "ann/broken", b"{")
    with pytest.raises(HubError, match=r"holds a card\.json that is not a card"):
        push(card, "ann/broken")


@pytest.mark.parametrize("fail", ["commit", "drop"])
def test_an_interrupted_upload_leaves_no_half_card(hub: Hub, fail: str) -> None:
    hub.fail = fail
    with pytest.raises(HubError, match=r"the hub at http://127\.0\.0\.1:\d+ (answers 500|stopped answering) about ann/one") as raised:
        push(card_of(), "ann/one")
    assert "\n" not in str(raised.value)
    assert set(hub.repositories["ann/one"].branches["main"]) == {".gitattributes"}
    hub.fail = ""
    with pytest.raises(HubError, match=r"ann/one holds no card \(card\.json\)"):
        pull("ann/one")
    push(card_of(), "ann/one")
    assert pull("ann/one") == card_of()


def test_refusals_of_the_hub_in_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(card_of(), "ann/secret", private=True)
    with pytest.raises(HubError, match=r"not a name/at/all' is not a name of a repository"):
        pull("not a name/at/all")
    with pytest.raises(HubError, match=r"ann/absent: no such repository on the hub"):
        pull("ann/absent")
    with pytest.raises(HubError, match=r"ann/secret has no such revision"):
        pull("ann/secret", revision="v9")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HubError, match=r"ann/secret: no such repository on .*, or it is private"):
        pull("ann/secret")
    with pytest.raises(HubError, match=r"the token may not do this with bo/one; use one with write access"):
        push(card_of(), "one")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(HubError, match=r"does not accept the token"):
        push(card_of(), "one")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", os.devnull)
    with pytest.raises(HubError, match=r"there is no token for the hub.*`hf auth login`"):
        push(card_of(), "one")


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as closed:
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed.url)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        pull("ann/one")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for call in (lambda: pull("ann/one"), lambda: push(card_of(), "ann/one"), lambda: find(FINGERPRINT)):
        with pytest.raises(HubError, match=rf"the hub at {closed.url} cannot be reached; check the network, or HF_ENDPOINT"):
            call()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not json", "ann/one on the hub is not a whole card"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"schema": "layercard/9"}', "schema 'layercard/9' is not"),
        (b'{"schema": "layercard/1"}', "Field required"),
        (b"[" * 100_000, "is not a whole card"),
        (json.dumps(fake_card(depth=3, warnings=["\x1b[2J"])).encode(), "control characters"),
        (json.dumps(fake_card(depth=3, warnings=["\u202egpj"])).encode(), "control characters"),
        (json.dumps(fake_card(depth=3, settings={"half \ud800": 1})).encode(), "surrogate pair"),
        (json.dumps(fake_card(depth=3, coupling=[[1.0]])).encode(), "coupling must be 3 by 3"),
        (json.dumps(fake_card(depth=3)).replace('"descent": [0.5', '"descent": [NaN').encode(), "descent.0: Input should be a finite"),
    ],
)
def test_what_comes_from_the_hub_is_distrusted(hub: Hub, content: bytes, words: str) -> None:
    put(hub, "ann/one", content)
    with pytest.raises(CardError, match=re.escape(words)) as raised:
        pull("ann/one")
    assert "\x1b" not in str(raised.value)


def test_a_card_without_end_is_not_read_to_its_end(hub: Hub) -> None:
    put(hub, "ann/one", b"")
    hub.fail = "endless"
    with pytest.raises(HubError, match=f"larger than {LARGEST // 2**20} MiB"):
        pull("ann/one")


def test_a_hub_that_never_ends_its_answer_is_not_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layercard.report.hub.SECONDS", 0.5)
    put(hub, "ann/one", b"")
    hub.fail = "slow"
    with pytest.raises(HubError, match=r"stopped answering about ann/one \(no whole answer within 0.5 s\); try again"):
        pull("ann/one")


def test_what_the_hub_says_does_not_steer_the_terminal(hub: Hub, layercard: Layercard) -> None:
    put(hub, "ann/one", b"")
    hub.fail = "\x1b[2J\x9b31m"
    status, out, err = layercard("pull", "ann/one")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert r"answers 500 about ann/one (\u001b[2J" in err and err.strip().isprintable()


def test_texts_of_a_card_are_no_markup() -> None:
    value = fake_card(depth=4, warnings=[NASTY])
    value["model"]["name"] = value["data"]["source"] = value["versions"]["layercard"] = value["settings"]["device"] = NASTY
    page = readme(LayerCard.from_json(value), "ann/one")
    header, body = page.removeprefix("---\n").split("\n---\n", 1)
    yaml = pytest.importorskip("yaml").safe_load(header)
    assert set(yaml) == {"pretty_name", "viewer", "tags"}
    assert yaml["tags"][:2] == ["layercard", f"layercard-{FINGERPRINT}"]
    assert not re.search(r"<\w|<!|(?<!\\)\[b|https?:|@bob", body)
    assert not re.search(r"(?<!\\)!\[", body)
    assert "\n---" not in body
    assert body.count("\n# ") == 1


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_any_text_stays_a_line_of_text(text: str) -> None:
    def lines(text: str) -> tuple[str, list[str]]:
        value = fake_card(depth=3, warnings=[text])
        value["model"]["name"] = text
        header, body = readme(LayerCard.from_json(value), "ann/one").removeprefix("---\n").split("\n---\n", 1)
        return header, body.splitlines()

    header, body = lines(text)
    assert pytest.importorskip("yaml").safe_load(header)["tags"][0] == "layercard"
    assert len(body) == len(lines("plain")[1])
    assert "<" not in "".join(body)


@pytest.mark.parametrize("depth", [1, 3, 30, 130])
def test_the_page_draws_every_layer(depth: int) -> None:
    page = readme(LayerCard.from_json(fake_card(depth=depth)), "ann/one")
    gains, coupling = (block.splitlines()[1:] for block in page.split("```")[1:4:2])
    assert [int(line.strip("▲ ").split()[0]) for line in gains] == list(range(depth)) == [int(line[:5]) for line in coupling]
    assert max(gains, key=lambda line: line.count("█")).startswith("▲")
    assert all(line[5 + layer] == "█" and len(line) == 5 + depth for layer, line in enumerate(coupling))
    assert len(page) < 60_000


def test_folders_of_this_machine_are_not_written(hub: Hub, layercard: Layercard, tmp_path: Path) -> None:
    value = fake_card(depth=4)
    value["model"]["name"], value["data"]["source"] = "/home/ann/models/small", "C:\\data\\e2e.jsonl"
    value["cost"] = CostModel.from_shapes([[(8, 8)]] * 4, model="/home/ann/models/small").to_json()
    (tmp_path / "card.json").write_text(json.dumps(value), encoding="utf-8")
    assert layercard("push", "card.json", "ann/one")[0] == 0
    card = pull("ann/one")
    assert (card.model.name, card.data.source) == ("small", "e2e.jsonl")
    assert not any(b"/home" in content for content in hub.repositories["ann/one"].branches["main"].values())
    assert without_folders(card) == card


# --- the commands ---------------------------------------------------------------------------------------------------------


def test_push_and_pull(hub: Hub, layercard: Layercard, tmp_path: Path) -> None:
    card_of().save(tmp_path / "card.json")
    status, said, _ = layercard("push", "card.json", "one", "--license", "apache-2.0")
    assert status == 0
    assert f"{hub.url}/datasets/ann/one: written" in said
    status, said, _ = layercard("pull", "ann/one", "-o", "again.json")
    assert status == 0
    assert "from ann/one: smollm2-135m, 6 layers" in said and "wrote again.json; next: layercard show again.json" in said
    assert LayerCard.load(tmp_path / "again.json") == card_of()
    status, said, _ = layercard("push", "card.json", "one", "--json")
    assert json.loads(said)["name"] == "ann/one"
    assert json.loads(layercard("pull", "ann/one", "-o", "json.json", "--json")[1]) == card_of().to_json()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("push", "absent.json", "one"), "no such file"),
        (("push", "card.json", "one", "--license", "GPL v3"), "not a licence as the hub names them"),
        (("push", "card.json", "a/b/c"), "is not a name of a repository"),
        (("pull",), "neither a repository nor --model"),
        (("pull", "--model", "m", "--revision", "r"), "--revision is of a repository"),
        (("pull", "ann/absent", "-o", "new.json"), "no such repository"),
        (("pull", "ann/absent"), "card.json exists already"),
    ],
)
def test_bad_input_ends_in_one_line(hub: Hub, layercard: Layercard, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    card_of().save(tmp_path / "card.json")
    status, said, err = layercard(*arguments)
    assert (status, said, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (tmp_path / "new.json").exists()


def test_pull_by_model(hub: Hub, layercard: Layercard, tiny_base: BaseModel, tiny_folder: Path, tmp_path: Path) -> None:
    status, _, err = layercard("pull", "--model", tiny_folder, "--device", "cpu")
    assert (status, err.count("\n")) == (2, 1)
    assert f"the hub has no card of {tiny_folder}'s weights" in err
    mine = card_of(model={"name": "tiny", "fingerprint": tiny_base.fingerprint, "layers": 6})
    push(card_of(), "ann/other")
    push(mine, "ann/mine")
    assert layercard("pull", "--model", tiny_folder, "--device", "cpu")[0] == 0
    assert LayerCard.load(tmp_path / "card.json") == mine
    status, _, err = layercard("pull", "ann/other", "--model", tiny_folder, "--device", "cpu", "--force")
    assert status == 2
    assert f"the card is of smollm2-135m ({FINGERPRINT}, 6 layers), the model is {tiny_folder}" in err
    assert LayerCard.load(tmp_path / "card.json") == mine
    push(mine, "ann/mine-too")
    status, _, err = layercard("pull", "--model", tiny_folder, "--device", "cpu", "--force")
    assert "2 cards of" in err
    assert "ann/mine, ann/mine-too; name the one you mean" in err


def test_the_endpoint_of_the_environment_is_asked(hub: Hub, tmp_path: Path) -> None:
    push(card_of(), "ann/one")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "COLUMNS": "200"}
    command = [sys.executable, "-m", "layercard", "pull", "ann/one", "-o", str(tmp_path / "card.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert LayerCard.load(tmp_path / "card.json") == card_of()


# --- reuse ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tiny_base: BaseModel) -> tuple[BaseModel, Any, ProfileSettings, LayerCard]:
    dataset, chosen = load_data(tiny_records(8), tiny_base.tokenizer), ProfileSettings(**QUICK)
    return tiny_base, dataset, chosen, profile(tiny_base, dataset, chosen)


def test_what_does_not_fit_and_why(made: tuple[BaseModel, Any, ProfileSettings, LayerCard]) -> None:
    base, dataset, chosen, card = made
    assert misfit(card, base.fingerprint, dataset, chosen) == ""
    assert misfit(card, "f" * 16, dataset, chosen) == f"it is of other weights ({base.fingerprint})"
    other = load_data(tiny_records(8, start=1), base.tokenizer)
    assert misfit(card, base.fingerprint, other, chosen) == "it is of other records (8 of records in memory)"
    for changes, words in (
        ({"rank": 4, "seed": 3}, "it was made with rank 2 instead of 4, seed 0 instead of 3"),
        ({"probe": "step"}, "it was made with probe none instead of step"),
        ({"probe_steps": 9, "probe_records": 3, "cost": True}, ""),
    ):
        found = misfit(card, base.fingerprint, dataset, dataclasses.replace(chosen, **changes))
        assert found.startswith(words)
        assert bool(found) == bool(words)
    bare = card.model_copy(update={"settings": {}})
    assert "rank None instead of 2" in misfit(bare, base.fingerprint, dataset, chosen)


def test_a_card_is_found_in_the_folder_then_on_the_hub(
    hub: Hub, made: tuple[BaseModel, Any, ProfileSettings, LayerCard], tmp_path: Path
) -> None:
    base, dataset, chosen, card = made
    assert reusable(base, dataset, chosen, tmp_path) == (None, "", [])
    push(card_of(model={"name": "other", "fingerprint": base.fingerprint, "layers": 6}), "ann/other")
    push(card, "ann/tiny")
    reasons = ["ann/other on the hub: it is of other records (64 of e2e/train.jsonl)"]
    assert reusable(base, dataset, chosen, tmp_path) == (card, "ann/tiny on the hub", reasons)
    path = keep(card, tmp_path)
    hub.asked.clear()
    assert reusable(base, dataset, chosen, tmp_path)[1] == str(path)
    assert hub.asked == []
    path.write_text("{", encoding="utf-8")
    _, source, reasons = reusable(base, dataset, chosen, tmp_path)
    assert source == "ann/tiny on the hub"
    assert "is not a whole card" in reasons[0]


def test_a_false_tag_convinces_nobody(hub: Hub, made: tuple[BaseModel, Any, ProfileSettings, LayerCard], tmp_path: Path) -> None:
    base, dataset, chosen, card = made
    push(card, "ann/tiny")
    files = hub.repositories["ann/tiny"].branches["main"]
    files["card.json"] = files["card.json"].replace(base.fingerprint.encode(), b"f" * 16)
    assert find(base.fingerprint) == ["ann/tiny"]
    reasons = [f"ann/tiny on the hub: it is of other weights ({'f' * 16})"]
    assert reusable(base, dataset, chosen, tmp_path) == (None, "", reasons)


def test_costs_are_those_of_this_machine(hub: Hub, made: tuple[BaseModel, Any, ProfileSettings, LayerCard], tmp_path: Path) -> None:
    base, dataset, chosen, card = made
    timed = dataclasses.replace(chosen, cost=True)
    elsewhere = profile(base, dataset, timed)
    push(elsewhere, "ann/timed")
    found, _, _ = reusable(base, dataset, timed, tmp_path)
    assert found is not None
    assert found.cost is not None
    assert found.cost != elsewhere.cost
    assert found.with_cost(None).layers == card.layers
    keep(elsewhere, tmp_path)
    assert reusable(base, dataset, timed, tmp_path)[0] == elsewhere
    assert reusable(base, dataset, chosen, tmp_path)[0] == card


def test_profile_reuses(hub: Hub, layercard: Layercard, tiny_folder: Path, tiny_file: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--probe", "none", "--label-samples", "1", "--no-cost", "--cache-dir", "kept")
    first = layercard("profile", tiny_folder, "--data", tiny_file, "-o", "first.json", "--reuse", *options)
    assert first[0] == 0
    assert "no card to reuse; profiling" in first[2]
    kept = list((tmp_path / "kept").rglob("*.json"))
    assert len(kept) == 1
    second = layercard("profile", tiny_folder, "--data", tiny_file, "-o", "second.json", "--reuse", *options, "--json")
    assert f"reused: {kept[0].relative_to(tmp_path)}" in second[2]
    assert LayerCard.load(tmp_path / "second.json") == LayerCard.load(tmp_path / "first.json")
    assert json.loads(second[1]) == LayerCard.load(tmp_path / "first.json").to_json()
    half = layercard("profile", tiny_folder, "--data", tiny_file, "-o", "half.json", "--reuse", *options, "--dtype", "bfloat16")
    assert "it was made in float32, and the model is in bfloat16: its numbers differ by rounding" in half[2]
    third = layercard("profile", tiny_folder, "--data", tiny_file, "-o", "third.json", "--reuse", *options, "--rank", "4")
    assert f"not reused: {kept[0].relative_to(tmp_path)}: it was made with rank 8 instead of 4" in third[2]
    assert len(list((tmp_path / "kept").rglob("*.json"))) == 2
    (tmp_path / "file").write_text("", encoding="utf-8")
    fourth = layercard("profile", tiny_folder, "--data", tiny_file, "-o", "fourth.json", *options[:-1], "file")
    assert fourth[0] == 0
    assert "not kept for --reuse" in fourth[2]


def test_processes_do_not_look_for_a_card(
    layercard: Layercard, tiny_folder: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = layercard("profile", tiny_folder, "--data", tiny_file, "-o", "new.json", "--reuse")
    assert (status, err.count("\n")) == (2, 1)
    assert "--reuse looks for a card in one process, and this run has 2" in err
