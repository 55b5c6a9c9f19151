"""What a front and the process that looks after it say to each other, over a pair of sockets.

Either side asks, and is answered or told what went wrong, or says what needs no answer. Frames are
those of `wire`: ask, answer, fault, tell.
"""

import asyncio
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.adapters import KnownAdapter, UnknownAdapter
from jaxsys.serve.processes.wire import Frames, pack

logger = logging.getLogger(__name__)

FAULTS = {one.__name__: one for one in (RunError, UsageError, KnownAdapter, UnknownAdapter)}
"""What an answer may be, beside a value."""


class Channel(asyncio.Protocol):
    """One end; on the event loop's thread."""

    def __init__(
        self,
        *,
        answer: Callable[[str, list[Any]], Awaitable[Any]],
        told: Callable[[str, list[Any]], None],
        ended: Callable[[], None],
    ):
        """
        Args:
            answer: to what the other side asks; its exceptions are the other side's.
            told: takes what it says.
            ended: it is gone.
        """
        self._answer = answer
        self._told = told
        self._ended = ended
        self._frames = Frames()
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: Any = None
        self.closed = False

    async def open(self, connection: socket.socket) -> "Channel":
        """Begins to speak over one of a pair of sockets."""
        connection.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=connection)
        return self

    def tell(self, kind: str, *values: Any) -> None:
        """Says something, if anybody is still there."""
        self._send(["tell", kind, list(values)])

    async def ask(self, kind: str, *values: Any, timeout_s: float | None = None) -> Any:
        """The other side's answer.

        Raises:
            RunError: if it is gone, or does not answer in time.
            UsageError, RunError: as it says.
        """
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            if self.closed:
                raise RunError("the process that is asked has ended; try again")
            self._send(["ask", number, kind, list(values)])
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise RunError(f"no answer within {timeout_s:g} s") from None
        finally:
            del self._asked[number]

    def close(self) -> None:
        """Says nothing more."""
        if self._transport is not None:
            self._transport.close()

    # --- of the protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for frame in self._frames.feed(data):
            kind = frame[0]
            if kind == "tell":
                try:
                    self._told(frame[1], frame[2])
                except Exception:
                    logger.exception("what was told cannot be taken in")
            elif kind == "ask":
                task = asyncio.ensure_future(self._reply(*frame[1:]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            else:
                self._settle(kind, *frame[1:])

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        for future in self._asked.values():
            if not future.done():
                future.set_exception(RunError("the process that is asked has ended; try again"))
        self._ended()

    # --- inside -------------------------------------------------------------------------------

    async def _reply(self, number: int, kind: str, values: list[Any]) -> None:
        try:
            frame = ["answer", number, await self._answer(kind, values)]
        except (UsageError, RunError) as error:
            known = type(error).__name__ if type(error).__name__ in FAULTS else None
            known = known or ("UsageError" if isinstance(error, UsageError) else "RunError")
            frame = ["fault", number, known, str(error)]
        except Exception as error:
            logger.exception("no answer")
            frame = ["fault", number, "RunError", f"{type(error).__name__}: {error}"]
        self._send(frame)

    def _settle(self, kind: str, number: int, *values: Any) -> None:
        future = self._asked.get(number)
        if future is None or future.done():
            return
        if kind == "answer":
            future.set_result(values[0])
        else:
            name, message = values
            future.set_exception(FAULTS[name](message))

    def _send(self, frame: list[Any]) -> None:
        if not self.closed and not self._transport.is_closing():
            self._transport.write(pack(frame))
