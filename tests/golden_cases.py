"""What the golden files hold: each case runs commands in the shared folder (`golden_files.workplace`) and gives a JSON value."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import layercard as package
from cards import fake_card, fake_comparison, fake_placement
from golden_files import GOLDEN, ROOT, as_json, layercard, lines, read_page, succeed
from tiny import tiny_records, tiny_tokenizer, write_records

RESULTS, STUDY = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "results" / "placements"
INPUTS = yaml.safe_load((GOLDEN / "inputs.yaml").read_text(encoding="utf-8"))
E2E, GSM8K, WEBNLG = (STUDY / "cards" / f"{name}.json" for name in ("e2e", "gsm8k", "webnlg"))
E2E_64, GSM8K_64 = (RESULTS / "cards" / f"{name}.json" for name in ("e2e-64", "gsm8k-64"))
DECOMPOSED = ("pissa", "olora", "eva")
"""Methods that begin from a decomposition, whose vectors have either sign; of their tensors only the norms are compared."""
BUDGETS = package.Budgets(max_time="90%", max_params="50%")
COMPARED = "all,middle:1,bottom:2,balanced:1"
TRAIN = "--data records.jsonl --valid records.jsonl --steps 6 --records 24 --valid-records 8 --max-length 96 --seed 3 --learning-rate 0.002"


def model(family: str) -> str:
    """The folder of a tiny model, made once; its weights are multiples of 1/128, so that no CPU's rounding shows in fingerprints."""
    folder = Path(family.replace(" ", "-"))
    if not folder.exists():
        sys.path.insert(0, str(ROOT / "tests" / "architectures"))
        from families import BY_NAME

        built, draw = BY_NAME[family].build(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in built.parameters():
                drawn = torch.randint(-16, 17, (4, *weight.shape), generator=draw).sum(0)
                weight.copy_((drawn if weight.ndim > 1 else (weight * 128).round()) / 128)
        built.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        write_records(Path("records.jsonl"), tiny_records(32))
    return folder.name


def read(file: str | Path) -> Any:
    return json.loads(Path(file).read_text(encoding="utf-8"))


def card(family: str, options: str = "") -> str:
    """A card of a tiny model, made once."""
    file = f"card-{model(family)}{options.replace(' ', '')}.json"
    if not Path(file).exists():
        sizes = "--records 16 --max-length 96 --batch-size 4 --no-cost"
        succeed(f"profile {model(family)} --data records.jsonl {sizes} {options} -o {file}")
    return file


def profiled(family: str, options: str = "") -> Any:
    """A card with a row of values for each module, under names that are written once: the file is half as long."""
    made = read(card(family, options))
    modules = [module for layer in made["layers"] for module in layer.pop("modules")]
    names = list(modules[0])
    return made | {"modules": [names, *([module.pop(name) for name in names] for module in modules)], "more": [m for m in modules if m]}


def profiled_smollm2() -> Any:
    """The measures of each layer of the embedded model, without intervals."""
    made = as_json("profile smollm2-135m --data synthetic --records 4 --max-length 64 --label-samples 1 --no-cost -o s.json --force")
    first = made["layers"][0]
    layers = {name: [layer[name]["value"] for layer in made["layers"]] for name in first if isinstance(first[name], dict)}
    return {key: made[key] for key in ("model", "data", "settings", "warnings", "stability")} | {"layers": layers}


def placement(source: str | Path, options: str = "") -> str:
    """The file of a placement that is selected from a card."""
    file = f"placed-{Path(source).stem}{options.replace(' ', '')}.json"
    succeed(f"select {source} {options} -o {file} --force")
    return file


def summary(point: dict[str, Any]) -> list[str]:
    """A placement as: layers; performance kept; shares of time, memory, weights and latency; their amounts; coverage; the rest."""
    predicted = point.get("predicted", point)
    costs = [predicted.get(key) or {} for key in ("step_time", "peak_memory", "parameters", "latency")]
    amounts = [amount for cost in costs for key, amount in cost.items() if key != "share"]
    numbers = [predicted["performance_kept"].values(), [cost.get("share") for cost in costs], amounts, [predicted["coverage"]]]
    texts = [", ".join("none" if number is None else f"{number:.5g}" for number in row) for row in numbers]
    baseline, status = predicted.get("baseline"), (predicted.get("solver") or {}).get("status")
    rest = [f"{status}, baseline {baseline and baseline['layers']}", predicted.get("remark")]
    return [" ".join(map(str, point["layers"])), *texts, *filter(None, rest)]


def placements(source: Callable[[], str | Path]) -> Any:
    """What each objective, strategy and budget gives; the exit status where it is refused."""
    file, chosen = source(), {}
    counts = [f"--k {count}" for count in (1, 2, 5, 8) if count <= read(file)["model"]["layers"]]
    ways = [f"--objective {name} {count}" for name in INPUTS["objectives"] for count in ("", *counts)]
    ways += [f"--strategy {name} {count}" for name in INPUTS["strategies"] for count in counts]
    for options in (*ways, *INPUTS["selections"]):
        status, out, _ = layercard(f"select {file} {options} -o placed.json --force --json")
        chosen[options.strip()] = status or summary(json.loads(out))
    return chosen


def full_placements() -> Any:
    """Placements with paths, reasons and shared ranks, as files and as text."""
    ways = ("", "--k 4 --objective performance --allocate-ranks", "--strategy uniform --k 3")
    texts = {f"{options} text": lines(succeed(f"select {E2E} {options} -o placed.json --force")) for options in ways}
    return {options: read(placement(E2E, options)) for options in ways} | texts


def front(source: Callable[[], str | Path]) -> Any:
    made = as_json(f"pareto {source()}")
    fronts = {name: [summary(point) for point in points] for name, points in made["fronts"].items()}
    return made | {"fronts": fronts, "baselines": {point["name"]: summary(point) for point in made["baselines"]}}


def transfer(options: str) -> Any:
    pair = as_json(f"transfer {E2E_64} {GSM8K_64} {options}")
    return {"three": as_json(f"transfer {E2E} {GSM8K} {WEBNLG} {options}"), "pair": {key: pair[key] for key in ("matrix", "lost", "pairs")}}


def trained(family: str, options: str = "") -> Path:
    """The folder of an adapter after 6 steps, made once: in the last two layers, or with a method in the last one."""
    folder = Path(f"adapter-{model(family)}{options.replace(' ', '')}")
    if not folder.exists():
        placed = placement(card(family), f"--strategy last --k {1 if 'method' in options else 2}")
        succeed(f"train {model(family)} --placement {placed} {TRAIN} {options} -o {folder}")
    return folder


def adapter(family: str, options: str = "") -> Any:
    """Losses of a run, and of each tensor its shape, its norm and a fixed projection."""
    folder, tensors = trained(family, options), {}
    run, config = read(folder / "run.json"), read(folder / "adapter_config.json")
    for name, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        flat = tensor.double().flatten()
        projection = float(flat @ torch.arange(len(flat)).double().cos())
        tensors[name] = [str(list(tensor.shape)), float(flat.norm()), None if options.endswith(DECOMPOSED) else projection]
    names = "loss_before loss_after loss_reduction_interval losses tokens_seen trainable_parameters layers_in_backward settings data"
    asked = [config.get("peft_type"), config.get("r"), config.get("lora_alpha"), sorted(config["target_modules"] or [])]
    return {name: run[name] for name in names.split()} | {"did": run["fast"].get("did"), "config": asked, "tensors": tensors}


def exports(trainer: str) -> Any:
    """Placements for a trainer: alone, with settings, merged into a user's file, and read back on a model; the status where refused."""
    file, text = f"user.{'json' if trainer == 'peft' else 'yaml'}", INPUTS["user_files"][trainer]
    Path(file).write_text(text, encoding="utf-8")
    ways = ["", "--rank 4 --alpha 10 --dropout 0.1", *(f"{merge} {file}" for merge in ("--merge", "--force --merge") if text)]
    cases = {f"uniform {way}": (placement(E2E, "--strategy uniform --k 3"), way) for way in ways}
    cases |= {f"ranks {way}": (placement(E2E, "--k 2 --allocate-ranks"), way) for way in ways[::3]}
    for family in ("gpt2", "qwen3_moe", "gemma3 vision"):
        placed = placement(card(family), "--strategy last --k 2")
        cases |= {f"{family} {way}": (placed, f"--model {model(family)} {way}") for way in ("", "--json")}
    results = {name.strip(): layercard(f"export {source} --to {trainer} {way}") for name, (source, way) in cases.items()}
    return {name: status or [*lines(out), *(f"stderr: {line}" for line in lines(err))] for name, (status, out, err) in results.items()}


def damaged(name: str, change: Callable[[str, Any], tuple[str, Any]], **config: Any) -> None:
    """A copy of the adapter without its placement, with other keys of its configuration, and with changed tensors (None: left out)."""
    folder = Path(name)
    shutil.copytree(trained("llama"), folder, dirs_exist_ok=True)
    (folder / "placement.json").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(read(file) | config), encoding="utf-8")
    tensors = dict(change(*item) for item in load_file(folder / "adapter_model.safetensors").items())
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / "adapter_model.safetensors")


