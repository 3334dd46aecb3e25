"""What a card costs, in plain passes over the same records with the same batch size.

A plain pass is forward and backward with the gradients of all weights. The whole card has everything in it that `layercard profile`
measures by default: signals of both halves, coupling, step probe, and the timing of training steps. Seconds are those of a core
(`process_time`, one thread), since cores are shared with other work; card and plain pass alternate, in one process.

- SmolLM2-135M on E2E, 64 records;
- a model of random weights with Gemma 3 270M's shape (18 blocks of width 640, vocabulary 262,144), records of random tokens with the
  lengths of the E2E ones: there the head is two thirds of all weights.

The order of layers is compared with that of the cards of the version before (`results/cards/`), which held out 40 % of the records,
probed all layers at two lengths and timed thirteen training steps.

Each run is kept in the result file and not made again while it is there; `--again` makes all.

    python benchmarks/profile_cost.py
    python benchmarks/profile_cost.py --models smollm2-135m --repeats 3
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from common import RESULTS, report, task_file
from layercard.card.card import LayerCard
from layercard.data.load import Dataset, Example, batches, load_data
from layercard.models.layers import find_blocks
from layercard.models.load import BaseModel, load_model
from layercard.models.losses import labelled_losses
from layercard.profiling.profile import profile_records
from layercard.settings import ProfileSettings
from layercard.statistics.ranks import spearman

NAME = "profile_cost"
MODELS = ("smollm2-135m", "gemma3-270m-shape")
RECORDS, BATCH_SIZE, MAX_LENGTH = 64, 8, 256
VOCABULARY = 262_144
COMPARED = ("gain_estimate", "step_probe", "centrality", "resnorm")
"""Measures whose order of layers is compared with the earlier card's."""


class _NoTokenizer:
    """What a model needs of a tokenizer where records are tokens already."""

    pad_token_id = 0
    eos_token_id = 0


def plain(base: BaseModel, dataset: Dataset) -> None:
    """Forward and backward over all records with the gradients of all weights."""
    for parameter in base.model.parameters():
        parameter.requires_grad_(True)
    for batch in batches(dataset.examples, BATCH_SIZE, base.pad_id, by_length=True):
        (labelled_losses(base.model, batch)[0].sum() / dataset.labelled_tokens).backward()
    base.model.zero_grad(set_to_none=True)
    for parameter in base.model.parameters():
        parameter.requires_grad_(False)


def large_vocabulary() -> BaseModel:
    """The shape of Gemma 3 270M with random weights."""
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return BaseModel(model, _NoTokenizer(), "gemma3-270m-shape", "", find_blocks(model))


def prepared(name: str) -> tuple[BaseModel, Dataset]:
    """A model and its records."""
    base = load_model("smollm2-135m", device="cpu")
    for parameter in base.model.parameters():
        parameter.requires_grad_(False)
    dataset = load_data(task_file("e2e", "train"), base.tokenizer, records=RECORDS, max_length=MAX_LENGTH)
    if name == "smollm2-135m":
        return base, dataset
    draw = torch.Generator().manual_seed(1)

    def random_tokens(example: Example) -> Example:
        ids = torch.randint(1, VOCABULARY, (len(example.input_ids),), generator=draw).tolist()
        labels = tuple(token if label >= 0 else label for token, label in zip(ids, example.labels, strict=True))
        return Example(tuple(ids), labels, {})

    return large_vocabulary(), replace(dataset, examples=tuple(map(random_tokens, dataset.examples)))


def card_seconds(base: BaseModel, dataset: Dataset) -> tuple[dict[str, float], LayerCard]:
    """Seconds of a core by part, and the card."""
    marks: dict[str, float] = {}
    started = time.process_time()

    def tell(phase: str, done: int, total: int) -> None:
        marks[f"{phase} after {len(marks)}" if phase == "steps" and done == 1 and "steps" in marks else phase] = time.process_time()

    card = profile_records(base, dataset, ProfileSettings(batch_size=BATCH_SIZE), tell)
    ended = time.process_time()
    parts = {
        "signals": marks["held-out pass"] - started,
        "step probe": marks["step probe"] - marks["held-out pass"],
        "timing": ended - marks["step probe"],
        "whole card": ended - started,
    }
    return parts, card


def main() -> None:
    """Alternate card and plain pass, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    runs: dict[str, list[dict[str, float]]] = {}
    order: dict[str, float] = {}
    if path.exists() and not options.again:
        details = json.loads(path.read_text())["details"]
        runs, order = details.get("by_model", {}), details.get("order", {})
    for name in options.models:
        missing = options.repeats - len(runs.setdefault(name, []))
        if missing <= 0:
            continue
        base, dataset = prepared(name)
        plain(base, replace(dataset, examples=dataset.examples[:BATCH_SIZE]))  # warm-up
        for _ in range(missing):
            plain_seconds = []
            for _ in range(2):  # before the card and behind it
                started = time.process_time()
                plain(base, dataset)
                plain_seconds.append(time.process_time() - started)
                if len(plain_seconds) == 1:
                    parts, card = card_seconds(base, dataset)
            runs[name].append({"plain": statistics.mean(plain_seconds), **parts})
            print(name, {part: round(seconds, 1) for part, seconds in runs[name][-1].items()}, flush=True)
            if name == "smollm2-135m":
                earlier = LayerCard.load(RESULTS / "cards" / f"e2e-{RECORDS}.json")
                order = {measure: spearman(np.array(card.values(measure)), np.array(earlier.values(measure))) for measure in COMPARED}
            write(runs, order)
    write(runs, order)


def write(runs: dict[str, list[dict[str, float]]], order: dict[str, float]) -> None:
    """Print the table and keep it."""
    rows: list[list[Any]] = []
    for name, of_model in runs.items():
        if of_model:
            ratios = {part: statistics.median(run[part] / run["plain"] for run in of_model) for part in of_model[0] if part != "plain"}
            seconds = statistics.median(run["plain"] for run in of_model)
            agrees = f"{order['gain_estimate']:.2f}" if name == "smollm2-135m" and order else "–"
            rows.append([name, len(of_model), seconds, *ratios.values(), agrees])
    report(
        NAME,
        f"Cost of a card in plain passes: {RECORDS} records, batch {BATCH_SIZE}, float32, seconds of a core, median of alternating runs",
        ["model", "runs", "plain pass, s", "signals", "step probe", "timing", "whole card", "order of layers as before"],
        rows,
        by_model=runs,
        order=order,
    )


if __name__ == "__main__":
    main()
