"""All of this package around a training loop, in the order in which the parts fit, each where it is exact."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from layercard.errors import TrainingError
from layercard.fast.anatomy import anatomy
from layercard.fast.cut import cut_backward
from layercard.fast.frozen import Frozen, randomness
from layercard.fast.labels import labels_only
from layercard.fast.lora import fused_lora
from layercard.fast.packing import unpadded
from layercard.fast.prefix import frozen_prefix
from layercard.settings import FastSettings

__all__ = ["Fast", "FastSettings", "fast_training"]


@dataclass
class Fast:
    """What `fast_training` does and did.

    Attributes:
        parts: What each part that is on yielded, by the name of its setting.
        off: Why a part is off, by the name of its setting; nothing for what was not asked for.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)

    @property
    def labels_only(self) -> bool:
        """Whether `model(**batch)` gives its loss from labelled positions only."""
        return "labels_only" in self.parts and self.parts["labels_only"].active

    def to_json(self) -> dict[str, str]:
        """One line for each part, on or off, by the name of its setting."""
        return {name: str(part) for name, part in self.parts.items()} | {name: f"off: {reason}" for name, reason in self.off.items()}

    def __str__(self) -> str:
        return "; ".join(self.to_json().values())


@contextmanager
def fast_training(
    model: nn.Module,
    settings: FastSettings | None = None,
    *,
    passes: float = 2.0,
    tokens: int | None = None,
    tokenizer: Any = None,
) -> Iterator[Fast]:
    """Train faster inside the `with` block, in any loop, with the losses and gradients of stock training.

    ```python
    with fast_training(peft_model, passes=3) as speed:
        trainer.train()
    print(speed)
    ```

    A part that cannot be exact for this model is left out, and `off` says why: nothing is raised for it. Padding is computed where
    dropout is on, because random numbers would fall on other places.

    Args:
        model: A PEFT model, or a transformers model with some blocks frozen, or a DistributedDataParallel model around one.
        settings: Which parts to use; all of them when not given.
        passes: Passes over the data that are expected, evaluations included; with one there is nothing for the prefix cache to save.
        tokens: Real tokens of the data, for the forecast of the prefix cache.
        tokenizer: Becomes part of the fingerprint of the prefix cache.
    """
    settings, done = settings or FastSettings(), Fast()
    folder = None if settings.cache_folder is None else Path(settings.cache_folder)

    def prefix() -> AbstractContextManager[Any]:
        return frozen_prefix(model, folder, max_bytes=settings.cache_bytes, passes=passes, tokens=tokens, tokenizer=tokenizer, strict=False)

    parts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "cut": lambda: cut_backward(model),
        "prefix_cache": prefix,
        "unpadded": lambda: unpadded(model),
        "labels_only": lambda: labels_only(model),
        "fused_lora": lambda: fused_lora(model),
    }
    draws = _draws(model) if settings.unpadded else ""
    with ExitStack() as stack:
        for name, enter in parts.items():
            if not settings.to_json()[name]:
                continue
            if name == "unpadded" and draws:
                done.off[name] = f"padding is computed: dropout is on ({draws})"
                continue
            try:
                done.parts[name] = stack.enter_context(enter())
            except TrainingError as error:
                done.off[name] = str(error)
        yield done


def _draws(model: nn.Module) -> str:
    """Something in the model that draws random numbers in training; empty where nothing does."""
    parts = anatomy(model)
    return next(iter(randomness(Frozen(parts, len(parts.blocks)))), "")
