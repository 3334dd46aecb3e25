"""The top of a report: where this model stands on the way from the frozen base to the adapter, and its headline numbers."""

from collections.abc import Sequence

from layercard.card.numbers import Json, best_layers, interval, listed, stability_words
from layercard.cost.model import CostModel
from layercard.records import Estimate
from layercard.report.costs import seconds, size
from layercard.report.roi import Ratio, Ratios
from layercard.report.sources import Sources
from layercard.report.story import Step, Tile
from layercard.report.trials import Row, Trial, mean, task_word


def steps_of(sources: Sources) -> list[Step]:
    """The five steps of the method, each with what is known of it, or with the command that does it."""
    card, placement = sources.card, sources.placement
    model, data, settings = card["model"], card["data"], card["settings"]
    fit = f"{data['fit_records']} of {data['records']}" if data.get("fit_records") else f"{data['records']}"
    known = [
        Step("Phase 1: diagnostic profiling", "Frozen base", "done", f"{model['name']}, {model['layers']} layers, {settings.get('dtype')}"),
        Step(
            "",
            "Local quadratic model",
            "done",
            f"steps from {fit} records, curvature from {settings.get('label_samples', '–')} label samples",
        ),
        Step("", "Layer Card", "done", f"{data['tokens']:,} tokens; its ranking is {stability_words(card).partition(' (')[0]}"),
    ]
    if placement is None:
        return [
            *known,
            Step(
                "Phase 2: objective-driven selection", "Placement", "next", "choose layers", "layercard select card.json -o placement.json"
            ),
            Step("Phase 3: targeted fine-tuning", "Adapter", "later", "train it"),
        ]
    chosen = tuple(placement["layers"])
    which = f"{len(chosen)} of {model['layers']} layers, chosen for {placement['objective']}: {listed(chosen, ' ')}"
    known.append(Step("Phase 2: objective-driven selection", "Placement", "done", which))
    runs = [trial for trial in sources.trials if trial.layers == chosen]
    if runs:
        done = f"trained {'once' if len(runs) == 1 else f'in {len(runs)} runs'}, {len(sources.trials)} runs in all"
        return [*known, Step("Phase 3: targeted fine-tuning", "Adapter", "done", done)]
    command = f"layercard train {model['name']} --placement placement.json --data train.jsonl -o adapter"
    return [*known, Step("Phase 3: targeted fine-tuning", "Adapter", "next", "train it", command)]


def tiles_of(sources: Sources, rows: Sequence[Row], ratios: Ratios | None) -> list[Tile]:
    """Performance kept, speed-up, peak memory, layers and latency of the placement; without one, what the card says by itself."""
    card, placement = sources.card, sources.placement
    depth = int(card["model"]["layers"])
    stable = Estimate.read((card.get("stability") or {}).get("gain_estimate"))
    stability = Tile("Ranking stability", f"{stable.value:.2f}" if stable else "unknown", "", "Spearman, two halves of the records")
    if placement is None or ratios is None:
        best = ", ".join(map(str, sorted(best_layers(card)))) or "not measured"
        return [Tile("Layers", str(depth)), Tile("Best single layers", best, "", "by gain estimate"), stability]
    chosen = tuple(placement["layers"])
    row = next((row for row in rows if row.layers == chosen), None)
    return [
        _kept(card, placement, row),
        _faster(ratios.time),
        _memory(card, chosen, row, ratios.memory),
        Tile("Layers adapted", f"{len(chosen)} of {depth}", "", f"layers {listed(chosen, ' ')}, chosen for {placement['objective']}"),
        _latency(card, chosen, ratios.latency),
        stability,
    ]


def of_the_task(card: Json, trials: Sequence[Trial]) -> list[Trial]:
    """The runs on the card's own data where there are any, else all."""
    task = task_word(str(card["data"]["source"]))
    own = [trial for trial in trials if trial.task == task]
    return own or list(trials)


def _kept(card: Json, placement: Json, row: Row | None) -> Tile:
    trials = [trial for trial in of_the_task(card, row.trials) if trial.kept is not None] if row else []
    if trials:
        found = mean([trial.kept for trial in trials if trial.kept is not None])
        count = "1 run" if len(trials) == 1 else f"{len(trials)} runs"
        where = ", ".join(dict.fromkeys(trial.task for trial in trials))
        return Tile("Performance kept", f"{found.value:.0f} %", _ends(found), f"of all layers' loss reduction; {count} on {where}", True)
    kept = Estimate.read((placement.get("predicted") or {}).get("performance_kept"))
    if kept is None:
        return Tile("Performance kept", "unknown", "", "select from the card, or train it beside all layers")
    return Tile("Performance kept", f"{100 * kept.value:.0f} %", _ends(kept, 100), "of all layers, predicted from the card", False)


def _ends(found: Estimate, scale: float = 1.0) -> str:
    return "" if found.low is None or found.high is None else f"{scale * found.low:.0f}–{scale * found.high:.0f} %"


def _faster(time: Ratio) -> Tile:
    if not time.measured and time.mid == 1:
        return Tile("Training speed-up", "unknown", "", "profile with --cost, or train it beside all layers")
    saved = Estimate(value=100 * (1 - time.mid), low=100 * (1 - time.high), high=100 * (1 - time.low))
    between = _ends(saved) if time.low < time.high else ""
    times = f", {1 / time.mid:.2f} times as fast" if time.mid > 0 else ""
    return Tile("Training speed-up", f"{saved.value:.0f} %", between, f"less time{times}; {time.source}", time.measured)


def _cost(card: Json) -> CostModel | None:
    return CostModel.from_json(dict(card["cost"]), "the card's cost") if card.get("cost") else None


def _memory(card: Json, chosen: Sequence[int], row: Row | None, ratio: Ratio) -> Tile:
    """Memory above the frozen model, as runs count it; the ratio counts the model too."""
    cost = _cost(card)
    trials = [trial for trial in of_the_task(card, row.trials) if trial.memory] if row else []
    if trials:
        found = mean([Estimate(value=trial.memory or 0.0) for trial in trials])
        mib = found.divided_by(2**20)
        whole = [trial.whole_memory for trial in trials if trial.whole_memory]
        share = f"{100 * found.value * len(whole) / sum(whole):.0f} % of all layers; " if whole else ""
        return Tile("Peak memory", f"{mib.value:,.0f} MiB", interval(mib), f"{share}above the frozen model, {len(trials)} runs", True)
    if cost is None:
        return Tile("Peak memory", "unknown", "", "profile with --cost")
    own, every = cost.peak_memory(chosen), cost.peak_memory(range(len(cost.layers)))
    note = f"{100 * own / every:.0f} % of all layers; above the frozen model, {ratio.source}"
    return Tile("Peak memory", size(own), "", note, cost.source == "measured")


def _latency(card: Json, chosen: Sequence[int], ratio: Ratio) -> Tile:
    cost = _cost(card)
    if cost is None or (not ratio.measured and ratio.mid == 1):
        return Tile("Added latency", "unknown", "", "profile with --cost")
    per_token = seconds(cost.inference_latency(chosen), cost)
    note = f"of what adapters in all layers add, {per_token} a token; {ratio.source}"
    return Tile("Added latency", f"{100 * ratio.mid:.0f} %", "", note, ratio.measured)
