"""The trainers that a placement can be written for: for each a table of its keys, and a function that names the adapted modules its way.

Keys are written with dots where they lie in a section: `lora_parameters.keys` is `keys` in `lora_parameters`. What a trainer makes of its
keys was read in the sources of the release named in the table; the files are named beside each entry.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from layercard.adapters.lora_config import CHOSEN, check_settings, full_paths, patterns
from layercard.errors import ExportError
from layercard.export.config_text import ABSENT, lookup
from layercard.files import shown
from layercard.models.module_sets import MLX_BLOCKS
from layercard.selection.placement import Placement
from layercard.settings import integer_if_whole


class Setting(Enum):
    """Stands in a trainer's table for a number that the user may give."""

    RANK = "rank"
    ALPHA = "alpha"
    SCALE = "alpha / rank"
    DROPOUT = "dropout"


RANK, ALPHA, SCALE, DROPOUT = Setting


@dataclass(frozen=True)
class LoraSettings:
    """Rank, alpha, dropout and learning rate as far as they are given; the rest is left to the file that is merged into.

    Where nothing says, the rank is 8, alpha twice the rank (the update is `alpha / rank` times B A), the dropout 0, and the learning rate
    that of the placement, where it has one.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    learning_rate: float | None = None

    def rate_for(self, placement: Placement) -> float | None:
        """The learning rate that was given, else the placement's."""
        return placement.learning_rate if self.learning_rate is None else self.learning_rate

    def values(self, rank_in_file: int = 8) -> dict[Setting, Any]:
        """The numbers, with the defaults where none are given; alpha is an integer where it can be."""
        rank = rank_in_file if self.rank is None else self.rank
        alpha = 2 * rank if self.alpha is None else self.alpha
        dropout = 0.0 if self.dropout is None else self.dropout
        return {RANK: rank, ALPHA: integer_if_whole(alpha), DROPOUT: dropout, SCALE: alpha / rank if rank else 0.0}

    def check(self, placement: Placement) -> None:
        """Raise `PlacementError` or `ExportError` where they are out of range or do not go with the placement."""
        values = self.values()
        check_settings(placement, values[RANK], values[ALPHA], values[DROPOUT])
        if placement.rank_pattern and (self.rank is not None or self.alpha is not None):
            raise ExportError("the placement has a rank and an alpha for every target; leave --rank and --alpha out")


class Plan(NamedTuple):
    """What one trainer must read for a placement."""

    required: dict[str, Any]  # keys with the value that they must have
    defaults: dict[str, Any]  # keys with the value that they get where a file says nothing
    allowed: dict[str, tuple[Any, ...]]  # values of further keys with which the placement is followed; any other contradicts it


