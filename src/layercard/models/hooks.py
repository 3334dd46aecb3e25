"""The only file that installs hooks: what goes into and comes back from each linear module of each block.

- `capturing`: the input `a_t: [in]` of every module and the gradient `δ_t: [out]` of its output;
- `hidden_states` and `replayed`: what enters a block, and a pass that starts there, so that the blocks below need not run again;
- `stepped`: a block with a low-rank step added to its weights;
- `block_borders`: when a pass goes from block to block, for the clock and the count of bytes.

Hooks, `requires_grad`, train/eval mode and the random state are the same before and after, also when the forward raises.

transformers keeps the experts of a block as stacked parameters `[E, out, in]` and runs them in one of several ways
(`ALL_EXPERTS_FUNCTIONS`); no hook on a module sees a single expert. `run_experts` computes the same as all of these ways.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from layercard.models.layers import Block, LinearModule

GradientSink = Callable[[LinearModule, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Called as `sink(module, a, δ, tokens)` with `a: [tokens, in]` and `δ: [tokens, out]`, padding removed, in the model's dtype.
For an expert's module `tokens` says which of the batch's tokens (padding not counted) the rows are; otherwise it is `None`: all."""
Seer = Callable[[LinearModule, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor | None]
"""Called as `see(module, x, y, tokens)` with what enters and leaves a module, and for an expert's the numbers of the tokens that were sent
to it, `[S]`; returns what replaces `y`, or `None`."""
BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a block's forward."""


# A model as it was before, and modules that run something else


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter requires a gradient; all of it, and the random state, is put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            for module, _ in modes:
                module.training = False
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in place of the module's own for the length of a `with` block; replacements nest, the innermost is called first.

    `forward` takes the same arguments. To run the module's own from it, keep `module.forward` from before.
    """
    instance_forward = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if instance_forward is None:
            del module.forward
        else:
            module.forward = instance_forward


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Callable[[torch.Tensor], BlockArguments]]:
    """The hidden states among a block's arguments, and a function that returns the arguments with others in their place."""
    if args:
        return args[0], lambda hidden: ((hidden, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda hidden: (args, {**kwargs, "hidden_states": hidden})


def block_output(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns; some return a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


def pass_through(*args: Any, **kwargs: Any) -> torch.Tensor:
    """A block's forward that returns what enters it."""
    return block_input(args, kwargs)[0]


# Inputs and gradients of every module


@contextmanager
def module_outputs(block: Block, paths: Container[str], see: Seer) -> Iterator[None]:
    """Call `see` with the input and output of those modules of a block whose paths are given; what it returns replaces the output."""
    with ExitStack() as stack:
        for module in block.linear_modules:
            if module.path in paths:
                hook = module.module.register_forward_hook(lambda _, args, output, module=module: see(module, args[0], output, None))
                stack.callback(hook.remove)
        experts: dict[nn.Module, dict[tuple[str, int | None], LinearModule]] = {}
        for each in block.stacks:
            seen = {(each.parameter, module.expert): module for module in each.modules if module.path in paths}
            if seen:
                experts.setdefault(each.module, {}).update(seen)
        for holder, modules in experts.items():
            stack.enter_context(replaced(holder, partial(run_experts, holder, modules, see)))
        yield


class Capture:
    """What forward passes inside `capturing` keep for their backward passes, which hand it to `sink`.

    `sink` may be exchanged between two backward passes over one graph (`retain_graph=True`). Inputs are kept for the next
    pass while `keep` is set; otherwise they are dropped as soon as they were used.

    `leaders` names for each module the first of its block that reads the same tensor: they share one second moment of their input.
    """

    def __init__(self) -> None:
        self.sink: GradientSink | None = None
        self.keep = False
        self.mask: torch.Tensor | None = None
        self.leaders: dict[str, str] = {}
        self._inputs: dict[tuple[str, int], torch.Tensor] = {}
        self._token_numbers: torch.Tensor | None = None
        self._runs: Counter[str] = Counter()

    def start(self, attention_mask: torch.Tensor, sink: GradientSink, *, keep: bool = False) -> None:
        """Prepare for one forward pass over a batch with this mask `[B, T]`."""
        self._inputs.clear()
        self._runs.clear()
        self.mask = None if bool(attention_mask.all()) else attention_mask.reshape(-1).bool()
        self._token_numbers = None if self.mask is None else self.mask.cumsum(0) - 1
        self.sink, self.keep = sink, keep

    def clear(self) -> None:
        """Drop what is kept for a further backward pass."""
        self._inputs.clear()
        self.sink = None

    def see(self, module: LinearModule, x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Keep what entered a module until the gradient of what left it is known."""
        if not y.requires_grad:
            return
        rows, numbers = self.mask, None
        if tokens is not None:  # of an expert: it is its own leader, and its rows are the tokens that were sent to it
            self.leaders.setdefault(module.path, module.path)
            rows = None if self.mask is None else self.mask.to(tokens.device)[tokens]
            numbers = tokens if self._token_numbers is None else self._token_numbers.to(tokens.device)[tokens[rows]]
            if len(numbers) == 0:  # padding alone
                return
        elif module.path not in self.leaders:
            same = (
                path
                for (path, _), other in self._inputs.items()
                if other.data_ptr() == x.data_ptr() and other.shape == x.shape and path in self.leaders
            )
            self.leaders[module.path] = next(same, module.path)
        key = module.path, self._runs[module.path]  # a module may run more than once in a pass
        self._runs[module.path] += 1
        self._inputs[key] = x.detach()

        def without_padding(tensor: torch.Tensor) -> torch.Tensor:
            flat = tensor.reshape(-1, tensor.shape[-1])
            return flat if rows is None else flat[rows.to(flat.device)]

        def backward(gradient: torch.Tensor) -> None:
            entered = self._inputs[key] if self.keep else self._inputs.pop(key)
            if self.sink is not None:
                self.sink(module, without_padding(entered.to(gradient.device)), without_padding(gradient), numbers)

        y.register_hook(backward)


@contextmanager
def capturing(model: nn.Module, blocks: Sequence[Block]) -> Iterator[Capture]:
    """Install the hooks of a `Capture`; the model is `frozen` inside, and gradients start at the input of the first of the blocks."""
    capture = Capture()
    with frozen(model), input_gradients(blocks), ExitStack() as stack, torch.enable_grad():
        for block in blocks:
            stack.enter_context(module_outputs(block, {module.path for module in block.modules}, capture.see))
        try:
            yield capture
        finally:
            capture.clear()


@contextmanager
def input_gradients(blocks: Sequence[Block]) -> Iterator[None]:
    """Let gradients start at the input of the first block, so that backward goes through every one although no weight asks for it."""

    def require(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockArguments:
        hidden, put = block_input(args, kwargs)
        return put(hidden if hidden.requires_grad else hidden.detach().requires_grad_(True))

    handle = blocks[0].module.register_forward_pre_hook(require, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# Hidden states between blocks


class _LastReached(Exception):
    """What lies above the last hidden states that were asked for need not run."""


def hidden_states(run: Callable[[], object], blocks: Sequence[Block], indices: Sequence[int]) -> dict[int, torch.Tensor]:
    """The hidden states `[B, T, width]` that enter some blocks during the forward pass `run()`, by the block's index.

    The number of blocks as an index asks for what leaves the last one. The pass is cut off at the highest index, so neither the blocks
    above nor the head are computed.
    """
    recorded: dict[int, torch.Tensor] = {}

    def record(index: int, hidden: torch.Tensor) -> None:
        recorded[index] = hidden.detach()
        if index == max(indices):
            raise _LastReached

    with ExitStack() as stack:
        for index in set(indices):
            if index < len(blocks):
                handle = blocks[index].module.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index: record(index, block_input(args, kwargs)[0]), with_kwargs=True
                )
            else:
                handle = blocks[-1].module.register_forward_hook(lambda _, args, output: record(len(blocks), block_output(output)))
            stack.callback(handle.remove)
        with suppress(_LastReached):
            run()
    return recorded


@contextmanager
def replayed(blocks: Sequence[Block], start: int, hidden: torch.Tensor) -> Iterator[None]:
    """Run a forward pass from block `start` on: the blocks below are skipped, and `hidden` enters block `start`.

    The model still prepares masks and positions itself, so the result equals the whole forward for any architecture whose
    blocks hand nothing but hidden states to each other.
    """
    with ExitStack() as stack:
        for block in blocks[:start]:
            stack.enter_context(replaced(block.module, pass_through))
        enter = blocks[start].module.register_forward_pre_hook
        stack.callback(enter(lambda _, args, kwargs: block_input(args, kwargs)[1](hidden), with_kwargs=True).remove)
        yield


@contextmanager
def stepped(block: Block, steps: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> Iterator[None]:
    """Add `α · B A x` to the output of each module of a block: the same as adding `α B A` to its weight, which stays as it is.

    `steps` has the factors `A: [r, in]` and `B: [out, r]` by the path of each module (`Block.modules`) that takes a step.
    """

    def step(module: LinearModule, x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        down, up = steps[module.path]
        return y + (alpha * ((x.to(down) @ down.T) @ up.T)).to(y)

    with module_outputs(block, steps, step):
        yield


@contextmanager
def block_borders(blocks: Sequence[Block], mark: Callable[[str, int], object]) -> Iterator[None]:
    """Call `mark` whenever a pass crosses the border of a block; nothing of the pass is changed.

    `mark("enter", i)` and `mark("leave", i)` in forward; in backward `mark("back", i)` once the gradient of what block i − 1 hands
    to block i is complete, so that block i is done, and i = number of blocks once the head is done. Where the graph does not reach that
    far down, there is no such call.
    """

    def watch_gradient(hidden: torch.Tensor, index: int) -> None:
        if hidden.requires_grad:
            hidden.register_hook(lambda _: mark("back", index))

    def enter(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch_gradient(block_input(args, kwargs)[0], index)
        mark("enter", index)

    def leave(index: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mark("leave", index)
        if index == len(blocks) - 1:
            watch_gradient(block_output(output), len(blocks))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_pre_hook(partial(enter, block.index), with_kwargs=True).remove)
            stack.callback(block.module.register_forward_hook(partial(leave, block.index)).remove)
        yield


# Experts


def run_experts(
    holder: Any,
    modules: Mapping[tuple[str, int | None], LinearModule],
    see: Seer,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The forward of an experts module of transformers (`use_experts_implementation`), expert by expert.

    Args:
        holder: The `nn.Module` that holds the stacked parameters and says how they are laid out.
        modules: Those whose input and output `see` is called with, by name of the stacked parameter and number of the expert.
        see: As in `module_outputs`.
        hidden_states: `[N, width]`, padding included; so is the result.
        top_k_index: The experts of each token, `[N, k]`; a number beyond the last expert stands for none.
        top_k_weights: What each of them counts, `[N, k]`.
    """
    first = "gate_up_proj" if holder.has_gate else "up_proj"
    total = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= holder.num_experts:
            continue
        tokens, places = torch.where(top_k_index == expert)

        def mapped(name: str, x: torch.Tensor, expert: int = expert, tokens: torch.Tensor = tokens) -> torch.Tensor:
            weight = getattr(holder, name)[expert]
            bias = getattr(holder, f"{name}_bias")[expert] if holder.has_bias else None
            y = linear(x, weight.T if holder.is_transposed else weight, bias)
            module = modules.get((name, expert))
            replacement = None if module is None else see(module, x, y, tokens)
            return y if replacement is None else replacement

        inner = mapped(first, hidden_states[tokens])
        inner = holder._apply_gate(inner) if holder.has_gate else holder.act_fn(inner)
        out = mapped("down_proj", inner)
        if getattr(holder, "has_post_expert_norm", False):  # new in transformers 5.19
            out = holder.post_expert_norm(out)
        total.index_add_(0, tokens, (out * top_k_weights[tokens, places, None]).to(total.dtype))
    return total
