"""Explicit whitening, steps and ranks of one linear map, from all its tokens at once."""

import torch


def whitened(a_ti: torch.Tensor, d_to: torch.Tensor, ridge: float) -> torch.Tensor:
    """`G Σ_λ^(-1/2)` by an eigendecomposition, with `G = (1/N) Σ δ aᵀ`."""
    a, d = a_ti.double(), d_to.double()
    values, vectors = torch.linalg.eigh(a.T @ a / len(a) + ridge * torch.eye(a.shape[1], dtype=torch.float64))
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    return (d.T @ a / len(a)) @ root


def step(a_ti: torch.Tensor, d_to: torch.Tensor, ridge: float) -> torch.Tensor:
    """`Δ = -G Σ_λ⁻¹` by an explicit inverse."""
    a, d = a_ti.double(), d_to.double()
    inverse = torch.linalg.inv(a.T @ a / len(a) + ridge * torch.eye(a.shape[1], dtype=torch.float64))
    return -(d.T @ a / len(a)) @ inverse


def best_decrease(a_ti: torch.Tensor, error_to: torch.Tensor) -> float:
    """How much `½ (1/N) Σ ‖e_t + D a_t‖²` can fall over all matrices D, by least squares."""
    a, e = a_ti.double(), error_to.double()
    solution = torch.linalg.lstsq(a, -e, driver="gelsd").solution
    before, after = e.square().sum(), (e + a @ solution).square().sum()
    return float(0.5 * (before - after) / len(a))
