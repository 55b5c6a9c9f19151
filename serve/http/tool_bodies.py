"""Tools in bodies: definitions, choice, calls that were made; and what a request makes of them."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxsys.serve.http.tools import Tool, Writing
from jaxsys.serve.requests import FieldRefused

MAX_TOOLS = 256
MAX_CALLS = 256
"""Calls of one message."""
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


class FunctionBody(pydantic.BaseModel):
    """A function as OpenAI describes it."""

    name: str = Field(description="a text of letters, digits, _, -, . and :, at most 128")
    description: str | None = Field(None, description="a text")
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema, an object")
    strict: bool | None = Field(None, description="true or false")


class ToolBody(pydantic.BaseModel):
    """A tool; only functions are understood."""

    type: Literal["function"] = Field(description='"function"')
    function: FunctionBody = Field(description="an object with a name")


class CallFunction(pydantic.BaseModel):
    """What was called."""

    name: str = Field(description="a text")
    arguments: str = Field("", description="a text that is JSON")


class CallBody(pydantic.BaseModel):
    """A call that an assistant has made."""

    id: str | None = Field(None, description="a text")
    type: Literal["function"] = Field("function", description='"function"')
    function: CallFunction = Field(description="an object with name and arguments")


Tools = Annotated[list[ToolBody], Field(max_length=MAX_TOOLS, fail_fast=True)]
Calls = Annotated[list[CallBody], Field(max_length=MAX_CALLS, fail_fast=True)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a request, and how they may be used."""

    tools: Sequence[Tool] = ()
    """Those that are told to the model."""
    callable: Sequence[Tool] = ()
    """Those of them that may be called."""
    needed: bool = False
    named: bool = False
    """Whether the request names the one that is called."""
    many: bool = True

    def writing(self, answer: str | None) -> Writing:
        """What the answer is made of, where `answer` is the grammar of one without calls."""
        return Writing(
            tools=self.callable,
            many=self.many,
            needed=self.needed,
            answer=None if self.needed else answer,
        )


def tool_use(tools: Sequence[ToolBody] | None, choice: Any, parallel: bool | None) -> ToolUse:
    """What a request asks of tools.

    Raises:
        UsageError: if the choice is not understood, or names a tool that is not there.
    """
    found: dict[str, Tool] = {}
    for tool in tools or ():
        function = tool.function
        if not _NAME.fullmatch(function.name):
            raise FieldRefused(
                f"the tool name {function.name[:140]!r} must be 1 to 128 letters, digits, _, -, . "
                f"or :",
                "tools",
            )
        if function.name in found:
            raise FieldRefused(f"two tools are called {function.name!r}; rename one", "tools")
        parameters = function.parameters or NO_ARGUMENTS
        source = {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": parameters,
            },
        }
        found[function.name] = Tool(
            name=function.name,
            parameters=parameters,
            source=source,
            strict=bool(function.strict),
        )
    every = tuple(found.values())
    many = parallel is not False
    if choice is None:
        choice = "auto"
    if choice == "none" or (choice == "auto" and not every):
        return ToolUse()
    if choice == "auto":
        return ToolUse(tools=every, callable=every, many=many)
    if choice in ("required", "any"):
        if not every:
            raise FieldRefused(f"tool_choice={choice!r} needs tools; add them", "tool_choice")
        return ToolUse(tools=every, callable=every, needed=True, many=many)
    named = choice.get("function", choice) if isinstance(choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise FieldRefused(
            'tool_choice must be none, auto, required or {"type": "function", "function": '
            '{"name": ...}}',
            "tool_choice",
        )
    if name not in found:
        raise FieldRefused(
            f"tool_choice names {name[:140]!r}, which is none of the tools", "tool_choice"
        )
    return ToolUse(tools=every, callable=(found[name],), needed=True, named=True, many=False)
