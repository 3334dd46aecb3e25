"""Callbacks for transformers' `Trainer` and TRL's trainers: the context managers of this package, held open while a training runs.

```python
trainer = SFTTrainer(model, args=args, train_dataset=data, peft_config=config, callbacks=[CutBackward()])
trainer.train()
```

A `Trainer` tells its callbacks when training begins and when it has ended, and tells them nothing when it raises: after an exception a
callback holds on until the next training begins. A `with` block around `trainer.train()` always lets go:

```python
with cut_backward(trainer.model):
    trainer.train()
```
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layercard.fast.cut import cut_backward


class WhileTraining(TrainerCallback):
    """Holds a context manager over the model open from the beginning of training to its end.

    What the context manager yields is written to stderr as one line, by the first process only.

    Args:
        enter: Makes the context manager from the model that trains.
    """

    def __init__(self, enter: Callable[[nn.Module], AbstractContextManager[object]]) -> None:
        self._enter = enter
        self._open = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Enter; what a training that raised left open is closed first."""
        self._open.close()
        assert model is not None  # Trainer always names it
        entered = self._open.enter_context(self._enter(model))
        if state.is_world_process_zero:
            sys.stderr.write(f"{entered}\n")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave."""
        self._open.close()


class CutBackward(WhileTraining):
    """`cut_backward` while a `Trainer` trains; stderr hears `layers in backward: 5/30`."""

    def __init__(self) -> None:
        super().__init__(cut_backward)
