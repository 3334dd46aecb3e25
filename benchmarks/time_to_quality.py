"""How long does each way of training take to the loss that LoRA in all layers reaches?

Every run is a process of its own on one core and one thread, and ends in one JSON file in `results/time_to_quality/REGIME/`, with the
held-out loss ten times along the way. A run whose file is there is not made again.

*Seconds* are seconds of that core (`time.process_time`), so that other work on the machine lengthens nothing. Loading the model and the
records is left out for all alike, and so are the measurements of the loss for the curve. What a method measures by itself, to choose or to
stop, is counted, on held-out records that are not those of the curve. All methods have the same adapters (rank 8, alpha 16, every linear
module of the layers they adapt), batch, records and seed; *loss* is that of the adapter which a method ends with.

| run | what it is |
| --- | --- |
| `peft-RATE` | all layers, PEFT and transformers' `Trainer`, at its defaults (AdamW, linear decay) |
| `trl-RATE` | all layers, TRL's `SFTTrainer`, at its defaults (gradient checkpointing and bfloat16 autocast on) |
| `trl-plain-RATE` | the same without gradient checkpointing |
| `trl-packed-RATE` | the same as that with packing, rows of 256 tokens, as many tokens in a batch |
| `fast-RATE` | all layers, `layercard train` with its fast parts |
| `mlp-RATE` | the same with the feed-forward modules only |
| `run` | `layercard run`: everything that it does is counted |
| `run-stock`, `run-nostop`, `run-rule`, `run-modules` | `run` without fast parts; without stopping; all layers at the learning rate of
  the rule, without a search; what it chose with all modules |

    python benchmarks/time_to_quality.py                      make what is missing of the first regime, then the table
    python benchmarks/time_to_quality.py --only run peft-0.001
    python benchmarks/time_to_quality.py --tables             only the tables
"""

# ruff: noqa: E402 (the clock is changed before anything that uses it is imported)

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

LEFT_OUT = 0.0
"""Seconds of this process that are not counted: those of measuring the curve."""


def seconds() -> float:
    """Seconds of the core that this process took and that count."""
    return time.process_time() - LEFT_OUT


if "--child" in sys.argv:  # whatever is timed in this process is timed so
    time.perf_counter = seconds

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

import layercard
from common import RESULTS, machine, report, task_file
from layercard.adapters.apply import loaded, place
from layercard.data.load import Dataset, load_data, shuffled
from layercard.files import write_json
from layercard.measure import PeakMemory
from layercard.models.adapted import quiet_peft
from layercard.models.load import BaseModel, load_model, quiet_libraries
from layercard.selection.learning_rate import Length, usual_rate
from layercard.settings import FastSettings, RunSettings, TrainSettings
from layercard.training import trainer as own_trainer
from layercard.training.evaluate import held_out_losses
from layercard.training.train import train
from layercard.training.trainer import heaviest_step
from layercard.workflow import run as workflow

RANK, ALPHA, BATCH = 8, 16, 8
CURVE, HELD_OUT, WATCHED = 100, 300, 100
"""Held-out records: for the curve (the first of those) for the loss at the end; after them, those that a method may look at."""
NEVER = 11
"""A patience that no run's ten measurements reach."""


class Regime(NamedTuple):
    """What is trained on; its name is that of its folder of results."""

    model: str
    task: str
    records: int
    epochs: int

    @property
    def name(self) -> str:
        return f"{Path(self.model).stem}-{self.task}-{self.records}x{self.epochs}"

    @property
    def folder(self) -> Path:
        return RESULTS / "time_to_quality" / self.name

    @property
    def steps(self) -> int:
        return TrainSettings(epochs=self.epochs, batch_size=BATCH).total_steps(self.records)


