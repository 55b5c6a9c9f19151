"""A client of streamed answers that takes as little time as it can: it notes when bytes come.

An HTTP library spends some 0.1 ms on each token of each stream, one after the other, which the
tokens of a batch then seem to be apart. Here a connection of its own carries each request; what
came is read when it has ended.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field

from jaxsys.errors import RunError

EVENT = b"data: {"
LATEST_S = 300.0
"""A request that has not ended by then is given up."""


@dataclass(slots=True)
class Stream:
    """What came of one request; all times of `time.perf_counter`."""

    sent_s: float = 0.0
    came_s: list[float] = field(default_factory=list)
    """When each event came."""
    name: str = ""
    """The answer's id."""
    content: bytes = b""


class _Reading(asyncio.Protocol):
    def __init__(self, to: Stream, message: bytes, ended: "asyncio.Future[None]") -> None:
        self._to, self._message, self._ended = to, message, ended
        self._parts: list[bytes] = []
        self._left = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._to.sent_s = time.perf_counter()
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        self._parts.append(data)
        seen = self._left + data  # an event's beginning may be cut in two
        self._to.came_s += [now_s] * seen.count(EVENT)
        self._left = seen[-(len(EVENT) - 1) :]

    def connection_lost(self, exc: Exception | None) -> None:
        self._to.content = b"".join(self._parts)
        if not self._ended.done():
            self._ended.set_result(None)


async def stream(port: int, path: str, body: bytes, to: Stream) -> None:
    """Posts a body that asks for a stream, and notes what comes until its end.

    Raises:
        RunError: if the answer is none, says an error or breaks off.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    try:
        transport, _ = await loop.create_connection(
            lambda: _Reading(to, head.encode() + body, ended), "127.0.0.1", port
        )
    except OSError as error:
        raise RunError(f"no connection to port {port}: {error}") from None
    try:
        await asyncio.wait_for(ended, LATEST_S)
    except TimeoutError:
        raise RunError(f"no end of an answer within {LATEST_S:.0f} s") from None
    finally:
        transport.abort()
    status = to.content.partition(b"\r\n")[0]
    if b" 200 " not in status + b" ":
        raise RunError(f"the server says {to.content[:300]!r}")
    fault = to.content.find(b'"error"')
    if fault >= 0:
        raise RunError(f"the server says {to.content[fault - 20 : fault + 200]!r}")
    if b"data: [DONE]" not in to.content:
        raise RunError(f"an answer broke off after {len(to.came_s)} tokens")
    if to.came_s:
        first = to.content[to.content.index(EVENT) + len(b"data: ") :].partition(b"\n")[0]
        to.name = json.loads(first)["id"]
