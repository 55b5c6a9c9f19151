"""Where control attaches to the engine: a governor around iterations, a router before instances.

The engine calls these. `NoGovernor` and `FewestRequestsRouter` do nothing and pick the least loaded
instance; what chooses clocks and routes by energy lies in `jaxsys.serve.energy`.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from jaxsys.serve.energy.meters import Reading

if TYPE_CHECKING:
    from jaxsys.serve.iterations import Iteration
    from jaxsys.serve.requests import Request


class AnyGovernor(Protocol):
    """What an instance's loop calls around each iteration; must return in well under 0.5 ms."""

    @property
    def method(self) -> str:
        """How energy is known."""
        ...

    @property
    def idle_after_s(self) -> float | None:
        """Quiet time after which `idle` has something to do; None for never."""
        ...

    def start(self, now_s: float) -> None:
        """The loop begins."""
        ...

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        """The iteration is planned and about to be dispatched; `waiting` holds the queue."""
        ...

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        """The oldest iteration in flight is done, `latency_s` after the device could begin it."""
        ...

    def dropped(self, count: int, now_s: float) -> None:
        """The `count` iterations in flight were lost."""
        ...

    def idle(self, now_s: float, quiet_since_s: float) -> None:
        """The loop found nothing to do since; called several times a second."""
        ...

    def reading(self, now_s: float) -> Reading:
        """Energy and clock so far; changes nothing."""
        ...

    def close(self) -> None:
        """The loop has ended, or hangs and is given up: the clock goes back at once."""
        ...


class InstanceView(Protocol):
    """What a router may read of an instance."""

    @property
    def name(self) -> str: ...

    @property
    def in_flight(self) -> int:
        """Requests the router has sent here that have not ended."""
        ...

    @property
    def batch(self) -> int:
        """Requests that decode."""
        ...

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values are held for unfinished requests."""
        ...

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that wait for prefill, or for pages."""
        ...

    @property
    def waiting_requests(self) -> int:
        """Prompts that wait or are partly computed; all in flight where that is not known."""
        ...

    @property
    def busy_until_s(self) -> float | None:
        """When the iteration in flight ends; None where idle or not known."""
        ...

    @property
    def clock_mhz(self) -> float | None:
        """The clock the governor last asked for; None where none is governed."""
        ...

    @property
    def page_size(self) -> int:
        """Tokens of a page; 0 where that is not known."""
        ...

    @property
    def page_count(self) -> int:
        """Pages for keys and values."""
        ...


class Router(Protocol):
    """Chooses the instance for a request."""

    def choose(self, instances: Sequence[InstanceView], request: "Request") -> int:
        """Index into `instances`, which is never empty."""
        ...


class NoGovernor:
    """Leaves the clock alone, and reads nothing."""

    __slots__ = ()
    method = "none: nothing reads energy"
    idle_after_s: float | None = None

    def start(self, now_s: float) -> None:
        return

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        return

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        return

    def dropped(self, count: int, now_s: float) -> None:
        return

    def idle(self, now_s: float, quiet_since_s: float) -> None:
        return

    def reading(self, now_s: float) -> Reading:
        return Reading()

    def close(self) -> None:
        return


class FewestRequestsRouter:
    """The instance with the fewest unfinished requests; ties go to the first."""

    __slots__ = ()

    def choose(self, instances: Sequence[InstanceView], request: "Request") -> int:
        counts = [one.in_flight for one in instances]
        return counts.index(min(counts))
