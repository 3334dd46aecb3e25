"""Exports read back as each trainer reads them, on tiny models: exactly the planned targets are adapted.

`layercard.export.read` has the rules of the trainers from their sources; PEFT's and TRL's own code run here, and
`tests/test_export_trainers.py` runs that of the others where it is installed.
"""

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from exports import CASES, placed, ranked
from layercard.adapters.apply import adapted_ranks
from layercard.adapters.lora_config import lora_config
from layercard.commands import main as cli
from layercard.errors import ExportError, PlacementError
from layercard.export import read
from layercard.export.export import exported
from layercard.export.trainers import TRAINERS, LoraSettings
from layercard.models.adapted import adapted_paths, quiet_peft
from layercard.models.layers import find_blocks
from layercard.selection.placement import Placement
from tiny import HEADS, INNER, VOCAB, WIDTH, build_tiny

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 1,
}


def experts() -> PreTrainedModel:
    """A mixture of experts whose first block has none."""
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0]))


def vision() -> PreTrainedModel:
    """A vision-language model whose tower has layers 0 to 3 with maps of the same names."""
    tower = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=SIZES, vision_config=tower, mm_tokens_per_image=4, image_token_id=120, boi_token_id=121, eoi_token_id=122)
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: build_tiny("llama", num_hidden_layers=12),
    "gpt2": lambda: build_tiny("gpt2"),
    "phi3": lambda: build_tiny("phi3"),
    "opt": lambda: build_tiny("opt"),
    "experts": experts,
    "vision": vision,
}
LAYERS = {"llama": (1, 11), "experts": (0, 2)}


def planned(model: PreTrainedModel, layers: tuple[int, ...]) -> Placement:
    """All maps of some layers, stacked experts included."""
    blocks = find_blocks(model)
    paths = tuple(each.path for layer in layers for each in blocks[layer].linear_modules)
    stacks = tuple(each.path for layer in layers for each in blocks[layer].stacks)
    return Placement(model={"name": "tiny", "layers": len(blocks)}, layers=layers, paths=paths, objective="given", parameters=stacks)


def adapted(model: PreTrainedModel, config: LoraConfig) -> set[str]:
    """What PEFT adapts; the model is as before afterwards."""
    with quiet_peft():
        wrapped = get_peft_model(model, config)
    found = set(adapted_paths(wrapped))
    wrapped.unload()
    return found


def by_reader(trainer: str) -> Callable[[str, PreTrainedModel], LoraConfig]:
    """As `layercard verify` reads it, by rules written from the trainer's sources apart from those for writing."""
    return lambda text, model: read.config_of(yaml.safe_load(text), model, trainer)


def by_trl(text: str, model: PreTrainedModel) -> LoraConfig:
    """TRL's own parser of its YAML."""
    trl = pytest.importorskip("trl")
    folder = Path(model.export_folder)
    file = folder / "sft.yaml"
    file.write_text(text, encoding="utf-8")
    (arguments,) = trl.TrlParser(trl.ModelConfig).parse_args_and_config(["--config", str(file)])
    return trl.get_peft_config(arguments)


def by_peft(text: str, model: PreTrainedModel) -> LoraConfig:
    """As the text itself says."""
    return LoraConfig(**json.loads(text))


def by_unsloth(text: str, model: PreTrainedModel) -> LoraConfig:
    """`models/llama.py`, `get_peft_model`: lists go on to `LoraConfig`; experts are added only where `target_parameters` is `None`."""
    caught: dict[str, Any] = {}

    class Fast:
        @staticmethod
        def from_pretrained(name: str) -> tuple[PreTrainedModel, None]:
            return model, None

        @staticmethod
        def get_peft_model(model: PreTrainedModel, **arguments: Any) -> PreTrainedModel:
            caught.update(arguments)
            return model

    fake = types.ModuleType("unsloth")
    vars(fake).update(FastLanguageModel=Fast, FastModel=Fast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "unsloth", fake)
        exec(text, {})
    assert isinstance(caught["target_parameters"], list)
    return LoraConfig(**caught)


