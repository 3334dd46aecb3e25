"""Half of the records makes a low-rank step `Δ_ℓ` for each layer, to be measured on the other half.

What enters each linear module, and the gradient of what leaves it, is summed up batch by batch (`FitSums`): by the fit pass over the first
half, by the held-out pass (`held_out`) over the second. One solve a layer (`solve_layer`) then turns the sums into signals, steps, and
directions against which the other half is measured. Both are the same for a model in memory and for one on disk (`streamed`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layercard import checkpoint, processes
from layercard.checkpoint import State
from layercard.data.checks import check_signals, precision_advice
from layercard.data.load import Batch, Example, batches, positions
from layercard.errors import DataError
from layercard.models.hooks import Capture, GradientSink, capturing
from layercard.models.layers import Block, LinearModule
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import labelled_logits
from layercard.settings import ProfileSettings
from layercard.statistics.moments import GradientMoments, InputMoments
from layercard.statistics.residual import Whitening, projected_residual, ridge_scale

PROBES = 8
"""Random directions by which the held-out pass estimates squared norms."""

Step = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""For the path of each module (`Block.modules`) the factors `A: [r, in]` and `B: [out, r]` of a step `Δ = B A` of its weight."""


@dataclass
class FitSums:
    """Sums over some batches of the fit pass.

    Attributes:
        batches: Number of the batch that comes next.
        labelled: Labelled tokens.
        nats: Their summed loss.
        leaders: For each module the one whose input moments it shares (`Capture.leaders`).
        inputs: Moments of inputs, by path of the leading module.
        gradients: Moments of output gradients, by path.
    """

    batches: int = 0
    labelled: int = 0
    nats: float = 0.0
    leaders: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, InputMoments] = field(default_factory=dict)
    gradients: dict[str, GradientMoments] = field(default_factory=dict)

    def sink(self, capture: Capture, blocks: Sequence[Block], tokens: int) -> GradientSink:
        """What adds the signals of a backward pass to the moments; `tokens` are expected in the whole pass."""
        shares = {module.path: stack.active / stack.experts for block in blocks for stack in block.stacks for module in stack.modules}

        def sink(module: LinearModule, a_ti: torch.Tensor, d_to: torch.Tensor, _: torch.Tensor | None) -> None:
            keep_rows = tokens * shares.get(module.path, 1) < module.in_features
            if capture.leaders[module.path] == module.path:
                self.inputs.setdefault(module.path, InputMoments(module.in_features, keep_rows)).update(a_ti)
            empty = GradientMoments(module.out_features, module.in_features, keep_rows)
            self.gradients.setdefault(module.path, empty).update(a_ti, d_to)

        return sink

    def merge(self, like: torch.Tensor) -> None:
        """Put the sums of all processes in place of this one's; all of them must call it.

        A module that ran in other processes only (an expert, or any module where there are fewer batches than processes) gets its sums
        too. `like` is a tensor of the model's dtype on its device.
        """
        if processes.count() == 1:
            return
        self.nats, labelled = processes.total([self.nats, self.labelled])
        self.labelled = int(labelled)
        input_shapes = {path: (sums.features, sums.keep_rows) for path, sums in self.inputs.items()}
        gradient_shapes = {path: (sums.outputs, sums.features, sums.keep_rows) for path, sums in self.gradients.items()}
        everywhere = processes.gathered((self.leaders, input_shapes, gradient_shapes))
        self.leaders, inputs, gradients = (_union(parts) for parts in zip(*everywhere, strict=True))
        for path, (features, keep_rows) in inputs.items():
            moments = self.inputs.setdefault(path, InputMoments(features, keep_rows))
            moments.update(like.new_zeros(0, features))
            moments.across(processes.add_up, processes.stacked)
        for path, (outputs, features, keep_rows) in gradients.items():
            slopes = self.gradients.setdefault(path, GradientMoments(outputs, features, keep_rows))
            slopes.update(like.new_zeros(0, features), like.new_zeros(0, outputs))
            slopes.across(processes.add_up, processes.stacked)

    def check_loss(self, base: BaseModel) -> None:
        """Raise `DataError` if the loss is not finite."""
        if not math.isfinite(self.nats):
            advice = f"check the weights and records{precision_advice(base.model)}"
            raise DataError(f"the loss of {base.name} on these records is {self.nats}; {advice}")


