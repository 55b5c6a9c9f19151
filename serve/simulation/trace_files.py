"""Traces of files, told apart by their names: a CSV's header, or those of the first object where
each line is a JSON object.

    Azure 2023   TIMESTAMP, ContextTokens, GeneratedTokens
    Mooncake     timestamp in milliseconds, also as timestamp_ms, input_length, output_length
    BurstGPT     Timestamp, Request tokens, Response tokens, perhaps a Session ID
    plain        arrival_s, prompt_tokens, output_tokens, perhaps session_id
"""

import csv
import datetime
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.files import MIB, parse_json, read_lines, shown
from jaxsys.serve.simulation.traces import RequestTrace

LONGEST_S = 366 * 86_400
"""Of a trace in a file."""

MOST_TOKENS = 100_000_000
"""Of a prompt or an output in a file."""

_Value = TypeVar("_Value")


def _timestamp(text: str) -> float:
    """Seconds of "2023-11-16 18:17:03.9799600" (seven digits) or any ISO form."""
    head, dot, rest = text.strip().partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    zone = rest[len(digits) :] if dot else ""
    moment = datetime.datetime.fromisoformat(head + zone)
    fraction = float(f"0.{digits}") if digits else 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return moment.timestamp() + fraction


@dataclass(frozen=True, slots=True)
class _Form:
    columns: tuple[str, str, str]
    arrival: Callable[[str], float]
    session: str | None = None
    """Column that tells conversations apart, where a file has it."""
    shared: str | None = None
    """Column that names the blocks prompts share, where a file has it; it is not replayed."""


def _milliseconds(text: str) -> float:
    return float(text) / 1e3


_FORMS = (
    _Form(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _timestamp),
    # As Mooncake's files are published, and with the unit in the name.
    _Form(("timestamp", "input_length", "output_length"), _milliseconds, shared="hash_ids"),
    _Form(("timestamp_ms", "input_length", "output_length"), _milliseconds, shared="hash_ids"),
    _Form(("Timestamp", "Request tokens", "Response tokens"), float, "Session ID"),
    _Form(("arrival_s", "prompt_tokens", "output_tokens"), float, "session_id"),
)


def read_trace(path: str | Path) -> RequestTrace:
    """Reads a trace of any known form, as CSV or a JSON object a line; time starts at its first
    arrival.

    Raises:
        UsageError: naming row and column where a value is malformed.
    """
    path = Path(path)
    lines = read_lines(path, what="trace", most_bytes=MIB)
    # Rows are counted from the file's first line, blank ones too.
    before: list[tuple[int, str]] = []
    for number, line in lines:
        before.append((number, line))
        if line.removeprefix("\N{BOM}").strip():
            break
    begin = before[-1][1].removeprefix("\N{BOM}").lstrip() if before else ""
    lines = itertools.chain(before, lines)
    if begin.startswith("["):
        raise UsageError(
            f"trace {path} is one JSON list; write each request as a JSON object on a line of its "
            "own, or as CSV"
        )
    if begin.startswith("{"):
        return _read_objects(lines, path)
    try:
        return _read_csv(csv.reader(line for _, line in lines), path)
    except csv.Error as error:
        raise UsageError(f"trace {path} is not CSV text: {error}") from None


def _form_of(names: Sequence[str], what: str, path: Path) -> _Form:
    form = next((form for form in _FORMS if set(form.columns) <= set(names)), None)
    if form is None:
        known = "; ".join(", ".join(form.columns) for form in _FORMS)
        raise UsageError(
            f"trace {path}: {what} {shown(list(names))} are not known; use one of: {known}"
        )
    return form


def _read_csv(rows: Iterator[list[str]], path: Path) -> RequestTrace:
    numbered = enumerate(rows, start=1)
    names = next((row for _, row in numbered if any(map(str.strip, row))), None)
    if names is None:
        raise UsageError(f"trace {path} is empty")
    header = [name.strip().removeprefix("\N{BOM}").strip() for name in names]
    form = _form_of(header, "columns", path)
    used = [*form.columns, *([form.session] if form.session else [])]
    twice = [column for column in used if header.count(column) > 1]
    if twice:
        raise UsageError(f"trace {path}: column {twice[0]} is there {header.count(twice[0])} times")
    return _read(numbered, header, form, path)


