"""Some records of a batch, in all that is handed to a block: rows of a padded batch, or tokens of a packed row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from layercard.fast.packing import Records


class Unselectable(Exception):
    """A block is given something in which the records cannot be told apart."""


@dataclass
class Selection:
    """Which part of a batch `[B, T]` goes on.

    Attributes:
        batch: B.
        width: T, or N for a packed row.
        index: Rows, or tokens of the packed row.
        packed: Which of the two.
        lengths: Lengths of the chosen records of a packed row.
    """

    batch: int
    width: int
    index: torch.Tensor
    packed: bool
    lengths: Sequence[int] = ()
    _made: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with only this part in them; `hidden`, which is one of them, stays as it is.

        Raises:
            Unselectable: One of them is of another layout.
        """
        return (
            tuple(value if value is hidden else self(value) for value in args),
            {name: value if value is hidden else self(value) for name, value in kwargs.items()},
        )

    def __call__(self, value: Any) -> Any:
        """The part of a value; the same objects give the same results, so that a mask is cut once and not for every block."""
        if id(value) not in self._made:
            self._made[id(value)] = (value, self._part(value))
        return self._made[id(value)][1]

    def _part(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tokens(value) if self.packed else self._rows(value)
        if isinstance(value, Records) and self.packed:
            real = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]
            return replace(Records.of(real.to(value.gather.device)), window=value.window)
        if isinstance(value, tuple | list):
            return type(value)(self._part(each) for each in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise Unselectable(type(value).__name__)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 2 or tensor.shape[0] == 1:
            return tensor
        if tensor.shape[0] != self.batch:
            raise Unselectable(f"a tensor of shape {list(tensor.shape)}")
        return tensor.index_select(0, self.index)

    def _tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 4 and tensor.shape[-2:] == (self.width, self.width):
            return tensor.index_select(2, self.index).index_select(3, self.index)
        if tensor.ndim >= 2 and tensor.shape[1] == self.width:
            return tensor.index_select(1, self.index)
        if self.width in tensor.shape:
            raise Unselectable(f"a tensor of shape {list(tensor.shape)}")
        return tensor
