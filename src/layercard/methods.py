"""Adapter methods by name: the PEFT configuration of each, and what a card can say about it.

A card's `resnorm_rank` bounds what an update of rank r can take out of the residual; which methods stay within that bound, and which
figures of a card hold for the others, is in the table of docs/adapters.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import (
    AdaLoraConfig,
    BOFTConfig,
    DeloraConfig,
    EvaConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    RandLoraConfig,
    VeraConfig,
)

from layercard.errors import PlacementError, TrainingError
from layercard.selection import Placement
from layercard.settings import TrainSettings, whole


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        config: PEFT's configuration class.
        names: What it calls `rank`, `alpha` and `dropout`, as far as it has them.
        fixed: What else it is given.
        seed: What it calls the seed of random matrices that are not trained; empty where there are none.
        one_rank: Whether all its adapters must have one rank: it begins or is saved in a way that shares or doubles ranks.
    """

    config: type[PeftConfig]
    names: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    seed: str = ""
    one_rank: bool = False


_LORA = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_BEGUN = {"rank": "r", "alpha": "lora_alpha"}  # the adapter holds a part of the weight itself, which dropout would drop

METHODS: dict[str, Method] = {
    "lora": Method(LoraConfig, _LORA),
    "rslora": Method(LoraConfig, _LORA, {"use_rslora": True}),
    "dora": Method(LoraConfig, _LORA, {"use_dora": True}),
    "pissa": Method(LoraConfig, _BEGUN, {"init_lora_weights": "pissa_niter_16"}, one_rank=True),
    "olora": Method(LoraConfig, _BEGUN, {"init_lora_weights": "olora"}, one_rank=True),
    "eva": Method(LoraConfig, _LORA, {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}, one_rank=True),
    "adalora": Method(AdaLoraConfig, _LORA | {"rank": "target_r"}, {"orth_reg_weight": 0.0}),  # `adalora.RankAllocation` adds it
    "loha": Method(LoHaConfig, {"rank": "r", "alpha": "alpha"}),
    "lokr": Method(LoKrConfig, {"rank": "r", "alpha": "alpha"}),
    "vera": Method(VeraConfig, {"rank": "r", "dropout": "vera_dropout"}, seed="projection_prng_key"),
    "randlora": Method(RandLoraConfig, {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"}, seed="projection_prng_key"),
    "delora": Method(DeloraConfig, {"rank": "r"}),
    "hira": Method(HiraConfig, {"rank": "r", "dropout": "hira_dropout"}),
    "hra": Method(HRAConfig, {"rank": "r"}),
    "miss": Method(MissConfig, {"rank": "r", "dropout": "miss_dropout"}),
    "ia3": Method(IA3Config, {}),
    "oft": Method(OFTConfig, {}),
    "boft": Method(BOFTConfig, {"dropout": "boft_dropout"}),
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
    values = {own: getattr(settings, name) for name, own in method.names.items()}
    if "alpha" in method.names:
        values[method.names["alpha"]] = whole(settings.alpha)
    if method.seed:
        values[method.seed] = settings.seed
    if method.config is AdaLoraConfig:
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
