"""Streaming sums over token positions.

Letters used in all of `statistics`: `t` token, `i` input feature, `o` output feature, `r` rank, `l` or `m` layer, `n` record.
`a_ti` is the input of a linear map, `d_to` the gradient of the batch's *summed* loss with respect to its output; dividing by
the number of labelled tokens, as the mean loss asks, is left to the end (`scale`), so that sums over batches just add.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch

_STRIPES = 4
AddUp = Callable[[torch.Tensor], None]
"""Puts the sum over all processes in place of a tensor's values."""
Stacked = Callable[[torch.Tensor], list[torch.Tensor]]
"""Gives the rows that each process has."""


@dataclass
class InputMoments:
    """`Σ a aᵀ` over tokens, or the tokens themselves where there are fewer of them than features.

    Attributes:
        features: Width of the input.
        keep_rows: Keep `a_ti` instead of the `[in, in]` sum: the N×N form of the same formulas.
        tokens: Number of tokens so far.
        energies: `‖a_t‖²` of each token, one tensor a batch.
        absent: Tokens that never enter the map, as an expert sees only those sent to it; they count as zeros.
    """

    features: int
    keep_rows: bool = False
    tokens: int = 0
    energies: list[torch.Tensor] = field(default_factory=list)
    absent: int = 0
    _sum: torch.Tensor | None = None
    _rows: list[torch.Tensor] = field(default_factory=list)

    def update(self, a_ti: torch.Tensor) -> None:
        """Add the tokens of a batch, `[tokens, in]`; sums are in float32 or better."""
        a_ti = a_ti.to(torch.promote_types(a_ti.dtype, torch.float32))
        self.tokens += a_ti.shape[0]
        self.energies.append(a_ti.square().sum(dim=1))
        if self.keep_rows:
            self._rows.append(a_ti.clone())
            return
        if self._sum is None:
            self._sum = torch.zeros(self.features, self.features, dtype=a_ti.dtype, device=a_ti.device)
        _add_gram(self._sum, a_ti)

    def across(self, add_up: AddUp, stacked: Stacked) -> None:
        """Merge with the instances of all other processes, which do the same; each must have seen an `update`, be it of no token."""
        self.energies = stacked(torch.cat(self.energies))
        self.tokens = sum(len(part) for part in self.energies)
        if self._sum is not None:
            add_up(self._sum)
        else:
            self._rows = stacked(self.rows())

    @property
    def count(self) -> int:
        """N: tokens that entered and tokens that are absent."""
        return self.tokens + self.absent

    def second_moment(self) -> torch.Tensor:
        """`Σ = (1/N) Σ_t a_t a_tᵀ`, `[in, in]`."""
        if self.keep_rows:
            rows = self.rows()
            return rows.T @ rows / self.count
        if self._sum is None:
            raise ValueError("no token seen; update before asking for the second moment")
        return (self._sum.triu() + self._sum.triu(1).T) / self.count

    def rows(self) -> torch.Tensor:
        """The tokens `a_ti: [tokens, in]`, kept only with `keep_rows`."""
        return torch.cat(self._rows)

    def energy(self) -> float:
        """Activation energy `tr Σ`: mean squared norm of the input of a token."""
        return float(torch.cat(self.energies).double().sum()) / self.count

    def typical_energy(self) -> float:
        """Energy of a typical token that enters in a typical feature, times the share of tokens that do; see `ridge_scale`."""
        per_token = torch.cat(self.energies).double().median() / self.features * self.tokens / self.count
        squares = self.rows().square().sum(dim=0) if self._sum is None else self._sum.diagonal()
        return float(torch.minimum(per_token, (squares / self.count).double().median()))


def _add_gram(total_ij: torch.Tensor, a_ti: torch.Tensor) -> None:
    """Add `aᵀ a` to the upper triangle of `total`, stripe by stripe: five eighths of the work of the whole product."""
    width = total_ij.shape[0]
    bounds = [width * stripe // _STRIPES for stripe in range(_STRIPES + 1)]
    for low, high in pairwise(bounds):
        if high > low:
            total_ij[low:high, low:].addmm_(a_ti[:, low:high].T, a_ti[:, low:])


@dataclass
class GradientMoments:
    """`Σ δ aᵀ` over tokens, or the output gradients themselves where the input keeps its rows.

    Attributes:
        outputs: Width of the output.
        features: Width of the input.
        keep_rows: As in `InputMoments`.
        residual: `Σ_t ‖δ_t‖²` so far.
    """

    outputs: int
    features: int
    keep_rows: bool = False
    residual: float = 0.0
    _sum: torch.Tensor | None = None
    _rows: list[torch.Tensor] = field(default_factory=list)

    def update(self, a_ti: torch.Tensor, d_to: torch.Tensor) -> None:
        """Add the tokens of a batch, `[tokens, in]` and `[tokens, out]`."""
        dtype = torch.promote_types(d_to.dtype, torch.float32)
        a_ti, d_to = a_ti.to(dtype), d_to.to(dtype)
        self.residual += float(d_to.square().sum())
        if self.keep_rows:
            self._rows.append(d_to.clone())
            return
        if self._sum is None:
            self._sum = torch.zeros(self.outputs, self.features, dtype=dtype, device=d_to.device)
        self._sum.addmm_(d_to.T, a_ti)

    def across(self, add_up: AddUp, stacked: Stacked) -> None:
        """As `InputMoments.across`; rows come in the same order as there."""
        residual = torch.tensor([self.residual], dtype=torch.float64)
        add_up(residual)
        self.residual = float(residual)
        if self._sum is not None:
            add_up(self._sum)
        else:
            self._rows = stacked(self.rows())

    def gradient(self, inputs: InputMoments, scale: float) -> torch.Tensor:
        """`G: [out, in] = scale · Σ_t δ_t a_tᵀ`.

        With `scale` one over the labelled tokens it is autograd's weight gradient of the mean loss.
        """
        if self.keep_rows:
            return scale * (self.rows().T @ inputs.rows())
        if self._sum is None:
            raise ValueError("no token seen; update before asking for the gradient")
        return scale * self._sum

    def rows(self) -> torch.Tensor:
        """The output gradients `d_to: [tokens, out]`, kept only with `keep_rows`."""
        return torch.cat(self._rows)

    def residual_energy(self, tokens: int, scale: float) -> float:
        """`E‖δ‖²`, where δ is scaled such that `G = (1/N) Σ δ aᵀ`: `N · scale² · Σ‖δ_t‖²`."""
        return tokens * scale**2 * self.residual