@dataclass(frozen=True)
class Trainer:
    """One trainer: its keys as a table. Keys in `defaults` are written where a file says nothing, in this order."""

    name: str  # as `--to` takes it
    title: str  # as messages call it
    version: str  # the release whose sources the keys were read from
    choose: Callable[[Placement], dict[str, Any]]  # makes the keys that choose the adapted modules
    defaults: dict[str, Any]
    allowed: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # values of further keys with which the placement is followed
    allowed_with_experts: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # in place of these where there are stacked experts
    choosing: tuple[str, ...] = ()  # keys that would choose modules as well: they must be empty unless `choose` gives them
    suffixes: tuple[str, ...] = (".yaml", ".yml")  # of the files that it reads, the usual one first; none where only Python calls it
    script: str | None = None  # Python that calls it, where that is its usual way
    has_ranks: bool = False  # whether single modules can have their own rank
    rate_key: str = ""  # its key for the peak learning rate; none where what is written here does not train
    no_experts: str = ""  # why it cannot name stacked experts, where it cannot
    whole_alpha: bool = False  # whether it reads alpha as an integer
    notes: tuple[str, ...] = ()  # sentences that the user must know

    def plan(
        self,
        placement: Placement,
        settings: LoraSettings,
        in_file: Mapping[str, Any] = MappingProxyType({}),
        where: Callable[[str], str] = str,
    ) -> Plan:
        """The keys for a placement, merged into a file of the keys `in_file`, whose rank decides about alpha; `where` says where a key is.

        Raises:
            ExportError: The trainer cannot express it, or the file's rank is not known and alpha depends on it.
        """
        keys = {setting: key for key, setting in self.defaults.items() if isinstance(setting, Setting)}
        rank = lookup(in_file, keys[RANK])
        if settings.rank is None and rank not in (ABSENT, None) and _whole(rank) is None:
            scale = keys.get(ALPHA) or keys[SCALE]
            if (SCALE in keys and settings.alpha is not None) or (settings.alpha is None and lookup(in_file, scale) in (ABSENT, None)):
                problem = f"{keys[RANK]}: {shown(rank)}, which is not a whole number above 0, and {scale} depends on it"
                raise ExportError(f"{where(keys[RANK])} has {problem}; write the number, or {scale} too")
        values = settings.values(_whole(rank) or 8)
        if placement.rank_pattern and not self.has_ranks:
            remedy = "export without --merge for Python, which has one for each" if self.script else "select without --allocate-ranks"
            raise ExportError(f"{self.title} has one rank for all adapters, but the placement has a rank for each; {remedy}")
        if placement.parameters and self.no_experts:
            raise ExportError(
                f"{self.title} {self.no_experts}, but the placement adapts {placement.parameters[0]}; select without the stacked experts"
            )
        alphas = [*placement.alpha_pattern.values()] if placement.rank_pattern else [values[ALPHA]]
        fraction = next((alpha for alpha in alphas if self.whole_alpha and alpha != int(alpha)), None)
        if fraction is not None:
            raise ExportError(f"{self.title} reads alpha as a whole number, found {fraction:g}; give a whole --alpha to select or export")
        # A number that the user gave must stand in the file; the others are the file's to say.
        numbers = {RANK: settings.rank, ALPHA: settings.alpha, SCALE: settings.alpha, DROPOUT: settings.dropout}
        given = [setting for setting, number in numbers.items() if number is not None]
        required = self.choose(placement)
        required |= {key: values[setting] for setting in given for key, value in self.defaults.items() if value is setting}
        defaults = {key: values[value] if isinstance(value, Setting) else value for key, value in self.defaults.items()}
        rate = settings.rate_for(placement)
        if self.rate_key and rate is not None:
            (defaults if settings.learning_rate is None else required)[self.rate_key] = rate
        others: dict[str, tuple[Any, ...]] = {key: ([], {}, "") for key in self.choosing if key not in required}
        return Plan(
            required,
            {key: value for key, value in defaults.items() if key not in required},
            self.allowed | (self.allowed_with_experts if placement.parameters else {}) | others,
        )


def _whole(value: Any) -> int | None:
    """A rank as a file has it, in quotes or as 64.0, too; `None` where it is not a whole number above 0."""
    match = re.fullmatch(r"0*([1-9]\d{0,8})(?:\.0*)?", str(value))
    return int(match[1]) if match else None


class Blocks(NamedTuple):
    """A placement's module paths cut at the list of blocks: its path (`model.layers`), and names below the block for each layer."""

    prefix: str
    names: dict[int, tuple[str, ...]]

    @property
    def text_only(self) -> bool:
        """Whether the list lies where causal language models without other towers have it: `model.layers`, `transformer.h`."""
        return self.prefix.count(".") == 1


