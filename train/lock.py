"""One run a folder: a lock that the kernel lets go of when its holder ends, however it ends.

The file names who holds it, for the message; what excludes is `flock`, so that nothing is left to
remove after a kill. On a network file system that keeps locks (NFS 4, Lustre with flock) it holds
between hosts too.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from jaxsys.errors import UsageError

NAME = "run.lock"


class RunLock:
    """Holds a run's folder (a context manager).

    Args:
        folder: made if missing.
        wait_s: how long to wait for another run to let go of it.
        notice: told, once, that it waits and for whom.

    Raises:
        UsageError: on entering, if another process holds it for longer than `wait_s`.
    """

    def __init__(
        self, folder: Path, *, wait_s: float = 0.0, notice: Callable[[str], None] = lambda _: None
    ) -> None:
        self._path, self._wait_s, self._notice = folder / NAME, wait_s, notice
        self._file: int | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        until, said = time.monotonic() + self._wait_s, False
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not self._take(file):
                holder = (
                    os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
                )
                if time.monotonic() >= until:
                    raise UsageError(
                        f"{self._path.parent} is in use by a run of {holder}; wait for it to end, "
                        "or choose another folder"
                    )
                if not said:
                    self._notice(f"waiting for {self._path.parent}, in use by {holder}")
                    said = True
                time.sleep(0.2)
            os.ftruncate(file, 0)
            os.pwrite(file, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @staticmethod
    def _take(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return True  # a file system without locks: nothing to ask
            raise
        return True
