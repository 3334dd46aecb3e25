"""`layercard run`: the race's decisions on made-up heats, and the whole recipe on a tiny model."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import layercard
from layercard.commands.main import run as command
from layercard.commands.run import Inputs
from layercard.errors import TrainingError
from layercard.models.losses import RecordLosses
from layercard.selection.learning_rate import Length, moved, usual_rate
from layercard.settings import DataSettings, LoadSettings, RunSettings, TrainSettings
from layercard.trials.race import Entrant, Heat, choose, race_shape
from layercard.trials.workers import Workers
from layercard.workflow import run as workflow
from tiny import tiny_records, write_records

TOKENS = torch.full((40,), 10.0, dtype=torch.float64)
BEFORE = RecordLosses(30 * torch.ones(40, dtype=torch.float64), TOKENS)


def heat(name: str, loss: float, seconds: float, memory: int = 100) -> Heat:
    entrant = Entrant(name=name, layers=(0, 1), learning_rate=1e-3)
    nats = tuple((loss * TOKENS).tolist())
    how = {"learning_rate": 1e-3, "step_seconds": seconds, "peak_memory_bytes": memory, "trainable_parameters": 1, "seconds": 1.0}
    return Heat(entrant=entrant, steps=8, loss=loss, nats=nats, **how)


@pytest.mark.parametrize(
    ("objective", "tolerance", "expected"),
    [("time", 0.01, "best"), ("time", 0.1, "fast"), ("memory", 0.1, "small"), ("quality", 0.1, "best")],
)
def test_choice_is_the_cheapest_within_the_tolerance(objective, tolerance, expected):
    heats = [heat("best", 1.00, 3.0, 300), heat("fast", 1.02, 1.0, 200), heat("small", 1.03, 2.0, 100), heat("bad", 1.5, 0.1, 1)]
    chosen, why = choose(heats, BEFORE, objective, tolerance)
    assert chosen.entrant.name == expected
    assert expected in why


def test_choice_wants_certainty():
    """A difference of exactly the tolerance is as likely above as below it."""
    chosen, why = choose([heat("best", 1.0, 3.0), heat("edge", 1.01, 1.0)], BEFORE, "time", 0.01)
    assert chosen.entrant.name == "best" and "only with 50 %" in why


def test_rates_move_with_the_length():
    short, usual, long = Length(40), Length(1000), Length(4000)
    assert moved(moved(0.002, usual, short), short, usual) == pytest.approx(0.002)
    assert moved(0.002, usual, short) > 0.002 > moved(0.002, usual, long) > moved(0.002, usual, Length(4000, passes=3))
    assert moved(0.002, short, Length(40, passes=0.2)) == 0.002
    assert usual_rate(576, usual, 0.5) > usual_rate(576, usual) > usual_rate(1024, usual)


def test_race_fits_its_budget():
    for budget in (10, 24, 40, 80, 150, 600):
        shape = race_shape(2000, budget, 4)
        if shape is not None:
            assert shape.heats() * (shape.steps + shape.judges / 12) <= budget
    assert race_shape(2000, 10, 4) is None
    assert race_shape(2000, 600, 4).final


@pytest.mark.parametrize("text", ["60", "8", "1e3", "half", "-3m", "nan m", "5parsecs"])
def test_bare_limits_are_refused(text):
    for name in ("max_time", "max_memory", "search", "tolerance"):
        with pytest.raises(TrainingError, match="unit"):
            RunSettings(**{name: text})


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[str]:
    data = write_records(tmp_path / "data.jsonl", tiny_records(60))
    return ["run", str(tiny_folder), "--data", str(data), "-o", str(tmp_path / "out"), "--epochs", "6", "--search", "150%", "--json"]


def files(folder: Path) -> dict[str, object]:
    return {name: json.loads((folder / name).read_text()) for name in ("race.json", "placement.json", "result.json")}


def test_run_leaves_every_step_and_goes_on_after_interrupts(arguments, tmp_path, capsys, monkeypatch):
    assert command(arguments) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    out = tmp_path / "out"
    first = files(out)
    assert result["schema"] == "layercard-result/1" and result == first["result.json"]
    assert result["measured"]["loss_after"] < result["measured"]["loss_before"]
    assert result["chosen"]["learning_rate"] == first["placement.json"]["learning_rate"] == first["race.json"]["chosen"]["learning_rate"]
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((out / "adapter" / "run.json").read_text())["settings"]["learning_rate"] == result["chosen"]["learning_rate"]
    assert "are held out" in captured.err and "search:" in captured.err

    # The same command again does nothing again; with other settings it is refused.
    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(workflow, "train", refuse)
        patch.setattr(workflow, "held_out_losses", refuse)
        assert command(arguments) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert command([*arguments, "--rank", "4"]) == 2
    assert "rank" in capsys.readouterr().err

    # Interrupted after one training of the race, and after all of them, it goes on to the same choice.
    for before_interrupt in (1, len(first["race.json"]["heats"])):
        assert command([*arguments, "--force", "--plan"]) == 0
        assert (out / "result.json").exists()  # a plan removes nothing
        trainings = iter(range(before_interrupt))

        def interrupt(*args, _train=workflow.train, _left=trainings, **kwargs):
            if next(_left, None) is None:
                raise KeyboardInterrupt
            return _train(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("layercard.trials.trial.train", interrupt)
            patch.setattr(workflow, "train", interrupt)
            assert command([*arguments, "--force"]) == 130
        assert not (out / "result.json").exists()
        assert command(arguments) == 0
        assert files(out)["placement.json"]["layers"] == first["placement.json"]["layers"]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--records", "12"], "at least"),
        (["--max-time", "0.001s"], "--max-time"),
        (["--max-time", "60"], "unit"),
        (["--objective", "tiem"], "did you mean"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line(arguments, capsys, change, message):
    assert command([*arguments, *change]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("error: ")


def test_a_model_larger_than_the_memory_is_refused_with_the_way_on(arguments, capsys, monkeypatch):
    monkeypatch.setattr("layercard.cost.estimate.free_bytes", lambda device: 1000)
    assert command(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "of memory are free" in line and line.endswith(
        "profile, select and train do a run's work in steps, with --stream for a model on disk"
    )


def test_plan_stops_before_the_search(arguments, tmp_path, capsys):
    assert command([*arguments[:-1], "--plan"]) == 0
    assert "search:" in capsys.readouterr().out
    assert not (tmp_path / "out" / "race").exists()


def test_tune_makes_a_placement_that_train_uses(arguments, tmp_path, capsys):
    words = ["tune", *arguments[1:]]
    recipe = tmp_path / "recipe.yml"
    assert command([*words, "--save-recipe", str(recipe)]) == 0
    raced = json.loads(capsys.readouterr().out)
    placement = json.loads((tmp_path / "out" / "placement.json").read_text())
    assert placement["learning_rate"] == raced["chosen"]["learning_rate"]
    assert not (tmp_path / "out" / "adapter").exists()
    train = ["train", words[1], "--data", words[3], "--placement", str(tmp_path / "out" / "placement.json"), "--steps", "2", "--json"]
    assert command([*train, "-o", str(tmp_path / "adapter")]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    raced_for = Length(placement["learning_rate_steps"], placement["learning_rate_passes"])
    passes = 2 * settings["batch_size"] / len(Path(words[3]).read_text().splitlines())
    expected = moved(placement["learning_rate"], raced_for, Length(2, passes))
    assert settings["learning_rate"] == pytest.approx(expected, rel=5e-3)  # three digits

    # The recipe says the same, and the command line has the last word.
    assert command(["tune", "--recipe", str(recipe), "-o", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["layers"] == raced["chosen"]["layers"]
    recipe.write_text(recipe.read_text().replace("batch_size:", "bath_size:"))
    assert command(["tune", "--recipe", str(recipe), "-o", str(tmp_path / "third")]) == 2
    assert "batch_size" in capsys.readouterr().err


def test_workers_come_to_the_same_choice(arguments, tmp_path, capsys):
    chosen = []
    for number, more in enumerate(([], ["--workers", "2"])):
        words = ["tune", *arguments[1:], "--objective", "memory", *more]
        words[words.index("-o") + 1] = str(tmp_path / f"out{number}")
        assert command(words) == 0
        chosen.append(json.loads(capsys.readouterr().out))
    assert_same_race(*chosen)


def test_from_python(tiny_folder, tmp_path):
    records = tiny_records(40)
    result = layercard.run(str(tiny_folder), records, tmp_path / "out", training=layercard.TrainSettings(steps=12))
    assert result.measured.loss_after < result.measured.loss_before
    assert result.steps == 12 and result.verdict in ("adapt", "all layers")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_comes_to_the_same_choice(arguments, tmp_path, capsys):
    pytest.importorskip("ray")
    chosen = []
    for number, more in enumerate(([], ["--workers", "2", "--ray", "local"])):
        words = ["tune", *arguments[1:], "--objective", "memory", *more]
        words[words.index("-o") + 1] = str(tmp_path / f"out{number}")
        assert command(words) == 0
        chosen.append(json.loads(capsys.readouterr().out))
    assert_same_race(*chosen)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_of_ray_killed_in_the_middle_changes_nothing(arguments, tiny_folder, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    inputs = Inputs(str(tiny_folder), [arguments[3]], None, None, None, DataSettings(), LoadSettings())
    base, data, _ = inputs.read(None)
    how = {"settings": RunSettings(objective="memory", search="150%"), "training": TrainSettings(epochs=6)}
    alone = workflow.tune(base, data, tmp_path / "alone", **how)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=1)
    killed: list[str] = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "train" and not killed:
            cluster.remove_node(doomed, allow_graceful=False)
            killed.append(phase)

    try:
        where = {"workers": Workers(2, cluster.address), "open_records": partial(inputs.read, None), "progress": progress}
        together = workflow.tune(base, data, tmp_path / "together", **how, **where)
    finally:
        cluster.shutdown()
    assert killed
    assert alone.race is not None and together.race is not None
    assert_same_race(alone.race.to_json(), together.race.to_json())


def assert_same_race(one: dict[str, object], other: dict[str, object]) -> None:
    """The same heats with the same losses, and the same choice, to rounding."""
    assert [heat["loss"] for heat in one["heats"]] == pytest.approx([heat["loss"] for heat in other["heats"]], rel=1e-4)
    assert {**one["chosen"], "learning_rate": 0} == {**other["chosen"], "learning_rate": 0}
    assert one["chosen"]["learning_rate"] == pytest.approx(other["chosen"]["learning_rate"], rel=1e-3)


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).resolve().parents[1] / "examples" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_recipes_of_the_examples_run(recipe: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Each with a tiny model on this machine; what is on the command line goes first."""
    data = write_records(tmp_path / "data.jsonl", tiny_records(48))
    words = ["run", str(tiny_folder), "--data", str(data), "-o", str(tmp_path / "out"), "--recipe", str(recipe), "--device", "cpu"]
    assert command([*words, "--plan"]) == 0
