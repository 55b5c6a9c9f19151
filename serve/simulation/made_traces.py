"""Traces that are made: arrivals by rate and burstiness, lengths lognormal, sessions of agents."""

import math

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.serve.simulation.traces import RequestTrace


def poisson_arrivals(count: int, rate_per_s: float, seed: int, *, cv: float = 1.0) -> np.ndarray:
    """Arrival times of a renewal process whose gaps are gamma with coefficient of variation `cv`;
    1 is Poisson."""
    if seed < 0:
        raise UsageError(f"seed={seed} must be at least 0")
    if not (rate_per_s > 0 and cv > 0):
        raise UsageError(f"rate_per_s={rate_per_s} and cv={cv} must be positive")
    shape = 1.0 / cv**2
    gaps = np.random.default_rng(seed).gamma(shape, 1.0 / (rate_per_s * shape), count)
    return np.cumsum(gaps)


def lognormal_lengths(
    count: int, mean: float, sigma: float, seed: int, *, most: int = 3000
) -> np.ndarray:
    """Token counts, lognormal with the given mean and log-space deviation, from 1 to `most`."""
    draw = np.random.default_rng(seed).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(draw), 1, most).astype(int)


def synthetic_trace(
    *,
    rate_per_s: float,
    duration_s: float,
    seed: int = 0,
    prompt_mean: float = 250.0,
    prompt_sigma: float = 1.0,
    output_mean: float = 215.0,
    output_sigma: float = 0.8,
    cv: float = 1.0,
    most_tokens: int = 3000,
    name: str = "synthetic",
) -> RequestTrace:
    """Lognormal lengths and Poisson (or burstier) arrivals for `duration_s`."""
    for what, value in (("rate_per_s", rate_per_s), ("duration_s", duration_s), ("cv", cv)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{what}={value} must be positive")
    for what, value in (("prompt_mean", prompt_mean), ("output_mean", output_mean)):
        if not 1 <= value <= most_tokens:
            raise UsageError(f"{what}={value:g} must be from 1 to {most_tokens} tokens")
    count = int(rate_per_s * duration_s + 6 * math.sqrt(rate_per_s * duration_s) * cv + 10)
    arrival_s = poisson_arrivals(count, rate_per_s, seed, cv=cv)
    kept = arrival_s < duration_s
    if not kept.any():
        raise UsageError(
            f"no request arrives in duration_s={duration_s:g} at rate_per_s={rate_per_s:g}: the "
            f"first would come after {arrival_s[0]:.3g} s"
        )
    prompts = lognormal_lengths(count, prompt_mean, prompt_sigma, seed + 1, most=most_tokens)
    outputs = lognormal_lengths(count, output_mean, output_sigma, seed + 2, most=most_tokens)
    return RequestTrace(
        name=name,
        arrival_s=arrival_s[kept],
        prompt_tokens=prompts[kept],
        output_tokens=outputs[kept],
    )


def agent_trace(
    *,
    sessions: int,
    sessions_per_s: float,
    seed: int = 0,
    turns: int = 40,
    prompt_mean: float = 140_000.0,
    output_mean: float = 440.0,
    known_share: float = 0.96,
    common_tokens: int = 16_000,
    tool_mean_s: float = 6.0,
    output_s: float = 0.02,
    most_tokens: int = 1_000_000,
    name: str = "agents",
) -> RequestTrace:
    """Sessions of agents: each prompt is the one before, its answer, and what a tool said of it.

    A prompt grows by as much a turn as leaves `known_share` of it known from the turn before, on
    the mean over a session; the defaults are those of coding agents: some 40 turns of 140,000
    tokens in and 440 out, of which 96 % were there before. The next turn follows when the answer is
    there and the tool has run (`gap_s`).

    Args:
        turns: of a session, on the mean; from a half of it to three halves.
        common_tokens: that all sessions begin with.
        output_s: that a token of an answer is taken to need in `arrival_s`.
    """
    for what, value in (
        ("sessions_per_s", sessions_per_s),
        ("tool_mean_s", tool_mean_s),
        ("output_s", output_s),
    ):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{what}={value} must be a finite positive number")
    for what, value in (("sessions", sessions), ("turns", turns), ("output_mean", output_mean)):
        if not value >= 1:
            raise UsageError(f"{what}={value:g} must be at least 1")
    if not 0 < known_share < 1:
        raise UsageError(f"known_share={known_share} must be between 0 and 1")
    grown = (1 - known_share) * prompt_mean
    if grown < output_mean + 1:
        raise UsageError(
            f"known_share={known_share} of prompt_mean={prompt_mean:g} tokens leaves {grown:.0f} "
            f"new ones a turn, fewer than an answer of output_mean={output_mean:g}; lower one"
        )
    # A request's mean place in its session, of a half to three halves of `turns`.
    first = prompt_mean - grown * (turns * 13 / 12 - 1) / 2
    if first <= common_tokens:
        raise UsageError(
            f"prompt_mean={prompt_mean:g} over {turns} turns begins at {first:.0f} tokens, not "
            f"beyond common_tokens={common_tokens}; raise known_share or lower common_tokens"
        )
    generator = np.random.default_rng(seed)
    begins_s = poisson_arrivals(sessions, sessions_per_s, seed + 1)
    found: list[tuple[float, int, int, int, float]] = []
    for session, began_s in enumerate(begins_s.tolist()):
        count = max(1, round(turns * generator.uniform(0.5, 1.5)))
        length, now_s = common_tokens + int((first - common_tokens) * generator.gamma(4, 0.25)), 0.0
        gap_s = 0.0
        for _ in range(count):
            output = max(1, int(output_mean * generator.lognormal(-0.32, 0.8)))
            if length + output > most_tokens:
                break
            found.append((began_s + now_s, max(1, length), output, session, gap_s))
            gap_s = float(generator.exponential(tool_mean_s))
            now_s += output * output_s + gap_s
            length += output + int((grown - output_mean) * generator.gamma(1, 1.0))
    found.sort()
    arrivals_s, prompts, outputs, numbers, gaps_s = zip(*found, strict=True)
    return RequestTrace(
        name=name,
        arrival_s=np.array(arrivals_s),
        prompt_tokens=np.array(prompts),
        output_tokens=np.array(outputs),
        sessions=np.array(numbers),
        common_tokens=common_tokens,
        gap_s=np.array(gaps_s),
    )
