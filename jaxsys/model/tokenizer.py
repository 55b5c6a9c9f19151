"""Text to token ids and back, over the `tokenizers` library, with one face for every model.

`Tokenizer` wraps any `tokenizers.Tokenizer` and knows what a server needs besides: which ids end a
generation, the chat template, and decoding token by token without splitting a character.
`ByteTokenizer` is the byte-level one: id b is byte b, special tokens follow.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxsys.errors import UsageError
from jaxsys.model.chat import CHATML_TEMPLATE, render_chat

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONG_TEXT = 10_000
"""Characters from which the interpreter is let go while a text is encoded; some 5 ms."""


class Tokenizer:
    """A tokenizer with its special ids and chat template.

    Attributes:
        backend: the wrapped `tokenizers.Tokenizer`.
        bos_id: id put before a text, or None.
        eos_ids: ids that end a generation, in no order of rank except that the first is `</s>`'s.
        chat_template: Jinja source, or None where the model has none.
        tool_template: the one for chats with tools, where the model has one apart.
        special_tokens: names templates use ("bos_token", "eos_token", ...) and their text.
        limit: ids that the model has vectors for, from 0; None where that is not known. Added
            tokens may lie beyond (those of images in a text model), but no text may hold them.
    """

    limit: int | None = None

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.chat_template = chat_template
        self.tool_template = tool_template
        self.special_tokens = dict(special_tokens or {})

    @property
    def vocab_size(self) -> int:
        """One past the largest id that texts may hold, special ones included."""
        return self._ids if self.limit is None else min(self._ids, self.limit)

    @functools.cached_property
    def _ids(self) -> int:
        """One past the largest id; some between may be free."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_fits(self, vocabulary: int) -> None:
        """Takes note of how many vectors the model has.

        Raises:
            UsageError: if an id of the vocabulary proper has none.
        """
        largest = max(self.backend.get_vocab(with_added_tokens=False).values(), default=-1)
        if largest >= vocabulary:
            raise UsageError(
                f"the tokenizer has {largest + 1} ids, the model only {vocabulary}; they do not "
                "belong together"
            )
        self.limit = vocabulary

    def _within(self, ids: list[int]) -> list[int]:
        if self.limit is not None and ids and max(ids) >= self.limit:
            token = max(ids)
            raise UsageError(
                f"the text holds the token {self.backend.id_to_token(token)!r} of id {token}, but "
                f"the model has vectors for {self.limit} ids; leave it out"
            )
        return ids

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Text to ids; special tokens written out in `text` become their ids.

        Args:
            text: any text.
            add_special: put the beginning-of-text id in front where the model wants one. Pass
                False for rendered chats, whose template has it already.

        Raises:
            UsageError: if `text` holds half of a surrogate pair, which no encoding can express.
        """
        _check_encodable(text)
        if len(text) < LONG_TEXT:
            return self._within(self.backend.encode(text, add_special_tokens=add_special).ids)
        # The same ids; only batches let other threads run meanwhile.
        batch = self.backend.encode_batch_fast([text], add_special_tokens=add_special)
        return self._within(batch[0].ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> "StreamDecoder":
        """A fresh decoder for one generation."""
        return StreamDecoder(self, skip_special=skip_special)

    def template_for(self, tools: Sequence[Any] | None) -> str | None:
        """The chat template of chats with these tools, or without any; None if there is none."""
        own = None if tools is None else self.tool_template
        return self.chat_template if own is None else own

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Messages to the text the model was tuned on; see `render_chat`.

        What is None in a message is left out of it, as transformers does.

        Raises:
            UsageError: if there is no template, or it refuses the messages.
        """
        template = self.template_for(tools)
        if template is None:
            raise UsageError("this model has no chat template; use plain completions instead")
        return render_chat(
            template,
            [{k: v for k, v in message.items() if v is not None} for message in messages],
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            tools=tools,
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Messages to the ids of a prompt."""
        text = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special=False)


class StreamDecoder:
    """Decodes one generation id by id; the pieces join to `decode` of all ids.

    A token may hold part of a character, and some decoders look at the token before. So each push
    decodes a short window and hands out only what is new, once it ends on a whole character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._settled = 0  # ids of the window whose text was handed out

    def push(self, token: int) -> str:
        """The text that became certain with this id; may be empty."""
        self._window.append(int(token))
        fresh = self._fresh()
        if not fresh or fresh.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return fresh

    def flush(self) -> str:
        """What is left at the end of a generation, broken characters as U+FFFD."""
        fresh = self._fresh()
        self._window, self._settled = [], 0
        return fresh

    def _fresh(self) -> str:
        before = self._decode(self._window[: self._settled])
        return self._decode(self._window)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


class ByteTokenizer(Tokenizer):
    """Bytes as ids 0 to 255, then eight special tokens: 264 ids, chats in ChatML.

    Saved as an ordinary `tokenizer.json` (a byte-level BPE without merges); `encode` takes a
    shortcut that yields the same ids.
    """

    SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>") + tuple(
        f"<|reserved_{index}|>" for index in range(4)
    )

    def __init__(self) -> None:
        vocabulary = {character: byte for byte, character in byte_characters().items()}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(
            [tokenizers.AddedToken(text, special=True, normalized=False) for text in self.SPECIAL]
        )
        super().__init__(
            backend,
            eos_ids=(256, 258),
            chat_template=CHATML_TEMPLATE,
            special_tokens={"eos_token": self.SPECIAL[0], "pad_token": self.SPECIAL[3]},
        )

    _any_special = re.compile("|".join(map(re.escape, SPECIAL)))

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Text to ids: its UTF-8 bytes, and special tokens where they are written out."""
        if self._any_special.search(text):
            return super().encode(text, add_special=add_special)
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text` as ids, uint8 [length]; special tokens are not looked for."""
        return np.frombuffer(_check_encodable(text), np.uint8)


def _check_encodable(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text holds {text[error.start]!r} at {error.start}, half of a surrogate pair; "
            "remove it or send the whole character"
        ) from error


def byte_characters() -> dict[int, str]:
    """The visible character that byte-level vocabularies write for each byte (GPT-2's map)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in visible}
    hidden = (byte for byte in range(256) if byte not in characters)
    return characters | {byte: chr(256 + index) for index, byte in enumerate(hidden)}
