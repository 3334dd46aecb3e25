"""Every long command, killed at random points and started again, ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Killings, Warm
from safetensors.torch import load_file

from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

DEPTH = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, records and a placement."""
    folder = tmp_path_factory.mktemp("faults")
    build_tiny("llama", num_hidden_layers=DEPTH).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_records(folder / "data.jsonl", tiny_records(24))
    write_records(folder / "valid.jsonl", tiny_records(8, 50))
    write_records(folder / "many.jsonl", tiny_records(240))
    task = folder / "tasks" / "tiny"
    task.mkdir(parents=True)
    for at, split in enumerate(("train", "valid", "test")):
        write_records(task / f"{split}.jsonl", tiny_records(12, start=100 * at))
    from layercard.adapters.apply import place as placed
    from layercard.models.load import load_model

    placed(load_model(str(folder / "model"), device="cpu"), [2, 3]).save(folder / "placement.json")
    return folder


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with Warm(tmp_path_factory.mktemp("logs")) as found:
        yield found


# --- the commands: arguments, and what of their result must be equal ---------------------------------------------------------


def card(output: Path) -> Any:
    assert not output.with_name(f"{output.name}.state").exists()
    return json.loads(output.read_text())


def adapter(output: Path) -> dict[str, Any]:
    """Weights and losses; rounded, since a kept prefix was computed beside other records after a resumption."""
    record = json.loads((output / "run.json").read_text())
    weights = load_file(output / "adapter_model.safetensors")
    return {"weights": weights, "losses": torch.tensor(record["losses"]), "after": torch.tensor(record["loss_after"])}


def comparison(output: Path) -> dict[str, Any]:
    return {path.parent.name: adapter(path.parent) for path in sorted(output.glob("*/run.json"))}


def table(output: Path) -> Any:
    return json.loads((output / "summary.json").read_text())


def profile(place: Path, output: Path, *more: str) -> list[str]:
    where = ["profile", str(place / "model"), "--data", str(place / "data.jsonl"), "-o", str(output)]
    return [*where, "--rank", "2", "--device", "cpu", "--no-cost", "--batch-size", "2", *more]


def training(place: Path, output: Path, data: str = "data.jsonl", length: tuple[str, str] = ("--steps", "30")) -> list[str]:
    where = ["train", str(place / "model"), "--data", str(place / data), "--valid", str(place / "valid.jsonl")]
    where += ["--placement", str(place / "placement.json"), "-o", str(output), "--cache", str(output.with_name(f"{output.name}-cache"))]
    return [*where, "--rank", "2", "--device", "cpu", *length, "--resume"]


def filling(place: Path, output: Path) -> list[str]:
    """Two passes over many records: half of the time goes by with the cache being filled."""
    return training(place, output, "many.jsonl", ("--epochs", "2"))


def streaming(place: Path, output: Path) -> list[str]:
    """Blocks 0 and 1 on disk: a pass over the records, then steps."""
    return [*training(place, output), "--stream"]


def passing(place: Path, output: Path) -> list[str]:
    """Many records and few steps: most of the time goes by in the pass."""
    return [*training(place, output, "many.jsonl", ("--steps", "6")), "--stream"]


def passed(output: Path) -> Any:
    """The adapter; nothing is left of the pass but whole shards, each record once."""
    cache = output.with_name(f"{output.name}-cache")
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".safetensors"}
    kept = [tuple(key) for shard in cache.rglob("*.safetensors") for key in load_file(shard)["keys"].tolist()]
    assert len(kept) == len(set(kept)) > 0
    return adapter(output)


def filled(output: Path) -> Any:
    """The adapter; every shard of the cache is whole (a resumed run fills it with what it still reads)."""
    cache = output.with_name(f"{output.name}-cache")
    kept = {tuple(key) for shard in cache.rglob("*.safetensors") for key in load_file(shard)["keys"].tolist()}
    assert 0 < len(kept) <= 240
    return adapter(output)


def comparing(place: Path, output: Path) -> list[str]:
    where = ["compare", str(place / "model"), "--data", str(place / "data.jsonl"), "--valid", str(place / "valid.jsonl")]
    return [*where, "--placements", "all,last:2", "-o", str(output), "--rank", "2", "--device", "cpu", "--steps", "12", "--resume"]


def bench(place: Path, output: Path) -> list[str]:
    where = ["bench", "placements", "--model", str(place / "model"), "--data", str(place / "tasks"), "--tasks", "tiny", "-o", str(output)]
    where += ["--strategies", "random,last,snr", "--k", "2", "--seeds", "0,1", "--steps", "2", "--card-records", "8", "--no-times"]
    where += ["--batch-tokens", "100", "--test-tokens", "120", "--valid-tokens", "60", "--rank", "2"]
    return [*where, "--dtype", "float32", "--device", "cpu"]


