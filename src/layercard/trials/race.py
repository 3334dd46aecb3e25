"""The race: a few short trainings on the user's own data choose layers, modules and the learning rate of a long one.

A heat is one complete training (`train`, with its own warm-up and decay) of one entrant, only shorter; it ends with the loss on held-out
records. The race goes in three rounds, so that no grid is filled:

1. *Rate*: all layers at learning rates a factor of 2 apart, until the best one lies between two worse ones.
2. *Placement*: the other entrants at the rate that this round found, each moved by its own rule (`usual_rate`).
3. *Final*: the leaders again, `LONGER` times as long, which also tells whether the order lasts.

Short runs want higher rates than long ones, down to `SETTLED` steps. So a heat of r steps that stands for T steps runs at
`(T / max(r, SETTLED)) ** SHIFT` times the rate of the long run, and what wins is moved back by the same factor (`moved`).

Every heat is a folder that is never made twice: a race that was killed goes on when it is asked for again.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from layercard.adapters.apply import place
from layercard.card.numbers import stretches
from layercard.data.load import Dataset
from layercard.errors import BenchmarkError
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import RecordLosses
from layercard.records import Part, Record
from layercard.selection.placement import Placement
from layercard.settings import FastSettings, TrainSettings
from layercard.training.records import Run
from layercard.training.train import RUN_FILE, train

SHIFT = 0.35
"""How the best learning rate falls with the number of steps, `steps ** -SHIFT`."""
SETTLED = 24
"""Steps below which the best learning rate no longer rises: there it is limited by what the first steps can bear."""
USUAL = (0.9, 500)
"""The rule for a rate without a race: `USUAL[0] / width` for adapters in all layers and `USUAL[1]` steps; see `usual_rate`."""
LAYERS_SHIFT = 0.3
"""How the best learning rate grows as fewer layers are adapted, `share of layers ** -LAYERS_SHIFT`."""
SHORTEST, LONGEST = 8, 64
"""Steps of a heat: below, chance decides; above, more heats say more."""
JUDGES = (16, 64)
"""Held-out records that heats are measured on, the least and the most."""
RATE_HEATS = 3
"""Learning rates that the first round tries as a rule."""
LONGER = 3
"""How much longer the final is than the rounds before it."""
FINALISTS = 2
MOST_RATES = 4
"""Learning rates that the first round tries at most."""
HEAT_NOISE = 0.015
"""Standard deviation of the difference between two heats with the same records, as a share of the loss that training takes away."""
CERTAIN = 0.9
"""Probability with which the chosen entrant must be within the tolerance of the best."""


class Entrant(Part):
    """What takes part: layers, the set of modules in them, and the peak learning rate that it would have in the long run."""

    name: str
    layers: tuple[int, ...]
    modules: str = "all"
    learning_rate: float

    @property
    def folder(self) -> str:
        """The name of a heat's folder, without its length."""
        layers = ".".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in stretches(self.layers))
        return f"{layers}-{self.modules}-lr{self.learning_rate:.3g}"


class Heat(Part):
    """One entrant after `steps` steps; losses are in nats per labelled token of the held-out records, bytes above the frozen model."""

    entrant: Entrant
    steps: int
    learning_rate: float  # that it ran at
    loss: float
    nats: tuple[float, ...]  # of each held-out record
    step_seconds: float
    peak_memory_bytes: int
    trainable_parameters: int
    seconds: float  # all of it, measuring included


