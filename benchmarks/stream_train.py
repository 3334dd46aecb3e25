"""Training with the lower blocks on disk: the same losses, memory against depth and trained blocks, and a model of 8B parameters.

- *equality*: SmolLM2-135M, the last 6 of 30 blocks, float32 and bfloat16, one pass and three: largest difference of a step's loss and of
  the adapter's weights from ordinary training; and a training killed (-9) in the pass and in a step, and gone on with;
- *memory*: random models of one width: 8 to 64 blocks with the last 2 trained, and 32 blocks with the last 1 to 16 trained; peak
  resident memory above that of the process before it opens the model, and what the cost model's sizes foretell;
- *8b*: random weights of Qwen3-8B's shape in bfloat16 in an address space of 6 GiB: the last 4 of 36 blocks, two passes over 64 records of
  E2E; and that the same without `--stream` is refused;
- *32b*: random weights of Qwen2.5-32B's width and depth in bfloat16 in an address space of 12 GiB: the pass over 8 records, and 4 steps on
  the last 2 blocks. Takes 66 GB of disk, given back at the end;
- *sizes*: what the cost model forecasts for models of 1.5B to 70B; nothing is measured.

Each part is kept in `results/stream_train/` and not run again while its file is there; the models lie in `--work`.

    python benchmarks/stream_train.py
    python benchmarks/stream_train.py --parts equality memory
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config

from common import RESULTS, report, task_file
from layercard.adapters.apply import place
from layercard.cost.estimate import estimated_cost
from layercard.cost.measure import usual_batch
from layercard.cost.model import CostModel
from layercard.data.load import IGNORED, load_data
from layercard.errors import BenchmarkError
from layercard.files import read_json, write_json
from layercard.models.embedded import embedded_folder
from layercard.models.load import empty_model
from layercard.models.streamed import open_model
from layercard.settings import FastSettings, TrainSettings
from layercard.training.streamed import train_streamed
from stream_profile import CAP, QWEN3_8B, QWEN_32B, SHALLOW, write_model

FOLDER = RESULTS / "stream_train"
PARTS = ("equality", "memory", "8b", "32b", "sizes")
CAP_32B, SPACE_32B = 12 * 2**30, 68 * 10**9
SHAPES = {"8b": QWEN3_8B, "32b": QWEN_32B}
LARGE = {
    "8b": "Qwen3-8B's shape, random weights, bfloat16: the last 4 of 36 blocks in an address space of 6 GiB",
    "32b": "Qwen2.5-32B's width and depth, random weights, bfloat16: the last 2 of 64 blocks in an address space of 12 GiB",
}
LAST = (1, 4, 8, 16)
"""Numbers of trained blocks in the table of sizes."""


def _shape(blocks: int, width: int, inner: int, heads: int, shared: int, vocabulary: int, *, tied: bool = False) -> dict[str, Any]:
    """A shape with heads of 128."""
    return {
        "num_hidden_layers": blocks, "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "head_dim": 128,
        "num_key_value_heads": shared, "vocab_size": vocabulary, "tie_word_embeddings": tied,
    }  # fmt: skip


SIZES = {
    "1.5B (Qwen2.5)": _shape(28, 1536, 8960, 12, 2, 151936, tied=True),
    "3B (Qwen2.5)": _shape(36, 2048, 11008, 16, 2, 151936, tied=True),
    "8B (Qwen3)": _shape(36, 4096, 12288, 32, 8, 151936),
    "14B (Qwen2.5)": _shape(48, 5120, 13824, 40, 8, 152064),
    "32B (Qwen2.5)": _shape(64, 5120, 27648, 40, 8, 152064),
    "70B (Llama 3)": _shape(80, 8192, 28672, 64, 8, 128256),
}
DEPTHS, TRAINED = (8, 16, 32, 64), (1, 4, 8, 16)


def resident(which: str) -> int:
    """Bytes of the resident set: `VmRSS` now, `VmHWM` at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) * 1024


