"""The generalised Gauss-Newton matrix of a tiny model's mean loss, explicitly."""

from collections.abc import Callable

import torch


def explicit_curvature(logits_of: Callable[[torch.Tensor], torch.Tensor], layers: int, labelled: int) -> torch.Tensor:
    """`K_ℓm = Δ_ℓᵀ F Δ_m` from the Jacobian of the logits along the layers' steps.

    Args:
        logits_of: Logits `[M, V]` of all labelled tokens with `c_ℓ Δ_ℓ` added to the weights, for `c: [L]`.
        layers: L.
        labelled: M, over which the loss is a mean.
    """
    zero = torch.zeros(layers, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(logits_of, zero)  # [M, V, L]
    p = logits_of(zero).softmax(dim=-1)
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("mvl,mvw,mwk->lk", jacobian, hessian, jacobian) / labelled
