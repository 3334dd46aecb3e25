"""The app without a browser: files, sliders to placements, settings for trainers, jobs, HTML, and what the server refuses."""

import ast
import base64
import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cards import fake_card, fake_comparison, fake_placement, fake_run
from layercard.card.card import LayerCard
from layercard.commands.main import run
from layercard.errors import OutputError, ReportError
from layercard.report.app import library as files, views
from layercard.report.app.explorer import MOST_FRONTS, MOST_UPLOADS, Explorer
from layercard.report.app.jobs import CANCELLED, CANCELLING, DONE, FAILED, RUNNING, Job, Progress, follow, result_name, start
from layercard.report.app.library import (
    LARGEST,
    MOST_FOLDERS,
    Choice,
    Entry,
    Library,
    by_hand,
    changes,
    choose,
    command_line,
    read_entry,
    rows,
    wishes,
)
from layercard.report.app.server import FOLDER, MOST_BYTES, MOST_WORDS, Guard, is_local, own_names, sweep
from layercard.report.roi import FIGURES
from layercard.selection.placement import Placement
from layercard.selection.select import select
from tiny import build_tiny, tiny_tokenizer

NASTY = "<script>alert(1)</script>${alert(2)}{{alert}}@children"


def saved(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def entry_of(value: dict[str, Any], name: str = "card.json") -> Entry:
    found = read_entry("key", name, json.dumps(value).encode())
    assert found is not None
    return found


def picked(entry: Entry, *layers: str) -> Placement:
    placement = by_hand(entry.card, layers).placement  # type: ignore[arg-type]
    assert placement is not None
    return placement


def shown(markup: str) -> str:
    """What a reader sees of HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


@pytest.fixture(scope="module")
def card() -> LayerCard:
    return LayerCard.from_json(fake_card(16))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a card, what was made from it, and files that are broken in several ways."""
    value = fake_card(12)
    saved(tmp_path / "card.json", value)
    saved(tmp_path / "placement.json", fake_placement(value, [3, 8]))
    saved(tmp_path / "adapter" / "run.json", fake_run(value, [4]))
    saved(tmp_path / "compare" / "placement" / "run.json", fake_run(value, [3, 8]))
    saved(tmp_path / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    saved(tmp_path / "compare" / "compare.json", fake_comparison(value, {"all": list(range(12)), "placement": [3, 8]}))
    (tmp_path / "cut.json").write_text('{"schema": "layercard/1", "mod', encoding="utf-8")
    (tmp_path / "list.json").write_text("[1, 2]", encoding="utf-8")
    (tmp_path / "digits.json").write_text('{"schema": "layercard/1", "model": ' + "9" * 6000 + "}", encoding="utf-8")
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    saved(tmp_path / "old.json", {"schema": "layercard/0"})
    saved(tmp_path / "million.json", {**value, "model": {**value["model"], "layers": 10**6}})
    (tmp_path / "nan.json").write_text(json.dumps({**value, "descent": [float("nan")] * 12}), encoding="utf-8")
    return tmp_path


class TestFiles:
    def test_one_bad_file_does_not_stop_the_others(self, folder: Path) -> None:
        entries = {entry.name: entry for entry in Library([folder]).entries()}
        whole = {name: entry.kind for name, entry in entries.items() if entry.problem is None}
        assert whole == {
            "card.json": "card",
            "placement.json": "placement",
            "adapter/run.json": "run record",
            "compare/placement/run.json": "run record",
            "compare/compare.json": "comparison",
        }
        broken = {name: entry.problem for name, entry in entries.items() if entry.problem is not None}
        assert set(broken) == {"cut.json", "list.json", "digits.json", "deep.json", "old.json", "million.json", "nan.json"}
        for name, problem in broken.items():
            assert problem is not None and name in problem and "\n" not in problem and len(problem) <= 300
        assert "finite" in str(broken["nan.json"]) and "'layercard/0'" in str(broken["old.json"])

    def test_links_out_of_the_folder_and_hidden_files_are_not_read(self, tmp_path: Path) -> None:
        outside = saved(tmp_path / "outside" / "secret.json", fake_card(4))
        inside = tmp_path / "inside"
        saved(inside / ".hidden.json", fake_card(4))
        saved(inside / ".git" / "card.json", fake_card(4))
        (inside / "link.json").symlink_to(outside)
        (inside / "folder").symlink_to(outside.parent)
        saved(inside / "/".join("abcdef"[: MOST_FOLDERS + 1]) / "far.json", fake_card(4))
        assert Library([inside]).entries() == []

    def test_keys_are_looked_up_not_opened(self, folder: Path) -> None:
        explorer = Explorer(Library([folder]))
        (_, key), *_ = explorer.cards([])
        entry = explorer.card([], key)
        assert entry is not None and entry.name == "card.json"
        placement = next(entry.key for entry in explorer.entries([]) if entry.kind == "placement")
        for wrong in ("../../etc/passwd", str(folder / "card.json"), "card.json", "", None, "file:0", placement):
            assert explorer.card([], wrong) is None

    def test_what_changed_is_read_again(self, tmp_path: Path) -> None:
        library = Library([tmp_path])
        path = saved(tmp_path / "card.json", fake_card(4))
        first = library.entries()
        assert library.entries()[0] is first[0]
        saved(path, fake_card(6))
        found = library.entries()[0].card
        assert found is not None and found.model.layers == 6
        path.unlink()
        assert library.entries() == []

    def test_files_of_another_user_are_listed_as_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved(tmp_path / "card.json", fake_card(4))

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
        (found,) = Library([tmp_path]).entries()
        assert found.problem == "card.json: Permission denied; make it readable"

    def test_too_large_a_file_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "card.json"
        with path.open("wb") as file:
            file.truncate(LARGEST + 1)
        (found,) = Library([tmp_path]).entries()
        assert found.problem is not None and "20 MiB" in found.problem

    def test_a_pipe_is_not_read(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "card.json")
        (found,) = Library([tmp_path]).entries()
        assert found.problem == "card.json: not a regular file; make it readable"

    def test_models_and_data_lie_in_the_given_folders(self, tmp_path: Path) -> None:
        saved(tmp_path / "models" / "a" / "config.json", {})
        (tmp_path / "models" / "a" / "model.safetensors").write_bytes(b"")
        saved(tmp_path / "models" / "pickled" / "config.json", {})
        (tmp_path / "models" / "pickled" / "pytorch_model.bin").write_bytes(b"")
        (tmp_path / "models" / "b.gguf").write_bytes(b"")
        (tmp_path / "models" / "train.jsonl").write_text("", encoding="utf-8")
        (tmp_path / "models" / "notes.txt").write_text("", encoding="utf-8")
        cards = tmp_path / "cards"
        cards.mkdir()
        library = Library([cards], [tmp_path / "models"])
        assert set(library.models()) == {"models/a", "models/b.gguf"}
        assert set(library.data()) == {"models/train.jsonl"}

    def test_no_folder_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="is not a folder"):
            Library([tmp_path / "none"])


class TestUploads:
    def test_the_good_ones_are_taken_in_beside_the_bad(self, tmp_path: Path) -> None:
        uploads, cards = tmp_path / "uploads", tmp_path / "cards"
        cards.mkdir()
        good = saved(uploads / "good.json", fake_card(4))
        broken = uploads / "broken.json"
        broken.write_text("{", encoding="utf-8")
        foreign = saved(uploads / "package.json", {})
        elsewhere = saved(tmp_path / "elsewhere.json", fake_card(4))
        explorer = Explorer(Library([cards]), uploads)
        found, refused = explorer.upload([], [str(path) for path in (broken, foreign, elsewhere, good, uploads / ".." / "elsewhere.json")])
        assert [(entry.name, entry.problem is None) for entry in found] == [
            ("broken.json (uploaded)", False),
            ("good.json (uploaded)", True),
        ]
        assert len(refused) == 4
        assert sum("was not uploaded here" in words for words in refused) == 2 and "package.json is not a file of layercard" in refused[1]
        assert explorer.cards(found)[0][0].startswith("good.json (uploaded)")

    def test_no_more_than_enough(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "card.json", fake_card(4))
        found, refused = Explorer(Library([tmp_path]), tmp_path).upload([], [str(path)] * 25)
        assert len(found) == MOST_UPLOADS == 20 and len(refused) == 5
        assert len({entry.key for entry in found}) == 20


class TestChoice:
    def test_sliders_are_what_select_takes(self, card: LayerCard) -> None:
        wanted = wishes("performance", 4, 0, 80, 100, 100, 100)
        found = choose(card, wanted, seconds=5)
        assert found.placement == select(card, objective="performance", k=4, budgets=wanted.budgets)
        assert found.placement is not None and found.placement.predicted["step_time"]["share"] <= 0.8 + 1e-9

    def test_a_tighter_budget_never_keeps_more(self, card: LayerCard) -> None:
        kept = []
        for time_share in (100, 80, 65, 58):
            found = choose(card, wishes("performance", 0, 0, time_share, 100, 99, 100), seconds=5)
            assert found.placement is not None
            kept.append(found.placement.predicted["coverage"])
        assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]

    def test_what_cannot_be_met_is_said_in_the_words_of_the_page(self, card: LayerCard) -> None:
        found = choose(card, wishes("balanced", 0, 99, 100, 10, 100, 100))
        assert found.placement is None and found.layers == ()
        assert found.problem is not None and "peak memory" in found.problem and "--" not in found.problem

    def test_the_command_makes_the_same_choice(
        self, card: LayerCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        saved(tmp_path / "my card.json", card.to_json())
        wanted = wishes("balanced", 0, 75, 100, 80, 100, 100)
        import shlex

        words = shlex.split(command_line(wanted, "my card.json"))
        assert words[:3] == ["layercard", "select", "my card.json"]
        assert run(words[1:]) == 0
        capsys.readouterr()
        assert Placement.load(tmp_path / "placement.json") == choose(card, wanted, seconds=5).placement

    @pytest.mark.parametrize("layers", [[], ["99"], ["-1"], ["1", "1"], ["x"]])
    def test_layers_by_hand_are_checked(self, card: LayerCard, layers: list[str]) -> None:
        found = by_hand(card, layers)
        assert found.placement is None and found.problem

    def test_changes_are_those_between_the_predictions(self, card: LayerCard) -> None:
        one, two = by_hand(card, ["3", "9"]), by_hand(card, ["9", "10", "15"])
        assert one.placement is not None and two.placement is not None
        table = {name: (left, right, difference) for name, left, right, difference in changes(one.placement, two.placement)}
        shares = [found.placement.predicted["step_time"]["share"] for found in (one, two) if found.placement]
        assert table["Step time"][2] == f"−{100 * (shares[0] - shares[1]):.1f} points"
        assert table["Layers"] == ("2 of 16", "3 of 16", "+1")
        assert table["Layers in backward"] == ("13 of 16", "7 of 16", "−6")
        assert [name for name, *_ in changes(one.placement, one.placement) if _[2] != "same"] == []

    def test_a_front_is_made_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[LayerCard] = []
        monkeypatch.setattr("layercard.report.app.explorer.pareto", lambda card, progress: made.append(card) or len(made))
        explorer = Explorer(Library([tmp_path]))
        entries = [entry_of(fake_card(4, seed=seed)) for seed in range(MOST_FRONTS + 1)]
        for entry in [entries[0], *entries, entries[0]]:
            explorer.front(entry)
        assert len(made) == MOST_FRONTS + 2, "the oldest was dropped, so it is made anew"


class TestTrainers:
    def downloads(self, placement: Placement) -> dict[str, str]:
        links = re.findall(r'download="([^"]+)" href="data:[a-z/-]+;base64,([^"]+)"', views.take_away(Choice(placement)))
        return {name: base64.b64decode(data).decode("utf-8") for name, data in links}

    def test_downloads_adapt_exactly_the_placement(self) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        from layercard.adapters.apply import place
        from layercard.models.load import wrap_model

        base = wrap_model(build_tiny("llama"), tiny_tokenizer(), name="tiny")
        placement = place(base, [1, 2])
        files = self.downloads(placement)
        assert set(files) == {"placement.json", "lora_config.json", "train_trl.py"}
        assert Placement.from_json(json.loads(files["placement.json"])) == placement
        wrapped = get_peft_model(base.model, LoraConfig(**json.loads(files["lora_config.json"])))
        adapted = {name for name, module in wrapped.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)}
        assert adapted == set(placement.paths)

    @pytest.mark.parametrize("rate", [None, 0.0007])
    def test_the_script_trains_with_a_rate_for_adapters(self, rate: float | None) -> None:
        placement = Placement.from_json({**fake_placement(fake_card(4), [1]), "learning_rate": rate})
        assert f"learning_rate={rate or 0.002:g})" in self.downloads(placement)["train_trl.py"]

    @pytest.mark.parametrize("name", ['x"""\nimport os; os.system("id")\n"""', "\\", "'''", NASTY, "{model}"])
    def test_a_name_stays_a_string_in_the_script(self, name: str) -> None:
        placement = fake_placement(fake_card(4, model={"name": name, "fingerprint": "f", "layers": 4}), [1, 3])
        tree = ast.parse(self.downloads(Placement.from_json(placement))["train_trl.py"])
        (model,) = (node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "model")
        assert ast.literal_eval(model) == name
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]


