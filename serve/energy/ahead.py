"""Ahead: EcoFreq that plans for the load to come, not only for what is at hand.

Decode. A slower step keeps every sequence longer, so the batch grows until as many end as come:
what must keep the ITL is the batch that today's offered load leads to. So a clock must keep it for
a batch larger by `growth_guard` (arrivals fluctuate by about that much within the time a request
stays). And where about as many tokens a second are asked for as the highest clock can write within
the ITL (`serve.energy.offered`), that one is taken long before the batch is there: what a slower
one leaves undone would never be caught up with.

Prompts. EcoFreq weighs the backlog at each clock; a slower clock leaves those who come after to a
longer backlog, which it does not see. Here the backlog is played on: with prompts arriving at the
rate and of the length of late, and some more where they come in bursts, each clock's queue is
followed over `horizon_s`, and its late first tokens are counted with the energy of all that work (a
receding horizon: only the first clock is used, and all is planned anew at the next iteration).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from jaxsys.errors import UsageError
from jaxsys.serve.energy.ecofreq import EcoFreq, EcoFreqConfig, Expected
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.offered import EVERY_S, Offered
from jaxsys.serve.energy.policy import Clocks, Queue
from jaxsys.serve.energy.predictors import Predictor
from jaxsys.serve.energy.slo import SharedSlo

RATE_MEMORY_S = 10.0
"""Of the exponential means of what arrives."""

LADDER = (1, *(round(16 * 1.06**step) for step in range(80)))
"""Batches among which the largest within the ITL is looked for: up to 1600."""

RELEASE_SHARE = 0.93
"""Of `full_share`, what must be asked for so that the highest clock is kept."""

SEVERAL = 8
"""Prompts of the batch from which is told what one more of them takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AheadConfig(EcoFreqConfig):
    """EcoFreq's settings, and how far is looked."""

    growth_guard: float = 0.1
    growth_s: float = 0.0
    saturation_s: float = 0.0
    worth: float = 40.0
    broken_worth: float = 40.0
    full_share: float = 0.94
    """Of the tokens that the highest clock could write within the ITL, the share from which that
    clock is taken, infinite for never, ..."""
    fill_share: float = 0.4
    """... once the batch is that share of the largest within the ITL: below there is time."""
    horizon_s: float = 2.0
    """Time over which arrivals to come are played on; 0 for none."""
    deviations: float = 0.5
    """By how many deviations more come in that time than on the mean."""

    def __post_init__(self) -> None:
        # A dataclass with slots is another class than the one `super` would close over.
        EcoFreqConfig.__post_init__(self)
        for name in ("horizon_s", "fill_share", "deviations"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)} must not be negative")
        if not self.full_share > 0:
            raise UsageError(f"full_share={self.full_share} must be above 0")


@dataclass(slots=True)
class Arrivals:
    """Prompts that came of late: how many a second, and how long they are."""

    per_s: float = 0.0
    tokens: float = 0.0
    """Mean of a prompt."""
    _gap_s: float = 0.0
    _gap_square: float = 0.0
    """Means of the time between two of them, and of its square."""
    _gaps: int = 0
    _latest_s: float = field(default=-math.inf)

    MEMORY_S: ClassVar[float] = RATE_MEMORY_S

    def see(self, arrived_s: float, tokens: int) -> None:
        """Takes in one, in order of arrival; who was seen before is passed over."""
        if arrived_s <= self._latest_s:
            return
        gap_s = arrived_s - self._latest_s
        self._latest_s = arrived_s
        if math.isinf(gap_s):  # the first
            self.tokens = float(tokens)
            return
        step = max(0.02, 1 / (1 + self._gaps))
        self._gaps += 1
        self._gap_s += step * (gap_s - self._gap_s)
        self._gap_square += step * (gap_s**2 - self._gap_square)
        kept = math.exp(-gap_s / self.MEMORY_S)
        self.per_s = self.per_s * kept + 1 / self.MEMORY_S
        self.tokens += (tokens - self.tokens) * min(0.1, 1 - kept + 0.02)

    @property
    def variation(self) -> float:
        """Coefficient of variation of the gaps: 1 as Poisson's, more where they come in bursts."""
        if self._gap_s <= 0:
            return 1.0
        return math.sqrt(max(0.0, self._gap_square / self._gap_s**2 - 1.0))

    def rate_per_s(self, now_s: float) -> float:
        """What is expected now: the mean falls while nobody comes."""
        if math.isinf(self._latest_s):
            return 0.0
        return self.per_s * math.exp(-max(0.0, now_s - self._latest_s) / self.MEMORY_S)


