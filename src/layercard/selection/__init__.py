"""Which layers get adapters."""

from layercard.card import cost_of
from layercard.selection.budgets import Budgets
from layercard.selection.calibration import performance_kept
from layercard.selection.models import SET_MODELS
from layercard.selection.placement import Placement, check_layers
from layercard.selection.select import OBJECTIVES, allocate_ranks, given, predict, select
from layercard.selection.strategies import ALIASES, STRATEGIES, strategy_layers, top_layers

__all__ = [
    "ALIASES",
    "OBJECTIVES",
    "SET_MODELS",
    "STRATEGIES",
    "Budgets",
    "Placement",
    "allocate_ranks",
    "check_layers",
    "cost_of",
    "given",
    "performance_kept",
    "predict",
    "select",
    "strategy_layers",
    "top_layers",
]
