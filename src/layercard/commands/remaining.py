"""How long the rest takes: of a phase from its own parts, of a command from what its phases have taken so far."""

import time
from collections.abc import Callable, Mapping


class Pace:
    """How long the rest of a phase takes, judged by the parts that were done while this watched.

    A part's time is a mean over them in which each counts nine tenths of the next, so that a slow beginning is soon forgotten and one slow
    part moves little. What was done before the first call, by an interrupted run, says nothing about time and counts nothing.

    Attributes:
        spent: Seconds in which the parts that count here were done, and `watched` how many they are.
    """

    FADING = 0.9

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done: int | None = None
        self._total = 0
        self._at = self._seconds = self._parts = 0.0
        self.spent, self.watched = 0.0, 0

    def update(self, done: int, total: int) -> None:
        """`done` of `total` parts are behind us now."""
        now = self._clock()
        if self._done is not None and done > self._done:
            new = done - self._done
            kept = self.FADING**new
            counted = (1 - kept) / (1 - self.FADING)
            self._seconds = kept * self._seconds + counted * (now - self._at) / new
            self._parts = kept * self._parts + counted
            self.spent, self.watched = self.spent + now - self._at, self.watched + new
        if done != self._done:
            self._at = now
        self._done, self._total = done, total

    @property
    def share(self) -> float:
        """The share of the phase that is done."""
        return (self._done or 0) / self._total if self._total else 0.0

    @property
    def watched_share(self) -> float:
        """The share of the phase whose time is known."""
        return self.watched / self._total if self._total else 0.0

    def remaining(self) -> float | None:
        """Seconds; they run down while a part is at work, and stand where it takes longer than others. `None`: nothing to judge by."""
        if self._done is None or not self._parts:
            return 0.0 if self._done is not None and self._done >= self._total else None
        each, left = self._seconds / self._parts, self._total - self._done
        return max(each * left - (self._clock() - self._at), each * (left - 1), 0.0)


class Whole:
    """How long the rest of a command takes, from its phases: those at work by their own pace, those to come by the work they are.

    What a unit of work takes is learnt from the phases so far, so an amount of work that was guessed wrongly misleads only until its phase
    begins. Phases that were not expected count nothing.

    Args:
        work: How much work each phase is, in any unit.
    """

    def __init__(self, work: Mapping[str, float]) -> None:
        self.work = dict(work)
        self.paces: dict[str, Pace] = {}

    @property
    def share(self) -> float:
        """The share of all work that is done; phases that were passed over count as done once a later one has begun."""
        done = sum(amount * share for amount, share in self._amounts())
        return done / (sum(self.work.values()) or 1.0)

    def remaining(self) -> float | None:
        """Seconds; `None` as long as no phase tells what work takes."""
        known = [(self.work[name] * pace.watched_share, pace.spent) for name, pace in self.paces.items() if name in self.work]
        amount, seconds = sum(part for part, _ in known), sum(part for _, part in known)
        if not amount:
            return None
        left = 0.0
        for name, share in zip(self.work, (share for _, share in self._amounts()), strict=True):
            own = self.paces[name].remaining() if name in self.paces and share < 1 else None
            left += self.work[name] * (1 - share) * seconds / amount if own is None else own
        return left

    def _amounts(self) -> list[tuple[float, float]]:
        """Work of each phase, and the share of it that is behind us."""
        begun = [name in self.paces for name in self.work]
        last = max((at for at, one in enumerate(begun) if one), default=-1)
        shares = [self.paces[name].share if name in self.paces else float(at < last) for at, name in enumerate(self.work)]
        return list(zip(self.work.values(), shares, strict=True))
