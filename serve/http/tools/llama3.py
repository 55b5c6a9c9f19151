"""Llama 3.1 to 3.3: the answer is {"name": ..., "parameters": ...}, one call only."""

import json
from collections.abc import Sequence

from jaxsys.serve.grammars import quoted
from jaxsys.serve.http.tools.base import Marks, Reader, Thinking, Tool, ToolFormat

PYTHON = "<|python_tag|>"
UNDECIDED = 256
"""Characters of an answer that may yet be a call."""


class _Reader(Reader):
    marks = (PYTHON,)
    thinks = False

    def _turn(self, last: bool) -> bool:
        if self.mode == "text":
            self._say(self._take())
            return False
        if self.mode == "arguments":
            if not self._arguments(last):
                return False
            self.mode = "rest"
            return True
        if self.mode == "rest":  # the closing brace; behind ";" another call may follow
            rest = self._buffer.lstrip()
            if rest.startswith("}"):
                rest = rest[1:].lstrip()
            if rest.startswith(";"):
                self._buffer = rest[1:]
                self.mode = "start"
                return bool(self._buffer)
            self._buffer = "" if last else self._buffer
            return False
        begun = self._buffer.lstrip()
        if begun.startswith(PYTHON):
            begun = begun[len(PYTHON) :].lstrip()
        elif PYTHON.startswith(begun) and not last:
            return False
        if not begun.startswith("{"):
            self.mode = "text"
            return True
        self._buffer = begun
        found = self._envelope()
        if found is not None:
            name = json.loads(f'"{found[1]}"')
            if name in self.tools:
                self._begin(name)
                self._buffer = begun[found.end() :]
                self.mode = "arguments"
                return True
        if found is not None or last or len(begun) > UNDECIDED:
            self.mode = "text"
            return True
        return False


class Llama3(ToolFormat):
    """Bare JSON, also behind <|python_tag|>."""

    name = "llama3"

    def fits(self, template: str) -> bool:
        return PYTHON in template or ('"parameters":' in template and "ipython" in template)

    def reader(self, tools: Sequence[Tool], thinking: Thinking) -> Reader:
        return _Reader(tools, thinking)

    def calls(self, marks: Marks, tools: Sequence[Tool], many: bool, template: str) -> str:
        ways = " | ".join(
            quoted(f'{{"name": {json.dumps(tool.name)}, "parameters": ')
            + f" arguments_{number} {quoted('}')}"
            for number, tool in enumerate(tools)
        )
        return f"calls: {ways}\n"