def split(placement: Placement) -> Blocks | None:
    """The placement's module paths cut at the list of blocks; `None` where there is no one list.

    >>> paths = ("model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj")
    >>> split(Placement(model={"layers": 3}, layers=(0, 2), paths=paths, objective="given"))
    Blocks(prefix='model.layers', names={0: ('mlp.up_proj',), 2: ('mlp.up_proj',)})
    """
    for cut in re.finditer(r"\.\d+\.", placement.paths[0] if placement.paths else ""):
        prefix = placement.paths[0][: cut.start()]
        matches = [re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", path) for path in placement.paths]
        names: dict[int, tuple[str, ...]] = {}
        for layer, name in sorted(((int(match[1]), match[2]) for match in matches if match), key=lambda pair: pair[0]):
            names[layer] = (*names.get(layer, ()), name)
        if all(matches) and names.keys() <= set(placement.layers):
            return Blocks(prefix, names)
    return None


def by_layer(placement: Placement) -> tuple[str, tuple[str, ...]] | None:
    """Name of the list of blocks and names of the modules, where these and layer indices say the same as full paths do; else `None`.

    They do not where there are stacked experts (PEFT ignores layer indices for them), ranks of single modules, other towers, numbers
    below the block, or layers with different modules.
    """
    blocks = split(placement)
    if blocks is None or not blocks.text_only or re.search(r"\d", blocks.prefix) or placement.parameters or placement.rank_pattern:
        return None
    names, *others = blocks.names.values()
    if any(set(each) != set(names) for each in others) or any(re.search(r"\.\d+\.", f".{name}.") for name in names):
        return None
    return blocks.prefix.rpartition(".")[2], names


def _axolotl(placement: Placement) -> dict[str, Any]:
    """Layers and names where that is safe. PEFT wants a dot before `layers_pattern`: `model.layers` matches nothing, `layers` does."""
    layered = by_layer(placement)
    if layered is None:
        return {f"lora_{name}": value for name, value in full_paths(placement).items()}
    return {
        "peft_layers_to_transform": list(placement.layers),
        "peft_layers_pattern": [layered[0]],
        "lora_target_modules": list(layered[1]),
    }


def _trl(placement: Placement) -> dict[str, Any]:
    """Full paths. A single one would become a regular expression, which PEFT may widen, so it is written twice."""
    paths = list(placement.paths) * (2 if len(placement.paths) == 1 else 1)
    parameters = {"lora_target_parameters": list(placement.parameters)} if placement.parameters else {}
    return {"use_peft": True, "lora_target_modules": paths, **parameters}


_UNSLOTH_NAMES = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
}  # fmt: skip


def _unsloth(placement: Placement) -> dict[str, Any]:
    """Layers and names where unsloth has names for the modules. With `target_parameters=None` it would add stacked experts by itself."""
    layered = by_layer(placement)
    if layered is None or not _UNSLOTH_NAMES.issuperset(layered[1]):
        return {"target_modules": list(placement.paths), "target_parameters": list(placement.parameters), **patterns(placement)}
    return {
        "target_modules": [name.rpartition(".")[2] for name in layered[1]],
        "layers_to_transform": list(placement.layers),
        "layers_pattern": layered[0],
        "target_parameters": [],
    }


def _swift(placement: Placement) -> dict[str, Any]:
    """Full paths. `target_regex` would be shorter, but PEFT from 0.19 on replaces an expression by the last names of what it matches
    wherever a model has stacked experts, and so adapts all layers. Without any names ms-swift adapts all linear maps, so that experts
    alone need an expression that matches no path.
    """
    modules: dict[str, Any] = {"target_modules": list(placement.paths)} if placement.paths else {"target_regex": "(?!)"}
    return modules | ({"target_parameters": list(placement.parameters)} if placement.parameters else {})


