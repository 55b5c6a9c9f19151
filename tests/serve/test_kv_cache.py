"""The page allocator keeps every page in exactly one place, whatever is asked of it."""

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jaxsys.serve.kv_cache import PageAllocator, block_keys


class Machine(RuleBasedStateMachine):
    """Random allocations, shares, registrations and releases against a plain count of holds."""

    held = Bundle("held")

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(12, 4)
        self.holds = [0] * 12

    @rule(target=held, count=st.integers(1, 6))
    def allocate(self, count):
        available = self.allocator.available
        pages = self.allocator.allocate(count)
        if pages is None:
            assert count > available
            return []
        assert len(set(pages)) == count
        for page in pages:
            assert self.holds[page] == 0, "a held page was handed out again"
            self.holds[page] = 1
        return pages

    @rule(pages=held, key=st.integers(0, 9))
    def register(self, pages, key):
        for offset, page in enumerate(pages):
            if self.holds[page]:
                self.allocator.register(page, key * 10 + offset)

    @rule(target=held, key=st.integers(0, 9), length=st.integers(1, 4))
    def share(self, key, length):
        pages = self.allocator.share([key * 10 + offset for offset in range(length)])
        for page in pages:
            self.holds[page] += 1
        return pages

    @rule(pages=consumes(held))
    def release(self, pages):
        self.allocator.release(pages)
        for page in pages:
            self.holds[page] -= 1

    @rule()
    def forget(self):
        self.allocator.forget()

    @invariant()
    def consistent(self):
        self.allocator.check()
        assert self.allocator.held == sum(count > 0 for count in self.holds)


TestMachine = Machine.TestCase


def test_shared_pages_are_found_again_after_their_holder_left():
    allocator: Any = PageAllocator(4, 2)
    pages = allocator.allocate(2)
    keys = list(block_keys([1, 2, 3, 4], 2))
    for page, key in zip(pages, keys, strict=True):
        allocator.register(page, key)
    allocator.release(pages)
    assert allocator.available == 4
    assert allocator.share(list(block_keys([1, 2, 3, 4, 5], 2))) == pages
    assert allocator.share(list(block_keys([9, 2, 3, 4], 2))) == []


def test_the_end_of_a_prefix_is_reclaimed_before_its_start():
    allocator: Any = PageAllocator(3, 1)
    pages = allocator.allocate(3)
    for page in pages:
        allocator.register(page, page)
    allocator.release(pages)
    allocator.allocate(1)
    assert allocator.share(pages) == pages[:2]


def test_keys_depend_on_everything_before_and_on_the_salt():
    keys = list(block_keys([1, 2, 3, 4, 5], 2))
    assert len(keys) == 2
    assert keys[1] == next(block_keys([3, 4], 2, after=keys[0]))
    assert keys[1] != list(block_keys([0, 2, 3, 4], 2))[1]
    assert keys[0] != next(block_keys([1, 2], 2, salt=b"user"))


def test_releasing_twice_is_refused():
    allocator: Any = PageAllocator(2, 1)
    pages = allocator.allocate(1)
    allocator.release(pages)
    with pytest.raises(ValueError, match="released more often than held"):
        allocator.release(pages)


def kept(allocator, keys, **given):
    pages = allocator.allocate(len(keys))
    for page, key in zip(pages, keys, strict=True):
        allocator.register(page, key)
    allocator.release(pages, **given)


def test_what_is_dear_to_compute_again_stays_longer_but_not_for_ever():
    allocator: Any = PageAllocator(4, 1)
    kept(allocator, [1, 2], cost=3.0)
    kept(allocator, [3, 4], cost=1.0)
    allocator.release(allocator.allocate(2))
    assert [allocator.find(key) is not None for key in (1, 2, 3, 4)] == [True, True, False, False]
    for key in range(10, 60, 2):  # cheap pages come and go, and prices rise with them
        kept(allocator, [key, key + 1], cost=1.0)
    assert allocator.find(1) is None and allocator.find(2) is None
    allocator.check()


def test_what_is_used_again_stays_longer_than_what_never_was():
    allocator: Any = PageAllocator(8, 1)
    for turn in range(40):
        session = [1, 2]
        held = allocator.share(session)
        if not held:
            kept(allocator, session, kind="session")
        else:
            allocator.release(held, kind="session")
        kept(allocator, [100 + 2 * turn, 101 + 2 * turn], kind="new")
    reuse = allocator.reuse
    assert reuse.probability("session") > 0.9
    assert reuse.probability("new") < 0.2
    kept(allocator, [7, 8], kind="session")
    for turn in range(12):
        kept(allocator, [300 + 2 * turn, 301 + 2 * turn], kind="new")
    assert allocator.find(7) is not None and allocator.find(8) is not None
    allocator.check()
