"""Pages in the host's memory: a larger and slower place for what was computed before.

    device                                   host
    a page is full and keyed      -- save --> a copy, some pages an iteration, behind its back
    its place is needed: dropped
    a prompt begins with it       <-- fetch - while others compute; then it is read on from there

The index is the scheduler's, pure Python, the same live and in a replay; `host_copies` moves the
bytes. A copy is findable when it is there, and what is being fetched stays.
Of what is not used the oldest goes first, ends of prefixes before their beginnings.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from jaxsys.serve.kv_cache import BlockKey
from jaxsys.serve.requests import Request

TOGETHER = 16
"""Pages that are copied in one piece."""


class Save(NamedTuple):
    """A page to be copied to the host."""

    page: int
    place: int
    key: BlockKey


class Fetch(NamedTuple):
    """Pages of a request to be filled from the host."""

    request: Request
    pages: tuple[int, ...]
    places: tuple[int, ...]


class HostIndex:
    """Which place in the host's memory holds what. Not thread-safe: one scheduler owns it."""

    def __init__(self, count: int) -> None:
        """
        Args:
            count: places, of a page each.
        """
        self.count = count
        self.fetched = 0
        """Pages that were fetched."""
        self._free = list(range(count - 1, -1, -1))
        self._places: dict[BlockKey, int] = {}
        self._saving: dict[BlockKey, int] = {}
        self._parents: dict[BlockKey, BlockKey | None] = {}
        self._children: dict[BlockKey, int] = {}
        self._leaves: OrderedDict[BlockKey, None] = OrderedDict()
        """Findable ones that nothing follows, the one used longest ago first."""
        self._pins: dict[BlockKey, int] = {}
        self._key_at: dict[int, BlockKey] = {}

    @property
    def held(self) -> int:
        """Places in use."""
        return self.count - len(self._free)

    def knows(self, key: BlockKey) -> bool:
        """Whether there is a copy, or one is to come."""
        return key in self._places or key in self._saving

    def parent_of(self, key: BlockKey) -> BlockKey | None:
        """The key before that of a copy."""
        return self._parents[key]

    def begin(self, key: BlockKey, parent: BlockKey | None) -> int | None:
        """A place for a copy to come; None where there is one already, or no room.

        Args:
            parent: key of the block before it.
        """
        if self.knows(key):
            return None
        if not self._free and not self._make_room(parent):
            return None
        place = self._free.pop()
        self._saving[key] = place
        self._parents[key] = parent
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1
            self._leaves.pop(parent, None)
        return place

    def saved(self, key: BlockKey) -> None:
        """The copy is there."""
        place = self._saving.pop(key, None)
        if place is None:  # it was given up meanwhile
            return
        self._places[key] = place
        self._key_at[place] = key
        if not self._children.get(key):
            self._leaves[key] = None

    def drop(self, key: BlockKey) -> None:
        """A copy is not to be found any more, or will not come."""
        place = self._saving.pop(key, None)
        if place is None:
            if self._pins.get(key):
                return
            place = self._places.pop(key, None)
            if place is None:
                return
            del self._key_at[place]
        self._leaves.pop(key, None)
        self._free.append(place)
        parent = self._parents.pop(key)
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
                if parent in self._places:  # no younger than what followed it
                    self._leaves[parent] = None
                    self._leaves.move_to_end(parent, last=False)

    def find(self, keys: Sequence[BlockKey]) -> list[int]:
        """The places of the longest run of `keys` from the first; they stay until let go."""
        found = []
        for key in keys:
            place = self._places.get(key)
            if place is None:
                break
            found.append(place)
            self._pins[key] = self._pins.get(key, 0) + 1
            if key in self._leaves:
                self._leaves.move_to_end(key)
        return found

    def let_go(self, places: Sequence[int]) -> None:
        """What `find` found is not needed any more."""
        for place in places:
            key = self._key_at[place]
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]

    def check(self) -> None:
        """Raises AssertionError unless every place is free, being filled or findable."""
        used = [*self._places.values(), *self._saving.values()]
        assert sorted([*used, *self._free]) == list(range(self.count)), "a place is lost or twice"
        assert self._key_at == {place: key for key, place in self._places.items()}
        children: dict[BlockKey, int] = {}
        for key in (*self._places, *self._saving):
            parent = self._parents[key]
            if parent is not None:
                children[parent] = children.get(parent, 0) + 1
        assert children == self._children, "children"
        assert set(self._leaves) == {key for key in self._places if not children.get(key)}
        assert set(self._pins) <= set(self._places), "pins"

    def _make_room(self, parent: BlockKey | None) -> bool:
        """Drops the oldest that may go, but not what a copy to come would follow."""
        for key in self._leaves:
            if key != parent and not self._pins.get(key):
                self.drop(key)
                return True
        return False