def verified() -> Any:
    """Text, JSON and exit status of `verify` for adapters and configurations, good and broken."""
    for name, text in INPUTS["verified_files"].items():
        Path(name).write_text(text, encoding="utf-8")
    damaged("no-effect", lambda key, value: (key, value * ("lora_A" in key)))
    damaged("lost-tensors", lambda key, value: (key, None if "q_proj" in key else value))
    damaged("renamed", lambda key, value: (key.replace("layers.2.", "layers.5."), value))
    damaged("other-shapes", lambda key, value: (key, value[:, :2].clone()))
    damaged("other-base", lambda key, value: (key, value), base_model_name_or_path="some/other")
    damaged("other-targets", lambda key, value: (key, value), target_modules=["q_proj"], rank_pattern={}, alpha_pattern={})
    files = {"GOOD": trained("llama"), "EXPERTS": trained("qwen3_moe"), "IA3": trained("llama", "--method ia3")}
    files |= {"WRONG": placement(card("llama"), "--strategy first --k 1"), "VISION": model("gemma3 vision"), "GPT2": model("gpt2")}
    results = {}
    for case in INPUTS["verified"]:
        arguments = " ".join(str(files.get(word, word)) for word in case.split())
        (status, out, err), text = layercard(f"verify {arguments}"), layercard(f"verify {arguments} --json")[1]
        value = json.loads(text) if text else {}
        lists = {key: " ".join(value.get(key) or ["none"]) for key in ("adapted", "saved")}
        results[case] = {"status": status, "text": lines(out), "error": lines(err), "json": value | lists}
    return results


