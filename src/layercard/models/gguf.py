"""Models from GGUF files: dequantised by transformers into a plain model with no trace of quantisation.

The header is read here first, without ever trusting a length that it states. `gguf.GGUFReader` walks through as many values as an array
says that it has, whether the file holds them or not, and transformers builds what the fields ask for; so a damaged file of a kilobyte
can take hours. Here each length is held against what is left of the file.

Layout (GGUF 2 and 3): `GGUF`, version, number of tensors, number of fields; fields (name, type, value); tensors (name, shape, type,
offset).
"""

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from layercard.errors import ModelError, one_line
from layercard.files import check_file

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of numbers, as `struct` names them."""
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 8
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
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(type(marked.config).from_dict(settings), dtype=dtype)
    model.load_state_dict(marked.state_dict())
    model.tie_weights()
    if marked.generation_config is not None:
        model.generation_config = marked.generation_config
    return model.eval(), tokenizer


def _check_header(path: Path) -> None:
    """Raise `ModelError` where the header asks for other blocks, or for far more weights, than the file has tensors for."""
    header = read_header(path)
    blocks = header.fields.get(f"{header.fields.get('general.architecture')}.block_count")
    if blocks is not None and blocks != header.blocks:
        raise ModelError(
            f"{path} says that it has {blocks} blocks and holds the tensors of {header.blocks}; it is damaged, so fetch it again"
        )
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if weights > TOLERATED * header.weights:
        raise ModelError(
            f"{path} asks for a model of {weights:,} weights and holds {header.weights:,}; its header is damaged, so fetch it again"
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


class Header(NamedTuple):
    """What a file says of itself: its fields by name (of an array the length), and the shapes of its tensors, fastest dimension first."""

    fields: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def blocks(self) -> int:
        """Blocks that tensors belong to."""
        return len({name.split(".")[1] for name in self.tensors if name.startswith("blk.")})

    @property
    def weights(self) -> int:
        """Numbers in all tensors."""
        return sum(map(math.prod, self.tensors.values()))


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file from its beginning to its end."""
    check_file(path, ModelError, "GGUF file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(path, data)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ModelError(f"{path} cannot be read as a GGUF model ({error}); name a whole file") from None


def _header(path: Path, data: mmap.mmap) -> Header:
    order, position = "<", 0

    def damaged(what: str) -> ModelError:
        return ModelError(
            f"{path} cannot be read as a GGUF model (byte {position:,}: {what}); it is damaged or cut short, so fetch it again"
        )

    def checked(count: int, size: int) -> int:
        """`count`, if the rest of the file can hold so many things of at least `size` bytes."""
        left = len(data) - position
        if count * size > left:
            raise damaged(f"it says that {count:,} things follow, and {left:,} bytes do")
        return count

    def take(count: int) -> bytes:
        nonlocal position
        position += checked(count, 1)
        return data[position - count : position]

    def number(kind: str = "I") -> Any:
        return struct.unpack(order + kind, take(struct.calcsize("=" + kind)))[0]

    def text() -> str:
        return take(number("Q")).decode("utf-8", "replace")

    def value() -> Any:
        kind = number()
        if kind in NUMBERS or kind == STRING:
            return text() if kind == STRING else number(NUMBERS[kind])
        if kind != ARRAY:
            raise damaged(f"a field of type {kind}")
        kind, count = number(), number("Q")
        if kind not in NUMBERS and kind != STRING:
            raise damaged(f"an array of type {kind}")
        if kind == STRING:
            for _ in range(checked(count, 8)):
                take(number("Q"))
        else:
            take(count * struct.calcsize(NUMBERS[kind]))
        return int(count)

    def tensor() -> tuple[str, tuple[int, ...]]:
        name, dimensions = text(), number()
        if dimensions > MOST_DIMENSIONS:
            raise damaged(f"a tensor of {dimensions} dimensions")
        shape = tuple(number("Q") for _ in range(dimensions))
        take(12)  # type and offset
        return name, shape

    if take(4) != b"GGUF":
        raise ModelError(f"{path} cannot be read as a GGUF model (it does not begin with GGUF); name a .gguf file")
    version = number()
    if version & 0xFFFF == 0:  # written on a machine that puts the high byte first
        order, version = ">", version >> 16 & 0xFF
    if version not in (2, 3):
        raise ModelError(f"{path} cannot be read as a GGUF model (version {version}); versions 2 and 3 can be read, so convert it")
    tensors, fields = checked(number("Q"), 24), checked(number("Q"), 13)
    return Header({text(): value() for _ in range(fields)}, dict(tensor() for _ in range(tensors)))
