"""The placement benchmark: fair, resumable at any point, the same table however it was run."""

import json
import math
import os
import shutil
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from layercard.adapters.apply import place
from layercard.commands.main import run
from layercard.data.load import load_data
from layercard.errors import BenchmarkError
from layercard.models.load import BaseModel
from layercard.models.stored import fingerprint
from layercard.settings import BenchSettings, TrainSettings
from layercard.trials import bench as bench_module, trial as trial_module
from layercard.trials.bench import STRATEGIES, Bench, Cell, Chooser, Grid, bench_placements, benches, check_strategies, climb
from layercard.trials.peers import linear_cka, peer_scores, weight_snr
from layercard.trials.storage import Storage
from layercard.trials.tables import measured, regrets, side_by_side, summarise
from layercard.trials.tasks import general_text, known_tasks, load_task
from layercard.trials.trial import Trial, compact, read_trials, run_trials
from layercard.trials.workers import Workers
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

STRATEGIES_HERE = ("random", "uniform", "last", "performance", "balanced", "snr")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchSettings:
    """A benchmark of a tiny model of 6 layers on one tiny task, two steps a run and two learning rates a search."""
    monkeypatch.setattr(bench_module, "MOST_RATES", 2)
    model = tmp_path / "model"
    build_tiny("llama", num_hidden_layers=6).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    task = tmp_path / "data" / "tiny"
    task.mkdir(parents=True)
    for at, split in enumerate(("train", "valid", "test")):
        write_records(task / f"{split}.jsonl", tiny_records(12, start=100 * at))
    return BenchSettings(
        model=str(model),
        data=str(tmp_path / "data"),
        dtype="float32",
        device="cpu",
        steps=2,
        batch_tokens=100,
        valid_tokens=60,
        test_tokens=120,
        card_records=8,
        rank=2,
    )


