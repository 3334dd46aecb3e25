"""A batch taken apart into records, each known by its tokens and their positions, whatever the batch around it.

A *record* is a run of real tokens: what is between the padding of a row, or one of several that follow each other in a packed row. What
the frozen blocks make of it depends on its tokens and positions alone, so these two are its key; order, batch size and padding are not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16

Ints = npt.NDArray[np.integer]
Apart = Callable[[int, int], bool]
"""`apart(row, column)`: whether the token at `column` of a row does not see the one before it."""


class Uncacheable(Exception):
    """The hidden states of this batch cannot be kept record by record; the message says why."""


@dataclass(frozen=True)
class Record:
    """A run of real tokens: `row`, first column, the column behind the last, and its key."""

    row: int
    start: int
    stop: int
    key: bytes

    @property
    def tokens(self) -> int:
        """Its length."""
        return self.stop - self.start


def take_apart(
    ids_bt: Ints,
    mask_bt: Ints | None,
    positions_bt: Ints | None,
    apart: Apart,
    *,
    starts: Ints | None = None,
    relative: bool = False,
) -> tuple[Record, ...]:
    """The records of a batch, row by row.

    Args:
        ids_bt: Token ids `[B, T]`.
        mask_bt: 1 for real tokens and 0 for padding, `[B, T]`; without it all tokens are real.
        positions_bt: Position ids `[B, T]` or `[1, T]`; without them columns are positions.
        apart: Asked where positions do not go on: two records if it says so, else one with these very positions.
        starts: Where the records of a single row `[1, N]` start, where that is known.
        relative: Whether only distances between positions count, so that the key need not hold the first one.

    Raises:
        Uncacheable: The mask has holes or other values than 0 and 1, or a shape is another.
    """
    batch, width = ids_bt.shape
    firsts, stops = _runs(ids_bt, mask_bt)
    positions = _positions(positions_bt, batch, width)
    breaks = None if positions is None else np.diff(positions, axis=1) != 1
    tokens = np.ascontiguousarray(ids_bt, dtype=np.int32)
    found = []
    for row in range(batch):
        first, stop = int(firsts[row]), int(stops[row])
        if first == stop:
            continue
        own = None if positions is None else positions[row if len(positions) > 1 else 0]
        gaps = [] if breaks is None else (np.flatnonzero(breaks[row if len(breaks) > 1 else 0, first : stop - 1]) + first + 1).tolist()
        if starts is not None:
            cuts = [int(at) for at in starts if at > 0]
        elif gaps and all(apart(row, at) for at in gaps):
            cuts = gaps
        else:
            cuts = []
        for low, high in zip([first, *cuts], [*cuts, stop], strict=True):
            begin = low if own is None else int(own[low])
            uneven = None if own is None or not any(low < at < high for at in gaps) else own[low:high] - begin
            found.append(Record(row, low, high, _key(tokens[row, low:high], None if relative else begin, uneven)))
    return tuple(found)


def _runs(ids_bt: Ints, mask_bt: Ints | None) -> tuple[Ints, Ints]:
    """First column of each row's run of real tokens, and the one behind it."""
    batch, width = ids_bt.shape
    if mask_bt is None:
        return np.zeros(batch, dtype=np.int64), np.full(batch, width, dtype=np.int64)
    if mask_bt.shape != ids_bt.shape:
        raise Uncacheable(f"a mask of shape {list(mask_bt.shape)} for tokens of shape {list(ids_bt.shape)}")
    real = mask_bt.astype(bool)
    if mask_bt.dtype != bool and not (mask_bt == real).all():
        raise Uncacheable("a mask with other values than 0 and 1")
    counts = real.sum(axis=1)
    firsts = np.where(counts > 0, real.argmax(axis=1), 0)
    if (np.diff(real.astype(np.int8), axis=1, prepend=0) == 1).sum(axis=1).max(initial=0) > 1:
        raise Uncacheable("a mask with holes")
    return firsts, firsts + counts


def _positions(positions_bt: Ints | None, batch: int, width: int) -> Ints | None:
    if positions_bt is None:
        return None
    if positions_bt.ndim != 2 or positions_bt.shape[1] != width or positions_bt.shape[0] not in (1, batch):
        raise Uncacheable(f"positions of shape {list(positions_bt.shape)}")
    return positions_bt.astype(np.int64, copy=False)


def _key(tokens: Ints, first: int | None, uneven: Ints | None) -> bytes:
    """Digest of a record: tokens, its first position where it counts, all positions where they are not consecutive."""
    kind = b"" if uneven is None else b"uneven"
    digest = blake2b(tokens.data, digest_size=KEY_BYTES, person=kind)
    if first:
        digest.update(b"@%d" % first)
    if uneven is not None:
        digest.update(uneven.tobytes())
    return digest.digest()
