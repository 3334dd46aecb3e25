"""Every figure that needs a GPU, in one command of less than nine minutes; nothing is fetched: weights and tokens are random.

A model of Qwen3-8B's shape in bfloat16:

- *profile*: seconds and memory of a card, its phases apart (the paper's own: 1.35 s and 4.1 GB);
- *training*: seconds a step and memory above the model for adapters in all layers, the last five and the layers that the card chooses, with
  stock PEFT, with TRL's defaults (`SFTTrainer`, which checkpoints activations) and with the fast parts;
- *attention*: a step of all layers with each attention implementation that is installed;
- *forecast*: what `layercard plan --device-rates` says of the same steps from this device's published rates, where it is in the table;
- *latency*: tokens a second with adapters in all layers and in the last five, merged and not.

A part that fails, for want of memory or of a kernel, says so and the others go on; past `--minutes` what is left is not begun. The JSON is
written after every part.

    python benchmarks/gpu.py                     results/gpu/DEVICE.json, with the name of the card
    python benchmarks/gpu.py --rehearse -o FILE  the same parts on a tiny model on the CPU: does the script run?
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.utils import is_flash_attn_2_available

from common import RESULTS, machine
from layercard.adapters.apply import place
from layercard.adapters.lora_config import lora_config
from layercard.card.card import LayerCard
from layercard.cost.devices import DEVICES, REACHED
from layercard.cost.estimate import estimated_cost
from layercard.cost.measure import Around, Step, device_name, measure_step
from layercard.data.load import Dataset, Example, collate
from layercard.errors import LayercardError, one_line
from layercard.fast.fast_training import fast_training
from layercard.files import write_json
from layercard.models.adapted import quiet_peft, unchanged
from layercard.models.load import BaseModel, quiet_libraries
from layercard.models.skeleton import random_model, read_config
from layercard.profiling.profile import profile_records
from layercard.selection.select import select
from layercard.serving.adapter_switch import random_adapter
from layercard.serving.latency import measure_latency
from layercard.settings import FastSettings, ProfileSettings

GIB = 2**30
TINY = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
RANK, SEED = 8, 0


def random_records(count: int, length: int, vocabulary: int) -> Dataset:
    """Records of random tokens, the second half of each labelled; of unequal lengths, so that batches have padding."""
    generator = torch.Generator().manual_seed(SEED)
    examples = []
    for number in range(count):
        tokens = length - (number % 4) * length // 8
        ids = torch.randint(3, vocabulary, (tokens,), generator=generator).tolist()
        labels = [-100 if place < tokens // 2 else token for place, token in enumerate(ids)]
        examples.append(Example(tuple(ids), tuple(labels), {}))
    return Dataset(tuple(examples), "random tokens", "random")


def on_gpu(base: BaseModel) -> bool:
    """Whether the model lies on a GPU whose memory can be counted."""
    return base.device.type == "cuda"


def profiled(base: BaseModel, data: Dataset, card_file: Path) -> dict[str, Any]:
    """A card of the model, its time by phases and its memory above the model."""
    if on_gpu(base):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    card = profile_records(base, data, ProfileSettings(rank=RANK, cost=True))
    seconds = time.perf_counter() - started
    card.save(card_file, force=True)
    phases = {phase.name: phase.seconds for phase in card.phases}
    peak = torch.cuda.max_memory_allocated() - before if on_gpu(base) else None
    return {"records": len(data), "tokens": data.tokens, "seconds": seconds, "phases": phases, "peak_bytes": peak}


def steps_of(base: BaseModel, data: Dataset, batch_size: int, layers: tuple[int, ...], around: Around | None) -> dict[str, Any]:
    """A step with stock PEFT, or with the fast parts."""
    batch = collate(data.examples, range(batch_size), 1)
    step: Step = measure_step(base, batch, layers=layers, rank=RANK, around=around)
    return {"seconds": step.seconds, "bytes": step.bytes, "tokens": int(batch.attention_mask.sum())}


def trl_steps(base: BaseModel, data: Dataset, batch_size: int, layers: tuple[int, ...], steps: int) -> dict[str, Any]:
    """The same with TRL's trainer as it comes: only the batch size, the number of steps and where it writes are set."""
    from datasets import Dataset as Table
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds of each step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.start = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu(base):
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    clock = Clock()
    rows = [{"input_ids": list(each.input_ids), "labels": list(each.labels)} for each in data.examples[:batch_size]] * steps
    with tempfile.TemporaryDirectory() as folder, unchanged(base.model), quiet_libraries(), quiet_peft():
        how: dict[str, Any] = {"use_cpu": not on_gpu(base), "bf16": on_gpu(base), "report_to": [], "save_strategy": "no"}
        config = SFTConfig(output_dir=folder, per_device_train_batch_size=batch_size, max_steps=steps, disable_tqdm=True, **how)
        before = torch.cuda.memory_allocated() if on_gpu(base) else 0
        if on_gpu(base):
            torch.cuda.reset_peak_memory_stats()
        trainer = SFTTrainer(
            base.model,
            args=config,
            train_dataset=Table.from_list(rows),
            processing_class=base.tokenizer,
            peft_config=lora_config(place(base, layers), r=RANK, lora_alpha=2 * RANK),
            callbacks=[clock],
        )
        trainer.train()
        peak = torch.cuda.max_memory_allocated() - before if on_gpu(base) else None
        checkpointing = bool(config.gradient_checkpointing)
    base.model.gradient_checkpointing_disable()  # what the trainer switched on
    timed = clock.seconds[1:] or clock.seconds
    return {"seconds": sum(timed) / len(timed), "bytes": peak, "gradient_checkpointing": checkpointing}


