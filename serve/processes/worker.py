"""An instance in a process of its own: builds it, connects to the front, does as it is told.

    python -m jaxsys.serve.processes.worker < specification.json

The process ends when the front says so or is gone.
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
from jaxsys.serve.handover import Message, Offer
from jaxsys.serve.iterations import Role
from jaxsys.serve.logs import log_to_stderr
from jaxsys.serve.member import TokenEvent
from jaxsys.serve.processes.page_transfer import PageServer
from jaxsys.serve.processes.secret import prove
from jaxsys.serve.processes.wire import Frame, Frames, message_frame, message_of, pack, request_of
from jaxsys.serve.requests import Request

logger = logging.getLogger("jaxsys.serve.processes.worker")  # __name__ would be __main__

PULSE_S = 1.0
"""How often the process says that it lives."""


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
    """An instance and its connection to the front."""

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
        with jax.default_device(jax.devices("cpu")[0]):
            model = load(Path(spec.model), jnp.dtype(dtype), layerwise=True)
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
        self._latency_s: float | None = None
        self._told_failure = False
        self._sending = threading.Lock()
        self._ended = threading.Event()

    def serve(self) -> None:
        """Connects and serves until the front ends it.

        Raises:
            RunError: if the front cannot be reached, or the instance has failed.
        """
        spec, instance = self.spec, self.instance
        try:
            self._socket = socket.create_connection((spec.front_host, spec.front_port), 30)
        except OSError as error:
            raise RunError(
                f"no front answers at {spec.front_host}:{spec.front_port}: {error}"
            ) from None
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = dataclasses.asdict(instance.scheduler.config)
        process = f"{socket.gethostname()}:{os.getpid()}"
        prove(self._socket, spec.token, b"switchboard")
        self._send(["hello", spec.name, config, instance.energy_method, process])
        # What is there now stays: looked through for garbage again and again, it would hold up
        # tokens.
        gc.collect()
        gc.freeze()
        instance.start()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
        compilation = BackgroundCompilation([instance])
        try:
            with contextlib.closing(self._socket), contextlib.suppress(OSError):
                self._read()
        finally:
            self._ended.set()
            instance.stop(10)
            compilation.stop()
        if instance.failure is not None:
            raise RunError(f"instance {spec.name} failed: {instance.failure}")

    def _read(self) -> None:
        frames = Frames()
        while data := self._socket.recv(1 << 18):
            for frame in frames.feed(data):
                if frame[0] == "stop":
                    self.instance.stop(10)
                    self._send(["stopped"])
                    return
                self._obey(frame)

    def _obey(self, frame: Frame) -> None:
        instance = self.instance
        kind = frame[0]
        if kind == "submit":
            instance.submit(self._request(frame[1]))
        elif kind == "offer":
            instance.take(Offer(self._request(frame[1])))
        elif kind == "abort":
            instance.abort(frame[1], frame[2])
        elif kind == "load_adapter":
            _, key, folder = frame
            instance.load_adapter(key, folder, lambda fault: self._send(["adapter", key, fault]))
        elif kind == "unload_adapter":
            instance.unload_adapter(frame[1])
        else:
            message = message_of(frame)
            if message is None:
                raise ValueError(f"frames of kind {kind!r} are unknown")
            instance.take(message)

    def _request(self, data: dict[str, Any]) -> Request:
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
        latency_s, self._latency_s = self._latency_s, None
        self._send(["events", [_entry(event) for event in events], latency_s, self._load()])

    def _note_latency(self, latency_s: float) -> None:
        self._latency_s = latency_s

    def _send_message(self, message: Message) -> None:
        self._send(message_frame(message))

    def _pulse(self) -> None:
        while not self._ended.wait(PULSE_S):
            if self.instance.failure is not None:
                self._tell_failure()
            self._send(["pulse", self._load()])

    def _tell_failure(self) -> None:
        if not self._told_failure:
            self._told_failure = True
            self._send(["failed", str(self.instance.failure)])

    def _load(self) -> dict[str, Any]:
        return dataclasses.asdict(self.instance.load)

    def _send(self, frame: Frame) -> None:
        data = pack(frame)
        # A front that is gone shows where frames are read.
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(data)


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