_LLAMA = _UNSLOTH_NAMES | {"self_attn.qkv_proj", "mlp.gate_up_proj"}
_MLX_NAMES = {
    "model.layers": _LLAMA,
    "model.language_model.layers": _LLAMA,
    "transformer.h": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "gpt_neox.layers": {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}
"""For each place of the blocks the names in a block that were read in mlx-lm."""


def _mlx(placement: Placement) -> dict[str, Any]:
    """Full paths as mlx-lm's classes have them, with all layers open to them. Keys that match nothing are passed over in silence, so
    names that were not read there are refused.
    """
    blocks = split(placement)
    names = _MLX_NAMES.get(blocks.prefix if blocks else "", set[str]())
    strange = next((path for path in placement.paths if not any(path.endswith(f".{name}") for name in names)), None)
    if blocks is None or strange is not None:
        raise ExportError(
            f"what mlx-lm calls {strange or placement.targets[0]} is not known here, and it passes over keys that match nothing; "
            "train with another trainer"
        )
    keys = [f"{MLX_BLOCKS[blocks.prefix]}.{layer}.{name}" for layer, below in blocks.names.items() for name in below]
    return {"num_layers": -1, "lora_parameters.keys": keys}


_MEGATRON_BLOCKS = {"model.layers": "*decoder.layers", "model.language_model.layers": "*language_model.decoder.layers"}
"""Where transformers has the blocks, and where Megatron has them, whatever wraps the model."""
_MEGATRON_MODULES: dict[str, tuple[set[str], ...]] = {
    "self_attention.linear_qkv": ({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"self_attn.qkv_proj"}),
    "self_attention.linear_proj": ({"self_attn.o_proj"},),
    "mlp.linear_fc1": ({"mlp.gate_proj", "mlp.up_proj"}, {"mlp.gate_up_proj"}),
    "mlp.linear_fc2": ({"mlp.down_proj"},),
}
"""Megatron's modules, and what each of them holds of transformers'; `CanonicalLoRA`, which splits them, fails on only some of the parts."""


def _megatron(placement: Placement) -> dict[str, Any]:
    """A pattern for every module of every layer. `*` is any text and a dot any character, so that the documented form
    `*.layers.1.*.linear_qkv` matches layers 10 to 19 too; hence no wildcard but the one for what wraps the model.
    """
    blocks = split(placement)
    if blocks is None or blocks.prefix not in _MEGATRON_BLOCKS:
        raise ExportError(
            f"what Megatron-Bridge calls {placement.targets[0]} is not known here: it has decoders like Llama's only; "
            "train with another trainer"
        )
    targets = []
    for layer, names in blocks.names.items():
        left = set(names)
        for fused, forms in _MEGATRON_MODULES.items():
            parts = next((form for form in forms if form <= left), None)
            if parts is not None:
                targets.append(f"{_MEGATRON_BLOCKS[blocks.prefix]}.{layer}.{fused}")
                left -= parts
        if left:
            strange = f"{blocks.prefix}.{layer}.{min(left)}"
            fusing = next((fused for fused, forms in _MEGATRON_MODULES.items() if any(min(left) in form for form in forms)), None)
            raise ExportError(
                f"Megatron-Bridge holds {strange} in {fusing} with others, which the placement does not adapt; select whole layers"
                if fusing
                else f"what Megatron-Bridge calls {strange} is not known here; train with another trainer"
            )
    return {"peft._target_": "megatron.bridge.peft.lora.LoRA", "peft.target_modules": targets}


_YAML_OR_JSON = (".yaml", ".yml", ".json")
_TRL_SCRIPT = """# {heading}
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

peft_config = LoraConfig(
{arguments}
)
trainer = SFTTrainer(
    model={model},
    args=SFTConfig(output_dir="adapter"{rate}),
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
    peft_config=peft_config,
)
trainer.train()
trainer.save_model()
"""
_UNSLOTH_SCRIPT = """# {heading}
from unsloth import {model_class}

model, tokenizer = {model_class}.from_pretrained({model})
model = {model_class}.get_peft_model(
    model,
{arguments}
)
"""

_ALL = (
    # `LoraConfig(**json.load(file))` reads it: tuners/lora/config.py, tuners/tuners_utils.py (`check_target_module_exists`).
    Trainer(
        "peft", "PEFT", "0.21.2", full_paths,
        defaults={"task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT, "bias": "none", "peft_type": "LORA"},
        allowed={"peft_type": ("LORA",), "bias": ("none", "lora_only"), "layer_replication": ([],)},
        choosing=CHOSEN, suffixes=(".json",), has_ranks=True,
    ),
    # trainer/model_config.py, trainer/utils.py (`get_peft_config`). The command line has no key for layers.
    Trainer(
        "trl", "TRL's command line", "1.16.0", _trl,
        defaults={"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT},
        choosing=("lora_target_parameters",), script=_TRL_SCRIPT, whole_alpha=True, rate_key="learning_rate",
    ),
    # utils/schemas/peft.py, utils/schemas/validation.py (`check_peft_layers_pattern`, `check_frozen`), loaders/adapter.py
    # (`_build_peft_lora_config` hands the keys to PEFT 0.20).
    Trainer(
        "axolotl", "axolotl", "0.19.0", _axolotl,
        defaults={"adapter": "lora", "lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT},
        allowed={
            "adapter": ("lora", "qlora"), "lora_target_linear": (False,), "lora_exclude_modules": ([],), "lora_model_dir": ("",),
            "peft_layer_replication": ([],), "unfrozen_parameters": ([],),
        },
        choosing=("peft_layers_to_transform", "peft_layers_pattern", "lora_target_parameters", "lora_rank_pattern", "lora_alpha_pattern"),
        has_ranks=True, whole_alpha=True, rate_key="learning_rate",
    ),
    # hparams/finetuning_args.py (`lora_target` is one string, split at commas), model/adapter.py (`use_llama_pro` replaces the list),
    # model/model_utils/visual.py (in vision-language models a target also chooses every module whose path contains it).
    Trainer(
        "llamafactory", "LLaMA-Factory", "0.9.5", lambda placement: {"lora_target": ",".join(placement.paths)},
        defaults={"finetuning_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT},
        allowed={"finetuning_type": ("lora",), "use_llama_pro": (False,), "adapter_name_or_path": ("",)},
        suffixes=_YAML_OR_JSON, no_experts="adapts modules only", whole_alpha=True, rate_key="learning_rate",
    ),
    # models/llama.py and models/vision.py (`get_peft_model`: names, or full paths as a list; further arguments go to `LoraConfig`).
    Trainer(
        "unsloth", "unsloth", "2026.10.9", _unsloth,
        defaults={"r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT},
        suffixes=(), script=_UNSLOTH_SCRIPT, has_ranks=True,
    ),
    # arguments/tuner_args.py (`target_regex` takes the place of `target_modules`), pipelines/train/tuner.py (`prepare_adapter`),
    # cli/main.py (a file as first argument); PEFT: utils/transformers_weight_conversion.py (`_resolve_string_target_modules`).
    Trainer(
        "ms-swift", "ms-swift", "4.6.0", _swift,
        defaults={"tuner_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT},
        allowed={
            "tuner_type": ("lora",), "use_swift_lora": (False,), "tuner_backend": ("peft", "unsloth"), "resume_from_checkpoint": ("",),
            "adapters": ([],),
        },
        allowed_with_experts={"tuner_backend": ("peft",)},
        choosing=("target_modules", "target_regex", "target_parameters"), suffixes=_YAML_OR_JSON, rate_key="learning_rate",
    ),
    # tuner/utils.py (`linear_to_lora_layers`: of the last `num_layers` blocks, all for -1, modules whose name below the block is in
    # `keys`, and modules of the whole model whose path is), tuner/lora.py (`scale` multiplies B A directly), models/ for the paths.
    Trainer(
        "mlx-lm", "mlx-lm", "0.32.2", _mlx,
        defaults={
            "fine_tune_type": "lora", "lora_parameters.rank": RANK, "lora_parameters.dropout": DROPOUT, "lora_parameters.scale": SCALE
        },
        allowed={"fine_tune_type": ("lora", "dora"), "adapter_file": ("",), "resume_adapter_file": ("",)},
        no_experts="keeps each map of the experts under a name of its own (switch_mlp)", rate_key="learning_rate",
        notes=("mlx-lm prints the share of trainable parameters as it starts: 0 % means that its paths are others",),
    ),
    # The `peft` section of `ConfigContainer`: peft/lora.py, peft/module_matcher.py, peft/utils.py (`wildcard_match`),
    # training/utils/config_utils.py (`_target_`). Blocks are counted from 0, on every pipeline stage anew.
    Trainer(
        "megatron-bridge", "Megatron-Bridge", "0.3.1", _megatron,
        defaults={"peft.dim": RANK, "peft.alpha": ALPHA, "peft.dropout": DROPOUT},
        allowed={
            "peft.exclude_modules": ([],), "peft.canonical_mapping": ({},), "model.pipeline_model_parallel_size": (1,),
            "checkpoint.pretrained_adapter": ("",),
        },
        no_experts="names experts by how it groups them", whole_alpha=True, rate_key="optimizer.lr",
        notes=("every pipeline stage counts its layers from 0, so these patterns hold for pipeline_model_parallel_size 1 only",),
    ),
)  # fmt: skip
TRAINERS = {trainer.name: trainer for trainer in _ALL}
REFUSED = {
    "torchtune": "torchtune's recipes put adapters on the same maps of every layer (lora_attn_modules, apply_lora_to_mlp) and have no key "
    "for layers; export to another trainer",
}


def trainer_named(name: str) -> Trainer:
    """The trainer of that name.

    Raises:
        ExportError: It cannot express a placement, or is unknown.
    """
    if name in REFUSED:
        raise ExportError(REFUSED[name])
    if name not in TRAINERS:
        close = difflib.get_close_matches(name.lower(), TRAINERS, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ExportError(f"{name!r} is not a trainer that placements are written for; {hint}known are {', '.join(TRAINERS)}")
    return TRAINERS[name]
