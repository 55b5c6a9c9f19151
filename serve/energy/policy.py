"""What a clock policy is: choose(load, queue, clocks) -> clock, before each iteration.

A policy knows sizes, deadlines and clocks, and nothing of drivers, counters or threads: the
`Governor` around it asks it, sets what it chose and tells it what came of it, the same one on a
real GPU, on a modelled one and in a replay. All but `choose` has a declared default.

To add one: a class that extends `ClockPolicy`, and a line in `jaxsys.serve.energy.registry` (or
`register_clock_policy` from a package of one's own).
"""

import abc
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from jaxsys.errors import UsageError
from jaxsys.serve.energy.gpu_model import Load

if TYPE_CHECKING:
    from jaxsys.serve.iterations import Iteration, PrefillPiece
    from jaxsys.serve.requests import Request


class Queue(NamedTuple):
    """Prompts whose first token is still to come; `request.timing.arrival_s` says since when.
    And beside them who decodes."""

    pieces: "Sequence[PrefillPiece]" = ()
    """Of the iteration about to run."""
    waiting: "Collection[Request]" = ()
    """Behind it, the next first."""
    decodes: "Sequence[Request]" = ()
    """Not prompts any more: the sequences that the iteration decodes, who joined first foremost."""


@dataclass(slots=True, kw_only=True)
class Clocks:
    """A GPU's clock as a policy sees it."""

    choices_mhz: tuple[int, ...]
    """Those to choose among, ascending; the lowest should be the sweet spot."""
    mhz: int
    """Chosen for the iteration before; what an idle GPU fell to does not count."""
    since_s: float = -math.inf
    """When it was chosen."""
    now_s: float = 0.0

    @property
    def top_mhz(self) -> int:
        return self.choices_mhz[-1]


class Ran(NamedTuple):
    """An iteration that has run."""

    load: Load
    steps: int
    """Decode steps it took in a row."""
    latency_s: float
    """Of all its steps."""
    predicted_s: float | None
    """Of one step, as the policy predicted it."""
    clock_mhz: float | None
    """The clock that really ran; None where nothing reads it."""
    power_w: float | None


@dataclass(slots=True)
class Record:
    """What a policy and its governor did, for gauges and reports."""

    decisions: int = 0
    infeasible: int = 0
    """Decisions in which no clock met the SLO for all at hand."""
    overruns: int = 0
    """Iterations that took longer than the policy's patience."""
    alarms: int = 0
    """Of these, those that were met while they still ran."""
    clamped: int = 0
    """Iterations whose real clock lay below the asked one though it had time to change."""
    busy_s: float = 0.0
    seconds_at_mhz: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))


class ClockPolicy(abc.ABC):
    """Chooses clocks for one instance. Called from the instance's loop alone."""

    controls: bool = True
    """Whether it ever asks for a clock."""
    start_mhz: int | None = None
    """The clock before the first iteration; the highest of the choices where None."""
    predicted_s: float | None = None
    """Time predicted of a step of the iteration last chosen for; None where nothing is predicted,
    and then no watchdog looks after it."""
    idle_after_s: float | None = None
    """Quiet time after which the clock falls to `idle_mhz`; None for never."""
    idle_mhz: int | None = None
    """The lowest of the choices where None."""

    def __init__(self) -> None:
        self.record = Record()

    @abc.abstractmethod
    def choose(self, load: Load, queue: Queue, clocks: Clocks) -> int | None:
        """The clock of the iteration about to run; must take well under 0.5 ms.

        Returns:
            One of `clocks.choices_mhz`, or None to leave the clock as it is.
        """

    def learn(self, ran: Ran) -> None:
        """Takes in what came of an iteration."""
        return

    def patience_s(self, predicted_s: float) -> float:
        """How long an iteration of which `predicted_s` was expected may take before the clock goes
        to the highest."""
        return math.inf

    def overran(self) -> None:
        """An iteration took longer than that."""
        return

    def close(self) -> None:
        """Ends what the policy runs of its own, such as training in the background."""
        return


class OwnRule(ClockPolicy):
    """Leaves the clock to the GPU's own rule."""

    controls = False

    def choose(self, load: Load, queue: Queue, clocks: Clocks) -> None:
        return None


def load_of(iteration: "Iteration") -> Load:
    """The iteration's size as policies and cost models see it."""
    prefills = iteration.prefills
    return Load(
        iteration.prefill_tokens,
        len(prefills),
        sum(piece.start for piece in prefills) if prefills else 0,
        len(iteration.decodes),
        iteration.kv_tokens,
        drafted=iteration.drafted if iteration.drafts else 0,
        gain=iteration.gain,
    )


def check_choices(clocks_mhz: Sequence[int], listed_mhz: Sequence[int], name: str) -> None:
    """Raises UsageError where there is nothing to choose, or a clock is not one of the GPU's."""
    if not clocks_mhz:
        raise UsageError("clocks_mhz is empty; give at least the maximum clock")
    unlisted = [mhz for mhz in clocks_mhz if listed_mhz and mhz not in listed_mhz]
    if unlisted:
        raise UsageError(
            f"clocks_mhz={unlisted} are not clocks of {name}; it lists "
            f"{listed_mhz[0]}..{listed_mhz[-1]} MHz"
        )
