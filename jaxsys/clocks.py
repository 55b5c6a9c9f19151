"""One protocol for a GPU's clock, power and energy, whatever stands behind it.

Bodies: NVML (`jaxsys.nvml`), observe-only (here: reads through another body, never sets), a group
of GPUs that work as one (here: joint power and energy) and simulated (here: a state machine in
virtual or real time). Governors hold a `GpuClocks` and nothing else, so the same decision code
drives a real GPU, a shared one that may only be watched, and none.

A reading that does not exist is `None`, never 0; why is in `reason`.
"""

import bisect
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxsys.errors import RunError, UsageError


class ClockError(RunError):
    """A GPU's clock could not be read or set."""


class ClockPermissionError(ClockError):
    """The driver refuses this user the right to set clocks."""


class GpuLostError(ClockError):
    """The GPU fell off the bus or its driver stopped answering."""


@runtime_checkable
class GpuClocks(Protocol):
    """A GPU whose SM clock may be read and perhaps set."""

    @property
    def name(self) -> str:
        """What the GPU calls itself, e.g. "NVIDIA H100 80GB HBM3"."""
        ...

    @property
    def available_mhz(self) -> tuple[int, ...]:
        """SM clocks that may be asked for, ascending; empty where unknown."""
        ...

    @property
    def can_set(self) -> bool:
        """Whether `set_clock` has any effect."""
        ...

    @property
    def reason(self) -> str:
        """Why `can_set` is False, or why a reading is missing; empty where all is well."""
        ...

    def set_clock(self, clock_mhz: int) -> None:
        """Asks for `clock_mhz`; returns before the GPU has changed. Only the newest ask counts.

        Raises:
            UsageError: if `clock_mhz` is not one of `available_mhz`.
        """
        ...

    def asked_mhz(self) -> int | None:
        """The clock last asked for, or None if the GPU runs by its own rule."""
        ...

    def actual_mhz(self) -> int | None:
        """The SM clock the GPU runs at now."""
        ...

    def power_w(self) -> float | None:
        """Power drawn, as the GPU reports it (often a moving average)."""
        ...

    def energy_j(self) -> float | None:
        """Energy since some fixed moment; never falls, even where the GPU's counter wraps."""
        ...

    def throttle_reasons(self) -> frozenset[str]:
        """Why the GPU runs below the asked clock, e.g. {"power_cap"}; empty if it does not."""
        ...

    def reset(self) -> None:
        """Returns the clock to the GPU's own rule."""
        ...

    def heed(self, alive: Callable[[], bool]) -> None:
        """Lets go of the clock while `alive` says False, where setting it is a lease."""
        ...

    def close(self) -> None:
        """Resets what was set and lets go of the GPU."""
        ...


def check_clock(clock_mhz: int, available_mhz: tuple[int, ...]) -> None:
    """Refuses a clock that the GPU does not list, and names the nearest that it does."""
    at = bisect.bisect_left(available_mhz, clock_mhz)
    if at < len(available_mhz) and available_mhz[at] == clock_mhz:
        return
    if not available_mhz:
        raise UsageError(f"clock_mhz={clock_mhz}: this GPU lists no clocks, so none can be set")
    near = min(available_mhz, key=lambda mhz: abs(mhz - clock_mhz))
    raise UsageError(
        f"clock_mhz={clock_mhz} is not a clock of this GPU "
        f"({available_mhz[0]}..{available_mhz[-1]} MHz); the nearest is {near}"
    )


class EnergyCounter:
    """Turns a counter that wraps or restarts into energy that never falls.

    A reading below the last one is taken as a wrap where the counter's modulus is known, else as a
    restart from zero (driver reload): then only what the counter holds now is added, so energy is
    undercounted rather than invented.
    """

    def __init__(self, modulus_mj: int | None = None) -> None:
        self._modulus_mj = modulus_mj
        self._last_mj: int | None = None
        self._total_mj = 0
        self.restarts = 0

    def update(self, reading_mj: int) -> float:
        """Takes one reading in millijoules; returns joules since the first reading."""
        if self._last_mj is not None:
            step = reading_mj - self._last_mj
            if step < 0:
                self.restarts += 1
                step = step + self._modulus_mj if self._modulus_mj else reading_mj
            self._total_mj += step
        self._last_mj = reading_mj
        return self._total_mj / 1000.0


