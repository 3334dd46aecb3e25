"""Experts by the definition: one token and one expert after another, in float64."""

import torch
from torch import nn

Rows = dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]]
"""For each stacked parameter and expert the input `[in]` of every token that was sent there and the gradient `[out]` of what came out."""


def rows_by_token(
    module: nn.Module, hidden_tw: torch.Tensor, index_tk: torch.Tensor, weights_tk: torch.Tensor, slope_tw: torch.Tensor
) -> Rows:
    """What enters each expert's two maps and the gradient of what leaves them.

    Args:
        module: A gated experts module of transformers.
        hidden_tw: What entered it.
        index_tk: The experts of each token.
        weights_tk: What each of them counts.
        slope_tw: Gradient of the loss with respect to what left it.
    """
    found: Rows = {}
    for hidden, experts, weights, slope in zip(hidden_tw, index_tk.tolist(), weights_tk, slope_tw, strict=True):
        for expert, weight in zip(experts, weights, strict=True):
            first = _map(module, "gate_up_proj", expert, hidden).detach().requires_grad_()
            inner = module._apply_gate(first[None])[0]
            last = _map(module, "down_proj", expert, inner)
            found.setdefault(("down_proj", expert), []).append((inner.detach(), weight * slope))
            (back,) = torch.autograd.grad(weight * last @ slope, first)
            found.setdefault(("gate_up_proj", expert), []).append((hidden, back))
    return found


def _map(module: nn.Module, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = module.get_parameter(name)[expert]
    y = weight.T @ x if module.is_transposed else weight @ x
    return y + module.get_parameter(f"{name}_bias")[expert] if module.has_bias else y


def resnorm_squared(rows: list[tuple[torch.Tensor, torch.Tensor]], tokens: int, labelled: int, ridge: float) -> float:
    """`‖G (Σ + λI)^(-1/2)‖²` of one expert's map, `G = Σ δ aᵀ / labelled` and `Σ = Σ a aᵀ / tokens`, by an eigendecomposition."""
    gradient = sum(torch.outer(d, a) for a, d in rows) / labelled
    second = sum(torch.outer(a, a) for a, _ in rows) / tokens
    values, vectors = torch.linalg.eigh(second)
    return float(((gradient @ vectors) / (values + ridge).sqrt()).square().sum())
