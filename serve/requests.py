"""A request as the scheduler sees it: tokens, pages, state and times.

A `Request` belongs to one scheduler at a time. Where prefill and decode run on different
instances, the decode side works on a twin (`Request.handed_over`) that shares the timing record.

Positions: a prompt of P tokens fills positions 0..P-1. `computed` counts the positions whose keys
and values are written, or will be by iterations already dispatched; `pending` counts the samples
dispatched whose values the host has not seen. While a request decodes,
`computed == prompt_length + generated + pending - 1`.
"""

import contextlib
import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from jaxsys.errors import UsageError

FinishReason = Literal["stop", "length", "abort", "error"]


class ContextLengthExceeded(UsageError):
    """Prompt and answer together are longer than a request may be."""


class FieldRefused(UsageError):
    """One field of a request is at fault.

    Attributes:
        field: its name.
    """

    def __init__(self, message: str, field: str):
        super().__init__(message, field)  # both are its arguments, so that it can be pickled
        self.field = field

    def __str__(self) -> str:
        return str(self.args[0])


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
    """Refusals in this block that do not say so themselves are of one field."""
    try:
        yield
    except UsageError as error:
        if type(error) is not UsageError:  # it has a status or a code of its own, or a field
            raise
        raise FieldRefused(str(error), field) from None


class RequestState(enum.Enum):
    """Where a request stands within one instance."""

    WAITING = "waiting"
    """Holds no pages: newly arrived, or preempted."""
    FETCHING = "fetching"
    """Holds pages, whose contents are on their way from the host's memory."""
    PREFILLING = "prefilling"
    """Holds pages; part of the prompt is not scheduled yet."""
    HANDING_OVER = "handing over"
    """Prefill instance: prompt scheduled or done, pages kept until the decode side has them."""
    RECEIVING = "receiving"
    """Decode instance: pages reserved, contents on their way."""
    RUNNING = "running"
    """Decodes one token an iteration."""
    FINISHED = "finished"
    """Holds nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How to choose each next token. `temperature=0` takes the likeliest."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest."""
    seed: int | None = None
    stream: int = 0
    """Which of the streams of draws that a seed has: choices of one request take one each."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the output, the model's end-of-text tokens among them."""
    min_tokens: int = 0
    """Tokens put out before one of `stop_token_ids` can be chosen."""
    logprobs: int | None = None
    """How many alternatives to report beside each chosen token; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, but for the first."""
    pooling: Literal["mean", "last"] | None = None
    """The prompt's embedding is asked for: of its final hidden states, their mean or the last."""
    grammar: str | None = None
    """What the output follows, as `grammars` writes it; the output ends with it."""

    def __post_init__(self) -> None:
        # Written so that NaN fails each check.
        for name, rule, holds in (
            ("max_tokens", "at least 1", self.max_tokens >= 1),
            ("min_tokens", "from 0 to max_tokens", 0 <= self.min_tokens <= self.max_tokens),
            (
                "seed",
                "of 64 bits: from -2**63 to 2**63 - 1",
                self.seed is None or -(2**63) <= self.seed < 2**63,
            ),
            ("stream", "0 or more", self.stream >= 0),
            ("temperature", "from 0 to 2", 0 <= self.temperature <= 2),
            ("top_k", "0 (all) or more", self.top_k >= 0),
            ("top_p", "over 0 and at most 1", 0 < self.top_p <= 1),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "over 0 and at most 10", 0 < self.repetition_penalty <= 10),
            ("presence_penalty", "from -2 to 2", -2 <= self.presence_penalty <= 2),
            ("frequency_penalty", "from -2 to 2", -2 <= self.frequency_penalty <= 2),
            (
                "min_tokens",
                "0 where a grammar says when the output ends",
                self.grammar is None or not self.min_tokens,
            ),
            (
                "pooling",
                "mean or last, of a prompt whose tokens are not scored",
                self.pooling is None
                or (self.pooling in ("mean", "last") and self.prompt_logprobs is None),
            ),
            ("logprobs", "from 0 to 20", _few(self.logprobs)),
            ("prompt_logprobs", "from 0 to 20", _few(self.prompt_logprobs)),
        ):
            if not holds:
                raise FieldRefused(f"{name}={str(getattr(self, name))[:40]} must be {rule}", name)

    @property
    def places(self) -> int:
        """Positions that the output may need: none where the prompt's embedding is asked for."""
        return self.max_tokens if self.pooling is None else 0


def _few(count: int | None) -> bool:
    return count is None or 0 <= count <= 20


