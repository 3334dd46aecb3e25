"""How adapters begin where that takes more than PEFT's configuration: from the data (EVA), or out of the weights (PiSSA, OLoRA)."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, initialize_lora_eva_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from layercard import processes
from layercard.adapters.apply import spell_out
from layercard.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from layercard.adapters.methods import REWRITING
from layercard.data.load import Batch, Dataset, Example, collate, shuffled
from layercard.errors import OutputError, TrainingError, one_line
from layercard.files import replacing
from layercard.models.adapted import check_adapted
from layercard.models.embedded import EMBEDDED, HUB_ID, cache_root
from layercard.models.load import is_classifier
from layercard.models.losses import labelled_logits
from layercard.selection.placement import Placement
from layercard.settings import TrainSettings

INITIAL = "initial"
"""Folder, beside the checkpoints, with the adapters as they began, for methods that took them out of the weights."""
PASSES = 10
"""EVA looks at the data until its directions stand still, at most so many times."""


def begin(
    model: PeftModel, placement: Placement, data: Dataset, pad_id: int, settings: TrainSettings, folder: Path, *, resumed: bool
) -> None:
    """Bring the fresh adapters of `model` to where their method begins; EVA reads `data`, unless a checkpoint will be loaded (`resumed`).

    Raises:
        TrainingError: There are too few labelled tokens for EVA, it does not converge, or a resumed run began elsewhere.
    """
    if settings.method == "eva" and not resumed:
        _eva(model, data, pad_id, settings)
        spell_out(model.peft_config["default"], placement)
        check_adapted(model, placement.targets)
    if settings.method in REWRITING:
        processes.by_first(lambda: _keep_initial(model, folder / INITIAL, resumed))


def _keep_initial(model: PeftModel, folder: Path, resumed: bool) -> None:
    """Save the first adapter, for the weights are without it from now on; a resumed run must have begun with the same."""
    if not resumed:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    first = load_file(folder / WEIGHTS_FILE)
    now = get_peft_model_state_dict(model, save_embedding_layers=False)
    if any(not torch.equal(first[name], now[name].cpu()) for name in first):
        raise TrainingError(
            "the weights were decomposed otherwise when this run began, by another machine or version; start again with --force"
        )


def save_adapter(model: PeftModel, output: Path, method: str, checkpoints: Path) -> None:
    """Write trained adapters as PEFT does, each of the two files whole or not at all; the embedded model is named by its hub id.

    Those that began out of the weights become plain LoRA of twice the rank, `B A − B₀ A₀`, on the weights as they were.

    Raises:
        OutputError: They cannot be written.
    """
    config = model.peft_config["default"]
    if Path(config.base_model_name_or_path or "") == cache_root() / EMBEDDED:
        config.base_model_name_or_path = HUB_ID
    try:
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=output) as folder:
            weights_file = Path(folder) / WEIGHTS_FILE
            if method in REWRITING:
                weights = get_peft_model_state_dict(model, save_embedding_layers=False)
                first = str(checkpoints / INITIAL)
                model.save_pretrained(folder, save_embedding_layers=False, path_initial_model_for_weight_conversion=first)
                # PEFT writes the adapters alone, so a head that was trained along is added.
                saved = load_file(weights_file)
                head = {name: weight.contiguous().cpu() for name, weight in weights.items() if ".lora_" not in name}
                if head.keys() - saved.keys():
                    save_file(head | saved, weights_file, metadata={"format": "pt"})
            else:
                model.save_pretrained(folder, save_embedding_layers=False)
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                with replacing(output / name) as part:  # with the mode that the umask leaves: safetensors makes files of 0600
                    (Path(folder) / name).replace(part)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write the adapter to {output}: {one_line(error)}; make room, then pass --resume") from error


def _eva(model: PeftModel, data: Dataset, pad_id: int, settings: TrainSettings) -> None:
    """Set A of every adapter to the directions in which the inputs of its module vary most (arXiv 2410.07170)."""
    every = is_classifier(model)  # all tokens count for a classifier, whose records have one label each; else those with a label

    def counted(examples: list[Example]) -> int:
        return sum(len(example.input_ids) if every else example.labelled for example in examples)

    # Step 1: batches in the order of training, each with more counted tokens than the rank.
    order = [data.examples[row] for row in shuffled(len(data), len(data), settings.seed)]
    groups: list[list[Example]] = [[]]
    for example in order:
        if len(groups[-1]) >= settings.batch_size and counted(groups[-1]) > settings.rank:
            groups.append([])
        groups[-1].append(example)
    if counted(groups[-1]) <= settings.rank:
        groups.pop()
    if not groups:
        raise TrainingError(f"eva needs more labelled tokens than the rank {settings.rank}, found {counted(order)}; give more records")
    inputs = []
    for group in groups:
        batch = collate(group, range(len(group)), pad_id)
        labels = batch.input_ids if every else batch.labels
        inputs.append({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels})

    # Step 2: let PEFT run the model up to the logits of labelled positions until it has seen enough, but not for ever.
    calls = 0

    def forward(model: Any, batch: dict[str, torch.Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls > PASSES * len(inputs) + 1:
            raise TrainingError(f"eva has not converged in {PASSES} passes over the records; give more records or a lower rank")
        labelled_logits(model, Batch(**batch, rows=tuple(range(len(batch["input_ids"])))))

    hooks = [(module._forward_hooks, dict(module._forward_hooks)) for module in model.modules()]
    try:
        initialize_lora_eva_weights(model, inputs, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False)
    finally:
        for installed, before in hooks:  # PEFT leaves its own where it is interrupted
            installed.clear()
            installed.update(before)
