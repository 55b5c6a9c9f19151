"""What EcoFreq is compared with: one locked clock, and control by windows of seconds."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from jaxsys.clocks import GpuClocks
from jaxsys.errors import UsageError
from jaxsys.serve.energy.ecofreq import GovernorRecord, Predictor, load_of
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.slo import SharedSlo

if TYPE_CHECKING:
    from jaxsys.serve.requests import Request
    from jaxsys.serve.scheduler import Iteration


class FixedClock:
    """Locks one clock, busy or idle: the static baselines."""

    def __init__(self, clocks: GpuClocks, clock_mhz: int) -> None:
        self.clocks = clocks
        self.clock_mhz = clock_mhz
        self.record = GovernorRecord()
        clocks.set_clock(clock_mhz)

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        return

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        self.record.busy_s += latency_s
        self.record.seconds_at_mhz[self.clock_mhz] += latency_s


class WindowControl:
    """Chooses a clock every `window_s` for the mean load of the window before.

    As window-based controllers do (DynamoLLM's clock loop, 5 s): the lowest clock at which the
    mean iteration would have met the SLO. What arrives within a window it cannot see.
    """

    def __init__(
        self,
        clocks: GpuClocks,
        predictor: Predictor,
        slo: SharedSlo,
        *,
        clocks_mhz: Sequence[int],
        window_s: float = 5.0,
    ) -> None:
        if window_s <= 0:
            raise UsageError(f"window_s={window_s} must be positive")
        self.clocks = clocks
        self.predictor = predictor
        self.slo = slo
        self.window_s = window_s
        self.record = GovernorRecord()
        self._clocks_mhz = tuple(sorted(clocks_mhz))
        self.clock_mhz = self._clocks_mhz[-1]
        self._window_began_s: float | None = None
        self._seen: list[tuple[Load, float]] = []
        clocks.set_clock(self.clock_mhz)

    def before_iteration(
        self, iteration: "Iteration", waiting: "Collection[Request]", now_s: float
    ) -> None:
        if self._window_began_s is None:
            self._window_began_s = now_s
        waited_s = max(
            (now_s - piece.request.timing.arrival_s for piece in iteration.prefills), default=0.0
        )
        self._seen.append((load_of(iteration), waited_s))
        if now_s - self._window_began_s >= self.window_s:
            self._decide()
            self._window_began_s = now_s
            self._seen.clear()

    def after_iteration(self, iteration: "Iteration", latency_s: float, now_s: float) -> None:
        self.record.busy_s += latency_s
        self.record.seconds_at_mhz[self.clock_mhz] += latency_s

    def _decide(self) -> None:
        slo, count = self.slo.current, len(self._seen)
        self.record.decisions += 1
        loads = [load for load, _ in self._seen]
        mean = Load(
            prefill_tokens=sum(load.prefill_tokens for load in loads) // count,
            prefill_requests=-(-sum(load.prefill_requests for load in loads) // count),
            cached_tokens=sum(load.cached_tokens for load in loads) // count,
            batch=sum(load.batch for load in loads) // count,
            kv_tokens=sum(load.kv_tokens for load in loads) // count,
        )
        budget_s = float("inf")
        if mean.batch:
            budget_s = slo.planned_itl_s
        if mean.prefill_tokens:
            waited_s = sum(waited for _, waited in self._seen) / count
            budget_s = min(budget_s, slo.planned_ttft_s - waited_s)
        times, _ = self.predictor.what_if([mean], self._clocks_mhz)
        chosen = self._clocks_mhz[-1]
        for mhz, time_s in zip(self._clocks_mhz, times[0], strict=True):
            if time_s <= budget_s:
                chosen = mhz
                break
        else:
            self.record.infeasible += 1
        if chosen != self.clock_mhz:
            self.clock_mhz = chosen
            self.clocks.set_clock(chosen)
