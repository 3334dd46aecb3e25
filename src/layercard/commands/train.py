"""`layercard train` and `layercard eval`: adapters in the layers of a placement and nowhere else, and what a model scores."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.errors import TrainingError
from layercard.processes import is_first
from layercard.settings import DataSettings, FastSettings, LoadSettings, TrainSettings, setting

SCORES = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L", "exact_match": "Exact match"}
"""Scores of what was written, and how they are shown."""


def train(
    model: str = opt.MODEL,
    data: list[str] = opt.DATA,
    placement: Path = setting(..., "A placement that `layercard select` wrote."),
    output: Path = setting(..., "Folder for the adapter, the placement and the run record.", metavar="DIR"),
    valid: list[str] | None = setting(None, f"{opt.VALID[:-1]}: the loss before and after.", metavar="FILE"),
    records: int | None = opt.RECORDS,
    valid_records: int | None = opt.VALID_RECORDS,
    reading: DataSettings = DataSettings(),
    experts: bool = opt.EXPERTS,
    settings: TrainSettings = opt.TRAINING,
    fast: FastSettings = FastSettings(),
    stock: bool = opt.STOCK,
    stream: bool = setting(
        False, "Leave the blocks below the lowest adapted one on disk: for models larger than the memory (docs/larger-than-memory.md)."
    ),
    bits: str | None = setting(
        None,
        "With --stream: the linear modules of the blocks in memory in 4 or 8 bits, where bitsandbytes is installed.",
        choices=("4", "8"),
    ),
    loading: LoadSettings = LoadSettings(),
    resume: bool = opt.RESUME,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Train adapters in the layers of a placement. The folder loads with plain PEFT.

    Under `torchrun` or `accelerate launch` all processes share every batch: losses and adapter are those of one process.
    """
    # What cannot work is refused before anything heavy is imported.
    if is_first():
        opt.check_folder(output, resume=resume, force=force)
    opt.check_data(data, valid, columns=reading.columns)
    fast = opt.fast_or_stock(fast, stock)
    if bits and not stream:
        raise TrainingError("--bits rounds the blocks that --stream leaves in memory; pass --stream too, or name a folder in 4 or 8 bits")
    from layercard.selection.placement import Placement

    chosen = Placement.load(placement)
    from layercard.adapters.apply import without_experts
    from layercard.measure import Phases
    from layercard.models.streamed import open_model
    from layercard.report.terminal import pairs
    from layercard.training.streamed import train_streamed
    from layercard.training.train import NEW, PLAN, first_day, train as run

    phases = Phases()
    with Display() as display:
        with phases.phase("load"):
            streamed = open_model(model, progress=display, **loading.to_json()) if stream else None
            base = streamed.base if streamed is not None else opt.load(model, loading, display, streams=True, trains=True)
        with phases.phase("data"):
            day = first_day(output / NEW / PLAN, output / PLAN) if resume else None
            dataset = opt.read(data, base, records, reading, day)
            held_out = opt.read(valid, base, valid_records, reading, day) if valid else None
        chosen = chosen if experts else without_experts(chosen)
        how: dict[str, Any] = {"valid": held_out, "fast": fast, "resume": resume, "force": force, "progress": display, "phases": phases}
        if streamed is not None:
            record = train_streamed(streamed, chosen, dataset, output, settings, bits=int(bits) if bits else None, **how)
        else:
            record = run(base, chosen, dataset, output, settings, **how)
    if not is_first():
        return
    layers, method = " ".join(map(str, record.placement["layers"])), record.settings["method"]
    rows = {"Adapter": f"{output} · {method} · layers {layers} · {record.trainable_parameters:,} parameters"}
    if record.loss_reduction is not None and record.loss_reduction_interval is not None:
        low, high = record.loss_reduction_interval
        rows["Loss"] = f"{record.loss_before:.4f} → {record.loss_after:.4f} nats per labelled token"
        rows["Reduction"] = f"{record.loss_reduction:.4f} ({low:.4f} to {high:.4f})"
    if record.fast["did"]:
        rows["Left out"] = "\n".join(record.fast["did"].values())
    rows["Learning rate"] = f"{record.settings['learning_rate']:.3g}, {record.learning_rate_source}"
    rows["Training"] = f"{record.steps} steps in {record.train_seconds:.1f} s · layers in backward {record.layers_in_backward}"
    if record.forward_seconds is not None and record.backward_seconds is not None and record.train_seconds > 0:
        forward, backward = (100 * part / record.train_seconds for part in (record.forward_seconds, record.backward_seconds))
        rows["Time"] = f"forward {forward:.0f} %, backward {backward:.0f} %, update and the rest {100 - forward - backward:.0f} %"
        if record.positions_seen > record.tokens_seen:
            rows["Time"] += f" · {1 - record.tokens_seen / record.positions_seen:.0%} of the positions are padding"
        rows["Time"] += " · by layer: layercard cost --explain"
    if record.notes:
        rows["Note"] = "\n".join(record.notes)
    rows["Size"] = f"{record.adapter_bytes / 2**20:.2f} MiB · peak memory {record.peak_memory_bytes / 2**20:,.0f} MiB above the base model"
    then = ("eval", model, *opt.data_options(valid), "--adapter", output) if valid else ("verify", output, "--model", model)
    show_result(record, as_json, pairs(rows), then=then)