@dataclass
class Judge(TrainerCallback):
    """Measures the curve of a training of so many steps (of any where `None`), outside of the time that counts."""

    base: BaseModel
    records: Dataset
    steps: int | None
    started: float = field(default_factory=seconds)
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After a tenth of the steps, two tenths, … and at the end."""
        global LEFT_OUT
        step, every = state.global_step, math.ceil(state.max_steps / own_trainer.MEASUREMENTS)
        if (self.steps or state.max_steps) != state.max_steps or (step % every and step != state.max_steps):
            return
        counted = seconds()
        loss = held_out_losses(model, self.base.pad_id, self.records).loss
        if not self.curve or loss < min(point["loss"] for point in self.curve):
            self.best = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        self.curve.append({"step": step, "seconds": counted - self.started, "loss": loss})
        LEFT_OUT += seconds() - counted
        print(f"  step {step}: {self.curve[-1]['seconds']:.0f} s, loss {loss:.4f}", file=sys.stderr, flush=True)


def run(regime: Regime, name: str, seed: int, dtype: str) -> dict[str, Any]:
    """One training, in this process."""
    base = load_model(regime.model, dtype=dtype)
    data = load_data(task_file(regime.task, "train"), base.tokenizer, records=regime.records)
    held_out = load_data(task_file(regime.task, "valid"), base.tokenizer, records=HELD_OUT + WATCHED)
    watched = held_out.part(range(HELD_OUT, len(held_out)), "watched")
    held_out = held_out.part(range(HELD_OUT), "held out")
    kind, _, rate = name.rpartition("-") if name[-1].isdigit() else (name, "", "0")
    wall = time.time()
    with tempfile.TemporaryDirectory() as folder, quiet_libraries(), quiet_peft():
        judge = Judge(base, held_out.part(range(CURVE), "curve"), regime.steps)
        if kind in ("fast", "mlp") or kind.startswith("run"):
            result = ours(kind, float(rate), base, data, watched, judge, regime, seed, Path(folder))
            adapter: Any = loaded(base, result.pop("folder"))
        else:
            model, result = stock(kind, float(rate), base, data, judge, regime, seed, folder)
            adapter = nullcontext(model)
        result |= {"wall_seconds": time.time() - wall, "curve": judge.curve}
        # The adapter that a run ends with, and that of the lowest point of its curve.
        with adapter as model:
            losses = held_out_losses(model, base.pad_id, held_out)
            lowest = min(judge.curve, key=lambda point: point["loss"])
            best = losses
            if lowest is not judge.curve[-1]:
                weights = dict(model.named_parameters())
                for path, weight in judge.best.items():
                    weights[path].data.copy_(weight)
                best = held_out_losses(model, base.pad_id, held_out)
    return result | {
        "loss": losses.loss,
        "nats": losses.nats.tolist(),
        "tokens": losses.tokens.tolist(),
        "lowest": {"step": lowest["step"], "loss": best.loss},
    }


def stock(
    kind: str, rate: float, base: BaseModel, data: Dataset, judge: Judge, regime: Regime, seed: int, folder: str
) -> tuple[Any, dict[str, Any]]:
    """All layers by the libraries themselves, at their defaults but for what is named here."""
    from datasets import Dataset as Rows
    from trl import SFTConfig, SFTTrainer

    set_seed(seed)
    model = get_peft_model(base.model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = Rows.from_list([{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in data.examples])
    how: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": regime.epochs,
        "learning_rate": rate,
        "seed": seed,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    if kind == "peft":
        collator = DataCollatorForSeq2Seq(base.tokenizer, label_pad_token_id=-100)
        trainer = Trainer(model=model, args=TrainingArguments(**how), train_dataset=rows, data_collator=collator, callbacks=[judge])
    else:
        more: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        if kind == "trl-packed":
            row, tokens = 256, data.tokens / len(data) * BATCH
            more = {"packing": True, "max_length": row}
            how["per_device_train_batch_size"] = max(1, round(tokens / row))
        if kind != "trl":
            more["gradient_checkpointing"] = False
        trainer = SFTTrainer(
            model=model, args=SFTConfig(**how, **more), train_dataset=rows, processing_class=base.tokenizer, callbacks=[judge]
        )
    judge.steps = None  # a last batch of an epoch may be smaller, and packed rows are fewer
    trainer.train()
    result = {
        "seconds": seconds() - judge.started,
        "steps": trainer.state.global_step,
        "layers": len(base.blocks),
        "modules": "all",
        "learning_rate": rate,
    }
    # Memory: the step that is the heaviest in our own order of the records, with adapters and the state of the optimiser.
    order = shuffled(len(data), regime.steps * BATCH, seed)
    start = BATCH * heaviest_step([data.examples[row] for row in order], BATCH, 1)
    heaviest = trainer.data_collator([rows[row] for row in order[start : start + BATCH]])
    states = [value for state in trainer.optimizer.state_dict()["state"].values() for value in state.values()]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    peak = PeakMemory(base.device)
    peak.start()
    trainer.training_step(model, heaviest)
    peak.stop()
    result["peak_memory_bytes"] = peak.bytes + sum(value.nbytes for value in (*weights, *states) if isinstance(value, torch.Tensor))
    model.zero_grad()
    return model, result


def ours(
    kind: str, rate: float, base: BaseModel, data: Dataset, watched: Dataset, judge: Judge, regime: Regime, seed: int, folder: Path
) -> dict[str, Any]:
    """`layercard train` or `layercard run`; the folder of its adapter is in the result."""

    class Judged(own_trainer.AdapterTrainer):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self.add_callback(judge)

    own_trainer.AdapterTrainer = Judged  # type: ignore[misc]
    training = TrainSettings(epochs=regime.epochs, batch_size=BATCH, rank=RANK, alpha=ALPHA, seed=seed)
    fast = FastSettings.baseline() if kind == "run-stock" else FastSettings()
    if kind in ("run", "run-stock"):
        done = layercard.run(base, data, folder / "run", valid=watched, settings=RunSettings(), training=training, fast=fast, tell=tell)
        return {
            "seconds": seconds() - judge.started,
            "steps": done.steps,
            "layers": len(done.chosen.layers),
            "modules": done.chosen.modules,
            "learning_rate": done.chosen.learning_rate,
            "peak_memory_bytes": done.peak_memory_bytes,
            "folder": folder / "run" / "adapter",
            "result": done.to_json(),
            "race": json.loads(race.read_text()) if (race := folder / "run" / "race.json").exists() else None,
        }
    search = 0.0
    layers, modules = tuple(range(len(base.blocks))), "all"
    if kind == "run-rule":
        rate = usual_rate(base.model.get_input_embeddings().weight.shape[1], Length(regime.steps, regime.epochs))
    elif kind == "mlp":
        modules = "mlp"
    elif kind != "fast":
        earlier = json.loads((regime.folder / f"run-s{seed}.json").read_text())["result"]
        chosen, search = earlier["chosen"], sum(earlier["seconds"][name] for name in ("timing", "profile", "race"))
        rate, layers = chosen["learning_rate"], tuple(chosen["layers"])
        modules = "all" if kind == "run-modules" else chosen["modules"]
    judge.started -= search
    patience = workflow.PATIENCE if kind in ("run-rule", "run-modules") else None
    training = replace(training, learning_rate=float(f"{rate:.4g}"), patience=patience, save_steps=0)
    placement = place(base, layers, modules=modules)
    trained = train(base, placement, data, folder / "adapter", training, valid=None if patience is None else watched, fast=fast)
    return {
        "seconds": seconds() - judge.started,
        "steps": trained.steps,
        "layers": len(layers),
        "modules": modules,
        "learning_rate": training.learning_rate,
        "peak_memory_bytes": trained.peak_memory_bytes,
        "folder": folder / "adapter",
    }


def tell(line: str) -> None:
    """Lines of `layercard run`."""
    print(f"  {line}", file=sys.stderr, flush=True)


def child(regime: Regime, name: str, seed: int, dtype: str) -> None:
    """Make a run in a process of its own, unless it is there."""
    path = regime.folder / f"{name}-s{seed}.json"
    if path.exists():
        return
    print(f"{regime.name} {name} seed {seed} …", file=sys.stderr, flush=True)
    words = ["--child", name, "--model", regime.model, "--task", regime.task, "--records", str(regime.records)]
    words += ["--epochs", str(regime.epochs), "--seeds", str(seed), "--dtype", dtype]
    subprocess.run([sys.executable, __file__, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


LABELS = {
    "peft": "all layers, PEFT and Trainer",
    "trl": "all layers, TRL",
    "trl-plain": "all layers, TRL, no checkpointing",
    "trl-packed": "all layers, TRL, packing",
    "fast": "all layers, our fast parts",
    "mlp": "all layers, MLP modules, our fast parts",
    "run": "layercard run",
    "run-stock": "– without fast parts",
    "run-nostop": "– without stopping",
    "run-rule": "– without search (all layers, rate by rule)",
    "run-modules": "– with all modules",
}
COLUMNS = ["method", "layers", "learning rate", "loss", "seconds", "seconds to the baseline's loss", "times faster"]
COLUMNS += ["seconds to within 1 %", "times faster, within 1 %", "peak MiB"]
BASELINES = ("peft", "trl", "trl-plain", "trl-packed")


def crossing(curve: list[dict[str, float]], target: float) -> float | None:
    """Seconds until a curve is at `target`, in a straight line between its points; `None` where it never is.

    >>> crossing([{"seconds": 10.0, "loss": 3.0}, {"seconds": 20.0, "loss": 1.0}], 2.0), crossing([{"seconds": 1.0, "loss": 3.0}], 2.0)
    (15.0, None)
    """
    before = None
    for point in curve:
        if point["loss"] <= target:
            if before is None:
                return point["seconds"]
            share = (before["loss"] - target) / (before["loss"] - point["loss"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


def kind_of(name: str) -> str:
    """What a run's name says beside its learning rate."""
    return name.rpartition("-")[0] if name[-1].isdigit() else name


