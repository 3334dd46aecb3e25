"""Which positions of the current pass the head will see; changes with the layout of the batch, padded or packed."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_needed: ContextVar[torch.Tensor | None] = ContextVar("needed", default=None)


def needed() -> torch.Tensor | None:
    """Mask `[B, T]` of the positions that the head will see, in the layout that blocks see now; `None` for all."""
    return _needed.get()


@contextmanager
def needing(mask_bt: torch.Tensor | None) -> Iterator[None]:
    """Say so for the length of a `with` block."""
    token = _needed.set(mask_bt)
    try:
        yield
    finally:
        _needed.reset(token)
