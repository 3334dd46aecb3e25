"""The part of a model below its lowest trained block: whether its hidden states can be kept, what decides about them, and who they are.

The forwards that stand in for a model's own while a frozen-prefix cache is at work.

The frozen-prefix cache: what enters the lowest trained block is computed once a record, and read in every later pass.

Below the lowest trained block s nothing changes during training, so the hidden states that enter it are a function of a record's tokens
and positions alone (`rows`). They are kept in memory or on disk (`store`) when a record is first seen; there is no separate pass to fill
the cache. When all or some records of a batch are known, the frozen blocks run on the others only, or not at all, and block s goes on
from the known hidden states. Masks, positions and all blocks from s on are the model's own work as ever.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercard.data.load import IGNORED
from layercard.errors import OutputError, TrainingError
from layercard.fast.anatomy import anatomy, forward_names
from layercard.fast.packing import needed
from layercard.fast.prefix_blocks import Frozen, layerdrop, obstacle, randomness, sharded
from layercard.fast.prefix_cache import PASSES, Passage, PrefixCache, evaluating
from layercard.fast.prefix_store import (
    Uncacheable,
    room,
)
from layercard.models.hooks import replaced

# ---- fast.calls

_FLAGS = ("output_hidden_states", "output_attentions", "output_router_logits")
_KNOWN = {
    *("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "cache_position", "use_cache", "return_dict"),
    *("num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", *_FLAGS),
}


@dataclass
class Wrapped:
    """The forwards that stand in for the model's own."""

    cache: PrefixCache
    own: Callable[..., Any]
    names: tuple[str, ...]
    passage: Passage | None = None
    labelled: bool = False

    def outer(self, own: Callable[..., Any], kind: type[nn.Module]) -> Callable[..., Any]:
        """The forward of the model with the head: looks whether padding carries labels."""
        names = forward_names(kind)

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.labelled = labels_on_padding({**dict(zip(names, args, strict=False)), **kwargs})
            try:
                return own(*args, **kwargs)
            finally:
                self.labelled = False

        return forward

    def decoder(self) -> Callable[..., Any]:
        """The forward of the decoder: sees what it is given, and puts the frozen part in evaluation mode where that was asked for."""

        @functools.wraps(type(self.cache.frozen.parts.decoder).forward.__get__(self.cache.frozen.parts.decoder))
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._decode({**dict(zip(self.names, args, strict=False)), **kwargs})

        return forward

    def _decode(self, kwargs: dict[str, Any]) -> Any:
        frozen = self.cache.frozen
        with evaluating((*frozen.embedding, *frozen.modules) if self.cache.evaluate else ()):
            if torch.compiler.is_compiling() or not self._cacheable(kwargs):
                return self.own(**kwargs)
            self.passage = Passage(self.cache, kwargs)
            try:
                return self.own(**{**kwargs, "use_cache": False})
            finally:
                self.passage = None

    def _cacheable(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether to look the batch up; counts it where not."""
        cache = self.cache
        if cache.active:
            cache.check_weights()
        if not cache.active:
            return False
        reason = "labels on padding" if self.labelled or needs_padding(kwargs) else unlike_training(kwargs, cache.frozen)
        if not reason and cache.frozen.adapters() != cache.adapters:
            reason = "other adapters in the frozen blocks"
        if reason:
            cache.untouched[reason] += 1
        return not reason

    def block(self, at: int, own: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of frozen block `at`."""

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if at == 0 and self.passage is not None:
                try:
                    self.passage.begin(args, kwargs)
                except Uncacheable as error:
                    self.cache.untouched[str(error)] += 1
                    self.passage = None
            if self.passage is None:
                return own(*args, **kwargs)
            return self.passage.block(at, own, args, kwargs)

        return forward


def unlike_training(kwargs: Mapping[str, Any], frozen: Frozen) -> str:
    """Why a call of the decoder is none whose hidden states can be kept; empty where it may be."""
    ids, mask, config = kwargs.get("input_ids"), kwargs.get("attention_mask"), frozen.parts.config
    if ids is None or kwargs.get("inputs_embeds") is not None:
        return "embeddings instead of tokens"
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is True:
        return "a cache of keys and values"
    if ids.ndim != 2 or (mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2)):
        return "a mask that is not two-dimensional"
    if mask is None and kwargs.get("use_cache") is None and config.use_cache and _restarts(kwargs.get("position_ids")):
        return "packed records that see each other, for want of use_cache=False"
    asked = [name for name in _FLAGS if kwargs.get(name) or (kwargs.get(name) is None and getattr(config, name, False))]
    if asked:
        return asked[0]
    strange = [name for name, value in kwargs.items() if name not in _KNOWN and value is not None and value is not False]
    if strange:
        return strange[0]
    if frozen.longest is not None and ids.shape[1] >= frozen.longest:
        return "a batch that changes the rotary frequencies"
    return ""


