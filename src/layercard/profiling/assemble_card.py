"""From the results of the passes and probes to a card with intervals, stability, and warnings in words.

Measures of the held-out records are resampled as a whole. Measures of the fit pass are moved by the influence that held-out records would
have had on them, so that no pass is run twice.
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
from layercard.profiling.fit import Fit, LayerSignals, ModuleSignals
from layercard.profiling.held_out import HeldOut
from layercard.profiling.step_probe import StepProbe
from layercard.profiling.training_probe import TrainingProbe
from layercard.records import Estimate
from layercard.statistics.coupling import centrality, correlation, curvature, descent, single_gain
from layercard.statistics.coverage import gain_estimate, similarity
from layercard.statistics.intervals import bootstrap_weights, interval, ratio_deviation, split_half_spearman

MASSIVE = 100.0
"""Energy of an input over its usual energy from which on a layer is said to have massive activations."""
STABLE = 0.8
"""Split-half rank correlation of `gain_estimate` below which the ranking is called unstable."""
TINY = 1e-300
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


def assemble_card(
    base: BaseModel,
    dataset: Dataset,
    settings: dict[str, Any],
    fit: Fit,
    held_out: HeldOut,
    probe: StepProbe | None,
    trained: TrainingProbe | None,
) -> LayerCard:
    """The whole card; `settings` say how it was made, `seed` among them.

    Raises:
        DataError: What was measured on the held-out records is not finite.
    """
    check_held_out(dataset.source, held_out.tensors(), base.model)
    records, seed = len(held_out.labelled), settings["seed"]
    weights_bn = bootstrap_weights(records, seed)

    def held_out_measures(weights_n: torch.Tensor) -> dict[str, torch.Tensor]:
        """The measures that come from the held-out records alone, `[L]` each."""
        k, b = curvature(held_out.drawn, held_out.labelled, weights_n), descent(held_out.slopes, held_out.labelled, weights_n)
        rho = correlation(k)
        measures = {"predicted_gain": single_gain(b, k), "centrality": centrality(rho)}
        if probe is not None:
            measures["step_probe"] = probe.gain(weights_n)
        if trained is not None:
            measures["training_probe"] = trained.gain(weights_n)
        gains = measures.get("step_probe", measures["predicted_gain"]).numpy()
        measures["gain_estimate"] = torch.from_numpy(gain_estimate(similarity(rho.numpy()), gains))
        return measures

    values = held_out_measures(torch.ones(records, dtype=torch.float64))
    resampled = [held_out_measures(weights) for weights in weights_bn]
    measures = {name: _estimates(value, torch.stack([each[name] for each in resampled])) for name, value in values.items()}
    measures |= _fit_measures(fit, held_out, weights_bn, math.sqrt(records / (len(dataset) - records)))
    # Layers of the training probe took different numbers of steps, so their order is not compared.
    stability = {
        name: split_half_spearman(lambda weights, name=name: held_out_measures(weights)[name], records, seed)  # type: ignore[misc]
        for name in sorted(values.keys() - {"training_probe"})
    }
    k, parameter = curvature(held_out.drawn, held_out.labelled), next(base.model.parameters())
    return LayerCard(
        model=ModelInfo(**describe(base)),
        data=DataInfo(
            source=dataset.source,
            fingerprint=dataset.fingerprint,
            records=len(dataset),
            tokens=dataset.tokens,
            labelled_tokens=dataset.labelled_tokens,
            fit_records=len(dataset) - records,
            truncated=dataset.truncated,
            loss=float(held_out.nats.sum() / held_out.labelled.sum()),
        ),
        settings={**settings, "dtype": str(parameter.dtype).removeprefix("torch."), "device": parameter.device.type},
        versions={name: version(name) for name in ("torch", "transformers", "layercard")} | {"python": platform.python_version()},
        layers=tuple(
            LayerEntry(
                index=block.index,
                modules=_modules(layer, block.stacks),
                training_probe_steps=None if trained is None else trained.steps[block.index],
                **{name: estimates[block.index] for name, estimates in measures.items()},  # type: ignore[arg-type]
            )
            for block, layer in zip(base.blocks, fit.layers, strict=True)
        ),
        coupling=tuple(tuple(row) for row in correlation(k).tolist()),
        descent=tuple(descent(held_out.slopes, held_out.labelled).tolist()),
        curvature=tuple(k.diagonal().tolist()),
        stability=stability,
        units=UNITS,
        warnings=tuple(warnings_in_words(base, fit, dataset, stability["gain_estimate"], probe)),
    )


def _fit_measures(fit: Fit, held_out: HeldOut, weights_bn: torch.Tensor, shrink: float) -> dict[str, list[Estimate]]:
    """The measures of the fit pass; `shrink` is what turns the error of the held-out records into that of the fit records."""

    def total(name: str) -> torch.Tensor:
        return torch.tensor([sum(getattr(m, name) for m in layer.modules) for layer in fit.layers], dtype=torch.float64)

    def deviation(contributions_ln: torch.Tensor, counts_n: torch.Tensor) -> torch.Tensor:
        """How far a mean over the fit records would move on other records, `[repeats, L]`."""
        return shrink * ratio_deviation(contributions_ln, counts_n, weights_bn)

    # Step 1: sums of squares over a layer's modules. A small change of a step's factor counts twice in its square.
    squared, squared_rank, gradient = total("resnorm_squared"), total("resnorm_rank_squared"), total("gradient_squared")
    energy, step = total("residual_energy").clamp(min=TINY), total("step_squared").clamp(min=TINY)
    moved = _moved(squared, 2 * deviation(held_out.residual, held_out.labelled))
    moved_rank = _moved(squared_rank, 2 * deviation(-held_out.slopes, held_out.labelled))
    moved_gradient = _moved(gradient, 2 * deviation(held_out.gradient, held_out.labelled))
    measures = {
        "resnorm": _estimates(squared.sqrt(), moved.sqrt()),
        "resnorm_rank": _estimates(squared_rank.sqrt(), moved_rank.sqrt()),
        "residual_fraction": _estimates(squared / energy, moved / energy),
        "gradient_norm": _estimates(gradient.sqrt(), moved_gradient.sqrt()),
    }

    # Step 2: measures of the layers' inputs, `[1 + repeats]` each: the value itself, then the resampled ones.
    columns: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("activation_energy", "effective_rank", "condition", "noise_amplification")
    }
    for index, layer in enumerate(fit.layers):
        energies, ranks, conditions, noises = [], [], [], []
        for signals in layer.inputs:
            change = deviation(held_out.inputs[signals.path], held_out.tokens)
            change = torch.cat([torch.zeros(1, 4, dtype=torch.float64), change])
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
    return measures | {name: _estimates(rows[0], rows[1:]) for name, rows in stacked.items()}


def _moved(value: torch.Tensor | float, change: torch.Tensor) -> torch.Tensor:
    """A positive quantity after a small change; `value · exp(change / value)` agrees to first order and stays positive."""
    positive = torch.as_tensor(value, dtype=torch.float64).clamp(min=TINY)
    return positive * (change / positive).clamp(-50, 50).exp()


def _estimates(value_l: torch.Tensor, resampled_bl: torch.Tensor) -> list[Estimate]:
    """An estimate for each layer; its interval holds the value."""
    low, high = interval(resampled_bl)
    ends = zip(value_l.tolist(), torch.minimum(low, value_l).tolist(), torch.maximum(high, value_l).tolist(), strict=True)
    return [Estimate(value=value, low=below, high=above) for value, below, above in ends]


def _modules(layer: LayerSignals, stacks: tuple[ExpertStack, ...]) -> tuple[ModuleCard, ...]:
    """The entries of a layer's modules, then one for each stack of experts; squares add up."""
    ridges = {signals.path: signals.ridge for signals in layer.inputs}

    def entry(path: str, shape: Any, parts: list[ModuleSignals], **more: Any) -> ModuleCard:
        return ModuleCard(
            path=path,
            in_features=shape.in_features,
            out_features=shape.out_features,
            resnorm=math.sqrt(sum(m.resnorm_squared for m in parts)),
            resnorm_rank=math.sqrt(sum(m.resnorm_rank_squared for m in parts)),
            gradient_norm=math.sqrt(sum(m.gradient_squared for m in parts)),
            ridge=statistics.median(ridges[m.leader] for m in parts) if parts else 0.0,
            **more,
        )

    entries = []
    for m in layer.modules:
        if m.module.expert is None:
            shared = None if m.leader == m.module.path else m.leader
            entries.append(entry(m.module.path, m.module, [m], shares_input_with=shared))
    for stack in stacks:
        by_expert = {m.module.expert: m for m in layer.modules if m.module.path.startswith(f"{stack.path}[")}
        experts = [by_expert.get(expert) for expert in range(stack.experts)]  # one that no token was sent to has no signals
        tokens = tuple(0 if m is None else m.tokens for m in experts)
        resnorms = tuple(0.0 if m is None else math.sqrt(m.resnorm_squared) for m in experts)
        parts = list(by_expert.values())
        entries.append(entry(stack.path, stack, parts, experts=stack.experts, expert_tokens=tokens, expert_resnorm=resnorms))
    return tuple(entries)


