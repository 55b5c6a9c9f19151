"""What families of models have in common in how they call tools, and how their answers are read.

A `ToolFormat` says how a family writes calls: as a grammar, where one must be made, and as a
`Reader`, which takes an answer apart as it comes: content, reasoning, calls. A reader holds back
only what may yet turn out to be a mark, and the space before one.
"""

import abc
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxsys.model import Tokenizer
from jaxsys.serve.grammars import quoted
from jaxsys.serve.http.structured import closed

Thinking = Literal["no", "may", "open"]
"""Whether an answer holds reasoning: never, where it begins with its mark, from the first token."""

THINK, UNTHINK = "<think>", "</think>"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that may be called."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments."""
    source: Mapping[str, Any]
    """As the request has it, for chat templates."""
    strict: bool = False
    """Whether arguments must follow the schema also where the model calls of itself."""


@dataclasses.dataclass(slots=True)
class CallPart:
    """A call, or the next part of one."""

    index: int
    name: str | None = None
    """With the first part."""
    arguments: str = ""


@dataclasses.dataclass(slots=True)
class Said:
    """What an answer has said, or how it goes on."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPart] = dataclasses.field(default_factory=list)

    def add(self, other: "Said") -> None:
        """Goes on with `other`; parts of one call become one."""
        self.content += other.content
        self.reasoning += other.reasoning
        for part in other.calls:
            last = self.calls[-1] if self.calls else None
            if last is not None and last.index == part.index:
                last.arguments += part.arguments
            else:
                self.calls.append(dataclasses.replace(part))

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class Marks:
    """How a tokenizer's marks stand in a grammar: as tokens, where they are ones."""

    def __init__(self, tokenizer: Tokenizer):
        added = tokenizer.backend.get_added_tokens_decoder()
        self._tokens = {entry.content: token for token, entry in added.items()}

    def __call__(self, text: str) -> str:
        """Text in a Lark grammar."""
        token = self._tokens.get(text)
        # Quoted text never stands for an added token.
        return quoted(text) if token is None else f"<[{token}]>"

    def named(self, text: str) -> bool:
        """Whether a mark is a token."""
        return text in self._tokens

    def until(self, rule: str, mark: str) -> tuple[str, str]:
        """Any text up to a mark, and the mark: how to name it, and its rules."""
        if mark in self._tokens:
            return rule, f"{rule}: ANY {self(mark)}\nANY: /(.|\\n)*/\n"
        return rule, f"{rule}[suffix={quoted(mark)}]: /(.|\\n)*/\n"


