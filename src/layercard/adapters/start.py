"""How adapters begin where that takes more than PEFT's configuration: from the data (EVA), or out of the weights (PiSSA, OLoRA)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, initialize_lora_eva_weights
from safetensors.torch import load_file, save_file

from layercard import processes
from layercard.adapters.apply import spell_out
from layercard.adapters.files import WEIGHTS_FILE
from layercard.adapters.methods import REWRITING
from layercard.data.load import Batch, Dataset, Example, collate, shuffled
from layercard.errors import TrainingError
from layercard.models.adapted import check_adapted
from layercard.models.load import is_classifier, labelled_logits
from layercard.selection.placement import Placement
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
        check_adapted(model, placement.targets)
    if settings.method in REWRITING:
        processes.by_first(lambda: _keep_initial(model, folder / INITIAL, resumed))


def _keep_initial(model: PeftModel, folder: Path, resumed: bool) -> None:
    """Save the first adapter, for the weights are without it from now on; a resumed run must have begun with the same."""
    if not resumed:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    kept = load_file(folder / WEIGHTS_FILE)
    now = get_peft_model_state_dict(model, save_embedding_layers=False)
    if any(not torch.equal(kept[name], now[name].cpu()) for name in kept):
        raise TrainingError(
            "the weights were decomposed otherwise when this run began, by another machine or version; start again with --force"
        )


def save_as_plain_lora(model: PeftModel, folder: Path, initial: Path) -> None:
    """Save adapters that began out of the weights as plain LoRA of twice the rank, `B A − B₀ A₀`, on the weights as they were.

    PEFT writes the adapters alone, so a head that was trained along is added.
    """
    whole = get_peft_model_state_dict(model, save_embedding_layers=False)
    model.save_pretrained(str(folder), save_embedding_layers=False, path_initial_model_for_weight_conversion=str(initial))
    saved = load_file(folder / WEIGHTS_FILE)
    head = {name: weight.contiguous().cpu() for name, weight in whole.items() if ".lora_" not in name}
    if head.keys() - saved.keys():
        save_file(head | saved, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _eva(model: PeftModel, data: Dataset, pad_id: int, settings: TrainSettings) -> None:
    """Set A of every adapter to the directions in which the inputs of its module vary most (arXiv 2410.07170)."""
    order = [data.examples[row] for row in shuffled(len(data), len(data), settings.seed)]
    loader = _Batches(order, settings, pad_id, next(model.parameters()).device, every=is_classifier(model))
    before = [(module._forward_hooks, dict(module._forward_hooks)) for module in model.modules()]
    try:
        initialize_lora_eva_weights(model, loader, forward_fn=_Forward(loader), gather_distributed_inputs=False, show_progress_bar=False)
    finally:
        for hooks, own in before:  # PEFT leaves its own where it is interrupted
            hooks.clear()
            hooks.update(own)


class _Forward:
    """Runs the model up to the logits of labelled positions, but not for ever."""

    def __init__(self, loader: "_Batches") -> None:
        self.calls, self.limit = 0, PASSES * len(loader) + 1

    def __call__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.calls += 1
        if self.calls > self.limit:
            raise TrainingError(f"eva has not converged in {PASSES} passes over the records; give more records or a lower rank")
        rows = tuple(range(len(inputs["input_ids"])))
        labelled_logits(model, Batch(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], rows))


class _Batches:
    """Batches of padded records as PEFT's EVA reads them, each with more counted tokens than the rank.

    Counted are those with a label, as in the loss; with `every` all of them, for a classifier, whose records have one label each.
    """

    def __init__(self, examples: Sequence[Example], settings: TrainSettings, pad_id: int, device: torch.device, *, every: bool) -> None:
        self.pad_id, self.device, self.every = pad_id, device, every
        self.groups: list[list[Example]] = [[]]
        for example in examples:
            if len(self.groups[-1]) >= settings.batch_size and self._counted(self.groups[-1]) > settings.rank:
                self.groups.append([])
            self.groups[-1].append(example)
        if self._counted(self.groups[-1]) <= settings.rank:
            self.groups.pop()
        if not self.groups:
            found = self._counted(examples)
            raise TrainingError(f"eva needs more labelled tokens than the rank {settings.rank}, found {found}; give more records")

    def _counted(self, examples: Sequence[Example]) -> int:
        return sum(len(example.input_ids) if self.every else example.labelled for example in examples)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for group in self.groups:
            batch = collate(group, range(len(group)), self.pad_id).to(self.device)
            labels = batch.input_ids if self.every else batch.labels
            yield {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
