"""Token ids in a .npy file, read from disk as they are needed and compared with what was there.

A run's data must not change under it. When the file is opened each block of `BLOCK_BYTES` is
summed (CRC-32); every later read sums the blocks it touches again. A file that was overwritten or
cut short is an error that names it; a memory map would hand on other tokens, or end the process.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxsys.errors import RunError, UsageError

BLOCK_BYTES = 1 << 16
_PASS_BLOCKS = 256
"""Read at a time while the file is summed."""


class TokenFile:
    """An array [N] of token ids on disk; slices are read, whole it is never held.

    Attributes:
        dtype: of the ids.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file and sums its blocks.

        Raises:
            UsageError: if it is not a .npy file of integers [N], or is shorter than it says.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if read is None:
                    raise UsageError(
                        f"{path} is a .npy file of version {version}; 1.0 and 2.0 are read"
                    )
                shape, _, self.dtype = read(file)
                self._offset = file.tell()
        except UsageError:
            raise
        except Exception as error:  # numpy parses the header as Python, and raises as that does
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"{path} is not a readable .npy file: {reason}") from error
        if len(shape) != 1 or self.dtype.kind not in "ui":
            raise UsageError(
                f"{path} holds {self.dtype} {list(shape)}; token ids must be integers [N]"
            )
        self._length = shape[0]
        if self._length < 1:
            raise UsageError(f"{path} holds no tokens")
        wanted = self._offset + self._bytes
        if (found := path.stat().st_size) < wanted:
            raise UsageError(f"{path} has {found} bytes, its header says {wanted}: it is cut short")
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._sums: list[int] = []
        for piece in self._raw_pieces():
            self._sums += [
                zlib.crc32(piece[at : at + BLOCK_BYTES]) for at in range(0, len(piece), BLOCK_BYTES)
            ]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: slice) -> np.ndarray:
        """Ids [start : stop].

        Raises:
            RunError: if the file is not what it was when it was opened.
        """
        start, stop, step = place.indices(self._length)
        if step != 1:
            raise UsageError(f"a slice of {self.path} with step {step}; use 1")
        if stop <= start:
            return np.empty(0, self.dtype)
        item = self.dtype.itemsize
        first, last = start * item // BLOCK_BYTES, (stop * item - 1) // BLOCK_BYTES
        raw = self._read(first * BLOCK_BYTES, (last + 1) * BLOCK_BYTES)
        for block in range(first, last + 1):
            at = (block - first) * BLOCK_BYTES
            if zlib.crc32(raw[at : at + BLOCK_BYTES]) != self._sums[block]:
                raise self._changed("was written to")
        begin = start * item - first * BLOCK_BYTES
        return np.frombuffer(raw, self.dtype, stop - start, begin)

    @property
    def _bytes(self) -> int:
        return self._length * self.dtype.itemsize

    def _raw_pieces(self) -> Iterator[memoryview]:
        each = _PASS_BLOCKS * BLOCK_BYTES
        for start in range(0, self._bytes, each):
            yield self._read(start, start + each)

    def _read(self, start: int, stop: int) -> memoryview:
        stop = min(stop, self._bytes)
        parts, at = [], start
        while at < stop:
            part = os.pread(self._file, stop - at, self._offset + at)
            if not part:
                raise self._changed("was cut short")
            parts.append(part)
            at += len(part)
        return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))

    def _changed(self, what: str) -> RunError:
        return RunError(
            f"{self.path} {what} while the run was reading it; put back what it held and resume, "
            "or start a new run on the new data"
        )
