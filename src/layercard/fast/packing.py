"""Padding goes through no block: the real tokens of a batch travel as one row, and only attention sees them record by record.

A batch `[B, T]` of records of unequal length is mostly computed for nothing where it is padded (a quarter of it for E2E, four records
at a time). Every module of a block but attention works on single tokens, so `unpadded` lets the decoder run on `[1, N]`, N the number of
real tokens. Attention puts queries, keys and values back to one record a row, padding on the right, where a causal mask keeps it
unseen, and takes the N real rows of its result. Losses and gradients are the padded ones up to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from layercard.fast.anatomy import Anatomy, anatomy, argument_names, named_arguments
from layercard.models.hooks import replaced
from layercard.models.load import sees_ahead

NAME = "layercard_records"
"""The attention implementation by which transformers finds `attention` and `mask`."""
WORTH = 0.05
"""Share of padding from which on taking it out is worth the copies in attention."""

_needed: ContextVar[torch.Tensor | None] = ContextVar("needed", default=None)


def needed() -> torch.Tensor | None:
    """Mask `[B, T]` of the positions that the head will see, in the layout that blocks see now (padded or packed); `None` for all."""
    return _needed.get()


@contextmanager
def needing(mask_bt: torch.Tensor | None) -> Iterator[None]:
    """Say what `needed` says, for the length of a `with` block."""
    token = _needed.set(mask_bt)
    try:
        yield
    finally:
        _needed.reset(token)


@dataclass(frozen=True)
class Records:
    """Where the records of a packed row `[1, N]` lie; travels through the blocks in the place of the attention mask.

    Attributes:
        gather: `[B, T]`, for each place of the padded layout the position in the packed row; padding points to any.
        scatter: `[N]`, for each token of the packed row its place in the flattened padded layout.
        window: How far back a token sees; `None` for all the way.
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    window: int | None = None

    @classmethod
    def of(cls, mask_bt: torch.Tensor) -> "Records":
        """From a mask `[B, T]` of real tokens, which need not be on the left; the layout of attention always is right-padded."""
        lengths = mask_bt.sum(dim=1)
        starts = lengths.cumsum(0) - lengths
        column = torch.arange(int(lengths.max()), device=mask_bt.device)
        real = column < lengths[:, None]
        gather = torch.where(real, starts[:, None] + column, starts[:, None])
        return cls(gather, real.flatten().nonzero()[:, 0])

    def mask(self) -> torch.Tensor | None:
        """Which keys a query may see, `[T, T]`; `None` where causality says it all."""
        width = self.gather.shape[1]
        if self.window is None or width <= self.window:
            return None
        index = torch.arange(width, device=self.gather.device)
        distance = index[:, None] - index
        return (distance >= 0) & (distance < self.window)


@dataclass
class Unpadded:
    """What `unpadded` did so far."""

    reason: str = ""  # why batches of this model cannot be packed, where they cannot
    tokens: int = 0  # real tokens that went through the decoder in packed rows
    spared: int = 0  # padding that did not

    @property
    def active(self) -> bool:
        """Whether batches of this model are packed."""
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"padding is computed: {self.reason}"
        return f"padding left out: {self.spared} of {self.tokens + self.spared} positions"


_packed: ContextVar[Records | None] = ContextVar("packed", default=None)


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention by `scaled_dot_product_attention`; of a packed row each record by itself.

    Queries are `[1, H, N, d]` of a packed row, where the mask is `Records`, else `[B, H, T, d]`; keys and values have as many heads as
    there are keys. Returns `[1, N, H, d]` or `[B, T, H, d]`, and no weights.
    """
    if not isinstance(attention_mask, Records):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    records = attention_mask
    rows = (states[0].transpose(0, 1)[records.gather].transpose(1, 2) for states in (query, key, value))  # [B, H, T, d]
    mask = records.mask()
    out, _ = sdpa_attention_forward(module, *rows, mask if mask is None else mask[None, None], **kwargs)
    return out.flatten(0, 1)[records.scatter][None], None


def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Any:
    """The mask that goes with `attention`: `Records` while a packed row runs, else transformers' own."""
    records = _packed.get()
    if records is None:
        return sdpa_mask(*args, local_size=local_size, **kwargs)
    return Records(records.gather, records.scatter, local_size)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


