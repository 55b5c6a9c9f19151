"""An instance as the engine, the router and the gauges see it, wherever it runs.

`Instance` is one on a thread of this process, `RemoteInstance` one in a process of its own.
"""

import abc
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxsys.serve.outcomes import TokenLogprobs
from jaxsys.serve.requests import FinishReason, Request

if TYPE_CHECKING:
    from jaxsys.serve.handover import Message

NOT_FINITE = "the model's outputs are not finite"
"""The message of a request that ended because the model computed NaN or infinity for it."""


class TokenEvent(NamedTuple):
    """One more token of a request, or its end, or both."""

    request: Request
    token: int | None
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    time_s: float
    message: str = ""
    """What went wrong, where `finish_reason` is "error"."""
    lost: bool = False
    """An instance or the way to it failed, not the request: it may be begun again elsewhere."""
    prompt: "list[TokenLogprobs | None] | None" = None
    """With the first token, where it was asked for: what was computed of the prompt's tokens."""
    embedding: list[float] | None = None
    """The same of the prompt's hidden states: pooled, of length 1."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLoad:
    """What an instance last said of itself; read by routers and gauges on other threads."""

    batch: int = 0
    kv_tokens: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    pages_held: int = 0
    preemptions: int = 0
    iterations: int = 0
    faults: int = 0
    """Faults of the device that the instance has outlived."""
    drafts: int | None = None
    """Guesses of tokens to come that were computed; None where none are made."""
    guesses_ready: bool | None = None
    """Whether the steps for them are compiled, for every batch that may guess; None likewise."""
    draft_tokens: int = 0
    """Tokens of these."""
    accepted_at: tuple[int, ...] = ()
    """How often the first, second, ... token of a guess was right."""
    host_pages: int | None = None
    """Pages that the host's memory keeps; None where it keeps none."""
    host_fetched: int = 0
    """Pages that came back from it."""
    energy_j: float | None = None
    """As the governor reads it; None where nothing does."""
    idle_energy_j: float | None = None
    """Of this, what passed while nothing ran."""
    energy_at_max_j: float | None = None
    """What the same work would have taken at the maximum clock, where the governor models it."""
    power_w: float | None = None
    """Measured now; None where nothing measures it, as on a CPU."""
    clock_mhz: float | None = None
    """The clock the governor last asked for; None where none is governed."""
    clock_bounds_mhz: Sequence[int] | None = None
    """The lowest and the highest that it may ask for; None where it asks for none."""


class Member(abc.ABC):
    """What is common to instances near and far; every method may be called from any thread."""

    def __init__(self, name: str, *, page_count: int, energy_method: str, page_size: int = 0):
        """
        Args:
            page_size: tokens of a page; 0 where that is not known.
        """
        self.name = name
        self.page_count = page_count
        self.page_size = page_size
        self.energy_method = energy_method
        self._load = InstanceLoad()
        self._in_flight = 0
        self.failure: BaseException | None = None
        self.retiring = False
        """Whether it gets no more requests because it is to go."""
        self.catching_up = False
        """Whether it gets none yet, because it lacks adapters that others have."""
        self.on_latency: Callable[[float], None] | None = None
        """Told the latency of each completed iteration in seconds, for gauges."""
        self._lock = threading.Lock()

    @property
    def load(self) -> InstanceLoad:
        """What it last said of itself."""
        return self._load

    @load.setter
    def load(self, load: InstanceLoad) -> None:
        self._load = load

    @property
    def in_flight(self) -> int:
        """Requests that routers have sent here that have not ended; counted by their owners."""
        return self._in_flight

    @property
    def batch(self) -> int:
        return self.load.batch

    @property
    def kv_tokens(self) -> int:
        return self.load.kv_tokens

    @property
    def waiting_tokens(self) -> int:
        return self.load.waiting_tokens

    @property
    def waiting_requests(self) -> int:
        """All in flight: how many of them wait is known only as of the last turn."""
        return self.in_flight

    @property
    def busy_until_s(self) -> float | None:
        """Not known."""
        return None

    @property
    def clock_mhz(self) -> float | None:
        """The clock the governor last asked for; None where none is governed."""
        return self.load.clock_mhz

    @property
    def open(self) -> bool:
        """Whether a router may choose it."""
        return self.failure is None and not self.retiring and not self.catching_up

    def adjust_in_flight(self, change: int) -> None:
        """Adds to `in_flight`; several threads do."""
        with self._lock:
            self._in_flight += change

    @abc.abstractmethod
    def start(self) -> None:
        """Starts the loop, where it does not run yet."""

    @abc.abstractmethod
    def check_fits(self, prompt_length: int, max_tokens: int) -> None:
        """Raises UsageError where such a request could never be served here."""

    @abc.abstractmethod
    def submit(self, request: Request) -> None:
        """Takes up a new request."""

    @abc.abstractmethod
    def abort(self, request_id: str | int, reason: FinishReason = "abort") -> None:
        """Ends a request in whatever state it is; nothing happens if it is not here (any more)."""

    @abc.abstractmethod
    def take(self, message: "Message") -> None:
        """Passes on a message about a hand-over."""

    @abc.abstractmethod
    def load_adapter(self, key: str, folder: str, done: Callable[[str | None], None]) -> None:
        """Takes the low-rank adapters of a folder up, while it serves.

        Args:
            key: what requests call them.
            done: told what was wrong, or None, on whatever thread; never if the instance ends.
        """

    @abc.abstractmethod
    def unload_adapter(self, key: str) -> None:
        """Forgets adapters that no request uses any more."""

    @abc.abstractmethod
    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the loop after the iterations in flight; True once it has ended."""
