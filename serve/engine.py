"""The serving engine: instances, the routes between them, and one asyncio face for callers.

Requests enter by `generate`, an asynchronous iterator of tokens; leaving it early, for whatever
reason, ends the request everywhere. The engine itself computes nothing: it counts what is where.
"""

import asyncio
import itertools
import logging
import math
import threading
from collections.abc import AsyncGenerator, Callable, Sequence

from jaxsys.errors import RunError
from jaxsys.serve.clock import Clock
from jaxsys.serve.handover import Receiver, Sender
from jaxsys.serve.hooks import FewestRequestsRouter, Router
from jaxsys.serve.instance import Instance, TokenEvent
from jaxsys.serve.requests import FinishReason, Request, SamplingParameters

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""How often a request is begun whose instances fail."""


class Overloaded(RunError):
    """Too many requests are in the engine."""

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Generation:
    """A request as its caller's task sees it."""

    __slots__ = ("attempts", "ended", "events", "home", "request", "tokens")

    def __init__(self, request: Request, home: Instance):
        self.request = request
        """As it was last submitted: an attempt to go on after a failure is a request of its own."""
        self.home = home
        """The instance it was last known to be on."""
        self.events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self.ended = False
        self.tokens: list[int] = []
        """Tokens that have reached the caller."""
        self.attempts = 1


