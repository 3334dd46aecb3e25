"""Losses summed up record by record, and one training step: the same for profiling, timing, training and evaluation."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from layercard.data.load import Batch
from layercard.models.load import labelled_logits, labelled_losses

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class RecordLosses:
    """Losses of one model on some records: `[records]` float64 each, in the order of the records.

    Attributes:
        nats: Summed cross entropy of each record's labelled tokens.
        tokens: Number of labelled tokens of each record; 1 for a classifier.
        right: How many of these tokens the model ranks first; `None` where that was not counted.
    """

    nats: torch.Tensor
    tokens: torch.Tensor
    right: torch.Tensor | None = None

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
) -> RecordLosses:
    """Losses of every record without gradients; the model's mode is the caller's.

    Args:
        model: A causal language model or a classifier, or a PEFT model around one.
        batches: Batches on the model's device.
        records: Number of records in all batches together.
        around: Gives a context manager for the forward pass of each batch, by the batch's number.
    """
    nats, tokens, right = (torch.zeros(records, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        for number, batch in enumerate(batches):
            with around(number):
                logits, targets, rows = labelled_logits(model, batch)
            record = torch.tensor(batch.rows)[rows.cpu()]
            nats.index_add_(0, record, cross_entropy(logits.float(), targets, reduction="none").double().cpu())
            tokens.index_add_(0, record, torch.ones(len(record), dtype=torch.float64))
            right.index_add_(0, record, (logits.argmax(dim=1) == targets).double().cpu())
    return RecordLosses(nats, tokens, right)


def training_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer | None,
    stamp: Callable[[str], object] | None = None,
    *,
    max_grad_norm: float = MAX_GRAD_NORM,
) -> None:
    """One step as `layercard train` takes it: mean loss of the labelled tokens, backward, clipping, update, zeroing.

    Args:
        model: A model with trainable adapters.
        batch: What to train on, on the model's device.
        optimizer: Holds the weights that are trained; without one there is no update.
        stamp: Called with `start`, `loss`, `backward` and `end` at the borders of the step's parts.
        max_grad_norm: Gradients are scaled down to this norm.
    """
    tell = stamp or (lambda _: None)
    tell("start")
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
