"""What a replay measured, and the figures that are read off it."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True, kw_only=True)
class ReplayResult:
    """What a replay measured. Energy counts every instance from zero to `duration_s`, idle too."""

    requests: int
    output_tokens: int
    duration_s: float
    energy_j: float
    energy_j_by_role: dict[str, float]
    idle_j: float
    busy_s_by_role: dict[str, float]
    ttft_s: np.ndarray
    """Per request."""
    tpot_s: np.ndarray
    """Per request with two tokens or more: mean time between its tokens."""
    itl_s: np.ndarray
    """Distinct gaps between tokens, weighted by `itl_weight`."""
    itl_weight: np.ndarray
    clock_seconds: dict[str, dict[int, float]]
    """Busy seconds by role and clock."""
    decisions: int
    infeasible: int
    overruns: int
    """Iterations that outlasted the policy's patience; one that was met while it ran counts twice:
    when the alarm rang, and when it ended."""
    clock_changes: int
    preemptions: int
    asleep_s: float
    """Instance seconds asleep ..."""
    wakes: int
    """... and how often one was woken."""
    wall_s: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of these, found in the prefix cache of the instance that read the prompt."""
    series: dict[str, list[float]] = field(default_factory=dict)

    def ttft_attainment(self, bound_s: float) -> float:
        """Share of requests whose first token came within `bound_s`."""
        return float(np.mean(self.ttft_s <= bound_s))

    def itl_attainment(self, bound_s: float) -> float:
        """Share of tokens after the first that came within `bound_s` of the one before."""
        total = self.itl_weight.sum()
        return float(self.itl_weight[self.itl_s <= bound_s].sum() / total) if total else 1.0

    def tpot_attainment(self, bound_s: float) -> float:
        """Share of requests whose mean time between tokens is within `bound_s`."""
        return float(np.mean(self.tpot_s <= bound_s)) if len(self.tpot_s) else 1.0

    def itl_percentile(self, percent: float) -> float:
        """Token-weighted percentile of the gaps."""
        if not len(self.itl_s):  # every answer was one token
            return 0.0
        order = np.argsort(self.itl_s)
        share = np.cumsum(self.itl_weight[order])
        at = np.searchsorted(share, share[-1] * percent / 100.0)
        return float(self.itl_s[order][min(at, len(order) - 1)])

    @property
    def prefix_hits(self) -> float:
        """Share of prompt tokens that were not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def energy_per_token_j(self) -> float:
        return self.energy_j / self.output_tokens

    @property
    def energy_per_request_j(self) -> float:
        return self.energy_j / self.requests
