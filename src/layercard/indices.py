"""Layer indices as short text."""

from collections.abc import Sequence


def stretches(layers: Sequence[int]) -> list[list[int]]:
    """Ascending indices cut where one is left out.

    >>> stretches([0, 1, 2, 5, 7, 8])
    [[0, 1, 2], [5], [7, 8]]
    """
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return parts


def listed(layers: Sequence[int], separator: str = ", ") -> str:
    """Ascending indices in short form.

    >>> listed([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    return separator.join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in stretches(layers))
