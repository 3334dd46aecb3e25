"""One training step with a reading at every border between its parts: of the clock, or of the bytes that are alive."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from layercard.data import Batch
from layercard.memory import LiveTensors
from layercard.models import labelled_losses

MAX_GRAD_NORM = 1.0


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stamps:
    """What the clock showed, in seconds, at the borders of one step.

    Attributes:
        marks: By name and block: `("enter", i)`, `("leave", i)` and `("back", i)` as `capture.stamped` gives them, and with block 0
            `start`, `loss` (once it is known), `backward` (once it is through) and `end` (after the update).
    """

    def __init__(self, device: torch.device, depth: int) -> None:
        self.device, self.depth = device, depth
        self.marks: dict[tuple[str, int], float] = {}

    def __call__(self, name: str, index: int = 0) -> None:
        """Read the clock, once the device has done all that it was told."""
        synchronize(self.device)
        self.marks[name, index] = time.perf_counter()

    def between(self, first: tuple[str, int], second: tuple[str, int]) -> float:
        """Growth from one mark to the other."""
        return self.marks[second] - self.marks[first]

    @property
    def total(self) -> float:
        """The whole step."""
        return self.between(("start", 0), ("end", 0))

    @property
    def embedding(self) -> float:
        """From the start to block 0."""
        return self.between(("start", 0), ("enter", 0))

    @property
    def head(self) -> tuple[float, float]:
        """Forward and backward of all above the last block."""
        return self.between(("leave", self.depth - 1), ("loss", 0)), self.between(("loss", 0), ("back", self.depth))

    def forward(self, index: int) -> float:
        """Forward of a block."""
        return self.between(("enter", index), ("leave", index))

    def backward(self, index: int) -> float:
        """Backward of a block; that of the lowest one in the graph ends with backward itself, and below it there is none."""
        if ("back", index + 1) not in self.marks:
            return 0.0
        return self.between(("back", index + 1), ("back", index) if ("back", index) in self.marks else ("backward", 0))

    @property
    def update(self) -> float:
        """Clipping, optimiser and zeroing."""
        return self.between(("backward", 0), ("end", 0))


class ByteCount(Stamps):
    """Bytes of tensors that the step made and that are alive at its borders, in `marks`; `peaks` holds the most since the border before."""

    def __init__(self, live: LiveTensors, depth: int) -> None:
        super().__init__(torch.device("cpu"), depth)
        self.live = live
        self.peaks: dict[tuple[str, int], int] = {}

    def __call__(self, name: str, index: int = 0) -> None:
        """Note what is alive, and what was at the worst moment since the last border."""
        self.marks[name, index] = self.live.now
        self.peaks[name, index] = self.live.peak
        self.live.peak = self.live.now

    def above(self, *ends: tuple[str, int]) -> int:
        """The worst moment in the stretches that end with these marks, above what is alive when the last block is left."""
        top = max(self.peaks[end] for end in ends if end in self.peaks)
        return max(0, round(top - self.marks["leave", self.depth - 1]))

    def within(self, blocks: Sequence[int]) -> int:
        """The worst moment within the forward of any of these blocks, above what is alive when it is entered."""
        return max((round(self.peaks["leave", at] - self.marks["enter", at]) for at in blocks), default=0)

    def kept(self, index: int) -> int:
        """What stays alive after the forward of a block."""
        return max(0, round(self.between(("enter", index), ("leave", index))))


def training_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None, stamp: Callable[[str], object]) -> None:
    """One training step as `layercard train` runs it: loss on labelled tokens, backward, clipping, update, zeroing."""
    stamp("start")
    losses, _ = labelled_losses(model, batch)
    loss = losses.sum() / len(losses)
    loss.item()
    stamp("loss")
    loss.backward()
    stamp("backward")
    if optimizer is not None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    stamp("end")
