"""How close generated texts are to what was wanted: overlap with references, equality of the final number."""

import re
from decimal import Decimal
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

_NUMBER = re.compile(r"(?:(?<![\w.,)])[-−])?[$€£]?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d+)?")


def overlap(texts: list[str], references: list[list[str]]) -> dict[str, Any]:
    """BLEU, chrF and ROUGE-L of `texts` against one or more references each, all from 0 to 100.

    BLEU and chrF are sacrebleu's, over the whole corpus; ROUGE-L is the F measure with the best reference, averaged over texts.

    >>> overlap(["a cat sat on the mat"], [["a cat sat on the mat", "there was a cat"]])
    {'bleu': 100.0, 'chrf': 100.0, 'rouge_l': 100.0}
    """
    most = max(len(some) for some in references)
    streams: list[Any] = [[some[at] if at < len(some) else None for some in references] for at in range(most)]
    scorer = RougeScorer(["rougeL"])
    best = [scorer.score_multi(some, text)["rougeL"].fmeasure for text, some in zip(texts, references, strict=True)]
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
    wanted = final_number(answer)
    return wanted is not None and final_number(text) == wanted


def final_number(text: str) -> Decimal | None:
    """The first number after the last `####`, or without that mark the last number of the text; `None` where there is none.

    Thousands commas, currency signs and a minus sign are understood; a dash between two numbers is no minus sign.

    >>> final_number("he has 5 left, #### -1,080 apples and 3 pears"), final_number("from 3-5 it is 2.50")
    (Decimal('-1080'), Decimal('2.50'))
    """
    _, mark, tail = text.rpartition("####")
    marked = _numbers(tail) if mark else []
    if marked:
        return marked[0]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[Decimal]:
    found = []
    for match in _NUMBER.finditer(text):
        digits = (match[1] or "").replace(",", "") + (match[2] or "")
        if digits:
            found.append(Decimal(f"-{digits}" if match[0][0] in "-−" else digits))
    return found
