"""What a profile costs against the size of the model and against the tokens: random models of one family, from 2 million to 1 billion
parameters, in float32 on one thread.

The cost is that of the two passes with their solving (resnorm, energy, coupling), in seconds of a core (`process_time`), so that other
work on the machine matters little. The exponent is the slope of a straight line through the logarithms. Each size is kept in
`results/profile_scaling/` and not measured again while its file is there.

    python benchmarks/profile_scaling.py
    python benchmarks/profile_scaling.py --largest 500
"""

import argparse
import gc
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from common import RESULTS, report
from layercard.data.load import Example
from layercard.errors import BenchmarkError
from layercard.files import read_json, write_json
from layercard.models.layers import find_blocks
from layercard.models.load import BaseModel
from layercard.profiling.fit import fit_pass
from layercard.profiling.held_out import held_out_pass
from layercard.settings import ProfileSettings

FOLDER = RESULTS / "profile_scaling"
SHAPES = ((128, 4), (256, 6), (512, 8), (1024, 12), (1536, 16), (2048, 20))
"""Width and number of blocks."""
WIDE = 1024
"""Width from which on a run takes so long that it is made once, without one to warm up."""
RECORDS, LENGTH, VOCABULARY = 8, 64, 8192
TOKEN_SHAPE = (512, 8)
TOKEN_RECORDS = (4, 8, 16, 32, 64, 128, 256)


class _NoTokenizer:
    """What a model needs of a tokenizer where records are tokens already."""

    pad_token_id = 0
    eos_token_id = 0


def random_base(width: int, depth: int) -> BaseModel:
    """A model of random weights; its fingerprint is left out, which belongs to loading."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return BaseModel(model, _NoTokenizer(), f"{width}x{depth}", "", find_blocks(model))


def random_examples(count: int) -> list[Example]:
    """Records of random tokens, the second half labelled."""
    ids = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return [Example(tuple(row), (-100,) * (LENGTH // 2) + tuple(row[LENGTH // 2 :]), {}) for row in ids]


def cost(base: BaseModel, records: int) -> tuple[float, float]:
    """Seconds of a core for the two passes, and how many of them were spent on solving for the steps."""
    stamps: dict[str, float] = {}

    def tell(phase: str, done: int, total: int) -> None:
        stamps[phase] = time.process_time()

    settings, examples = ProfileSettings(cost=False), random_examples(records)
    cut = round(settings.fit_share * records)
    started = time.process_time()
    fit = fit_pass(base, examples[:cut], settings, tell)
    held_out_pass(base, examples[cut:], fit, settings)
    return time.process_time() - started, stamps["steps"] - stamps["fit pass"]


def measured(width: int, depth: int, records: int, repeats: int) -> dict[str, Any]:
    """One point: the least of a few runs, after a small one to warm up where that could matter."""
    path = FOLDER / f"w{width}-l{depth}-n{records}.json"
    if not path.exists():
        base = random_base(width, depth)
        if width < WIDE:
            cost(base, 4)
        runs = [cost(base, records) for _ in range(repeats)]
        seconds, solving = min(runs)
        parameters = sum(weight.numel() for weight in base.model.parameters())
        write_json(
            path, {"parameters": parameters, "tokens": records * LENGTH, "runs": runs, "cpu_seconds": seconds, "solving_seconds": solving}
        )
        del base
        gc.collect()
    found = read_json(path, BenchmarkError, "result")
    print(f"{found['parameters']:,} parameters, {found['tokens']} tokens: {found['cpu_seconds']:.2f} s", flush=True)
    return found


def exponent(points: list[dict[str, Any]], by: str, solving: bool = True) -> float:
    """Slope of log seconds over log `by`, with or without the solving."""
    seconds = [p["cpu_seconds"] - (0 if solving else p["solving_seconds"]) for p in points]
    return float(np.polyfit(np.log([p[by] for p in points]), np.log(seconds), 1)[0])


def main() -> None:
    """Measure what is missing, fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=2000, metavar="MILLION", help="leave out models with more parameters than this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens = [measured(*TOKEN_SHAPE, records, repeats=2) for records in TOKEN_RECORDS]
    shapes = [(w, depth) for w, depth in SHAPES if depth * (4 * w * w + 33 * w * w // 4) <= options.largest * 1e6]
    sizes = [measured(w, depth, RECORDS, repeats=1 if w >= WIDE else 2) for w, depth in shapes]
    by_size, by_tokens = exponent(sizes, "parameters"), exponent(tokens, "tokens")
    upper, passes = exponent(sizes[-4:], "parameters"), exponent(tokens, "tokens", solving=False)
    rows: list[list[Any]] = [
        [axis, point["parameters"], point["tokens"], round(point["cpu_seconds"], 2), round(point["solving_seconds"], 2)]
        for axis, points in (("size", sizes), ("tokens", tokens))
        for point in points
    ]
    title = (
        f"Cost of the two passes grows with the parameters to the power {by_size:.2f} ({upper:.2f} over the {len(sizes[-4:])} largest), "
        f"with the tokens to the power {by_tokens:.2f} ({passes:.2f} without the solving)"
    )
    report(
        "profile_scaling",
        title,
        ["series", "parameters", "tokens", "seconds of a core", "of them solving"],
        rows,
        exponents={"parameters": by_size, "parameters_upper": upper, "tokens": by_tokens, "tokens_passes": passes},
    )


if __name__ == "__main__":
    main()
