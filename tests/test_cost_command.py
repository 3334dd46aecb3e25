"""`layercard cost`: what it prints and writes, and one line for what a user can mend."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layercard.commands.main import run
from layercard.cost.model import CostModel
from test_cost import measured
from tiny import LAYERS, build_tiny

QUICK = ("--repeats", "1", "--batch-size", "2", "--rank", "2", "--device", "cpu")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    found = capsys.readouterr()
    return status, found.out, found.err


def test_measured_on_records(tiny_folder: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cost.json"
    status, out, err = printed(capsys, "cost", tiny_folder, "--data", tiny_file, *QUICK, "-o", path)
    assert (status, err) == (0, "")
    for word in ("3 layers", "float32, rank 2", "2 records of", "measured", "layer, mean", "head and loss", "first 3", "uniform 3", "all"):
        assert word in " ".join(out.split()), out
    cost = CostModel.load(path)
    assert (cost.source, len(cost.layers), cost.batch_size) == ("measured", LAYERS, 2)
    status, out, err = printed(capsys, "cost", tiny_folder, *QUICK, "--length", 16, "-o", path)
    assert status == 2 and "exists already" in err and out == ""


def test_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny("gpt2").config.save_pretrained(tmp_path)
    status, out, err = printed(capsys, "cost", tmp_path, "--meta", *QUICK, "--length", 16, "--json")
    assert (status, err) == (0, "")
    assert CostModel.from_json(json.loads(out)).source == "measured"
    monkeypatch.setattr("layercard.cost.estimate.free_bytes", lambda device: 1000)
    status, out, err = printed(capsys, "cost", tmp_path, "--meta", *QUICK, "--length", 16, "--json")
    assert CostModel.from_json(json.loads(out)).source == "rates"
    status, out, err = printed(capsys, "cost", "qwen3-8b", "--meta", "--flops", 4e14, "--bandwidth", 3e12, "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    assert "36 layers, bfloat16" in out and "4e+14 FLOP/s" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("qwen3-8", "--meta"), "did you mean qwen3-8b"),
        (("qwen3-8b", "--meta", "--flops", "1e12"), "--flops and --bandwidth belong together"),
        (("qwen3-8b", "--flops", "1e12", "--bandwidth", "1e11"), "give --meta too"),
        (("qwen3-8b", "--meta", "--flops", "-1", "--bandwidth", "1e11"), "flops is -1.0"),
        (("qwen3-8b", "--meta", "--dtype", "auto"), "choose float32, bfloat16 or float16"),
        (("qwen3-8b", "--meta", "--data", "train.jsonl"), "no tokenizer for --data"),
        (("qwen3-8b", "--meta", "--device", "gpu"), "device 'gpu' is unknown"),
        (("qwen3-8b", "--data", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = printed(capsys, "cost", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err


def test_shares_are_shown_where_nothing_was_measured() -> None:
    from layercard.report.terminal import cost_view
    from layercard.report.words import seconds

    def shown(cost: CostModel) -> str:
        console = Console(width=200)
        with console.capture() as capture:
            console.print(cost_view(cost))
        return capture.get()

    relative: Any = measured(source="shapes")
    assert seconds(0.25, relative) == "25.00 %" and "relative, from shapes alone" in shown(relative)
    assert [seconds(value, measured()) for value in (2.5, 0.0123, 4e-6)] == ["2.50 s", "12.3 ms", "4.0 µs"]
    assert "made up: 6 layers" in shown(measured(threads=2)) and "2 threads" in shown(measured(threads=2))