def child(options: argparse.Namespace) -> None:
    """Train the last blocks of one model from disk, and print what it took as JSON."""
    if options.cap:
        resource.setrlimit(resource.RLIMIT_AS, (options.cap, options.cap))
    torch.set_num_threads(options.threads)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident set, back to what it is now
    before, started = resident("VmRSS"), time.perf_counter()
    streamed = open_model(options.child, device="cpu", dtype="auto")
    opened = time.perf_counter() - started
    data = load_data(task_file("e2e", "train"), streamed.base.tokenizer, records=options.records, max_length=256)
    blocks, batch = len(streamed.blocks), usual_batch(data.examples, 4, streamed.base.pad_id)
    output = Path(options.child) / "adapter"
    shutil.rmtree(output, ignore_errors=True)
    settings = TrainSettings(epochs=options.epochs, batch_size=4, learning_rate=1e-3, save_steps=0)
    placement = place(streamed.base, range(blocks - options.last, blocks))
    fast = FastSettings(cache_folder=str(Path(options.child) / "states"))
    run = train_streamed(streamed, placement, data, output, settings, fast=fast, progress=_tell)
    states = sum(path.stat().st_size for path in (Path(options.child) / "states").rglob("*") if path.is_file())
    shutil.rmtree(Path(options.child) / "states", ignore_errors=True)
    phases = {phase["name"]: phase["seconds"] for phase in run.phases}
    print(
        json.dumps(
            {
                "blocks": blocks,
                "trained": options.last,
                "tokens": data.tokens,
                "batch": {"length": batch.input_ids.shape[1], "labelled": int((batch.labels[:, 1:] != IGNORED).sum())},
                "steps": run.steps,
                "open_seconds": opened,
                "pass_seconds": phases["pass"],
                "step_seconds": run.train_seconds / run.steps,
                "peak_bytes": resident("VmHWM") - before,
                "peak_process_bytes": resident("VmHWM"),
                "weights_bytes": streamed.resident_bytes,
                "step_bytes": run.peak_memory_bytes,
                "disk_bytes": states,
                "losses": [run.losses[0], run.losses[-1]],
            }
        )
    )


def _tell(phase: str, done: int, total: int) -> None:
    print(f"{phase}: {done} of {total}", file=sys.stderr, flush=True)


