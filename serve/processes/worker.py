"""An instance in a process of its own: builds it, connects to the front, does as it is told.

    python -m jaxsys.serve.processes.worker < specification.json

The process ends when whoever launched it says so or is gone. That is the front, or where there are
several, what looks after them: then it says where the fronts are, and each has a line of its own.
One that is gone is tried again until another has taken its place.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.errors import RunError, UsageError
from jaxsys.model import load
from jaxsys.serve.deployment import (
    BackgroundCompilation,
    DeploymentConfig,
    build_instance,
    choose_devices,
    compile_ahead,
    connect,
    default_dtype,
    place_weights,
    prefill_budget,
)
from jaxsys.serve.energy.governors import GovernorChoice, Served, make_governor
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.grammars import Grammars
from jaxsys.serve.handover import Delivery, Message, Offer, Receipt, RequestId
from jaxsys.serve.iterations import Role
from jaxsys.serve.logs import log_to_stderr
from jaxsys.serve.member import TokenEvent
from jaxsys.serve.processes.lines import AGAIN_S, Line
from jaxsys.serve.processes.page_transfer import PageServer
from jaxsys.serve.processes.wire import (
    Frame,
    Named,
    load_values,
    message_frame,
    message_of,
    request_of,
)
from jaxsys.serve.requests import Request

logger = logging.getLogger("jaxsys.serve.processes.worker")  # __name__ would be __main__

PULSE_S = 1.0
"""How often the process says that it lives."""
LOAD_S = 0.05
"""How often a front is told a load that has changed, where no tokens tell it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """All that an instance's process needs to know."""

    name: str
    role: Role
    model: str
    """Path of the model, as this process sees it."""
    dtype: str | None = None
    """Of the weights; None takes what suits the device."""
    deployment: DeploymentConfig
    governor: GovernorChoice = dataclasses.field(default_factory=GovernorChoice)
    slo: Slo = dataclasses.field(default_factory=Slo)
    compilation_cache: str | None = None
    json_log: bool = False
    front_host: str
    front_port: int
    token: str = dataclasses.field(repr=False)

    def to_json(self) -> str:
        """As text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "WorkerSpec":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(
            **fields
            | {
                "deployment": DeploymentConfig(**fields["deployment"]),
                "governor": GovernorChoice(**fields["governor"]),
                "slo": Slo(**fields["slo"]),
            }
        )


class Worker:
    """An instance and its lines to fronts."""

    def __init__(self, spec: WorkerSpec, host: str):
        """Builds the instance and compiles what it cannot do without.

        Args:
            host: this machine's address, as other instances reach it.
        """
        self.spec = spec
        if spec.compilation_cache is not None:
            jax.config.update("jax_compilation_cache_dir", spec.compilation_cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        group = tuple(choose_devices(spec.deployment.tensor_parallel))
        dtype = spec.dtype or default_dtype(group[0])
        model = load(Path(spec.model), jnp.dtype(dtype), leafwise=True)
        weights = place_weights(model, spec.deployment, group)
        slo = SharedSlo(spec.slo)
        served = Served(
            model=model.config,
            weights=spec.deployment.weights_named(dtype),
            tensor_parallel=spec.deployment.tensor_parallel,
            prefill_budget=prefill_budget(spec.deployment, group[0]),
        )
        self.grammars = None
        if model.tokenizer is not None:
            self.grammars = Grammars(model.tokenizer, model.config.vocab_size)
        self.instance = build_instance(
            model.config,
            weights,
            spec.deployment,
            name=spec.name,
            role=spec.role,
            group=group,
            sink=self._sink,
            governor=make_governor(spec.governor, served, slo, group),
            grammars=self.grammars,
        )
        self.pages = None if spec.role == "both" else PageServer(group[0], host, secret=spec.token)
        connect(self.instance, self._send_message, self.pages)
        self.instance.on_latency = self._note_latency
        compile_ahead([self.instance])
        self._latencies_s: deque[float] = deque()
        """Of iterations, that are not told yet."""
        self._told_failure = False
        self._ended = threading.Event()
        self._main: Line
        self._lines: tuple[Line, ...] = ()
        """All that are open, the main one first; a new tuple when one comes or goes."""
        self._changing = threading.Lock()
        self._published: set[RequestId] = set()
        """Requests that have moved on, whose pages wait until the other side says it has them."""

    def serve(self) -> None:
        """Connects and serves until the front ends it.

        Raises:
            RunError: if the front cannot be reached, or the instance has failed.
        """
        spec, instance = self.spec, self.instance
        try:
            self._main = self._connect((spec.front_host, spec.front_port), None)
        except OSError as error:
            raise RunError(
                f"no front answers at {spec.front_host}:{spec.front_port}: {error}"
            ) from None
        # What is there now stays: looked through for garbage again and again, it would hold up
        # tokens.
        gc.collect()
        gc.freeze()
        instance.start()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
        compilation = BackgroundCompilation([instance])
        try:
            self._main.read(self._told)
        finally:
            self._ended.set()
            instance.stop(10)
            compilation.stop()
            for line in self._lines:
                line.close()
        if instance.failure is not None:
            raise RunError(f"instance {spec.name} failed: {instance.failure}")

    def _connect(self, address: tuple[str, int], place: int | None) -> Line:
        """A line on which it has said who it is.

        Raises:
            OSError: if there is nobody.
        """
        spec, instance = self.spec, self.instance
        line = Line(address, spec.token)
        config = dataclasses.asdict(instance.scheduler.config)
        process = f"{socket.gethostname()}:{os.getpid()}"
        line.send(["hello", spec.name, config, instance.energy_method, process, place])
        with self._changing:
            self._lines = (*self._lines, line)
        return line

    def _told(self, frame: Frame) -> bool:
        """Does what whoever launched it says; False once that was to stop."""
        kind = frame[0]
        if kind == "stop":
            self.instance.stop(10)
            self._main.send(["stopped"])
            return False
        if kind == "load_adapter":
            _, key, folder = frame

            def done(fault: str | None) -> None:
                self._main.send(["adapter", key, fault])

            self.instance.load_adapter(key, folder, done)
        elif kind == "unload_adapter":
            self.instance.unload_adapter(frame[1])
        elif kind == "fronts":
            _, place, addresses = frame
            for host, port in addresses:
                arguments = ((host, port), place)
                threading.Thread(target=self._keep, args=arguments, daemon=True).start()
        else:
            self._obey(frame, self._main)
        return True

    def _keep(self, address: tuple[str, int], place: int) -> None:
        """Serves one of several fronts, and whoever takes its place when it is gone."""
        while not self._ended.is_set():
            try:
                line = self._connect(address, place)
            except OSError:  # it is being replaced
                self._ended.wait(AGAIN_S)
                continue
            self._attend(line)

    def _attend(self, line: Line) -> None:
        """Does what a front says until it is gone, and then ends its requests."""
        try:
            line.read(lambda frame: self._obey(frame, line))
        except Exception:
            logger.exception("bad frame")
        line.close()
        with self._changing:
            self._lines = tuple(one for one in self._lines if one is not line)
        self.instance.post(lambda: self._abandon(line))

    def _obey(self, frame: Frame, line: Line) -> bool:
        instance = self.instance
        kind = frame[0]
        if kind == "submit":
            instance.submit(self._request(frame[1], line))
        elif kind == "offer":
            instance.take(Offer(self._request(frame[1], line)))
        elif kind == "abort":
            instance.abort(frame[1], frame[2])
        else:
            frame[1] = Named(frame[1], line)
            message = message_of(frame)
            if message is None:
                raise ValueError(f"frames of kind {kind!r} are unknown")
            if isinstance(message, Receipt):
                self._published.discard(frame[1])
            instance.take(message)
        return True

    def _request(self, data: dict[str, Any], line: Line) -> Request:
        data["id"] = Named(data["id"], line)
        request = request_of(data, self.instance.clock.now_s())
        if request.sampling.grammar is not None and self.grammars is not None:
            # Here, while the instance computes; what is wrong with it shows there.
            with contextlib.suppress(UsageError):
                self.grammars.prepare(request.sampling.grammar)
        return request

    # --- on the instance's thread, but for the pulse ------------------------------------------

    def _sink(self, events: Sequence[TokenEvent]) -> None:
        if self.instance.failure is not None:
            self._tell_failure()  # before what it does to requests
        by_line: defaultdict[Line, list[list[Any]]] = defaultdict(list)
        for event in events:
            by_line[_line_of(event.request.request_id)].append(_entry(event))
        for line, entries in by_line.items():
            line.send(["events", entries, self._untold_s(line), self._load(line)])

    def _note_latency(self, latency_s: float) -> None:
        self._latencies_s.append(latency_s)

    def _untold_s(self, line: Line) -> list[float]:
        """Latencies that nobody was told: for the main line, that each is counted once."""
        if line is not self._main:
            return []
        told_s: list[float] = []
        while self._latencies_s:  # which another thread fills
            told_s.append(self._latencies_s.popleft())
        return told_s

    def _send_message(self, message: Message) -> None:
        name = message.request_id
        if isinstance(message, Delivery) and message.outputs is not None:
            self._published.add(name)
        _line_of(name).send(message_frame(message))

    def _abandon(self, line: Line) -> None:
        """Ends what a front that is gone has asked for, and frees all that it holds."""
        instance = self.instance
        for name in list(instance.requests):
            if _line_of(name) is line:
                instance.abort_now(name)
        # Copied first: it is read on from while others take out what they have a receipt for.
        for name in [one for one in list(self._published) if _line_of(one) is line]:
            self._published.discard(name)
            instance.take(Receipt(name, pulled=False))

    def _pulse(self) -> None:
        last_s = time.monotonic()
        while not self._ended.wait(LOAD_S):
            now_s = time.monotonic()
            due = now_s - last_s >= PULSE_S
            if due:
                last_s = now_s
            if self.instance.failure is not None:
                self._tell_failure()
            for line in self._lines:
                fresh = line is not self._main and line.told is not self.instance.load
                if due or fresh:
                    line.send(["pulse", self._untold_s(line), self._load(line)])

    def _tell_failure(self) -> None:
        if not self._told_failure:
            self._told_failure = True
            for line in self._lines:
                line.send(["failed", str(self.instance.failure)])

    def _load(self, line: Line) -> Sequence[Any]:
        line.told = load = self.instance.load
        return load_values(load)


def _line_of(name: RequestId) -> Line:
    """Whose request it is."""
    assert isinstance(name, Named)
    return name.line


def _entry(event: TokenEvent) -> list[Any]:
    request = event.request
    name, token = request.request_id, event.token
    first = request.generated == 1 or len(request.timing.token_times_s) == 1
    if event.finish_reason is None and event.logprobs is None and not first:
        return [name, token]
    return [
        name,
        token,
        event.finish_reason,
        None if event.logprobs is None else list(event.logprobs),
        event.message,
        event.lost,
        (request.timing.energy_j, request.timing.prefill_energy_j),
        request.cached_tokens,
        request.timing.preemptions,
        None if event.prompt is None else [one and list(one) for one in event.prompt],
        event.embedding,
        _queued_s(request),
    ]


def _queued_s(request: Request) -> float | None:
    """How long a request waited for its first piece; None where that was elsewhere."""
    timing = request.timing
    return None if timing.scheduled_s is None else timing.scheduled_s - timing.arrival_s


def main() -> int:
    """Runs the instance whose specification stands on standard input."""
    spec = WorkerSpec.from_json(sys.stdin.readline())
    log_to_stderr(as_json=spec.json_log)
    try:
        Worker(spec, spec.front_host).serve()
    except (UsageError, RunError) as error:
        logger.error("cannot serve", extra={"instance": spec.name, "reason": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
