"""The two passes over the records from which every signal of a card comes.

The *fit* pass streams the first share of the records through the model once, forward and backward, and ends in a
low-rank step `Δ_ℓ` for each layer. The *held-out* pass takes the other records: one forward, one backward under the true
labels, and one more for each sample of labels drawn from the model. It leaves scalars for each record only.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from layercard import processes, saved
from layercard.capture import Capture, SignalSink, capturing
from layercard.data import Batch, Example, batches
from layercard.errors import DataError
from layercard.fit_sums import FitSums, own_batches
from layercard.layers import Block, Projection
from layercard.models import BaseModel, Progress, labelled_logits
from layercard.probe import Step, StepProbe
from layercard.soundness import check_signals
from layercard.state import State
from layercard.statistics.moments import GradientMoments, InputMoments
from layercard.statistics.residual import Whitening, projected_residual, ridge_scale

_PROBES = 8


@dataclass(frozen=True)
class ModuleSignals:
    """What the fit pass found at one map; squared norms in nats, energies in squared units of the activations.

    `tokens` entered it: all of the pass, or those that were sent to the expert whose map it is.
    """

    projection: Projection
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
    return saved.Form(kinds, {p.path: p for block in base.blocks for p in block.maps})


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
        progress: Told of batches and layers.
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
    sums = state.load(name) or FitSums()
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
                progress("fit pass", min(at + processes.count(), len(found)), len(found))
    return sums


def fit_sink(sums: FitSums, capture: Capture, blocks: Sequence[Block], tokens: int) -> SignalSink:
    """What adds the signals of a backward pass to the moments; `tokens` are expected in the whole pass."""
    shares = {own.path: stack.active / stack.experts for block in blocks for stack in block.stacks for own in stack.maps}

    def sink(projection: Projection, a_ti: torch.Tensor, d_to: torch.Tensor, _: torch.Tensor | None) -> None:
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
    present = [projection for projection in block.maps if projection.path in gradients]
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
    drawn = torch.randn(width, _PROBES, generator=torch.Generator().manual_seed(1))
    return (drawn / math.sqrt(_PROBES)).to(like)


class HeldOutSums:
    """Adds tokens up to records while the backward passes run."""

    def __init__(self, base: BaseModel, fit: Fit, held: HeldOut) -> None:
        self.fit, self.held = fit, held
        self.layer_of = {p.path: block.index for block in base.blocks for p in block.maps}
        self.record_of_token = torch.zeros(0, dtype=torch.long)

    def enter(self, batch: Batch) -> None:
        """What comes from now on is of this batch."""
        numbers = torch.tensor(batch.rows).unsqueeze(1).expand(-1, batch.input_ids.shape[1])
        self.record_of_token = numbers[batch.attention_mask.bool().cpu()]

    def _adder(self, tokens: torch.Tensor | None) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """What adds values of these tokens of the batch, all of them for `None`, to their records."""
        records = self.record_of_token if tokens is None else self.record_of_token[tokens.cpu()]

        def add(values_t: torch.Tensor, into_n: torch.Tensor) -> None:
            into_n.index_add_(0, records, values_t.double().cpu())

        return add

    def true_labels(self, projection: Projection, a_ti: torch.Tensor, d_to: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Slopes and contributions under the true labels."""
        directions = self.fit.map_directions.get(projection.path)
        if directions is None:
            return
        layer, rank, add = self.layer_of[projection.path], directions.rank, self._adder(tokens)
        a = a_ti.to(directions.inputs.dtype) @ directions.inputs
        d = d_to.to(directions.outputs.dtype) @ directions.outputs
        add((a[:, :rank] * d[:, :rank]).sum(dim=1), self.held.slopes[layer])
        add((a[:, rank : rank + _PROBES] * d[:, rank:]).sum(dim=1), self.held.gradient[layer])
        add((a[:, rank + _PROBES :] * d[:, rank:]).sum(dim=1), self.held.residual[layer])
        probes = self.fit.input_directions.get(projection.path)
        if probes is not None:
            _input_contributions(a_ti.to(probes.dtype), probes, self.held.inputs[projection.path], add)

    def drawn_labels(self, sample: int) -> SignalSink:
        """A sink for the backward pass under the drawn labels of one sample."""

        def sink(projection: Projection, a_ti: torch.Tensor, d_to: torch.Tensor, tokens: torch.Tensor | None) -> None:
            directions = self.fit.map_directions.get(projection.path)
            if directions is None:
                return
            rank = directions.rank
            a = a_ti.to(directions.inputs.dtype) @ directions.inputs[:, :rank]
            d = d_to.to(directions.outputs.dtype) @ directions.outputs[:, :rank]
            self._adder(tokens)((a * d).sum(dim=1), self.held.drawn[sample, self.layer_of[projection.path]])

        return sink


