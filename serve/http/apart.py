"""What is done apart from the server: by processes that answer frames, and may be ended.

A frame is a length of four bytes and so many bytes. Processes are started when they are needed and
kept; one that does not answer is ended, and the next question starts another.
"""

import contextlib
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from jaxsys.errors import RunError

START_S = 30.0
"""Longest time that a process may take to start."""
LENGTH = struct.Struct("!I")


class Apart:
    """Processes of one script, which is run by its path: packages around it would bring JAX."""

    def __init__(self, script: Path, arguments: Sequence[str] = (), *, what: str):
        """
        Args:
            script: reads frames from standard input, and answers each by one.
            arguments: of the script.
            what: it does, for whoever is told that no process does it.
        """
        self._command = [sys.executable, "-P", str(script), *arguments]
        self._what = what
        self._idle: list[subprocess.Popen[bytes]] = []
        self._all: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._finalizer = weakref.finalize(self, _end, self._all, self._lock)

    def ask(self, pieces: Sequence[bytes], limit_s: float) -> bytes | None:
        """An answer, for which the calling thread waits.

        Args:
            pieces: of the frame, without its length.
            limit_s: longest time that the process may take once it runs.

        Returns:
            The answer, or None where the process has ended, or does not answer.

        Raises:
            RunError: if no process can be started, or the server is shutting down.
        """
        process = self._take()
        try:
            answer = _exchange(process, pieces, START_S + limit_s)
        except BaseException:
            self._drop(process)
            raise
        if answer is None:
            self._drop(process)
            if self._closed.is_set():
                raise RunError("the server is shutting down; use another one")
            return None
        with self._lock:
            self._idle.append(process)
        return answer

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._closed.set()
        self._finalizer()

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                self._all.discard(process)
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the terminal is the server's
                bufsize=0,
            )
        except OSError as error:
            raise RunError(f"no process {self._what}: {error.strerror}; try again later") from None
        with self._lock:
            self._all.add(process)
            late = self._closed.is_set()
        if late:
            process.kill()
        return process

    def _drop(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._all.discard(process)
        _kill(process)


def _exchange(
    process: subprocess.Popen[bytes], pieces: Sequence[bytes], limit_s: float
) -> bytes | None:
    assert process.stdin is not None and process.stdout is not None
    try:
        for piece in (LENGTH.pack(sum(map(len, pieces))), *pieces):
            left = memoryview(piece)
            while left:
                left = left[process.stdin.write(left) :]
    except OSError:
        return None
    deadline_s = time.monotonic() + limit_s
    header = _read(process, LENGTH.size, deadline_s)
    return None if header is None else _read(process, LENGTH.unpack(header)[0], deadline_s)


def _read(process: subprocess.Popen[bytes], count: int, deadline_s: float) -> bytes | None:
    """`count` bytes that a process writes; None where they do not come."""
    pipe = process.stdout
    assert pipe is not None
    found = bytearray()
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    while len(found) < count:
        if not ready.poll(max(0.0, 1e3 * (deadline_s - time.monotonic()))):
            return None
        piece = pipe.read(min(count - len(found), 1 << 20))
        if not piece:
            return None
        found += piece
    return bytes(found)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


def _end(processes: set[subprocess.Popen[bytes]], lock: threading.Lock) -> None:
    with lock:
        ending = list(processes)
        processes.clear()
    for process in ending:  # whoever reads from one sees it end, and closes its pipes
        process.kill()
        process.wait()
