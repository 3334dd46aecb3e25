"""What the fit pass sums up: kept on the way, and put together where several processes share the batches."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from layercard import processes
from layercard.statistics.moments import GradientMoments, InputMoments


@dataclass
class FitSums:
    """What the fit pass has summed up after some of its batches.

    Attributes:
        batches: Number of the batch that comes next.
        labelled: Labelled tokens.
        nats: Their summed loss.
        leaders: For each map the one whose input moments it shares (`Capture.leaders`).
        inputs: Moments by path of the leading map.
        gradients: Moments by path.
    """

    batches: int = 0
    labelled: int = 0
    nats: float = 0.0
    leaders: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, InputMoments] = field(default_factory=dict)
    gradients: dict[str, GradientMoments] = field(default_factory=dict)

    def merge(self, like: torch.Tensor) -> None:
        """Put the sums of all processes in place of this one's; all of them must call it.

        A map that ran in other processes only (an expert, or any map where there are fewer batches than processes) gets its sums too.

        Args:
            like: A tensor of the model's dtype on its device.
        """
        if processes.count() == 1:
            return
        self.nats, labelled = processes.total([self.nats, self.labelled], like.device)
        self.labelled = int(labelled)
        everywhere = [json.loads(data) for data in processes.gathered(json.dumps(self._shapes()).encode())]
        self.leaders = _union(theirs["leaders"] for theirs in everywhere)
        for path, (features, keep_rows) in _union(theirs["inputs"] for theirs in everywhere).items():
            moments = self.inputs.setdefault(path, InputMoments(features, keep_rows))
            moments.update(like.new_zeros(0, features))
            moments.across(processes.add_up, processes.stacked)
        for path, (outputs, features, keep_rows) in _union(theirs["gradients"] for theirs in everywhere).items():
            slopes = self.gradients.setdefault(path, GradientMoments(outputs, features, keep_rows))
            slopes.update(like.new_zeros(0, features), like.new_zeros(0, outputs))
            slopes.across(processes.add_up, processes.stacked)

    def _shapes(self) -> dict[str, Any]:
        return {
            "leaders": self.leaders,
            "inputs": {path: [sums.features, sums.keep_rows] for path, sums in self.inputs.items()},
            "gradients": {path: [sums.outputs, sums.features, sums.keep_rows] for path, sums in self.gradients.items()},
        }


def _union(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All entries, in an order that is the same in every process."""
    return dict(sorted((path, value) for part in found for path, value in part.items()))


def own_batches(done: int, count: int) -> range:
    """Which of `count` batches this process takes from number `done` on: every so many-th, beginning with its own number.

    >>> own_batches(2, 5)
    range(2, 5)
    """
    step, first = processes.count(), processes.rank()
    return range(done + (first - done) % step, count, step)
