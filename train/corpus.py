"""Text and token arrays on disk, read into one flat array of tokens with document boundaries.

Sources: the Python standard library's own sources (every machine that runs this has them), text
files, JSONL with a text field, and token arrays (.npy). Every token array is read in a fixed order
and carries a fingerprint, so that a resumed run can tell whether its data is still the same.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.files import parse_json, read_lines, read_text
from jaxsys.train.token_file import TokenFile

HELD_OUT_EVERY = 20
"""One document in this many is kept out of training."""

MOST_TEXT_BYTES = 2**36
"""Of a text file."""
MOST_IN_A_LINE = 10_000
"""Objects and arrays of a JSONL document."""
Encode = Callable[[str], "np.ndarray | list[int]"]
"""Text to token ids."""

_PIECE = 1 << 22
"""Tokens looked at a time, where all of them are; whole blocks of a `TokenFile`."""


class Tokens(Protocol):
    """Token ids [N], in memory or on disk; slices are arrays."""

    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, place: slice, /) -> np.ndarray: ...


def pieces(tokens: Tokens) -> Iterator[np.ndarray]:
    """All tokens, some megabytes at a time."""
    for start in range(0, len(tokens), _PIECE):
        yield tokens[start : start + _PIECE]


_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Tokens of many documents, end to end."""

    tokens: Tokens
    """Integers [N]; a separator ends every document."""
    starts: np.ndarray
    """int64 [documents + 1]: document d is tokens[starts[d] : starts[d + 1]]."""
    source: str
    """Where it is from, in words."""

    @property
    def documents(self) -> int:
        """How many documents."""
        return len(self.starts) - 1

    def fingerprint(self) -> str:
        """A hash of tokens and boundaries: equal for equal data."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(str(self.tokens.dtype).encode())
        for piece in pieces(self.tokens):
            digest.update(np.ascontiguousarray(piece).data)
        digest.update(np.ascontiguousarray(self.starts).data)
        return digest.hexdigest()


class _Within:
    """Some stretches of other tokens, end to end: a view, which copies what is read."""

    def __init__(self, base: Tokens, begins: np.ndarray, lengths: np.ndarray) -> None:
        self._base, self._begins = base, begins
        self._ends = np.cumsum(lengths)
        self.dtype = base.dtype

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, step = place.indices(len(self))
        assert step == 1, "samples are consecutive tokens"
        parts = [np.empty(0, self.dtype)]
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            upto = min(stop, int(self._ends[index]))
            before = int(self._ends[index - 1]) if index else 0
            at = int(self._begins[index]) + start - before
            parts.append(self._base[at : at + upto - start])
            start, index = upto, index + 1
        return np.concatenate(parts)


def split(corpus: Corpus, *, every: int = HELD_OUT_EVERY) -> tuple[Corpus, Corpus]:
    """Cuts a corpus into (training, held out) by whole documents, each `every`-th held out.

    A corpus of fewer documents is cut within its last one, at 1 - 1 / `every` of all tokens.
    """
    if corpus.documents < every:
        cut = len(corpus.tokens) - len(corpus.tokens) // every
        train = np.append(corpus.starts[corpus.starts < cut], cut)
        rest = np.append(cut, corpus.starts[corpus.starts > cut]) - cut
        return (
            _stretches(corpus, train[:1], train[-1:] - train[:1], train, corpus.source),
            _stretches(
                corpus,
                rest[:1] + cut,
                rest[-1:] - rest[:1],
                rest,
                f"{corpus.source}, held out",
            ),
        )
    held = np.arange(corpus.documents) % every == every - 1
    return (
        _select(corpus, ~held, corpus.source),
        _select(corpus, held, f"{corpus.source}, held out"),
    )


def standard_library(encode: Encode, *, separator: int) -> Corpus:
    """The sources of the running interpreter's standard library, tests left out.

    Args:
        encode: text to ids.
        separator: the id put after each file.

    Raises:
        UsageError: if this Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY.intersection(path.relative_to(root).parts)
    )
    texts = (path.read_text(encoding="utf-8", errors="replace") for _, path in files)
    if not files:
        raise UsageError(f"{root} holds no .py files; give your own text with --data")
    return from_texts(
        texts, encode, separator=separator, source=f"Python {_python()} standard library"
    )


