"""The HTTP server under the application: connections that say nothing cannot keep others out.

Each connection takes a descriptor, of which a process has so many. The limit is raised to what the
system allows; a connection must send a whole request head within seconds; and where connections
near the limit, the longest silent one makes room for the newest, so that `/health` is answered.
"""

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 30
"""Longer than clients keep a connection that they do not use (httpx: 5 s): otherwise one may be
closed under a request that has just been sent."""
HEAD_S = 10.0
"""How long a connection may take to send the head of a request."""
LAST_S = 0.3
"""How long a server that is to end still takes requests, so that none is lost on its way."""
ACCEPT_AGAIN_S = 1.0
"""Pause before a connection is taken again, where descriptors have run out."""
BACKLOG = 128
"""Connections that wait to be taken."""
MOST_DESCRIPTORS = 1 << 20
RESERVE = 64
"""Descriptors kept for everything but connections; a quarter of the limit where that is less."""
LOG_EVERY_S = 60.0

_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)


def raise_descriptor_limit() -> int:
    """Lets this process open as many files as the system allows; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


class Connections:
    """The connections of one server, the silent ones in the order of their silence."""

    def __init__(self, most: int | None = None):
        """
        Args:
            most: open at once; None takes what descriptors are left.
        """
        if most is None:
            limit = raise_descriptor_limit()
            used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
            most = max(4, limit - used - min(RESERVE, limit // 4))
        self.most = most
        self.open: set[_Connection] = set()
        self.silent: dict[_Connection, None] = {}
        self._told_s = -LOG_EVERY_S

    def full(self) -> bool:
        """Whether one more is too many, also after a silent one was closed."""
        if len(self.open) <= self.most:
            return False
        self.tell(
            f"{len(self.open)} connections are open, as many as can be: silent ones make room"
        )
        for oldest in self.silent:
            oldest.drop()
            return False
        return True

    def tell(self, message: str) -> None:
        """Logs what may happen thousands of times, once a minute."""
        if time.monotonic() - self._told_s >= LOG_EVERY_S:
            self._told_s = time.monotonic()
            logger.warning(message)

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An event loop's exception handler: descriptors that run out are told once a minute."""
        if "out of system resource" in str(context.get("message")):
            self.tell(f"no connection can be taken: {context.get('exception')}")
        else:
            loop.default_exception_handler(context)


class _Connection(H11Protocol):
    """A connection that is silent until a request's head is there, and again behind the answer."""

    watch: Connections
    _alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.watch.open.add(self)
        if self.watch.full():
            transport.write(_BUSY)
            transport.close()
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self.cycle is not None and self.cycle.response_complete and self._alarm is None:
            self._alarm = self.loop.call_later(HEAD_S, self.drop)  # the next request's head
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self.watch.silent.pop(self, None)
            self._hush()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self in self.watch.open and not self.transport.is_closing():
            self.watch.silent[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.open.discard(self)
        self.watch.silent.pop(self, None)
        self._hush()
        super().connection_lost(exc)

    def drop(self) -> None:
        """Ends the connection at once."""
        self.watch.open.discard(self)
        self.watch.silent.pop(self, None)
        self._hush()
        self.transport.abort()

    def _wait(self) -> None:
        self.watch.silent[self] = None
        self._alarm = self.loop.call_later(HEAD_S, self.drop)

    def _hush(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None


class _OneByOne:
    """Takes the connections of a socket that other processes take from too, one a turn of the loop:
    a loop's own server takes all that wait, and whoever wakes first would have all of them."""

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None,
        failed: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None],
    ):
        self._listener = listener
        self._make = make
        self._tls = tls
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._again: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._watch()

    def close(self) -> None:
        """Takes no more."""
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """Nothing is left to wait for."""

    def _watch(self) -> None:
        self._loop.add_reader(self._listener, self._take)

    def _take(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another process was quicker
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            message = "socket.accept() out of system resource"  # as asyncio says it
            self._failed(self._loop, {"message": message, "exception": error})
            self._loop.remove_reader(self._listener)
            self._again = self._loop.call_later(ACCEPT_AGAIN_S, self._watch)
            return
        connection.setblocking(False)
        work = self._loop.connect_accepted_socket(self._make, connection, ssl=self._tls)
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._taken)

    def _taken(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of a client that says no TLS, and has been hung up on


class HttpServer(uvicorn.Server):
    """uvicorn over such connections; signals are its owner's."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        drain_s: float = 1.0,
        tls: tuple[str, str] | None = None,
        one_by_one: bool = False,
    ):
        """
        Args:
            one_by_one: whether connections are taken one at a time, because other processes listen
                on the same socket: otherwise whoever wakes first would take all that wait.
            drain_s: how long open requests may take once it is to exit.
            tls: files of a certificate and its key; without, the server speaks plain HTTP.
        """
        certificate, key = tls or (None, None)
        self.open_connections = Connections()
        kind = type("_Counted", (_Connection,), {"watch": self.open_connections})
        super().__init__(
            uvicorn.Config(
                app,
                http=kind,
                log_config=None,
                access_log=False,
                lifespan="off",
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
        )
        self._one_by_one = one_by_one
        self.drain(drain_s)

    def drain(self, seconds: float) -> None:
        """Sets how long open requests may take."""
        self.config.timeout_graceful_shutdown = max(1, round(seconds))

    async def serve(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self.open_connections.handle)
        await super().serve(sockets)

    async def startup(self, sockets: Any = None) -> None:
        if not self._one_by_one:
            await super().startup(sockets)
            return
        await super().startup([])
        config, state = self.config, self.server_state

        def connection() -> asyncio.Protocol:
            made: Any = config.http_protocol_class
            return made(config=config, server_state=state, app_state=self.lifespan.state)

        handle = self.open_connections.handle
        taking: Any = [_OneByOne(one, connection, config.ssl, handle) for one in sockets]
        self.servers.extend(taking)

    async def shutdown(self, sockets: Any = None) -> None:
        if self.open_connections.open:  # whoever has just connected may still ask
            await asyncio.sleep(LAST_S)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
