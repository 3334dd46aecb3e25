"""A PEFT configuration pinned to the exact paths of a placement: no suffix, no layer index and no pattern is left to match by.

What is adapted in a PEFT model: modules, parameters and what else trains, and whether that is what a placement planned.

Adapters exactly where a placement says, and a base model that is as before once they are gone.
"""

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from layercard.card.numbers import listed
from layercard.errors import PlacementError, one_line
from layercard.models.adapted import adapted_paths, check_adapted, quiet_peft, restorer, unchanged
from layercard.models.layers import LinearModule, find_blocks
from layercard.models.load import BaseModel, describe
from layercard.selection.placement import Placement, check_layers
from layercard.settings import integer_if_whole

# ---- pinning

WITH_PATTERNS = (PeftType.LORA, PeftType.LOHA, PeftType.LOKR)
"""Methods with a rank and an alpha for each module (AdaLoRA's `rank_pattern` is what it finds by itself)."""
NOT_FOR_MAPS = (PeftType.ADAPTION_PROMPT, PeftType.TRAINABLE_TOKENS, PeftType.LN_TUNING)
"""Methods whose `target_modules` are no linear maps."""
LEAVING = (
    PeftType.LORA,
    PeftType.ADALORA,
    PeftType.LOHA,
    PeftType.LOKR,
    PeftType.IA3,
    PeftType.VERA,
    PeftType.OFT,
    PeftType.BOFT,
    PeftType.HRA,
)
"""Methods that leave the weights of the base model alone."""
LEAVING_STARTS = ("gaussian", "eva")
"""Initialisations of LoRA by name (`init_lora_weights`) that do so too."""
TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}


def pinned(config: PeftConfig, placement: Placement, model: PreTrainedModel) -> PeftConfig:
    """A copy of `config` that adapts exactly the targets of `placement`.

    `target_modules`, `target_parameters`, `layers_to_transform`, `layers_pattern`, `exclude_modules` and, where the placement has them,
    `rank_pattern` and `alpha_pattern` are replaced. PEFT takes an exact path for a suffix too (`model.layers.1.x` also names
    `vision.model.layers.1.x`), so such modules are excluded by name.

    Raises:
        PlacementError: A path is no target in the model, or the configuration asks for something else than the placement, or has no
            choice of modules.
    """
    maps = planned_maps(model, placement)
    fields = {each.name for each in dataclasses.fields(config)}
    _check_method(config, fields, placement)
    _check_choice(config, placement)
    if vars(config).get("init_lora_weights") == "olora" and any(projection.transposed for projection in maps.values()):
        raise PlacementError("PEFT's OLoRA takes the stored weights of Conv1D for transposed ones; use PiSSA or plain LoRA in this model")
    exact = copy.deepcopy(config)
    suffixes = tuple(f".{path}" for path in maps)
    twins = [name for name, _ in model.named_modules() if name.endswith(suffixes) and name not in maps]
    changes: dict[str, Any] = {
        "target_modules": list(maps),
        "target_parameters": list(placement.parameters) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": twins or None,
        "fan_in_fan_out": bool(maps) and all(projection.transposed for projection in maps.values()),
        "feedforward_modules": _feedforward(config, maps, model),
        "task_type": config.task_type or task_of(model),
    }
    if placement.rank_pattern:
        changes |= {"rank_pattern": dict(placement.rank_pattern), "alpha_pattern": dict(placement.alpha_pattern)}
    for name, value in changes.items():
        if name in fields:
            setattr(exact, name, value)
    return exact


def spell_out(config: PeftConfig, placement: Placement) -> None:
    """Name the adapted modules in full again: PEFT shortens long lists to suffixes, and the saved adapter must not."""
    config.target_modules = set(placement.paths)
    if placement.parameters:
        config.target_parameters = sorted(placement.parameters)


def written_weights(config: PeftConfig | None, placement: Placement) -> tuple[str, ...]:
    """Paths of the maps whose own weights a configuration may write into as adapters are made: PiSSA, OLoRA, CorDA, LoftQ, OSF.

    Empty for methods known to leave them alone, all of the placement's for any other.
    """
    if config is None:
        return ()
    start = vars(config).get("init_lora_weights", True)
    leaves = config.peft_type in LEAVING and (isinstance(start, bool) or start in LEAVING_STARTS)
    return () if leaves else placement.paths


