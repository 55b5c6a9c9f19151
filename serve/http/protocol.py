"""The OpenAI request bodies that the server understands, and what it makes of them.

Fields that would change the answer and are not implemented are refused, never ignored; fields that
only describe the caller (`user`, `metadata`, ...) are ignored, and so are those that are not known,
which the log names. What is said of a field's value is its `description`. Values are of their
field's type as JSON has it: "4" and 1.0 are no whole numbers.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from jaxsys.errors import UsageError
from jaxsys.model import Tokenizer
from jaxsys.serve.requests import SamplingParameters

MAX_CHOICES = 16
MAX_STOPS = 4
LOGPROBS = "a whole number from 0 to 20 for a completion, true or false for a chat"
DESCRIBE_THE_CALLER = {"metadata", "prompt_cache_key", "safety_identifier", "store", "user"}

logger = logging.getLogger(__name__)


class StreamOptions(pydantic.BaseModel):
    """`stream_options`."""

    include_usage: bool = Field(False, description="true or false")


class _Sampled(pydantic.BaseModel):
    """What both endpoints share."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    model: str = Field("", description="a text")
    max_tokens: int | None = Field(None, ge=1, description="a whole number, at least 1")
    temperature: float | None = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    n: int | None = Field(
        1, ge=1, le=MAX_CHOICES, description=f"a whole number from 1 to {MAX_CHOICES}"
    )
    stream: bool | None = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object")
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = Field(
        None, description=f"a text or a list of at most {MAX_STOPS} texts"
    )
    seed: int | None = Field(None, description="a whole number")
    presence_penalty: float | None = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="an object from token ids to numbers from -100 to 100"
    )
    # Beyond OpenAI's fields, as vLLM and SGLang name them.
    top_k: int | None = Field(
        0, ge=-1, le=2**31 - 1, description="a whole number; 0 and -1 keep all tokens"
    )
    min_p: float | None = Field(0.0, ge=0, le=1, description="a number from 0 to 1")
    repetition_penalty: float | None = Field(
        1.0, ge=0.01, le=10, description="a number from 0.01 to 10"
    )
    ignore_eos: bool | None = Field(False, description="true or false")
    # Not implemented: refused where they ask for anything.
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def refuse_unimplemented(self) -> None:
        """Raises UsageError for fields that would change the answer; logs those not known."""
        ignored = sorted(set(self.model_extra or {}) - DESCRIBE_THE_CALLER)
        if ignored:
            names = ", ".join(repr(name[:40]) for name in ignored[:10])
            logger.info("ignored fields of a body", extra={"fields": names})
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


T = TypeVar("T")
ListOf = Annotated[list[T], Field(fail_fast=True)]
"""A list of which only the first wrong item is named: of millions, all would take many seconds."""
TokenId = Annotated[int, Field(ge=0)]


class CompletionRequest(_Sampled):
    """Body of `/v1/completions`."""

    prompt: str | ListOf[str] | ListOf[TokenId] | ListOf[ListOf[TokenId]] = Field(
        description="a text, a list of texts, a list of token ids, or a list of such lists"
    )
    logprobs: int | None = Field(None, ge=0, le=20, description=LOGPROBS)

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
    text: str | None = Field(None, description="a text")


class Message(pydantic.BaseModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer, user or assistant"
    )
    content: str | ListOf[TextPart] | None = Field(
        None,
        validate_default=True,
        description='a text or a list of parts such as {"type": "text", "text": "Hi"}',
    )
    name: str | None = Field(None, description="a text")

    @pydantic.field_validator("content")
    @classmethod
    def _given(cls, content: Any, info: pydantic.ValidationInfo) -> Any:
        if content is None and info.data.get("role") != "assistant":
            raise ValueError("only an assistant's may be null")
        return content

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
        # What OpenAI calls the developer's word, chat templates call the system's.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content or ""}


class ChatRequest(_Sampled):
    """Body of `/v1/chat/completions`."""

    messages: ListOf[Message] = Field(
        min_length=1, description='a list of at least one {"role": "user", "content": "Hi"}'
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number, at least 1")
    logprobs: bool | None = Field(False, description=LOGPROBS)
    top_logprobs: int | None = Field(None, ge=0, le=20, description="a whole number from 0 to 20")

    def prompt(self, tokenizer: Tokenizer) -> list[int]:
        """The chat as tokens."""
        messages = [message.plain() for message in self.messages]
        check_text("".join(message["content"] + message["role"] for message in messages))
        return tokenizer.encode_chat(messages)


RULES = {
    name: field.description
    for body in (StreamOptions, TextPart, Message, CompletionRequest, ChatRequest)
    for name, field in body.model_fields.items()
    if field.description
}
"""What the value of each field must be."""


def what_is_wrong(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """What a client is told of a body that is not as described, and the field it is about.

    Args:
        errors: of pydantic; the first one counts.
    """
    first = errors[0]
    where, given = [part for part in first["loc"] if part != "body"], first.get("input")
    if first["type"] == "json_invalid":
        return f"the body is no valid JSON: {first.get('ctx', {}).get('error', '')}", None
    if first["type"] == "missing":
        param = ".".join(map(str, where)) or None
        return f"{param or 'the body'} is required; add it", param
    if not where:
        if isinstance(given, bytes):
            return "the body came as no JSON; send the header Content-Type: application/json", None
        return 'the body must be a JSON object, such as {"prompt": "Hi"}', None
    # Behind a field pydantic names the alternatives of its type, which are ours.
    while len(where) > 1 and where[-1] not in RULES:
        where.pop()
    param = ".".join(map(str, where))
    value = "" if isinstance(given, dict | list) else f"={given!r}"[:80]
    rule = RULES.get(where[-1])
    message = (
        f"{param}{value}: {first['msg']}" if rule is None else f"{param}{value} must be {rule}"
    )
    # Lone surrogates may come back in values; they have no place in an answer.
    return message.encode(errors="replace").decode(), param


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