def fake_files() -> list[str]:
    """A made-up card, a placement and a comparison of it."""
    value = fake_card(5)
    comparison = fake_comparison(value, {"all": [0, 1, 2, 3, 4], "middle:2": [2, 3], "bottom:2": [3, 4]})
    files = {"fake.json": value, "fake-placed.json": fake_placement(value, [2, 4]), "fake-compared.json": comparison}
    for name, content in files.items():
        Path(name).write_text(json.dumps(content), encoding="utf-8")
    return list(files)


def report(files: str) -> Any:
    succeed(f"report {files} -o report.html --force")
    return read_page(Path("report.html"))


def report_of_results() -> Any:
    """The committed cards, runs and tables, as `make report-sample` has them."""
    shutil.copy(placement(E2E, "--stock"), "balanced.json")
    shutil.copy(placement(E2E, "--strategy uniform --k 5"), "uniform.json")
    tables = f"{RESULTS / 'placements_table.json'} {RESULTS / 'trade_off_e2e.json'}"
    return report(f"{E2E} balanced.json uniform.json {WEBNLG} {GSM8K} {STUDY / 'runs'} {STUDY / 'times'} {tables}")


def shown() -> Any:
    fake, placed, comparison = fake_files()
    succeed(f"show {fake} --html shown.html --placement {placed} --comparison {comparison} --force")
    files = {"fake": fake, "llama": card("llama"), "e2e": E2E, "gsm8k-64": GSM8K_64}
    texts = {name: lines(succeed(f"show {file}")) for name, file in files.items()}
    return {"text": texts, "json": as_json(f"show {fake}"), "page": read_page(Path("shown.html"))}


def roi() -> Any:
    """The calculator from a card's cost, from runs, and with figures that are given."""
    files = f"{E2E} {placement(E2E, '--strategy uniform --k 5')}"
    figures = "gpu_price_per_hour=4 runs_per_month=200 hours_per_run=3 gpus=8 gpu_watts=400 grid_gco2_per_kwh=300 adapter_latency_ms=3"
    given = " ".join(f"--set {figure}" for figure in figures.split())
    runs = as_json(f"roi {files} {STUDY / 'runs'} {STUDY / 'times'} {given}")
    return {"card": as_json(f"roi {files}"), "runs": runs, "text": lines(succeed(f"roi {files} {given}"))}


def cost() -> Any:
    """Costs from shapes alone; measured ones differ from run to run."""
    options = "--meta --flops 1e12 --bandwidth 1e11 --batch-size 2 --length 64"
    texts = {name: lines(succeed(f"cost {name} {options}")) for name in ("qwen3-8b", "gpt2-medium")}
    return {name: as_json(f"cost {model(name)} {options}") for name in ("llama", "qwen3_moe", "gemma3 vision")} | texts


CASES: dict[str, Callable[[], Any]] = {
    **{f"cards/{name}": partial(profiled, *case.split("|")) for name, case in INPUTS["cards"].items()},
    "cards/smollm2": profiled_smollm2,
    **{f"placements/{path.stem}": partial(placements, partial(Path, path)) for path in (E2E, GSM8K, E2E_64, GSM8K_64)},
    "placements/tiny-llama": partial(placements, partial(card, "llama")),
    "placements/full": full_placements,
    "placements/from-python": lambda: summary(package.select(package.LayerCard.load(E2E), k=4, budgets=BUDGETS).to_json()),
    "fronts/e2e": partial(front, partial(Path, E2E)),
    "fronts/gsm8k-64": partial(front, partial(Path, GSM8K_64)),
    "fronts/tiny-llama": partial(front, partial(card, "llama")),
    "transfer/gain-estimate": partial(transfer, ""),
    "transfer/resnorm": partial(transfer, "--measure resnorm --k 8"),
    **{f"exports/{trainer}": partial(exports, trainer) for trainer in INPUTS["user_files"]},
    **{f"adapters/{name}": partial(adapter, *case.split("|")) for name, case in INPUTS["adapters"].items()},
    "adapters/compare": lambda: as_json(f"compare llama --placements {COMPARED} --card {card('llama')} {TRAIN} -o compared --force"),
    "verify/all": verified,
    "reports/results": report_of_results,
    "reports/made-up": lambda: report(" ".join(fake_files())),
    "reports/show": shown,
    "reports/roi": roi,
    "reports/cost": cost,
}
SLOW = {"cards/smollm2", "placements/e2e-64", "placements/gsm8k", "transfer/resnorm"}
