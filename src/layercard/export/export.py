"""A placement in the words of other trainers: the keys that each of them reads, and no others."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layercard.selection.placement import Placement


def configuration(
    placement: "Placement",
    to: str,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    merge: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> str:
    """The text that a trainer reads to adapt exactly the placement's targets, as `layercard export` prints it.

    ```python
    Path("run.yml").write_text(configuration(placement, "axolotl", merge="axolotl.yml"))
    ```

    Args:
        placement: Where the adapters go.
        to: The trainer: peft, trl, axolotl, llamafactory, unsloth, ms-swift, mlx-lm or megatron-bridge.
        rank: Rank of each adapter; the merged file's, else 8.
        alpha: The update is `alpha / rank` times B A; the merged file's, else twice the rank.
        dropout: Probability of dropping an adapter's input; the merged file's, else 0.
        merge: A configuration to put the keys into; all else in it stays as it is.
        force: Replace keys of that configuration that contradict the placement.

    Raises:
        ExportError: The trainer cannot express the placement, or the configuration cannot be used or contradicts it.
        PlacementError: Rank, alpha or dropout are out of range.
    """
    from layercard.export.plan import Settings
    from layercard.export.trainers import trainer_named
    from layercard.export.writing import exported

    source = None if merge is None else Path(merge)
    return exported(placement, trainer_named(to), Settings(rank, alpha, dropout), merge=source, force=force).text
