"""gpt-oss: messages on channels; a call is one to=functions.name, reasoning is on analysis.

<|channel|>analysis<|message|>...<|end|><|start|>assistant
<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>
<|channel|>final<|message|>...<|return|>
"""

import re
from collections.abc import Callable, Sequence

from jaxsys.serve.grammars import quoted
from jaxsys.serve.http.tools.base import Marks, Reader, Thinking, Tool, ToolFormat, joined

CHANNEL, MESSAGE, CONSTRAIN = "<|channel|>", "<|message|>", "<|constrain|>"
START, ENDS = "<|start|>", ("<|end|>", "<|call|>", "<|return|>")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")


class _Reader(Reader):
    marks = (CHANNEL, MESSAGE, CONSTRAIN, START, *ENDS)
    thinks = False
    _to: Callable[[str], None] | None = None

    @property
    def reasoning(self) -> bool:
        return self.mode == "body" and self._to == self._reason

    def _pass_on(self, text: str) -> None:
        super()._pass_on(text)
        # The mark behind a call may end the answer, and is no text then.
        if self._scan is not None and self._scan.push(text)[1]:
            self._scan = None

    def _turn(self, last: bool) -> bool:
        if self.mode == "start":  # of a message's head
            begun = self._buffer.lstrip()
            heads = (CHANNEL, START, MESSAGE, "assistant", "to=")
            if begun.startswith(heads):
                self.mode = "head"
                return True
            if not last and any(head.startswith(begun) for head in heads):
                return False
            self._to = self._say
            self.mode = "body"
            return bool(self._buffer)
        if self.mode == "head":
            at = self._buffer.find(MESSAGE)
            if at < 0:
                if last:
                    self._buffer = ""
                return False
            head, self._buffer = self._buffer[:at], self._buffer[at + len(MESSAGE) :]
            channel, recipient = _CHANNEL.search(head), _RECIPIENT.search(head)
            name = channel[1] if channel else "final"
            if recipient is not None:
                self._begin(recipient[1].removeprefix("functions."))
                self._to = self._pass_on
            else:
                self._to = self._reason if name == "analysis" else self._say
            self.mode = "body"
            return bool(self._buffer)
        if self._until((*ENDS, START), self._to, last) is None:
            return False
        self.finished = self._calls
        self._scan = None
        self._space = ""
        self.mode = "start"
        return bool(self._buffer)


class Harmony(ToolFormat):
    """The form that OpenAI's open models speak."""

    name = "harmony"

    def fits(self, template: str) -> bool:
        return CHANNEL in template and MESSAGE in template

    def reader(self, tools: Sequence[Tool], thinking: Thinking) -> Reader:
        return _Reader(tools, thinking)

    def thinking(self, template: str, prompt: str) -> Thinking:
        return "may"

    def before(self, marks: Marks, thinking: Thinking, template: str) -> tuple[str, str]:
        rest, rules = marks.until("reasoning", "<|end|>")
        head = f"{marks(CHANNEL)} {quoted('analysis')} {marks(MESSAGE)}"
        tail = f"{marks(START)} {quoted('assistant')}"
        return "thought? ", f"thought: {head} {rest} {tail}\n" + rules

    def answers(self, marks: Marks, template: str) -> str:
        return f"{marks(CHANNEL)} {quoted('final')} {marks(MESSAGE)} "

    def calls(self, marks: Marks, tools: Sequence[Tool], many: bool, template: str) -> str:
        # It ends with its first call: the marks behind end the answer.
        ways = " | ".join(
            f"{quoted(f'commentary to=functions.{tool.name} ')} {marks(CONSTRAIN)} "
            f"{quoted('json')} {marks(MESSAGE)} arguments_{number}"
            for number, tool in enumerate(tools)
        )
        return joined("call", "", False) + f"call: {marks(CHANNEL)} ({ways})\n"
