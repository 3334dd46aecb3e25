"""The command line: what it prints where, and one line and status 2 for whatever a user can mend."""

import dataclasses
import html
import inspect
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest

from cards import fake_card, fake_comparison, fake_placement
from layercard.card.card import LayerCard
from layercard.commands import main
from layercard.commands.bench import placements as bench_placements
from layercard.commands.main import app
from layercard.commands.options import expanded
from layercard.commands.profile import profile
from layercard.commands.reproduce import command_lines
from layercard.commands.train import train
from layercard.errors import HIDDEN, TrainingError
from layercard.selection.placement import Placement
from layercard.settings import BenchSettings, FastSettings, ProfileSettings, Settings, TrainSettings

COMPARED = ("compare/compare.json", "again/compare/compare.json")
COMMANDS = [command.name for command in app.registered_commands]
Layercard = Callable[..., tuple[int, str, str]]


@pytest.fixture
def card(tmp_path: Path) -> Path:
    return saved(tmp_path / "card.json", fake_card())


def saved(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err, err


@pytest.mark.parametrize("name", [*COMMANDS, "bench placements"])
def test_every_command_has_help_with_an_example_that_can_be_read(layercard: Layercard, name: str) -> None:
    status, out, err = layercard(*name.split(), "-h")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: layercard {name}")
    example = out.partition("Example:\n")[2].strip()
    assert example.startswith(f"layercard {name} ") and len(example) <= 100
    command: Any = main.ROOT
    for word in name.split():
        command = command.commands[word]
    command.make_context(name, shlex.split(example)[1 + len(name.split()) :])


def test_the_help_names_every_command_in_one_line_under_a_heading(layercard: Layercard) -> None:
    assert layercard() == layercard("--help")
    lines = layercard("--help")[1].splitlines()
    assert all(len(line) <= 80 and "..." not in line for line in lines if line.split()[:1] != ["Usage:"])
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= {*COMMANDS, "bench"}
    assert {heading for heading in main.COMMANDS if f"{heading}:" in lines} == set(main.COMMANDS)
    assert layercard("--version")[1].startswith("layercard 0.")


def numbers() -> Iterator[tuple[list[str], str]]:
    """Every option that takes a number: its command with what it must have, and its flag."""
    commands = [*(each for group in main.COMMANDS.values() for each in group.items()), (bench_placements, "bench placements")]
    for command, example in commands:
        parameters = inspect.signature(expanded(command), eval_str=True).parameters.values()
        options = [(get_args(each.annotation), each.default) for each in parameters if get_origin(each.annotation) is Annotated]
        name = example.split()[: 2 if command is bench_placements else 1]
        flags = [option.default for (_, option), default in options if default is inspect.Parameter.empty]
        needed = [word for flag in flags for word in ([flag, "x"] if isinstance(flag, str) else ["x"])]
        for (kind, option), _ in options:
            if {int, float} & {kind, *get_args(kind)}:
                yield [*name, *needed], option.default


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", pytest.param("9" * 5000, id="digits"), "1e999", "x"])
def test_numbers_that_mean_nothing_are_one_line_for_every_option(layercard: Layercard, value: str) -> None:
    options = list(numbers())
    assert len(options) > 70
    for command, flag in options:
        status, out, err = layercard(*command, flag, value)
        assert (status, out, err.count("\n")) == (2, "", 1), (command, flag)
        assert err.startswith("error: ") and flag in err and len(err) < 1200, (command, flag, err)


@pytest.mark.parametrize("settings", Settings.__subclasses__())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, pytest.param(10**5000, id="digits"), "8", True, []])
def test_settings_refuse_what_is_not_a_number_in_range(settings: type[Any], value: object) -> None:
    usual = settings("smollm2-135m") if settings is BenchSettings else settings()
    for field in usual.fields():
        kinds = set(get_args(field.type) or (field.type,))
        if {int, float} & kinds or (kinds & {str, bool} and not isinstance(value, tuple(kinds))):
            with pytest.raises(TrainingError, match=field.name):
                dataclasses.replace(usual, **{field.name: value})


HOSTILE = "a\x1b[2J\x9b31m\u202e b"


