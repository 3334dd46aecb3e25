"""What a reader must know before trusting a card, in words.

From the arrays of the two passes and the step probe to a card with intervals, stability and warnings.
"""

import math
import platform
import statistics
from importlib.metadata import version
from typing import Any

import torch

from layercard.card.card import DataInfo, LayerCard, LayerEntry, ModelInfo, ModuleCard
from layercard.data.checks import check_held_out
from layercard.data.load import Dataset
from layercard.models.layers import ExpertStack, unread_experts
from layercard.models.load import BaseModel, describe
from layercard.profiling.fit import Fit, HeldOut, ModuleSignals
from layercard.profiling.step_probe import StepProbe
from layercard.profiling.training_probe import TrainingProbe
from layercard.records import Estimate
from layercard.statistics.coupling import centrality, correlation, curvature, descent, single_gain
from layercard.statistics.coverage import gain_estimate, similarity
from layercard.statistics.intervals import bootstrap_weights, interval, ratio_deviation, split_half_spearman

# ---- cautions

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
        count = max((sum(own.path not in seen for own in stack.modules) for stack in block.stacks), default=0)
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


# ---- assembly

UNITS = {
    "resnorm": "sqrt(nats) per labelled token",
    "resnorm_rank": "sqrt(nats) per labelled token",
    "residual_fraction": "share of E|delta|^2",
    "gradient_norm": "nats per labelled token per unit of weight",
    "activation_energy": "squared activation, summed over the layer's module inputs",
    "effective_rank": "directions, mean over module inputs",
    "condition": "ratio, geometric mean over module inputs",
    "noise_amplification": "noise energy of the step / energy of the step",
    "predicted_gain": "nats per labelled token",
    "centrality": "layers",
    "step_probe": "nats per labelled token",
    "training_probe": "nats per labelled token",
    "gain_estimate": "nats per labelled token, relative scale",
    "coupling": "correlation, -1 to 1",
    "forward_seconds": "s",
    "backward_seconds": "s",
    "adapter_seconds": "s",
    "saved_bytes": "bytes",
}
_Profile = tuple[list[float], list[float], list[float]]
"""Value, low and high of one measure, layer by layer."""


