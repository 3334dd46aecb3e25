"""What is adapted in a PEFT model: modules, parameters and what else trains, and whether that is what a placement planned."""

from collections.abc import Iterable

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from layercard.errors import PlacementError
from layercard.selection import Placement


def adapted_paths(model: PeftModel) -> tuple[str, ...]:
    """Paths of the adapted modules and parameters, as they are called in the base model.

    Of a module with several adapted parameters PEFT nests the wrappers (`experts`, `experts.base_layer`); each counts as its parameter.
    """
    found = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            found.append(f"{name.replace('.base_layer', '')}.{module.parameter_name}")
        elif isinstance(module, BaseTunerLayer):
            found.append(name)
    return tuple(found)


def adapted_ranks(model: PeftModel) -> dict[str, tuple[int, float]]:
    """Rank and scale of each adapted module and parameter, for methods that have both."""
    modules = (module for module in model.get_base_model().modules() if isinstance(module, BaseTunerLayer))
    return {
        path: (module.r["default"], module.scaling["default"])
        for path, module in zip(adapted_paths(model), modules, strict=True)
        if isinstance(module, (LoraLayer, LycorisLayer)) and "default" in module.r
    }


def check_adapted(model: PeftModel, placement: Placement) -> None:
    """Raise `PlacementError` unless exactly the planned modules and parameters are adapted and only adapters are trainable."""
    found, planned = set(adapted_paths(model)), set(placement.targets)
    if found != planned:
        words = [f"{what} {few(paths)}" for what, paths in (("missing", planned - found), ("extra", found - planned)) if paths]
        raise PlacementError(f"PEFT did not adapt what was planned: {'; '.join(words)}; select other layers or report this model")
    stray = stray_weights(model)
    if stray:
        raise PlacementError(f"{len(stray)} weights outside the adapters are trainable, such as {stray[0]}; freeze the model first")


def stray_weights(model: PeftModel) -> list[str]:
    """Trainable weights that belong to no adapter and to no module that the configuration has trained and saved along."""
    inner = model.get_base_model()
    own = {id(weight) for module in inner.modules() for weight in _own_weights(module)}
    if any(vars(config).get("bias", "none") != "none" for config in model.peft_config.values()):
        own |= {
            id(vars(module.get_base_layer())["_parameters"].get("bias")) for module in inner.modules() if isinstance(module, BaseTunerLayer)
        }
    return [name for name, weight in inner.named_parameters() if weight.requires_grad and id(weight) not in own]


def few(paths: Iterable[str]) -> str:
    """The first three of some paths, and how many more there are.

    >>> few({"a", "d", "c", "b"})
    'a, b, c and 1 more'
    """
    names = sorted(paths)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _own_weights(module: nn.Module) -> list[nn.Parameter]:
    """Weights that a wrapper of PEFT's has of its own: those of an adapter, or of a module that is trained and saved along."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return list(module.parameters())
    if not isinstance(module, BaseTunerLayer):
        return []
    base = {id(weight) for weight in module.get_base_layer().parameters()}
    return [weight for weight in module.parameters() if id(weight) not in base]
