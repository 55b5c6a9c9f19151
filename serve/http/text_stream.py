"""Tokens to text as they come, ended by stop strings.

Text that might be the beginning of a stop string is held back until the next tokens decide. A stop
string itself is never put out, nor anything after it.
"""

from collections.abc import Sequence

from jaxsys.model import Tokenizer


class TextStream:
    """The text of one generation."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._decoder = tokenizer.stream()
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string was met; nothing is put out from then on."""

    def push(self, token: int) -> str:
        """Text that became certain with `token`."""
        return self._release(self._decoder.push(token), last=False)

    def flush(self) -> str:
        """Text still held when the generation has ended."""
        return self._release(self._decoder.flush(), last=True)

    def _release(self, fresh: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
