"""Fixtures for all tests: tiny models (`tiny.py`), tiny data files, and the data sets beside the repository."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

if TYPE_CHECKING:
    from layercard.models.load import BaseModel

torch.set_num_threads(1)  # results are compared bit for bit, and with those of child processes
collect_ignore = ["golden", "faults/warm.py", "fuzzing/coverage.py"]  # files for others to read; programs of their own
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _frozen_modules() -> None:
    """transformers collects garbage after each training, half a second where it has to walk over all that is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _cards_of_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cards that `layercard profile` keeps in tests do not go into the user's cache."""
    os.environ["LAYERCARD_CARDS"] = str(tmp_path_factory.mktemp("cards"))


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model("llama", seed=0, num_hidden_layers=5)`: a fresh tiny model."""
    return build_tiny


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, with end token, padding token and chat template."""
    return tiny_tokenizer()


@pytest.fixture
def tiny_base() -> "BaseModel":
    """A tiny Llama with its tokenizer, as `load_model` would give it."""
    from layercard.models.load import wrap_model

    return wrap_model(build_tiny("llama"), tiny_tokenizer(), name="tiny-llama")


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """A JSON Lines file with 16 `prompt` + `completion` records."""
    return write_records(tmp_path / "tiny.jsonl", tiny_records(16))


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A saved tiny Llama with its tokenizer, as a local model folder."""
    folder = tmp_path / "tiny-llama"
    build_tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def shared_data() -> Path:
    """The folder with the E2E, WebNLG and GSM8K samples; skips where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: this test reads real data")
    return folder


@pytest.fixture
def layercard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`layercard("show", path)` in an empty folder: exit status, stdout and stderr."""
    import re
    import shlex

    from layercard.commands.main import ROOT, run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        # What comes next can be pasted: a command that is there, with options that it has.
        for line in re.findall(r"next: layercard (.*)", printed.out + printed.err):
            name, *words = shlex.split(line)
            ROOT.commands[name].make_context(name, words)
        return status, printed.out, printed.err

    return command