class Ahead(EcoFreq):
    """The policy of one instance."""

    config: AheadConfig

    def __init__(
        self, predictor: Predictor, slo: SharedSlo, *, config: AheadConfig | None = None
    ) -> None:
        super().__init__(predictor, slo, config=config or AheadConfig())
        self.arrivals = Arrivals()
        self.offered = Offered()
        self.pressure = 0.0
        """Tokens that are asked for, of those that the highest clock could write within the ITL."""
        self._full = False
        self._most = (0, 0.0)
        self._bounded_s = -math.inf

    def choose(self, load: Load, queue: Queue, clocks: Clocks) -> int:
        self.offered.see(queue.decodes, clocks.now_s)
        for piece in queue.pieces:
            if piece.start == 0:
                self.arrivals.see(piece.request.timing.arrival_s, piece.request.prompt_length)
        for request in queue.waiting:
            self.arrivals.see(request.timing.arrival_s, request.prompt_length)
        return super().choose(load, queue, clocks)

    def saturated(self, load: Load, outgrown: bool, clocks: Clocks) -> bool:
        """Whether more is asked for than the highest clock could write within the ITL."""
        config = self.config
        if super().saturated(load, outgrown, clocks):
            return True
        found = self.offered.estimate(clocks.now_s)
        if found is None:
            return False
        offered_per_s, context = found
        if clocks.now_s - self._bounded_s >= EVERY_S:
            self._bounded_s = clocks.now_s
            self._most = self._within_itl(load, context, clocks)
        batch, per_s = self._most
        self.pressure = offered_per_s / per_s if per_s else math.inf
        # Who comes fluctuates: what was full is so until there is clearly less.
        self._full = self.pressure > config.full_share * (RELEASE_SHARE if self._full else 1.0)
        return self._full and load.batch > config.fill_share * batch

    def _within_itl(self, load: Load, context: float, clocks: Clocks) -> tuple[int, float]:
        """The largest batch that the highest clock keeps the ITL for, and what it writes a
        second."""
        itl_s = self.slo.current.itl_s * load.gain
        loads = [
            Load(batch=batch, kv_tokens=round(batch * context), gain=load.gain) for batch in LADDER
        ]
        tokens = max(1, round(self.arrivals.tokens))
        prompts = Load(prefill_tokens=SEVERAL * tokens, prefill_requests=SEVERAL)
        times_s, _ = self.predictor.what_if([*loads, prompts], (clocks.top_mhz,))
        most, per_s = 0, 0.0
        for one, row in zip(loads, times_s, strict=False):
            time_s = float(row[0])
            if time_s <= itl_s:
                most, per_s = one.batch, max(per_s, one.batch * load.gain / time_s)
        # Where the instance reads prompts too, that time is lost to writing.
        reading = self.arrivals.rate_per_s(clocks.now_s) * float(times_s[-1][0]) / SEVERAL
        per_s *= max(0.0, 1.0 - reading)
        return most, per_s

    def expected(self, now_s: float) -> Expected | None:
        per_s = self.arrivals.rate_per_s(now_s)
        horizon_s = self.config.horizon_s
        if per_s * horizon_s < 1:
            return None
        # So many come in that time, with a deviation that grows with the burstiness.
        deviation = self.arrivals.variation / math.sqrt(per_s * horizon_s)
        per_s *= 1 + self.config.deviations * deviation
        tokens = max(1, round(self.arrivals.tokens))
        return Expected(
            (per_s, horizon_s),
            Load(prefill_tokens=tokens, prefill_requests=1),
            Load(prefill_tokens=SEVERAL * tokens, prefill_requests=SEVERAL),
        )