def rows(regime: Regime) -> list[list[Any]]:
    """The table of a regime: of each method the learning rate of least loss, then its others, then other seeds.

    The target is the loss at the end of the baseline that ends lowest, and 1 % more; the time to beat is that of the
    baseline, with whatever trainer and learning rate, that is there first.
    """
    runs = [json.loads(path.read_text()) for path in sorted(regime.folder.glob("*-s*.json"))]
    baselines = [each for each in runs if kind_of(each["name"]) in BASELINES and each["seed"] == 0]
    if not baselines:
        return []
    baseline = min(baselines, key=lambda each: each["loss"])["curve"]
    targets = (baseline[-1]["loss"], 1.01 * baseline[-1]["loss"])
    reaches = {loss: [crossing(each["curve"], loss) for each in baselines] for loss in targets}
    to_beat = {loss: min(time for time in times if time is not None) for loss, times in reaches.items()}
    table = []
    for kind, label in LABELS.items():
        alike = sorted((each for each in runs if kind_of(each["name"]) == kind), key=lambda each: (each["seed"], each["loss"]))
        for number, each in enumerate(alike):
            other = f"seed {each['seed']}" if each["seed"] else "other rate"
            row = [
                label if number == 0 else f"{label} ({other})",
                f"{each['layers']}" + ("" if each["modules"] == "all" else f", {each['modules']}"),
                each["learning_rate"],
                f"{each['loss']:.4f}",
                each["seconds"],
            ]
            for loss in targets:
                reached = crossing(each["curve"], loss)
                row += [reached, None if reached is None else to_beat[loss] / reached]
            table.append([*row, round(each["peak_memory_bytes"] / 2**20)])
    return table


