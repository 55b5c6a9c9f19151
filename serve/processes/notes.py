"""What fronts tell each other of prompts: which blocks of tokens each has sent where.

A front writes into a ring of shared memory that nobody else writes; others read on from where they
have read to, whenever they choose an instance. Whoever is too slow, and whoever is new, reads what
the ring still holds from its beginning: a note that is missed makes an estimate worse, no answer.

    written   8 bytes: of all rounds together
    ring      records: name of the instance, its pages, count of keys; the keys, 16 bytes each
"""

import struct
from collections.abc import Callable, Sequence

from jaxsys.serve.energy.prefix_route import PrefixIndex
from jaxsys.serve.kv_cache import BlockKey

KEY_BYTES = 16
WRITTEN = struct.Struct("=Q")
HEAD = struct.Struct("=32sQQ")
NAME_BYTES = 32


class Notes(PrefixIndex):
    """An index of what all fronts have sent where."""

    def __init__(self, own: memoryview, others: Sequence[memoryview]):
        """
        Args:
            own: ring of this front; what another process left there is read first.
            others: those of the other fronts.
        """
        super().__init__()
        self._own = own
        self._others = [_Reader(one) for one in others]
        _Reader(own).read(super().note)

    def note(self, name: str, keys: Sequence[BlockKey], *, most: int) -> None:
        super().note(name, keys, most=most)
        encoded = name.encode()
        blocks = [key for key in keys if isinstance(key, bytes) and len(key) == KEY_BYTES]
        if blocks and len(encoded) <= NAME_BYTES:
            _write(self._own, HEAD.pack(encoded, most, len(blocks)) + b"".join(blocks))

    def keep_only(self, names: Sequence[str]) -> None:
        """Forgets instances that are gone, behind what others have noted meanwhile."""
        for reader in self._others:
            reader.read(super().note)
        super().keep_only(names)


def _write(ring: memoryview, record: bytes) -> None:
    size = len(ring) - WRITTEN.size
    if len(record) > size // 2:
        return
    (written,) = WRITTEN.unpack_from(ring)
    at = written % size
    if at + len(record) > size:  # no record is in two parts
        written += size - at
        at = 0
    ring[WRITTEN.size + at : WRITTEN.size + at + len(record)] = record
    WRITTEN.pack_into(ring, 0, written + len(record))


class _Reader:
    """One's place in a ring."""

    def __init__(self, ring: memoryview):
        self._ring = ring
        self._size = len(ring) - WRITTEN.size
        self._read = 0

    def read(self, note: Callable[..., None]) -> None:
        """Gives on what was written since the last call."""
        (written,) = WRITTEN.unpack_from(self._ring)
        if written == self._read:
            return
        if written // self._size > self._read // self._size:
            # The rest of the round before may be overwritten by now.
            self._read = written // self._size * self._size
        data = bytes(self._ring[WRITTEN.size :][self._read % self._size : written % self._size])
        self._read = written
        at = 0
        while at + HEAD.size <= len(data):
            name, most, count = HEAD.unpack_from(data, at)
            at += HEAD.size
            end = at + count * KEY_BYTES
            if end > len(data):
                return
            keys = [data[place : place + KEY_BYTES] for place in range(at, end, KEY_BYTES)]
            note(name.rstrip(b"\0").decode(errors="replace"), keys, most=most)
            at = end
