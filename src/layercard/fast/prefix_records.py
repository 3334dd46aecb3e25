"""A batch taken apart into records, each known by its tokens and their positions, whatever the batch around it.

A *record* is a run of real tokens: what is between the padding of a row, or one of several that follow each other in a packed row. What
the frozen blocks make of it depends on its tokens and positions alone, so these two are its key; order, batch size and padding are not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from layercard.data.load import Example
from layercard.fast.packing import Records

KEY_BYTES = 16

Ints = npt.NDArray[np.integer]


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
    apart: Callable[[int, int], bool],
    *,
    starts: Ints | None = None,
    relative: bool = False,
) -> tuple[Record, ...]:
    """The records of a batch, row by row.

    Args:
        ids_bt: Token ids `[B, T]`.
        mask_bt: 1 for real tokens and 0 for padding, `[B, T]`; without it all tokens are real.
        positions_bt: Position ids `[B, T]` or `[1, T]`; without them columns are positions.
        apart: `apart(row, column)` says whether the token there does not see the one before it. Asked where positions do not go on:
            two records if it says so, else one with these very positions.
        starts: Where the records of a single row `[1, N]` start, where that is known.
        relative: Whether only distances between positions count, so that the key need not hold the first one.

    Raises:
        Uncacheable: The mask has holes or other values than 0 and 1, or a shape is another.
    """
    batch, width = ids_bt.shape
    firsts, stops = np.zeros(batch, dtype=np.int64), np.full(batch, width)
    if mask_bt is not None:
        if mask_bt.shape != ids_bt.shape:
            raise Uncacheable(f"a mask of shape {list(mask_bt.shape)} for tokens of shape {list(ids_bt.shape)}")
        real = mask_bt.astype(bool)
        if mask_bt.dtype != bool and not (mask_bt == real).all():
            raise Uncacheable("a mask with other values than 0 and 1")
        if (np.diff(real.astype(np.int8), axis=1, prepend=0) == 1).sum(axis=1).max(initial=0) > 1:
            raise Uncacheable("a mask with holes")
        firsts = real.argmax(axis=1)
        stops = firsts + real.sum(axis=1)
    if positions_bt is not None and (positions_bt.ndim != 2 or positions_bt.shape[1] != width or len(positions_bt) not in (1, batch)):
        raise Uncacheable(f"positions of shape {list(positions_bt.shape)}")
    tokens = np.ascontiguousarray(ids_bt, dtype=np.int32)
    records = []
    for row, (first, stop) in enumerate(zip(firsts.tolist(), stops.tolist(), strict=True)):
        if first == stop:
            continue
        # Positions that do not go on are either the border of two packed records or part of the key.
        positions = None if positions_bt is None else positions_bt[row if len(positions_bt) > 1 else 0].astype(np.int64)
        jumps = [] if positions is None else (np.flatnonzero(np.diff(positions[first:stop]) != 1) + first + 1).tolist()
        if starts is not None:
            cuts = [int(start) for start in starts if start > 0]
        else:
            cuts = jumps if all(apart(row, column) for column in jumps) else []
        for low, high in zip([first, *cuts], [*cuts, stop], strict=True):
            begin = low if positions is None else int(positions[low])
            uneven = positions is not None and any(low < column < high for column in jumps)
            digest = blake2b(tokens[row, low:high].data, digest_size=KEY_BYTES, person=b"uneven" if uneven else b"")
            if begin and not relative:
                digest.update(b"@%d" % begin)
            if uneven and positions is not None:
                digest.update((positions[low:high] - begin).tobytes())
            records.append(Record(row, low, high, digest.digest()))
    return tuple(records)


def record_key(example: Example, relative: bool) -> bytes:
    """The key of an example that stands alone in its row, as a batch gives it."""
    ids = np.array([example.input_ids])
    (record,) = take_apart(ids, None, np.arange(ids.shape[1])[None], lambda row, column: False, relative=relative)
    return record.key


@dataclass
class Selection:
    """Some records of a batch `[B, T]`, taken out of everything that is handed to a block."""

    shape: tuple[int, int]  # B and T; 1 and N for a packed row
    index: torch.Tensor  # rows, or tokens of the packed row
    lengths: Sequence[int] = ()  # of the chosen records of a packed row; none for rows
    _parts: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[Record], hidden: torch.Tensor) -> "Selection":
        """The rows of hidden states `[B, T, width]` with these records, or their tokens where all lie in one row."""
        batch, width = hidden.shape[:2]
        if batch > 1:
            return cls((batch, width), torch.tensor(sorted({record.row for record in records}), device=hidden.device))
        index = torch.cat([torch.arange(record.start, record.stop) for record in records])
        return cls((batch, width), index.to(hidden.device), [record.tokens for record in records])

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with only this part in them; `hidden`, which is one of them, stays as it is.

        Raises:
            Uncacheable: One of them is of another layout.
        """
        return (
            tuple(value if value is hidden else self(value) for value in args),
            {name: value if value is hidden else self(value) for name, value in kwargs.items()},
        )

    def __call__(self, value: Any) -> Any:
        """The part of a value; the same objects give the same results, so that a mask is cut once and not for every block."""
        if id(value) not in self._parts:
            self._parts[id(value)] = (value, self._part(value))  # with the value, so that its id stays taken
        return self._parts[id(value)][1]

    def _part(self, value: Any) -> Any:
        batch, width = self.shape
        if isinstance(value, Records) and self.lengths:
            real = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]
            return replace(Records.of(real.to(value.gather.device)), window=value.window)
        if isinstance(value, tuple | list):
            return type(value)(self._part(item) for item in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if not isinstance(value, torch.Tensor):
            raise Uncacheable(f"the blocks share a {type(value).__name__}")
        if self.lengths:
            if value.ndim == 4 and value.shape[-2:] == (width, width):
                return value.index_select(2, self.index).index_select(3, self.index)
            if value.ndim >= 2 and value.shape[1] == width:
                return value.index_select(1, self.index)
            fits = width not in value.shape
        else:
            if value.ndim >= 2 and value.shape[0] == batch:
                return value.index_select(0, self.index)
            fits = value.ndim < 2 or value.shape[0] == 1
        if not fits:
            raise Uncacheable(f"the blocks share a tensor of shape {list(value.shape)}")
        return value
