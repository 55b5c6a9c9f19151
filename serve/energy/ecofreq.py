"""EcoFreq: before each iteration, the clock of least cost that keeps the SLO.

For every clock f from the sweet spot up, one batched what-if gives time T(f) and power P(f) of the
iteration about to run and of the queue behind it. Where the iteration decodes, a clock is feasible
if T(f) keeps the ITL, for the batch as it is and for the one it is growing into, and however much
longer steps took of late than predicted, all but a thousandth of them. Of the feasible
ones the cheapest is taken: energy T(f) * P(f), and prompts whose first token would come too late at
what they are worth (`jaxsys.serve.energy.eco_prompts`); where none is feasible, the highest.
Raising is immediate; lowering waits for a minimum dwell and must clear the bound by a margin
(hysteresis). After an iteration that overran its prediction the clock stays at the maximum for some
more, and an idle instance falls to its lowest clock.

The idea is VoltanaLLM's (arXiv 2509.04827); queue-wide deadlines and the watchdog follow DualScale
(arXiv 2602.18755).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.serve.energy.eco_prompts import ToCome, batches_at_hand, prompt_costs_j
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.policy import ClockPolicy, Clocks, Queue, Ran
from jaxsys.serve.energy.predictors import Answers, Predictor
from jaxsys.serve.energy.slo import SharedSlo

SLOWNESS_STEP = 0.01
"""By how much one decode step that takes longer than expected raises what is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoFreqConfig:
    """How eagerly the clock follows the load."""

    hysteresis: float = 0.01
    """A lower clock must clear the planned bound by this share."""
    minimum_dwell_s: float = 0.02
    """Time at a clock before it may be lowered; raising never waits."""
    idle_after_s: float = 0.5
    """Quiet time after which the clock falls to `idle_mhz`."""
    idle_mhz: int | None = None
    """Clock while idle; None for the lowest of the governed clocks."""
    watchdog_s: float = 0.005
    """Overrun beyond the prediction at which the clock goes to the maximum ..."""
    watchdog_share: float = 0.1
    """... and this share of the prediction on top, so that its usual error is no alarm."""
    watchdog_hold: int = 4
    """Iterations that stay at the maximum after an overrun."""
    growth_guard: float = 0.1
    """A decode clock must keep the ITL for a batch larger by this share too, and ..."""
    growth_s: float = 8.0
    """... by what it grew over about this time. 0 to look at no growth."""
    saturation_s: float = 20.0
    """Where even the highest clock could not keep the ITL for what the batch grows to in about this
    time, that clock is taken at once: a slower one would only bring the day nearer. 0 for never."""
    saturation_guard: float = 0.1
    """Share by which that batch is taken to be larger still."""
    late_steps: float = 0.001
    """Share of decode steps that may exceed the ITL because they take longer than predicted: where
    the SLO's reserve is too little for that, more of the ITL is left. 0 for the reserve alone."""
    worth: float = 18.0
    """Worth of a first token in time, in energies that its prompt takes at the lowest clock."""
    broken_worth: float = 2.4
    """What remains of `worth` where a large share of the prompts is late at every clock."""
    prefill_budget: int = 8192
    """Prompt tokens an iteration computes: how the queue will be cut."""
    queue_chunks: int = 8
    """Pieces of the queue looked at; the rest counts as one more."""

    def __post_init__(self) -> None:
        if not 0 <= self.hysteresis < 1:
            raise UsageError(f"hysteresis={self.hysteresis} must be from 0 to below 1")
        for name in (
            "minimum_dwell_s",
            "idle_after_s",
            "watchdog_s",
            "watchdog_share",
            "watchdog_hold",
            "growth_guard",
            "growth_s",
            "saturation_s",
            "saturation_guard",
            "late_steps",
            "worth",
            "broken_worth",
        ):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("prefill_budget", "queue_chunks"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")


def _grown(load: Load, factor: float) -> Load:
    """The same iteration with a larger decode batch."""
    return Load(
        load.prefill_tokens,
        load.prefill_requests,
        load.cached_tokens,
        int(load.batch * factor) + 1,
        int(load.kv_tokens * factor),
        drafted=int(load.drafted * factor),
        gain=load.gain,
    )


def _rows(answers: Answers) -> Sequence[Sequence[float]]:
    return answers.tolist() if isinstance(answers, np.ndarray) else answers


class Expected(NamedTuple):
    """Prompts that have not arrived yet."""

    plan: tuple[float, float]
    """How many come in a second, and for how long that is looked at."""
    one: Load
    several: Load


def _to_come(
    expected: Expected, times_s: Sequence[Sequence[float]], powers_w: Sequence[Sequence[float]]
) -> ToCome:
    more = expected.several.prefill_requests - 1
    return ToCome(
        *expected.plan,
        one_s=times_s[0],
        more_s=[max(0.0, (b - a) / more) for a, b in zip(times_s[0], times_s[1], strict=True)],
        power_w=powers_w[1],
    )


class EcoFreq(ClockPolicy):
    """The policy of one instance."""

    def __init__(
        self, predictor: Predictor, slo: SharedSlo, *, config: EcoFreqConfig | None = None
    ) -> None:
        super().__init__()
        self.predictor = predictor
        self.slo = slo
        self.config = config = config or EcoFreqConfig()
        self.idle_after_s = config.idle_after_s
        self.idle_mhz = config.idle_mhz
        self._choices_mhz: tuple[int, ...] = ()
        self._clock_squares: list[float] = []
        self._hold = 0
        self._usual_batches = [0.0, 0.0]
        """The batch's exponential means over `growth_s` and `saturation_s`."""
        self._batch_seen_s = float("-inf")
        self._slowness = 1.0
        """Real over predicted time that all but `late_steps` of the decode steps stay within."""

    def choose(self, load: Load, queue: Queue, clocks: Clocks) -> int:
        slo, config, now_s = self.slo.current, self.config, clocks.now_s
        prompt_s = self.slo.planned_prompt_s
        if clocks.choices_mhz != self._choices_mhz:
            self._choices_mhz = clocks.choices_mhz
            self._clock_squares = [float(mhz) ** 2 for mhz in clocks.choices_mhz]
        top = len(self._choices_mhz) - 1
        present = self._choices_mhz.index(clocks.mhz)
        self.record.decisions += 1
        loads, deadlines_s = batches_at_hand(
            load,
            queue,
            left_s=prompt_s - now_s,
            budget=config.prefill_budget,
            most=config.queue_chunks,
        )
        batches = len(loads)
        expected = self.expected(now_s) if load.prefill_tokens else None
        if expected is not None:
            loads += expected[1:]
        if load.batch:
            guards = (config.growth_guard, config.saturation_guard)
            for guard, growth in zip(guards, self._growths(load.batch, now_s), strict=True):
                loads.append(_grown(load, 1 + guard + growth))
        times_s, powers_w = map(_rows, self.predictor.what_if(loads, self._choices_mhz))
        # Lowering must clear the bounds by more, so that the clock does not flutter.
        slack = 1 - config.hysteresis
        clearance = [slack if level < present else 1.0 for level in range(top + 1)]
        costs_j, lost = prompt_costs_j(
            times_s[:batches],
            # Where no power was ever read, the lowest feasible clock stands for the thriftiest:
            # above the sweet spot energy rises with the clock.
            [self._clock_squares if math.isnan(row[0]) else row for row in powers_w[:batches]],
            deadlines_s,
            bound_s=prompt_s,
            clearance=clearance,
            worth=config.worth,
            broken_worth=config.broken_worth,
            to_come=None
            if expected is None
            else _to_come(expected, times_s[batches:], powers_w[batches:]),
        )
        # The bound is on the time a token; where tokens are guessed, a step yields several.
        itl_s = slo.itl_s * load.gain
        planned_itl_s = min(slo.planned_itl_s * load.gain, itl_s / self._slowness)
        levels, itl_kept = list(range(top + 1)), True
        if load.batch:
            saturated = self.saturated(load, times_s[-1][-1] > itl_s, clocks)
            levels = [
                level
                for level in levels
                if times_s[0][level] <= planned_itl_s * clearance[level]
                and times_s[-2][level] <= itl_s
                and (level == top or not saturated)
            ]
            itl_kept = times_s[0][-1] <= planned_itl_s
        best = min(levels, key=costs_j.__getitem__, default=top)
        if lost or not itl_kept:
            self.record.infeasible += 1
        if self._hold > 0:
            best = top
        elif best < present and now_s - clocks.since_s < config.minimum_dwell_s:
            best = present
        self.predicted_s = times_s[0][best]
        return self._choices_mhz[best]

    def learn(self, ran: Ran) -> None:
        if ran.clock_mhz is not None:
            # The predictor must learn what the clock that ran costs, not the one wished for.
            self.predictor.observe(ran.load, ran.clock_mhz, ran.latency_s / ran.steps, ran.power_w)
        late_steps = self.config.late_steps
        if ran.load.batch and late_steps and ran.predicted_s is not None:
            # A quantile by stochastic approximation (Robbins and Monro, 1951).
            longer = ran.latency_s > self._slowness * ran.predicted_s * ran.steps
            self._slowness += SLOWNESS_STEP * (longer - late_steps)
            self._slowness = max(1.0, self._slowness)
        if self._hold > 0:
            self._hold -= 1

    def patience_s(self, predicted_s: float) -> float:
        return predicted_s * (1 + self.config.watchdog_share) + self.config.watchdog_s

    def overran(self) -> None:
        self._hold = self.config.watchdog_hold

    def close(self) -> None:
        self.predictor.close()

    def expected(self, now_s: float) -> Expected | None:
        """The prompts that are looked out for though they are not there yet: none here."""
        return None

    def saturated(self, load: Load, outgrown: bool, clocks: Clocks) -> bool:
        """Whether the highest clock is taken at once, for what the batch leads to.

        Args:
            outgrown: whether that clock could not keep the ITL for what the batch grows to, at the
                pace of late, in `saturation_s`.
        """
        return outgrown and self.config.saturation_s > 0

    def _growths(self, batch: int, now_s: float) -> list[float]:
        """Shares by which the batch lies above its exponential means: what it grew by in their
        times, where it grows steadily."""
        since_s = now_s - self._batch_seen_s
        self._batch_seen_s = now_s
        growths = []
        for place, memory_s in enumerate((self.config.growth_s, self.config.saturation_s)):
            kept = math.exp(-since_s / memory_s) if memory_s else 0.0
            self._usual_batches[place] = batch + (self._usual_batches[place] - batch) * kept
            growths.append(max(0.0, batch - self._usual_batches[place]) / batch)
        return growths
