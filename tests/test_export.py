"""Exports as text: golden files, merging that touches nothing else, contradictions, refusals, and the command."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from exports import CASES, GOLDEN, REFUSED, golden, placed, ranked
from layercard.commands import main as cli
from layercard.errors import ExportError, PlacementError
from layercard.export.config_text import edited, lookup
from layercard.export.export import exported, merged
from layercard.export.trainers import TRAINERS, LoraSettings
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


def into(
    text: str, trainer: str = "axolotl", source: str = "config.yml", *, plan: Placement = DENSE, force: bool = False, **numbers: Any
) -> Any:
    """A configuration with the keys of a placement merged into it."""
    return merged(text, source, TRAINERS[trainer], plan, LoraSettings(**numbers), force=force)


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
    again = merged(done.text, "config.yml", TRAINERS["axolotl"], DENSE, LoraSettings())
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
    assert merged(found.out, "config.yaml", TRAINERS[trainer], DENSE, LoraSettings()).text == found.out


def test_an_option_that_differs_from_the_file_is_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config.yml:2 has lora_r: 16, which contradicts.*must be 4"):
        into("adapter: lora\nlora_r: 16\n", rank=4)


def test_an_empty_adapter_becomes_lora() -> None:
    done = into("adapter:\nlora_r:   # open\n")
    assert done.text.startswith("adapter: lora\nlora_r: 8   # open\n")


def test_line_breaks_and_a_missing_last_one() -> None:
    done = into("base_model: m\r\nadapter: lora")
    assert "\n" not in done.text.replace("\r\n", "")
    assert done.text.startswith("base_model: m\r\nadapter: lora\r\nlora_r: 8\r\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "holds a list and no keys"),
        ("a: [1\n", "PyYAML, with which trainers read YAML, refuses this"),
        ("a: !!python/object/apply:os.system ['true']\n", "PyYAML, with which trainers read YAML, refuses this"),
        ("\n{adapter: lora}\n", ":2 is written in braces; put each key on a line of its own"),
        ("adapter: lora\nadapter: lora\n", ":2 has 'adapter' twice, in lines 1 and 2; take one of them out"),
        ("a: 1\nadapter:\tlora\n", ":2: PyYAML, .*found character '.t' that cannot start any token"),
        ("# none\n~\n", ":2 holds '~'; put each key on a line of its own"),
        ("a: 1\nwhen: 2026-13-01\n", ":2: PyYAML, .*'2026-13-01' is not a value of"),
        ("a: 1\nlora_r: " + "9" * 5000, ":2: PyYAML, "),
        ("a: !!bool maybe\n", ":1: PyYAML, "),
        ("base_model: {{ model }}\n", ":1: PyYAML, .*found unhashable key"),
        ("a: \x00\n", ":1: PyYAML, .*special characters are not allowed"),
        ("a: 1\n---\nb: 2\n", ":2: PyYAML, with which trainers read YAML, refuses this"),
        (
            "lora_target_modules: &x [q]\nother: *x\n",
            "1: lora_target_modules cannot be changed without changing more",
        ),
        ("a: &a\n  b: *a\n", "holds itself by an alias"),
        (
            "a0: &a0 [x, x, x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 12)),
            "repeats over 100,000",
        ),
        ("a: " + "[" * 5000, "PyYAML, with which trainers read YAML, refuses this"),
    ],
)
def test_yaml_that_cannot_be_merged_into(text: str, words: str) -> None:
    with pytest.raises(ExportError, match=rf"^config.yml.*{words}"):
        into(text, force=True)


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
    done = into(text, "mlx-lm")
    section = done.keys["lora_parameters"]
    assert (section["rank"], section["scale"], section["dropout"], len(section["keys"])) == (4, 2.5, 0.0, len(DENSE.paths))
    assert done.keys["num_layers"] == -1
    for comment in ("# how", "# low", "# scale is alpha / rank", "# seed"):
        assert (comment in done.text) == (comment in text)


def test_json_keeps_what_it_does_not_change() -> None:
    text = '{\n    "model_name_or_path": "org/mödel",\n    "learning_rate": 1e-4,\n    "lora_rank": 16\n}\n'
    done = into(text, "llamafactory", "c.json")
    assert done.text.startswith(text.removesuffix("\n}\n"))
    assert json.loads(done.text)["lora_target"].split(",") == list(DENSE.paths)
    assert json.loads(done.text)["lora_rank"] == 16
    line = into('{"lora_target": "all", "x": [1, {"a": 2}]}', "llamafactory", "c.json", force=True).text
    assert "\n" not in line
    assert '"x": [1, {"a": 2}]' in line


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


@pytest.mark.parametrize(
    ("trainer", "text", "keys"),
    [
        ("axolotl", "adapter: lora\nlora_r: 64\n", {"lora_alpha": 128}),
        ("axolotl", "adapter: lora\nlora_r: '16'\n", {"lora_alpha": 32}),
        ("axolotl", "lora_r: 010\n", {"lora_alpha": 16}),  # 8 in YAML 1.1, which the trainers read
        ("axolotl", "lora_r: 64.0\n", {"lora_alpha": 128}),
        ("axolotl", "d: &d {lora_r: 4}\n<<: *d\n", {"lora_alpha": 8}),
        ("axolotl", "lora_r: 64\nlora_alpha: 16\n", {"lora_alpha": 16}),
        ("axolotl", "lora_r: ${RANK}\nlora_alpha: 16\n", {"lora_r": "${RANK}", "lora_alpha": 16}),
        ("axolotl", "adapter: lora\n", {"lora_r": 8, "lora_alpha": 16}),
        ("llamafactory", "lora_rank: 64\n", {"lora_alpha": 128}),
        ("ms-swift", "lora_rank: 64\n", {"lora_alpha": 128}),
        ("trl", "lora_r: 64\n", {"lora_alpha": 128}),
        ("mlx-lm", "lora_parameters:\n  rank: 64\n", {"lora_parameters.scale": 2.0}),
        ("mlx-lm", "lora_parameters:\n  rank: 64\n  scale: 20.0\n", {"lora_parameters.scale": 20.0}),
        ("megatron-bridge", "peft:\n  dim: 64\n", {"peft.alpha": 128}),
    ],
)
def test_alpha_is_the_files_else_twice_its_rank(trainer: str, text: str, keys: dict[str, Any]) -> None:
    done = into(text, trainer)
    assert {key: lookup(done.keys, key) for key in keys} == keys


def test_an_option_goes_with_the_files_rank() -> None:
    assert lookup(into("lora_parameters: {rank: 64}\n", "mlx-lm", alpha=16).keys, "lora_parameters.scale") == 0.25
    assert into("lora_r: 64\n", rank=16, force=True).keys["lora_alpha"] == 32
    for text, trainer, numbers in (
        ("a: 1\nlora_r: ${RANK}\n", "axolotl", {}),
        ("lora_r: 0\n", "axolotl", {}),
        ("lora_parameters: {rank: '${R}'}\n", "mlx-lm", {"alpha": 4.0}),
    ):
        with pytest.raises(ExportError, match=r"which is not a whole number above 0, and .* depends on it"):
            into(text, trainer, **numbers)


PARTIAL = placed((3, 11), ("self_attn.q_proj", "mlp.down_proj"))
EVERY = placed(tuple(range(30)), ("self_attn.q_proj", "mlp.down_proj"))


@pytest.mark.parametrize(
    ("trainer", "plan", "text"),
    [
        ("axolotl", PARTIAL, "lora_target_modules:\n  # short\n  - down_proj\n  - q_proj  # q\n"),
        ("axolotl", PARTIAL, "lora_target_modules: [mlp.down_proj, self_attn.q_proj]\npeft_layers_to_transform: [11, 3]\n"),
        ("axolotl", PARTIAL, "lora_target_modules: " + str(list(PARTIAL.paths)) + "\n"),
        ("axolotl", PARTIAL, "peft_layers_pattern: layers\npeft_layers_to_transform: ['3', '11']\n"),
        ("llamafactory", PARTIAL, "lora_target: " + ", ".join(reversed(PARTIAL.paths)) + "\n"),
        ("llamafactory", PARTIAL, "lora_target: " + str(list(PARTIAL.paths)) + "\n"),
        ("llamafactory", EVERY, "lora_target: q_proj,down_proj\n"),
        (
            "ms-swift",
            PARTIAL,
            "target_modules: [layers.3.self_attn.q_proj, layers.11.self_attn.q_proj, 3.mlp.down_proj, 11.mlp.down_proj]",
        ),
        ("trl", PARTIAL, "lora_target_modules: " + str(list(PARTIAL.paths)) + "\nuse_peft: yes\n"),
        ("mlx-lm", EVERY, "lora_parameters: {keys: [self_attn.q_proj, mlp.down_proj]}\n"),
    ],
)
def test_the_same_modules_in_another_spelling_are_no_contradiction(trainer: str, plan: Placement, text: str) -> None:
    done = into(text, trainer, plan=plan)
    assert all(lookup(done.keys, key) for key in TRAINERS[trainer].choose(plan))
    assert not [note for note in done.notes if "replaced" in note]
    with pytest.raises(ExportError, match="contradicts"):
        into(text, trainer, plan=placed((3, 12), ("self_attn.q_proj", "mlp.up_proj")))


@pytest.mark.parametrize("text", ["lora_target: q_proj,down_proj\n", "lora_target: q_proj\n", "lora_target: layers.3.self_attn.q_proj\n"])
def test_fewer_modules_or_those_of_all_layers_are_a_contradiction(text: str) -> None:
    with pytest.raises(ExportError, match="contradicts"):
        into(text, "llamafactory", plan=PARTIAL)


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        ("a: 1\r\nadapter: lora\nb: 2\r\n", ["a: 1\r\nadapter: lora\nb: 2\r\n"]),  # line breaks of two kinds
        ("x: .nan\ny: .inf\n", ["x: .nan\ny: .inf\n"]),
        ("a: 1\ntext: |+\n  one\n\n\n# end\n", ["a: 1\ntext: |+\n  one\n\n\n", "# end\n"]),
        ("x: &x [q_proj]\nlora_target_modules: *x  # short\nz: *x\n", ["x: &x [q_proj]\n", "# short\n", "z: *x\n"]),
        ("1: a\n'1': b\n", ["1: a\n'1': b\n"]),
        ("a: |\n  x\n   \n", ["a: |\n  x\n   \n"]),
        ("--- &root\na: 1\n", ["--- &root\na: 1\n"]),
        ("---\n", ["---\n"]),
        ("? a\n: lora\n", ["? a\n: lora\n"]),
        ("<<: {a: 1}\n<<: {b: 2}\n", ["<<: {a: 1}\n<<: {b: 2}\n"]),
        ("\ufeffadapter: none\nb: 1\n", ["\ufeffadapter: lora\nb: 1\n"]),
        ("%YAML 1.1\n---\na: 1\n...\n", ["%YAML 1.1\n---\na: 1\n", "...\n"]),
        ("lora_model_dir: x  # gone\n# about a\na: 1\n", ["# about a\na: 1\n"]),
    ],
)
def test_everything_else_stays_byte_for_byte(text: str, keeps: list[str]) -> None:
    done = into(text, force=True)
    assert all(part in done.text for part in keeps)
    assert done.text.startswith(keeps[0])


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_json_members_that_go_take_nothing_with_them(line_break: str) -> None:
    text = '{\n  "a": 1e-4,\n  "adapter_name_or_path": "x", "b": {"c":1},\n  "lora_rank": 64\n}\n'.replace("\n", line_break)
    new = into(text, "llamafactory", "c.json", force=True).text
    assert new.startswith('{\n  "a": 1e-4, "b": {"c":1},\n  "lora_rank": 64,\n  "lora_target"'.replace("\n", line_break).split(",")[0])
    assert '"b": {"c":1},' in new and "adapter_name_or_path" not in new and json.loads(new)["lora_alpha"] == 128
    assert line_break == "\n" or "\n" not in new.replace("\r\n", "")


CONFIGS = sorted((Path(__file__).parents[2] / "shared" / "cases" / "configs").glob("*"))
REFUSED_LINES = {"dup.yml": 3, "dup_other.yml": 4, "jinja_like.yml": 1, "tabs.yml": 2, "twodocs.yml": 2, "env.yml": 3}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_collected_configurations_are_merged_or_refused_with_the_line(path: Path) -> None:
    trainer = {"lf": "llamafactory", "mlx64": "mlx-lm"}.get(path.stem.split("_")[0], "axolotl")
    text = path.read_bytes().decode()
    try:
        done = exported(DENSE, TRAINERS[trainer], LoraSettings(), merge=path, force=True)
    except ExportError as error:
        assert str(error).startswith(f"{path}:{REFUSED_LINES[path.name]}") and "\n" not in str(error)
        return
    assert path.name not in REFUSED_LINES
    left = iter(done.text.splitlines(keepends=True))
    for line in text.splitlines(keepends=True):  # in order; a key that held nothing, and the list that was replaced, have their values
        empty, item = line.rstrip().endswith((":", "~")), path.name == "comment_in_list.yml" and line.startswith("  ")
        assert item or any(new.rstrip("\n") == line.rstrip("\n") or (empty and new.startswith(line.partition(":")[0])) for new in left)
    rank = lookup(done.keys, {"mlx-lm": "lora_parameters.rank", "llamafactory": "lora_rank"}.get(trainer, "lora_r"))
    if "64" in path.name:
        assert rank == 64 and lookup(done.keys, "lora_parameters.scale" if trainer == "mlx-lm" else "lora_alpha") in (128, 2.0)


def test_the_default_model_has_its_hub_id_and_a_gguf_file_has_none() -> None:
    for trainer in ("trl", "unsloth"):
        default = DENSE.changed(model=DENSE.model | {"name": "smollm2-135m"})
        assert '"HuggingFaceTB/SmolLM2-135M-Instruct"' in exported(default, TRAINERS[trainer], LoraSettings()).text
        with pytest.raises(ExportError, match="trainers load no GGUF file by its name"):
            exported(DENSE.changed(model=DENSE.model | {"name": "a/b.Q4.gguf"}), TRAINERS[trainer], LoraSettings())


def test_merging_in_place_keeps_mode_and_link(tmp_path: Path) -> None:
    path, file, link = DENSE.save(tmp_path / "placement.json"), tmp_path / "real.yml", tmp_path / "link.yml"
    file.write_text("base_model: m\n", encoding="utf-8")
    file.chmod(0o600)
    link.symlink_to(file.name)
    assert cli.run(["export", str(path), "--to", "axolotl", "--merge", str(link), "-o", str(link)]) == 0
    assert link.is_symlink() and "peft_layers_to_transform" in file.read_text(encoding="utf-8")
    assert file.stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe.yml")
    assert cli.run(["export", str(path), "--to", "axolotl", "--merge", str(tmp_path / "pipe.yml")]) == 2


def test_an_entry_of_the_method_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT reads the folder's configuration, and the benchmark's parameters are replaced by the learning rate that was found."""
    from peft import PeftConfig

    monkeypatch.chdir(tmp_path)
    placement = CASES["dense"].changed(learning_rate=3e-4)
    placement.save(Path("placement.json"))
    line = ["export", "placement.json", "--to", "peft-method-comparison", "--rank", "16", "-o", "experiments/lora/few-layers"]
    assert cli.run(line) == 0
    config = PeftConfig.from_pretrained("experiments/lora/few-layers")
    assert (set(config.target_modules), config.r, config.lora_alpha) == (set(placement.paths), 16, 32)
    parameters = json.loads(Path("experiments/lora/few-layers/training_params.json").read_text())
    assert parameters["optimizer_kwargs"] == {"lr": 3e-4, "weight_decay": 0.1}
    capsys.readouterr()
    assert cli.run(line) == 2 and "exists" in capsys.readouterr().err
    Path("a.json").write_text("{}")
    assert cli.run([*line[:4], "--merge", "a.json"]) == 2 and "folder of its own" in capsys.readouterr().err
    assert cli.run([*line[:4], "-o", "other"]) == 0 and "put the folder there" in capsys.readouterr().out
