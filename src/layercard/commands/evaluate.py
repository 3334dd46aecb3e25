"""`layercard eval`: held-out loss, perplexity, and what a model writes."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.settings import DataSettings, LoadSettings, setting

if TYPE_CHECKING:
    from layercard.training.records import Evaluation

SCORES = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L", "exact_match": "Exact match"}
"""Scores of what was written, and how they are shown."""


def evaluate(
    model: str = opt.MODEL,
    data: str = opt.DATA,
    adapter: Path | None = setting(None, "An adapter that `layercard train` wrote; else the base model.", metavar="DIR"),
    generate: int = setting(128, "Write up to N new tokens for records with references or an answer; 0 for none.", low=0),
    records: int | None = opt.RECORDS,
    batch_size: int = opt.batch_size(16),
    reading: DataSettings = DataSettings(),
    loading: LoadSettings = LoadSettings(),
    as_json: bool = opt.AS_JSON,
) -> None:
    """Measure a model, with or without an adapter, on held-out records.

    Always: loss per labelled token and perplexity. For records with `references`: BLEU, chrF and ROUGE-L of greedy
    continuations. For records with an `answer`: how often the final number is right. For classifiers: accuracy.
    """
    opt.check_data(data)
    from layercard.adapters.apply import loaded
    from layercard.training.evaluate import evaluate as measure

    with Display() as display:
        base = opt.load(model, loading, display)
        dataset = opt.read(data, base, records, reading)
        with loaded(base, adapter) if adapter else nullcontext(base.model) as measured:
            result = measure(
                base,
                dataset,
                model=measured,
                adapter=adapter,
                batch_size=batch_size,
                max_new_tokens=max(generate, 1),
                with_generation=generate > 0,
                progress=display,
            )
    show_result(result.to_json(), as_json, _view(result))


def _view(result: "Evaluation") -> Any:
    from layercard.report.terminal import pairs

    (low, high), (p_low, p_high) = result.loss_interval, result.perplexity_interval
    data = result.data
    rows = {
        "Model": result.model["name"] + (f" with {result.adapter}" if result.adapter else ""),
        "Data": f"{data['source']} · {data['records']:,} records · {data['labelled_tokens']:,} labelled tokens",
        "Loss": f"{result.loss:.4f} ({low:.4f} to {high:.4f}) nats per labelled token",
        "Perplexity": f"{result.perplexity:.3f} ({p_low:.3f} to {p_high:.3f})",
    }
    if result.accuracy is not None and result.accuracy_interval is not None:
        a_low, a_high = result.accuracy_interval
        rows["Accuracy"] = f"{100 * result.accuracy:.1f} % ({100 * a_low:.1f} to {100 * a_high:.1f})"
    for key, name in SCORES.items():
        score = (result.generation or {}).get(key)
        if score is not None:
            rows[name] = f"{100 * score:.1f} %" if key == "exact_match" else f"{score:.2f}"
    return pairs(rows)
