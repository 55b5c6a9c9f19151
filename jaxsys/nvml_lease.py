"""A GPU's clock as a lease: a small helper process locks it, and unlocks it whatever happens.

Locked clocks outlive the process that locked them. The helper therefore is a process of its own
session whose standard input is a pipe from the server: lines `set MHZ`, `reset`, `beat`. It resets
the clock when the pipe ends (the server exited, crashed or was killed), when no line came for the
lease time (it hangs), on SIGTERM, and on its own faults. Of the commands waiting in the pipe only
the newest is carried out, so a slow driver never falls behind.

Run as `python -m jaxsys.nvml_lease UUID LEASE_S`; it answers `ready`, `error TEXT` or `lapsed`,
one a line.
"""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from jaxsys.nvml_gpu import NvmlGpu

logger = logging.getLogger(__name__)


class Lease:
    """The server's end. `set_clock` costs one write to a pipe."""

    def __init__(
        self,
        uuid: str,
        *,
        alive: Callable[[], bool] | None = None,
        heartbeat_s: float = 0.5,
        lease_s: float = 2.0,
    ) -> None:
        self._uuid = uuid
        self.alive = alive
        """Asked before each heartbeat: the lease lapses while it says False."""
        self._heartbeat_s = heartbeat_s
        self._lease_s = lease_s
        self._process: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._wanted: bytes | None = None
        """What could not be sent yet."""
        self._asked: bytes | None = None
        """The clock last asked for; None after a reset."""
        self._lapsed = False
        self._writing = threading.Lock()
        """A pipe that another thread closes meanwhile must not be written to."""
        self.fault = ""
        """Why the lease no longer sets clocks; empty while it does."""

    def start(self) -> str:
        """Starts the helper; returns why it cannot set clocks, or "" if it can."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxsys.nvml_lease", self._uuid, str(self._lease_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C for the server must not reach it
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = self._process.stdout.readline().decode().strip()
        if answer != "ready":
            self._process.stdin.close()
            self._process.wait()
            return answer.removeprefix("error ") or "the clock helper did not start"
        os.set_blocking(self._process.stdin.fileno(), False)
        for target in (self._beat, self._listen):
            thread = threading.Thread(target=target, name=f"clock-lease{target.__name__}")
            thread.daemon = True
            thread.start()
            self._threads.append(thread)
        return ""

    @property
    def helper_pid(self) -> int | None:
        """The helper's process id."""
        return None if self._process is None else self._process.pid

    def set_clock(self, clock_mhz: int) -> None:
        """Asks for a clock; returns at once."""
        self._asked = b"set %d\n" % clock_mhz
        self._lapsed = False
        self._send(self._asked)

    def reset(self) -> None:
        """Asks for the GPU's own rule; returns at once."""
        self._asked = None
        self._send(b"reset\n")

    def close(self) -> None:
        """Ends the lease and waits until the clock is given back."""
        self._stop.set()
        process = self._process
        if process is None or process.stdin is None:
            return
        with self._writing, contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(timeout=10.0)
        for thread in self._threads:
            thread.join(timeout=5.0)
        if process.stdout is not None:
            process.stdout.close()
        self._process = None

    def _send(self, line: bytes) -> None:
        process = self._process
        if process is None or process.stdin is None or self.fault:
            return
        try:
            # Below the pipe's atomic size, so lines of two threads never mix.
            with self._writing:
                os.write(process.stdin.fileno(), line)
            self._wanted = None
        except BlockingIOError:
            self._wanted = line  # the helper is stuck in the driver; the next beat tries again
        except (OSError, ValueError):
            self._fail("the clock helper is gone")

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            if self.alive is not None and not self.alive():
                continue
            if self._lapsed and self._asked is not None:  # it hung and goes on: as it was
                self._lapsed, self._wanted = False, self._asked
            self._send(self._wanted or b"beat\n")

    def _listen(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        for raw in process.stdout:
            word, _, rest = raw.decode().strip().partition(" ")
            if word == "lapsed":
                self._lapsed = True
                logger.warning("no heartbeat for %.1f s: the clock was given back", self._lease_s)
            elif word == "error":
                self._fail(rest)
        if not self._stop.is_set():
            self._fail("the clock helper ended")
            self._reset_directly()

    def _fail(self, reason: str) -> None:
        if not self.fault:
            self.fault = reason
            if not self._stop.is_set():
                logger.error("GPU clocks are no longer set: %s", reason)

    def _reset_directly(self) -> None:
        """The helper was killed and could not tidy up: this process tries itself."""
        try:
            gpu = NvmlGpu(self._uuid)
            try:
                gpu.unlock()
            finally:
                gpu.close()
        except (RuntimeError, ValueError) as error:
            logger.error("%s; reset the clock with `jaxsys clocks reset`", error)


# --- the helper -------------------------------------------------------------------------------


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, f"{text}\n".encode())


def _newest(lines: list[bytes]) -> bytes | None:
    """The last command among `lines`; beats are no commands."""
    commands = [line for line in lines if line and line != b"beat"]
    return commands[-1] if commands else None


def run_helper(uuid: str, lease_s: float) -> int:
    """Holds the clock until the pipe ends; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        gpu = NvmlGpu(uuid)
        gpu.unlock()  # what will be done at the end must be possible at the beginning
    except (RuntimeError, ValueError) as error:
        _say(f"error {error}")
        return 1
    try:
        _say("ready")
        _serve(gpu, lease_s)
    except (RuntimeError, ValueError) as error:
        _say(f"error {error}")
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _unlock_stubbornly(gpu)
    return 0


def _serve(gpu: NvmlGpu, lease_s: float) -> None:
    rest = b""
    held: int | None = None
    heard_s = time.monotonic()
    while True:
        left_s = max(0.0, heard_s + lease_s - time.monotonic()) if held is not None else None
        ready, _, _ = select.select([0], [], [], left_s)
        if not ready:
            gpu.unlock()
            held = None
            _say("lapsed")
            continue
        data = os.read(0, 65536)
        if not data:
            return
        heard_s = time.monotonic()
        *lines, rest = (rest + data).split(b"\n")
        command = _newest(lines)
        if command is None:
            continue
        if command == b"reset":
            gpu.unlock()
            held = None
        else:
            mhz = int(command.removeprefix(b"set "))
            if mhz != held:
                gpu.lock(mhz)  # refuses what the driver does not list
                held = mhz


def _unlock_stubbornly(gpu: NvmlGpu) -> None:
    for _ in range(3):
        try:
            gpu.unlock()
            return
        except RuntimeError:
            time.sleep(0.1)


if __name__ == "__main__":
    raise SystemExit(run_helper(sys.argv[1], float(sys.argv[2])))
