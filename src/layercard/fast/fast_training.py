"""All parts of faster training around a training loop, in the order in which they fit, each where it is exact; and as callbacks.

```python
trainer = SFTTrainer(model, args=args, train_dataset=data, peft_config=config, callbacks=[CutBackward(), FrozenPrefix(passes=3)])
trainer.train()
```

The callbacks, for transformers' `Trainer` and TRL's trainers, hold the context managers open while a training runs. Name them in the order
in which `with` would enter them. A `Trainer` tells its callbacks when training begins and when it has ended, and tells them nothing when
it raises: after an exception they hold on until the model trains again. A `with` block always lets go:

```python
with cut_backward(trainer.model), frozen_prefix(trainer.model, passes=3):
    trainer.train()
```
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layercard.errors import TrainingError
from layercard.fast.anatomy import anatomy
from layercard.fast.cut import cut_backward
from layercard.fast.labels import labels_only
from layercard.fast.lora import fused_lora
from layercard.fast.packing import unpadded
from layercard.fast.prefix import PrefixCache, frozen_prefix
from layercard.fast.prefix_blocks import randomness
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
    options: dict[str, Any] = {"passes": passes, "tokens": tokens, "tokenizer": tokenizer, "max_bytes": settings.cache_bytes}
    parts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "cut": lambda: cut_backward(model),
        "prefix_cache": lambda: frozen_prefix(model, settings.cache_folder, strict=False, **options),
        "unpadded": lambda: unpadded(model),
        "labels_only": lambda: labels_only(model),
        "fused_lora": lambda: fused_lora(model),
    }
    anatomy_of_model = anatomy(model)
    drawing = randomness(anatomy_of_model, len(anatomy_of_model.blocks)) if settings.unpadded else []
    with ExitStack() as stack:
        for name, enter in parts.items():
            if not getattr(settings, name):
                continue
            if name == "unpadded" and drawing:
                done.off[name] = f"padding is computed: dropout is on ({drawing[0]})"
                continue
            try:
                done.parts[name] = stack.enter_context(enter())
            except TrainingError as error:
                done.off[name] = str(error)
        yield done


class _Entered(NamedTuple):
    """A context manager that a callback holds open, and for which training of which model."""

    callback: "WhileTraining"
    manager: AbstractContextManager[object]
    model: nn.Module
    training: TrainerState


_entered: list[_Entered] = []
"""All that is open, in the order of block_input: whatever is left takes with it what was entered after it."""


def _leave(is_first: Callable[[_Entered], bool]) -> None:
    """Leave the first context manager of which this is true and all that were entered after it, the last one first."""
    first = next((index for index, entry in enumerate(_entered) if is_first(entry)), len(_entered))
    while len(_entered) > first:
        _entered.pop().manager.__exit__(None, None, None)


class WhileTraining(TrainerCallback):
    """Holds a context manager over the model open from the beginning of training to its end.

    What it yields is written to stderr as one line, at the beginning and, where the line has changed, at the end; by the first process
    only.

    Args:
        enter: Makes the context manager from the model that trains.
    """

    def __init__(self, enter: Callable[[nn.Module], AbstractContextManager[object]]) -> None:
        self._enter = enter
        self._yielded: object = None
        self._last_line = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Enter; what a training of this model that raised left open is left first.

        Raises:
            TrainingError: There is no model, or whatever the context manager refuses.
        """
        if model is None:
            raise TrainingError(f"{type(self).__name__} was called without a model; give it to a Trainer as a callback")
        _leave(lambda entry: entry.model is model and entry.training is not state)
        manager = self._enter(model)
        self._yielded, self._last_line = manager.__enter__(), ""
        _entered.append(_Entered(self, manager, model, state))
        self._write_line(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave, together with what was entered later: `Trainer` ends its callbacks in the order in which it began them."""
        self._write_line(state)
        _leave(lambda entry: entry.callback is self)

    def _write_line(self, state: TrainerState) -> None:
        line = str(self._yielded)
        if state.is_world_process_zero and line != self._last_line:
            sys.stderr.write(f"{line}\n")
        self._last_line = line


class CutBackward(WhileTraining):
    """`cut_backward` while a `Trainer` trains; it writes `layers in backward: 5/30` to stderr."""

    def __init__(self) -> None:
        super().__init__(cut_backward)


class FastTraining(WhileTraining):
    """`fast_training` while a `Trainer` trains; takes its arguments, of which `passes` should be the number of epochs."""

    def __init__(self, settings: FastSettings | None = None, **options: Any) -> None:
        super().__init__(partial(fast_training, settings=settings, **options))


class FrozenPrefix(WhileTraining):
    """`frozen_prefix` while a `Trainer` trains; takes its options, of which `passes` should be the number of epochs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(partial(frozen_prefix, **options))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what waits, so that other processes find it in the next epoch."""
        if isinstance(self._yielded, PrefixCache):
            self._yielded.flush()
