"""Models from GGUF files: dequantised by transformers into a plain model with no trace of quantisation."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from layercard.errors import ModelError, one_line
from layercard.models.gguf import read_header

TOLERATED = 1.5
"""Times the weights of the file that its model may have: a tied head, and vectors that some families leave out, are no damage."""


def read_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a `.gguf` file.

    transformers reads the weights into a model marked as quantised, which trainers refuse; so they are put into a fresh model of
    the same configuration without that mark. Reading 135 million weights takes about 20 s.

    Raises:
        ModelError: The file cannot be read, is cut short, or is of a family that transformers cannot convert.
    """
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with _without_bars():
            _check_header(path)
            marked, info = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(**place)
    except ModelError:
        raise
    except Exception as error:  # the readers raise struct, key, value and their own errors on broken files
        detail = one_line(error)
        raise ModelError(f"{path} cannot be read as a GGUF model ({detail}); it may be cut short or of an unknown family") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{path} holds no weights for {missing[0]}, which would be random ({len(missing)} such); fetch it again")
    settings = {key: value for key, value in marked.config.to_dict().items() if key != "quantization_config"}
    config = type(marked.config).from_dict(settings)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(marked.state_dict())
    model.tie_weights()
    if marked.generation_config is not None:
        model.generation_config = marked.generation_config
    return model.eval(), tokenizer


def _check_header(path: Path) -> None:
    """Raise `ModelError` where the header asks for other blocks, or for far more weights, than the file has tensors for."""
    header = read_header(path)
    said = header.fields.get(f"{header.fields.get('general.architecture')}.block_count")
    if said is not None and said != header.blocks:
        raise ModelError(
            f"{path} says that it has {said} blocks and holds the tensors of {header.blocks}; it is damaged, so fetch it again"
        )
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        wanted = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if wanted > TOLERATED * header.weights:
        raise ModelError(
            f"{path} asks for a model of {wanted:,} weights and holds {header.weights:,}; its header is damaged, so fetch it again"
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Draw no bars of tqdm's: transformers draws one for each pass over the tensors, and its own switch does not reach it."""
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original
