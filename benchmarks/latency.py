"""What adapters cost when the model writes, and what several adapters over one prompt can share.

*Writing*: base model, an adapter in all layers, in 5 selected layers, and both merged; the variants take short turns, in many rounds. What
merged adapters differ from the base model by is noise: they do the same arithmetic.

*Shared prefix*: 2, 8 and 32 adapters in the last five layers, 2 and 8 in five spread ones, read one prompt, each by itself (stock
`generate`) and through `SharedPrefix`; the logits of all adapters are compared bit for bit, and for a shorter prompt whole
continuations.

Times are CPU seconds of the process, which other work on the machine disturbs less than the clock. All weights of the adapters are
random, so the texts mean nothing; no time depends on them.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/latency.py
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from common import report, rounded
from layercard.adapters.apply import place
from layercard.models.load import BaseModel, load_model
from layercard.serving.adapter_switch import Adapter, random_adapter, switched_on
from layercard.serving.latency import measure_latency
from layercard.serving.shared_prefix import Continuation, SharedPrefix

SELECTED = (5, 11, 17, 22, 25)
MIB = 2**20


def writing(base: BaseModel, options: argparse.Namespace) -> tuple[list[list[Any]], dict[str, Any]]:
    """Rows of the first table."""
    every = random_adapter(base, place(base, range(len(base.blocks))), name="all 30 layers")
    chosen = random_adapter(base, place(base, SELECTED), name="5 layers")
    found: dict[str, Any] = measure_latency(
        base,
        [every, chosen],
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        clock=time.process_time,
    ).to_json()
    rows = [
        [
            row["name"],
            1e3 * row["first_token_seconds"]["value"],
            _interval(row["first_token_ratio"]),
            row["tokens_per_second"]["value"],
            _interval(row["tokens_per_second_ratio"]),
            row["weights_bytes"] / MIB,
            row["peak_bytes"] / MIB,
        ]
        for row in found["variants"]
    ]
    return rows, found


def _interval(found: dict[str, float]) -> str:
    return rounded(found["value"], found["low"], found["high"])


@dataclass(frozen=True)
class Output:
    """What one adapter said after the prompt: tokens, the logits they were chosen by, and the CPU seconds that it took."""

    tokens: list[int]
    logits: torch.Tensor
    seconds: float


def separate(base: BaseModel, adapter: Adapter, prompt: torch.Tensor, new: int) -> Output:
    """One adapter by itself through stock `generate`."""
    ids = prompt.reshape(1, -1)
    asked = {"max_new_tokens": new, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    started = time.process_time()
    with switched_on(base, adapter), torch.no_grad():
        found = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
    seconds = time.process_time() - started
    return Output(found.sequences[0, ids.shape[1] :].tolist(), torch.cat(found.logits), seconds)


def equal(one: Continuation, other: Output) -> bool:
    """Whether tokens and logits are the same, bit for bit."""
    return list(one.token_ids) == other.tokens and one.logits is not None and torch.equal(one.logits, other.logits)


def sharing(base: BaseModel, name: str, layers: Sequence[int], counts: Sequence[int], length: int) -> list[dict[str, Any]]:
    """The first 2, 8, … of some adapters read one prompt: through `SharedPrefix`, and each by itself, by turns."""
    adapters = [random_adapter(base, place(base, layers), name=str(at), seed=at) for at in range(max(counts))]
    prompt = torch.randint(0, base.model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    alone: list[Output] = []
    found = []
    for count in counts:
        serving = SharedPrefix(base, adapters[:count])
        alone += [separate(base, adapter, prompt, 1) for adapter in adapters[len(alone) : count]]
        started = time.process_time()
        together = serving.generate(prompt, 1, with_logits=True)
        shared = time.process_time() - started
        row: dict[str, Any] = {"placement": name, "layers": list(layers), "adapters": count, "shared_seconds": shared}
        row |= {"separate_seconds": [output.seconds for output in alone], "work": asdict(serving.work)}
        row |= {
            "identical": all(map(equal, together, alone)),
            "different_logits": len({float(output.logits.sum()) for output in alone}),
        }
        found.append(row)
        print(
            f"{name}, {count} adapters: {sum(row['separate_seconds']):.1f} s separate, {shared:.1f} s shared, {row['identical']}",
            flush=True,
        )
    return found


def decoded(base: BaseModel, layers: Sequence[int], length: int, count: int = 4, new: int = 16) -> bool:
    """Whether whole continuations are identical, not only what comes right after the prompt."""
    adapters = [random_adapter(base, place(base, layers), name=str(at), seed=at) for at in range(count)]
    prompt = torch.randint(0, base.model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
    together = SharedPrefix(base, adapters).generate(prompt, new, with_logits=True)
    return all(equal(one, separate(base, adapter, prompt, new)) for one, adapter in zip(together, adapters, strict=True))


def shared_row(found: dict[str, Any]) -> list[Any]:
    """A row of the second table."""
    work, separately = found["work"], sum(found["separate_seconds"])
    return [
        found["placement"],
        found["adapters"],
        work["prefill_blocks_separate"],
        work["prefill_blocks"],
        work["prefill_blocks"] / work["prefill_blocks_separate"],
        separately,
        found["shared_seconds"],
        found["shared_seconds"] / separately,
        work["kv_bytes_separate"] / MIB,
        work["kv_bytes"] / MIB,
        found["identical"],
    ]


def report_writing(base: BaseModel, options: argparse.Namespace) -> None:
    """Measure and print the first table."""
    rows, details = writing(base, options)
    report(
        "latency",
        f"{base.name}: {options.prompt_tokens} tokens read, {options.new_tokens} written; CPU time, medians of {options.repeats} rounds, "
        "the variants in turn, ratios to the base model in the same round with smallest and largest (the machine was shared with other "
        "work)",
        ["variant", "first token ms", "× base", "tokens/s", "× base, tokens/s", "weights MiB", "peak beside them MiB"],
        rows,
        **details,
    )


def report_sharing(base: BaseModel, options: argparse.Namespace) -> None:
    """Measure and print the second table."""
    last = tuple(range(len(base.blocks) - len(SELECTED), len(base.blocks)))
    plan = (("last 5", last, options.counts), ("5 spread", SELECTED, options.spread_counts))
    found = [row for name, layers, counts in plan for row in sharing(base, name, layers, counts, options.shared_tokens)]
    report(
        "shared_prefix",
        f"{base.name}: adapters over one prompt of {options.shared_tokens} tokens, up to the first token of each; 5 spread: layers "
        f"{' '.join(map(str, SELECTED))}; CPU seconds of one run each (the machine was shared with other work)",
        [
            "layers",
            "adapters",
            "blocks separate",
            "blocks shared",
            "ratio",
            "s separate",
            "s shared",
            "time ratio",
            "KV MiB separate",
            "KV MiB shared",
            "identical",
        ],
        [shared_row(row) for row in found],
        runs=found,
        continuations_identical=decoded(base, last, 64) and decoded(base, SELECTED, 64),
    )


def main() -> None:
    """Measure both and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shared-tokens", type=int, default=512)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 8, 32], help="adapters in the last five layers")
    parser.add_argument("--spread-counts", type=int, nargs="+", default=[2, 8], help="adapters in five spread layers")
    parser.add_argument("--part", choices=("both", "writing", "sharing"), default="both")
    options = parser.parse_args()
    base = load_model(options.model)
    if options.part != "sharing":
        report_writing(base, options)
    if options.part != "writing":
        report_sharing(base, options)


if __name__ == "__main__":
    main()
