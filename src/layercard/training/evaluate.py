"""How good a model is on held-out records: loss per labelled token, and how close what it writes is to what should be written."""

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from torch import nn

from layercard.data.checks import check_ids, precision_advice
from layercard.data.load import IGNORED, Batch, Dataset, Example, batches
from layercard.errors import DataError, ModelError
from layercard.measure import Phases
from layercard.models.load import BaseModel, Progress, describe, quiet_libraries
from layercard.models.losses import RecordLosses, record_losses
from layercard.statistics.ratios import ratio_interval
from layercard.training.records import Evaluation, Interval

_NUMBER = re.compile(r"(?:(?<![\w.,)])[-−])?[$€£]?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d+)?")


def evaluate(
    base: BaseModel,
    dataset: Dataset,
    *,
    model: Any = None,
    adapter: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    with_generation: bool = True,
    losses: RecordLosses | None = None,
    texts: list[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Held-out loss and perplexity, and for records with `references` or an `answer` the quality of what the model writes.

    Args:
        base: The base model.
        dataset: Held-out records.
        model: `base` with adapters (`adapters.loaded`); the base model itself when not given.
        adapter: Folder of these adapters, for the record.
        batch_size: Records that go through the model at once.
        max_new_tokens: Longest continuation.
        with_generation: Whether to generate at all: it costs one forward pass for each new token.
        losses: Those of every record, where they are known already.
        texts: Continuations of the records that have `references` or an `answer`, where they are known already.
        progress: Told of the phases `evaluate` and `generate`, in records.
    """
    phases = Phases()
    if losses is None:
        with phases.phase("evaluate"):
            losses = held_out_losses(base.model if model is None else model, base.pad_id, dataset, batch_size=batch_size, progress=progress)
    low, high = ratio_interval(losses.nats, losses.tokens)
    answerable = [example for example in dataset.examples if "references" in example.record or "answer" in example.record]
    generation = None
    if answerable and with_generation and base.classes is None:
        if texts is None:
            with phases.phase("generate"):
                texts = generate(base, answerable, model=model, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
        generation = score_texts([example.record for example in answerable], texts) | {"max_new_tokens": max_new_tokens}
    accuracy, accuracy_interval = None, None
    if base.classes is not None and losses.right is not None:
        accuracy, accuracy_interval = losses.accuracy, ratio_interval(losses.right, losses.tokens)
    return Evaluation(
        model=describe(base),
        data=describe_data(dataset),
        loss=losses.loss,
        loss_interval=(low, high),
        perplexity=losses.perplexity,
        perplexity_interval=(math.exp(min(low, 700.0)), math.exp(min(high, 700.0))),
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        generation=generation,
        phases=phases.to_json(),
        adapter=None if adapter is None else str(adapter),
    )


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """The `data` object of run records: where records came from, and how many there are."""
    return {
        "source": dataset.source,
        "fingerprint": dataset.fingerprint,
        "records": len(dataset),
        "tokens": dataset.tokens,
        "labelled_tokens": dataset.labelled_tokens,
        "truncated": dataset.truncated,
    } | ({"left_out": dataset.left_out} if dataset.left_out else {})


# Losses


def held_out_losses(
    model: nn.Module, pad_id: int, dataset: Dataset, *, batch_size: int = 16, progress: Progress | None = None, phase: str = "evaluate"
) -> RecordLosses:
    """Losses of every record, in eval mode and without gradients; the mode is put back afterwards.

    Records of similar length share a batch; the result is in the order of `dataset`. `progress` is told of `phase`, in records.

    Raises:
        DataError: No record has a labelled token, or one has ids that the model does not have.
        ModelError: A loss is not finite.
    """
    if dataset.labelled_tokens == 0:
        raise DataError(f"{dataset.source} has no labelled token to measure on; give records with completions")
    check_ids(model, dataset)
    device, training = next(model.parameters()).device, model.training

    def on_device() -> Iterator[Batch]:
        done = 0
        for batch in batches(dataset.examples, batch_size, pad_id, by_length=True):
            yield batch.to(device)
            done += len(batch.rows)
            if progress is not None:
                progress(phase, done, len(dataset))

    model.eval()
    try:
        losses = record_losses(model, on_device(), len(dataset))
    finally:
        model.train(training)
    broken = (~losses.nats.isfinite()).nonzero()
    if len(broken) > 0:
        advice = f"check the weights and the record, or lower the learning rate{precision_advice(model)}"
        raise ModelError(f"the loss on record {int(broken[0]) + 1} of {dataset.source} is not finite; {advice}")
    return losses


def reduction_interval(before: RecordLosses, after: RecordLosses, seed: int = 0) -> Interval:
    """Interval of the loss reduction `before.loss − after.loss` on the same records (nats per labelled token)."""
    return ratio_interval(before.nats - after.nats, before.tokens, seed)


# Generation


def generate(
    base: BaseModel,
    examples: list[Example],
    *,
    model: Any = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy continuations of the examples' prompts, up to the end token, in the order of `examples`.

    Args:
        base: Gives the tokenizer, and the model unless `model` is given.
        examples: Whose prompts to continue.
        model: The base model with adapters.
        max_new_tokens: Where to stop at the latest; earlier where the model's positions end.
        batch_size: Prompts that go through the model at once.
        progress: Told of the phase `generate`, in records.
    """
    model = base.model if model is None else model
    ends = end_ids(base)
    positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    prompts = [prompt_of(example) for example in examples]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # prompts of similar length share a batch
    texts, training = [""] * len(prompts), model.training
    model.eval()
    try:
        with torch.no_grad(), quiet_libraries():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                # Padding stands on the left, so that every row goes on from its own last token.
                width = len(prompts[rows[-1]])
                padding = [width - len(prompts[row]) for row in rows]
                ids = [[base.pad_id] * gap + list(prompts[row]) for row, gap in zip(rows, padding, strict=True)]
                output = model.generate(
                    input_ids=torch.tensor(ids, device=base.device),
                    attention_mask=torch.tensor([[0] * gap + [1] * (width - gap) for gap in padding], device=base.device),
                    max_new_tokens=max_new_tokens if positions is None else min(max_new_tokens, max(1, positions - width)),
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,  # some models bring one of their own in generation_config.json
                    no_repeat_ngram_size=0,
                    use_cache=True,
                    pad_token_id=base.pad_id,
                    eos_token_id=sorted(ends) or None,
                )
                for row, tokens in zip(rows, output[:, width:].tolist(), strict=True):
                    texts[row] = base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                if progress is not None:
                    progress("generate", start + len(rows), len(prompts))
    finally:
        model.train(training)
    return texts


def end_ids(base: BaseModel) -> set[int]:
    """End tokens of the tokenizer and of the model's own generation settings, which may have more (end of a chat turn)."""
    ends = base.model.generation_config.eos_token_id
    return {base.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def prompt_of(example: Example) -> tuple[int, ...]:
    """The tokens before the first labelled one: what is given to the model to go on from."""
    labelled = (place for place, label in enumerate(example.labels) if label != IGNORED and place > 0)
    return example.input_ids[: next(labelled, len(example.labels))]


# Scores of texts


def score_texts(records: list[dict[str, Any]], texts: list[str]) -> dict[str, Any]:
    """Metrics of generated `texts`, one for each record: overlap with its `references`, equality with its `answer`."""
    scores: dict[str, Any] = {"records": len(records)}
    pairs = list(zip(records, texts, strict=True))
    with_references = [(text, list(map(str, record["references"]))) for record, text in pairs if record.get("references")]
    if with_references:
        scores |= overlap([text for text, _ in with_references], [references for _, references in with_references])
    answered = [exact_match(text, str(record["answer"])) for record, text in pairs if "answer" in record]
    if answered:
        right = torch.tensor(answered, dtype=torch.float64)
        scores |= {"exact_match": float(right.mean()), "exact_match_interval": list(ratio_interval(right, torch.ones_like(right)))}
    shown = ("prompt", "references", "answer")
    scores["texts"] = [{name: record[name] for name in shown if name in record} | {"text": text} for record, text in pairs]
    return scores


def overlap(texts: list[str], references: list[list[str]]) -> dict[str, Any]:
    """BLEU, chrF and ROUGE-L of `texts` against one or more references each, all from 0 to 100.

    BLEU and chrF are sacrebleu's, over the whole corpus; ROUGE-L is the F measure with the best reference, averaged over texts.

    >>> overlap(["a cat sat on the mat"], [["a cat sat on the mat", "there was a cat"]])
    {'bleu': 100.0, 'chrf': 100.0, 'rouge_l': 100.0}
    """
    most = max(map(len, references))
    streams: list[Any] = [[several[place] if place < len(several) else None for several in references] for place in range(most)]
    scorer = RougeScorer(["rougeL"])
    best = [scorer.score_multi(several, text)["rougeL"].fmeasure for text, several in zip(texts, references, strict=True)]
    return {
        "bleu": round(BLEU(force=True).corpus_score(texts, streams).score, 4),
        "chrf": round(CHRF().corpus_score(texts, streams).score, 4),
        "rouge_l": round(100 * sum(best) / len(best), 4),
    }


def exact_match(text: str, answer: str) -> bool:
    """Whether the final number of `text` is the number `answer`.

    >>> exact_match("so 1,000 + 80 = 1080 #### 1,080", "1080.0")
    True
    """
    number = final_number(answer)
    return number is not None and final_number(text) == number


def final_number(text: str) -> Decimal | None:
    """The first number after the last `####`, or without that mark the last number of the text; `None` where there is none.

    Thousands commas, currency signs and a minus sign are understood; a dash between two numbers is not a minus sign.

    >>> final_number("he has 5 left, #### -1,080 apples and 3 pears"), final_number("from 3-5 it is 2.50")
    (Decimal('-1080'), Decimal('2.50'))
    """

    def numbers(part: str) -> list[Decimal]:
        matches = ((match[0], (match[1] or "").replace(",", "") + (match[2] or "")) for match in _NUMBER.finditer(part))
        return [Decimal(f"-{digits}" if written[0] in "-−" else digits) for written, digits in matches if digits]

    _, mark, tail = text.rpartition("####")
    marked = numbers(tail) if mark else []
    return marked[0] if marked else next(reversed(numbers(text)), None)
