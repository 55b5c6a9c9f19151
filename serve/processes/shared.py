"""What several fronts of one server count together, in memory that all of them map.

Each front counts its own requests in cells that nobody else writes, and a number of them all is the
sum of its cells: nobody waits for an answer, and what a front that is gone has counted is taken out
when another takes its place.

    cells   [number][front]   int64; number 0: requests in the server, then those in flight at each
                              instance, then those of each adapter
    notes   [front]           see `notes`
"""

import contextlib
import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator

CELL_BYTES = 8
NOTES_BYTES = 4 << 20
"""For what each front sent where: 260,000 pages' keys."""


class Tally:
    """A number that several count, as one of them sees it."""

    __slots__ = ("_cells", "_own")

    def __init__(self, cells: memoryview, own: int):
        """
        Args:
            cells: one for each front.
            own: the place of this one.
        """
        self._cells = cells
        self._own = own

    def add(self, change: int) -> None:
        """Counts; on one thread of this process only."""
        self._cells[self._own] += change

    def total(self) -> int:
        """What all of them have counted."""
        return sum(self._cells)


class Shared:
    """The memory of one server."""

    def __init__(self, file: int, *, fronts: int, instances: int, adapters: int):
        """
        Args:
            file: descriptor of the memory, as `create` made it.
            instances: most of them that there are at once.
            adapters: the same.
        """
        self.file = file
        self.fronts = fronts
        self.instances = instances
        self.adapters = adapters
        counted = _cell_bytes(fronts, instances, adapters)
        self._memory = mmap.mmap(file, counted + fronts * NOTES_BYTES)
        whole = memoryview(self._memory)
        self._cells = whole[:counted].cast("q")
        self._notes = whole[counted:]

    @classmethod
    def create(cls, *, fronts: int, instances: int, adapters: int) -> "Shared":
        """Memory of nobody else, all zeros; children inherit its descriptor where they are given
        it."""
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("jaxsys-fronts")
        else:  # a file without a name
            with tempfile.TemporaryFile() as opened:
                file = os.dup(opened.fileno())
        os.ftruncate(file, _cell_bytes(fronts, instances, adapters) + fronts * NOTES_BYTES)
        return cls(file, fronts=fronts, instances=instances, adapters=adapters)

    def requests(self, front: int) -> Tally:
        """Requests that have not ended."""
        return self._tally(0, front)

    def instance(self, place: int, front: int) -> Tally:
        """Those in flight at one instance."""
        return self._tally(1 + place, front)

    def adapter(self, place: int, front: int) -> Tally:
        """Those that are computed with one adapter."""
        return self._tally(1 + self.instances + place, front)

    def notes(self, front: int) -> memoryview:
        """Where a front writes what it sent where, and others read it."""
        return self._notes[front * NOTES_BYTES : (front + 1) * NOTES_BYTES]

    def clear(self, front: int) -> None:
        """Takes out what a front has counted, which must not run any more."""
        for at in range(front, len(self._cells), self.fronts):
            self._cells[at] = 0

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out; whoever dies lets go of it."""
        fcntl.lockf(self.file, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, 0)

    def _tally(self, number: int, front: int) -> Tally:
        return Tally(self._cells[number * self.fronts : (number + 1) * self.fronts], front)


class SharedCrowd:
    """Requests of all fronts, as one of them counts; on the event loop's thread."""

    def __init__(self, shared: Shared, front: int):
        self.lock = shared.lock
        self.places: dict[str, int] = {}
        """Of adapters' keys."""
        self._shared = shared
        self._front = front
        self._requests = shared.requests(front)
        self._adapters: dict[str, Tally] = {}

    def add(self, change: int, adapter: str | None) -> None:
        self._requests.add(change)
        if adapter is not None:
            self._of(adapter).add(change)

    def total(self) -> int:
        return self._requests.total()

    def uses(self, adapter: str) -> int:
        """Requests of all fronts with an adapter that has a place."""
        return self._of(adapter).total()

    def place(self, places: dict[str, int]) -> None:
        """Where adapters are counted from now on; those that are gone have no requests left."""
        self.places = places
        self._adapters = {key: one for key, one in self._adapters.items() if key in places}

    def _of(self, adapter: str) -> Tally:
        tally = self._adapters.get(adapter)
        if tally is None:
            tally = self._shared.adapter(self.places[adapter], self._front)
            self._adapters[adapter] = tally
        return tally


def _cell_bytes(fronts: int, instances: int, adapters: int) -> int:
    page = mmap.PAGESIZE
    return -(-CELL_BYTES * fronts * (1 + instances + adapters) // page) * page