def apart(model: Path, last: int, options: argparse.Namespace, *, records: int, epochs: float, cap: int = 0) -> dict[str, Any]:
    """`child` in a process of its own."""
    arguments = ["--child", str(model), "--last", str(last), "--records", str(records), "--epochs", str(epochs), "--cap", str(cap)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *arguments, "--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def forecast(shape: dict[str, Any], trained: int, batch: dict[str, int]) -> int:
    """Bytes of a process that trains the last blocks of a model of this shape with `--stream`, from the shape alone."""
    cost = _cost(shape, batch)
    return cost.process_memory(range(len(cost.layers) - trained, len(cost.layers)), stream=True)


def _cost(shape: dict[str, Any], batch: dict[str, int]) -> CostModel:
    """The cost model of a shape; its times are of no interest here."""
    config = Qwen3Config(**{"tie_word_embeddings": False, **{key: value for key, value in shape.items() if key != "dtype"}})
    model = empty_model("", config, getattr(torch, shape["dtype"]), False)
    of_batch = {"batch_size": 4, "rank": TrainSettings().rank, "dtype": shape["dtype"], **batch}
    return estimated_cost(model, flops=1.0, bandwidth=1.0, name="", **of_batch)


def equality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ordinary against streamed training through the command line, each in processes of their own; and a streamed one killed twice."""
    rows = []
    work = options.work / "equality"
    for dtype, epochs in (("float32", 1), ("float32", 3), ("bfloat16", 1)):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        base = open_model(str(embedded_folder()), dtype=dtype).base
        place(base, range(24, 30)).save(work / "placement.json")
        line = [
            *(sys.executable, "-m", "layercard", "train", str(embedded_folder()), "--data", task_file("e2e", "train")),
            *("--records", "48", "--placement", str(work / "placement.json"), "--epochs", str(epochs), "--dtype", dtype),
            *("--device", "cpu", "--learning-rate", "0.002", "--cache", str(work / "states")),
        ]
        runs = {}
        for name, more in (("memory", []), ("stream", ["--stream"])):
            subprocess.run([*line, *more, "-o", str(work / name)], check=True, stdout=subprocess.DEVNULL)
            runs[name] = read_json(work / name / "run.json", BenchmarkError, "run")
        shutil.rmtree(work / "states")
        line += ["--stream", "--resume", "-o", str(work / "killed")]  # where there is nothing to go on with, a new run begins
        killed = [_kill(line, word) for word in ("pass", "train")]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        tensors = {name: load_file(work / name / "adapter_model.safetensors") for name in ("memory", "stream", "killed")}
        largest = max(float(value.abs().max()) for value in tensors["memory"].values())
        losses = np.array([runs[name]["losses"] for name in ("memory", "stream")])

        def apart_by(other: str, tensors: dict[str, Any] = tensors) -> float:
            return max(float((tensors["memory"][key] - tensors[other][key]).abs().max()) for key in tensors["memory"])

        rows.append(
            {
                "dtype": dtype,
                "epochs": epochs,
                "steps": losses.shape[1],
                "loss": float(np.abs(losses[0] - losses[1]).max() / losses[0].max()),
                "adapter": apart_by("stream") / largest,
                "killed": apart_by("killed") / largest,
                "kills": sum(killed),
            }
        )
    return rows


def _kill(command: list[str], word: str) -> bool:
    """Start a command and kill it when its progress first names a phase; whether it was still at work then."""
    environment = os.environ | {"LAYERCARD_PROGRESS": "lines"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            parts = line.split("\t")
            if len(parts) == 4 and parts[1] == word and int(parts[2]) >= 3:
                process.send_signal(signal.SIGKILL)
                break
    return process.returncode == -signal.SIGKILL


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks over depth, and over the number of trained blocks."""
    cells = [(depth, 2) for depth in DEPTHS] + [(32, last) for last in TRAINED]
    models = {depth: write_model(options.work / f"depth-{depth}", SHALLOW | {"num_hidden_layers": depth}) for depth, _ in cells}
    return [apart(models[depth], last, options, records=16, epochs=1) for depth, last in cells]


def large(options: argparse.Namespace) -> dict[str, Any]:
    """The 8B shape, and what the command without `--stream` says under the same cap."""
    model = write_model(options.work / "qwen3-8b", QWEN3_8B)
    command = (
        f"ulimit -v {CAP // 1024}; exec {sys.executable} -m layercard train {model} --dtype bfloat16 --device cpu "
        f"--data {task_file('e2e', 'train')} --placement {_placement(model)} -o {options.work / 'refused'}"
    )
    refusal = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    shutil.rmtree(options.work / "refused", ignore_errors=True)
    done = apart(model, 4, options, records=64, epochs=2, cap=CAP)
    return done | {"refusal": refusal.stderr.strip().splitlines()[-1], "refusal_status": refusal.returncode}


def huge(options: argparse.Namespace) -> dict[str, Any]:
    """The 32B shape; its files are gone afterwards."""
    folder = options.work / "qwen-32b"
    free = shutil.disk_usage(options.work).free
    if not (folder / "done").exists() and free < SPACE_32B:
        raise BenchmarkError(
            f"32b needs {SPACE_32B / 1e9:.0f} GB in {options.work}, where {free / 1e9:.0f} GB are free; name another --work"
        )
    try:
        return apart(write_model(folder, QWEN_32B, pool_size=2**24), 2, options, records=8, epochs=2, cap=CAP_32B)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sizes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forecasts by size of model."""
    rows = []
    for name, shape in SIZES.items():
        blocks = shape["num_hidden_layers"]
        cost = _cost(shape | {"dtype": "bfloat16"}, {"length": 256, "labelled": 512})
        last = [cost.process_memory(range(blocks - count, blocks), stream=True) for count in LAST]
        disk = round(1000 * 256 * shape["hidden_size"] * 2 / 1e9, 2)
        rows.append({"model": name, "blocks": blocks, "all": cost.process_memory(range(blocks)), "last": last, "disk": disk})
    return rows


def _placement(model: Path) -> Path:
    path = model / "placement.json"
    if not path.exists():
        place(open_model(str(model), dtype="auto", device="cpu").base, range(32, 36)).save(path)
    return path


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--work", type=Path, default=Path("/tmp/layercard-stream"), help="folder for models; 20 GB for 8b, 68 GB for 32b")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--records", type=int, default=16, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=float, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    parts = dict(zip(PARTS, (equality, memory, large, huge, sizes), strict=True))
    results: dict[str, Any] = {}
    for part in options.parts:
        path = FOLDER / f"{part}.json"
        if not path.exists():
            write_json(path, {"part": part, "result": parts[part](options)})
        results[part] = read_json(path, BenchmarkError, "result")["result"]
    tables(results)


def tables(results: dict[str, Any]) -> None:
    """Print and write the tables of the parts."""
    mib = 2**20
    if "equality" in results:
        rows = [
            [row["dtype"], row["epochs"], row["steps"], f"{row['loss']:.1e}", f"{row['adapter']:.1e}", f"{row['killed']:.1e}", row["kills"]]
            for row in results["equality"]
        ]
        heads = ["type", "epochs", "steps", "loss of a step", "adapter", "adapter after kills", "kills"]
        title = "Streamed against ordinary training: largest difference as a share of the largest value; SmolLM2-135M, last 6 of 30 blocks"
        report("stream_train_equality", title, heads, rows, runs=results["equality"])
    if "memory" in results:
        forecasts = [forecast(SHALLOW | {"num_hidden_layers": run["blocks"]}, run["trained"], run["batch"]) for run in results["memory"]]
        rows = [
            [
                run["blocks"],
                run["trained"],
                round(run["weights_bytes"] / mib),
                round(run["step_bytes"] / mib),
                round(run["peak_process_bytes"] / mib),
                round(foretold / mib),
                round(100 * (foretold / run["peak_process_bytes"] - 1), 1) + 0.0,  # no -0
                round(run["disk_bytes"] / mib, 1),
            ]
            for run, foretold in zip(results["memory"], forecasts, strict=True)
        ]
        heads = [
            "blocks",
            "trained",
            "weights in memory, MiB",
            "above them in a step, MiB",
            "peak of the process, MiB",
            "forecast, MiB",
            "error, %",
            "hidden states, MiB",
        ]
        title = f"Memory of streamed training: random weights, width {SHALLOW['hidden_size']}, float32, 16 records, batches of 4"
        report("stream_train_memory", title, heads, rows, runs=results["memory"])
    for part, title in LARGE.items():
        if part in results:
            run = results[part]
            rows = [
                ["fingerprint, minutes", round(run["open_seconds"] / 60, 1)],
                [f"pass over {run['blocks'] - run['trained']} blocks, minutes", round(run["pass_seconds"] / 60, 1)],
                ["a step of 4 records, seconds", round(run["step_seconds"], 2)],
                ["steps", run["steps"]],
                ["peak resident memory of the process, MiB", round(run["peak_process_bytes"] / mib)],
                ["forecast of it, MiB", round(forecast(SHAPES[part], run["trained"], run["batch"]) / mib)],
                ["weights in memory, MiB", round(run["weights_bytes"] / mib)],
                ["hidden states on disk, MiB", round(run["disk_bytes"] / mib, 1)],
                ["tokens", run["tokens"]],
            ]
            rows += [["without --stream", run["refusal"]]] if "refusal" in run else []
            report(f"stream_train_{part}", title, ["", "measured"], rows, **run)
    if "sizes" in results:
        rows = [
            [run["model"], run["blocks"], round(run["all"] / 1e9, 1), *(round(size / 1e9, 1) for size in run["last"]), run["disk"]]
            for run in results["sizes"]
        ]
        heads = ["model", "blocks", "all in memory, GB", *(f"last {last}, GB" for last in LAST), "hidden states of 1,000 records, GB"]
        title = (
            "Memory of a process that trains the last blocks with --stream, forecast from shapes on a CPU: bfloat16, rank 8, batches of "
            "4 records of 256 tokens, half of them labelled"
        )
        report("stream_train_sizes", title, heads, rows, runs=results["sizes"])


if __name__ == "__main__":
    main()