def _union(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All entries, in an order that is the same in every process."""
    return dict(sorted((path, value) for part in parts for path, value in part.items()))


@dataclass(frozen=True)
class ModuleSignals:
    """What the fit pass found at one linear module; squared norms in nats, energies in squared units of the activations.

    Attributes:
        leader: Path of the module whose input it reads.
        tokens: How many entered it: all of the pass, or those that were sent to its expert.
        rank: Rank of its step.
        directions_in: `[in, rank + 16]`: the step's `Aᵀ`, then what squared norms of the gradient, and of the residual beyond the rank, are
            estimated with.
        directions_out: `[out, rank + 8]`: the step's `B`, then random directions.
    """

    module: LinearModule
    leader: str
    tokens: int
    resnorm_squared: float
    resnorm_rank_squared: float
    residual_energy: float
    gradient_squared: float
    step_squared: float
    noise: float
    rank: int
    directions_in: torch.Tensor
    directions_out: torch.Tensor


@dataclass(frozen=True)
class InputSignals:
    """What the fit pass found at one input, which several modules may share; `directions` are `[in, 25]`, for the held-out pass."""

    path: str
    features: int
    energy: float
    second_moment_squared: float
    condition: float
    top: float
    ridge: float
    noise_trace: float
    massive: float
    directions: torch.Tensor


@dataclass(frozen=True)
class LayerSignals:
    """What the fit pass found in one layer: its modules (of experts, those that saw a token) and their inputs."""

    modules: list[ModuleSignals]
    inputs: list[InputSignals]

    @property
    def step(self) -> Step:
        """The layer's low-rank step."""
        return {m.module.path: (m.directions_in[:, : m.rank].T, m.directions_out[:, : m.rank]) for m in self.modules}


@dataclass(frozen=True)
class Fit:
    """What one half of the records gave: tokens, labelled tokens, loss in nats per labelled token, and the signals of each layer."""

    tokens: int
    labelled: int
    loss: float
    layers: list[LayerSignals]


def form(base: BaseModel, *classes: type) -> checkpoint.Form:
    """What the results of the passes are made of, for their `State`, and what else is kept there."""
    kinds = (FitSums, ModuleSignals, InputSignals, LayerSignals, Fit, InputMoments, GradientMoments, *classes)
    return checkpoint.Form(kinds, {module.path: module for block in base.blocks for module in block.modules})


def batches_of_process(
    base: BaseModel, examples: Sequence[Example], batch_size: int, done: int, phase: str, progress: Progress | None
) -> Iterator[tuple[int, Batch]]:
    """The batches that this process takes from number `done` on, with their numbers: every n-th of n processes, from its own number on.

    `progress` is told of each batch once the next is asked for, counted in positions.
    """
    every, first = processes.count(), processes.rank()
    all_batches = list(batches(examples, batch_size, base.pad_id, by_length=True))
    positions_done = positions(all_batches)
    for number in range(done + (first - done) % every, len(all_batches), every):
        yield number, all_batches[number].to(base.device)
        if progress:
            progress(phase, positions_done[min(number + every, len(all_batches)) - 1], positions_done[-1])


def fit_pass(
    base: BaseModel, examples: Sequence[Example], settings: ProfileSettings, progress: Progress | None = None, state: State | None = None
) -> Fit:
    """Forward and backward over `examples`, then one step for each layer.

    Several processes share the batches, and the layers once the sums are merged; all get the whole result. `progress` is told of batches,
    counted in positions, and of layers; unfinished sums go to `state` now and then.

    Raises:
        DataError: The loss is not finite.
        ModelError: Activations or gradients are not, though the loss is.
    """
    state, sums_name = state or State(), f"fit-pass-{processes.rank()}"
    tokens = sum(len(example.input_ids) for example in examples)
    sums: FitSums = state.load(sums_name) or FitSums()
    with capturing(base.model, base.blocks) as capture:
        capture.leaders.update(sums.leaders)
        sink = sums.sink(capture, base.blocks, tokens)
        for number, batch in batches_of_process(base, examples, settings.batch_size, sums.batches, "fit pass", progress):
            capture.start(batch.attention_mask, sink)
            logits, targets, _ = labelled_logits(base.model, batch)
            loss = cross_entropy(logits.float(), targets, reduction="sum")
            del logits  # the graph keeps what it needs
            loss.backward()
            sums.labelled, sums.nats, sums.batches = sums.labelled + len(targets), sums.nats + float(loss.detach()), number + 1
            del loss
            sums.leaders = dict(capture.leaders)
            state.snapshot(sums_name, lambda: sums)
    return solved(base, sums, tokens, settings, progress, state)


def solved(
    base: BaseModel, sums: FitSums, tokens: int, settings: ProfileSettings, progress: Progress | None = None, state: State | None = None
) -> Fit:
    """The steps of all layers from the sums of this and all other processes, which share the layers; the sums are used up.

    `tokens` are those of all records. Raises as `fit_pass` does.
    """
    state, layers_name = state or State(), f"steps-{processes.rank()}"
    sums.merge(torch.zeros(0, dtype=next(base.model.parameters()).dtype, device=base.device))
    sums.check_loss(base)
    layers: dict[str, LayerSignals] = state.load(layers_name) or {}
    for block in base.blocks:
        if block.index % processes.count() == processes.rank() and str(block.index) not in layers:
            layers[str(block.index)] = solve_layer(block, sums, tokens, settings)
            state.snapshot(layers_name, lambda: layers)
        if progress:
            progress("steps", block.index + 1, len(base.blocks))
    if processes.count() > 1:
        for other in processes.gathered(checkpoint.to_bytes(form(base), layers)):
            layers |= checkpoint.from_bytes(form(base), other)
    return Fit(tokens, sums.labelled, sums.nats / sums.labelled, [layers[str(block.index)] for block in base.blocks])


def solve_layer(block: Block, sums: FitSums, tokens: int, settings: ProfileSettings) -> LayerSignals:
    """Turn one layer's moments into signals and a step, and drop the moments. `tokens` are those of the whole pass."""
    scale, whitenings = 1 / sums.labelled, {}
    modules: list[ModuleSignals] = []
    inputs: dict[str, InputSignals] = {}
    for module in block.modules:
        if module.path not in sums.gradients:
            continue  # an expert that no token was sent to
        leader = sums.leaders[module.path]
        moments, gradients = sums.inputs[leader], sums.gradients.pop(module.path)
        check_signals(module.path, moments, gradients, next(block.module.parameters()).dtype)
        if leader not in whitenings:
            # λ is measured against the usual energy; tokens that other experts saw count as zeros.
            moments.absent = tokens - moments.tokens if module.expert is not None else 0
            whitenings[leader] = Whitening.of(moments, settings.ridge * ridge_scale(moments))
            inputs[leader] = _input_signals(leader, moments, whitenings[leader])
        whitening = whitenings[leader]
        residual = projected_residual(moments, gradients, whitening, scale, settings.rank)
        energy = gradients.residual_energy(whitening.tokens, scale)
        z_op = _gaussian(module.out_features, residual.gradient)
        beyond_rank = residual.step - residual.up @ residual.down
        modules.append(
            ModuleSignals(
                module,
                leader,
                moments.tokens,
                resnorm_squared=residual.squared,
                resnorm_rank_squared=residual.squared_rank,
                residual_energy=energy,
                gradient_squared=residual.gradient_squared,
                step_squared=residual.step_squared,
                noise=energy * inputs[leader].noise_trace / whitening.tokens,
                rank=residual.up.shape[1],
                directions_in=torch.cat([residual.down.T, residual.gradient.T @ z_op, -beyond_rank.T @ z_op], dim=1),
                directions_out=torch.cat([residual.up, z_op], dim=1),
            )
        )
    for leader in whitenings:
        del sums.inputs[leader]
    return LayerSignals(modules, list(inputs.values()))


def _input_signals(path: str, moments: InputMoments, whitening: Whitening) -> InputSignals:
    condition, top = whitening.condition()
    z_ip = _gaussian(moments.features, top)
    if whitening.second_moment is None:  # ‖A Aᵀ/N‖ equals ‖Σ‖, and is smaller
        second_moment = moments.rows() @ moments.rows().T / moments.count
    else:
        second_moment = whitening.second_moment
    usual_energy = moments.typical_energy() * moments.features
    return InputSignals(
        path=path,
        features=moments.features,
        energy=moments.energy(),
        second_moment_squared=float(second_moment.double().square().sum()),
        condition=condition,
        top=float(top @ whitening.times_second_moment(top.unsqueeze(1))[:, 0]),
        ridge=whitening.ridge,
        noise_trace=whitening.noise_trace(),
        massive=moments.energy() / usual_energy if usual_energy > 0 else math.inf,
        directions=torch.cat([z_ip, whitening.times_second_moment(z_ip), top.unsqueeze(1), whitening.solve(z_ip)], dim=1),
    )


def _gaussian(width: int, like: torch.Tensor) -> torch.Tensor:
    """Random columns `[width, 8]` with `E[z zᵀ]` summed over columns the identity (Hutchinson)."""
    drawn = torch.randn(width, PROBES, generator=torch.Generator().manual_seed(1))
    return (drawn / math.sqrt(PROBES)).to(like)
