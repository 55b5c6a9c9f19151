"""Speculation without a second model: what a text says again is guessed from where it said it.

A text often repeats itself: code that is edited, a document that is quoted, a tool's answer that is
passed on. Where its last tokens stood before, what followed them there is guessed to follow again.
The guessed tokens are computed in one step with the one that is due, each row of the batch has so
many, and as many are kept as the model would have chosen itself (`verification`).

    lookup   the last n tokens, n from `prompt_lookup_min` on, at the place where most of them up
             to `prompt_lookup_max` match; the latest such place of several
    gain     tokens that a request gains a step, were every step to guess: an exponential mean
    pays     mean gain over the batch > time of a step that guesses / time of one that does not

A request's gain is known without guessing in earnest: each token that is chosen anyway is compared
with the guess that would have been made. So texts that do not repeat cost a lookup on the host and
no step. Steps' times are those measured, for each size of batch; where guessing does not pay by
them, it is tried again in ever longer intervals, lest one slow step decide for ever.

Prompt lookup is due to Saxena (2023, github.com/apoorvumang/prompt-lookup-decoding); the longest
match follows SuffixDecoding (arXiv 2411.04975), by chained n-grams instead of a suffix tree.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from jaxsys.errors import UsageError

if TYPE_CHECKING:
    from jaxsys.serve.iterations import Iteration
    from jaxsys.serve.requests import Request

Method = Literal["ngram"]
METHODS: tuple[Method, ...] = get_args(Method)

MOST_LOOKED_AT = 1 << 17
"""Latest tokens of a text that are looked at; each takes some 200 bytes of the host's memory."""
PLACES = 8
"""Earlier places of the last tokens that are compared, from the latest on."""
ASSUMED_COST = 1.5
"""Time of a step that guesses over one that does not, until both were measured."""
MARGIN = 0.05
"""By what share guessing must be quicker."""
MEMORY = 0.2
"""Weight of the latest step in a request's gain."""
TIMES = 7
"""Latest steps whose median time counts."""
LONGEST_WAIT = 1024
"""Steps until guessing is tried again where it did not pay."""
MOST_ROWS = 512
"""Tokens of a step that guesses; larger batches are bound by computing and gain nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """How tokens are guessed; fields by the names that vLLM gave them."""

    num_speculative_tokens: int = 5
    """Most tokens guessed at once."""
    prompt_lookup_min: int = 2
    """Last tokens that must have stood somewhere before."""
    prompt_lookup_max: int = 8
    """Last tokens that are compared to choose among several places."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_speculative_tokens <= 63:
            raise UsageError(
                f"num_speculative_tokens={self.num_speculative_tokens} must be from 1 to 63"
            )
        if self.prompt_lookup_min < 1:
            raise UsageError(f"prompt_lookup_min={self.prompt_lookup_min} must be at least 1")
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise UsageError(
                f"prompt_lookup_max={self.prompt_lookup_max} must not be below "
                f"prompt_lookup_min={self.prompt_lookup_min}"
            )

    @property
    def width(self) -> int:
        """Tokens of a row in a step that guesses."""
        return self.num_speculative_tokens + 1


class Lookup:
    """Where the last tokens of one text stood before."""

    __slots__ = ("_earlier", "_latest", "_longest", "_shortest", "tokens")

    def __init__(self, tokens: Sequence[int], *, shortest: int, longest: int):
        """
        Args:
            shortest: tokens that must match.
            longest: tokens that are compared.
        """
        self.tokens: list[int] = []
        self._shortest = shortest
        self._longest = longest
        self._latest: dict[tuple[int, ...], int] = {}
        """By the last tokens: how many tokens there were the latest time."""
        self._earlier: list[int] = []
        """By the number of tokens, less `shortest`: how many there were the time before; or 0."""
        self.extend(tokens)

    def extend(self, fresh: Sequence[int]) -> None:
        """Appends tokens; each takes constant time."""
        tokens, size, latest = self.tokens, self._shortest, self._latest
        begin = max(0, len(tokens) - size + 1)
        tokens += fresh
        part = tokens[begin:] if begin else tokens
        grams = zip(*(part[shift:] for shift in range(size)), strict=False)
        for end, gram in enumerate(grams, begin + size):
            self._earlier.append(latest.get(gram, 0))
            latest[gram] = end

    def draft(self, most: int) -> list[int]:
        """The tokens that followed where the last ones stood before; at most `most`, or none."""
        tokens, size = self.tokens, self._shortest
        length = len(tokens)
        if length <= size:
            return []
        best, matched = 0, 0
        place = self._earlier[length - size]
        for _ in range(PLACES):
            if not place:
                break
            same, longest = size, min(self._longest, place)
            while same < longest and tokens[place - 1 - same] == tokens[length - 1 - same]:
                same += 1
            if same > matched:
                best, matched = place, same
            if matched >= self._longest:
                break
            place = self._earlier[place - size]
        if not best:
            return []
        found = tokens[best : best + most]
        period = length - best  # what repeats itself up to here is taken to go on so
        while len(found) < most:
            found.append(found[len(found) - period])
        return found


