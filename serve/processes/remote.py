"""Instances in other processes, as the front sees them.

Each instance's process connects to the `Switchboard` and says who it is; from then on a
`RemoteInstance` stands for it in the engine. The front keeps the one true `Request`, with its times
as they are seen here, since clocks differ between machines. An instance is lost when its connection
ends, when it says that it has failed, or when nothing, not even its pulse, has come for a while.
"""

import asyncio
import contextlib
import functools
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from jaxsys.errors import RunError
from jaxsys.serve.clock import Clock
from jaxsys.serve.engine import Engine
from jaxsys.serve.handover import Delivery, Message, Offer, Withdrawal
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.member import InstanceLoad, Member, TokenEvent
from jaxsys.serve.outcomes import TokenLogprobs
from jaxsys.serve.processes.secret import (
    MAX_STRANGERS,
    PROOF_BYTES,
    PROVE_S,
    challenge,
    proves,
)
from jaxsys.serve.processes.shared import Tally
from jaxsys.serve.processes.wire import (
    Frame,
    Frames,
    load_of,
    message_frame,
    message_of,
    pack,
    request_data,
)
from jaxsys.serve.request_rules import seed_of
from jaxsys.serve.requests import FinishReason, Request

logger = logging.getLogger(__name__)

SILENCE_S = 10.0
"""An instance of which nothing has been heard for so long is given up: it pulses every second."""
STRANGER_BYTES = 4096
READ_BYTES = 256 << 10
"""Most bytes read at once before and after a connection has proved that it knows the secret."""


