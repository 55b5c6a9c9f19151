"""The simulated body of an instance: iterations that take modelled time and energy.

The clock may change while an iteration runs (a set takes effect some milliseconds later, a
watchdog boosts), so an iteration is a row of segments, each at one clock; the work left at a change
goes on at the new pace. All time is virtual.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from jaxsys.clocks import SimulatedClocks
from jaxsys.serve.energy.gpu_model import Load, Outcome, SimulatedGpu


@dataclass(slots=True)
class _Segment:
    start_s: float
    end_s: float
    clock_mhz: int
    outcome: Outcome


class SimExecutor:
    """Runs one iteration at a time on a `SimulatedGpu` whose clock is a `SimulatedClocks`."""

    def __init__(
        self, gpu: SimulatedGpu, clocks: SimulatedClocks, *, time_noise: float = 0.0, seed: int = 0
    ) -> None:
        """
        Args:
            time_noise: relative deviation (log-normal) of each step's time from the model's.
        """
        self._noise = time_noise
        self._random = random.Random(seed)
        self._slowness = 1.0
        self.gpu = gpu
        self.clocks = clocks
        self.busy_s = 0.0
        self.busy_j = 0.0
        self.idle_s = 0.0
        self.idle_j = 0.0
        self.seconds_at_mhz: defaultdict[int, float] = defaultdict(float)
        """Busy seconds at each clock set; where the power cap binds, the GPU runs below it."""
        self.capped_s = 0.0
        self.finished_j = 0.0
        """Energy of the iteration that ended last."""
        self._loads: tuple[Load, ...] = ()
        self._segments: list[_Segment] = []
        self._end_s = 0.0
        self._idle_from_s = 0.0
        self._resting_w: float | None = None

    @property
    def began_s(self) -> float:
        """When the iteration in flight began."""
        return self._segments[0].start_s if self._segments else self._end_s

    @property
    def end_s(self) -> float:
        """When the iteration in flight ends, or the last one ended."""
        return self._end_s

    def begin(self, load: Load, steps: int, now_s: float, *, after: tuple[Load, ...] = ()) -> float:
        """Starts `steps` repetitions of `load`; returns when they end.

        Args:
            after: what each repetition computes behind `load`, one after the other.
        """
        self.idle_until(now_s)
        self._loads = (load, *after)
        if self._noise:
            # The mean of `steps` independent deviations.
            self._slowness = math.exp(self._random.gauss(0.0, self._noise / math.sqrt(steps)))
        self._segments = []
        return self._plan(float(steps), now_s)

    def reclock(self, now_s: float) -> float:
        """The clock was asked to change while work is in flight; returns the new end."""
        return self._plan(self._steps_left(now_s), now_s)

    def steps_done(self, now_s: float) -> float:
        """Steps of the iteration in flight that are done at `now_s`, with fractions."""
        return sum(
            (min(now_s, s.end_s) - s.start_s) / s.outcome.time_s
            for s in self._segments
            if s.start_s < now_s
        )

    def cut_after(self, steps: int, now_s: float) -> float:
        """Ends the iteration in flight after `steps` steps, not before `now_s`."""
        left = steps - self.steps_done(now_s)
        return self._plan(max(0.0, left), now_s)

    def finish(self) -> float:
        """The iteration's end has come: books its energy and returns it in joules."""
        energy_j = 0.0
        for segment in self._segments:
            duration_s = segment.end_s - segment.start_s
            outcome = segment.outcome
            self.clocks.spend(duration_s, outcome.power_w, power_capped=outcome.power_capped)
            energy_j += duration_s * outcome.power_w
            self.busy_s += duration_s
            self.seconds_at_mhz[segment.clock_mhz] += duration_s
            if outcome.power_capped:
                self.capped_s += duration_s
        self.busy_j += energy_j
        self.finished_j = energy_j
        self._segments = []
        self._idle_from_s = self._end_s
        return energy_j

    def idle_until(self, now_s: float) -> None:
        """Books idle power at the present clock up to `now_s`."""
        gap_s = now_s - self._idle_from_s
        if gap_s <= 0:
            return
        power_w = self._resting_w
        if power_w is None:
            power_w = self.gpu.idle_power_w(self.clocks.actual_mhz())
        self.clocks.spend(gap_s, power_w)
        self.idle_s += gap_s
        self.idle_j += gap_s * power_w
        self._idle_from_s = now_s

    def rest(self, power_w: float | None, now_s: float) -> None:
        """From now on idle time draws `power_w`, whatever the clock; None: by the clock again."""
        self.idle_until(now_s)
        self._resting_w = power_w

    def _run(self, clock_mhz: float) -> Outcome:
        outcome = self.gpu.run(self._loads[0], clock_mhz)
        if len(self._loads) > 1:
            outcome = _in_turn([outcome, *(self.gpu.run(x, clock_mhz) for x in self._loads[1:])])
        if self._noise:
            return Outcome(
                outcome.time_s * self._slowness,
                outcome.power_w,
                outcome.clock_mhz,
                outcome.power_capped,
            )
        return outcome

    def _steps_left(self, now_s: float) -> float:
        return sum(
            (s.end_s - max(now_s, s.start_s)) / s.outcome.time_s
            for s in self._segments
            if s.end_s > now_s
        )

    def _plan(self, steps: float, now_s: float) -> float:
        """Replaces what lies after `now_s` by `steps` steps at the clocks to come."""
        kept = [s for s in self._segments if s.start_s < now_s]
        if kept:
            kept[-1].end_s = min(kept[-1].end_s, now_s)
        self._segments = kept
        mhz = self.clocks.actual_mhz()
        outcome = self._run(mhz)
        end_s = now_s + steps * outcome.time_s
        change = self.clocks.next_change()
        if change is not None and now_s < change[0] < end_s:
            change_s, next_mhz = change
            kept.append(_Segment(now_s, change_s, mhz, outcome))
            mhz = next_mhz
            steps -= (change_s - now_s) / outcome.time_s
            outcome = self._run(mhz)
            now_s, end_s = change_s, change_s + steps * outcome.time_s
        kept.append(_Segment(now_s, end_s, mhz, outcome))
        self._end_s = end_s
        return end_s


def _in_turn(outcomes: Sequence[Outcome]) -> Outcome:
    """Several pieces of work, one after the other, as one."""
    time_s = sum(outcome.time_s for outcome in outcomes)
    return Outcome(
        time_s,
        sum(outcome.energy_j for outcome in outcomes) / time_s,
        min(outcome.clock_mhz for outcome in outcomes),
        any(outcome.power_capped for outcome in outcomes),
    )
