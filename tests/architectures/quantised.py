"""Models whose maps hold no float matrix: bitsandbytes' on the CPU, and a stand-in for kinds that are no `nn.Linear` (GPTQ, AWQ, HQQ)."""

import tempfile

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from layercard.models.load import quiet_libraries

KINDS = ("8bit", "4bit", "packed")


class PackedLinear(nn.Module):
    """A linear map whose weight lies as unsigned bytes with a scale for each row."""

    def __init__(self, map_: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = map_.in_features, map_.out_features
        weight = map_.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", ((weight / scale).round() + 128).to(torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, (self.codes.float() - 128) * self.scale)


def quantised(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model with the maps of its blocks quantised; the head stays as it is."""
    if kind == "packed":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and ".layers." in name:
                model.set_submodule(name, PackedLinear(module))
        return model
    config = BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
