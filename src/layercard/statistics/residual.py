"""Projected residual norm: what a linear adapter on one map could still correct.

With `Σ_λ = Σ + λI`, the adapter's own optimal step is `Δ = -G Σ_λ⁻¹` and

    resnorm² = ‖G Σ_λ^(-1/2)‖_F² = -⟨G, Δ⟩.

For squared loss and a linear adapter on the map's output, `½ resnorm²` at λ = 0 is the largest possible decrease of the loss
(the proof by `lstsq` is in the tests). Restricted to rank r, the best step keeps the r largest singular values of
`G Σ_λ^(-1/2)`: these are the square roots of the top eigenvalues of `G Σ_λ⁻¹ Gᵀ = -G Δᵀ`, with eigenvectors `U_r`, and the step is
`Δ_r = U_r U_rᵀ Δ`. So neither a square root nor an eigendecomposition of Σ is needed: one Cholesky factorisation and products
with r + 8 columns are enough. Source: arXiv 2602.04019 (resnorm), Halko, Martinsson and Tropp 2011 (randomised range finder).
"""

from dataclasses import dataclass

import torch

from layercard.statistics.moments import GradientMoments, InputMoments

_OVERSAMPLING = 8
_ITERATIONS = 3


def ridge_scale(inputs: InputMoments) -> float:
    """The energy against which λ is measured, robust to massive activations.

    It is the smaller of two medians: of `‖a_t‖² / in` over tokens and of `E a_i²` over features. A few massive tokens leave
    the first alone, a few massive features the second; `tr Σ / in`, the usual choice, is raised a thousandfold by either.
    """
    scale = inputs.typical_energy()
    return scale if scale > 0 else 1.0


@dataclass(frozen=True)
class Whitening:
    """The factorised `Σ_λ` of one input, in the cheaper of two forms.

    Attributes:
        ridge: λ itself, in units of Σ.
        tokens: N.
        factor: Cholesky factor of `Σ_λ: [in, in]`, or of `A Aᵀ/N + λI: [N, N]` where `rows` is given.
        rows: `A = a_ti: [N, in]` in the N×N form, else nothing.
        second_moment: `Σ: [in, in]`, in the d×d form only.
    """

    ridge: float
    tokens: int
    factor: torch.Tensor
    rows: torch.Tensor | None
    second_moment: torch.Tensor | None

    @classmethod
    def of(cls, inputs: InputMoments, ridge: float) -> "Whitening":
        """Factorise; `ridge` is λ in units of Σ and must be positive."""
        rows = inputs.rows() if inputs.keep_rows else None
        gram = rows @ rows.T / inputs.count if rows is not None else inputs.second_moment()
        shifted = gram.clone()
        shifted.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) != 0:  # rounding made the smallest eigenvalue negative: once more in double precision
            double = gram.double()
            double.diagonal().add_(ridge)
            factor = torch.linalg.cholesky(double).to(gram.dtype)
        return cls(ridge, inputs.count, factor, rows, None if rows is not None else gram)

    def solve(self, x_io: torch.Tensor) -> torch.Tensor:
        """`Σ_λ⁻¹ x` for columns `x: [in, k]`."""
        if self.rows is None:
            return torch.cholesky_solve(x_io, self.factor)
        inner = torch.cholesky_solve(self.rows @ x_io, self.factor)
        return (x_io - self.rows.T @ inner / self.tokens) / self.ridge

    def times_second_moment(self, x_io: torch.Tensor) -> torch.Tensor:
        """`Σ x` for columns `x: [in, k]`."""
        if self.rows is None:
            assert self.second_moment is not None
            return self.second_moment @ x_io
        return self.rows.T @ (self.rows @ x_io) / self.tokens

    def noise_trace(self) -> float:
        """`tr(Σ Σ_λ⁻²)`, the amplification of gradient noise by the step `Δ = -G Σ_λ⁻¹` (per unit of noise and token)."""
        inverse = torch.cholesky_inverse(self.factor)
        return float((inverse.diagonal().double().sum() - self.ridge * inverse.double().square().sum()).clamp(min=0))

    def condition(self, iterations: int = 10) -> tuple[float, torch.Tensor]:
        """Condition number of `Σ_λ` by power iteration, and the top eigenvector `[in]`."""
        width = self.factor.shape[0] if self.rows is None else self.rows.shape[1]
        start = torch.ones(width, 1, dtype=self.factor.dtype, device=self.factor.device)
        top = start / start.norm()
        for _ in range(iterations):
            top = self.times_second_moment(top)
            top = top / top.norm().clamp(min=torch.finfo(top.dtype).tiny)
        largest = float((top * self.times_second_moment(top)).sum()) + self.ridge
        if self.rows is not None and self.rows.shape[0] < width:
            return largest / self.ridge, top[:, 0]
        low = torch.randn(width, 1, generator=torch.Generator().manual_seed(0)).to(start)
        for _ in range(iterations):
            low = self.solve(low / low.norm())
        smallest = 1.0 / float(low.norm())
        return largest / max(smallest, self.ridge), top[:, 0]


@dataclass(frozen=True)
class ProjectedResidual:
    """Projected residual of one map.

    Attributes:
        squared: `resnorm² = ‖G Σ_λ^(-1/2)‖_F²`, nats.
        squared_rank: The same for the r largest singular values.
        gradient_squared: `‖G‖_F²`.
        step_squared: `‖Δ‖_F²`.
        gradient: `G: [out, in]`.
        step: `Δ: [out, in]`.
        down: `A: [r, in]` of the rank-r step `Δ_r = B A`.
        up: `B: [out, r]`, orthonormal columns.
    """

    squared: float
    squared_rank: float
    gradient_squared: float
    step_squared: float
    gradient: torch.Tensor
    step: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor


def projected_residual(
    inputs: InputMoments, gradients: GradientMoments, whitening: Whitening, scale: float, rank: int
) -> ProjectedResidual:
    """Resnorm and optimal steps of one map.

    Args:
        inputs: Moments of its input.
        gradients: Moments of its output gradient.
        whitening: Factorised `Σ_λ` of its input.
        scale: One over the number of labelled tokens.
        rank: Rank r of the limited step.
    """
    gradient = gradients.gradient(inputs, scale)
    if whitening.rows is None:
        step = -whitening.solve(gradient.T).T
    else:  # push-through identity: Aᵀ (A Aᵀ/N + λ)⁻¹ = (Aᵀ A/N + λ)⁻¹ Aᵀ
        step = -scale * torch.cholesky_solve(gradients.rows(), whitening.factor).T @ whitening.rows
    squared = -float((gradient.double() * step.double()).sum())
    values, up = top_eigenvectors(gradient, -step, rank)
    return ProjectedResidual(
        squared=max(squared, 0.0),
        squared_rank=float(values.sum()),
        gradient_squared=float(gradient.double().square().sum()),
        step_squared=float(step.double().square().sum()),
        gradient=gradient,
        step=step,
        down=up.T @ step,
        up=up,
    )


def top_eigenvectors(left_oi: torch.Tensor, right_oi: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest eigenvalues `[r]` and eigenvectors `[out, r]` of the positive semidefinite `left rightᵀ`, by block power iteration."""
    outputs, features = left_oi.shape
    width = min(rank + _OVERSAMPLING, outputs, features)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(outputs, width, generator=generator, dtype=torch.float32).to(left_oi)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(left_oi @ (right_oi.T @ basis)).Q
    small = (basis.T @ left_oi) @ (right_oi.T @ basis)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    kept = min(rank, width)
    return values.flip(0)[:kept].clamp(min=0), (basis @ vectors.flip(1))[:, :kept]
