"""mlx-lm's YAML.

Read from mlx-lm 0.32.2: `tuner/utils.py` (`linear_to_lora_layers`: of the last `num_layers` blocks, all for -1, maps whose name below the
block is in `keys`, and maps of the whole model whose path is), `tuner/lora.py` (`scale` multiplies B A directly, so it is alpha / rank),
and `models/` for the paths, which are those of its own classes. Keys that match nothing are passed over in silence, so names whose paths
were not read there are refused.
"""

from layercard.errors import ExportError
from layercard.export.plan import Plan, Settings, refuse_parameters, refuse_ranks, split
from layercard.selection.placement import Placement

_LLAMA = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.qkv_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_up_proj",
}  # fmt: skip
PLACES = {
    "model.layers": ("model.layers", _LLAMA),
    "model.language_model.layers": ("language_model.model.layers", _LLAMA),
    "transformer.h": ("model.h", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    "gpt_neox.layers": ("model.h", {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
}
"""Where transformers has the blocks: where mlx-lm has them, and the names in a block that are the same in both."""


def plan(placement: Placement, settings: Settings) -> Plan:
    """Full paths as `keys`, with all layers open to them."""
    refuse_ranks(placement, "mlx-lm")
    refuse_parameters(placement, "mlx-lm", "keeps each map of the experts under a name of its own (switch_mlp)")
    rank = "lora_parameters.rank"
    given, usual = settings.named(rank, "lora_parameters.scale", "lora_parameters.dropout")
    usual.pop("lora_parameters.scale", None)
    scaled = usual if settings.alpha is None and settings.rank is None else given
    scaled["lora_parameters.scale"] = settings.scaling / settings.whole_rank
    return Plan(
        wanted={"num_layers": -1, "lora_parameters.keys": keys(placement), **given},
        usual={"fine_tune_type": "lora", **usual},
        harmless={"fine_tune_type": ("lora", "dora"), "adapter_file": ("",), "resume_adapter_file": ("",)},
        notes=("mlx-lm prints the share of trainable parameters as it starts: 0 % means that its paths are others",),
    )


def keys(placement: Placement) -> list[str]:
    """The paths as mlx-lm has them.

    Raises:
        ExportError: A path whose name in mlx-lm is not known.
    """
    parts = split(placement)
    place, known = PLACES.get(parts.prefix if parts is not None else "", ("", set[str]()))
    strange = next((path for path in placement.paths if not any(path.endswith(f".{name}") for name in known)), None)
    if parts is None or strange is not None:
        raise ExportError(
            f"what mlx-lm calls {strange or placement.targets[0]} is not known here, and it passes over keys that match nothing; "
            "train with another trainer"
        )
    return [f"{place}.{layer}.{name}" for layer, names in parts.names.items() for name in names]
