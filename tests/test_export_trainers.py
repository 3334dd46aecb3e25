"""Exports read by the trainers' own code, where it is installed: `pip install --no-deps axolotl llamafactory mlx-lm mlx[cpu]`.

None of them is needed for development, and their pinned versions exclude each other, so each test skips where its trainer is missing.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from peft import get_peft_model

from layercard.export.export import exported
from layercard.export.trainers import TRAINERS, LoraSettings
from layercard.models.adapted import adapted_paths, quiet_peft
from layercard.models.layers import find_blocks
from layercard.selection.placement import Placement
from tiny import build_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def placed(family: str, layers: tuple[int, ...]) -> tuple[Any, Placement]:
    """A tiny model of 12 layers, and all maps of some of them."""
    model = build_tiny(family, **({"n_layer": 12} if family == "gpt2" else {"num_hidden_layers": 12}))
    blocks = find_blocks(model)
    paths = tuple(each.path for layer in layers for each in blocks[layer].linear_modules)
    return model, Placement(model={"name": "tiny", "layers": 12}, layers=layers, paths=paths, objective="given")


def values(placement: Placement, trainer: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(exported(placement, TRAINERS[trainer], LoraSettings()).text)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_axolotl(family: str) -> None:
    adapter = pytest.importorskip("axolotl.loaders.adapter", exc_type=ImportError)
    schema = pytest.importorskip("axolotl.utils.schemas.peft", exc_type=ImportError)
    dictionary = pytest.importorskip("axolotl.utils.dict", exc_type=ImportError)
    model, plan = placed(family, (1, 11))
    checked = schema.LoraConfig(**values(plan, "axolotl")).model_dump()
    config = adapter._build_peft_lora_config(model, dictionary.DictDefault(checked))
    with quiet_peft():
        assert set(adapted_paths(get_peft_model(model, config))) == set(plan.paths)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_llamafactory(family: str) -> None:
    adapter = pytest.importorskip("llamafactory.model.adapter", exc_type=ImportError)
    arguments = pytest.importorskip("llamafactory.hparams.finetuning_args", exc_type=ImportError)
    model, plan = placed(family, (1, 11))
    asked = arguments.FinetuningArguments(**values(plan, "llamafactory"))
    settings = SimpleNamespace(adapter_name_or_path=None, use_unsloth=False, use_kt=False, resize_vocab=False, quantization_bit=None)
    wrapped = adapter.init_adapter(model.config, model, settings, asked, is_trainable=True)
    assert set(adapted_paths(wrapped)) == set(plan.paths)


def test_swift_reads_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swift = pytest.importorskip("swift.cli.main", exc_type=ImportError)
    _, plan = placed("llama", (1, 11))
    file = tmp_path / "sft.yaml"
    file.write_text(exported(plan, TRAINERS["ms-swift"], LoraSettings()).text, encoding="utf-8")
    arguments = [str(file)]
    monkeypatch.setenv("SWIFT_CONFIG_FILE", "")
    swift.parse_yaml_args(arguments)
    at = arguments.index("--target_modules")
    assert arguments[at + 1 : at + 1 + len(plan.paths)] == list(plan.paths)


MLX = {
    "llama": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 12, "intermediate_size": 48, "num_attention_heads": 4,
              "rms_norm_eps": 1e-5, "vocab_size": 64},
    "phi3": {"model_type": "phi3", "hidden_size": 32, "num_hidden_layers": 12, "intermediate_size": 48, "num_attention_heads": 4,
             "rms_norm_eps": 1e-5, "vocab_size": 64, "num_key_value_heads": 4},
    "gpt2": {"model_type": "gpt2", "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 12, "n_positions": 64, "layer_norm_epsilon": 1e-5,
             "vocab_size": 64},
    "gpt_neox": {"model_type": "gpt_neox", "max_position_embeddings": 64, "hidden_size": 32, "num_attention_heads": 4,
                 "num_hidden_layers": 12, "layer_norm_eps": 1e-5, "vocab_size": 64, "rotary_emb_base": 10000, "rotary_pct": 0.25},
}  # fmt: skip
PREFIX = {"gpt2": ("transformer.h", "model.h"), "gpt_neox": ("gpt_neox.layers", "model.h")}


@pytest.mark.parametrize("family", MLX)
def test_mlx(family: str) -> None:
    utils = pytest.importorskip("mlx_lm.tuner.utils", exc_type=ImportError)
    pytest.importorskip(f"mlx_lm.models.{family}", exc_type=ImportError)
    lora = sys.modules["mlx_lm.tuner.lora"]
    classes = sys.modules[f"mlx_lm.models.{family}"]
    model = classes.Model(classes.ModelArgs.from_dict(MLX[family]))
    _, plan = placed(family, (1, 11))
    asked = values(plan, "mlx-lm")
    utils.linear_to_lora_layers(model, asked["num_layers"], asked["lora_parameters"])
    found = {name for name, module in model.named_modules() if isinstance(module, lora.LoRALinear)}
    here, there = PREFIX.get(family, ("model.layers", "model.layers"))
    assert found == {path.replace(here, there) for path in plan.paths}
    assert {module.scale for _, module in model.named_modules() if isinstance(module, lora.LoRALinear)} == {2.0}
