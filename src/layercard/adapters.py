"""Adapters exactly where a placement says, and a base model that is as before once they are gone."""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from layercard.errors import PlacementError, one_line
from layercard.inspection import adapted_paths as adapted_paths
from layercard.inspection import check_adapted as check_adapted
from layercard.models import BaseModel, describe
from layercard.pinning import pinned, spell_out, written_weights
from layercard.selection import Placement, check_layers
from layercard.settings import whole

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PLACEMENT_FILE = "placement.json"


def place(base: BaseModel, layers: Iterable[Any], *, objective: str = "given") -> Placement:
    """A placement of every linear map of the given layers, and of their experts.

    Raises:
        PlacementError: The layers are empty, repeated, or not in the model.
    """
    checked = check_layers(layers, len(base.blocks))
    blocks = [base.blocks[layer] for layer in checked]
    paths = tuple(projection.path for block in blocks for projection in block.projections)
    parameters = tuple(stack.path for block in blocks for stack in block.stacks)
    return Placement(describe(base), checked, paths, objective, parameters=parameters)


def without_experts(placement: Placement) -> Placement:
    """The placement's linear maps alone, for methods that cannot adapt stacked experts; what was predicted held for all of it.

    Raises:
        PlacementError: There is nothing else in it, or in one of its layers.
    """
    if not placement.parameters:
        return placement
    ranks = {path: placement.rank_pattern[path] for path in placement.paths if path in placement.rank_pattern}
    alphas = {path: placement.alpha_pattern[path] for path in ranks}
    return dataclasses.replace(placement, parameters=(), predicted={}, rank_pattern=ranks, alpha_pattern=alphas)


def check_model(base: BaseModel, placement: Placement) -> None:
    """Raise `PlacementError` unless `placement` was made for the weights of `base`."""
    found = placement.model.get("fingerprint")
    if found != base.fingerprint:
        raise PlacementError(
            f"the placement is for {placement.model.get('name')!r} (fingerprint {found}), but {base.name!r} has fingerprint "
            f"{base.fingerprint}; select again from a card of this model"
        )


def apply(
    model: PreTrainedModel,
    placement: Placement,
    config: PeftConfig | None = None,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
) -> PeftModel:
    """Wrap a model with fresh adapters at exactly the placement's targets; everything else is frozen.

    Whatever the configuration matches modules by is replaced by the exact paths, and after wrapping what is adapted is compared with what
    was planned. The model is changed in place: use `adapted` where it must come back unchanged. It is as before where this raises.

    ```python
    model = layercard.apply(model, placement, LoraConfig(r=16, lora_alpha=32, use_dora=True))
    ```

    Args:
        model: The model itself, without adapters.
        placement: Where the adapters go.
        config: A configuration of any PEFT method that adapts chosen linear maps, with no choice of modules of its own or the placement's;
            it is copied. Plain LoRA of the rank, alpha and dropout below when not given.
        rank: Rank r of each adapter's update `(alpha / r) B A`, A `[r, in]`, B `[out, r]`; where the placement has ranks and alphas of
            its own, both are taken from there, target by target.
        alpha: Scale of the update.
        dropout: Probability of dropping an input of an adapter during training.

    Raises:
        PlacementError: A path is no target in the placement's layers, the configuration contradicts the placement, PEFT cannot adapt
            what is planned, or what was adapted is not what was planned.
    """
    if config is None:
        config = LoraConfig(r=rank, lora_alpha=whole(alpha), lora_dropout=dropout)
    elif (rank, alpha, dropout) != (8, 16.0, 0.0):
        raise PlacementError("rank, alpha and dropout are given beside a configuration; write them into the configuration")
    exact = pinned(config, placement, model)
    before = _Before(model, written_weights(config, placement))
    try:
        with no_deprecations(), no_false_warnings():
            wrapped = get_peft_model(model, exact)
        spell_out(exact, placement)
        check_adapted(wrapped, placement)
    except (ValueError, TypeError, RuntimeError) as error:
        before.restore()
        reason = one_line(error)
        raise PlacementError(
            f"PEFT cannot put adapters there ({reason}); use another method, or a base model whose maps it knows"
        ) from error
    except PlacementError:
        before.restore()
        raise
    return wrapped


@contextmanager
def adapted(
    base: BaseModel,
    placement: Placement,
    config: PeftConfig | None = None,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
) -> Iterator[PeftModel]:
    """`apply` for the length of a `with` block; afterwards `base` is as before, also when the block raises.

    Raises:
        PlacementError: As `apply`, or the placement is of another model.
    """
    check_model(base, placement)
    with unchanged(base.model, written_weights(config, placement)):
        yield apply(base.model, placement, config, rank=rank, alpha=alpha, dropout=dropout)


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
            with no_deprecations(), no_false_warnings():
                wrapped = PeftModel.from_pretrained(base.model, str(folder))
        except (ValueError, RuntimeError, KeyError, json.JSONDecodeError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise PlacementError(f"{folder} does not fit {base.name!r} ({reason}); load it on the model it was trained for") from error
        if placement is not None:
            check_adapted(wrapped, placement)
        yield wrapped.eval()


@contextmanager
def unchanged(model: PreTrainedModel, rewritten: Iterable[str] = ()) -> Iterator[None]:
    """Take out of `model` whatever the block put in: adapters, trainable flags, gradients, train mode, settings of its config.

    Adapters wrap modules and do not write into weights, so putting the modules back restores every weight bit for bit. `rewritten` are
    paths of modules whose weights the block may write into, as `written_weights` of a configuration says: of those copies are kept.
    """
    before = _Before(model, rewritten)
    try:
        yield
    finally:
        before.restore()


class _Before:
    """A model's modules, weights, flags and settings; without copies of the weights but for those that are `rewritten`."""

    def __init__(self, model: PreTrainedModel, rewritten: Iterable[str] = ()) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.training = {name: module.training for name, module in self.modules.items()}
        self.weights = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
        self.copies = [(weight, weight.detach().clone()) for path in rewritten for weight in self.modules[path].parameters()]
        self.config, self.own = dict(vars(model.config)), set(vars(model))

    def restore(self) -> None:
        """Put all of it back."""
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            if name and self.modules[parent]._modules.get(child) is not module:
                setattr(self.modules[parent], child, module)
            module.training = self.training[name]
        for weight, copied in self.copies:
            weight.data = copied
        for weight, requires_grad, grad in self.weights:
            weight.requires_grad_(requires_grad)
            weight.grad = grad
        for name in set(vars(self.model)) - self.own:
            delattr(self.model, name)
        vars(self.model.config).clear()
        vars(self.model.config).update(self.config)


@contextmanager
def no_deprecations() -> Iterator[None]:
    """Keep what peft, transformers and accelerate say to each other about renamed functions from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


_NOT_SO = (
    r"The following (rank|alpha)_pattern keys did not match",  # looked for among modules only; those that name parameters are heeded
    r"lora with eva initialization used with low_cpu_mem_usage=False",
    r"OLoRA changes the base weights",  # it is saved as plain LoRA
    r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape",  # AdaLoRA may leave a module a rank of 0
    r"Invalid `oft_block_size`",
    r"Setting boft_n_butterfly_factor",
    r"Failed to load the CUDA extension",
)


@contextmanager
def no_false_warnings() -> Iterator[None]:
    """Keep warnings of PEFT's from the user that do not hold for what this package does, or that nothing need be done about."""
    with warnings.catch_warnings():
        for message in _NOT_SO:
            warnings.filterwarnings("ignore", message=message)
        yield