def test_nothing_in_a_file_or_its_name_steers_the_terminal(layercard: Layercard, tmp_path: Path) -> None:
    value = fake_card(warnings=[HOSTILE])
    value["model"]["name"] = value["data"]["source"] = HOSTILE
    card = saved(tmp_path / f"{HOSTILE}.json", value)
    for arguments in (
        ("show", card),
        ("show", card, "--json"),
        ("select", card, "-o", f"{HOSTILE}.placement.json"),
        ("select", card, "-o", f"{HOSTILE}.placement.json"),
        ("pareto", card),
        ("select", card, "--strategy", HOSTILE, "-o", "p.json"),
        (HOSTILE,),
        ("show", card, f"--{HOSTILE}"),
        ("show", f"{HOSTILE}.txt"),
    ):
        _, out, err = layercard(*arguments)
        assert out + err and not [letter for letter in out + err if unicodedata.category(letter) in HIDDEN and letter != "\n"], arguments
    assert json.loads(layercard("show", card, "--json")[1])["model"]["name"] == HOSTILE


NO_NEXT = {"app"}
"""Commands without a next one: the app runs until it is ended."""


def test_every_command_says_what_comes_next() -> None:
    """That what it names can be read is checked wherever a test gives a command (`conftest.layercard`)."""
    commands = {name: command for group in main.COMMANDS.values() for command in group for name in [command.__name__]}
    silent = {name for name, command in commands.items() if not re.search(r"then=|next: ", inspect.getsource(command))}
    assert silent == NO_NEXT
    assert "next: " in inspect.getsource(bench_placements)


def test_the_next_line_can_be_pasted(layercard: Layercard, tmp_path: Path) -> None:
    value = fake_card()
    value["model"]["name"] = "my model; rm -rf $HOME"
    out = layercard("select", saved(tmp_path / "card.json", value), "-o", "it's.json")[1]
    line = out.partition("next: layercard ")[2].strip()
    assert shlex.split(line) == [
        "train",
        "my model; rm -rf $HOME",
        "--data",
        "e2e/train.jsonl",
        "--placement",
        "it's.json",
        "-o",
        "adapter",
    ]


@pytest.mark.parametrize("output", ["/dev/null", "x" * 300, "pipe", ".", "/proc/x/y", "file/x.json"])
@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.timeout(20)
def test_outputs_that_are_no_files_are_written_to_or_refused(layercard: Layercard, card: Path, output: str, force: tuple[str]) -> None:
    os.mkfifo("pipe")
    Path("file").touch()
    before = {path.name: path.lstat().st_ino for path in Path().iterdir()}
    for command in (("select", card), ("pareto", card), ("transfer", card, "pipe"), ("profile", "x", "--data", "synthetic")):
        result = layercard(*command, "-o", output, *force)
        if output == "/dev/null" and command[0] == "select":
            assert result[0] == 0
        else:
            assert_one_line(result)
    for command in (
        ("train", "x", "--data", "synthetic", "--placement", "x"),
        ("compare", "x", "--data", "x", "--valid", "x", "--placements", "all"),
    ):
        assert_one_line(layercard(*command, "-o", output, *force))
    assert {path.name: path.lstat().st_ino for path in Path().iterdir()} == before


