"""Ends a run well: SIGTERM and SIGINT become a stop after a step, and hung steps an exit.

In a run of many processes all must stop after the same step. The first to be told writes that step
into the coordination service: its own plus `AHEAD`, which no other process can have passed, because
none starts step n + 2 before step n has ended everywhere.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import jax

AHEAD = 3
_STOP_KEY = "jaxsys/stop-after"


class StopRequest:
    """Listens for SIGTERM and SIGINT while a run lasts (a context manager).

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, object] = {}
        self._stop_after: int | None = None

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers; elsewhere the caller keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self.signal = signal.Signals(number)

    def after(self, step: int) -> bool:
        """Whether the run is to stop after `step`, which this process has just started."""
        if jax.process_count() == 1:
            return self.signal is not None
        client = _client()
        if self._stop_after is None and self.signal is not None:
            # Fails where another process was first, whose step then counts.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(_STOP_KEY, str(step + AHEAD))
        if self._stop_after is None:
            try:
                self._stop_after = int(client.key_value_try_get(_STOP_KEY))
            except jax.errors.JaxRuntimeError:  # not there: nobody asked
                return False
        return step >= self._stop_after


class Watchdog:
    """Ends the process when no step has ended for too long (a context manager).

    A collective that waits for a peer that never comes cannot be interrupted from Python, so the
    process leaves by `os._exit`, after the stacks of all threads are printed.

    Args:
        timeout_s: the longest a step may take; None watches nothing.
        start_s: the same for the first step, which compiles.
        explain: called for a last word on what may be wrong.
    """

    def __init__(
        self,
        timeout_s: float | None,
        *,
        start_s: float = 3600.0,
        explain: Callable[[], str] = lambda: "",
    ) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + max(start_s, timeout_s or 0)
        self._allowed = max(start_s, timeout_s or 0)
        self._explain = explain
        self._step = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._timeout_s is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self, step: int, *, extra_s: float = 0.0) -> None:
        """Step `step` has ended; what comes next may take `extra_s` more than a step."""
        self._step = step
        self._allowed = (self._timeout_s or 0) + extra_s
        self._deadline = time.monotonic() + self._allowed

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, (self._timeout_s or 1.0) / 4)):
            if time.monotonic() > self._deadline:
                print(
                    f"jaxsys: no step has ended for {self._allowed:.0f} s (the last was step "
                    f"{self._step}); {self._explain() or 'all peers are alive'}; stopping",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr)
                os._exit(1)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client
