"""One choice of an answer on its way: a request of the engine, and the text that comes of it."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import NamedTuple

from jaxsys.errors import RunError
from jaxsys.serve.adapters import name_of
from jaxsys.serve.engine import Engine
from jaxsys.serve.generation import Generation, Watch
from jaxsys.serve.http.answers import Choice, Usage
from jaxsys.serve.http.protocol import ChatRequest, CompletionRequest
from jaxsys.serve.http.refusals import NotFinite
from jaxsys.serve.http.text_stream import Spoken, TextStream, text_of
from jaxsys.serve.http.tools import Reader, Said
from jaxsys.serve.http.vocabulary import Vocabulary
from jaxsys.serve.member import NOT_FINITE, TokenEvent
from jaxsys.serve.outcomes import TokenLogprobs
from jaxsys.serve.requests import SamplingParameters

logger = logging.getLogger(__name__)


class Reads(NamedTuple):
    """How an answer is written, and how it is taken apart."""

    grammar: str | None = None
    reader: Callable[[], Reader] | None = None
    """Makes the reader of one choice; None where its text is all content."""
    most_calls: int | None = None
    """Calls that end the answer; None where nothing does."""
    named: bool = False
    """Whether the request names the function that is called."""


class ChoiceRun:
    """One choice on its way: a request of the engine, and the text that comes of it."""

    generation: Generation

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        body: CompletionRequest | ChatRequest,
        index: int,
        name: str,
        usage: Usage,
        reads: Reads | None = None,
        *,
        counts: bool,
    ):
        """
        Args:
            usage: of all choices.
            reads: how the text is taken apart, if it is.
            counts: whether the prompt is counted here.
        """
        self.engine = engine
        self.vocabulary = vocabulary
        self.body = body
        self.index = index
        self.name = name
        self.usage = usage
        self.counts = counts
        self.tokens = 0
        """Tokens that were put out."""
        self._begun = False
        self._offset = 0
        """Characters of the text so far."""
        self._released: deque[tuple[list[Spoken], Said | None]] = deque()
        """What became certain with each event that is on its way to `run`."""
        reader = None if reads is None else reads.reader
        self._reader = None if reader is None else reader()
        if self._reader is not None:
            usage.reasoning_tokens = usage.reasoning_tokens or 0
        self._most_calls = None if reads is None else reads.most_calls
        self._named = reads is not None and reads.named

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParameters,
        adapter: str | None,
        session: str | None,
    ) -> None:
        """Begins the request; raises as `Engine.submit`."""
        body = self.body
        self._ends = sampling.stop_token_ids
        self._include_stop = bool(body.include_stop_str_in_output)
        # A reader looks at special tokens, and drops those that it does not know.
        self._skip_special = body.skip_special_tokens is not False and self._reader is None
        self._text = TextStream(
            self.vocabulary,
            sampling.stop,
            prompt=prompt,
            skip_special=self._skip_special,
            include_stop=self._include_stop,
            min_tokens=sampling.min_tokens,
        )
        watch: Watch = self._watch
        self.generation = self.engine.submit(
            prompt,
            sampling,
            request_id=self.name,
            watch=watch,
            adapter=adapter,
            session=session,
        )

    def _watch(self, event: TokenEvent) -> bool:
        """Takes a token in, as it reaches the engine's thread; whether the text ends with it."""
        assert event.token is not None
        # A token that ends the output is no text, unless it is asked for or a grammar's last one.
        ends = event.finish_reason == "stop" and event.token in self._ends
        if not ends or self._include_stop:
            self._text.push(event.token, event.logprobs)
        spoken = self._text.take()
        self._released.append((spoken, self._apart(spoken)))
        reader, most = self._reader, self._most_calls
        if reader is not None and most is not None and reader.finished >= most:
            return True
        return self._text.stopped

    def _apart(self, spoken: Sequence[Spoken], *, last: bool = False) -> Said | None:
        """What tokens say: content, reasoning, calls; None where the text is not taken apart."""
        reader = self._reader
        if reader is None:
            return None
        said = Said()
        special = self.vocabulary.special
        for one in spoken:
            if reader.reasoning:
                self.usage.reasoning_tokens = (self.usage.reasoning_tokens or 0) + 1
            if one.text:
                said.add(reader.push(one.text, special=one.token in special))
        if last:
            said.add(reader.close())
        return said

    async def run(self) -> AsyncGenerator[Choice, None]:
        """The choice's increments."""
        last: TokenEvent | None = None
        events = self.engine.events(self.generation)
        async with contextlib.aclosing(events):
            async for last in events:
                yield self._increment(last)
                if last.finish_reason is not None:
                    break
        if last is not None:
            self._account(last)

    async def whole(self) -> Choice:
        """All of them as one, once there are no more."""
        events = await self.engine.all_events(self.generation)
        choice = self._increment(events[0])
        pieces = [choice.text]
        for one in events[1:]:
            part = self._increment(one)
            pieces.append(part.text)
            choice.tokens += part.tokens
            choice.called = part.called
            if choice.said is not None and part.said is not None:
                choice.said.add(part.said)
            choice.finish_reason, choice.message = part.finish_reason, part.message
        choice.text = "".join(pieces)
        self._account(events[-1])
        return choice

    def _increment(self, event: TokenEvent) -> Choice:
        """What comes of one event."""
        request, usage, text = self.generation.request, self.usage, self._text
        spoken: list[Spoken] = []
        prompt = said = None
        if not self._begun:
            self._begun = True
            if self.counts:
                usage.prompt_tokens += request.prompt_length
                usage.cached_tokens += event.request.cached_tokens
        if event.token is not None:
            usage.completion_tokens += 1
            self.tokens += 1
            if self.tokens == 1:
                spoken, prompt = self._prompt(request.prompt_tokens, event)
            fresh, said = self._released.popleft()
            spoken += fresh
        reason = event.finish_reason
        if reason is not None:
            text.flush()
            rest = text.take()
            spoken += rest
            more = self._apart(rest, last=True)
            if more is not None:
                said = said or Said()
                said.add(more)
        part = text_of(spoken)
        offset, self._offset = self._offset, self._offset + len(part)
        return Choice(
            self.index,
            part,
            spoken,
            reason,
            event.message,
            offset=offset,
            prompt=prompt,
            said=said if said is not None or self._reader is None else Said(),
            called=self._reader is not None and self._reader.whole,
            named=self._named,
        )

    def _prompt(
        self, prompt: Sequence[int], event: TokenEvent
    ) -> tuple[list[Spoken], list[tuple[int, TokenLogprobs | None]] | None]:
        """What is said of the prompt before the first token: its text, its log-probabilities."""
        beside = event.prompt or [None] * len(prompt)
        spoken = []
        if isinstance(self.body, CompletionRequest) and self.body.echo:
            text = TextStream(self.vocabulary, skip_special=self._skip_special)
            for token, entry in zip(prompt, beside, strict=True):
                text.push(token, entry)
            text.flush()
            spoken = text.take()
        if self.body.prompt_logprobs is None:
            return spoken, None
        return spoken, list(zip(prompt, beside, strict=True))

    def _account(self, last: TokenEvent) -> None:
        timing, usage = last.request.timing, self.usage
        if timing.energy_j is not None:
            usage.energy_j = (usage.energy_j or 0.0) + timing.energy_j
            usage.prefill_energy_j += timing.prefill_energy_j or 0.0
        logger.info(
            "request",
            extra={
                "request_id": self.name,
                "adapter": name_of(last.request.adapter),
                "prompt_tokens": last.request.prompt_length,
                "cached_tokens": last.request.cached_tokens,
                "output_tokens": self.tokens,
                "finish_reason": last.finish_reason,
                "ttft_s": _rounded(timing.ttft_s),
                "total_s": _rounded(last.time_s - timing.arrival_s),
                "preemptions": timing.preemptions,
                "energy_j": _rounded(timing.energy_j),
            },
        )


def failure_of(message: str) -> RunError:
    if message == NOT_FINITE:
        return NotFinite(message)
    return RunError(message or "the request failed")


async def all_of(answers: Sequence[ChoiceRun]) -> list[Choice]:
    """The choices of an answer that is given at once."""
    if len(answers) == 1:
        return [await answers[0].whole()]
    return await asyncio.gather(*[answer.whole() for answer in answers])


async def merged(runs: Sequence[AsyncGenerator[Choice, None]]) -> AsyncIterator[Choice]:
    """Increments of several choices as they come."""
    if len(runs) == 1:
        async with contextlib.aclosing(runs[0]) as only:
            async for choice in only:
                yield choice
        return
    ready: asyncio.Queue[Choice | BaseException | None] = asyncio.Queue()

    async def pump(run: AsyncIterator[Choice]) -> None:
        try:
            async for choice in run:
                ready.put_nowait(choice)
            ready.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - raised again where the choices meet
            ready.put_nowait(error)

    tasks = [asyncio.create_task(pump(run)) for run in runs]
    try:
        left = len(tasks)
        while left:
            item = await ready.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
