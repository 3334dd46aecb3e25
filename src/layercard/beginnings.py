"""How adapters begin where that takes more than PEFT's configuration: from the data (EVA), or out of the weights (PiSSA, OLoRA)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, initialize_lora_eva_weights
from safetensors.torch import load_file

from layercard import processes
from layercard.adapter_files import WEIGHTS_FILE
from layercard.data import Dataset, Example, collate, shuffled
from layercard.errors import TrainingError
from layercard.inspection import check_adapted
from layercard.methods import REWRITING
from layercard.pinning import spell_out
from layercard.selection import Placement
from layercard.settings import TrainSettings

INITIAL = "initial"
"""Folder, beside the checkpoints, with the adapters as they began, for methods that took them out of the weights."""
PASSES = 10
"""EVA looks at the data until its directions stand still, at most so many times."""


def begin(
    model: PeftModel, placement: Placement, data: Dataset, pad_id: int, settings: TrainSettings, folder: Path, *, resumed: bool
) -> None:
    """Bring fresh adapters to where their method begins.

    Args:
        model: The model with fresh adapters.
        placement: Where they are.
        data: Records to train on; EVA reads them in the order of training.
        pad_id: Id to pad with.
        settings: With the method.
        folder: The run's folder for checkpoints.
        resumed: Whether a checkpoint will be loaded, so that the data need not be looked at again.

    Raises:
        TrainingError: There are too few labelled tokens for EVA, it does not converge, or a resumed run began elsewhere.
    """
    if settings.method == "eva" and not resumed:
        _eva(model, data, pad_id, settings)
        spell_out(model.peft_config["default"], placement)
        check_adapted(model, placement)
    if settings.method in REWRITING:
        processes.by_first(lambda: _keep_initial(model, folder / INITIAL, resumed), next(model.parameters()).device)


def _keep_initial(model: PeftModel, folder: Path, resumed: bool) -> None:
    """Save the first adapter, for the weights are without it from now on; a resumed run must have begun with the same."""
    if not resumed:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    kept = load_file(folder / WEIGHTS_FILE)
    now = {name.replace(".default.", "."): weight for name, weight in model.named_parameters() if weight.requires_grad}
    if any(not torch.equal(kept[name], now[name].cpu()) for name in kept):
        raise TrainingError(
            "the weights were decomposed otherwise when this run began, by another machine or version; start again with --force"
        )


def _eva(model: PeftModel, data: Dataset, pad_id: int, settings: TrainSettings) -> None:
    """Set A of every adapter to the directions in which the inputs of its module vary most (arXiv 2410.07170)."""
    order = [data.examples[row] for row in shuffled(len(data), len(data), settings.seed)]
    loader = _Batches(order, settings.batch_size, settings.rank, pad_id, next(model.parameters()).device)
    before = [(module._forward_hooks, dict(module._forward_hooks)) for module in model.modules()]
    try:
        initialize_lora_eva_weights(model, loader, forward_fn=_Forward(loader), gather_distributed_inputs=False, show_progress_bar=False)
    finally:
        for hooks, own in before:  # PEFT leaves its own where it is interrupted
            hooks.clear()
            hooks.update(own)


class _Forward:
    """Runs the model for the inputs of its modules alone (labels would only cost memory), but not for ever."""

    def __init__(self, loader: "_Batches") -> None:
        self.calls, self.limit = 0, PASSES * len(loader) + 1

    def __call__(self, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        self.calls += 1
        if self.calls > self.limit:
            raise TrainingError(f"eva has not converged in {PASSES} passes over the records; give more records or a lower rank")
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)


class _Batches:
    """Batches of padded records as PEFT's EVA reads them, each with more labelled tokens than the rank."""

    def __init__(self, examples: Sequence[Example], batch_size: int, rank: int, pad_id: int, device: torch.device) -> None:
        self.pad_id, self.device = pad_id, device
        self.groups: list[list[Example]] = [[]]
        for example in examples:
            if len(self.groups[-1]) >= batch_size and _labelled(self.groups[-1]) > rank:
                self.groups.append([])
            self.groups[-1].append(example)
        if _labelled(self.groups[-1]) <= rank:
            self.groups.pop()
        if not self.groups:
            raise TrainingError(f"eva needs more labelled tokens than the rank {rank}, found {_labelled(examples)}; give more records")

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for group in self.groups:
            batch = collate(group, range(len(group)), self.pad_id)
            yield {
                "input_ids": batch.input_ids.to(self.device),
                "attention_mask": batch.attention_mask.to(self.device),
                "labels": batch.labels.to(self.device),
            }


def _labelled(examples: Sequence[Example]) -> int:
    return sum(example.labelled for example in examples)
