"""What the fit pass sums up: kept on the way, and put together where several processes share the batches.

The first of the two passes over the records from which every signal of a card comes, and what both give.

The *fit* pass streams the first share of the records through the model once, forward and backward, and ends in a low-rank step `Δ_ℓ` for
each layer. The *held-out* pass (`layercard.held_out`) takes the other records.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layercard import checkpoint as saved, processes
from layercard.checkpoint import State
from layercard.data.checks import check_signals
from layercard.data.load import Batch, Example, batches, positions
from layercard.errors import DataError
from layercard.models.hooks import Capture, GradientSink, capturing
from layercard.models.layers import Block, LinearModule
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import labelled_logits
from layercard.profiling.step_probe import Step, StepProbe
from layercard.statistics.moments import GradientMoments, InputMoments
from layercard.statistics.residual import Whitening, projected_residual, ridge_scale

# ---- fit_sums


@dataclass
class FitSums:
    """What the fit pass has summed up after some of its batches.

    Attributes:
        batches: Number of the batch that comes next.
        labelled: Labelled tokens.
        nats: Their summed loss.
        leaders: For each map the one whose input moments it shares (`Capture.leaders`).
        inputs: Moments by path of the leading map.
        gradients: Moments by path.
    """

    batches: int = 0
    labelled: int = 0
    nats: float = 0.0
    leaders: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, InputMoments] = field(default_factory=dict)
    gradients: dict[str, GradientMoments] = field(default_factory=dict)

    def merge(self, like: torch.Tensor) -> None:
        """Put the sums of all processes in place of this one's; all of them must call it.

        A map that ran in other processes only (an expert, or any map where there are fewer batches than processes) gets its sums too.

        Args:
            like: A tensor of the model's dtype on its device.
        """
        if processes.count() == 1:
            return
        self.nats, labelled = processes.total([self.nats, self.labelled])
        self.labelled = int(labelled)
        everywhere = [json.loads(data) for data in processes.gathered(json.dumps(self._shapes()).encode())]
        self.leaders = _union(theirs["leaders"] for theirs in everywhere)
        for path, (features, keep_rows) in _union(theirs["inputs"] for theirs in everywhere).items():
            moments = self.inputs.setdefault(path, InputMoments(features, keep_rows))
            moments.update(like.new_zeros(0, features))
            moments.across(processes.add_up, processes.stacked)
        for path, (outputs, features, keep_rows) in _union(theirs["gradients"] for theirs in everywhere).items():
            slopes = self.gradients.setdefault(path, GradientMoments(outputs, features, keep_rows))
            slopes.update(like.new_zeros(0, features), like.new_zeros(0, outputs))
            slopes.across(processes.add_up, processes.stacked)

    def _shapes(self) -> dict[str, Any]:
        return {
            "leaders": self.leaders,
            "inputs": {path: [sums.features, sums.keep_rows] for path, sums in self.inputs.items()},
            "gradients": {path: [sums.outputs, sums.features, sums.keep_rows] for path, sums in self.gradients.items()},
        }


def _union(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All entries, in an order that is the same in every process."""
    return dict(sorted((path, value) for part in found for path, value in part.items()))


def own_batches(done: int, count: int) -> range:
    """Which of `count` batches this process takes from number `done` on: every so many-th, beginning with its own number.

    >>> own_batches(2, 5)
    range(2, 5)
    """
    step, first = processes.count(), processes.rank()
    return range(done + (first - done) % step, count, step)


# ---- signals

PROBES = 8
"""Random directions by which the held-out pass estimates squared norms."""


@dataclass(frozen=True)
class ModuleSignals:
    """What the fit pass found at one map; squared norms in nats, energies in squared units of the activations.

    `tokens` entered it: all of the pass, or those that were sent to the expert whose map it is.
    """

    projection: LinearModule
    leader: str
    tokens: int
    resnorm_squared: float
    resnorm_rank_squared: float
    residual_energy: float
    gradient_squared: float
    step_squared: float
    noise: float


@dataclass(frozen=True)
class InputSignals:
    """What the fit pass found at one input, which several maps may share."""

    path: str
    features: int
    energy: float
    second_moment_squared: float
    condition: float
    top: float
    ridge: float
    noise_trace: float
    massive: float


