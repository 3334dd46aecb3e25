"""Slow twins: every fast number once more, in float64, with explicit matrices and one sample at a time."""
