"""AdaLoRA in a training loop: ranks are shared out while it trains, by how much each singular value has mattered so far.

PEFT keeps those importances in memory only and cuts saved weights to the ranks of the moment, so that a run could not go on from a
checkpoint. Here both are kept whole beside it.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from safetensors.torch import load_file, save_file

from layercard.errors import TrainingError

STATE_FILE = "allocation.safetensors"
ORTHOGONALITY = 0.5
"""Weight of the penalty for singular vectors that are not orthonormal, as in the paper (arXiv 2303.10512) and PEFT's default."""
_HISTORIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankAllocation:
    """What AdaLoRA needs of each step, and of each checkpoint."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.config: Any = model.peft_config["default"]
        self.allocator: Any = model.base_model.rankallocator

    @classmethod
    def of(cls, model: PeftModel) -> "RankAllocation | None":
        """That of a model with AdaLoRA adapters; `None` for any other method."""
        return cls(model) if model.peft_config["default"].peft_type == PeftType.ADALORA else None

    def penalty(self) -> torch.Tensor:
        """`ORTHOGONALITY` times the mean of `‖A Aᵀ − I‖_F` and `‖Bᵀ B − I‖_F` over all adapters, A `[r, in]`, B `[out, r]`."""
        terms = []
        for name, weight in self.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                product = weight @ weight.T if ".lora_A." in name else weight.T @ weight
                terms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=weight.device, dtype=weight.dtype)))
        return ORTHOGONALITY * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        """Count importances and share out ranks after update number `step`, counted from 1, while its gradients are there."""
        self.model.base_model.update_and_allocate(step)

    def save(self, folder: Path) -> None:
        """Keep weights of full size, importances and ranks beside a checkpoint."""
        tensors = {f"weight.{name}": weight.detach().contiguous() for name, weight in self._weights().items()}
        for history in _HISTORIES:
            tensors |= {f"{history}.{name}": value.contiguous() for name, value in getattr(self.allocator, history).items()}
        tensors |= {f"rank.{name}": torch.tensor(kept) for name, kept in (self.config.rank_pattern or {}).items()}
        save_file(tensors, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` kept.

        Raises:
            TrainingError: The checkpoint has no such file, or it is of other adapters.
        """
        file = folder / STATE_FILE
        if not file.is_file():
            raise TrainingError(f"{folder} lacks {STATE_FILE}; start again with --force")
        parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("weight", "rank", *_HISTORIES)}
        for key, value in load_file(file).items():
            kind, _, name = key.partition(".")
            parts[kind][name] = value
        weights = self._weights()
        if parts["weight"].keys() != weights.keys():
            raise TrainingError(f"{file} is of other adapters; start again with --force")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(parts["weight"][name])
        for history in _HISTORIES:
            setattr(self.allocator, history, {name: value.to(weights[name].device) for name, value in parts[history].items()})
        self.config.rank_pattern = {name: kept.tolist() for name, kept in parts["rank"].items()} or None

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        """The trained weights by the names that the allocator knows them by."""
        return {name: weight for name, weight in self.model.get_base_model().named_parameters() if weight.requires_grad}
