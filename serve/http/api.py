"""The HTTP face: OpenAI's completions and chats, models, health and metrics, as a FastAPI app.

Every refusal is a 4xx (or a deliberate 503) whose body says the value, the rule and the way out. A
client that goes away ends its request in the engine.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxsys import __version__
from jaxsys.errors import RunError, UsageError
from jaxsys.model import Tokenizer
from jaxsys.serve.engine import Engine, Generation, Overloaded
from jaxsys.serve.executor import TokenLogprobs, check_sampling
from jaxsys.serve.http.metrics import Metrics
from jaxsys.serve.http.protocol import (
    ChatRequest,
    CompletionRequest,
    ErrorAnswer,
    Model,
    ModelList,
    what_is_wrong,
)
from jaxsys.serve.http.text_stream import TextStream
from jaxsys.serve.member import TokenEvent
from jaxsys.serve.requests import FinishReason, SamplingParameters

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """What the HTTP face needs to know beside the engine."""

    model_name: str
    max_length: int
    """Most tokens of a request, prompt and output."""
    api_keys: frozenset[str] = frozenset()
    """Keys that are let in; without any, everybody is."""
    max_body_bytes: int = 8 << 20


class NotFinite(RunError):
    """The model computed NaN or infinity."""


@dataclass(slots=True)
class Choice:
    """One choice of an answer, complete or as far as it has come."""

    index: int
    text: str
    tokens: list[tuple[int, TokenLogprobs | None]]
    finish_reason: FinishReason | None = None
    message: str = ""


@dataclass(slots=True)
class Usage:
    """What a request took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    energy_j: float | None = None

    def body(self, method: str) -> dict[str, Any]:
        """As OpenAI's `usage`, with energy beside it where it is known."""
        body: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.energy_j is not None:
            body["energy_j"] = round(self.energy_j, 6)
            body["energy_method"] = method
        return body


def create_app(
    engine: Engine, tokenizer: Tokenizer, config: ApiConfig, metrics: Metrics
) -> fastapi.FastAPI:
    """The application; `engine` must be started on the same event loop."""
    app = fastapi.FastAPI(
        title="jaxsys",
        version=__version__,
        description="OpenAI-compatible completions over a JAX decode server.",
        # 4xx and 503 answers share one body, so the description says so everywhere.
        responses={
            status: {"model": ErrorAnswer} for status in (400, 401, 404, 405, 413, 422, 429, 503)
        },
    )
    created_s = int(time.time())
    face = _Face(engine, tokenizer, config, metrics)

    streams: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    }

    @app.post("/v1/completions", responses=streams)
    async def completions(body: CompletionRequest, request: fastapi.Request) -> Response:
        return await face.completions(body, request)

    @app.post("/v1/chat/completions", responses=streams)
    async def chat(body: ChatRequest, request: fastapi.Request) -> Response:
        return await face.chat(body, request)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(
            data=[Model(id=config.model_name, created=created_s, max_model_len=config.max_length)]
        )

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

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(UsageError)
    async def refuse_usage(_: fastapi.Request, error: UsageError) -> JSONResponse:
        return face.refuse(400, str(error), "invalid_request_error")

    @app.exception_handler(Overloaded)
    async def refuse_load(_: fastapi.Request, error: Overloaded) -> JSONResponse:
        answer = face.refuse(429, str(error), "rate_limit_error", code="overloaded")
        answer.headers["Retry-After"] = str(error.retry_after_s)
        return answer

    @app.exception_handler(Exception)
    async def confess(_: fastapi.Request, error: Exception) -> JSONResponse:
        # The server logs the traceback.
        return face.refuse(500, f"the server is at fault: {type(error).__name__}", "server_error")

    @app.exception_handler(NotFinite)
    async def refuse_numbers(_: fastapi.Request, error: NotFinite) -> JSONResponse:
        return face.refuse(500, str(error), "server_error")

    @app.exception_handler(RunError)
    async def refuse_run(_: fastapi.Request, error: RunError) -> JSONResponse:
        return face.refuse(503, str(error), "server_error")

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        return face.refuse_validation(error)

    @app.exception_handler(HTTPException)
    async def refuse_http(_: fastapi.Request, error: HTTPException) -> JSONResponse:
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        answer = face.refuse(error.status_code, str(error.detail), kind)
        answer.headers.update(error.headers or {})
        return answer

    app.add_middleware(_Gate, config=config, refuse=face.refuse)
    return app