class RemoteInstance(Member):
    """An instance's process; everything but `stop` runs on the event loop's thread."""

    def __init__(
        self,
        name: str,
        config: SchedulerConfig,
        *,
        energy_method: str,
        process: str,
        engine: Engine,
        transport: asyncio.Transport,
        tally: Tally | None = None,
    ):
        """
        Args:
            tally: counts what is in flight here, where several fronts do; None: this one alone.
        """
        super().__init__(
            name,
            page_count=config.page_count,
            page_size=config.page_size,
            energy_method=energy_method,
        )
        self.config = config
        self.process = process
        """Its machine and process number."""
        self.engine = engine
        self.clock: Clock = engine.clock
        self.tally = tally
        self._others = tally is not None
        """Whether there are other fronts."""
        self._values: list[Any] | None = None
        """Its load as it came, if nobody has asked for it yet."""
        self.requests: dict[str | int, Request] = {}
        """Requests known there that have not ended."""
        self.stopped = threading.Event()
        self._loading: dict[str, Callable[[str | None], None]] = {}
        self._energies_j: dict[str | int, tuple[float, float]] = {}
        """Of each request, what it told last: in all, and for its prompt."""
        self._transport = transport
        self._loop = asyncio.get_running_loop()

    @property
    def load(self) -> InstanceLoad:
        """What it last said of itself."""
        if self._values is not None:
            self._load, self._values = load_of(self._values), None
        return self._load

    @load.setter
    def load(self, load: InstanceLoad) -> None:
        self._load, self._values = load, None

    @property
    def in_flight(self) -> int:
        """Requests in flight there, those of other fronts too."""
        return self._in_flight if self.tally is None else self.tally.total()

    def adjust_in_flight(self, change: int) -> None:
        if self.tally is None:
            super().adjust_in_flight(change)
        else:
            self.tally.add(change)

    def start(self) -> None:
        """Nothing: the process has started it."""

    def check_fits(self, prompt_length: int, max_tokens: int) -> None:
        self.config.check_fits(prompt_length, max_tokens)

    def submit(self, request: Request) -> None:
        self._take_up("submit", request)

    def abort(self, request_id: str | int, reason: FinishReason = "abort") -> None:
        if request_id in self.requests:
            self.send(["abort", request_id, reason])

    def take(self, message: Message) -> None:
        if isinstance(message, Offer):
            self._take_up("offer", message.request)
            return
        if isinstance(message, Withdrawal):
            self._forget(message.request_id)
        self.send(message_frame(message))

    def load_adapter(self, key: str, folder: str, done: Callable[[str | None], None]) -> None:
        self._loading[key] = done
        self.send(["load_adapter", key, folder])

    def unload_adapter(self, key: str) -> None:
        self.send(["unload_adapter", key])

    def stop(self, timeout_s: float | None = None) -> bool:
        """Never on the event loop's thread, which must take in the answer.

        One of several fronts only hangs up: the instance goes on with the others.
        """
        end = self._transport.close if self._others else functools.partial(self.send, ["stop"])
        self._loop.call_soon_threadsafe(end)
        return self.stopped.wait(timeout_s)

    def send(self, frame: Frame) -> None:
        """Sends to the process, if it is still there."""
        if self.failure is None and not self._transport.is_closing():
            self._transport.write(pack(frame))

    def lost(self, reason: str) -> None:
        """The process is gone or not to be relied on: its requests begin again elsewhere."""
        self._transport.abort()
        self.stopped.set()
        if self.failure is None:
            self.failure = RunError(reason)
            self.requests.clear()
            self.engine.lose(self, f"instance {self.name}: {reason}")

    def received(self, frame: Frame) -> None:
        """Takes one frame from the process in."""
        kind = frame[0]
        if kind == "events":
            _, events, latencies_s, self._values = frame
            self._tell(latencies_s)
            now_s = self.clock.now_s()
            made = [self._event(entry, now_s) for entry in events]
            self.engine.receive(self, [event for event in made if event is not None])
        elif kind == "pulse":
            _, latencies_s, self._values = frame
            self._tell(latencies_s)
        elif kind == "offer":
            request = self.requests.get(frame[1])
            if request is not None:  # not aborted from here meanwhile
                request.cached_tokens = frame[2]
                self.engine.exchange.forward(self, Offer(request))
        elif kind == "adapter":
            done = self._loading.pop(frame[1], None)
            if done is not None:
                done(frame[2])
        elif kind == "failed":
            self.lost(f"it failed: {frame[1]}")
        elif kind == "stopped":
            self.stopped.set()
        else:
            message = message_of(frame)
            if message is None:
                raise ValueError(f"frames of kind {kind!r} are unknown")
            if isinstance(message, Delivery) and message.outputs is not None:
                self._forget(message.request_id)
            self.engine.exchange.forward(self, message)

    def _tell(self, latencies_s: list[float]) -> None:
        if self.on_latency is not None:
            for latency_s in latencies_s:
                self.on_latency(latency_s)

    def _take_up(self, kind: str, request: Request) -> None:
        self.requests[request.request_id] = request
        self.send([kind, request_data(request, self.clock.now_s(), seed_of(request))])

    def _forget(self, request_id: str | int) -> None:
        self.requests.pop(request_id, None)
        self._energies_j.pop(request_id, None)

    def _event(self, entry: list[Any], now_s: float) -> TokenEvent | None:
        """An event as it came: [name, token], or with all that may go beside it."""
        name, token, *beside = entry
        request = self.requests.get(name)
        if request is None:
            return None
        timing = request.timing
        if token is not None:
            request.generated += 1
            request.output_tokens.append(token)
            if timing.first_token_s is None:
                timing.first_token_s = now_s
            timing.last_token_s = now_s
            timing.token_times_s.append(now_s)
        if not beside:
            return TokenEvent(request, token, None, None, now_s)
        reason, logprobs, message, lost, energies_j, cached, preemptions, *found_out = beside
        prompt, embedding, queued_s = found_out
        if queued_s is not None and timing.scheduled_s is None:
            timing.scheduled_s = timing.arrival_s + queued_s
        request.cached_tokens = cached
        timing.preemptions = max(timing.preemptions, preemptions)
        energy_j, prefill_j = energies_j
        if energy_j is not None:
            known_j, known_prefill_j = self._energies_j.get(name, (0.0, 0.0))
            prefill_j = prefill_j or 0.0
            timing.energy_j = (timing.energy_j or 0.0) + energy_j - known_j
            before_j = timing.prefill_energy_j or 0.0
            timing.prefill_energy_j = before_j + prefill_j - known_prefill_j
            self._energies_j[name] = energy_j, prefill_j
        if reason is not None:
            timing.finished_s, request.finish_reason = now_s, reason
            self._forget(name)
        found = None if logprobs is None else TokenLogprobs(*logprobs)
        scored = None if prompt is None else [one and TokenLogprobs(*one) for one in prompt]
        return TokenEvent(request, token, found, reason, now_s, message, lost, scored, embedding)


