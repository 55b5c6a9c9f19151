"""Which low-rank adapters are served: loaded at every instance, unloaded when nobody uses them.

A name of the API stands for one load of a folder, whose key no other load ever has: pages, slots
and requests go by keys, so that a name which is loaded anew shares nothing with what it was.

    load    every instance reads the folder; then the name is known
    unload  the name is gone at once; its slot when its last request has ended
"""

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Protocol

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.member import Member

logger = logging.getLogger(__name__)

LOOK_S = 0.02
"""How often those who wait look."""
FREE_S = 60.0
"""How long a load waits for a slot that is about to be free."""


class UnknownAdapter(UsageError):
    """No adapter is called so."""


class KnownAdapter(UsageError):
    """An adapter is called so already."""


class Users(Protocol):
    """Whose requests they are."""

    @property
    def instances(self) -> Sequence[Member]:
        """All there are."""
        ...

    def uses(self, key: str) -> int:
        """Requests that have not ended and are computed with an adapter."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One load of a folder."""

    name: str
    key: str
    folder: str
    created_s: float
    """Seconds since 1970."""


class Served(Protocol):
    """The adapters that requests may name, wherever they are looked after."""

    most: int
    """That are loaded at once, those that are going away counted."""

    def __iter__(self) -> Iterator[Adapter]: ...

    def get(self, name: str) -> Adapter | None:
        """The adapter that is called so now."""
        ...

    async def load(self, name: str, folder: str, *, in_place: bool = False) -> Adapter:
        """Loads a folder at every instance; raises as `Adapters.load`."""
        ...

    async def forget(self, name: str) -> None:
        """Takes a name away; raises as `Adapters.unload`."""
        ...

    def join(self, member: Member, then: Callable[[], None]) -> None:
        """An instance has come up."""
        ...


def name_of(key: str | None) -> str | None:
    """What the adapter of a key is called in the API; None where there is none."""
    return None if key is None else key.rpartition("@")[0]


class Adapters:
    """The adapters of an engine; everything runs on the event loop's thread."""

    def __init__(self, users: Users, most: int = 0):
        """
        Args:
            most: that are loaded at once, those that are going away counted.
        """
        self.most = most
        self._users = users
        self._named: dict[str, Adapter] = {}
        self._held: dict[str, str] = {}
        """Keys that have a slot, and their folders."""
        self._places: dict[str, int] = {}
        """Of those keys, each its own number below `most`."""
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Adapter]:
        return iter(list(self._named.values()))

    def __len__(self) -> int:
        return len(self._named)

    def get(self, name: str) -> Adapter | None:
        """The adapter that is called so now."""
        return self._named.get(name)

    @property
    def places(self) -> dict[str, int]:
        """The keys that have a slot anywhere, each with a number of its own below `most`."""
        return dict(self._places)

    async def load(self, name: str, folder: str, *, in_place: bool = False) -> Adapter:
        """Loads a folder at every instance.

        Args:
            in_place: takes the place of one of the same name, whose requests go on with it.

        Raises:
            KnownAdapter: if there is one of this name, unless `in_place`.
            UsageError: if the folder is no adapter of this model, or no slot is free.
            RunError: if a slot that is to be free is not in time.
        """
        self._check_new(name, in_place)
        if not self.most:
            raise UsageError("no adapters are served; start with --max-loras, or with --lora")
        await self._room()
        self._check_new(name, in_place)
        key = f"{name}@{next(self._numbers)}"
        self._held[key] = folder
        self._places[key] = min(set(range(self.most)) - set(self._places.values()))
        members = list(self._users.instances)
        faults = await asyncio.gather(*(self._load_at(one, key, folder) for one in members))
        fault = next((one for one in faults if one is not None), None)
        if fault is None and not in_place and name in self._named:
            fault = f"adapter {name!r} was loaded meanwhile"
        if fault is not None:
            self._free(key)
            raise UsageError(fault)
        old = self._named.get(name)
        adapter = Adapter(name=name, key=key, folder=folder, created_s=time.time())
        self._named[name] = adapter
        if old is not None:
            self._retire(old)
        logger.info("loaded adapter", extra={"adapter": name, "folder": folder})
        return adapter

    def unload(self, name: str) -> None:
        """Forgets a name; its slot is free when the requests that have it have ended.

        Raises:
            UnknownAdapter: if there is none.
        """
        adapter = self._named.pop(name, None)
        if adapter is None:
            raise UnknownAdapter(f"adapter {name!r} is not loaded")
        self._retire(adapter)

    async def forget(self, name: str) -> None:
        """As `unload`, wherever that happens."""
        self.unload(name)

    def join(self, member: Member, then: Callable[[], None]) -> None:
        """Loads at an instance that has come up what the others have; it is closed until then."""
        if not self._held:
            return

        async def catch_up() -> None:
            for key, folder in list(self._held.items()):
                fault = await self._load_at(member, key, folder)
                if key not in self._held:  # it was unloaded meanwhile
                    member.unload_adapter(key)
                if fault is not None:
                    logger.error(
                        "no adapter",
                        extra={"instance": member.name, "adapter": key, "reason": fault},
                    )
            member.catching_up = False
            then()

        member.catching_up = True
        self._start(catch_up())

    # --- inside -------------------------------------------------------------------------------

    def _check_new(self, name: str, in_place: bool) -> None:
        if not in_place and name in self._named:
            raise KnownAdapter(
                f"adapter {name!r} is loaded already; unload it first, or load in place"
            )

    async def _room(self) -> None:
        """Waits for a slot that is about to be free."""
        deadline_s = time.monotonic() + FREE_S
        while len(self._held) >= self.most:
            if len(self._named) >= self.most:
                raise UsageError(
                    f"{len(self._named)} adapter(s) are loaded, as many as --max-loras allows; "
                    "unload one first"
                )
            if time.monotonic() > deadline_s:
                raise RunError("requests still use the adapter that was unloaded; try again later")
            await asyncio.sleep(LOOK_S)

    async def _load_at(self, member: Member, key: str, folder: str) -> str | None:
        """What was wrong; None also where the instance is gone, or goes, before it can say."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[str | None] = loop.create_future()

        def settle(fault: str | None) -> None:
            if not told.done():
                told.set_result(fault)

        def done(fault: str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, fault)

        member.load_adapter(key, folder, done)
        while not told.done():
            if member.failure is not None or member not in self._users.instances:
                return None
            await asyncio.wait([told], timeout=0.1)
        return told.result()

    def _retire(self, adapter: Adapter) -> None:
        async def when_unused() -> None:
            while self._users.uses(adapter.key):
                await asyncio.sleep(LOOK_S)
            self._free(adapter.key)
            logger.info("unloaded adapter", extra={"adapter": adapter.name})

        self._start(when_unused())

    def _free(self, key: str) -> None:
        # Behind whatever ends the last requests there: instances take things in order.
        for member in self._users.instances:
            member.unload_adapter(key)
        self._held.pop(key, None)
        self._places.pop(key, None)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