READERS = {
    "axolotl": by_reader("axolotl"),
    "llamafactory": by_reader("llamafactory"),
    "ms-swift": by_reader("ms-swift"),
    "trl": by_trl,
    "peft": by_peft,
    "unsloth": by_unsloth,
}
SUFFIX = {"trl": ".yaml"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    found = {name: make() for name, make in MODELS.items()}
    for model in found.values():
        model.export_folder = str(tmp_path_factory.mktemp("trl"))
    return found


@pytest.mark.parametrize("trainer", READERS)
@pytest.mark.parametrize("family", MODELS)
def test_exactly_the_planned_targets_are_adapted(family: str, trainer: str, models: dict[str, PreTrainedModel]) -> None:
    model = models[family]
    plan = planned(model, LAYERS.get(family, (1,)))
    if family == "experts" and trainer == "llamafactory":
        with pytest.raises(ExportError, match="adapts modules only"):
            exported(plan, TRAINERS[trainer], LoraSettings())
        plan = Placement(model=plan.model, layers=plan.layers, paths=plan.paths, objective="given")
    done = exported(plan, TRAINERS[trainer], LoraSettings(), suffix=SUFFIX.get(trainer, ""))
    assert adapted(model, READERS[trainer](done.text, model)) == set(plan.targets)
    if trainer in read.MARKS:  # known by its keys
        assert adapted(model, read.config_of(done.keys, model)) == set(plan.targets)


@pytest.mark.filterwarnings(r"ignore:target_modules=\(\?!\) were set but no module was matched:RuntimeWarning")
@pytest.mark.parametrize("trainer", READERS)
@pytest.mark.parametrize("what", ["attention", "one", "stacks"])
def test_parts_of_blocks_with_experts(what: str, trainer: str, models: dict[str, PreTrainedModel]) -> None:
    model = models["experts"]
    whole = planned(model, (1, 2))
    plan = {
        "attention": Placement(model=whole.model, layers=(1, 2), paths=whole.paths, objective="given"),
        "one": Placement(model=whole.model, layers=(1,), paths=whole.paths[:1], objective="given"),
        "stacks": Placement(model=whole.model, layers=(1, 2), paths=(), objective="given", parameters=whole.parameters),
    }[what]
    if what == "stacks" and trainer == "llamafactory":
        return
    text = exported(plan, TRAINERS[trainer], LoraSettings(), suffix=SUFFIX.get(trainer, "")).text
    assert adapted(model, READERS[trainer](text, model)) == set(plan.targets)


def test_peft_widens_expressions_where_there_are_experts(models: dict[str, PreTrainedModel]) -> None:
    """Why ms-swift gets a list and not `target_regex`, and TRL's command line never a single name."""
    expression = r"^model\.layers\.1\.self_attn\.q_proj$"
    found = {family: adapted(models[family], LoraConfig(target_modules=expression)) for family in ("llama", "experts")}
    assert found["llama"] == {"model.layers.1.self_attn.q_proj"}
    assert found["experts"] == {f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)}


def test_trl_in_python(models: dict[str, PreTrainedModel]) -> None:
    for family, model in models.items():
        plan = planned(model, LAYERS.get(family, (1,)))
        text = exported(plan, TRAINERS["trl"], LoraSettings()).text
        names: dict[str, Any] = {}
        exec(text.partition("trainer = ")[0].replace("from datasets import load_dataset\n", "").replace("from trl", "# from trl"), names)
        assert adapted(model, names["peft_config"]) == set(plan.targets)


@pytest.mark.parametrize("trainer", ["axolotl", "peft", "unsloth"])
def test_ranks_are_taken_over(trainer: str, models: dict[str, PreTrainedModel]) -> None:
    model = models["llama"]
    plan = ranked(planned(model, (1, 11)))
    text = exported(plan, TRAINERS[trainer], LoraSettings()).text
    with quiet_peft():
        wrapped = get_peft_model(model, READERS[trainer](text, model))
    assert adapted_ranks(wrapped) == {path: (rank, plan.alpha_pattern[path] / rank) for path, rank in plan.rank_pattern.items()}
    wrapped.unload()