def test_a_budget_alone_asks_for_the_best_within_it(layercard: Layercard, card: Path) -> None:
    assert layercard("select", card, "--max-time", "60%", "-o", "lone.json")[0] == 0
    assert layercard("select", card, "--max-time", "60%", "--objective", "performance", "-o", "best.json")[0] == 0
    assert Path("lone.json").read_text() == Path("best.json").read_text()


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "layercard", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_explains_the_names_of_the_ends(layercard: Layercard) -> None:
    text = " ".join(layercard("select", "--help")[1].split())
    assert "bottom is an alias of last: the output side, cheapest to train" in text
    assert "top is an alias of first" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shwo"], ["shwo", "see layercard --help"]),
        (["show"], ["CARD", "see layercard show --help"]),
        (["show", "card.json", "--jsn"], ["--jsn", "--json"]),
        (["bench"], ["a command is missing", "see layercard bench --help"]),
        (["select", "card.json", "--k", "five", "-o", "p.json"], ["--k", "must be a whole number"]),
        (["profile", "m", "--data", "synthetic", "--records", "0", "-o", "c.json"], ["--records is 0; give a whole number from 1"]),
    ],
)
def test_a_wrong_command_line_is_one_line(layercard: Layercard, card: Path, arguments: list[str], words: list[str]) -> None:
    assert_one_line(layercard(*arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--k", "99"], ["99", "30"]),
        (["--objective", "ballanced"], ["ballanced", "balanced"]),
        (["--strategy", "midle"], ["midle", "middle"]),
        (["--strategy", "all", "--objective", "cost"], ["--objective cost", "--strategy all"]),
        (["--strategy", "all", "--max-time", "60%"], ["--max-time", "--strategy all"]),
        (["--max-time", "0%"], ["--max-time 0%"]),
        (["--max-time", "60"], ["--max-time 60 could be 60s or 60%"]),
        (["--max-training-memory", "200"], ["--max-training-memory 200 could be 200MB or 200%"]),
        (["--max-latency", "5"], ["--max-latency 5 could be 5s or 5%"]),
        (["--max-time", "12s"], ["--max-time 12s", "no measured cost"]),
        (["--max-time", "soon"], ["--max-time 'soon'", "60%"]),
        (["--max-time", "3%"], ["the least step time that would do is"]),
        (["--max-training-memory", "1KiB"], ["--max-training-memory", "the least peak memory"]),
        (["--max-params", "10"], ["--max-params 10", "adapter weights"]),
        (["--max-latency", "1%"], ["--max-latency", "added latency"]),
        (["--min-performance", "0.9"], ["did you mean 90%"]),
        (["--min-performance", "120%"], ["at most 100%"]),
        (["--objective", "cost", "--k", "1", "--min-performance", "99%"], ["of 1 layer", "the best keeps"]),
    ],
)
def test_a_choice_that_cannot_be_met_is_one_line(layercard: Layercard, card: Path, arguments: list[str], words: list[str]) -> None:
    assert_one_line(layercard("select", card, *arguments, "-o", "placement.json"), *words)
    assert not Path("placement.json").exists()


@pytest.mark.parametrize("odd", [["step"], {"step": 1}, 7, None, "everything", HOSTILE])
@pytest.mark.parametrize("name", ["probe", "rank"])
def test_odd_settings_of_a_card_are_read_or_refused_in_one_line(layercard: Layercard, tmp_path: Path, name: str, odd: object) -> None:
    value = fake_card()
    value["settings"] = {**value["settings"], name: odd}
    card = saved(tmp_path / "card.json", value)
    for arguments in (["show", card], ["select", card, "-o", tmp_path / "p.json"], ["report", card, "-o", tmp_path / "page.html"]):
        result = layercard(*arguments)
        if result[0] != 0:
            assert_one_line(result, f"settings: {name} ")
        assert "Traceback" not in result[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no such file"]),
        ("", ["truncated"]),
        (json.dumps(fake_card())[:5000], ["truncated"]),
        ("[]", ["list"]),
        ('{"schema": "layercard/99"}', ["layercard/99", "layercard/1"]),
        (json.dumps(fake_card(layers=[])), ["layers"]),
        (json.dumps(fake_card()).replace('"gain_estimate": {"value": ', '"gain_estimate": {"value": NaN, "was": '), ["gain_estimate"]),
        (json.dumps(fake_placement(fake_card(), [1])), ["is a placement (layercard-placement/1); a card is needed"]),
    ],
)
def test_a_card_that_is_none_is_one_line(layercard: Layercard, tmp_path: Path, text: str | None, words: list[str]) -> None:
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert_one_line(layercard("show", path), "broken.json", *words)
    assert_one_line(layercard("select", path, "-o", tmp_path / "placement.json"), "broken.json", *words)


def test_show_prints_a_row_a_layer(layercard: Layercard, card: Path) -> None:
    status, out, err = layercard("show", card)
    assert (status, err) == (0, "")
    assert sum("●" in line for line in out.splitlines()) == 30
    assert "massive activations" in out
    assert json.loads(layercard("show", card, "--json")[1])["model"]["layers"] == 30


def test_show_writes_a_page(layercard: Layercard, card: Path, tmp_path: Path) -> None:
    placement = saved(tmp_path / "placement.json", fake_placement(fake_card(), [2, 9]))
    comparison = saved(tmp_path / "compare.json", fake_comparison(fake_card(), {"mine": [2, 9], "all": list(range(30))}))
    arguments = ("show", card, "--html", "card.html", "--placement", placement, "--comparison", comparison)
    status, out, _ = layercard(*arguments)
    assert status == 0 and out.startswith("wrote card.html; next: layercard select ")
    assert "Performance kept against training time" in Path("card.html").read_text(encoding="utf-8")
    assert_one_line(layercard(*arguments), "card.html exists already", "--force")
    assert layercard(*arguments, "--force")[0] == 0
    assert_one_line(layercard("show", card, "--placement", placement), "--html")