class Assembly:
    """Turns the arrays of the passes into a card."""

    def __init__(
        self,
        base: BaseModel,
        dataset: Dataset,
        settings: dict[str, Any],
        fit: Fit,
        held_out: HeldOut,
        probe: StepProbe | None,
        trained: TrainingProbe | None,
        fit_records: int,
    ) -> None:
        self.base, self.dataset, self.settings = base, dataset, settings
        self.fit, self.held_out, self.probe, self.trained, self.fit_records = fit, held_out, probe, trained, fit_records
        self.records = len(held_out.labelled)
        self.weights = bootstrap_weights(self.records, settings["seed"])
        self.shrink = math.sqrt(self.records / fit_records)

    def card(self) -> LayerCard:
        """The whole card.

        Raises:
            DataError: What was measured on the held-out records is not finite.
        """
        check_held_out(self.dataset.source, self.held_out.tensors())
        measures = {**self._fitted(), **self._bootstrapped()}
        depth = len(self.base.blocks)
        k = curvature(self.held_out.drawn, self.held_out.labelled)
        return LayerCard(
            model=ModelInfo(**describe(self.base)),
            data=DataInfo(
                source=self.dataset.source,
                fingerprint=self.dataset.fingerprint,
                records=len(self.dataset),
                tokens=self.dataset.tokens,
                labelled_tokens=self.dataset.labelled_tokens,
                fit_records=self.fit_records,
                truncated=self.dataset.truncated,
                loss=float(self.held_out.nats.sum() / self.held_out.labelled.sum()),
            ),
            settings=self._settings(),
            versions={name: version(name) for name in ("torch", "transformers", "layercard")} | {"python": platform.python_version()},
            layers=tuple(self._entry(layer, measures) for layer in range(depth)),
            coupling=tuple(tuple(row) for row in correlation(k).tolist()),
            descent=tuple(descent(self.held_out.slopes, self.held_out.labelled).tolist()),
            curvature=tuple(k.diagonal().tolist()),
            stability=(stability := self._stability()),
            units=UNITS,
            warnings=tuple(cautions(self.base, self.fit, self.dataset, stability, self.probe)),
        )

    def _entry(self, layer: int, measures: dict[str, _Profile]) -> LayerEntry:
        sampled: dict[str, Any] = {
            name: Estimate(value=value[layer], low=low[layer], high=high[layer]) for name, (value, low, high) in measures.items()
        }
        steps = self.trained.steps[layer] if self.trained is not None else None
        return LayerEntry(index=layer, modules=self._modules(layer), training_probe_steps=steps, **sampled)

    def _settings(self) -> dict[str, Any]:
        parameter = next(self.base.model.parameters())
        return {**self.settings, "dtype": str(parameter.dtype).removeprefix("torch."), "device": parameter.device.type}

    # --- measures that come from the held-out records alone: resampled as a whole -----------------------------------------

    def _profiles(self, weights_n: torch.Tensor) -> dict[str, torch.Tensor]:
        held = self.held_out
        k = curvature(held.drawn, held.labelled, weights_n)
        b = descent(held.slopes, held.labelled, weights_n)
        rho = correlation(k)
        found = {"predicted_gain": single_gain(b, k), "centrality": centrality(rho)}
        if self.probe is not None:
            found["step_probe"] = self.probe.gain(weights_n)
        if self.trained is not None:
            found["training_probe"] = self.trained.gain(weights_n)
        gains = found.get("step_probe", found["predicted_gain"]).numpy()
        found["gain_estimate"] = torch.from_numpy(gain_estimate(similarity(rho.numpy()), gains))
        return found

    def _bootstrapped(self) -> dict[str, _Profile]:
        values = self._profiles(torch.ones(self.records, dtype=torch.float64))
        resampled = [self._profiles(weights) for weights in self.weights]
        return {name: _with_interval(value, torch.stack([one[name] for one in resampled])) for name, value in values.items()}

    def _stability(self) -> dict[str, float]:
        names = self._profiles(torch.ones(self.records, dtype=torch.float64)).keys() - {"training_probe"}  # layers differ in steps there
        return {
            name: split_half_spearman(lambda weights, name=name: self._profiles(weights)[name], self.records, self.settings["seed"])  # type: ignore[misc]
            for name in sorted(names)
        }

    # --- measures of the fit pass: moved by the influence that held-out records would have had -------------------------------

    def _fitted(self) -> dict[str, _Profile]:
        sums = self._layer_sums()
        squared, rank_squared, gradient = sums["resnorm"], sums["rank"], sums["gradient"]
        labelled = self.held_out.labelled
        residual = _moved_to(squared, 2 * self._moved(self.held_out.residual, labelled))
        slope = _moved_to(rank_squared, 2 * self._moved(-self.held_out.slopes, labelled))
        steeper = _moved_to(gradient, 2 * self._moved(self.held_out.gradient, labelled))
        return {
            "resnorm": _with_interval(squared.sqrt(), residual.sqrt()),
            "resnorm_rank": _with_interval(rank_squared.sqrt(), slope.sqrt()),
            "residual_fraction": _with_interval(squared / sums["energy"], residual / sums["energy"]),
            "gradient_norm": _with_interval(gradient.sqrt(), steeper.sqrt()),
            **self._input_measures(),
        }

    def _layer_sums(self) -> dict[str, torch.Tensor]:
        def total(name: str) -> torch.Tensor:
            return torch.tensor([sum(getattr(m, name) for m in layer) for layer in self.fit.modules], dtype=torch.float64)

        return {
            "resnorm": total("resnorm_squared"),
            "rank": total("resnorm_rank_squared"),
            "energy": total("residual_energy").clamp(min=1e-300),
            "gradient": total("gradient_squared"),
            "step": total("step_squared").clamp(min=1e-300),
        }

    def _moved(self, contributions_ln: torch.Tensor, counts_n: torch.Tensor) -> torch.Tensor:
        """How far a mean of the fit records would move on other records, `[repeats, L]`."""
        return self.shrink * ratio_deviation(contributions_ln, counts_n, self.weights)

    def _input_measures(self) -> dict[str, _Profile]:
        collected: dict[str, list[torch.Tensor]] = {
            "activation_energy": [],
            "effective_rank": [],
            "condition": [],
            "noise_amplification": [],
        }
        steps = self._layer_sums()["step"]
        for layer, inputs in enumerate(self.fit.inputs):
            shares = self._shares(layer)
            columns: dict[str, list[torch.Tensor]] = {name: [] for name in collected}
            for signals in inputs:
                moved = self._moved(self.held_out.inputs[signals.path], self.held_out.tokens)
                moved = torch.cat([torch.zeros(1, 4, dtype=torch.float64), moved])  # row 0: the value itself
                energy = _moved_to(signals.energy, moved[:, 0])
                square = _moved_to(signals.second_moment_squared, 2 * moved[:, 1])
                top = _moved_to(signals.top, moved[:, 2])
                noise = sum(m.noise for m in self.fit.modules[layer] if m.leader == signals.path)
                columns["activation_energy"].append(energy)
                columns["effective_rank"].append(energy.square() / square)
                columns["condition"].append((signals.condition * (top + signals.ridge) / (signals.top + signals.ridge)).log())
                columns["noise_amplification"].append(
                    _moved_to(noise, moved[:, 3] / max(signals.noise_trace, 1e-300) * noise) / steps[layer]
                )
            collected["activation_energy"].append(torch.stack(columns["activation_energy"]).sum(dim=0))
            weights = torch.tensor([shares[signals.path] for signals in inputs], dtype=torch.float64)
            weights = weights / weights.sum()
            collected["effective_rank"].append(weights @ torch.stack(columns["effective_rank"]))
            collected["condition"].append((weights @ torch.stack(columns["condition"])).exp())
            collected["noise_amplification"].append(torch.stack(columns["noise_amplification"]).sum(dim=0))
        stacked = {name: torch.stack(rows, dim=1) for name, rows in collected.items()}
        return {name: _with_interval(rows[0], rows[1:]) for name, rows in stacked.items()}

    def _shares(self, layer: int) -> dict[str, float]:
        """What each input of a layer counts in a mean over inputs, by path.

        All experts of a stack count as one input, each by its share of the tokens that were sent to them.
        """
        tokens: dict[str, dict[str, int]] = {}
        for m in self.fit.modules[layer]:
            tokens.setdefault(m.projection.path.partition("[")[0], {})[m.leader] = m.tokens
        return {path: count / sum(each.values()) for each in tokens.values() for path, count in each.items()}

    # --- maps of a layer ----------------------------------------------------------------------------------------------------

    def _modules(self, layer: int) -> tuple[ModuleCard, ...]:
        ridges = {signals.path: signals.ridge for signals in self.fit.inputs[layer]}
        found = self.fit.modules[layer]
        single = [_module(m.projection.path, [m], ridges[m.leader], _shared(m)) for m in found if m.projection.expert is None]
        return (*single, *(self._stack(stack, found) for stack in self.base.blocks[layer].stacks))

    def _stack(self, stack: ExpertStack, found: list[ModuleSignals]) -> ModuleCard:
        """The maps of all experts as one entry; squares add up, and an expert that no token was sent to has none."""
        own = {m.projection.expert: m for m in found if m.projection.path.startswith(f"{stack.path}[")}
        ridges = {signals.path: signals.ridge for layer in self.fit.inputs for signals in layer}
        used = [ridges[m.leader] for m in own.values()]
        ridge = statistics.median(used) if used else 0.0
        card = _module(stack.path, list(own.values()), ridge, None, stack)
        each = [own.get(expert) for expert in range(stack.experts)]
        return card.model_copy(
            update={
                "experts": stack.experts,
                "expert_tokens": tuple(0 if m is None else m.tokens for m in each),
                "expert_resnorm": tuple(0.0 if m is None else math.sqrt(m.resnorm_squared) for m in each),
            }
        )