def main() -> None:
    """Make what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="e2e")
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="+", help="names of runs, as in the table above")
    parser.add_argument("--tables", action="store_true", help="make no run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    regime = Regime(options.model, options.task, options.records, options.epochs)
    if options.child:
        seed = options.seeds[0]
        about = {"name": options.child, "regime": regime.name, "seed": seed, "dtype": options.dtype}
        result = about | run(regime, options.child, seed, options.dtype) | {"machine": machine()}
        regime.folder.mkdir(parents=True, exist_ok=True)
        write_json(regime.folder / f"{options.child}-s{seed}.json", result, force=True)
        return
    if not options.tables:
        for seed in options.seeds:
            for name in options.only or QUEUE:
                child(regime, name, seed, options.dtype)
    title = "Seconds of one core until the loss of the best all-layer baseline; times faster: than the first baseline there; "
    title += f"{Path(regime.model).stem}, {regime.task}, "
    title += f"{regime.records} records × {regime.epochs} epochs, batches of {BATCH}, {options.dtype}, seed 0 but where another is named"
    name = "time_to_quality" if regime == Regime("smollm2-135m", "e2e", 300, 3) else f"time_to_quality_{regime.name}"
    report(name, title, COLUMNS, rows(regime))


QUEUE = ["peft-0.001", "fast-0.001", "run", "fast-0.002", "trl-0.001", "peft-0.002", "peft-0.0005", "fast-0.0005", "run-nostop"]
QUEUE += ["run-stock", "fast-0.004", "trl-plain-0.001"]
"""Runs of a regime, the headline first."""


if __name__ == "__main__":
    main()