def attention_steps(base: BaseModel, data: Dataset, batch_size: int) -> dict[str, Any]:
    """A stock step of all layers with each attention implementation; the model's own is put back."""
    kinds = ["sdpa", "eager", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]
    before, result = base.model.config._attn_implementation, {}
    for kind in kinds:
        try:
            base.model.set_attn_implementation(kind)
            result[kind] = steps_of(base, data, batch_size, tuple(range(len(base.blocks))), None)
        except (RuntimeError, ValueError, ImportError, LayercardError) as error:
            result[kind] = {"failed": one_line(error)}
        finally:
            base.model.set_attn_implementation(before)
    return result


def forecast(base: BaseModel, data: Dataset, batch_size: int, placements: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Seconds of a stock step from the device's published rates."""
    name = device_name(base.device).upper().replace(" ", "")
    device = next((rates for known, rates in DEVICES.items() if known.upper() in name), None)
    if device is None:
        return {"failed": f"{name} is not in the table of published rates"}
    batch = collate(data.examples, range(batch_size), 1)
    sizes = {"batch_size": batch_size, "length": batch.input_ids.shape[1], "rank": RANK}
    rates = {"flops": device.flops, "bandwidth": device.bytes_per_second}
    cost = estimated_cost(base.model, **rates, name="shape", dtype="bfloat16", device=device.name, **sizes)
    return {"device": device.name, "reached": REACHED, "seconds": {name: cost.step_time(layers) for name, layers in placements.items()}}


def parts_of(base: BaseModel, sizes: dict[str, int], card_file: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, by name and in order."""
    depth, batch = len(base.blocks), sizes["batch"]
    data = random_records(sizes["records"], sizes["length"], base.model.config.vocab_size)
    every, last = tuple(range(depth)), tuple(range(max(0, depth - 5), depth))

    def chosen() -> tuple[int, ...]:
        return select(LayerCard.load(card_file)).layers if card_file.exists() else last

    placements: dict[str, Callable[[], tuple[int, ...]]] = {"all layers": lambda: every, "last 5": lambda: last, "chosen": chosen}
    fast = partial(fast_training, settings=FastSettings(prefix_cache=False))
    parts: dict[str, Callable[[], dict[str, Any]]] = {"profile": lambda: profiled(base, data, card_file)}
    for name, layers in placements.items():
        parts[f"PEFT, {name}"] = lambda layers=layers: {"layers": layers(), **steps_of(base, data, batch, layers(), None)}
        parts[f"ours, {name}"] = lambda layers=layers: {"layers": layers(), **steps_of(base, data, batch, layers(), fast)}
        parts[f"TRL, {name}"] = lambda layers=layers: {"layers": layers(), **trl_steps(base, data, batch, layers(), sizes["steps"])}
    parts["attention"] = lambda: attention_steps(base, data, batch)
    parts["forecast"] = lambda: forecast(base, data, batch, {name: layers() for name, layers in placements.items()})
    prompts = {"prompt_tokens": sizes["length"], "new_tokens": sizes["new_tokens"], "repeats": 3}
    adapters = {"all layers": every, "last 5": last}
    parts["latency"] = lambda: measure_latency(
        base, [random_adapter(base, place(base, layers), name=name, rank=RANK) for name, layers in adapters.items()], **prompts
    ).to_json()
    return parts


def main() -> None:
    """Run the parts one after another and write what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", "-o", type=Path)
    parser.add_argument("--shape", default="qwen3-8b")
    options = parser.parse_args()
    started = time.monotonic()
    if not options.rehearse and not torch.cuda.is_available():
        parser.exit(1, "skipped: there is no CUDA GPU here; --rehearse runs the parts on the CPU\n")
    device, dtype = (torch.device("cpu"), torch.float32) if options.rehearse else (torch.device("cuda"), torch.bfloat16)
    base = random_model(TINY if options.rehearse else read_config(options.shape), options.shape, device, dtype)
    base = BaseModel(base.model, tiny_tokenizer(), base.name, "random", base.blocks)
    sizes = {"batch": 4, "records": 64, "length": 512, "steps": 5, "new_tokens": 32}
    sizes |= {"records": 8, "length": 24, "steps": 2, "new_tokens": 2} if options.rehearse else {}
    output = options.output or RESULTS / "gpu" / f"{device_name(device).replace(' ', '-')}.json"
    result: dict[str, Any] = {"shape": "tiny" if options.rehearse else options.shape, "device": device_name(device), "dtype": str(dtype)}
    result |= {"sizes": sizes, "rank": RANK, "machine": machine(), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts_of(base, sizes, Path(folder) / "card.json").items():
            begun = time.monotonic()
            if begun - started > 60 * options.minutes:
                result["parts"][name] = {"failed": f"not begun: {options.minutes:g} minutes were over"}
                continue
            try:
                result["parts"][name] = part()
            except (RuntimeError, ValueError, ImportError, LayercardError) as error:
                result["parts"][name] = {"failed": one_line(error)}
            result["parts"][name]["minutes"] = (time.monotonic() - begun) / 60
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            write_json(output, json.loads(json.dumps(result)), force=True)
            print(f"{name}: {json.dumps(result['parts'][name])[:160]}", flush=True)
    print(f"wrote {output} after {(time.monotonic() - started) / 60:.1f} minutes")


def tiny_tokenizer() -> Any:
    """A tokenizer of a few words, since trainers and cards ask for one; no text is read with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<unk>", "<pad>", "<eos>", "a", "b"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


if __name__ == "__main__":
    main()
