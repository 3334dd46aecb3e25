"""The first screen of a report: what was gained, in a sentence and in four numbers."""

from collections.abc import Sequence
from typing import NamedTuple

from layercard.card.card import training_cost
from layercard.card.numbers import PREDICTED
from layercard.records import Estimate
from layercard.report.roi import Ratios, Roi
from layercard.report.sources import Sources
from layercard.report.trials import Trial, TrialGroup, mean
from layercard.report.words import amount, counted, size
from layercard.trials.result import Result

SAME = 0.05
"""Difference of two times or sizes, as a share, below which they are called the same."""
AS_GOOD = 99.0
"""Performance kept, %, from which on a placement is called as good as all layers: where its whole interval lies above."""


class Tile(NamedTuple):
    """A headline number: name, value and interval, where it comes from, and whether it was measured.

    `said` is its part of the sentence. `result` names a line of the calculator, which the page then fills in.
    """

    name: str
    value: str
    between: str = ""
    note: str = ""
    basis: str = ""
    said: str = ""
    result: str = ""


def headline(sources: Sources, groups: Sequence[TrialGroup], ratios: Ratios | None, saved: Roi | None) -> tuple[str, list[Tile]]:
    """The sentence and the tiles; without a placement, what the card says by itself.

    Args:
        sources: What was read.
        groups: Trained placements of the placement's own regime.
        ratios: What the placement costs against all layers; `None` without one.
        saved: What it saves; `None` without one.
    """
    depth = int(sources.model["layers"])
    if sources.chosen is None or ratios is None or saved is None:
        assert sources.card is not None
        best = ", ".join(map(str, sorted(sources.card.best_layers())))
        stable = sources.card.stability.get("gain_estimate")
        tiles = [
            Tile("Layers", str(depth)),
            Tile("Best single layers", best, "", "by gain estimate"),
            Tile("Ranking stability", "unknown" if stable is None else f"{stable:.2f}", "", "Spearman, two halves of the records"),
        ]
        return f"No layers are chosen yet; of {depth}, the best single ones are {best}.", tiles

    layers, modules = sources.chosen
    year, currency = saved.results["saved_year"].mid, saved.inputs.currency
    money = Tile("Saved a year", amount(year), "", f"{currency} at the prices below", result="saved_year")
    result = sources.own_result
    if result is not None:
        tiles = [_kept_by_run(result), _time(ratios, result), _memory_of_run(result), money]
        if result.verdict != "adapt":
            loss = f"the held-out loss went from {result.measured.loss_before:.3f} to {result.measured.loss_after:.3f}"
            why = "no cheaper choice was as good" if result.verdict == "all layers" else "the gain may be chance"
            return f"{'All layers' if result.verdict == 'all layers' else 'Not worth training'}: {why}; {loss}.", tiles
    else:
        group = next((each for each in groups if (each.layers, each.modules) == (layers, modules)), None)
        runs = group.trials if group else ()
        tiles = [_kept(sources, runs), _time(ratios), _memory(sources, runs, ratios), money]
    which = "" if modules == "all" else f", {'MLP' if modules == 'mlp' else modules} modules only"
    said = ", ".join(tile.said for tile in tiles if tile.said) or "nothing is known yet of what they keep or cost"
    return f"{len(layers)} of {depth} layers{which}: {said}", tiles


def _ends(low: float | None, high: float | None, scale: float = 1.0) -> str:
    return "" if low is None or high is None or low == high else f"{scale * low:.0f}–{scale * high:.0f}"


def _kept_tile(kept: Estimate, note: str, basis: str) -> Tile:
    """Performance kept in % of all layers' loss reduction."""
    between = _ends(kept.low, kept.high)
    said = f"{kept.value:.0f} %{f' ({between})' if between else ''} of what all layers learn"
    if kept.low is not None and kept.low >= AS_GOOD:
        said = f"as good as all layers (within {100 - AS_GOOD:.0f} %)"
    return Tile("Performance kept", f"{kept.value:.0f} %", between and f"{between} %", note, basis, f"{said}{_unless_measured(basis)}")


def _unless_measured(basis: str) -> str:
    return "" if basis == "measured" else f" ({basis})"