class Reader:
    """Takes one answer apart. Subclasses read what follows their marks in `_turn`."""

    marks: tuple[str, ...] = ()
    """Special tokens that are looked at; others are no text."""
    opens: str = ""
    """The mark before calls, which content ends at."""
    thinks = True
    """Whether reasoning stands between the marks that most families use."""

    def __init__(self, tools: Sequence[Tool], thinking: Thinking):
        self.tools = {tool.name: tool for tool in tools}
        self.mode = "think" if thinking == "open" else "start"
        self._thinking = thinking
        self._buffer = ""
        self._space = ""
        """Held back before what may be a call."""
        self._said = Said()
        self._calls = 0
        self.finished = 0
        """Calls that are complete."""
        self._scan: _JsonScan | None = None
        self.must_call = False
        """There is no text but calls: what is left of one that breaks off is none either."""

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self.mode == "think"

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        return self._calls > 0

    @property
    def whole(self) -> bool:
        """Whether there were calls, and the last one's arguments did not break off."""
        return self.called and self._scan is None

    def push(self, text: str, *, special: bool = False) -> Said:
        """What has become certain with the next token's text."""
        if special and text not in (*self.marks, THINK, UNTHINK):
            return Said()
        self._buffer += text
        return self._run(last=False)

    def close(self) -> Said:
        """What is left when the answer has ended."""
        said = self._run(last=True)
        if self.must_call:
            said.content = ""
        elif not self.called:
            said.content += self._space
        self._space = ""
        return said

    def _run(self, *, last: bool) -> Said:
        while self._turn(last):
            pass
        said, self._said = self._said, Said()
        return said

    # --- for subclasses -----------------------------------------------------------------------

    def _turn(self, last: bool) -> bool:
        """Reads on in `_buffer`; whether to look again."""
        if self.mode == "start":
            return self._start(last)
        if self.mode == "think":
            return self._think(last)
        if self.mode == "text":
            return self._text(last)
        return self._marked(last)

    def _marked(self, last: bool) -> bool:
        """Reads on behind a mark."""
        raise NotImplementedError

    def _start(self, last: bool) -> bool:
        """Whether the answer begins with reasoning."""
        begun = self._buffer.lstrip()
        undecided = not begun or (THINK.startswith(begun) and begun != THINK)
        if undecided and self._thinking == "may" and self.thinks and not last:
            return False
        if self.thinks and begun.startswith(THINK):
            self._buffer = begun[len(THINK) :]
            self.mode = "think"
        else:
            self.mode = "text"
        return True

    def _think(self, last: bool) -> bool:
        found = self._until((UNTHINK,), self._reason, last)
        if found is None:
            return False
        self._space = ""
        self._buffer = self._buffer.lstrip()
        self.mode = "after"
        return self._after(last)

    def _after(self, last: bool) -> bool:
        """Space behind reasoning is no content."""
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self.mode = "text"
        return True

    def _text(self, last: bool) -> bool:
        if not self.opens:
            self._say(self._take())
            return False
        if self._until((self.opens,), self._say, last) is None:
            return False
        self._space = ""
        self.mode = "call"
        return True

    def _take(self) -> str:
        text, self._buffer = self._buffer, ""
        return text

    def _say(self, text: str) -> None:
        """Content; space at its end waits for more."""
        text = self._space + text
        kept = text.rstrip() if self.opens else text
        self._space = text[len(kept) :]
        self._said.content += kept

    def _reason(self, text: str) -> None:
        text = self._space + text
        if not self._said.reasoning and not self._has_reasoned:
            text = text.lstrip("\n")
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._has_reasoned = self._has_reasoned or bool(kept)
        self._said.reasoning += kept

    _has_reasoned = False

    def _until(
        self, marks: Sequence[str], say: Callable[[str], None] | None, last: bool
    ) -> str | None:
        """Reads up to the first of some marks, which it takes off; None where none is there yet.

        Args:
            say: takes the text before; without, it stays where no mark is found, else is dropped.
        """
        buffer = self._buffer
        found = [(at, mark) for mark in marks if (at := buffer.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            if say is not None and at:
                say(buffer[:at])
            self._buffer = buffer[at + len(mark) :]
            return mark
        if say is not None:
            keep = 0 if last else max(_overlap(buffer, mark) for mark in marks)
            text = buffer[: len(buffer) - keep]
            self._buffer = buffer[len(text) :]
            if text:
                say(text)
        return None

    def _begin(self, name: str) -> None:
        """A call begins, whose arguments follow."""
        self._said.calls.append(CallPart(self._calls, name))
        self._calls += 1
        self._scan = _JsonScan()

    def _whole(self, name: str, arguments: str) -> None:
        """A call at once."""
        self._begin(name)
        self._pass_on(arguments)
        self._scan = None
        self.finished += 1

    def _pass_on(self, text: str) -> None:
        if not text:
            return
        index = self._calls - 1
        last = self._said.calls[-1] if self._said.calls else None
        if last is not None and last.index == index:
            last.arguments += text
        else:
            self._said.calls.append(CallPart(index, None, text))

    def _arguments(self, last: bool) -> bool:
        """Passes on the JSON value that the buffer goes on with; whether it is whole."""
        assert self._scan is not None
        used, whole = self._scan.push(self._buffer)
        self._pass_on(self._buffer[:used])
        self._buffer = self._buffer[used:]
        if whole:
            self._scan = None
            self.finished += 1
        return whole

    def _arguments_to(self, end: str, then: str, last: bool) -> bool | None:
        """In arguments or behind them, reads up to the mark `end`, behind which comes mode `then`.

        Returns what `_marked` does, and None where no arguments are open.
        """
        if self.mode == "arguments":
            if not self._arguments(last):
                return False
            self.mode = "rest"
        elif self.mode != "rest":
            return None
        if self._until((end,), None, last) is None:
            if last:
                self._buffer = ""
            return False
        self.mode = then
        return True

    def _envelope(self) -> re.Match[str] | None:
        """{"name": ..., "arguments": up to the arguments, at the beginning of the buffer."""
        return _ENVELOPE.match(self._buffer)


_ENVELOPE = re.compile(
    r'\s*\{\s*(?:"(?:type|id)"\s*:\s*"[^"]*"\s*,\s*)*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class _JsonScan:
    """Finds the end of a JSON value in a growing text."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._begun = False

    def push(self, text: str) -> tuple[int, bool]:
        """How many characters belong to the value, and whether it is whole."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                if character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = self._begun = True
            elif character in "{[":
                self._depth += 1
                self._begun = True
            elif character in "}]":
                self._depth -= 1
            if self._begun and not self._quoted and self._depth == 0:
                return at + 1, True
        return len(text), False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What an answer must be made of: calls, other text, or either."""

    tools: Sequence[Tool]
    many: bool
    """Whether several calls may follow each other."""
    needed: bool
    """Whether there must be a call."""
    answer: str | None = None
    """Grammar of an answer without calls; None where that is free or not allowed."""


class ToolFormat(abc.ABC):
    """How a family of models writes calls."""

    name: str
    opening: str | None = None
    """The mark that calls begin with, before which an answer may say anything; None where they
    can only be told from other text when they are there."""
    id_length: int | None = None
    """Characters that the family's templates want in the id of a call."""

    @abc.abstractmethod
    def fits(self, template: str) -> bool:
        """Whether a chat template speaks this way."""

    @abc.abstractmethod
    def reader(self, tools: Sequence[Tool], thinking: Thinking) -> Reader:
        """A reader of one answer."""

    @abc.abstractmethod
    def calls(self, marks: Marks, tools: Sequence[Tool], many: bool, template: str) -> str:
        """Lark rules of which `calls` is one call or more; `arguments_N` is tool N's schema."""

    def thinking(self, template: str, prompt: str) -> Thinking:
        """Whether an answer to a rendered chat holds reasoning."""
        if THINK not in template:
            return "no"
        begun, ended = prompt.rfind(THINK), prompt.rfind(UNTHINK)
        if begun > ended and not prompt[begun + len(THINK) :].strip():
            return "open"
        return "no" if ended >= 0 and not prompt[ended + len(UNTHINK) :].strip() else "may"

    def before(self, marks: Marks, thinking: Thinking, template: str) -> tuple[str, str]:
        """What may stand before an answer: how to name it, and its rules."""
        if thinking == "no":
            return "", ""
        space = "SPACE: /[ \\n]{0,4}/\n"
        rest, rules = marks.until("reasoning", UNTHINK)
        if thinking == "open":
            return f"{rest} SPACE ", rules + space
        return "thought? ", f"thought: {marks(THINK)} {rest} SPACE\n" + rules + space

    def answers(self, marks: Marks, template: str) -> str:
        """What stands before an answer without calls, in Lark; most families have nothing."""
        return ""

    def grammar(
        self, marks: Marks, writing: Writing, thinking: Thinking, template: str
    ) -> str | None:
        """The grammar of a whole answer; None where it is free."""
        if not writing.needed and writing.answer is None:
            return self._free(marks, writing, thinking, template)
        alone = writing.answer is not None and not writing.tools and thinking == "no"
        if alone and not self.answers(marks, template):
            return writing.answer
        before, rules = self.before(marks, thinking, template)
        ways = []
        if writing.tools:
            ways.append("calls")
            rules += self.calls(marks, writing.tools, writing.many, template)
            rules += _arguments(writing.tools)
        grammars: list[dict[str, Any]] = []
        if writing.answer is not None:
            ways.append(f"{self.answers(marks, template)}@answer")
            made = json.loads(writing.answer)["grammars"] if _is_json(writing.answer) else None
            # One grammar as llguidance's own functions make them, Lark texts as they stand.
            own = made[0] if made else {"lark_grammar": writing.answer}
            grammars.append({**own, "name": "answer"})
        start = f"start: {before}({' | '.join(ways)})\n"
        return json.dumps({"grammars": [{"lark_grammar": start + rules}, *grammars]})

    def _free(
        self, marks: Marks, writing: Writing, thinking: Thinking, template: str
    ) -> str | None:
        """Any text, behind which calls may follow, where strict tools want their schemas kept."""
        if self.opening is None or not any(tool.strict for tool in writing.tools):
            return None
        if not marks.named(self.opening):  # then it could be spelt within the text
            return None
        before, rules = self.before(marks, thinking, template)
        tools = [
            tool if tool.strict else dataclasses.replace(tool, parameters={"type": "object"})
            for tool in writing.tools
        ]
        rules += self.calls(marks, tools, writing.many, template) + _arguments(tools)
        start = f"start: {before}FREE calls?\nFREE: /(.|\\n)*/\n"
        return json.dumps({"grammars": [{"lark_grammar": start + rules}]})


def _arguments(tools: Sequence[Tool]) -> str:
    """Rules of what each tool may be given: arguments that it names, and no others."""
    schemas = [{**closed(tool.parameters), "x-guidance": _STRICT} for tool in tools]
    return "".join(
        f"arguments_{number}: %json {json.dumps(schema)}\n" for number, schema in enumerate(schemas)
    )


_STRICT = {"whitespace_pattern": " ", "lenient": False, "coerce_one_of": False}
"""Arguments stand on one line, as models are trained to write them."""


def _is_json(grammar: str) -> bool:
    return grammar.startswith("{")


def joined(calls: str, between: str, many: bool) -> str:
    """One call, or several with something between them."""
    return f"calls: {calls} ({between} {calls})*\n" if many else f"calls: {calls}\n"


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