def _input_contributions(
    a_ti: torch.Tensor, probes: torch.Tensor, into: torch.Tensor, add: Callable[[torch.Tensor, torch.Tensor], None]
) -> None:
    a = a_ti @ probes
    z, product, top, solved = a[:, :_PROBES], a[:, _PROBES : 2 * _PROBES], a[:, 2 * _PROBES], a[:, 2 * _PROBES + 1 :]
    for at, values in enumerate((a_ti.square().sum(dim=1), (z * product).sum(dim=1), top.square(), solved.square().sum(dim=1))):
        add(values, into[at])


def held_out_pass(
    base: BaseModel,
    examples: Sequence[Example],
    fit: Fit,
    *,
    samples: int,
    seed: int,
    batch_size: int,
    progress: Progress | None = None,
    state: State | None = None,
) -> HeldOut:
    """Scalars of records that had no part in making the steps. Several processes share the batches; all get the whole result.

    Args:
        base: The model.
        examples: The held-out records.
        fit: What the fit pass found.
        samples: How many times labels are drawn from the model.
        seed: Of the draws; those of a record are its own, whatever batch it is in.
        batch_size: Records in a batch.
        progress: Told of each backward pass.
        state: Where the scalars are kept from time to time.
    """
    state, name = state or State(), f"held-out-pass-{processes.rank()}"
    kept = state.load(name) or {"batches": 0, "held": HeldOut.empty(len(base.blocks), len(examples), samples, fit.input_directions)}
    held: HeldOut = kept["held"]
    sums = HeldOutSums(base, fit, held)
    found = list(batches(examples, batch_size, base.pad_id, by_length=True))
    with capturing(base.model, base.blocks) as capture:
        for at in own_batches(kept["batches"], len(found)):
            batch = found[at].to(base.device)
            sums.enter(batch)
            held.tokens.index_add_(0, sums.record_of_token, torch.ones(len(sums.record_of_token), dtype=torch.float64))
            capture.start(batch.attention_mask, sums.true_labels, keep=samples > 0)
            logits, targets, rows = labelled_logits(base.model, batch)
            losses = cross_entropy(logits.float(), targets, reduction="none")
            record = torch.tensor(batch.rows)[rows.cpu()]
            held.nats.index_add_(0, record, losses.detach().double().cpu())
            held.labelled.index_add_(0, record, torch.ones(len(record), dtype=torch.float64))
            losses.sum().backward(retain_graph=samples > 0)
            _draw(capture, sums, logits, label_thresholds(record, samples, seed))
            kept["batches"] = at + 1
            state.snapshot(name, lambda: kept)
            if progress:
                progress("held-out pass", min(at + processes.count(), len(found)), len(found))
    for tensor in held.tensors():
        processes.add_up(tensor)
    return held


def label_thresholds(record_m: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    """Uniform draws `[samples, M]` by which labels are drawn, for labelled tokens of the records `record_m: [M]`.

    Each record has a generator of its own, so that its draws depend neither on the batch it is in nor on how many processes share the
    records.
    """
    drawn = torch.empty(samples, len(record_m))
    for record in record_m.unique().tolist():
        own = record_m == record
        generator = torch.Generator().manual_seed((1_000_003 * seed + record) % 2**32)
        drawn[:, own] = torch.rand(samples, int(own.sum()), generator=generator)
    return drawn


def _draw(capture: Capture, sums: HeldOutSums, logits: torch.Tensor, thresholds_sm: torch.Tensor) -> None:
    """Backward passes under labels drawn from the model, through the graph that is there."""
    samples = len(thresholds_sm)
    for sample, slope in enumerate(drawn_slopes(logits, thresholds_sm)):
        capture.sink, capture.keep = sums.drawn_labels(sample), sample + 1 < samples
        logits.backward(slope, retain_graph=sample + 1 < samples)


def drawn_slopes(logits: torch.Tensor, thresholds_sm: torch.Tensor) -> Iterator[torch.Tensor]:
    """For each sample of labels drawn from the model the gradient of their summed cross entropy by the logits, `[M, vocabulary]`."""
    if not len(thresholds_sm):
        return
    probabilities = logits.detach().float().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    for drawn in thresholds_sm:
        thresholds = drawn.to(logits.device).unsqueeze(1) * cumulative[:, -1:]
        targets = torch.searchsorted(cumulative, thresholds)[:, 0].clamp(max=logits.shape[1] - 1)
        slope = probabilities.clone()
        slope[torch.arange(len(targets)), targets] -= 1
        yield slope.to(logits.dtype)