def warnings_in_words(base: BaseModel, fit: Fit, dataset: Dataset, stability: float, probe: StepProbe | None = None) -> list[str]:
    """What a reader must know before trusting the card, one sentence each; `stability` is the split-half correlation of `gain_estimate`."""
    massive, no_activation, no_gradient, idle = [], [], [], []
    unread: list[str] = []
    for block, layer in zip(base.blocks, fit.layers, strict=True):
        if any(signals.massive > MASSIVE and signals.energy > 0 for signals in layer.inputs):
            massive.append(str(block.index))
        zeros = sum(signals.energy == 0 for signals in layer.inputs)
        if zeros:
            no_activation.append(f"{block.index} ({zeros} of {len(layer.inputs)} inputs)")
        elif all(m.residual_energy == 0 for m in layer.modules):
            no_gradient.append(str(block.index))
        seen = {m.module.path for m in layer.modules}
        unseen = max((sum(module.path not in seen for module in stack.modules) for stack in block.stacks), default=0)
        if unseen:
            idle.append(f"{block.index} ({unseen} of {block.stacks[0].experts})")
        unread += unread_experts(block)[:1]
    experts = [m for layer in fit.layers for m in layer.modules if m.module.expert is not None]
    thin = [m for m in experts if m.tokens < m.module.in_features]
    diverged = [str(layer) for layer in probe.diverged] if probe is not None else []
    widest = max(signals.features for layer in fit.layers for signals in layer.inputs)
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
            fit.tokens < widest,
            f"few tokens: {fit.tokens} made the steps, fewer than the {widest} features of the widest input; resnorm is an "
            "upper bound, so profile more records",
        ),
        (
            idle,
            f"experts that no token was sent to, in layer {', '.join(idle)}: they have no signals, so profile more records before "
            "judging these layers",
        ),
        (
            thin,
            f"few tokens for experts: {len(thin)} of {len(experts)} maps of experts saw fewer tokens than they have inputs; what they add "
            "to resnorm is an upper bound, so profile more records before comparing experts",
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