@dataclass(frozen=True)
class _Directions:
    """Columns against which the held-out tokens of a map are projected; the first r of each are the step's factors."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    rank: int


@dataclass
class Fit:
    """Result of the fit pass: signals by layer, the low-rank steps, and directions for the held-out pass."""

    tokens: int
    labelled: int
    loss: float
    modules: list[list[ModuleSignals]] = field(default_factory=list)
    inputs: list[list[InputSignals]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    map_directions: dict[str, _Directions] = field(default_factory=dict)
    input_directions: dict[str, torch.Tensor] = field(default_factory=dict)

    def extend(self, upper: "Fit") -> None:
        """Append the layers of another fit of the same records."""
        self.modules += upper.modules
        self.inputs += upper.inputs
        self.steps += upper.steps
        self.map_directions |= upper.map_directions
        self.input_directions |= upper.input_directions


@dataclass(frozen=True)
class HeldOut:
    """Scalars of each held-out record.

    Attributes:
        slopes: True-label derivative of the record's summed loss along each layer's step, `[L, n]`.
        drawn: The same under labels drawn from the model, `[samples, L, n]`.
        labelled: Labelled tokens, `[n]`.
        tokens: Tokens, `[n]`.
        nats: Summed loss, `[n]`.
        residual: Contribution of the record to resnorm² of each layer, `[L, n]`.
        gradient: Contribution to `‖G‖²`, `[L, n]`.
        inputs: For each input path: contributions to `tr Σ`, `‖Σ‖²`, the top eigenvalue and `tr(Σ Σ_λ⁻²)`, `[4, n]`.
    """

    slopes: torch.Tensor
    drawn: torch.Tensor
    labelled: torch.Tensor
    tokens: torch.Tensor
    nats: torch.Tensor
    residual: torch.Tensor
    gradient: torch.Tensor
    inputs: dict[str, torch.Tensor]

    @classmethod
    def empty(cls, layers: int, records: int, samples: int, paths: Iterable[str]) -> "HeldOut":
        """Zeros, to be added to."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, records, dtype=torch.float64)

        return cls(
            slopes=zeros(layers),
            drawn=zeros(samples, layers),
            labelled=zeros(),
            tokens=zeros(),
            nats=zeros(),
            residual=zeros(layers),
            gradient=zeros(layers),
            inputs={path: zeros(4) for path in paths},
        )

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in an order that depends on the model alone."""
        single = [self.slopes, self.drawn, self.labelled, self.tokens, self.nats, self.residual, self.gradient]
        return [*single, *(self.inputs[path] for path in sorted(self.inputs))]


def form(base: BaseModel) -> saved.Form:
    """What the values of the two passes and the step probe are made of, for their `State`."""
    kinds = (Fit, FitSums, ModuleSignals, InputSignals, _Directions, HeldOut, InputMoments, GradientMoments, StepProbe)
    return saved.Form(kinds, {p.path: p for block in base.blocks for p in block.modules})


def fit_pass(
    base: BaseModel,
    examples: Sequence[Example],
    *,
    rank: int,
    ridge: float,
    batch_size: int,
    progress: Progress | None = None,
    state: State | None = None,
) -> Fit:
    """Forward and backward over `examples`, then one step for each layer.

    Several processes share the batches, and the layers once the moments are merged; all get the whole result.

    Args:
        base: The model.
        examples: Records to make the steps from.
        rank: Rank of the steps.
        ridge: λ as a share of `ridge_scale`.
        batch_size: Records in a batch.
        progress: Told of each batch, counted in positions, and of layers.
        state: Where the sums are kept from time to time.

    Raises:
        DataError: The loss is not finite.
    """
    expected = sum(len(example.input_ids) for example in examples)
    state, name = state or State(), f"steps-{processes.rank()}"
    sums = _fit_sums(base, list(batches(examples, batch_size, base.pad_id, by_length=True)), expected, progress, state)
    sums.merge(torch.zeros(0, dtype=next(base.model.parameters()).dtype, device=base.device))
    if not math.isfinite(sums.nats):
        raise DataError(f"the loss of {base.name} on these records is {sums.nats}; check the weights and records, or use --dtype float32")
    parts: dict[str, Fit] = state.load(name) or {}
    for block in base.blocks:
        if block.index % processes.count() == processes.rank() and str(block.index) not in parts:
            part = Fit(expected, sums.labelled, sums.nats / sums.labelled)
            solve_layer(part, block, sums.leaders, sums.inputs, sums.gradients, rank, ridge)
            parts[str(block.index)] = part
            state.snapshot(name, lambda: parts)
        if progress:
            progress("steps", block.index + 1, len(base.blocks))
    for other in processes.gathered(saved.to_bytes(form(base), parts)) if processes.count() > 1 else ():
        parts |= saved.from_bytes(form(base), other)
    fit = Fit(expected, sums.labelled, sums.nats / sums.labelled)
    for block in base.blocks:
        fit.extend(parts[str(block.index)])
    return fit


def _fit_sums(base: BaseModel, found: Sequence[Batch], tokens: int, progress: Progress | None, state: State) -> FitSums:
    """This process's share of the pass, from where the state has it."""
    name = f"fit-pass-{processes.rank()}"
    sums, spent = state.load(name) or FitSums(), positions(found)
    with capturing(base.model, base.blocks) as capture:
        capture.leaders.update(sums.leaders)

        sink = fit_sink(sums, capture, base.blocks, tokens)
        for at in own_batches(sums.batches, len(found)):
            batch = found[at].to(base.device)
            capture.start(batch.attention_mask, sink)
            logits, targets, _ = labelled_logits(base.model, batch)
            loss = cross_entropy(logits.float(), targets, reduction="sum")
            del logits
            loss.backward()
            sums.labelled, sums.nats, sums.batches = sums.labelled + len(targets), sums.nats + float(loss.detach()), at + 1
            del loss
            sums.leaders = dict(capture.leaders)
            state.snapshot(name, lambda: sums)
            if progress:
                progress("fit pass", spent[min(at + processes.count(), len(found)) - 1], spent[-1])
    return sums


