"""`/v1/responses`: turns of a conversation that the server remembers, made of chats.

A request's items (messages, calls, results, reasoning, references to earlier items) become the
messages of a chat; what the chat says becomes items again. Turns are kept, the latest ones, within
bounds of number and size, for `previous_response_id` and references.
"""

import contextlib
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import pydantic
from pydantic import Field
from starlette.exceptions import HTTPException

from jaxsys.errors import UsageError
from jaxsys.serve.http.protocol import MAX_NAME, ChatRequest, Name, what_is_wrong
from jaxsys.serve.http.structured import schema_of_format
from jaxsys.serve.requests import FieldRefused, about

MAX_TURNS = 1000
MAX_BYTES = 64 << 20
"""Of the items of all turns that are kept, as JSON."""
MAX_ITEMS = 10_000
"""Of one conversation."""
REFUSED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "prompt": (),
}
"""Fields that would change the answer, and their values beside null that do not."""
OF_CHAT = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "top_logprobs",
}
"""Fields of the chat that answers, and where they come from."""
INCLUDED = frozenset({"reasoning.encrypted_content", "message.output_text.logprobs"})
"""What `include` may name: what there is of it is always there."""


class ResponseRequest(pydantic.BaseModel):
    """Body of `/v1/responses`."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    model: Name | None = Field("", description=f"a text of at most {MAX_NAME} characters")
    input: str | list[dict[str, Any]] = Field(description="a text, or a list of items")
    instructions: str | None = Field(None, description="a text")
    previous_response_id: Name | None = Field(None, description="the id of an earlier response")
    max_output_tokens: int | None = Field(None, ge=1, description="a whole number, at least 1")
    temperature: float | None = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    tools: list[dict[str, Any]] | None = Field(None, description="a list of functions")
    tool_choice: Any = Field(None, description="none, auto, required or a function")
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    text: dict[str, Any] | None = Field(None, description="an object with a format")
    reasoning: dict[str, Any] | None = Field(None, description="an object")
    stream: bool | None = Field(False, description="true or false")
    stream_options: dict[str, Any] | None = Field(None, description="an object")
    store: bool | None = Field(True, description="true or false")
    include: list[str] | None = Field(None, description="a list of texts")
    truncation: str | None = Field("disabled", description="disabled or auto")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="a whole number, 0 to 20")
    metadata: dict[str, Any] | None = Field(None, description="an object")

    def refuse(self) -> None:
        """Raises UsageError for what would change the answer and is not implemented."""
        for name, neutral in REFUSED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in neutral:
                raise FieldRefused(f"{name} is not implemented; leave it out", name)
        if self.truncation not in (None, "disabled"):
            said = f"truncation={self.truncation!r} is not implemented; use disabled"
            raise FieldRefused(said, "truncation")
        unknown = sorted(set(self.include or ()) - INCLUDED)
        if unknown:
            said = f"include {unknown[0][:80]!r} is not implemented; leave it out"
            raise FieldRefused(said, "include")
        try:  # what is said again in the answer
            json.dumps(self.model_dump(), allow_nan=False, ensure_ascii=False).encode()
        except ValueError:
            raise UsageError(
                "the body holds NaN, infinity or half of a surrogate pair, which no JSON can say"
            ) from None
        verbosity = (self.text or {}).get("verbosity")
        if verbosity not in (None, "medium"):
            said = f"text.verbosity={verbosity!r} is not implemented; leave it out"
            raise FieldRefused(said, "text.verbosity")

    def chat(self, items: Sequence[dict[str, Any]]) -> ChatRequest:
        """The chat that answers, over a whole conversation.

        Raises:
            UsageError: if an item, a tool or a field is not understood.
        """
        with about("input"):
            messages = messages_of(items)
        form = (self.text or {}).get("format")
        with about("text.format"):
            if form is not None:
                schema_of_format(form, "text.format")
        with about("tools"):
            tools = [_tool(tool) for tool in self.tools or ()]
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        effort = (self.reasoning or {}).get("effort")
        extra = {name: value for name, value in (self.model_extra or {}).items()}
        body = extra | {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": tools,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": form,
            "stream": self.stream,
            "logprobs": self.top_logprobs is not None,
            "top_logprobs": self.top_logprobs,
        }
        for name in REFUSED:
            body.pop(name, None)
        if effort is not None:
            body["reasoning_effort"] = effort
        try:
            return ChatRequest.model_validate(body)
        except pydantic.ValidationError as error:
            message, field = what_is_wrong(error.errors(include_url=False), "ChatRequest")
            if field is None:
                raise UsageError(message) from None
            raise FieldRefused(message, field) from None


@contextlib.contextmanager
def as_asked() -> Iterator[None]:
    """Refusals of the chat that a request was made to, in the request's own names."""
    try:
        yield
    except FieldRefused as error:
        first = error.field.partition(".")[0]
        raise FieldRefused(str(error), OF_CHAT.get(first, error.field)) from None


