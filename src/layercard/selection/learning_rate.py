"""The learning rate of a placement where none was measured: a rule from width, length, rank and the share of layers that are adapted.

    rate = BASE / width · (steps / STEPS) ** −SHIFT · passes ** −PASSES_SHIFT · share ** −LAYERS_SHIFT · (rank / RANK) ** −RANK_SHIFT

It is the peak rate of AdamW with a short warm-up and a linear fall to zero, for LoRA whose alpha is twice its rank. What the constants rest
on is said beside each; `benchmarks/learning_rate.py` and `benchmarks/race_constants.py` fit them again. Short runs want higher rates than
long ones, down to `SETTLED` steps, below which the first steps cannot bear more.
"""

from typing import NamedTuple

from layercard.selection.placement import Placement

BASE = 0.9
"""Rate times width, for adapters of rank 8 in all layers and `STEPS` steps; it rests on one width, so how it falls with that is assumed."""
STEPS = 500
"""Updates of the run that a placement's rate is for where no other number is given."""
SHIFT = 0.35
"""How the best learning rate falls with the number of steps, `steps ** -SHIFT`: assumed from few runs, not fitted (docs/run.md)."""
PASSES_SHIFT = 0.7
"""How it falls with the passes over the records beside that, `passes ** -PASSES_SHIFT`: records seen again are learnt by heart, the sooner
the higher the rate. From one ladder (`benchmarks/race_constants.py`)."""
SETTLED = 24
"""Steps below which the best learning rate no longer rises: there it is limited by what the first steps can bear."""
LAYERS_SHIFT = 0.4
"""How the best learning rate grows as fewer layers are adapted, `share of layers ** -LAYERS_SHIFT`: fitted to 26 ladders, one model, three
tasks (`benchmarks/race_constants.py`)."""
RANK, RANK_SHIFT = 8, 0.5
"""How it falls as the rank grows, with alpha twice the rank: from one ladder at rank 48 (`benchmarks/learning_rate.py`)."""


class Length(NamedTuple):
    """How long a training is: updates, and passes over the records (a part of one counts as one)."""

    steps: int
    passes: float = 1.0

    def factor(self) -> float:
        """What the best learning rate of this length is a multiple of."""
        return float(max(self.steps, SETTLED) ** -SHIFT * max(self.passes, 1.0) ** -PASSES_SHIFT)

    def __str__(self) -> str:
        return f"{self.steps} steps" + (f" and {self.passes:g} passes" if self.passes > 1 else "")


class Recommended(NamedTuple):
    """A learning rate and where it comes from, in words."""

    rate: float
    source: str


def usual_rate(width: int, length: Length, share: float = 1.0, rank: int = RANK) -> float:
    """A peak learning rate for LoRA where nothing was measured: it falls with width, length and rank, and grows with fewer layers.

    Args:
        width: Size of the hidden state.
        length: Of the run.
        share: Part of the layers that are adapted, 0 to 1.
        rank: Rank of the adapters, alpha twice that.

    >>> round(usual_rate(576, Length(500)), 5), round(usual_rate(4096, Length(500)), 5)
    (0.00156, 0.00022)
    """
    return moved(BASE / width, Length(STEPS), length) * share**-LAYERS_SHIFT * float(rank / RANK) ** -RANK_SHIFT


def moved(rate: float, length: Length, other: Length) -> float:
    """The learning rate for a run of the length `other` that answers to `rate` in one of `length`.

    >>> round(moved(0.002, Length(960), Length(96)) / 0.002, 2), moved(0.002, Length(8), Length(16))
    (2.24, 0.002)
    """
    return rate * other.factor() / length.factor()


def recommended(placement: Placement, width: int, length: Length, rank: int = RANK) -> Recommended:
    """The rate of a placement for a run of this length: its own, moved to that, or that of the rule where it has none.

    >>> paths = ("model.layers.1.mlp.up_proj",)
    >>> recommended(Placement(model={"layers": 2}, layers=(1,), paths=paths, objective="given", learning_rate=0.002), 576, Length(100))
    Recommended(rate=0.002, source='from the placement')
    """
    if placement.learning_rate is not None:
        own, source = placement.learning_rate, f"from the {placement.learning_rate_source or 'placement'}"
        if placement.learning_rate_steps is None:
            return Recommended(own, source)
        made_for = Length(placement.learning_rate_steps, placement.learning_rate_passes or 1.0)
        rate = moved(own, made_for, length)
        return Recommended(own, source) if abs(rate / own - 1) < 1e-9 else Recommended(_short(rate), f"{source}, moved to {length}")
    share = len(placement.layers) / placement.model["layers"]
    return Recommended(_short(usual_rate(width, length, share, rank)), f"from the rule for {length}")


def _short(rate: float) -> float:
    return float(f"{rate:.3g}")
