"""Adapters exactly where a placement says, and a base model that is as before once they are gone.

PEFT's configuration is pinned to the exact paths of the placement, so that no suffix, layer index or pattern is left to match by, and
after wrapping what is adapted is compared with what was planned.
"""

import copy
import dataclasses
import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from layercard.adapters.files import check_loads, load_weights, read_adapter, saved_modules, saved_placement, wrapped_by_peft
from layercard.card.card import check_same_model
from layercard.card.numbers import listed
from layercard.errors import PlacementError, one_line
from layercard.files import read_json
from layercard.models.adapted import adapted_paths, check_adapted, quiet_peft, restorer, unchanged
from layercard.models.layers import LinearModule, find_blocks
from layercard.models.load import BaseModel, describe
from layercard.models.module_sets import module_set
from layercard.selection.placement import Placement, check_layers
from layercard.settings import integer_if_whole

RUN_FILE = "run.json"
"""The record of the run beside an adapter, where `layercard train` made it."""
WITH_PATTERNS = (PeftType.LORA, PeftType.LOHA, PeftType.LOKR)
"""Methods with a rank and an alpha for each module (AdaLoRA's `rank_pattern` is what it finds by itself)."""
NOT_FOR_MODULES = (PeftType.ADAPTION_PROMPT, PeftType.TRAINABLE_TOKENS, PeftType.LN_TUNING)
"""Methods whose `target_modules` are not linear modules."""
LEAVE_WEIGHTS = tuple(PeftType(name) for name in ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT", "HRA"))
"""Methods that do not write into the weights of the base model."""
STARTS_THAT_LEAVE_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` for which LoRA does not either."""
TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}


def place(base: BaseModel, layers: Iterable[Any], *, objective: str = "given", modules: str = "all") -> Placement:
    """A placement of the linear modules of the given layers, and of their experts: all, or a set of them (`MODULE_SETS`).

    Raises:
        PlacementError: The layers are empty, repeated, or not in the model; an unknown set of modules, or one that a layer lacks.
    """
    checked = check_layers(layers, len(base.blocks))
    chosen = [module for layer in checked for module in module_set(base.blocks[layer].adaptable, modules)]
    paths = tuple(module.path for module in chosen if isinstance(module, LinearModule))
    parameters = tuple(module.path for module in chosen if not isinstance(module, LinearModule))
    which = "" if modules == "all" else modules
    return Placement(model=describe(base), layers=checked, paths=paths, objective=objective, parameters=parameters, modules=which)


def without_experts(placement: Placement) -> Placement:
    """The placement without stacked experts, which most methods cannot adapt; its predictions, which included them, are left out.

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
    check_same_model(placement.model, describe(base), "placement", PlacementError, "select again from a card of this model")


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
        config: A configuration of any PEFT method that adapts chosen linear modules, with no choice of modules of its own or the
            placement's; it is copied. Plain LoRA of the rank, alpha and dropout below when not given.
        rank: Rank r of each adapter's update `(alpha / r) B A`, A `[r, in]`, B `[out, r]`; where the placement has ranks and alphas of
            its own, both are taken from there, target by target.
        alpha: Scale of the update.
        dropout: Probability of dropping an input of an adapter during training.

    Raises:
        PlacementError: A path is not a target in the placement's layers, the configuration contradicts the placement, PEFT cannot adapt
            what is planned, or what was adapted is not what was planned.
    """
    if config is None:
        config = LoraConfig(r=rank, lora_alpha=integer_if_whole(alpha), lora_dropout=dropout)
    elif (rank, alpha, dropout) != (8, 16.0, 0.0):
        raise PlacementError("rank, alpha and dropout are given beside a configuration; write them into the configuration")
    exact = pinned(config, placement, model)
    restore = restorer(model, written_weights(config, placement.paths))
    try:
        with quiet_peft():
            wrapped = get_peft_model(model, exact)
        spell_out(exact, placement)
        check_adapted(wrapped, placement.targets)
    except (ValueError, TypeError, RuntimeError) as error:
        restore()
        reason = one_line(error)
        raise PlacementError(
            f"PEFT cannot put adapters there ({reason}); use another method, or a base model whose modules it knows"
        ) from error
    except PlacementError:
        restore()
        raise
    return wrapped


@contextmanager
def adapted(base: BaseModel, placement: Placement, config: PeftConfig | None = None, **lora: Any) -> Iterator[PeftModel]:
    """`apply` for the length of a `with` block; afterwards `base` is as before, also when the block raises.

    Raises:
        PlacementError: As `apply`, or the placement is for another model.
    """
    check_model(base, placement)
    with unchanged(base.model, written_weights(config, placement.paths)):
        yield apply(base.model, placement, config, **lora)


@contextmanager
def loaded(base: BaseModel, folder: str | Path) -> Iterator[PeftModel]:
    """The saved adapter in `folder` on top of `base`, in eval mode, for the length of a `with` block.

    Raises:
        PlacementError: There is no adapter in the folder, it was trained for another model, or its weights do not fit this one, lack a
            part, or are not finite.
    """
    adapter, placement = read_adapter(folder, base.model), saved_placement(folder)
    if placement is not None:
        check_model(base, placement)
    _note_dtype(base, Path(folder))
    check_loads(base.model, adapter, str(folder), base.name)
    config = copy.deepcopy(adapter.config)
    config.base_model_name_or_path = None
    linear = [module.path for block in base.blocks for module in block.linear_modules]
    with unchanged(base.model, written_weights(config, linear)):
        wrapped = wrapped_by_peft(base.model, config)
        load_weights(wrapped, adapter.weights or {}, empty=False)
        if placement is not None:
            check_adapted(wrapped, placement.targets)
        _, none_acts, effect = saved_modules(config, adapter.weights or {})
        if none_acts:
            logging.getLogger(__name__).warning("%s: %s", folder, effect)
        yield wrapped.requires_grad_(False).eval()


def _note_dtype(base: BaseModel, folder: Path) -> None:
    """Say where an adapter was trained on the same model in another type."""
    with suppress(PlacementError):  # an adapter without a record of its run, or with one that cannot be read, has nothing to say
        trained = read_json(folder / RUN_FILE, PlacementError, "run record").get("model")
        dtype = trained.get("dtype") if isinstance(trained, dict) else None
        here = str(base.model.dtype).removeprefix("torch.")
        if isinstance(dtype, str) and dtype != here:
            logging.getLogger(__name__).warning(
                "the adapter was trained in %s and the model is in %s: losses differ by rounding", dtype, here
            )


def adapted_ranks(model: PeftModel) -> dict[str, tuple[int, float]]:
    """Rank and scale of each adapted module and parameter, for methods that have both."""
    modules = (module for module in model.get_base_model().modules() if isinstance(module, BaseTunerLayer))
    return {
        path: (module.r["default"], module.scaling["default"])
        for path, module in zip(adapted_paths(model), modules, strict=True)
        if isinstance(module, (LoraLayer, LycorisLayer)) and "default" in module.r
    }


# The configuration


def pinned(config: PeftConfig, placement: Placement, model: PreTrainedModel) -> PeftConfig:
    """A copy of `config` that adapts exactly the targets of `placement`.

    Raises:
        PlacementError: A path is not a target in the model, or the configuration asks for something else than the placement, or has no
            choice of modules.
    """
    modules = planned_modules(model, placement)
    names = {field.name for field in dataclasses.fields(config)}
    transposed = [module.transposed for module in modules.values()]
    for refused, message in _refusals(config, placement, modules):
        if refused:
            raise PlacementError(message)
    # PEFT takes an exact path for a suffix too (`model.layers.1.x` also names `vision.model.layers.1.x`): exclude those by name.
    suffixes = tuple(f".{path}" for path in modules)
    twins = [name for name, _ in model.named_modules() if name.endswith(suffixes) and name not in modules]
    # IA3 scales feed-forward modules at their input and all others at their output.
    feedforward = vars(config).get("feedforward_modules")
    if feedforward is None:
        kind = BaseTuner.get_model_config(model).get("model_type")
        feedforward = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    changes: dict[str, Any] = {
        "target_modules": list(modules),
        "target_parameters": list(placement.parameters) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": twins or None,
        "fan_in_fan_out": bool(modules) and all(transposed),
        "feedforward_modules": [path for path in modules if _names(feedforward, path)],
        "task_type": config.task_type or task_of(model),
    }
    if placement.rank_pattern:
        changes |= {"rank_pattern": dict(placement.rank_pattern), "alpha_pattern": dict(placement.alpha_pattern)}
    exact = copy.deepcopy(config)
    for name in names & changes.keys():
        setattr(exact, name, changes[name])
    return exact


def _refusals(config: PeftConfig, placement: Placement, modules: dict[str, LinearModule]) -> Iterator[tuple[Any, str]]:
    """Reasons to refuse a configuration for a placement of `modules`, in order: whether each holds, and its message."""
    given, method = vars(config), PeftType(config.peft_type).value
    start = given.get("init_lora_weights", True)

    # What the method cannot do.
    no_choice = config.is_prompt_learning or "target_modules" not in given or config.peft_type in NOT_FOR_MODULES
    yield no_choice, f"{method} has no choice of linear maps, so no placement; use LoRA or another method with target_modules"
    yield (
        placement.rank_pattern and config.peft_type not in WITH_PATTERNS,
        f"{method} has no rank and alpha for each module, but the placement gives them; select without ranks, or use LoRA, LoHa or LoKr",
    )
    if placement.parameters:
        stack, mend = placement.parameters[0], "leave the experts alone (--no-experts)"
        yield config.peft_type != PeftType.LORA, f"{method} cannot adapt parameters such as {stack}; use LoRA, or {mend}"
        yield given.get("use_dora"), f"PEFT has no DoRA for parameters such as {stack}; use LoRA, or {mend}"
        plain = start in (True, False, "gaussian")
        yield not plain, f"PEFT cannot begin parameters such as {stack} with {start!r}; use plain LoRA or --no-experts"
        yield given.get("lora_dropout"), f"PEFT has no dropout for parameters such as {stack}; set it to 0, or {mend}"

    # What the configuration chooses by itself, where that is not the placement's choice.
    layers = given.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    yield (
        layers is not None and set(layers) != set(placement.layers),
        f"the configuration asks for layers {listed(sorted(layers or ())) or '[]'} and the placement for {listed(placement.layers)}; "
        "leave layers_to_transform out",
    )
    for field, planned in (("target_modules", placement.paths), ("target_parameters", placement.parameters)):
        names = given.get(field)
        if names is None or names == "all-linear" or len(names) == 0:
            continue
        lacking = next((path for path in planned if not _names(names, path)), "")
        yield lacking, f"{field} does not name {lacking}, which the placement adapts; leave {field} out, or select modules alike"
        single = [] if isinstance(names, str) else sorted(names)
        beside = next((name for name in single if not any(_names([name], path) for path in planned)), "")
        yield beside, f"{field} names {beside!r}, which the placement does not adapt; leave {field} out"
    excluded = next((path for path in placement.paths if given.get("exclude_modules") and _names(given["exclude_modules"], path)), "")
    yield excluded, f"exclude_modules excludes {excluded}, which the placement adapts; leave exclude_modules out"
    biases = given.get("bias") == "all"
    yield biases, "bias='all' trains the biases of every layer, not only of the placement's; use bias='none' or 'lora_only'"
    yield given.get("layer_replication"), "layer_replication makes layers that the placement does not know; leave it out"

    # Ranks of single modules.
    ranks, alphas = given.get("rank_pattern") or {}, given.get("alpha_pattern") or {}
    yield (
        placement.rank_pattern and (ranks or alphas),
        "both the configuration and the placement give ranks for single modules; leave rank_pattern and alpha_pattern out",
    )
    alone = min(set(ranks) - set(alphas), default="") if "alpha_pattern" in given else ""
    yield alone, f"rank_pattern names {alone!r} and alpha_pattern does not, which changes the scale alpha / rank there; name it in both"
    wrong_way = start == "olora" and any(module.transposed for module in modules.values())
    yield wrong_way, "PEFT's OLoRA takes the stored weights of Conv1D for transposed ones; use PiSSA or plain LoRA in this model"
    rank = max([given.get("r") or 0, *ranks.values()]) if start not in STARTS_THAT_LEAVE_WEIGHTS else 0
    narrow = next((path for path, module in modules.items() if min(module.in_features, module.out_features) < rank), "")
    yield narrow, f"rank {rank} is above the width of {narrow}, and {start} takes adapters out of its weight; give a lower rank"


def _names(names: Any, path: str) -> bool:
    """Whether a list of names or a regular expression chooses a path, as PEFT matches them."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def spell_out(config: PeftConfig, placement: Placement) -> None:
    """Name the adapted modules in full again: PEFT shortens long lists to suffixes, and the saved adapter must not."""
    config.target_modules = set(placement.paths)
    if placement.parameters:
        config.target_parameters = sorted(placement.parameters)


def written_weights(config: PeftConfig | None, paths: Sequence[str]) -> Sequence[str]:
    """Of the modules to adapt, those whose weights a configuration may write into as adapters are made: all or none.

    PiSSA, OLoRA, CorDA, LoftQ and OSF do.
    """
    start = vars(config).get("init_lora_weights", True) if config is not None else True
    leaves = config is None or (config.peft_type in LEAVE_WEIGHTS and start in STARTS_THAT_LEAVE_WEIGHTS)
    return () if leaves else paths


def planned_modules(model: nn.Module, placement: Placement) -> dict[str, LinearModule]:
    """The placement's linear modules by path; every target must belong to a layer of the placement, and each layer must have one.

    Raises:
        PlacementError: It is otherwise.
    """
    blocks = find_blocks(model)
    check_layers(placement.layers, len(blocks))
    modules = {module.path: module for block in blocks for module in block.linear_modules}
    module_layers = {module.path: block.index for block in blocks for module in block.linear_modules}
    stack_layers = {stack.path: block.index for block in blocks for stack in block.stacks}
    for paths, layers, what in ((placement.paths, module_layers, "linear map"), (placement.parameters, stack_layers, "stack of experts")):
        unknown = next((path for path in paths if path not in layers), None)
        if unknown is not None:
            close = difflib.get_close_matches(unknown, layers, n=1, cutoff=0.0)
            hint = f"did you mean {close[0]!r}? Select again for this model" if close else "this model has none; select again for it"
            raise PlacementError(f"{unknown!r} is not a {what} of a decoder block; {hint}")
    reached = {module_layers[path] for path in placement.paths} | {stack_layers[path] for path in placement.parameters}
    if reached != set(placement.layers):
        names = f"{list(placement.layers)} but its paths lie in layers {sorted(reached)}"
        raise PlacementError(f"the placement names layers {names}; select again")
    return {path: modules[path] for path in placement.paths}


def task_of(model: nn.Module) -> TaskType | None:
    """PEFT's name of what a model does, by its class; it decides which head is trained and saved along (`modules_to_save`)."""
    task = next((task for suffix, task in TASKS.items() if type(model).__name__.endswith(suffix)), None)
    if task is not None or not isinstance(model, PreTrainedModel) or not model.can_generate():
        return task
    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