def items_of(asked: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a request brings, each with an id.

    Raises:
        FieldRefused: if they are too many, or an id is no text.
    """
    with about("input"):
        return _items_of(asked)


def _items_of(asked: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(asked, str):
        asked = [{"type": "message", "role": "user", "content": asked}]
    if len(asked) > MAX_ITEMS:
        raise UsageError(f"input has {len(asked)} items; at most {MAX_ITEMS} are taken")
    found = []
    for item in asked:
        kind = item.get("type") or "message"
        name = item.get("id")
        if name is None:
            name = new_id("msg" if kind == "message" else "item")
        if not isinstance(name, str):
            raise UsageError(f"the id of an item of type {str(kind)[:60]!r} must be a text")
        found.append({**item, "id": name, "type": kind})
    return found


def messages_of(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as the messages of a chat: what one assistant's turn holds becomes one message.

    Raises:
        UsageError: if an item is not understood.
    """
    messages: list[dict[str, Any]] = []

    def assistant(fresh: bool) -> dict[str, Any]:
        if fresh or not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        return messages[-1]

    for item in items:
        kind = item["type"]
        if kind == "message":
            role, content = item.get("role"), _content(item.get("content"))
            if role == "assistant":
                # Text behind calls begins a message of its own.
                last = messages[-1] if messages else {}
                fresh = bool(last.get("tool_calls") or last.get("content"))
                assistant(fresh)["content"] = content
            else:
                messages.append({"role": role, "content": content})
        elif kind == "function_call":
            call = {
                "id": item.get("call_id") or item["id"],
                "type": "function",
                "function": {"name": item.get("name"), "arguments": item.get("arguments", "")},
            }
            assistant(False).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = _content(item.get("output"))
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
            )
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or ()
            parts = parts if isinstance(parts, list) else ()
            text = "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
            last = messages[-1] if messages else {}
            if text:
                assistant(bool(last.get("tool_calls") or last.get("content")))
                messages[-1]["reasoning_content"] = text
        else:
            raise UsageError(f"an item of type {str(kind)[:60]!r} is not understood")
    if not messages:
        raise UsageError("input is empty; give a text or items")
    return messages


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text", "text", "summary_text"):
            found.append({"type": "text", "text": part.get("text")})
        elif kind == "refusal":
            found.append({"type": "text", "text": part.get("refusal")})
        else:
            raise UsageError(f"a part of type {str(kind)[:60]!r} is not understood; use input_text")
    return found


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise UsageError(f"a tool of type {str(kind)[:60]!r} is not implemented; use function")
    return {"type": "function", "function": tool.get("function") or tool}


def new_id(kind: str) -> str:
    """A fresh id."""
    return f"{kind}_{uuid.uuid4().hex}"


class NoSuchResponse(HTTPException):
    """A response is asked for that is not, or no longer, kept."""

    def __init__(self, name: str, param: str | None = None):
        super().__init__(
            404, f"response {name[:100]!r} is not kept: it never was, or newer ones took its place"
        )
        self.param = param


class KeptTurns(Protocol):
    """Turns that are remembered, wherever they lie; see `OwnTurns`."""

    def conversation(
        self, previous: str | None, fresh: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]: ...

    def keep(
        self, body: dict[str, Any], own: list[dict[str, Any]], items: list[dict[str, Any]]
    ) -> None: ...

    def get(self, name: str) -> dict[str, Any]: ...

    def inputs(self, name: str) -> list[dict[str, Any]]: ...

    def forget(self, name: str) -> None: ...


