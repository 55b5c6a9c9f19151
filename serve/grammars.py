"""Grammars that outputs follow: which tokens may come next, as packed bits for the device.

A grammar is text of llguidance's own form, made of a JSON schema, a regular expression, choices or
a context-free grammar. Following one is the host's work: a `Follower` takes the tokens that were
put out and fills a row of a mask, bit t % 32 of word t // 32 for token t. Its state is a function
of grammar and tokens alone, so it is made again wherever a request goes on.

What a schema says and llguidance cannot hold is refused: nothing is loosened.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.model import Tokenizer

MAX_GRAMMAR = 1 << 18
"""Characters of a grammar: what is longer would be built for seconds."""
KEPT = 64
"""Grammars that are kept ready; to begin a request is then a copy."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between the parts of a JSON text: a bound, since models may go on with it for ever."""


def of_json_schema(
    schema: Mapping[str, Any] | bool, *, whitespace: str | None = None, compact: bool = False
) -> str:
    """The grammar of JSON texts that a schema admits, properties in its order.

    Args:
        whitespace: regular expression of what may stand between parts.
        compact: whether nothing may.
    """
    from llguidance import LLMatcher

    # A schema could ask llguidance itself to be lenient: these are read last.
    options: Any = {"lenient": False, "coerce_one_of": False}
    if compact:
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = whitespace or WHITESPACE
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    except ValueError as error:  # nested too deep for it, or half of a surrogate pair
        raise UsageError(f"the schema cannot be read: {_line(error)}") from None


def of_regex(regex: str) -> str:
    """The grammar of a regular expression, of the whole output."""
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_regex(regex)
    except ValueError as error:
        raise UsageError(f"the regular expression cannot be read: {_line(error)}") from None


def of_choices(choices: Sequence[str]) -> str:
    """The grammar of one of several texts."""
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(map(quoted, dict.fromkeys(choices)))
        )
    except ValueError as error:
        raise UsageError(f"the choices cannot be read: {_line(error)}") from None


def of_lark(text: str) -> str:
    """The grammar of a Lark or, where it looks like one, a GBNF text.

    Raises:
        UsageError: if it is a GBNF text that cannot be read.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # noqa: BLE001 - a parser of others' texts
        raise UsageError(f"the grammar cannot be read: {_line(error)}") from None


def quoted(text: str) -> str:
    """A text as a Lark grammar writes it."""
    return json.dumps(text, ensure_ascii=False)


class Follower:
    """One output on its way through its grammar."""

    def __init__(self, matcher: Any, words: int):
        """
        Args:
            words: of a mask of the matcher's own.
        """
        self._matcher = matcher
        self._words = words
        self.count = 0
        """Tokens that were taken in."""

    def follow(self, tokens: Sequence[int]) -> None:
        """Takes in what it has not seen of an output's tokens.

        Raises:
            ValueError: if the grammar does not admit them, or is too complex to go on.
        """
        fresh = tokens[self.count :]
        if not fresh:
            return
        self.count += len(fresh)
        if not self._matcher.consume_tokens(list(fresh)):
            raise ValueError(f"the grammar cannot be followed: {_line(self._matcher.get_error())}")

    @property
    def ended(self) -> bool:
        """Whether nothing can come any more."""
        return self._matcher.is_stopped()

    def fill(self, row: np.ndarray) -> None:
        """Sets the bits of the tokens that may come next, in int32 [1, words].

        Raises:
            ValueError: if the grammar is too complex to go on.
        """
        from llguidance.numpy import fill_next_token_bitmask

        if row.shape[1] == self._words:
            fill_next_token_bitmask(self._matcher, row)
        else:  # the tokenizer has ids that the model has no logits for
            own = np.zeros((1, self._words), np.int32)
            fill_next_token_bitmask(self._matcher, own)
            row[:] = own[:, : row.shape[1]]
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {_line(self._matcher.get_error())}")


class Grammars:
    """The grammars over one vocabulary; every method may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int):
        """
        Args:
            vocabulary: how many logits the model has.
        """
        self.words = -(-vocabulary // 32)
        ids = tokenizer.backend.get_vocab(with_added_tokens=True).values()
        self._size = max(vocabulary, max(ids, default=-1) + 1)
        self._tokenizer = tokenizer
        self._vocabulary: Any = None
        self._ready: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self, grammar: str | None = None) -> None:
        """Reads the vocabulary, for up to 1.5 s, and makes a grammar ready.

        Raises:
            UsageError: if the grammar is none, or says what cannot be held.
        """
        with self._lock:
            vocabulary = self._read_vocabulary()
            if grammar is None or grammar in self._ready:
                return
        self._keep(grammar, self._build(vocabulary, grammar))

    def begin(self, grammar: str) -> Follower:
        """An output that nothing is known of yet.

        Raises:
            UsageError: as `prepare`.
        """
        self.prepare(grammar)
        with self._lock:
            ready = self._ready.get(grammar)
            if ready is not None:
                self._ready.move_to_end(grammar)
                return self._follower(ready.deep_copy())
            vocabulary = self._read_vocabulary()
        return self._follower(self._build(vocabulary, grammar))  # put aside meanwhile

    def _follower(self, matcher: Any) -> Follower:
        return Follower(matcher, -(-self._size // 32))

    def _keep(self, grammar: str, matcher: Any) -> None:
        with self._lock:
            self._ready[grammar] = matcher
            while len(self._ready) > KEPT:
                self._ready.popitem(last=False)

    def _read_vocabulary(self) -> Any:
        if self._vocabulary is None:
            from llguidance import LLTokenizer

            try:
                self._vocabulary = LLTokenizer(
                    self._tokenizer.backend.to_str(),
                    n_vocab=self._size,
                    eos_token=list(self._tokenizer.eos_ids) or None,
                )
            except Exception as error:  # noqa: BLE001 - whatever tokenizers there are
                raise UsageError(
                    f"no form can be kept with this model's tokenizer: {_line(error)}; leave it out"
                ) from None
        return self._vocabulary

    @staticmethod
    def _build(vocabulary: Any, grammar: str) -> Any:
        from llguidance import LLMatcher

        if len(grammar) > MAX_GRAMMAR:
            raise UsageError(
                f"the grammar or schema has {len(grammar)} characters; at most {MAX_GRAMMAR} are "
                f"taken"
            )
        try:
            matcher = LLMatcher(vocabulary, grammar, log_level=0)
        except ValueError as error:
            raise UsageError(f"the grammar cannot be read: {_line(error)}") from None
        if matcher.is_error():
            raise UsageError(
                f"the grammar or schema cannot be held: {_line(matcher.get_error())}; leave that "
                f"out or say it otherwise"
            )
        return matcher


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
