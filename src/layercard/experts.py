"""A block's experts run one after another, so that what enters and leaves the map of each can be seen and changed.

transformers keeps the experts of a block as stacked parameters `[E, out, in]` and runs them in one of several ways
(`ALL_EXPERTS_FUNCTIONS`); no module's hook sees a single expert. `run_experts` computes the same as all of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

Tap = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Called as `tap(parameter, expert, tokens, x, y)` with the name of the stacked parameter, which of the tokens `[S]` were sent to the
expert, and `x: [S, in]` and `y: [S, out]`; gives what goes on in place of `y`."""


def run_experts(module: Any, tap: Tap, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The forward of an experts module of transformers (`use_experts_implementation`), expert by expert.

    Args:
        module: An `nn.Module` that holds the stacked parameters and says how they are laid out.
        tap: Sees every map's input and output.
        hidden_states: `[N, width]`, padding included.
        top_k_index: The experts of each token, `[N, k]`; a number beyond the last one stands for none.
        top_k_weights: What each of them counts, `[N, k]`.

    Returns:
        `[N, width]`.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    total = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= module.num_experts:
            continue
        tokens, places = torch.where(top_k_index == expert)

        def mapped(name: str, x: torch.Tensor, expert: int = expert, tokens: torch.Tensor = tokens) -> torch.Tensor:
            weight = getattr(module, name)[expert]
            bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
            return tap(name, expert, tokens, x, linear(x, weight.T if module.is_transposed else weight, bias))

        inner = mapped(first, hidden_states[tokens])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        out = mapped("down_proj", inner)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        total.index_add_(0, tokens, (out * top_k_weights[tokens, places, None]).to(total.dtype))
    return total