def _restarts(positions: torch.Tensor | None) -> bool:
    """Whether positions start anew within a row."""
    return positions is not None and bool((positions.diff(dim=-1) != 1).any())


def labels_on_padding(kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's inputs ask for a loss at padding: there a label is predicted from a padded position."""
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    if not isinstance(labels, torch.Tensor) or not isinstance(mask, torch.Tensor) or mask.ndim != 2 or labels.shape != mask.shape:
        return False
    return bool(((labels[:, 1:] != IGNORED) & ~mask[:, :-1].bool()).any())


def needs_padding(kwargs: Mapping[str, Any]) -> bool:
    """Whether the head will see a padded position, as far as `labels_only` says which ones it will see."""
    wanted, mask = needed(), kwargs.get("attention_mask")
    if wanted is None or not isinstance(mask, torch.Tensor) or mask.shape != wanted.shape:
        return False
    return bool((wanted.to(mask.device) & ~mask.bool()).any())


# ---- fast.prefix

__all__ = ["PrefixCache", "frozen_prefix"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What hidden states may be kept in, beside the type they are computed in."""


@contextmanager
def frozen_prefix(
    model: nn.Module,
    cache: str | Path | None = None,
    *,
    max_bytes: int | None = None,
    dtype: str | None = None,
    dropout: str = "refuse",
    passes: float = PASSES,
    tokens: int | None = None,
    tokenizer: Any = None,
    always: bool = False,
    strict: bool = True,
) -> Iterator[PrefixCache]:
    """Compute the frozen blocks below the lowest trained one once a record, for any training loop inside the `with` block.

    ```python
    with frozen_prefix(peft_model, cache="hidden-states", tokenizer=tokenizer, passes=3) as prefix:
        trainer.train()
    print(prefix)  # frozen prefix of 25/30 blocks: 1648 of 2472 records read from the cache; …
    ```

    Records are known by their tokens and positions, so order, batch size and padding do not matter; the first epoch fills the cache, and
    later epochs, evaluations and, with a folder, other processes and later runs read it. Losses and gradients are those without it, up to
    rounding. What cannot be kept record by record runs as ever and is counted in `untouched`: generation, batches with holes in the mask
    or with four-dimensional masks, embeddings given instead of tokens, hidden states or attention weights asked for, and batches with
    labels on padding. (Loss that is computed outside the model must not look at padded positions: they hold zeros.) Where a training step
    does not say whether it wants a cache of keys and values, it gets none.

    Enter it before `unpadded` and after `cut_backward`.

    Args:
        model: A transformers model, or a PEFT or DistributedDataParallel model around one, with its adapters in place.
        cache: A folder for the hidden states, which runs may share: below it each set of frozen weights, tokenizer, dtype, depth and
            library versions has its own, so a mismatch is never read. Without a folder they are kept in memory.
        max_bytes: What this cache may take; half of the free disk, or a quarter of the free memory where it is not given.
        dtype: `bfloat16` or `float16` keep hidden states in two bytes each. Rounding float32 hidden states to bfloat16 changes each
            number by up to 0.4 %, in the first epoch as in later ones, so the adapter is trained on slightly other inputs than those it
            will see: losses then agree to about three digits. Not given, the type that the model computes in is kept, exactly.
        dropout: `refuse` models that draw random numbers below block s in training, or `off`: run embeddings and frozen blocks in
            evaluation mode, which is another training run than with dropout there, and says so in `notes`.
        passes: Passes over the data that are expected, evaluations included.
        tokens: Real tokens of the data set, for the forecast of what the cache takes; not given, it is filled up to its limit.
        tokenizer: Becomes part of the folder's fingerprint.
        always: Keep the cache on where the forecast says that it loses.
        strict: Raise where the cache cannot be used; otherwise it is yielded switched off, with the reason.

    Yields:
        A `PrefixCache`: counts that go on, `active`, `reason`, and one line as its `str`.

    Raises:
        TrainingError: Something below block s trains or draws random numbers, nothing is frozen there, blocks hand each other more than
            hidden states, or the model is spread over processes; or, at a forward pass inside, a frozen weight has become trainable.
        OutputError: The folder cannot be made.
        ModelError: The model has no decoder blocks.
    """
    found = _prepare(model, cache, max_bytes, dtype, dropout, passes, tokens, tokenizer, always)
    if found.reason and strict and not found.forecast:
        raise TrainingError(f"the frozen prefix cannot be kept: {found.reason}")
    if not found.active:
        yield found
        return
    parts = found.frozen.parts
    wrapped = Wrapped(found, parts.decoder.forward, forward_names(type(parts.decoder)))
    with ExitStack() as stack:
        stack.enter_context(replaced(parts.causal, wrapped.outer(parts.causal.forward, type(parts.causal))))
        stack.enter_context(replaced(parts.decoder, wrapped.decoder()))
        for block in parts.blocks[: parts.lowest]:
            stack.enter_context(replaced(block.module, wrapped.block(block.index, block.module.forward)))
        stack.callback(found.flush)
        yield found


def _prepare(
    model: nn.Module,
    cache: str | Path | None,
    max_bytes: int | None,
    dtype: str | None,
    dropout: str,
    passes: float,
    tokens: int | None,
    tokenizer: Any,
    always: bool,
) -> PrefixCache:
    """The cache before the first batch; switched off, with the reason, where it cannot or should not be used."""
    if dropout not in ("refuse", "off"):
        raise TrainingError(f"dropout {dropout!r} is unknown; choose 'refuse' or 'off'")
    if dtype is not None and dtype not in DTYPES:
        raise TrainingError(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}, or leave it out for the model's own")
    parts = anatomy(model)
    folder = None if cache is None else Path(cache)
    frozen = Frozen(parts, parts.lowest)
    found = PrefixCache(frozen, folder, 0, DTYPES[dtype] if dtype else None, tokenizer, dropout == "off", always, passes, tokens)
    reason = sharded(model) or obstacle(frozen) or _random(frozen, found)
    if reason:
        found.turn_off(reason)
        return found
    if folder is not None:
        _make(folder)
        found.measure_disk()
    found.limit = room(folder) if max_bytes is None else max_bytes
    found.watch_weights()
    found.judge(parts.config.hidden_size, (found.dtype or parts.causal.dtype).itemsize, filled=False)
    return found


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the cache folder {folder}: {error.strerror or error}; name another") from error


def _random(frozen: Frozen, found: PrefixCache) -> str:
    """Why random numbers forbid the cache; what is done about them goes into its notes."""
    if layerdrop(frozen):
        return f"layerdrop {layerdrop(frozen):g} leaves out whole blocks by chance; set it to 0"
    drawn = randomness(frozen)
    if not drawn:
        return ""
    few = ", ".join(drawn[:2]) + (f" and {len(drawn) - 2} more" if len(drawn) > 2 else "")
    if not found.evaluate:
        return f"random numbers are drawn below block {frozen.depth} ({few}); set them to 0 in the config, or pass dropout='off'"
    found.notes.append(f"dropout is off below block {frozen.depth} ({few})")
    return ""
