"""What an instance's energy is known by: a counter that is read, or a modelled GPU.

Both keep one ledger: what is given to iterations, and so to requests, and what passed while nothing
ran. Given and idle energy add up to the whole.
"""

from typing import NamedTuple, Protocol

from jaxsys.clocks import GpuClocks, SimulatedClocks
from jaxsys.serve.energy.gpu_model import Load, SimulatedGpu

SETTLE_S = 0.5
"""Time within which shares make up for what was booked too little or too much."""
MOST_CORRECTION = 0.5
"""Most by which they do so, as a share of an iteration's energy."""
SCALES = (0.5, 2.0)
"""Between these the counter may lie above or below the power that is read."""
SCALE_STEP = 0.1
"""How much of what one step of the counter says of that is believed."""


class Metered(NamedTuple):
    """One iteration."""

    time_s: float
    energy_j: float | None


class Reading(NamedTuple):
    """What an instance's governor says of its GPUs; what nothing knows is None, never 0."""

    energy_j: float | None = None
    """Since the start, idle time included."""
    energy_at_max_j: float | None = None
    """What the same work and idle time would have taken at the maximum clock, where modelled."""
    idle_j: float | None = None
    """Of `energy_j`, what passed while nothing ran."""
    power_w: float | None = None
    """Measured now; None where the GPU is a modelled one, which draws nothing."""
    clock_mhz: float | None = None
    """Last asked for."""
    clock_bounds_mhz: tuple[int, int] | None = None
    """The lowest and the highest clock that may be asked for; None where none is."""


class Meter(Protocol):
    """Tells what iterations and idle times took."""

    @property
    def method(self) -> str:
        """How: begins with "measured", "modelled" or "none"."""
        ...

    def begin(self, now_s: float) -> None:
        """Work begins after a time without."""
        ...

    def iteration(self, load: Load, steps: int, latency_s: float, now_s: float) -> Metered:
        """An iteration has ended: what it took, by the device's own measure."""
        ...

    def idle(self, now_s: float) -> None:
        """Nothing runs, nor did since the last call."""
        ...

    def read(self, now_s: float) -> Reading:
        """All so far."""
        ...


class CounterMeter:
    """A GPU's energy counter.

    It steps about every 100 ms, coarser than an iteration: an iteration is given the power read
    times its latency, scaled by what the counter rose by against power readings of late, and
    whatever that misses of the counter in the iterations after it. Over seconds, requests' shares
    and idle time add up to the counter.
    """

    def __init__(self, device: GpuClocks, *, sharing: int = 1) -> None:
        """
        Args:
            sharing: instances that have the same GPUs: each is given an equal part, so that they
                add up to what was drawn.
        """
        self.device = device
        self._part = 1.0 / sharing
        shared = f", in equal parts to {sharing} instances" if sharing > 1 else ""
        setting = "" if device.can_set else f"; clocks are observed, not set: {device.reason}"
        self.method = (
            f"measured: the energy counter of {device.name} (steps of about 100 ms), idle "
            f"included{shared}; requests share their iterations by tokens and bytes{setting}"
        )
        self._first_j = self._seen_j = self._counter_j()
        self._booked_j = 0.0
        self._idle_j = 0.0
        self._owed_j = 0.0
        """What the counter showed more than was booked, when it last stepped."""
        self._raw_j = 0.0
        """Power read, times time, since then."""
        self._scale = 1.0
        self._booked_s: float | None = None

    def begin(self, now_s: float) -> None:
        self.idle(now_s)

    def iteration(self, load: Load, steps: int, latency_s: float, now_s: float) -> Metered:
        self._booked_s = now_s
        power_w = self._power_w()
        self._raw_j += (power_w or 0.0) * latency_s
        stepped = self._look()
        if power_w is None:
            energy_j = max(0.0, self._owed_j) if stepped else None
        else:
            energy_j = power_w * latency_s * self._scale
            if power_w > 0:
                correction = self._owed_j / (power_w * SETTLE_S)
                energy_j *= 1 + min(max(correction, -MOST_CORRECTION), MOST_CORRECTION)
        if energy_j is not None:
            self._booked_j += energy_j
        return Metered(latency_s, energy_j)

    def idle(self, now_s: float) -> None:
        since_s, self._booked_s = self._booked_s, now_s
        power_w = self._power_w()
        raw_j = 0.0 if since_s is None or power_w is None else power_w * (now_s - since_s)
        self._raw_j += raw_j
        energy_j = max(0.0, self._owed_j) if self._look() else raw_j * self._scale
        self._booked_j += energy_j
        self._idle_j += energy_j

    def read(self, now_s: float) -> Reading:
        now_j = self._counter_j()
        if now_j is None:
            return Reading(power_w=self._power_w())
        if self._first_j is None:
            self._first_j = now_j
        return Reading(now_j - self._first_j, None, self._idle_j, self._power_w())

    def _counter_j(self) -> float | None:
        energy_j = self.device.energy_j()
        return None if energy_j is None else energy_j * self._part

    def _power_w(self) -> float | None:
        power_w = self.device.power_w()
        return None if power_w is None else power_w * self._part

    def _look(self) -> bool:
        """Whether the counter has stepped; then what it says more than is booked is owed."""
        now_j, before_j = self._counter_j(), self._seen_j
        if now_j is None or now_j == before_j:
            return False
        if self._first_j is None:
            self._first_j = now_j
        if before_j is not None and self._raw_j > 0:
            low, high = SCALES
            seen = min(max((now_j - before_j) / self._raw_j, low), high)
            self._scale += SCALE_STEP * (seen - self._scale)
        self._seen_j, self._raw_j = now_j, 0.0
        self._owed_j = now_j - self._first_j - self._booked_j
        return True


class ModelMeter:
    """A modelled GPU, for servers without one: what each real iteration's batch and tokens would
    have taken there, at the clock chosen and at its highest.

    Time between iterations counts as idle at the modelled idle power; time in them is the model's.
    """

    method = (
        "modelled: a simulated GPU at the clock chosen, idle between iterations included; nothing "
        "is measured"
    )

    def __init__(self, gpu: SimulatedGpu, clocks: SimulatedClocks) -> None:
        self.gpu = gpu
        self.clocks = clocks
        self._at_max_j = 0.0
        self._idle_j = 0.0
        self._settled_s: float | None = None

    def begin(self, now_s: float) -> None:
        self.idle(now_s)

    def iteration(self, load: Load, steps: int, latency_s: float, now_s: float) -> Metered:
        outcome = self.gpu.run(load, self.clocks.actual_mhz())
        time_s = outcome.time_s * steps
        self.clocks.spend(time_s, outcome.power_w, power_capped=outcome.power_capped)
        self._at_max_j += self.gpu.run(load, self.gpu.spec.max_mhz).energy_j * steps
        self._settled_s = now_s
        return Metered(time_s, outcome.energy_j * steps)

    def idle(self, now_s: float) -> None:
        gap_s = 0.0 if self._settled_s is None else max(0.0, now_s - self._settled_s)
        self._settled_s = now_s
        power_w = self.gpu.idle_power_w(self.clocks.actual_mhz())
        self.clocks.spend(gap_s, power_w)
        self._idle_j += gap_s * power_w
        self._at_max_j += gap_s * self.gpu.idle_power_w(self.gpu.spec.max_mhz)

    def read(self, now_s: float) -> Reading:
        return Reading(self.clocks.energy_j(), self._at_max_j, self._idle_j)
