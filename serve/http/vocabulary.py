"""What each token stands for: its own bytes and text, taken from its piece in the vocabulary.

Decoding one token alone tells less: SentencePiece's decoder drops the space that a first piece
begins with, and half a character becomes U+FFFD. So a piece is read by its decoder's own rules:

    byte-level   (GPT-2's map)   each character of the piece is a byte
    byte fallback                <0xE2> is that byte
    any other                    what the decoder makes of it behind another token
    added tokens                 their content, as it stands
"""

import json
import re
from typing import Any, NamedTuple

from jaxsys.model import Tokenizer
from jaxsys.model.tokenizer import byte_characters

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTES_OF = {character: byte for byte, character in byte_characters().items()}


class Piece(NamedTuple):
    """What a token stands for."""

    data: bytes
    """Its bytes; part of a character where `text` is None."""
    text: str | None
    """Behind other text; None where the bytes must be joined with their neighbours' to be text."""
    first: str | None
    """As `text`, where nothing stands before it."""
    special: bool = False


class Vocabulary:
    """The pieces of one tokenizer, read when they are first asked for."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        backend = tokenizer.backend
        added = backend.get_added_tokens_decoder()
        self._added: dict[int, str] = {token: entry.content for token, entry in added.items()}
        self.special = frozenset(token for token, entry in added.items() if entry.special)
        """Tokens that are no text unless they are asked for."""
        kinds = _kinds(backend.decoder)
        self._byte_level = "ByteLevel" in kinds
        self.each_byte = "ByteFallback" in kinds
        """Whether each broken byte becomes a U+FFFD, instead of each broken character."""
        self._pieces: dict[int, Piece] = {}
        self._plain: dict[int, tuple[str | None, str | None]] = {}
        """By token: its text behind other text, and where nothing stands before it."""
        self._anchor = None if self._byte_level else self._find_anchor()

    def longest(self) -> int:
        """Most characters that a token stands for; some 30 ms for 100,000 tokens."""
        return max(map(len, self.tokenizer.backend.get_vocab(with_added_tokens=True)), default=1)

    def piece(self, token: int) -> Piece:
        """What a token stands for; a token that the vocabulary lacks is nothing."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._read(token)
        return found

    def plain(self, token: int, *, first: bool) -> str | None:
        """Its text where that is known without its neighbours, and is text in any case."""
        known = self._plain.get(token)
        if known is None:
            piece = self.piece(token)
            both: tuple[str | None, str | None] = piece.text, piece.first
            if piece.text is None and piece.data.isascii():
                text = piece.data.decode("ascii")
                both = text, text
            known = self._plain[token] = (None, None) if piece.special else both
        return known[first]

    def name(self, token: int, *, first: bool = False) -> str:
        """A token's text; where its bytes are none, they are spelt out as OpenAI does."""
        piece = self.piece(token)
        text = piece.first if first else piece.text
        if text is not None:
            return text
        try:
            return piece.data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece.data)

    def _read(self, token: int) -> Piece:
        piece = self.tokenizer.backend.id_to_token(token)
        if piece is None:
            return Piece(b"", "", "")
        if token in self._added:
            content = self._added[token]
            return Piece(content.encode(errors="replace"), content, content, token in self.special)
        if self._byte_level:
            try:
                data = bytes(_BYTES_OF[character] for character in piece)
            except KeyError:
                data = piece.encode()
            return Piece(data, None, None)
        if self.each_byte and (byte := _BYTE.fullmatch(piece)):
            return Piece(bytes([int(byte[1], 16)]), None, None)
        first = self._decode([token])
        text = first
        if self._anchor is not None:
            before = self._decode([self._anchor])
            both = self._decode([self._anchor, token])
            text = both[len(before) :] if both.startswith(before) else first
        return Piece(text.encode(), text, first)

    def _find_anchor(self) -> int | None:
        """A token that is ordinary text, which others can be decoded behind."""
        for token in range(self.tokenizer.vocab_size):
            if token in self._added or _BYTE.fullmatch(
                self.tokenizer.backend.id_to_token(token) or ""
            ):
                continue
            if self._decode([token]).isalnum():
                return token
        return None

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.backend.decode(tokens, skip_special_tokens=False)


def _kinds(decoder: Any) -> set[str]:
    """The names of a decoder's parts."""
    if decoder is None:
        return set()
    found: set[str] = set()

    def look(part: Any) -> None:
        found.add(str(part.get("type")))
        for inner in part.get("decoders", ()):
            look(inner)

    look(json.loads(decoder.__getstate__()))
    return found
