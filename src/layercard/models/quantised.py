"""Linear modules in 4 or 8 bits (bitsandbytes), filled one weight at a time, so that the whole model is never there in full."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from layercard.errors import ModelError

BITS = (4, 8)
SHARE = {4: 4.5 / 8, 8: 1.03}
"""Bytes of a weight, its share of the scales included (4 bits: a float32 for 64 weights, itself in 8 bits, counted whole)."""


def library() -> Any:
    """The module `bitsandbytes`.

    Raises:
        ModelError: It is not installed, or does not work here.
    """
    try:
        return import_module("bitsandbytes")
    except Exception as error:  # it loads kernels, which fails in many ways
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else "cannot be used here"
        raise ModelError(f"--bits needs bitsandbytes, which {reason}; pip install 'layercard[quantised]', or leave --bits out") from error


def empty_linear(linear: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Module:
    """A module in 4 or 8 bits of the same shape, without its weight (`fill`); it computes in `dtype`."""
    sizes: dict[str, Any] = {"bias": linear.bias is not None, "device": "meta"}
    if bits == 8:
        return library().nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0, **sizes)
    module = library().nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=dtype, quant_type="nf4", **sizes)
    if "support_avx512bf16_for_cpu" in vars(module):
        module.support_avx512bf16_for_cpu = False  # as in `wrap_model`
    return module


def fill(module: nn.Module, weight: torch.Tensor, device: torch.device) -> None:
    """Round a weight `[out, in]` to the bits of an empty module, and put it there, on the device."""
    kind = library().nn
    if isinstance(module, kind.Linear8bitLt):
        module.weight = kind.Int8Params(weight, has_fp16_weights=False, requires_grad=False).to(device)
    else:
        module.weight = kind.Params4bit(weight, requires_grad=False, quant_type="nf4", module=module).to(device)