class _Turn:
    """One response and what led to it."""

    __slots__ = ("body", "input", "items", "size")

    def __init__(self, body: dict[str, Any], own: list[dict[str, Any]], items: list):
        self.body = body
        self.input = own
        self.items = items
        """The whole conversation, this response's output included; items are shared."""
        self.size = len(json.dumps([own, body]))


class OwnTurns:
    """The latest turns; only for the event loop's thread."""

    def __init__(self, *, most: int = MAX_TURNS, most_bytes: int = MAX_BYTES):
        self.most = most
        self.most_bytes = most_bytes
        self._turns: OrderedDict[str, _Turn] = OrderedDict()
        self._items: dict[str, tuple[str, dict[str, Any]]] = {}
        """Items by id, with the response whose going takes them away."""
        self._bytes = 0

    def conversation(
        self, previous: str | None, fresh: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """All items so far.

        Raises:
            NoSuchResponse: if the previous response is not kept.
            UsageError: if an item is referred to that is not kept.
        """
        found = [] if previous is None else self._get(previous, "previous_response_id").items
        return joined(found, fresh, lambda name: self._items.get(name, ("", None))[1])

    def keep(
        self, body: dict[str, Any], own: list[dict[str, Any]], items: list[dict[str, Any]]
    ) -> None:
        """Remembers a response, and forgets the oldest where there is no room."""
        turn = _Turn(body, own, [*items, *body["output"]])
        name = body["id"]
        self._turns[name] = turn
        self._bytes += turn.size
        for item in (*own, *body["output"]):
            if item["type"] != "item_reference":
                self._items[item["id"]] = (name, item)
        while len(self._turns) > self.most or self._bytes > self.most_bytes:
            self.forget(next(iter(self._turns)))

    def get(self, name: str) -> dict[str, Any]:
        """A response's body.

        Raises:
            NoSuchResponse: if it is not kept.
        """
        return self._get(name).body

    def inputs(self, name: str) -> list[dict[str, Any]]:
        """The items that led to a response, the earliest first.

        Raises:
            NoSuchResponse: if it is not kept.
        """
        turn = self._get(name)
        return turn.items[: len(turn.items) - len(turn.body["output"])]

    def forget(self, name: str) -> None:
        """Lets a response go.

        Raises:
            NoSuchResponse: if it is not kept.
        """
        turn = self._get(name)
        del self._turns[name]
        self._bytes -= turn.size
        for item in (*turn.input, *turn.body["output"]):
            if self._items.get(item["id"], ("",))[0] == name:
                del self._items[item["id"]]

    def _get(self, name: str, param: str | None = None) -> _Turn:
        if name not in self._turns:
            raise NoSuchResponse(name, param)
        return self._turns[name]


def joined(
    before: Sequence[dict[str, Any]],
    fresh: Sequence[dict[str, Any]],
    kept: Callable[[str], dict[str, Any] | None],
) -> list[dict[str, Any]]:
    """A conversation and what a request brings, its references replaced by what is kept.

    Raises:
        UsageError: if an item is referred to that is not kept, or there are too many.
    """
    found = list(before)
    for item in fresh:
        if item["type"] == "item_reference":
            name = str(item.get("id"))
            known = kept(name)
            if known is None:
                said = f"item {name[:100]!r} is not kept; send the item itself"
                raise FieldRefused(said, "input")
            item = known
        found.append(item)
    if len(found) > MAX_ITEMS:
        said = f"the conversation has {len(found)} items; at most {MAX_ITEMS} do"
        raise FieldRefused(said, "input")
    return found


def head_of(body: ResponseRequest, model: str, choice: Any) -> dict[str, Any]:
    """What a response repeats of its request."""
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None} | (body.reasoning or {}),
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} | (body.text or {}),
        "tool_choice": "auto" if choice is None else choice,
        "tools": body.tools or [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "metadata": body.metadata or {},
    }
