"""Mistral: behind [TOOL_CALLS] a list of calls (Nemo), or name[ARGS]arguments for each (later)."""

import json
from collections.abc import Sequence

from jaxsys.serve.grammars import quoted
from jaxsys.serve.http.tools.base import Marks, Reader, Thinking, Tool, ToolFormat, joined

CALLS, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class _Reader(Reader):
    marks = (CALLS, ID, ARGUMENTS)
    opens = CALLS

    def _marked(self, last: bool) -> bool:
        if self.mode == "after":
            return self._after(last)
        if self.mode in ("arguments", "item arguments"):
            if not self._arguments(last):
                return False
            self.mode = "item rest" if self.mode == "item arguments" else "after"
            return bool(self._buffer)
        if self.mode == "item rest":  # an id may follow the arguments
            if self._until(("}",), None, last) is None:
                return False
            self.mode = "list"
            return True
        if self.mode == "list":
            self._buffer = self._buffer.lstrip(" \n,[")
            if self._buffer.startswith("]"):
                self._buffer = self._buffer[1:]
                self.mode = "after"
                return bool(self._buffer)
            found = self._envelope()
            if found is not None:
                self._begin(json.loads(f'"{found[1]}"'))
                self._buffer = self._buffer[found.end() :]
                self.mode = "item arguments"
                return True
            if last and self._buffer:
                self._say(self._take())
            return False
        begun = self._buffer.lstrip()
        if begun.startswith("["):
            if any(mark.startswith(begun) for mark in (ID, ARGUMENTS)) and not last:
                return False
            self.mode = "list"
            return True
        at = min((at for mark in (ID, ARGUMENTS, "{") if (at := begun.find(mark)) >= 0), default=-1)
        if at < 0:
            if last and begun:
                self._say(CALLS + self._take())
            return False
        rest = begun[at:]
        if rest.startswith(ID):
            if ARGUMENTS not in rest and not last:
                return False
            rest = rest[rest.find(ARGUMENTS) :]
        self._begin(begun[:at].strip())
        self._buffer = rest.removeprefix(ARGUMENTS)
        self.mode = "arguments"
        return True


class Mistral(ToolFormat):
    """Both forms are read; which one is written the template says."""

    name = "mistral"
    opening = CALLS
    id_length = 9

    def fits(self, template: str) -> bool:
        return CALLS in template

    def reader(self, tools: Sequence[Tool], thinking: Thinking) -> Reader:
        return _Reader(tools, thinking)

    def calls(self, marks: Marks, tools: Sequence[Tool], many: bool, template: str) -> str:
        if ARGUMENTS in template:
            middle = f"{marks(ID)} ID {marks(ARGUMENTS)}" if ID in template else marks(ARGUMENTS)
            ways = " | ".join(
                f"{quoted(tool.name)} {middle} arguments_{number}"
                for number, tool in enumerate(tools)
            )
            rules = f"call: {marks(CALLS)} ({ways})\n"
            return joined("call", "", many) + rules + "ID: /[a-zA-Z0-9]{9}/\n"
        ways = " | ".join(
            quoted(f'{{"name": {json.dumps(tool.name)}, "arguments": ') + f" arguments_{number}"
            for number, tool in enumerate(tools)
        )
        more = f"({quoted(', ')} item)*" if many else ""
        end = quoted(', "id": "') + " ID " + quoted('"}')
        return (
            f'calls: {marks(CALLS)} "[" item {more} "]"\nitem: ({ways}) {end}\n'
            "ID: /[a-zA-Z0-9]{9}/\n"
        )