NAMES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
)  # fmt: skip


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any modules in any layers of a Llama of 12, most often the same ones in each layer."""
    layers = tuple(sorted(draw(st.sets(st.integers(0, 11), min_size=1, max_size=5))))
    some = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)
    same = draw(st.one_of(some, st.none()))
    paths = tuple(f"model.layers.{layer}.{name}" for layer in layers for name in (same or draw(some)))
    return Placement(model={"name": "tiny", "layers": 12}, layers=layers, paths=paths, objective="given")


@settings(max_examples=60, deadline=None)
@given(placements())
def test_any_placement_comes_back(plan: Placement) -> None:
    model = _llama()
    names = [name for name, _ in model.named_modules() if name]
    for trainer in ("axolotl", "llamafactory", "ms-swift", "peft", "unsloth"):
        config = READERS[trainer](exported(plan, TRAINERS[trainer], LoraSettings()).text, model)
        assert {name for name in names if check_target_module_exists(config, name)} == set(plan.paths), trainer
    assert set(TRAINERS["mlx-lm"].choose(plan)["lora_parameters.keys"]) == set(plan.paths)


def _llama() -> PreTrainedModel:
    if not _KEPT:
        _KEPT.append(build_tiny("llama", num_hidden_layers=12))
    return _KEPT[0]


_KEPT: list[PreTrainedModel] = []


# Trainers with classes of their own


@pytest.mark.parametrize(("case", "blocks"), [("dense", "model.layers"), ("vision", "language_model.model.layers"), ("gpt2", "model.h")])
def test_mlx_adapts_what_is_planned(case: str, blocks: str) -> None:
    """`tuner/utils.py`, `linear_to_lora_layers`: names below the last `num_layers` blocks, then paths in the model."""
    plan = CASES[case]
    cfg = yaml.safe_load(exported(plan, TRAINERS["mlx-lm"], LoraSettings()).text)
    keys = set(cfg["lora_parameters"]["keys"])
    below = [f"{block}.{name}" for block in ("self_attn", "mlp", "attn") for name in ("q_proj", "v_proj", "c_attn", "c_proj", "down_proj")]
    layers = list(range(30))[-max(cfg["num_layers"], 0) :]
    assert len(layers) == 30
    assert not keys & set(below)
    assert keys == {re.sub(r"^.*?\.(\d+)\.", rf"{blocks}.\1.", path) for path in plan.paths}


def wildcard(pattern: str, name: str) -> bool:
    """Megatron-Bridge, `peft/utils.py`, `wildcard_match`."""
    return re.match("^" + pattern.replace("*", "(.*)") + "$", name) is not None


@pytest.mark.parametrize("prefix", ["", "module.module."])
def test_megatron_adapts_what_is_planned(prefix: str) -> None:
    maps = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    for case, blocks in (("dense", "decoder.layers"), ("vision", "language_model.decoder.layers")):
        cfg = yaml.safe_load(exported(CASES[case], TRAINERS["megatron-bridge"], LoraSettings()).text)["peft"]
        towers = ["mtp.layers"] if case == "dense" else ["mtp.layers", "vision_model.decoder.layers"]
        modules = [f"{prefix}{place}.{layer}.{name}" for place in (blocks, *towers) for layer in range(30) for name in maps]
        found = {name for name in modules if any(wildcard(pattern, name) for pattern in cfg["target_modules"])}
        assert found == {f"{prefix}{blocks}.{layer}.{name}" for layer in (3, 11) for name in maps}


def test_the_documented_pattern_of_megatron_takes_more_layers() -> None:
    assert wildcard("*.layers.1.*.linear_qkv", "decoder.layers.11.self_attention.linear_qkv")
    assert not wildcard("*decoder.layers.1.self_attention.linear_qkv", "decoder.layers.11.self_attention.linear_qkv")


# Read back on a model, by the command


@pytest.fixture(scope="module")
def folder(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vision")
    models["vision"].config.architectures = ["Gemma3ForConditionalGeneration"]
    models["vision"].config.save_pretrained(path)
    return path


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_command_reads_back(
    trainer: str, folder: Path, models: dict[str, PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = planned(models["vision"], (1, 2)).save(tmp_path / "placement.json")
    assert cli.run(["export", str(path), "--to", trainer, "--model", str(folder / "config.json")]) == 0
    said = capsys.readouterr().err
    assert ("cannot be checked" if trainer in ("mlx-lm", "megatron-bridge") else "exactly the 14 planned targets") in said


def test_the_command_refuses_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = placed((1,), NAMES).save(tmp_path / "placement.json")
    for trainer in ("axolotl", "mlx-lm"):
        assert cli.run(["export", str(path), "--to", trainer, "--model", str(folder / "config.json")]) == 2
        found = capsys.readouterr()
        assert (found.out, found.err.count("\n")) == ("", 1)


def test_configurations_made_elsewhere(models: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    model = models["llama"]
    every = {path for block in find_blocks(model) for path in (each.path for each in block.linear_modules)}
    file = tmp_path / "config.yaml"
    for text, planned_paths in (
        ("base_model: m\nadapter: qlora\nlora_target_linear: true\n", every),
        ("finetuning_type: lora\nlora_target: all\n", every),
        ("tuner_type: lora\ntarget_modules: [all-linear]\n", every),
        ("lora_target: q_proj\n", {path for path in every if path.endswith("q_proj")}),
        ("use_peft: true\nlora_target_modules: ['.*layers.2.*q_proj']\n", {"model.layers.2.self_attn.q_proj"}),
    ):
        file.write_text(text, encoding="utf-8")
        assert adapted(model, read.peft_config(file, model)) == planned_paths
    for text, words in (("adapter:\nbase_model: m\n", "without LoRA"), ("a: 1\n", "has no key of")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ExportError, match=words):
            read.peft_config(file, model)
    text_names = read.config_of({"lora_target": "q_proj"}, models["vision"]).target_modules
    assert text_names == {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(3)}


def test_lora_config(models: dict[str, PreTrainedModel]) -> None:
    plan = planned(models["experts"], (0, 2))
    assert adapted(models["experts"], lora_config(plan, r=4)) == set(plan.targets)
    config = lora_config(plan, r=16, use_rslora=True)
    assert (config.r, config.lora_alpha, config.use_rslora) == (16, 32, True)
    with pytest.raises(PlacementError, match="layers_to_transform is given beside a placement"):
        lora_config(plan, layers_to_transform=[1])
    with pytest.raises(PlacementError, match="no dropout"):
        lora_config(plan, lora_dropout=0.1)
    with pytest.raises(PlacementError, match="refuses these options"):
        lora_config(plan, unknown=1)