class ObserveOnly:
    """Reads through another body and never sets: for shared GPUs and refused permissions."""

    def __init__(self, inner: GpuClocks, reason: str) -> None:
        self._inner = inner
        self.reason = reason
        self.ignored_asks = 0
        self._wished_mhz: int | None = None

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def available_mhz(self) -> tuple[int, ...]:
        return self._inner.available_mhz

    @property
    def can_set(self) -> bool:
        return False

    @property
    def wished_mhz(self) -> int | None:
        """The clock a governor would have set: what observing is for."""
        return self._wished_mhz

    def set_clock(self, clock_mhz: int) -> None:
        check_clock(clock_mhz, self.available_mhz)
        self._wished_mhz = clock_mhz
        self.ignored_asks += 1

    def asked_mhz(self) -> int | None:
        return None

    def actual_mhz(self) -> int | None:
        return self._inner.actual_mhz()

    def power_w(self) -> float | None:
        return self._inner.power_w()

    def energy_j(self) -> float | None:
        return self._inner.energy_j()

    def throttle_reasons(self) -> frozenset[str]:
        return self._inner.throttle_reasons()

    def reset(self) -> None:
        self._wished_mhz = None

    def heed(self, alive: Callable[[], bool]) -> None:
        return

    def close(self) -> None:
        self._inner.close()


class GroupClocks:
    """GPUs that work as one, as a tensor-parallel instance's do: one clock, joint power and energy.

    What one of them cannot tell, the group cannot: a sum with a part missing would be taken for the
    whole.
    """

    def __init__(self, members: Sequence[GpuClocks]) -> None:
        if not members:
            raise UsageError("a group of GPUs needs at least one")
        self.members = tuple(members)

    @property
    def name(self) -> str:
        return f"{len(self.members)} x {self.members[0].name}"

    @property
    def available_mhz(self) -> tuple[int, ...]:
        """Those that all of them list."""
        common = set(self.members[0].available_mhz)
        for member in self.members[1:]:
            common &= set(member.available_mhz)
        return tuple(sorted(common))

    @property
    def can_set(self) -> bool:
        return all(member.can_set for member in self.members)

    @property
    def reason(self) -> str:
        return next((member.reason for member in self.members if member.reason), "")

    def set_clock(self, clock_mhz: int) -> None:
        for member in self.members:
            member.set_clock(clock_mhz)

    def asked_mhz(self) -> int | None:
        return self.members[0].asked_mhz()

    def actual_mhz(self) -> int | None:
        """The slowest: the others wait for it."""
        clocks = [member.actual_mhz() for member in self.members]
        known = [mhz for mhz in clocks if mhz is not None]
        return min(known) if len(known) == len(clocks) else None

    def power_w(self) -> float | None:
        return _sum([member.power_w() for member in self.members])

    def energy_j(self) -> float | None:
        return _sum([member.energy_j() for member in self.members])

    def throttle_reasons(self) -> frozenset[str]:
        return frozenset().union(*(member.throttle_reasons() for member in self.members))

    def reset(self) -> None:
        for member in self.members:
            member.reset()

    def heed(self, alive: Callable[[], bool]) -> None:
        for member in self.members:
            member.heed(alive)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # each, whatever another raises
            for member in self.members:
                stack.callback(member.close)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


