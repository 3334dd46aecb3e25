"""What reads files that may be broken: for each target valid files to start from, how they are changed, and the reader."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from cards import fake_card
from fuzzing.mutations import Mutate, mutate_bytes, mutate_head, mutate_header, mutate_json
from layercard.card.card import LayerCard
from layercard.commands.roi import figures
from layercard.cost.model import CostModel
from layercard.data.load import load_data
from layercard.errors import CardError
from layercard.export.config_text import read_text
from layercard.export.export import merged
from layercard.export.read import peft_config
from layercard.export.trainers import TRAINERS, LoraSettings
from layercard.fast.prefix_store import Store
from layercard.files import read_json
from layercard.models.skeleton import empty_model, read_config
from layercard.models.streamed import open_model
from layercard.report.page import report_page
from layercard.report.sources import read_sources
from layercard.report.terminal import card_view
from layercard.selection.placement import Placement
from layercard.selection.select import select
from tiny import build_tiny, tiny_records, tiny_tokenizer


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        seeds: Valid files.
        suffix: Of their names.
        mutate: Changes one.
        read: Reads the file at a path; it may raise `LayercardError` and nothing else.
    """

    seeds: Callable[[], list[bytes]]
    suffix: str
    mutate: Mutate
    read: Callable[[Path], object]


@functools.cache
def _tokenizer() -> Any:
    return tiny_tokenizer()


def _records() -> list[bytes]:
    pairs = tiny_records(4)
    chat = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 2
    texts = [{"text": "one two", "label": "a"}, {"text": "three", "label": "b"}]
    answers = [record | {"references": ["x", "y"], "answer": "7"} for record in pairs]
    return ["".join(json.dumps(record) + "\n" for record in group).encode() for group in (pairs, chat, texts, answers)]


def _csv() -> list[bytes]:
    rows = [f'"{record["prompt"]}","{record["completion"]}"' for record in tiny_records(4)]
    return [("prompt,completion\n" + "\n".join(rows) + "\n").encode(), b'text\nhello\n"a\nb"\n']


def _parquet() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tiny_records(6)), sink)
    return [sink.getvalue().to_pybytes()]


def _load(path: Path) -> object:
    return load_data(path, _tokenizer(), records=50, max_length=64)


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _card(path: Path) -> object:
    card = LayerCard.load(path)
    select(card, k=1, objective="performance")
    return card_view(card, Console(width=100)), card._repr_html_()


def _placements() -> list[bytes]:
    card = LayerCard.from_json(fake_card(6))
    plain = select(card, k=2).to_json()
    ranked = plain | {"rank_pattern": dict.fromkeys(plain["paths"], 4), "alpha_pattern": dict.fromkeys(plain["paths"], 8.0)}
    return [_text(plain), _text(ranked)]


def _placement(path: Path) -> object:
    placement = Placement.load(path)
    return placement.to_json(), placement._repr_html_()


def _runs() -> list[bytes]:
    (placement, _) = (json.loads(seed) for seed in _placements())
    run = {
        "schema": "layercard-run/1",
        "started": "2026-01-01T00:00:00+00:00",
        "placement": placement,
        "settings": {"rank": 8, "steps": 3, "seed": 0, "learning_rate": 0.002, "batch_size": 4},
        "model": placement["model"] | {"dtype": "float32", "device": "cpu"},
        "data": {"source": "e2e/train.jsonl", "fingerprint": "ab", "records": 8},
        "valid": {"source": "v.jsonl", "fingerprint": "cd", "records": 2,
                  "per_record": {"labelled": [3, 4], "nats_before": [2.0, 3.0], "nats_after": [1.0, 2.0]}},
        "loss_before": 2.0, "loss_after": 1.5, "loss_reduction": 0.5, "loss_reduction_interval": [0.4, 0.6],
        "perplexity_before": 7.4, "perplexity_after": 4.5, "steps": 3, "tokens_seen": 100, "losses": [2.0, 1.8, 1.6],
        "train_seconds": 2.5, "peak_memory_bytes": 1000, "layers_in_backward": "5/6", "trainable_parameters": 10, "adapter_bytes": 40,
        "fast": {"cut": True, "did": {}}, "processes": 1, "versions": {"torch": "2"},
    }  # fmt: skip
    table = {"title": "t", "columns": ["strategy", "x"], "rows": [["all", 1.0], ["last", "2 ± 1"]]}
    return [_text(run), _text(table), _text(placement)]


def _report(path: Path) -> object:
    card = path.parent / "card.json"
    if not card.exists():
        card.write_text(json.dumps(fake_card(6)))
    return report_page(read_sources([card, path]))


