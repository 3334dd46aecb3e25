"""Do the intervals of a card hold what they say? Cards of disjoint sets of records, each interval against the mean of the other sets.

For each set and layer the truth is the mean of the measure over all other sets. That mean has an error of its own, s / √(n − 1), where s
is the standard deviation between sets; so the interval's lower part a counts as √(a² + (1.96 s)² / (n − 1)), and its upper part likewise.
A measure's coverage is the share of sets and layers where the truth is inside. Nominal is 95 %.

- SmolLM2-135M on E2E, 64 records a set, at least 8 sets;
- tiny models of random weights on a Markov chain, 64 records a set, more sets.

Last come the 90 % intervals of *performance kept* on trained placements of tasks that had no part in the curve (`calibration.py`).

A set that is in the result file is not profiled again, and where a profile was interrupted it goes on (in `build/coverage/`).

    python benchmarks/coverage_of_intervals.py
    python benchmarks/coverage_of_intervals.py --sets 2      at most two sets more
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from calibration import left_out_coverage
from common import RESULTS, report, task_file
from layercard.card.card import LayerCard
from layercard.data.load import Dataset, Example, load_data
from layercard.models.layers import find_blocks
from layercard.models.load import BaseModel, load_model
from layercard.profiling.profile import profile_records
from layercard.records import Estimate
from layercard.settings import ProfileSettings

NAME = "coverage_of_intervals"
STATE = Path(__file__).parents[1] / "build" / "coverage"
RECORDS = 64
SMOLLM2_SETS, TINY_SETS, TINY_MODELS = 10, 16, 2
MAX_LENGTH = 256
VOCABULARY, LENGTH = 64, 40


class _NoTokenizer:
    """What a model needs of a tokenizer where records are tokens already."""

    pad_token_id = 0
    eos_token_id = 0


def tiny_base(seed: int) -> BaseModel:
    """A model of random weights, 6 blocks of width 48."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        if weight.dim() == 2 and "embed" not in name:
            weight.mul_(3.0)
    return BaseModel(model, _NoTokenizer(), f"tiny-{seed}", f"{seed:016x}", find_blocks(model))