class Race(Record):
    """All heats and what they decided, `race.json`."""

    error: ClassVar = BenchmarkError
    noun: ClassVar = "race"
    made_by: ClassVar = "layercard tune"
    schema_: Literal["layercard-race/1"] = Field(default="layercard-race/1", alias="schema")
    model: dict[str, Any]
    data: dict[str, Any]
    held_out_records: int
    labelled: tuple[int, ...]  # labelled tokens of each held-out record
    loss_before: float
    steps: int  # of the run that it decides for
    objective: str
    tolerance: float
    budget_seconds: float
    heats: tuple[Heat, ...]
    chosen: Entrant
    why: str
    seconds: float
    left_out: tuple[str, ...] = ()  # entrants that did not take part, and why

    def final(self) -> list[Heat]:
        """The heats that decided: those of the greatest length."""
        longest = max((heat.steps for heat in self.heats), default=0)
        return [heat for heat in self.heats if heat.steps == longest]


def usual_rate(width: int, steps: int, share: float = 1.0) -> float:
    """A peak learning rate for LoRA where nothing was measured: it falls with the width and the steps, and grows with fewer layers.

    Args:
        width: Size of the hidden state.
        steps: Updates of the run.
        share: Part of the layers that are adapted, 0 to 1.

    >>> round(usual_rate(576, 500), 5), round(usual_rate(4096, 500), 5)
    (0.00156, 0.00022)
    """
    return moved(USUAL[0] / width, USUAL[1], steps) * share**-LAYERS_SHIFT


def moved(rate: float, steps: int, others: int) -> float:
    """The learning rate for a run of `others` steps that answers to `rate` in one of `steps` steps.

    >>> round(moved(0.002, 960, 96) / 0.002, 2), moved(0.002, 8, 16)
    (2.24, 0.002)
    """
    return rate * (max(steps, SETTLED) / max(others, SETTLED)) ** SHIFT


@dataclass(frozen=True)
class Course:
    """What all heats of a race share, and what its budget is.

    Attributes:
        base: The frozen base model.
        data, valid: Records to train on and to judge by.
        before: Losses of `base` on `valid`.
        settings: Those of the long run; steps and learning rate are set heat by heat.
        fast: Those of the long run.
        steps: Updates of the long run.
        folder: Where heats lie.
        budget: Seconds that the race may take.
        progress: Told of every heat.
    """

    base: BaseModel
    data: Dataset
    valid: Dataset
    before: RecordLosses
    settings: TrainSettings
    fast: FastSettings
    steps: int
    folder: Path
    budget: float
    progress: Progress | None = None

    def placement(self, entrant: Entrant) -> Placement:
        """An entrant as a placement with its learning rate."""
        placement = place(self.base, entrant.layers, objective=entrant.name, modules=entrant.modules)
        return placement.changed(learning_rate=entrant.learning_rate)

    def heat(self, entrant: Entrant, steps: int) -> Heat:
        """Train an entrant for so many steps, or read that it was."""
        rate = moved(entrant.learning_rate, self.steps, steps)
        settings = replace(self.settings, steps=steps, epochs=None, learning_rate=float(f"{rate:.4g}"), save_steps=0, report_to="none")
        folder = self.folder / f"{entrant.folder}-n{steps}"
        told = self.progress and (lambda phase, done, total: self.progress(f"{entrant.name}: {phase}", done, total))  # type: ignore[misc]
        how: dict[str, Any] = {"valid": self.valid, "fast": self.fast, "before": self.before, "progress": told}
        unfinished = folder.exists() and not (folder / RUN_FILE).exists()
        run = train(self.base, self.placement(entrant), self.data, folder, settings, **how, resume=not unfinished, force=unfinished)
        return _heat_of(run, entrant)


def _heat_of(run: Run, entrant: Entrant) -> Heat:
    assert run.valid is not None and run.loss_after is not None
    return Heat(
        entrant=entrant,
        steps=run.steps,
        learning_rate=run.settings["learning_rate"],
        loss=run.loss_after,
        nats=run.valid["per_record"]["nats_after"],
        step_seconds=run.train_seconds / run.steps,
        peak_memory_bytes=run.peak_memory_bytes,
        trainable_parameters=run.trainable_parameters,
        seconds=sum(phase["seconds"] for phase in run.phases if phase["name"] != "load"),
    )


