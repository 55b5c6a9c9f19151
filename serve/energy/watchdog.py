"""A deadline that another thread keeps while the loop is busy with an iteration."""

import threading
import time
from collections.abc import Callable

LOOK_S = 0.005
"""How often it looks up: the least by which an alarm may be late."""
QUIET_S = 0.5
"""Time without a deadline after which it sleeps until there is one."""


class Watchdog:
    """Calls `alarm` from a thread of its own once a deadline passes unless it is moved or lifted.

    While there is work the thread looks up every `LOOK_S`, so setting a deadline wakes nobody. One
    set nearer than that may ring so much late.
    """

    def __init__(self, alarm: Callable[[], None], *, now_s: Callable[[], float]) -> None:
        self._alarm = alarm
        self._now_s = now_s
        self._deadline_s: float | None = None
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="clock-watchdog", daemon=True)
        self._thread.start()

    def expect(self, deadline_s: float) -> None:
        """Something must be done by `deadline_s`."""
        self._deadline_s = deadline_s
        if not self._wake.is_set():  # first after a long quiet
            self._wake.set()

    def lift(self) -> None:
        """It was done."""
        self._deadline_s = None

    def close(self) -> None:
        """Ends the thread."""
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        quiet_s = 0.0
        while not self._stopped:
            deadline_s = self._deadline_s
            if deadline_s is None:
                quiet_s += LOOK_S
                if quiet_s > QUIET_S:
                    self._wake.clear()
                    if self._deadline_s is None and not self._stopped:
                        self._wake.wait()
                    quiet_s = 0.0
                else:
                    time.sleep(LOOK_S)
                continue
            quiet_s = 0.0
            left_s = deadline_s - self._now_s()
            if left_s > 0:
                time.sleep(min(left_s, LOOK_S))
            elif self._deadline_s == deadline_s:  # neither moved nor lifted meanwhile
                self._deadline_s = None
                self._alarm()
