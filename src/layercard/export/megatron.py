"""Megatron-Bridge's YAML: the `peft` section of its `ConfigContainer`.

Read from Megatron-Bridge 0.3.1: `peft/lora.py` (`LoRA`), `peft/module_matcher.py` and `peft/utils.py` (`wildcard_match`: `*` is any text,
and a dot is any character, so that the documented form `*.layers.1.*.linear_qkv` matches layers 10 to 19 too),
`training/utils/config_utils.py` (`_target_`). Blocks are counted from 0, on every pipeline stage anew. Queries, keys and values are one
map, and so are gate and up; `CanonicalLoRA` fails where it gets only some of them.
"""

from layercard.errors import ExportError
from layercard.export.plan import Plan, Settings, refuse_fractions, refuse_parameters, refuse_ranks, split
from layercard.selection.placement import Placement

BLOCKS = {"model.layers": "*decoder.layers", "model.language_model.layers": "*language_model.decoder.layers"}
"""Where transformers has the blocks, and where Megatron has them, whatever wraps the model."""
MAPS: dict[str, tuple[frozenset[str], ...]] = {
    "self_attention.linear_qkv": (
        frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        frozenset({"self_attn.qkv_proj"}),
    ),
    "self_attention.linear_proj": (frozenset({"self_attn.o_proj"}),),
    "mlp.linear_fc1": (frozenset({"mlp.gate_proj", "mlp.up_proj"}), frozenset({"mlp.gate_up_proj"})),
    "mlp.linear_fc2": (frozenset({"mlp.down_proj"}),),
}
"""Megatron's maps, and what each of them holds of transformers'."""


def plan(placement: Placement, settings: Settings) -> Plan:
    """A pattern for every map of every layer, with no wildcard but that for what wraps the model."""
    refuse_ranks(placement, "Megatron-Bridge")
    refuse_parameters(placement, "Megatron-Bridge", "names experts by how it groups them")
    refuse_fractions("Megatron-Bridge", settings, placement)
    given, usual = settings.named("peft.dim", "peft.alpha", "peft.dropout")
    return Plan(
        wanted={"peft._target_": "megatron.bridge.peft.lora.LoRA", "peft.target_modules": targets(placement), **given},
        usual=usual,
        harmless={
            "peft.exclude_modules": ([],),
            "peft.canonical_mapping": ({},),
            "model.pipeline_model_parallel_size": (1,),
            "checkpoint.pretrained_adapter": ("",),
        },
        notes=("every pipeline stage counts its layers from 0, so these patterns hold for pipeline_model_parallel_size 1 only",),
    )


def targets(placement: Placement) -> list[str]:
    """Megatron's maps that hold exactly the placement's.

    Raises:
        ExportError: A map is unknown there, or only a part of what is one map there is to be adapted.
    """
    parts = split(placement)
    if parts is None or parts.prefix not in BLOCKS:
        raise ExportError(
            f"what Megatron-Bridge calls {placement.targets[0]} is not known here: it has decoders like Llama's only; "
            "train with another trainer"
        )
    return [f"{BLOCKS[parts.prefix]}.{layer}.{name}" for layer, names in parts.names.items() for name in _fused(parts.prefix, layer, names)]


def _fused(prefix: str, layer: int, names: tuple[str, ...]) -> list[str]:
    left, found = set(names), []
    for name, holds in MAPS.items():
        whole = next((each for each in holds if each <= left), None)
        if whole is not None:
            found.append(name)
            left -= whole
    if left:
        strange = f"{prefix}.{layer}.{min(left)}"
        fused = next((name for name, holds in MAPS.items() if any(min(left) in each for each in holds)), None)
        raise ExportError(
            f"Megatron-Bridge holds {strange} in {fused} with others, which the placement does not adapt; select whole layers"
            if fused
            else f"what Megatron-Bridge calls {strange} is not known here; train with another trainer"
        )
    return found
