"""The HTTP face: OpenAI's completions and chats, models, health and metrics, as a FastAPI app.

Every refusal is a 4xx (or a deliberate 503) whose body says the value, the rule and the way out. A
client that goes away ends its request in the engine. Each token becomes text as it arrives, before
anything counts it: where the text ends, so does the request, and nothing computed ahead is seen.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from jaxsys import __version__
from jaxsys.errors import RunError, UsageError
from jaxsys.model import Tokenizer
from jaxsys.serve.engine import Engine, Generation, Overloaded, Watch
from jaxsys.serve.executor import TokenLogprobs, check_sampling
from jaxsys.serve.http.answers import ChatShape, Choice, CompletionShape, Shape, Usage, event
from jaxsys.serve.http.bodies import Bodies
from jaxsys.serve.http.description import body_of, describe, page
from jaxsys.serve.http.gate import Gate
from jaxsys.serve.http.metrics import Metrics
from jaxsys.serve.http.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorAnswer,
    Model,
    ModelList,
    Text,
    TokenizeRequest,
    Tokens,
    Version,
    check_tokens,
    encode,
    what_is_wrong,
)
from jaxsys.serve.http.templates import Templates
from jaxsys.serve.http.text_stream import Spoken, TextStream, text_of
from jaxsys.serve.http.vocabulary import Vocabulary
from jaxsys.serve.member import NOT_FINITE, TokenEvent
from jaxsys.serve.requests import ContextLengthExceeded, SamplingParameters

logger = logging.getLogger(__name__)
T = TypeVar("T")

SLACK = 4
"""How many characters of a text a tokenizer may join into one before it looks for tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """What the HTTP face needs to know beside the engine."""

    model_name: str
    max_length: int
    """Most tokens of a request, prompt and output."""
    api_keys: frozenset[str] = frozenset()
    """Keys that are let in; without any, everybody is."""
    key_for_all: bool = False
    """Whether metrics, dashboard and description ask for a key too."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask; "*" is any."""
    max_body_bytes: int = 8 << 20


class NotFinite(RunError):
    """The model computed NaN or infinity."""


class ModelNotFound(HTTPException):
    """Another model is asked for than is served."""

    def __init__(self, asked: str, served: str):
        super().__init__(404, f"model {asked!r} is not served; use {served!r}")