def _read_objects(lines: Iterator[tuple[int, str]], path: Path) -> RequestTrace:
    """Of JSON lines: the first object's names say the form, and others may have more or fewer of
    those that are not used."""
    objects = (
        (number, _object(line.removeprefix("\N{BOM}"), f"trace {path}, row {number}"))
        for number, line in lines
        if line.removeprefix("\N{BOM}").strip()
    )
    first = next(objects)
    form = _form_of(list(first[1]), "names", path)
    used = list(form.columns)
    used += [name for name in (form.session,) if name in first[1]]

    def texts(number: int, values: dict[str, Any]) -> list[str]:
        where = f"trace {path}, row {number}"
        for name in used:
            if name not in values:
                raise UsageError(f"{where}: there is no {name}")
        return [_text(values[name], where, name) for name in used]

    rows = ((number, texts(number, values)) for number, values in itertools.chain([first], objects))
    trace = _read(rows, used, form, path)
    return replace(trace, unused=form.shared if form.shared in first[1] else None)


def _object(line: str, where: str) -> dict[str, Any]:
    value = parse_json(line, name=where, unique=True)
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {shown(value)}; a JSON object a line is needed")
    return value


def _text(value: Any, where: str, name: str) -> str:
    """A JSON number or text as CSV would have it."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise UsageError(f"{where}, column {name}: {shown(value)} is neither a number nor a text")


def _read(
    numbered: Iterator[tuple[int, list[str]]], header: Sequence[str], form: _Form, path: Path
) -> RequestTrace:
    """The trace of rows and their numbers.

    Args:
        header: names of a row's values.
    """
    places = [header.index(column) for column in form.columns]
    session_place = header.index(form.session) if form.session in header else None
    numbers: dict[str, int] = {}
    sessions: list[int] = []
    arrivals: list[float] = []
    sizes: tuple[list[int], list[int]] = ([], [])
    previous_s = -math.inf
    for number, row in numbered:
        if not row:
            continue
        where = f"trace {path}, row {number}"
        if len(row) != len(header):
            raise UsageError(f"{where}: {len(row)} values for {len(header)} columns")
        arrival_s = parsed(form.arrival, row[places[0]], where, form.columns[0])
        if not math.isfinite(arrival_s):
            raise UsageError(
                f"{where}, column {form.columns[0]}: {shown(row[places[0]])} is not a finite number"
            )
        if arrival_s < previous_s:
            raise UsageError(
                f"{where}, column {form.columns[0]}: {row[places[0]]!r} lies before the row "
                f"above; sort the trace by arrival"
            )
        previous_s = arrival_s
        arrivals.append(arrival_s)
        if arrival_s - arrivals[0] > LONGEST_S:
            raise UsageError(
                f"{where}, column {form.columns[0]}: {shown(row[places[0]])} is more than a year "
                "after the first row; cut the trace"
            )
        for values, place, column in zip(sizes, places[1:], form.columns[1:], strict=True):
            count = parsed(int, row[place], where, column)
            if not (1 if values is sizes[0] else 0) <= count <= MOST_TOKENS:
                raise UsageError(
                    f"{where}, column {column}: {shown(count)} tokens; a count is needed, at most "
                    f"{MOST_TOKENS}"
                )
            values.append(count)
        if session_place is not None:
            name = row[session_place].strip()
            if not name:
                raise UsageError(f"{where}, column {form.session}: a session's name is needed")
            sessions.append(numbers.setdefault(name, len(numbers)))
    if not arrivals:
        raise UsageError(f"trace {path} holds no requests")
    return RequestTrace(
        name=path.stem,
        arrival_s=np.array(arrivals) - arrivals[0],
        prompt_tokens=np.array(sizes[0]),
        # A request that yields nothing still yields its first token.
        output_tokens=np.maximum(1, np.array(sizes[1])),
        sessions=None if session_place is None else np.array(sessions),
        unused=form.shared if form.shared in header else None,
    )


def parsed(convert: Callable[[str], _Value], text: str, where: str, column: str) -> _Value:
    try:
        return convert(text)
    except (ValueError, OverflowError):
        wanted = {int: "a whole number", float: "a number"}.get(convert, "a moment of time")
        raise UsageError(f"{where}, column {column}: {shown(text)} is not {wanted}") from None
