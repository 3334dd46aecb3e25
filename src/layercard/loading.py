"""From a model's name to its weights and tokenizer: a hub id, a local folder, a `.gguf` file or the embedded model."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils as hub_utils
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from layercard.conversion import read_gguf
from layercard.embedded import EMBEDDED, embedded_folder
from layercard.errors import ModelError, one_line
from layercard.hub import hub_answers

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, how much is done and how much there is."""

CLASSIFIER = "ForSequenceClassification"
"""How transformers names models that put a text into one of several classes."""
_CHOICES = f"name a folder with safetensors, a .gguf file, a hub id or {EMBEDDED}"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def locate(name: str, progress: Progress | None = None) -> str:
    """The folder, `.gguf` file or hub id that a name stands for; the embedded model is fetched if it must be.

    Raises:
        ModelError: There is no such file or folder, or it holds no usable weights.
    """
    if name == EMBEDDED:
        return str(embedded_folder(progress=progress))
    if not name.strip():
        raise ModelError(f"no model is named; {_CHOICES}")
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return str(path)
        raise ModelError(f"{name} is a file but no .gguf file; {_CHOICES}")
    near = _near(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1 or path.suffix == ".gguf"
    if looks_local or (near and "/" not in name):
        raise ModelError(f"{name!r}: no such model{near}; {_CHOICES}")
    return name


def read_model(place: str, dtype: torch.dtype | str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of what `locate` found: a `.gguf` file, or safetensors in a local folder or on the hub.

    Of a vision-language model all parts are read, of a classifier its head too.

    Args:
        place: Folder, `.gguf` file or hub id.
        dtype: A torch dtype, or `auto` for the stored one (float32 for `.gguf`).
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ModelError: It cannot be read, lacks tensors of its own model, or has no tokenizer.
    """
    if place.lower().endswith(".gguf"):
        return read_gguf(Path(place), dtype if isinstance(dtype, torch.dtype) else torch.float32)
    source = place if Path(place).is_dir() or hub_answers() else cached_snapshot(place)
    try:
        kind = auto_class(place, AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code))
        model, info = kind.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except ModelError:
        raise
    except Exception as error:  # transformers, the hub client and safetensors each raise their own kinds
        raise ModelError(_reading_failed(place, error)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        whole = "classifier, its head included" if kind is AutoModelForSequenceClassification else "causal model"
        raise ModelError(f"{place}: its weights lack {len(missing)} of the model's tensors, such as {missing[0]}; use a whole {whole}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise ModelError(f"{place}: its tokenizer cannot be read ({one_line(error)}); put the tokenizer's files beside it") from error
    return model, tokenizer


def refuse_encoder_decoder(name: str, config: PreTrainedConfig) -> None:
    """Raise `ModelError` for a model with two stacks of blocks."""
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder: its two stacks see different tokens, and the gradients of the encoder come through every block "
            "of the decoder, so its layers have no one order to choose from; use a decoder, or an encoder with a classifier's head"
        )


def auto_class(place: str, config: PreTrainedConfig) -> Any:
    """The class of transformers that reads a model, by what its configuration says it was saved as.

    Raises:
        ModelError: It is of a kind that has no loss by next tokens or classes, or no one order of blocks.
    """
    refuse_encoder_decoder(place, config)
    saved = next(iter(config.architectures or ()), "")
    if saved.endswith("ForMaskedLM"):
        raise ModelError(
            f"{place} is a masked language model ({saved}), which predicts no next token; train a head on it "
            f"(…{CLASSIFIER}) and name that, or name a causal model"
        )
    if saved.endswith(CLASSIFIER):
        return AutoModelForSequenceClassification
    pictures = saved in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() and saved not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return AutoModelForImageTextToText if pictures else AutoModelForCausalLM


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the progress bars and log lines of transformers and the hub client, and restore them afterwards."""
    levels = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    bars, hub_bars = hf_logging.is_progress_bar_enabled(), not hub_utils.are_progress_bars_disabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hub_logging.set_verbosity(hub_logging.CRITICAL)
    hf_logging.disable_progress_bar()
    if hub_bars:
        hub_utils.disable_progress_bars()
    try:
        yield
    finally:
        hf_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars:
            hf_logging.enable_progress_bar()
        if hub_bars:
            hub_utils.enable_progress_bars()


def _near(name: str) -> str:
    """`, did you mean …?` for a misspelt embedded model or a misspelt neighbour in the same folder, else nothing."""
    path = Path(name).expanduser()
    try:
        beside = [str(path.parent / other.name) for other in path.parent.iterdir() if other.is_dir() or other.suffix == ".gguf"]
    except OSError:
        beside = []
    known = {candidate.lower(): candidate for candidate in [*beside, EMBEDDED]}
    close = difflib.get_close_matches(str(path).lower(), list(known), n=1, cutoff=0.75)
    return f", did you mean {known[close[0]]}?" if close else ""


def _check_folder(folder: Path) -> None:
    """Refuse a local folder that holds no configuration or no safetensors weights, naming what it holds."""
    found = sorted(item.name for item in folder.iterdir())
    if "config.json" in found and any(item.endswith(".safetensors") and not item.startswith("adapter_") for item in found):
        return
    gguf = [item for item in found if item.lower().endswith(".gguf")]
    pickled = [item for item in found if item.endswith(_PICKLED) and item != "training_args.bin"]
    if gguf:
        raise ModelError(f"{folder} holds a GGUF file, not a model folder; name the file itself: {folder / gguf[0]}")
    if "adapter_config.json" in found:
        raise ModelError(f"{folder} holds an adapter without its base model; name the base model's folder or hub id")
    if "config.json" not in found:
        raise ModelError(f"{folder} is no model folder: it has no config.json; name a folder written by save_pretrained")
    if pickled:
        raise ModelError(f"{folder} has only pickled weights ({pickled[0]}), which can run code when read; convert them to safetensors")
    raise ModelError(f"{folder} has a config.json but no weights (*.safetensors); copy the weights there or name another folder")


def cached_snapshot(name: str) -> str:
    try:
        return huggingface_hub.snapshot_download(name, local_files_only=True)
    except Exception as error:  # not in the cache, or no well formed id
        message = f"{name!r} is no local folder{_near(name)}, the hub cannot be reached and its cache has no such model; {_CHOICES}"
        raise ModelError(message) from error


def _reading_failed(place: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"{place} needs code that comes with the model; read that code, then allow it with trust_remote_code"
    if Path(place).is_dir():
        return f"{place} cannot be read as a causal language model ({one_line(error)}); mend the folder or name another model"
    return f"{place!r} is no local folder{_near(place)}, and the hub did not give it ({one_line(error)}); {_CHOICES}"
