"""`layercard latency`: every variant timed in each round, ratios within the round, memory in bytes, one line for what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from layercard.adapters.apply import place
from layercard.commands.main import run
from layercard.errors import DataError, ModelError
from layercard.models.load import BaseModel
from layercard.serving import latency
from layercard.serving.adapter_switch import random_adapter
from layercard.serving.latency import Reading, measure_latency, write
from test_adapters import assert_same, state_of
from test_serving import alone, base_of, save
from tiny import LAYERS

QUICK = ("--repeats", "2", "--prompt-tokens", "6", "--new-tokens", "3", "--device", "cpu", "--rank", "2")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    found = capsys.readouterr()
    return status, found.out, found.err


def test_variants_take_turns_and_are_compared_within_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    before = state_of(base.model)
    adapters = [random_adapter(base, place(base, layers), name=name, rank=2) for name, layers in (("five", [1, 3]), ("all", range(6)))]
    ran: list[str] = []
    rounds = iter([1.0, 2.0, 4.0])
    pace = {"now": 1.0}

    def fake(model: Any, ids: torch.Tensor, count: int, *, device: torch.device, clock: Any) -> Reading:
        """The whole machine is slower in every round; an adapter costs 50 %."""
        assert (ids.shape, count) == ((2, 8), 4)
        wrapped = {block.index for block in base.blocks for p in block.linear_modules if model.get_submodule(p.path) is not p.module}
        merged_too = any("lora_" in name for name, _ in model.named_parameters())
        if len(ran) >= 5 and len(ran) % 5 == 0:
            pace["now"] = next(rounds)
        ran.append(("adapter" if merged_too else "merged" if wrapped else "base") + (" all" if len(wrapped) == 6 else ""))
        return Reading(pace["now"] * (1.5 if merged_too else 1.0), 1 / pace["now"])

    monkeypatch.setattr(latency, "write", fake)
    told: list[tuple[str, int, int]] = []
    result = measure_latency(
        base, adapters, prompt_tokens=8, new_tokens=4, batch_size=2, repeats=3, progress=lambda *a: told.append(a)
    ).to_json()
    assert_same(before, state_of(base.model))
    order = ["base", "adapter", "merged", "adapter all", "merged all"]
    assert ran == order + order[::-1] + order + order[::-1]
    assert told[0] == ("latency", 0, 20) and told[-1] == ("latency", 20, 20)
    rows = {row["name"]: row for row in result["variants"]}
    assert list(rows) == ["base", "five", "five, merged", "all", "all, merged"]
    assert rows["base"]["first_token_seconds"] == {"value": 2.0, "low": 1.0, "high": 4.0}
    assert rows["five"]["first_token_ratio"] == {"value": 1.5, "low": 1.5, "high": 1.5}
    assert rows["all, merged"]["tokens_per_second_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert rows["five"]["layers"] == [1, 3] and rows["base"]["layers"] == []


def test_memory_of_each_variant() -> None:
    base = base_of()
    adapter = random_adapter(base, place(base, [1, 3]), name="two", rank=2)
    result = measure_latency(base, [adapter], prompt_tokens=40, new_tokens=4, repeats=1).to_json()
    plain, wrapped, merged = result["variants"]
    held = sum(weight.nbytes for weight in base.model.parameters())
    assert plain["weights_bytes"] == merged["weights_bytes"] == held
    assert wrapped["weights_bytes"] == held + adapter.bytes
    cache = 6 * 2 * 2 * 8 * 43 * 4  # blocks, keys and values, heads, width, tokens, float32
    assert cache < plain["peak_bytes"] == merged["peak_bytes"] <= wrapped["peak_bytes"] < 10 * cache
    longer = measure_latency(base, [], prompt_tokens=80, new_tokens=4, repeats=1).to_json()
    assert longer["variants"][0]["peak_bytes"] > 1.5 * plain["peak_bytes"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_writes_what_generate_writes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop that is timed is the real one: the same tokens as stock generation, up to where that one ends."""
    base = base_of(family)
    prompt = list(range(5, 17))
    tokens, _ = alone(base.model, prompt, 10)
    chosen: list[int] = []
    own = torch.Tensor.argmax

    def argmax(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = own(self, *args, **kwargs)
        chosen.extend(found.reshape(-1).tolist())
        return found

    monkeypatch.setattr(torch.Tensor, "argmax", argmax)
    shown = iter([5.0, 7.0, 10.0])  # at the start, with the first token, at the end
    with torch.no_grad():
        reading = write(base.model, torch.tensor([prompt, prompt]), 10, device=base.device, clock=lambda: next(shown))
    assert len(chosen) == 20 and chosen[: 2 * len(tokens) : 2] == tokens
    assert reading == Reading(first_token=2.0, rate=2 * 9 / 3.0)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"new_tokens": 1}, "1 new tokens cannot be timed"),
        ({"prompt_tokens": 0}, "0 prompt tokens"),
        ({"batch_size": 0}, "0 rows"),
        ({"repeats": 0}, "0 repeats"),
        ({"prompt_tokens": 500, "new_tokens": 20}, "exceed the 512 positions"),
    ],
)
def test_sizes_that_cannot_be_timed(sizes: dict[str, int], words: str, tiny_base: BaseModel) -> None:
    with pytest.raises(DataError, match=words):
        measure_latency(tiny_base, [], **sizes)  # type: ignore[arg-type]


