"""Request traces: when each request arrives and how long its prompt and output are.

Requests of one session share their beginning: each prompt is taken to hold the one before it.
Traces come of files (`jaxsys.serve.simulation.trace_files`) or are made from rates and length
distributions (`jaxsys.serve.simulation.made_traces`).
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from jaxsys.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """Requests in order of arrival."""

    name: str
    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    sessions: np.ndarray | None = None
    """Number of each request's conversation, where the trace tells them apart."""
    common_tokens: int = 0
    """Tokens that the prompts of all sessions begin with, such as one system prompt."""
    gap_s: np.ndarray | None = None
    """Where a turn waits for the answer to the one before it in its session: seconds between the
    two. Then `arrival_s` holds for each session's first turn, and orders the others."""
    unused: str | None = None
    """Column of a file that says what prompts share, which nothing here replays."""

    def __post_init__(self) -> None:
        sizes = {len(self.arrival_s), len(self.prompt_tokens), len(self.output_tokens)}
        if self.sessions is not None:
            sizes.add(len(self.sessions))
        if self.gap_s is not None:
            if self.sessions is None:
                raise UsageError(f"trace {self.name} has gap_s, between turns of no sessions")
            sizes.add(len(self.gap_s))
        if len(sizes) != 1:
            raise UsageError(f"trace {self.name}: columns differ in length: {sorted(sizes)}")
        if len(self.arrival_s) == 0:
            raise UsageError(f"trace {self.name} holds no requests")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """From time zero to the last arrival."""
        return float(self.arrival_s[-1])

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals a second."""
        return len(self) / self.duration_s if self.duration_s > 0 else math.inf

    def head(self, count: int) -> "RequestTrace":
        """The first `count` requests."""
        return self._take(slice(0, count))

    def between(self, start_s: float, end_s: float) -> "RequestTrace":
        """The requests that arrive in [start_s, end_s), with time counted from `start_s`."""
        kept = (self.arrival_s >= start_s) & (self.arrival_s < end_s)
        if not kept.any():
            raise UsageError(
                f"trace {self.name} has no arrivals from {start_s} s to {end_s} s; "
                f"it lasts {self.duration_s:.0f} s"
            )
        taken = self._take(kept)
        return replace(taken, arrival_s=taken.arrival_s - start_s)

    def at_rate(self, rate_per_s: float) -> "RequestTrace":
        """The same requests with time stretched or squeezed to a mean rate: burstiness is kept."""
        if not rate_per_s > 0:
            raise UsageError(f"rate_per_s={rate_per_s} must be positive")
        if not self.duration_s > 0:
            raise UsageError(
                f"trace {self.name} has all its {len(self)} arrivals at one moment, and so no rate "
                f"to bring to rate_per_s={rate_per_s:g}; leave it out"
            )
        stretch = self.rate_per_s / rate_per_s
        gap_s = None if self.gap_s is None else self.gap_s * stretch
        return replace(self, arrival_s=self.arrival_s * stretch, gap_s=gap_s)

    def repeated(self, duration_s: float, *, daily_swing: float = 0.0) -> "RequestTrace":
        """Tiled to `duration_s`; with `daily_swing` s, the rate follows 1 + s * sin over 24 h.

        Arrivals are thinned to follow the swing, so at the peak the trace's own rate holds.
        """
        times = math.ceil(duration_s / max(self.duration_s, 1e-9))
        step_s = self.duration_s + 1.0 / self.rate_per_s
        arrival_s = np.concatenate([self.arrival_s + k * step_s for k in range(times)])
        prompts = np.tile(self.prompt_tokens, times)
        outputs = np.tile(self.output_tokens, times)
        sessions = None
        if self.sessions is not None:  # every repetition has sessions of its own
            apart = int(self.sessions.max()) + 1
            sessions = np.concatenate([self.sessions + k * apart for k in range(times)])
        kept = arrival_s < duration_s
        if daily_swing:
            if not 0 <= daily_swing < 1:
                raise UsageError(f"daily_swing={daily_swing} must be from 0 to below 1")
            share = (1 + daily_swing * np.sin(2 * np.pi * arrival_s / 86_400)) / (1 + daily_swing)
            kept &= np.random.default_rng(0).random(len(arrival_s)) < share
        return RequestTrace(
            name=self.name,
            arrival_s=arrival_s[kept],
            prompt_tokens=prompts[kept],
            output_tokens=outputs[kept],
            sessions=None if sessions is None else sessions[kept],
            common_tokens=self.common_tokens,
            gap_s=None if self.gap_s is None else np.tile(self.gap_s, times)[kept],
            unused=self.unused,
        )

    def sampled(self, share: float, seed: int = 0) -> "RequestTrace":
        """A random part of the requests, each kept with probability `share`."""
        if not 0 < share <= 1:
            raise UsageError(f"share={share} must be above 0, at most 1")
        kept = np.random.default_rng(seed).random(len(self)) < share
        if not kept.any():
            raise UsageError(f"trace {self.name}: no request is left of {len(self)}")
        return self._take(kept)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return int((self.prompt_tokens + self.output_tokens).max())

    def clipped(self, max_total_tokens: int, what: str = "tokens") -> "RequestTrace":
        """Without the requests longer than `max_total_tokens`, as an engine would refuse them.

        Args:
            what: so many of what there are, as the error says it.
        """
        kept = self.prompt_tokens + self.output_tokens <= max_total_tokens
        if not kept.any():
            shortest = int((self.prompt_tokens + self.output_tokens).min())
            raise UsageError(
                f"trace {self.name}: no request fits {max_total_tokens} {what}; the shortest has "
                f"{shortest} tokens"
            )
        return self._take(kept)

    def _take(self, which: slice | np.ndarray) -> "RequestTrace":
        return RequestTrace(
            name=self.name,
            arrival_s=self.arrival_s[which],
            prompt_tokens=self.prompt_tokens[which],
            output_tokens=self.output_tokens[which],
            sessions=None if self.sessions is None else self.sessions[which],
            common_tokens=self.common_tokens,
            gap_s=None if self.gap_s is None else self.gap_s[which],
            unused=self.unused,
        )
