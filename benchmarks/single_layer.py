"""Ground truth: LoRA trained in one layer alone, for every chosen layer, task and seed.

One JSON a run lies in `results/single_layer/`; a run that is there is not repeated, so the program may be killed at any point.
The hidden states that enter a layer are kept, so only the blocks above run (`trained`).

    python benchmarks/single_layer.py --tasks e2e gsm8k --seeds 0
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from common import RESULTS, machine, task_file
from layercard.data.load import load_data
from layercard.files import write_json
from layercard.models.load import BaseModel, load_model
from layercard.profiling.step_probe import ReplayedSet
from layercard.profiling.training_probe import ProbeTraining, adapting

LAYERS = (0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 29)
BATCH = {"e2e": 4, "webnlg": 4, "gsm8k": 2}
"""Records in a step; GSM8K's are three times as long."""
HELD_OUT = {"e2e": 96, "webnlg": 96, "gsm8k": 64}
MAX_LENGTH = 256


def run_file(task: str, layer: int, seed: int) -> Path:
    """Where the result of one run lies."""
    return RESULTS / "single_layer" / f"{task}-layer{layer:02d}-seed{seed}.json"


def measure(base: BaseModel, task: str, layers: tuple[int, ...], settings: ProbeTraining) -> None:
    """Train each layer that has no result yet."""
    missing = [layer for layer in layers if not run_file(task, layer, settings.seed).exists()]
    if not missing:
        return
    train = load_data(task_file(task, "train"), base.tokenizer, records=settings.steps * settings.batch_size, max_length=MAX_LENGTH)
    valid = load_data(task_file(task, "valid"), base.tokenizer, records=HELD_OUT[task], max_length=MAX_LENGTH)
    ordered = settings.batches(train.examples)
    held_out = ReplayedSet(base, valid.examples, [*missing, len(base.blocks) - 1], 8)
    before = held_out.losses(len(base.blocks) - 1)
    replayed = ReplayedSet(base, ordered, missing, settings.batch_size, by_length=False)
    for layer in missing:
        started = time.perf_counter()
        with adapting(base, [layer], settings) as adaptation:
            adaptation.advance(replayed, settings.steps)
            after = held_out.losses(layer)
        write_json(
            run_file(task, layer, settings.seed),
            {
                "task": task,
                "layer": layer,
                "settings": asdict(settings),
                "max_length": MAX_LENGTH,
                "train": {"fingerprint": train.fingerprint, "records": len(train)},
                "valid": {"fingerprint": valid.fingerprint, "records": len(valid)},
                "model": {"name": base.name, "fingerprint": base.fingerprint},
                "before_nats": before.nats.tolist(),
                "after_nats": after.nats.tolist(),
                "tokens": before.tokens.tolist(),
                "gain": before.loss - after.loss,
                "seconds": time.perf_counter() - started,
                "machine": machine(),
            },
        )
        gain = before.loss - after.loss
        print(f"{task} seed {settings.seed} layer {layer:2d}: {before.loss:.4f} -> {after.loss:.4f} nats, gain {gain:.4f}", flush=True)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that trains single layers."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["e2e", "gsm8k"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--layers", nargs="+", type=int, default=list(LAYERS))
    return parser


def main() -> None:
    """Measure what is missing."""
    options = arguments(__doc__).parse_args()
    base = load_model(options.model)
    for seed in options.seeds:
        for task in options.tasks:
            measure(base, task, tuple(options.layers), ProbeTraining(seed=seed, batch_size=BATCH[task]))


if __name__ == "__main__":
    main()
