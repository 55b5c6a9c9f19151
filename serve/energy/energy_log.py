"""A GPU's energy counter as a curve in time.

The counter steps about every 100 ms, so a difference of two readings may miss a step at either end.
Here a thread notes when it steps; between steps energy is taken to rise evenly, which leaves an
error of a fraction of a step.
"""

import bisect
import threading
import time
from collections.abc import Callable

from jaxsys.clocks import ClockError

LONGEST_WAIT_S = 1.0
"""A counter that has not stepped for this long will not."""


class EnergyLog:
    """Steps of one counter, noted from now until `close`."""

    def __init__(self, read_j: Callable[[], float | None], *, every_s: float = 0.01) -> None:
        """
        Args:
            read_j: the counter; milliseconds a call on real GPUs.
            every_s: pause between readings.
        """
        self._read_j = read_j
        self._every_s = every_s
        self._times_s: list[float] = []
        self._energies_j: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="energy-log", daemon=True)
        self._thread.start()

    def between(self, start_s: float, end_s: float) -> float | None:
        """Joules from one `time.perf_counter` time to another; None where the counter was not
        known to step before the one and after the other. Waits for the step after `end_s`."""
        deadline_s = end_s + LONGEST_WAIT_S
        while time.perf_counter() < deadline_s and self._thread.is_alive():
            if self._times_s and self._times_s[-1] >= end_s:
                break
            time.sleep(self._every_s)
        at_start, at_end = self._at(start_s), self._at(end_s)
        return None if at_start is None or at_end is None else at_end - at_start

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _at(self, when_s: float) -> float | None:
        # The thread appends to the energies first, so they are never the shorter list.
        times_s = self._times_s[:]
        after = bisect.bisect_left(times_s, when_s)
        if not 0 < after < len(times_s):
            return None
        (t0, t1), (e0, e1) = times_s[after - 1 : after + 1], self._energies_j[after - 1 : after + 1]
        return e0 + (e1 - e0) * (when_s - t0) / (t1 - t0)

    def _run(self) -> None:
        last_j: float | None = None
        while not self._stop.wait(self._every_s):
            try:
                now_j = self._read_j()
            except ClockError:  # the GPU is lost
                return
            if now_j is None:
                return
            if now_j != last_j:
                if last_j is not None:  # the first reading is not a step
                    self._energies_j.append(now_j)
                    self._times_s.append(time.perf_counter())
                last_j = now_j
