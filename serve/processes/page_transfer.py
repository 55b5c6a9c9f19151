"""Pages from process to process: published under a number, pulled by whoever has the ticket.

Each process listens for the others of its deployment (`secret` says who they are) and knows one
question only: a number of 8 bytes, answered by a length of 8 bytes and the pages' own bytes, or by
length 0 where nothing is published under it. Nothing that arrives is ever parsed.

`publish` starts the copy to the host at once; it is there, or nearly, when the other side asks. A
pull reads into host memory and copies to the device, on a thread for each process pulled from, so
both devices go on computing.
"""

import collections
import contextlib
import functools
import ipaddress
import logging
import math
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.errors import RunError
from jaxsys.mesh import Device
from jaxsys.serve.handover import RequestId, Ticket
from jaxsys.serve.paged_model import Contents
from jaxsys.serve.processes.secret import (
    MAX_STRANGERS,
    PROOF_BYTES,
    PROVE_S,
    challenge,
    prove,
    proves,
    read_exactly,
    read_into,
)

logger = logging.getLogger(__name__)

SEND_S = 60.0
"""Longest time in which the other side may take nothing of what is sent to it."""
LINGER_S = 30.0
"""How long what is on its way stays, once the other side has said that it has all."""
PARTS = 8
"""Parts of what arrives that go to an accelerator one after the other."""
PIECE_BYTES = 8 << 20
NUMBER = struct.Struct("!Q")
"""A ticket's number, and the length of an answer."""

Then = Callable[[Contents | Exception], None]


class _Pull(NamedTuple):
    number: int
    like: jax.ShapeDtypeStruct
    deadline_s: float
    then: Then


