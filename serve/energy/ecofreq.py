"""EcoFreq: before each iteration, the clock of least cost that keeps the SLO.

For every clock f from the sweet spot up, one batched what-if gives time T(f) and power P(f) of the
iteration about to run and of the queue behind it. Where the iteration decodes, a clock is feasible
if T(f) keeps the ITL, for the batch as it is and for the one it is growing into, and however much
longer steps took of late than predicted, all but a thousandth of them. Of the feasible
ones the cheapest is taken: energy T(f) * P(f), and prompts whose first token would come too late at
what they are worth (`jaxsys.serve.energy.eco_prompts`); where none is feasible, the highest.
Raising is immediate; lowering waits for a minimum dwell and must clear the bound by a margin
(hysteresis). An iteration that overruns its prediction sends the clock to the maximum (watchdog),
and an idle instance falls to its lowest clock.

The idea is VoltanaLLM's (arXiv 2509.04827); queue-wide deadlines and the watchdog follow DualScale
(arXiv 2602.18755). What it never does: wait for the clock to change. Setting runs beside the
critical path, and the clock that really ran is compared with the asked one afterwards.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from jaxsys.clocks import GpuClocks, SimulatedClocks
from jaxsys.errors import UsageError
from jaxsys.serve.energy.eco_prompts import batches_at_hand, prompt_costs_j
from jaxsys.serve.energy.gpu_model import Load, SimulatedGpu, run_many, simulated_gpu
from jaxsys.serve.energy.slo import SharedSlo, Slo

if TYPE_CHECKING:
    from jaxsys.serve.requests import Request
    from jaxsys.serve.scheduler import Iteration


SLOWNESS_STEP = 0.01
"""By how much one decode step that takes longer than expected raises what is expected."""

Answers = Sequence[Sequence[float]] | np.ndarray
"""Numbers indexed [load][clock]."""


class Predictor(Protocol):
    """Answers what-ifs: how long, and at what power."""

    def what_if(self, loads: Sequence[Load], clocks_mhz: Sequence[int]) -> tuple[Answers, Answers]:
        """Seconds and watts, each indexed [load][clock], from one batched evaluation."""
        ...

    def observe(self, load: Load, clock_mhz: float, time_s: float, power_w: float | None) -> None:
        """Learns from what really happened."""
        ...


class ModelPredictor:
    """A predictor that asks a `SimulatedGpu`: exact in simulation, and free of training.

    `scale` multiplies its times, for studies of prediction error.
    """

    def __init__(self, gpu: SimulatedGpu, *, scale: float = 1.0) -> None:
        self.gpu = gpu
        self.scale = scale

    def what_if(
        self, loads: Sequence[Load], clocks_mhz: Sequence[int]
    ) -> tuple[list[list[float]], list[list[float]]]:
        if len(loads) * len(clocks_mhz) > 12:  # where arrays begin to pay
            time_s, power_w = run_many(self.gpu, loads, clocks_mhz)
            return (time_s * self.scale).tolist(), power_w.tolist()
        times: list[list[float]] = []
        powers: list[list[float]] = []
        for load in loads:
            outcomes = [self.gpu.run(load, mhz) for mhz in clocks_mhz]
            times.append([outcome.time_s * self.scale for outcome in outcomes])
            powers.append([outcome.power_w for outcome in outcomes])
        return times, powers

    def observe(self, load: Load, clock_mhz: float, time_s: float, power_w: float | None) -> None:
        return


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
            "late_steps",
            "worth",
            "broken_worth",
        ):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("prefill_budget", "queue_chunks"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(slots=True)
class GovernorRecord:
    """What a governor did, for gauges and reports."""

    decisions: int = 0
    infeasible: int = 0
    """Decisions in which no clock met the SLO for all at hand."""
    overruns: int = 0
    clamped: int = 0
    """Iterations whose real clock lay below the asked one though it had time to change."""
    busy_s: float = 0.0
    idle_s: float = 0.0
    seconds_at_mhz: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))


def _grown(load: Load, factor: float) -> Load:
    """The same iteration with a larger decode batch."""
    return Load(
        load.prefill_tokens,
        load.prefill_requests,
        load.cached_tokens,
        int(load.batch * factor) + 1,
        int(load.kv_tokens * factor),
    )


def _rows(answers: Answers) -> Sequence[Sequence[float]]:
    return answers.tolist() if isinstance(answers, np.ndarray) else answers


def load_of(iteration: "Iteration") -> Load:
    """The iteration's size as the cost models see it."""
    return Load(
        prefill_tokens=iteration.prefill_tokens,
        prefill_requests=len(iteration.prefills),
        cached_tokens=sum(piece.start for piece in iteration.prefills),
        batch=len(iteration.decodes),
        kv_tokens=iteration.kv_tokens,
    )


