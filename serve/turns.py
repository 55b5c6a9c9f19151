"""An instance's turns: plan, set the clock, dispatch, complete. The same live and in a replay.

    turn                                       end of the oldest iteration in flight
    take in requests handed over               complete it in the scheduler
    plan the next iteration                    tell the governor, and the owner
    the governor sets its clock                hand requests over
    dispatch it

A live instance waits for its device between the two (`Instance`), a replay moves its clock there
(`jaxsys.serve.simulation.simulator`); with `depth` 2 the next iteration is planned and dispatched
while one runs.
"""

import collections
from typing import Any, Protocol

from jaxsys.serve.clock import Clock
from jaxsys.serve.hooks import AnyGovernor
from jaxsys.serve.host_pages import Fetch
from jaxsys.serve.iterations import Completion, Iteration
from jaxsys.serve.outcomes import Sampled
from jaxsys.serve.requests import Request
from jaxsys.serve.scheduler import Scheduler


class Transfer(Protocol):
    """An instance's part in handing requests over; called on the instance's thread."""

    def planned(self, iteration: Iteration) -> None:
        """An iteration was dispatched."""
        ...

    def completed(self, completion: Completion) -> None:
        """An iteration's tokens are known."""
        ...

    def between(self) -> None:
        """Between iterations."""
        ...

    def aborted(self, request: Request) -> None:
        """A request of this instance is about to be ended from outside."""
        ...

    def take(self, message: Any) -> None:
        """The other side has something to say."""
        ...


class Owner(Protocol):
    """Whose turns they are."""

    def dispatch(self, iteration: Iteration) -> Any:
        """Queues an iteration on the device; the handle is for whoever waits for it."""
        ...

    def fetch(self, fetch: Fetch) -> None:
        """Has pages filled from the host's memory; `Scheduler.start_fetched` is told when."""
        ...

    def ended(
        self, iteration: Iteration, outcome: Sampled | None, latency_s: float, now_s: float
    ) -> None:
        """The device is done with an iteration, of which nothing else is told yet."""
        ...

    def completed(
        self, iteration: Iteration, outcome: Sampled | None, completion: Completion, now_s: float
    ) -> None:
        """What came of it."""
        ...


class Flight:
    """An iteration in flight."""

    __slots__ = ("dispatched_s", "follows", "handle", "iteration")

    def __init__(
        self, iteration: Iteration, handle: Any, dispatched_s: float, *, follows: bool
    ) -> None:
        self.iteration = iteration
        self.handle = handle
        self.dispatched_s = dispatched_s
        self.follows = follows
        """Whether there was something to do all the time since the iteration before."""


class Turns:
    """The loop of one instance, without the waiting."""

    def __init__(
        self,
        scheduler: Scheduler,
        governor: AnyGovernor,
        clock: Clock,
        owner: Owner,
        *,
        depth: int = 2,
        max_steps: int = 1,
    ) -> None:
        """
        Args:
            depth: most iterations in flight.
            max_steps: decode steps that may be planned as one, as `Scheduler.next_iteration`'s.
        """
        self.scheduler = scheduler
        self.governor = governor
        self.clock = clock
        self.owner = owner
        self.depth = depth
        self.max_steps = max_steps
        self.transfer: Transfer | None = None
        self.stopping = False
        self.in_flight: collections.deque[Flight] = collections.deque()
        self.iteration: Iteration | None = None
        """Planned in the last turn."""
        self.stuck = False
        """Whether only a message can change anything after the last turn: it did nothing and left
        nothing behind."""
        self.ended_s = 0.0
        """When an iteration last ended."""
        self._quiet = True

    @property
    def done(self) -> bool:
        """Whether it is to stop and nothing is in flight."""
        return self.stopping and not self.in_flight

    def start(self) -> None:
        """Before the first turn."""
        self.ended_s = self.clock.now_s()
        self.stuck = not self.scheduler.requests

    def turn(self) -> Flight | None:
        """Plans and dispatches an iteration, if there is one.

        Returns:
            What must end before the next turn makes sense, if anything.
        """
        scheduler, in_flight, transfer = self.scheduler, self.in_flight, self.transfer
        if transfer is not None:
            transfer.between()
        now_s = self.clock.now_s()
        preemptions = scheduler.preemptions
        self.iteration = iteration = (
            None if self.stopping else scheduler.next_iteration(now_s, self.max_steps)
        )
        for fetch in scheduler.take_fetches():
            self.owner.fetch(fetch)
        if iteration is not None:
            self.governor.before_iteration(iteration, scheduler.waiting, now_s)
            handle = self.owner.dispatch(iteration)
            follows, self._quiet = not self._quiet, False
            in_flight.append(Flight(iteration, handle, self.clock.now_s(), follows=follows))
            if transfer is not None:
                transfer.planned(iteration)
        self.stuck = not in_flight and scheduler.preemptions == preemptions
        self._quiet = self._quiet or self.stuck
        if in_flight and (iteration is None or len(in_flight) >= self.depth):
            return in_flight[0]
        return None

    def end(self, outcome: Sampled | None) -> None:
        """The oldest iteration in flight has ended, with these tokens (None in a replay)."""
        flight = self.in_flight.popleft()
        iteration = flight.iteration
        now_s = self.clock.now_s()
        # The device works in order: it could start when the iteration before had ended.
        latency_s = now_s - max(flight.dispatched_s, self.ended_s)
        # Where the host must know an iteration's tokens to plan the next, the device waits for it.
        period_s = now_s - self.ended_s if flight.follows else latency_s
        self.ended_s = now_s
        self.owner.ended(iteration, outcome, latency_s, now_s)
        tokens = None if outcome is None else outcome.tokens
        ended = None if outcome is None else outcome.ended
        more = None if outcome is None else outcome.more
        completion = self.scheduler.complete(iteration, now_s, tokens, ended, more)
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.ran(iteration, max(latency_s, period_s))
        self.governor.after_iteration(iteration, latency_s, now_s)
        self.owner.completed(iteration, outcome, completion, now_s)
        if self.transfer is not None:
            self.transfer.completed(completion)

    def drop(self) -> None:
        """The device lost what was in flight."""
        now_s = self.clock.now_s()
        self.in_flight.clear()
        self._quiet = True
        self.governor.dropped(len(self.scheduler.forget()), now_s)
        self.ended_s = now_s
        self.stuck = not self.scheduler.requests
