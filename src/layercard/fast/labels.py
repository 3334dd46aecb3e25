"""Final norm, head and loss on labelled positions only, in chunks: the same loss and gradient, without the logits of the rest.

Of a record's tokens only the completion carries labels, yet a stock forward makes logits `[B, T, vocabulary]` for all. Here the head
runs on the M labelled positions, a chunk at a time. While the head is frozen, the gradient with respect to the hidden states is taken
in the same go, `∂loss/∂h = Wᵀ (softmax(W h) − onehot)`, so that no more than one chunk of logits is ever held. A trainable head is run
again in backward instead (`torch.utils.checkpoint`).
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from layercard.data.load import IGNORED
from layercard.fast.anatomy import Anatomy, anatomy, named_arguments
from layercard.fast.packing import needed, needing
from layercard.models.hooks import replaced

CHUNK_BYTES = {"cpu": 24 * 2**20}
"""Float32 logits held at once, by kind of device. On a CPU more than the C library keeps for itself (32 MiB) is fetched from the
system anew each time, which took twice as long as the arithmetic (256 rows of 49,152 logits against 128)."""
OTHER_CHUNK_BYTES = 512 * 2**20
FULL = ("output_hidden_states", "output_attentions", "output_router_logits", "fused_lm_head", "logits_to_keep", "shift_labels")
"""What a caller may ask for that needs the whole output."""

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class LabelsOnly:
    """What `labels_only` did so far."""

    reason: str = ""  # why losses of this model cannot be computed so, where they cannot
    labelled: int = 0  # positions that went through the head
    spared: int = 0  # positions that did not

    @property
    def active(self) -> bool:
        """Whether losses of this model are computed so."""
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"logits of all positions: {self.reason}"
        return f"logits of labelled positions only: {self.labelled} of {self.labelled + self.spared}"


@contextmanager
def labels_only(model: nn.Module, *, chunk_bytes: int | None = None) -> Iterator[LabelsOnly]:
    """Let the head of `model` see labelled positions only, in training forwards with `labels`, for the length of a `with` block.

    `model(**batch)` returns the loss that it would return anyway, and no logits (`None`). In eval mode, without labels, and where more
    is asked for than the loss (hidden states, router logits, logits of given positions, TRL's own fused head), nothing changes.

    Args:
        model: A causal language model, or a PEFT or DistributedDataParallel model around one.
        chunk_bytes: Float32 logits to hold at once; by default 24 MiB on a CPU, 512 MiB elsewhere.
    """
    parts = anatomy(model)
    done = LabelsOnly(_obstacle(parts))
    with ExitStack() as stack:
        if done.active:
            forward = _LabelledForward(parts, parts.causal.forward, chunk_bytes, done)
            stack.enter_context(replaced(parts.causal, update_wrapper(forward, parts.causal.forward)))  # trainers read its signature
            if parts.final_norm is not None:
                stack.enter_context(replaced(parts.final_norm, partial(_norm_needed, parts.final_norm.forward)))
        yield done


def _obstacle(parts: Anatomy) -> str:
    """Why the losses of a model cannot be computed so; empty where they can."""
    if parts.causal.loss_function is not ForCausalLMLoss:
        return f"the loss of {parts.name} is not the cross entropy of the next token"
    if parts.multimodal:
        return f"{parts.name} puts pictures or sound among its tokens"
    if parts.config.to_dict().get("z_loss_coefficient"):
        return f"the loss of {parts.name} has a z-loss in it, which takes the logits of all positions"
    return "" if parts.causal.get_output_embeddings() is not None else f"{parts.name} has no head"


@dataclass
class _LabelledForward:
    """The model's forward in `labels_only`."""

    parts: Anatomy
    run: Callable[..., Any]
    chunk_bytes: int | None
    done: LabelsOnly

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parts = self.parts
        kwargs = named_arguments(parts.causal, args, kwargs)
        labels = kwargs.get("labels")
        full = any(kwargs.get(name) is not None and kwargs[name] is not False for name in FULL) or kwargs.get("return_dict") is False
        if labels is None or full or not parts.causal.training or vars(parts.config).get("output_router_logits"):
            return self.run(**kwargs)

        # The decoder runs as ever; its final norm learns which positions the head will see: those that predict a label.
        predicting = torch.zeros_like(labels, dtype=torch.bool)
        predicting[:, :-1] = labels[:, 1:] != IGNORED
        items = kwargs.get("num_items_in_batch")
        outputs: list[Any] = []
        run_decoder = parts.decoder.forward

        def decode(*args: Any, **inner: Any) -> Any:
            outputs.append(run_decoder(*args, **inner))
            return _with_hidden(outputs[0], outputs[0][0][:, :0].detach())  # nothing is left for the head to do

        with needing(predicting), replaced(parts.decoder, decode):
            self.run(**{name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")})
        hidden = outputs[0][0]
        hidden = hidden[predicting.to(hidden.device)]
        targets = labels[:, 1:][predicting[:, :-1]].to(hidden.device)

        def head(part: torch.Tensor) -> torch.Tensor:
            """Logits `[m, vocabulary]` of hidden states `[m, width]`, by the model's own code: scale, cap and bias included."""
            output = _with_hidden(outputs[0], part[None])
            with replaced(parts.decoder, lambda *args, **kwargs: output):
                ids = torch.zeros((1, len(part)), dtype=torch.long, device=part.device)
                logits: torch.Tensor = self.run(input_ids=ids, use_cache=False).logits[0]
                return logits

        # Chunks of equal size, none larger than allowed.
        limit = CHUNK_BYTES.get(hidden.device.type, OTHER_CHUNK_BYTES) if self.chunk_bytes is None else self.chunk_bytes
        most = max(1, limit // (4 * parts.config.vocab_size))
        rows = max(1, math.ceil(len(targets) / math.ceil(max(len(targets), 1) / most)))
        total = _checkpointed_loss(hidden, targets, head, rows) if self._head_trains() else _FrozenHead.apply(hidden, targets, head, rows)
        self.done.labelled += len(targets)
        self.done.spared += labels.numel() - len(targets)
        return CausalLMOutputWithPast(loss=total / (len(targets) if items is None else items))

    def _head_trains(self) -> bool:
        inside = {id(weight) for weight in self.parts.decoder.parameters()}
        outside = [weight for weight in self.parts.causal.parameters() if id(weight) not in inside]
        return any(weight.requires_grad for weight in (*outside, *self.parts.causal.get_output_embeddings().parameters()))


def _norm_needed(norm: Head, hidden: torch.Tensor) -> torch.Tensor:
    """The final norm on the positions that the head will see, zeros elsewhere."""
    mask = needed()
    if mask is None or mask.shape != hidden.shape[:2]:
        return norm(hidden)
    return torch.zeros_like(hidden).masked_scatter(mask[..., None], norm(hidden[mask]))


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    changed = copy.copy(output)
    changed["last_hidden_state"] = hidden
    return changed


def _checkpointed_loss(hidden: torch.Tensor, targets: torch.Tensor, head: Head, rows: int) -> torch.Tensor:
    """Summed cross entropy; the head of each chunk runs again in backward."""

    def loss(part: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(part).float(), labels, reduction="sum")

    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.stack([checkpoint(loss, part, labels, use_reentrant=False) for part, labels in pairs]).sum()


class _FrozenHead(torch.autograd.Function):
    """Summed cross entropy of hidden states `[M, width]` through a head without trainable weights; the gradient is taken with it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, rows: int) -> torch.Tensor:
        """Losses and gradients, one chunk of logits at a time."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part, labels = hidden[start : start + rows].detach(), targets[start : start + rows]
            with torch.set_grad_enabled(gradient is not None):
                logits = head(part.requires_grad_(gradient is not None))
            losses = logits.detach().float().log_softmax(dim=-1)
            picked = losses.gather(1, labels[:, None])
            total -= picked.sum()
            if gradient is not None:
                slope = losses.exp_().scatter_add_(1, labels[:, None], -torch.ones_like(picked)).to(logits.dtype)
                (gradient[start : start + rows],) = torch.autograd.grad(logits, part, slope)
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """The gradient from forward, scaled."""
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None
