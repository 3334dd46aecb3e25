"""The race: a few short trainings on the user's own data choose layers, modules and the learning rate of a long one.

A heat is one complete training (`train`, with its own warm-up and decay) of one entrant, only shorter; it ends with the loss on held-out
records. The race goes in three rounds, so that no grid is filled:

1. *Rate*: all layers at three learning rates, a factor of 2 apart.
2. *Placement*: the other entrants at the rate that this round found, each moved by its own rule (`usual_rate`).
3. *Final*: the leaders again, `LONGER` times as long, which also tells whether the order lasts.

Short runs want higher rates than long ones, down to `SETTLED` steps. So a heat of r steps that stands for T steps runs at
`(T / max(r, SETTLED)) ** SHIFT` times the rate of the long run, and more where that goes over the records several times; what wins is moved
back by the same factor (`moved`).

Every heat is a trial (`trials.trial`) that is never made twice: a race that was killed goes on when it is asked for again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from layercard.errors import BenchmarkError
from layercard.models.load import Progress
from layercard.models.losses import RecordLosses
from layercard.selection.learning_rate import Length, moved
from layercard.settings import TrainSettings
from layercard.trials.records import Entrant, Heat, Race, TrialRecord
from layercard.trials.trial import Opener, Trial, run_trials
from layercard.trials.workers import Workers

SHORTEST, LONGEST = 8, 64
"""Steps of a heat: below, chance decides; above, more heats say more."""
JUDGES = (16, 64)
"""Held-out records that heats are measured on, the least and the most."""
RATE_HEATS = 3
"""Learning rates that the first round tries."""
LONGER = 3
"""How much longer the final is than the rounds before it."""
FINALISTS = 2
HEAT_NOISE = 0.026
"""Standard deviation of the difference between two heats with the same records, as a share of what training takes away: that of trainings
of 32 steps over seeds, one model, three tasks (`benchmarks/race_constants.py`)."""
CERTAIN = 0.9
"""Probability with which the chosen entrant must be within the tolerance of the best."""


@dataclass(frozen=True)
class Course:
    """What all heats of a race share.

    Attributes:
        task: Model and records, with the judging records as the split `valid`; or what opens them in a worker.
        settings: Those of the long run; steps and learning rate are set heat by heat.
        length: Of the long run.
        folder: Where heats lie.
        workers: Where they run.
        progress: Told of every heat.
    """

    task: Opener
    settings: TrainSettings
    length: Length
    folder: Path
    workers: Workers = field(default_factory=Workers)
    progress: Progress | None = None

    def heats(self, entrants: Sequence[Entrant], steps: int) -> list[Heat]:
        """Train each entrant for so many steps, or read that it was."""
        trials, heat = [], Length(steps, self.length.passes * steps / self.length.steps)
        for entrant in entrants:
            rate = float(f"{moved(entrant.learning_rate, self.length, heat):.4g}")
            how = replace(self.settings, steps=steps, epochs=None, learning_rate=rate, save_steps=0, report_to="none", patience=None)
            trials.append(Trial("race", entrant.layers, how, modules=entrant.modules, split="valid"))
        records = run_trials(trials, self.task, self.folder, self.workers, self.progress)
        return [_heat_of(record, entrant) for record, entrant in zip(records, entrants, strict=True)]


def _heat_of(record: TrialRecord, entrant: Entrant) -> Heat:
    steps = record.settings["steps"]
    return Heat(
        entrant=entrant,
        steps=steps,
        learning_rate=record.settings["learning_rate"],
        loss=record.loss_after,
        nats=record.valid["per_record"]["nats_after"] if record.loss_after is not None else (),
        step_seconds=(record.train_seconds or 0.0) / steps,
        peak_memory_bytes=record.peak_memory_bytes or 0,
        trainable_parameters=record.trainable_parameters or 0,
        seconds=sum(phase["seconds"] for phase in record.phases),
    )


class Shape(NamedTuple):
    """How large a race is: entrants besides the reference, steps of a heat, whether a longer final follows, records to judge by."""

    entrants: int
    steps: int
    final: bool
    judges: int

    def heats(self) -> int:
        """Heats of `steps` steps that it comes to; the first round has three."""
        return RATE_HEATS + self.entrants + (FINALISTS * LONGER if self.final else 0)


def race_shape(steps: int, budget_steps: float, batch_size: int) -> Shape | None:
    """The largest race that fits: `None` where not even the learning rate can be searched.

    Args:
        steps: Updates of the long run.
        budget_steps: What the race may take, in steps of all layers.
        batch_size: Records in a step; a record costs a third of a training step to measure.

    >>> race_shape(2000, 400, 8).steps, race_shape(225, 45, 8), race_shape(100, 20, 8)
    (28, Shape(entrants=1, steps=9, final=False, judges=36), None)
    """
    for entrants, final in ((4, True), (3, False), (1, False), (0, False)):
        for length in range(min(LONGEST, steps // 2), SHORTEST - 1, -1):
            judges = min(JUDGES[1], max(JUDGES[0], length * batch_size // 2))
            shape = Shape(entrants, length, final, judges)
            if shape.heats() * (length + judges / batch_size / 3) <= budget_steps:
                return shape
    return None


def race(
    course: Course,
    entrants: Sequence[Entrant],
    shape: Shape,
    before: RecordLosses,
    *,
    about: Mapping[str, Any],
    objective: str = "time",
    tolerance: float = 0.01,
    search_rate: bool = True,
    max_memory: float | None = None,
    left_out: Sequence[str] = (),
) -> Race:
    """Let entrants run and choose one.

    Which heats are run depends on their losses alone and not on the clock, so a race that was killed, or runs on other workers, comes to
    the same choice where losses do.

    Args:
        course: What the heats share.
        entrants: The first is the reference, whose learning rate is searched (all layers and modules, as a rule).
        shape: How large it is (`race_shape`).
        before: Losses of the base on the judging records.
        about: `model` and `data` of the record.
        objective: What the choice shall be cheap in, among those that are good enough; `quality`: the least loss.
        tolerance: How far above the best loss is good enough, as a share of it.
        search_rate: Whether the first round looks for the learning rate; else that of the reference is taken.
        max_memory: Bytes above the frozen model; an entrant that was measured to take more is not chosen.
        left_out: Entrants that do not take part, in words, for the record.

    Raises:
        BenchmarkError: No entrant keeps `max_memory`, or all of them diverged.
        TrainingError: As `train`.
    """
    first, others = entrants[0], entrants[1 : shape.entrants + 1]
    skipped = [*left_out, *(f"{entrant.name}: no time for it" for entrant in entrants[shape.entrants + 1 :])]

    # Round 1: the learning rate of the reference, at two factors and at one more on the side that is better.
    factors = (1.0, 2.0) if search_rate else (1.0,)
    by_factor = dict(zip(factors, course.heats([_at(first, factor) for factor in factors], shape.steps), strict=True))
    if search_rate:
        third = 4.0 if by_factor[2.0].result < by_factor[1.0].result else 0.5
        by_factor[third] = course.heats([_at(first, third)], shape.steps)[0]
    factor = _lowest(by_factor)
    heats = list(by_factor.values())

    # Round 2: the other entrants, each at its own usual rate times the factor that the reference wanted.
    ran = [min(heats, key=lambda heat: heat.result), *course.heats([_at(entrant, factor) for entrant in others], shape.steps)]
    heats += ran[1:]
    finite = [heat for heat in ran if heat.loss is not None]
    if not finite:
        raise BenchmarkError("every heat diverged; give a lower --learning-rate")
    allowed = [heat for heat in finite if max_memory is None or heat.peak_memory_bytes <= max_memory]
    if not allowed:
        least = min(finite, key=lambda heat: heat.peak_memory_bytes)
        raise BenchmarkError(
            f"nothing keeps {(max_memory or 0) / 2**20:,.0f} MiB; {least.entrant.name} takes least, "
            f"{least.peak_memory_bytes / 2**20:,.0f} MiB; allow more, or lower the batch size"
        )

    # Round 3: the best and the cheapest that may be as good, longer.
    finalists, last = _finalists(allowed, objective), allowed
    if shape.final and len(finalists) > 1:
        again = [_at(first, factor) if heat.entrant.name == first.name else heat.entrant for heat in finalists]
        last = [heat for heat in course.heats(again, min(LONGER * shape.steps, course.length.steps)) if heat.loss is not None] or allowed
        heats += last if last is not allowed else []
    winner, why = choose(last, before, objective, tolerance)
    return Race(
        model=dict(about["model"]),
        data=dict(about["data"]),
        held_out_records=len(before.tokens),
        labelled=tuple(before.tokens.int().tolist()),
        loss_before=before.loss,
        steps=course.length.steps,
        objective=objective,
        tolerance=tolerance,
        heats=tuple(heats),
        chosen=_at(first, factor) if winner.entrant.name == first.name else winner.entrant,
        why=why,
        seconds=sum(heat.seconds for heat in heats),
        left_out=tuple(skipped),
    )


def _at(entrant: Entrant, factor: float) -> Entrant:
    """An entrant with its learning rate times a factor."""
    return entrant.model_copy(update={"learning_rate": float(f"{entrant.learning_rate * factor:.4g}")})


def _lowest(by_factor: dict[float, Heat]) -> float:
    """The factor of least loss: the lowest point of a parabola through the best and its neighbours, or the best where it is at an edge."""
    best = min(by_factor, key=lambda factor: by_factor[factor].result)
    if not {best / 2, best * 2} <= set(by_factor):
        return best
    left, middle, right = (by_factor[best * step].result for step in (0.5, 1.0, 2.0))
    if math.isinf(left + right):
        return best
    bend = left - 2 * middle + right
    return best if bend <= 0 else float(best * 2 ** (0.5 * (left - right) / bend))


def _finalists(heats: Sequence[Heat], objective: str) -> list[Heat]:
    """The best, and of the rest the one that would be chosen if it were as good: the cheapest that is not far behind."""
    ranked = sorted(heats, key=lambda heat: heat.result)
    best, rest = ranked[0], ranked[1:]
    if objective == "quality" or not rest:
        return ranked[:FINALISTS]
    near = [heat for heat in rest if heat.result - best.result <= 3 * HEAT_NOISE * max(heat.result for heat in ranked)] or rest[:1]
    return [best, *sorted(near, key=lambda heat: price(heat, objective))[: FINALISTS - 1]]


def price(heat: Heat, objective: str) -> float:
    """What an objective wants little of."""
    return {"time": heat.step_seconds, "memory": float(heat.peak_memory_bytes), "quality": heat.result}[objective]


def choose(heats: Sequence[Heat], before: RecordLosses, objective: str, tolerance: float) -> tuple[Heat, str]:
    """The cheapest heat that is within `tolerance` of the best with probability `CERTAIN`, and why in a sentence.

    The difference between two heats is taken as normal: its value is that of their losses on the same records, its variance the
    bootstrap's over records and that of a training (`HEAT_NOISE` of what training takes away).
    """
    tokens = before.tokens
    best = min(heats, key=lambda heat: heat.result)
    noise = HEAT_NOISE * max(before.loss - best.result, 0.0)

    def certainty(heat: Heat) -> float:
        if heat is best:
            return 1.0
        difference = [a - b for a, b in zip(heat.nats, best.nats, strict=True)]
        mean = heat.result - best.result
        residuals = [d - mean * t for d, t in zip(difference, tokens.tolist(), strict=True)]
        sampling = math.sqrt(sum(value * value for value in residuals)) / float(tokens.sum())
        spread = math.hypot(sampling, noise)
        margin = tolerance * best.result - mean
        return 0.5 * (1 + math.erf(margin / spread / math.sqrt(2))) if spread > 0 else float(margin >= 0)

    good = [heat for heat in heats if certainty(heat) >= CERTAIN]
    chosen = best if objective == "quality" else min(good, key=lambda heat: price(heat, objective))
    if chosen is best:
        others = [heat for heat in heats if heat is not best and price(heat, objective) < price(best, objective)]
        why = f"{best.entrant.name} has the least loss ({best.result:.4f} after {best.steps} steps)"
        if others and objective != "quality":
            closest = max(others, key=certainty)
            why += f"; {closest.entrant.name} is cheaper, but within {100 * tolerance:g} % only with {100 * certainty(closest):.0f} %"
        return best, why
    why = (
        f"{chosen.entrant.name} is the cheapest in {objective} within {100 * tolerance:g} % of the best ({best.entrant.name}: "
        f"{best.result:.4f} against {chosen.loss:.4f} after {best.steps} steps) with {100 * certainty(chosen):.0f} % probability"
    )
    return chosen, why
