"""The OpenAI request bodies that the server understands, and what it makes of them.

Fields that would change the answer and are not implemented are refused, never ignored; fields that
only describe the caller (`user`, `metadata`, ...) are ignored.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxsys.errors import UsageError
from jaxsys.model import Tokenizer
from jaxsys.serve.requests import SamplingParameters

MAX_CHOICES = 16
MAX_STOPS = 4


class StreamOptions(pydantic.BaseModel):
    """`stream_options`."""

    include_usage: bool = False


class _Sampled(pydantic.BaseModel):
    """What both endpoints share."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=False)

    model: str = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # Beyond OpenAI's fields, as vLLM and SGLang name them.
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = 1.0
    ignore_eos: bool | None = False
    # Not implemented: refused where they ask for anything.
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def refuse_unimplemented(self) -> None:
        """Raises UsageError for fields that would change the answer."""
        asked = {
            "tools": bool(self.tools),
            "functions": bool(self.functions),
            "response_format": bool(self.response_format)
            and (self.response_format or {}).get("type") != "text",
            "best_of": self.best_of not in (None, self.n, 1),
            "echo": bool(self.echo),
            "suffix": bool(self.suffix),
        }
        for name, value in asked.items():
            if value:
                raise UsageError(f"{name} is not implemented; leave it out")

    def sampling(
        self, tokenizer: Tokenizer, *, max_tokens: int, logprobs: int | None
    ) -> SamplingParameters:
        """The parameters of one choice."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if any(not stop for stop in stops):
            raise UsageError("stop holds an empty string; leave it out")
        bias: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise UsageError(f"logit_bias key {key!r} is no token id")
            bias[int(key)] = value
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed={self.seed} must fit 64 bits")

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return SamplingParameters(
            max_tokens=max_tokens,
            temperature=given(self.temperature, 1.0),
            top_k=max(0, given(self.top_k, 0)),
            top_p=given(self.top_p, 1.0),
            min_p=given(self.min_p, 0.0),
            seed=self.seed,
            repetition_penalty=given(self.repetition_penalty, 1.0),
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            logit_bias=bias,
            stop=tuple(stops),
            stop_token_ids=frozenset() if self.ignore_eos else frozenset(tokenizer.eos_ids),
            logprobs=logprobs,
        )


TokenId = Annotated[pydantic.StrictInt, Field(ge=0)]


class CompletionRequest(_Sampled):
    """Body of `/v1/completions`."""

    # Strict: true and 1.0 are no token ids.
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The prompts as tokens."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise UsageError("prompt is an empty list; give a text or token ids")
        if len(prompt) * (self.n or 1) > MAX_CHOICES:
            raise UsageError(
                f"{len(prompt)} prompts times n={self.n} exceed {MAX_CHOICES}; send fewer at once"
            )
        return [
            encode(tokenizer, one) if isinstance(one, str) else check_tokens(tokenizer, one)
            for one in prompt
        ]


class TextPart(pydantic.BaseModel):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Message(pydantic.BaseModel):
    """One turn of a chat."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise UsageError(
                        f"a message part of type {part.type!r} is not understood; use text"
                    )
            content = "".join(part.text or "" for part in content)
        return {"role": self.role, "content": content or ""}


class ChatRequest(_Sampled):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompt(self, tokenizer: Tokenizer) -> list[int]:
        """The chat as tokens."""
        messages = [message.plain() for message in self.messages]
        check_text("".join(message["content"] + message["role"] for message in messages))
        return tokenizer.encode_chat(messages)


class Model(pydantic.BaseModel):
    """An entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jaxsys"
    max_model_len: int


class ModelList(pydantic.BaseModel):
    """Answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(pydantic.BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(pydantic.BaseModel):
    """Body of every answer of 400 and above."""

    error: ErrorBody


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt's text as tokens.

    Raises:
        UsageError: if there is nothing in it, or it is no valid text.
    """
    check_text(text)
    tokens = tokenizer.encode(text)
    if not tokens:
        raise UsageError("the prompt is empty; give at least one token")
    return tokens


def check_text(text: str) -> None:
    """Raises UsageError for text that has no UTF-8 form (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is no valid Unicode: {error.reason} at {error.start}") from None


def check_tokens(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Raises UsageError for ids the model does not have."""
    if not tokens:
        raise UsageError("the prompt is empty; give at least one token")
    vocabulary = tokenizer.vocab_size
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise UsageError(f"token id {token} is none of 0..{vocabulary - 1}")
    return tokens
