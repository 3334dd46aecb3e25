"""Records, their keys, and the files that hold their hidden states: whole or not at all, and never those of another cache."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from layercard.errors import OutputError
from layercard.fast import prefix_store as stores
from layercard.fast.prefix_cache import Rates, forecast
from layercard.fast.prefix_records import Uncacheable, take_apart
from layercard.fast.prefix_store import CacheWarning, Store, checksum, disk_rates, gigabytes, room

WIDTH = 6


def key(at: int) -> bytes:
    return at.to_bytes(16, "big")


def states(at: int, length: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(at)).to(dtype)


def filled(folder: Path | None, records: range = range(4), **options: Any) -> Store:
    store = Store(WIDTH, torch.float32, folder, label="here", **options)
    for at in records:
        assert store.add(key(at), states(at, 1 + at % 5))
    store.flush()
    return store


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# Rows


def seen(row: int, at: int) -> bool:
    return False


def apart(row: int, at: int) -> bool:
    return True


def ids_of(*rows: list[int]) -> np.ndarray:
    return np.array(rows)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_record_has_the_same_key_wherever_it_lies(data: st.DataObject) -> None:
    """Left, right or packed, in any order: keys depend on tokens alone where only distances between positions count."""
    rows = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4))
    width = max(map(len, rows)) + data.draw(st.integers(0, 3))
    shift = [data.draw(st.integers(0, width - len(row))) for row in rows]
    ids, mask = np.full((len(rows), width), 9), np.zeros((len(rows), width), dtype=np.int64)
    for at, row in enumerate(rows):
        ids[at, shift[at] : shift[at] + len(row)] = row
        mask[at, shift[at] : shift[at] + len(row)] = 1
    padded = take_apart(ids, mask, None, seen, relative=True)
    assert [(record.row, record.start, record.tokens) for record in padded] == [(at, shift[at], len(row)) for at, row in enumerate(rows)]
    flat, positions = np.concatenate(rows)[None], np.concatenate([np.arange(len(row)) for row in rows])[None]
    starts = np.cumsum([0, *map(len, rows[:-1])])
    packed = take_apart(flat, None, positions, seen, starts=starts, relative=True)
    assert [record.key for record in packed] == [record.key for record in padded]
    assert len({record.key for record in padded}) == len({tuple(row) for row in rows})


def test_positions_are_part_of_the_key_where_they_count() -> None:
    ids, mask = ids_of([1, 2, 0], [0, 1, 2]), ids_of([1, 1, 0], [0, 1, 1])
    one, other = take_apart(ids, mask, None, seen)
    assert one.key != other.key
    one, other = take_apart(ids, mask, ids_of([0, 1, 1], [0, 0, 1]), seen)
    assert one.key == other.key
    one, other = take_apart(ids, mask, None, seen, relative=True)
    assert one.key == other.key


def test_positions_that_jump_are_part_of_the_key() -> None:
    ids = ids_of([1, 2, 3, 4])
    keys = {
        take_apart(ids, None, positions, seen, relative=True)[0].key
        for positions in (None, ids_of([0, 1, 0, 1]), ids_of([0, 1, 2, 0]), ids_of([0, 1, 3, 4]))
    }
    assert len(keys) == 4
    assert take_apart(ids, None, ids_of([5, 6, 7, 8]), seen, relative=True)[0].key in keys


def test_a_row_is_split_only_where_the_model_splits_it() -> None:
    ids, positions = ids_of([1, 2, 3, 4]), ids_of([0, 1, 0, 1])
    assert [record.tokens for record in take_apart(ids, None, positions, apart)] == [2, 2]
    assert [record.tokens for record in take_apart(ids, None, positions, seen)] == [4]


def test_rows_without_a_real_token_are_no_records() -> None:
    assert [record.row for record in take_apart(ids_of([1, 1], [2, 2]), ids_of([0, 0], [1, 1]), None, seen)] == [1]


@pytest.mark.parametrize(
    ("mask", "positions", "said"),
    [
        (ids_of([1, 0, 1]), None, "holes"),
        (ids_of([1, 2, 2]), None, "0 and 1"),
        (ids_of([1, 1]), None, "shape"),
        (None, ids_of([0, 1]), "positions"),
        (None, np.zeros((3, 1, 3), dtype=np.int64), "positions"),
    ],
)
def test_batches_that_cannot_be_taken_apart(mask: Any, positions: Any, said: str) -> None:
    with pytest.raises(Uncacheable, match=said):
        take_apart(ids_of([1, 2, 3]), mask, positions, seen)


# Store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [6, 7, 33])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_kept_comes_back(tmp_path: Path, on_disk: bool, width: int, dtype: torch.dtype) -> None:
    store = Store(width, dtype, tmp_path / "cache" if on_disk else None)
    rows = {key(at): torch.randn(at + 1, width) for at in range(9)}
    for name, tensor in rows.items():
        assert store.add(name, tensor)
    store.flush()
    again = Store(width, dtype, tmp_path / "cache") if on_disk else store
    assert len(again) == 9 and again.taken == store.taken == 45 * width * dtype.itemsize
    for name, tensor in rows.items():
        kept = again.get(name)
        assert kept is not None and torch.equal(kept, tensor.to(dtype))
        assert (again.foreign(name), store.foreign(name)) == (on_disk, False)
    assert again.get(key(99)) is None


def test_records_are_copied() -> None:
    store, rows = Store(WIDTH, torch.float32), states(1)
    store.add(key(1), rows)
    expected = rows.clone()
    rows.zero_()
    assert torch.equal(store.get(key(1)), expected)


def test_a_full_store_turns_records_away() -> None:
    store = Store(WIDTH, torch.float32, limit=2 * 3 * WIDTH * 4)
    assert [store.add(key(at), states(at)) for at in range(3)] == [True, True, False]
    assert store.full and store.taken == store.limit
    assert store.add(key(0), states(0))


def test_the_limit_counts_what_other_runs_wrote(tmp_path: Path) -> None:
    filled(tmp_path)
    assert not Store(WIDTH, torch.float32, tmp_path, limit=100, label="here").add(key(9), states(9))


def test_shards_are_written_when_enough_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SHARD_BYTES", 5 * WIDTH * 4)
    store = Store(WIDTH, torch.float32, tmp_path)
    for at in range(6):
        store.add(key(at), states(at))
    assert len(shards(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in shards(tmp_path)]


def test_a_pause_is_used_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(WIDTH, torch.float32, tmp_path)
    store.add(key(1), states(1))
    store.settle()
    assert shards(tmp_path) == []
    monkeypatch.setattr(stores, "PAUSE", -1.0)
    store.settle()
    store.settle()
    assert len(shards(tmp_path)) == 1


def test_shards_of_others_are_found(tmp_path: Path) -> None:
    mine, theirs = filled(tmp_path, range(2)), Store(WIDTH, torch.float32, tmp_path, label="here")
    assert len(theirs) == 2
    mine.add(key(7), states(7))
    mine.flush()
    assert theirs.get(key(7)) is None
    theirs.refresh()
    assert torch.equal(theirs.get(key(7)), states(7))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not safetensors at all, but long enough to be read as a header", encoding="utf-8")


def change_metadata(**changes: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        about = {"format": stores.FORMAT, "label": "here", "dtype": "torch.float32", "width": str(WIDTH)} | changes
        save_file(load_file(path), path, about)

    return change


def change_tensors(**changes: torch.Tensor) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        about = {"format": stores.FORMAT, "label": "here", "dtype": "torch.float32", "width": str(WIDTH)}
        save_file(load_file(path) | changes, path, about)

    return change


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        empty,
        text,
        foreign,
        change_metadata(label="elsewhere"),
        change_metadata(width="7"),
        change_metadata(dtype="torch.bfloat16"),
        change_metadata(format="layercard-prefix/0"),
        change_tensors(bounds=torch.tensor([0, 1, 2, 3, 400])),
        change_tensors(bounds=torch.tensor([0, 3, 2, 6, 10])),
        change_tensors(keys=torch.zeros(4, 15, dtype=torch.uint8)),
        change_tensors(checks=torch.zeros(3, dtype=torch.int64)),
        change_tensors(hidden=torch.zeros(10, WIDTH + 1)),
        change_tensors(hidden=torch.zeros(10, WIDTH, dtype=torch.float64)),
    ],
)
def test_a_file_that_is_no_whole_shard_is_named_once_and_not_used(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    filled(tmp_path, range(4))
    (path,) = shards(tmp_path)
    good = filled(tmp_path, range(10, 12))
    harm(path)
    with pytest.warns(CacheWarning) as said:
        store = Store(WIDTH, torch.float32, tmp_path, label="here")
    (line,) = [str(warning.message) for warning in said]
    assert str(path) in line and "computed again" in line and "\n" not in line
    assert len(store) == 2 and torch.equal(store.get(key(10)), good.get(key(10)))
    store.refresh()


def test_a_damaged_record_is_found_when_it_is_read(tmp_path: Path) -> None:
    filled(tmp_path)
    (path,) = shards(tmp_path)
    raw = bytearray(path.read_bytes())
    at = raw.index(states(3, 4)[2].numpy().tobytes())
    raw[at + 5] ^= 1
    path.write_bytes(raw)
    store = Store(WIDTH, torch.float32, tmp_path, label="here")
    assert torch.equal(store.get(key(2)), states(2, 3))
    with pytest.warns(CacheWarning, match="damaged") as said:
        assert store.get(key(3)) is None
    assert len(said) == 1
    assert store.get(key(2)) is None and store.taken == 0
    assert store.add(key(3), states(3, 4))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_a_checksum_sees_every_flipped_bit(length: int, width: int, dtype: torch.dtype, data: st.DataObject) -> None:
    rows = torch.randn(length, width).to(dtype)
    changed = rows.clone()
    raw = changed.view(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(changed) != checksum(rows) == checksum(rows.clone())


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_once_and_the_store_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = filled(tmp_path)
    monkeypatch.setattr(stores, "save_file", no_space)
    assert before.add(key(20), states(20))
    with pytest.warns(CacheWarning, match="No space left.*goes on") as said:
        before.flush()
    assert len(said) == 1
    assert not before.add(key(21), states(21))
    before.flush()
    assert torch.equal(before.get(key(1)), states(1, 2)) and before.get(key(20)) is None
    assert len(list(tmp_path.iterdir())) == 1, "no half-written file stays"


def test_a_folder_that_goes_away_is_made_again(tmp_path: Path) -> None:
    store = filled(tmp_path / "cache", range(1))
    for path in shards(tmp_path / "cache"):
        path.unlink()
    (tmp_path / "cache").rmdir()
    store.add(key(5), states(5))
    store.flush()
    store.refresh()
    assert len(shards(tmp_path / "cache")) == 1
    assert torch.equal(store.get(key(5)), states(5))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".old.part", tmp_path / ".new.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    filled(tmp_path)
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="name another"):
        Store(WIDTH, torch.float32, tmp_path / "file" / "cache")


def _write(folder: str, first: int, go: Any) -> None:
    go.wait()
    store = Store(WIDTH, torch.float32, Path(folder), label="here")
    for at in range(first, first + 40):
        store.add(key(at), states(at))
        if at % 7 == 0:
            store.flush()
            store.refresh()
    store.flush()


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    go = context.Event()
    workers = [context.Process(target=_write, args=(str(tmp_path), first, go)) for first in (0, 20)]
    for worker in workers:
        worker.start()
    go.set()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store = Store(WIDTH, torch.float32, tmp_path, label="here")
    assert len(store) == 60
    assert all(torch.equal(store.get(key(at)), states(at)) for at in range(60))


def test_room_and_rates(tmp_path: Path) -> None:
    assert room(None) > 0
    assert room(tmp_path / "not" / "there") > 0
    assert all(rate > 0 for rate in disk_rates(tmp_path, 2**16))
    assert list(tmp_path.iterdir()) == []


# Forecast


def test_forecast_of_size() -> None:
    found = forecast(1000, 8, 2, passes=3, limit=16_000)
    assert (found.needed, found.pays, found.saved) == (16_000, True, None)
    found = forecast(1000, 8, 2, passes=3, limit=15_999)
    assert not found.pays and "max_bytes" in found.reason and "bfloat16" not in found.reason
    assert forecast(None, 8, 2, passes=3, limit=1).pays


def test_forecast_of_break_even() -> None:
    rates = Rates(compute=10.0, read=2.0, store=16.0)
    found = forecast(5, 8, 2, passes=4, limit=1000, rates=rates)
    assert (found.break_even, found.saved, found.pays) == (3.0, 5 * (40 - 10 - 16 - 6), True)
    assert forecast(5, 8, 2, passes=3, limit=1000, rates=rates).saved == 0
    assert "3.00 passes" in forecast(5, 8, 2, passes=3, limit=1000, rates=rates).reason
    assert "3.00 passes" in forecast(5, 8, 2, passes=2, limit=1000, rates=rates).reason
    filled = forecast(5, 8, 2, passes=1, limit=1000, rates=rates, filled=True)
    assert (filled.break_even, filled.saved, filled.pays) == (0.0, 40.0, True)


@pytest.mark.parametrize("filled", [False, True])
def test_forecast_where_reading_is_slower(filled: bool) -> None:
    found = forecast(None, 8, 2, passes=100, limit=1000, rates=Rates(compute=1e-6, read=2e-6), filled=filled)
    assert not found.pays and found.break_even == float("inf")
    assert found.reason == "reading a token takes 2.0 µs and computing it 1.0 µs"


def test_one_pass_over_the_data_gains_nothing() -> None:
    assert "1.00 passes" in forecast(None, 8, 2, passes=1, limit=1000).reason
    assert forecast(None, 8, 2, passes=1, limit=1000, filled=True).pays


@pytest.mark.parametrize(("size", "words"), [(5, "5 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (140e6, "140 MB"), (2.31e9, "2.3 GB")])
def test_sizes_in_words(size: float, words: str) -> None:
    assert gigabytes(size) == words