def test_select_writes_a_placement_with_reasons(layercard: Layercard, card: Path) -> None:
    status, out, _ = layercard("select", card, "--k", 3, "-o", "placement.json")
    assert status == 0
    value = json.loads(Path("placement.json").read_text(encoding="utf-8"))
    assert len(value["layers"]) == 3
    assert set(value["reasons"]) == set(map(str, value["layers"]))
    assert "3 of 30 layers" in out
    assert_one_line(layercard("select", card, "-o", "placement.json"), "exists already", "--force")
    printed = json.loads(layercard("select", card, "--k", 3, "-o", "placement.json", "--force", "--json")[1])
    assert printed == value


@pytest.mark.parametrize(
    "arguments",
    [
        ["--objective", "performance"],
        ["--objective", "performance", "--max-time", "60%"],
        ["--objective", "performance", "--max-training-memory", "5GB", "--k", "4"],
        ["--objective", "cost", "--min-performance", "90"],
        ["--max-params", "40%", "--min-performance", "92%"],
        ["--max-latency", "50%"],
        ["--strategy", "random", "--k", "3", "--seed", "4"],
        ["--k", "4", "--allocate-ranks", "--rank", "4", "--alpha", "8"],
    ],
)
def test_a_placement_says_how_it_was_asked_for(layercard: Layercard, card: Path, arguments: list[str]) -> None:
    status, out, err = layercard("select", card, *arguments, "-o", "placement.json")
    assert (status, err) == (0, "")
    assert "of the performance of all layers" in out and "Costs" in out
    value = json.loads(Path("placement.json").read_text(encoding="utf-8"))
    line = shlex.split(command_lines(LayerCard.from_json(fake_card()), Placement.from_json(value), None)[1])
    assert line[:3] == ["layercard", "select", "card.json"]
    assert layercard(*line[1:-1], "again.json")[0] == 0
    assert json.loads(Path("again.json").read_text(encoding="utf-8")) == value


def test_pareto_prints_and_keeps_the_front(layercard: Layercard, card: Path) -> None:
    status, out, err = layercard("pareto", card, "-o", "front.json")
    assert (status, err) == (0, "")
    assert "Least step time" in out and "uniform-5" in out and "wrote front.json" in out
    value = json.loads(Path("front.json").read_text(encoding="utf-8"))
    assert json.loads(layercard("pareto", card, "--json")[1]) == value
    assert_one_line(layercard("pareto", card, "-o", "front.json"), "exists already", "--force")
    assert layercard("pareto", card, "-o", "front.json", "--force")[0] == 0
    assert layercard("pareto", card, "-o", "front.html")[0] == 0
    assert "performance kept, %" in Path("front.html").read_text(encoding="utf-8")
    assert_one_line(layercard("pareto", card, "-o", "front.png"), "front.png", ".html")
    assert_one_line(layercard("pareto", "missing.json"), "missing.json")


def test_bottom_is_the_output_side(layercard: Layercard, card: Path) -> None:
    chosen = {
        name: json.loads(layercard("select", card, "--strategy", name, "-o", f"{name}.json", "--json")[1])["layers"]
        for name in ("top", "first", "bottom", "last", "all")
    }
    assert chosen["bottom"] == chosen["last"] == [25, 26, 27, 28, 29]
    assert chosen["top"] == chosen["first"] == [0, 1, 2, 3, 4]
    assert chosen["all"] == list(range(30))


def test_data_that_cannot_be_used_is_one_line(layercard: Layercard, tiny_folder: Path, tiny_file: Path) -> None:
    lines = tiny_file.read_text(encoding="utf-8").splitlines()
    Path("malformed.jsonl").write_text("\n".join([*lines[:6], '{"prompt": "a"', *lines[6:]]), encoding="utf-8")
    Path("empty.jsonl").write_text("", encoding="utf-8")
    Path("silent.jsonl").write_text("\n".join([*lines[:2], '{"prompt": "a", "completion": ""}']), encoding="utf-8")
    for file, words in {
        "missing.jsonl": ["missing.jsonl"],
        "malformed.jsonl": ["malformed.jsonl", "line 7"],
        "empty.jsonl": ["empty.jsonl"],
        "silent.jsonl": ["silent.jsonl", "line 3"],
        "synthetic:tset": ["synthetic:test"],
    }.items():
        assert_one_line(layercard("profile", tiny_folder, "--data", file, "--on-bad", "fail", "-o", "card.json"), *words)
    assert not Path("card.json").exists()


