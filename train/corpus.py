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

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.files import parse_json, read_lines, read_text

HELD_OUT_EVERY = 20
"""One document in this many is kept out of training."""

MOST_TEXT_BYTES = 2**36
"""Of a text file."""
MOST_IN_A_LINE = 10_000
"""Objects and arrays of a JSONL document."""
Encode = Callable[[str], "np.ndarray | list[int]"]
"""Text to token ids."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Tokens of many documents, end to end."""

    tokens: np.ndarray
    """uint8, uint16 or int32 [N]; a separator ends every document."""
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
        digest.update(np.ascontiguousarray(self.tokens).data)
        digest.update(np.ascontiguousarray(self.starts).data)
        return digest.hexdigest()


def split(corpus: Corpus, *, every: int = HELD_OUT_EVERY) -> tuple[Corpus, Corpus]:
    """Cuts a corpus into (training, held out) by whole documents, each `every`-th held out.

    A corpus of fewer documents is cut within its last one, at 1 - 1 / `every` of all tokens.
    """
    if corpus.documents < every:
        cut = len(corpus.tokens) - len(corpus.tokens) // every
        train = np.append(corpus.starts[corpus.starts < cut], cut)
        rest = np.append(cut, corpus.starts[corpus.starts > cut]) - cut
        return (
            Corpus(tokens=corpus.tokens[:cut], starts=train, source=corpus.source),
            Corpus(tokens=corpus.tokens[cut:], starts=rest, source=f"{corpus.source}, held out"),
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
    """A .npy file of token ids, integer [N], read through a memory map; `separator` ends documents.

    Raises:
        UsageError: if the file is not such an array.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, and raises as that does
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path} is not a readable .npy file: {reason}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise UsageError(
            f"{path} holds {tokens.dtype} {list(tokens.shape)}; token ids must be integers [N]"
        )
    if not len(tokens):
        raise UsageError(f"{path} holds no tokens")
    if tokens.dtype.kind == "i" and tokens.min() < 0:
        raise UsageError(f"{path} holds the negative id {tokens.min()}; ids count from 0")
    ends = np.flatnonzero(tokens == separator) + 1
    starts = np.unique(np.concatenate([[0], ends, [len(tokens)]])).astype(np.int64)
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
    lengths = np.diff(corpus.starts)
    return Corpus(
        tokens=corpus.tokens[np.repeat(keep, lengths)],
        starts=np.concatenate([[0], np.cumsum(lengths[keep])]).astype(np.int64),
        source=source,
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
