"""Logits and losses of labelled tokens, their sums by record, and one training step, for profiling, timing, training and evaluation.

There is one loss: the cross entropy of all labelled tokens of an update, divided once by their number. What a model adds to it by itself
(a router's auxiliary loss, a z-loss, label smoothing) is left out everywhere, since routers are frozen; `extra_loss` says when.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from layercard.data.load import IGNORED, Batch
from layercard.models.layers import transformers_model
from layercard.models.load import is_classifier

MAX_GRAD_NORM = 1.0


def labelled_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits that predict the labelled tokens of a batch, and nothing else; of a classifier, those of each row's classes.

    The logits of position t − 1 predict `labels[t]`. Where the model can (`logits_to_keep`), its head runs only on the positions
    before a label of any row.

    Args:
        model: A causal language model or a classifier, or a PEFT model around one.
        batch: Right-padded tokens `[B, T]` on the model's device; for a classifier each row has one label, the number of its class.

    Returns:
        Logits `[M, vocabulary]` (or `[M, classes]`) in the model's dtype, label ids `[M]` and rows `[M]` (position of the row in the
        batch), row by row; M is the number of labelled tokens.
    """
    if is_classifier(model):
        rows = (batch.labels != IGNORED).any(dim=1).nonzero()[:, 0]
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[rows], batch.labels.amax(dim=1)[rows], rows
    rows, before = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    targets = batch.labels[rows, before + 1]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if rows.numel() > 0 and keeps_logits(model):
        keep, column = torch.unique(before, return_inverse=True)
        logits = model(**inputs, logits_to_keep=keep).logits
    else:
        logits, column = model(**inputs).logits, before
    return logits[rows, column], targets, rows


def labelled_losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every labelled token.

    Returns:
        Losses `[M]` (nats, float32, differentiable) and rows `[M]` (position of the row in the batch), as `labelled_logits` orders them.
    """
    logits, targets, rows = labelled_logits(model, batch)
    return cross_entropy(logits.float(), targets, reduction="none"), rows


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model's head, and nothing else, can be asked to run on some positions only (`logits_to_keep`).

    The decoders of Gemma 3n and 4 take such a request too, and drop positions before their last blocks.
    """
    inner = transformers_model(model) or model
    below = (module for module in inner.modules() if isinstance(module, PreTrainedModel) and module is not inner)
    forwards = (inner.forward, *(type(module).forward for module in below))
    takes, *taken_below = ("logits_to_keep" in inspect.signature(forward).parameters for forward in forwards)
    return takes and not any(taken_below)


@contextmanager
def without_router_logits(model: nn.Module) -> Iterator[None]:
    """Switch `output_router_logits` off for the length of a `with` block: models add the router's loss to theirs only where it is on."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    configs |= {id(text): text for text in [config.get_text_config() for config in configs.values()]}
    on = [config for config in configs.values() if vars(config).get("output_router_logits")]
    for config in on:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in on:
            config.output_router_logits = True


def extra_loss(model: nn.Module, batch: Batch) -> str:
    """One line where a model's own loss is more than cross entropy, as measured on a batch without padding; empty where it is not.

    A classifier is never asked, nor a model that takes no labels; one whose own loss fails has none that could be left out.
    """
    causal = transformers_model(model)
    if causal is None or is_classifier(causal) or "labels" not in inspect.signature(type(causal).forward).parameters:
        return ""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain = float(labelled_losses(model, batch)[0].mean())
            own = float(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False).loss)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        return ""
    finally:
        model.train(training)
    if abs(own - plain) <= (1e-4 if causal.dtype == torch.float32 else 2e-2) * abs(plain) or not math.isfinite(own):
        return ""
    values = causal.config.get_text_config().to_dict() | causal.config.to_dict()
    terms = [
        f"{name} {value:g}"
        for name, value in values.items()
        if ("loss" in name or "smoothing" in name) and isinstance(value, int | float) and not isinstance(value, bool) and value
    ]
    measured = f"{own:.4f} and not {plain:.4f} on a record"
    return (
        f"the loss of {type(causal).__name__} is more than cross entropy ({', '.join([*terms, measured])}); what it adds is left out: "
        "adapters learn by the cross entropy of labelled tokens"
    )


@dataclass(frozen=True)
class RecordLosses:
    """Losses of one model on some records: `[records]` float64 each, in the order of the records."""

    nats: torch.Tensor  # summed cross entropy of each record's labelled tokens
    tokens: torch.Tensor  # labelled tokens of each record; 1 for a classifier
    right: torch.Tensor | None = None  # how many of these the model ranks first; `None` where that was not counted

    @property
    def loss(self) -> float:
        """Nats per labelled token over all records together."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, capped at `exp(700)`."""
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        """Share of the labelled tokens that the model ranks first, 0 to 1."""
        assert self.right is not None
        return float(self.right.sum() / self.tokens.sum())


def record_losses(
    model: nn.Module,
    batches: Iterable[Batch],
    records: int,
    around: Callable[[int], AbstractContextManager[object]] = lambda batch: nullcontext(),
    *,
    count_right: bool = True,
) -> RecordLosses:
    """Losses of every record without gradients; the model's mode is the caller's.

    `records` is their number in all batches, which lie on the model's device. `around` gives a context manager for the forward pass of
    each batch, by the batch's number. Without `count_right` it is left open how many tokens the model ranks first.
    """
    nats, tokens, right = (torch.zeros(records, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        for number, batch in enumerate(batches):
            with around(number):
                logits, targets, rows = labelled_logits(model, batch)
            record = torch.tensor(batch.rows)[rows.cpu()]
            nats.index_add_(0, record, cross_entropy(logits.float(), targets, reduction="none").double().cpu())
            tokens.index_add_(0, record, torch.ones(len(record), dtype=torch.float64))
            if count_right:
                right.index_add_(0, record, (logits.argmax(dim=1) == targets).double().cpu())
    return RecordLosses(nats, tokens, right if count_right else None)


def training_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer | None,
    stamp: Callable[[str], object] | None = None,
    *,
    max_grad_norm: float = MAX_GRAD_NORM,
    labels_only: bool = False,
) -> None:
    """One step as `layercard train` takes it: mean loss of the labelled tokens, backward, clipping, update, zeroing.

    Without an optimizer there is no update. `stamp` is called with `start`, `loss`, `backward` and `end` at the borders of the parts.
    `labels_only` says that the model gives its loss from labelled positions by itself (`layercard.fast.labels`).
    """
    tell = stamp or (lambda _: None)
    tell("start")
    if labels_only:
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False).loss
    else:
        loss = labelled_losses(model, batch)[0].mean()
    if stamp is not None:
        loss.item()  # training reads each loss, so a step that is timed waits for it too
    tell("loss")
    loss.backward()
    tell("backward")
    if optimizer is not None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    tell("end")
