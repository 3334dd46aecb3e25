"""The frozen-prefix cache: what enters the lowest trained block is computed once a record, and read in every later pass.

Below the lowest trained block s nothing changes during training, so the hidden states that enter it are a function of a record's tokens
and positions alone (`prefix_records`). They are kept in memory or on disk (`prefix_store`) when a record is first seen; there is no
separate pass to fill the cache. When all or some records of a batch are known, the frozen blocks run on the others only, or not at all,
and block s goes on from the known hidden states (`prefix_cache`). Masks, positions and all blocks from s on are the model's own work as
ever.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercard.data.load import IGNORED
from layercard.errors import OutputError, TrainingError
from layercard.fast.anatomy import anatomy, named_arguments
from layercard.fast.packing import needed
from layercard.fast.prefix_blocks import adapter_states, obstacle, randomness
from layercard.fast.prefix_cache import PASSES, Pass, PrefixCache, evaluating
from layercard.fast.prefix_store import Store, room
from layercard.fast.read_ahead import ReadAhead
from layercard.models.hooks import replaced

__all__ = ["PrefixCache", "frozen_prefix"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What hidden states may be kept in, beside the type they are computed in."""
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
_KNOWN_INPUTS = {
    *("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "cache_position", "use_cache", "return_dict"),
    *("num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", *_OUTPUTS),
}


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
    print(prefix)  # frozen blocks 25/30: 1648 of 2472 records read from the cache; …
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
    if dropout not in ("refuse", "off"):
        raise TrainingError(f"dropout {dropout!r} is unknown; choose 'refuse' or 'off'")
    if dtype is not None and dtype not in DTYPES:
        raise TrainingError(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}, or leave it out for the model's own")
    parts, folder = anatomy(model), None if cache is None else Path(cache)
    prefix = PrefixCache(parts, folder, 0, DTYPES[dtype] if dtype else None, tokenizer, dropout == "off", always, passes, tokens)

    # Whether it can be used at all, and exactly.
    reason = obstacle(model, parts)
    drawing = [] if reason else randomness(parts, parts.lowest)
    if drawing:
        few = ", ".join(drawing[:2]) + (f" and {len(drawing) - 2} more" if len(drawing) > 2 else "")
        if dropout == "off":
            prefix.notes.append(f"dropout is off below block {parts.lowest} ({few})")
        else:
            reason = f"random numbers are drawn below block {parts.lowest} ({few}); set them to 0 in the config, or pass dropout='off'"
    if reason and strict:
        raise TrainingError(f"the frozen prefix cannot be kept: {reason}")
    if reason:
        prefix.turn_off(reason)
    else:
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the cache folder {folder}: {error.strerror or error}; name another") from error
        prefix.limit = room(folder) if max_bytes is None else max_bytes
        prefix.begin()

    with _at_work(prefix) if prefix.active else nullcontext():
        yield prefix


@contextmanager
def known_prefix(model: nn.Module, store: Store, lowest: int) -> Iterator[PrefixCache]:
    """Let block `lowest` go on from hidden states that are all in `store`; the blocks below it need no weights.

    Enter it before adapters are put on, and before `unpadded`.

    Raises:
        TrainingError: The blocks hand each other more than hidden states; at a forward pass inside: a record is not in the store, or the
            call needs the blocks themselves.
    """
    parts = replace(anatomy(model), lowest=lowest, below=())
    check_known_prefix(model, lowest)
    ahead = ReadAhead(store, next(parts.blocks[lowest].module.parameters()).device)
    prefix = PrefixCache(parts, given=store, ahead=ahead)
    prefix.begin()
    with ExitStack() as stack:
        stack.callback(ahead.close)
        stack.enter_context(_at_work(prefix))
        yield prefix


def check_known_prefix(model: nn.Module, lowest: int) -> None:
    """Raise `TrainingError` where what enters block `lowest` is not a function of the record alone."""
    parts = replace(anatomy(model), lowest=lowest, below=())
    reason = obstacle(model, parts, streamed=True)
    drawing = [] if reason else randomness(parts, lowest)
    if drawing:
        reason = f"random numbers are drawn there in training ({drawing[0]}); set them to 0 in the model's config.json"
    if reason:
        raise TrainingError(f"the blocks below {lowest} cannot stay on disk: {reason}")


@contextmanager
def _at_work(prefix: PrefixCache) -> Iterator[None]:
    """The forwards of model, decoder and frozen blocks replaced by those that use the cache."""
    parts, forwards = prefix.parts, _Forwards(prefix)
    with ExitStack() as stack:
        stack.enter_context(replaced(parts.causal, _like(forwards.model, parts.causal)))
        stack.enter_context(replaced(parts.decoder, _like(forwards.decoder, parts.decoder)))
        for block in parts.blocks[: parts.lowest]:
            stack.enter_context(replaced(block.module, partial(forwards.block, block.index, block.module.forward)))
        stack.callback(prefix.flush)
        yield


def _like(forward: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """A forward that is handed the module's own first and has its signature, which trainers look at."""
    return update_wrapper(partial(forward, module.forward), module.forward)


class _Forwards:
    """The forwards that stand in for those of the model, its decoder and the frozen blocks while a cache is at work."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self.passing: Pass | None = None
        self.labels_on_padding = False

    def model(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model with its head: looks whether padding carries labels, so that a label is predicted from a padded position."""
        inputs = named_arguments(self.cache.parts.causal, args, kwargs)
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        if isinstance(labels, torch.Tensor) and isinstance(mask, torch.Tensor) and labels.shape == mask.shape and mask.ndim == 2:
            self.labels_on_padding = bool(((labels[:, 1:] != IGNORED) & ~mask[:, :-1].bool()).any())
        try:
            return run(*args, **kwargs)
        finally:
            self.labels_on_padding = False

    def decoder(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The decoder: begins a pass, and puts the frozen part in evaluation mode where that was asked for."""
        cache, kwargs = self.cache, named_arguments(self.cache.parts.decoder, args, kwargs)
        with evaluating(cache.modules if cache.evaluate else ()):
            if torch.compiler.is_compiling() or not cache.active:
                return run(**kwargs)
            cache.check_weights()
            reason = "labels on padding" if self.labels_on_padding else self._unlike_training(kwargs)
            if reason and cache.active:
                cache.leave_alone(reason)
            if reason or not cache.active:
                return run(**kwargs)
            self.passing = Pass(cache, kwargs)
            try:
                return run(**{**kwargs, "use_cache": False})
            finally:
                self.passing = None

    def block(self, index: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A frozen block."""
        return run(*args, **kwargs) if self.passing is None else self.passing.block(index, run, args, kwargs)

    def _unlike_training(self, kwargs: Mapping[str, Any]) -> str:
        """Why this call of the decoder cannot use the cache; empty where it can."""
        ids, mask, config = kwargs.get("input_ids"), kwargs.get("attention_mask"), self.cache.parts.config
        head_mask = needed()  # `labels_only` may say which positions the head will see
        if isinstance(head_mask, torch.Tensor) and isinstance(mask, torch.Tensor) and mask.shape == head_mask.shape:
            padded = head_mask.to(mask.device) & ~mask.bool()
            if bool(padded.any()):
                return "labels on padding"
        if ids is None or kwargs.get("inputs_embeds") is not None:
            return "embeddings instead of tokens"
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is True:
            return "a cache of keys and values"
        if ids.ndim != 2 or (mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2)):
            return "a mask that is not two-dimensional"
        positions = kwargs.get("position_ids")
        restarts = mask is None and positions is not None and bool((positions.diff(dim=-1) != 1).any())
        if restarts and kwargs.get("use_cache") is None and config.use_cache:
            return "packed records that see each other, for want of use_cache=False"
        for name in _OUTPUTS:
            if kwargs.get(name) or (kwargs.get(name) is None and getattr(config, name, False)):
                return name
        for name, value in kwargs.items():
            if name not in _KNOWN_INPUTS and value is not None and value is not False:
                return name
        if self.cache.longest is not None and ids.shape[1] >= self.cache.longest:
            return "a batch that changes the rotary frequencies"
        return "" if adapter_states(self.cache.tuners) == self.cache.adapters else "other adapters in the frozen blocks"
