"""Several processes train what one trains: `layercard train` and `cut_backward` under torchrun, DistributedDataParallel and FSDP."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layercard import processes
from layercard.adapters.apply import place
from layercard.data.load import load_data
from layercard.errors import TrainingError
from layercard.models.load import find_device, wrap_model
from layercard.settings import TrainSettings
from layercard.training.train import train
from several import SETTINGS
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

TESTS = Path(__file__).parent
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def assert_same_adapter(one: Path, other: Path) -> None:
    """The same weights to rounding: what the prefix cache keeps was computed beside other records after a resumption."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, weight in second.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found (`several.py`), and the folder."""
    folder = tmp_path_factory.mktemp("several")
    command = [sys.executable, *TORCHRUN, str(TESTS / "several.py"), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((folder / f"results{rank}.json").read_text()) for rank in (0, 1))
    return {"folder": folder, "first": first, "second": second}


def test_two_processes_give_losses_and_adapter_of_one(results: dict[str, Any], tmp_path: Path) -> None:
    folder, record = results["folder"], results["first"]["trained"]["record"]
    base = wrap_model(build_tiny("llama"), tiny_tokenizer(), name="tiny")
    data, valid = (load_data(str(folder / f"{name}.jsonl"), base.tokenizer) for name in ("train", "valid"))
    alone = train(base, place(base, [1, 2]), data, tmp_path / "alone", SETTINGS, valid=valid)
    assert record["losses"] == pytest.approx(alone.losses, rel=1e-4)
    assert record["loss_after"] == pytest.approx(alone.loss_after, rel=1e-4)
    assert alone.losses[0] > 1.05 * alone.losses[-1]
    assert record["tokens_seen"] == alone.tokens_seen
    assert (record["processes"], alone.processes) == (2, 1)
    assert record["peak_memory_bytes"] < 0.8 * alone.peak_memory_bytes  # half the rows each
    assert_same_adapter(folder / "whole", tmp_path / "alone")
    again = train(base, place(base, [1, 2]), data, folder / "whole", SETTINGS, valid=valid, resume=True)
    assert again.to_json() == record  # a run of two processes is the same run in one


def test_two_processes_resume_to_the_same_adapter(results: dict[str, Any]) -> None:
    assert results["first"]["trained"]["resumed"] == pytest.approx(results["first"]["trained"]["record"]["losses"], rel=1e-5)
    assert_same_adapter(results["folder"] / "cut", results["folder"] / "whole")


def test_the_first_process_speaks_and_all_know(results: dict[str, Any]) -> None:
    first, second = results["first"]["trained"], results["second"]["trained"]
    assert first["heard"].count("train") == 5
    assert second["heard"] == []
    assert first["record"] == second["record"]
    assert first["uneven"] == "TrainingError: 2 processes cannot share a batch of 3 evenly; give a multiple of 2"
    assert "holds a finished run" in first["exists"]
    assert "lower the learning rate" in first["diverged"]
    assert all(first[name] == second[name] for name in ("uneven", "exists", "diverged"))
    assert not (results["folder"] / "uneven").exists()


