"""Peak memory counts tensors that live together, forward and backward, and nothing else."""

import torch

from layercard.measure import LiveTensors, PeakMemory

KIB = 1024


def test_peak_is_what_lived_together() -> None:
    older = torch.ones(KIB)
    with LiveTensors() as live:
        a = torch.zeros(KIB)
        b = a + older
        del a
        c = b.view(32, 32)[0]
        assert live.now == 4 * KIB
        del b
        assert live.now == 4 * KIB  # `c` still holds the storage
        del c
        assert live.now == 0
    assert live.peak == 8 * KIB


def test_views_and_updates_of_older_tensors_are_free() -> None:
    older = torch.ones(KIB, KIB)
    with LiveTensors() as live:
        older.t().add_(1)
        older[0].mul_(2)
    assert live.peak < KIB


def test_backward_is_counted() -> None:
    weight = torch.ones(KIB, requires_grad=True)
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    (weight * 2).exp().exp().sum().backward()
    peak.stop()
    assert 3 * 4 * KIB <= peak.bytes < 3 * 4 * KIB + 64  # both exponentials, saved for backward, and the gradient of the first
    assert weight.grad is not None


def test_stop_without_start_and_a_second_start() -> None:
    peak = PeakMemory(torch.device("cpu"))
    peak.stop()
    assert peak.bytes == 0
    for _ in range(2):
        peak.start()
        torch.ones(KIB)
        peak.stop()
        assert peak.bytes == 4 * KIB
