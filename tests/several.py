"""What each of two processes does in test_processes.py; `torchrun --nproc-per-node 2 tests/several.py FOLDER` by hand."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from layercard import cut_backward, processes
from layercard.adapters.apply import place
from layercard.data.load import load_data
from layercard.errors import LayercardError
from layercard.models.load import wrap_model
from layercard.settings import TrainSettings
from layercard.training.train import train
from test_cut import batches, enable, peft_model
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

SETTINGS = TrainSettings(rank=2, steps=5, batch_size=4, accumulation=2, learning_rate=1e-2, warmup_ratio=0.0, save_steps=2)
CPU = torch.device("cpu")


def trained(folder: Path) -> dict[str, Any]:
    """Run, then run with the end cut off and resumed; all refusals in between."""
    base = wrap_model(build_tiny("llama"), tiny_tokenizer(), name="tiny")
    data = load_data(str(folder / "train.jsonl"), base.tokenizer)
    valid = load_data(str(folder / "valid.jsonl"), base.tokenizer)
    placement, heard = place(base, [1, 2]), []
    run = lambda name, settings=SETTINGS, **more: train(base, placement, data, folder / name, settings, valid=valid, **more)  # noqa: E731
    record = run("whole", progress=lambda phase, done, total: heard.append(phase))
    run("cut")
    dist.barrier()
    if processes.is_first():
        for name in ("run.json", "adapter_model.safetensors", "checkpoints/checkpoint-5"):
            path = folder / "cut" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    dist.barrier()
    resumed = run("cut", resume=True)
    found = {"record": record.to_json(), "resumed": resumed.losses, "heard": heard}
    found["uneven"] = refusal(lambda: run("uneven", replace(SETTINGS, batch_size=3)))
    found["exists"] = refusal(lambda: run("whole"))
    found["diverged"] = refusal(lambda: run("wild", replace(SETTINGS, learning_rate=1e30, max_grad_norm=0.0, scheduler="constant")))
    return found


def refusal(run: Callable[[], object]) -> str:
    """The error that a run ends in, in every process."""
    try:
        run()
    except LayercardError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def distributed(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2: each block by itself, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loop(wrap: Callable[[nn.Module], nn.Module], kind: str, *, cut: bool) -> dict[str, Any]:
    """A plain loop over this process's rows of three batches: losses, and how far each block's first linear map came."""
    model = wrap(peft_model("llama", (2,)))
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    enable(inner, kind)
    forwards = [0, 0, 0]
    handles = []
    for at, layer in enumerate(inner.get_base_model().model.layers):

        def count(*_: Any, at: int = at) -> None:
            forwards[at] += 1

        handles.append(layer.input_layernorm.register_forward_hook(count))
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    with cut_backward(model) if cut else nullcontext():
        for batch in batches(3):
            own = {name: value[processes.rank() :: processes.count()] for name, value in batch.items()}
            loss = model(**own, use_cache=False).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses += processes.total([loss.item()])
    for handle in handles:
        handle.remove()
    weights = [weight.full_tensor() if wrap is sharded else weight for weight in model.parameters() if weight.requires_grad]
    return {"losses": losses, "forwards": forwards, "sum": [float(weight.detach().abs().sum()) for weight in weights]}


def main(folder: Path) -> None:
    """Everything in turn."""
    if processes.is_first():
        write_records(folder / "train.jsonl", tiny_records(10))
        write_records(folder / "valid.jsonl", tiny_records(6, 20))
    with processes.joined(CPU):
        processes.wait()
        found = {"trained": trained(folder)}
        for wrap in (distributed, sharded):
            for kind in ("off", "reentrant", "non-reentrant"):
                found[f"{wrap.__name__} {kind}"] = {
                    "stock": loop(wrap, "off", cut=False),
                    "ours": loop(wrap, kind, cut=True),
                }
        (folder / f"results{processes.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