class PageServer:
    """One process's end. Safe to use from any thread."""

    def __init__(self, device: Device, host: str, *, timeout_s: float = 30.0, secret: str = ""):
        """
        Args:
            device: any device of the backend that the pages live on.
            host: this machine's address, as others reach it; nothing else is listened on.
            timeout_s: longest time a pull may take.
            secret: of the deployment; those with another one are turned away. Without one, the
                processes of a test say so by sharing this default, on a loopback address only.
        """
        if not secret and not _is_loopback(host):
            raise ValueError(f"host={host!r} is reached from elsewhere: pages there need a secret")
        self.timeout_s = timeout_s
        self._device = device
        self._secret = secret or "pages of one machine"
        self._published: dict[int, tuple[RequestId, Contents]] = {}
        self._numbers: dict[RequestId, list[int]] = {}
        self._leaving: collections.deque[tuple[float, list[int]]] = collections.deque()
        self._lock = threading.Lock()
        self._strangers = threading.BoundedSemaphore(MAX_STRANGERS)
        self._pulls: dict[str, queue.SimpleQueue[_Pull]] = {}
        self._listener = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        threading.Thread(target=self._accept, name="pages", daemon=True).start()

    @property
    def published(self) -> int:
        """Requests whose pages wait to be pulled."""
        return len(self._numbers)

    def publish(self, request_id: RequestId, contents: Contents) -> Ticket:
        """Holds contents until they are pulled, once, or released; a request may have several."""
        self._sweep()
        for shard in contents.addressable_shards:
            shard.data.copy_to_host_async()
        # Not to be guessed: one number tells nothing of another.
        number = 1 + secrets.randbits(63)
        with self._lock:
            self._published[number] = request_id, contents
            self._numbers.setdefault(request_id, []).append(number)
        return Ticket(self.address, number, contents.shape[1])

    def release(self, request_id: RequestId, *, pulled: bool) -> None:
        """Lets go of what was published for a request.

        Args:
            pulled: whether the other side has said that it has all; what is still being sent then
                stays for a moment.
        """
        with self._lock:
            numbers = self._numbers.pop(request_id, [])
            if pulled:
                left = [number for number in numbers if number in self._published]
                if left:
                    self._leaving.append((time.monotonic() + LINGER_S, left))
            else:
                for number in numbers:
                    self._published.pop(number, None)
        self._sweep()

    def _sweep(self) -> None:
        with self._lock:
            while self._leaving and self._leaving[0][0] < time.monotonic():
                for number in self._leaving.popleft()[1]:
                    self._published.pop(number, None)

    def fetch(self, pages: Contents | Ticket, like: jax.ShapeDtypeStruct, then: Then) -> None:
        """Pulls contents of the form of `like`, or says in time why not.

        Args:
            then: called once, with the contents or an exception, on a thread of this object.
        """
        assert isinstance(pages, Ticket)
        deadline_s = time.monotonic() + self.timeout_s
        with self._lock:
            pulls = self._pulls.get(pages.address)
            if pulls is None:
                pulls = self._pulls[pages.address] = queue.SimpleQueue()
                target = functools.partial(self._pull_from, pages.address, pulls)
                threading.Thread(target=target, name="pull", daemon=True).start()
            pulls.put(_Pull(pages.number, like, deadline_s, then))

    def close(self) -> None:
        """Listens no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    # --- the side that is pulled from ---------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0:
                    return
                logger.warning("no page connection", extra={"reason": error})
                time.sleep(0.5)
                continue
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            target = functools.partial(self._answer, connection)
            threading.Thread(target=target, name="pages", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.closing(connection):
            try:
                try:
                    known = self._known(connection)
                finally:
                    self._strangers.release()
                while known:
                    self._give(connection)
            except OSError:
                return  # it has gone, which is its right

    def _known(self, connection: socket.socket) -> bool:
        """Whether the caller knows the secret; its own bytes are only compared, never parsed."""
        connection.settimeout(PROVE_S)
        challenged = challenge()
        connection.sendall(challenged)
        answer = read_exactly(connection, PROOF_BYTES, within_s=PROVE_S)
        if not proves(self._secret, b"pages", challenged, answer):
            logger.warning("refused a page connection that does not know the secret")
            return False
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return True

    def _give(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        (number,) = NUMBER.unpack(read_exactly(connection, NUMBER.size))
        with self._lock:
            found = self._published.get(number)
        if found is None:
            connection.sendall(NUMBER.pack(0))
            return
        try:
            data = _bytes_of(np.asarray(found[1]))
        except RuntimeError as error:  # released meanwhile, or the device is gone
            logger.warning("pages cannot be read", extra={"reason": error})
            connection.sendall(NUMBER.pack(0))
            return
        connection.settimeout(SEND_S)
        connection.sendall(NUMBER.pack(len(data)))
        connection.sendall(data)
        with self._lock:
            self._published.pop(number, None)

    # --- the side that pulls ------------------------------------------------------------------

    def _pull_from(self, address: str, pulls: "queue.SimpleQueue[_Pull]") -> None:
        connection: socket.socket | None = None
        buffers = _Buffers(reused=self._device.platform != "cpu")
        while True:
            pull = pulls.get()
            try:
                if connection is None:
                    connection = self._connect(address, pull.deadline_s)
                result: Contents | Exception = self._pull(connection, pull, buffers)
            except (OSError, RuntimeError, ValueError) as error:
                if connection is not None:  # the next pull connects anew
                    connection.close()
                    connection = None
                result = error
            try:
                pull.then(result)
            except Exception:
                logger.exception("after a pull")
            del pull, result

    def _connect(self, address: str, deadline_s: float) -> socket.socket:
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host.strip("[]"), int(port)), _left_s(deadline_s))
        try:
            prove(connection, self._secret, b"pages")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            connection.close()
            raise
        return connection

    def _pull(self, connection: socket.socket, pull: _Pull, buffers: "_Buffers") -> Contents:
        like = pull.like
        connection.settimeout(_left_s(pull.deadline_s))
        connection.sendall(NUMBER.pack(pull.number))
        (length,) = NUMBER.unpack(read_exactly(connection, NUMBER.size))
        if length == 0:
            raise NotPublished("nothing is published under the ticket's number")
        due = math.prod(like.shape) * np.dtype(like.dtype).itemsize
        if length != due:
            raise RunError(f"pages of {length} bytes came where {due} are due")
        pages = buffers.of(like)
        parts: list[jax.Array] = []
        # What has arrived goes to the device while the rest arrives.
        step = max(1, -(-len(pages) // PARTS)) if buffers.reused else len(pages)
        for first in range(0, len(pages), step):
            part = pages[first : first + step]
            view = _bytes_of(part)
            while view:
                connection.settimeout(_left_s(pull.deadline_s))
                piece = view[:PIECE_BYTES]
                read_into(connection, piece)
                view = view[len(piece) :]
            parts.append(jax.device_put(part, like.sharding))
        whole = parts[0] if len(parts) == 1 else _joined(like.sharding)(*parts)
        return jax.block_until_ready(whole)


class _Buffers:
    """Host memory that pages arrive in."""

    def __init__(self, *, reused: bool):
        """
        Args:
            reused: whether devices copy what they are given, so that it can be used again: to
                touch fresh memory takes as long as to fill it. On CPU arrays keep it.
        """
        self.reused = reused
        self._bytes = np.empty(0, np.uint8)

    def of(self, like: jax.ShapeDtypeStruct) -> np.ndarray:
        """An array of the form of `like`; with `reused`, in the place of the one before."""
        if not self.reused:
            return np.empty(like.shape, like.dtype)
        dtype = np.dtype(like.dtype)
        count = math.prod(like.shape) * dtype.itemsize
        if self._bytes.nbytes < count:
            self._bytes = np.empty(count, np.uint8)
        return self._bytes[:count].view(dtype).reshape(like.shape)


@functools.lru_cache(maxsize=8)
def _joined(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda *parts: jnp.concatenate(parts), out_shardings=sharding)


class NotPublished(RunError):
    """The other side does not hold what was asked for."""


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("pages took too long to arrive")
    return left_s


def _bytes_of(array: np.ndarray) -> memoryview:
    """An array's own bytes; numpy's view takes dtypes that buffers do not know, as bfloat16."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
