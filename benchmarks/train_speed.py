"""How much faster is targeted training than LoRA in all layers, in one and the same trainer?

Every run is a process of its own: transformers' `Trainer` around a PEFT model, three epochs over the same records in the same batches.
*stock* is just that; *ours* is the same trainer inside `with fast_training(model):`. Runs alternate within a round, each round has its
own seed (order of the records, first weights of the adapters), and time is that of steps, first epoch and later ones apart. Memory is
counted in two further steps of their own process (tensors alive above the loaded model, optimiser and prefix cache included). With
shapes instead of a model, weights are random and only time and memory mean anything. Finished runs are kept, so that the benchmark goes
on where it was stopped.

    python benchmarks/train_speed.py                                         SmolLM2-135M on E2E, weights in bfloat16
    python benchmarks/train_speed.py --dtype float32 --rounds 1              the same in float32
    python benchmarks/train_speed.py --checkpointing --rounds 1              with gradient checkpointing
    python benchmarks/train_speed.py --model gpt2-medium --records 16        shapes only
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from common import RESULTS, machine, report, task_file
from layercard.adapters.apply import place
from layercard.card.card import LayerCard
from layercard.data.load import Dataset, collate, load_data, shuffled
from layercard.fast.fast_training import fast_training
from layercard.files import write_json
from layercard.measure import PeakMemory
from layercard.models.adapted import quiet_peft
from layercard.models.load import BaseModel, load_model, quiet_libraries, wrap_model
from layercard.models.skeleton import BUILT_IN, read_config
from layercard.selection.budgets import Budgets
from layercard.selection.placement import Placement
from layercard.selection.select import select
from layercard.training.evaluate import held_out_losses

EPOCHS, BATCH, RANK = 3, 4, 8
RATES = {1: 0.016, 8: 0.008}
"""Learning rate up to so many layers, as the placement benchmark found them; for more `MANY`."""
MANY = 0.004
TOKENS = 256
VALID = 96
WARY = 97
"""Performance to keep, %, for a second balanced placement beside the default of 95."""


def placements(base: BaseModel, card: LayerCard | None) -> dict[str, tuple[int, ...]]:
    """Layers by name; the card's own choice only where there is a card."""
    depth = len(base.blocks)
    start = (depth - 5) // 2 + (depth - 5) % 2
    found = {
        "all": tuple(range(depth)),
        "last 5": tuple(range(depth - 5, depth)),
        "middle 5": tuple(range(start, start + 5)),
        "first 5": tuple(range(5)),
    }
    if card is None:
        return found
    wary = select(card, budgets=Budgets(min_performance=WARY)).layers
    return found | {"balanced": select(card).layers, f"balanced, {WARY:g} % wanted": wary}


class SameBatches(Trainer):
    """`Trainer` that takes the records in the order in which they are given, and keeps the loss of each step unrounded."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss.item())
        return loss

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    """Seconds of each step; with a counter, the peak memory of all steps."""

    def __init__(self, count: PeakMemory | None) -> None:
        self.seconds: list[float] = []
        self.count = count
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.count is not None and state.global_step == 0:
            self.count.start()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def base_of(name: str, dtype: str) -> BaseModel:
    """The embedded model, or random weights in the shape of another; their dropout is off."""
    if name not in BUILT_IN:
        return load_model(name, dtype=dtype)
    config = read_config(name)
    for key in [key for key in config.to_dict() if key.endswith("pdrop")]:
        setattr(config, key, 0.0)
    with quiet_libraries():
        torch.manual_seed(0)
        return wrap_model(AutoModelForCausalLM.from_config(config, dtype=dtype), load_model("smollm2-135m").tokenizer, name=name)


def records_of(base: BaseModel, records: int, seed: int, memory: bool) -> tuple[Dataset, list[Any]]:
    """The records, and the order in which three epochs take them; to count memory the heaviest batch twice."""
    data = load_data(task_file("e2e", "train"), base.tokenizer, records=records, max_length=TOKENS)
    order = [data.examples[row] for row in shuffled(len(data), EPOCHS * len(data), seed)]
    if memory:
        heaviest = max(range(0, len(order), BATCH), key=lambda at: max(len(row.input_ids) for row in order[at : at + BATCH]))
        order = order[heaviest : heaviest + BATCH] * 2
    return data, order


def peft_model(base: BaseModel, placement: Placement, seed: int) -> PeftModel:
    """Stock PEFT with the placement's paths."""
    set_seed(seed)
    with quiet_peft():
        return get_peft_model(base.model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(placement.paths)))


