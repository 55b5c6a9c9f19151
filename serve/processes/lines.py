"""An instance's connections to fronts, one `Line` each, which no slow or dead front can hold up.

What a front does not take in at once waits, up to a bound, for a thread that sends it; a front that
takes nothing for long is given up. A line that ends takes its requests with it: whoever asked for
them is gone.
"""

import contextlib
import logging
import select
import socket
import threading
from collections import deque
from collections.abc import Callable

from jaxsys.serve.processes.secret import prove
from jaxsys.serve.processes.wire import Frame, Frames, pack

logger = logging.getLogger(__name__)

CONNECT_S = 30.0
AGAIN_S = 0.2
"""Pause before a front that is gone is tried again."""
MOST_UNSENT = 64 << 20
"""Bytes that may wait for a front."""
UNSENT_S = 30.0
"""How long a front may take nothing while something waits for it."""


class Line:
    """A connection; safe to send on from any thread."""

    def __init__(self, address: tuple[str, int], secret: str):
        """Connects.

        Raises:
            OSError: if nobody listens there, or turns us away.
        """
        self.told: object = None
        """The load that was last sent."""
        self._socket = socket.create_connection(address, CONNECT_S)
        try:
            prove(self._socket, secret, b"switchboard")
            self._socket.settimeout(None)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            self._socket.close()
            raise
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._sending = False
        """Whether the thread has something that nothing may overtake."""
        self._ready = threading.Condition()
        self._thread: threading.Thread | None = None
        self.closed = False

    def send(self, frame: Frame) -> None:
        """Sends, now or soon; a line that is gone shows where frames are read."""
        data = pack(frame)
        with self._ready:
            if self.closed:
                return
            if not self._sending:
                try:
                    data = data[self._socket.send(data, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass
                except OSError:
                    return
                if not data:
                    return
            self._unsent.append(data)
            self._unsent_bytes += len(data)
            if self._unsent_bytes > MOST_UNSENT:
                self._give_up(f"{self._unsent_bytes >> 20} MiB wait for it")
                return
            self._sending = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._send, name="line", daemon=True)
                self._thread.start()
            self._ready.notify()

    def read(self, take: Callable[[Frame], bool]) -> None:
        """Reads until the other side ends the line, or `take` says that it is over."""
        frames = Frames()
        with contextlib.suppress(OSError):
            while data := self._socket.recv(1 << 18):
                for frame in frames.feed(data):
                    if not take(frame):
                        return

    def close(self) -> None:
        """Ends it; whatever is still unsent goes if there is room for it."""
        with self._ready:
            self.closed = True
            with contextlib.suppress(OSError):
                for data in self._unsent:
                    self._socket.send(data, socket.MSG_DONTWAIT)
            self._unsent.clear()
            self._ready.notify()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _send(self) -> None:
        """Sends what had to wait, in its order."""
        while True:
            with self._ready:
                while not self._unsent:
                    self._sending = False
                    if self.closed:
                        return
                    self._ready.wait()
                if self.closed:
                    return
                data = self._unsent[0]
            try:
                # A time limit would be one for the reader too.
                sent = self._send_some(data)
            except OSError as error:
                with self._ready:
                    self._give_up(str(error))
                return
            with self._ready:
                if self.closed:
                    return
                self._unsent_bytes -= sent
                if sent == len(data):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = data[sent:]

    def _send_some(self, data: bytes) -> int:
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        if not poll.poll(UNSENT_S * 1e3):
            raise TimeoutError(f"it took nothing for {UNSENT_S:g} s")
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def _give_up(self, reason: str) -> None:
        if not self.closed:
            logger.warning("gave a front up", extra={"reason": reason})
        self._unsent.clear()
        self._unsent_bytes = 0
        self.closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
