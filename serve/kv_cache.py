"""Which page of the key-value cache holds what: a reference-counted page allocator.

Pages of `page_size` tokens are shared between requests with a common prefix. A page whose content
is known carries a key, the hash of every token up to its end; when its last holder lets go it
stays findable, and is reclaimed only when no free page is left. Keys are 16-byte BLAKE2 digests
chained over blocks, so that no prompt can be made to collide with another's.

Which kept page goes first is a matter of price: what it would cost to compute it again, times how
likely that is, as pages all take the same memory (GreedyDual-Size, Cao and Irani 1997):

    price = floor + cost * P(used again | kind)      floor = price of the page reclaimed last

so that what is not used falls behind what comes later, and of equal prices the oldest goes first.
The floor rises with every page reclaimed besides, so that nothing outlasts `STAY` turnovers of all
pages unused, however cheap what comes later is.
P is counted: of the pages of a kind that were kept, those found again against those reclaimed.

At every moment, each page is in exactly one place: held (count > 0), kept (count 0, keyed) or free.
"""

import hashlib
import heapq
from array import array
from collections.abc import Iterator, Sequence

BlockKey = bytes | int | tuple[bytes | int, int]
"""Of a block's tokens; with the number of a group of layers where that is not the first."""

FREED = -1
"""Stands in a table for a page that was given back: what lay there is not seen any more."""


def block_keys(
    tokens: Sequence[int], page_size: int, *, salt: bytes = b"", after: BlockKey | None = None
) -> Iterator[bytes]:
    """Keys of the full blocks of `tokens`, each standing for the whole prefix to its end.

    Args:
        salt: separates those whose pages differ for the same tokens.
        after: the key of the block before `tokens`, if they continue one.
    """
    assert not isinstance(after, tuple)
    parent = salt if after is None else bytes(after)
    for start in range(0, len(tokens) - page_size + 1, page_size):
        block = array("i", tokens[start : start + page_size]).tobytes()
        parent = hashlib.blake2b(block, digest_size=16, key=parent).digest()
        yield parent


def salt_of(adapter: str | None) -> bytes:
    """What keeps an adapter's keys and values apart from those of others and of the model alone."""
    return b"" if adapter is None else hashlib.blake2b(adapter.encode(), digest_size=16).digest()


STAY = 4
"""Turnovers of all pages after which even the dearest goes, if it is not used."""
MEMORY = 4096
"""Pages of a kind that its chance of being used again is counted over."""


