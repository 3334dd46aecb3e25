"""`layercard.profile`: the first call of the way through, for models and records at hand.

```python
card = layercard.profile(model, tokenizer, records)
placement = card.select(k=5)
model = layercard.apply(model, placement, LoraConfig(r=16, lora_alpha=32))
```
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from layercard import profiling
from layercard.card import LayerCard
from layercard.data import Dataset, load_data
from layercard.errors import ModelError
from layercard.loading import Progress
from layercard.models import BaseModel, load_model, wrap_model

Model: TypeAlias = PreTrainedModel | BaseModel | str | os.PathLike[str]
"""A transformers model, what `load_model` gives, or a name that `load_model` takes."""
Records: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Dataset
"""A source that `load_data` takes: the name of a file or set, or records such as a list of dictionaries or a `datasets.Dataset`; or what
it gives."""


def profile(
    model: Model,
    tokenizer: Any,
    data: Records,
    *,
    records: int | None = 64,
    max_length: int = 1024,
    separator: str = "\n",
    rank: int = 8,
    ridge: float = 1.0,
    batch_size: int = 8,
    fit_share: float = 0.6,
    label_samples: int = 3,
    probe: str = "step",
    probe_steps: int = 48,
    probe_records: int = 16,
    cost: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    state: str | os.PathLike[str] | None = None,
) -> LayerCard:
    """Make the Layer Card of a model on reference records.

    The model is the same afterwards: weights, modes of its modules, `requires_grad`, `.grad`, hooks and random state, also where this
    raises. It is profiled on its device and in its dtype.

    Args:
        model: A transformers model, without adapters; or a name as `load_model` takes it (then in float32, on the best device here).
        tokenizer: Its tokenizer; `None` where the model is given by name, for the one that comes with it.
        data: Records with `prompt` and `completion`, `messages` or `text`, as `load_data` takes them, or a `Dataset` that it gave.
        records: Profile the first so many, `None` for all. A `Dataset` is taken whole.
        max_length: Longest record in tokens; what goes beyond is cut. A `Dataset` is cut already.
        separator: Put between prompt and completion; empty where the prompts end as they do in training.
        rank: Rank of the steps: that of the adapter one means to train.
        ridge: Regularisation of each input's covariance, as a share of its usual energy.
        batch_size: Records in a batch.
        fit_share: Share of the records that make the steps; the others measure them.
        label_samples: How often labels are drawn from the model for the coupling; each is one more backward pass.
        probe: `none`, `step` (the step probe) or `train` (the step probe, then the training probe).
        probe_steps: Training steps of the training probe.
        probe_records: Held-out records that the step probe measures on.
        cost: Whether to time a few training steps, in seconds and bytes; else costs are relative, from shapes.
        seed: Of the split, the drawn labels and the bootstrap.
        progress: Called with a phase's name, how much is done and how much there is.
        state: Folder for what is finished; an interrupted call with the same arguments goes on from there. It is the caller's to remove.

    Raises:
        ModelError: The model carries adapters, is of no kind that can be profiled, or has no tokenizer.
        DataError: The records cannot be used, or are fewer than 4.
        OutputError: `state` is something else, another run works there, or it cannot be written.
        TrainingError: An unknown probe, or a loss of the training probe that is not finite.
    """
    settings = profiling.ProfileSettings(
        rank=rank,
        ridge=ridge,
        batch_size=batch_size,
        fit_share=fit_share,
        label_samples=label_samples,
        probe=probe,
        probe_steps=probe_steps,
        probe_records=probe_records,
        cost=cost,
        seed=seed,
    )
    with _modes_kept(model) if isinstance(model, nn.Module) else nullcontext():
        base = _base(model, tokenizer, progress)
        if not isinstance(data, Dataset):
            data = load_data(data, base.tokenizer, records=records, max_length=max_length, separator=separator, classes=base.classes)
        return profiling.profile(base, data, settings, progress, state=None if state is None else Path(state))


def _base(model: Model, tokenizer: Any, progress: Progress | None) -> BaseModel:
    """The model with what profiling must know of it.

    Raises:
        ModelError: It is none, carries adapters, or lacks a tokenizer.
    """
    if isinstance(model, BaseModel):
        return _with_tokenizer(model, tokenizer)
    if isinstance(model, str | os.PathLike):
        return _with_tokenizer(load_model(model, progress=progress), tokenizer)
    if isinstance(model, PeftModel):
        raise ModelError("the model carries adapters, and a card is of a base model; pass model.unload(), or profile before adding them")
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"expected a transformers model or its name, found {type(model).__name__}; pass the model inside the wrapper")
    adapted = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapted is not None:
        raise ModelError(f"the model carries an adapter on {adapted}, and a card is of a base model; profile before adding adapters")
    if tokenizer is None:
        raise ModelError("a model at hand needs its tokenizer: layercard.profile(model, tokenizer, data)")
    return wrap_model(model, tokenizer, name=model.name_or_path or "in-memory")


def _with_tokenizer(base: BaseModel, tokenizer: Any) -> BaseModel:
    return base if tokenizer is None else replace(base, tokenizer=tokenizer)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into train or eval mode as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