def _kept(sources: Sources, runs: Sequence[Trial]) -> Tile:
    """From trainings beside all layers, else as the placement predicts."""
    shares = [run.performance_kept for run in runs if run.performance_kept is not None]
    if shares:
        kept = mean(shares)
        of = ", interval over runs" if len(shares) > 1 else ", interval over its held-out records" if kept.low is not None else ""
        note = f"of all layers' loss reduction; {counted(len(shares), 'run')} on {runs[0].task}{of}"
        return _kept_tile(kept, note, "measured")
    predicted = Estimate.read(sources.placement.predicted.get("performance_kept")) if sources.placement is not None else None
    if predicted is not None:
        return _kept_tile(predicted.divided_by(0.01), f"of all layers, {PREDICTED}", "predicted")
    return Tile("Performance kept", "unknown", "", "select from the card, or train it beside all layers")


def _kept_by_run(result: Result) -> Tile:
    """From the held-out loss after a run, and what the race says all layers would have reached."""
    measured, every = result.measured, result.all_layers.loss_reduction
    loss = f"loss {measured.loss_before:.3f} to {measured.loss_after:.3f} on {result.valid['records']:,} held-out records"
    if result.all_layers.source != "estimated" or every.value <= 0:
        between = "" if measured.interval is None else "{:.3f}–{:.3f}".format(*measured.interval)
        return Tile(
            "Loss reduction",
            f"{measured.loss_reduction:.3f}",
            between,
            loss,
            "measured",
            f"a loss reduction of {measured.loss_reduction:.3f}",
        )
    ends = [None if end is None or end <= 0 else 100 * measured.loss_reduction / end for end in (every.high, every.low)]
    kept = Estimate(value=100 * measured.loss_reduction / every.value, low=ends[0], high=ends[1])
    return _kept_tile(kept, loss, "estimated")


def _time(ratios: Ratios, result: Result | None = None) -> Tile:
    """Of training, against all layers; only what has an interval shows one, and a single timing has none."""
    time = ratios.time
    if (not time.measured and time.mid == 1) or time.mid <= 0:
        return Tile("Training time", "unknown", "", "profile with --cost, or train it beside all layers")
    between = _ends(1 - time.high, 1 - time.low, 100)
    change = f"{100 * abs(1 - time.mid):.0f} % {'less' if time.mid <= 1 else 'more'}"
    said = "in the same time" if abs(1 - time.mid) < SAME else f"{1 / time.mid:.1f} times faster" if time.mid < 1 else f"in {change} time"
    note = time.source
    if result is not None:  # one step each, beside each other; the table of ratios says so at length
        note = f"1 timing of a step; {result.seconds.train:.0f} s after {result.seconds.search:.0f} s of search"
    return Tile("Training time", change, between and f"{between} %", note, time.basis, said + _unless_measured(time.basis))


def _memory_tile(peak: Estimate, share: float | None, note: str, basis: str) -> Tile:
    """Peak memory above the frozen model, in bytes, and its share of that of all layers."""
    between = "" if peak.low is None or peak.high is None else f"{peak.low / 2**20:,.0f}–{peak.high / 2**20:,.0f}"
    of_all = "" if share is None else f"{100 * share:.0f} % of all layers', "
    said = "" if share is None else "as much memory" if abs(1 - share) < SAME else f"{100 * share:.0f} % of the memory above the model"
    return Tile("Peak memory", size(peak.value), between, f"{of_all}{note}", basis, said and said + _unless_measured(basis))


def _memory(sources: Sources, runs: Sequence[Trial], ratios: Ratios) -> Tile:
    """From trainings, else from the card's cost."""
    peaks, card = [run.peak_memory_bytes for run in runs if run.peak_memory_bytes], sources.card
    if peaks:
        peak = mean([Estimate(value=value) for value in peaks])
        of_all = [run.memory_of_all for run in runs if run.peak_memory_bytes and run.memory_of_all]
        share = peak.value * len(of_all) / sum(of_all) if of_all else None
        return _memory_tile(peak, share, f"above the frozen model, {counted(len(peaks), 'run')}", "measured")
    if card is not None and card.cost is not None and sources.chosen is not None:
        peak_of, every = training_cost(card).peak_memory, range(card.model.layers)
        peak = Estimate(value=peak_of(sources.chosen[0]))
        return _memory_tile(peak, peak.value / peak_of(every), "above the frozen model", ratios.memory.basis)
    return Tile("Peak memory", "unknown", "", "profile with --cost")


def _memory_of_run(result: Result) -> Tile:
    every = result.all_layers.peak_memory_bytes
    share = result.peak_memory_bytes / every if every and result.all_layers.source == "estimated" else None
    return _memory_tile(Estimate(value=result.peak_memory_bytes), share, "above the frozen model", "measured")
