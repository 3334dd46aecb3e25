"""A profile of a model that stays on disk: its numbers, its memory against depth, its time against depth, and a model of 8B parameters.

- *equality*: the card of SmolLM2-135M streamed, against the card of the model in memory;
- *depth*: random models of one width and 8 to 64 blocks, one process each. Peak memory is the resident set above that of the process
  before it opens the model; what goes from block to block is kept on disk;
- *8B*: random weights of Qwen3-8B's shape in bfloat16, written once, block by block, profiled in a process whose address space is capped at
  6 GiB (`RLIMIT_AS`, as `ulimit -v`), which is harder than a cap on resident memory.

Each part is kept in `results/stream_profile/` and not run again while its file is there; the models lie in `--work`.

    python benchmarks/stream_profile.py
    python benchmarks/stream_profile.py --parts equality depth
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from common import RESULTS, report, task_file
from layercard.card.card import LayerCard
from layercard.data.load import load_data
from layercard.errors import BenchmarkError
from layercard.files import read_json, write_json
from layercard.models.embedded import embedded_folder
from layercard.models.load import load_model
from layercard.models.streamed import open_model
from layercard.profiling.profile import profile_records as profile
from layercard.settings import ProfileSettings

FOLDER = RESULTS / "stream_profile"
DEPTHS = (8, 16, 32, 64)
CAP = 6 * 2**30
SHALLOW = {
    "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "vocab_size": 49152, "dtype": "float32",
}  # fmt: skip
QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "dtype": "bfloat16", "num_hidden_layers": 36,
}  # fmt: skip

QWEN_32B = {
    "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 152064, "dtype": "bfloat16", "num_hidden_layers": 64,
}  # fmt: skip


def write_model(folder: Path, shape: dict[str, Any], pool_size: int = 0) -> Path:
    """A Qwen3 model of random weights, one file a block, never whole in memory; SmolLM2's tokenizer beside it.

    With a `pool_size` so many numbers are drawn once, and each tensor repeats them from another place on, which takes no time.
    """
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config | shape))
    for path in embedded_folder().glob("*token*"):
        shutil.copy(path, folder / path.name)
    dtype = getattr(torch, shape["dtype"])
    draw = torch.Generator().manual_seed(0)
    pool = torch.empty(pool_size, dtype=dtype).normal_(0, 0.02, generator=draw) if pool_size else None

    def weights(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=dtype)
        if pool is None:
            return torch.empty(size, dtype=dtype).normal_(0, 0.02, generator=draw)
        start = int(torch.randint(pool_size, (), generator=draw))
        return pool.roll(start).repeat(-(-math.prod(size) // pool_size))[: math.prod(size)].reshape(size)

    places: dict[str, str] = {}
    for name, tensors in _parts(shape):
        made = {key: weights(size) for key, size in tensors.items()}
        save_file(made, folder / f"{name}.safetensors")
        places |= dict.fromkeys(made, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "done").touch()
    return folder


def _parts(shape: dict[str, Any]) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """Names and shapes of the tensors of each file."""
    width, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    own, shared = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    found: list[tuple[str, dict[str, tuple[int, ...]]]] = [
        ("embedding", {"model.embed_tokens.weight": (shape["vocab_size"], width)}),
        ("head", {"lm_head.weight": (shape["vocab_size"], width), "model.norm.weight": (width,)}),
    ]
    for at in range(shape["num_hidden_layers"]):
        maps = {
            "self_attn.q_proj": (own, width), "self_attn.k_proj": (shared, width), "self_attn.v_proj": (shared, width),
            "self_attn.o_proj": (width, own), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,), "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner), "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }  # fmt: skip
        found.append((f"block-{at:03d}", {f"model.layers.{at}.{name}.weight": size for name, size in maps.items()}))
    return found


def child(options: argparse.Namespace) -> None:
    """Profile one model and print what it took, as JSON."""
    if options.cap:
        resource.setrlimit(resource.RLIMIT_AS, (options.cap, options.cap))
    torch.set_num_threads(options.threads)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident set, back to what it is now
    before = _resident("VmRSS")
    started, busy = time.perf_counter(), time.process_time()
    streamed = open_model(options.child, device="cpu", dtype="auto")
    opened, opened_busy = time.perf_counter() - started, time.process_time() - busy
    data = load_data(task_file("e2e", "train"), streamed.base.tokenizer, records=options.records)
    between = Path(options.child) / "between" if options.on_disk else None
    settings = ProfileSettings(
        probe="step" if options.probe_records else "none", probe_records=options.probe_records, batch_size=4, cost=False
    )
    card = profile(streamed, data, settings, _tell, boundaries=between, state=Path(options.child) / "state")
    shutil.rmtree(Path(options.child) / "between", ignore_errors=True)
    shutil.rmtree(Path(options.child) / "state", ignore_errors=True)
    card.save(Path(options.child) / "card.json", force=True)
    peak = _resident("VmHWM")
    print(
        json.dumps(
            {
                "blocks": card.model.layers,
                "tokens": card.data.tokens,
                "open_seconds": opened,
                "seconds": time.perf_counter() - started - opened,
                "cpu_seconds": time.process_time() - busy - opened_busy,
                "peak_bytes": peak - before,
                "peak_process_bytes": peak,
                "largest_weights_bytes": streamed.peak_bytes,
                "bytes_read": streamed.weights.bytes_read,
                "loss": card.data.loss,
                "probe_records": options.probe_records,
            }
        )
    )


def _resident(which: str) -> int:
    """Bytes of the resident set: `VmRSS` now, `VmHWM` at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) * 1024


