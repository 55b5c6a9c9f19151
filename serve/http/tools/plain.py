"""For models whose chat template knows no tools: they are described in words, in Hermes' form.

Calls that were made stand in the assistant's text, results in the user's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsys.serve.http.tools.hermes import CLOSE, OPEN, Hermes

_WORDS = """You may call functions to help with the request. They are, as JSON schemas:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON between these marks:
{open}
{{"name": <name>, "arguments": <arguments>}}
{close}"""


class Plain(Hermes):
    """Where the template has no word for tools."""

    name = "plain"

    def fits(self, template: str) -> bool:
        return True


def told(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages that say all with system, user and assistant text.

    Args:
        tools: as the request has them; none are described where there are none.
    """
    found: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if role == "tool":
            text = f"<tool_response>\n{content}\n</tool_response>"
            if found and found[-1].get("results"):
                found[-1]["content"] += "\n" + text
            else:
                found.append({"role": "user", "content": text, "results": True})
            continue
        calls = message.get("tool_calls") or ()
        parts = [content] if content else []
        for call in calls:
            function = call["function"]
            arguments = function["arguments"]
            if isinstance(arguments, str):
                written = arguments or "{}"
            else:
                written = json.dumps(arguments, ensure_ascii=False)
            name = json.dumps(function["name"])
            parts.append(f'{OPEN}\n{{"name": {name}, "arguments": {written}}}\n{CLOSE}')
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        found.append(rest | {"content": "\n".join(parts)})
    for message in found:
        message.pop("results", None)
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        words = _WORDS.format(tools=lines, open=OPEN, close=CLOSE)
        if found and found[0]["role"] == "system":
            found[0]["content"] = f"{found[0]['content']}\n\n{words}"
        else:
            found.insert(0, {"role": "system", "content": words})
    return found