class TestHtml:
    def test_whatever_a_card_says_is_text(self, tmp_path: Path) -> None:
        value = fake_card(6, model={"name": NASTY, "fingerprint": "ff", "layers": 6})
        value["data"]["source"] = "<img src=x onerror=alert(3)>"
        entry = entry_of(value, "<b>.json")
        placement = choose(entry.card, wishes("cost", 2, 0, 100, 100, 100, 100))  # type: ignore[arg-type]
        parts = [
            views.roadmap([entry], entry),
            views.card(entry),
            views.card_table(entry.card, [1]),  # type: ignore[arg-type]
            views.tiles(placement),
            views.take_away(placement, NASTY),
            views.files([entry]),
            views.note(NASTY),
        ]
        for part in parts:
            assert "<script" not in part and "<img" not in part and "<b>.json" not in part
            assert not re.search(r"[{}$@]", part), "the page's template language must find nothing"
        assert NASTY in shown(parts[0]) and NASTY in shown(parts[-1])

    def test_control_characters_are_seen_and_do_nothing(self, tmp_path: Path) -> None:
        odd = "a\x1b[31m\u202eb\u200bc\x00"
        card = fake_card(4, model={"name": odd, "fingerprint": "f", "layers": 4})
        saved(tmp_path / "a\x1b\u202eb.json", card)
        (tmp_path / os.fsdecode(b"\xff.json")).write_text(json.dumps(card), encoding="utf-8")
        (tmp_path / "x\x9b.gguf").touch()
        explorer = Explorer(Library([tmp_path]))
        entries = explorer.entries([])
        first = explorer.card([], explorer.cards([])[0][1])
        texts = [*(text for pair in explorer.cards([]) for text in pair), *explorer.library.models()]
        texts += [views.files(entries), views.roadmap(entries, first), views.note(odd)]
        assert len(entries) == 2 and "\\u001b" in texts[0] and "\\u202e" in texts[0]
        for text in texts:
            assert not {unicodedata.category(letter) for letter in text.replace("\n", "")} & {"Cc", "Cf", "Cs"}, ascii(text)

    def test_tiles_say_what_is_predicted(self, card: LayerCard) -> None:
        found = choose(card, wishes("balanced", 0, 90, 100, 100, 100, 100), seconds=5)
        assert found.placement is not None
        text = shown(views.tiles(found, 0.04))
        for name, (value, _) in rows(found.placement).items():
            assert f"{name} {value}" in text
        assert "estimated from shapes alone" in text and "in 0.04 s" in text

    def test_broken_files_are_listed_with_their_reason(self, folder: Path) -> None:
        text = shown(views.files(Library([folder]).entries()))
        assert "12 files" in text and "nan.json: descent.0: Input should be a finite number" in text

    def test_figures_mark_the_choice_and_the_budgets(self, card: LayerCard) -> None:
        wanted = wishes("balanced", 0, 80, 90, 100, 100, 100)
        found, hand = choose(card, wanted), by_hand(card, ["1"])
        drawn = views.front(None, "time", found, hand, wanted)
        assert [trace.name for trace in drawn.data[-2:]] == ["chosen", "by hand"]
        assert found.placement is not None
        assert drawn.data[-2].x == (100 * found.placement.predicted["step_time"]["share"],)
        assert {(shape.x0, shape.y0) for shape in drawn.layout.shapes} == {(90, 0), (0, 80)}
        assert list(views.depth(card, "gain_estimate", [2, 5]).data[-1].x) == [2, 5]