CONNECTED = """
import sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from layercard import processes
def work(fails):
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    processes.gathered(1)
    if fails:
        raise ValueError
for fails in (False, True):
    try:
        with processes.joined(torch.device("cpu")):
            work(fails)
    except ValueError:
        pass
    print([name for task in Path("/proc/self/task").glob("*") if "gloo" in (name := task.joinpath("comm").read_text())])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_thread_outlives_a_connection() -> None:
    """One that needs Python while the interpreter goes down aborts the process."""
    common = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20001 + os.getpid() % 20000)}
    started = [
        subprocess.Popen([sys.executable, "-c", CONNECTED], env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    assert [process.communicate(timeout=100)[0] for process in started] == ["[]\n[]\n"] * 2


@pytest.mark.parametrize("kind", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("wrap", ["distributed", "sharded"])
def test_the_cut_under_data_parallel_wrappers(results: dict[str, Any], wrap: str, kind: str) -> None:
    found = results["first"][f"{wrap} {kind}"]
    stock, ours = found["stock"], found["ours"]
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5)
    assert ours["sum"] == pytest.approx(stock["sum"], rel=1e-5)
    assert ours["losses"][0] != pytest.approx(ours["losses"][-1])
    assert ours["forwards"] == [3, 3, 3 if kind == "off" else 6]


@pytest.fixture
def inputs(tiny_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    """Arguments of `layercard train` for a tiny run."""
    from layercard.models.load import load_model

    data = write_records(tmp_path / "train.jsonl", tiny_records(10))
    placement = place(load_model(str(tiny_folder), device="cpu"), [2]).save(tmp_path / "placement.json")
    return ("train", str(tiny_folder), "--data", str(data), "--placement", str(placement), "--rank", "2", "--device", "cpu")


def test_torchrun_prints_once(inputs: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, *TORCHRUN, "-m", "layercard", *inputs, "--steps", "2", "-o", str(tmp_path / "a")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: ") == 1
    assert json.loads((tmp_path / "a" / "run.json").read_text())["processes"] == 2


def test_two_processes_train_a_streamed_model_as_one(inputs: tuple[str, ...], tmp_path: Path) -> None:
    """The pass is shared, and both read all hidden states."""
    data, runs = str(tmp_path / "train.jsonl"), {}
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        more = ["--stream", "--steps", "5", "--valid", data, "--cache", str(tmp_path / f"states-{name}"), "-o", str(tmp_path / name)]
        command = [sys.executable, *launcher, "-m", "layercard", *inputs, *more]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        runs[name] = json.loads((tmp_path / name / "run.json").read_text())
    assert runs["two"]["processes"] == 2
    assert runs["two"]["losses"] == pytest.approx(runs["one"]["losses"], rel=1e-4)
    assert runs["two"]["loss_after"] == pytest.approx(runs["one"]["loss_after"], rel=1e-4)
    assert_same_adapter(tmp_path / "two", tmp_path / "one")
    kept = {}
    for name in runs:
        shards = [load_file(path)["keys"] for path in (tmp_path / f"states-{name}").rglob("*.safetensors")]
        kept[name] = sorted(bytes(key) for shard in shards for key in shard.numpy())
    assert kept["two"] == kept["one"]  # no record passed twice


def test_a_full_disk_of_one_process_ends_both_in_one_line(inputs: tuple[str, ...], tmp_path: Path) -> None:
    script = (
        "import sys\nfrom layercard import processes\nfrom layercard.commands import main\nfrom layercard.fast import prefix_pass\n"
        "if processes.rank() == 1:\n    prefix_pass.COPIES = 10**15\nsys.argv[0] = 'layercard'\nmain.main()\n"
    )
    common = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(19998 + os.getpid() % 20000)}
    command = [sys.executable, "-c", script, *inputs, "--stream", "--steps", "2", "-o", str(tmp_path / "a")]
    started = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=200)[1].strip() for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert said[0].splitlines()[-1].startswith("error: the pass needs")
    assert not any("Traceback" in each for each in said)
    assert not (tmp_path / "a").exists()


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """All numbers in a JSON value but readings of a clock, by their place."""
    if isinstance(value, dict):
        return {name: n for key, part in value.items() if key != "cost" for name, n in numbers(part, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {name: n for at, part in enumerate(value) for name, n in numbers(part, f"{path}/{at}").items()}
    return {path: value} if isinstance(value, float) else {}


@pytest.mark.slow
@pytest.mark.parametrize("records", [3, 64], ids=["rows of tokens", "sums"])  # fewer tokens than features, and more
def test_two_processes_profile_as_one(records: int, tiny_folder: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.jsonl", tiny_records(24) if records > 3 else [{"prompt": "a", "completion": c} for c in "bcde"])
    arguments = ["-m", "layercard", "profile", str(tiny_folder), "--data", str(data)]
    arguments += ["--rank", "2", "--device", "cpu", "--no-cost", "--probe", "train", "--probe-steps", "4", "--batch-size", "3"]
    for name, launcher in (("one", ()), ("two", TORCHRUN), ("accelerated", ACCELERATE)):
        command = [sys.executable, *launcher, *arguments, "-o", str(tmp_path / f"{name}.json")]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("next: layercard show") == 1
    one, two, accelerated = (numbers(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("one", "two", "accelerated"))
    assert len(one) > 200
    assert two == pytest.approx(one, rel=2e-3, abs=1e-5)
    assert accelerated == pytest.approx(one, rel=2e-3, abs=1e-5)
    assert records == 3 or accelerated != one, "one process would give the same sums to the last digit"
    assert not list(tmp_path.glob("*.state"))


FAILING = """
import sys
import torch
from layercard import processes
from layercard.commands import main as cli
from layercard.training import trainer
own = trainer.AdapterTrainer.compute_loss
def loss(*args, **kwargs):
    if processes.rank() == 1:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return own(*args, **kwargs)