class Reuse:
    """How often kept pages are used again, by kind."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[str, list[float]] = {}

    def count(self, kind: str, *, used: bool) -> None:
        """A page of a kind was found again, or was not before its place was needed."""
        counts = self._counts.setdefault(kind, [0.0, 0.0])
        counts[used] += 1
        if sum(counts) > MEMORY:
            counts[:] = [value / 2 for value in counts]

    def probability(self, kind: str) -> float:
        """That a page of this kind is used again; a half where nothing is known."""
        missed, used = self._counts.get(kind, (0.0, 0.0))
        return (used + 1) / (used + missed + 2)


class PageAllocator:
    """Hands out page numbers `0..page_count-1`. Not thread-safe: one scheduler owns it."""

    __slots__ = (
        "_by_key",
        "_counts",
        "_dearest",
        "_floor",
        "_free",
        "_kept",
        "_keys",
        "_kinds",
        "_prices",
        "_sequence",
        "page_count",
        "page_size",
        "reuse",
    )

    def __init__(self, page_count: int, page_size: int):
        if page_count < 1 or page_size < 1:
            raise ValueError(f"page_count={page_count}, page_size={page_size} must be at least 1")
        self.page_count = page_count
        self.page_size = page_size
        self._free = list(range(page_count - 1, -1, -1))
        self._counts = [0] * page_count
        self._keys: list[BlockKey | None] = [None] * page_count
        self._by_key: dict[BlockKey, int] = {}
        self._kept: dict[int, int] = {}
        """By page: the number of its entry among the prices."""
        self._kinds: dict[int, str] = {}
        self._prices: list[tuple[float, int, int]] = []
        """A heap of price, number and page; entries of pages not kept any more are stale."""
        self._sequence = 0
        self._floor = 0.0
        self._dearest = 0.0
        """The most that a page was worth above the floor of its time, of late."""
        self.reuse = Reuse()

    @property
    def available(self) -> int:
        """Pages that an allocation could take: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages some request holds."""
        return self.page_count - self.available

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with count 1 and no key, or None (and no change) where too few are left."""
        free = self._free
        if count > len(free):
            if count > len(free) + len(self._kept):
                return None
            self._reclaim(count - len(free))
        if count == 1:
            pages = [free.pop()]
        else:
            pages = free[len(free) - count :]
            del free[len(free) - count :]
        counts = self._counts
        for page in pages:
            counts[page] = 1
        return pages

    def share(self, keys: Sequence[BlockKey]) -> list[int]:
        """The pages of the longest known prefix of `keys`; the caller holds them from now on."""
        pages = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            if self._counts[page] == 0:
                self._use_again(page)
            self._counts[page] += 1
            pages.append(page)
        return pages

    def find(self, key: BlockKey) -> int | None:
        """The page that holds what a key stands for, if any does."""
        return self._by_key.get(key)

    def hold(self, pages: Sequence[int]) -> None:
        """Holds pages that were found."""
        for page in pages:
            if self._counts[page] == 0:
                self._use_again(page)
            self._counts[page] += 1

    def key_of(self, page: int) -> BlockKey | None:
        """What a page's content is known by, if it is."""
        return self._keys[page]

    def register(self, page: int, key: BlockKey) -> None:
        """Makes a held page's content findable. A key known already keeps its first page."""
        if self._counts[page] < 1:
            raise ValueError(f"page={page} is held by nobody; only held pages can be registered")
        if self._keys[page] is None and key not in self._by_key:
            self._keys[page] = key
            self._by_key[key] = page

    def unregister(self, pages: Sequence[int]) -> None:
        """Makes held pages not findable any more."""
        for page in pages:
            key = self._keys[page]
            if key is not None:
                self._keys[page] = None
                del self._by_key[key]

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._counts[page]

    def release(self, pages: Sequence[int], *, cost: float = 1.0, kind: str = "") -> None:
        """Gives up one hold on each of `pages`.

        Args:
            cost: of computing one of them again, in any unit that is the same for all.
            kind: of use, which tells how likely they are used again.
        """
        counts, keys = self._counts, self._keys
        worth = cost * self.reuse.probability(kind)
        self._dearest = max(self._dearest, worth)
        price = self._floor + worth
        # Last page first: a prefix is reclaimed from its end, so what is left stays reachable.
        for page in reversed(pages):
            count = counts[page] - 1
            if count < 0:
                raise ValueError(f"page={page} is released more often than held")
            counts[page] = count
            if count == 0:
                if keys[page] is None:
                    self._free.append(page)
                else:
                    self._sequence += 1
                    self._kept[page] = self._sequence
                    self._kinds[page] = kind
                    heapq.heappush(self._prices, (price, self._sequence, page))
        if len(self._prices) > 4 * self.page_count + 64:
            self._prices = [one for one in self._prices if self._kept.get(one[2]) == one[1]]
            heapq.heapify(self._prices)

    def forget(self) -> None:
        """Drops every kept page, as after the weights changed."""
        for page in list(self._kept):
            self._drop(page)
        self._prices.clear()

    def check(self) -> None:
        """Raises AssertionError unless every page is in exactly one place."""
        free, kept = set(self._free), set(self._kept)
        held = {page for page, count in enumerate(self._counts) if count > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & kept and not free & held and not kept & held, "a page is in two places"
        assert len(free) + len(kept) + len(held) == self.page_count, "a page is nowhere"
        assert all(count >= 0 for count in self._counts), "a count is negative"
        assert all(self._keys[page] is None for page in free), "a free page has a key"
        assert all(self._keys[page] is not None for page in kept), "a kept page has no key"
        keyed = {key: page for page, key in enumerate(self._keys) if key is not None}
        assert keyed == self._by_key, "keys and pages disagree"

    def _reclaim(self, count: int) -> None:
        while count:
            price, number, page = heapq.heappop(self._prices)
            if self._kept.get(page) != number:
                continue
            rise = self._dearest / (STAY * self.page_count)
            self._floor = max(self._floor + rise, price)
            self._dearest -= rise / STAY
            self.reuse.count(self._kinds[page], used=False)
            self._drop(page)
            count -= 1

    def _drop(self, page: int) -> None:
        """Makes a kept page a free one."""
        del self._kept[page], self._kinds[page]
        key = self._keys[page]
        assert key is not None
        del self._by_key[key]
        self._keys[page] = None
        self._free.append(page)

    def _use_again(self, page: int) -> None:
        del self._kept[page]
        self.reuse.count(self._kinds.pop(page), used=True)