class _Face:
    """The handlers, apart from their routes."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: ApiConfig, metrics: Metrics):
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = metrics

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
        error = {"message": message, "type": kind, "param": param, "code": code}
        return JSONResponse({"error": error}, status)

    def refuse_validation(self, error: RequestValidationError) -> JSONResponse:
        """The first thing wrong with a body, in one line."""
        message, param = what_is_wrong(error.errors())
        return self.refuse(400, message, "invalid_request_error", param=param)

    # --- endpoints ----------------------------------------------------------------------------

    async def completions(self, body: CompletionRequest, request: fastapi.Request) -> Response:
        self._check(body)
        prompts = await asyncio.to_thread(body.prompts, self.tokenizer)
        max_tokens = body.max_tokens or 16
        sampling = body.sampling(self.tokenizer, max_tokens=max_tokens, logprobs=body.logprobs)
        shape = _CompletionShape(self.config.model_name, self.tokenizer, body.logprobs is not None)
        return await self._answer(body, prompts, sampling, shape, request)

    async def chat(self, body: ChatRequest, request: fastapi.Request) -> Response:
        self._check(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise UsageError(
                f"top_logprobs={body.top_logprobs} needs logprobs=true; set it or leave both out"
            )
        prompt = await asyncio.to_thread(body.prompt, self.tokenizer)
        asked = body.max_completion_tokens or body.max_tokens
        max_tokens = asked or max(1, self.config.max_length - len(prompt))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = body.sampling(self.tokenizer, max_tokens=max_tokens, logprobs=logprobs)
        shape = _ChatShape(self.config.model_name, self.tokenizer, bool(body.logprobs))
        return await self._answer(body, [prompt], sampling, shape, request)

    def _check(self, body: CompletionRequest | ChatRequest) -> None:
        if body.model and body.model != self.config.model_name:
            message = f"model {body.model!r} is not served; use {self.config.model_name!r}"
            raise HTTPException(404, message)
        body.refuse_unimplemented()

    async def _answer(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        sampling: SamplingParameters,
        shape: "_CompletionShape | _ChatShape",
        request: fastapi.Request,
    ) -> Response:
        check_sampling(sampling, self.tokenizer.vocab_size)
        choices = body.n or 1
        for prompt in prompts:
            self.engine.check(len(prompt), sampling.max_tokens)
        self.engine.admit(len(prompts) * choices)
        usage = Usage()
        generations: list[Generation] = []
        runs = []
        for index in range(len(prompts) * choices):
            prompt = prompts[index // choices]
            own = sampling
            if sampling.seed is not None and choices > 1:
                own = replace(sampling, seed=sampling.seed + index % choices)
            name = f"{shape.identity}-{index}" if len(prompts) * choices > 1 else shape.identity
            # Now, while they are admitted: once a stream has begun, none could be refused.
            generation = self.engine.submit(prompt, own, request_id=name)
            generations.append(generation)
            runs.append(self._run(name, index, generation, usage, count=index % choices == 0))
        if body.stream:
            options = body.stream_options
            include_usage = options is not None and options.include_usage
            parts = self._stream(runs, shape, usage, include_usage)
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
                raise RunError(choice.message or "the request failed")
        return JSONResponse(shape.whole(collected, usage.body(self._method)))

    @property
    def _method(self) -> str:
        return self.engine.energy_method

    async def _run(
        self,
        name: str,
        index: int,
        generation: Generation,
        usage: Usage,
        *,
        count: bool,
    ) -> AsyncGenerator[Choice, None]:
        """One choice's increments."""
        request = generation.request
        text = TextStream(self.tokenizer, request.sampling.stop)
        usage.prompt_tokens += request.prompt_length if count else 0
        last: TokenEvent | None = None
        events = self.engine.events(generation)
        async with contextlib.aclosing(events):
            async for event in events:
                last = event
                tokens = []
                piece = ""
                reason = event.finish_reason
                if event.token is not None and not text.stopped:
                    if event.logprobs is not None and not _finite(event.logprobs):
                        raise NotFinite("the model's outputs are not finite")
                    usage.completion_tokens += 1
                    tokens = [(event.token, event.logprobs)]
                    if reason == "stop":  # the end-of-text token is no text
                        tokens = []
                    else:
                        piece = text.push(event.token)
                if reason is not None:
                    piece += text.flush()
                if text.stopped:
                    reason = "stop"
                yield Choice(index, piece, tokens, reason, event.message)
                if reason is not None:
                    break
        if last is not None:
            timing = last.request.timing
            if count:
                usage.cached_tokens += last.request.cached_tokens
            if timing.energy_j is not None:
                usage.energy_j = (usage.energy_j or 0.0) + timing.energy_j
            logger.info(
                "request",
                extra={
                    "request_id": name,
                    "prompt_tokens": request.prompt_length,
                    "cached_tokens": last.request.cached_tokens,
                    "output_tokens": last.request.generated,
                    "finish_reason": "stop" if text.stopped else last.finish_reason,
                    "ttft_s": _rounded(timing.ttft_s),
                    "total_s": _rounded(last.time_s - timing.arrival_s),
                    "preemptions": timing.preemptions,
                    "energy_j": _rounded(timing.energy_j),
                },
            )

    async def _stream(
        self,
        runs: Sequence[AsyncGenerator[Choice, None]],
        shape: "_CompletionShape | _ChatShape",
        usage: Usage,
        include_usage: bool,
    ) -> AsyncIterator[bytes]:
        for index in range(len(runs)):
            for first in shape.opening(index):
                yield _event(first)
        try:
            async for choice in _merged(runs):
                if choice.finish_reason == "error":
                    raise RunError(choice.message or "the request failed")
                if choice.text or choice.tokens or choice.finish_reason:
                    yield _event(shape.increment(choice))
        except (RunError, UsageError) as error:
            # The status is out already: an error event is all that is left.
            yield _event({"error": {"message": str(error), "type": "server_error"}})
            return
        if include_usage:
            yield _event(shape.closing(usage.body(self._method)))
        yield b"data: [DONE]\n\n"


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


