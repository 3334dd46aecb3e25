"""Results in a folder and at addresses behave alike."""

from pathlib import Path
from typing import Any

import fsspec
import pytest

from layercard.errors import BenchmarkError, OutputError
from layercard.trials.storage import Storage


@pytest.fixture(params=["folder", "file", "memory", "local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    places = {
        "folder": tmp_path / "f",
        "file": f"file://{tmp_path}/f",
        "memory": f"memory://{tmp_path}/f/",
        "local": f"local://{tmp_path}/f",
    }
    return Storage.at(places[request.param])


def test_what_is_written_is_read(storage: Storage) -> None:
    assert not storage.exists("runs/a.json")
    storage.write("runs/a.json", {"a": 1})
    assert storage.exists("runs/a.json") and not storage.exists("runs/b.json")
    assert storage.read("runs/a.json", "run") == {"a": 1}
    storage.write("runs/a.json", {"a": "ä"})
    assert storage.below("runs").read("a.json", "run") == {"a": "ä"}


def test_what_is_missing_or_broken_is_said(storage: Storage) -> None:
    with pytest.raises(BenchmarkError, match=r"a\.json: no such file; name an existing run"):
        storage.read("a.json", "run")
    storage.write("a.json", {"a": 1})
    _put(storage, "a.json", b'{"a": ')
    with pytest.raises(BenchmarkError, match="is not a whole run"):
        storage.read("a.json", "run")
    with pytest.raises(OutputError, match="JSON"):
        storage.write("b.json", {"a": float("nan")})
    assert not storage.exists("b.json")


def _put(storage: Storage, name: str, data: bytes) -> None:
    if storage.folder is not None:
        (storage.folder / name).write_bytes(data)
        return
    system, root = fsspec.core.url_to_fs(storage.place)
    system.pipe_file(f"{root}/{name}", data)


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.at(f"local://{tmp_path}")
    storage.write("a.json", {"a": 1})

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("gone")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.mv", broken)
    with pytest.raises(OutputError, match=r"a\.json cannot be reached \(gone\); check the address"):
        storage.write("a.json", {"a": 2})
    assert storage.read("a.json", "run") == {"a": 1}


@pytest.mark.parametrize("place", ["nosuch://bucket/x", "hdfs://nowhere/x"])
def test_storage_that_cannot_be_reached_is_one_line(place: str) -> None:
    with pytest.raises(OutputError) as refused:
        Storage.at(place).exists("a.json")
    assert place in str(refused.value) and "\n" not in str(refused.value)


def test_one_run_has_a_folder_and_an_address_is_open_to_all(tmp_path: Path) -> None:
    with Storage.at(tmp_path).alone(), pytest.raises(OutputError, match="another run is at work"), Storage.at(tmp_path).alone():
        pass
    address = Storage.at("memory://x")
    with address.alone(), address.alone():
        pass


def test_what_a_part_needs_while_it_is_made_lies_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERCARD_CACHE", str(tmp_path / "cache"))
    assert Storage.at(tmp_path).working("cards/a.state") == tmp_path / "cards" / "a.state"
    one, other = (Storage.at(place).working("cards/a.state") for place in ("s3://a/b", "s3://a/c"))
    assert one.is_relative_to(tmp_path / "cache") and one != other