@dataclass(slots=True)
class SimulatedClocks:
    """A GPU's clock as a state machine: an ask takes effect `set_latency_s` later.

    `now_s` supplies time (virtual or real). Power and energy are what the owner records with
    `spend`: this class knows nothing of models. `counter_step_s` makes `energy_j` step as NVML's
    counter does (about every 100 ms on data-centre GPUs); 0 reads exactly.
    """

    available_mhz: tuple[int, ...]
    now_s: Callable[[], float]
    name: str = "simulated GPU"
    set_latency_s: float = 0.003
    clamp_mhz: int | None = None
    """Highest clock the GPU really reaches, e.g. under a power cap; None for no clamp."""
    counter_step_s: float = 0.0
    can_set: bool = True
    reason: str = ""
    changes: int = field(default=0, init=False)
    _asked_mhz: int | None = field(default=None, init=False)
    _current_mhz: int = field(default=0, init=False)
    _moving_to_mhz: int | None = field(default=None, init=False)
    _moved_at_s: float = field(default=0.0, init=False)
    _queued_mhz: int | None = field(default=None, init=False)
    _energy_j: float = field(default=0.0, init=False)
    _shown_energy_j: float = field(default=0.0, init=False)
    _shown_at_s: float = field(default=float("-inf"), init=False)
    _power_w: float | None = field(default=None, init=False)
    _power_capped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.available_mhz = tuple(sorted(self.available_mhz))
        if not self.available_mhz:
            raise UsageError("a simulated GPU needs at least one clock")
        if self.set_latency_s < 0:
            raise UsageError(f"set_latency_s={self.set_latency_s} must not be negative")
        self._current_mhz = self.available_mhz[-1]

    @property
    def max_mhz(self) -> int:
        """The clock the GPU runs at under its own rule when there is work."""
        return self.available_mhz[-1]

    def set_clock(self, clock_mhz: int) -> None:
        check_clock(clock_mhz, self.available_mhz)
        if clock_mhz == self._asked_mhz:
            return
        self._settle()
        self._asked_mhz = clock_mhz
        self._schedule(clock_mhz)

    def asked_mhz(self) -> int | None:
        return self._asked_mhz

    def actual_mhz(self) -> int:
        self._settle()
        if self.clamp_mhz is not None and self._current_mhz > self.clamp_mhz:
            return self.clamp_mhz
        return self._current_mhz

    def power_w(self) -> float | None:
        return self._power_w

    def energy_j(self) -> float:
        if self.counter_step_s <= 0:
            return self._energy_j
        now = self.now_s()
        if now - self._shown_at_s >= self.counter_step_s:
            self._shown_energy_j = self._energy_j
            self._shown_at_s = now
        return self._shown_energy_j

    def throttle_reasons(self) -> frozenset[str]:
        self._settle()
        clamped = self.clamp_mhz is not None and self._current_mhz > self.clamp_mhz
        return frozenset({"power_cap"}) if clamped or self._power_capped else frozenset()

    def reset(self) -> None:
        if self._asked_mhz is None:
            return
        self._settle()
        self._asked_mhz = None
        self._schedule(self.max_mhz)

    def heed(self, alive: Callable[[], bool]) -> None:
        return

    def close(self) -> None:
        self.reset()

    def next_change(self) -> tuple[float, int] | None:
        """When the clock will change and to what, or None if nothing is under way."""
        self._settle()
        if self._moving_to_mhz is None:
            return None
        return self._moved_at_s, self._moving_to_mhz

    def spend(self, duration_s: float, power_w: float, *, power_capped: bool = False) -> None:
        """Records that the GPU drew `power_w` for `duration_s`."""
        self._energy_j += duration_s * power_w
        self._power_w = power_w
        self._power_capped = power_capped

    def _schedule(self, clock_mhz: int) -> None:
        # One command is under way at a time; of those waiting behind it only the newest counts.
        self.changes += 1
        if self._moving_to_mhz is not None:
            self._queued_mhz = clock_mhz
            return
        self._moving_to_mhz = clock_mhz
        self._moved_at_s = self.now_s() + self.set_latency_s
        self._settle()

    def _settle(self) -> None:
        if self._moving_to_mhz is None:
            return
        now = self.now_s()
        while self._moving_to_mhz is not None and now >= self._moved_at_s:
            self._current_mhz = self._moving_to_mhz
            self._moving_to_mhz = self._queued_mhz
            self._queued_mhz = None
            self._moved_at_s += self.set_latency_s