def create_app(
    engine: Engine, tokenizer: Tokenizer, config: ApiConfig, metrics: Metrics
) -> fastapi.FastAPI:
    """The application; `engine` must be started on the same event loop.

    `app.state.close()` ends what it has started beside the engine.
    """
    app = fastapi.FastAPI(
        title="jaxsys",
        version=__version__,
        description="OpenAI-compatible completions over a JAX decode server.",
        docs_url=None,
        redoc_url=None,
        # 4xx and 503 answers share one body, so the description says so everywhere.
        responses={
            status: {"model": ErrorAnswer}
            for status in (400, 401, 404, 405, 408, 413, 415, 422, 429, 503)
        },
    )
    created_s = int(time.time())
    face = _Face(engine, tokenizer, config, metrics)
    app.state.close = face.close

    streams: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    }

    @app.post("/v1/completions", responses=streams, openapi_extra=body_of(CompletionRequest))
    async def completions(request: fastapi.Request) -> Response:
        return await face.completions(request)

    @app.post("/v1/chat/completions", responses=streams, openapi_extra=body_of(ChatRequest))
    async def chat(request: fastapi.Request) -> Response:
        return await face.chat(request)

    served = Model(id=config.model_name, created=created_s, max_model_len=config.max_length)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[served])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Model:
        if name != config.model_name:
            raise ModelNotFound(name[:200], config.model_name)
        return served

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: fastapi.Request) -> Tokens:
        return await face.tokenize(request)

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: fastapi.Request) -> Text:
        return await face.detokenize(request)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, str | None]:
        return {**tokenizer.special_tokens, "chat_template": tokenizer.chat_template}

    @app.get("/version")
    async def version() -> Version:
        return Version(version=__version__)

    @app.get("/health")
    async def health() -> JSONResponse:
        failure = engine.failure
        if failure is None and engine.draining:
            failure = "shutting down"
        if failure is not None:
            return JSONResponse({"status": "unhealthy", "reason": failure}, 503)
        status = "degraded" if engine.failed else "ok"
        return JSONResponse(
            {"status": status, "failed": engine.failed, "unfinished": engine.unfinished}
        )

    @app.get("/ping")
    async def ping() -> JSONResponse:
        return await health()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))

    @app.exception_handler(ContextLengthExceeded)
    async def refuse_length(request: fastapi.Request, error: ContextLengthExceeded) -> JSONResponse:
        param = "messages" if request.url.path.startswith("/v1/chat") else "prompt"
        code = "context_length_exceeded"
        return face.refuse(400, str(error), "invalid_request_error", param=param, code=code)

    @app.exception_handler(UsageError)
    async def refuse_usage(_: fastapi.Request, error: UsageError) -> JSONResponse:
        return face.refuse(400, str(error), "invalid_request_error")

    @app.exception_handler(Overloaded)
    async def refuse_load(_: fastapi.Request, error: Overloaded) -> JSONResponse:
        answer = face.refuse(429, str(error), "rate_limit_error", code="overloaded")
        answer.headers["Retry-After"] = str(error.retry_after_s)
        return answer

    @app.exception_handler(NotFinite)
    async def refuse_numbers(_: fastapi.Request, error: NotFinite) -> JSONResponse:
        return face.refuse(500, str(error), "server_error")

    @app.exception_handler(RunError)
    async def refuse_run(_: fastapi.Request, error: RunError) -> JSONResponse:
        return face.refuse(503, str(error), "server_error")

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        return face.refuse_validation(error)

    @app.exception_handler(ModelNotFound)
    async def refuse_model(_: fastapi.Request, error: ModelNotFound) -> JSONResponse:
        message, code = str(error.detail), "model_not_found"
        return face.refuse(404, message, "invalid_request_error", param="model", code=code)

    @app.exception_handler(HTTPException)
    async def refuse_http(_: fastapi.Request, error: HTTPException) -> JSONResponse:
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        answer = face.refuse(error.status_code, str(error.detail), kind)
        answer.headers.update(error.headers or {})
        return answer

    app.add_middleware(
        Gate,
        keys=config.api_keys,
        key_for_all=config.key_for_all,
        max_bytes=config.max_body_bytes,
        size_rule=face.bodies.size_rule,
        refuse=face.refuse,
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    describe(app, [CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest])
    return app


class _Face:
    """The handlers, apart from their routes."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: ApiConfig, metrics: Metrics):
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = metrics
        self.vocabulary = Vocabulary(tokenizer)
        self.templates = Templates(tokenizer)
        self.bodies = Bodies(max_bytes=config.max_body_bytes, max_length=config.max_length)
        self._most_characters = SLACK * config.max_length * self.vocabulary.longest()

    def close(self) -> None:
        """Ends the processes and threads that are not the engine's."""
        self.templates.close()
        self.bodies.close()

    # --- refusals -----------------------------------------------------------------------------

    def refuse(
        self,
        status: int,
        message: str,
        kind: str,
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> JSONResponse:
        """An answer of 400 or above."""
        self.metrics.refused.labels(str(status)).inc()
        # Lone surrogates may come back in values; they have no place in an answer.
        message = message.encode(errors="replace").decode()
        error = {"message": message, "type": kind, "param": param, "code": code}
        return JSONResponse({"error": error}, status)

    def refuse_validation(self, error: RequestValidationError) -> JSONResponse:
        """The first thing wrong with a body, in one line."""
        message, param = what_is_wrong(error.errors(), str(error.body))
        return self.refuse(400, message, "invalid_request_error", param=param)

    # --- endpoints ----------------------------------------------------------------------------

    async def completions(self, request: fastapi.Request) -> Response:
        body = await self.bodies.read(CompletionRequest, request)
        self._check_model(body.model)
        body.refuse_unimplemented()
        # Before the tokenizer is put to work.
        self.engine.admit(len(body.given()) * body.choices)
        most, asked = self.config.max_length, body.asked_tokens
        found = await asyncio.to_thread(body.prompts, self.tokenizer, self._most_characters)
        prompts = [body.cut(prompt, most - (asked or 1)) for prompt in found]
        max_tokens = asked or max(1, min(16, most - max(map(len, prompts))))
        sampling = body.sampling(
            self.tokenizer,
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=_most(body.prompt_logprobs, body.logprobs if body.echo else None),
        )
        shape = CompletionShape(self.config.model_name, self.vocabulary, body.logprobs is not None)
        return await self._answer(body, prompts, sampling, shape, request)

    async def chat(self, request: fastapi.Request) -> Response:
        body = await self.bodies.read(ChatRequest, request)
        self._check_model(body.model)
        body.refuse_unimplemented()
        if body.top_logprobs is not None and not body.logprobs:
            raise UsageError(
                f"top_logprobs={body.top_logprobs} needs logprobs=true; set it or leave both out"
            )
        self.engine.admit(body.choices)
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            if not self.templates.names("reasoning_effort"):
                raise UsageError("reasoning_effort is unknown to this model; leave it out")
            variables["reasoning_effort"] = body.reasoning_effort
        text = await self._rendered(body, variables)
        most, asked = self.config.max_length, body.asked_tokens
        prompt = await self._encoded(text, add_special=bool(body.add_special_tokens))
        prompt = body.cut(prompt, most - (asked or 1))
        sampling = body.sampling(
            self.tokenizer,
            max_tokens=asked or max(1, most - len(prompt)),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        shape = ChatShape(self.config.model_name, self.vocabulary, bool(body.logprobs))
        return await self._answer(body, [prompt], sampling, shape, request)

    async def tokenize(self, request: fastapi.Request) -> Tokens:
        body = await self.bodies.read(TokenizeRequest, request)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise UsageError("give a prompt or messages, one of them")
        add_special = body.add_special_tokens
        if body.messages is not None:
            chat = ChatRequest.model_construct(
                messages=body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
            )
            text = await self._rendered(chat, body.chat_template_kwargs or {})
            tokens = await self._encoded(text, add_special=bool(add_special))
        elif body.prompt:
            tokens = await self._encoded(body.prompt, add_special=add_special is not False)
        else:
            tokens = self.tokenizer.encode("", add_special=add_special is not False)
        names = None
        if body.return_token_strs:
            names = [self.tokenizer.backend.id_to_token(token) or "" for token in tokens]
        most = self.config.max_length
        return Tokens(count=len(tokens), max_model_len=most, tokens=tokens, token_strs=names)

    async def detokenize(self, request: fastapi.Request) -> Text:
        body = await self.bodies.read(DetokenizeRequest, request)
        self._check_model(body.model)
        tokens = check_tokens(self.tokenizer, body.tokens) if body.tokens else []
        text = await asyncio.to_thread(self.tokenizer.decode, tokens, skip_special=False)
        return Text(prompt=text)

    def _check_model(self, asked: str | None) -> None:
        if asked and asked != self.config.model_name:
            raise ModelNotFound(asked, self.config.model_name)

    async def _rendered(self, body: ChatRequest, variables: dict[str, Any]) -> str:
        messages = body.plain()
        text = await self.templates.render(
            messages, add_generation_prompt=body.opens_turn, variables=variables
        )
        return body.ended(text, messages)

    async def _encoded(self, text: str, *, add_special: bool) -> list[int]:
        return await asyncio.to_thread(
            encode,
            self.tokenizer,
            text,
            add_special=add_special,
            most_characters=self._most_characters,
        )

    async def _answer(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        sampling: SamplingParameters,
        shape: Shape,
        request: fastapi.Request,
    ) -> Response:
        check_sampling(sampling, self.tokenizer.vocab_size)
        choices = body.choices
        for prompt in prompts:
            self.engine.check(len(prompt), sampling.max_tokens)
        self.engine.admit(len(prompts) * choices)
        usage = Usage()
        answers: list[_Answer] = []
        for index in range(len(prompts) * choices):
            own = sampling if choices == 1 else replace(sampling, stream=index % choices)
            name = f"{shape.identity}-{index}" if len(prompts) * choices > 1 else shape.identity
            answer = _Answer(self, body, index, name, usage, counts=index % choices == 0)
            answers.append(answer)
            # Now, while they are admitted: once a stream has begun, none could be refused.
            answer.submit(prompts[index // choices], own)
        generations = [answer.generation for answer in answers]
        runs = [answer.run() for answer in answers]
        if body.stream:
            options = body.stream_options
            parts = self._stream(
                runs,
                shape,
                usage,
                include_usage=bool(options and options.include_usage),
                always=bool(options and options.continuous_usage_stats),
            )
            return _EventStream(parts, self.engine, generations)
        try:
            collected = await _unless_disconnected(
                request, asyncio.gather(*[_collect(run) for run in runs])
            )
        finally:
            for generation in generations:
                self.engine.leave(generation)
        if collected is None:
            return Response(status_code=499)  # nobody reads it
        for choice in collected:
            if choice.finish_reason == "error":
                raise _failure(choice.message)
        return JSONResponse(shape.whole(collected, usage.body(self.engine.energy_method)))

    async def _stream(
        self,
        runs: Sequence[AsyncGenerator[Choice, None]],
        shape: Shape,
        usage: Usage,
        *,
        include_usage: bool,
        always: bool,
    ) -> AsyncIterator[bytes]:
        for index in range(len(runs)):
            for first in shape.opening(index):
                yield event(first)
        try:
            async for choice in _merged(runs):
                if choice.finish_reason == "error":
                    raise _failure(choice.message)
                if choice.text or choice.tokens or choice.finish_reason or choice.prompt:
                    so_far = usage.body(self.engine.energy_method) if always else None
                    yield event(shape.increment(choice, so_far))
        except (RunError, UsageError) as error:
            # The status is out already: an error event is all that is left.
            body = {"message": str(error), "type": "server_error", "param": None, "code": None}
            yield event({"error": body})
            return
        if include_usage:
            yield event(shape.closing(usage.body(self.engine.energy_method)))
        yield b"data: [DONE]\n\n"


class _Answer:
    """One choice on its way: a request of the engine, and the text that comes of it."""

    generation: Generation

    def __init__(
        self,
        face: _Face,
        body: CompletionRequest | ChatRequest,
        index: int,
        name: str,
        usage: Usage,
        *,
        counts: bool,
    ):
        """
        Args:
            usage: of all choices.
            counts: whether the prompt is counted here.
        """
        self.face = face
        self.body = body
        self.index = index
        self.name = name
        self.usage = usage
        self.counts = counts
        self.tokens = 0
        """Tokens that were put out."""
        self._released: deque[list[Spoken]] = deque()
        """What became certain with each event that is on its way to `run`."""

    def submit(self, prompt: Sequence[int], sampling: SamplingParameters) -> None:
        """Begins the request; raises as `Engine.submit`."""
        body = self.body
        self._include_stop = bool(body.include_stop_str_in_output)
        self._skip_special = body.skip_special_tokens is not False
        self._text = TextStream(
            self.face.vocabulary,
            sampling.stop,
            prompt=prompt,
            skip_special=self._skip_special,
            include_stop=self._include_stop,
            min_tokens=sampling.min_tokens,
        )
        watch: Watch = self._watch
        self.generation = self.face.engine.submit(
            prompt, sampling, request_id=self.name, watch=watch
        )

    def _watch(self, event: TokenEvent) -> bool:
        """Takes a token in, as it reaches the engine's thread; whether the text ends with it."""
        assert event.token is not None
        # A token that ends the output is no text, unless it is asked for.
        if event.finish_reason != "stop" or self._include_stop:
            self._text.push(event.token, event.logprobs)
        self._released.append(self._text.take())
        return self._text.stopped

    async def run(self) -> AsyncGenerator[Choice, None]:
        """The choice's increments."""
        request, usage, text = self.generation.request, self.usage, self._text
        usage.prompt_tokens += request.prompt_length if self.counts else 0
        last: TokenEvent | None = None
        offset = 0
        events = self.face.engine.events(self.generation)
        async with contextlib.aclosing(events):
            async for event in events:
                spoken: list[Spoken] = []
                prompt = None
                if event.token is not None:
                    usage.completion_tokens += 1
                    self.tokens += 1
                    if self.tokens == 1:
                        spoken, prompt = self._prompt(request.prompt_tokens, event)
                    spoken += self._released.popleft()
                reason = event.finish_reason
                if last is None and self.counts:
                    usage.cached_tokens += event.request.cached_tokens
                last = event
                if reason is not None:
                    text.flush()
                    spoken += text.take()
                part = text_of(spoken)
                yield Choice(
                    self.index, part, spoken, reason, event.message, offset=offset, prompt=prompt
                )
                offset += len(part)
                if reason is not None:
                    break
        if last is not None:
            self._account(last)

    def _prompt(
        self, prompt: Sequence[int], event: TokenEvent
    ) -> tuple[list[Spoken], list[tuple[int, TokenLogprobs | None]] | None]:
        """What is said of the prompt before the first token: its text, its log-probabilities."""
        beside = event.prompt or [None] * len(prompt)
        spoken = []
        if isinstance(self.body, CompletionRequest) and self.body.echo:
            text = TextStream(self.face.vocabulary, skip_special=self._skip_special)
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


def _failure(message: str) -> RunError:
    if message == NOT_FINITE:
        return NotFinite(message)
    return RunError(message or "the request failed")


class _EventStream(StreamingResponse):
    """Server-sent events; the requests behind them end with it, even if it never began."""

    def __init__(
        self, parts: AsyncIterator[bytes], engine: Engine, generations: Sequence[Generation]
    ):
        headers = {"Cache-Control": "no-cache"}
        super().__init__(parts, media_type="text/event-stream", headers=headers)
        self._engine = engine
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generation in self._generations:
                self._engine.leave(generation)


async def _collect(run: AsyncIterator[Choice]) -> Choice:
    """All increments of a choice as one."""
    whole: Choice | None = None
    pieces: list[str] = []
    async for part in run:
        pieces.append(part.text)
        if whole is None:
            whole = part
        else:
            whole.tokens += part.tokens
            whole.finish_reason, whole.message = part.finish_reason, part.message
    assert whole is not None
    whole.text = "".join(pieces)
    return whole


async def _merged(runs: Sequence[AsyncGenerator[Choice, None]]) -> AsyncIterator[Choice]:
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


async def _unless_disconnected(request: fastapi.Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None (and `work` cancelled) once the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def _most(*counts: int | None) -> int | None:
    """The largest of those that are asked for."""
    return max((count for count in counts if count is not None), default=None)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
