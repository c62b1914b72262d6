"""What a safetensors file holds, out of its header alone: `length | header | tensors`."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_MOST_BYTES: Final = 64 * 2**20
_LENGTH_BYTES: Final = 8
_SAFETENSORS: Final = "a safetensors file"


class HeaderError(ValueError):
    """The header can't be read, or does not fit the file.

    Attributes:
        got: What was found.
        expected: What was expected.
    """

    def __init__(self, got: str, expected: str = _SAFETENSORS) -> None:
        """Name both."""
        self.got, self.expected = got, expected
        super().__init__(f"got {got}, expected {expected}")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by name.

    Raises:
        HeaderError: The header is damaged, lies, or disagrees with the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else 0
        if not len("{}") <= length <= min(size - _LENGTH_BYTES, _MOST_BYTES):
            raise HeaderError(f"a header of {length} bytes in a file of {size}")
        header = file.read(length)
    try:
        tensors = {name: part for name, part in json.loads(header).items() if name != "__metadata__"}
        end = max((_whole(part["data_offsets"])[1] for part in tensors.values()), default=0)
        shapes = {name: _whole(part["shape"]) for name, part in tensors.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise HeaderError(f"no readable header ({type(error).__name__})") from error
    if end != size - _LENGTH_BYTES - length:
        raise HeaderError(f"{size} bytes", f"{end + _LENGTH_BYTES + length}, as its header says")
    return shapes


def num_weights(shapes: dict[str, tuple[int, ...]]) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def _whole(numbers: list[int]) -> tuple[int, ...]:
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(numbers)
    return tuple(numbers)