@contextmanager
def unpadded(model: nn.Module) -> Iterator[Unpadded]:
    """Let no padding through the decoder of `model` for the length of a `with` block.

    Nothing needs to change in the training loop: batches come padded, right or left, and hidden states go padded to the head, with
    zeros where there was padding. A batch is left as it is where packing it gains nothing or would not be exact: nearly no padding, a
    mask with holes, four-dimensional masks, a cache of keys and values, hidden states or attention weights asked for. With dropout the
    random numbers fall on other places, so that runs equal padded ones in distribution only.

    Where the model does not let its attention be chosen (`sdpa` must be in use), or its blocks work along the sequence in other ways
    (recurrent ones), nothing changes, and `reason` says why.

    Args:
        model: A causal language model, or a PEFT or DistributedDataParallel model around one.
    """
    parts = anatomy(model)
    done = Unpadded(_obstacle(parts))
    if not done.active:
        yield done
        return
    config = parts.config
    relative = bool(config.to_dict().get("rope_parameters"))  # only distances between positions count
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        with replaced(parts.decoder, partial(_packed_forward, parts.decoder, parts.decoder.forward, relative, done)):
            yield done
    finally:
        config._attn_implementation_internal = before


def _packed_forward(decoder: nn.Module, run: Callable[..., Any], relative: bool, done: Unpadded, *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward in `unpadded`."""
    kwargs = named_arguments(decoder, args, kwargs)
    real_bt = _packable(kwargs, relative)
    if real_bt is None:
        return run(**kwargs)
    ids, positions, head_mask = kwargs["input_ids"], kwargs.get("position_ids"), needed()
    columns = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
    packed = {"input_ids": ids[real_bt][None], "attention_mask": None, "position_ids": columns.expand_as(ids)[real_bt][None]}
    token = _packed.set(Records.of(real_bt))
    try:
        with needing(None if head_mask is None else head_mask[real_bt][None]):
            output = run(**{**kwargs, **packed, "use_cache": False})
    finally:
        _packed.reset(token)
    done.tokens += packed["input_ids"].numel()
    done.spared += ids.numel() - packed["input_ids"].numel()

    # Back to the padded layout, zeros where there was padding.
    states = output[0]
    hidden = states.new_zeros((*real_bt.shape, states.shape[-1])).masked_scatter(real_bt[..., None], states[0])
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output


def _packable(kwargs: dict[str, Any], relative: bool) -> torch.Tensor | None:
    """The mask `[B, T]` of real tokens, on the device of the ids, where the batch should be packed; `None` where it should not."""
    ids, mask_bt, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if ids is None or mask_bt is None or mask_bt.dim() != 2 or mask_bt.shape != ids.shape or kwargs.get("use_cache") is True:
        return None
    plain = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict"}
    if any(value is not None and value is not False for name, value in kwargs.items() if name not in plain):
        return None
    real = mask_bt.bool()
    tokens = int(real.sum())
    if tokens == 0 or tokens > (1 - WORTH) * real.numel() or not bool(real.any(dim=1).all()):
        return None
    if int((real[:, 1:] != real[:, :-1]).sum(dim=1).max()) > 1:
        return None  # holes, or padding on both sides
    if positions is None and not relative and not bool(real[:, 0].all()):
        return None  # each model numbers left-padded tokens in its own way
    if positions is not None and not bool(((positions[:, 1:] - positions[:, :-1] == 1) | ~(real[:, 1:] & real[:, :-1])).all()):
        return None  # rows that are packed already
    return real


def _obstacle(parts: Anatomy) -> str:
    """Why batches of a model cannot be packed; empty where they can."""
    if not isinstance(parts.decoder, PreTrainedModel) or not parts.causal._supports_attention_backend:
        return f"{parts.name} does not let its attention be chosen"
    if parts.config._attn_implementation != "sdpa":
        return f"the attention is {parts.config._attn_implementation!r}, not 'sdpa'"
    if parts.multimodal:
        return f"{parts.name} puts pictures or sound among its tokens"
    if sees_ahead(parts.blocks):
        return f"the tokens of {parts.name} see those behind them, too"
    if parts.mixes_records:
        return f"the 8-bit modules of {parts.name} look for outliers in the whole batch"
    if "logits_to_keep" in argument_names(type(parts.decoder).forward):
        return f"{parts.name} may drop positions before its last blocks"
    if parts.other_layer_kinds or parts.causal._is_stateful:
        kinds = ", ".join(parts.other_layer_kinds) or "recurrent"
        return f"{parts.name} has blocks that work along the sequence in other ways ({kinds})"
    return ""