def test_models_that_cannot_be_used_are_one_line(layercard: Layercard, tiny_file: Path, tiny_folder: Path) -> None:
    Path("hollow").mkdir()
    Path("hollow/config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    for model, words in {"hollow": ["hollow"], "./nowhere": ["nowhere"], "smollm2-135": ["smollm2-135m"]}.items():
        assert_one_line(layercard("profile", model, "--data", tiny_file, "-o", "card.json"), *words)
    for option, value in {"--device": "cpuu", "--dtype": "float31"}.items():
        assert_one_line(layercard("profile", tiny_folder, "--data", tiny_file, option, value, "-o", "card.json"), value)


def test_an_output_that_exists_is_refused_before_anything_is_loaded(layercard: Layercard, card: Path) -> None:
    started = time.perf_counter()
    assert_one_line(layercard("profile", "no/model", "--data", "missing.jsonl", "-o", card), "card.json exists already")
    Path("adapter").mkdir()
    Path("adapter/notes.txt").touch()
    common = ("no/model", "--data", "missing.jsonl", "--valid", "missing.jsonl")
    assert_one_line(layercard("train", *common, "--placement", "missing.json", "-o", "adapter"), "adapter exists already", "--resume")
    assert_one_line(layercard("compare", *common, "--placements", "all", "-o", "adapter"), "adapter exists already")
    assert time.perf_counter() - started < 5


def test_from_profile_to_eval(layercard: Layercard, tiny_folder: Path, tiny_file: Path) -> None:
    data = ("--data", tiny_file)
    made = json.loads(layercard("profile", tiny_folder, *data, "--seed", 1, "-o", "card.json", "--json")[1])
    assert made["settings"]["seed"] == 1
    assert len(made["layers"]) == made["model"]["layers"]
    assert layercard("show", "card.json")[0] == 0
    assert layercard("select", "card.json", "--k", 1, "-o", "placement.json")[0] == 0
    trained = layercard("train", tiny_folder, *data, "--valid", tiny_file, "--placement", "placement.json", "--steps", 2, "-o", "adapter")
    assert trained[0] == 0
    assert "Reduction" in trained[1]
    result = json.loads(layercard("eval", tiny_folder, *data, "--adapter", "adapter", "--generate", 0, "--json")[1])
    record = json.loads(Path("adapter/run.json").read_text(encoding="utf-8"))
    assert result["loss"] == pytest.approx(record["loss_after"])
    again = layercard("train", tiny_folder, *data, "--valid", tiny_file, "--placement", "placement.json", "--steps", 2, "-o", "adapter")
    assert_one_line(again, "adapter exists already", "--force")
    assert_one_line(layercard("eval", tiny_folder, *data, "--adapter", "."), "adapter")


def test_compare_sets_placements_side_by_side(layercard: Layercard, tiny_folder: Path, tiny_file: Path) -> None:
    assert layercard("profile", tiny_folder, "--data", tiny_file, "-o", "card.json")[0] == 0
    assert layercard("select", "card.json", "--k", 1, "-o", "mine.json")[0] == 0
    files = ("compare", tiny_folder, "--data", tiny_file, "--valid", tiny_file)
    several = (*files, "--card", "card.json", "--placements", "mine.json,last:1,cost:2,all", "--steps", 2, "-o", "runs")
    status, out, err = layercard(*several)
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()[3:7]]
    assert [row[:2] for row in rows] == [["mine", "1"], ["last:1", "1"], ["cost:2", "2"], ["all", "3"]]
    value = json.loads(layercard(*several, "--resume", "--json")[1])
    assert value == json.loads(Path("runs/compare.json").read_text(encoding="utf-8"))
    assert value["rows"][3]["performance_kept"]["value"] == pytest.approx(100)
    assert value["rows"][1]["layers"] == [2]
    for placements, words in {
        "": ["--placements is empty"],
        "all,all": ["'all' twice"],
        "balanced:2": ["--card"],
        "middle:x": ["'x'"],
        "midle:1": ["midle", "middle"],
        "missing.json": ["missing.json"],
        "last:99": ["99"],
    }.items():
        assert_one_line(layercard(*files, "--placements", placements, "-o", "other"), *words)
    assert not Path("other").exists()
    Path("foreign.json").write_text(json.dumps(fake_card()), encoding="utf-8")
    result = layercard(*files, "--card", "foreign.json", "--placements", "balanced:1,all", "-o", "other")
    assert_one_line(result, "smollm2-135m", "profile this model first")


