"""A block's experts run one after another, so that what enters and leaves the map of each can be seen and changed.

transformers keeps the experts of a block as stacked parameters `[E, out, in]` and runs them in one of several ways
(`ALL_EXPERTS_FUNCTIONS`); no module's hook sees a single expert. `run_experts` computes the same as all of them.

The only file that installs hooks: what goes into and comes back from each linear map of each block.

Three things are captured, all without touching a weight:

- *signals*: the input `a_t: [in]` of every adapted map and the gradient `δ_t: [out]` with respect to its output;
- *entries*: the hidden states that enter a block, so that the blocks below need not run again (`replayed`);
- *borders*: when a pass goes from block to block, for the clock and the count of bytes (`stamped`).

Hooks, `requires_grad`, train/eval mode and the random state are the same before and after, also when the forward raises.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from layercard.models.layers import Block, ExpertStack, Projection

# ---- experts

Tap = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Called as `tap(parameter, expert, tokens, x, y)` with the name of the stacked parameter, which of the tokens `[S]` were sent to the
expert, and `x: [S, in]` and `y: [S, out]`; gives what goes on in place of `y`."""


def run_experts(module: Any, tap: Tap, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The forward of an experts module of transformers (`use_experts_implementation`), expert by expert.

    Args:
        module: An `nn.Module` that holds the stacked parameters and says how they are laid out.
        tap: Sees every map's input and output.
        hidden_states: `[N, width]`, padding included.
        top_k_index: The experts of each token, `[N, k]`; a number beyond the last one stands for none.
        top_k_weights: What each of them counts, `[N, k]`.

    Returns:
        `[N, width]`.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    total = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= module.num_experts:
            continue
        tokens, places = torch.where(top_k_index == expert)

        def mapped(name: str, x: torch.Tensor, expert: int = expert, tokens: torch.Tensor = tokens) -> torch.Tensor:
            weight = getattr(module, name)[expert]
            bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
            return tap(name, expert, tokens, x, linear(x, weight.T if module.is_transposed else weight, bias))

        inner = mapped(first, hidden_states[tokens])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        out = mapped("down_proj", inner)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        total.index_add_(0, tokens, (out * top_k_weights[tokens, places, None]).to(total.dtype))
    return total


# ---- capture

SignalSink = Callable[[Projection, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Called as `sink(projection, a, δ, tokens)` with `a: [tokens, in]` and `δ: [tokens, out]`, padding removed, in the model's dtype.
`tokens` says which of the batch's tokens (padding not counted) the rows are, for an expert's map; otherwise it is `None`: all of them."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter requires a gradient; all of it, and the random state, is put back at the end."""
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


class Capture:
    """Signals of the forward passes that run inside `capturing`; filled by forward hooks, emptied by backward.

    `sink` may be exchanged between two backward passes over one graph (`retain_graph=True`); inputs are kept for the next
    pass while `keep` is set and dropped as soon as they were used otherwise.
    """

    def __init__(self) -> None:
        self.sink: SignalSink | None = None
        self.keep = False
        self.mask: torch.Tensor | None = None
        self.leaders: dict[str, str] = {}
        self._inputs: dict[tuple[str, int], torch.Tensor] = {}
        self._place: torch.Tensor | None = None
        self._calls: Counter[str] = Counter()

    def start(self, attention_mask: torch.Tensor, sink: SignalSink, *, keep: bool = False) -> None:
        """Prepare for one forward pass over a batch with this mask `[B, T]`."""
        self._inputs.clear()
        self._calls.clear()
        self.mask = None if bool(attention_mask.all()) else attention_mask.reshape(-1).bool()
        self._place = None if self.mask is None else self.mask.cumsum(0) - 1
        self.sink, self.keep = sink, keep

    def clear(self) -> None:
        """Drop what is held for a further backward pass."""
        self._inputs.clear()
        self.sink = None

    def _forward_hook(self, projection: Projection) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                call = self._keep(projection, args[0].detach())
                if projection.path not in self.leaders:
                    self._group(projection, self._inputs[projection.path, call])
                output.register_hook(self._backward_hook(projection, call, self._rows, None))

        return hook

    def _keep(self, projection: Projection, entering: torch.Tensor) -> int:
        """Keep what entered a map for the backward pass; the number of the call, since a map may run more than once in a pass."""
        call = self._calls[projection.path]
        self._calls[projection.path] += 1
        self._inputs[projection.path, call] = entering
        return call

    def _expert_tap(self, stacks: Sequence[ExpertStack]) -> Tap:
        """What sees the maps of one experts module: each is its own leader, and its rows are the tokens that were sent to it."""
        maps = {(stack.parameter, own.expert): own for stack in stacks for own in stack.maps}

        def tap(parameter: str, expert: int, tokens: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            projection = maps.get((parameter, expert))
            if projection is not None and y.requires_grad:
                self.leaders.setdefault(projection.path, projection.path)
                seen = slice(None) if self.mask is None else self.mask.to(tokens.device)[tokens]
                places = tokens if self._place is None else self._place.to(tokens.device)[tokens[seen]]
                if len(places) > 0:  # not padding alone
                    call = self._keep(projection, x.detach())
                    y.register_hook(self._backward_hook(projection, call, lambda rows: rows[seen], places))
            return y

        return tap

    def _group(self, projection: Projection, entering: torch.Tensor) -> None:
        """Maps of one block that read the same tensor share their second moment: the first of them leads."""
        same = (
            path
            for (path, _), other in self._inputs.items()
            if other.data_ptr() == entering.data_ptr() and other.shape == entering.shape and path in self.leaders
        )
        self.leaders[projection.path] = next(same, projection.path)

    def _backward_hook(
        self, projection: Projection, call: int, seen: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor | None
    ) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            entering = self._inputs[projection.path, call] if self.keep else self._inputs.pop((projection.path, call))
            if self.sink is not None:
                self.sink(projection, seen(entering.to(gradient.device)), seen(gradient), tokens)

        return hook

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if self.mask is None else flat[self.mask.to(flat.device)]


@contextmanager
def capturing(model: nn.Module, blocks: Sequence[Block], *, opening: bool = True) -> Iterator[Capture]:
    """Install the hooks of a `Capture`; the model is `frozen` inside, and gradients start at the input of the first of the blocks.

    With `opening` off they start where the caller has them start.
    """
    capture = Capture()
    with frozen(model), ExitStack() as stack, torch.enable_grad():
        if opening:
            stack.enter_context(opened(blocks))
        for block in blocks:
            for projection in block.projections:
                stack.callback(projection.module.register_forward_hook(capture._forward_hook(projection)).remove)
            for module, stacks in _by_module(block.stacks).items():
                stack.enter_context(replaced(module, partial(run_experts, module, capture._expert_tap(stacks))))
        try:
            yield capture
        finally:
            capture.clear()


def _by_module(stacks: Iterable[ExpertStack]) -> dict[nn.Module, list[ExpertStack]]:
    found: dict[nn.Module, list[ExpertStack]] = {}
    for stack in stacks:
        found.setdefault(stack.module, []).append(stack)
    return found


def _require_input_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    hidden, put = entering(args, kwargs)
    return put(hidden.detach().requires_grad_(True))


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[Any, ...]]]:
    """The hidden states that enter a block, and how to put others in their place."""
    if args:
        return args[0], lambda hidden: ((hidden, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda hidden: (args, {**kwargs, "hidden_states": hidden})


def detach_entry(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A block's arguments `(args, kwargs)` with the hidden states that enter it cut off from what made them."""
    hidden, put = entering(args, kwargs)
    return put(hidden.detach())


class _AllRecorded(Exception):
    """The last wanted block was reached; what lies above need not run."""


def entries(run: Callable[[], object], blocks: Sequence[Block], wanted: Sequence[int]) -> dict[int, torch.Tensor]:
    """The hidden states `[B, T, width]` that enter the `wanted` blocks during the forward pass `run()`.

    The pass is cut off at the last wanted block, so neither the blocks above nor the head are computed.
    """
    found: dict[int, torch.Tensor] = {}
    last = max(wanted)

    def recorder(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[index] = entering(args, kwargs)[0].detach()
            if index == last:
                raise _AllRecorded

        return hook

    with ExitStack() as stack:
        for index in sorted(set(wanted)):
            handle = blocks[index].module.register_forward_pre_hook(recorder(index), with_kwargs=True)
            stack.callback(handle.remove)
        with suppress(_AllRecorded):
            run()
    return found


def passages(run: Callable[[], object], blocks: Sequence[Block]) -> list[torch.Tensor]:
    """The hidden states `[B, T, width]` that enter block 0 and those that leave each block during `run()`: one more than blocks."""
    found: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(entering(args, kwargs)[0].detach())

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach())

    with ExitStack() as stack:
        stack.callback(blocks[0].module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for block in blocks:
            stack.callback(block.module.register_forward_hook(leave).remove)
        run()
    return found


@contextmanager
def replayed(blocks: Sequence[Block], start: int, entry: torch.Tensor) -> Iterator[None]:
    """Run a forward pass from block `start` on: the blocks below are skipped and `entry` enters block `start`.

    The model still prepares masks and positions itself, so the result equals the whole forward for any architecture whose
    blocks hand nothing but hidden states to each other.
    """

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return entering(args, kwargs)[1](entry)

    with ExitStack() as stack:
        for block in blocks[:start]:
            stack.enter_context(replaced(block.module, skip))
        stack.callback(blocks[start].module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand in for the module's own for the length of a `with` block; replacements nest, the innermost is called first.

    `forward` gets what the module's own would get. To run the module's own, keep `module.forward` from before.
    """
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def skip(*args: Any, **kwargs: Any) -> torch.Tensor:
    """A block's forward that hands on what enters it."""
    return entering(args, kwargs)[0]


@contextmanager
def stepped(block: Block, steps: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> Iterator[None]:
    """Add `α · B A x` to the output of each map of a block: the same as adding `α B A` to its weight, which stays as it is.

    Args:
        block: The block.
        steps: For the path of each map (`Block.maps`) that takes a step the factors `A: [r, in]` and `B: [out, r]`.
        alpha: Length of the step.
    """

    def moved(path: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        down, up = steps[path]
        return y + (alpha * ((x.to(down) @ down.T) @ up.T)).to(y)

    def adder(path: str) -> Callable[..., torch.Tensor]:
        return lambda module, args, output: moved(path, args[0], output)

    def tap(paths: Mapping[tuple[str, int | None], str]) -> Tap:
        return lambda parameter, expert, _, x, y: moved(paths[parameter, expert], x, y) if (parameter, expert) in paths else y

    with ExitStack() as stack:
        for projection in block.projections:
            if projection.path in steps:
                stack.callback(projection.module.register_forward_hook(adder(projection.path)).remove)
        for module, stacks in _by_module(block.stacks).items():
            paths = {(one.parameter, own.expert): own.path for one in stacks for own in one.maps if own.path in steps}
            if paths:
                stack.enter_context(replaced(module, partial(run_experts, module, tap(paths))))
        yield


@contextmanager
def stamped(blocks: Sequence[Block], stamp: Callable[[str, int], object]) -> Iterator[None]:
    """Call `stamp` whenever a pass crosses the border of a block; nothing of the pass is changed.

    `stamp("enter", i)` and `stamp("leave", i)` in forward; in backward `stamp("back", i)` once the gradient of what block i − 1 hands
    to block i is complete, so that block i is done, and i = number of blocks once the head is done. Where the graph does not reach that
    far down, there is no such call.
    """

    def watch(hidden: torch.Tensor, index: int) -> None:
        if hidden.requires_grad:
            hidden.register_hook(lambda _: stamp("back", index))

    def enter(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watch(entering(args, kwargs)[0], index)
            stamp("enter", index)

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            stamp("leave", index)
            if index == len(blocks) - 1:
                watch(output[0] if isinstance(output, tuple) else output, len(blocks))

        return hook

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_pre_hook(enter(block.index), with_kwargs=True).remove)
            stack.callback(block.module.register_forward_hook(leave(block.index)).remove)
        yield


@contextmanager
def opened(blocks: Sequence[Block]) -> Iterator[None]:
    """Let gradients start at the input of the first block: backward goes through every one although no weight asks for it."""
    handle = blocks[0].module.register_forward_pre_hook(_require_input_gradient, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
