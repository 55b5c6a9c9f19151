"""DeepSeek V3, R1 and V3.1: calls between marks, the name before or behind the one in the middle.

V3.1    <|call begin|>name<|sep|>{...}<|call end|>
V3, R1  <|call begin|>function<|sep|>name, a fenced json block <|call end|>
"""

import re
from collections.abc import Sequence

from jaxsys.serve.grammars import quoted
from jaxsys.serve.http.tools.base import Marks, Reader, Thinking, Tool, ToolFormat

ALL, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
MIDDLE = "<｜tool▁sep｜>"
_FENCED = re.compile(r"\s*([^\n{]+?)\s*\n\s*(?:```json)?\s*(?=\{)")


class _Reader(Reader):
    marks = (ALL, ALL_END, ONE, ONE_END, MIDDLE)
    opens = ALL

    def _marked(self, last: bool) -> bool:
        if self.mode == "after":
            return self._after(last)
        read = self._arguments_to(ONE_END, "call", last)
        if read is not None:
            return read
        if self.mode == "call":
            mark = self._until((ONE, ALL_END), None, last)
            if mark is None:
                if last and self._buffer.strip():
                    self._say(self._take())
                return False
            self.mode = "name" if mark == ONE else "after"
            return bool(self._buffer)
        at = self._buffer.find(MIDDLE)
        if at < 0:
            return False
        kind, rest = self._buffer[:at].strip(), self._buffer[at + len(MIDDLE) :]
        if kind == "function":
            found = _FENCED.match(rest)
            if found is None:
                return False
            kind, rest = found[1], rest[found.end() :]
        self._begin(kind)
        self._buffer = rest
        self.mode = "arguments"
        return True


class DeepSeek(ToolFormat):
    """Which of the two forms is written the template says; both are read."""

    name = "deepseek"
    opening = ALL

    def fits(self, template: str) -> bool:
        return ONE in template

    def reader(self, tools: Sequence[Tool], thinking: Thinking) -> Reader:
        return _Reader(tools, thinking)

    def calls(self, marks: Marks, tools: Sequence[Tool], many: bool, template: str) -> str:
        fenced = "```json" in template
        before, behind, end = "", "", ""
        if fenced:
            before, behind = f"{quoted('function')} {marks(MIDDLE)} ", "\n```json\n"
            end = quoted("\n```")
        ways = []
        for number, tool in enumerate(tools):
            name = quoted(tool.name + behind)
            middle = "" if fenced else marks(MIDDLE)
            ways.append(f"{before}{name} {middle} arguments_{number} {end}")
        more = f"({quoted(chr(10))}? call)*" if many else ""
        return (
            f"calls: {marks(ALL)} call {more} {marks(ALL_END)}\n"
            f"call: {marks(ONE)} ({' | '.join(ways)}) {marks(ONE_END)}\n"
        )
