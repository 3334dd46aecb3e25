"""The backward cut: nothing below the lowest trained block takes part in backward, and nothing below it is recomputed.

A frozen block needs no backward pass unless something below it trains. Stock libraries run one all the same with gradient checkpointing
on: `gradient_checkpointing_enable`, PEFT and TRL hook the input embedding so that its output requires a gradient, and from there on
every block is in the graph and computed a second time. Here, with s the lowest block that holds a trainable weight:

- blocks below s run under `torch.no_grad()`, without checkpointing;
- what enters block s is detached, so no hook on the embedding can put the blocks below back into the graph;
- blocks from s on keep the checkpointing that was asked for, always the non-reentrant kind: the reentrant kind loses the gradients of a
  block whose input requires none.

Losses and gradients of the trained weights are those of stock training, bit for bit but for the order of sums.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from layercard.errors import TrainingError
from layercard.fast.anatomy import anatomy
from layercard.models.hooks import block_input, replaced
from layercard.models.layers import Block


@dataclass(frozen=True)
class Cut:
    """Where backward stops.

    Attributes:
        lowest: Index of the lowest block that takes part in backward; `layers` where only the head trains.
        layers: Number of blocks.
    """

    lowest: int
    layers: int

    @property
    def layers_in_backward(self) -> str:
        """Blocks in backward, of all: `5/30`."""
        return f"{self.layers - self.lowest}/{self.layers}"

    def __str__(self) -> str:
        return f"layers in backward: {self.layers_in_backward}"


@contextmanager
def cut_backward(model: nn.Module) -> Iterator[Cut]:
    """Stop backward at the lowest trained block, for any training loop inside the `with` block.

    ```python
    with cut_backward(peft_model) as cut:
        print(cut)  # layers in backward: 5/30
        trainer.train()
    ```

    Checkpointing may be switched on before or inside the block, in either kind. What changes lasts for one forward pass of the
    decoder at a time, so flags and functions of checkpointing read as the user set them. The embedding's input-gradient hooks are taken
    off and come back at the end, also when the block raises. Adapters must be in place, and weights frozen, before the block begins.

    Args:
        model: A transformers model, or a PEFT, DistributedDataParallel or FSDP model around one.

    Yields:
        The `Cut`: where it is, and a line that says so.

    Raises:
        TrainingError: Nothing trains; something below the blocks trains (a prompt, a prefix, an embedding, also through a tied head), so
            that its gradient must pass through every block; or, at a forward pass inside, a block below the cut has become trainable.
        ModelError: The model has no decoder blocks.
    """
    parts = anatomy(model)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise TrainingError("no weight of the model requires a gradient; add adapters first (get_peft_model), then cut the backward pass")
    if parts.below:
        raise TrainingError(
            f"backward cannot be cut: {parts.below_words()} trains below the blocks, so its gradient passes through all of them; "
            "freeze it (no prompt or prefix tuning, no trainable or tied embedding), or train without the cut"
        )
    frozen_blocks, trained_blocks = parts.blocks[: parts.lowest], parts.blocks[parts.lowest :]
    frozen_weights = [weight for block in frozen_blocks for weight in block.module.parameters()]
    frozen_layers, trained_layers = _checkpointing_layers(frozen_blocks), _checkpointing_layers(trained_blocks)
    run_decoder = parts.decoder.forward

    def decoder_forward(*args: Any, **kwargs: Any) -> Any:
        if any(weight.requires_grad for weight in frozen_weights):
            raise TrainingError(
                f"a weight below block {parts.lowest} has become trainable since the backward pass was cut there; "
                "leave the cut, or enter it after the weights are chosen"
            )
        take_off_hooks()
        with _checkpointing_of(parts.decoder, frozen_layers, trained_layers):
            return run_decoder(*args, **kwargs)

    def without_graph(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return run(*args, **kwargs)

    def from_detached(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden, put = block_input(args, kwargs)
        args, kwargs = put(hidden.detach())
        return run(*args, **kwargs)

    with ExitStack() as stack:
        take_off_hooks = stack.enter_context(_no_input_gradients(parts.causal))
        stack.enter_context(replaced(parts.decoder, decoder_forward))
        for block in frozen_blocks:
            stack.enter_context(replaced(block.module, partial(without_graph, block.module.forward)))
        for block in trained_blocks[:1]:
            stack.enter_context(replaced(block.module, partial(from_detached, block.module.forward)))
        yield Cut(parts.lowest, len(parts.blocks))


def _checkpointing_layers(blocks: tuple[Block, ...]) -> list[GradientCheckpointingLayer]:
    """The layers of blocks that checkpoint themselves: in transformers 5 the blocks."""
    return [module for block in blocks for module in block.module.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _checkpointing_of(
    decoder: nn.Module, frozen: list[GradientCheckpointingLayer], trained: list[GradientCheckpointingLayer]
) -> Iterator[None]:
    """No checkpointing in frozen layers, non-reentrant checkpointing in trained ones where it is on.

    Models from the hub written for transformers 4 checkpoint in the decoder's forward, by a function of the decoder's. Non-reentrant
    it does no harm below the cut: a block without a graph is not computed again.
    """
    frozen = [layer for layer in frozen if layer.gradient_checkpointing]
    changes: list[tuple[nn.Module, str, Any]] = [(layer, "gradient_checkpointing", False) for layer in frozen]
    for module in (*trained, decoder):
        if vars(module).get("gradient_checkpointing"):
            function = partial(vars(module)["_gradient_checkpointing_func"], use_reentrant=False)
            changes.append((module, "_gradient_checkpointing_func", function))
    before = [vars(module)[name] for module, name, _ in changes]
    for module, name, value in changes:
        vars(module)[name] = value
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            vars(module)[name] = value


@contextmanager
def _no_input_gradients(model: PreTrainedModel) -> Iterator[Callable[[], None]]:
    """Take the input-gradient hooks off the embedding; whoever put them on, before or meanwhile, has them back afterwards.

    Yields:
        A function that takes them off again, for those that were put on meanwhile.
    """
    removed = False

    def hooked() -> bool:
        return bool(vars(model).get("_require_grads_hooks"))

    def take_off() -> None:
        nonlocal removed
        removed = removed or hooked()
        model.disable_input_require_grads()

    take_off()
    try:
        yield take_off
    finally:
        if removed and not hooked():
            model.enable_input_require_grads()
