"""The examples run as they are, on a tiny model, and leave adapters in the selected layers only."""

import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from exports import CASES
from layercard.commands import main as cli
from tiny import tiny_records, write_records

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ADAPTER = "adapter_model.safetensors"


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", ["trl_targeted.py", "plain_loop.py"])
def test_an_example(
    name: str, tiny_folder: Path, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    run(name, [str(tiny_folder), str(tiny_file), "adapter"], monkeypatch)
    said = "".join(capfd.readouterr())
    layers = [int(layer) for layer in re.search(r"^layers ([\d ]+)$", said, re.MULTILINE)[1].split()]
    assert f"layers in backward: {3 - min(layers)}/3" in said
    assert "records read from the cache" in said
    weights = load_file(tmp_path / "adapter" / ADAPTER)
    assert {int(re.search(r"layers\.(\d+)\.", key)[1]) for key in weights} == set(layers)
    assert any(weight.abs().sum() > 0 for key, weight in weights.items() if "lora_B" in key)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8


def test_configurations_for_trainers(
    tiny_folder: Path, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both name the selected layers only, keep every line of the files in `examples/`, and `layercard verify` reads them."""
    monkeypatch.chdir(tmp_path)
    run("for_trainers.py", [str(tiny_folder), str(tiny_file), "out"], monkeypatch)
    layers = re.search(r"^layers ([\d ]+)$", capfd.readouterr().out, re.MULTILINE)[1].replace(" ", ",")
    for name in ("axolotl.yml", "llamafactory.yaml"):
        before, after = ((folder / name).read_text(encoding="utf-8").splitlines() for folder in (EXAMPLES, tmp_path / "out"))
        assert [line for line in after if line in before] == before
        assert cli.run(["verify", f"out/{name}", "--model", str(tiny_folder), "--layers", layers]) == 0
    assert cli.run(["verify", "out/axolotl.yml", "--model", str(tiny_folder), "--layers", "0-2"]) == 2


@pytest.mark.parametrize(("name", "trainer"), [("axolotl.yml", "axolotl"), ("llamafactory.yaml", "llamafactory")])
def test_commands_in_the_configurations(name: str, trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `layercard export` line in each file's head, on a copy of the file."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(text, encoding="utf-8")
    CASES["dense"].save(tmp_path / "placement.json")
    monkeypatch.chdir(tmp_path)
    command = re.search(r"^#\s+layercard (export .*)$", text, re.MULTILINE)[1].split()
    assert command[2:4] == ["--to", trainer]
    assert cli.run(command) == 0
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(text)


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        lines = [line for line in path.read_text(encoding="utf-8").split("def main", 1)[1].splitlines() if line.strip()]
        assert len(lines) <= 30, path.name


def test_one_file(
    tiny_folder: Path, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its head is one that `uv run` reads, and it ends in the result's line."""
    text = (EXAMPLES / "one_file.py").read_text(encoding="utf-8")
    head = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", text)[1]
    assert tomllib.loads(head.replace("# ", ""))["dependencies"] == ["layercard"]
    monkeypatch.chdir(tmp_path)
    run("one_file.py", [str(tiny_folder), str(write_records(tmp_path / "many.jsonl", tiny_records(48))), "out", "5m"], monkeypatch)
    assert "loss" in capfd.readouterr().out.splitlines()[-1]


def test_the_citation_can_be_read() -> None:
    citation = yaml.safe_load((EXAMPLES.parent / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert "2602.04019" in citation["references"][0]["url"]
