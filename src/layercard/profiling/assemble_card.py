"""From the results of the passes and probes to a card with intervals, stability, and warnings in words.

Measures of steps on records of the other half are resampled as a whole. Those of the moments are moved by the influence that their records
would have had on the other half's, so that no pass is run twice.
"""

import math
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch

from layercard.card.card import DataInfo, LayerCard, LayerEntry, ModelInfo, ModuleCard
from layercard.data.checks import check_held_out
from layercard.data.load import Dataset
from layercard.models.layers import ExpertStack, unread_experts
from layercard.models.load import BaseModel, describe
from layercard.profiling.fit import Fit, LayerSignals, ModuleSignals
from layercard.profiling.held_out import HeldOut
from layercard.profiling.step_probe import StepProbe
from layercard.profiling.training_probe import TrainingProbe
from layercard.records import Estimate
from layercard.statistics.coupling import best_lengths, centrality, correlation, curvature, descent, single_gain
from layercard.statistics.coverage import gain_estimate, similarity
from layercard.statistics.intervals import bootstrap_weights, interval, ratio_deviation, split_half_spearman, widening

MASSIVE = 100.0
"""Energy of an input over its usual energy from which on a layer is said to have massive activations."""
STABLE = 0.8
"""Split-half rank correlation of `gain_estimate` below which the ranking is called unstable."""
TINY = 1e-300
CROSS_FITTED = (
    "resnorm",
    "resnorm_rank",
    "residual_fraction",
    "predicted_gain",
    "centrality",
    "step_probe",
    "step_curvature",
    "longest_step",
    "gain_estimate",
)
"""Measures of steps on records that had no part in making them, both ways round."""
NEVER_NEGATIVE = ("predicted_gain", "step_curvature", "step_probe", "longest_step", "gain_estimate")
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
    "step_curvature": "nats per labelled token per squared unit of weight",
    "longest_step": "multiple of the length where the quadratic model puts its minimum",
    "training_probe": "nats per labelled token",
    "gain_estimate": "nats per labelled token, relative scale",
    "coupling": "correlation, -1 to 1",
    "forward_seconds": "s",
    "backward_seconds": "s",
    "adapter_seconds": "s",
    "saved_bytes": "bytes",
}


