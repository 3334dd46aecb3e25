"""Hidden states and gradients between blocks, in memory or on disk."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from layercard.errors import OutputError


class Boundaries:
    """Tensors by kind, batch and block.

    Args:
        folder: Where they are kept; in memory where it is not given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[tuple[str, int, int], torch.Tensor | None] = {}

    def put(self, kind: str, batch: int, block: int, tensor: torch.Tensor) -> None:
        """Keep a tensor.

        Raises:
            OutputError: It cannot be written.
        """
        tensor = tensor.detach().cpu()
        self._kept[kind, batch, block] = tensor if self.folder is None else None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"tensor": tensor.contiguous()}, self._path(kind, batch, block))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot keep what goes from block to block in {self.folder} ({error}); make room there") from error

    def get(self, kind: str, batch: int, block: int, device: torch.device) -> torch.Tensor:
        """A tensor that was kept."""
        found = self._kept[kind, batch, block]
        if found is None:
            found = load_file(self._path(kind, batch, block))["tensor"]
        return found.to(device)

    def drop(self, kind: str, batch: int, block: int) -> None:
        """Forget a tensor; one that was never kept is none."""
        self._kept.pop((kind, batch, block), None)
        if self.folder is not None:
            self._path(kind, batch, block).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all of them."""
        for key in list(self._kept):
            self.drop(*key)

    def _path(self, kind: str, batch: int, block: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{kind}-{batch}-{block}.safetensors"