class Shape(NamedTuple):
    """How large a race is: entrants besides the reference, steps of a heat, whether a longer final follows, records to judge by."""

    entrants: int
    steps: int
    final: bool
    judges: int

    def heats(self) -> int:
        """Heats of `steps` steps that it comes to; the first round has three as a rule."""
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
    *,
    objective: str = "time",
    tolerance: float = 0.01,
    search_rate: bool = True,
    max_memory: float | None = None,
    left_out: Sequence[str] = (),
) -> Race:
    """Let entrants run and choose one.

    Args:
        course: What the heats share.
        entrants: The first is the reference, whose learning rate is searched (all layers and modules, as a rule).
        shape: How large it is (`race_shape`).
        objective: What the choice shall be cheap in, among those that are good enough; `quality`: the least loss.
        tolerance: How far above the best loss is good enough, as a share of it.
        search_rate: Whether the first round looks for the learning rate; else that of the reference is taken.
        max_memory: Bytes above the frozen model; an entrant that was measured to take more is not chosen.
        left_out: Entrants that do not take part, in words, for the record.

    Raises:
        BenchmarkError: No entrant keeps `max_memory`.
        TrainingError: As `train`.
    """
    heats: list[Heat] = []
    skipped = [*left_out, *(f"{entrant.name}: no time for it" for entrant in entrants[shape.entrants + 1 :])]

    def run(entrant: Entrant, steps: int) -> Heat:
        heats.append(course.heat(entrant, steps))
        return heats[-1]

    def left(steps: int) -> float:
        """Budget that remains after so many more steps of a heat as they were so far, in seconds."""
        second = statistics.median(heat.seconds / heat.steps for heat in heats)
        return course.budget - sum(heat.seconds for heat in heats) - second * steps

    # Round 1: the learning rate of the reference. It goes on to a side as long as that side is better.
    first, heat_length = entrants[0], shape.steps
    final_length = min(LONGER * heat_length, course.steps)
    final_steps = FINALISTS * final_length if shape.final else 0
    by_factor = {factor: run(_at(first, factor), heat_length) for factor in ((1.0, 2.0) if search_rate else (1.0,))}
    side = 2.0 if by_factor[max(by_factor)].loss < by_factor[1.0].loss else 0.5
    while search_rate and len(by_factor) < MOST_RATES and left(heat_length * (1 + len(entrants[1 : shape.entrants + 1])) + final_steps) > 0:
        edge = max(by_factor) if side > 1 else min(by_factor)
        if by_factor[edge].loss > min(heat.loss for heat in by_factor.values()):
            break
        by_factor[edge * side] = run(_at(first, edge * side), heat_length)
    factor = _lowest(by_factor)

    # Round 2: the other entrants, each at its own usual rate times the factor that the reference wanted.
    first_round = [min(by_factor.values(), key=lambda heat: heat.loss)]
    for entrant in entrants[1 : shape.entrants + 1]:
        if left(heat_length + final_steps) < 0:
            skipped.append(f"{entrant.name}: no time left for it")
        else:
            first_round.append(run(_at(entrant, factor), heat_length))
    allowed = [heat for heat in first_round if max_memory is None or heat.peak_memory_bytes <= max_memory]
    if not allowed:
        least = min(first_round, key=lambda heat: heat.peak_memory_bytes)
        raise BenchmarkError(
            f"nothing keeps {(max_memory or 0) / 2**20:,.0f} MiB; {least.entrant.name} takes least, "
            f"{least.peak_memory_bytes / 2**20:,.0f} MiB; allow more, or lower the batch size"
        )

    # Round 3: the best and the cheapest that may be as good, longer.
    finalists = _finalists(allowed, objective)
    last = allowed
    if shape.final and len(finalists) > 1:
        last = [run(_at(first, factor) if heat.entrant.name == first.name else heat.entrant, final_length) for heat in finalists]
    winner, why = choose(last, course.before, objective, tolerance)
    return Race(
        model={"name": course.base.name, "fingerprint": course.base.fingerprint, "layers": len(course.base.blocks)},
        data={"source": course.data.source, "fingerprint": course.data.fingerprint, "records": len(course.data)},
        held_out_records=len(course.valid),
        labelled=tuple(course.before.tokens.int().tolist()),
        loss_before=course.before.loss,
        steps=course.steps,
        objective=objective,
        tolerance=tolerance,
        budget_seconds=course.budget,
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
    best = min(by_factor, key=lambda factor: by_factor[factor].loss)
    if not {best / 2, best * 2} <= set(by_factor):
        return best
    left, middle, right = (by_factor[best * step].loss for step in (0.5, 1.0, 2.0))
    bend = left - 2 * middle + right
    return best if bend <= 0 else float(best * 2 ** (0.5 * (left - right) / bend))


def _finalists(heats: Sequence[Heat], objective: str) -> list[Heat]:
    """The best, and of the rest the one that would be chosen if it were as good: the cheapest that is not far behind."""
    ranked = sorted(heats, key=lambda heat: heat.loss)
    best, rest = ranked[0], ranked[1:]
    if objective == "quality" or not rest:
        return ranked[:FINALISTS]
    near = [heat for heat in rest if heat.loss - best.loss <= 3 * HEAT_NOISE * max(heat.loss for heat in ranked)] or rest[:1]
    return [best, *sorted(near, key=lambda heat: price(heat, objective))[: FINALISTS - 1]]


def price(heat: Heat, objective: str) -> float:
    """What an objective wants little of."""
    return {"time": heat.step_seconds, "memory": float(heat.peak_memory_bytes), "quality": heat.loss}[objective]


def choose(heats: Sequence[Heat], before: RecordLosses, objective: str, tolerance: float) -> tuple[Heat, str]:
    """The cheapest heat that is within `tolerance` of the best with probability `CERTAIN`, and why in a sentence.

    The difference between two heats is taken as normal: its value is that of their losses on the same records, its variance the
    bootstrap's over records and that of a training (`HEAT_NOISE` of what training takes away).
    """
    tokens = before.tokens
    best = min(heats, key=lambda heat: heat.loss)
    noise = HEAT_NOISE * max(before.loss - best.loss, 0.0)

    def certainty(heat: Heat) -> float:
        if heat is best:
            return 1.0
        difference = [a - b for a, b in zip(heat.nats, best.nats, strict=True)]
        mean = heat.loss - best.loss
        residuals = [d - mean * t for d, t in zip(difference, tokens.tolist(), strict=True)]
        sampling = math.sqrt(sum(value * value for value in residuals)) / float(tokens.sum())
        spread = math.hypot(sampling, noise)
        margin = tolerance * best.loss - mean
        return 0.5 * (1 + math.erf(margin / spread / math.sqrt(2))) if spread > 0 else float(margin >= 0)

    good = [heat for heat in heats if certainty(heat) >= CERTAIN]
    chosen = best if objective == "quality" else min(good, key=lambda heat: price(heat, objective))
    if chosen is best:
        others = [heat for heat in heats if heat is not best and price(heat, objective) < price(best, objective)]
        why = f"{best.entrant.name} has the least loss ({best.loss:.4f} after {best.steps} steps)"
        if others and objective != "quality":
            closest = max(others, key=certainty)
            why += f"; {closest.entrant.name} is cheaper, but within {100 * tolerance:g} % only with {100 * certainty(closest):.0f} %"
        return best, why
    why = (
        f"{chosen.entrant.name} is the cheapest in {objective} within {100 * tolerance:g} % of the best ({best.entrant.name}: "
        f"{best.loss:.4f} against {chosen.loss:.4f} after {best.steps} steps) with {100 * certainty(chosen):.0f} % probability"
    )
    return chosen, why
