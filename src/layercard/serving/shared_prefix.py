"""Keys and values of a block whose first tokens several runs share: read by all, written by none, held once.

For decoding a single sequence token by token; they cannot be cropped, or reordered for beam search.

Several adapters over one prompt: the blocks below an adapter are the base model's, so they run once for all of them.

Let `s_a` be the lowest layer of adapter a. Over the same tokens, the hidden states that enter block `s_a` and the keys and values of the
blocks below it do not depend on a. So one pass of the base model over the prompt, cut off at the largest `s_a`, gives every adapter the
hidden states to start from; then each runs its own blocks `s_a … L − 1`. For N adapters this takes `max_a s_a + Σ_a (L − s_a)` blocks
instead of `N L`, never more.

While decoding, every adapter goes on with its own tokens. As long as the continuations of several adapters agree, the new token's pass
through the lower blocks is shared in the same way; from where they part, each adapter runs all blocks for itself.

Every pass has the shapes that it would have if the adapter ran alone, one sequence at a time, so the logits are equal bit for bit and
not to rounding. Batching the adapters' rows would be faster on a GPU, and would not be equal.

What is held: the keys and values of the prompt in the shared blocks, once; the keys and values of the blocks from `s_a` on, and those of
the tokens decoded in the shared blocks, for each adapter. Attention wants one tensor, so each block's pass makes one of the shared and
the own part and drops it afterwards (transformers' `DynamicCache` makes such a copy too, and keeps it).
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
from layercard.models.load import BaseModel, keeps_logits
from layercard.serving.adapter_switch import Adapter, load_adapter, switched_on

# ---- shared_cache


class SharedLayer(DynamicLayer):
    """A block's cache whose first tokens are another's and are only read: `keys` and `values` hold what came after them."""

    is_croppable = False

    def __init__(self, prompt: DynamicLayer) -> None:
        super().__init__()
        assert prompt.keys is not None and prompt.values is not None
        self.prompt_keys, self.prompt_values = prompt.keys, prompt.values
        self.lazy_initialization(prompt.keys, prompt.values)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the own part; gives keys and values of all tokens `[1, heads, tokens, width]`."""
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
        """Append to the own part; gives keys and values of the window before the new tokens, and theirs."""
        assert self.keys is not None
        own = self.keys.shape[-2] if self.keys.numel() else 0
        inside = max(0, self.sliding_window - 1 - own)  # tokens of the prompt that the window still reaches
        first = max(0, self.prompt_keys.shape[-2] - inside)
        keys, values = super().update(key_states, value_states)
        return torch.cat([self.prompt_keys[:, :, first:], keys], dim=-2), torch.cat([self.prompt_values[:, :, first:], values], dim=-2)


def shared(layer: DynamicLayer) -> DynamicLayer:
    """A layer to append to, beside others that share its tokens."""
    if isinstance(layer, (SharedLayer, SharedSlidingLayer)):
        return layer
    return SharedSlidingLayer(layer) if isinstance(layer, DynamicSlidingWindowLayer) else SharedLayer(layer)


def held_tensors(layer: DynamicLayer) -> tuple[torch.Tensor, ...]:
    """All keys and values that a layer refers to."""
    assert layer.keys is not None and layer.values is not None
    own = (layer.keys, layer.values)
    shared = (layer.prompt_keys, layer.prompt_values) if isinstance(layer, (SharedLayer, SharedSlidingLayer)) else ()
    return tuple(tensor for tensor in (*shared, *own) if tensor.numel() > 0)


# ---- serving

CHECK_TOKENS = 5
"""Tokens of the prompt on which a model is checked for being shareable."""


@dataclass
class Work:
    """What was computed and held, and what it would be if every adapter ran alone.

    Attributes:
        prefill_blocks: Blocks run over the prompt.
        prefill_blocks_separate: Those of separate runs: number of adapters times number of blocks.
        decode_blocks: Blocks run over single new tokens.
        decode_blocks_separate: Those of separate runs.
        kv_bytes: Size of the prompt's keys and values that are held once the prompt is read.
        kv_bytes_separate: That of separate runs.
    """

    prefill_blocks: int = 0
    prefill_blocks_separate: int = 0
    decode_blocks: int = 0
    decode_blocks_separate: int = 0
    kv_bytes: int = 0
    kv_bytes_separate: int = 0


