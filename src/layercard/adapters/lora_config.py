"""A placement as PEFT's `LoraConfig`, for PEFT itself and for TRL's `peft_config=`.

Modules are named by their full paths, never by suffix and layer index: PEFT ignores `layers_to_transform` for stacked experts, takes
layers of a vision tower for those of the text model, and leaves out silently blocks that lack a named module.
"""

from typing import TYPE_CHECKING, Any

from layercard.errors import PlacementError, one_line
from layercard.selection.placement import Placement
from layercard.settings import integer_if_whole

if TYPE_CHECKING:
    from peft import LoraConfig

CHOSEN = (
    "target_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
)
"""Arguments of `LoraConfig` that choose modules or their ranks, which is the placement's to do."""


def lora_arguments(
    placement: Placement, *, r: int = 8, lora_alpha: float | None = None, lora_dropout: float = 0.0, **options: Any
) -> dict[str, Any]:
    """Keyword arguments of `peft.LoraConfig` that put adapters exactly where a placement says; every value is plain JSON.

    `fan_in_fan_out` is not among them: PEFT sets it by itself for each `Conv1D` (GPT-2) that it adapts.

    Args:
        placement: Where the adapters go; ranks and alphas of its own are taken over, target by target.
        r: Rank of the adapters, where the placement has none of its own.
        lora_alpha: The update is `lora_alpha / r` times B A; twice the rank when not given.
        lora_dropout: Probability of dropping an input of an adapter during training.
        options: Further arguments of `LoraConfig`, such as `use_dora=True`; `task_type` is CAUSAL_LM when not given.

    Raises:
        PlacementError: An argument chooses modules, is out of range, or asks for dropout on stacked experts, which PEFT lacks.
    """
    chosen = next((name for name in CHOSEN if name in options), None)
    if chosen is not None:
        raise PlacementError(f"{chosen} is given beside a placement, which chooses the modules and their ranks; leave it out")
    alpha = 2 * r if lora_alpha is None else lora_alpha
    check_settings(placement, r, alpha, lora_dropout)
    return {
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": integer_if_whole(alpha),
        "lora_dropout": lora_dropout,
        "bias": "none",
        **options,
        **full_paths(placement),
    }


def lora_config(
    placement: Placement, *, r: int = 8, lora_alpha: float | None = None, lora_dropout: float = 0.0, **options: Any
) -> "LoraConfig":
    """`lora_arguments` as a `LoraConfig`, for `peft_config=` of TRL's trainers and for `get_peft_model`.

    ```python
    trainer = SFTTrainer(model, peft_config=lora_config(placement, r=16), ...)
    ```

    Where the model is at hand, `layercard.apply` is the safer way: it also checks what was adapted.

    Raises:
        PlacementError: As `lora_arguments`, or `LoraConfig` refuses an option.
    """
    from peft import LoraConfig

    arguments = lora_arguments(placement, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, **options)
    try:
        return LoraConfig(**arguments)
    except (TypeError, ValueError) as error:
        reason = one_line(error)
        raise PlacementError(f"peft.LoraConfig refuses these options ({reason}); change or leave out {', '.join(options)}") from error


def check_settings(placement: Placement, rank: int, alpha: float, dropout: float) -> None:
    """Raise `PlacementError` for a rank, alpha or dropout that no LoRA adapter can have, or not on these targets."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise PlacementError(f"rank {rank!r} makes no adapter; give a whole number of at least 1")
    if not 0 < alpha < float("inf"):
        raise PlacementError(f"alpha {alpha!r} scales adapters to nothing; give a number above 0")
    if not 0 <= dropout < 1:
        raise PlacementError(f"dropout {dropout!r} is not a probability below 1; give 0 or a little more")
    if dropout and placement.parameters:
        raise PlacementError(
            f"PEFT has no dropout for parameters such as {placement.parameters[0]}; set it to 0, or select without the stacked experts"
        )


def full_paths(placement: Placement) -> dict[str, Any]:
    """PEFT's keys that choose modules. A full path is found by itself, whatever `layers_to_transform` says."""
    parameters = {"target_parameters": list(placement.parameters)} if placement.parameters else {}
    return {"target_modules": list(placement.paths), **parameters, **patterns(placement)}


def patterns(placement: Placement) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` where the placement has them: always both, since a rank alone changes the scale alpha / r."""
    if not placement.rank_pattern:
        return {}
    alphas = {path: integer_if_whole(alpha) for path, alpha in placement.alpha_pattern.items()}
    return {"rank_pattern": dict(placement.rank_pattern), "alpha_pattern": alphas}
