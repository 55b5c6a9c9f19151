"""Grammars that outputs follow: which tokens may come next, as packed bits for the device.

A grammar is text of llguidance's own form, made of a JSON schema, a regular expression, choices or
a context-free grammar. Following one is the host's work: a `Follower` takes the tokens that were
put out and fills a row of a mask, bit t % 32 of word t // 32 for token t. Its state is a function
of grammar and tokens alone, so it is made again wherever a request goes on.

What a schema says and llguidance cannot hold is refused: nothing is loosened.
"""

import json
import re
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
MAX_NUMBER = 2**53 - 1
"""Of a schema: llguidance reads numbers as float64, which would round larger ones."""
MAX_REFERENCES = 200
"""`$ref`s of a schema, and definitions."""
MAX_DEPTH = 64
"""Of objects and lists within each other, in a schema."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between the parts of a JSON text: a bound, since models may go on with it for ever."""
NO_WAY_ON = "NoExtensionBias"
"""What llguidance calls it where no token can come next."""
_ADVICE = re.compile(r"\. Enable '\w+' option[^.]*")


def check_schema(schema: Any) -> None:
    """Refuses, before llguidance sees it, a schema that it would round or that is too large for it.

    Raises:
        UsageError: if a number is too large, or there are too many references or levels.
    """
    references = definitions = 0
    left: list[tuple[Any, str, int]] = [(schema, "schema", 0)]
    while left:
        value, name, depth = left.pop()
        if isinstance(value, Mapping):
            references += isinstance(value.get("$ref"), str)
            for key in ("$defs", "definitions"):
                inner = value.get(key)
                definitions += len(inner) if isinstance(inner, Mapping) else 0
            left += [(one, str(key), depth + 1) for key, one in value.items()]
        elif isinstance(value, list | tuple):
            left += [(one, name, depth + 1) for one in value]
        elif isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
            raise UsageError(
                f"the schema's {name[:60]} has {_shown(value)}: a number beyond {MAX_NUMBER} "
                f"(2**53 - 1) would be rounded; write it as a string"
            )
        if depth > MAX_DEPTH:
            raise UsageError(
                f"the schema is nested deeper than {MAX_DEPTH} levels; make it flatter"
            )
    for count, what in ((references, "$refs"), (definitions, "$defs entries")):
        if count > MAX_REFERENCES:
            raise UsageError(
                f"the schema has {count} {what}; at most {MAX_REFERENCES} are taken: write schemas "
                f"out where they are used, or split it"
            )


def _shown(number: float) -> str:
    if isinstance(number, int) and number.bit_length() > 128:
        return f"an integer of {number.bit_length()} bits"
    return str(number)


def of_json_schema(
    schema: Mapping[str, Any] | bool, *, whitespace: str | None = None, compact: bool = False
) -> str:
    """The grammar of JSON texts that a schema admits, properties in its order.

    Args:
        whitespace: regular expression of what may stand between parts, "" if nothing; `WHITESPACE`
            if not given.
        compact: whether nothing may.

    Raises:
        UsageError: if it cannot be read, or `check_schema` refuses it.
    """
    from llguidance import LLMatcher

    check_schema(schema)
    # A schema could ask llguidance itself to be lenient: these are read last.
    options: Any = {"lenient": False, "coerce_one_of": False}
    if compact or whitespace == "":
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = WHITESPACE if whitespace is None else whitespace
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
        lark = any_to_lark(text)
        _check_inner(lark)
        return LLMatcher.grammar_from_lark(lark)
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 - a parser of others' texts
        raise UsageError(f"the grammar cannot be read: {_line(error)}") from None


def _check_inner(lark: str) -> None:
    """Refuses what `check_schema` does in schemas that stand in a Lark text."""
    for found in re.finditer(r"%json\s*", lark):
        try:
            schema, _ = json.JSONDecoder().raw_decode(lark, found.end())
        except ValueError:  # no schema: llguidance says so, where it reads one there
            continue
        except RecursionError:
            raise UsageError(
                f"the schema is nested deeper than {MAX_DEPTH} levels; make it flatter"
            ) from None
        check_schema(schema)


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

    def fill_along(self, tokens: Sequence[int], rows: np.ndarray) -> int:
        """Fills a row for each place among tokens that may follow, without taking them in.

        Args:
            rows: int32 [1 + len(tokens) or more, words]; those behind what is admitted are left.

        Returns:
            How many of `tokens`, from the first, the grammar admits.

        Raises:
            ValueError: as `fill` does for the first row.
        """
        self.fill(rows[:1])
        if not tokens:
            return 0
        ahead = Follower(self._matcher.deep_copy(), self._words)
        for place in range(len(tokens)):
            try:
                ahead.follow(tokens[: place + 1])
                ahead.fill(rows[place + 1 : place + 2])
            except ValueError:
                return place
        return len(tokens)


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
            UsageError: if the grammar is none, says what cannot be held, or admits no text.
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

    def _build(self, vocabulary: Any, grammar: str) -> Any:
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
        self._begins(matcher)
        return matcher

    def _begins(self, matcher: Any) -> None:
        """Refuses a grammar that no text can begin."""
        row = np.zeros((1, self.words), np.int32)
        try:
            self._follower(matcher.deep_copy()).fill(row)
        except ValueError as error:
            if NO_WAY_ON not in str(error):
                raise UsageError(f"the grammar or schema cannot be held: {error}") from None
            row[:] = 0
        ends = self._tokenizer.eos_ids
        if not any(
            token not in ends
            for token in np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        ):
            raise UsageError(
                "the grammar or schema admits no text: there is nothing it could begin with; write "
                "it so that some text fits"
            )


def _line(error: object) -> str:
    """What llguidance says, without its state behind it or its own options."""
    text = _ADVICE.sub("", str(error).partition("<state>")[0])
    return " ".join(text.split())[:300]
