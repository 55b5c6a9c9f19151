"""Control by windows of seconds, as DynamoLLM's clock loop does it (5 s)."""

from jaxsys.errors import UsageError
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.policy import ClockPolicy, Clocks, Queue
from jaxsys.serve.energy.predictors import Predictor
from jaxsys.serve.energy.slo import SharedSlo


class WindowControl(ClockPolicy):
    """Chooses a clock every `window_s` for the mean load of the window before.

    The lowest clock at which the mean iteration would have met the SLO. What arrives within a
    window it cannot see.
    """

    def __init__(self, predictor: Predictor, slo: SharedSlo, *, window_s: float = 5.0) -> None:
        super().__init__()
        if window_s <= 0:
            raise UsageError(f"window_s={window_s} must be positive")
        self.predictor = predictor
        self.slo = slo
        self.window_s = window_s
        self._window_began_s: float | None = None
        self._seen: list[tuple[Load, float]] = []

    def choose(self, load: Load, queue: Queue, clocks: Clocks) -> int:
        now_s = clocks.now_s
        if self._window_began_s is None:
            self._window_began_s = now_s
        waited_s = max(
            (now_s - piece.request.timing.arrival_s for piece in queue.pieces), default=0.0
        )
        self._seen.append((load, waited_s))
        if now_s - self._window_began_s < self.window_s:
            return clocks.mhz
        self._window_began_s = now_s
        chosen = self._for_the_window(clocks)
        self._seen.clear()
        return chosen

    def close(self) -> None:
        self.predictor.close()

    def _for_the_window(self, clocks: Clocks) -> int:
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
        times, _ = self.predictor.what_if([mean], clocks.choices_mhz)
        for mhz, time_s in zip(clocks.choices_mhz, times[0], strict=True):
            if time_s <= budget_s:
                return mhz
        self.record.infeasible += 1
        return clocks.top_mhz
