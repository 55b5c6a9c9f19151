"""The HTTP face: OpenAI's completions and chats, models, health and metrics, as a FastAPI app.

Every refusal is a 4xx (or a deliberate 503) whose body says the value, the rule and the way out. A
client that goes away ends its request in the engine. Each token becomes text as it arrives, before
anything counts it: where the text ends, so does the request, and nothing computed ahead is seen.
"""

import asyncio
import functools
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import fastapi
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
)
from starlette.routing import Route

from jaxsys import __version__
from jaxsys.errors import RunError, UsageError
from jaxsys.model import Tokenizer
from jaxsys.serve.engine import Engine
from jaxsys.serve.grammars import Grammars
from jaxsys.serve.http import lora_adapters
from jaxsys.serve.http.answers import ChatShape, Choice, CompletionShape, Shape, Usage, event
from jaxsys.serve.http.bodies import Bodies
from jaxsys.serve.http.choice_run import ChoiceRun, Reads, all_of, failure_of, merged
from jaxsys.serve.http.description import body_of, describe, page
from jaxsys.serve.http.embeddings import AT_ONCE, EmbeddingRequest, entry
from jaxsys.serve.http.gate import Gate
from jaxsys.serve.http.lora_adapters import LoadAdapterRequest, UnloadAdapterRequest
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
    session_of,
)
from jaxsys.serve.http.refusals import ModelNotFound, refuse_all
from jaxsys.serve.http.response_shape import ResponseShape
from jaxsys.serve.http.responses import (
    KeptTurns,
    OwnTurns,
    ResponseRequest,
    as_asked,
    head_of,
    items_of,
)
from jaxsys.serve.http.templates import Templates, history_forms
from jaxsys.serve.http.tool_bodies import ToolUse, tool_use
from jaxsys.serve.http.tools import Marks, Reader, Thinking, format_of, told
from jaxsys.serve.http.vocabulary import Vocabulary
from jaxsys.serve.http.waiting import EventStream, perhaps_apart, unless_disconnected
from jaxsys.serve.request_rules import check_sampling
from jaxsys.serve.requests import (
    ContextLengthExceeded,
    FieldRefused,
    SamplingParameters,
    about,
)

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
    tool_format: str = "auto"
    """How the model calls tools, as `tools.FORMATS` has it; "auto" goes by its chat template."""
    max_body_bytes: int = 8 << 20
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What the model's makers sample with, for requests that do not say."""
    lora_updates: bool = False
    """Whether adapters are loaded and unloaded on demand."""
    created_s: float = field(default_factory=time.time)
    """When the model began to be served, as the list of models says it."""


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    config: ApiConfig,
    metrics: Metrics,
    *,
    exposition: Callable[[], Awaitable[bytes]] | None = None,
    turns: KeptTurns | None = None,
) -> fastapi.FastAPI:
    """The application; `engine` must be started on the same event loop.

    `app.state.close()` ends what it has started beside the engine.

    Args:
        metrics: counts what happens here.
        exposition: what `/metrics` shows, where there is more than that.
        turns: where `/v1/responses` keeps its turns; None: here.
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
    face = _Face(engine, tokenizer, config, metrics, turns or OwnTurns())
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

    @app.post("/v1/responses", responses=streams, openapi_extra=body_of(ResponseRequest))
    async def responses(request: fastapi.Request) -> Response:
        return await face.responses(request)

    @app.post("/v1/embeddings", openapi_extra=body_of(EmbeddingRequest))
    async def embeddings(request: fastapi.Request) -> Response:
        return await face.embeddings(request)

    @app.get("/v1/responses/{name}")
    async def response(name: str) -> JSONResponse:
        return JSONResponse(face.turns.get(name))

    @app.delete("/v1/responses/{name}")
    async def forget_response(name: str) -> JSONResponse:
        face.turns.forget(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    @app.get("/v1/responses/{name}/input_items")
    async def input_items(name: str) -> JSONResponse:
        found = face.turns.inputs(name)
        ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]} if found else {}
        return JSONResponse({"object": "list", "data": found, "has_more": False, **ends})

    def served() -> list[Model]:
        one = Model(
            id=config.model_name, created=int(config.created_s), max_model_len=config.max_length
        )
        adapted = [
            one.model_copy(
                update={
                    "id": adapter.name,
                    "created": int(adapter.created_s),
                    "root": adapter.folder,
                    "parent": config.model_name,
                }
            )
            for adapter in engine.adapters
        ]
        return [one, *adapted]

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=served())

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Model:
        found = {one.id: one for one in served()}
        if name not in found:
            raise ModelNotFound(name, list(found))
        return found[name]

    @app.post("/v1/load_lora_adapter", openapi_extra=body_of(LoadAdapterRequest))
    async def load_adapter(request: fastapi.Request) -> Response:
        lora_adapters.check_allowed(config.lora_updates)
        body = await face.bodies.read(LoadAdapterRequest, request)
        return await lora_adapters.load(engine.adapters, body, config.model_name)

    @app.post("/v1/unload_lora_adapter", openapi_extra=body_of(UnloadAdapterRequest))
    async def unload_adapter(request: fastapi.Request) -> Response:
        lora_adapters.check_allowed(config.lora_updates)
        body = await face.bodies.read(UnloadAdapterRequest, request)
        return await lora_adapters.unload(engine.adapters, body)

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
        text = metrics.text() if exposition is None else await exposition()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))

    refuse_all(app, face.refuse)

    # Those asked most, before FastAPI's own of the same, which stay for the description: they take
    # the request as it is, and need none of its dependencies.
    for path, handler in (
        ("/v1/completions", face.completions),
        ("/v1/chat/completions", face.chat),
        ("/v1/responses", face.responses),
    ):
        app.router.routes.insert(0, Route(path, handler, methods=["POST"], include_in_schema=False))

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
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    describe(
        app,
        [
            CompletionRequest,
            ChatRequest,
            ResponseRequest,
            EmbeddingRequest,
            TokenizeRequest,
            DetokenizeRequest,
            LoadAdapterRequest,
            UnloadAdapterRequest,
        ],
    )
    return app


class _Face:
    """The handlers, apart from their routes."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        config: ApiConfig,
        metrics: Metrics,
        turns: KeptTurns,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = metrics
        self.vocabulary = Vocabulary(tokenizer)
        self.templates = Templates(tokenizer)
        self.tool_format = format_of(tokenizer.template_for(()), config.tool_format)
        self.marks = Marks(tokenizer)
        self.turns = turns
        self.grammars = engine.grammars or Grammars(tokenizer, tokenizer.vocab_size)
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

    # --- endpoints ----------------------------------------------------------------------------

    async def completions(self, request: fastapi.Request) -> Response:
        body = await self.bodies.read(CompletionRequest, request)
        model, adapter = self._model(body.model)
        body.refuse_unimplemented()
        # Before the tokenizer is put to work.
        self.engine.admit(len(body.given()) * body.choices)
        most, asked = self.config.max_length, body.asked_tokens
        work = functools.partial(body.prompts, self.tokenizer, self._most_characters)
        found = await perhaps_apart(work, sum(map(len, body.given())))
        prompts = [body.cut(prompt, most - (asked or 1)) for prompt in found]
        max_tokens = asked or max(1, min(16, most - max(map(len, prompts))))
        sampling = body.sampling(
            self.tokenizer,
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=_most(body.prompt_logprobs, body.logprobs if body.echo else None),
            grammar=await self._ready(body.asked_grammar(), body.grammar_field),
            defaults=self.config.sampling,
        )
        shape = CompletionShape(model, self.vocabulary, body.logprobs is not None)
        return await self._answer(body, prompts, sampling, shape, request, adapter=adapter)

    async def chat(self, request: fastapi.Request) -> Response:
        body = await self.bodies.read(ChatRequest, request)
        model, adapter = self._model(body.model)
        prompt, sampling, reads = await self._of_chat(body)
        shape = ChatShape(model, self.vocabulary, bool(body.logprobs))
        return await self._answer(body, [prompt], sampling, shape, request, reads, adapter=adapter)

    async def _of_chat(self, body: ChatRequest) -> tuple[list[int], SamplingParameters, Reads]:
        """A chat's prompt, and how its answer is chosen and read."""
        body.refuse_unimplemented()
        if body.top_logprobs is not None and not body.logprobs:
            raise FieldRefused(
                f"top_logprobs={body.top_logprobs} needs logprobs=true; set it or leave both out",
                "top_logprobs",
            )
        self.engine.admit(body.choices)
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            if not self.templates.names("reasoning_effort"):
                raise FieldRefused(
                    "reasoning_effort is unknown to this model; leave it out", "reasoning_effort"
                )
            variables["reasoning_effort"] = body.reasoning_effort
        use = body.tool_use()
        text = await self._rendered(body, variables, use)
        reads = self._reads(body, use, text)
        most, asked = self.config.max_length, body.asked_tokens
        prompt = await self._encoded(text, add_special=bool(body.add_special_tokens))
        prompt = body.cut(prompt, most - (asked or 1))
        sampling = body.sampling(
            self.tokenizer,
            max_tokens=asked or max(1, most - len(prompt)),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            grammar=await self._ready(reads.grammar, body.grammar_field),
            defaults=self.config.sampling,
        )
        return prompt, sampling, reads

    async def responses(self, request: fastapi.Request) -> Response:
        asked = await self.bodies.read(ResponseRequest, request)
        model, adapter = self._model(asked.model)
        asked.refuse()
        own = items_of(asked.input)
        items = self.turns.conversation(asked.previous_response_id, own)
        with as_asked():
            body = asked.chat(items)
            prompt, sampling, reads = await self._of_chat(body)

        def keep(response: dict[str, Any]) -> None:
            if asked.store is not False:
                self.turns.keep(response, own, items)

        head = head_of(asked, model, asked.tool_choice)
        logprobs = bool(body.logprobs)
        shape = ResponseShape(model, self.vocabulary, head, keep, logprobs)
        return await self._answer(body, [prompt], sampling, shape, request, reads, adapter=adapter)

    async def embeddings(self, request: fastapi.Request) -> Response:
        body = await self.bodies.read(EmbeddingRequest, request)
        model, adapter = self._model(body.model)
        most = self.config.max_length
        prompts = await asyncio.to_thread(body.prompts, self.tokenizer, self._most_characters, most)
        for index, prompt in enumerate(prompts):
            try:
                self.engine.check(len(prompt), 0)
            except ContextLengthExceeded as error:
                said = str(error).removeprefix("prompt")
                raise ContextLengthExceeded(body.name(index) + said) from None
        sampling = SamplingParameters(max_tokens=1, temperature=0, pooling=body.pooling or "mean")
        identity = f"embd-{uuid.uuid4().hex}"
        free = asyncio.Semaphore(AT_ONCE)

        async def embed(index: int, prompt: list[int]) -> list[float]:
            async with free:
                name = f"{identity}-{index}"
                async for event in self.engine.generate(
                    prompt, sampling, request_id=name, adapter=adapter
                ):
                    if event.finish_reason == "error":
                        raise failure_of(event.message)
                    if event.embedding is not None:
                        return event.embedding
            raise RunError("the server is shutting down; use another one")

        async def all_of_them() -> list[list[float]]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(embed(*one)) for one in enumerate(prompts)]
            return [task.result() for task in tasks]

        try:
            vectors = await unless_disconnected(request, all_of_them())
        except* (RunError, UsageError) as errors:
            raise errors.exceptions[0] from None
        if vectors is None:
            return Response(status_code=499)  # nobody reads it
        wide = len(vectors[0])
        if body.dimensions not in (None, wide):
            raise FieldRefused(
                f"dimensions={body.dimensions} is not implemented: vectors of this model have "
                f"{wide}; leave it out",
                "dimensions",
            )
        total = sum(map(len, prompts))
        return JSONResponse(
            {
                "object": "list",
                "model": model,
                "data": [
                    entry(index, vector, body.encoding_format)
                    for index, vector in enumerate(vectors)
                ],
                "usage": {"prompt_tokens": total, "total_tokens": total},
                "pooling": sampling.pooling,
            }
        )

    def _reads(self, body: ChatRequest, use: ToolUse, prompt: str) -> Reads:
        """How an answer to a rendered chat is written and taken apart."""
        form, template = self.tool_format, self.tokenizer.template_for(use.tools or None) or ""
        going_on = bool(body.continue_final_message)
        thinking: Thinking = "no" if going_on else form.thinking(template, prompt)
        answer = body.asked_grammar()
        grammar = answer
        if not going_on:
            grammar = form.grammar(self.marks, use.writing(answer), thinking, template)
        elif use.needed:
            raise FieldRefused(
                "continue_final_message goes on with text; leave tool_choice out", "tool_choice"
            )
        if going_on or (not use.callable and thinking == "no"):
            return Reads(grammar)
        # One call only: what comes behind it, marks of a grammar too, is not waited for.
        most = None if use.many else 1

        def reader() -> Reader:
            made = form.reader(use.callable, thinking)
            made.must_call = use.needed
            return made

        return Reads(grammar, reader, most, use.named)

    async def tokenize(self, request: fastapi.Request) -> Tokens:
        body = await self.bodies.read(TokenizeRequest, request)
        self._model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise FieldRefused("give a prompt or messages, one of them", "prompt")
        add_special = body.add_special_tokens
        if body.messages is not None:
            chat = ChatRequest.model_construct(
                messages=body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
            )
            use = tool_use(body.tools, None, None)
            text = await self._rendered(chat, body.chat_template_kwargs or {}, use)
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
        self._model(body.model)
        tokens = check_tokens(self.tokenizer, body.tokens, "tokens") if body.tokens else []
        text = await asyncio.to_thread(self.tokenizer.decode, tokens, skip_special=False)
        return Text(prompt=text)

    def _model(self, asked: str | None) -> tuple[str, str | None]:
        """What is asked for, and if that is an adapter, its name."""
        own = self.config.model_name
        if not asked or asked == own:
            return own, None
        adapters = self.engine.adapters
        if adapters.get(asked) is None:
            raise ModelNotFound(asked, [own, *(one.name for one in adapters)])
        return asked, asked

    async def _rendered(
        self, body: ChatRequest, variables: dict[str, Any], use: ToolUse | None = None
    ) -> str:
        messages = body.plain()
        tools = [tool.source for tool in use.tools] if use is not None and use.tools else None
        told_messages = messages
        if self.tool_format.name == "plain":
            told_messages, tools = told(messages, tools or ()), None
        refusal: UsageError | None = None
        for form in history_forms(told_messages, self.tool_format.id_length):
            try:
                text = await self.templates.render(
                    form, add_generation_prompt=body.opens_turn, variables=variables, tools=tools
                )
            except UsageError as error:
                refusal = refusal or error
            else:
                return body.ended(text, messages)
        assert refusal is not None
        with about("messages"):
            raise refusal

    async def _encoded(self, text: str, *, add_special: bool) -> list[int]:
        work = functools.partial(
            encode,
            self.tokenizer,
            text,
            add_special=add_special,
            most_characters=self._most_characters,
        )
        return await perhaps_apart(work, len(text))

    async def _ready(self, grammar: str | None, field: str) -> str | None:
        """The grammar of an answer, made ready; None where it is free.

        Args:
            field: of the body, that it came of.
        """
        if grammar is not None:
            with about(field):
                await asyncio.to_thread(self.grammars.prepare, grammar)
        return grammar

    async def _answer(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        sampling: SamplingParameters,
        shape: Shape,
        request: fastapi.Request,
        reads: Reads | None = None,
        *,
        adapter: str | None = None,
    ) -> Response:
        check_sampling(sampling, self.tokenizer.vocab_size)
        choices = body.choices
        for prompt in prompts:
            self.engine.check(len(prompt), sampling.max_tokens)
        self.engine.admit(len(prompts) * choices)
        session = session_of(body, request.headers.get("x-session-id"))
        usage = Usage()
        answers: list[ChoiceRun] = []
        for index in range(len(prompts) * choices):
            own = sampling if choices == 1 else replace(sampling, stream=index % choices)
            name = f"{shape.identity}-{index}" if len(prompts) * choices > 1 else shape.identity
            counts = index % choices == 0
            answer = ChoiceRun(
                self.engine, self.vocabulary, body, index, name, usage, reads, counts=counts
            )
            answers.append(answer)
            # Now, while they are admitted: once a stream has begun, none could be refused.
            answer.submit(prompts[index // choices], own, adapter, session)
        generations = [answer.generation for answer in answers]
        if body.stream:
            options = body.stream_options
            parts = self._stream(
                [answer.run() for answer in answers],
                shape,
                usage,
                include_usage=bool(options and options.include_usage),
                always=bool(options and options.continuous_usage_stats),
            )
            return EventStream(parts, self.engine, generations)
        try:
            collected = await unless_disconnected(request, all_of(answers))
        finally:
            for generation in generations:
                self.engine.leave(generation)
        if collected is None:
            return Response(status_code=499)  # nobody reads it
        for choice in collected:
            if choice.finish_reason == "error":
                raise failure_of(choice.message)
        return JSONResponse(shape.whole(collected, usage, self.engine.energy_method))

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
            async for choice in merged(runs):
                if choice.finish_reason == "error":
                    raise failure_of(choice.message)
                says = choice.text or choice.tokens if choice.said is None else choice.said
                if (
                    says
                    or choice.finish_reason
                    or choice.prompt
                    or (shape.logprobs and choice.tokens)
                ):
                    if not always and (line := shape.line(choice)) is not None:
                        yield line
                        continue
                    so_far = usage.body(self.engine.energy_method) if always else None
                    for one in shape.increments(choice, so_far):
                        yield event(one)
        except (RunError, UsageError) as error:
            # The status is out already: an error event is all that is left.
            for one in shape.failure(str(error)):
                yield event(one)
            return
        for one in shape.ending(usage, self.engine.energy_method, include_usage):
            yield event(one)
        yield b"data: [DONE]\n\n"


def _most(*counts: int | None) -> int | None:
    """The largest of those that are asked for."""
    return max((count for count in counts if count is not None), default=None)
