"""The safetensors format, read memory-mapped and written as a stream.

A file is: header length (8 bytes, little-endian), a JSON header naming each tensor's dtype, shape
and byte range, then the bytes. Written out here because the numpy side of the `safetensors` package
has no bfloat16 on reading and wants all tensors of a file in memory on writing.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxsys.errors import UsageError
from jaxsys.fields import Fields
from jaxsys.files import parse_json, refuse_pointer, shown

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The float types that weights come in."""

STORED: dict[str, np.dtype] = {
    **DTYPES,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""Those, and what parts of quantised weights come in."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
MOST_CONTAINERS = 1_000_000
"""Three for each tensor of a header; published files have up to 100,000 tensors."""
MOST_AXES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One tensor of a header: bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One open file, its tensors read on demand from a memory map.

    Attributes:
        shapes: of every tensor, by name.

    Raises:
        UsageError: on opening, if the file is cut short or its header makes no sense.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_pointer(path)
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or length > min(size - 8, MAX_HEADER_BYTES):
                raise UsageError(
                    f"{path} is not a whole safetensors file: {size} bytes do not hold its header; "
                    "fetch it again"
                )
            self._entries = _parse_header(file.read(length), path)
        self._start = 8 + length
        needed = self._start + max((entry.end for entry in self._entries.values()), default=0)
        if size != needed:
            fault = "cut short" if size < needed else "longer than it says"
            raise UsageError(
                f"{path} is {fault}: {size} bytes where its header needs {needed}; fetch it again"
            )
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self._bytes = np.memmap(path, np.uint8, mode="r")

    def read(self, name: str) -> np.ndarray:
        """A view of one tensor's bytes in the file; valid while it is held.

        Raises:
            UsageError: if its dtype is no float type known here, or its size is not its shape's.
        """
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise UsageError(
                f"{self.path}: tensor {name!r} is {shown(entry.dtype)[1:-1]}, which is not read as "
                f"weights; known: {', '.join(DTYPES)}. Use the model's files in one of these"
            )
        return self._view(name, entry, DTYPES[entry.dtype])

    def stored_dtype(self, name: str) -> str:
        """What the format calls a tensor's dtype."""
        return self._entries[name].dtype

    def read_as(self, name: str, *dtypes: str) -> np.ndarray:
        """As `read`, of a tensor in one of some dtypes of `STORED`."""
        entry = self._entries[name]
        if entry.dtype not in dtypes:
            raise UsageError(
                f"{self.path}: tensor {name!r} is {shown(entry.dtype)[1:-1]}, not "
                f"{' or '.join(dtypes)}"
            )
        return self._view(name, entry, STORED[entry.dtype])

    def read_bytes(self, name: str) -> np.ndarray:
        """As `read`, of a tensor of unsigned bytes."""
        return self.read_as(name, "U8")

    def _view(self, name: str, entry: _Entry, dtype: np.dtype) -> np.ndarray:
        if entry.end - entry.begin != math.prod(entry.shape) * dtype.itemsize:
            raise UsageError(
                f"{self.path}: tensor {name!r} has {entry.end - entry.begin} bytes, not those of "
                f"{entry.shape} {entry.dtype}"
            )
        # The format does not align tensors to their element size, so a view could be misaligned;
        # numpy reads those rightly.
        raw = self._bytes[self._start + entry.begin : self._start + entry.end]
        return raw.view(dtype).reshape(entry.shape)


def _parse_header(text: bytes, path: Path) -> dict[str, _Entry]:
    """Raises UsageError unless the tensors lie end to end, each with a dtype and a shape."""
    name = f"{path} has no valid safetensors header"
    value = parse_json(text, name=name, most_containers=MOST_CONTAINERS, unique=True)
    header = Fields(value, name=name, hint="fetch it again")
    entries: dict[str, _Entry] = {}
    for tensor in header:
        if tensor == "__metadata__":
            continue
        fields = header.fields(tensor)
        shape, offsets = fields.array("shape", of=int), fields.array("data_offsets", of=int)
        if len(shape) > MOST_AXES or min(shape, default=0) < 0:
            raise fields.wrong("shape", f"at most {MOST_AXES} sizes of at least 0", shape)
        if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
            raise fields.wrong("data_offsets", "where bytes begin and end", offsets)
        entries[tensor] = _Entry(
            dtype=fields.text("dtype"), shape=tuple(shape), begin=offsets[0], end=offsets[1]
        )
    end = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise header.fault(
                f"tensor {shown(tensor)} begins at byte {entry.begin}, where {end} were taken"
            )
        end = entry.end
    return entries


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorToWrite:
    """A tensor whose values are asked for only when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]
    """Its values, some rows after the other."""

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[TensorToWrite]) -> None:
    """Writes one file, holding some rows of a tensor in memory at a time.

    Raises:
        UsageError: if a dtype is no float type of the format known here.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # transformers refuses files that do not say which framework's layout they follow.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        if tensor.dtype not in codes:
            raise UsageError(
                f"tensor {tensor.name!r} of dtype {tensor.dtype} cannot be saved; "
                f"known: {', '.join(map(str, codes))}"
            )
        header[tensor.name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size_bytes],
        }
        offset += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin on an 8-byte boundary
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                values = np.ascontiguousarray(piece, tensor.dtype)
                if values.shape[1:] != tensor.shape[1:]:
                    raise UsageError(f"{tensor.name}: values {values.shape}, said {tensor.shape}")
                file.write(values.view(np.uint8).data)
                written += values.nbytes
            if written != tensor.size_bytes:
                raise UsageError(
                    f"{tensor.name}: {written} bytes of values, said {tensor.size_bytes}"
                )
