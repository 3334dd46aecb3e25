"""What is told of a run while it goes on: remaining time, phases with time and memory, the log."""

import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cards import fake_card
from layercard.adapters import place
from layercard.cli import run
from layercard.commands.terminal import Display, Pace
from layercard.data import Dataset
from layercard.models import BaseModel
from layercard.phases import Phases
from layercard.profiling import ProfileSettings, profile
from layercard.training import train
from test_cli import saved
from test_profile import dataset
from test_training import FAST, data, valid  # noqa: F401  fixtures


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paced(seconds: list[float], total: int, start: int = 0) -> tuple[Pace, Clock, list[float]]:
    """A phase whose parts took these seconds, and what it said remains after each."""
    clock = Clock()
    pace, said = Pace(clock), []
    pace.update(start, total)
    for at, one in enumerate(seconds, start + 1):
        clock.now += one
        pace.update(at, total)
        left = pace.remaining()
        assert left is not None
        said.append(left)
    return pace, clock, said


def test_remaining_time_of_a_steady_phase_is_right_from_the_first_part_on() -> None:
    assert paced([2.0] * 10, 10)[2] == pytest.approx([2.0 * left for left in range(9, -1, -1)])


def test_nothing_is_said_before_there_is_anything_to_judge_by() -> None:
    pace = Pace(Clock())
    assert pace.remaining() is None
    pace.update(3, 10)
    assert pace.remaining() is None


def test_what_an_interrupted_run_did_does_not_flatter_the_rate() -> None:
    _, _, said = paced([2.0, 2.0], 100, start=90)
    assert said == pytest.approx([18.0, 16.0])


def test_a_slow_beginning_is_forgotten() -> None:
    _, _, said = paced([30.0] + [1.0] * 40, 100)
    assert said[-1] == pytest.approx(59.0, rel=0.1)


def test_one_slow_part_moves_the_rest_by_its_share_only() -> None:
    usual, slow = [1.0] * 30, [1.0] * 30
    slow[-1] = 3.0
    assert paced(slow, 100)[2][-1] == pytest.approx(paced(usual, 100)[2][-1], rel=0.25)


def test_it_runs_down_while_a_part_is_at_work_and_never_up() -> None:
    pace, clock, said = paced([2.0] * 5, 10)
    seen = [said[-1]]
    for _ in range(8):
        clock.now += 0.5
        left = pace.remaining()
        assert left is not None
        seen.append(left)
    assert seen == pytest.approx([10.0, 9.5, 9.0, 8.5, 8.0, 8.0, 8.0, 8.0, 8.0])
    assert all(after <= before for before, after in pairwise(seen))


def test_many_parts_at_once_count_as_many() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.update(0, 160)
    clock.now += 8.0
    pace.update(16, 160)
    assert pace.remaining() == pytest.approx(72.0)


def test_bars_of_a_phase_that_starts_over_begin_anew() -> None:
    with Display() as display:
        for phase, done in (("train", 1), ("train", 2), ("train", 1)):
            display(phase, done, 2)
        assert len(display._bars.tasks) == 2


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
    assert [phase["name"] for phase in record["phases"]] == ["loss before", "begin", "train", "loss after", "save"]
    assert sum(phase["seconds"] for phase in record["phases"] if phase["name"] == "train") >= record["train_seconds"]
    peaks = [phase["resident_peak_bytes"] for phase in record["phases"]]
    assert peaks == sorted(peaks)


def test_card_with_measured_cost_has_its_phases_and_one_without_has_none(tiny_base: BaseModel) -> None:
    settings = ProfileSettings(rank=2, batch_size=3, probe="none")
    assert profile(tiny_base, dataset(), settings).phases == ()
    timed = profile(tiny_base, dataset(), ProfileSettings(rank=2, batch_size=3, probe="none", cost=True))
    assert [phase.name for phase in timed.phases] == ["fit", "held-out", "cost"]
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

    monkeypatch.setattr("layercard.commands.show.emit_json", noisy)
    assert run(["--log-level", level, "show", str(saved(tmp_path / "card.json", fake_card())), "--json"]) == 0
    assert capsys.readouterr().err.splitlines() == [f"{name}: said at {name}" for name in lines]
    assert logging.getLogger("layercard").level == logging.NOTSET


def test_library_says_nothing_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("layercard.test").error("unheard")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
