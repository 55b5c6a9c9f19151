"""A corpus cut into training samples that are numbered, so that any process can read any of them.

Two cuts. `windows` runs over the documents end to end: sample i is tokens [i T, i T + T], no token
is lost. `whole_documents` keeps documents whole where they fit, puts several into a row (first fit
over the rows still open), and pads the rest; no target reaches over a document's end.

A sample is {"inputs": int32 [T], "targets": int32 [T]}; targets of -1 do not count.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.train.corpus import Corpus, pieces

IGNORED = -1
OPEN_ROWS = 64
"""Rows that whole-document packing keeps open at once; more wastes less and packs slower."""

Sample = dict[str, np.ndarray]


class Windows:
    """Samples of consecutive tokens, over document ends; see `windows`."""

    def __init__(self, corpus: Corpus, sequence_length: int) -> None:
        self._tokens = corpus.tokens
        self._length = sequence_length
        self._count = (len(corpus.tokens) - 1) // sequence_length
        if self._count < 1:
            raise UsageError(
                f"{corpus.source} holds {len(corpus.tokens)} tokens; one sample of "
                f"sequence_length={sequence_length} needs {sequence_length + 1}"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        start = int(index) * self._length
        piece = np.asarray(self._tokens[start : start + self._length + 1], np.int32)
        return {"inputs": piece[:-1], "targets": piece[1:]}


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    length: int


class WholeDocuments:
    """Samples of whole documents, several to a row; see `whole_documents`."""

    def __init__(self, corpus: Corpus, sequence_length: int, *, padding: int = 0) -> None:
        if sequence_length < 2:
            raise UsageError(f"sequence_length={sequence_length} must be at least 2")
        self._tokens = corpus.tokens
        self._length = sequence_length
        self._padding = padding
        self._rows = _first_fit(corpus.starts, sequence_length + 1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        inputs = np.full(self._length, self._padding, np.int32)
        targets = np.full(self._length, IGNORED, np.int32)
        at = 0
        for piece in self._rows[int(index)]:
            tokens = np.asarray(self._tokens[piece.start : piece.start + piece.length], np.int32)
            inputs[at : at + piece.length - 1] = tokens[:-1]
            targets[at : at + piece.length - 1] = tokens[1:]
            at += piece.length - 1
        return {"inputs": inputs, "targets": targets}


Cut = Windows | WholeDocuments


def windows(corpus: Corpus, sequence_length: int) -> Windows:
    """All samples of `sequence_length` consecutive tokens.

    Raises:
        UsageError: if the corpus is shorter than one sample.
    """
    if sequence_length < 1:
        raise UsageError(f"sequence_length={sequence_length} must be at least 1")
    return Windows(corpus, sequence_length)


def whole_documents(corpus: Corpus, sequence_length: int, *, padding: int = 0) -> WholeDocuments:
    """Rows of whole documents; one longer than a row is cut into row-sized pieces.

    Documents in one row see each other through attention; only their targets are kept apart.
    """
    return WholeDocuments(corpus, sequence_length, padding=padding)


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Raises UsageError if the corpus holds an id the model has no row for."""
    largest = max((int(piece.max()) for piece in pieces(corpus.tokens)), default=0)
    if largest >= vocab_size:
        raise UsageError(
            f"{corpus.source} holds token {largest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer the model was made for"
        )


def _first_fit(starts: Sequence[int] | np.ndarray, room: int) -> list[tuple[_Piece, ...]]:
    """Rows of pieces; a piece of n tokens yields n - 1 predictions and takes n - 1 places."""
    rows: list[list[_Piece]] = []
    places = room - 1
    open_rows: list[list[int]] = []  # [index of row, places left]
    for begin, end in itertools.pairwise(starts):
        at = int(begin)
        while int(end) - at > 1:
            piece = _Piece(at, min(room, int(end) - at))
            at += piece.length - 1
            need = piece.length - 1
            for entry in open_rows:
                if entry[1] >= need:
                    rows[entry[0]].append(piece)
                    entry[1] -= need
                    break
            else:
                rows.append([piece])
                open_rows.append([len(rows) - 1, places - need])
            open_rows = [entry for entry in open_rows if entry[1] > 0][-OPEN_ROWS:]
    if not rows:
        raise UsageError("no document has two tokens to predict one from")
    return [tuple(row) for row in rows]