class EcoFreq:
    """A clock governor for one instance. Call it from the instance's loop alone."""

    def __init__(
        self,
        clocks: GpuClocks,
        predictor: Predictor,
        slo: SharedSlo,
        *,
        clocks_mhz: Sequence[int],
        config: EcoFreqConfig | None = None,
    ) -> None:
        """
        Args:
            clocks_mhz: the clocks to choose among; the lowest is the floor, which should be the
                U-curve's sweet spot.

        Raises:
            UsageError: if a clock is not one of the GPU's.
        """
        if not clocks_mhz:
            raise UsageError("clocks_mhz is empty; give at least the maximum clock")
        listed = clocks.available_mhz
        unlisted = [mhz for mhz in clocks_mhz if listed and mhz not in listed]
        if unlisted:
            raise UsageError(
                f"clocks_mhz={unlisted} are not clocks of {clocks.name}; "
                f"it lists {listed[0]}..{listed[-1]} MHz"
            )
        self.clocks = clocks
        self.predictor = predictor
        self.slo = slo
        self.config = config or EcoFreqConfig()
        self.record = GovernorRecord()
        self.predicted_s = 0.0
        """Predicted time of the iteration last planned."""
        self._clocks_mhz = tuple(sorted(clocks_mhz))
        self._clock_squares = [float(mhz) ** 2 for mhz in self._clocks_mhz]
        self._top = len(self._clocks_mhz) - 1
        self._level = self._top
        self._level_since_s = float("-inf")
        self._hold = 0
        self._idle = False
        self._load = Load()
        self._usual_batches = [0.0, 0.0]
        """The batch's exponential means over `growth_s` and `saturation_s`."""
        self._batch_seen_s = float("-inf")
        self._slowness = 1.0
        """Real over predicted time that all but `late_steps` of the decode steps stay within."""
        self._predicted_s: dict[int, float] = {}
        self._set(self._top, float("-inf"))

    @property
    def clock_mhz(self) -> int:
        """The clock last asked for."""
        if self._idle:
            return self._idle_mhz
        return self._clocks_mhz[self._level]

    @property
    def top_mhz(self) -> int:
        """The highest clock it may ask for."""
        return self._clocks_mhz[self._top]

    @property
    def _idle_mhz(self) -> int:
        idle = self.config.idle_mhz
        return self._clocks_mhz[0] if idle is None else idle

    # --- the Governor protocol ----------------------------------------------------------------

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        """Chooses and asks for the clock of the iteration about to run."""
        self._load = load_of(iteration)
        level = self._choose(iteration, waiting, now_s)
        # A server plans the next iteration while this one runs, so more than one may be open.
        self._predicted_s[iteration.index] = self.predicted_s
        was_idle, self._idle = self._idle, False
        if level != self._level or was_idle:
            self._set(level, now_s)

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        """Learns from the iteration, and boosts where it overran its prediction."""
        record, config = self.record, self.config
        steps = max(1, iteration.steps)
        actual_mhz = self.clocks.actual_mhz()
        asked_mhz = self._clocks_mhz[self._level]
        record.busy_s += latency_s
        predicted_s = self._predicted_s.pop(iteration.index, self.predicted_s)
        if actual_mhz is not None:
            record.seconds_at_mhz[int(actual_mhz)] += latency_s
            if actual_mhz < asked_mhz and self.clocks.throttle_reasons():
                record.clamped += 1
            # The predictor must learn what the clock that ran costs, not the one wished for.
            self.predictor.observe(
                load_of(iteration), actual_mhz, latency_s / steps, self.clocks.power_w()
            )
        if iteration.decodes and config.late_steps:
            # A quantile by stochastic approximation (Robbins and Monro, 1951).
            longer = latency_s > self._slowness * predicted_s * steps
            self._slowness += SLOWNESS_STEP * (longer - config.late_steps)
            self._slowness = max(1.0, self._slowness)
        if self._hold > 0:
            self._hold -= 1
        if latency_s > self._patience_s(predicted_s * steps):
            self.on_overrun(now_s)

    def patience_s(self, steps: int) -> float:
        """How long the iteration just planned may take before the watchdog boosts."""
        return self._patience_s(self.predicted_s * steps)

    def _patience_s(self, predicted_s: float) -> float:
        return predicted_s * (1 + self.config.watchdog_share) + self.config.watchdog_s

    def on_overrun(self, now_s: float) -> None:
        """The iteration in flight is late: to the maximum clock, for some iterations."""
        self.record.overruns += 1
        self._hold = self.config.watchdog_hold
        if self._level != self._top:
            self._set(self._top, now_s)

    def on_idle(self, now_s: float, idle_since_s: float) -> None:
        """Nothing to compute: after a quiet time the clock falls to the idle clock."""
        if not self._idle and now_s - idle_since_s >= self.config.idle_after_s:
            self._idle = True
            self.clocks.set_clock(self._idle_mhz)

    # --- inside -------------------------------------------------------------------------------

    def _choose(self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float) -> int:
        slo, config = self.slo.current, self.config
        self.record.decisions += 1
        loads, deadlines_s = batches_at_hand(
            self._load,
            iteration,
            waiting,
            left_s=slo.planned_ttft_s - now_s,
            budget=config.prefill_budget,
            most=config.queue_chunks,
        )
        batches = len(loads)
        if iteration.decodes:
            for growth in self._growths(now_s):
                loads.append(_grown(self._load, 1 + config.growth_guard + growth))
        times_s, powers_w = map(_rows, self.predictor.what_if(loads, self._clocks_mhz))
        # Lowering must clear the bounds by more, so that the clock does not flutter.
        slack = 1 - config.hysteresis
        clearance = [slack if level < self._level else 1.0 for level in range(self._top + 1)]
        costs_j, lost = prompt_costs_j(
            times_s[:batches],
            # Where no power was ever read, the lowest feasible clock stands for the thriftiest:
            # above the sweet spot energy rises with the clock.
            [self._clock_squares if math.isnan(row[0]) else row for row in powers_w[:batches]],
            deadlines_s,
            bound_s=slo.planned_ttft_s,
            clearance=clearance,
            worth=config.worth,
            broken_worth=config.broken_worth,
        )
        planned_itl_s = min(slo.planned_itl_s, slo.itl_s / self._slowness)
        levels, itl_kept = list(range(self._top + 1)), True
        if iteration.decodes:
            saturated = config.saturation_s and times_s[-1][-1] > slo.itl_s
            levels = [
                level
                for level in levels
                if times_s[0][level] <= planned_itl_s * clearance[level]
                and times_s[-2][level] <= slo.itl_s
                and (level == self._top or not saturated)
            ]
            itl_kept = times_s[0][-1] <= planned_itl_s
        best = min(levels, key=costs_j.__getitem__, default=self._top)
        if lost or not itl_kept:
            self.record.infeasible += 1
        if self._hold > 0:
            best = self._top
        elif best < self._level and now_s - self._level_since_s < config.minimum_dwell_s:
            best = self._level
        self.predicted_s = times_s[0][best]
        return best

    def _growths(self, now_s: float) -> list[float]:
        """Shares by which the batch lies above its exponential means: what it grew by in their
        times, where it grows steadily."""
        batch, since_s = self._load.batch, now_s - self._batch_seen_s
        self._batch_seen_s = now_s
        growths = []
        for place, memory_s in enumerate((self.config.growth_s, self.config.saturation_s)):
            kept = math.exp(-since_s / memory_s) if memory_s else 0.0
            self._usual_batches[place] = batch + (self._usual_batches[place] - batch) * kept
            growths.append(max(0.0, batch - self._usual_batches[place]) / batch)
        return growths

    def _set(self, level: int, now_s: float) -> None:
        self._level = level
        self._level_since_s = now_s
        self.clocks.set_clock(self._clocks_mhz[level])


