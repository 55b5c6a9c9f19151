"""What one instance may do at once, what it computes next, and what came of it: plain data."""

import dataclasses
from typing import Literal

from jaxsys.errors import UsageError
from jaxsys.serve.cache_groups import most_held
from jaxsys.serve.host_pages import Save
from jaxsys.serve.requests import ContextLengthExceeded, Request

Role = Literal["both", "prefill", "decode"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of one instance."""

    page_count: int
    page_size: int = 16
    max_batch: int = 64
    """Most requests that hold pages at once (their slots on the device)."""
    max_prefill_tokens: int = 512
    """Prompt tokens an iteration may compute."""
    max_length: int = 2048
    """Most tokens of one request, prompt and output."""
    decode_buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Batch sizes that steps are compiled for, ascending."""
    role: Role = "both"
    prefix_caching: bool = True
    reserved_tokens: int = 0
    """Tokens of cache kept free for each request that decodes before another is received; at least
    a page is."""
    windows: tuple[int | None, ...] = (None,)
    """Tokens that each group of layers sees; None: all. See `cache_groups`."""
    pair_cost: float = 0.0
    """What it takes a token to attend to one before it, in what its products take."""
    host_pages: int = 0
    """Pages that the host's memory keeps of what is computed; of layers that see all tokens."""

    def __post_init__(self) -> None:
        if list(self.decode_buckets) != sorted(set(self.decode_buckets)) or (
            not self.decode_buckets or self.decode_buckets[-1] < self.max_batch
        ):
            raise UsageError(
                f"decode_buckets={self.decode_buckets} must ascend and reach "
                f"max_batch={self.max_batch}"
            )
        if self.host_pages and self.windows != (None,):
            raise UsageError(
                f"host_pages={self.host_pages} keeps pages of layers that see all tokens; this "
                f"model has layers with windows: leave it 0"
            )
        for name in ("page_count", "page_size", "max_batch", "max_prefill_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")

    def pages_for(self, length: int) -> int:
        """Pages that a request of so many tokens needs at most at once."""
        ahead = self.max_prefill_tokens + 1
        size = self.page_size
        return sum(most_held(window, length, ahead, size) for window in self.windows)

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest request that all pages hold."""
        if self.windows == (None,):
            return self.page_count * self.page_size
        shortest, longest = 0, self.page_count * self.page_size + 1
        if self.pages_for(self.max_length) <= self.page_count:
            return max(self.max_length, longest - 1)
        while longest - shortest > 1:
            middle = (shortest + longest) // 2
            if self.pages_for(middle) <= self.page_count:
                shortest = middle
            else:
                longest = middle
        return shortest

    def check_fits(self, prompt_length: int, max_tokens: int) -> None:
        """Raises ContextLengthExceeded where no such instance could ever serve such a request."""
        capacity = min(self.max_length, self.capacity_tokens)
        # A prompt without an answer is given a page for its next token all the same.
        most = min(self.max_length, self.capacity_tokens - 1)
        if prompt_length > most and not max_tokens:
            raise ContextLengthExceeded(
                f"prompt is too long: {prompt_length} tokens; at most {most} fit. Shorten it"
            )
        if prompt_length + max_tokens > capacity:
            alone = prompt_length >= capacity  # the words that clients look for
            raise ContextLengthExceeded(
                ("prompt is too long: " if alone else "prompt of ")
                + f"{prompt_length} tokens and max_tokens={max_tokens} need "
                f"{prompt_length + max_tokens} tokens; at most {capacity} fit. Shorten the prompt"
                + ("" if alone else f" or lower max_tokens to {capacity - prompt_length}")
            )


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillPiece:
    """Positions `start..start+length-1` of a request's known tokens."""

    request: Request
    start: int
    length: int
    cached_tokens: int
    """Positions before `start` that were found in the prefix cache rather than computed."""
    last: bool
    """Whether the piece ends the known tokens, and so samples the next one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Iteration:
    """What one instance computes next."""

    index: int
    prefills: tuple[PrefillPiece, ...]
    decodes: tuple[Request, ...]
    copies: tuple[tuple[int, int], ...]
    """Pages (source, target) to copy before the piece of whoever has the target: copy on write."""
    prefill_tokens: int
    cached_tokens: int
    """Sum of `cached_tokens` over pieces that are the first of their request."""
    kv_tokens: int
    """Tokens the decodes attend to, their own included."""
    bucket: int
    """Padded batch of the decode step; 0 without decodes."""
    steps: int
    """Decode steps taken in a row; more than 1 only where the caller allowed it."""
    drafts: tuple[tuple[int, ...], ...] = ()
    """Tokens guessed for each of `decodes`, computed with its next one; empty where none is."""
    gain: float = 1.0
    """Tokens that each of `decodes` is expected to gain at least, guesses included."""
    saves: tuple[Save, ...] = ()
    """Pages to be copied to the host before anything else."""

    @property
    def drafted(self) -> int:
        """Tokens guessed, of all requests."""
        return sum(map(len, self.drafts))

    @property
    def batch(self) -> int:
        """Requests that decode."""
        return len(self.decodes)

    @property
    def sampling(self) -> list[Request]:
        """The requests that sample a token, in the order of the tokens given to `complete`."""
        return [*(piece.request for piece in self.prefills if piece.last), *self.decodes]


@dataclasses.dataclass(slots=True)
class Completion:
    """What `complete` changed."""

    emitted: list[Request]
    """Requests that gained tokens."""
    finished: list[Request]
    handed_over: list[Request]
    """Prefill role: requests whose pages may go to a decode instance now."""
    gained: list[int] = dataclasses.field(default_factory=list)
    """How many of their `output_tokens` each of `emitted` gained."""
