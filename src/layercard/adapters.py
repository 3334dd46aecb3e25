"""LoRA adapters exactly where a placement says, and a base model that is as before once they are gone."""

import difflib
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from layercard.errors import PlacementError
from layercard.layers import Projection, find_blocks
from layercard.models import BaseModel, describe
from layercard.selection import Placement, check_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PLACEMENT_FILE = "placement.json"


def place(base: BaseModel, layers: Iterable[Any], *, objective: str = "given") -> Placement:
    """A placement of every linear map of the given layers.

    Raises:
        PlacementError: The layers are empty, repeated, or not in the model.
    """
    checked = check_layers(layers, len(base.blocks))
    paths = tuple(projection.path for layer in checked for projection in base.blocks[layer].projections)
    return Placement(describe(base), checked, paths, objective)


def check_model(base: BaseModel, placement: Placement) -> None:
    """Raise `PlacementError` unless `placement` was made for the weights of `base`."""
    found = placement.model.get("fingerprint")
    if found != base.fingerprint:
        raise PlacementError(
            f"the placement is for {placement.model.get('name')!r} (fingerprint {found}), but {base.name!r} has fingerprint "
            f"{base.fingerprint}; select again from a card of this model"
        )


def apply(model: PreTrainedModel, placement: Placement, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> PeftModel:
    """Wrap a model with fresh LoRA adapters at exactly the placement's paths; everything else is frozen.

    PEFT takes an exact path for a suffix too (`model.layers.1.x` also names `vision.model.layers.1.x`). Such modules are excluded
    by name, and after wrapping the adapted modules are compared with the planned ones. The model is changed in place: use
    `adapted` where it must come back unchanged.

    Args:
        model: The model itself, without adapters.
        placement: Where the adapters go.
        rank: Rank r of each adapter's update `(alpha / r) B A`, A `[r, in]`, B `[out, r]`; where the placement has ranks and alphas of
            its own, both are taken from there, module by module.
        alpha: Scale of the update.
        dropout: Probability of dropping an input of an adapter during training.

    Raises:
        PlacementError: A path is no linear map of the placement's layers, or what was adapted is not what was planned.
    """
    targets = _projections(model, placement)
    suffixes = tuple(f".{path}" for path in targets)
    extra = [name for name, _ in model.named_modules() if name.endswith(suffixes) and name not in targets]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # an integer where it can be: other tools read it as one
        rank_pattern=dict(placement.rank_pattern),
        alpha_pattern=dict(placement.alpha_pattern),
        lora_dropout=dropout,
        target_modules=list(targets),
        exclude_modules=extra or None,
        fan_in_fan_out=all(projection.transposed for projection in targets.values()),
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        with no_deprecations():
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise PlacementError(f"PEFT cannot put adapters there ({reason}); use a base model whose maps it knows") from error
    config.target_modules = set(targets)  # PEFT shortens long lists to suffixes; the saved adapter names the modules in full
    check_adapted(wrapped, placement)
    return wrapped


def adapted_paths(model: PeftModel) -> tuple[str, ...]:
    """Paths of the adapted modules, as they are called in the base model."""
    inner = model.get_base_model()
    return tuple(name for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer))


def check_adapted(model: PeftModel, placement: Placement) -> None:
    """Raise `PlacementError` unless exactly the planned modules are adapted and only adapters are trainable."""
    found, planned = set(adapted_paths(model)), set(placement.paths)
    if found != planned:
        words = [f"{what} {_few(paths)}" for what, paths in (("missing", planned - found), ("extra", found - planned)) if paths]
        raise PlacementError(f"PEFT did not adapt what was planned: {'; '.join(words)}; select other layers or report this model")
    prefixes = tuple(f"{path}.lora_" for path in planned)
    stray = [name for name, weight in model.get_base_model().named_parameters() if weight.requires_grad and not name.startswith(prefixes)]
    if stray:
        raise PlacementError(f"{len(stray)} weights outside the adapters are trainable, such as {stray[0]}; freeze the model first")


@contextmanager
def adapted(base: BaseModel, placement: Placement, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Iterator[PeftModel]:
    """`apply` for the length of a `with` block; afterwards `base` is as before, also when the block raises.

    Raises:
        PlacementError: As `apply`, or the placement is of another model.
    """
    check_model(base, placement)
    with unchanged(base.model):
        yield apply(base.model, placement, rank=rank, alpha=alpha, dropout=dropout)


@contextmanager
def loaded(base: BaseModel, folder: str | Path) -> Iterator[PeftModel]:
    """The saved adapter in `folder` on top of `base`, in eval mode, for the length of a `with` block.

    Raises:
        PlacementError: There is no adapter in the folder, or it was trained for another model.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise PlacementError(f"{folder} is no adapter: it lacks {missing[0]}; name the folder that `layercard train` wrote")
    placement = Placement.load(folder / PLACEMENT_FILE) if (folder / PLACEMENT_FILE).exists() else None
    if placement is not None:
        check_model(base, placement)
    with unchanged(base.model):
        try:
            with no_deprecations():
                wrapped = PeftModel.from_pretrained(base.model, str(folder))
        except (ValueError, RuntimeError, KeyError, json.JSONDecodeError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise PlacementError(f"{folder} does not fit {base.name!r} ({reason}); load it on the model it was trained for") from error
        if placement is not None:
            check_adapted(wrapped, placement)
        yield wrapped.eval()


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Take out of `model` whatever the block put in: adapters, trainable flags, gradients, train mode, settings of its config.

    Adapters wrap modules and do not write into weights, so putting the modules back restores every weight bit for bit.
    """
    modules = dict(model.named_modules())
    training = {name: module.training for name, module in modules.items()}
    weights = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    config, own = dict(vars(model.config)), set(vars(model))
    try:
        yield
    finally:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if name and modules[parent]._modules.get(child) is not module:
                setattr(modules[parent], child, module)
            module.training = training[name]
        for weight, requires_grad, grad in weights:
            weight.requires_grad_(requires_grad)
            weight.grad = grad
        for name in set(vars(model)) - own:
            delattr(model, name)
        vars(model.config).clear()
        vars(model.config).update(config)


@contextmanager
def no_deprecations() -> Iterator[None]:
    """Keep what peft, transformers and accelerate say to each other about renamed functions from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _projections(model: nn.Module, placement: Placement) -> dict[str, Projection]:
    """The placement's linear maps by path; each must belong to a layer of the placement, and each layer must have one."""
    blocks = find_blocks(model)
    check_layers(placement.layers, len(blocks))
    known = {projection.path: (block.index, projection) for block in blocks for projection in block.projections}
    unknown = [path for path in placement.paths if path not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        raise PlacementError(f"{unknown[0]!r} is no linear map of a decoder block; did you mean {close!r}? Select again for this model")
    hit = {known[path][0] for path in placement.paths}
    if hit != set(placement.layers):
        raise PlacementError(f"the placement names layers {list(placement.layers)} but its paths lie in layers {sorted(hit)}; select again")
    return {path: known[path][1] for path in placement.paths}


def _few(paths: set[str]) -> str:
    first = sorted(paths)[:3]
    return ", ".join(first) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
