"""The header of a GGUF file: its fields and the shapes of its tensors, read without ever trusting a length that it states.

`gguf.GGUFReader` walks through as many values as an array says that it has, whether the file holds them or not, and transformers builds
what the fields ask for; so a damaged file of a kilobyte can take hours. Here each length is held against what is left of the file first.

Layout (GGUF 2 and 3): `GGUF`, version, number of tensors, number of fields; fields (name, type, value); tensors (name, shape, type,
offset).
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercard.errors import ModelError

SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of numbers, as `struct` names them."""
STRING, ARRAY = 8, 9
DIMENSIONS = 8
"""A tensor has no more."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        fields: Numbers and texts by name; of an array its length.
        tensors: Shapes by name, the fastest dimension first, as the file has them.
    """

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
    """Read the header of a GGUF file.

    Raises:
        ModelError: It is none, it is cut short, or a length in it is longer than the file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(path, data).header()
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ModelError(f"{path} cannot be read as a GGUF model ({error}); name a whole file") from None


class _Walk:
    """Goes through a header from its beginning."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.order = path, data, 0, "<"

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise ModelError(f"{self.path} cannot be read as a GGUF model (it does not begin with GGUF); name a .gguf file")
        version = self._number("I")
        if version & 0xFFFF == 0:
            self.order, version = ">", version >> 16 & 0xFF
        if version not in (2, 3):
            raise ModelError(f"{self.path} cannot be read as a GGUF model (version {version}); versions 2 and 3 can be read, so convert it")
        tensors, fields = self._length(self._number("Q"), 24), self._length(self._number("Q"), 13)
        found = {self._text(): self._value(self._number("I")) for _ in range(fields)}
        return Header(found, dict(self._tensor() for _ in range(tensors)))

    def _tensor(self) -> tuple[str, tuple[int, ...]]:
        name, dimensions = self._text(), self._number("I")
        if dimensions > DIMENSIONS:
            raise self._damaged(f"a tensor of {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        self._bytes(12)
        return name, shape

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            return self._array()
        if kind not in SIZES:
            raise self._damaged(f"a field of type {kind}")
        return self._number(SIZES[kind])

    def _array(self) -> int:
        kind, count = self._number("I"), self._number("Q")
        if kind == STRING:
            for _ in range(self._length(count, 8)):
                self._bytes(self._number("Q"))
        elif kind in SIZES:
            self._bytes(count * struct.calcsize(SIZES[kind]))
        else:
            raise self._damaged(f"an array of type {kind}")
        return int(count)

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", "replace")

    def _number(self, kind: str) -> Any:
        return struct.unpack(self.order + kind, self._bytes(struct.calcsize("=" + kind)))[0]

    def _bytes(self, count: int) -> bytes:
        self._length(count, 1)
        self.at += count
        return self.data[self.at - count : self.at]

    def _length(self, count: int, size: int) -> int:
        """`count`, if the rest of the file can hold so many things of `size` bytes at least."""
        left = len(self.data) - self.at
        if count * size > left:
            raise self._damaged(f"it says that {count:,} things follow, and {left:,} bytes do")
        return count

    def _damaged(self, what: str) -> ModelError:
        return ModelError(
            f"{self.path} cannot be read as a GGUF model (byte {self.at:,}: {what}); it is damaged or cut short, so fetch it again"
        )
