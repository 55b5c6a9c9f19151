"""Ctrl-C and SIGTERM end a command soon and with 128 + their number, whatever it is doing.

Python runs a signal's handler on the main thread between two bytecodes: a compilation holds it up,
and a KeyboardInterrupt raised in a callback of a C library is printed and dropped. So a thread
reads the byte that is written as each signal comes (`signal.set_wakeup_fd`), and insists. The
process leaves by `os._exit`: with XLA's threads running, the interpreter's own end may crash.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, Self

GRACE_S = 1.0
"""How long an interrupted command may take to unwind."""


class SignalWatch:
    """Calls `told(number)` on a thread as each signal with a handler comes (a context manager)."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self._told = told
        self._write_end = self._before = -1

    def __enter__(self) -> Self:
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(read_end,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._write_end)

    def _read(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                self._told(number[0])


class Interruptible:
    """Around a command: its first SIGINT or SIGTERM unwinds it, then the process is left.

    What sets handlers of its own inside, as a training loop or a server does, takes over, and ends
    in its own order: until the second Ctrl-C, which always ends the process.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._taken_over = 0  # signals that came when another handled them
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(SignalWatch(self._told))
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before = signal.signal(number, self._receive)
                self._stack.callback(signal.signal, number, before)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._number is not None:
            leave(128 + self._number)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            leave(128 + signal.SIGINT)
        self._stack.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number = number
            raise KeyboardInterrupt

    def _told(self, number: int) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            return
        if signal.getsignal(number) != self._receive:
            self._taken_over += 1
            if number == signal.SIGTERM:
                return
            if self._taken_over == 1:
                print("stopping after what is under way; Ctrl-C again to stop now", file=sys.stderr)
                return
        time.sleep(GRACE_S)
        os._exit(128 + number)


def leave(code: int) -> NoReturn:
    """Ends the process without the interpreter's own end; what was printed gets out."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
