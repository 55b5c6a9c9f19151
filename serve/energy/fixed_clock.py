"""One clock, busy or idle: the static policies that others are compared with."""

from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.policy import ClockPolicy, Clocks, Queue


class FixedClock(ClockPolicy):
    """Holds one clock."""

    def __init__(self, clock_mhz: int) -> None:
        super().__init__()
        self.start_mhz = clock_mhz

    def choose(self, load: Load, queue: Queue, clocks: Clocks) -> int | None:
        return self.start_mhz