def test_demo_ends_in_a_verdict_and_uses_finished_parts_again(layercard: Layercard, tiny_folder: Path) -> None:
    arguments = ("demo", "--model", tiny_folder, "--records", 64, "--steps", 40, "--output", "demo")
    status, out, err = layercard(*arguments)
    assert status == 0, err
    assert [line.split()[2] for line in out.splitlines() if line.startswith("$ layercard ")] == ["run", "compare"]
    ours, usual, verdict, page = out.splitlines()[-4:]
    page = re.match("wrote (.*); next: ", page)[1]
    assert re.match(r"layercard  \d of 3 layers.*: loss [\d.]+ → [\d.]+ in \d+ s, ", ours)
    assert usual.startswith("usual way  all layers, PEFT and Trainer as they are: loss ")
    speed = r"[\d.]+ times faster \([\d.]+ times with the search\), [\d.]+ times less memory"
    assert re.fullmatch(rf"verdict    (as good|loss .*%.*), {speed}", verdict)
    assert Path(page).name == "report.html" and Path(page).exists()
    assert {path.name for path in Path("demo").iterdir()} == {"run", "default"}
    results = [Path("demo/run/result.json"), Path("demo/default/all/run.json")]
    before = [path.stat().st_mtime_ns for path in results]
    assert layercard(*arguments)[0] == 0
    assert [path.stat().st_mtime_ns for path in results] == before
    assert layercard(*arguments, "--force")[0] == 0
    assert all(path.stat().st_mtime_ns != time for path, time in zip(results, before, strict=True))


def without_clock(path: str) -> dict[str, Any]:
    """A card without what was timed."""
    value: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    timed = ("forward_seconds", "backward_seconds", "adapter_seconds", "saved_bytes")
    layers = [{key: found for key, found in layer.items() if key not in timed} for layer in value["layers"]]
    return {**value, "cost": None, "phases": [], "layers": layers}


def test_the_page_says_how_it_is_made_again(layercard: Layercard, tiny_folder: Path) -> None:
    data = ("--data", "synthetic", "--records", 8)
    valid = ("--valid", "synthetic:valid", "--valid-records", 4)
    for words in (
        ("profile", tiny_folder, *data, "-o", "card.json"),
        ("select", "card.json", "--k", 1, "-o", "placement.json"),
        ("compare", tiny_folder, *data, *valid, "--placements", "placement.json,all", "--steps", 2, "-o", "compare"),
        ("report", "card.json", "placement.json", "compare/compare.json", "-o", "card.html"),
    ):
        assert layercard(*words)[0] == 0
    page = html.unescape(Path("card.html").read_text(encoding="utf-8"))
    lines = re.findall(r"^(?: *<pre tabindex=\"0\"><code>)?(layercard .*)$", page, flags=re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["profile", "select", "compare", "report"]
    before = {name: Path(name).read_text(encoding="utf-8") for name in ("card.json", "placement.json")}
    Path("again").mkdir()
    for line in lines:
        words = [
            re.sub(r"^(card.json|card.html|placement.json|compare(?:/compare.json)?)$", r"again/\1", word) for word in shlex.split(line)[1:]
        ]
        words[0] = words[0].removeprefix("again/")
        assert layercard(*words)[0] == 0, line
        if words[0] == "profile":
            assert without_clock("again/card.json") == without_clock("card.json")
            shutil.copy("card.json", "again/card.json")  # readings of the clock differ, and with them what is cheapest
    assert {name: Path("again", name).read_text(encoding="utf-8") for name in before} == before
    losses = [[row["loss_reduction"] for row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]] for path in COMPARED]
    assert losses[0] == losses[1]


