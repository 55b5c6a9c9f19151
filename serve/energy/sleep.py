"""Which instances sleep, and which are woken, so that a light load does not keep all of them warm.

An instance sleeps by giving its GPU up altogether: power falls only when no process holds the GPU
(a context alone keeps its clocks up, 26 to 50 W on A100 and H100, whatever memory is filled: Model
Parking Tax, arXiv 2605.23918), so a sleeper has to start and load its weights again when it is
woken, and the same study puts the time after which that pays at one to five minutes.

Requests must not wait for that. So of instances of one role, those that work and a few more stay
awake: one is woken as soon as fewer than `spare` of the working ones are idle, and one goes to
sleep when more are, and it has been idle itself for `after_s`. Routers that fill batches, rather
than spread requests, are what leaves instances idle.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from jaxsys.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepConfig:
    """How readily instances sleep."""

    after_s: float = 120.0
    """Idle time after which an instance that is not needed as a spare goes to sleep."""
    wake_s: float = 60.0
    """From being woken to serving: process, weights and compiled steps (30 to 100 s and more to
    start an engine anew, by vLLM's own account of 2025-10; a step compiled before is loaded)."""
    spare: float = 0.25
    """Idle instances kept awake, as a share of those that work; one at least."""
    look_s: float = 2.0
    """How often it is looked at."""

    def __post_init__(self) -> None:
        for name in ("after_s", "wake_s", "spare"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name}={getattr(self, name)} must not be negative")
        if not self.look_s > 0:
            raise UsageError(f"look_s={self.look_s} must be positive")


class Sleepable(Protocol):
    """An instance, as far as its sleep goes."""

    @property
    def in_flight(self) -> int: ...

    @property
    def asleep(self) -> bool:
        """Whether it takes no requests: it sleeps, or wakes and is not up yet."""
        ...

    @property
    def waking(self) -> bool: ...


class Change(NamedTuple):
    """Whom to put to sleep and whom to wake: indices."""

    to_sleep: list[int]
    to_wake: list[int]


class Sleeper:
    """Of the instances of one role, in the order in which a router fills them."""

    def __init__(self, config: SleepConfig) -> None:
        self.config = config
        self._idle_since_s: dict[int, float] = {}

    def look(self, instances: Sequence[Sleepable], now_s: float) -> Change:
        """What should change now."""
        idle_since_s = self._idle_since_s
        working = idle = waking = 0
        for index, one in enumerate(instances):
            if one.asleep:
                waking += one.waking
                idle_since_s.pop(index, None)
            elif one.in_flight:
                working += 1
                idle_since_s.pop(index, None)
            else:
                idle += 1
                idle_since_s.setdefault(index, now_s)
        wanted = max(1, math.ceil(self.config.spare * working))
        more = wanted - idle - waking
        if more > 0:
            sleepers = [i for i, one in enumerate(instances) if one.asleep and not one.waking]
            return Change([], sleepers[:more])
        # Last first: a router that fills comes to the first ones first.
        rested = [
            index
            for index, since_s in sorted(idle_since_s.items(), reverse=True)
            if now_s - since_s >= self.config.after_s
        ]
        return Change(rested[: idle - wanted] if idle > wanted else [], [])
