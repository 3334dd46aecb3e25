"""Which layers get adapters."""

from layercard.selection.placement import Placement, check_layers
from layercard.selection.select import OBJECTIVES, select
from layercard.selection.strategies import ALIASES, STRATEGIES, strategy_layers

__all__ = ["ALIASES", "OBJECTIVES", "STRATEGIES", "Placement", "check_layers", "select", "strategy_layers"]