trainer.AdapterTrainer.compute_loss = loss
sys.argv[0] = "layercard"
cli.main()
"""


def test_a_process_that_fails_by_itself_says_so(inputs: tuple[str, ...], tmp_path: Path) -> None:
    """Each ends in one line: the one that failed with the reason, the other with whom to ask."""
    common = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    command = [sys.executable, "-c", FAILING, *inputs, "--steps", "2", "-o", str(tmp_path / "a")]
    started = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [2, 2]
    assert errors[1].startswith("error: process 1: memory ran out")
    assert "error: another process of this run has ended" in errors[0]
    assert not (tmp_path / "a" / "run.json").exists()


# --- one process: interrupts -------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys
from layercard.commands import main as cli
from layercard.commands import options, terminal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
object.__setattr__(options.TRAINING, "save_steps", 2)
def heard(self, phase, done, total):
    if (phase, done) == ("train", 5):
        os.kill(os.getpid(), {number})
terminal.Display.__call__ = heard
sys.argv[0] = "layercard"
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n"), (signal.SIGKILL, -9, "")],
)
def test_resume_after_an_interrupt(number: int, status: int, word: str, inputs: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*inputs, "--steps", "7", "--dropout", "0.2")
    stopped = [sys.executable, "-c", INTERRUPTED.format(number=int(number)), *arguments, "-o", str(tmp_path / "a")]
    done = subprocess.run(stopped, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", word)
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "a" / "run.json").exists()
    from layercard.commands.main import run

    assert run([*arguments, "-o", str(tmp_path / "a"), "--resume"]) == 0
    assert run([*arguments, "-o", str(tmp_path / "undisturbed")]) == 0
    assert_same_adapter(tmp_path / "a", tmp_path / "undisturbed")
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("a", "undisturbed")]
    assert records[0]["losses"] == pytest.approx(records[1]["losses"], rel=1e-5)
    assert len(records[0]["losses"]) == 7


# --- one process: numbers ----------------------------------------------------------------------------------------------------


def test_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it without having started several
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.rank(), processes.count(), processes.local_rank(), processes.is_first()) == (0, 1, 0, True)
    assert processes.total([1.5, 2.0]) == [1.5, 2.0]
    assert processes.by_first(lambda: {"a": 1}) == {"a": 1}


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (processes.rank(), processes.count(), processes.is_first()) == (5, 8, False)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda:1")
    assert find_device("cuda:3") == torch.device("cuda:3")
    assert find_device("cpu") == torch.device("cpu")


def test_with_dropout_the_number_of_processes_belongs_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = wrap_model(build_tiny("llama"), tiny_tokenizer())
    data = load_data(str(write_records(tmp_path / "train.jsonl", tiny_records(4))), base.tokenizer)
    settings = TrainSettings(rank=2, steps=1, dropout=0.1)
    train(base, place(base, [2]), data, tmp_path / "a", settings)
    train(base, place(base, [2]), data, tmp_path / "b", replace(settings, dropout=0.0))
    plan = json.loads((tmp_path / "a" / "checkpoints" / "plan.json").read_text())
    (tmp_path / "a" / "checkpoints" / "plan.json").write_text(json.dumps({**plan, "processes": 2}))
    with pytest.raises(TrainingError, match="processes 2, not 1"):
        train(base, place(base, [2]), data, tmp_path / "a", settings, resume=True)
    del plan["processes"]  # as written before there were several
    (tmp_path / "a" / "checkpoints" / "plan.json").write_text(json.dumps(plan))
    train(base, place(base, [2]), data, tmp_path / "a", settings, resume=True)