class Engine:
    """Instances that prefill and decode together ("both"), or apart."""

    def __init__(
        self,
        *,
        clock: Clock,
        max_requests: int,
        prefill_router: Router | None = None,
        decode_router: Router | None = None,
        on_token: Callable[[Request, TokenEvent], None] | None = None,
    ):
        """
        Args:
            max_requests: most requests in the engine; more are refused with `Overloaded`.
            on_token: sees every event on the event loop's thread, for metrics.
        """
        self.clock = clock
        self.max_requests = max_requests
        self.prefill_router = prefill_router or FewestRequestsRouter()
        self.decode_router = decode_router or FewestRequestsRouter()
        self.on_token = on_token
        self.entries: list[Instance] = []
        """Instances that take new requests: prefill ones, or those that do both."""
        self.decoders: list[Instance] = []
        """Decode instances, where they are apart."""
        self.draining = False
        self._generations: dict[str | int, Generation] = {}
        self._homes = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._numbers = itertools.count()
        self._recent_s: list[float] = []

    # --- construction -------------------------------------------------------------------------

    def add_instances(self, entries: Sequence[Instance], decoders: Sequence[Instance]) -> None:
        """Sets the instances, before `start`; decoders receive what entries prefill."""
        self.entries, self.decoders = list(entries), list(decoders)
        receivers = []
        for instance in self.decoders:
            receiver = Receiver(instance)
            instance.transfer = receiver
            receivers.append(receiver)
        if receivers:
            for instance in self.entries:
                instance.transfer = Sender(
                    instance, receivers, self.decode_router, moved=self._moved
                )

    def sink(self, name: str) -> Callable[[Sequence[TokenEvent]], None]:
        """Where the instance called `name` puts its events; usable before `start`."""

        def deliver(events: Sequence[TokenEvent]) -> None:
            loop = self._loop
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver, name, events)

        return deliver

    @property
    def instances(self) -> list[Instance]:
        return [*self.entries, *self.decoders]

    @property
    def unfinished(self) -> int:
        """Requests in the engine."""
        return len(self._generations)

    @property
    def failed(self) -> list[str]:
        """The instances that have failed, and why."""
        return [
            f"instance {one.name} failed: {one.failure}"
            for one in self.instances
            if one.failure is not None
        ]

    @property
    def failure(self) -> str | None:
        """Why the engine cannot serve; None where a way through living instances is left."""
        for group in (self.entries, self.decoders):
            if group and all(one.failure is not None for one in group):
                return "; ".join(self.failed)
        return None

    async def start(self) -> None:
        """Starts the instances on the running event loop."""
        self._loop = asyncio.get_running_loop()
        for instance in self.instances:
            instance.start()

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests, waits for those in the engine, ends what is left, stops.

        Returns:
            How many requests had to be ended.
        """
        self.draining = True
        deadline_s = self.clock.now_s() + timeout_s
        while self._generations and self.clock.now_s() < deadline_s:
            await asyncio.sleep(0.02)
        left = list(self._generations)
        for request_id in left:
            self.abort(request_id)
        grace_s = self.clock.now_s() + 5
        while self._generations and self.clock.now_s() < grace_s:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(lambda: [instance.stop(10) for instance in self.instances])
        return len(left)

    # --- requests -----------------------------------------------------------------------------

    def check(self, prompt_length: int, max_tokens: int) -> None:
        """Raises UsageError for what no instance can serve."""
        for instance in (self.entries[0], *self.decoders[:1]):
            instance.scheduler.check_fits(prompt_length, max_tokens)

    def admit(self, count: int = 1) -> None:
        """Raises where `count` more requests cannot be taken up now.

        Raises:
            Overloaded: with the time after which trying again makes sense.
            RunError: if the engine drains or an instance has failed.
        """
        failure = self.failure
        if failure is not None:
            raise RunError(failure)
        if self.draining:
            raise RunError("the server is shutting down; use another one")
        if len(self._generations) + count > self.max_requests:
            raise Overloaded(
                f"{len(self._generations)} requests are being served or wait; at most "
                f"{self.max_requests} are taken. Try again later",
                self._retry_after_s(count),
            )

    async def generate(
        self,
        prompt_tokens: Sequence[int],
        sampling: SamplingParameters,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """The tokens of one request as they come; the last event carries `finish_reason`.

        Raises:
            UsageError, Overloaded, RunError: before the first token, as `check` and `admit` do.
        """
        self.check(len(prompt_tokens), sampling.max_tokens)
        self.admit()
        request = Request(
            request_id or f"request-{next(self._numbers)}",
            sampling=sampling,
            arrival_s=self.clock.now_s(),
            prompt_tokens=prompt_tokens,
        )
        generation = Generation(request, self._choose_entry(request))
        self._submit(generation)
        try:
            while not generation.ended or not generation.events.empty():
                yield await generation.events.get()
        finally:
            if not generation.ended:
                self.abort(generation.request.request_id)

    def abort(self, request_id: str | int, reason: FinishReason = "abort") -> None:
        """Ends a request wherever it is; to be called on the event loop's thread."""
        generation = self._generations.get(request_id)
        if generation is None:
            return
        # The prefill side first: it knows whether the request has been offered onward.
        for instance in self.instances:
            instance.abort(request_id, reason)

    # --- inside -------------------------------------------------------------------------------

    def _moved(self, request: Request, source: Instance, target: Instance) -> None:
        """Called on the source's thread."""
        with self._homes:
            generation = self._generations.get(request.request_id)
            if generation is None:  # it has ended meanwhile, and was taken off the source's count
                target.adjust_in_flight(-1)
            else:
                generation.home = target
                source.adjust_in_flight(-1)

    def _deliver(self, name: str, events: Sequence[TokenEvent]) -> None:
        for event in events:
            generation = self._generations.get(event.request.request_id)
            if generation is None or generation.ended:
                continue
            if event.finish_reason == "error" and self._retry(generation, name):
                continue
            if self.on_token is not None:
                self.on_token(generation.request, event)
            if event.token is not None:
                generation.tokens.append(event.token)
            if event.finish_reason is not None:
                generation.ended = True
                with self._homes:
                    del self._generations[event.request.request_id]
                    generation.home.adjust_in_flight(-1)
                if event.finish_reason == "error":
                    logger.error(
                        "request failed",
                        extra={
                            "request_id": event.request.request_id,
                            "instance": name,
                            "reason": event.message,
                        },
                    )
                    # The other side may still hold its part.
                    for instance in self.instances:
                        instance.abort(event.request.request_id)
                self._recent_s = [*self._recent_s[-31:], event.time_s]
            generation.events.put_nowait(event)

    def _choose_entry(self, request: Request) -> Instance:
        living = [one for one in self.entries if one.failure is None]
        return living[self.prefill_router.choose(living, request)]

    def _submit(self, generation: Generation) -> None:
        self._generations[generation.request.request_id] = generation
        generation.home.adjust_in_flight(1)
        generation.home.submit(generation.request)

    def _retry(self, generation: Generation, name: str) -> bool:
        """Starts a request again whose instance has failed, from its tokens so far.

        A draw depends on seed and position alone, so the text goes on as it would have.
        """
        old = generation.request
        dead = any(one.name == name and one.failure is not None for one in self.instances)
        if not dead or self.failure or self.draining or generation.attempts >= MAX_ATTEMPTS:
            return False
        # A name of its own: whatever the other side still says of the old attempt is passed over.
        request = Request(
            f"{str(old.request_id).partition('~')[0]}~{generation.attempts}",
            sampling=old.sampling,
            arrival_s=old.arrival_s,
            prompt_tokens=old.prompt_tokens,
            timing=old.timing,
        )
        request.output_tokens = list(generation.tokens)
        request.generated = len(generation.tokens)
        with self._homes:
            del self._generations[old.request_id]
            generation.home.adjust_in_flight(-1)
        for instance in self.instances:
            instance.abort(old.request_id)
        generation.attempts += 1
        generation.request, generation.home = request, self._choose_entry(request)
        self._submit(generation)
        logger.warning("retrying", extra={"request_id": request.request_id, "instance": name})
        return True

    def _retry_after_s(self, count: int) -> int:
        """Seconds in which `count` requests end at the pace of late; between 1 and 60."""
        recent = self._recent_s
        if len(recent) < 2 or recent[-1] <= recent[0]:
            return 1
        pace = (len(recent) - 1) / (recent[-1] - recent[0])
        return max(1, min(60, math.ceil(count / pace)))
