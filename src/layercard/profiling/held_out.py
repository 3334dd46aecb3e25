"""The second pass over the records: what the steps of a fit do on records that had no part in making them.

One forward, one backward under the true labels, and one more for each sample of labels drawn from the model, all through one graph. It
leaves scalars for each record only.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy

from layercard import processes
from layercard.checkpoint import State
from layercard.data.load import Batch, Example, batches, positions
from layercard.models.hooks import Capture, GradientSink, capturing
from layercard.models.layers import LinearModule
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import labelled_logits
from layercard.profiling.fit import PROBES, Fit, HeldOut, own_batches


class HeldOutSums:
    """Adds tokens up to records while the backward passes run."""

    def __init__(self, base: BaseModel, fit: Fit, held: HeldOut) -> None:
        self.fit, self.held = fit, held
        self.layer_of = {p.path: block.index for block in base.blocks for p in block.modules}
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

    def true_labels(self, projection: LinearModule, a_ti: torch.Tensor, d_to: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Slopes and contributions under the true labels."""
        directions = self.fit.map_directions.get(projection.path)
        if directions is None:
            return
        layer, rank, add = self.layer_of[projection.path], directions.rank, self._adder(tokens)
        a = a_ti.to(directions.inputs.dtype) @ directions.inputs
        d = d_to.to(directions.outputs.dtype) @ directions.outputs
        add((a[:, :rank] * d[:, :rank]).sum(dim=1), self.held.slopes[layer])
        add((a[:, rank : rank + PROBES] * d[:, rank:]).sum(dim=1), self.held.gradient[layer])
        add((a[:, rank + PROBES :] * d[:, rank:]).sum(dim=1), self.held.residual[layer])
        probes = self.fit.input_directions.get(projection.path)
        if probes is not None:
            _input_contributions(a_ti.to(probes.dtype), probes, self.held.inputs[projection.path], add)

    def drawn_labels(self, sample: int) -> GradientSink:
        """A sink for the backward pass under the drawn labels of one sample."""

        def sink(projection: LinearModule, a_ti: torch.Tensor, d_to: torch.Tensor, tokens: torch.Tensor | None) -> None:
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
    z, product, top, solved = a[:, :PROBES], a[:, PROBES : 2 * PROBES], a[:, 2 * PROBES], a[:, 2 * PROBES + 1 :]
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
        progress: Told of each batch, counted in positions.
        state: Where the scalars are kept from time to time.
    """
    state, name = state or State(), f"held-out-pass-{processes.rank()}"
    kept = state.load(name) or {"batches": 0, "held": HeldOut.empty(len(base.blocks), len(examples), samples, fit.input_directions)}
    held: HeldOut = kept["held"]
    sums = HeldOutSums(base, fit, held)
    found = list(batches(examples, batch_size, base.pad_id, by_length=True))
    spent = positions(found)
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
                progress("held-out pass", spent[min(at + processes.count(), len(found)) - 1], spent[-1])
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
