"""The serving engine: instances, the routes between them, and one asyncio face for callers.

Requests enter by `generate`, an asynchronous iterator of tokens; leaving it early, for whatever
reason, ends the request everywhere. The engine itself computes nothing: it counts what is where.
Instances may come and go while it serves, and may be threads of this process or processes.
"""

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import AsyncGenerator, Callable, Sequence

from jaxsys.errors import RunError
from jaxsys.serve.adapters import Adapters, Served, UnknownAdapter, name_of
from jaxsys.serve.clock import Clock
from jaxsys.serve.crowd import Crowd, OwnCrowd
from jaxsys.serve.exchange import Exchange, HandoverLimits
from jaxsys.serve.generation import Generation, Watch
from jaxsys.serve.grammars import Grammars
from jaxsys.serve.handover import RequestId
from jaxsys.serve.hooks import FewestRequestsRouter, Router
from jaxsys.serve.member import Member, TokenEvent
from jaxsys.serve.requests import FieldRefused, FinishReason, Request, SamplingParameters

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""How often a request is begun whose instances fail."""

WATCH_S = 0.5
"""How often the engine looks for hand-overs that take too long, and whether it has failed."""


class Overloaded(RunError):
    """Too many requests are in the engine."""

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Engine:
    """Instances that prefill and decode together ("both"), or apart."""

    def __init__(
        self,
        *,
        clock: Clock,
        max_requests: int,
        prefill_router: Router | None = None,
        decode_router: Router | None = None,
        limits: HandoverLimits | None = None,
        on_token: Callable[[Request, TokenEvent, str], None] | None = None,
    ):
        """
        Args:
            max_requests: most requests in the engine; more are refused with `Overloaded`.
            on_token: sees every event, with the name of the instance it came from, on the event
                loop's thread, for metrics.
        """
        self.clock = clock
        self.max_requests = max_requests
        self.prefill_router = prefill_router or FewestRequestsRouter()
        self.on_token = on_token
        self.on_join: Callable[[Member], None] | None = None
        """Told of each instance that is added."""
        self.on_watch: Callable[[], None] | None = None
        """Called every `WATCH_S`, on the event loop's thread."""
        self.entries: list[Member] = []
        """Instances that take new requests: prefill ones, or those that do both."""
        self.decoders: list[Member] = []
        """Decode instances, where they are apart."""
        self.apart = False
        """Whether decode instances are apart, even if none is up at present."""
        self.exchange = Exchange(
            decode_router or FewestRequestsRouter(), clock=clock, moved=self._moved, limits=limits
        )
        self.grammars: Grammars | None = None
        """Those that the instances share, where they are in this process."""
        self.adapters: Served = Adapters(self)
        """The low-rank adapters that requests may name."""
        self.draining = False
        self.healing = False
        """Whether failed instances are replaced: then requests wait for that, if they must."""
        self.crowd: Crowd = OwnCrowd()
        """Counts requests, where there are several fronts those of all."""
        self.prefix = "request"
        """How the names of requests begin that are given none."""
        self._generations: dict[RequestId, Generation] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._recent_s: list[float] = []

    # --- instances ----------------------------------------------------------------------------

    def add(self, instance: Member, *, decodes: bool) -> None:
        """Adds an instance: one that takes new requests, or one that decodes those of others."""
        # New lists, since other threads may be reading the old ones.
        if decodes:
            self.apart = True
            self.exchange.decoders = self.decoders = [*self.decoders, instance]
        else:
            self.entries = [*self.entries, instance]
        if self.on_join is not None:
            self.on_join(instance)
        if self._loop is not None:
            instance.start()
            self.adapters.join(instance, self._place_waiting)
            self._place_waiting()

    def remove(self, instance: Member) -> None:
        """Forgets an instance that has failed or was emptied by `retire`."""
        self.entries = [one for one in self.entries if one is not instance]
        self.exchange.decoders = self.decoders = [
            one for one in self.decoders if one is not instance
        ]

    async def retire(self, instance: Member, timeout_s: float) -> bool:
        """Gives an instance no more requests, waits for those it has, stops it, forgets it.

        Returns:
            Whether it was empty in time; what was left is begun again elsewhere.
        """
        instance.retiring = True
        deadline_s = self.clock.now_s() + timeout_s
        while instance.in_flight and instance.failure is None and self.clock.now_s() < deadline_s:
            await asyncio.sleep(0.02)
        emptied = not instance.in_flight
        if not emptied:
            self.lose(instance, f"instance {instance.name} was to go before it was empty")
        await asyncio.to_thread(instance.stop, 10)
        self.remove(instance)
        return emptied

    def lose(self, instance: Member, message: str) -> None:
        """Begins again elsewhere whatever is on an instance; on the event loop's thread."""
        undecided = self.exchange.gone(instance)
        now_s = self.clock.now_s()
        for name, generation in list(self._generations.items()):
            if generation.home is instance or name in undecided:
                event = TokenEvent(generation.request, None, None, "error", now_s, message, True)
                self.receive(instance, [event])

    def sink(self, name: str) -> Callable[[Sequence[TokenEvent]], None]:
        """Where the thread of the instance called `name` puts its events."""

        def deliver(events: Sequence[TokenEvent]) -> None:
            loop = self._loop
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self.receive, name, events)

        return deliver

    @property
    def instances(self) -> list[Member]:
        return [*self.entries, *self.decoders]

    @property
    def unfinished(self) -> int:
        """Requests in the engine, and in those of other fronts."""
        return self.crowd.total()

    def uses(self, key: str) -> int:
        """Requests in the engine that are computed with an adapter."""
        return sum(one.request.adapter == key for one in self._generations.values())

    def by_adapter(self) -> dict[str, tuple[int, int]]:
        """Of each adapter that requests are computed with: how many have no token yet, and some."""
        found: dict[str, tuple[int, int]] = {}
        for generation in self._generations.values():
            name = name_of(generation.request.adapter)
            if name is not None:
                waiting, running = found.get(name, (0, 0))
                if generation.request.timing.first_token_s is None:
                    found[name] = waiting + 1, running
                else:
                    found[name] = waiting, running + 1
        return found

    @property
    def energy_method(self) -> str:
        """How energy is known."""
        return self.instances[0].energy_method if self.instances else "none: no instance is up"

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
        if self.healing:
            return None
        for group in (self.entries, self.decoders):
            if group and all(one.failure is not None for one in group):
                return "; ".join(self.failed)
        return None

    async def start(self) -> None:
        """Starts the instances on the running event loop."""
        self._loop = asyncio.get_running_loop()
        for instance in self.instances:
            instance.start()
        self._watcher = asyncio.create_task(self._watch())

    async def until_failure(self) -> str:
        """Waits until the engine cannot serve any more, and says why."""
        while self.failure is None:
            await asyncio.sleep(WATCH_S)
        return self.failure or ""

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
        if self._watcher is not None:
            self._watcher.cancel()
        await asyncio.to_thread(lambda: [instance.stop(10) for instance in self.instances])
        return len(left)

    # --- requests -----------------------------------------------------------------------------

    def check(self, prompt_length: int, max_tokens: int) -> None:
        """Raises UsageError for what no instance can serve."""
        for instance in (*self.entries[:1], *self.decoders[:1]):
            instance.check_fits(prompt_length, max_tokens)

    def admit(self, count: int = 1) -> None:
        """Raises where `count` more requests cannot be taken up now.

        Raises:
            UsageError: if so many are never taken at once.
            Overloaded: with the time after which trying again makes sense.
            RunError: if the engine drains or an instance has failed.
        """
        if count > self.max_requests:
            raise FieldRefused(
                f"{count} choices are asked for at once; at most {self.max_requests} are taken. "
                f"Lower n or send fewer prompts",
                "n",
            )
        failure = self.failure
        if failure is not None:
            raise RunError(failure)
        if self.draining:
            raise RunError("the server is shutting down; use another one")
        if self.unfinished + count > self.max_requests:
            raise Overloaded(
                f"{self.unfinished} requests are being served or wait; at most "
                f"{self.max_requests} are taken. Try again later",
                self._retry_after_s(count),
            )

    async def generate(
        self,
        prompt_tokens: Sequence[int],
        sampling: SamplingParameters,
        *,
        request_id: str | None = None,
        adapter: str | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """The tokens of one request as they come; the last event carries `finish_reason`.

        Raises:
            UsageError, Overloaded, RunError: before the first token, as `check` and `admit` do.
        """
        generation = self.submit(prompt_tokens, sampling, request_id=request_id, adapter=adapter)
        async with contextlib.aclosing(self.events(generation)) as events:
            async for event in events:
                yield event

    def submit(
        self,
        prompt_tokens: Sequence[int],
        sampling: SamplingParameters,
        *,
        request_id: str | None = None,
        watch: Watch | None = None,
        adapter: str | None = None,
        session: str | None = None,
    ) -> Generation:
        """Begins a request at once; whoever does so must `leave` it in the end.

        Args:
            adapter: name of one that is loaded; None: the model alone.
            watch: sees each token as it reaches this thread, before anybody else does, and says
                whether the output ends with it, as at a stop string. Then the request ends
                everywhere, and whatever was computed ahead is never seen nor counted.
            session: what the request belongs to; see `Request`.

        Raises:
            UsageError, Overloaded, RunError: as `check` and `admit` do.
        """
        self.check(len(prompt_tokens), sampling.places)
        found = None if adapter is None else self.adapters.get(adapter)
        if adapter is not None and found is None:
            raise UnknownAdapter(f"adapter {adapter!r} is not loaded")
        request = Request(
            request_id or f"{self.prefix}-{next(self._numbers)}",
            sampling=sampling,
            arrival_s=self.clock.now_s(),
            prompt_tokens=prompt_tokens,
            adapter=None if found is None else found.key,
            session=session,
        )
        with self.crowd.lock():
            self.admit()
            self.crowd.add(1, request.adapter)
        generation = Generation(request, watch)
        self._submit(generation)
        return generation

    async def events(self, generation: Generation) -> AsyncGenerator[TokenEvent, None]:
        """What comes of a request that was submitted; it is left at the latest with this."""
        try:
            while not generation.ended or not generation.events.empty():
                yield await generation.events.get()
        finally:
            self.leave(generation)

    async def all_events(self, generation: Generation) -> list[TokenEvent]:
        """The same at once, when it has ended; nothing is computed for it in between."""
        try:
            return await generation.events.get_all()
        finally:
            self.leave(generation)

    def leave(self, generation: Generation) -> None:
        """Ends a request, if it has not ended, since nobody waits for it any more."""
        if not generation.ended:
            self.abort(generation.request.request_id)

    def abort(self, request_id: str | int, reason: FinishReason = "abort") -> None:
        """Ends a request wherever it is; to be called on the event loop's thread."""
        generation = self._generations.get(request_id)
        if generation is None:
            return
        for instance in self._holders(generation):
            instance.abort(request_id, reason)
        if generation.home is None:
            now_s = self.clock.now_s()
            self.receive("", [TokenEvent(generation.request, None, None, reason, now_s)])

    # --- inside -------------------------------------------------------------------------------

    def _moved(self, request_id: RequestId, source: Member, target: Member) -> None:
        """A request has changed hands; called under the exchange's lock, on whatever thread."""
        generation = self._generations.get(request_id)
        if generation is None:  # it has ended meanwhile, and was taken off the source's count
            target.adjust_in_flight(-1)
        else:
            generation.home = target
            source.adjust_in_flight(-1)

    def _holders(self, generation: Generation) -> list[Member]:
        """The instances that hold a part of a request, the prefill side first.

        It knows whether the request has been offered onward.
        """
        with self.exchange.lock:
            passage = self.exchange.passage(generation.request.request_id)
            found = [generation.home]
            if passage is not None:
                found += [passage.source, passage.target]
        return list(dict.fromkeys(one for one in found if one is not None))

    def receive(self, source: Member | str, events: Sequence[TokenEvent]) -> None:
        """Takes an instance's events in; on the event loop's thread."""
        for event in events:
            generation = self._generations.get(event.request.request_id)
            if generation is None or generation.ended:
                continue
            if event.finish_reason == "error" and event.lost and self._retry(generation):
                continue
            everywhere = event.finish_reason == "error"  # the other side may still hold its part
            if event.token is not None:
                generation.tokens.append(event.token)
                if generation.watch is not None and self._watched(generation.watch, event):
                    everywhere = everywhere or event.finish_reason is None
                    event = event._replace(finish_reason="stop")
            if self.on_token is not None:
                name = source if isinstance(source, str) else source.name
                self.on_token(generation.request, event, name)
            if event.finish_reason is not None:
                self._end(generation, everywhere=everywhere)
                self.crowd.add(-1, generation.request.adapter)
                if event.finish_reason == "error":
                    logger.error(
                        "request failed",
                        extra={
                            "request_id": event.request.request_id,
                            "instance": source if isinstance(source, str) else source.name,
                            "reason": event.message,
                        },
                    )
                self._recent_s = [*self._recent_s[-31:], event.time_s]
            generation.events.put(event)

    def _watched(self, watch: Watch, event: TokenEvent) -> bool:
        try:
            return watch(event)
        except Exception:  # of one request, while events of others wait
            logger.exception("a watch failed", extra={"request_id": event.request.request_id})
            return True

    def _end(self, generation: Generation, *, everywhere: bool) -> None:
        """Takes a request, or one attempt at it, off the books, and out of the instances too."""
        request_id = generation.request.request_id
        with self.exchange.lock:
            holders = self._holders(generation)
            del self._generations[request_id]
            if generation.home is not None:
                generation.home.adjust_in_flight(-1)
        if everywhere:
            for instance in holders:
                instance.abort(request_id)
        generation.ended = True

    def _choose_entry(self, request: Request) -> Member | None:
        living = [one for one in self.entries if one.open]
        return living[self.prefill_router.choose(living, request)] if living else None

    def _submit(self, generation: Generation) -> None:
        self._generations[generation.request.request_id] = generation
        if self.apart and not any(one.open for one in self.decoders):
            return  # placed when one comes up
        generation.home = home = self._choose_entry(generation.request)
        if home is not None:
            home.adjust_in_flight(1)
            home.submit(generation.request)

    def stop_healing(self, message: str) -> None:
        """Failed instances are no longer replaced: whoever waits for that is told."""
        self.healing = False
        for generation in list(self._generations.values()):
            if generation.home is None:
                now_s = self.clock.now_s()
                event = TokenEvent(generation.request, None, None, "error", now_s, message)
                self.receive("", [event])

    def _place_waiting(self) -> None:
        """An instance has come up: whoever waits for one is placed."""
        for generation in [one for one in self._generations.values() if one.home is None]:
            self._submit(generation)

    def _retry(self, generation: Generation) -> bool:
        """Starts a request again whose instance has failed, from its tokens so far.

        A draw depends on seed and position alone, so the text goes on as it would have.
        """
        old = generation.request
        if self.failure or self.draining or generation.attempts >= MAX_ATTEMPTS:
            return False
        # A name of its own: whatever the other side still says of the old attempt is passed over.
        request = Request(
            f"{str(old.request_id).partition('~')[0]}~{generation.attempts}",
            sampling=old.sampling,
            arrival_s=old.arrival_s,
            prompt_tokens=old.prompt_tokens,
            timing=old.timing,
            adapter=old.adapter,
            session=old.session,
        )
        request.output_tokens = list(generation.tokens)
        request.generated = len(generation.tokens)
        self._end(generation, everywhere=True)
        generation.ended = False
        generation.attempts += 1
        generation.request, generation.home = request, None
        self._submit(generation)
        logger.warning("retrying", extra={"request_id": request.request_id})
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            if self.on_watch is not None:
                try:
                    self.on_watch()
                except Exception:  # whoever looks on must not end what is looked at
                    logger.exception("on_watch")
            for request_id, message in self.exchange.late():
                generation = self._generations.get(request_id)
                if generation is not None:
                    now_s = self.clock.now_s()
                    event = TokenEvent(
                        generation.request, None, None, "error", now_s, message, True
                    )
                    self.receive("", [event])
                self.exchange.give_up(request_id)

    def _retry_after_s(self, count: int) -> int:
        """Seconds in which `count` requests end at the pace of late; between 1 and 60."""
        recent = self._recent_s
        if len(recent) < 2 or recent[-1] <= recent[0]:
            return 1
        pace = (len(recent) - 1) / (recent[-1] - recent[0])
        pace *= self.unfinished / max(1, len(self._generations))  # other fronts have their own
        return max(1, min(60, math.ceil(count / pace)))
