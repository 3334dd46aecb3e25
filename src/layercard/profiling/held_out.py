"""The held-out pass: what the steps of one half of the records do on the other half.

One forward, one backward under the true labels, and one more for each sample of labels drawn from the model, all through one graph. It
leaves only scalars of each record, and on the way the sums from which this half makes steps of its own: so each record makes steps and
measures those of the other half, and no pass is run twice for that. `HeldOutSums` is the same for a model in memory (`held_out_pass`) and
for one on disk (`streamed`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layercard import processes
from layercard.checkpoint import State
from layercard.data.load import Batch, Example
from layercard.models.hooks import GradientSink, capturing
from layercard.models.layers import LinearModule
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import labelled_logits
from layercard.profiling.fit import PROBES, Fit, FitSums, LayerSignals, batches_of_process
from layercard.settings import ProfileSettings


@dataclass(frozen=True)
class HeldOut:
    """Scalars of each record, measured with the steps of the half that it does not belong to.

    Attributes:
        half: Which half it belongs to, 0 or 1, `[n]`.
        slopes: True-label derivative of the record's summed loss along each layer's step, `[L, n]`.
        drawn: The same under labels drawn from the model, `[samples, L, n]`.
        labelled: Labelled tokens, `[n]`.
        tokens: Tokens, `[n]`.
        nats: Summed loss, `[n]`.
        gradient: Contribution to `‖G‖²`, `[L, n]`.
        modules: For each module's path: contributions to resnorm² within reach of the rank, and to all of it, `[2, n]`.
        inputs: For each input path: contributions to `tr Σ`, `‖Σ‖²`, the top eigenvalue and `tr(Σ Σ_λ⁻²)`, `[4, n]`.
    """

    half: torch.Tensor
    slopes: torch.Tensor
    drawn: torch.Tensor
    labelled: torch.Tensor
    tokens: torch.Tensor
    nats: torch.Tensor
    gradient: torch.Tensor
    modules: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]

    @classmethod
    def empty(cls, layers: int, records: int, samples: int, half: int = 0) -> "HeldOut":
        """Zeros, to be added to."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, records, dtype=torch.float64)

        return cls(
            half=torch.full((records,), half),
            slopes=zeros(layers),
            drawn=zeros(samples, layers),
            labelled=zeros(),
            tokens=zeros(),
            nats=zeros(),
            gradient=zeros(layers),
            modules={},
            inputs={},
        )

    def tensors(self) -> list[torch.Tensor]:
        """All that is measured, in an order that depends on the model alone."""
        single = [self.slopes, self.drawn, self.labelled, self.tokens, self.nats, self.gradient]
        return [*single, *(each[path] for each in (self.modules, self.inputs) for path in sorted(each))]

    @classmethod
    def joined(cls, first: "HeldOut", second: "HeldOut") -> "HeldOut":
        """The records of both halves; what only one half measured (an expert that no token of the other was sent to) is 0 in the other."""

        def join(name: str) -> Any:
            one, two = getattr(first, name), getattr(second, name)
            if isinstance(one, torch.Tensor):
                return torch.cat([one, two], dim=-1)
            either = {**one, **two}
            empty = [next((torch.zeros_like(each) for each in part.values()), None) for part in (one, two)]
            return {path: torch.cat([one.get(path, empty[0]), two.get(path, empty[1])], dim=-1) for path in sorted(either)}

        return cls(**{field.name: join(field.name) for field in fields(cls)})


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
        for paths, sums, count in ((self.modules, held_out.modules, 2), (self.inputs, held_out.inputs, 4)):
            for path in paths:
                sums.setdefault(path, torch.zeros(count, len(held_out.nats), dtype=torch.float64))

    def enter(self, batch: Batch) -> None:
        """What comes from now on is of this batch."""
        records = torch.tensor(batch.rows).unsqueeze(1).expand(-1, batch.input_ids.shape[1])
        self.record_of_token = records[batch.attention_mask.bool().cpu()]

    def sink(self, backward: int, make: GradientSink | None = None) -> GradientSink:
        """What takes the signals of a backward pass: 0 under the true labels, else of the sample counted from 1.

        `make` takes them, too: the sums from which these records make steps (`FitSums.sink`).
        """

        def sink(module: LinearModule, a_ti: torch.Tensor, d_to: torch.Tensor, tokens: torch.Tensor | None) -> None:
            if make is not None:
                make(module, a_ti, d_to, tokens)
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
            slope_t = (a[:, :rank] * d[:, :rank]).sum(dim=1)
            add(slope_t, slopes[layer])
            if backward:
                return
            add((a[:, rank : rank + PROBES] * d[:, rank:]).sum(dim=1), self.held_out.gradient[layer])
            within_rank_n, all_n = self.held_out.modules[module.path]
            add(-slope_t, within_rank_n)
            add((a[:, rank + PROBES :] * d[:, rank:]).sum(dim=1) - slope_t, all_n)
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
    *,
    half: int = 0,
    phase: str = "held-out pass",
) -> tuple[HeldOut, FitSums]:
    """Scalars of records that had no part in making the steps, and the sums from which those of half 1 make steps of their own.

    Several processes share the batches; all get the scalars of all, and each its own sums. Those of half 0 made steps before (`fit_pass`):
    their sums stay empty. `progress` is told of batches, counted in positions; unfinished sums go to `state` now and then.
    """
    state, name, samples = state or State(), f"{phase.replace(' ', '-')}-{processes.rank()}", settings.label_samples
    tokens = sum(len(example.input_ids) for example in examples)
    empty = {"batches": 0, "held_out": HeldOut.empty(len(base.blocks), len(examples), samples, half), "sums": FitSums()}
    done = state.load(name) or empty
    held_out: HeldOut = done["held_out"]
    sums: FitSums = done["sums"]
    records = HeldOutSums(held_out, dict(enumerate(fit.layers)))
    with capturing(base.model, base.blocks) as capture:
        capture.leaders.update(sums.leaders)
        make = sums.sink(capture, base.blocks, tokens) if half else None
        for number, batch in batches_of_process(base, examples, settings.batch_size, done["batches"], phase, progress):
            records.enter(batch)
            held_out.tokens.index_add_(0, records.record_of_token, torch.ones(len(records.record_of_token), dtype=torch.float64))
            capture.start(batch.attention_mask, records.sink(0), keep=samples > 0)
            logits, targets, rows = labelled_logits(base.model, batch)
            record = torch.tensor(batch.rows)[rows.cpu()]
            starts = backward_starts(held_out, record, logits, targets, label_thresholds(record, samples, 2 * settings.seed + half))
            for backward, (tensor, gradient, again) in enumerate(starts):
                capture.sink, capture.keep = records.sink(backward, make if backward == 0 else None), again
                tensor.backward(gradient, retain_graph=again)
            done["batches"] = number + 1
            if half:
                sums.leaders = dict(capture.leaders)
            state.snapshot(name, lambda: done)
    if half:
        sums.labelled, sums.nats = int(held_out.labelled.sum()), float(held_out.nats.sum())
    for tensor in held_out.tensors():
        processes.add_up(tensor)
    return held_out, sums
