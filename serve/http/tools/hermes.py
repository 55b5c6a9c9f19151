"""Hermes, Qwen 2.5 and 3, Granite 4: <tool_call> {"name": ..., "arguments": ...} </tool_call>."""

import json
from collections.abc import Sequence

from jaxsys.serve.grammars import quoted
from jaxsys.serve.http.tools.base import Marks, Reader, Thinking, Tool, ToolFormat, joined

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class _Reader(Reader):
    marks = (OPEN, CLOSE)
    opens = OPEN

    def _marked(self, last: bool) -> bool:
        if self.mode == "after":
            return self._after(last)
        read = self._arguments_to(CLOSE, "after", last)
        if read is not None:
            return read
        found = self._envelope()
        if found is not None:
            self._begin(json.loads(f'"{found[1]}"'))
            self._buffer = self._buffer[found.end() :]
            self.mode = "arguments"
            return True
        # Not in that order: it is read when it is whole.
        at = self._buffer.find(CLOSE)
        if at < 0 and not last:
            return False
        inner = self._buffer if at < 0 else self._buffer[:at]
        self._buffer = "" if at < 0 else self._buffer[at + len(CLOSE) :]
        self.mode = "after"
        try:
            call = json.loads(inner)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
            if not isinstance(name, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError):
            self._say(OPEN + inner + ("" if at < 0 else CLOSE))  # no call: the client sees it
        else:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
            self._whole(name, text)
        return bool(self._buffer)


class Hermes(ToolFormat):
    """Named after the models that began it."""

    name = "hermes"
    opening = OPEN

    def fits(self, template: str) -> bool:
        return OPEN in template and "<function=" not in template

    def reader(self, tools: Sequence[Tool], thinking: Thinking) -> Reader:
        return _Reader(tools, thinking)

    def calls(self, marks: Marks, tools: Sequence[Tool], many: bool, template: str) -> str:
        inner = " | ".join(
            f"{quoted(_head(tool.name))} arguments_{number} {quoted('}')}"
            for number, tool in enumerate(tools)
        )
        rules = f'call: {marks(OPEN)} "\\n" ({inner}) "\\n" {marks(CLOSE)}\n'
        return joined("call", '"\\n"', many) + rules


def _head(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments": '
