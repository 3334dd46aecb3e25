"""The forwards that stand in for a model's own while a frozen-prefix cache is at work."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layercard.data import IGNORED
from layercard.fast.anatomy import forward_names
from layercard.fast.frozen import Frozen
from layercard.fast.passage import Passage, evaluating
from layercard.fast.positions import needed
from layercard.fast.prefix_cache import PrefixCache
from layercard.fast.rows import Uncacheable

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
