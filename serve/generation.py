"""One request as its caller's task sees it: its events, and what of them has reached the caller."""

import asyncio
from collections import deque
from collections.abc import Callable

from jaxsys.serve.member import Member, TokenEvent
from jaxsys.serve.requests import Request

Watch = Callable[[TokenEvent], bool]
"""See `Engine.submit`."""


class EventQueue:
    """Events on their way to the one task that waits for them."""

    __slots__ = ("_at_end", "_events", "_waiter")

    def __init__(self) -> None:
        self._events: deque[TokenEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._at_end = False
        """Whether it waits for the last one."""

    def put(self, event: TokenEvent) -> None:
        """Adds one; on the event loop's thread."""
        self._events.append(event)
        waiter = self._waiter
        if waiter is None or (self._at_end and event.finish_reason is None):
            return
        if not waiter.done():
            waiter.set_result(None)

    def empty(self) -> bool:
        return not self._events

    async def get(self) -> TokenEvent:
        """The next one."""
        while not self._events:
            await self._wait()
        return self._events.popleft()

    async def get_all(self) -> list[TokenEvent]:
        """All of them, once the last one is there: nobody is woken before."""
        while not (self._events and self._events[-1].finish_reason is not None):
            await self._wait(at_end=True)
        found = list(self._events)
        self._events.clear()
        return found

    async def _wait(self, *, at_end: bool = False) -> None:
        self._waiter, self._at_end = asyncio.get_running_loop().create_future(), at_end
        try:
            await self._waiter
        finally:
            self._waiter = None


class Generation:
    """A request as its caller's task sees it."""

    __slots__ = ("attempts", "ended", "events", "home", "request", "tokens", "watch")

    def __init__(self, request: Request, watch: Watch | None = None):
        self.request = request
        """As it was last submitted: an attempt to go on after a failure is a request of its own."""
        self.home: Member | None = None
        """The instance it was last known to be on; None while it waits for one to come up."""
        self.events = EventQueue()
        self.ended = False
        self.tokens: list[int] = []
        """Tokens that have reached the caller."""
        self.attempts = 1
        self.watch = watch
