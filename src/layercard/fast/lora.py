"""LoRA in one step: the frozen module and its adapter as one function with its own backward.

Stock modules compute `y = W x + s · B(A x)` in five operations, each with a pass over `y` or `x` and a node in the graph, and let
autograd multiply thin matrices in the slow order. Here, with rows `x: [N, in]`, `h = x Aᵀ: [N, r]` and `δ = ∂loss/∂y: [N, out]`,

    y = x Wᵀ + s h Bᵀ,   ∂B = s (hᵀ δ)ᵀ,   ∂h = s (Bᵀ δᵀ)ᵀ,   ∂A = ∂hᵀ x,   ∂x = δ W + ∂h A,

where sums are added in place. Numbers are the stock ones up to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear, ParamWrapper
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from layercard.models.hooks import replaced


@dataclass(frozen=True)
class FusedLora:
    """How many adapters of linear modules are computed in one step; others run as they are, those of stacked experts among them."""

    fused: int
    adapters: int
    stacked: int = 0

    def __str__(self) -> str:
        experts = f"; {self.stacked} of stacked experts as they are" if self.stacked else ""
        return f"adapters computed in one step: {self.fused} of {self.adapters}{experts}"


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[FusedLora]:
    """Compute plain LoRA adapters of `model` in one step for the length of a `with` block.

    Left to PEFT are adapters of stacked experts, which it adds to the weights before the experts run, adapters with dropout, bias or a
    variant (DoRA), on quantised or trainable modules, merged, switched off, or several at once, and every call under autocast.

    Args:
        model: A PEFT model, or what wraps one.
    """
    adapters = [module for module in model.modules() if isinstance(module, LoraLinear)]
    plain = [module for module in adapters if _is_plain(module)]
    with ExitStack() as stack:
        for module in plain:
            stack.enter_context(replaced(module, partial(_forward, module, module.forward)))
        yield FusedLora(len(plain), len(adapters), sum(isinstance(module, ParamWrapper) for module in model.modules()))


def _is_plain(module: LoraLinear) -> bool:
    base, names = module.get_base_layer(), module.active_adapters
    if type(base) not in (nn.Linear, Conv1D) or len(names) != 1 or names[0] not in module.lora_A:
        return False
    dropout = module.lora_dropout[names[0]]
    draws = not isinstance(dropout, nn.Identity) and not (isinstance(dropout, nn.Dropout) and dropout.p == 0)
    frozen = base.weight.is_floating_point() and not any(weight.requires_grad for weight in base.parameters())
    return frozen and not draws and names[0] not in module.lora_variant and module.lora_B[names[0]].bias is None


def _forward(module: LoraLinear, run: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    base = module.get_base_layer()
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
    if args or kwargs or hooked or module.disable_adapters or module.merged or torch.is_autocast_enabled(x.device.type):
        return run(x, *args, **kwargs)
    (name,) = module.active_adapters
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    return _Adapted.apply(x, weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


class _Adapted(torch.autograd.Function):
    """`y = x Wᵀ + b + s (x Aᵀ) Bᵀ` for `x: [..., in]`, `W: [out, in]`, `A: [r, in]`, `B: [out, r]`; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """`[..., out]` in the dtype of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        low = rows.to(down.dtype) @ down.T
        out = linear(rows, weight, bias)
        out = out.addmm_(low, up.T, alpha=scale) if out.dtype == low.dtype else torch.addmm(out.to(low.dtype), low, up.T, alpha=scale)
        ctx.save_for_backward(x, weight, down, up, low)
        ctx.scale = scale
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gradients of `x`, `A` and `B`."""
        x, weight, down, up, low = ctx.saved_tensors
        rows, delta = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        wide = delta.to(up.dtype)
        back = (up.T @ wide.T).mul_(ctx.scale)  # [r, N]
        grad_down = back @ rows.to(down.dtype) if ctx.needs_input_grad[3] else None
        grad_up = (low.T @ wide).mul_(ctx.scale).T if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = delta @ weight
            grad_x = grad_x.addmm_(back.T, down) if grad_x.dtype == down.dtype else grad_x + (back.T @ down).to(grad_x.dtype)
            grad_x = grad_x.view_as(x)
        return grad_x, None, None, grad_down, grad_up, None
