"""One loss on every path: the cross entropy of the labelled tokens of a whole update, divided once, against a plain loop.

Run as a program, in two processes, it trains every case of the matrix and writes the losses (`torchrun … test_losses.py FOLDER`).
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BY_NAME, EXPERTS, PLAIN, Family
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from layercard import labels_only, processes
from layercard.adapters.apply import adapted, place
from layercard.data.load import Dataset, collate, load_data, shuffled
from layercard.models.load import BaseModel, wrap_model
from layercard.models.losses import extra_loss
from layercard.settings import FastSettings, TrainSettings
from layercard.training.train import train
from padded import no_dropout
from tiny import TINY_FAMILIES, build_tiny, tiny_records, tiny_tokenizer, write_records

ROUTED = PLAIN | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1, "moe_layer_start_index": 0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16, "attn_layer_indices": [1]}
MORE = [
    Family("mixtral", "MixtralConfig", ROUTED | LOCAL),
    Family("qwen2_moe", "Qwen2MoeConfig", ROUTED | EXPERTS | {"shared_expert_intermediate_size": 24}),
    Family("qwen3_moe", "Qwen3MoeConfig", ROUTED | EXPERTS | {"head_dim": 8}),
    Family("gpt_oss", "GptOssConfig", ROUTED | LOCAL | {"head_dim": 8, "sliding_window": 64}),
    Family("olmoe", "OlmoeConfig", ROUTED | {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("granitemoe", "GraniteMoeConfig", ROUTED | LOCAL),
    Family("granitemoeshared", "GraniteMoeSharedConfig", ROUTED | LOCAL | {"shared_intermediate_size": 24}),
    Family("jetmoe", "JetMoeConfig", ROUTED | LOCAL | {"aux_loss_coef": 0.5, "kv_channels": 8}),
    Family("ernie4_5_moe", "Ernie4_5_MoeConfig", ROUTED | ERNIE),
    Family("flex_olmo", "FlexOlmoConfig", ROUTED | {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("minimax", "MiniMaxConfig", ROUTED | LOCAL | {"head_dim": 8, "layer_types": ["full_attention"] * 3}),
    Family("bamba", "BambaConfig", PLAIN | MAMBA | {"z_loss_coefficient": 0.5}),
]
"""Families whose own loss is more than cross entropy: with a router's auxiliary loss, or a z-loss."""
ADDED = {family.name: family for family in MORE}
FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe", "gpt_oss"]
PARTS = ("cut", "prefix_cache", "unpadded", "labels_only", "fused_lora")
PATHS = {"default": FastSettings(), "stock": FastSettings.baseline()}
PATHS |= {f"without {name}": FastSettings(**{name: False}) for name in PARTS}
SETTINGS = TrainSettings(rank=2, steps=3, batch_size=2, learning_rate=1e-3, warmup_ratio=0.0, save_steps=0)


def base_of(name: str) -> BaseModel:
    if name in TINY_FAMILIES:
        return wrap_model(build_tiny(name, **no_dropout(name)), tiny_tokenizer(), name=name)
    return wrap_model((ADDED.get(name) or BY_NAME[name]).build(), tiny_tokenizer(), name=name)


def data_of(base: BaseModel, folder: Path, start: int = 0) -> Dataset:
    return load_data(str(write_records(folder / f"{start}-{processes.rank()}.jsonl", tiny_records(7, start))), base.tokenizer)


def nats(model: Any, rows: list[Any], pad_id: int) -> torch.Tensor:
    """Summed cross entropy of labelled tokens."""
    batch = collate(rows, range(len(rows)), pad_id)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def plain_loop(base: BaseModel, data: Dataset, valid: Dataset, settings: TrainSettings) -> list[float]:
    """Losses of every step, each step on one big batch, and last the loss on `valid`: written without this package's training."""
    size = settings.batch_size * settings.accumulation
    order = shuffled(len(data), settings.steps * size, settings.seed)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        with adapted(base, place(base, [1, 2]), rank=settings.rank) as model:
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
            schedule = LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
            model.train()
            for step in range(settings.steps):
                rows = [data.examples[row] for row in order[step * size : (step + 1) * size]]
                loss = nats(model, rows, base.pad_id) / sum(row.labelled for row in rows)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            with torch.no_grad():
                model.eval()
                total = sum(float(nats(model, [example], base.pad_id)) for example in valid.examples)
    return [*losses, total / valid.labelled_tokens]


