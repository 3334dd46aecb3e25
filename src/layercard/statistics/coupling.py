"""Layer coupling in the local quadratic model of the loss.

With the layers' own steps `Δ_ℓ` and the generalised Gauss-Newton matrix F of the mean loss,

    K_ℓm = Δ_ℓᵀ F Δ_m,   b_ℓ = -⟨G, Δ_ℓ⟩,   ρ_ℓm = K_ℓm / √(K_ℓℓ K_mm).

F is the covariance of gradients whose labels are drawn from the model itself, so with `s_ℓn`, the derivative along `Δ_ℓ` of the
summed loss of record n under drawn labels, `E[s_ℓ s_m]` summed over records and divided by the labelled tokens is `K_ℓm`: no
matrix is formed. Everything here starts from these scalars, so a bootstrap over records costs next to nothing.
Source: arXiv 2602.04019 (coupling), Schraudolph 2002 and Martens 2020 (Gauss-Newton and Fisher).
"""

import math

import torch

_FLOOR = 1e-12


def curvature(slopes_sln: torch.Tensor, tokens_n: torch.Tensor, weights_n: torch.Tensor | None = None) -> torch.Tensor:
    """`K: [L, L]` from drawn-label slopes.

    Args:
        slopes_sln: `[samples, L, records]`, derivative of each record's summed loss along each layer's step.
        tokens_n: Labelled tokens of each record.
        weights_n: How often each record counts (bootstrap); once unless given.
    """
    weights = torch.ones_like(tokens_n) if weights_n is None else weights_n
    weighted = slopes_sln * weights
    return torch.einsum("sln,smn->lm", weighted, slopes_sln) / (slopes_sln.shape[0] * (weights * tokens_n).sum())


def descent(slopes_ln: torch.Tensor, tokens_n: torch.Tensor, weights_n: torch.Tensor | None = None) -> torch.Tensor:
    """`b: [L] = -⟨G, Δ_ℓ⟩` from true-label slopes `[L, records]`: first-order decrease of the mean loss, nats."""
    weights = torch.ones_like(tokens_n) if weights_n is None else weights_n
    return -(slopes_ln * weights).sum(dim=1) / (weights * tokens_n).sum()


def correlation(curvature_lm: torch.Tensor) -> torch.Tensor:
    """`ρ: [L, L]`, ones on the diagonal; a layer without curvature couples with none."""
    diagonal = curvature_lm.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(diagonal, diagonal)
    rho = torch.where(scale > _FLOOR * scale.max(), curvature_lm / scale.clamp(min=torch.finfo(scale.dtype).tiny), torch.zeros_like(scale))
    rho = rho.clamp(-1, 1)
    rho.fill_diagonal_(1.0)
    return rho


def single_gain(descent_l: torch.Tensor, curvature_lm: torch.Tensor) -> torch.Tensor:
    """`½ b²/K: [L]`, the decrease that the quadratic model predicts for each layer alone; 0 where the step leads uphill."""
    diagonal = curvature_lm.diagonal()
    usable = (diagonal > 0) & (descent_l > 0)
    return torch.where(usable, 0.5 * descent_l.square() / diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny), torch.zeros_like(descent_l))


def centrality(rho_lm: torch.Tensor, other_lm: torch.Tensor | None = None) -> torch.Tensor:
    """`c_ℓ = Σ_j ρ_jℓ ρ'_jℓ: [L]`: how much of what the other layers correct this layer can correct too.

    ρ' is a second measurement of ρ, with other steps on other records. The product of two has no bias; the square of one, which is taken
    where there is no other, is too large by the variance of its noise.
    """
    return (rho_lm * (rho_lm if other_lm is None else other_lm)).sum(dim=0)


def best_lengths(descent_l: torch.Tensor, curvature_lm: torch.Tensor) -> torch.Tensor:
    """`b_ℓ / K_ℓℓ: [L]`, where the quadratic model puts its minimum along each layer's step; their median where a step leads uphill."""
    diagonal = curvature_lm.diagonal()
    usable = (diagonal > 0) & (descent_l > 0)
    lengths = torch.where(usable, descent_l / diagonal.clamp(min=_FLOOR), torch.full_like(descent_l, math.nan))
    median = lengths.nanmedian()
    return torch.where(usable, lengths, median if not median.isnan() else torch.ones_like(median))