class Timing:
    """When things happened to one request, in seconds on the instance's clock."""

    __slots__ = (
        "arrival_s",
        "energy_j",
        "finished_s",
        "first_token_s",
        "last_token_s",
        "preemptions",
        "prefill_energy_j",
        "scheduled_s",
        "token_times_s",
    )

    def __init__(self, arrival_s: float):
        self.arrival_s = arrival_s
        self.scheduled_s: float | None = None
        """When the first piece of the prompt was put into an iteration."""
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.finished_s: float | None = None
        self.token_times_s: list[float] = []
        self.energy_j: float | None = None
        """Energy attributed to the request; None where no reading exists."""
        self.prefill_energy_j: float | None = None
        """Of this, for computing its prompt."""
        self.preemptions = 0

    @property
    def ttft_s(self) -> float | None:
        """Time from arrival to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


class Request:
    """One prompt on its way through one instance."""

    __slots__ = (
        "adapter",
        "block_hashes",
        "cached_tokens",
        "computed",
        "embedding",
        "finish_reason",
        "follower",
        "generated",
        "note",
        "other_pages",
        "output_tokens",
        "pages",
        "pending",
        "prompt_length",
        "prompt_logprobs",
        "prompt_tokens",
        "prospect",
        "request_id",
        "sampling",
        "session",
        "shared_pages",
        "slot",
        "state",
        "timing",
    )

    def __init__(
        self,
        request_id: str | int,
        *,
        sampling: SamplingParameters,
        arrival_s: float,
        prompt_tokens: Sequence[int] | None = None,
        prompt_length: int | None = None,
        block_hashes: Sequence[bytes | int] | None = None,
        timing: Timing | None = None,
        adapter: str | None = None,
        session: str | None = None,
    ):
        """A replay gives `prompt_length` alone; a server gives `prompt_tokens`.

        Args:
            block_hashes: identities of the prompt's full blocks, each standing for the whole
                prefix up to its end; computed from the tokens where None.
            adapter: which low-rank adapter computes it, by the name that `Adapters` gave its load;
                None: the model alone.
            session: what it belongs to, if its owner says so: more is likely to follow.
        """
        if prompt_tokens is None:
            if prompt_length is None:
                raise UsageError("a request needs prompt_tokens or prompt_length")
            self.prompt_tokens: Sequence[int] = ()
            self.prompt_length = prompt_length
        else:
            self.prompt_tokens = prompt_tokens
            self.prompt_length = len(prompt_tokens)
        if self.prompt_length < 1:
            raise UsageError("the prompt is empty; give at least one token")
        self.request_id = request_id
        self.sampling = sampling
        self.adapter = adapter
        self.timing = Timing(arrival_s) if timing is None else timing
        self.block_hashes = block_hashes
        self.session = session
        self.state = RequestState.WAITING
        self.output_tokens: list[int] = []
        self.generated = 0
        self.pending = 0
        self.computed = 0
        self.cached_tokens = 0
        self.prompt_logprobs: list[Any] | None = None
        """What was found out of the prompt's tokens, where that is asked for."""
        self.embedding: Any = None
        """Hidden states of the prompt, pooled so far, where that is asked for."""
        self.pages: list[int] = []
        """Of each block of tokens in turn, in the first group of layers (see `cache_groups`);
        FREED where its page was given back."""
        self.other_pages: tuple[list[int], ...] = ()
        """The like in further groups of layers."""
        self.shared_pages = 0
        """Receiving: how many blocks, from the first, hold their contents already."""
        self.slot = -1
        self.follower: Any = None
        """The executor's: where the output stands in its grammar."""
        self.prospect: Any = None
        """The speculation's: where the text repeats itself."""
        self.finish_reason: FinishReason | None = None
        self.note: object = None
        """For the owner's use (the server keeps its output stream here); never read here."""

    @property
    def arrival_s(self) -> float:
        return self.timing.arrival_s

    @property
    def total_length(self) -> int:
        """Tokens known so far, prompt and output."""
        return self.prompt_length + self.generated

    @property
    def tables(self) -> tuple[list[int], ...]:
        """Pages by group of layers."""
        return (self.pages, *self.other_pages)

    def known_tokens(self) -> list[int]:
        """Prompt and output tokens."""
        return [*self.prompt_tokens, *self.output_tokens]

    def handed_over(self) -> "Request":
        """The decode side's twin: same prompt, output and times, no pages yet."""
        twin = Request(
            self.request_id,
            sampling=self.sampling,
            arrival_s=self.timing.arrival_s,
            prompt_tokens=self.prompt_tokens or None,
            prompt_length=self.prompt_length,
            block_hashes=self.block_hashes,
            timing=self.timing,
            adapter=self.adapter,
            session=self.session,
        )
        twin.output_tokens = list(self.output_tokens)
        twin.generated = self.generated
        twin.cached_tokens = self.cached_tokens
        twin.note = self.note
        return twin

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.state.value}, prompt={self.prompt_length}, "
            f"generated={self.generated}+{self.pending}, computed={self.computed})"
        )