def run_all(folder: Path, names: list[str], paths: list[str], accumulations: tuple[int, ...]) -> dict[str, list[float]]:
    """Losses of each step, and the loss on held-out records after training, by family, path and accumulation."""
    results = {}
    for name in names:
        base = base_of(name)
        data, valid = data_of(base, folder), data_of(base, folder, 20)
        for accumulation in accumulations:
            settings = replace(SETTINGS, accumulation=accumulation)
            if processes.count() == 1:
                results[f"{name} {accumulation} plain"] = plain_loop(base, data, valid, settings)
            for path in paths:
                output = folder / f"{name}-{accumulation}-{path}"
                run = train(base, place(base, [1, 2]), data, output, settings, valid=valid, fast=PATHS[path])
                results[f"{name} {accumulation} {path}"] = [*run.losses, run.loss_after]
                assert bool(run.notes) == (name in ADDED)
    return results


def assert_all_plain(results: dict[str, list[float]], plain: dict[str, list[float]]) -> None:
    for case, losses in results.items():
        family, accumulation, _ = case.split(" ", 2)
        assert losses == pytest.approx(plain[f"{family} {accumulation} plain"], rel=1e-6), case


def test_all_paths_have_one_loss(tmp_path: Path) -> None:
    results = run_all(tmp_path, ["llama", "mixtral"], ["default", "stock", "without labels_only"], (1, 3))
    assert_all_plain(results, results)


@pytest.mark.slow
def test_the_whole_matrix_has_one_loss(tmp_path: Path) -> None:
    """Paths × accumulation × processes × families."""
    alone = run_all(tmp_path, FAMILIES, list(PATHS), (1, 3))
    assert_all_plain(alone, alone)
    (tmp_path / "two").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path / "two")]
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests / "architectures"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert len(two) == len(FAMILIES) * len(PATHS) * 2
    assert_all_plain(two, alone)


@pytest.mark.parametrize("name", ["mixtral", *[pytest.param(name, marks=pytest.mark.slow) for name in ADDED if name != "mixtral"]])
def test_what_a_model_adds_is_said_and_left_out(name: str, tmp_path: Path) -> None:
    base = base_of(name)
    data = data_of(base, tmp_path)
    batch = collate(data.examples, [0], base.pad_id)
    line = extra_loss(base.model, batch)
    assert line.startswith(f"the loss of {type(base.model).__name__} is more than cross entropy (")
    assert "0.5" in line and "\n" not in line
    on = base.model.config.to_dict().get("output_router_logits")
    runs = [train(base, place(base, [1, 2]), data, tmp_path / path, SETTINGS, fast=PATHS[path]) for path in ("default", "stock")]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)
    assert runs[0].losses[0] == pytest.approx(plain_loop(base, data, data, SETTINGS)[0], rel=1e-6)
    assert runs[0].notes == runs[1].notes and runs[0].notes[0].startswith("the loss of ")
    assert base.model.config.to_dict().get("output_router_logits") == on


def test_in_other_loops_a_model_keeps_its_own_loss(tmp_path: Path) -> None:
    """`labels_only` gives the loss that the model would, with the auxiliary loss in it."""
    base = base_of("mixtral")
    batch = collate(data_of(base, tmp_path).examples, [0, 1], base.pad_id)
    with adapted(base, place(base, [1])) as model:
        losses = []
        for manager in (nullcontext(), labels_only(model.train())):
            with manager:
                losses.append(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_nothing_is_said_of_models_with_plain_cross_entropy(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "gemma2", "bert"):
        base = base_of(name)
        if base.classes is None:
            batch = collate(data_of(base, tmp_path).examples, [0], base.pad_id)
        assert extra_loss(base.model, batch) == ""


if __name__ == "__main__":
    with processes.joined(torch.device("cpu")):
        losses = run_all(Path(sys.argv[1]), FAMILIES, list(PATHS), (1, 3))
        if processes.is_first():
            (Path(sys.argv[1]) / "results.json").write_text(json.dumps(losses))