class Switchboard:
    """Where instances' processes connect."""

    def __init__(
        self,
        engine: Engine,
        token: str,
        *,
        on_up: Callable[[RemoteInstance], None],
        on_down: Callable[[RemoteInstance], None],
        tally: Callable[[int], Tally] | None = None,
    ):
        """
        Args:
            tally: of the instance with a number, where several fronts count.
            token: the deployment's secret, which whoever connects must prove to know.
            on_up: told of each instance that has said who it is.
            on_down: told of each whose connection has ended, whether it failed or was stopped.
        """
        self.engine = engine
        self.token = token
        self.tally = tally
        self.on_up = on_up
        self.on_down = on_down
        self.lines: set[_Line] = set()
        self.told = False
        """Whether the log has it that strangers call."""
        self._server: asyncio.Server | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def open(self, host: str, listener: socket.socket | None = None) -> int:
        """Listens on a free port, or on a socket that listens already; returns the port."""
        loop = asyncio.get_running_loop()
        if listener is None:
            self._server = await loop.create_server(lambda: _Line(self), host, 0)
        else:
            self._server = await loop.create_server(lambda: _Line(self), sock=listener)
        self._watcher = asyncio.create_task(self._watch())
        return self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Ends all connections, at which the processes end themselves."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._server is not None:
            self._server.close()
        for line in list(self.lines):
            line.close()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before_s = loop.time()
            await asyncio.sleep(SILENCE_S / 10)
            # Where this process itself was held up, what was sent meanwhile is still unread.
            held_up_s = loop.time() - before_s - SILENCE_S / 10
            for line in list(self.lines):
                line.heard_s += held_up_s
                if loop.time() - line.heard_s > SILENCE_S:
                    line.drop(f"nothing was heard of it for {SILENCE_S:g} s")


class _Line(asyncio.Protocol):
    """One connection; until it has proved that it knows the secret, nothing of it is parsed."""

    def __init__(self, board: Switchboard):
        self.board = board
        self.instance: RemoteInstance | None = None
        self.heard_s = 0.0
        self._frames = Frames()
        self._transport: Any = None
        self._loop = asyncio.get_running_loop()
        self._challenge = challenge()
        self._answer: bytes | None = b""
        """What has come of the proof; None once it was right."""
        self._proving: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.heard_s = self._loop.time()
        if sum(line._answer is not None for line in self.board.lines) >= MAX_STRANGERS:
            self._transport.abort()
            return
        self.board.lines.add(self)
        self._read_at_most(STRANGER_BYTES)
        self._transport.write(self._challenge)
        self._proving = self._loop.call_later(PROVE_S, self._turn_away)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        if self._answer is not None:
            wanted = PROOF_BYTES - len(self._answer)
            self._answer += data[:wanted]
            data = data[wanted:]
            if len(self._answer) < PROOF_BYTES:
                return
            if not proves(self.board.token, b"switchboard", self._challenge, self._answer):
                self._turn_away()
                return
            self._answer = None
            self._read_at_most(READ_BYTES)
            if self._proving is not None:
                self._proving.cancel()
        self.heard_s = self._loop.time()
        try:
            for frame in self._frames.feed(data):
                if self.instance is not None:
                    self.instance.received(frame)
                elif not self._introduced(frame):
                    return
        except Exception as error:
            logger.exception("bad frame")
            self.drop(f"it sent what cannot be read: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.board.lines.discard(self)
        if self._proving is not None:
            self._proving.cancel()
        instance = self.instance
        if instance is not None:
            if not instance.stopped.is_set():
                instance.lost("its connection ended" + (f": {exc}" if exc else ""))
            instance.stopped.set()
            self.board.on_down(instance)

    def close(self) -> None:
        """Ends the connection from this side."""
        self._transport.close()

    def drop(self, reason: str) -> None:
        """Gives the instance up."""
        if self.instance is not None:
            self.instance.lost(reason)
        self._transport.abort()

    def _read_at_most(self, count: int) -> None:
        # asyncio's own transport can be told; uvloop's, as under Ray, reads 256 KiB at most.
        if hasattr(self._transport, "max_size"):
            self._transport.max_size = count

    def _turn_away(self) -> None:
        if not self.board.told:
            self.board.told = True
            logger.warning("refused a connection that does not know the secret")
        self._transport.abort()

    def _introduced(self, frame: Frame) -> bool:
        kind, name, config, energy_method, process, place = frame
        if kind != "hello":
            raise ValueError(f"the first frame is {kind!r}, no hello")
        for listed in ("decode_buckets", "windows"):
            config[listed] = tuple(config[listed])
        self.instance = RemoteInstance(
            name,
            SchedulerConfig(**config),
            energy_method=energy_method,
            process=process,
            engine=self.board.engine,
            transport=self._transport,
            tally=None if self.board.tally is None else self.board.tally(place),
        )
        self.board.on_up(self.instance)
        return True
