"""Adapter methods by name: the PEFT configuration of each, and what AdaLoRA needs of each step.

A card's `resnorm_rank` bounds what an update of rank r can take out of the residual; which methods stay within that bound, and which
figures of a card hold for the others, is in the table of docs/adapters.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, PeftType
from safetensors.torch import load_file, save_file

from layercard.errors import PlacementError, TrainingError
from layercard.selection.placement import Placement
from layercard.settings import TrainSettings, integer_if_whole


@dataclass(frozen=True)
class Method:
    """One method."""

    config: type[PeftConfig]  # class of PEFT
    names: Mapping[str, str]  # what it calls `rank`, `alpha` and `dropout`, as far as it has them
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what else it is given
    seed: str = ""  # what it calls the seed of random matrices that are not trained
    one_rank: bool = False  # all adapters must have one rank: it begins or is saved in a way that shares or doubles ranks


_LORA = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_BEGUN = {"rank": "r", "alpha": "lora_alpha"}  # the adapter holds a part of the weight itself, which dropout would drop
_RANDOM = "projection_prng_key"

METHODS: dict[str, Method] = {
    "lora": Method(peft.LoraConfig, _LORA),
    "rslora": Method(peft.LoraConfig, _LORA, {"use_rslora": True}),
    "dora": Method(peft.LoraConfig, _LORA, {"use_dora": True}),
    "pissa": Method(peft.LoraConfig, _BEGUN, {"init_lora_weights": "pissa_niter_16"}, one_rank=True),
    "olora": Method(peft.LoraConfig, _BEGUN, {"init_lora_weights": "olora"}, one_rank=True),
    "eva": Method(peft.LoraConfig, _LORA, {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)}, one_rank=True),
    "adalora": Method(peft.AdaLoraConfig, _LORA | {"rank": "target_r"}, {"orth_reg_weight": 0.0}),  # `RankAllocation` adds it
    "loha": Method(peft.LoHaConfig, {"rank": "r", "alpha": "alpha"}),
    "lokr": Method(peft.LoKrConfig, {"rank": "r", "alpha": "alpha"}),
    "vera": Method(peft.VeraConfig, {"rank": "r", "dropout": "vera_dropout"}, seed=_RANDOM),
    "randlora": Method(peft.RandLoraConfig, {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"}, seed=_RANDOM),
    "delora": Method(peft.DeloraConfig, {"rank": "r"}),
    "hira": Method(peft.HiraConfig, {"rank": "r", "dropout": "hira_dropout"}),
    "hra": Method(peft.HRAConfig, {"rank": "r"}),
    "miss": Method(peft.MissConfig, {"rank": "r", "dropout": "miss_dropout"}),
    "ia3": Method(peft.IA3Config, {}),
    "oft": Method(peft.OFTConfig, {}),
    "boft": Method(peft.BOFTConfig, {"dropout": "boft_dropout"}),
}
"""Every name in `settings.METHODS`."""

REWRITING = ("pissa", "olora")
"""Methods that take their first adapter out of the weights; saved, they are plain LoRA of twice the rank on the weights as they were."""

WARMUP, FINAL = 0.1, 0.3
"""Shares of the steps in which AdaLoRA keeps all ranks at the beginning, and has shared them out at the end."""
GROWTH = 1.5
"""AdaLoRA begins with this many times the rank that it ends with on average, as in PEFT's defaults."""


def configuration(settings: TrainSettings, steps: int, placement: Placement) -> PeftConfig:
    """The PEFT configuration of a training run of `steps` updates, without a choice of modules.

    Raises:
        PlacementError: The placement gives ranks to single modules, and the method has one rank for all.
        TrainingError: There are too few steps for AdaLoRA.
    """
    method = METHODS[settings.method]
    if method.one_rank and placement.rank_pattern:
        raise PlacementError(
            f"{settings.method} has one rank for all modules, but the placement gives ranks; select without ranks, or use lora"
        )
    values = {theirs: getattr(settings, name) for name, theirs in method.names.items()}
    if "alpha" in method.names:
        values[method.names["alpha"]] = integer_if_whole(settings.alpha)
    if method.seed:
        values[method.seed] = settings.seed
    if method.config is peft.AdaLoraConfig:
        if steps < 2:
            raise TrainingError("adalora shares out ranks between its first step and its last; give at least 2 steps")
        values |= {
            "init_r": math.ceil(GROWTH * settings.rank),
            "total_step": steps,
            "tinit": int(WARMUP * steps),
            "tfinal": int(FINAL * steps),
            "deltaT": max(1, steps // 100),
        }
    return method.config(**method.fixed, **values)


# AdaLoRA

STATE_FILE = "allocation.safetensors"
ORTHOGONALITY = 0.5
"""Weight of the penalty for singular vectors that are not orthonormal, as in the paper (arXiv 2303.10512) and PEFT's default."""
_HISTORIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankAllocation:
    """AdaLoRA shares out ranks while it trains, by how much each singular value has mattered so far.

    PEFT keeps those importances in memory only and cuts saved weights to the ranks of the moment, so that a run could not go on from a
    checkpoint. Here both are saved whole beside it.
    """

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
        """Save weights of full size, importances and ranks beside a checkpoint."""
        tensors = {f"weight.{name}": weight.detach().contiguous() for name, weight in self._weights().items()}
        for history in _HISTORIES:
            tensors |= {f"{history}.{name}": value.contiguous() for name, value in getattr(self.allocator, history).items()}
        tensors |= {f"rank.{name}": torch.tensor(mask) for name, mask in (self.config.rank_pattern or {}).items()}
        save_file(tensors, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote.

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
        self.config.rank_pattern = {name: mask.tolist() for name, mask in parts["rank"].items()} or None

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        """The trained weights by the names that the allocator knows them by."""
        return {name: weight for name, weight in self.model.get_base_model().named_parameters() if weight.requires_grad}
