"""The OpenAI request bodies that the server understands, and what it makes of them.

Fields that would change the answer and are not implemented are refused, never ignored: those that
OpenAI and other servers have, by name. Fields that only describe the caller (`user`, `metadata`,
...) are ignored, and so are those that nobody has, which the log names. What is said of a field's
value is its `description`. Values are of their field's type as JSON has it: "4" and 1.0 are no
whole numbers.
"""

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from jaxsys.errors import UsageError
from jaxsys.model import Tokenizer
from jaxsys.serve.http import structured
from jaxsys.serve.http.tool_bodies import (
    MAX_TOOLS,
    CallBody,
    CallFunction,
    Calls,
    FunctionBody,
    ToolBody,
    Tools,
    ToolUse,
    tool_use,
)
from jaxsys.serve.requests import (
    ContextLengthExceeded,
    FieldRefused,
    SamplingParameters,
    about,
)

MAX_CHOICES = 16
MAX_STOPS = 4
MAX_STOP_TOKENS = 32
MAX_BIASES = 300
MAX_MESSAGES = 10_000
MAX_NAME = 512
"""Characters of a name or a stop string."""
LOGPROBS = "a whole number from 0 to 20 for a completion, true or false for a chat"
MISSPELT = 0.87
"""How alike a name must be to a field's to be meant for it, by difflib's ratio: `temprature` is,
fields of other servers are not."""
DESCRIBE_THE_CALLER = {
    "cache_salt",
    "metadata",
    "parallel_tool_calls",  # says nothing without tools
    "guided_decoding_backend",  # there is one
    "prediction",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "session_id",
    "store",
    "user",
}
"""Fields that change no answer."""
SESSION = ("session_id", "prompt_cache_key")
"""Of these, those that say what a request belongs to."""
UNIMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True, False),  # these are a chat's
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "do_sample": (True,),
    "documents": (),
    "early_stopping": (False,),
    "ebnf": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "include_reasoning": (True,),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "lora_path": (),
    "max_new_tokens": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n_predict": (),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": (False,),
    "num_beams": (1,),
    "num_predict": (),
    "penalty_alpha": (0,),
    "reasoning": (),
    "reasoning_effort": (),
    "regex": (),
    "repeat_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "suffix": (),
    "tfs_z": (1,),
    "thinking": (),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "top_a": (0,),
    "top_logprobs": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that would change the answer, and their values beside null and nothing that do not."""
UNIMPLEMENTED_KINDS = ("guided_", "structured_", "dry_", "xtc_", "mirostat_", "dynatemp_")
"""How the names of more of them begin."""

logger = logging.getLogger(__name__)

T = TypeVar("T")
ListOf = Annotated[list[T], Field(fail_fast=True)]
"""A list of which only the first wrong item is named: of millions, all would take many seconds."""
TokenId = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(max_length=MAX_NAME)]


class StreamOptions(pydantic.BaseModel):
    """`stream_options`."""

    include_usage: bool | None = Field(False, description="true or false")
    continuous_usage_stats: bool | None = Field(False, description="true or false")


def _number(value: Any) -> float | None:
    """A neutral value as a number, if it is one: 1 and 1.0 say the same, true does not."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _small(value: Any) -> Any:
    """Of a large object all faults would be named: its size is looked at first."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"{len(value)} entries")
    return value


class _Sampled(pydantic.BaseModel):
    """What both endpoints share."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    model: Name | None = Field("", description=f"a text of at most {MAX_NAME} characters")
    max_tokens: int | None = Field(None, ge=1, description="a whole number, at least 1")
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number, at least 1")
    temperature: float | None = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    n: int | None = Field(
        1, ge=1, le=MAX_CHOICES, description=f"a whole number from 1 to {MAX_CHOICES}"
    )
    stream: bool | None = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object")
    stop: Name | Annotated[list[Name], Field(max_length=MAX_STOPS)] | None = Field(
        None,
        description=f"a text or a list of at most {MAX_STOPS} texts, none over {MAX_NAME} "
        f"characters",
    )
    seed: int | None = Field(None, description="a whole number")
    presence_penalty: float | None = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]], pydantic.BeforeValidator(_small)
        ]
        | None
    ) = Field(
        None,
        description=f"an object from token ids to numbers from -100 to 100, of at most "
        f"{MAX_BIASES} entries",
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
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description=f"a list of at most {MAX_STOP_TOKENS} token ids"
    )
    min_tokens: int | None = Field(0, ge=0, description="a whole number, at most max_tokens")
    include_stop_str_in_output: bool | None = Field(False, description="true or false")
    skip_special_tokens: bool | None = Field(True, description="true or false")
    add_special_tokens: bool | None = Field(None, description="true or false")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="a whole number from 1 on; -1 cuts to what fits"
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=20, description="a whole number, 0 to 20")
    response_format: Any = Field(None, description="an object")
    structured_outputs: Any = Field(None, description="an object")
    guided_json: Any = Field(None, description="a JSON schema")
    guided_regex: Any = Field(None, description="a text")
    guided_choice: Any = Field(None, description="a list of texts")
    guided_grammar: Any = Field(None, description="a text")
    guided_whitespace_pattern: Any = Field(None, description="a text")

    @property
    def grammar_field(self) -> str:
        """The field that asks for a form of the answer, where one does."""
        return structured.field_of({name: getattr(self, name) for name in structured.FIELDS})

    def asked_grammar(self) -> str | None:
        """What the answer's form is to follow; None where it is free."""
        return structured.grammar_of({name: getattr(self, name) for name in structured.FIELDS})

    @property
    def choices(self) -> int:
        """How many answers are wanted to each prompt."""
        return self.n or 1

    @property
    def asked_tokens(self) -> int | None:
        """Most tokens of an answer; None where it is not said."""
        return self.max_completion_tokens or self.max_tokens

    def refuse_unimplemented(self) -> None:
        """Raises UsageError for fields that would change the answer, for names that are nearly
        those of fields and for stream_options without a stream; logs others that are not known."""
        if self.stream_options is not None and not self.stream:
            raise FieldRefused(
                "stream_options needs stream=true; set it or leave stream_options out",
                "stream_options",
            )
        extra = self.model_extra or {}
        for name, value in extra.items():
            if name in DESCRIBE_THE_CALLER:
                continue
            if name in structured.OPTIONS and value not in (None, False):
                raise FieldRefused(
                    f"{name} is an option of structured_outputs; write it there", name
                )
            known = name in UNIMPLEMENTED or name.startswith(UNIMPLEMENTED_KINDS)
            constrains = name.startswith(("guided_", "structured_"))  # {} is still "any JSON"
            if not known or value is None or (not constrains and value in ("", [], {})):
                continue
            neutral = (*UNIMPLEMENTED.get(name, ()), self.choices if name == "best_of" else None)
            if not any(type(value) is type(one) and value == one for one in neutral) and not (
                (number := _number(value)) is not None and number in map(_number, neutral)
            ):
                raise FieldRefused(f"{name[:60]} is not implemented; leave it out", name[:60])
        ignored = sorted(
            name
            for name in set(extra) - DESCRIBE_THE_CALLER - {*UNIMPLEMENTED, *structured.OPTIONS}
            if not name.startswith(UNIMPLEMENTED_KINDS)
        )
        for name in ignored:
            meant = difflib.get_close_matches(name, type(self).model_fields, 1, cutoff=MISSPELT)
            if meant:
                raise FieldRefused(f"{name[:60]} is not known; did you mean {meant[0]}?", name[:60])
        if ignored:
            names = ", ".join(repr(name[:40]) for name in ignored[:10])
            logger.info("ignored fields of a body", extra={"fields": names})

    def cut(self, tokens: list[int], room: int) -> list[int]:
        """A prompt's last tokens, as many as `truncate_prompt_tokens` leaves.

        Args:
            room: tokens that fit.
        """
        most = self.truncate_prompt_tokens
        if most is None:
            return tokens
        if most == 0:
            raise FieldRefused(
                "truncate_prompt_tokens=0 leaves no prompt; use 1 or more, or -1",
                "truncate_prompt_tokens",
            )
        most = max(1, room) if most == -1 else most
        return tokens[-most:]

    def sampling(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: str | None = None,
        defaults: Mapping[str, float] = MappingProxyType({}),
    ) -> SamplingParameters:
        """The parameters of one choice.

        Args:
            defaults: what the model's makers sample with, for fields that are not given.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if any(not stop for stop in stops):
            raise FieldRefused("stop holds an empty string; leave it out", "stop")
        bias: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise FieldRefused(f"logit_bias key {key[:40]!r} is no token id", "logit_bias")
            bias[int(key)] = value
        ends = self.stop_token_ids or []
        if ends:
            check_tokens(tokenizer, ends, "stop_token_ids")

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        def chosen(name: str, default: float) -> Any:
            asked = getattr(self, name) if name in self.model_fields_set else None
            return given(asked, defaults.get(name, default))

        return SamplingParameters(
            max_tokens=max_tokens,
            temperature=chosen("temperature", 1.0),
            top_k=max(0, int(chosen("top_k", 0))),
            top_p=chosen("top_p", 1.0),
            min_p=chosen("min_p", 0.0),
            seed=self.seed,
            repetition_penalty=chosen("repetition_penalty", 1.0),
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            logit_bias=bias,
            stop=tuple(stops),
            stop_token_ids=frozenset(ends)
            | (frozenset() if self.ignore_eos else frozenset(tokenizer.eos_ids)),
            min_tokens=given(self.min_tokens, 0),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        )


class CompletionRequest(_Sampled):
    """Body of `/v1/completions`."""

    prompt: str | ListOf[str] | ListOf[TokenId] | ListOf[ListOf[TokenId]] = Field(
        description="a text, a list of texts, a list of token ids, or a list of such lists"
    )
    logprobs: int | None = Field(None, ge=0, le=20, description=LOGPROBS)
    echo: bool | None = Field(False, description="true or false")

    def given(self) -> list[str | list[int]]:
        """The prompts as they came.

        Raises:
            UsageError: if there is none.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise FieldRefused("prompt is an empty list; give a text or token ids", "prompt")
        return prompt

    def prompts(self, tokenizer: Tokenizer, most_characters: int | None = None) -> list[list[int]]:
        """The prompts as tokens; `most_characters` as in `encode`."""
        add_special = self.add_special_tokens is not False
        return [
            encode(tokenizer, one, add_special=add_special, most_characters=most_characters)
            if isinstance(one, str)
            else check_tokens(tokenizer, one)
            for one in self.given()
        ]