@pytest.fixture(autouse=True)
def no_aletheia(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's package is an extra; its score has a test of its own."""
    monkeypatch.setattr("layercard.trials.peers.aletheia_scores", lambda base, examples: [1.0] * len(base.blocks))


GRID = Grid(("tiny",), STRATEGIES_HERE, ks=(2,), seeds=(0, 1))
SMALL = Grid(("tiny",), ("last", "performance"), ks=(2,), seeds=(0,))


def whole(settings: BenchSettings, folder: Path, **more: Any) -> dict[str, Any]:
    """The summary of a finished grid."""
    return finished(settings, folder, SMALL, times=False, **more)


def finished(settings: BenchSettings, place: str | Path, grid: Grid, **more: Any) -> dict[str, Any]:
    """The summary of a grid in a place."""
    (part,) = benches([settings], place)
    return summarise(part, bench_placements([part], grid, **more)[0])


def share_cards(tmp_path: Path) -> None:
    """Cards hold step times that were measured, and other processes do not see the patch of the peer's package."""
    for part in ("cards", "scores", "rates"):
        shutil.copytree(tmp_path / "a" / part, tmp_path / "b" / part)


def outcome(summary: dict[str, Any]) -> str:
    return json.dumps(summary, sort_keys=True)


# --- resuming -------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_killed_twice_and_resumed_gives_the_same_table(settings: BenchSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = whole(settings, tmp_path / "a")
    share_cards(tmp_path)
    real, calls = trial_module.measure, 0

    def killed_at_every_second(*arguments: Any, **how: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise Killed
        return real(*arguments, **how)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(trial_module, "measure", killed_at_every_second)
            with pytest.raises(Killed):
                whole(settings, tmp_path / "b")
    assert outcome(whole(settings, tmp_path / "b")) == outcome(undisturbed)
    monkeypatch.setattr(trial_module, "measure", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(bench_module, "profile_records", lambda *_: pytest.fail("profiled again"))
    assert outcome(whole(settings, tmp_path / "a")) == outcome(undisturbed)


def shared_address(folder: Path) -> str:
    """An address of fsspec that several processes see as the same storage; everything goes through fsspec and not through paths."""
    return f"local://{folder}"


def test_results_at_an_address_are_the_same(settings: BenchSettings, tmp_path: Path) -> None:
    in_folder = whole(settings, tmp_path / "a")
    share_cards(tmp_path)
    assert outcome(whole(settings, shared_address(tmp_path / "b"), workers=Workers(2))) == outcome(in_folder)
    paths = [[path.relative_to(tmp_path / place) for path in (tmp_path / place).rglob("*.json")] for place in "ab"]
    names = [sorted(str(path) for path in part if "-valid-" not in path.name) for part in paths]  # what was searched before is shared
    assert names[0] == names[1]
    assert not list((tmp_path / "b").rglob("*.part"))


def test_several_models_make_one_table(settings: BenchSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny("gpt2", num_hidden_layers=4).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    grid = SMALL
    every = [settings, replace(settings, model=str(tmp_path / "other"))]
    parts = benches(every, tmp_path / "both")
    assert len({part.storage.place for part in parts}) == 2
    work, arguments = parts[1].job(lambda *given: given, "tiny")
    assert work(*arguments) == ("tiny",), "as it runs in another process of this machine"
    heard: set[str] = set()
    found = bench_placements(parts, grid, progress=lambda phase, done, total: heard.add(phase), times=False)
    assert [max(max(cell.layers) for cell in cells) for cells in found] == [5, 3]
    assert all(any(phase.startswith(f"{part.title}: ") for phase in heard) for part in parts)
    summary = side_by_side({part.title: summarise(part, cells) for part, cells in zip(parts, found, strict=True)})
    for table in summary["tables"].values():
        assert table["columns"][0] == "model"
        assert [row[0] for row in table["rows"]] == [part.title for part in parts for _ in range(3)]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert {run["model"] for run in summary["runs"]} == {part.title for part in parts}
    by_itself = finished(settings, tmp_path / "alone", grid, times=False)
    assert [run["layers"] for run in summary["runs"]][:3] == [run["layers"] for run in by_itself["runs"]]
    monkeypatch.setattr(trial_module, "measure", lambda *_, **__: pytest.fail("trained again"))
    assert bench_placements(parts, grid, times=False) == found
    with pytest.raises(BenchmarkError, match="name each model once"):
        benches([settings, settings], tmp_path)


@pytest.mark.slow
def test_ray_gives_the_same_table(settings: BenchSettings, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    alone = whole(settings, tmp_path / "a")
    share_cards(tmp_path)
    assert outcome(whole(settings, shared_address(tmp_path / "b"), workers=Workers(1, "local"))) == outcome(alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_with_a_node_killed_in_the_middle_gives_the_same_table(settings: BenchSettings, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    alone = whole(settings, tmp_path / "a")
    share_cards(tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=1)
    killed: list[str] = []
    heard: set[str] = set()

    def progress(phase: str, done: int, total: int) -> None:
        heard.add(phase)
        if phase == "train" and not killed and any((tmp_path / "b" / "runs").glob("tiny-test-*")):
            cluster.remove_node(doomed, allow_graceful=False)
            killed.append(phase)

    try:
        found = whole(settings, tmp_path / "b", workers=Workers(2, cluster.address), progress=progress)
    finally:
        cluster.shutdown()
    assert killed, heard
    assert outcome(found) == outcome(alone)


def _vanish(folder: str, progress: Any = None) -> str:
    """A job whose worker is lost the first time, and answers the second."""
    mark = Path(folder) / "was here"
    if mark.exists():
        return "answer"
    mark.touch()
    os._exit(1)


def _vanish_always(folder: str, progress: Any = None) -> None:
    os._exit(1)


def test_the_job_of_a_lost_worker_is_made_again(tmp_path: Path) -> None:
    jobs = [(_vanish, (str(tmp_path),)), (str, ("other",))]
    assert sorted(Workers(2).run(jobs, lambda *_: None)) == ["answer", "other"]
    with pytest.raises(BenchmarkError, match="lost 3 times"):
        list(Workers(2).run([(_vanish_always, ("",))] * 2, lambda *_: None))


@pytest.mark.slow
def test_ray_says_what_it_lacks_and_what_a_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # where workers find the job
    with pytest.raises(BenchmarkError, match="has 0 GPU, and a run asks for 1"):
        list(Workers(1, "local", gpus=1).run([(_vanish, (str(tmp_path),))], lambda *_: None))
    assert list(Workers(1, "local").run([(_vanish, (str(tmp_path),))], lambda *_: None)) == ["answer"]


def test_a_folder_belongs_to_one_benchmark(settings: BenchSettings, tmp_path: Path) -> None:
    bench = Bench(settings, Storage.at(tmp_path))
    bench.keep_settings()
    bench.keep_settings()
    older = {name: value for name, value in vars(settings).items() if name != "probe"}
    bench.storage.write("settings.json", older)  # of a version that did not have the setting
    bench.keep_settings()
    replace(bench, settings=replace(settings, steps=3)).keep_settings()  # several lengths lie side by side
    with pytest.raises(BenchmarkError, match="rank = 2, now it is 3"):
        replace(bench, settings=replace(settings, rank=3)).keep_settings()


def test_cards_and_trials_of_a_folder_print_one_day(settings: BenchSettings, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(settings.model)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the answer"}]
    for split in ("train", "valid", "test"):
        path = write_records(tmp_path / "data" / "tiny" / f"{split}.jsonl", [{"messages": messages}] * 12)
    (bench,) = benches([settings], tmp_path / "bench")
    assert bench.day is None
    bench.keep_settings()
    assert bench.day == datetime.now(tz=UTC).date()
    kept = bench.storage.read("settings.json", "settings")
    bench.storage.write("settings.json", kept | {"day": "2024-07-26"})  # as if it had begun then
    bench.keep_settings()
    (cells,) = bench_placements([bench], SMALL, times=False)
    then = [load_data(path, tokenizer, records=records, day=date(2024, 7, 26)).fingerprint for records in (None, settings.card_records)]
    assert {bench.record(cell).data["fingerprint"] for cell in cells} == {then[0]}
    assert bench.card("tiny").data.fingerprint == then[1] != load_data(path, tokenizer, records=settings.card_records).fingerprint
    bench.storage.write("settings.json", kept | {"day": "yesterday"})
    with pytest.raises(BenchmarkError, match=r"settings.json says that its day is 'yesterday'; write it as in 2026-11-29"):
        _ = bench.day


# --- runs -----------------------------------------------------------------------------------------------------------------


SETTINGS = TrainSettings(steps=4, batch_size=2, rank=2, learning_rate=0.02, save_steps=0)


def test_trials_of_several_lengths_and_modules_lie_in_one_folder(
    settings: BenchSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = replace(load_task(settings, "tiny"), moments=1)
    before, modules = fingerprint(task.base.model, exact=True), [name for name, _ in task.base.model.named_modules()]
    lengths = [replace(SETTINGS, steps=steps) for steps in (2, 4)]
    trials = [Trial("tiny", layers, how, which) for layers in ((5,), (2, 3)) for how in lengths for which in ("all", "mlp")]
    first = run_trials(trials[:2], task, tmp_path)
    records = run_trials([*trials, trials[0]], task, tmp_path)
    assert records[:2] == first and records.pop() == first[0]
    assert fingerprint(task.base.model, exact=True) == before and [name for name, _ in task.base.model.named_modules()] == modules
    assert read_trials(tmp_path) == {trial.key: record for trial, record in zip(trials, records, strict=True)}
    assert (read_trials(tmp_path / "none") == {} and not (tmp_path / "unfinished").exists()) or not any((tmp_path / "unfinished").iterdir())
    for trial, record in zip(trials, records, strict=True):
        assert (record.layers, record.modules, record.settings["steps"]) == (trial.layers, trial.modules, trial.settings.steps)
        assert [moment.step for moment in record.curve] == [0, trial.settings.steps // 2, trial.settings.steps]
        assert (record.curve[0].loss, record.curve[-1].loss) == (record.loss_before, record.loss_after)
        assert record.forgetting is not None and record.accuracy is not None and record.loss_reduction is not None
    # The held-out loss on the way has no effect on what is learnt.
    assert records[0].loss_after == run_trials(trials[:1], replace(task, moments=0), tmp_path / "without")[0].loss_after
    assert records[1].trainable_parameters < records[0].trainable_parameters
    monkeypatch.setattr(trial_module, "measure", lambda *_, **__: pytest.fail("trained again"))
    assert run_trials(trials[::-1], partial(load_task, settings, "tiny"), tmp_path, Workers(2)) == records[::-1]
    with pytest.raises(BenchmarkError, match="name another folder"):
        run_trials(trials[:1], replace(task, train=task.train.part([0, 1], "few")), tmp_path)


def test_a_key_names_all_that_changes_the_result(settings: BenchSettings) -> None:
    usual = Trial("tiny", (1, 2), SETTINGS)
    placement = place(load_task(settings, "tiny").base, (1, 2))
    changes: dict[str, Any] = {"steps": 5, "batch_size": 4, "rank": 4, "alpha": 8.0, "learning_rate": 0.01, "seed": 1, "method": "dora"}
    changes |= {"accumulation": 2, "warmup_ratio": 0.1, "scheduler": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.0}
    changes |= {"dropout": 0.1, "bf16": True, "patience": 2}
    others = [replace(usual, settings=replace(SETTINGS, **{name: value})) for name, value in changes.items()]
    others += [replace(usual, settings=replace(SETTINGS, steps=None, epochs=epochs)) for epochs in (None, 2.0)]
    others += [replace(usual, task="other"), replace(usual, layers=(1,)), replace(usual, modules="mlp"), replace(usual, split="valid")]
    others += [replace(usual, placement=place) for place in (placement, placement.changed(paths=placement.paths[:-1]))]
    assert set(changes) | {"epochs"} == set(SETTINGS.deciding())
    assert len({trial.key for trial in (usual, *others)}) == 1 + len(others)
    for key in ("save_steps", "report_to"):
        assert replace(usual, settings=replace(SETTINGS, **{key: {"save_steps": 7}.get(key, "all")})).key == usual.key
    assert len(Trial("hub:a/b", tuple(range(0, 512, 2)), SETTINGS).file) < 200


def test_a_trial_that_diverges_is_recorded_and_is_the_worst(settings: BenchSettings, tmp_path: Path) -> None:
    trial = Trial("tiny", (0, 5), replace(SETTINGS, learning_rate=1e30, max_grad_norm=0.0), split="valid")
    (record,) = run_trials([trial], load_task(settings, "tiny"), tmp_path)
    assert (record.status, record.loss_after, record.loss) == ("diverged", None, math.inf)
    assert read_trials(tmp_path)[trial.key] == record


def test_learning_rate_is_the_best_on_validation(settings: BenchSettings, tmp_path: Path) -> None:
    found = Bench(settings, Storage.at(tmp_path)).find_rate("tiny", 2, 2)
    kept = json.loads(next((tmp_path / "rates").iterdir()).read_text())
    losses = {row["learning_rate"]: row["loss"] for row in kept["tried"]}
    assert found == kept["learning_rate"] == min(losses, key=losses.__getitem__)
    assert all("-valid-" in path.name for path in (tmp_path / "runs").iterdir())


def test_climb_stops_and_tokens_may_be_none() -> None:
    assert (compact([7]), compact(range(30))) == ("7", "0-29")
    assert climb(lambda rate: -rate, 1.0) == 2.0**5
    assert climb(lambda rate: math.inf if rate > 1 else 1 / rate, 4.0) == 1.0


# --- choices --------------------------------------------------------------------------------------------------------------


def test_scores_are_made_as_they_are_asked_for(settings: BenchSettings, tmp_path: Path) -> None:
    bench = Bench(settings, Storage.at(tmp_path))
    for peers, there in (((), set()), (("snr",), {"snr"}), (("activation_norm",), {"snr", "activation_norm"})):
        assert not bench.prepared("tiny", peers)
        bench.prepare("tiny", peers)
        assert set(bench.scores("tiny")) == there and bench.prepared("tiny", peers)


def test_every_strategy_chooses_k_layers(settings: BenchSettings, tmp_path: Path) -> None:
    bench = Bench(settings, Storage.at(tmp_path))
    bench.prepare("tiny")
    chooser = Chooser(bench, "tiny")
    for strategy in STRATEGIES:
        choice = chooser.choose(strategy, 2, seed=0)
        assert set(choice.layers) <= set(range(6))
        if strategy not in ("all", "balanced"):
            assert len(choice.layers) == 2, strategy
    assert chooser.choose("performance_equal_parameters", 2, 0).rank == 6
    assert chooser.choose("random", 2, 0).layers != chooser.choose("random", 2, 1).layers
    budgeted = [chooser.choose(name, 0, 0, 80.0) for name in ("performance", "uniform_above")]
    assert len(budgeted[0].layers) == len(budgeted[1].layers)
    assert not chooser.fits(1.0)


def test_names_of_the_paper_are_understood_and_typing_errors_are_not() -> None:
    assert check_strategies(["bottom", "top", "last"]) == ("last", "first")
    with pytest.raises(BenchmarkError, match="did you mean uniform"):
        check_strategies(["unifrom"])


def test_synthetic_task_is_always_there(tmp_path: Path) -> None:
    assert known_tasks(None) == ["synthetic"]
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train.jsonl").touch()
    assert known_tasks(str(tmp_path)) == ["synthetic"]


# --- peers ----------------------------------------------------------------------------------------------------------------


def test_cka_is_one_for_rotations_and_small_for_noise() -> None:
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, torch.randn(400, 6, generator=torch.Generator().manual_seed(2))) < 0.1


def test_cka_equals_its_kernel_form() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(20, 4, generator=generator).double(), torch.randn(20, 7, generator=generator).double()
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())))


def test_snr_sees_a_planted_signal() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 40, generator=generator)
    direction = torch.randn(60, 1, generator=generator) @ torch.randn(1, 40, generator=generator)
    assert weight_snr(noise + direction) != pytest.approx(weight_snr(noise), rel=0.1)


def test_peer_scores_have_a_number_a_layer(tiny_base: BaseModel, tiny_file: Path) -> None:
    before = fingerprint(tiny_base.model, exact=True)
    scores = peer_scores(tiny_base, load_data(tiny_file, tiny_base.tokenizer).examples)
    assert set(scores) == {"gradient_norm", "activation_norm", "one_minus_cka", "snr"}
    assert all(len(values) == 3 and all(math.isfinite(value) for value in values) for values in scores.values())
    assert fingerprint(tiny_base.model, exact=True) == before
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in tiny_base.model.modules())


# --- tables ---------------------------------------------------------------------------------------------------------------


def test_summary_kept_regret_and_intervals(settings: BenchSettings, tmp_path: Path) -> None:
    (part,) = benches([settings], tmp_path)
    (cells,) = bench_placements([part], GRID, times=False)
    results = measured(part, cells)
    for result in results:
        reference = next(each for each in results if each["strategy"] == "all" and each["seed"] == result["seed"])
        assert result["performance_kept"] == pytest.approx(100 * result["loss_reduction"] / reference["loss_reduction"])
    found = regrets(results)
    assert ("all", 6, None) not in found
    assert min(mean.value for mean in found.values()) == pytest.approx(0, abs=1e-9)
    columns, rows = (summarise(part, cells)["tables"]["reduction"][name] for name in ("columns", "rows"))
    assert all(len(row) == len(columns) for row in rows)


def test_step_times_are_measured_once(settings: BenchSettings, tmp_path: Path) -> None:
    small = Grid(("tiny",), ("last",), ks=(2,), seeds=(0,))
    finished(settings, tmp_path, small)
    files = {path: path.read_text() for path in (tmp_path / "times").iterdir()}
    assert len(files) == 2
    table = finished(settings, tmp_path, small)["tables"]["trade_off"]
    assert {path: path.read_text() for path in (tmp_path / "times").iterdir()} == files
    assert all(row[table["columns"].index("step time % of all")] is not None for row in table["rows"])


# --- command line ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "tinny"], "did you mean tiny?"),
        (["--tasks", ""], "--tasks is empty"),
        (["--tasks", "tiny", "--strategies", "balnced"], "did you mean balanced?"),
        (["--tasks", "tiny", "--k", "five"], "'five' is not a whole number"),
        (["--tasks", "tiny", "--budgets", "140"], "'140' is not a whole number"),
        (["--tasks", "tiny", "--k", "9"], "k = 9"),
        (["--tasks", "tiny", "--probe", "stepp"], "did you mean 'step'?"),
        (["--tasks", "tiny", "-o", "nosuch://place/bench"], "nosuch"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    settings: BenchSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    common = ["--data", str(settings.data), "--model", settings.model, "-o", str(tmp_path / "out"), "--steps", "2", "--card-records", "8"]
    assert run(["bench", "placements", *common, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_command_prints_tables_and_json(
    settings: BenchSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layercard.trials.peers.aletheia_scores", lambda *_: pytest.fail("nobody asked for gradient_norm"))
    arguments = f"bench placements --model {settings.model} --data {settings.data} --tasks tiny -o {tmp_path / 'o'}".split()
    arguments += ["--strategies", "last,performance", "--k", "2", "--seeds", "0", "--steps", "2", "--card-records", "8"]
    arguments += ["--dtype", "float32", "--batch-tokens", "100"]
    arguments += ["--test-tokens", "120", "--valid-tokens", "60", "--no-times", "--rank", "2"]
    assert run(arguments) == 0
    assert "ours (performance)" in capsys.readouterr().out
    assert run([*arguments, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert {one["strategy"] for one in value["runs"]} == {"all", "last", "performance"}
    arguments[arguments.index("-o") + 1] = "memory://bench/o"
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"]["reduction"]["columns"] == value["tables"]["reduction"]["columns"]


def test_general_text_has_labels_on_all_but_the_first_token(tiny_base: BaseModel) -> None:
    examples = general_text(tiny_base, 64).examples
    assert len(examples) == 8
    assert all(example.labelled == len(example.input_ids) - 1 for example in examples)


def test_choice_takes_the_learning_rate_of_the_nearest_number() -> None:
    assert Cell("t", "performance", 5, None, 0, (1, 2, 3, 4), 8).rate_count == 5
    assert Cell("t", "all", 30, None, 0, tuple(range(30)), 8).rate_count == 30
