"""Several adapters over one prompt: the blocks below an adapter are the base model's, so they run once for all of them.

Let `s_a` be the lowest layer of adapter a. Over the same tokens, the hidden states that enter block `s_a` and the keys and values of the
blocks below it do not depend on a. So one pass of the base model over the prompt, cut off at the largest `s_a`, gives every adapter the
hidden states to start from; then each runs its own blocks `s_a … L − 1`. For N adapters this takes `max_a s_a + Σ_a (L − s_a)` blocks
instead of `N L`, never more.

While decoding, the new token's pass through the lower blocks is shared as long as continuations agree; from where they part, each
adapter runs all blocks for itself.

Every pass has the shapes that it would have if the adapter ran alone, one sequence at a time, so the logits are equal bit for bit and
not to rounding. Batching the adapters' rows would be faster on a GPU, and would not be equal.

What is held: the keys and values of the prompt in the shared blocks, once; the keys and values of the blocks from `s_a` on, and those of
the tokens decoded in the shared blocks, for each adapter. Attention wants one tensor, so each block's pass makes one of the shared part
and the adapter's and drops it afterwards (transformers' `DynamicCache` makes such a copy too, and keeps it).
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from layercard.errors import DataError, ModelError, PlacementError
from layercard.models.hooks import frozen, hidden_states, replayed
from layercard.models.load import BaseModel
from layercard.models.losses import keeps_logits
from layercard.serving.adapter_switch import Adapter, check_positions, load_adapter, switched_on

CHECK_TOKENS = 5
"""Tokens of the prompt on which a model is checked for being shareable."""


class SharedLayer(DynamicLayer):
    """A block's cache whose first tokens are another's and are only read: `keys` and `values` hold what came after them.

    For decoding a single sequence token by token: it cannot be cropped, or reordered for beam search.
    """

    is_croppable = False

    def __init__(self, prompt: DynamicLayer) -> None:
        super().__init__()
        assert prompt.keys is not None and prompt.values is not None
        self.prompt_keys, self.prompt_values = prompt.keys, prompt.values
        self.lazy_initialization(prompt.keys, prompt.values)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the adapter's part; gives keys and values of all tokens `[1, heads, tokens, width]`."""
        keys, values = super().update(key_states, value_states)
        return torch.cat([self.prompt_keys, keys], dim=-2), torch.cat([self.prompt_values, values], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens of the prompt and those after it."""
        return self.prompt_keys.shape[-2] + super().get_seq_length()


class SharedSlidingLayer(DynamicSlidingWindowLayer):
    """The same for a block that sees the last `sliding_window` tokens only."""

    is_croppable = False

    def __init__(self, prompt: DynamicSlidingWindowLayer) -> None:
        super().__init__(prompt.sliding_window)
        assert prompt.keys is not None and prompt.values is not None
        self.prompt_keys, self.prompt_values = prompt.keys.contiguous(), prompt.values.contiguous()
        self.lazy_initialization(prompt.keys, prompt.values)
        self.cumulative_length = prompt.cumulative_length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the adapter's part; gives keys and values of the window before the new tokens, and theirs."""
        assert self.keys is not None
        decoded = self.keys.shape[-2] if self.keys.numel() else 0
        reached = max(0, self.sliding_window - 1 - decoded)  # tokens of the prompt that the window still reaches
        first = max(0, self.prompt_keys.shape[-2] - reached)
        keys, values = super().update(key_states, value_states)
        return torch.cat([self.prompt_keys[:, :, first:], keys], dim=-2), torch.cat([self.prompt_values[:, :, first:], values], dim=-2)


def shared(layer: DynamicLayer) -> DynamicLayer:
    """A layer to append to, beside others that share its tokens."""
    if isinstance(layer, (SharedLayer, SharedSlidingLayer)):
        return layer
    return SharedSlidingLayer(layer) if isinstance(layer, DynamicSlidingWindowLayer) else SharedLayer(layer)


@dataclass
class Work:
    """What was computed and held, and what it would be if every adapter ran alone (`…_separate`)."""

    prefill_blocks: int = 0  # blocks run over the prompt
    prefill_blocks_separate: int = 0
    decode_blocks: int = 0  # blocks run over single new tokens
    decode_blocks_separate: int = 0
    kv_bytes: int = 0  # the prompt's keys and values that are held once it is read
    kv_bytes_separate: int = 0


@dataclass(frozen=True)
class Continuation:
    """What one adapter writes after the prompt."""

    adapter: str
    token_ids: tuple[int, ...]  # the last one is the end token where the adapter came to an end
    text: str  # without special tokens; empty where the model has no tokenizer
    logits: torch.Tensor | None = None  # `[new tokens, vocabulary]`, on the CPU, where asked for


@dataclass
class _Sequence:
    """One adapter's run: its cache, block by block, and the tokens so far."""

    adapter: Adapter | None
    start: int
    layers: list[DynamicLayer]
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class SharedPrefix:
    """Several LoRA adapters over one base model, greedy decoding, the shared blocks computed once.

    Example:
        ```python
        serving = SharedPrefix(load_model("smollm2-135m"), ["adapter/de", "adapter/fr"])
        for continuation in serving.generate("name[Blue Spice], food[Chinese]", max_new_tokens=32):
            print(continuation.adapter, continuation.text)
        print(serving.work)
        ```

    The base model stays as it is; between calls of `generate` no adapter is on it.

    Attributes:
        base: The base model.
        adapters: The adapters, in the order of the continuations.
        starts: For each adapter the block that it starts from; the blocks below are shared.
        work: What the last call of `generate` computed.
    """

    def __init__(self, base: BaseModel, adapters: Sequence[str | Path | Adapter]) -> None:
        """Load the adapters and check, on a few tokens, that this model's blocks can be shared.

        Args:
            base: The base model.
            adapters: Folders that `layercard train` or PEFT wrote, or adapters of `base` loaded before.

        Raises:
            PlacementError: There is no adapter, one cannot be read, or it changes something below block 0.
            ModelError: The blocks of this model hand each other more than hidden states, or keep other than plain keys and values.
        """
        if not adapters:
            raise PlacementError("there is no adapter to serve; give one or more folders that `layercard train` wrote")
        self.base, self.work = base, Work()
        self.adapters = tuple(given if isinstance(given, Adapter) else load_adapter(base, given) for given in adapters)
        # Each starts from its lowest block, and from the last one where it changes the head alone.
        head = {path for path, module in base.model.named_modules() if module is base.model.get_output_embeddings()}
        for adapter in self.adapters:
            early = [path for path in adapter.outside if path not in head]
            if early:
                raise PlacementError(f"adapter {adapter.name} changes {early[0]}, so no block is the base model's; serve it by itself")
        self.starts = tuple(min(adapter.layers, default=len(base.blocks) - 1) for adapter in self.adapters)
        self._check_model()

    def generate(
        self, prompt: str | Sequence[int] | torch.Tensor, max_new_tokens: int = 32, *, with_logits: bool = False
    ) -> list[Continuation]:
        """Continue one prompt with every adapter, greedily, until its end token or `max_new_tokens`.

        Args:
            prompt: Text, or token ids `[T]`.
            max_new_tokens: How many tokens each adapter writes at most.
            with_logits: Keep the logits of each new token.

        Returns:
            One continuation for each adapter.

        Raises:
            DataError: The prompt is empty, has ids that the model lacks, or is too long for the model.
        """
        ids, tokenizer = self._ids(prompt, max_new_tokens), self.base.tokenizer
        settings = self.base.model.generation_config
        ends = settings.eos_token_id if settings is not None else None
        end_ids = set(ends) if isinstance(ends, list) else {ends}
        self.work = Work()
        sequences = [_Sequence(adapter, start, self._empty_cache()) for adapter, start in zip(self.adapters, self.starts, strict=True)]
        with frozen(self.base.model), torch.no_grad():
            # A group are the sequences whose tokens so far are the same; each round takes all of them one token further.
            groups = [(sequences, ids)]
            for number in range(max_new_tokens):
                following: dict[tuple[int, ...], list[_Sequence]] = defaultdict(list)
                for group, entering in groups:
                    for sequence, logits in zip(group, self._advance(group, entering), strict=True):
                        sequence.tokens.append(int(logits.argmax()))
                        if with_logits:
                            sequence.logits.append(logits.float().cpu())
                        if sequence.tokens[-1] not in end_ids:
                            following[tuple(sequence.tokens)].append(sequence)
                if number == 0:
                    self._count_bytes(sequences)
                groups = [(group, torch.tensor([[tokens[-1]]], device=ids.device)) for tokens, group in following.items()]
        return [
            Continuation(
                adapter.name,
                tuple(sequence.tokens),
                "" if tokenizer is None else tokenizer.decode(sequence.tokens, skip_special_tokens=True),
                torch.stack(sequence.logits) if sequence.logits else None,
            )
            for adapter, sequence in zip(self.adapters, sequences, strict=True)
        ]

    def _advance(self, group: Sequence[_Sequence], ids: torch.Tensor) -> list[torch.Tensor]:
        """Run `ids: [1, T]` through every sequence of a group, whose tokens before are the same; logits `[vocabulary]` of each."""
        depth, blocks = len(self.base.blocks), self.base.blocks
        sharing = [sequence for sequence in group if sequence.start > 0]
        shared_blocks, below, entered = 0, list[DynamicLayer](), dict[int, torch.Tensor]()

        # Step 1: the base model runs up to the highest start, and gives what enters each of the starts.
        if len(sharing) > 1:
            deepest = max(sharing, key=lambda sequence: sequence.start)
            shared_blocks, below = deepest.start, [copy.copy(layer) for layer in deepest.layers]
            entered = hidden_states(lambda: self._run(ids, below), blocks, sorted({sequence.start for sequence in sharing}))
            below = [shared(layer) for layer in below[:shared_blocks]]
        skipped = sum(sequence.start for sequence in sharing) if entered else 0
        run, separate = shared_blocks + len(group) * depth - skipped, len(group) * depth
        if ids.shape[1] > 1 or self.work.prefill_blocks == 0:
            self.work.prefill_blocks += run
            self.work.prefill_blocks_separate += separate
        else:
            self.work.decode_blocks += run
            self.work.decode_blocks_separate += separate

        # Step 2: each adapter goes on from there with its own blocks, and takes the shared keys and values below.
        results = []
        for sequence in group:
            entry = entered.get(sequence.start)
            from_entry = nullcontext() if entry is None else replayed(blocks, sequence.start, entry)
            with switched_on(self.base, sequence.adapter), from_entry:
                results.append(self._run(ids, sequence.layers))
            if entry is not None:
                sequence.layers[: sequence.start] = [copy.copy(layer) for layer in below[: sequence.start]]
        return results

    def _run(self, ids: torch.Tensor, layers: list[DynamicLayer]) -> torch.Tensor:
        """Logits `[vocabulary]` of the last position; the layers of the cache grow by the tokens of `ids`."""
        cache = DynamicCache()
        cache.layers = layers
        last = {"logits_to_keep": 1} if keeps_logits(self.base.model) else {}
        return self.base.model(input_ids=ids, past_key_values=cache, use_cache=True, **last).logits[0, -1]

    def _count_bytes(self, sequences: Sequence[_Sequence]) -> None:
        """Bytes of the keys and values after the prompt, each tensor once, and once for each sequence."""
        held: dict[int, int] = {}
        for layer in (layer for sequence in sequences for layer in sequence.layers):
            tensors = [layer.keys, layer.values]
            if isinstance(layer, (SharedLayer, SharedSlidingLayer)):
                tensors += [layer.prompt_keys, layer.prompt_values]
            for tensor in tensors:
                if tensor is not None and tensor.numel() > 0:
                    held[tensor.data_ptr()] = tensor.nbytes
                    self.work.kv_bytes_separate += tensor.nbytes
        self.work.kv_bytes = sum(held.values())

    def _empty_cache(self) -> list[DynamicLayer]:
        """A cache without tokens, as transformers makes it for this model."""
        return list(DynamicCache(config=self.base.model.config).layers)

    def _ids(self, prompt: str | Sequence[int] | torch.Tensor, count: int) -> torch.Tensor:
        """The prompt as ids `[1, T]` on the model's device."""
        if isinstance(prompt, str):
            if self.base.tokenizer is None:
                raise DataError(f"{self.base.name} has no tokenizer, so a text cannot be read; give token ids")
            prompt = self.base.tokenizer(prompt)["input_ids"]
        ids = torch.as_tensor(prompt, dtype=torch.long).reshape(1, -1)
        vocabulary = self.base.model.get_input_embeddings().weight.shape[0]
        if ids.numel() == 0:
            raise DataError("the prompt is empty; give at least one token")
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise DataError(f"the prompt has ids from {int(ids.min())} to {int(ids.max())}, but the model has 0 to {vocabulary - 1}")
        if count < 1:
            raise DataError(f"{count} new tokens ask for nothing; give 1 or more")
        check_positions(self.base, ids.shape[1], count)
        return ids.to(self.base.device)

    def _check_model(self) -> None:
        """Raise `ModelError` unless a few tokens give the same logits with and without sharing, bit for bit."""
        config, depth, name = self.base.model.config, len(self.base.blocks), self.base.name
        layers = self._empty_cache() if not config.is_encoder_decoder else []
        other = {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
        if config.is_encoder_decoder or other or len(layers) != depth:
            kinds = ", ".join(sorted(other)) or f"{len(layers)} caches for {depth} blocks"
            raise ModelError(f"{name} keeps more than keys and values of each block ({kinds}); serve its adapters one by one")
        ids = torch.arange(CHECK_TOKENS, device=self.base.device).reshape(1, -1)
        alone = [_Sequence(None, 0, self._empty_cache())]
        together = [_Sequence(None, max(1, depth // 2), self._empty_cache()) for _ in range(2)] if depth > 1 else []
        with frozen(self.base.model), torch.no_grad():
            for group in (alone, together):
                for entering in (ids, ids[:, :1]):
                    for sequence, logits in zip(group, self._advance(group, entering), strict=True):
                        sequence.logits.append(logits)
        self.work = Work()
        if any(not torch.equal(torch.stack(sequence.logits), torch.stack(alone[0].logits)) for sequence in together):
            raise ModelError(f"the blocks of {name} hand each other more than hidden states; serve its adapters one by one")