def _shared(signals: ModuleSignals) -> str | None:
    return None if signals.leader == signals.projection.path else signals.leader


def _module(path: str, parts: list[ModuleSignals], ridge: float, leader: str | None, stack: ExpertStack | None = None) -> ModuleCard:
    """One entry of `modules` from the signals of a map, or of those of a stack's experts."""
    shape = stack or parts[0].projection
    return ModuleCard(
        path=path,
        in_features=shape.in_features,
        out_features=shape.out_features,
        resnorm=math.sqrt(sum(m.resnorm_squared for m in parts)),
        resnorm_rank=math.sqrt(sum(m.resnorm_rank_squared for m in parts)),
        gradient_norm=math.sqrt(sum(m.gradient_squared for m in parts)),
        ridge=ridge,
        shares_input_with=leader,
    )


def _moved_to(value: torch.Tensor | float, change: torch.Tensor) -> torch.Tensor:
    """A positive quantity after a small change; `value · exp(change / value)` agrees to first order and stays positive."""
    at = torch.as_tensor(value, dtype=torch.float64).clamp(min=1e-300)
    return at * (change / at).clamp(-50, 50).exp()


def _with_interval(value_l: torch.Tensor, resampled_bl: torch.Tensor) -> _Profile:
    low, high = interval(resampled_bl)
    return value_l.tolist(), torch.minimum(low, value_l).tolist(), torch.maximum(high, value_l).tolist()
