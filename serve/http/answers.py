"""How answers look: OpenAI's completions and chats, whole or as events of a stream."""

import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring
from typing import Any

from jaxsys.serve.http.text_stream import Spoken
from jaxsys.serve.http.tools import CallPart, Said
from jaxsys.serve.http.vocabulary import Vocabulary
from jaxsys.serve.outcomes import TokenLogprobs
from jaxsys.serve.requests import FinishReason

LEAST_LOGPROB = -9999.0
"""What OpenAI says of tokens that cannot be; minus infinity is no JSON."""


@dataclasses.dataclass(slots=True)
class Choice:
    """One choice of an answer, complete or as far as it has come."""

    index: int
    text: str
    tokens: list[Spoken]
    finish_reason: FinishReason | None = None
    message: str = ""
    offset: int = 0
    """Characters of the choice's text before this part of it."""
    prompt: list[tuple[int, TokenLogprobs | None]] | None = None
    """The prompt's tokens, where what was computed of them is asked for."""
    said: Said | None = None
    """Content, reasoning and calls, where the text is taken apart."""

    @property
    def reason(self) -> str | None:
        """Why it ended, as chats say it: with a call, unless that was the one thing asked for."""
        called = self.finish_reason == "stop" and self.called and not self.named
        return "tool_calls" if called else self.finish_reason

    called: bool = False
    """Whether there were calls so far, all of them whole."""
    named: bool = False
    """Whether the request names the function that is called."""


