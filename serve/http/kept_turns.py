"""Turns of `/v1/responses` that several fronts keep together, in a file of the server's own.

Whichever front a turn was made at, the others find it, and it outlives that front. A turn holds
what it added to the conversation before it; one that was forgotten, or had to make room, stays
without a name for as long as a later one goes on from it.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxsys.errors import RunError
from jaxsys.serve.http.responses import (
    MAX_BYTES,
    MAX_TURNS,
    NoSuchResponse,
    joined,
)

WAIT_S = 5.0
"""How long a front waits for another one that writes."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT UNIQUE,      -- NULL once it is forgotten
    parent INTEGER,        -- the turn before it
    size INTEGER NOT NULL, -- of what it holds, as the limit counts
    length INTEGER NOT NULL, -- items of the whole conversation
    added TEXT NOT NULL,   -- items behind those of the turn before: the request's, then the output
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS sizes ON turns (number, size) WHERE name IS NOT NULL;
CREATE INDEX IF NOT EXISTS parents ON turns (parent);
CREATE TABLE IF NOT EXISTS items (name TEXT PRIMARY KEY, turn INTEGER NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS owners ON items (turn);
"""


class SharedTurns:
    """The latest turns, as `OwnTurns` has them; for one thread."""

    def __init__(self, path: Path, *, most: int = MAX_TURNS, most_bytes: int = MAX_BYTES):
        self.most = most
        self.most_bytes = most_bytes
        self._file = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = OFF")  # nothing outlives the server anyway
        self._file.executescript(_SCHEMA)

    def conversation(
        self, previous: str | None, fresh: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """As `OwnTurns.conversation`."""
        with self._reading():
            found = [] if previous is None else self._items(previous, "previous_response_id")
            return joined(found, fresh, self._item)

    def keep(
        self, body: dict[str, Any], own: list[dict[str, Any]], items: list[dict[str, Any]]
    ) -> None:
        """As `OwnTurns.keep`."""
        size = len(json.dumps([own, body]))
        with self._writing():
            row = self._file.execute(
                "SELECT number, length FROM turns WHERE name = ?",
                (body.get("previous_response_id"),),
            ).fetchone()
            # What it went on from may have been forgotten meanwhile.
            parent, before = (None, 0) if row is None else row
            added = [*items[before:], *body["output"]]
            number = self._file.execute(
                "INSERT INTO turns (name, parent, size, length, added, body) VALUES (?,?,?,?,?,?)",
                (
                    body["id"],
                    parent,
                    size,
                    before + len(added),
                    json.dumps(added),
                    json.dumps(body),
                ),
            ).lastrowid
            self._file.executemany(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?)",
                [
                    (item["id"], number, json.dumps(item))
                    for item in (*own, *body["output"])
                    if item["type"] != "item_reference"
                ],
            )
            while True:
                oldest, count, total = self._file.execute(
                    "SELECT min(number), count(*), sum(size) FROM turns WHERE name IS NOT NULL"
                ).fetchone()
                if not count or (count <= self.most and total <= self.most_bytes):
                    return
                self._drop(oldest)

    def get(self, name: str) -> dict[str, Any]:
        """As `OwnTurns.get`."""
        with self._reading():
            return json.loads(self._row(name)[1])

    def inputs(self, name: str) -> list[dict[str, Any]]:
        """As `OwnTurns.inputs`."""
        with self._reading():
            items = self._items(name)
            return items[: len(items) - len(json.loads(self._row(name)[1])["output"])]

    def forget(self, name: str) -> None:
        """As `OwnTurns.forget`."""
        with self._writing():
            self._drop(self._row(name)[0])

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    # --- inside -------------------------------------------------------------------------------

    def _row(self, name: str, param: str | None = None) -> tuple[int, str]:
        row = self._file.execute(
            "SELECT number, body FROM turns WHERE name = ?", (name,)
        ).fetchone()
        if row is None:
            raise NoSuchResponse(name, param)
        return row

    def _items(self, name: str, param: str | None = None) -> list[dict[str, Any]]:
        """A turn's whole conversation."""
        number: int | None = self._row(name, param)[0]
        parts: list[list[dict[str, Any]]] = []
        while number is not None:
            added, number = self._file.execute(
                "SELECT added, parent FROM turns WHERE number = ?", (number,)
            ).fetchone()
            parts.append(json.loads(added))
        return [item for part in reversed(parts) for item in part]

    def _item(self, name: str) -> dict[str, Any] | None:
        row = self._file.execute("SELECT data FROM items WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def _drop(self, number: int) -> None:
        """Takes a turn's name away, and all that nothing goes on from."""
        self._file.execute("DELETE FROM items WHERE turn = ?", (number,))
        self._file.execute(
            "UPDATE turns SET name = NULL, size = 0, body = '' WHERE number = ?", (number,)
        )
        place: int | None = number
        while place is not None:
            row = self._file.execute(
                "SELECT parent FROM turns WHERE number = ? AND name IS NULL AND NOT EXISTS "
                "(SELECT 1 FROM turns AS later WHERE later.parent = turns.number)",
                (place,),
            ).fetchone()
            if row is None:
                return
            self._file.execute("DELETE FROM turns WHERE number = ?", (place,))
            (place,) = row

    @contextlib.contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        try:
            self._file.execute(f"BEGIN {kind}")
            try:
                yield
            except BaseException:
                self._file.execute("ROLLBACK")
                raise
            self._file.execute("COMMIT")
        except sqlite3.Error as error:
            raise RunError(f"the turns that are kept cannot be reached: {error}") from None

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        return self._transaction("DEFERRED")

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return self._transaction("IMMEDIATE")
