"""`layercard eval`: held-out loss, perplexity, and what a model writes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out

NEW_TOKENS = 128


def evaluate(
    model: opt.ModelName,
    data: opt.Data,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="An adapter that `layercard train` wrote; else the base model.")
    ] = None,
    generate: Annotated[
        int,
        typer.Option(
            "--generate", min=0, metavar="N", help="Write up to N new tokens for records with references or an answer; 0 for none."
        ),
    ] = NEW_TOKENS,
    records: opt.Records = None,
    batch_size: opt.BatchSize = 16,
    max_length: opt.MaxLength = 1024,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    trust_remote_code: opt.TrustRemoteCode = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure a model, with or without an adapter, on held-out records.

    Always: loss per labelled token and perplexity. For records with `references`: BLEU, chrF and ROUGE-L of greedy
    continuations. For records with an `answer`: how often the final number is right. For classifiers: accuracy.
    """
    opt.check_data(data)
    from contextlib import nullcontext

    from layercard.adapters.apply import loaded
    from layercard.data.load import load_data
    from layercard.models.load import load_model
    from layercard.training.evaluate import evaluate as measure

    with Display() as display:
        base = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=display)
        dataset = load_data(data, base.tokenizer, records=records, max_length=max_length, classes=base.classes)
        with loaded(base, adapter) if adapter else nullcontext(base.model) as measured:
            result = measure(
                base,
                dataset,
                model=measured,
                batch_size=batch_size,
                max_new_tokens=max(generate, 1),
                with_generation=generate > 0,
                progress=display,
            )
    result["adapter"] = str(adapter) if adapter else None
    if as_json:
        emit_json(result)
        return
    out().print(_view(result))


def _view(result: dict[str, Any]) -> Any:
    from layercard.report.terminal import pairs

    (low, high), (p_low, p_high) = result["loss_interval"], result["perplexity_interval"]
    data = result["data"]
    rows = {
        "Model": result["model"]["name"] + (f" with {result['adapter']}" if result["adapter"] else ""),
        "Data": f"{data['source']} · {data['records']:,} records · {data['labelled_tokens']:,} labelled tokens",
        "Loss": f"{result['loss']:.4f} ({low:.4f} to {high:.4f}) nats per labelled token",
        "Perplexity": f"{result['perplexity']:.3f} ({p_low:.3f} to {p_high:.3f})",
    }
    if result["accuracy"] is not None:
        a_low, a_high = result["accuracy_interval"]
        rows["Accuracy"] = f"{100 * result['accuracy']:.1f} % ({100 * a_low:.1f} to {100 * a_high:.1f})"
    names = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L", "exact_match": "Exact match"}
    for key, name in names.items():
        found = (result.get("generation") or {}).get(key)
        if found is not None:
            rows[name] = f"{100 * found:.1f} %" if key == "exact_match" else f"{found:.2f}"
    return pairs(rows)
