"""Parts of a long computation in a folder: whole or not there, of one plan, of one run at a time."""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from layercard import checkpoint as saved, checkpoint as state_module, processes
from layercard.checkpoint import State, check_folder, discard, opened
from layercard.errors import LayercardError, OutputError
from layercard.files import alone, replacing
from layercard.profiling.fit import FitSums
from layercard.profiling.profile import profile_records as profile
from layercard.settings import ProfileSettings
from layercard.statistics.moments import GradientMoments, InputMoments
from test_profile import base_of, dataset


@dataclass(frozen=True)
class Part:
    name: str
    rows: list[torch.Tensor]
    at: tuple[int, float]
    thing: object


THING = object()
FORM = saved.Form((Part,), {"thing": THING})


def part() -> Part:
    whole = torch.arange(12.0).reshape(3, 4)
    return Part("μ", [whole, whole[1:], whole.T, torch.zeros(0, 3), torch.tensor(2, dtype=torch.int8)], (1, float("inf")), THING)


# --- values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["file", "bytes"])
def test_a_value_comes_back_as_it_was(way: str, tmp_path: Path) -> None:
    value = {"a": part(), "b": None, "c": True, "d": {}}
    if way == "file":
        saved.write(tmp_path / "x", FORM, value, plan="1")
        found = saved.read(tmp_path / "x", FORM, plan="1")
    else:
        found = saved.from_bytes(FORM, saved.to_bytes(FORM, value))
    assert found.keys() == value.keys()
    assert (found["b"], found["c"], found["d"]) == (None, True, {})
    assert found["a"].thing is THING
    assert (found["a"].name, found["a"].at) == ("μ", (1, float("inf")))
    for mine, theirs in zip(part().rows, found["a"].rows, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype


def test_a_value_of_another_kind_is_an_error_of_the_programmer() -> None:
    with pytest.raises(TypeError, match="Part"):
        saved.to_bytes(saved.Form(), part())


@pytest.mark.parametrize("damage", ["cut", "other label", "no file", "other classes", "noise"])
def test_what_is_not_whole_or_not_ours_is_not_read(damage: str, tmp_path: Path) -> None:
    path, form = tmp_path / "x", FORM
    saved.write(path, FORM, {"a": part()}, plan="1")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "noise":
        path.write_bytes(b"\x00" * 100)
    elif damage == "no file":
        path.unlink()
    elif damage == "other classes":
        form = saved.Form()
    assert saved.read(path, form, plan="2" if damage == "other label" else "1") is None


# --- folders --------------------------------------------------------------------------------------------------------------


def test_parts_of_another_plan_are_removed_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "state"
    with opened(folder, {"seed": 1, "rank": 8}, FORM) as state:
        state.save("a", part())
    with opened(folder, {"seed": 1, "rank": 8}, FORM) as state:
        assert state.load("a").name == "μ"
    with caplog.at_level(logging.WARNING), opened(folder, {"seed": 2, "rank": 8}, FORM) as state:
        assert state.load("a") is None
    assert caplog.messages == [f"{folder} was of another seed: starting over"]
    assert not list(folder.glob("*.safetensors"))


def test_a_part_that_another_plan_left_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """As after a kill between the new plan and the removal of the old parts."""
    with opened(tmp_path / "state", {"seed": 1}, FORM) as state:
        state.save("a", part())
        assert State(state.folder, "other", FORM).load("a") is None


def test_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with opened(folder, {}, FORM):
        for use in (lambda: opened(folder, {}, FORM).__enter__(), lambda: discard(folder), lambda: alone(folder).__enter__()):
            with pytest.raises(OutputError, match="another run is at work"):
                use()
    discard(folder)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for use in (lambda: check_folder(tmp_path), lambda: discard(tmp_path), lambda: opened(tmp_path, {}, FORM).__enter__()):
        with pytest.raises(OutputError, match="move it away"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with opened(tmp_path / "state", {}, FORM) as state:
        state.save("a", {"n": 1})
        monkeypatch.setattr(saved, "save_file", full)
        with pytest.raises(OutputError, match="No space left on device; make room"):
            state.save("a", {"n": 2})
        assert state.load("a") == {"n": 1}
    with pytest.raises(OutputError, match="No space left"), replacing(tmp_path / "x"):
        full()
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"plan.json", "a.safetensors"}


def test_snapshots_keep_to_a_twentieth_of_the_time_and_half_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(state_module.time, "monotonic", lambda: clock["now"])
    with opened(tmp_path / "state", {}, FORM) as state:

        def slow(value: int) -> Callable[[], dict[str, int]]:
            def make() -> dict[str, int]:
                return {"n": value}

            return make

        def at(now: float, value: int) -> int | None:
            clock["now"] = now
            state.snapshot("a", slow(value))
            found = state.load("a")
            return found["n"] if found else None

        assert at(29.0, 1) is None
        assert at(31.0, 2) == 2
        assert at(60.0, 3) == 2
        assert at(62.0, 4) == 4
        own = saved.write

        def write(*arguments: Any, **labels: str) -> None:
            clock["now"] += 10.0
            own(*arguments, **labels)

        monkeypatch.setattr(saved, "write", write)
        assert at(100.0, 5) == 5  # took 10 s, until 110
        assert at(309.0, 6) == 5
        assert at(311.0, 7) == 7
        monkeypatch.setattr(saved, "size", lambda form, value: 2**60)
        assert at(1000.0, 8) == 7


# --- a profile ------------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """What a kill looks like from inside."""


def stopping(after: int) -> Callable[[str, int, int], None]:
    calls = {"n": 0}

    def progress(phase: str, done: int, total: int) -> None:
        calls["n"] += 1
        if calls["n"] == after:
            raise Stopped

    return progress


@pytest.mark.parametrize("snapshots", [True, False])
def test_a_profile_interrupted_again_and_again_is_the_same_card(snapshots: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = ProfileSettings(rank=2, batch_size=3, probe="train", probe_steps=4, cost=False)
    whole = profile(base_of(), dataset(), how)
    if snapshots:
        monkeypatch.setattr(state_module, "EVERY", 0.0)
        monkeypatch.setattr(state_module, "SHARE", 0.0)
    folder, interrupts, after = tmp_path / "card.json.state", 0, 2
    while True:
        try:
            card = profile(base_of(), dataset(), how, stopping(after), state=folder)
            break
        except Stopped:
            interrupts, after = interrupts + 1, after + 1
    assert interrupts >= 3
    assert card.to_json() == whole.to_json()


def test_finished_parts_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how, folder = ProfileSettings(rank=2, batch_size=3, cost=True), tmp_path / "state"
    card = profile(base_of(), dataset(), how, state=folder)
    phases: list[str] = []
    again = profile(base_of(), dataset(), how, lambda phase, done, total: phases.append(phase), state=folder)
    assert again.to_json() == card.to_json()  # the readings of the clock too
    assert phases == []
    other = profile(
        base_of(), dataset(), ProfileSettings(rank=3, batch_size=3, cost=False), lambda phase, *_: phases.append(phase), state=folder
    )
    assert other.to_json() == profile(base_of(), dataset(), ProfileSettings(rank=3, batch_size=3, cost=False)).to_json()
    assert "fit pass" in phases


@pytest.mark.parametrize("damage", ["cut", "one bit", "header", "empty"])
def test_a_damaged_part_is_made_again(damage: str, tmp_path: Path) -> None:
    how, folder = ProfileSettings(rank=2, batch_size=3, probe="none", cost=False), tmp_path / "state"
    card = profile(base_of(), dataset(), how, state=folder)
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        if damage == "cut":
            del data[len(data) // 2 :]
        elif damage == "one bit":
            data[-3] ^= 64
        elif damage == "header":  # readable JSON that says something else
            data = data.replace(rb"\"of\": \"0\"", rb"\"of\": \"1\"")
        else:
            data.clear()
        assert bytes(data) != path.read_bytes() or path.stem == "phases"
        path.write_bytes(data)
    assert profile(base_of(), dataset(), how, state=folder).to_json() == card.to_json()


# --- several processes ------------------------------------------------------------------------------------------------------


class Threads:
    """Threads in the place of processes: each exchange gives all of them what each has."""

    def __init__(self, count: int, patch: pytest.MonkeyPatch) -> None:
        self.count, self.barrier, self.slots = count, threading.Barrier(count, timeout=20), [None] * count
        self.own = threading.local()
        patch.setattr(processes, "count", lambda: count)
        patch.setattr(processes, "rank", lambda: self.own.rank)
        patch.setattr(processes, "gathered", self.exchange)
        patch.setattr(processes, "stacked", self.exchange)
        patch.setattr(processes, "add_up", lambda tensor: tensor.copy_(torch.stack(self.exchange(tensor.clone())).sum(dim=0)))
        patch.setattr(processes, "total", lambda values: [sum(column) for column in zip(*self.exchange(values), strict=True)])

    def exchange(self, value: Any) -> list[Any]:
        self.slots[self.own.rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def run(self, functions: list[Callable[[], None]]) -> None:
        def work(rank: int) -> None:
            self.own.rank = rank
            functions[rank]()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 12),
    count=st.integers(1, 4),
    keep_rows=st.booleans(),
    seed=st.integers(0, 2**16),
    alone=st.booleans(),
)
def test_sums_of_any_split_over_processes_are_those_of_one(tokens: int, count: int, keep_rows: bool, seed: int, alone: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, d = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) for width in (5, 3))
    owner = torch.randint(0, count, (tokens,), generator=generator) * (0 if alone else 1)
    whole, parts = FitSums(), [FitSums() for _ in range(count)]
    for sums, rows in ((whole, torch.ones(tokens, dtype=torch.bool)), *((part, owner == at) for at, part in enumerate(parts))):
        if rows.any():
            sums.labelled, sums.nats, sums.leaders = int(rows.sum()), float(a[rows].sum()), {"q": "q", "k": "q"}
            sums.inputs["q"] = InputMoments(5, keep_rows)
            sums.gradients["k"] = GradientMoments(3, 5, keep_rows)
            sums.inputs["q"].update(a[rows])
            sums.gradients["k"].update(a[rows], d[rows])
    with pytest.MonkeyPatch.context() as patch:
        Threads(count, patch).run([lambda part=part: part.merge(torch.zeros(0, dtype=torch.float64)) for part in parts])  # type: ignore[misc]
    for part in parts:
        assert part.leaders == whole.leaders
        assert (part.labelled, part.inputs["q"].tokens) == (whole.labelled, tokens)
        assert part.nats == pytest.approx(whole.nats)
        mine, theirs = part.inputs["q"], whole.inputs["q"]
        torch.testing.assert_close(mine.second_moment(), theirs.second_moment())
        torch.testing.assert_close(part.gradients["k"].gradient(mine, 0.5), whole.gradients["k"].gradient(theirs, 0.5))
        assert mine.energy() == pytest.approx(theirs.energy())
        assert mine.typical_energy() == pytest.approx(theirs.typical_energy())
        assert part.gradients["k"].residual == pytest.approx(whole.gradients["k"].residual)


def test_a_state_that_cannot_be_written_by_another_process_is_said_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "file").touch()
    with pytest.raises(LayercardError, match="process 1: cannot write"):
        State(tmp_path / "file", "plan", FORM).save("a", {"n": 1})


def test_the_plan_is_there_to_be_read(tmp_path: Path) -> None:
    profile(base_of(), dataset(), ProfileSettings(rank=2, batch_size=3, probe="none", cost=False), state=tmp_path / "state")
    plan = json.loads((tmp_path / "state" / "plan.json").read_text())
    assert (plan["schema"], plan["rank"], plan["records"], plan["processes"]) == ("layercard-state/1", 2, 12, 1)
