"""`gain_estimate`: how much LoRA in one layer alone will reduce the loss, from what can be measured without training."""

import torch

from layercard.statistics.coupling import centrality


def gain_estimate(rho_lm: torch.Tensor, step_probe_l: torch.Tensor | None, predicted_l: torch.Tensor) -> torch.Tensor:
    """Placeholder combination."""
    base = predicted_l if step_probe_l is None else step_probe_l
    return base * centrality(rho_lm) / rho_lm.shape[0]