def planned_maps(model: nn.Module, placement: Placement) -> dict[str, LinearModule]:
    """The placement's linear maps by path; every target must belong to a layer of the placement, and each layer must have one.

    Raises:
        PlacementError: It is otherwise.
    """
    blocks = find_blocks(model)
    check_layers(placement.layers, len(blocks))
    known = {projection.path: (block.index, projection) for block in blocks for projection in block.linear_modules}
    stacks = {stack.path: block.index for block in blocks for stack in block.stacks}
    layer_of = {path: index for path, (index, _) in known.items()}
    _check_known(placement.paths, layer_of, "linear map")
    _check_known(placement.parameters, stacks, "stack of experts")
    hit = {layer_of[path] for path in placement.paths} | {stacks[path] for path in placement.parameters}
    if hit != set(placement.layers):
        raise PlacementError(f"the placement names layers {list(placement.layers)} but its paths lie in layers {sorted(hit)}; select again")
    return {path: known[path][1] for path in placement.paths}


def _check_known(paths: Iterable[str], known: dict[str, int], what: str) -> None:
    unknown = [path for path in paths if path not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)
        hint = f"did you mean {close[0]!r}? Select again for this model" if close else "this model has none; select again for it"
        raise PlacementError(f"{unknown[0]!r} is no {what} of a decoder block; {hint}")


def task_of(model: nn.Module) -> TaskType | None:
    """PEFT's name of what a model does, by its class; it decides which head is trained and saved along (`modules_to_save`)."""
    kind = type(model).__name__
    found = next((task for suffix, task in TASKS.items() if kind.endswith(suffix)), None)
    if found is not None or not isinstance(model, PreTrainedModel) or not model.can_generate():
        return found
    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def _check_method(config: PeftConfig, fields: set[str], placement: Placement) -> None:
    """Refuse a method that cannot put adapters on chosen linear maps, or not with what the placement asks for."""
    name = PeftType(config.peft_type).value
    if config.is_prompt_learning or "target_modules" not in fields or config.peft_type in NOT_FOR_MAPS:
        raise PlacementError(f"{name} has no choice of linear maps, so no placement; use LoRA or another method with target_modules")
    if placement.rank_pattern and config.peft_type not in WITH_PATTERNS:
        raise PlacementError(
            f"{name} has no rank and alpha for each module, but the placement gives them; select without ranks, or use LoRA, LoHa or LoKr"
        )
    if placement.parameters and config.peft_type != PeftType.LORA:
        raise PlacementError(
            f"{name} cannot adapt parameters such as {placement.parameters[0]}; use LoRA, or leave the experts alone (--no-experts)"
        )
    if placement.parameters and vars(config)["use_dora"]:
        raise PlacementError(
            f"PEFT has no DoRA for parameters such as {placement.parameters[0]}; use LoRA, or leave the experts alone (--no-experts)"
        )
    start = vars(config).get("init_lora_weights", True)
    if placement.parameters and start not in (True, False, "gaussian"):
        raise PlacementError(
            f"PEFT cannot begin parameters such as {placement.parameters[0]} with {start!r}; use plain LoRA or --no-experts"
        )
    if placement.parameters and vars(config)["lora_dropout"]:
        raise PlacementError(
            f"PEFT has no dropout for parameters such as {placement.parameters[0]}; set it to 0, or leave the experts alone (--no-experts)"
        )


def _check_choice(config: PeftConfig, placement: Placement) -> None:
    """Refuse what the configuration chooses by itself where that is not the placement's choice."""
    asked = vars(config)
    if asked.get("layers_to_transform") is not None:
        layers = asked["layers_to_transform"]
        layers = [layers] if isinstance(layers, int) else list(layers)
        if set(layers) != set(placement.layers):
            raise PlacementError(
                f"the configuration asks for layers {listed(sorted(layers)) or '[]'} and the placement for {listed(placement.layers)}; "
                "leave layers_to_transform out"
            )
    _check_names("target_modules", asked["target_modules"], placement.paths)
    _check_names("target_parameters", asked.get("target_parameters"), placement.parameters)
    excluded = [path for path in placement.paths if asked.get("exclude_modules") and _names(asked["exclude_modules"], path)]
    if excluded:
        raise PlacementError(f"exclude_modules excludes {excluded[0]}, which the placement adapts; leave exclude_modules out")
    if asked.get("bias") == "all":
        raise PlacementError("bias='all' trains the biases of every layer, not only of the placement's; use bias='none' or 'lora_only'")
    if asked.get("layer_replication"):
        raise PlacementError("layer_replication makes layers that the placement does not know; leave it out")
    _check_patterns(asked, placement)