def evaluate(
    model: str = opt.MODEL,
    data: list[str] = opt.DATA,
    adapter: Path | None = setting(None, "An adapter that `layercard train` wrote; else the base model.", metavar="DIR"),
    generate: int = setting(128, "Write up to N new tokens for records with references or an answer; 0 for none.", low=0),
    records: int | None = opt.RECORDS,
    batch_size: int = opt.batch_size(16),
    reading: DataSettings = DataSettings(),
    stream: bool = setting(False, "Leave the model on disk: one block in memory at a time, for all records at once."),
    loading: LoadSettings = LoadSettings(),
    as_json: bool = opt.AS_JSON,
) -> None:
    """Measure a model, with an adapter or without, on held-out data.

    Always: loss per labelled token and perplexity. For records with `references`: BLEU, chrF and ROUGE-L of greedy
    continuations. For records with an `answer`: how often the final number is right. For classifiers: accuracy.
    """
    opt.check_data(data, columns=reading.columns)
    from layercard.adapters.apply import loaded
    from layercard.models.streamed import open_model
    from layercard.report.terminal import pairs
    from layercard.training.evaluate import evaluate as measure
    from layercard.training.streamed import evaluate_streamed

    with Display() as display:
        streamed = open_model(model, progress=display, **loading.to_json()) if stream else None
        base = streamed.base if streamed else opt.load(model, loading, display, streams=True)
        dataset = opt.read(data, base, records, reading)
        with loaded(base, adapter) if adapter and not streamed else nullcontext(base.model) as measured:
            how: dict[str, Any] = {"max_new_tokens": max(generate, 1), "with_generation": generate > 0, "progress": display}
            if streamed:
                result = evaluate_streamed(streamed, dataset, adapter=adapter, batch_size=batch_size, **how)
            else:
                result = measure(base, dataset, model=measured, adapter=adapter, batch_size=batch_size, **how)
    (low, high), (p_low, p_high) = result.loss_interval, result.perplexity_interval
    records_info = result.data
    rows = {
        "Model": result.model["name"] + (f" with {result.adapter}" if result.adapter else ""),
        "Data": f"{records_info['source']} · {records_info['records']:,} records · {records_info['labelled_tokens']:,} labelled tokens",
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
    then = ("merge", adapter, "--model", model, "-o", "merged") if adapter else ("run", model, *opt.data_options(data), "-o", "run")
    show_result(result, as_json, pairs(rows), then=then)
