"""Ahead: EcoFreq that plans for the load to come, not only for what is at hand.

Decode. A slower step keeps every sequence longer, so the batch grows until as many end as come:
what must keep the ITL is the batch that today's offered load leads to. So a clock must keep it for
a batch larger by `growth_guard` (arrivals fluctuate by about that much within the time a request
stays), and where not even the highest clock could for what it grows to within `saturation_s`, that
one is taken at once. The two are apart: a guard added to the growth would hold the highest clock
through every rise from a quiet time, when there is room for all of it.

Prompts. EcoFreq weighs the backlog at each clock; a slower clock leaves those who come after to a
longer backlog, which it does not see. Here the backlog is played on: with prompts arriving at the
rate and of the length of late, each clock's queue is followed over `horizon_s`, and its late first
tokens are counted with the energy of all that work (a receding horizon: only the first clock is
used, and all is planned anew at the next iteration).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from jaxsys.errors import UsageError
from jaxsys.serve.energy.ecofreq import EcoFreq, EcoFreqConfig, Expected
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.policy import Clocks, Queue
from jaxsys.serve.energy.predictors import Predictor
from jaxsys.serve.energy.slo import SharedSlo

RATE_MEMORY_S = 10.0
"""Of the exponential means of what arrives."""

SEVERAL = 8
"""Prompts of the batch from which is told what one more of them takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AheadConfig(EcoFreqConfig):
    """EcoFreq's settings, and how far is looked."""

    growth_guard: float = 0.3
    growth_s: float = 0.0
    saturation_s: float = 90.0
    saturation_guard: float = 0.0
    horizon_s: float = 2.0
    """Time over which arrivals to come are played on; 0 for none."""

    def __post_init__(self) -> None:
        # A dataclass with slots is another class than the one `super` would close over.
        EcoFreqConfig.__post_init__(self)
        if self.horizon_s < 0:
            raise UsageError(f"horizon_s={self.horizon_s} must not be negative")


@dataclass(slots=True)
class Arrivals:
    """Prompts that came of late: how many a second, and how long they are."""

    per_s: float = 0.0
    tokens: float = 0.0
    """Mean of a prompt."""
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
        kept = math.exp(-gap_s / self.MEMORY_S)
        self.per_s = self.per_s * kept + 1 / self.MEMORY_S
        self.tokens += (tokens - self.tokens) * min(0.1, 1 - kept + 0.02)

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

    def choose(self, load: Load, queue: Queue, clocks: Clocks) -> int:
        for piece in queue.pieces:
            if piece.start == 0:
                self.arrivals.see(piece.request.timing.arrival_s, piece.request.prompt_length)
        for request in queue.waiting:
            self.arrivals.see(request.timing.arrival_s, request.prompt_length)
        return super().choose(load, queue, clocks)

    def expected(self, now_s: float) -> Expected | None:
        per_s = self.arrivals.rate_per_s(now_s)
        if per_s * self.config.horizon_s < 1:
            return None
        tokens = max(1, round(self.arrivals.tokens))
        return Expected(
            (per_s, self.config.horizon_s),
            Load(prefill_tokens=tokens, prefill_requests=1),
            Load(prefill_tokens=SEVERAL * tokens, prefill_requests=SEVERAL),
        )