class _Shape:
    """How answers of one endpoint look."""

    prefix = ""
    object_name = ""
    stream_object = ""

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool):
        self.identity = f"{self.prefix}-{uuid.uuid4().hex}"
        self.tokenizer = tokenizer
        self.logprobs = logprobs
        self._head = {"id": self.identity, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer at once."""
        return {
            **self._head,
            "object": self.object_name,
            "choices": [self._choice(choice, whole=True) for choice in choices],
            "usage": usage,
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def increment(self, choice: Choice) -> dict[str, Any]:
        """One event of a stream."""
        return {
            **self._head,
            "object": self.stream_object,
            "choices": [self._choice(choice, whole=False)],
        }

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last event where usage was asked for."""
        return {**self._head, "object": self.stream_object, "choices": [], "usage": usage}

    def _choice(self, choice: Choice, *, whole: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)


class _CompletionShape(_Shape):
    prefix, object_name, stream_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, choice: Choice, *, whole: bool) -> dict[str, Any]:
        logprobs = None
        if self.logprobs:
            given = [(token, entry) for token, entry in choice.tokens if entry is not None]
            texts = [self._token_text(token) for token, _ in given]
            offsets = [sum(map(len, texts[:at])) for at in range(len(texts))]
            logprobs = {
                "tokens": texts,
                "token_logprobs": [entry.logprob for _, entry in given],
                "text_offset": offsets,
                "top_logprobs": [
                    {
                        self._token_text(token): value
                        for token, value in zip(entry.top_tokens, entry.top_logprobs, strict=True)
                    }
                    for _, entry in given
                ],
            }
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }


class _ChatShape(_Shape):
    prefix, object_name, stream_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [{**self._head, "object": self.stream_object, "choices": [choice]}]

    def _choice(self, choice: Choice, *, whole: bool) -> dict[str, Any]:
        logprobs = None
        if self.logprobs:
            logprobs = {
                "content": [
                    {
                        **self._entry(token, entry.logprob),
                        "top_logprobs": [
                            self._entry(other, value)
                            for other, value in zip(
                                entry.top_tokens, entry.top_logprobs, strict=True
                            )
                        ],
                    }
                    for token, entry in choice.tokens
                    if entry is not None
                ]
            }
        content: dict[str, Any] = {"content": choice.text}
        if whole:
            body: dict[str, Any] = {"message": {"role": "assistant", **content}}
        else:
            body = {"delta": content if choice.text else {}}
        return {
            "index": choice.index,
            **body,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class _Gate:
    """Keys and body sizes, before anything is parsed."""

    def __init__(self, app: ASGIApp, *, config: ApiConfig, refuse: Callable[..., JSONResponse]):
        self.app = app
        self.config = config
        self.refuse = refuse
        self.keys = [key.encode() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.keys and not self._known(headers.get(b"authorization", b"")):
            message = "a known key is needed; send it as `Authorization: Bearer KEY`"
            answer = self.refuse(401, message, "authentication_error", code="invalid_api_key")
            answer.headers["WWW-Authenticate"] = "Bearer"
            await answer(scope, receive, send)
            return
        most = self.config.max_body_bytes
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            await self._too_large(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, self._size_rule())
            return message

        await self.app(scope, counted, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.refuse(413, self._size_rule(), "invalid_request_error")
        answer.headers["Connection"] = "close"
        await answer(scope, receive, send)

    def _size_rule(self) -> str:
        return f"the body exceeds {self.config.max_body_bytes} bytes; send a shorter prompt"

    def _known(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        # Every key is compared, in constant time, so that timing tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        return scheme.lower() == b"bearer" and any(matches)


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


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode(errors="replace") + b"\n\n"


def _finite(logprobs: TokenLogprobs) -> bool:
    return all(map(math.isfinite, (logprobs.logprob, *logprobs.top_logprobs)))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