def _check_patterns(asked: dict[str, Any], placement: Placement) -> None:
    ranks, alphas = asked.get("rank_pattern") or {}, asked.get("alpha_pattern") or {}
    if placement.rank_pattern and (ranks or alphas):
        raise PlacementError(
            "both the configuration and the placement give ranks for single modules; leave rank_pattern and alpha_pattern out"
        )
    if "alpha_pattern" in asked and set(ranks) - set(alphas):
        name = sorted(set(ranks) - set(alphas))[0]
        raise PlacementError(
            f"rank_pattern names {name!r} and alpha_pattern does not, which changes the scale alpha / rank there; name it in both"
        )


def _check_names(field: str, asked: Any, planned: tuple[str, ...]) -> None:
    """Names in the configuration must choose every planned path, and each name at least one of them."""
    if asked is None or asked == "all-linear" or len(asked) == 0:
        return
    left_out = [path for path in planned if not _names(asked, path)]
    if left_out:
        raise PlacementError(f"{field} does not name {left_out[0]}, which the placement adapts; leave {field} out, or select modules alike")
    beside = [name for name in ([] if isinstance(asked, str) else sorted(asked)) if not any(_names([name], path) for path in planned)]
    if beside:
        raise PlacementError(f"{field} names {beside[0]!r}, which the placement does not adapt; leave {field} out")


def _names(asked: Any, path: str) -> bool:
    """Whether a list of names or a regular expression chooses a path, as PEFT matches them."""
    if isinstance(asked, str):
        return re.fullmatch(asked, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in asked)


def _feedforward(config: PeftConfig, maps: dict[str, LinearModule], model: nn.Module) -> list[str]:
    """The planned maps that IA3 scales at their input; all others it scales at their output."""
    asked = vars(config).get("feedforward_modules")
    if asked is None:
        kind = BaseTuner.get_model_config(model).get("model_type")
        asked = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    return [path for path in maps if _names(asked, path)]


# ---- inspection


def adapted_ranks(model: PeftModel) -> dict[str, tuple[int, float]]:
    """Rank and scale of each adapted module and parameter, for methods that have both."""
    modules = (module for module in model.get_base_model().modules() if isinstance(module, BaseTunerLayer))
    return {
        path: (module.r["default"], module.scaling["default"])
        for path, module in zip(adapted_paths(model), modules, strict=True)
        if isinstance(module, (LoraLayer, LycorisLayer)) and "default" in module.r
    }


# ---- adapters

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
    paths = tuple(projection.path for block in blocks for projection in block.linear_modules)
    parameters = tuple(stack.path for block in blocks for stack in block.stacks)
    return Placement(model=describe(base), layers=checked, paths=paths, objective=objective, parameters=parameters)


def without_experts(placement: Placement) -> Placement:
    """The placement's linear maps alone, for methods that cannot adapt stacked experts; what was predicted held for all of it.

    Raises:
        PlacementError: There is nothing else in it, or in one of its layers.
    """
    if not placement.parameters:
        return placement
    ranks = {path: placement.rank_pattern[path] for path in placement.paths if path in placement.rank_pattern}
    alphas = {path: placement.alpha_pattern[path] for path in ranks}
    return placement.changed(parameters=(), predicted={}, rank_pattern=ranks, alpha_pattern=alphas)


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
        config = LoraConfig(r=rank, lora_alpha=integer_if_whole(alpha), lora_dropout=dropout)
    elif (rank, alpha, dropout) != (8, 16.0, 0.0):
        raise PlacementError("rank, alpha and dropout are given beside a configuration; write them into the configuration")
    exact = pinned(config, placement, model)
    restore = restorer(model, written_weights(config, placement))
    try:
        with quiet_peft():
            wrapped = get_peft_model(model, exact)
        spell_out(exact, placement)
        check_adapted(wrapped, placement.targets)
    except (ValueError, TypeError, RuntimeError) as error:
        restore()
        reason = one_line(error)
        raise PlacementError(
            f"PEFT cannot put adapters there ({reason}); use another method, or a base model whose maps it knows"
        ) from error
    except PlacementError:
        restore()
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
            with quiet_peft():
                wrapped = PeftModel.from_pretrained(base.model, str(folder))
        except (ValueError, RuntimeError, KeyError, json.JSONDecodeError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise PlacementError(f"{folder} does not fit {base.name!r} ({reason}); load it on the model it was trained for") from error
        if placement is not None:
            check_adapted(wrapped, placement.targets)
        yield wrapped.eval()
