"""Whether a GGUF file's header lies within the file, asked before its values are taken in.

The `gguf` package makes an array object for every element that a header declares, and does not end
where the file does. So lengths and counts are walked through first, at no cost in memory.

A header is: magic, version, number of tensors, number of metadata; then each metadatum (key, type,
value) and each tensor (name, number of axes, sizes, type, offset). A string is a 64-bit length and
its bytes; an array is its elements' type, a 64-bit count and the elements. Source: ggml's
docs/gguf.md, versions 2 and 3.
"""

import mmap
import struct
from pathlib import Path

import gguf

from jaxsys.errors import UsageError
from jaxsys.files import refuse_pointer, shown

MAGIC = b"GGUF"
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type -> bytes of its values."""
STRING, ARRAY = 8, 9
MOST_VALUES = 4_000_000
"""Of metadata, elements of arrays counted; a vocabulary of 262,144 takes some 1,300,000."""
MOST_TENSORS = 200_000
MOST_AXES = 4
KINDS = frozenset(int(kind) for kind in gguf.GGMLQuantizationType)
"""Of tensors' numbers."""


def check_header(path: Path) -> None:
    """Walks through a file's header.

    Raises:
        UsageError: if it is no GGUF, or its bytes lie the other way round, or a length or count in
            it goes beyond the file.
    """
    try:
        refuse_pointer(path)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            _Walk(path, content).header()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UsageError:  # is a ValueError
        raise
    except ValueError:  # an empty file cannot be mapped
        raise UsageError(f"{path} is not a whole GGUF file (it is empty); fetch it again") from None


class _Walk:
    """A place in a header, of which it is known that everything before it is in the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at, self._values = path, content, 0, 0

    def header(self) -> None:
        if self._content[:4] != MAGIC:
            raise self._fault("it does not begin with GGUF")
        self._skip(4)
        (version,) = struct.unpack("<I", self._content[4:8].ljust(4, b"\0"))
        if version and version & 0xFFFF == 0:
            raise UsageError(
                f"{self._path} has its bytes in big-endian order, which is not read; turn them "
                "with the gguf package: gguf-convert-endian FILE little"
            )
        self._number(4)
        tensors, metadata = self._number(8), self._number(8)
        if tensors > MOST_TENSORS:
            raise self._fault(f"it declares {tensors} tensors; at most {MOST_TENSORS} are read")
        for _ in range(metadata):
            self._string()
            self._value(self._number(4))
        for _ in range(tensors):
            start = self._at + 8
            self._string()
            name = self._content[start : self._at]
            axes = self._number(4)
            if axes > MOST_AXES:
                raise self._fault(f"a tensor has {axes} axes; at most {MOST_AXES} are known")
            self._skip(8 * axes)
            kind = self._number(4)
            if kind not in KINDS:
                raise UsageError(
                    f"{self._path}: tensor {shown(name.decode(errors='replace'))} is quantised as "
                    f"type {kind}, which is not known; use another quantisation of this model"
                )
            self._skip(8)

    def _value(self, kind: int, *, inner: bool = False) -> None:
        self._count(1)
        if kind in SCALAR_BYTES:
            self._skip(SCALAR_BYTES[kind])
        elif kind == STRING:
            self._string()
        elif kind == ARRAY and not inner:
            element, count = self._number(4), self._number(8)
            self._count(count)
            if element in SCALAR_BYTES:
                self._skip(SCALAR_BYTES[element] * count)
            else:
                for _ in range(count):
                    self._value(element, inner=True)
        else:
            raise self._fault(f"a value of type {kind} at byte {self._at} is not known")

    def _count(self, values: int) -> None:
        self._values += values
        if self._values > MOST_VALUES:
            raise self._fault(f"it declares more than {MOST_VALUES} values, the most that is read")

    def _string(self) -> None:
        self._skip(self._number(8))

    def _number(self, size: int) -> int:
        at = self._at
        self._skip(size)
        return int.from_bytes(self._content[at : at + size], "little")

    def _skip(self, size: int) -> None:
        if size > len(self._content) - self._at:
            raise self._fault(f"its header goes on behind its end, {len(self._content)} bytes")
        self._at += size

    def _fault(self, what: str) -> UsageError:
        return UsageError(
            f"{self._path} is not a whole GGUF file ({what}); fetch it again or check the name"
        )