def _tell(phase: str, done: int, total: int) -> None:
    print(f"{phase}: {done} of {total}", file=sys.stderr, flush=True)


def apart(model: Path, *, records: int, threads: int, on_disk: bool, cap: int = 0, probe_records: int = 0) -> dict[str, Any]:
    """`child` in a process of its own."""
    arguments = ["--child", str(model), "--records", str(records), "--threads", str(threads), "--cap", str(cap)]
    arguments += ["--probe-records", str(probe_records)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments, *(["--on-disk"] if on_disk else [])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def equality(work: Path, threads: int) -> dict[str, Any]:
    """The largest difference of any number of the two cards, by measure, as a share of the measure's largest value."""
    torch.set_num_threads(threads)
    folder = str(embedded_folder())
    base, streamed = load_model(folder, device="cpu"), open_model(folder, device="cpu")
    data = load_data(task_file("e2e", "train"), base.tokenizer, records=16)
    settings = ProfileSettings(probe_records=4, cost=False)
    started = time.process_time()
    plain = profile(base, data, settings)
    between = time.process_time()
    other = profile(streamed, data, settings)
    ended = time.process_time()
    return {
        "tokens": data.tokens,
        "same_fingerprint": base.fingerprint == streamed.base.fingerprint,
        "difference": _differences(plain, other),
        "cpu_seconds": [between - started, ended - between],
        "bytes_read": streamed.weights.bytes_read,
        "largest_weights_bytes": streamed.peak_bytes,
    }


def _differences(one: LayerCard, other: LayerCard) -> dict[str, float]:
    measures = [name for name, value in one.layers[0].model_dump().items() if isinstance(value, dict) and "value" in value]
    pairs = {name: (np.array(one.values(name)), np.array(other.values(name))) for name in measures}
    pairs["coupling"] = np.array(one.coupling), np.array(other.coupling)
    return {name: float(np.abs(a - b).max() / np.abs(a).max()) for name, (a, b) in pairs.items()}


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["equality", "depth", "8b"], choices=["equality", "depth", "8b"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/layercard-stream"), help="folder for models; 20 GB for 8b")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--probe-records", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--on-disk", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    makers = {
        "equality": lambda: equality(options.work, options.threads),
        "depth": lambda: [
            apart(
                write_model(options.work / f"depth-{depth}", SHALLOW | {"num_hidden_layers": depth}),
                records=options.records,
                threads=options.threads,
                on_disk=True,
            )
            for depth in DEPTHS
        ],
        "8b": lambda: apart(
            write_model(options.work / "qwen3-8b", QWEN3_8B),
            records=options.records,
            threads=options.threads,
            on_disk=False,
            cap=CAP,
            probe_records=2,
        ),
    }
    found: dict[str, Any] = {}
    for part in options.parts:
        path = FOLDER / f"{part}.json"
        if not path.exists():
            write_json(path, {"part": part, "found": makers[part]()})
        found[part] = read_json(path, BenchmarkError, "result")["found"]
    tables(found)


def tables(found: dict[str, Any]) -> None:
    """Print and write the tables of the parts."""
    mib = 2**20
    if "equality" in found:
        rows: list[list[Any]] = [[name, f"{value:.1e}"] for name, value in found["equality"]["difference"].items()]
        seconds, tokens = found["equality"]["cpu_seconds"], found["equality"]["tokens"]
        title = f"Streamed against plain, SmolLM2-135M, {tokens} tokens, {seconds[1]:.0f} against {seconds[0]:.0f} seconds of a core"
        report("stream_equality", title, ["measure", "largest difference / largest value"], rows, **found["equality"])
    if "depth" in found:
        runs = found["depth"]
        slope = np.polyfit(np.log([run["blocks"] for run in runs]), np.log([run["cpu_seconds"] for run in runs]), 1)[0]
        rows = [
            [
                run["blocks"],
                round(run["cpu_seconds"], 1),
                round(run["cpu_seconds"] / run["blocks"], 2),
                round(run["peak_bytes"] / mib),
                round(run["largest_weights_bytes"] / mib),
                round(run["bytes_read"] / mib),
            ]
            for run in runs
        ]
        title = f"Blocks of width {SHALLOW['hidden_size']}, {runs[0]['tokens']} tokens: time grows with depth to the power {slope:.2f}"
        heads = ["blocks", "seconds of a core", "of it a block", "peak MiB", "largest weights in memory, MiB", "read, MiB"]
        report("stream_depth", title, heads, rows, exponent=float(slope), runs=runs)
    if "8b" in found:
        run = found["8b"]
        minutes = [run["open_seconds"] / 60, run["seconds"] / 60]
        rows = [
            ["fingerprint, minutes", round(minutes[0], 1)],
            ["profile, minutes", round(minutes[1], 1)],
            ["peak resident memory of the process, MiB", round(run["peak_process_bytes"] / mib)],
            ["largest weights in memory, MiB", round(run["largest_weights_bytes"] / mib)],
            ["read, GiB", round(run["bytes_read"] / 2**30, 1)],
            ["tokens", run["tokens"]],
            ["records of the step probe", run["probe_records"]],
        ]
        report("stream_8b", "Qwen3-8B's shape in bfloat16, address space capped at 6 GiB", ["", "measured"], rows, **run)


if __name__ == "__main__":
    main()