def fit_sink(sums: FitSums, capture: Capture, blocks: Sequence[Block], tokens: int) -> GradientSink:
    """What adds the signals of a backward pass to the moments; `tokens` are expected in the whole pass."""
    shares = {own.path: stack.active / stack.experts for block in blocks for stack in block.stacks for own in stack.modules}

    def sink(projection: LinearModule, a_ti: torch.Tensor, d_to: torch.Tensor, _: torch.Tensor | None) -> None:
        dual = tokens * shares.get(projection.path, 1) < projection.in_features
        if capture.leaders[projection.path] == projection.path:
            sums.inputs.setdefault(projection.path, InputMoments(projection.in_features, dual)).update(a_ti)
        empty = GradientMoments(projection.out_features, projection.in_features, dual)
        sums.gradients.setdefault(projection.path, empty).update(a_ti, d_to)

    return sink


def solve_layer(
    fit: Fit,
    block: Block,
    leaders: dict[str, str],
    inputs: dict[str, InputMoments],
    gradients: dict[str, GradientMoments],
    rank: int,
    ridge: float,
) -> None:
    """Turn one layer's moments into signals and a step, and drop the moments."""
    whitenings: dict[str, Whitening] = {}
    modules, entering, step = [], [], {}
    present = [projection for projection in block.modules if projection.path in gradients]
    for projection in present:
        leader = leaders[projection.path]
        check_signals(projection.path, inputs[leader], gradients[projection.path], next(block.module.parameters()).dtype)
        if leader not in whitenings:
            moments = inputs[leader]
            moments.absent = fit.tokens - moments.tokens if projection.expert is not None else 0
            whitenings[leader] = Whitening.of(moments, ridge * ridge_scale(moments))
            entering.append(_input_signals(fit, leader, moments, whitenings[leader]))
        shared, sums = whitenings[leader], gradients.pop(projection.path)
        residual = projected_residual(inputs[leader], sums, shared, 1 / fit.labelled, rank)
        energy = sums.residual_energy(shared.tokens, 1 / fit.labelled)
        trace = next(signals.noise_trace for signals in entering if signals.path == leader)
        modules.append(
            ModuleSignals(
                projection,
                leader,
                inputs[leader].tokens,
                resnorm_squared=residual.squared,
                resnorm_rank_squared=residual.squared_rank,
                residual_energy=energy,
                gradient_squared=residual.gradient_squared,
                step_squared=residual.step_squared,
                noise=energy * trace / shared.tokens,
            )
        )
        step[projection.path] = (residual.down, residual.up)
        z_op = _gaussian(projection.out_features, residual.gradient)
        fit.map_directions[projection.path] = _Directions(
            inputs=torch.cat([residual.down.T, residual.gradient.T @ z_op, -residual.step.T @ z_op], dim=1),
            outputs=torch.cat([residual.up, z_op], dim=1),
            rank=residual.up.shape[1],
        )
    for leader in whitenings:
        del inputs[leader]
    fit.modules.append(modules)
    fit.inputs.append(entering)
    fit.steps.append(step)


def _input_signals(fit: Fit, path: str, moments: InputMoments, whitening: Whitening) -> InputSignals:
    condition, top = whitening.condition()
    z_ip = _gaussian(moments.features, top)
    product = whitening.times_second_moment(z_ip)
    fit.input_directions[path] = torch.cat([z_ip, product, top.unsqueeze(1), whitening.solve(z_ip)], dim=1)
    if whitening.second_moment is None:
        gram = moments.rows() @ moments.rows().T / moments.count
    else:
        gram = whitening.second_moment
    typical = moments.typical_energy() * moments.features
    return InputSignals(
        path=path,
        features=moments.features,
        energy=moments.energy(),
        second_moment_squared=float(gram.double().square().sum()),
        condition=condition,
        top=float(top @ whitening.times_second_moment(top.unsqueeze(1))[:, 0]),
        ridge=whitening.ridge,
        noise_trace=whitening.noise_trace(),
        massive=moments.energy() / typical if typical > 0 else math.inf,
    )


def _gaussian(width: int, like: torch.Tensor) -> torch.Tensor:
    """Random columns `[width, 8]` with `E[z zᵀ]` summed over columns the identity (Hutchinson)."""
    drawn = torch.randn(width, PROBES, generator=torch.Generator().manual_seed(1))
    return (drawn / math.sqrt(PROBES)).to(like)