@dataclass(frozen=True)
class Continuation:
    """What one adapter writes after the prompt.

    Attributes:
        adapter: Its name.
        token_ids: The new tokens; the last one is the end token where the adapter came to an end.
        text: The same as text, without special tokens; empty where the model has no tokenizer.
        logits: The logits `[new tokens, vocabulary]` that they were chosen by, on the CPU, where asked for.
    """

    adapter: str
    token_ids: tuple[int, ...]
    text: str
    logits: torch.Tensor | None = None


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
        self.base = base
        self.adapters = tuple(given if isinstance(given, Adapter) else load_adapter(base, given) for given in adapters)
        self.starts = tuple(self._start(adapter) for adapter in self.adapters)
        self.work = Work()
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
        ids = self._ids(prompt, max_new_tokens)
        self.work = Work()
        sequences = [_Sequence(adapter, start, self._empty()) for adapter, start in zip(self.adapters, self.starts, strict=True)]
        with frozen(self.base.model), torch.no_grad():
            self._decode(sequences, ids, max_new_tokens, with_logits=with_logits)
        return [self._continuation(sequence) for sequence in sequences]

    def _decode(self, sequences: Sequence[_Sequence], ids: torch.Tensor, count: int, *, with_logits: bool) -> None:
        """Fill the sequences with up to `count` tokens, all of them one token further in each round."""
        ends = self._end_ids()
        groups: list[tuple[list[_Sequence], torch.Tensor]] = [(list(sequences), ids)]
        for at in range(count):
            following: dict[tuple[int, ...], list[_Sequence]] = defaultdict(list)
            for group, entering in groups:
                for sequence, logits in zip(group, self._advance(group, entering), strict=True):
                    sequence.tokens.append(int(logits.argmax()))
                    if with_logits:
                        sequence.logits.append(logits.float().cpu())
                    if sequence.tokens[-1] not in ends:
                        following[tuple(sequence.tokens)].append(sequence)
            if at == 0:
                self._weigh(sequences)
            groups = [(group, torch.tensor([[tokens[-1]]], device=ids.device)) for tokens, group in following.items()]

    def _advance(self, group: Sequence[_Sequence], ids: torch.Tensor) -> list[torch.Tensor]:
        """Run `ids: [1, T]` through every sequence of a group, whose tokens before are the same; logits `[vocabulary]` of each."""
        depth = len(self.base.blocks)
        sharing = [sequence for sequence in group if sequence.start > 0]
        top, below, entered = 0, list[DynamicLayer](), dict[int, torch.Tensor]()
        if len(sharing) > 1:
            deepest = max(sharing, key=lambda sequence: sequence.start)
            top, below = deepest.start, [copy.copy(layer) for layer in deepest.layers]
            starts = sorted({sequence.start for sequence in sharing})
            entered = hidden_states(lambda: self._run(ids, below), self.base.blocks, starts)
            below = [shared(layer) for layer in below[:top]]
        self._count(ids, top, len(group) * depth - sum(sequence.start for sequence in sharing if entered), len(group) * depth)
        found = []
        for sequence in group:
            entry = entered.get(sequence.start)
            from_entry = nullcontext() if entry is None else replayed(self.base.blocks, sequence.start, entry)
            with switched_on(self.base, sequence.adapter), from_entry:
                found.append(self._run(ids, sequence.layers))
            if entry is not None:
                sequence.layers[: sequence.start] = [copy.copy(layer) for layer in below[: sequence.start]]
        return found

    def _run(self, ids: torch.Tensor, layers: list[DynamicLayer]) -> torch.Tensor:
        """Logits `[vocabulary]` of the last position; the layers of the cache grow by the tokens of `ids`."""
        cache = DynamicCache()
        cache.layers = layers
        last = {"logits_to_keep": 1} if keeps_logits(self.base.model) else {}
        return self.base.model(input_ids=ids, past_key_values=cache, use_cache=True, **last).logits[0, -1]

    def _count(self, ids: torch.Tensor, shared: int, own: int, separate: int) -> None:
        if ids.shape[1] > 1 or self.work.prefill_blocks == 0:
            self.work.prefill_blocks += shared + own
            self.work.prefill_blocks_separate += separate
        else:
            self.work.decode_blocks += shared + own
            self.work.decode_blocks_separate += separate

    def _weigh(self, sequences: Sequence[_Sequence]) -> None:
        """Bytes of the keys and values after the prompt, each tensor once, and once for each sequence."""
        held: dict[int, int] = {}
        for tensor in (tensor for sequence in sequences for layer in sequence.layers for tensor in held_tensors(layer)):
            held[tensor.data_ptr()] = tensor.nbytes
            self.work.kv_bytes_separate += tensor.nbytes
        self.work.kv_bytes = sum(held.values())

    def _continuation(self, sequence: _Sequence) -> Continuation:
        assert sequence.adapter is not None
        tokenizer = self.base.tokenizer
        text = tokenizer.decode(sequence.tokens, skip_special_tokens=True) if tokenizer is not None else ""
        logits = torch.stack(sequence.logits) if sequence.logits else None
        return Continuation(sequence.adapter.name, tuple(sequence.tokens), text, logits)

    def _empty(self) -> list[DynamicLayer]:
        """A cache without tokens, as transformers makes it for this model."""
        return list(DynamicCache(config=self.base.model.config).layers)

    def _start(self, adapter: Adapter) -> int:
        """The block that an adapter starts from: its lowest one, and the last where it changes the head alone."""
        head = {path for path, module in self.base.model.named_modules() if module is self.base.model.get_output_embeddings()}
        early = [path for path in adapter.outside if path not in head]
        if early:
            raise PlacementError(f"adapter {adapter.name} changes {early[0]}, so no block is the base model's; serve it by itself")
        return min(adapter.layers, default=len(self.base.blocks) - 1)

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
        limit = getattr(self.base.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if isinstance(limit, int) and ids.shape[1] + count > limit:
            raise DataError(f"{ids.shape[1]} tokens and {count} new ones exceed the {limit} positions of {self.base.name}; take fewer")
        return ids.to(self.base.device)

    def _end_ids(self) -> set[int]:
        settings = self.base.model.generation_config
        found = settings.eos_token_id if settings is not None else None
        return set(found) if isinstance(found, list) else set() if found is None else {int(found)}

    def _check_model(self) -> None:
        """Raise `ModelError` unless a few tokens give the same logits with and without sharing, bit for bit."""
        config, depth, name = self.base.model.config, len(self.base.blocks), self.base.name
        layers = self._empty() if not config.is_encoder_decoder else []
        other = {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
        if config.is_encoder_decoder or other or len(layers) != depth:
            found = ", ".join(sorted(other)) or f"{len(layers)} caches for {depth} blocks"
            raise ModelError(f"{name} keeps more than keys and values of each block ({found}); serve its adapters one by one")
        ids = torch.arange(CHECK_TOKENS, device=self.base.device).reshape(1, -1)
        alone = [_Sequence(None, 0, self._empty())]
        together = [_Sequence(None, max(1, depth // 2), self._empty()) for _ in range(2)] if depth > 1 else []
        with frozen(self.base.model), torch.no_grad():
            for group in (alone, together):
                for entering in (ids, ids[:, :1]):
                    for sequence, logits in zip(group, self._advance(group, entering), strict=True):
                        sequence.logits.append(logits)
        self.work = Work()
        if any(not torch.equal(torch.stack(sequence.logits), torch.stack(alone[0].logits)) for sequence in together):
            raise ModelError(f"the blocks of {name} hand each other more than hidden states; serve its adapters one by one")
