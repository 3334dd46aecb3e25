"""Which positions of the current pass the head will see; changes with the layout of the batch, padded or packed.

Padding goes through no block: the real tokens of a batch travel as one row, and only attention sees them record by record.

A batch `[B, T]` of records of unequal length is mostly computed for nothing where it is padded (a quarter of it for E2E, four records
at a time). Every map of a block but attention works on single tokens, so `unpadded` lets the decoder run on `[1, N]`, N the number of
real tokens. Attention puts queries, keys and values back to one record a row, padding on the right, where a causal mask keeps it
unseen, and takes the N real rows of its result. Losses and gradients are the padded ones up to rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from layercard.fast.anatomy import Anatomy, anatomy, forward_names
from layercard.models.hooks import replaced
from layercard.models.load import sees_ahead

# ---- fast.positions

_needed: ContextVar[torch.Tensor | None] = ContextVar("needed", default=None)


def needed() -> torch.Tensor | None:
    """Mask `[B, T]` of the positions that the head will see, in the layout that blocks see now; `None` for all."""
    return _needed.get()


@contextmanager
def needing(mask_bt: torch.Tensor | None) -> Iterator[None]:
    """Say so for the length of a `with` block."""
    token = _needed.set(mask_bt)
    try:
        yield
    finally:
        _needed.reset(token)


# ---- fast.packing

NAME = "layercard_records"
"""The attention implementation by which transformers finds `attention` and `mask`."""
WORTH = 0.05
"""Share of padding from which on taking it out is worth the copies in attention."""
PLAIN = frozenset({"input_ids", "attention_mask", "position_ids"})


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
        width = int(lengths.max())
        starts = lengths.cumsum(0) - lengths
        column = torch.arange(width, device=mask_bt.device)
        real = column < lengths[:, None]
        gather = torch.where(real, starts[:, None] + column, starts[:, None])
        return cls(gather, real.flatten().nonzero()[:, 0])

    def mask(self) -> torch.Tensor | None:
        """Which keys a query may see, `[T, T]`; `None` where causality says it all."""
        width = self.gather.shape[1]
        if self.window is None or width <= self.window:
            return None
        index = torch.arange(width, device=self.gather.device)
        apart = index[:, None] - index
        return (apart >= 0) & (apart < self.window)


@dataclass
class Unpadded:
    """What `unpadded` did so far.

    Attributes:
        active: Whether batches of this model can be packed at all.
        reason: Why not, where they cannot.
        tokens: Real tokens that went through the decoder in packed rows.
        spared: Padding that did not.
    """

    active: bool = True
    reason: str = ""
    tokens: int = 0
    spared: int = 0

    def __str__(self) -> str:
        if not self.active:
            return f"padding is computed: {self.reason}"
        return f"padding left out: {self.spared} of {self.tokens + self.spared} positions"


_packed: ContextVar[Records | None] = ContextVar("packed", default=None)


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention by `scaled_dot_product_attention`; of a packed row each record by itself.

    Args:
        module: The attention module.
        query: `[1, H, N, d]` of a packed row, else `[B, H, T, d]`.
        key: As `query`, with as many heads as there are keys.
        value: As `key`.
        attention_mask: `Records` of a packed row; else whatever `sdpa_mask` made.
        kwargs: As transformers passes them on.

    Returns:
        `[1, N, H, d]` or `[B, T, H, d]`, and no weights.
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
    done = Unpadded(*_possible(parts))
    if not done.active:
        yield done
        return
    config, run = parts.config, parts.decoder.forward
    names = forward_names(type(parts.decoder))
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        with replaced(parts.decoder, _Packing(run, names, done, _relative(config))):
            yield done
    finally:
        config._attn_implementation_internal = before


@dataclass
class _Packing:
    """The decoder's forward in `unpadded`."""

    run: Callable[..., Any]
    names: tuple[str, ...]
    done: Unpadded
    relative: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids, seen = kwargs.get("input_ids"), _packable(kwargs, self.relative)
        if ids is None or seen is None:
            return self.run(**kwargs)
        positions = kwargs.get("position_ids")
        columns = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        packed = {"input_ids": ids[seen][None], "attention_mask": None, "position_ids": columns.expand_as(ids)[seen][None]}
        wanted = needed()
        token = _packed.set(Records.of(seen))
        try:
            with needing(None if wanted is None else wanted[seen][None]):
                output = self.run(**{**kwargs, **packed, "use_cache": False})
        finally:
            _packed.reset(token)
        self.done.tokens += packed["input_ids"].numel()
        self.done.spared += ids.numel() - packed["input_ids"].numel()
        return _padded(output, seen)


def _packable(kwargs: Mapping[str, Any], relative: bool) -> torch.Tensor | None:
    """The mask `[B, T]` of real tokens, on the device of the ids, where the batch should be packed; `None` where it should not."""
    ids, mask_bt, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if ids is None or mask_bt is None or mask_bt.dim() != 2 or mask_bt.shape != ids.shape or kwargs.get("use_cache") is True:
        return None
    if any(value is not None and value is not False for name, value in kwargs.items() if name not in PLAIN | {"use_cache", "return_dict"}):
        return None
    seen = mask_bt.bool()
    real = int(seen.sum())
    if real == 0 or real > (1 - WORTH) * seen.numel() or not bool(seen.any(dim=1).all()):
        return None
    turns = (seen[:, 1:] != seen[:, :-1]).sum(dim=1)
    if int(turns.max()) > 1:
        return None  # holes, or padding on both sides
    if positions is None and not relative and not bool(seen[:, 0].all()):
        return None  # each model numbers left-padded tokens in its own way
    if positions is not None and not bool(((positions[:, 1:] - positions[:, :-1] == 1) | ~(seen[:, 1:] & seen[:, :-1])).all()):
        return None  # rows that are packed already
    return seen


def _padded(output: Any, seen: torch.Tensor) -> Any:
    """The decoder's output with its hidden states back in the padded layout."""
    packed = output[0]
    hidden = packed.new_zeros((*seen.shape, packed.shape[-1])).masked_scatter(seen[..., None], packed[0])
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output


def _possible(parts: Anatomy) -> tuple[bool, str]:
    causal, config = parts.causal, parts.config
    name = type(causal).__name__
    if not isinstance(parts.decoder, PreTrainedModel) or not causal._supports_attention_backend:
        return False, f"{name} does not let its attention be chosen"
    if config._attn_implementation != "sdpa":
        return False, f"the attention is {config._attn_implementation!r}, not 'sdpa'"
    if parts.multimodal:
        return False, f"{name} puts pictures or sound among its tokens"
    if sees_ahead(parts.blocks):
        return False, f"the tokens of {name} see those behind them, too"
    if parts.mixes_records:
        return False, f"the 8-bit maps of {name} look for outliers in the whole batch"
    if "logits_to_keep" in forward_names(type(parts.decoder)):
        return False, f"{name} may drop positions before its last blocks"
    kinds = set(config.to_dict().get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds or causal._is_stateful:
        return False, f"{name} has blocks that work along the sequence in other ways ({', '.join(sorted(kinds)) or 'recurrent'})"
    return True, ""


def _relative(config: Any) -> bool:
    """Whether only distances between positions count (rotary embeddings)."""
    return bool(config.to_dict().get("rope_parameters"))