def read(path: str | Path, encode: Encode, *, separator: int, field: str = "text") -> Corpus:
    """Reads a file or a folder by its suffix: .npy tokens, .jsonl documents, else UTF-8 text.

    Args:
        path: a file, or a folder whose files are read in order of name, one document each.
        encode: text to ids; not used for token arrays.
        separator: the id put after each document.
        field: the key of a JSONL line that holds the text.

    Raises:
        UsageError: if the path is missing, empty or not what its suffix says.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        if not files:
            raise UsageError(f"{path} holds no files")
        return from_texts((_text(p) for p in files), encode, separator=separator, source=str(path))
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    if path.suffix == ".npy":
        return token_array(path, separator=separator)
    if path.suffix in (".jsonl", ".ndjson"):
        return from_texts(_lines(path, field), encode, separator=separator, source=str(path))
    return from_texts([_text(path)], encode, separator=separator, source=str(path))


def token_array(path: Path, *, separator: int) -> Corpus:
    """A .npy file of token ids, integer [N], read from disk as needed; `separator` ends documents.

    Raises:
        UsageError: if the file is not such an array.
    """
    tokens = TokenFile(path)
    ends = [np.zeros(1, np.int64)]
    at = 0
    for piece in pieces(tokens):
        if piece.dtype.kind == "i" and piece.min() < 0:
            raise UsageError(f"{path} holds the negative id {piece.min()}; ids count from 0")
        ends.append(np.flatnonzero(piece == separator) + at + 1)
        at += len(piece)
    starts = np.unique(np.concatenate([*ends, [len(tokens)]])).astype(np.int64)
    return Corpus(tokens=tokens, starts=starts, source=str(path))


def from_texts(texts: Iterable[str], encode: Encode, *, separator: int, source: str) -> Corpus:
    """Encodes documents one after another; empty ones are left out.

    Raises:
        UsageError: if there is nothing in them.
    """
    parts: list[np.ndarray] = []
    starts = [0]
    for text in texts:
        ids = np.asarray(encode(text))
        if not ids.size:
            continue
        parts.append(np.append(ids, separator).astype(np.int32))
        starts.append(starts[-1] + len(parts[-1]))
    if not parts:
        raise UsageError(f"{source} holds no text")
    tokens = np.concatenate(parts)
    narrow = np.uint8 if tokens.max() < 256 else np.uint16 if tokens.max() < 65536 else np.int32
    return Corpus(tokens=tokens.astype(narrow), starts=np.asarray(starts, np.int64), source=source)


def _select(corpus: Corpus, keep: np.ndarray, source: str) -> Corpus:
    lengths = np.diff(corpus.starts)[keep]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return _stretches(corpus, corpus.starts[:-1][keep], lengths, starts, source)


def _stretches(
    corpus: Corpus, begins: np.ndarray, lengths: np.ndarray, starts: np.ndarray, source: str
) -> Corpus:
    """Parts of a corpus: copied where it is in memory, else read when they are asked for."""
    within = _Within(corpus.tokens, begins, lengths)
    in_memory = isinstance(corpus.tokens, np.ndarray)
    return Corpus(
        tokens=within[0 : len(within)] if in_memory else within, starts=starts, source=source
    )


def _text(path: Path) -> str:
    try:
        return read_text(path, most_bytes=MOST_TEXT_BYTES)
    except UsageError as error:
        raise UsageError(
            f"{error}; token arrays end in .npy, documents by line in .jsonl"
        ) from None


def _lines(path: Path, field: str) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        row = parse_json(line, name=f"{path} line {number}", most_containers=MOST_IN_A_LINE)
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UsageError(f"{path} line {number} has no text under {field!r}")
        yield row[field]


def _python() -> str:
    return sysconfig.get_python_version()
