"""Keys and values of a block whose first tokens several runs share: read by all, written by none, held once.

For decoding a single sequence token by token; they cannot be cropped, or reordered for beam search.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


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