class TextPart(pydantic.BaseModel):
    """A piece of a message's content."""

    type: Name
    text: str | None = Field(None, description="a text")


class Message(pydantic.BaseModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="system, developer, user, assistant or tool"
    )
    content: str | ListOf[TextPart] | None = Field(
        None,
        validate_default=True,
        description='a text or a list of parts such as {"type": "text", "text": "Hi"}',
    )
    name: str | None = Field(None, description="a text")
    tool_calls: Calls | None = Field(None, description="a list of calls")
    tool_call_id: str | None = Field(None, description="a text")
    reasoning_content: str | None = Field(None, description="a text")
    reasoning: str | None = Field(None, description="a text")

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
        message: dict[str, Any] = {"role": role, "content": content or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        thought = self.reasoning_content or self.reasoning
        if thought and role == "assistant":
            message["reasoning_content"] = thought
        if self.tool_calls:
            if role != "assistant":
                raise UsageError(f"tool_calls of a {role} make no sense; only assistants call")
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class _Chat(pydantic.BaseModel):
    """What makes a prompt of messages."""

    messages: Annotated[ListOf[Message], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description='a list of at least one {"role": "user", "content": "Hi"}, and at most '
        f"{MAX_MESSAGES}"
    )
    add_generation_prompt: bool | None = Field(None, description="true or false")
    continue_final_message: bool | None = Field(False, description="true or false")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")
    reasoning_effort: Name | None = Field(None, description="a text")

    def plain(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them.

        Raises:
            UsageError: if one is not understood, or holds half of a surrogate pair.
        """
        with about("messages"):
            messages = [message.plain() for message in self.messages]
            check_text(json.dumps(messages, ensure_ascii=False))
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise FieldRefused(
                    "continue_final_message and add_generation_prompt exclude each other; leave "
                    "one out",
                    "continue_final_message",
                )
            if not messages[-1]["content"].strip():
                raise FieldRefused(
                    "continue_final_message needs a last message with content",
                    "continue_final_message",
                )
        return messages

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends with the head of the assistant's next turn."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    def ended(self, rendered: str, messages: Sequence[Mapping[str, Any]]) -> str:
        """The rendered chat, cut behind the last message's content where that is to go on."""
        if not self.continue_final_message:
            return rendered
        content = messages[-1]["content"]
        at = rendered.rfind(content.strip())
        if at < 0:
            raise FieldRefused(
                "continue_final_message: the chat template does not render the last message's "
                "content as it stands",
                "continue_final_message",
            )
        # Templates may trim: the spaces behind it stay where the template has left them.
        for kept in (content.lstrip(), content.strip()):
            if rendered.startswith(kept, at):
                break
        return rendered[: at + len(kept)]


class ChatRequest(_Chat, _Sampled):
    """Body of `/v1/chat/completions`."""

    tools: Tools | None = Field(
        None, description=f"a list of at most {MAX_TOOLS} tools of type function"
    )
    tool_choice: Any = Field(None, description="none, auto, required or a function")
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    logprobs: bool | None = Field(False, description=LOGPROBS)
    top_logprobs: int | None = Field(None, ge=0, le=20, description="a whole number from 0 to 20")

    def tool_use(self) -> ToolUse:
        """The tools, and how they may be used."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)


class TokenizeRequest(pydantic.BaseModel):
    """Body of `/tokenize`: a prompt, or messages as a chat has them."""

    model_config = pydantic.ConfigDict(strict=True)

    model: Name | None = Field("", description=f"a text of at most {MAX_NAME} characters")
    prompt: str | None = Field(None, description="a text")
    messages: ListOf[Message] | None = Field(
        None, max_length=MAX_MESSAGES, description='a list of {"role": "user", "content": "Hi"}'
    )
    add_special_tokens: bool | None = Field(None, description="true or false")
    add_generation_prompt: bool | None = Field(None, description="true or false")
    continue_final_message: bool | None = Field(False, description="true or false")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")
    tools: Tools | None = Field(
        None, description=f"a list of at most {MAX_TOOLS} tools of type function"
    )
    return_token_strs: bool | None = Field(False, description="true or false")


class DetokenizeRequest(pydantic.BaseModel):
    """Body of `/detokenize`."""

    model_config = pydantic.ConfigDict(strict=True)

    model: Name | None = Field("", description=f"a text of at most {MAX_NAME} characters")
    tokens: ListOf[TokenId] = Field(description="a list of token ids")


class Tokens(pydantic.BaseModel):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(pydantic.BaseModel):
    """Answer of `/detokenize`."""

    prompt: str


class Version(pydantic.BaseModel):
    """Answer of `/version`."""

    version: str


_PARTS = (StreamOptions, TextPart, FunctionBody, ToolBody, CallFunction, CallBody, Message)


def _rules(*bodies: type[pydantic.BaseModel]) -> dict[str, str]:
    return {
        name: field.description
        for body in (*_PARTS, *bodies)
        for name, field in body.model_fields.items()
        if field.description
    }


RULES = {
    kind.__name__: _rules(kind)
    for kind in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
}
"""What the value of each field must be, by the body it is in."""


def what_is_wrong(errors: Sequence[Mapping[str, Any]], kind: str = "") -> tuple[str, str | None]:
    """What a client is told of a body that is not as described, and the field it is about.

    Args:
        errors: of pydantic; the first one counts.
        kind: the body's, as in `RULES`.
    """
    rules = RULES.get(kind, {})
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
    while len(where) > 1 and where[-1] not in rules:
        where.pop()
    param = ".".join(map(str, where))
    if isinstance(given, str):
        given = given[:80]
    value = "" if isinstance(given, dict | list) else f"={given!r}"[:80]
    rule = rules.get(where[-1])
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
    root: str | None = None
    """The folder of an adapter."""
    parent: str | None = None
    """The model that an adapter belongs to."""


class ModelList(pydantic.BaseModel):
    """Answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


def session_of(body: pydantic.BaseModel, header: str | None) -> str | None:
    """What a request belongs to, whose next one is likely to begin as it does; None if not said.

    Args:
        header: of `X-Session-ID`.
    """
    extra = body.model_extra or {}
    said = (header, *(extra.get(name) for name in SESSION))
    return next((one[:MAX_NAME] for one in said if isinstance(one, str) and one), None)


class ErrorBody(pydantic.BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(pydantic.BaseModel):
    """Body of every answer of 400 and above."""

    error: ErrorBody


def encode(
    tokenizer: Tokenizer,
    text: str,
    *,
    add_special: bool = True,
    most_characters: int | None = None,
    name: str = "prompt",
) -> list[int]:
    """A prompt's text as tokens.

    Args:
        add_special: put the beginning-of-text token in front, where the model has one.
        most_characters: of a text whose tokens could still fit.
        name: what the text is called in the request.

    Raises:
        ContextLengthExceeded: if it is longer.
        UsageError: if there is nothing in it, or it is no valid text.
    """
    if most_characters is not None and len(text) > most_characters:
        raise ContextLengthExceeded(
            f"{name} is too long: {len(text)} characters; no text of over {most_characters} "
            f"characters can fit. Shorten it"
        )
    field = name.partition("[")[0]
    with about(field):
        check_text(text)
    tokens = tokenizer.encode(text, add_special=add_special)
    if not tokens:
        raise FieldRefused(f"the {name} is empty; give at least one token", field)
    return tokens


def check_text(text: str) -> None:
    """Raises UsageError for text that has no UTF-8 form (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is no valid Unicode: {error.reason} at {error.start}") from None


def check_tokens(tokenizer: Tokenizer, tokens: list[int], name: str = "prompt") -> list[int]:
    """Raises FieldRefused for ids the model does not have, or where there are none."""
    field = name.partition("[")[0]
    if not tokens:
        raise FieldRefused(f"the {name} is empty; give at least one token", field)
    vocabulary = tokenizer.vocab_size
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise FieldRefused(f"token id {token} is none of 0..{vocabulary - 1}", field)
    return tokens