def markov_records(first: int, count: int) -> list[Example]:
    """Records of a Markov chain in which each token has four likely followers; the second half of each is labelled."""
    # Followers are drawn from a skewed distribution, so that some tokens are frequent: that is what random weights have to learn.
    shares = 1 / torch.arange(1, VOCABULARY).double()
    followers = 1 + torch.multinomial(shares.expand(VOCABULARY, -1), 4, generator=torch.Generator().manual_seed(7))
    made = []
    for number in range(first, first + count):
        draw = torch.Generator().manual_seed(1000 + number)
        length = int(torch.randint(LENGTH // 2, LENGTH + 1, (1,), generator=draw))
        ids = [int(torch.randint(1, VOCABULARY, (1,), generator=draw))]
        while len(ids) < length:
            ids.append(int(followers[ids[-1], int(torch.randint(4, (1,), generator=draw))]))
        made.append(Example(tuple(ids), (-100,) * (length // 2) + tuple(ids[length // 2 :]), {}))
    return made


def measures_of(card: LayerCard) -> dict[str, list[list[float]]]:
    """Value, low and high of each sampled measure, layer by layer."""
    found = {}
    for name, first in card.layers[0]:
        if isinstance(first, Estimate) and first.low is not None:
            profile = [getattr(layer, name) for layer in card.layers]
            found[name] = [[float(f"{number:.5g}") for number in (each.value, each.low, each.high)] for each in profile]
    return found


def smollm2_sets() -> Iterator[tuple[str, str, Callable[[], tuple[BaseModel, Dataset]]]]:
    """Group and name of each set, and what makes it."""
    loaded: list[BaseModel] = []

    def make(number: int) -> tuple[BaseModel, Dataset]:
        if not loaded:
            loaded.append(load_model("smollm2-135m", device="cpu"))
        data = load_data(task_file("e2e", "train"), loaded[0].tokenizer, records=RECORDS * (number + 1), max_length=MAX_LENGTH)
        return loaded[0], replace(data, examples=data.examples[RECORDS * number :], fingerprint=f"{data.fingerprint}-{number}")

    for number in range(SMOLLM2_SETS):
        yield "smollm2-135m, e2e", str(number), lambda number=number: make(number)  # type: ignore[misc]


def tiny_sets() -> Iterator[tuple[str, str, Callable[[], tuple[BaseModel, Dataset]]]]:
    """As `smollm2_sets`."""

    def make(seed: int, number: int) -> tuple[BaseModel, Dataset]:
        examples = markov_records(RECORDS * number, RECORDS)
        return tiny_base(seed), Dataset(tuple(examples), "Markov chain", f"{seed}-{number}", 0)

    for seed in range(TINY_MODELS):
        for number in range(TINY_SETS):
            yield f"tiny {seed}, Markov chain", str(number), lambda seed=seed, number=number: make(seed, number)  # type: ignore[misc]


def covered(sets_nlk: np.ndarray) -> tuple[float, float]:
    """Share of sets and layers whose interval holds the mean of the other sets, and mean width of an interval over 3.92 times the standard
    deviation between sets, from `[sets, layers, (value, low, high)]`."""
    count = len(sets_nlk)
    value, low, high = np.moveaxis(sets_nlk, 2, 0)
    inside = []
    for number in range(count):
        others = np.delete(value, number, axis=0)
        own_error = 1.96 * others.std(axis=0, ddof=1) / np.sqrt(count - 1)
        below, above = (np.hypot(part, own_error) for part in (value[number] - low[number], high[number] - value[number]))
        inside.append((others.mean(axis=0) >= value[number] - below) & (others.mean(axis=0) <= value[number] + above))
    spread = value.std(axis=0, ddof=1).mean()
    return float(np.mean(inside)), float((high - low).mean() / (3.92 * spread)) if spread > 0 else float("nan")


def main() -> None:
    """Profile what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, metavar="N", help="profile at most N sets in this call; when not given all")
    parser.add_argument("--only", choices=("smollm2", "tiny"), help="profile sets of this family alone")
    parser.add_argument("--again", action="store_true", help="make every card again from the passes kept in build/coverage/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    groups: dict[str, dict[str, Any]] = {}
    if path.exists() and not options.again:
        groups = json.loads(path.read_text())["details"]["sets"]
    made, settings = 0, ProfileSettings(cost=False)
    for group, name, make in (*smollm2_sets(), *tiny_sets()):
        if name in groups.setdefault(group, {}) or not group.startswith(options.only or ""):
            continue
        if made == options.sets:
            break
        base, data = make()
        card = profile_records(base, data, settings, state=STATE / f"{group}-{name}".replace(", ", "-").replace(" ", "-"))
        groups[group][name] = measures_of(card)
        made += group.startswith("smollm2")
        print(f"{group}, set {name}", flush=True)
        write(groups, card.cross_fitted)
    write(groups, None)


def write(groups: dict[str, dict[str, Any]], cross_fitted: tuple[str, ...] | None) -> None:
    """Write the result; without `cross_fitted` print it, too, taking that from the file."""
    if cross_fitted is None:
        cross_fitted = tuple(json.loads((RESULTS / f"{NAME}.json").read_text())["details"]["cross_fitted"])
    rows: list[list[Any]] = []
    families = {"SmolLM2-135M": [g for g in groups if g.startswith("smollm2")], "tiny models": [g for g in groups if g.startswith("tiny")]}
    enough = {family: [g for g in names if len(groups[g]) > 2] for family, names in families.items()}
    measures = next((list(next(iter(groups[g].values()))) for names in enough.values() for g in names), [])
    for measure in measures:
        row: list[Any] = [measure, "yes" if measure in cross_fitted else "no"]
        for names in enough.values():
            results = [covered(np.array([each[measure] for each in groups[g].values()])) for g in names]
            row += [f"{np.mean([part[i] for part in results]):.2f}" if results else "–" for i in (0, 1)]
        rows.append(row)
    for task, (share, count, _) in left_out_coverage().items():
        rows.append([f"performance kept of {task}, which was left out ({count} runs; nominal 0.90)", "–", f"{share:.2f}", "–", "–", "–"])
    counts = {family: sum(len(groups[g]) for g in names) for family, names in families.items()}
    report(
        NAME,
        f"Coverage of 95 % intervals: {counts['SmolLM2-135M']} disjoint sets of {RECORDS} records on SmolLM2-135M (E2E), "
        f"{counts['tiny models']} on {TINY_MODELS} tiny models",
        ["measure", "cross-fitted", "covered, SmolLM2", "width", "covered, tiny", "width, tiny"],
        rows,
        sets=groups,
        cross_fitted=list(cross_fitted),
        width="mean width of an interval, as a multiple of 3.92 standard deviations between sets",
    )


if __name__ == "__main__":
    main()