@dataclasses.dataclass(slots=True)
class Usage:
    """What a request took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    energy_j: float | None = None
    prefill_energy_j: float = 0.0
    """Of this, for computing the prompt."""
    reasoning_tokens: int | None = None
    """Of the completion; None where it is not taken apart."""

    def body(self, method: str) -> dict[str, Any]:
        """As OpenAI's `usage`, with energy beside it where it is known."""
        body: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            body["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        if self.energy_j is not None:
            decode_j = self.energy_j - self.prefill_energy_j
            tokens = max(1, self.completion_tokens)
            body["energy_j"] = round(self.energy_j, 6)
            body["energy_kind"] = method.partition(":")[0]
            body["energy_method"] = method
            body["joules_per_output_token"] = round(self.energy_j / tokens, 6)
            body["joules_per_output_token_by_role"] = {
                "prefill": round(self.prefill_energy_j / tokens, 6),
                "decode": round(decode_j / tokens, 6),
            }
        return body


class Shape:
    """How answers of one endpoint look."""

    prefix = ""
    object_name = ""
    stream_object = ""

    def __init__(self, model: str, vocabulary: Vocabulary, logprobs: bool):
        self.identity = f"{self.prefix}-{uuid.uuid4().hex}"
        self.vocabulary = vocabulary
        self.logprobs = logprobs
        self._head = {"id": self.identity, "created": int(time.time()), "model": model}
        head = json.dumps(self._head | {"object": self.stream_object}, ensure_ascii=False)
        self._line_head = f'data: {head[:-1]}, "choices": [{{"index": '.encode(errors="replace")

    def whole(self, choices: Sequence[Choice], usage: Usage, method: str) -> dict[str, Any]:
        """The answer at once; `method` says how energy is known."""
        return {
            **self._head,
            "object": self.object_name,
            "choices": [self._choice(choice, whole=True) for choice in choices],
            "usage": usage.body(method),
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def increments(
        self, choice: Choice, usage: dict[str, Any] | None = None
    ) -> Iterable[dict[str, Any]]:
        """Events of a stream, with what it has taken so far where that is asked for."""
        event = {
            **self._head,
            "object": self.stream_object,
            "choices": [self._choice(choice, whole=False)],
        }
        return [event if usage is None else event | {"usage": usage}]

    def line(self, choice: Choice) -> bytes | None:
        """What `increments` come to as bytes, where that is text alone; else None.

        Most tokens of most streams are, and take a third of the time so.
        """
        return None

    def _line(self, index: int, said: str, reason: str | None) -> bytes:
        """The event of a choice that says `said`, as JSON without its first fields."""
        ended = "null" if reason is None else f'"{reason}"'
        body = f'{index}, {said}, "logprobs": null, "finish_reason": {ended}'
        return self._line_head + body.encode(errors="replace") + b"}]}\n\n"

    def ending(self, usage: Usage, method: str, asked: bool) -> Iterable[dict[str, Any]]:
        """The last events; `asked` says whether usage was asked for."""
        if not asked:
            return []
        body = usage.body(method)
        return [{**self._head, "object": self.stream_object, "choices": [], "usage": body}]

    def failure(self, message: str) -> Iterable[dict[str, Any]]:
        """The last event of a stream that came to nothing."""
        body = {"message": message, "type": "server_error", "param": None, "code": None}
        return [{"error": body}]

    def _choice(self, choice: Choice, *, whole: bool) -> dict[str, Any]:
        raise NotImplementedError

    def entries(self, choice: Choice) -> list[dict[str, Any]]:
        """Log-probabilities of a choice's tokens, as chats and responses have them."""
        return [
            {
                **_entry(one.text, one.data, one.beside.logprob),
                "top_logprobs": [
                    self._alternative(one, other, value)
                    for other, value in zip(
                        one.beside.top_tokens, one.beside.top_logprobs, strict=True
                    )
                ],
            }
            for one in choice.tokens
            if one.beside is not None
        ]

    def _alternative(self, one: Spoken, other: int, value: float) -> dict[str, Any]:
        if other == one.token:
            return _entry(one.text, one.data, value)
        piece = self.vocabulary.piece(other)
        text = piece.first if one.first else piece.text
        data = piece.data if text is None else text.encode(errors="replace")
        return _entry(self.vocabulary.name(other, first=one.first), data, value)

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        """Log-probabilities of the prompt, as vLLM gives them: by token id."""
        if choice.prompt is None:
            return {}
        entries: list[dict[str, Any] | None] = []
        for token, beside in choice.prompt:
            if beside is None:
                entries.append(None)
                continue
            ranked = [
                (other, value, rank)
                for rank, (other, value) in enumerate(
                    zip(beside.top_tokens, beside.top_logprobs, strict=True), 1
                )
            ]
            if token not in beside.top_tokens:
                ranked.append((token, beside.logprob, beside.rank))
            entries.append(
                {
                    str(other): {
                        "logprob": finite(value),
                        "rank": rank,
                        "decoded_token": self.vocabulary.name(other),
                    }
                    for other, value, rank in ranked
                }
            )
        return {"prompt_logprobs": entries}


class CompletionShape(Shape):
    """`/v1/completions`."""

    prefix, object_name, stream_object = "cmpl", "text_completion", "text_completion"

    def line(self, choice: Choice) -> bytes | None:
        if self.logprobs or choice.prompt is not None:
            return None
        said = f'"text": {encode_basestring(choice.text)}'
        return self._line(choice.index, said, choice.finish_reason)

    def _choice(self, choice: Choice, *, whole: bool) -> dict[str, Any]:
        logprobs = None
        if self.logprobs:
            offsets, at = [], choice.offset
            for one in choice.tokens:
                offsets.append(at)
                at += len(one.text)
            logprobs = {
                "tokens": [one.text for one in choice.tokens],
                "token_logprobs": [
                    None if one.beside is None else finite(one.beside.logprob)
                    for one in choice.tokens
                ],
                "text_offset": offsets,
                "top_logprobs": [self._alternatives(one) for one in choice.tokens],
            }
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            **self._of_prompt(choice),
        }

    def _alternatives(self, one: Spoken) -> dict[str, float] | None:
        """Text to log-probability, the likeliest first, the chosen token always among them.

        Tokens that share a text go by their ids, all but the chosen one and the likeliest.
        """
        beside = one.beside
        if beside is None:
            return None
        ranked = dict(zip(beside.top_tokens, beside.top_logprobs, strict=True))
        ranked.setdefault(one.token, beside.logprob)
        found: dict[str, float] = {}
        for token, value in ranked.items():
            name = one.text
            if token != one.token:
                name = self.vocabulary.name(token, first=one.first)
                if name in found or name == one.text:
                    name = f"token_id:{token}"
            found[name] = finite(value)
        return found


class ChatShape(Shape):
    """`/v1/chat/completions`."""

    prefix, object_name, stream_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, choices: Sequence[Choice], usage: Usage, method: str) -> dict[str, Any]:
        return super().whole(choices, usage, method) | self._of_prompt(choices[0])

    def line(self, choice: Choice) -> bytes | None:
        text = choice.text
        if choice.said is not None:
            if choice.said.reasoning or choice.said.calls:
                return None
            text = choice.said.content
        if self.logprobs or choice.prompt is not None:
            return None
        content = f'"content": {encode_basestring(text)}' if text else ""
        return self._line(choice.index, f'"delta": {{{content}}}', choice.reason)

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [{**self._head, "object": self.stream_object, "choices": [choice]}]

    def _choice(self, choice: Choice, *, whole: bool) -> dict[str, Any]:
        logprobs = {"content": self.entries(choice)} if self.logprobs else None
        said = Said(content=choice.text) if choice.said is None else choice.said
        found: dict[str, Any] = {"content": said.content} if said.content or whole else {}
        if said.reasoning:
            found["reasoning_content"] = said.reasoning
        if said.calls:
            found["tool_calls"] = [self._call(choice, part, whole) for part in said.calls]
            if whole:
                found["content"] = said.content or None
        return {
            "index": choice.index,
            **({"message": {"role": "assistant", **found}} if whole else {"delta": found}),
            "logprobs": logprobs,
            "finish_reason": choice.reason,
        }

    def _call(self, choice: Choice, part: CallPart, whole: bool) -> dict[str, Any]:
        """A call, or the next part of one: only the first has id, type and name."""
        place = {} if whole else {"index": part.index}
        if part.name is None:
            return place | {"function": {"arguments": part.arguments}}
        return place | {
            "id": self.call_id(choice.index, part.index),
            "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }

    def call_id(self, choice: int, call: int) -> str:
        """The name of a call: nine characters, as some chat templates want it."""
        made = hashlib.sha256(f"{self.identity}-{choice}-{call}".encode()).hexdigest()
        return made[:9]


def _entry(text: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": finite(logprob), "bytes": list(data)}


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return max(logprob, LEAST_LOGPROB)


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event, with its type where it has one."""
    kind = f"event: {body['type']}\n".encode() if "type" in body else b""
    data = json.dumps(body, ensure_ascii=False).encode(errors="replace")
    return kind + b"data: " + data + b"\n\n"
