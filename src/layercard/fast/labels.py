"""Final norm, head and loss on labelled positions only, in chunks: the same loss and gradient, without the logits of the rest.

Of a record's tokens only the completion carries labels, yet a stock forward makes logits `[B, T, vocabulary]` for all. Here the head
runs on the M labelled positions, a chunk at a time. While the head is frozen, the gradient with respect to the hidden states is taken
in the same go, `∂loss/∂h = Wᵀ (softmax(W h) − onehot)`, so that no more than one chunk of logits is ever held. A trainable head is run
again in backward instead (`torch.utils.checkpoint`).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from layercard.data.load import IGNORED
from layercard.fast.anatomy import Anatomy, anatomy, forward_names
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
    """What `labels_only` did so far.

    Attributes:
        active: Whether losses of this model can be computed so at all.
        reason: Why not, where they cannot.
        labelled: Positions that went through the head.
        spared: Positions that did not.
    """

    active: bool = True
    reason: str = ""
    labelled: int = 0
    spared: int = 0

    def __str__(self) -> str:
        if not self.active:
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
    done = LabelsOnly(*_possible(parts))
    if not done.active:
        yield done
        return
    forward, norm = parts.causal.forward, parts.final_norm
    names = forward_names(type(parts.causal))
    with replaced(parts.causal, _Labelled(parts, forward, names, chunk_bytes, done)):
        if norm is None:
            yield done
        else:
            with replaced(norm, partial(_normed, norm.forward)):
                yield done


@dataclass
class _Labelled:
    """The model's forward in `labels_only`."""

    parts: Anatomy
    run: Callable[..., Any]
    names: tuple[str, ...]
    chunk_bytes: int | None
    done: LabelsOnly

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = kwargs.get("labels")
        if labels is None or not self.parts.causal.training or _asks_for_all(kwargs) or vars(self.parts.config).get("output_router_logits"):
            return self.run(**kwargs)
        before = torch.zeros_like(labels, dtype=torch.bool)
        before[:, :-1] = labels[:, 1:] != IGNORED
        items = kwargs.get("num_items_in_batch")
        with needing(before):
            hidden, output = self.body({name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")})
        targets = labels[:, 1:][before[:, :-1]].to(hidden.device)
        head = partial(self.head, output)
        rows = self.rows(len(targets), hidden.device.type)
        trains = any(weight.requires_grad for weight in self._head_weights())
        total = (_rerun if trains else _frozen)(hidden[before.to(hidden.device)], targets, head, rows)
        self.done.labelled += len(targets)
        self.done.spared += labels.numel() - len(targets)
        return CausalLMOutputWithPast(loss=total / (len(targets) if items is None else items))

    def rows(self, labelled: int, device: str) -> int:
        """Rows of a chunk, so that chunks are alike and none is larger than allowed."""
        limit = CHUNK_BYTES.get(device, OTHER_CHUNK_BYTES) if self.chunk_bytes is None else self.chunk_bytes
        most = max(1, limit // (4 * self.parts.config.vocab_size))
        return max(1, math.ceil(labelled / math.ceil(max(labelled, 1) / most)))

    def body(self, kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
        """Hidden states `[B, T, width]` that the head would get, and an output of the decoder to put others in."""
        run, found = self.parts.decoder.forward, []

        def decode(*args: Any, **inner: Any) -> Any:
            output = run(*args, **inner)
            found.append(output)
            return _with_hidden(output, output[0][:, :0].detach())  # nothing is left for the head to do

        with replaced(self.parts.decoder, decode):
            self.run(**kwargs)
        return found[0][0], found[0]

    def head(self, output: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[m, vocabulary]` of hidden states `[m, width]`, by the model's own code: scale, cap and bias included."""
        stub = _with_hidden(output, hidden[None])
        with replaced(self.parts.decoder, lambda *args, **kwargs: stub):
            ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
            return self.run(input_ids=ids, use_cache=False).logits[0]

    def _head_weights(self) -> Iterator[nn.Parameter]:
        inside = {id(weight) for weight in self.parts.decoder.parameters()}
        yield from (weight for weight in self.parts.causal.parameters() if id(weight) not in inside)
        head = self.parts.causal.get_output_embeddings()
        yield from head.parameters() if head is not None else ()


def _normed(norm: Head, hidden: torch.Tensor) -> torch.Tensor:
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


def _asks_for_all(kwargs: Mapping[str, Any]) -> bool:
    wanted = [kwargs.get(name) for name in FULL]
    return any(value is not None and value is not False for value in wanted) or kwargs.get("return_dict") is False


def _rerun(hidden: torch.Tensor, targets: torch.Tensor, head: Head, rows: int) -> torch.Tensor:
    """Summed cross entropy; the head of each chunk runs again in backward."""

    def loss(part: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(part).float(), labels, reduction="sum")

    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    total = torch.stack([checkpoint(loss, part, labels, use_reentrant=False) for part, labels in pairs]).sum()
    assert isinstance(total, torch.Tensor)
    return total


def _frozen(hidden: torch.Tensor, targets: torch.Tensor, head: Head, rows: int) -> torch.Tensor:
    """Summed cross entropy through a head without trainable weights."""
    total = _FrozenHead.apply(hidden, targets, head, rows)
    assert isinstance(total, torch.Tensor)
    return total


class _FrozenHead(torch.autograd.Function):
    """Summed cross entropy of hidden states `[M, width]`, whose gradient is taken together with it."""

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


def _possible(parts: Anatomy) -> tuple[bool, str]:
    name = type(parts.causal).__name__
    if parts.causal.loss_function is not ForCausalLMLoss:
        return False, f"the loss of {name} is not the cross entropy of the next token"
    if parts.multimodal:
        return False, f"{name} puts pictures or sound among its tokens"
    if parts.causal.get_output_embeddings() is None:
        return False, f"{name} has no head"
    return True, ""
