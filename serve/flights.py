"""What is in flight on a device, and what is read of it when it has arrived."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxsys.serve.lora import Adapted
from jaxsys.serve.outcomes import TokenLogprobs
from jaxsys.serve.prompt_scores import Scores
from jaxsys.serve.requests import Request
from jaxsys.serve.sampling import Rules, Sample, SamplingNeeds
from jaxsys.serve.verification import Verified


class Pending(NamedTuple):
    """One sampling call in flight, or a piece that samples nothing and is only waited for."""

    sample: Sample
    requests: Sequence[Request | None]
    """Whose tokens they are; empty where there are none."""
    scored: "Scored | Pooled | None" = None


class Guessed(NamedTuple):
    """A step in flight that computed guesses."""

    verified: Verified
    requests: Sequence[Request]


class Held:
    """A decode step whose tokens are not chosen yet."""

    __slots__ = ("logits", "pending", "requests", "where")

    def __init__(self, requests: tuple[Request, ...], where: jax.Array, logits: jax.Array):
        self.requests = requests
        self.where = where
        self.logits = logits
        self.pending: Pending | None = None
        """Once they are."""


class Scored(NamedTuple):
    """What is being found out of a prompt's tokens."""

    request: Request
    start: int
    """Position of the first of them; the token scored first is the next one."""
    tokens: int
    scores: Scores


class Pooled(NamedTuple):
    """Hidden states of a prompt's piece."""

    request: Request
    start: int
    scores: tuple[jax.Array]
    """float32 [2, D]: their sum, and the last."""


NOBODYS = Pending(Sample(cast(Any, np.zeros(1, np.int32)), None, None, None), [None])
"""Stands in for the sample of a request that has ended."""


class PromptPiece(NamedTuple):
    """A prompt's piece as the device takes it."""

    request: Request
    end: int
    shape: tuple[int, int, bool]
    packed: np.ndarray
    sampling: tuple[Rules, SamplingNeeds] | None
    """For the last piece."""
    history: tuple[np.ndarray, ...] | None
    start: int = 0
    following: np.ndarray | None = None
    """The token behind each of the piece's, where how likely they are is asked for."""
    mask: np.ndarray | None = None
    """For the last piece: the tokens that its grammar admits."""
    adapted: Adapted | None = None


def logprobs_of(columns: Sequence[np.ndarray], row: int, count: int) -> TokenLogprobs:
    """What a sample's columns of log-probabilities say of a row."""
    chosen, top_tokens, top_logprobs = columns
    return TokenLogprobs(
        float(chosen[row]), top_tokens[row, :count].tolist(), top_logprobs[row, :count].tolist()
    )


def send(pending: Pending) -> None:
    """Has what the host asks for travel there."""
    sampled, requests, scored = pending
    for array in (*(sampled if requests else ()), *(scored.scores if scored else ())):
        if isinstance(array, jax.Array):
            array.copy_to_host_async()


def note_pooled(pooled: Pooled) -> bool:
    """Puts down with the request what its prompt's pieces give; whether all of it is finite."""
    request = pooled.request
    hidden = np.asarray(pooled.scores[0], np.float64)
    if pooled.start:  # pieces come in order
        hidden[0] += request.embedding[0]
    request.embedding = hidden
    return bool(np.isfinite(hidden).all())


def note(scored: Scored) -> bool:
    """Puts down with the request what was found out of its prompt; whether all of it is finite."""
    request, count = scored.request, scored.tokens
    alternatives = request.sampling.prompt_logprobs
    logprobs, ranks, top_tokens, top_logprobs = (
        np.asarray(column)[:count] for column in scored.scores
    )
    if request.prompt_logprobs is None:
        request.prompt_logprobs = [None] * request.prompt_length
    for row, (logprob, rank) in enumerate(zip(logprobs.tolist(), ranks.tolist(), strict=True)):
        request.prompt_logprobs[scored.start + 1 + row] = TokenLogprobs(
            logprob,
            top_tokens[row, :alternatives].tolist(),
            top_logprobs[row, :alternatives].tolist(),
            rank,
        )
    return bool(np.isfinite(logprobs).all())
