"""Pages from process to process: published under a number, pulled by whoever has the ticket.

`jax.experimental.transfer` runs a server beside each process's devices; a pull names the server,
the number and the shapes, returns at once, and its arrays become ready as the data arrives, so
both devices go on computing. Its own time limits are looked at too late to rely on (JAX 0.10), so
`Arrivals` gives up those past their deadline. What was published and never pulled is freed by
pulling it oneself.
"""

import functools
import secrets
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import transfer

from jaxsys.mesh import Device
from jaxsys.serve.arrivals import Arrivals
from jaxsys.serve.handover import RequestId, Ticket
from jaxsys.serve.paged_model import Contents

RELEASE_S = 5.0
"""How long pulling one's own pages may take before they count as taken by the other side."""

Then = Callable[[Contents | Exception], None]


class PageServer:
    """One process's end. Safe to use from any thread."""

    def __init__(self, device: Device, host: str, *, timeout_s: float = 30.0):
        """
        Args:
            device: any device of the backend that the pages live on.
            host: this machine's address, as others reach it.
            timeout_s: longest time a pull may take.
        """
        self.timeout_s = timeout_s
        self._server: Any = transfer.start_transfer_server(
            device.client, f"{host}:0", [f"{host}:0"]
        )
        self.address: str = self._server.address()
        self._connections: dict[str, Any] = {}
        self._published: dict[RequestId, list[tuple[int, jax.ShapeDtypeStruct]]] = {}
        self._lock = threading.Lock()
        self._arrivals = Arrivals()

    @property
    def published(self) -> int:
        """Requests whose pages wait to be pulled."""
        return len(self._published)

    def publish(self, request_id: RequestId, contents: Contents) -> Ticket:
        """Holds contents until they are pulled or released; a request may have several."""
        # Not to be guessed: whoever knows it may pull.
        number = secrets.randbits(62)
        like = jax.ShapeDtypeStruct(contents.shape, contents.dtype, sharding=contents.sharding)
        with self._lock:
            self._published.setdefault(request_id, []).append((number, like))
        self._server.await_pull(number, contents)
        return Ticket(self.address, number, contents.shape[1])

    def release(self, request_id: RequestId, *, pulled: bool) -> None:
        """Lets go of what was published for a request."""
        with self._lock:
            published = self._published.pop(request_id, [])
        if not pulled:
            for number, like in published:
                self._pull_back(number, like)

    def _pull_back(self, number: int, like: jax.ShapeDtypeStruct) -> None:
        def done(result: Contents | Exception) -> None:
            if isinstance(result, Exception):
                # The other side has it after all, and this pull would wait for ever: answer it
                # with something of another shape, which ends it with an error.
                self._server.await_pull(number, [jnp.zeros(1)])

        self._pull(self.address, number, like, RELEASE_S, done)

    def fetch(self, pages: Contents | Ticket, like: jax.ShapeDtypeStruct, then: Then) -> None:
        """Pulls contents of the form of `like`, or says in time why not.

        Args:
            then: called once, with the contents or an exception, on this object's thread or, where
                there is no connection, the caller's.
        """
        assert isinstance(pages, Ticket)
        self._pull(pages.address, pages.number, like, self.timeout_s, then)

    def _pull(
        self, address: str, number: int, like: jax.ShapeDtypeStruct, limit_s: float, then: Then
    ) -> None:
        try:
            connection = self._connections.get(address)
            if connection is None:
                connection = self._connections[address] = self._server.connect(address)
            contents = connection.pull(number, like)
        except (RuntimeError, ValueError) as error:
            self._connections.pop(address, None)
            then(error)
            return
        self._arrivals.expect(contents, limit_s, functools.partial(self._arrived, address, then))

    def _arrived(self, address: str, then: Then, result: Contents | Exception) -> None:
        if isinstance(result, Exception):
            self._connections.pop(address, None)  # the next pull connects anew
        then(result)