class TestCompareAndMoney:
    def test_two_cards_get_a_verdict(self, tmp_path: Path) -> None:
        first = fake_card(12)
        second = {**fake_card(12, seed=1), "data": {**first["data"], "source": "webnlg/train.jsonl", "fingerprint": "9"}}
        saved(tmp_path / "a.json", first)
        saved(tmp_path / "b.json", second)
        saved(tmp_path / "c.json", fake_card(5, model={"name": "other", "fingerprint": "x", "layers": 5}))
        explorer = Explorer(Library([tmp_path]))
        a, b, c = (entry for _, key in explorer.cards([]) if (entry := explorer.card([], key)))
        text = shown(explorer.compare([], a.key, b.key, 3))
        assert any(word in text for word in ("reuse the card", "profile again", "not enough evidence"))
        assert "Layers of a.json" in text and "Gain estimate" in text
        assert "different models" in shown(explorer.compare([], a.key, c.key, 3))
        assert "two different cards" in shown(explorer.compare([], a.key, a.key, 3))
        assert "not in the list" in shown(explorer.compare([], a.key, "/etc/passwd", 3))
        assert explorer.sibling([], a) == b.key and explorer.sibling([], b) == a.key

    def test_savings_come_from_the_runs_of_the_model(self, folder: Path) -> None:
        explorer = Explorer(Library([folder]))
        (_, key), *_ = explorer.cards([])
        entry = explorer.card([], key)
        assert entry is not None and entry.card is not None
        figures = [field.default for field in FIGURES.values()]
        found = files.saved(figures, "EUR", picked(entry, "3", "8"), entry, explorer.entries([]))
        share = fake_comparison(fake_card(12), {"placement": [3, 8]})["rows"][0]["time_share"] / 100
        assert "1 timing" in found.ratios.time.source, "the run in the comparison's folder is not counted twice"
        assert found.ratios.time.measured and found.ratios.time.mid == pytest.approx(share)
        assert found.results["training_saved"].mid == pytest.approx(2.5 * 20 * 8 * (1 - share))
        headline, table = explorer.saves([], key, by_hand(entry.card, ["3", "8"]), "EUR", *figures)
        assert "Saved a month" in shown(headline) and "EUR" in shown(headline) and "Shorter training" in shown(table)

    def test_nothing_measured_saves_nothing(self) -> None:
        entry = entry_of(fake_card(12))
        found = files.saved([field.default for field in FIGURES.values()], "USD", picked(entry, "3"), entry, [entry])
        assert found.results["saved_month"].mid == 0
        headline, table = map(shown, views.savings(found))
        assert "never" in headline and "never months" not in headline
        assert "a figure above is empty" in table

    @pytest.mark.parametrize(
        ("name", "given", "words"),
        [
            *(("gpu_watts", "abc", "Power of a GPU"), ("gpus", -1, "GPUs a run"), ("gpus", 1.5, "GPUs")),
            *(("gpu_price_per_hour", typed, "GPU price") for typed in ("4,5", "1,900", "nan", "2.5.1")),
        ],
    )
    def test_figures_out_of_range_are_one_line(self, name: str, given: Any, words: str) -> None:
        figures = [given if figure == name else field.default for figure, field in FIGURES.items()]
        entry = entry_of(fake_card(12))
        with pytest.raises(ReportError, match=words):
            files.saved(figures, "USD", picked(entry, "3"), entry, [entry])

    def test_fields_are_all_of_the_calculator(self) -> None:
        from layercard.report.roi import RoiInputs

        assert {*FIGURES, "currency"} == set(RoiInputs.model_fields)


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