def whole_run(place: Path, output: Path) -> list[str]:
    """All steps of `run`; its choice looks at memory, since times differ from call to call."""
    where = ["run", str(place / "model"), "--data", str(place / "many.jsonl"), "--valid", str(place / "valid.jsonl"), "-o", str(output)]
    how = ["--objective", "memory", "--search", "150%", "--steps", "24", "--batch-size", "2", "--rank", "2", "--device", "cpu"]
    return [*where, *how]


def choice(output: Path) -> Any:
    """What was chosen, the losses of all heats, and the adapter."""
    chosen = json.loads((output / "result.json").read_text())["chosen"]
    race = json.loads((output / "race.json").read_text())
    return {"chosen": chosen, "heats": [heat["loss"] for heat in race["heats"]], "adapter": adapter(output / "adapter")}


Command = tuple[Callable[[Path, Path], list[str]], Callable[[Path], Any]]
COMMANDS: dict[str, Command] = {
    "profile": (profile, card),
    "profile train": (lambda place, output: profile(place, output, "--probe", "train", "--probe-steps", "8"), card),
    "profile stream": (lambda place, output: profile(place, output, "--stream"), card),
    "train": (training, adapter),
    "cache fill": (filling, filled),
    "train stream": (streaming, passed),
    "pass": (passing, passed),
    "compare": (comparing, comparison),
    "bench": (bench, table),
    "run": (whole_run, choice),
}


def assert_equal(found: Any, wanted: Any) -> None:
    """Equal, numbers to rounding: sums may differ in their last digits from process to process, with where their terms lie in memory."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_equal(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    else:
        assert found == wanted


def undisturbed(warm: Warm, place: Path, name: str, output: Path) -> tuple[Any, float]:
    """The result of a command that nobody kills, and its seconds."""
    arguments, result = COMMANDS[name]
    started = time.monotonic()
    status, said = warm.run(arguments(place, output))
    assert status == 0, said
    return result(output), time.monotonic() - started


def kill_and_resume(warm: Warm, place: Path, folder: Path, name: str, wanted: int) -> Killings:
    """Start, kill and resume a command, from scratch again when it is done, until so many kills hit; each result is that undisturbed."""
    arguments, result = COMMANDS[name]
    whole, seconds = undisturbed(warm, place, name, folder / "undisturbed")
    killings, rounds = Killings(warm, seconds), 0
    while killings.total < wanted:
        rounds += 1
        assert rounds <= 4 * wanted, f"only {killings.total} kills hit in {rounds} rounds"
        output = folder / f"round-{rounds}"
        if name == "bench":  # a card holds step times, which differ from call to call and decide about placements
            for part in ("cards", "scores"):
                shutil.copytree(folder / "undisturbed" / part, output / part)
        killings.until_done(arguments(place, output), min(8, wanted - killings.total))
        assert_equal(result(output), whole)
    return killings


def test_a_few_kills(warm: Warm, place: Path, tmp_path: Path) -> None:
    assert kill_and_resume(warm, place, tmp_path, "profile", 4).total == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(COMMANDS))
def test_kills_at_random_points(name: str, warm: Warm, place: Path, tmp_path: Path) -> None:
    """18 for each of ten commands: 180."""
    killings = kill_and_resume(warm, place, tmp_path, name, 18)
    assert killings.total == 18
    assert all(killings.kills.values())


# --- what is replaced: `--force` over a finished result ---------------------------------------------------------------------


def replacing(place: Path, output: Path, name: str) -> list[str]:
    """The command that makes another result at the output of a finished one."""
    arguments = [word for word in COMMANDS[name][0](place, output) if word != "--resume"]
    return [*arguments, "--seed", "7", "--force"]


def finished(output: Path) -> dict[str, Any]:
    """What of a card, a run or a comparison lies at an output, each part whole by itself."""
    if output.is_file():
        return {"card": json.loads(output.read_text())["layers"]}
    table = {"table": json.loads((output / "compare.json").read_text())["rows"]} if (output / "compare.json").exists() else {}
    runs = [path.parent for path in (output / "run.json", *output.glob("*/run.json")) if path.exists()]
    return {**table, **{str(run.relative_to(output)): adapter(run) for run in runs}}


def equal(one: Any, other: Any) -> bool:
    try:
        assert_equal(one, other)
    except AssertionError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["profile", "train", "train stream", "compare"])
def test_a_killed_replacement_loses_nothing(name: str, warm: Warm, place: Path, tmp_path: Path) -> None:
    """What is finished is there until what replaces it is, wherever the kill comes."""
    output, other = tmp_path / "output", tmp_path / "other"
    _, seconds = undisturbed(warm, place, name, output)
    undisturbed(warm, place, name, other)
    status, said = warm.run(replacing(place, other, name))
    assert status == 0, said
    old, new, randomness, hits = finished(output), finished(other), random.Random(1), 0
    clock = ("seconds", "peak_memory_bytes", "train_seconds", "started", "curve", "phases", "fast", "time_share")
    for _ in range(12):
        pid, _ = warm.start(replacing(place, output, name))
        time.sleep(randomness.uniform(0, seconds))
        os.kill(pid, randomness.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        hits += warm.wait(pid) != 0
        there = finished(output)
        assert there.keys() == old.keys()
        for part, value in there.items():
            value, before, after = (without(each, *clock) for each in (value, old[part], new[part]))
            if not equal(value, before):
                assert_equal(value, after)
    assert hits >= 6
    status, said = warm.run(replacing(place, output, name))
    assert status == 0, said
    assert_equal(without(finished(output), *clock), without(new, *clock))


def without(value: Any, *names: str) -> Any:
    """A value without what was timed, at any depth."""
    if isinstance(value, dict):
        return {key: without(each, *names) for key, each in value.items() if not any(name in key for name in names)}
    return [without(each, *names) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_app_takes_its_profile_along(place: Path, tmp_path: Path) -> None:
    """Neither the process, nor its folder, nor half a card is left."""
    script = "import sys, time; from pathlib import Path; from layercard.report.app.jobs import profile_job\n"
    script += "job = profile_job(Path(sys.argv[3]), sys.argv[4], 16, Path(sys.argv[1]), Path(sys.argv[2]))\n"
    script += "print(job._process.pid, flush=True); time.sleep(600)"
    cards, work = tmp_path / "cards", tmp_path / "work"
    for folder in (cards, work):
        folder.mkdir()
    words = [sys.executable, "-c", script, str(cards), str(work), str(place / "model"), str(place / "data.jsonl")]
    for seconds in (0.0, 1.0, 4.0, 8.0):
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as app:
            assert app.stdout is not None
            group = int(app.stdout.readline())
            time.sleep(seconds)
            app.kill()
        deadline = time.monotonic() + 30
        while any(work.iterdir()) or is_there(group):
            assert time.monotonic() < deadline, f"the profile outlives an app that was killed after {seconds:g} s"
            time.sleep(0.1)
        assert all("layers" in json.loads(path.read_text()) for path in cards.iterdir())


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["profile train", "train", "train stream", "pass", "bench"])
def test_two_runs_in_one_folder(name: str, warm: Warm, place: Path, tmp_path: Path) -> None:
    """The second says so and ends, or finds the first one's result; nothing is spoilt."""
    arguments, result = COMMANDS[name]
    whole, seconds = undisturbed(warm, place, name, tmp_path / "undisturbed")
    output = tmp_path / "both"
    if name == "bench":
        for part in ("cards", "scores"):
            shutil.copytree(tmp_path / "undisturbed" / part, output / part)
    first, _ = warm.start(arguments(place, output))
    time.sleep(seconds / 2)
    second, log = warm.start(arguments(place, output))
    statuses = (warm.wait(first), warm.wait(second))
    assert statuses[0] == 0
    if statuses[1] != 0:
        assert statuses[1] == 2
        assert log.read_text().splitlines()[-1].startswith("error: another run is at work in")
    assert_equal(result(output), whole)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("a small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=False, cwd=os.sep)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def assert_full(status: int, said: str) -> None:
    """One line says that the disk is full."""
    assert status == 2, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
    assert "No space left" in said or "are free; name a folder with room" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["profile train", "train", "train stream", "compare", "bench"])
