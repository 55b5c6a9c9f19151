"""Where control attaches to the engine: a governor around iterations, a router before instances.

The engine calls these; EcoFreq and EcoRoute are one pair of bodies. The defaults do nothing and
pick the least loaded instance.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jaxsys.serve.requests import Request
    from jaxsys.serve.scheduler import Iteration


class Governor(Protocol):
    """Called by an instance's loop around each iteration; must return in well under 0.5 ms."""

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        """The iteration is planned and about to be dispatched; `waiting` holds the queue."""
        ...

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        """The iteration's tokens are known, `latency_s` after the device could start on it."""
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
    def clock_mhz(self) -> float | None:
        """The clock the governor last asked for; None where none is governed."""
        ...


class Router(Protocol):
    """Chooses the instance for a request."""

    def choose(self, instances: Sequence[InstanceView], request: "Request") -> int:
        """Index into `instances`, which is never empty."""
        ...


class NoGovernor:
    """Leaves the clock alone."""

    __slots__ = ()

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        return

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        return


class FewestRequestsRouter:
    """The instance with the fewest unfinished requests; ties go to the first."""

    __slots__ = ()

    def choose(self, instances: Sequence[InstanceView], request: "Request") -> int:
        return min(range(len(instances)), key=lambda index: instances[index].in_flight)