class TestJobs:
    def job(self, tmp_path: Path, text: str) -> Job:
        made = tmp_path / "work" / "card.json"
        made.parent.mkdir()
        return Job("profile", script(text), made, tmp_path / "m-d.card.json")

    def test_a_finished_job_moves_its_card(self, tmp_path: Path) -> None:
        lines = "progress\tload\t1\t1\nprogress\tfit pass\t2\t4\n"
        text = f"import sys; sys.stderr.write({lines!r}); open({str(tmp_path / 'work' / 'card.json')!r}, 'w').write('x')"
        found = self.job(tmp_path, text).wait(30)
        assert (found.state, found.share) == (DONE, 1.0)
        assert (tmp_path / "m-d.card.json").read_text(encoding="utf-8") == "x"
        assert [path.name for path in tmp_path.iterdir()] == ["m-d.card.json"]

    def test_a_card_that_is_there_stays(self, tmp_path: Path) -> None:
        (tmp_path / "m-d.card.json").write_text("old", encoding="utf-8")
        found = self.job(tmp_path, f"open({str(tmp_path / 'work' / 'card.json')!r}, 'w').write('new')").wait(30)
        assert found.message == str(tmp_path / "m-d-2.card.json")
        assert (tmp_path / "m-d.card.json").read_text(encoding="utf-8") == "old"

    def test_a_failed_job_says_why_and_leaves_nothing(self, tmp_path: Path) -> None:
        half = f"open({str(tmp_path / 'work' / 'card.json')!r}, 'w').write('half')"
        text = f"import sys; {half}; sys.stderr.write('error: no such thing'); sys.exit(2)"
        found = self.job(tmp_path, text).wait(30)
        assert (found.state, found.message) == (FAILED, "no such thing")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("deaf", [False, True], ids=["hears", "deaf"])
    def test_cancelling_leaves_nothing(self, tmp_path: Path, deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("layercard.report.app.jobs.PATIENCE", 1.0)
        ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);" if deaf else ""
        text = (
            f"{ignore}import sys, time; open({str(tmp_path / 'work' / 'card.json')!r}, 'w').write('half');"
            "sys.stderr.write('progress\\tfit pass\\t1\\t9\\n'); sys.stderr.flush(); time.sleep(60)"
        )
        job = self.job(tmp_path, text)
        while job.running and not job.progress.doing.startswith("measuring"):
            time.sleep(0.01)
        assert job.running and "Measuring every layer, 1 of 9" in shown(views.job(job.progress))
        assert job.cancel().state == CANCELLING and "Cancelling" in shown(views.job(job.progress))  # heard before the process has ended
        assert job.wait(30).state == CANCELLED
        assert not job.running and list(tmp_path.iterdir()) == []

    def test_a_folder_is_moved_whole(self, tmp_path: Path) -> None:
        (tmp_path / "m-run").mkdir()
        (tmp_path / "work").mkdir()
        text = f"import pathlib; p = pathlib.Path({str(tmp_path / 'work' / 'run')!r}); p.mkdir(); (p / 'x').touch()"
        found = Job("train", script(text), tmp_path / "work" / "run", tmp_path / "m-run").wait(30)
        assert found.message == str(tmp_path / "m-run-2") and (tmp_path / "m-run-2" / "x").exists() and not (tmp_path / "work").exists()

    def test_the_bar_never_falls_and_counts_short_trainings(self) -> None:
        """The bar of a whole run, from the lines that one says: a race of three heats of 2 steps and a final of two of 4, then 10 steps."""
        heats = [f"progress\ttrain\t{step}\t{steps}\n" for steps in (2, 2, 2, 4, 4) for step in range(1, steps + 1)]
        lines = [
            *("progress\tload\t1\t1\n", "progress\ttime a few steps\t4\t4\n", "an odd line\n"),
            "search: no card; race of 1 candidates, 2 steps each, two of them again for 4 (up to 9 s)\n",
            *(*heats, "progress\trace trials\t1\t2\n", "chosen: all layers, learning rate 0.01; best\n"),
            *(f"progress\ttrain\t{step}\t10\n" for step in range(1, 11)),
        ]
        progress, shares, doing = Progress(RUNNING), [], []
        for line in lines:
            progress = follow(progress, line, "run")
            shares.append(progress.share)
            doing.append(progress.doing)
        assert shares == sorted(shares) and shares[-1] > 0.9 and shares[2] < shares[len(heats) + 3] < shares[-10]
        assert "short trainings of the candidates, 14 of 14 steps" in doing and doing[-1] == "training, 10 of 10 steps"
        assert [text.partition(":")[0] for text in progress.said] == ["search", "chosen"]

    def test_one_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("layercard.report.app.explorer.start", lambda *_, **__: self.job(tmp_path, "import time; time.sleep(60)"))
        (tmp_path / "m.gguf").touch()
        explorer = Explorer(Library([tmp_path]))
        asked = ("profile", "m.gguf", "synthetic", "none", 8, Choice(None))
        assert "Starting" in shown(explorer.start(*asked))
        assert "running already" in shown(explorer.start(*asked))
        assert "Cancelling" in shown(explorer.cancel())
        explorer.close()
        assert "cancelled" in shown(explorer.progress())

    @pytest.mark.parametrize(
        "line", ["progress\tfit pass\tx\t4\n", "progress\tfit pass\n", "anything", "", "progress\tfit pass\t-1\t4", "progress\todd\t1\t4"]
    )
    def test_other_lines_tell_nothing(self, line: str) -> None:
        before = Progress(RUNNING, "load", 1, 1)
        assert follow(before, line, "profile") is before

    @pytest.mark.parametrize(("model", "data"), [("../..", "/etc/passwd"), ("a/../b", "x"), ("", ""), (NASTY, NASTY), ("-o", "--force")])
    def test_names_of_new_cards_stay_in_the_folder(self, tmp_path: Path, model: str, data: str) -> None:
        name = result_name(model, data, ".card.json")
        assert re.fullmatch(r"[\w][\w.-]*\.card\.json", name) and (tmp_path / name).resolve().parent == tmp_path

    def test_models_and_data_of_the_list_alone_can_be_profiled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        explorer = Explorer(Library([tmp_path]))
        monkeypatch.setattr("layercard.report.app.explorer.start", lambda *_, **__: pytest.fail("started"))
        (tmp_path / "m.gguf").write_bytes(b"")
        for model, data in (
            ("/etc", "synthetic"),
            ("../m.gguf", "synthetic"),
            (None, "synthetic"),
            ("m.gguf", "/etc/passwd"),
            ("m.gguf", "hub:x"),
        ):
            assert "choose" in shown(explorer.start("profile", model, data, "none", 8, Choice(None)))
        assert "choose data" in shown(explorer.start("profile", "m.gguf", "synthetic", "/etc/passwd", 8, Choice(None)))
        assert "choose layers" in shown(explorer.start("train", "m.gguf", "synthetic", "none", 8, Choice(None)))

    def test_a_tiny_model_gets_a_card_and_is_trained(self, tmp_path: Path, tiny_folder: Path, tiny_file: Path) -> None:
        cards = tmp_path / "cards"
        cards.mkdir()
        explorer = Explorer(Library([cards], [tmp_path]))
        model, data = next(iter(explorer.library.models())), next(iter(explorer.library.data()))

        def done(kind: str, records: int, valid: str, picked: Choice) -> str:
            explorer.start(kind, model, data, valid, records, picked)
            assert explorer.job is not None
            found = explorer.job.wait(280)
            assert found.state == DONE, found.message
            return shown(explorer.progress())

        assert "tiny-llama-tiny.card.json" in done("profile", 16, "none", Choice(None))
        ((label, key),) = explorer.cards([])
        assert label.startswith("cards/tiny-llama-tiny.card.json")
        hand, words, _ = explorer.by_hand([], key, explorer.explore([], key, "balanced", 0, 90, 100, 100, 100, 100)[0], ["1"])
        assert hand.layers == (1,) and "By hand" in shown(words)
        said = done("train", 8, data, hand)
        assert "held-out loss went from" in said and "Layers 1" in said and (cards / "tiny-llama-tiny-adapter" / "run.json").is_file()

    def test_a_killed_app_takes_its_profile_along(self, tmp_path: Path, tiny_folder: Path) -> None:
        start = f"""
from pathlib import Path
from layercard.report.app.jobs import start
job = start("profile", Path({str(tiny_folder)!r}), "synthetic", 512, Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))
print(job._process.pid, flush=True)
input()
"""
        with subprocess.Popen(script(start), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as app:
            assert app.stdout is not None
            profile = int(app.stdout.readline())
            assert list(tmp_path.glob("profile-*"))
            app.kill()
        for _ in range(500):
            if not Path(f"/proc/{profile}").exists() or "State:\tZ" in Path(f"/proc/{profile}/status").read_text(encoding="utf-8"):
                break
            time.sleep(0.02)
        else:
            pytest.fail("the profile runs on")
        assert not list(tmp_path.glob("profile-*"))

    def test_the_command_names_files_and_no_shell(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("layercard.report.app.jobs.Job", lambda kind, command, *_: command)
        words = start("profile", Path("/models/a b"), "/data/x;y.jsonl", 8, tmp_path, tmp_path)
        assert words[1:5] == ["-m", "layercard.report.app.jobs", "profile", "/models/a b"] and "/data/x;y.jsonl" in words  # type: ignore[index, operator]


OWN = "127.0.0.1:7860"
JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"


class TestGuard:
    guard = Guard(app=None, hosts=own_names("127.0.0.1", 7860))  # type: ignore[arg-type]

    def status(self, path: str = "/", host: str = OWN, guard: Guard | None = None, **headers: str) -> int | None:
        """The status that a request is refused with; `None` where it is passed on."""
        sent = [(b"host", host.encode()), *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items())]
        refusal = (guard or self.guard).refusal({"type": "http", "scheme": "http", "path": path, "headers": sent})
        return refusal and refusal[0]

    @pytest.mark.parametrize("path", ["/", "/config", JOIN, UPLOAD, "/gradio_api/heartbeat/abc", "/assets/a.js", "/theme.css"])
    @pytest.mark.parametrize("host", [OWN, "localhost:7860", "[::1]:7860", "LocalHost:7860"])
    def test_the_page_is_served(self, path: str, host: str) -> None:
        assert self.status(path, host, origin=f"http://{host}", sec_fetch_site="same-origin") is None
        assert self.status(path, host, sec_fetch_site="none") is None and self.status(path, host) is None

    @pytest.mark.parametrize(
        "path",
        [
            *("/gradio_api/file=/etc/passwd", "/gradio_api/file=http://example.org", "/file=/etc/passwd", "/etc/passwd"),
            *("/gradio_api/proxy=http://example.org", "/assets/../../etc/passwd", "/static/../secret", "/monitoring"),
            *("/gradio_api/vibe-edit", "/gradio_api/runs", "/gradio_api/mcp/sse", "/docs", "/openapi.json"),
        ],
    )
    def test_nothing_else_is(self, path: str) -> None:
        assert self.status(path) == 403

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:7860", "", "127.0.0.1.evil.example:7860", "192.168.0.2:7860", "127.0.0.1", "localhost:80"]
    )
    def test_other_names_and_ports_get_nothing(self, host: str) -> None:
        assert self.status("/", host) == 403

    def test_two_names_get_nothing(self) -> None:
        headers = [(b"host", OWN.encode()), (b"host", b"evil.example")]
        assert self.guard.refusal({"type": "http", "scheme": "http", "path": "/", "headers": headers})

    @pytest.mark.parametrize("path", ["/", "/config", JOIN, UPLOAD, "/gradio_api/queue/data", "/gradio_api/heartbeat/abc"])
    @pytest.mark.parametrize(
        "headers",
        [
            *({"origin": origin} for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:7860")),
            *({"origin": origin} for origin in (f"https://{OWN}", f"http://{OWN}.evil.example", "")),
            *({"sec_fetch_site": site} for site in ("cross-site", "same-site", "")),
        ],
        ids=str,
    )
    def test_other_sites_get_nothing(self, path: str, headers: dict[str, str]) -> None:
        assert self.status(path, **headers) == 403

    @pytest.mark.parametrize(("path", "most"), [(UPLOAD, MOST_BYTES), (JOIN, MOST_WORDS)])
    def test_long_bodies_are_refused_unread(self, path: str, most: int) -> None:
        assert [self.status(path, content_length=str(length)) for length in (most, most + 1, "1e3", "-1")] == [None, 413, 413, 413]

    def test_a_server_for_others_goes_by_any_name_and_serves_its_own_page(self) -> None:
        guard = Guard(app=None, hosts=own_names("0.0.0.0", 80))  # type: ignore[arg-type]
        assert self.status("/", "build-box:7860", guard, origin="http://build-box:7860") is None
        assert self.status("/", "build-box:7860", guard, origin="http://evil.example") == 403
        assert self.status("/", "localhost", Guard(app=None, hosts=own_names("127.8.8.8", 80))) is None  # type: ignore[arg-type]
        places = ("127.0.0.1", "127.1.2.3", "localhost", "::1", "0.0.0.0", "10.0.0.1", "::", "127.0.0.1.x")
        assert [is_local(host) for host in places] == [True] * 4 + [False] * 4


def answer(request: urllib.request.Request | str) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode("utf-8", "replace"), {name.lower(): value for name, value in reply.headers.items()}
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode("utf-8", "replace"), {}


class TestServer:
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
        """`layercard app` in a process of its own: its address, its folder of cards and that of temporary files."""
        pytest.importorskip("gradio")
        folder = tmp_path_factory.mktemp("cards")
        saved(folder / "card.json", fake_card(8))
        saved(folder.parent / "outside.json", fake_card(8, model={"name": "outside", "fingerprint": "o", "layers": 8}))
        command = [sys.executable, "-m", "layercard", "app", "--cards", str(folder), "--port", "0", "--no-browser"]
        temporary = tmp_path_factory.mktemp("temporary")
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **streams, cwd=folder, env={**os.environ, "TMPDIR": str(temporary)})
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + (process.stderr.read() if process.poll() is not None else "")
        yield found[0], folder, temporary
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "ended\n"), err
        assert not list(temporary.iterdir())

    def test_the_page_comes_with_a_policy(self, server: tuple[str, Path, Path]) -> None:
        status, text, headers = answer(f"{server[0]}/")
        assert status == 200 and "layercard" in text
        assert "connect-src 'self'" in headers["content-security-policy"]
        assert "share" not in json.loads(answer(f"{server[0]}/config")[1]).get("share_url", "")

    @pytest.mark.parametrize(
        "path", ["gradio_api/file={}", "file={}", "gradio_api/file=..%2foutside.json", "assets/..%2f..%2f..%2f..%2fetc/passwd"]
    )
    def test_files_are_not_served(self, server: tuple[str, Path, Path], path: str) -> None:
        for target in (server[1] / "card.json", server[1].parent / "outside.json", Path("/etc/passwd")):
            status, text, _ = answer(f"{server[0]}/{path.format(target)}")
            assert status in (403, 404) and "fingerprint" not in text and "root:" not in text

    @pytest.mark.parametrize("path", ["", "config", "gradio_api/upload", "gradio_api/queue/join", "gradio_api/queue/data?session_hash=x"])
    @pytest.mark.parametrize(
        "headers",
        [
            {"Host": "evil.example"},
            {"Origin": "http://evil.example"},
            {"Origin": "http://localhost:1"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
        ],
        ids=str,
    )
    def test_other_sites_get_nothing(self, server: tuple[str, Path, Path], path: str, headers: dict[str, str]) -> None:
        for method in ("GET", "POST", "OPTIONS"):
            asked = {**headers, "Access-Control-Request-Method": "POST"}
            status, _, back = answer(urllib.request.Request(f"{server[0]}/{path}", headers=asked, method=method))
            assert status == 403 and not any(name.startswith("access-control") for name in back)

    def test_no_websocket_opens(self, server: tuple[str, Path, Path]) -> None:
        headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "eHg=", "Sec-WebSocket-Version": "13"}
        assert answer(urllib.request.Request(f"{server[0]}/gradio_api/queue/join", headers=headers))[0] in (403, 404, 405)

    def upload(self, address: str, *files: tuple[str, bytes], lines: bool = False, **headers: str) -> tuple[int, str]:
        """What an upload of files is answered with; `lines` sends it in chunks, without saying how long it is."""
        parts = []
        for name, data in files:
            parts += [f'--m\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode(), data, b"\r\n"]
        body: Any = [*parts, b"--m--\r\n"]
        headers |= {"Content-Type": "multipart/form-data; boundary=m"}
        sent = iter(body) if lines else b"".join(body)
        status, text, _ = answer(urllib.request.Request(f"{address}/gradio_api/upload", sent, headers))
        return status, text

    def call(self, address: str, upload_path: str) -> str:
        """What the page's upload event says to a file that a visitor claims to have uploaded."""
        config = json.loads(answer(f"{address}/config")[1])
        state, button = (next(c["id"] for c in config["components"] if c["type"] == kind) for kind in ("state", "uploadbutton"))
        event = next(d for d in config["dependencies"] if d["inputs"] == [state, button])
        file = {"path": upload_path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.json"}
        data = {"data": [None, [file]], "fn_index": event["id"], "session_hash": "test"}
        join = urllib.request.Request(f"{address}/gradio_api/queue/join", json.dumps(data).encode(), {"Content-Type": "application/json"})
        assert answer(join)[0] == 200
        with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=test", timeout=60) as stream:
            lines = []
            for line in stream:
                lines.append(line.decode())
                if "process_completed" in lines[-1]:
                    break
        return "".join(lines)

    @pytest.mark.parametrize("lines", [False, True], ids=["whole", "chunked"])
    def test_uploads_are_read(self, server: tuple[str, Path, Path], lines: bool) -> None:
        data = json.dumps(fake_card(4)).encode()
        status, text = self.upload(server[0], ("mine.json", data), ("more.JSON", data), lines=lines, Origin=server[0])
        assert status == 200
        assert "1 file(s) taken in" in self.call(server[0], json.loads(text)[0])

    @pytest.mark.parametrize("lines", [False, True], ids=["whole", "chunked"])
    @pytest.mark.parametrize(
        ("files", "status", "words"),
        [
            ([("notes.txt", b"hello")], 400, "not a .json file"),
            ([("good.json", b"{}"), ("run.json.exe", b"{}")], 400, "not a .json file"),
            ([("c.json", b"{}")] * (MOST_UPLOADS + 1), 400, f"over {MOST_UPLOADS} files"),
            ([("big.json", b" " * (LARGEST + 1))], 413, "20 MiB"),
            ([(f"{number}.json", b" " * LARGEST) for number in range(6)], 413, "100 MiB"),
        ],
        ids=["ending", "second ending", "count", "size", "total"],
    )
    def test_uploads_over_the_limits_are_refused_and_leave_nothing(
        self, server: tuple[str, Path, Path], files: list[tuple[str, bytes]], status: int, words: str, lines: bool
    ) -> None:
        def stored() -> set[Path]:
            return {path for path in server[2].rglob("*") if path.is_file()}

        before = stored()
        try:
            said, text = self.upload(server[0], *files, lines=lines)
        except OSError:  # the server hung up while the rest was on its way
            assert sum(len(data) for _, data in files) > LARGEST
        else:
            assert said == status and words in text
        assert stored() <= before

    def test_a_path_is_no_upload(self, server: tuple[str, Path, Path]) -> None:
        for path in ("/etc/passwd", str(server[1].parent / "outside.json"), str(server[1] / "card.json"), "http://127.0.0.1:9/x.json"):
            said = self.call(server[0], path)
            assert "taken in" not in said and "outside" not in said.replace("outside.json", ""), said
            assert '"success":false' in said.replace(" ", "") or "was not uploaded here" in said


class TestSweep:
    def test_folders_of_killed_apps_go_and_those_of_running_ones_stay(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        outside = saved(tmp_path / "outside" / "card.json", {})
        for name in ("killed", "runs"):
            saved(tmp_path / f"{FOLDER}{name}" / "upload.json", {})
            (tmp_path / f"{FOLDER}{name}" / ".lock").touch()
        (outside.parent / ".lock").touch()
        (tmp_path / f"{FOLDER}link").symlink_to(outside.parent)
        hold = "import pathlib, sys; from layercard.files import alone\nwith alone(pathlib.Path(sys.argv[1])): print(1, flush=1); input()"
        with subprocess.Popen([*script(hold), str(tmp_path / f"{FOLDER}runs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None and other.stdout.readline()
            sweep()
            other.kill()
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{FOLDER}link", f"{FOLDER}runs", "outside"]
        assert (tmp_path / f"{FOLDER}runs" / "upload.json").is_file() and outside.is_file()


class TestCommand:
    def test_without_gradio_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr("layercard.report.app.server.find_spec", lambda name: None)
        assert run(["app", "--no-browser"]) == 2
        assert (
            capsys.readouterr().err
            == 'error: the app needs Gradio, which is not installed; install it with `pip install "layercard[app]"`\n'
        )

    def test_a_folder_that_is_not_there(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        pytest.importorskip("gradio")
        assert run(["app", "--no-browser", "--cards", str(tmp_path / "none")]) == 2
        assert "is not a folder" in capsys.readouterr().err

    def test_a_port_that_is_taken(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        pytest.importorskip("gradio")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            assert run(["app", "--no-browser", "--cards", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
        assert "cannot listen on 127.0.0.1:" in capsys.readouterr().err

    def test_others_are_warned_of(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: object, **__: object) -> None:
            raise OutputError("stopped")

        pytest.importorskip("gradio")
        monkeypatch.setattr("layercard.report.app.server.serving", stop)
        assert run(["app", "--no-browser", "--cards", str(tmp_path), "--host", "0.0.0.0"]) == 2
        assert capsys.readouterr().err.startswith("warning: 0.0.0.0 can be reached from other machines")

    def test_choices_without_a_card(self, tmp_path: Path) -> None:
        explorer = Explorer(Library([tmp_path]))
        assert explorer.cards([]) == [] and "Make the Layer Card" in shown(explorer.roadmap([], None))
        assert "no file of layercard here yet" in shown(views.files([]))
        assert "no placement" in shown(views.tiles(Choice(None)))
