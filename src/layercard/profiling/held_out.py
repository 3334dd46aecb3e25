"""The held-out pass: what the steps of a fit do on records that had no part in making them.

One forward, one backward under the true labels, and one more for each sample of labels drawn from the model, all through one graph. It
leaves only scalars of each record. `HeldOutSums` is the same for a model in memory (`held_out_pass`) and for one on disk (`streamed`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from layercard import processes
from layercard.checkpoint import State
from layercard.data.load import Batch, Example
from layercard.models.hooks import GradientSink, capturing
from layercard.models.layers import LinearModule
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import labelled_logits
from layercard.profiling.fit import PROBES, Fit, LayerSignals, batches_of_process
from layercard.settings import ProfileSettings


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
    def empty(cls, layers: int, records: int, samples: int) -> "HeldOut":
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
            inputs={},
        )

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in an order that depends on the model alone."""
        single = [self.slopes, self.drawn, self.labelled, self.tokens, self.nats, self.residual, self.gradient]
        return [*single, *(self.inputs[path] for path in sorted(self.inputs))]


class HeldOutSums:
    """Adds losses and signals up to records while the backward passes run through some layers.

    Args:
        held_out: What is added to.
        layers: Signals of the layers by their index, as the fit pass found them.
    """

    def __init__(self, held_out: HeldOut, layers: dict[int, LayerSignals]) -> None:
        self.held_out = held_out
        self.modules = {signals.module.path: (layer, signals) for layer, each in layers.items() for signals in each.modules}
        self.inputs = {signals.path: signals.directions for each in layers.values() for signals in each.inputs}
        self.record_of_token = torch.zeros(0, dtype=torch.long)
        for path in self.inputs:
            held_out.inputs.setdefault(path, torch.zeros(4, len(held_out.nats), dtype=torch.float64))

    def enter(self, batch: Batch) -> None:
        """What comes from now on is of this batch."""
        records = torch.tensor(batch.rows).unsqueeze(1).expand(-1, batch.input_ids.shape[1])
        self.record_of_token = records[batch.attention_mask.bool().cpu()]

    def sink(self, backward: int) -> GradientSink:
        """What takes the signals of a backward pass: 0 under the true labels, else of the sample counted from 1."""

        def sink(module: LinearModule, a_ti: torch.Tensor, d_to: torch.Tensor, tokens: torch.Tensor | None) -> None:
            if module.path not in self.modules:
                return  # an expert that had no part in the fit
            records = self.record_of_token if tokens is None else self.record_of_token[tokens.cpu()]

            def add(values_t: torch.Tensor, into_n: torch.Tensor) -> None:
                into_n.index_add_(0, records, values_t.double().cpu())

            layer, signals = self.modules[module.path]
            rank, columns = signals.rank, slice(signals.rank if backward else None)
            a = a_ti.to(signals.directions_in.dtype) @ signals.directions_in[:, columns]
            d = d_to.to(signals.directions_out.dtype) @ signals.directions_out[:, columns]
            slopes = self.held_out.drawn[backward - 1] if backward else self.held_out.slopes
            add((a[:, :rank] * d[:, :rank]).sum(dim=1), slopes[layer])
            if backward:
                return
            add((a[:, rank : rank + PROBES] * d[:, rank:]).sum(dim=1), self.held_out.gradient[layer])
            add((a[:, rank + PROBES :] * d[:, rank:]).sum(dim=1), self.held_out.residual[layer])
            directions = self.inputs.get(module.path)
            if directions is not None:
                a_ti = a_ti.to(directions.dtype)
                z, product, top, solved = (a_ti @ directions).split([PROBES, PROBES, 1, PROBES], dim=1)
                energies = (a_ti.square(), z * product, top.square(), solved.square())
                for values, into_n in zip(energies, self.held_out.inputs[module.path], strict=True):
                    add(values.sum(dim=1), into_n)

        return sink


def backward_starts(
    held_out: HeldOut, record_m: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, thresholds_sm: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, bool]]:
    """Add the losses of labelled tokens of the records `record_m: [M]` to these, and give what each backward pass starts from.

    Yields:
        A tensor, its gradient, and whether a later pass needs the graph: first for the true labels, then for each sample of labels drawn
        by `thresholds_sm` (`label_thresholds`).
    """
    losses = cross_entropy(logits.float(), targets, reduction="none")
    held_out.nats.index_add_(0, record_m, losses.detach().double().cpu())
    held_out.labelled.index_add_(0, record_m, torch.ones(len(record_m), dtype=torch.float64))
    yield losses.sum(), None, len(thresholds_sm) > 0
    if not len(thresholds_sm):
        return
    # The gradient of the summed cross entropy by the logits is the probabilities, less one at each label.
    probabilities = logits.detach().float().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    for sample, drawn in enumerate(thresholds_sm):
        thresholds = drawn.to(logits.device).unsqueeze(1) * cumulative[:, -1:]
        labels = torch.searchsorted(cumulative, thresholds)[:, 0].clamp(max=logits.shape[1] - 1)
        slope = probabilities.clone()
        slope[torch.arange(len(labels)), labels] -= 1
        yield logits, slope.to(logits.dtype), sample + 1 < len(thresholds_sm)


def label_thresholds(record_m: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    """Uniform draws `[samples, M]` by which labels are drawn, for labelled tokens of the records `record_m: [M]`.

    Each record has its own generator, so that its draws depend neither on its batch nor on how many processes share the records.
    """
    drawn = torch.empty(samples, len(record_m))
    for record in record_m.unique().tolist():
        of_record = record_m == record
        generator = torch.Generator().manual_seed((1_000_003 * seed + record) % 2**32)
        drawn[:, of_record] = torch.rand(samples, int(of_record.sum()), generator=generator)
    return drawn


def held_out_pass(
    base: BaseModel,
    examples: Sequence[Example],
    fit: Fit,
    settings: ProfileSettings,
    progress: Progress | None = None,
    state: State | None = None,
) -> HeldOut:
    """Scalars of records that had no part in making the steps. Several processes share the batches; all get the whole result.

    `progress` is told of batches, counted in positions; unfinished sums go to `state` now and then.
    """
    state, name, samples = state or State(), f"held-out-pass-{processes.rank()}", settings.label_samples
    done = state.load(name) or {"batches": 0, "held_out": HeldOut.empty(len(base.blocks), len(examples), samples)}
    held_out: HeldOut = done["held_out"]
    sums = HeldOutSums(held_out, dict(enumerate(fit.layers)))
    with capturing(base.model, base.blocks) as capture:
        for number, batch in batches_of_process(base, examples, settings.batch_size, done["batches"], "held-out pass", progress):
            sums.enter(batch)
            held_out.tokens.index_add_(0, sums.record_of_token, torch.ones(len(sums.record_of_token), dtype=torch.float64))
            capture.start(batch.attention_mask, sums.sink(0), keep=samples > 0)
            logits, targets, rows = labelled_logits(base.model, batch)
            record = torch.tensor(batch.rows)[rows.cpu()]
            starts = backward_starts(held_out, record, logits, targets, label_thresholds(record, samples, settings.seed))
            for backward, (tensor, gradient, again) in enumerate(starts):
                capture.sink, capture.keep = sums.sink(backward), again
                tensor.backward(gradient, retain_graph=again)
            done["batches"] = number + 1
            state.snapshot(name, lambda: done)
    for tensor in held_out.tensors():
        processes.add_up(tensor)
    return held_out