def _costs() -> list[bytes]:
    shapes = [[(8, 8), (8, 16)]] * 3
    return [_text(CostModel.from_shapes(shapes).to_json()), _text(CostModel.from_rates(
        shapes, flops=1e12, bandwidth=1e11, vocabulary=100, model="m", dtype="float32", device="cpu", batch_size=2, length=16, rank=4
    ).to_json())]  # fmt: skip


def _cost(path: Path) -> object:
    cost = CostModel.from_json(read_json(path, CardError, "cost"), str(path))
    depth = len(cost.layers)
    return cost.step_time([depth - 1]), cost.peak_memory(range(depth)), cost.linear("memory")


def _figures() -> list[bytes]:
    return [_text({"gpu_price_per_hour": 2.5, "runs_per_month": 10, "hours_per_run": 4})]


def _configurations() -> list[bytes]:
    return [_text(build_tiny(family).config.to_dict()) for family in ("llama", "gpt2", "gemma3")]


def _configuration(path: Path) -> object:
    config = read_config(str(path))
    layers = vars(config).get("num_hidden_layers", 1)
    return empty_model(config, str(path)) if isinstance(layers, int) and layers < 100 else None


def _gguf() -> list[bytes]:
    from test_embedded import write_gguf

    with TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_gguf(path, build_tiny("llama", tie_word_embeddings=True))  # type: ignore[arg-type]
        return [path.read_bytes()]


def _read_gguf(path: Path) -> object:
    from layercard.models.load import load_model

    return load_model(path)


def _safetensors() -> list[bytes]:
    with TemporaryDirectory() as folder:
        build_tiny("llama").save_pretrained(folder)
        return [(Path(folder) / "model.safetensors").read_bytes()]


def _streamed(path: Path) -> object:
    folder = path.parent / "streamed"
    if not (folder / "config.json").exists():
        build_tiny("llama").save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(path.read_bytes())
    return open_model(str(folder))


def _shards() -> list[bytes]:
    with TemporaryDirectory() as folder:
        store = Store(8, torch.float32, Path(folder), label="x")
        for at in range(3):
            store.add(bytes([at]) * 16, torch.full((at + 2, 8), float(at)))
        store.flush()
        (shard,) = Path(folder).glob("*.safetensors")
        return [shard.read_bytes()]


def _shard(path: Path) -> object:
    folder = path.parent / "cache"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "0-0.safetensors").write_bytes(path.read_bytes())
    store = Store(8, torch.float32, folder, label="x")
    for at in range(3):
        rows = store.get(bytes([at]) * 16)
        assert rows is None or torch.equal(rows, torch.full((at + 2, 8), float(at))), "damaged hidden states passed for whole ones"
    return len(store)


_AXOLOTL = b"""# a comment
base_model: x
adapter: lora
lora_r: 16   # rank
lora_target_modules:
  - q_proj
lora_target_linear: false
datasets:
  - path: a.jsonl
    type: "alpaca"
"""
_FACTORY = b"model_name_or_path: x\nfinetuning_type: lora\nlora_rank: 8\nlora_target: all # every one\n"


def _merge(path: Path) -> object:
    text, placement = read_text(path), Placement.from_json(json.loads(_placements()[0]))
    for name in ("axolotl", "llamafactory"):
        merged(text, str(path), TRAINERS[name], placement, LoraSettings(), force=True)
    return None


@functools.cache
def _model() -> Any:
    return build_tiny("llama")


def _trainer_file(path: Path) -> object:
    return peft_config(path, _model())


TARGETS: dict[str, Target] = {
    "jsonl": Target(_records, ".jsonl", mutate_json, _load),
    "csv": Target(_csv, ".csv", mutate_bytes, _load),
    "parquet": Target(_parquet, ".parquet", mutate_bytes, _load),
    "card": Target(lambda: [_text(fake_card(6))], ".json", mutate_json, _card),
    "placement": Target(_placements, ".json", mutate_json, _placement),
    "report": Target(_runs, ".json", mutate_json, _report),
    "cost": Target(_costs, ".json", mutate_json, _cost),
    "figures": Target(_figures, ".json", mutate_json, lambda path: figures(path, None)),
    "config": Target(_configurations, ".json", mutate_json, _configuration),
    "gguf": Target(_gguf, ".gguf", mutate_head, _read_gguf),
    "safetensors": Target(_safetensors, ".safetensors", mutate_header, _streamed),
    "shard": Target(_shards, ".safetensors", mutate_header, _shard),
    "merge": Target(lambda: [_AXOLOTL, _FACTORY], ".yml", mutate_bytes, _merge),
    "trainer": Target(lambda: [_AXOLOTL, _FACTORY], ".yml", mutate_bytes, _trainer_file),
}
"""By name."""
