"""Exports as text: golden files, merging that touches nothing else, contradictions, refusals, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from exports import CASES, GOLDEN, REFUSED, golden, placed, ranked
from layercard.commands import main as cli
from layercard.errors import ExportError, PlacementError
from layercard.export.config_text import edited
from layercard.export.export import exported, merged
from layercard.export.trainers import TRAINERS, LoraSettings, trainer_named
from layercard.files import write_json
from layercard.selection.placement import Placement

AXOLOTL = """\
# how we train
base_model: "org/model"   # the base
datasets:
    - path: data.jsonl    # four blanks
      type: 'alpaca'

adapter: lora
lora_r: 16  # larger than usual
lora_alpha: 32
lora_target_modules:
  # attention only
  - q_proj
  - v_proj

learning_rate: 2e-4
# the end
"""
DENSE = CASES["dense"]


def test_golden_files() -> None:
    made = dict(golden())
    assert {path.name for path in made} == {path.name for path in GOLDEN.iterdir()}, "write them with python tests/exports.py"
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, path.name


@pytest.mark.parametrize(("trainer", "case"), [(trainer, case) for trainer, cases in REFUSED.items() for case in cases])
def test_what_a_trainer_cannot_express_is_refused(trainer: str, case: str) -> None:
    with pytest.raises(ExportError, match=r"; (select|train|export)"):
        exported(CASES[case], TRAINERS[trainer], LoraSettings())


def test_merging_touches_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(AXOLOTL, encoding="utf-8")
    done = exported(DENSE, TRAINERS["axolotl"], LoraSettings(), merge=path, force=True)
    lines = done.text.splitlines()
    kept = [line for line in AXOLOTL.splitlines() if line.strip() not in ("# attention only", "- q_proj", "- v_proj")]
    assert [line for line in lines if line in kept] == kept
    values = yaml.safe_load(done.text)
    assert values["lora_target_modules"] == list(dict.fromkeys(path.split(".", 3)[3] for path in DENSE.paths))
    assert values["peft_layers_to_transform"] == [3, 11]
    assert (values["lora_r"], values["lora_alpha"]) == (16, 32)  # the file's own
    assert values["datasets"] == [{"path": "data.jsonl", "type": "alpaca"}]
    assert done.notes == ("replaced lora_target_modules: ['q_proj', 'v_proj']",)
    again = merged(done.text, "config.yml", TRAINERS["axolotl"], TRAINERS["axolotl"].plan(DENSE, LoraSettings()))
    assert again.text == done.text
    assert again.notes == ()


@pytest.mark.parametrize(
    ("trainer", "text", "key"),
    [
        ("axolotl", "adapter: lora\nlora_target_linear: true\n", "lora_target_linear"),
        ("axolotl", "peft_layers_to_transform: [0, 1]\n", "peft_layers_to_transform"),
        ("axolotl", "peft_layers_pattern: blocks\n", "peft_layers_pattern"),
        ("axolotl", "lora_target_parameters: [mlp.experts.down_proj]\n", "lora_target_parameters"),
        ("axolotl", "lora_rank_pattern: {q_proj: 4}\n", "lora_rank_pattern"),
        ("axolotl", "unfrozen_parameters: [lm_head]\n", "unfrozen_parameters"),
        ("axolotl", "lora_model_dir: adapter\n", "lora_model_dir"),
        ("axolotl", "adapter: llama-adapter\n", "adapter"),
        ("llamafactory", "lora_target: all\n", "lora_target"),
        ("llamafactory", "finetuning_type: full\n", "finetuning_type"),
        ("llamafactory", "use_llama_pro: true\n", "use_llama_pro"),
        ("ms-swift", "target_modules: [all-linear]\n", "target_modules"),
        ("ms-swift", "target_regex: '.*q_proj'\n", "target_regex"),
        ("ms-swift", "tuner_backend: other\n", "tuner_backend"),
        ("ms-swift", "tuner_type: full\n", "tuner_type"),
        ("mlx-lm", "num_layers: 16\n", "num_layers"),
        ("mlx-lm", "lora_parameters:\n  keys: [self_attn.q_proj]\n", "lora_parameters.keys"),
        ("mlx-lm", "fine_tune_type: full\n", "fine_tune_type"),
        ("megatron-bridge", "peft:\n  target_modules: [linear_qkv]\n", "peft.target_modules"),
        ("megatron-bridge", "peft:\n  exclude_modules: [linear_fc1]\n", "peft.exclude_modules"),
        ("megatron-bridge", "model:\n  pipeline_model_parallel_size: 4\n", "model.pipeline_model_parallel_size"),
        ("trl", "use_peft: false\n", "use_peft"),
        ("trl", "use_peft: true\nlora_target_modules: [q_proj]\n", "lora_target_modules"),
    ],
)
def test_contradictions(trainer: str, text: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = DENSE.save(tmp_path / "placement.json"), tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    command = ["export", str(path), "--to", trainer, "--merge", str(file)]
    assert cli.run(command) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert f"has {key}: " in found.err
    assert "--force" in found.err
    assert file.read_text(encoding="utf-8") == text
    assert cli.run([*command, "--force"]) == 0
    found = capsys.readouterr()
    assert key in found.err  # said, not silent
    plan = TRAINERS[trainer].plan(DENSE, LoraSettings())
    assert merged(found.out, "config.yaml", TRAINERS[trainer], plan).text == found.out


def test_an_option_that_differs_from_the_file_is_a_contradiction(tmp_path: Path) -> None:
    plan = TRAINERS["axolotl"].plan(DENSE, LoraSettings(rank=4))
    with pytest.raises(ExportError, match=r"lora_r: 16, which contradicts.*must be 4"):
        merged("adapter: lora\nlora_r: 16\n", "config.yml", TRAINERS["axolotl"], plan)


def test_an_empty_adapter_becomes_lora() -> None:
    done = merged("adapter:\nlora_r:   # open\n", "c.yml", TRAINERS["axolotl"], TRAINERS["axolotl"].plan(DENSE, LoraSettings()))
    assert done.text.startswith("adapter: lora\nlora_r: 8   # open\n")


def test_line_breaks_and_a_missing_last_one() -> None:
    plan = TRAINERS["axolotl"].plan(DENSE, LoraSettings())
    done = merged("base_model: m\r\nadapter: lora", "c.yml", TRAINERS["axolotl"], plan)
    assert "\n" not in done.text.replace("\r\n", "")
    assert done.text.startswith("base_model: m\r\nadapter: lora\r\nlora_r: 8\r\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "holds a list and no keys"),
        ("a: [1\n", "cannot be read as YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
        ("{adapter: lora}\n", "a line of its own"),
        ("adapter: lora\nadapter: lora\n", "twice"),
        ("a: 1\n---\nb: 2\n", "cannot be read as YAML"),
        ("x: &x [q]\nlora_target_modules: *x\n", "alias"),
        ("a: &a\n  b: *a\n", "holds itself by an alias"),
        (
            "a0: &a0 [x, x, x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 12)),
            "repeats over 100,000",
        ),
        ("a: " + "[" * 5000, "cannot be read as YAML"),
    ],
)
def test_yaml_that_cannot_be_merged_into(text: str, words: str) -> None:
    plan = TRAINERS["axolotl"].plan(DENSE, LoraSettings())
    with pytest.raises(ExportError, match=words):
        merged(text, "config.yml", TRAINERS["axolotl"], plan, force=True)


@pytest.mark.parametrize(
    "text",
    [
        "lora_parameters:   # how\n  rank: 4  # low\n  # scale is alpha / rank\n  scale: 2.5\nseed: 0\n",
        "lora_parameters: {rank: 4, scale: 2.5}  # how\nseed: 0\n",
        "lora_parameters:\n  rank: 4\n  scale: 2.5\n\n\n# seed\nseed: 0\n",
        "seed: 0\nlora_parameters:\n      rank: 4\n      scale: 2.5",
    ],
)
def test_sections(text: str) -> None:
    done = merged(text, "c.yaml", TRAINERS["mlx-lm"], TRAINERS["mlx-lm"].plan(DENSE, LoraSettings()))
    section = done.keys["lora_parameters"]
    assert (section["rank"], section["scale"], section["dropout"], len(section["keys"])) == (4, 2.5, 0.0, len(DENSE.paths))
    assert done.keys["num_layers"] == -1
    for comment in ("# how", "# low", "# scale is alpha / rank", "# seed"):
        assert (comment in done.text) == (comment in text)


def test_json_keeps_what_it_does_not_change() -> None:
    text = '{\n    "model_name_or_path": "org/mödel",\n    "learning_rate": 1e-4,\n    "lora_rank": 16\n}\n'
    done = merged(text, "c.json", TRAINERS["llamafactory"], TRAINERS["llamafactory"].plan(DENSE, LoraSettings()))
    assert done.text.startswith(text.removesuffix("\n}\n"))
    assert json.loads(done.text)["lora_target"].split(",") == list(DENSE.paths)
    assert json.loads(done.text)["lora_rank"] == 16
    line = merged('{"lora_target": "all", "x": [1, {"a": 2}]}', "c.json", TRAINERS["llamafactory"], _plan(), force=True).text
    assert "\n" not in line
    assert '"x": [1, {"a": 2}]' in line


def _plan() -> Any:
    return TRAINERS["llamafactory"].plan(DENSE, LoraSettings())


KEYS = st.text("abcxyz_", min_size=1, max_size=6)
SCALARS = st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=12))
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)), max_leaves=6)
NEW = st.one_of(
    st.integers(),
    st.booleans(),
    st.text(max_size=20),
    st.lists(st.text(max_size=9), min_size=1),
    st.lists(st.integers()),
    st.dictionaries(st.text(min_size=1, max_size=5), st.integers(), min_size=1),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=5), st.dictionaries(KEYS, NEW, max_size=4), st.sampled_from((2, 4)), st.data())
def test_any_yaml_says_what_it_should(old: dict[str, Any], new: dict[str, Any], indent: int, data: st.DataObject) -> None:
    gone = data.draw(st.lists(st.sampled_from(sorted(old)), unique=True, max_size=2))
    new = {key: value for key, value in new.items() if key not in gone}
    text = "".join(f"# about {key}\n{yaml.safe_dump({key: value}, indent=indent, allow_unicode=True)}" for key, value in old.items())
    before = yaml.safe_load(text)  # PyYAML itself turns some control characters into blanks
    changed = edited(text, "c.yml", new, gone)
    assert (yaml.safe_load(changed) or {}) == {key: value for key, value in before.items() if key not in gone} | new
    for key in old:
        assert f"# about {key}\n" in changed
    whole = {key: value for key, value in old.items() if value is not None}
    as_json = edited(json.dumps(whole, indent=indent), "c.json", new, gone)
    assert json.loads(as_json) == {key: value for key, value in whole.items() if key not in gone} | new


def test_rank_alpha_and_dropout() -> None:
    values = yaml.safe_load(exported(DENSE, TRAINERS["axolotl"], LoraSettings(16, None, 0.1)).text)
    assert (values["lora_r"], values["lora_alpha"], values["lora_dropout"]) == (16, 32, 0.1)
    scale = yaml.safe_load(exported(DENSE, TRAINERS["mlx-lm"], LoraSettings(16, 8.0)).text)["lora_parameters"]
    assert (scale["rank"], scale["scale"]) == (16, 0.5)
    with pytest.raises(ExportError, match="leave --rank and --alpha out"):
        exported(CASES["ranks"], TRAINERS["axolotl"], LoraSettings(rank=4))
    with pytest.raises(ExportError, match="whole number"):
        exported(DENSE, TRAINERS["axolotl"], LoraSettings(alpha=2.5))
    with pytest.raises(PlacementError, match="no dropout for parameters"):
        exported(CASES["experts"], TRAINERS["peft"], LoraSettings(dropout=0.1))
    broken = ranked(DENSE)
    uneven = Placement.from_json(broken.to_json() | {"alpha_pattern": dict.fromkeys(broken.targets, 2.5)})
    with pytest.raises(ExportError, match="whole number"):
        exported(uneven, TRAINERS["axolotl"], LoraSettings())


def test_a_name_from_outside_stays_a_string() -> None:
    name = 'x"\nimport os  # \N{SNOWMAN}'
    strange = Placement.from_json(DENSE.to_json() | {"model": {"name": name, "layers": 30}})
    for trainer in TRAINERS.values():
        text = exported(strange, trainer, LoraSettings()).text
        assert "\nimport os" not in text
        if trainer.script is None and trainer.suffixes[0] != ".json":
            assert isinstance(yaml.safe_load(text), dict)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = DENSE.save(tmp_path / "placement.json"), tmp_path / "config.yml"
    file.write_text("base_model: m\n", encoding="utf-8")
    assert cli.run(["export", str(path), "--to", "axolotl", "--merge", str(file), "-o", str(file)]) == 0
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["peft_layers_to_transform"] == [3, 11]
    assert capsys.readouterr().out == ""
    other = tmp_path / "other.yml"
    other.write_text("kept", encoding="utf-8")
    assert cli.run(["export", str(path), "--to", "axolotl", "-o", str(other)]) == 2
    assert other.read_text(encoding="utf-8") == "kept"
    capsys.readouterr()
    assert cli.run(["export", str(path), "--to", "trl", "-o", str(tmp_path / "trl.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["keys"]["lora_target_modules"] == list(DENSE.paths)
    assert found["text"] == (tmp_path / "trl.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "torchtune"], "no key for layers"),
        (["--to", "axolotll"], "did you mean axolotl?"),
        (["--to", "axolotl", "--merge", "missing.yml"], "no such file"),
        (["--to", "axolotl", "--merge", "config.json"], "reads .yaml or .yml"),
        (["--to", "unsloth", "--merge", "config.yml"], "used from Python"),
        (["--to", "peft", "--alpha", "-1"], "alpha"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    DENSE.save("placement.json")
    for name in ("config.json", "config.yml"):
        write_json(name, {})
    assert cli.run(["export", "placement.json", *arguments]) == 2
    found = capsys.readouterr()
    assert (found.out, found.err.count("\n")) == ("", 1)
    assert words in found.err


def test_every_trainer_has_its_name() -> None:
    assert [trainer_named(name).name for name in TRAINERS] == list(TRAINERS)
    assert placed((1,), ("q",)).paths == ("model.layers.1.q",)
