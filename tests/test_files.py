"""Files are written whole or not at all, never in place of what is not a file, and read in one line or not at all."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cards import fake_card
from layercard.errors import CardError, LayercardError, ModelError, OutputError, visible
from layercard.files import alone, read_json, refuse_existing, replacing, write_json, write_text


def test_a_file_keeps_its_mode_and_a_new_one_has_that_of_the_umask(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.touch(0o600)
    before = os.umask(0o027)
    try:
        write_json(secret, {"a": 1}, force=True)
        with replacing(tmp_path / "new.json") as part:
            part.unlink()
            part.touch(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (secret, tmp_path / "new.json")] == [0o600, 0o640]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "far" / "target.json"
    link.symlink_to(target)
    write_text(link, "1")
    with pytest.raises(OutputError, match="exists already"):
        write_text(link, "2")
    write_text(link, "3", force=True)
    assert (link.is_symlink(), target.is_symlink(), target.read_text()) == (True, False, "3")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("make", [os.mkfifo, _socket, Path.mkdir, _loop])
def test_what_is_not_a_file_is_neither_replaced_nor_read(
    make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("x.json")
    make(path)
    before = path.lstat()
    for write in (lambda: refuse_existing(path, True), lambda: write_text(path, "1", force=True), lambda: replacing(path).__enter__()):
        with pytest.raises(OutputError, match=r"x\.json"):
            write()
    with pytest.raises(CardError, match=r"x\.json"):
        read_json(path, CardError, "card")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_models_folder_is_not_waited_for(name: str, tmp_path: Path) -> None:
    from layercard.models.load import locate

    for each in {"config.json", "model.safetensors", "tokenizer.json"} - {name}:
        (tmp_path / each).touch()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=f"{name} is not a regular file"):
        locate(str(tmp_path))


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_model_is_not_waited_for(tmp_path: Path) -> None:
    from layercard.models.gguf import read_gguf
    from layercard.models.load import locate
    from layercard.models.stored import Weights

    for name in ("model.gguf", "model.safetensors", "model.json"):
        os.mkfifo(tmp_path / name)
        for read in (lambda path: locate(str(path)), read_gguf, lambda path: Weights([path])):
            with pytest.raises(ModelError, match=f"{name} is not a regular file"):
                read(tmp_path / name)
    with pytest.raises(ModelError, match="/dev/zero is not a regular file"):
        locate("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 10**9}, {"text_config": {"n_layer": 10**9}}, {"decoder_layers": 10**9}, {"num_local_experts": 10**9}]
)
def test_more_layers_than_any_model_has_are_not_built(config: dict[str, Any], tmp_path: Path) -> None:
    from layercard.models.load import locate
    from layercard.models.skeleton import read_config

    (tmp_path / "model.safetensors").touch()
    write_json(tmp_path / "config.json", {"model_type": "llama", **config})
    for read in (locate, read_config):
        with pytest.raises(ModelError, match="more than any model has"):
            read(str(tmp_path))


def test_devices_and_open_streams_are_written_to(tmp_path: Path) -> None:
    for force in (False, True):
        write_text("/dev/null", "1", force=force)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(OutputError, match="No space left on device; make room"):
        write_text("/dev/full", "1")
    script = "from layercard.files import write_text; print(1, flush=True); write_text('/dev/stdout', 'two')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "1\ntwo"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", script], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "1\ntwo"


@pytest.mark.parametrize("name", ["x" * 250 + ".json", "ä" * 125 + ".json"])
def test_the_longest_names_can_be_written(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / name, "1")
    assert [each.name for each in tmp_path.iterdir()] == [name]
    with pytest.raises(OutputError, match="File name too long"):
        refuse_existing(tmp_path / f"x{name}", force=False)


def test_a_refused_output_leaves_no_folder_and_changes_no_file(tmp_path: Path) -> None:
    deep, old = tmp_path / "a" / "b" / "c.json", tmp_path / "old.json"
    old.write_text("old")
    refuse_existing(deep, force=False)
    for path in (deep, old):
        with pytest.raises(RuntimeError), replacing(path) as part:
            part.write_text("half")
            raise RuntimeError
    with pytest.raises(RuntimeError), alone(deep.parent):
        raise RuntimeError
    for broken in (old / "x.json", Path("a\0b")):
        with pytest.raises(OutputError):
            refuse_existing(broken, force=True)
    assert [each.name for each in tmp_path.iterdir()] == ["old.json"]
    assert old.read_text() == "old"
    with alone(deep.parent):
        write_text(deep, "1")
    assert deep.read_text() == "1"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1', "line 1: .* may be truncated"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDfff": 1}', "surrogate"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "found list"),
    ],
)
def test_json_that_cannot_be_used_is_said_in_one_line(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CardError, match=words):
        read_json(tmp_path / "x.json", CardError, "card")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), pytest.param(10**5000, id="digits")])
def test_numbers_that_json_has_not_are_not_written(value: float, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a number that JSON cannot"):
        write_json(tmp_path / "x.json", {"a": [value]})
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_text_can_be_written(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"source": os.fsdecode(b"\xff.jsonl"), "pair": "\U0001f600"})
    assert read_json(tmp_path / "x.json", CardError, "card") == {"source": "?.jsonl", "pair": "\U0001f600"}


@pytest.mark.parametrize("text", ["\x1b[31m", "\x07", "\x9b2J", "\u202e", "\u2028", "\ufeff", "\udcff", "\U000e0041"])
def test_a_message_holds_nothing_that_a_terminal_obeys(text: str) -> None:
    said = str(LayercardError(f"a{text}b"))
    assert said.isprintable() and said.startswith("a") and said.endswith("b") and text not in said
    assert visible("näher\t✓ 日本\n") == "näher\t✓ 日本\n"


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    from layercard.selection.placement import Placement

    write_json(tmp_path / "card.json", fake_card())
    with pytest.raises(LayercardError, match=r"card\.json is a card \(layercard/1\); a placement is needed: make one with `"):
        Placement.load(tmp_path / "card.json")
