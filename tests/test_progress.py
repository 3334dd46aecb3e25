"""What is told of a run while it goes on: remaining time, phases with time and memory, the log."""

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cards import fake_card
from layercard.adapters.apply import place
from layercard.commands.main import run
from layercard.commands.remaining import Pace, Whole
from layercard.commands.terminal import Display
from layercard.data.load import Dataset
from layercard.measure import Phases
from layercard.models.load import BaseModel
from layercard.models.streamed import open_model
from layercard.profiling.profile import profile_records as profile
from layercard.profiling.streamed import stream_profile
from layercard.profiling.workload import comparison_work, profile_work, training_work
from layercard.settings import ProfileSettings
from layercard.training.train import train
from layercard.trials.compare import compare
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


def watched(work: dict[str, float], seconds: dict[str, float], parts: int = 10) -> list[tuple[float | None, float, float]]:
    """Phases one after another, each part of a phase taking as long; what was said remains after each part, what did, and the share."""
    clock, whole, said = Clock(), Whole(work), []
    left = sum(seconds.values())
    for name, took in seconds.items():
        whole.paces[name] = Pace(clock)
        for done in range(parts + 1):
            if done:
                clock.now += took / parts
                left -= took / parts
            whole.paces[name].update(done, parts)
            said.append((whole.remaining(), left, whole.share))
    return said


def test_the_whole_is_right_from_the_first_part_on_where_the_work_is_known() -> None:
    said = watched({"fit": 1.0, "held-out": 3.0, "probe": 6.0}, {"fit": 20.0, "held-out": 60.0, "probe": 120.0})
    assert said[0][0] is None
    assert [one for one, _, _ in said[1:]] == pytest.approx([left for _, left, _ in said[1:]])
    assert [share for _, _, share in said] == pytest.approx([1 - left / 200 for _, left, _ in said])


def test_work_that_was_guessed_wrongly_misleads_until_its_phase_begins() -> None:
    said = watched({"fit": 1.0, "probe": 1.0}, {"fit": 10.0, "probe": 90.0})
    assert said[5][0] == pytest.approx(15.0) and said[5][1] == pytest.approx(95.0)
    assert [one for one, _, _ in said[12:]] == pytest.approx([left for _, left, _ in said[12:]])


def test_phases_that_were_passed_over_count_as_done() -> None:
    clock = Clock()
    whole = Whole({"fit": 4.0, "held-out": 1.0, "probe": 5.0})
    whole.paces["probe"] = Pace(clock)  # the others were finished by an interrupted run
    whole.paces["probe"].update(4, 10)
    assert whole.share == pytest.approx(0.7) and whole.remaining() is None
    clock.now += 3.0
    whole.paces["probe"].update(5, 10)
    assert whole.remaining() == pytest.approx(15.0)
    whole.paces["other"] = Pace(clock)
    whole.paces["other"].update(1, 2)
    assert whole.remaining() == pytest.approx(15.0), "a phase that was not expected counts nothing"


def heard(run_it: Callable[[Callable[[str, int, int], None]], object]) -> list[str]:
    """The phases that progress is told of, in their order."""
    names: list[str] = []
    run_it(lambda phase, done, total: names.append(phase))
    return list(dict.fromkeys(names))


@pytest.mark.parametrize("probe", ["none", "step", "train"])
def test_the_phases_of_a_profile_are_the_expected_ones(probe: str, tiny_base: BaseModel) -> None:
    settings = ProfileSettings(rank=2, batch_size=3, probe=probe, probe_steps=4, cost=probe == "step")
    work = profile_work(tiny_base, dataset(), settings)
    assert heard(lambda tell: profile(tiny_base, dataset(), settings, tell)) == list(work)
    assert all(amount > 0 for amount in work.values())


def test_the_phases_of_a_streamed_profile_are_the_expected_ones(tiny_folder: Path) -> None:
    settings, streamed = ProfileSettings(rank=2, batch_size=3, cost=False), open_model(str(tiny_folder), device="cpu")
    work = profile_work(streamed.base, dataset(), settings, stream=True)
    assert heard(lambda tell: stream_profile(streamed, dataset(), settings, tell)) == list(work)


def test_the_phases_of_training_are_the_expected_ones(tiny_base: BaseModel, data: Dataset, valid: Dataset, tmp_path: Path) -> None:  # noqa: F811
    placement = place(tiny_base, [2])
    work = training_work(data, valid, FAST)
    assert heard(lambda tell: train(tiny_base, placement, data, tmp_path / "a", FAST, valid=valid, progress=tell)) == list(work)
    work = dict(comparison_work(["one", "two"], data, valid, FAST))
    both = [("one", placement), ("two", place(tiny_base, [1]))]
    names = heard(lambda tell: compare(tiny_base, both, data, valid, FAST, progress=tell))
    assert [name for name in names if name != "compare"] == list(work)


def test_the_bar_of_the_whole_is_full_at_the_end() -> None:
    with Display() as display:
        display.expect({"train": 2.0, "loss after": 1.0})
        display("train", 1, 2)
        (bar,) = (task for task in display._bars.tasks if task.description == "all")
        assert bar.completed == pytest.approx(1 / 3)
    assert bar.completed == 1.0


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
    settings = ProfileSettings(rank=2, batch_size=3, probe="none", cost=False)
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
