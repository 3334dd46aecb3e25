"""What a reader must know before trusting a card, in words."""

from layercard.data import Dataset
from layercard.layers import unread_experts
from layercard.models import BaseModel
from layercard.probe import StepProbe
from layercard.signals import Fit

MASSIVE = 100.0
"""Energy of an input over its usual energy from which on a layer is said to have massive activations."""
STABLE = 0.8
"""Split-half rank correlation of `gain_estimate` below which the ranking is called unstable."""


def cautions(base: BaseModel, fit: Fit, dataset: Dataset, stability: dict[str, float], probe: StepProbe | None = None) -> list[str]:
    """The card's warnings, one sentence each.

    Args:
        base: The profiled model.
        fit: What the fit pass found.
        dataset: The records.
        stability: Split-half rank correlation of each measure.
        probe: What the step probe found, where there was one.
    """
    found = []
    massive = [
        layer for layer, inputs in enumerate(fit.inputs) if any(signals.massive > MASSIVE and signals.energy > 0 for signals in inputs)
    ]
    if massive:
        found.append(
            f"massive activations in layer {', '.join(map(str, massive))}: a few tokens or features carry over {MASSIVE:.0f} times "
            "the usual energy; the ridge is measured against the usual energy, so the layer is not wiped out"
        )
    found += [*_silent(fit), *_diverged(probe)]
    widest = max(signals.features for inputs in fit.inputs for signals in inputs)
    if fit.tokens < widest:
        found.append(
            f"few tokens: {fit.tokens} made the steps, fewer than the {widest} features of the widest input; resnorm is an "
            "upper bound, so profile more records"
        )
    found += [*_idle_experts(base, fit), *_thin_experts(fit), *_unread_experts(base)]
    if stability["gain_estimate"] < STABLE:
        found.append(
            f"unstable ranking: two halves of the records agree on gain_estimate with Spearman {stability['gain_estimate']:.2f} only; "
            "profile more records before trusting small differences"
        )
    if dataset.truncated:
        found.append(f"{dataset.truncated} records were longer than the limit and were cut")
    return found


def _silent(fit: Fit) -> list[str]:
    """Layers that nothing enters, and layers that no gradient comes back to."""
    nothing, alone = [], []
    for layer, (inputs, modules) in enumerate(zip(fit.inputs, fit.modules, strict=True)):
        zeros = sum(signals.energy == 0 for signals in inputs)
        if zeros:
            nothing.append(f"{layer} ({zeros} of {len(inputs)} inputs)")
        elif all(signals.residual_energy == 0 for signals in modules):
            alone.append(str(layer))
    found = []
    if nothing:
        found.append(
            f"no activation in layer {', '.join(nothing)}: these inputs are zero for every token, so adapters there would learn nothing"
        )
    if alone:
        found.append(
            f"no gradient reaches layer {', '.join(alone)}: its output changes no loss here, or numbers are too small for the dtype; "
            "compare with --dtype float32"
        )
    return found


def _diverged(probe: StepProbe | None) -> list[str]:
    """Layers whose step probe is not finite."""
    if probe is None or not probe.diverged:
        return []
    return [
        f"the step probe's loss is not finite in layer {', '.join(map(str, probe.diverged))}: that length of the step counts as no gain; "
        "compare with --dtype float32"
    ]


def _idle_experts(base: BaseModel, fit: Fit) -> list[str]:
    """Experts that the records which made the steps left without a token."""
    idle = {}
    for block in base.blocks:
        seen = {m.projection.path for m in fit.modules[block.index]}
        count = max((sum(own.path not in seen for own in stack.maps) for stack in block.stacks), default=0)
        if count:
            idle[block.index] = f"{block.index} ({count} of {block.stacks[0].experts})"
    if not idle:
        return []
    return [
        f"experts that no token was sent to, in layer {', '.join(idle.values())}: they have no signals, so profile more records before "
        "judging these layers"
    ]


def _thin_experts(fit: Fit) -> list[str]:
    """Experts that saw fewer tokens than they have inputs."""
    seen = [m for layer in fit.modules for m in layer if m.projection.expert is not None]
    thin = [m for m in seen if m.tokens < m.projection.in_features]
    if not thin:
        return []
    return [
        f"few tokens for experts: {len(thin)} of {len(seen)} maps of experts saw fewer tokens than they have inputs; what they add to "
        "resnorm is an upper bound, so profile more records before comparing experts"
    ]


def _unread_experts(base: BaseModel) -> list[str]:
    """Experts that signals cannot be read from."""
    unread = {block.index: names for block in base.blocks if (names := unread_experts(block))}
    if not unread:
        return []
    first = next(iter(unread.values()))[0]
    return [
        f"experts without signals in {len(unread)} of {len(base.blocks)} layers ({first}): they are quantised or run in a way of "
        "their own, so this card is about the other maps alone, and adapters go there"
    ]
