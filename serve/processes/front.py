"""The front of a server whose instances are processes: engine, router, HTTP, fleet.

It computes nothing and needs no device. It runs in the command's own process over processes of
this machine, or as a Ray actor over those of a cluster.
"""

import asyncio
import contextlib
import dataclasses
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastapi

from jaxsys.errors import UsageError
from jaxsys.model import DecoderConfig, Tokenizer
from jaxsys.model.folder import read_config, read_tokenizer
from jaxsys.model.gguf_file import GgufFile
from jaxsys.model.load import no_model
from jaxsys.serve.clock import WallClock
from jaxsys.serve.energy.governors import Served, make_router
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.engine import Engine
from jaxsys.serve.http.api import ApiConfig, create_app
from jaxsys.serve.http.dashboard import Dashboard
from jaxsys.serve.http.listening import BACKLOG, HttpServer
from jaxsys.serve.http.metrics import Metrics
from jaxsys.serve.http.starting import Gateway, StartProgress
from jaxsys.serve.member import TokenEvent
from jaxsys.serve.processes.fleet import Fleet, Launcher
from jaxsys.serve.processes.worker import WorkerSpec
from jaxsys.serve.requests import Request

UNIX = "unix:"
"""How an address begins that is a path."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrontSpec:
    """What the front is to serve, and how."""

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str
    api_keys: frozenset[str] = dataclasses.field(default=frozenset(), repr=False)
    key_for_all: bool = False
    cors_origins: tuple[str, ...] = ()
    tool_format: str = "auto"
    root_path: str = ""
    """That paths may begin with."""
    tls: tuple[str, str] | None = None
    """Files of a certificate and its key, if it speaks HTTPS."""
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """See `ApiConfig`."""
    route: str = "fewest"
    """Of `ROUTERS`, before instances that decode; ..."""
    route_prompts: str = "fewest"
    """... and before those that read prompts."""
    adapters: tuple[tuple[str, str], ...] = ()
    """Names and folders of low-rank adapters that are served from the start."""
    lora_updates: bool = False
    """Whether more are loaded on demand."""
    created_s: float = dataclasses.field(default_factory=time.time)
    """When the deployment began, of all its fronts, those that are started again among them."""
    worker: WorkerSpec
    """What the instances have in common."""

    def api(self) -> ApiConfig:
        """What of it the HTTP face needs to know."""
        return ApiConfig(
            model_name=self.model_name,
            max_length=self.worker.deployment.max_length,
            api_keys=self.api_keys,
            key_for_all=self.key_for_all,
            cors_origins=self.cors_origins,
            tool_format=self.tool_format,
            sampling=self.sampling,
            lora_updates=self.lora_updates,
            created_s=self.created_s,
        )


async def load_adapters(engine: Engine, spec: FrontSpec) -> None:
    """Loads what is served from the start, at instances that run.

    Raises:
        UsageError: for a folder that holds none of this model's.
    """
    for name, folder in spec.adapters:
        await engine.adapters.load(name, folder)


class Front:
    """Starts, serves, scales and stops."""

    def __init__(self, spec: FrontSpec, launcher: Launcher, *, reached_at: str):
        """
        Args:
            reached_at: this machine's address, as instances reach it.
        """
        self.spec = spec
        worker = spec.worker
        config, tokenizer = read_face(Path(worker.model))
        slo = SharedSlo(worker.slo)
        served = Served(
            model=config,
            weights=worker.deployment.weights_named(worker.dtype or "bfloat16"),
            tensor_parallel=worker.deployment.tensor_parallel,
        )
        self.engine = Engine(
            clock=WallClock(),
            max_requests=worker.deployment.max_requests,
            prefill_router=make_router(
                spec.route_prompts, worker.governor.gpu, served, slo, option="--route-prompts"
            ),
            decode_router=make_router(spec.route, worker.governor.gpu, served, slo),
        )
        self.engine.adapters.most = worker.deployment.max_loras
        self.app = build_app(self.engine, tokenizer, spec.api(), slo)
        self.progress = StartProgress()
        self._gateway = Gateway(self.progress, spec.root_path)
        self.fleet = Fleet(self.engine, launcher, worker, host=reached_at)
        self.fleet.on_up = lambda _: self.progress.advance()
        self._server = HttpServer(self._gateway, tls=spec.tls)
        self._listener: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    async def listen(self) -> tuple[str, int]:
        """Listens, which `start` does otherwise, and says how far that is; returns host and port.

        Raises:
            UsageError: if the address cannot be listened on.
        """
        self._listener = listener = bind(self.spec.host, self.spec.port)
        listener.listen(BACKLOG)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        return name_of(listener)

    async def start(self) -> tuple[str, int]:
        """Brings the instances up, then serves; returns host and port.

        Raises:
            UsageError: if the address cannot be listened on.
            RunError: if an instance does not come up.
        """
        if self._listener is None:
            await self.listen()
        assert self._listener is not None
        deployment = self.spec.worker.deployment
        address = name_of(self._listener)
        self.progress.enter("instances that are up", len(deployment.roles))
        try:
            await self.engine.start()
            await self.fleet.start(prefill=deployment.prefill, decode=deployment.decode)
            await load_adapters(self.engine, self.spec)
        except BaseException:
            self._server.should_exit = True
            self.app.state.close()
            raise
        self._gateway.app = self.app
        return address

    async def scale(self, prefill: int, decode: int) -> None:
        """Brings the numbers of instances to these while serving."""
        await self.fleet.scale(prefill=prefill, decode=decode)

    async def describe(self) -> list[dict[str, Any]]:
        """The instances there are: name, process, state and load of each."""
        return [
            {
                "name": one.name,
                "process": getattr(one, "process", None),
                "failure": None if one.failure is None else str(one.failure),
                "retiring": one.retiring,
                "in_flight": one.in_flight,
                **dataclasses.asdict(one.load),
            }
            for one in self.engine.instances
        ]

    async def until_failure(self) -> str:
        """Waits until nothing can be served any more, and says why."""
        return await self.engine.until_failure()

    async def failure(self) -> str | None:
        """Why nothing can be served any more; None while something can."""
        return self.engine.failure

    async def stop(self, drain_s: float) -> None:
        """Stops listening, finishes open requests for `drain_s` seconds, ends the instances."""
        if self._serving is not None:
            self._server.drain(drain_s)
            self._server.should_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
        await self.engine.drain(0.0)
        self.app.state.close()
        await self.fleet.close()


def read_face(path: Path) -> tuple[DecoderConfig, Tokenizer]:
    """What can be known of a model without reading its weights.

    Raises:
        UsageError: if there is no model, or none with a tokenizer.
    """
    if path.is_dir():
        config, tokenizer = read_config(path), read_tokenizer(path)
    elif path.is_file():
        file = GgufFile(path)
        config, tokenizer = file.config(), file.tokenizer()
    else:
        raise no_model(path)
    if tokenizer is None:
        raise UsageError(f"{path} has no tokenizer.json; add the one the model came with")
    return config, tokenizer


def build_app(
    engine: Engine, tokenizer: Tokenizer, config: ApiConfig, slo: SharedSlo
) -> fastapi.FastAPI:
    """The HTTP application over an engine, with its metrics and its dashboard."""
    metrics = Metrics(engine, config.model_name)
    dashboard = Dashboard(engine, slo, model_name=config.model_name, refused=metrics.count_refused)

    def on_token(request: Request, event: TokenEvent, source: str) -> None:
        metrics.on_token(request, event)
        dashboard.on_token(request, event, source)

    engine.on_token = on_token
    engine.on_watch = dashboard.tick
    metrics.watch()
    app = create_app(engine, tokenizer, config, metrics)
    dashboard.add_to(app)
    return app


def name_of(listener: socket.socket) -> tuple[str, int]:
    """Host and port that are listened on; port 0 where it is a socket of the machine's own."""
    name = listener.getsockname()
    return (UNIX + name, 0) if isinstance(name, str) else name[:2]


def shown(spec: FrontSpec, host: str, port: int) -> str:
    """An address as clients are told it."""
    scheme = "http" if spec.tls is None else "https"
    if host.startswith(UNIX):
        return f"{host}, {scheme}://localhost{spec.root_path}"
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}{spec.root_path}"


def _bind_unix(path: str) -> socket.socket:
    """A socket of this machine; one that a server has left behind is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    place = Path(path)
    try:
        if place.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise OSError(0, "another server listens there")
            place.unlink()
        listener.bind(path)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise UsageError(f"cannot listen on {UNIX}{path}: {reason}; choose another path") from None
    return listener


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not yet listening.

    Args:
        host: an address, or unix:PATH.

    Raises:
        UsageError: if the address is not ours or is taken.
    """
    if host.startswith(UNIX):
        return _bind_unix(host.removeprefix(UNIX))
    if not 0 <= port <= 65535:
        raise UsageError(f"port={port} must be from 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"host={host!r} is no address of this machine: {error.strerror}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror}; stop what uses it or choose "
            f"another --port (0 takes a free one)"
        ) from None
    return listener
