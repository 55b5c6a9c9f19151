"""Pages from process to process: published under a number, pulled by whoever has the ticket.

`jax.experimental.transfer` runs a server beside each process's devices; a pull names the server,
the number and the shapes, returns at once, and its arrays become ready as the data arrives, so
both devices go on computing. Its own time limits are looked at too late to rely on (JAX 0.10), so
this keeps its own: a thread looks at the pulls under way and gives up those past their deadline.
What was published and never pulled is freed by pulling it oneself.
"""

import dataclasses
import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import transfer

from jaxsys.errors import RunError
from jaxsys.mesh import Device
from jaxsys.serve.handover import RequestId, Ticket
from jaxsys.serve.paged_model import Cache

logger = logging.getLogger(__name__)

LOOK_S = 0.001
"""How often pulls under way are looked at."""
RELEASE_S = 5.0
"""How long pulling one's own pages may take before they count as taken by the other side."""

Then = Callable[[Cache | Exception], None]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Pull:
    contents: Cache
    deadline_s: float
    then: Then


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
        self._published: dict[RequestId, tuple[int, Cache]] = {}
        self._pulls: list[_Pull] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._look, name="page-pulls", daemon=True)
        self._thread.start()

    @property
    def published(self) -> int:
        """Requests whose pages wait to be pulled."""
        return len(self._published)

    def publish(self, request_id: RequestId, contents: Cache, width: int) -> Ticket:
        """Holds contents until they are pulled or released."""
        # Not to be guessed: whoever knows it may pull.
        number = secrets.randbits(62)
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            contents,
        )
        with self._changed:
            self._published[request_id] = number, like
        self._server.await_pull(number, contents)
        return Ticket(self.address, number, width)

    def release(self, request_id: RequestId, *, pulled: bool) -> None:
        """Lets go of what was published for a request."""
        with self._changed:
            number, like = self._published.pop(request_id, (None, None))
        if number is None or like is None or pulled:
            return

        def done(result: Cache | Exception) -> None:
            if isinstance(result, Exception):
                # The other side has it after all, and this pull would wait for ever: answer it
                # with something of another shape, which ends it with an error.
                self._server.await_pull(number, [jnp.zeros(1)])

        self._pull(self.address, number, like, RELEASE_S, done)

    def fetch(self, ticket: Ticket, like: Cache, then: Then) -> None:
        """Pulls contents of the form of `like`, or says in time why not.

        Args:
            then: called once, with the contents or an exception, on this object's thread or, where
                there is no connection, the caller's.
        """
        self._pull(ticket.address, ticket.number, like, self.timeout_s, then)

    def _pull(self, address: str, number: int, like: Cache, limit_s: float, then: Then) -> None:
        try:
            connection = self._connections.get(address)
            if connection is None:
                connection = self._connections[address] = self._server.connect(address)
            contents = connection.pull(number, like)
        except (RuntimeError, ValueError) as error:
            self._connections.pop(address, None)
            then(error)
            return
        failed = functools.partial(self._failed, address, then)
        with self._changed:
            self._pulls.append(_Pull(contents, time.monotonic() + limit_s, failed))
            self._changed.notify()

    def _failed(self, address: str, then: Then, result: Cache | Exception) -> None:
        if isinstance(result, Exception):
            self._connections.pop(address, None)  # the next pull connects anew
        then(result)

    def _look(self) -> None:
        while True:
            with self._changed:
                while not self._pulls:
                    self._changed.wait()
                pulls = list(self._pulls)
            now_s = time.monotonic()
            for pull in pulls:
                result = _result(pull, now_s)
                if result is not None:
                    with self._changed:
                        self._pulls.remove(pull)
                    try:
                        pull.then(result)
                    except Exception:
                        logger.exception("after a pull")
            time.sleep(LOOK_S)


def _result(pull: _Pull, now_s: float) -> Cache | Exception | None:
    """What a pull has come to; None while it is under way."""
    if all(leaf.is_ready() for leaf in jax.tree.leaves(pull.contents)):
        try:
            return jax.block_until_ready(pull.contents)
        except RuntimeError as error:  # the peer is gone, or never had it
            return error
    if now_s > pull.deadline_s:
        return RunError("the pull took too long")
    return None