def test_an_adapter_given_twice(tiny_base: BaseModel) -> None:
    adapter = random_adapter(tiny_base, place(tiny_base, [1]), name="a", rank=2)
    with pytest.raises(DataError, match="adapter a is given twice"):
        measure_latency(tiny_base, [adapter, adapter])


def test_memory_runs_out(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Reading:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(latency, "write", fail)
    with pytest.raises(ModelError, match="memory ran out writing after 1 rows of 8 tokens"):
        measure_latency(tiny_base, [], prompt_tokens=8)


def test_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from layercard.models.load import load_model

    base = load_model(tiny_folder)
    folder = save(base, [2], tmp_path / "adapter", 1)
    path = tmp_path / "latency.json"
    status, out, err = printed(capsys, "latency", tiny_folder, "--adapter", folder, *QUICK, "-o", path)
    assert (status, err) == (0, ""), err
    for word in ("Latency", "3 layers", "base", "all layers", "merged", "Tokens/s", "6 tokens, then 3 new ones", f"wrote {path}"):
        assert word in " ".join(out.split()), out
    kept = json.loads(path.read_text())
    assert [row["kind"] for row in kept["variants"]] == ["base", "adapter", "merged", "adapter", "merged"]
    assert kept["variants"][1]["layers"] == [2] and kept["variants"][3]["layers"] == list(range(LAYERS))
    status, out, err = printed(capsys, "latency", tiny_folder, *QUICK, "-o", path)
    assert status == 2 and "exists already" in err and out == ""
    status, out, err = printed(capsys, "latency", tiny_folder, "--placement", folder / "placement.json", *QUICK, "--json")
    assert (status, err) == (0, "")
    assert [row["layers"] for row in json.loads(out)["variants"]] == [[], [2], [2], [0, 1, 2], [0, 1, 2]]
    every = save(base, [0, 1, 2], tmp_path / "every", 1)
    status, out, err = printed(capsys, "latency", tiny_folder, "--adapter", every, *QUICK, "--json")
    assert [row["name"] for row in json.loads(out)["variants"]] == ["base", "every", "every, merged"]
    twins = ("--adapter", folder, "--placement", folder / "placement.json", "--placement", every / "placement.json")
    status, out, err = printed(capsys, "latency", tiny_folder, *twins, *QUICK, "--json")
    names = [row["name"] for row in json.loads(out)["variants"]]
    assert names[1::2] == ["adapter", str(folder / "placement.json"), str(every / "placement.json")]


def test_what_is_no_adapter_is_one_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = save(base_of(), [4], tmp_path / "foreign", 1)
    cases = [
        (("absent-model", "--adapter", tmp_path / "absent"), "absent is not an adapter"),
        ((tiny_folder, "--adapter", foreign), "6 layers"),
        ((tiny_folder, "--placement", tmp_path / "absent.json"), "no such file"),
        ((tiny_folder, "--placement", foreign / "placement.json"), "6 layers"),
        ((tiny_folder, "--prompt-tokens", 600), "exceed the 512 positions"),
        ((tiny_folder, "--new-tokens", 1), "--new-tokens"),
    ]
    for arguments, words in cases:
        status, out, err = printed(capsys, "latency", *arguments, "--device", "cpu")
        assert (status, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err
