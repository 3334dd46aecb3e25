"""The examples run as they are, on a tiny model, and leave adapters in the selected layers only."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

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


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        lines = [line for line in path.read_text(encoding="utf-8").split("def main", 1)[1].splitlines() if line.strip()]
        assert len(lines) <= 30, path.name
