"""Time as a value: the brain of the server asks a `Clock`, never the operating system.

The live server runs on `WallClock`; a replay runs on `VirtualClock`, which moves only when told.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """Something that knows the time in seconds since an arbitrary start."""

    def now_s(self) -> float:
        """The present time in seconds."""
        ...


class WallClock:
    """Monotonic real time."""

    __slots__ = ()

    def now_s(self) -> float:
        return time.monotonic()


class VirtualClock:
    """Time that stands still until `advance_to`."""

    __slots__ = ("_now_s",)

    def __init__(self, start_s: float = 0.0):
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance_to(self, time_s: float) -> None:
        """Moves to `time_s`.

        Raises:
            ValueError: if `time_s` lies in the past.
        """
        if time_s < self._now_s:
            raise ValueError(f"time_s={time_s} lies before the clock's now_s={self._now_s}")
        self._now_s = time_s
