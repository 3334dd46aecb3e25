"""Adapters of PEFT on a model and off again, for training, probes, timing and verification alike.

Adapters wrap modules and do not write into weights, so putting the modules back restores every weight bit for bit.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from layercard.errors import PlacementError
from layercard.models.hooks import frozen
from layercard.models.load import BaseModel

_FALSE_WARNINGS = (
    r"The following (rank|alpha)_pattern keys did not match",  # PEFT looks among modules only; keys that name parameters are heeded
    r"lora with eva initialization used with low_cpu_mem_usage=False",
    r"OLoRA changes the base weights",  # it is saved as plain LoRA
    r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape",  # AdaLoRA may leave a module a rank of 0
    r"Invalid `oft_block_size`",
    r"Setting boft_n_butterfly_factor",
    r"Failed to load the CUDA extension",
)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide warnings of PEFT that are not true here or that nothing need be done about, and what libraries tell each other of renames."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        for message in _FALSE_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def restorer(model: PreTrainedModel, rewritten: Iterable[str] = ()) -> Callable[[], None]:
    """A function that makes `model` what it is now: modules, weights, flags, gradients, modes, attributes and settings of its config.

    Weights are not copied, except those of the modules whose paths are `rewritten`.
    """
    modules = dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    weights = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    copies = [(weight, weight.detach().clone()) for path in rewritten for weight in modules[path].parameters()]
    config, attributes = dict(vars(model.config)), set(vars(model))

    def restore() -> None:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if name and modules[parent]._modules.get(child) is not module:
                setattr(modules[parent], child, module)
            module.training = modes[name]
        for weight, copied in copies:
            weight.data = copied
        for weight, requires_grad, grad in weights:
            weight.requires_grad_(requires_grad)
            weight.grad = grad
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        vars(model.config).clear()
        vars(model.config).update(config)

    return restore


@contextmanager
def unchanged(model: PreTrainedModel, rewritten: Iterable[str] = ()) -> Iterator[None]:
    """Take out of `model` whatever the block put in, adapters above all, also when the block raises (`restorer`)."""
    restore = restorer(model, rewritten)
    try:
        yield
    finally:
        restore()


@contextmanager
def lora_layers(base: BaseModel, layers: Sequence[int], *, rank: int, alpha: float, seed: int | None = None) -> Iterator[PeftModel]:
    """Plain LoRA on all linear modules and experts of some layers, in eval mode; model and random state are as before afterwards."""
    blocks = [base.blocks[layer] for layer in layers]
    modules = [module for block in blocks for module in block.linear_modules]
    stacks = [stack.path for block in blocks for stack in block.stacks]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[module.path for module in modules],
        target_parameters=stacks or None,
        fan_in_fan_out=not stacks and all(module.transposed for module in modules),
    )
    with frozen(base.model), unchanged(base.model), torch.enable_grad():
        if seed is not None:
            torch.manual_seed(seed)
        with quiet_peft():
            model = get_peft_model(base.model, config)
        check_adapted(model, [*(module.path for module in modules), *stacks])
        yield model


def check_adapted(model: PeftModel, planned: Iterable[str]) -> None:
    """Raise `PlacementError` unless exactly the planned modules and parameters are adapted, and only adapters are trainable."""
    adapted, planned = set(adapted_paths(model)), set(planned)
    if adapted != planned:
        words = [f"{what} {few(paths)}" for what, paths in (("missing", planned - adapted), ("extra", adapted - planned)) if paths]
        raise PlacementError(f"PEFT did not adapt what was planned: {'; '.join(words)}; select other layers or report this model")
    stray = stray_weights(model)
    if stray:
        raise PlacementError(f"{len(stray)} weights outside the adapters are trainable, such as {stray[0]}; freeze the model first")


def adapted_paths(model: PeftModel) -> tuple[str, ...]:
    """Paths of the adapted modules and parameters, as they are called in the base model.

    PEFT nests the wrappers of several parameters of one module (`experts`, `experts.base_layer`); each counts as its parameter.
    """
    modules = model.get_base_model().named_modules()
    return tuple(
        f"{name.replace('.base_layer', '')}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name
        for name, module in modules
        if isinstance(module, BaseTunerLayer)
    )


def stray_weights(model: PeftModel) -> list[str]:
    """Trainable weights that belong to no adapter and to no module that the configuration has trained and saved along."""
    inner = model.get_base_model()
    with_bias = any(vars(config).get("bias", "none") != "none" for config in model.peft_config.values())
    expected: set[int] = set()
    for module in inner.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            expected |= {id(weight) for weight in module.parameters()}
        elif isinstance(module, BaseTunerLayer):
            layer: nn.Module = module.get_base_layer()
            expected |= {id(weight) for weight in module.parameters()} - {id(weight) for weight in layer.parameters()}
            if with_bias:
                expected.add(id(layer._parameters.get("bias")))
    return [name for name, weight in inner.named_parameters() if weight.requires_grad and id(weight) not in expected]


def few(paths: Iterable[str]) -> str:
    """The first three of some paths, and how many more there are.

    >>> few({"a", "d", "c", "b"})
    'a, b, c and 1 more'
    """
    names = sorted(paths)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