class Prospect:
    """What is known of one request: where its text repeats itself, and what guessing gains."""

    __slots__ = ("gain", "guess", "lookup", "matched")

    def __init__(self, lookup: Lookup):
        self.lookup = lookup
        self.gain = 1.0
        self.guess: list[int] = []
        """For the step that began last, in earnest or not."""
        self.matched = 0
        """How many of them were chosen since."""


class _Times:
    """Steps of one size of batch."""

    __slots__ = ("guessing", "plain")

    def __init__(self) -> None:
        self.plain: deque[float] = deque(maxlen=TIMES)
        self.guessing: deque[float] = deque(maxlen=TIMES)

    @property
    def cost(self) -> float | None:
        """Of a step that guesses, in steps that do not; None until both were measured."""
        if not self.plain or not self.guessing:
            return None
        return statistics.median(self.guessing) / statistics.median(self.plain)


class Speculation:
    """Guesses for the requests of one scheduler, which owns it."""

    def __init__(
        self, config: SpeculationConfig, *, ready: Callable[[int], bool] | None = None
    ) -> None:
        """
        Args:
            ready: whether the step that guesses is compiled for so many rows; always where None.
        """
        self.config = config
        self.ready = ready
        self._all_ready = False
        self.drafts = 0
        """Guesses that were computed."""
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self.accepted_at = [0] * config.num_speculative_tokens
        """How often the first, second, ... token of a guess was right."""
        self._times: dict[int, _Times] = {}
        self._waits: dict[int, tuple[int, int]] = {}
        """By size of batch, where guessing did not pay: steps to go until it is tried again, and
        how many they were."""

    def ready_for(self, buckets: Sequence[int]) -> bool:
        """Whether the steps that guess are there for all of these batches that may guess."""
        if not self._all_ready:
            small = [size for size in buckets if size * self.config.width <= MOST_ROWS]
            self._all_ready = self.ready is None or all(map(self.ready, small))
        return self._all_ready

    # --- before an iteration --------------------------------------------------------------------

    def wanted(self, running: Sequence[Request], bucket: int) -> bool:
        """Whether a step of these requests should guess. Changes nothing."""
        if not running or bucket * self.config.width > MOST_ROWS:
            return False
        if self.ready is not None and not self.ready(bucket):
            return False
        gain = self.gain(running)
        if gain <= 1 + MARGIN:
            return False
        times = self._times.get(bucket)
        cost = times.cost if times is not None else None
        if cost is None:  # whatever was not measured yet comes next
            return gain > ASSUMED_COST and (times is None or not times.guessing)
        if gain > cost * (1 + MARGIN):
            return True
        return gain > ASSUMED_COST and self._waits.get(bucket, (0, 0))[0] <= 0

    def gain(self, running: Sequence[Request]) -> float:
        """Tokens that a request gains a step, on the mean."""
        total = 0.0
        for request in running:
            prospect = request.prospect
            total += 1.0 if prospect is None else prospect.gain
        return total / len(running)

    def draft(self, request: Request) -> list[int]:
        """What is guessed to follow a request's tokens, all of which are known."""
        most = min(
            self.config.num_speculative_tokens,
            request.sampling.max_tokens - request.generated - 1,
        )
        prospect = request.prospect
        if prospect is None or most < 1:
            return []
        if prospect.matched:  # a guess not made in earnest was half right so far
            self._begin(prospect)
        return prospect.guess[:most]

    # --- after it -------------------------------------------------------------------------------

    def observe(self, request: Request, fresh: Sequence[int]) -> None:
        """Takes in tokens that a request has gained."""
        prospect = request.prospect
        if prospect is None:
            config = self.config
            known = request.known_tokens()[-MOST_LOOKED_AT:]
            prospect = request.prospect = Prospect(
                Lookup(known, shortest=config.prompt_lookup_min, longest=config.prompt_lookup_max)
            )
            self._begin(prospect)
            return
        lookup = prospect.lookup
        for token in fresh:
            lookup.extend((token,))
            guess, matched = prospect.guess, prospect.matched
            if matched < len(guess) and guess[matched] == token:
                prospect.matched += 1
                continue
            prospect.gain += MEMORY * (matched + 1 - prospect.gain)
            self._begin(prospect)

    def verified(self, drafted: int, accepted: int) -> None:
        """Counts what became of one guess."""
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        for place in range(accepted):
            self.accepted_at[place] += 1

    def ran(self, iteration: Iteration, period_s: float) -> None:
        """Takes in how long an iteration took, host's work that nothing ran behind included."""
        if iteration.prefills or not iteration.decodes or iteration.steps != 1 or period_s <= 0:
            return
        bucket = iteration.bucket
        times = self._times.setdefault(bucket, _Times())
        left, wait = self._waits.get(bucket, (0, 1))
        if iteration.drafted and wait > TIMES:
            times.guessing.clear()  # those of long ago
        (times.guessing if iteration.drafted else times.plain).append(period_s)
        if not iteration.drafted:
            self._waits[bucket] = left - 1, wait
            return
        cost = times.cost
        if cost is not None and self.gain(iteration.decodes) <= cost * (1 + MARGIN):
            wait = min(LONGEST_WAIT, 2 * wait)
            self._waits[bucket] = wait, wait
        else:
            self._waits[bucket] = 0, 1

    def _begin(self, prospect: Prospect) -> None:
        prospect.guess = prospect.lookup.draft(self.config.num_speculative_tokens)
        prospect.matched = 0
