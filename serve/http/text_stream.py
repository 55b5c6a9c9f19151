"""Tokens to text as they come, each with its own part of it, ended by stop strings.

The text is what the tokenizer makes of prompt and answer together, less the prompt: the first token
keeps its space, and a character that the prompt began is whole. Each token's own part is what it
adds, so parts always join to the text; of tokens that share a character the last one has it.

Text that might be the beginning of a stop string is held back, with its tokens, until the next ones
decide. A stop string itself is not put out unless asked for, nor anything after it. Special tokens
are no text unless asked for, yet stop strings may name them.
"""

import codecs
import dataclasses
from collections import deque
from collections.abc import Sequence

from jaxsys.model import Tokenizer
from jaxsys.serve.http.vocabulary import Vocabulary
from jaxsys.serve.outcomes import TokenLogprobs

PRIMING = 8
"""Tokens of the prompt that may begin the character which the answer ends: 4 at most do."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("jaxsys-each-byte", _replace_each)


@dataclasses.dataclass(slots=True, eq=False)
class Spoken:
    """A token and its part of the text."""

    token: int
    beside: TokenLogprobs | None = None
    text: str = ""
    data: bytes = b""
    """The bytes it adds to the text, whole characters or not."""
    first: bool = False
    """Whether nothing stood before it."""
    matched: str = ""
    """What stop strings see of it: a special token that is no text can be named by one."""


class TextStream:
    """The text of one generation."""

    def __init__(
        self,
        tokenizer: Tokenizer | Vocabulary,
        stop: Sequence[str] = (),
        *,
        prompt: Sequence[int] = (),
        skip_special: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ):
        """
        Args:
            tokenizer: or, to share what is known of its tokens, its vocabulary.
            stop: strings that end the text.
            prompt: what the text goes on from.
            skip_special: whether special tokens are no text.
            include_stop: whether the stop string that was met is put out.
            min_tokens: tokens at the beginning that stop strings do not see.
        """
        self.vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary(tokenizer)
        self._stop = tuple(stop)
        self._skip_special = skip_special
        self._include_stop = include_stop
        self._unseen = min_tokens
        self._begun = any(self._shows(token) for token in prompt)
        each_byte = self.vocabulary.each_byte
        self._utf8 = codecs.getincrementaldecoder("utf-8")(
            "jaxsys-each-byte" if each_byte else "replace"
        )
        self._open: Spoken | None = None
        """The last token, while the character that its bytes begin is not whole."""
        self._held: deque[Spoken] = deque()
        self._tail = ""
        """What stop strings see of `_held`."""
        self.stopped = False
        """Whether a stop string was met; nothing is put out from then on."""
        self._released: list[Spoken] = []
        self._primed = 0
        """Bytes of a character that the prompt began."""
        for token in prompt[-PRIMING:]:
            self._decode(Spoken(token))
        self._primed = len(self._utf8.getstate()[0])

    def push(self, token: int, beside: TokenLogprobs | None = None) -> str:
        """The text that became certain with `token`; its tokens are for `take`."""
        if self.stopped:
            return ""
        if not self._stop and self._open is None and not self._primed:
            first = not self._begun
            text = self.vocabulary.plain(token, first=first)
            if text is not None:  # as most are, and nothing waits for what comes next
                self._begun = True
                data = text.encode(errors="replace")
                self._released.append(Spoken(token, beside, text, data, first, text))
                return text
        fresh = Spoken(token, beside, first=not self._begun)
        self._decode(fresh)
        self._begun = self._begun or self._shows(token)
        settled = []
        if self._open is not None:
            settled.append(self._open)
            self._open = None
        if self._utf8.getstate()[0]:
            self._open = fresh
        else:
            settled.append(fresh)
        return self._release(settled, last=False)

    def flush(self) -> str:
        """What is still held when the generation has ended, broken characters as U+FFFD."""
        if self.stopped:
            return ""
        settled = []
        if self._open is not None:
            rest = self._text_of(b"", final=True)
            self._open.text += rest
            self._open.matched += rest
            settled.append(self._open)
            self._open = None
        return self._release(settled, last=True)

    def take(self) -> list[Spoken]:
        """The tokens whose text was put out since the last call."""
        taken, self._released = self._released, []
        return taken

    def _text_of(self, data: bytes, *, final: bool = False) -> str:
        text = self._utf8.decode(data, final=final)
        if self._primed and text:
            # The prompt's own text has the mark already, of a character that came to nothing.
            if text[0] == REPLACEMENT:
                text = text[self._primed if self.vocabulary.each_byte else 1 :]
            self._primed = 0
        return text

    def _shows(self, token: int) -> bool:
        return not (self._skip_special and token in self.vocabulary.special)

    def _decode(self, fresh: Spoken) -> None:
        """Finds what a token adds to the text so far."""
        piece = self.vocabulary.piece(fresh.token)
        if piece.special and self._skip_special:
            # The decoder drops it before anything else, also between halves of a character.
            named = piece.text or ""
            fresh.matched = named if any(named in stop for stop in self._stop) else ""
            return
        fresh.data = piece.data
        text = piece.first if fresh.first else piece.text
        if text is None:
            fresh.text = self._text_of(piece.data)
        else:
            fresh.text = self._text_of(b"", final=True) + text
            fresh.data = text.encode(errors="replace")
        fresh.matched = fresh.text

    def _release(self, settled: list[Spoken], *, last: bool) -> str:
        released = settled if not self._stop else self._search(settled, last=last)
        self._released += released
        return text_of(released)

    def _search(self, settled: list[Spoken], *, last: bool) -> list[Spoken]:
        """What can be put out, now that these are known too."""
        released: list[Spoken] = []
        for one in settled:
            if self._unseen > 0:  # before anything is held
                self._unseen -= 1
                released.append(one)
                continue
            self._held.append(one)
            self._tail += one.matched
            # The least place counts; of those there, the first that was given.
            found = [(at, stop) for stop in self._stop if (at := self._tail.find(stop)) >= 0]
            if found:
                at, stop = min(found, key=lambda pair: pair[0])
                return released + self._cut(at, at + len(stop))
        keep = 0 if last else max(_overlap(self._tail, stop) for stop in self._stop)
        while self._held and len(self._tail) - len(self._held[0].matched) >= keep:
            one = self._held.popleft()
            self._tail = self._tail[len(one.matched) :]
            released.append(one)
        return released

    def _cut(self, begin: int, end: int) -> list[Spoken]:
        """The held tokens up to the stop string at these places, at which all ends."""
        self.stopped = True
        most = end if self._include_stop else begin
        released = []
        place = 0
        for one in self._held:
            if place >= most and one.matched:
                break
            left = most - place
            if not one.text and one.matched and place >= begin:  # a special token, asked for
                one.text, one.data = one.matched, one.matched.encode()
            if len(one.text) > left:
                one.text = one.text[:left]
                one.data = one.text.encode(errors="replace")
            place += len(one.matched)
            released.append(one)
        self._held.clear()
        self._tail = ""
        return released


def text_of(tokens: Sequence[Spoken]) -> str:
    """The text that tokens join to."""
    return "".join(one.text for one in tokens)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
