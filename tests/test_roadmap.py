"""The road from profile to deployment: what counts as done, what is next, and commands that can be run."""

import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from cards import fake_card, fake_comparison, fake_placement
from layercard.commands.main import app
from layercard.report.roadmap import DONE, NEXT, OPEN, ModelFile, Roadmap, Step, roadmap, roadmap_markdown

ROOT = Path(__file__).resolve().parents[1]
CARD = fake_card(12)
PLACEMENT = fake_placement(CARD, [3, 8])
RUN = {"schema": "layercard-run/1", "model": CARD["model"], "placement": PLACEMENT, "loss_reduction": 1.25}
COMPARISON = fake_comparison(CARD, {"all": list(range(12)), "placement": [3, 8]})


def found(name: str, kind: str, value: dict[str, Any]) -> ModelFile:
    return ModelFile(name, kind, value)


def steps(road: Roadmap) -> dict[str, Step]:
    return {step.title: step for phase in road.phases for step in phase.steps}


def test_without_a_card_the_way_begins_at_its_start() -> None:
    road = roadmap([])
    assert [phase.name for phase in road.phases] == ["Profile", "Select", "Deploy"]
    assert [phase.state for phase in road.phases] == [NEXT, OPEN, OPEN]
    assert road.next is not None and road.next.command == "layercard profile MODEL --data train.jsonl -o card.json"
    assert sum(step.state == NEXT for step in steps(road).values()) == 1


def test_each_file_moves_the_next_step_on() -> None:
    card = found("card.json", "card", CARD)
    files = [
        card,
        found("placement.json", "placement", PLACEMENT),
        found("adapter/run.json", "run record", RUN),
        found("compare/compare.json", "comparison", COMPARISON),
    ]
    expected = ["Choose the layers", "Train", "Check against all layers", None]
    for count, title in enumerate(expected, 1):
        road = roadmap(files[:count], card)
        assert (road.next.title if road.next else None) == title
    assert [phase.state for phase in road.phases] == [DONE, DONE, DONE]
    assert steps(road)["Score what it writes"].state == OPEN, "what is optional is not counted as done"
    assert "--adapter adapter" in steps(road)["Score what it writes"].command


def test_files_of_other_models_do_not_count() -> None:
    card = found("card.json", "card", CARD)
    other = fake_card(12, model={"name": "other", "fingerprint": "ffff", "layers": 12})
    road = roadmap([card, found("theirs.json", "placement", fake_placement(other, [1])), found("theirs-card.json", "card", other)], card)
    assert road.next is not None and road.next.title == "Choose the layers"
    assert steps(road)["Does it serve other data too?"].state == OPEN


def test_details_say_what_was_found() -> None:
    card = found("card.json", "card", CARD)
    whole = {**RUN, "placement": fake_placement(CARD, list(range(12)))}
    files = [
        card,
        found("all/run.json", "run record", whole),
        found("few/run.json", "run record", RUN),
        found("placement.json", "placement", PLACEMENT),
        found("compare.json", "comparison", COMPARISON),
        found("second.json", "card", {**CARD, "data": {**CARD["data"], "source": "webnlg"}}),
    ]
    shown = steps(roadmap(files, card))
    assert shown["Make the Layer Card"].detail.startswith("card.json: 64 records of e2e/train.jsonl; ranking very stable")
    assert shown["Choose the layers"].detail == "placement.json: layers 3, 8, 96% (93–99) predicted"
    assert shown["Train"].detail.startswith(
        "few/run.json: 2 layers, loss reduced by 1.250 nats per labelled token; all/run.json: 12 layers"
    )
    assert shown["Check against all layers"].detail.startswith("compare.json: placement keeps ")
    assert shown["Does it serve other data too?"].command == "layercard transfer card.json second.json"


@pytest.mark.parametrize("name", ["a b; rm -rf ~", "$(id)", "`id`", "x' | y"])
def test_names_cannot_leave_their_place_in_a_command(name: str) -> None:
    card = found("card.json", "card", fake_card(12, model={"name": name, "fingerprint": "ff", "layers": 12}))
    for step in steps(roadmap([card], card)).values():
        words = shlex.split(step.command)
        assert words[0] == "layercard"
        if words[1] in ("profile", "train", "compare", "eval"):
            assert words[2] == name


def test_every_command_and_option_exists() -> None:
    group: Any = typer.main.get_command(app)
    for step in steps(roadmap([])).values():
        _, name, *rest = shlex.split(step.command)
        options = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= options, step.command


def test_the_first_page_of_the_docs_is_the_same_way() -> None:
    spec = importlib.util.spec_from_file_location("generate_roadmap", ROOT / "docs" / "generate_roadmap.py")
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.main(["--check"]) == 0, "run make cli-docs"
    assert roadmap_markdown().strip() in generator.PAGE.read_text(encoding="utf-8")