class SimulatedGovernor:
    """EcoFreq on a simulated GPU, for servers without one that can be governed.

    Each real iteration's batch and tokens are turned into the energy that the modelled GPU would
    have spent on them at the governed clock, and at its maximum clock for comparison. Gaps between
    iterations count as idle at the modelled idle power. The figures are modelled, not measured.
    """

    method = "modelled: simulated GPU at the governed clock, idle between iterations included"

    def __init__(
        self,
        gpu: SimulatedGpu,
        slo: SharedSlo,
        *,
        predictor: Predictor | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            predictor: of the modelled GPU; exact where None.
        """
        spec = gpu.spec
        self.gpu = gpu
        self.clocks = SimulatedClocks(
            available_mhz=spec.available_mhz, now_s=now_s, name=f"simulated {spec.name}"
        )
        self.inner = EcoFreq(
            self.clocks,
            predictor or ModelPredictor(gpu),
            slo,
            clocks_mhz=spec.control_mhz,
            # A real iteration's latency on another machine says nothing about the modelled GPU.
            config=EcoFreqConfig(watchdog_s=float("inf")),
        )
        self.slo = slo
        self.energy_at_max_j = 0.0
        """What the same iterations and gaps would have cost at the maximum clock."""
        self._now_s = now_s
        self._ended_s: float | None = None
        self._settled_s = 0.0

    @property
    def record(self) -> GovernorRecord:
        return self.inner.record

    @property
    def clock_mhz(self) -> int:
        return self.inner.clock_mhz

    def energy_j(self) -> float:
        """Modelled energy so far, the idle time up to now included."""
        self.settle(self._now_s())
        return self.clocks.energy_j()

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        self.settle(now_s)
        self.inner.before_iteration(iteration, waiting, now_s)

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        load = load_of(iteration)
        steps = max(1, iteration.steps)
        outcome = self.gpu.run(load, self.clocks.actual_mhz())
        energy_j = outcome.energy_j * steps
        self.clocks.spend(
            outcome.time_s * steps, outcome.power_w, power_capped=outcome.power_capped
        )
        self.energy_at_max_j += self.gpu.run(load, self.gpu.spec.max_mhz).energy_j * steps
        share_energy(iteration, energy_j)
        self.inner.after_iteration(iteration, outcome.time_s * steps, now_s)
        self._ended_s = self._settled_s = now_s

    def settle(self, now_s: float) -> None:
        """Counts the idle time since the last iteration, and applies the idle rule."""
        if self._ended_s is None or now_s <= self._settled_s:
            return
        falls_at_s = self._ended_s + self.inner.config.idle_after_s
        if self._settled_s < falls_at_s < now_s:
            self._spend_idle(falls_at_s)
        self.inner.on_idle(now_s, self._ended_s)
        self._spend_idle(now_s)

    def _spend_idle(self, until_s: float) -> None:
        gap_s = until_s - self._settled_s
        self.clocks.spend(gap_s, self.gpu.idle_power_w(self.clocks.actual_mhz()))
        self.energy_at_max_j += gap_s * self.gpu.idle_power_w(self.gpu.spec.max_mhz)
        self.record.idle_s += gap_s
        self._settled_s = until_s


def share_energy(iteration: "Iteration", energy_j: float) -> None:
    """Adds to each request its part of an iteration's energy: by tokens computed for it.

    Batching makes any attribution a convention; this one sums to the whole.
    """
    steps = max(1, iteration.steps)
    tokens = iteration.prefill_tokens + len(iteration.decodes) * steps
    if not tokens:
        return
    per_token_j = energy_j / tokens
    for piece in iteration.prefills:
        timing = piece.request.timing
        timing.energy_j = (timing.energy_j or 0.0) + per_token_j * piece.length
    for request in iteration.decodes:
        request.timing.energy_j = (request.timing.energy_j or 0.0) + per_token_j * steps


def simulated_governor(
    gpu: str = "h100",
    model: str = "llama-3-8b",
    slo: SharedSlo | Slo | None = None,
    *,
    now_s: Callable[[], float] = time.monotonic,
) -> SimulatedGovernor:
    """EcoFreq with a simulated GPU's clocks: `jaxsys serve`'s default where no GPU is governed.

    Args:
        gpu: a preset of `jaxsys.serve.energy.gpu_model.GPUS`.
        model: a shape of `jaxsys.serve.energy.gpu_model.SHAPES`.
        slo: shared with the router where given as `SharedSlo`.
        now_s: the instance's clock.
    """
    shared = slo if isinstance(slo, SharedSlo) else SharedSlo(slo)
    return SimulatedGovernor(simulated_gpu(gpu, model), shared, now_s=now_s)
