"""Around any policy: asks it, sets the clock, measures, tells it what came of it.

One governor for all policies and all devices. It owns the device: whoever closes it gives the clock
back, at once. A governor that is not called any more, because its instance's loop hangs, loses the
clock too (`alive`).
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from jaxsys.clocks import GpuClocks
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.meters import Meter, Reading
from jaxsys.serve.energy.policy import (
    ClockPolicy,
    Clocks,
    Queue,
    Ran,
    Record,
    check_choices,
    load_of,
)
from jaxsys.serve.energy.shares import Shares
from jaxsys.serve.energy.watchdog import Watchdog

if TYPE_CHECKING:
    from jaxsys.serve.iterations import Iteration
    from jaxsys.serve.requests import Request

logger = logging.getLogger(__name__)

HANG_S = 3.0
"""Time without a call from the loop after which an instance does not count as alive. An idle loop
looks up several times a second; an iteration that takes longer costs it the clock while it runs."""


class Governor:
    """One instance's. All but `close`, `late` and `alive` from the instance's thread alone."""

    def __init__(
        self,
        policy: ClockPolicy,
        device: GpuClocks,
        meter: Meter,
        *,
        choices_mhz: Sequence[int],
        shares: Shares | None = None,
        watchdog: bool = False,
        judge_latency: bool = True,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            choices_mhz: the clocks that the policy chooses among.
            shares: apportions energy to requests; nothing is apportioned where None.
            watchdog: whether a thread raises the clock while an iteration overruns.
            judge_latency: whether iterations that took longer than the policy's patience count:
                not where their time is another machine's.

        Raises:
            UsageError: if a clock is not one of the GPU's.
        """
        if policy.controls:
            check_choices(choices_mhz, device.available_mhz, device.name)
        self.policy = policy
        self.device = device
        self.meter = meter
        choices_mhz = tuple(sorted(choices_mhz))
        self.clocks = Clocks(choices_mhz=choices_mhz, mhz=choices_mhz[-1] if choices_mhz else 0)
        controls = bool(policy.controls and choices_mhz)
        self._bounds_mhz = (choices_mhz[0], choices_mhz[-1]) if controls else None
        self.shares = shares
        self._judge_latency = judge_latency
        self._now_s = now_s
        self._idle = False
        self._open: deque[tuple[Load, float | None]] = deque()
        """Iterations in flight, with the time predicted of a step. A server plans the next one
        while this one runs."""
        self._heard_s: float | None = None
        self._closed = False
        device.heed(self.alive)
        self._watchdog = Watchdog(self._alarm, now_s=now_s) if watchdog and device.can_set else None

    @property
    def method(self) -> str:
        """How energy is known."""
        return self.meter.method

    @property
    def record(self) -> Record:
        return self.policy.record

    @property
    def clock_mhz(self) -> float | None:
        """The clock last asked for, which the GPU runs at where clocks can be set; where none is
        ever asked for, the one it runs at."""
        if not self.policy.controls:
            return self.device.actual_mhz()
        return self._idle_mhz if self._idle else self.clocks.mhz

    @property
    def idle_after_s(self) -> float | None:
        """Quiet time after which `idle` changes the clock; None for never."""
        return self.policy.idle_after_s

    @property
    def _idle_mhz(self) -> int:
        mhz = self.policy.idle_mhz
        return self.clocks.choices_mhz[0] if mhz is None else mhz

    # --- from the instance's loop -------------------------------------------------------------

    def start(self, now_s: float) -> None:
        """The loop begins."""
        self._heard_s = now_s
        if self.policy.controls:
            self.clocks.mhz = self.policy.start_mhz or self.clocks.top_mhz
            self.device.set_clock(self.clocks.mhz)

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        """Chooses and asks for the clock of the iteration about to run."""
        self._heard_s = now_s
        policy, clocks = self.policy, self.clocks
        if not self._open:
            self.meter.begin(now_s)
        load = load_of(iteration)
        clocks.now_s = now_s
        queue = Queue(iteration.prefills, waiting, iteration.decodes)
        mhz = policy.choose(load, queue, clocks)
        self._open.append((load, policy.predicted_s))
        was_idle, self._idle = self._idle, False
        if mhz is not None and (mhz != clocks.mhz or was_idle):
            self._set(mhz, now_s)
        if self._watchdog is not None and len(self._open) == 1:
            self._watchdog.expect(now_s + self.patience_s(max(1, iteration.steps)))

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        """Measures the iteration, teaches the policy, and raises the clock where it was late."""
        self._heard_s = now_s
        if self._watchdog is not None:
            self._watchdog.lift()
        policy, record, device = self.policy, self.policy.record, self.device
        load, predicted_s = self._open.popleft()
        steps = max(1, iteration.steps)
        latency_s, energy_j = self.meter.iteration(load, steps, latency_s, now_s)
        actual_mhz = device.actual_mhz()
        record.busy_s += latency_s
        if actual_mhz is not None:
            record.seconds_at_mhz[int(actual_mhz)] += latency_s
            if actual_mhz < self.clocks.mhz and policy.controls and device.throttle_reasons():
                record.clamped += 1
        policy.learn(Ran(load, steps, latency_s, predicted_s, actual_mhz, device.power_w()))
        if (
            predicted_s is not None
            and self._judge_latency
            and latency_s > policy.patience_s(predicted_s * steps)
        ):
            record.overruns += 1
            policy.overran()
            self._to_top(now_s)
        if energy_j is not None and self.shares is not None:
            self.shares.give(iteration, energy_j, now_s)
        if self._watchdog is not None and self._open:  # the next one began when this one ended
            self._watchdog.expect(now_s + self.patience_s(1))

    def dropped(self, count: int, now_s: float) -> None:
        """`count` iterations in flight were lost with a fault of the device."""
        self._heard_s = now_s
        if self._watchdog is not None:
            self._watchdog.lift()
        for _ in range(min(count, len(self._open))):
            self._open.popleft()

    def idle(self, now_s: float, quiet_since_s: float) -> None:
        """Nothing to compute: after a quiet time the clock falls to the idle clock."""
        self._heard_s = now_s
        if self._open:
            return
        self.meter.idle(now_s)
        wait_s = self.policy.idle_after_s
        if wait_s is None or self._idle or now_s - quiet_since_s < wait_s:
            return
        self._idle = True
        self.device.set_clock(self._idle_mhz)

    def reading(self, now_s: float) -> Reading:
        """Energy and clock so far; changes nothing."""
        read = self.meter.read(now_s)
        return read._replace(clock_mhz=self.clock_mhz, clock_bounds_mhz=self._bounds_mhz)

    # --- from wherever ------------------------------------------------------------------------

    def patience_s(self, steps: int) -> float:
        """How long the iteration last planned may take before `late` is to be called."""
        predicted_s = self._open[-1][1] if self._open else None
        return math.inf if predicted_s is None else self.policy.patience_s(predicted_s * steps)

    def late(self, now_s: float) -> None:
        """The iteration in flight takes longer than that: to the highest clock, while it runs."""
        self.policy.record.alarms += 1
        self._to_top(now_s)

    def alive(self) -> bool:
        """Whether the loop still calls; true before it has begun."""
        return self._heard_s is None or self._now_s() - self._heard_s < HANG_S

    def close(self) -> None:
        """Gives the clock back, then ends whatever runs beside. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.device.close()
        finally:
            if self._watchdog is not None:
                self._watchdog.close()
            self.policy.close()

    # --- inside -------------------------------------------------------------------------------

    def _alarm(self) -> None:
        # On the watchdog's thread; devices take asks from any thread.
        if self.device.can_set and not self._closed:
            self.late(self._now_s())

    def _to_top(self, now_s: float) -> None:
        if self.policy.controls and self.clocks.mhz != self.clocks.top_mhz:
            self._set(self.clocks.top_mhz, now_s)

    def _set(self, mhz: int, now_s: float) -> None:
        self.clocks.mhz = mhz
        self.clocks.since_s = now_s
        if not self._closed:  # by whoever stopped a loop that had hung
            self.device.set_clock(mhz)