def arguments(options: argparse.Namespace, layers: int, folder: str) -> TrainingArguments:
    """As a user would set them, but for the logging of every step."""
    rate = next((rate for most, rate in RATES.items() if layers <= most), MANY)
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=rate,
        warmup_steps=2,
        gradient_checkpointing=options.checkpointing,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=options.seed,
    )


@contextmanager
def around(ours: bool, model: PeftModel, data: Dataset) -> Iterator[Any]:
    """`fast_training` for ours, nothing for stock."""
    with fast_training(model, passes=EPOCHS, tokens=data.tokens) if ours else nullcontext() as speed:
        yield speed


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One training, in this process."""
    base = base_of(options.model, options.dtype)
    layers = tuple(options.layers)
    data, order = records_of(base, options.records, options.seed, options.memory)
    count = PeakMemory(base.device) if options.memory else None
    clock = Clock(count)
    model = peft_model(base, place(base, layers), options.seed)

    def batch(rows: list[Any]) -> dict[str, torch.Tensor]:
        made = collate(rows, range(len(rows)), base.pad_id)
        return {"input_ids": made.input_ids, "attention_mask": made.attention_mask, "labels": made.labels}

    trainer = SameBatches(
        model=model, args=arguments(options, len(layers), options.folder), train_dataset=order, data_collator=batch, callbacks=[clock]
    )
    trainer.step_losses = []
    with quiet_libraries(), quiet_peft(), around(options.ours, model, data) as speed:
        trainer.train()
        if count is not None:
            count.stop()
        said = speed.to_json() if speed is not None else {}
        kept = speed.parts["prefix_cache"].taken if speed is not None and "prefix_cache" in speed.parts else 0
    result = {"layers": layers, "seconds": clock.seconds, "losses": trainer.step_losses, "fast": said, "cache_bytes": kept}
    result["tokens"] = sum(len(example.input_ids) for example in order)
    if count is not None:
        adapters = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
        return result | {"peak_bytes": count.bytes + adapters + kept}
    if options.model in BUILT_IN:
        return result
    valid = load_data(task_file("e2e", "valid"), base.tokenizer, records=VALID, max_length=TOKENS)
    after = held_out_losses(model, base.pad_id, valid).loss
    return result | {"loss_before": loss_before(model, base, valid, Path(options.child).parent / "base.json"), "loss_after": after}


def loss_before(model: PeftModel, base: BaseModel, valid: Dataset, path: Path) -> float:
    """Held-out loss of the frozen model, measured once for all runs."""
    if not path.exists():
        with model.disable_adapter():
            write_json(path, {"loss": held_out_losses(model, base.pad_id, valid).loss})
    return float(json.loads(path.read_text())["loss"])


def child(options: argparse.Namespace, folder: Path, layers: tuple[int, ...], seed: int, *, ours: bool, memory: bool) -> dict[str, Any]:
    """The record of a run; made in a process of its own where it is not there yet."""
    kind = ("ours" if ours else "stock") + ("-memory" if memory else "")
    path = folder / f"{'.'.join(map(str, layers)) if len(layers) < 12 else f'{layers[0]}-{layers[-1]}'}-s{seed}-{kind}.json"
    if not path.exists():
        print(f"{path.stem} …", file=sys.stderr, flush=True)
        flags = [flag for flag, on in (("--ours", ours), ("--memory", memory), ("--checkpointing", options.checkpointing)) if on]
        command = [
            sys.executable,
            __file__,
            "--model",
            options.model,
            "--records",
            str(options.records),
            "--seed",
            str(seed),
            "--dtype",
            options.dtype,
        ]
        command += ["--child", str(path), "--layers", *map(str, layers), *flags]
        subprocess.run(command, check=True)
    return dict(json.loads(path.read_text()))


def rows(options: argparse.Namespace, folder: Path, found: dict[str, tuple[int, ...]]) -> list[list[Any]]:
    """The runs of every round, one placement after the other, and what they come to."""
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for seed in range(options.rounds):
        for name, layers in found.items():
            for ours in (False, True):
                runs.setdefault((name, ours), []).append(child(options, folder, layers, seed, ours=ours, memory=False))
    memory = {key: child(options, folder, found[key[0]], 0, ours=key[1], memory=True)["peak_bytes"] for key in runs}
    table = []
    for (name, ours), done in runs.items():
        whole, stock = runs["all", False], runs[name, False]
        table.append([name, len(found[name]), "ours" if ours else "stock", *figures(done, whole, stock), memory[name, ours] / 2**20])
        table[-1].append(memory["all", False] / memory[name, ours])
    return table


def figures(done: list[dict[str, Any]], whole: list[dict[str, Any]], stock: list[dict[str, Any]]) -> list[Any]:
    """Medians over rounds of times and ratios within a round; the mean of the performance kept; the largest difference of losses."""
    seconds = np.array([run["seconds"] for run in done])
    first = seconds.shape[1] // EPOCHS
    ratios = np.array([run["seconds"] for run in whole]).sum(axis=1) / seconds.sum(axis=1)
    later = np.array([run["seconds"] for run in whole])[:, first:].sum(axis=1) / seconds[:, first:].sum(axis=1)
    apart = max(float(np.max(np.abs(np.array(a["losses"]) / np.array(b["losses"]) - 1))) for a, b in zip(done, stock, strict=True))
    speed = done[0]["tokens"] / np.median(seconds.sum(axis=1))
    kept = [
        100 * (run["loss_before"] - run["loss_after"]) / (other["loss_before"] - other["loss_after"])
        for run, other in zip(done, whole, strict=True)
        if "loss_after" in run
    ]
    return [
        f"{np.median(ratios):.2f} ({ratios.min():.2f}–{ratios.max():.2f})",
        1e3 * float(np.median(seconds[:, :first])),
        1e3 * float(np.median(seconds[:, first:])),
        float(np.median(later)),
        float(speed),
        None if not kept else float(np.mean(kept)),
        None if not kept else float(np.mean([run["loss_after"] for run in done])),
        f"{apart:.0e}" if kept else None,
    ]


COLUMNS = ["placement", "layers", "training", "times faster than all, stock (range)", "ms a step, first epoch", "later epochs"]
COLUMNS += [
    "times faster, later epochs",
    "tokens/s",
    "performance kept %",
    "held-out loss",
    "losses apart from stock",
    "peak MiB",
    "times less memory",
]


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="Of the weights; adapters are float32.")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--placements", nargs="+")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--layers", nargs="+", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    task_file("e2e", "train")
    if options.child:
        options.folder = str(Path(tempfile.gettempdir()) / "layercard-train-speed")
        write_json(options.child, run(options), force=True)
        return
    kinds = [options.model.replace("-", "_"), *(["float32"] if options.dtype == "float32" else [])]
    name = "_".join(["train_speed", *kinds, *(["checkpointing"] if options.checkpointing else [])])
    folder = RESULTS / "train_speed" / (name.removeprefix("train_speed_") + f"-{options.records}")
    folder.mkdir(parents=True, exist_ok=True)
    own = RESULTS / "placements" / "cards" / "e2e.json"
    card = LayerCard.load(own) if options.model not in BUILT_IN and own.exists() else None
    found = placements(base_of(options.model, options.dtype), card)
    chosen = {name: found[name] for name in ["all", *(options.placements or found)]}
    kind = "random weights in the shape of " if options.model in BUILT_IN else ""
    title = f"Training time, E2E, {kind}{options.model}, {options.records} records, {EPOCHS} epochs, batches of {BATCH}, {options.dtype}"
    title += f", {options.rounds} round(s)" + (", gradient checkpointing on" if options.checkpointing else "")
    report(name, title, COLUMNS, rows(options, folder, chosen), threads=torch.get_num_threads(), machine=machine())


if __name__ == "__main__":
    main()
