"""What a frozen-prefix cache will take and save, from the size of the data and three measured rates."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Seconds a token, as measured on the first batches.

    Attributes:
        compute: The embeddings' and frozen blocks' forward.
        read: Looking a record up and putting its hidden states in place.
        store: Keeping them after they were computed, writing included.
    """

    compute: float
    read: float
    store: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a cache.

    Attributes:
        needed: Bytes that the data set takes; `None` where its size is not known.
        limit: Bytes that the cache may take.
        passes: Passes over the data, training and evaluation.
        break_even: From how many passes on the cache pays; infinite where reading is no faster than computing.
        saved: Seconds saved over all passes; `None` where the size of the data or the rates are not known.
        reason: Why the cache should stay off; empty where it pays.
    """

    needed: int | None
    limit: int
    passes: float
    break_even: float
    saved: float | None
    reason: str

    @property
    def pays(self) -> bool:
        """Whether the cache should be used."""
        return not self.reason


def forecast(
    tokens: int | None, width: int, itemsize: int, *, passes: float, limit: int, rates: Rates | None = None, filled: bool = False
) -> Forecast:
    """Disk or memory use, break-even and time saved of a cache.

    With c, r and w the seconds a token takes to compute, read and store, P passes cost `P c` without a cache and `c + w + (P − 1) r`
    with one, so that it pays from `P = 1 + w / (c − r)` passes on. A cache that is filled already costs `P r`.

    Args:
        tokens: Real tokens of the data set, where they are known.
        width: Width of the hidden states.
        itemsize: Bytes of one number in the cache.
        passes: Expected passes over the data.
        limit: Bytes that the cache may take.
        rates: Measured rates; without them only the size is judged.
        filled: Whether the records are in the cache already.

    >>> forecast(1_000_000, 576, 4, passes=3, limit=10**10, rates=Rates(compute=1e-4, read=1e-5, store=2e-5)).saved
    160.0
    >>> forecast(1_000_000, 576, 4, passes=3, limit=10**9).reason
    'the data set takes 2.3 GB and the cache may take 1.0 GB; raise max_bytes, or keep bfloat16'
    """
    size = None if tokens is None else tokens * width * itemsize
    break_even, saved, reason = 0.0 if filled else 1.0, None, ""
    if rates is not None:
        gain = rates.compute - rates.read
        break_even = float("inf") if gain <= 0 else 0.0 if filled else 1 + rates.store / gain
        spent = passes * rates.read if filled else rates.compute + rates.store + (passes - 1) * rates.read
        saved = None if tokens is None else round(tokens * (passes * rates.compute - spent), 3)
    if size is not None and size > limit:
        mend = "raise max_bytes" + (", or keep bfloat16" if itemsize > 2 else "")
        reason = f"the data set takes {gigabytes(size)} and the cache may take {gigabytes(limit)}; {mend}"
    elif rates is not None and rates.compute <= rates.read:
        reason = f"reading a token takes {rates.read * 1e6:.1f} µs and computing it {rates.compute * 1e6:.1f} µs"
    elif not filled and passes <= break_even:
        reason = f"it pays from {break_even:.2f} passes over the data on, and {passes:g} are expected"
    return Forecast(size, limit, passes, break_even, saved, reason)


def gigabytes(size: float) -> str:
    """A size in words: `2.3 GB`, `140 MB`."""
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}" if size < 100 * bytes_each else f"{size / bytes_each:.0f} {unit}"
    return f"{size:.0f} B"
