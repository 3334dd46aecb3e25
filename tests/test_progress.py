"""What is told of a run while it goes on: remaining time, phases with time and memory, the log."""

import logging
from pathlib import Path

import pytest
import torch

from cards import fake_card
from layercard.adapters.apply import place
from layercard.commands.main import run
from layercard.commands.terminal import Display, logging_to_stderr
from layercard.data.load import Dataset
from layercard.measure import Phases
from layercard.models.load import BaseModel
from layercard.profiling.profile import profile_records as profile
from layercard.settings import ProfileSettings
from layercard.training.train import train
from test_cli import saved
from test_profile import dataset
from test_training import FAST, data, valid  # noqa: F401  fixtures


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_bars_of_a_phase_that_starts_over_begin_anew() -> None:
    with Display() as display:
        for phase, done in (("train", 1), ("train", 2), ("train", 1)):
            display(phase, done, 2)
        assert [(task.description, task.completed) for task in display.bars.tasks] == [("train", 2), ("train", 1)]


def test_what_an_interrupted_run_did_does_not_flatter_the_remaining_time() -> None:
    clock = Clock()
    with Display() as display:
        display.bars.get_time = clock
        for done in (90, 91, 92):
            display("train", done, 100)
            clock.now += 2.0
        (task,) = display.bars.tasks
        assert task.time_remaining == 16


def test_phases_are_measured_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    phases = Phases(clock)
    with caplog.at_level(logging.INFO, logger="layercard"), phases.phase("load"):
        clock.now += 2.5
    (found,) = phases.to_json()
    assert found["name"] == "load"
    assert found["seconds"] == 2.5
    assert found["resident_peak_bytes"] > 2**20
    assert found["device_peak_bytes"] is None or torch.cuda.is_initialized()
    assert "load: 2.50 s, memory up to" in caplog.text


def test_a_phase_that_fails_is_not_kept() -> None:
    phases = Phases(Clock())
    with pytest.raises(ValueError, match="stopped"), phases.phase("load"):
        raise ValueError("stopped")
    assert phases.to_json() == []


def test_run_record_has_its_phases(tiny_base: BaseModel, data: Dataset, valid: Dataset, tmp_path: Path) -> None:  # noqa: F811
    record = train(tiny_base, place(tiny_base, [2]), data, tmp_path / "a", FAST, valid=valid)
    assert [phase["name"] for phase in record.phases] == ["loss before", "begin", "train", "loss after", "save"]
    assert sum(phase["seconds"] for phase in record.phases if phase["name"] == "train") >= record.train_seconds
    peaks = [phase["resident_peak_bytes"] for phase in record.phases]
    assert peaks == sorted(peaks)


def test_card_with_measured_cost_has_its_phases_and_one_without_has_none(tiny_base: BaseModel) -> None:
    settings = ProfileSettings(rank=2, batch_size=3, probe="none", cost=False)
    assert profile(tiny_base, dataset(), settings).phases == ()
    timed = profile(tiny_base, dataset(), ProfileSettings(rank=2, batch_size=3, probe="none", cost=True))
    assert [phase.name for phase in timed.phases] == ["fit", "cross", "held-out", "cost"]
    assert type(timed).from_json(timed.to_json()) == timed
    older = {key: value for key, value in timed.to_json().items() if key != "phases"}
    assert type(timed).from_json(older).phases == ()


@pytest.mark.parametrize(
    ("level", "lines"),
    [("debug", ["debug", "info", "warning", "error"]), ("info", ["info", "warning", "error"]), ("error", ["error"])],
)
def test_log_level_says_how_much_is_told(
    level: str, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def noisy(value: dict[str, object]) -> None:
        for name in ("debug", "info", "warning", "error"):
            logging.getLogger("layercard.test").log(logging.getLevelName(name.upper()), "said\nat %s", name)

    monkeypatch.setattr("layercard.commands.terminal.emit_json", noisy)
    assert run(["--log-level", level, "show", str(saved(tmp_path / "card.json", fake_card())), "--json"]) == 0
    assert capsys.readouterr().err.splitlines() == [f"{name}: said at {name}" for name in lines]
    assert logging.getLogger("layercard").level == logging.NOTSET


def test_a_warning_is_told_once_and_what_happens_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("info"):
        for text in ("one", "one", "two", "one"):
            logging.getLogger("layercard.test").warning(text)
        for _ in range(2):
            logging.getLogger("layercard.test").info("step")
    with logging_to_stderr("info"):  # another command
        logging.getLogger("layercard.test").warning("one")
    lines = ["warning: one", "warning: two", "info: step", "info: step", "warning: one"]
    assert capsys.readouterr().err.splitlines() == lines


def test_library_says_nothing_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("layercard.test").error("unheard")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
