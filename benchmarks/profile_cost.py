"""What a card costs, side by side in one process on the same records and batch size.

- *plain*: forward and backward with the gradients of all weights = 1;
- *signals*: the fit and the held-out pass (resnorm, energy, coupling), each on its share of the records, with the solving;
- *aletheia-lora*: the probe of its own package, which fixes the batch size at 1 (so plain and signals run once more at 1).

The runs alternate (aletheia-lora, which takes minutes, runs once); times are medians and ratios to plain at the same batch
size. Peak memory is the high-water mark of the
resident set, set back before each run, and includes the loaded model.

    python benchmarks/profile_cost.py
"""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import report, task_file
from layercard.data.load import Dataset, batches, load_data
from layercard.models.load import BaseModel, load_model
from layercard.models.losses import labelled_losses
from layercard.profiling.fit import fit_pass
from layercard.profiling.held_out import held_out_pass
from layercard.profiling.profile import split_records
from layercard.settings import ProfileSettings
from layercard.trials.peers import aletheia_scores


def plain(base: BaseModel, dataset: Dataset, size: int) -> None:
    """Forward and backward over all records with the gradients of all weights."""
    for parameter in base.model.parameters():
        parameter.requires_grad_(True)
    for batch in batches(dataset.examples, size, base.pad_id, by_length=True):
        (labelled_losses(base.model, batch)[0].sum() / dataset.labelled_tokens).backward()
    base.model.zero_grad(set_to_none=True)
    for parameter in base.model.parameters():
        parameter.requires_grad_(False)


def signals(base: BaseModel, dataset: Dataset, size: int) -> None:
    """The two passes of a profile, without the step probe."""
    settings = ProfileSettings(batch_size=size, cost=False)
    fit_examples, held = split_records(dataset, settings)
    fit = fit_pass(base, fit_examples, settings)
    held_out_pass(base, held, fit, settings)


def aletheia(base: BaseModel, dataset: Dataset, size: int) -> None:
    """aletheia-lora's probe on every record."""
    aletheia_scores(base, dataset.examples, len(dataset))


def measured(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds and peak resident MiB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    return seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Alternate the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--records", type=int, default=72)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    base = load_model(options.model)
    for parameter in base.model.parameters():
        parameter.requires_grad_(False)
    dataset = load_data(task_file("e2e", "train"), base.tokenizer, records=options.records)
    assert dataset.tokens >= 4000, f"{dataset.tokens} tokens are too few; raise --records"
    plan: list[tuple[str, Callable[[BaseModel, Dataset, int], None], int]] = [
        ("plain, all weight gradients", plain, options.batch_size),
        ("signals (resnorm, energy, coupling)", signals, options.batch_size),
        ("plain, all weight gradients", plain, 1),
        ("signals (resnorm, energy, coupling)", signals, 1),
        ("aletheia-lora probe", aletheia, 1),
    ]
    plain(base, dataset, options.batch_size)  # warm-up
    found: dict[tuple[str, int], list[tuple[float, float]]] = {(name, size): [] for name, _, size in plan}
    for at in range(options.repeats):
        for name, run, size in plan:
            if run is aletheia and at > 0:
                continue  # it takes minutes
            found[name, size].append(measured(lambda run=run, size=size: run(base, dataset, size)))  # type: ignore[misc]
            print(f"{name}, batch {size}: {found[name, size][-1][0]:.1f} s, {found[name, size][-1][1]:.0f} MiB", flush=True)
    medians = {key: (statistics.median(s for s, _ in runs), statistics.median(m for _, m in runs)) for key, runs in found.items()}
    rows: list[list[Any]] = []
    for name, _, size in plan:
        seconds, memory = medians[name, size]
        base_seconds, base_memory = medians["plain, all weight gradients", size]
        rows.append([name, size, seconds, seconds / base_seconds, memory, memory / base_memory])
    report(
        "profile_cost",
        f"Cost of the signals on {dataset.tokens} tokens ({len(dataset)} E2E records), median of {options.repeats} alternating runs",
        ["run", "batch", "seconds", "time ratio", "peak MiB", "memory ratio"],
        rows,
        runs={f"{name}, batch {size}": runs for (name, size), runs in found.items()},
    )


if __name__ == "__main__":
    main()
