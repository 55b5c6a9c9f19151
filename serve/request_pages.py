"""Which pages the requests of an instance have: tables over one pool, shared prefixes, host copies.

A request has a table of pages for each group of layers (`cache_groups`). Full pages are registered
by the tokens that they hold and all before, so that a later request finds them; of those that the
host's memory is to keep a queue is made here, and copied with the iterations.
"""

from collections import deque
from collections.abc import Sequence

from jaxsys.serve.cache_groups import first_seen
from jaxsys.serve.host_pages import TOGETHER, HostIndex, Save
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.kv_cache import FREED, BlockKey, PageAllocator, block_keys, salt_of
from jaxsys.serve.requests import Request


class RequestPages:
    """Gives pages to requests, finds them again by prefix, and takes them back."""

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.windows = config.windows
        self.allocator = PageAllocator(config.page_count, config.page_size)
        self.host = HostIndex(config.host_pages) if config.host_pages else None
        self._unsaved: deque[tuple[int, BlockKey, BlockKey | None]] = deque()
        """Full pages, by page and key with the key before, that the host may not have yet."""
        self._queued: set[BlockKey] = set()

    def forget(self) -> None:
        """What pages hold is lost."""
        self._unsaved.clear()
        self._queued.clear()
        self.allocator.forget()

    def extend(self, request: Request, end: int) -> bool:
        """Gives a request pages for the tokens before `end`, its next ones among them.

        Pages are given back first that no query sees any more. False, and nothing given, where too
        few are left.
        """
        tables = request.tables
        self.give_back(tables, request.computed)
        return self.fill(tables, [-(-end // self.config.page_size)] * len(tables))

    def give_back(self, tables: Sequence[list[int]], position: int) -> None:
        """Lets go of pages that lie before every window of queries from `position` on."""
        for table, window in zip(tables, self.windows, strict=True):
            if window is None:
                continue
            block = min(first_seen(window, position, self.config.page_size), len(table)) - 1
            gone = []
            while block >= 0 and table[block] != FREED:  # what is before was given back earlier
                gone.append(table[block])
                table[block] = FREED
                block -= 1
            self.allocator.release(gone)

    def fill(self, tables: Sequence[list[int]], blocks: Sequence[int]) -> bool:
        """Makes tables so long, or changes none of them."""
        missing = [max(0, wanted - len(t)) for t, wanted in zip(tables, blocks, strict=True)]
        pages = self.allocator.allocate(sum(missing))
        if pages is None:
            return False
        for table, count in zip(tables, missing, strict=True):
            table += pages[:count]
            del pages[:count]
        return True

    def let_go(self, tables: Sequence[list[int]], request: Request | None = None) -> None:
        """Gives pages up; those of a request that has used them at what they would cost again."""
        cost, kind = 1.0, ""
        if request is not None:
            cost += self.config.pair_cost * request.computed
            kind = kind_of(request)
        for table in tables:
            held = [page for page in table if page != FREED]
            self.allocator.release(held, cost=cost, kind=kind)

    def share(self, keys: Sequence[BlockKey]) -> tuple[list[int], ...]:
        """Tables of the longest prefix of which every group has all that is seen behind it."""
        allocator, size = self.allocator, self.config.page_size
        if self.windows == (None,):
            return (allocator.share(keys),)
        known = [
            [allocator.find(_in_group(key, g)) for key in keys] for g in range(len(self.windows))
        ]
        most = len(keys)
        for found, window in zip(known, self.windows, strict=True):
            if window is None and None in found:
                most = min(most, found.index(None))
        blocks, starts = 0, [0] * len(self.windows)
        for blocks in range(most, -1, -1):
            # The last token may have to be computed again: see `Scheduler._admit`.
            starts = [first_seen(window, blocks * size - 1, size) for window in self.windows]
            if all(None not in f[s:blocks] for f, s in zip(known, starts, strict=True)):
                break
        tables = tuple(
            [FREED] * start + [page for page in found[start:blocks] if page is not None]
            for found, start in zip(known, starts, strict=True)
        )
        for table, start in zip(tables, starts, strict=True):
            allocator.hold(table[start:])
        return tables

    def extend_windows(self, request: Request, end: int) -> bool:
        """`extend`, of the groups with a window alone."""
        tables, size = request.tables, self.config.page_size
        self.give_back(tables, request.computed)
        wanted = [0 if window is None else -(-end // size) for window in self.windows]
        return self.fill(tables, wanted)

    def keys(self, request: Request) -> Sequence[BlockKey]:
        """Of a request's full pages, of its prompt at least."""
        if request.block_hashes is None:
            if not request.prompt_tokens:
                return ()
            salt = salt_of(request.adapter)
            keys = block_keys(request.prompt_tokens, self.config.page_size, salt=salt)
            request.block_hashes = list(keys)
        return request.block_hashes

    def register(self, request: Request, length: int) -> None:
        """Makes the full pages among the first `length` tokens findable."""
        page_size = self.config.page_size
        full = length // page_size
        keys = self.keys(request)
        if len(keys) < full and request.output_tokens:
            start = len(keys) * page_size
            tokens = request.known_tokens()[start : full * page_size]
            after = keys[-1] if keys else None
            salt = salt_of(request.adapter)
            keys = [*keys, *block_keys(tokens, page_size, salt=salt, after=after)]
            request.block_hashes = keys
        for group, table in enumerate(request.tables):
            for page, key in zip(table[:full], keys, strict=False):
                if page != FREED:
                    self.allocator.register(page, _in_group(key, group))
        if self.host is not None:
            parent = None
            for page, key in zip(request.pages[:full], keys, strict=False):
                if (
                    self.allocator.find(key) == page
                    and key not in self._queued
                    and not self.host.knows(key)
                ):
                    self._unsaved.append((page, key, parent))
                    self._queued.add(key)
                parent = key

    def plan_saves(self) -> tuple[Save, ...]:
        """The next full pages that the host is to have, of those that are still there."""
        saves: list[Save] = []
        # Twice what an iteration fills, so that what was left over catches up.
        most = max(TOGETHER, 2 * -(-self.config.max_prefill_tokens // self.config.page_size))
        while self.host is not None and self._unsaved and len(saves) < most:
            page, key, parent = self._unsaved.popleft()
            self._queued.discard(key)
            if self.allocator.find(key) != page:
                continue
            place = self.host.begin(key, parent)
            if place is not None:
                saves.append(Save(page, place, key))
        return tuple(saves)

    def put_off(self, saves: Sequence[Save]) -> None:
        """There is no iteration that could take them along."""
        for save in reversed(saves):
            assert self.host is not None
            self._unsaved.appendleft((save.page, save.key, self.host.parent_of(save.key)))
            self._queued.add(save.key)
            self.host.drop(save.key)


def kind_of(request: Request) -> str:
    """Among whom it is counted how often pages are used again."""
    if request.session is not None:
        return "session"
    return "continued" if request.cached_tokens else "new"


def _in_group(key: BlockKey, group: int) -> BlockKey:
    """What a block's key is in a group of layers."""
    assert not isinstance(key, tuple)
    return key if group == 0 else (key, group)