def test_a_full_disk(name: str, warm: Warm, place: Path, tmp_path: Path, disk: Path) -> None:
    """One line, and after room was made the same command goes on to the same result."""
    arguments, result = COMMANDS[name]
    whole, _ = undisturbed(warm, place, name, tmp_path / "undisturbed")
    output = disk / "out"
    if name == "bench":
        for part in ("cards", "scores"):
            (output / part).mkdir(parents=True)
        (output / "cards" / "tiny.json").symlink_to(tmp_path / "undisturbed" / "cards" / "tiny.json")
        (output / "scores" / "tiny.json").symlink_to(tmp_path / "undisturbed" / "scores" / "tiny.json")
        (disk / "ballast").write_bytes(bytes(24 * 1024))
    assert_full(*warm.run(arguments(place, output)))
    resize(disk, "64m")
    status, said = warm.run(arguments(place, output))
    assert status == 0, said
    assert_equal(result(output), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["profile", "train", "train stream", "compare"])
def test_a_replacement_on_a_full_disk_loses_nothing(name: str, warm: Warm, place: Path, disk: Path) -> None:
    resize(disk, "64m")
    output = disk / "out"
    undisturbed(warm, place, name, output)
    old = finished(output)
    shutil.rmtree(disk / "out-cache", ignore_errors=True)
    try:
        with (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
    except OSError:
        assert_full(*warm.run(replacing(place, output, name)))
    assert_equal(finished(output), old)
