"""Models from GGUF files: dequantised by transformers into a plain model with no trace of quantisation."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from layercard.errors import ModelError


def read_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a `.gguf` file.

    transformers reads the weights into a model marked as quantised, which trainers refuse; so they are put into a fresh model of
    the same configuration without that mark. Reading 135 million weights takes about 20 s.

    Raises:
        ModelError: The file cannot be read, is cut short, or is of a family that transformers cannot convert.
    """
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        _check_blocks(path)
        with _without_bars():
            marked = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(**place)
    except ModelError:
        raise
    except Exception as error:  # the readers raise struct, key, value and their own errors on broken files
        detail = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(f"{path} cannot be read as a GGUF model ({detail}); it may be cut short or of an unknown family") from error
    settings = {key: value for key, value in marked.config.to_dict().items() if key != "quantization_config"}
    config = type(marked.config).from_dict(settings)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(marked.state_dict())
    model.tie_weights()
    if marked.generation_config is not None:
        model.generation_config = marked.generation_config
    return model.eval(), tokenizer


def _check_blocks(path: Path) -> None:
    """Raise `ModelError` where the header counts other blocks than there are tensors of: the rest would be filled at random."""
    reader = GGUFReader(path)
    family = str(reader.fields["general.architecture"].contents())
    said = int(reader.fields[f"{family}.block_count"].contents())
    held = {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")}
    if said != len(held):
        raise ModelError(f"{path} says that it has {said} blocks and holds the tensors of {len(held)}; it is damaged, so fetch it again")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Draw no bars of tqdm's: transformers draws one for each pass over the tensors, and its own switch does not reach it."""
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original