def test_a_page_shows_one_model_only(layercard: Layercard, card: Path, tmp_path: Path) -> None:
    other = fake_card()
    other["model"] = {**other["model"], "fingerprint": "another", "name": "another-model"}
    placement = saved(tmp_path / "placement.json", fake_placement(other, [1]))
    assert_one_line(layercard("show", card, "--html", "card.html", "--placement", placement), "another-model", "one model")
    comparison = saved(tmp_path / "compare.json", {"schema": "layercard-compare/1", "model": other["model"], "rows": [1]})
    assert_one_line(layercard("show", card, "--html", "card.html", "--comparison", comparison), "compare.json")


def test_defaults_are_those_of_the_library() -> None:
    for command, settings in ((profile, ProfileSettings()), (train, TrainSettings()), (train, FastSettings())):
        defaults = {name: parameter.default for name, parameter in inspect.signature(expanded(command)).parameters.items()}
        shared = [field.name for field in dataclasses.fields(settings) if field.name in defaults]
        assert len(shared) >= 7
        plain = {name: None if name == "learning_rate" and defaults[name] == "auto" else defaults[name] for name in shared}
        assert plain == {name: getattr(settings, name) for name in shared}


@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")])
def test_an_interrupt_ends_in_one_line(number: int, status: int, word: str, tmp_path: Path) -> None:
    script = "import signal, sys, time; from layercard.commands import main as cli, show\n"
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent in the background may have it ignored
    script += "import layercard.card.card as card\ncard.LayerCard.load = lambda path: (print('ready', flush=True), time.sleep(60))\n"
    script += "sys.argv[1:] = ['show', 'card.json']; cli.main()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, err) == (status, word)


def test_a_closed_pipe_is_no_traceback(card: Path) -> None:
    command = f"{sys.executable} -m layercard show {card} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_plain_terminal_still_gets_the_numbers(card: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "layercard", "show", str(card)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0
    assert "11.7" in done.stdout
    assert done.stderr == ""


MISTAKES = {
    "show placement.json": "is a placement",
    "select placement.json -o new.json": "is a placement",
    "train tiny --data data.jsonl --placement card.json -o new": "is a card",
    "export card.json --to peft": "is a card",
    "compare tiny --data data.jsonl --valid data.jsonl --placements card.json -o new": "is a card",
    "verify card.json --model tiny": "is a file of layercard",
    "select card.json --max-time 60 -o new.json": "60s or 60%",
    "select card.json --max-memory 200 -o new.json": "200MB or 200%",
    "run tiny --data data.jsonl --max-time 60 -o new": "90s, 30m or 2h",
    "run tiny --data data.jsonl --report-to nonsense -o new": "choose tensorboard",
    "run tiny --data data.jsonl --report-to tensorbord -o new": "did you mean 'tensorboard'",
    "run tiny --data data.jsonl --records 5 -o new": "at least 32",
    "bench": "a command is missing",
    "run tiny --data . -o new": "is a folder",
    "show .": "is a folder",
    "run tiny --data data.jsonl -o data.jsonl": "is not a folder",
    "select card.json --k 5.5 -o new.json": "must be a whole number",
    "train tiny --data data.jsonl --placement placement.json --alpha much -o new": "must be a number",
    "data data.jsonl --model tiny --columns prompt=nothing": "has no column 'nothing'",
    "run tiny --data data.jsonl --columns prompt=nothing -o new": "has no column 'nothing'",
    "profile tiny --data data.jsonl --columns nothing=prompt -o new.json": "is not a field",
    "profile tiny --data card.json -o new.json": "needs prompt and completion",
}
"""What a user may get wrong, and words of the one line that says so."""


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    layercard: Layercard, tiny_folder: Path, tiny_file: Path, tmp_path: Path, line: str
) -> None:
    tiny_folder.rename(tmp_path / "tiny")
    tiny_file.rename(tmp_path / "data.jsonl")
    saved(tmp_path / "card.json", fake_card())
    saved(tmp_path / "placement.json", fake_placement(fake_card(), [2, 9]))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert_one_line(layercard(*shlex.split(line)), MISTAKES[line])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_data_are_looked_at_before_anything_heavy_is_imported(tiny_folder: Path, tiny_file: Path) -> None:
    line = ["run", str(tiny_folder), "--data", str(tiny_file), "--columns", "prompt=nothing", "-o", "new"]
    program = f"import sys; from layercard.commands.main import run; code = run({line!r}); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