def assemble_card(
    base: BaseModel,
    dataset: Dataset,
    settings: dict[str, Any],
    fits: Sequence[Fit],
    held_out: HeldOut,
    probe: StepProbe | None,
    trained: TrainingProbe | None,
) -> LayerCard:
    """The whole card.

    Args:
        base: The model.
        dataset: The records.
        settings: How it was made, `seed` among them.
        fits: What the records of each half made.
        held_out: All records, those of half 0 first, each measured with the steps of the other half.
        probe: The step probe.
        trained: The training probe: trained on half 0, measured on half 1.

    Raises:
        DataError: What was measured on the records is not finite.
    """
    check_held_out(dataset.source, held_out.tensors(), base.model)
    half, seed = held_out.half, settings["seed"]
    weights_bn = bootstrap_weights(half, seed)
    everything = torch.ones(len(half), dtype=torch.float64)
    step_norms = [_total(fit, lambda m: float(m.directions_in[:, : m.rank].double().square().sum())).clamp(min=TINY) for fit in fits]
    slopes_ln = -held_out.slopes * step_lengths(held_out)[:, None]

    def held_out_measures(weights_n: torch.Tensor) -> dict[str, torch.Tensor]:
        """The measures of steps on records of the other half, averaged over both ways round, `[L]` each."""
        k, b, rho = quadratics(weights_n)
        measures = {
            "predicted_gain": (single_gain(b[0], k[0]) + single_gain(b[1], k[1])) / 2,
            "centrality": centrality(*rho),
            "step_curvature": (k[0].diagonal() / step_norms[1] + k[1].diagonal() / step_norms[0]) / 2,
        }
        if probe is not None:
            measures["step_probe"] = probe.gain(weights_n)
            measures["longest_step"] = probe.longest(slopes_ln, weights_n)
        if trained is not None:
            measures["training_probe"] = trained.gain(weights_n[half == 1])
        gains = measures.get("step_probe", measures["predicted_gain"]).numpy()
        # The sign is kept until both halves are averaged: noise has no sign to prefer, and its absolute value has.
        measures["gain_estimate"] = torch.from_numpy(gain_estimate(similarity(((rho[0] + rho[1]) / 2).numpy()), gains))
        return measures

    def quadratics(weights_n: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """K, b and ρ on each half of the records."""
        by_half = [weights_n * (half == number) for number in (0, 1)]
        k = [curvature(held_out.drawn, held_out.labelled, weights) for weights in by_half]
        return k, [descent(held_out.slopes, held_out.labelled, weights) for weights in by_half], [correlation(each) for each in k]

    def differences() -> dict[str, torch.Tensor]:
        """How far the two halves are apart in the measures that each has by itself, `[L]` each."""
        k, b, rho = quadratics(everything)
        found = {
            "predicted_gain": [single_gain(b[number], k[number]) for number in (0, 1)],
            "step_curvature": [k[number].diagonal() / step_norms[1 - number] for number in (0, 1)],
        }
        if probe is not None:
            found["step_probe"] = list(probe.gains_of_halves(everything))
            found["longest_step"] = [probe.longest(slopes_ln, everything * (half == number)) for number in (0, 1)]
        gains = found.get("step_probe", found["predicted_gain"])
        found["gain_estimate"] = [
            torch.from_numpy(gain_estimate(similarity(rho[number].numpy()), gains[number].clamp(min=0).numpy())) for number in (0, 1)
        ]
        return {name: first - second for name, (first, second) in found.items()}

    values, apart = held_out_measures(everything), differences()
    resampled = [held_out_measures(weights) for weights in weights_bn]
    measures = {}
    for name, value in values.items():
        moved = torch.stack([each[name] for each in resampled])
        if name in apart:
            moved = value + widening(moved - value, apart[name]) * (moved - value)
        measures[name] = _estimates(value, moved.clamp(min=0) if name in NEVER_NEGATIVE else moved)
    measures |= _residual_measures(fits, held_out, weights_bn) | _fit_measures(fits, held_out, weights_bn)
    # Layers of the training probe took different numbers of steps, so their order is not compared.
    stability = {
        name: split_half_spearman(lambda weights, name=name: held_out_measures(weights)[name], half, seed)  # type: ignore[misc]
        for name in sorted(values.keys() - {"training_probe"})
    }
    k = [curvature(held_out.drawn, held_out.labelled, everything * (half == number)) for number in (0, 1)]
    rho, parameter = (correlation(k[0]) + correlation(k[1])) / 2, next(base.model.parameters())
    return LayerCard(
        model=ModelInfo(**describe(base)),
        data=DataInfo(
            source=dataset.source,
            fingerprint=dataset.fingerprint,
            records=len(dataset),
            tokens=dataset.tokens,
            labelled_tokens=dataset.labelled_tokens,
            truncated=dataset.truncated,
            loss=float(held_out.nats.sum() / held_out.labelled.sum()),
        ),
        settings={**settings, "dtype": str(parameter.dtype).removeprefix("torch."), "device": parameter.device.type},
        versions={name: version(name) for name in ("torch", "transformers", "layercard")} | {"python": platform.python_version()},
        layers=tuple(
            LayerEntry(
                index=block.index,
                modules=_modules([fit.layers[block.index] for fit in fits], held_out, block.stacks),
                training_probe_steps=None if trained is None else trained.steps[block.index],
                **{name: estimates[block.index] for name, estimates in measures.items()},  # type: ignore[arg-type]
            )
            for block in base.blocks
        ),
        coupling=tuple(tuple(row) for row in rho.tolist()),
        descent=tuple(descent(held_out.slopes, held_out.labelled).tolist()),
        curvature=tuple(curvature(held_out.drawn, held_out.labelled).diagonal().tolist()),
        stability=stability,
        cross_fitted=tuple(name for name in CROSS_FITTED if name in measures),
        units=UNITS,
        warnings=tuple(warnings_in_words(base, fits, dataset, stability["gain_estimate"], probe)),
    )


def step_lengths(held_out: HeldOut) -> torch.Tensor:
    """For each layer the multiple of its steps at which the quadratic model puts its minimum, `[L]`, from all records."""
    return best_lengths(descent(held_out.slopes, held_out.labelled), curvature(held_out.drawn, held_out.labelled))


def _total(fit: Fit, of: Callable[[ModuleSignals], float]) -> torch.Tensor:
    """A quantity of modules, added up over those of each layer, `[L]`."""
    return torch.tensor([sum(of(m) for m in layer.modules) for layer in fit.layers], dtype=torch.float64)


def _deviation(values_ln: torch.Tensor, counts_n: torch.Tensor, held_out: HeldOut, weights_bn: torch.Tensor) -> list[torch.Tensor]:
    """For each half how far `Σ value / Σ count` over its records would move on other records, `[repeats, L]`."""
    halves = [held_out.half == number for number in (0, 1)]
    return [ratio_deviation(values_ln[:, rows], counts_n[rows], weights_bn[:, rows]) for rows in halves]


def _over_halves(values: torch.Tensor, held_out: HeldOut) -> torch.Tensor:
    """The mean over both halves of the records of `Σ value / Σ labelled tokens`; `values` are `[…, n]`."""
    parts = [values[..., rows].sum(dim=-1) / held_out.labelled[rows].sum() for rows in (held_out.half == 0, held_out.half == 1)]
    return (parts[0] + parts[1]) / 2


def _residual_measures(fits: Sequence[Fit], held_out: HeldOut, weights_bn: torch.Tensor) -> dict[str, list[Estimate]]:
    """What the steps of one half are worth on the other, `−⟨G, Δ⟩`: noise in either of them is none in the other.

    The gradient G of one half and the step Δ of the other take part alike: another half in place of either moves the mean of both ways
    round by as much. So a record moves it twice, as one that measures and as one that makes steps.
    """
    squares = []
    for number in (0, 1):  # within reach of the rank, and all of it
        per_layer = [
            sum((held_out.modules[path][number] for path in _paths(fits, layer)), torch.zeros(len(held_out.half), dtype=torch.float64))
            for layer in range(len(fits[0].layers))
        ]
        values_ln = torch.stack(per_layer)
        value = _over_halves(values_ln, held_out)
        squares.append((value, value + sum(_deviation(values_ln, held_out.labelled, held_out, weights_bn))))
    (rank_value, rank_moved), (value, moved) = squares
    energy = ((_total(fits[0], _residual_energy) + _total(fits[1], _residual_energy)) / 2).clamp(min=TINY)
    return {
        "resnorm": _estimates(value.clamp(min=0).sqrt(), moved.clamp(min=0).sqrt()),
        "resnorm_rank": _estimates(rank_value.clamp(min=0).sqrt(), rank_moved.clamp(min=0).sqrt()),
        "residual_fraction": _estimates((value / energy).clamp(min=0), (moved / energy).clamp(min=0)),
    }


def _residual_energy(m: ModuleSignals) -> float:
    return m.residual_energy


def _paths(fits: Sequence[Fit], layer: int) -> list[str]:
    """Paths of a layer's modules that some half has signals of."""
    return list(dict.fromkeys(m.module.path for fit in fits for m in fit.layers[layer].modules))


def _fit_measures(fits: Sequence[Fit], held_out: HeldOut, weights_bn: torch.Tensor) -> dict[str, list[Estimate]]:
    """Measures that describe records without a step of others: those of each half, averaged.

    They are moved, to first order, by what their records contribute along the directions of the other half.
    """
    gradients = _deviation(held_out.gradient, held_out.labelled, held_out, weights_bn)
    inputs = {path: _deviation(values, held_out.tokens, held_out, weights_bn) for path, values in held_out.inputs.items()}
    halves: list[dict[str, torch.Tensor]] = []  # `[1 + repeats, L]` each: the value itself, then the resampled ones
    for number, fit in enumerate(fits):
        step = _total(fit, lambda m: m.step_squared).clamp(min=TINY)
        # A small change of a factor counts twice in its square.
        squared = _moved(_total(fit, lambda m: m.gradient_squared), 2 * _with_zero(gradients[number]))
        columns: dict[str, list[torch.Tensor]] = {
            name: [] for name in ("activation_energy", "effective_rank", "condition", "noise_amplification")
        }
        for index, layer in enumerate(fit.layers):
            energies, ranks, conditions, noises = [], [], [], []
            for signals in layer.inputs:
                change = inputs[signals.path][number] if signals.path in inputs else torch.zeros(len(weights_bn), 4, dtype=torch.float64)
                change = _with_zero(change)
                energies.append(_moved(signals.energy, change[:, 0]))
                ranks.append(energies[-1].square() / _moved(signals.second_moment_squared, 2 * change[:, 1]))
                top = _moved(signals.top, change[:, 2])
                conditions.append((signals.condition * (top + signals.ridge) / (signals.top + signals.ridge)).log())
                noise = sum(m.noise for m in layer.modules if m.leader == signals.path)
                noises.append(_moved(noise, change[:, 3] / max(signals.noise_trace, TINY) * noise) / step[index])
            # In a mean over inputs all experts of a stack count as one, each by its share of the tokens that were sent to them.
            tokens: dict[str, dict[str, int]] = {}
            for m in layer.modules:
                tokens.setdefault(m.module.path.partition("[")[0], {})[m.leader] = m.tokens
            shares = {path: count / sum(counts.values()) for counts in tokens.values() for path, count in counts.items()}
            weights = torch.tensor([shares[signals.path] for signals in layer.inputs], dtype=torch.float64)
            weights = weights / weights.sum()
            columns["activation_energy"].append(torch.stack(energies).sum(dim=0))
            columns["effective_rank"].append(weights @ torch.stack(ranks))
            columns["condition"].append((weights @ torch.stack(conditions)).exp())
            columns["noise_amplification"].append(torch.stack(noises).sum(dim=0))
        stacked = {name: torch.stack(of_layers, dim=1) for name, of_layers in columns.items()}
        halves.append({"gradient_norm": squared.sqrt(), **stacked})
    both = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    return {name: _estimates(rows[0], rows[1:]) for name, rows in both.items()}


def _with_zero(change_bl: torch.Tensor) -> torch.Tensor:
    """A row of zeros, then these rows."""
    return torch.cat([torch.zeros_like(change_bl[:1]), change_bl])


def _moved(value: torch.Tensor | float, change: torch.Tensor) -> torch.Tensor:
    """A positive quantity after a small change; `value · exp(change / value)` agrees to first order and stays positive."""
    positive = torch.as_tensor(value, dtype=torch.float64).clamp(min=TINY)
    return positive * (change / positive).clamp(-50, 50).exp()


def _estimates(value_l: torch.Tensor, resampled_bl: torch.Tensor) -> list[Estimate]:
    """An estimate for each layer; its interval holds the value."""
    low, high = interval(resampled_bl)
    ends = zip(value_l.tolist(), torch.minimum(low, value_l).tolist(), torch.maximum(high, value_l).tolist(), strict=True)
    return [Estimate(value=value, low=below, high=above) for value, below, above in ends]


def _modules(layers: Sequence[LayerSignals], held_out: HeldOut, stacks: tuple[ExpertStack, ...]) -> tuple[ModuleCard, ...]:
    """The entries of a layer's modules, then one for each stack of experts; squares add up. `layers` are the layer in both halves."""
    by_path: dict[str, list[ModuleSignals]] = {}
    for layer in layers:
        for m in layer.modules:
            by_path.setdefault(m.module.path, []).append(m)
    ridges = [{signals.path: signals.ridge for signals in layer.inputs} for layer in layers]

    def squared(path: str, number: int) -> float:
        """What the module has of resnorm², within reach of the rank (0) or all of it (1)."""
        return float(_over_halves(held_out.modules[path][number], held_out))

    def entry(path: str, shape: Any, paths: list[str], **more: Any) -> ModuleCard:
        parts = [m for each in paths for m in by_path[each]]
        return ModuleCard(
            path=path,
            in_features=shape.in_features,
            out_features=shape.out_features,
            resnorm=math.sqrt(max(0.0, sum(squared(each, 1) for each in paths))),
            resnorm_rank=math.sqrt(max(0.0, sum(squared(each, 0) for each in paths))),
            gradient_norm=math.sqrt(sum(m.gradient_squared for m in parts) / len(layers)),
            ridge=statistics.median(ridge[m.leader] for m in parts for ridge in ridges if m.leader in ridge) if parts else 0.0,
            **more,
        )

    entries = []
    for path, parts in by_path.items():
        m = parts[0]
        if m.module.expert is None:
            shared = None if m.leader == path else m.leader
            entries.append(entry(path, m.module, [path], shares_input_with=shared))
    for stack in stacks:
        by_expert = {parts[0].module.expert: path for path, parts in by_path.items() if path.startswith(f"{stack.path}[")}
        experts = [by_expert.get(expert) for expert in range(stack.experts)]  # one that no token was sent to has no signals
        tokens = tuple(0 if path is None else sum(m.tokens for m in by_path[path]) for path in experts)
        resnorms = tuple(0.0 if path is None else math.sqrt(max(0.0, squared(path, 1))) for path in experts)
        of_stack = list(by_expert.values())
        entries.append(entry(stack.path, stack, of_stack, experts=stack.experts, expert_tokens=tokens, expert_resnorm=resnorms))
    return tuple(entries)


def warnings_in_words(
    base: BaseModel, fits: Sequence[Fit], dataset: Dataset, stability: float, probe: StepProbe | None = None
) -> list[str]:
    """What a reader must know before trusting the card, one sentence each; `stability` is the split-half correlation of `gain_estimate`."""
    massive, no_activation, no_gradient, idle = [], [], [], []
    unread: list[str] = []
    for block in base.blocks:
        halves = [fit.layers[block.index] for fit in fits]
        if any(signals.massive > MASSIVE and signals.energy > 0 for layer in halves for signals in layer.inputs):
            massive.append(str(block.index))
        # An input is zero, or an expert idle, where it is so in both halves.
        energies: dict[str, float] = {}
        for layer in halves:
            for signals in layer.inputs:
                energies[signals.path] = max(energies.get(signals.path, 0.0), signals.energy)
        zeros = sum(energy == 0 for energy in energies.values())
        if zeros:
            no_activation.append(f"{block.index} ({zeros} of {len(energies)} inputs)")
        elif all(m.residual_energy == 0 for layer in halves for m in layer.modules):
            no_gradient.append(str(block.index))
        seen = {m.module.path for layer in halves for m in layer.modules}
        unseen = max((sum(module.path not in seen for module in stack.modules) for stack in block.stacks), default=0)
        if unseen:
            idle.append(f"{block.index} ({unseen} of {block.stacks[0].experts})")
        unread += unread_experts(block)[:1]
    experts = {m.module.path: m.module for fit in fits for layer in fit.layers for m in layer.modules if m.module.expert is not None}
    tokens: Counter[str] = Counter()
    for fit in fits:
        tokens.update({m.module.path: m.tokens for layer in fit.layers for m in layer.modules})
    thin = [path for path, module in experts.items() if tokens[path] < module.in_features]
    diverged = [str(layer) for layer in probe.diverged] if probe is not None else []
    fewest = min(fit.tokens for fit in fits)
    widest = max(signals.features for layer in fits[0].layers for signals in layer.inputs)
    conditions = [
        (
            massive,
            f"massive activations in layer {', '.join(massive)}: a few tokens or features carry over {MASSIVE:.0f} times "
            "the usual energy; the ridge is measured against the usual energy, so the layer is not wiped out",
        ),
        (
            no_activation,
            f"no activation in layer {', '.join(no_activation)}: these inputs are zero for every token, so adapters there would learn "
            "nothing",
        ),
        (
            no_gradient,
            f"no gradient reaches layer {', '.join(no_gradient)}: its output changes no loss here, or numbers are too small for the dtype; "
            "compare with --dtype float32",
        ),
        (
            diverged,
            f"the step probe's loss is not finite in layer {', '.join(diverged)}: that length of the step counts as no gain; "
            "compare with --dtype float32",
        ),
        (
            fewest < widest,
            f"few tokens: {fewest} in half of the records make steps, fewer than the {widest} features of the widest input; such steps "
            "hold much noise, so profile more records",
        ),
        (
            idle,
            f"experts that no token was sent to, in layer {', '.join(idle)}: they have no signals, so profile more records before "
            "judging these layers",
        ),
        (
            thin,
            f"few tokens for experts: {len(thin)} of {len(experts)} maps of experts saw fewer tokens than they have inputs; their steps "
            "hold much noise, so profile more records before comparing experts",
        ),
        (
            unread,
            f"experts without signals in {len(unread)} of {len(base.blocks)} layers ({(unread or [''])[0]}): they are quantised or run in "
            "a way of their own, so this card is about the other maps alone, and adapters go there",
        ),
        (
            stability < STABLE,
            f"unstable ranking: two halves of the records agree on gain_estimate with Spearman {stability:.2f} only; "
            "profile more records before trusting small differences",
        ),
        (dataset.truncated, f"{dataset.truncated} records were longer than the limit and were cut"),
    ]
    return [words for applies, words in conditions if applies]
