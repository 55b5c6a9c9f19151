"""Chat templates, rendered apart from the server: bounded in time, memory and length.

Templates come with models and are programs. A few processes render them (`template_process`),
started when they are needed and kept; one that takes too long ends itself, and its messages are
refused.
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.model import Tokenizer, chat
from jaxsys.serve.http.apart import Apart
from jaxsys.serve.requests import FieldRefused

LIMIT_S = 5.0
"""Longest time that one rendering may take."""
PROCESSES = 4
"""Most processes at once: so many renderings that take long hold up others."""
MOST_CHARACTERS = 16 << 20
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of templates that fields of a body have a name for."""
_ROOT = Path(chat.__file__).parents[2]
_SCRIPT = Path(__file__).with_name("template_process.py")


class Templates:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, *, limit_s: float = LIMIT_S):
        self.source = tokenizer.chat_template
        self._template_for = tokenizer.template_for
        self.limit_s = limit_s
        self._special_tokens = dict(tokenizer.special_tokens)
        self._threads = ThreadPoolExecutor(PROCESSES, "template")
        arguments = [str(_ROOT), str(chat.__file__)]
        self._apart = Apart(_SCRIPT, arguments, what="renders chats")

    def names(self, variable: str) -> bool:
        """Whether the template speaks of a variable."""
        return variable in (self.source or "")

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Messages to the text that the model was tuned on.

        Args:
            tools: that the model is told of, as requests have them.
            variables: that the template is given beside its own.

        Raises:
            UsageError: if there is no template, it refuses the messages, or takes too much.
        """
        source = self._template_for(tools)
        if source is None:
            raise UsageError("this model has no chat template; use plain completions instead")
        variables = dict(variables or {})
        taken = sorted(RESERVED & set(variables))
        if taken:
            raise FieldRefused(
                f"chat_template_kwargs holds {taken[0]!r}, which the request itself sets; leave it "
                f"out",
                "chat_template_kwargs",
            )
        asked = {
            "template": source,
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
            "variables": self._special_tokens | variables,
            "limit_s": self.limit_s,
            "most": MOST_CHARACTERS,
        }
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._threads, self._ask, asked)
        if "error" in answer:
            raise UsageError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._apart.close()

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        # Its own alarm comes first; the limit is for one that is not even scheduled.
        answer = self._apart.ask([json.dumps(asked).encode()], self.limit_s)
        if answer is None:
            raise UsageError(
                f"the chat template took over {self.limit_s:g} s, or too much memory, for these "
                f"messages; send fewer or shorter ones"
            )
        return json.loads(answer)


def history_forms(
    messages: Sequence[Mapping[str, Any]], id_length: int | None = None
) -> list[list[dict[str, Any]]]:
    """Messages in the forms that chat templates want them in, the likeliest first.

    Most take the arguments of a call as an object, some only as the text that clients send, and
    then the content beside it as null.

    Args:
        id_length: characters that the id of a call must have.
    """
    plain = [_with_ids(message, id_length) for message in messages]
    if not any(message.get("tool_calls") for message in plain):
        return [plain]

    def with_objects(message: dict[str, Any]) -> dict[str, Any]:
        calls = []
        for call in message.get("tool_calls") or ():
            function = call["function"]
            with contextlib.suppress(ValueError):
                arguments = json.loads(function["arguments"] or "{}")
                if isinstance(arguments, dict):
                    function = function | {"arguments": arguments}
            calls.append(call | {"function": function})
        return message | {"tool_calls": calls} if calls else message

    def with_nulls(message: dict[str, Any]) -> dict[str, Any]:
        empty = message.get("tool_calls") and not message["content"]
        return message | {"content": None} if empty else message

    return [list(map(with_objects, plain)), list(map(with_nulls, plain))]


def _with_ids(message: Mapping[str, Any], length: int | None) -> dict[str, Any]:
    def named(name: str) -> str:
        if length is None or (len(name) == length and name.isalnum()):
            return name
        return hashlib.sha256(name.encode()).hexdigest()[:length]

    found = dict(message)
    if message.get("tool_call_id"):
        found["tool_call_id"] = named(message["tool_call_id"])
    calls = message.get("tool_calls")
    if calls:
        found["tool_calls"] = [call | {"id": named(call.get("id") or "")} for call in calls]
    return found
