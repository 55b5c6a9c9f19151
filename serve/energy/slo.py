"""The latency promises: time to first token (TTFT) and inter-token latency (ITL).

One `SharedSlo` is held by the governors and the router alike, so they cannot disagree, and a live
change reaches both at their next decision.
"""

import math
from dataclasses import dataclass

from jaxsys.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Upper bounds promised to users, and the reserve kept below them when planning."""

    ttft_s: float = 0.6
    itl_s: float = 0.06
    reserve: float = 0.05
    """Share of each bound that decisions leave unused: 0.05 plans for 95 % of it. Larger is safer
    and dearer."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name}={value} must be a positive number of seconds")
        if not 0 <= self.reserve < 1:
            raise UsageError(f"reserve={self.reserve} must be from 0 to below 1")

    @property
    def planned_ttft_s(self) -> float:
        """The TTFT that decisions aim for."""
        return self.ttft_s * (1 - self.reserve)

    @property
    def planned_itl_s(self) -> float:
        """The ITL that decisions aim for."""
        return self.itl_s * (1 - self.reserve)


class SharedSlo:
    """The SLO in force. Readers take `current` anew at each decision."""

    __slots__ = ("changes", "current")

    def __init__(self, slo: Slo | None = None) -> None:
        self.current = slo or Slo()
        self.changes = 0

    def change(self, slo: Slo) -> None:
        """Puts another SLO in force; rebinding one reference is atomic for threads."""
        self.current = slo
        self.changes += 1
