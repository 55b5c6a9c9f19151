"""Request traces: when each request arrives and how long its prompt and output are.

Readers: the Azure 2023 form (TIMESTAMP, ContextTokens, GeneratedTokens), Mooncake's (timestamp in
milliseconds, also as timestamp_ms, input_length, output_length), BurstGPT's (Timestamp, Request
tokens, Response tokens, perhaps a Session ID) and a plain one (arrival_s, prompt_tokens,
output_tokens, perhaps session_id), told apart by their names: a CSV's header, or those of the
first object where each line is a JSON object. Requests of one session share their beginning: each
prompt is taken to hold the one before it. Generators make the same record from rates and length
distributions.
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

LONGEST_S = 366 * 86_400
"""Of a trace in a file."""
MOST_TOKENS = 100_000_000
"""Of a prompt or an output in a file."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """Requests in order of arrival."""

    name: str
    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    sessions: np.ndarray | None = None
    """Number of each request's conversation, where the trace tells them apart."""
    common_tokens: int = 0
    """Tokens that the prompts of all sessions begin with, such as one system prompt."""
    gap_s: np.ndarray | None = None
    """Where a turn waits for the answer to the one before it in its session: seconds between the
    two. Then `arrival_s` holds for each session's first turn, and orders the others."""
    unused: str | None = None
    """Column of a file that says what prompts share, which nothing here replays."""

    def __post_init__(self) -> None:
        sizes = {len(self.arrival_s), len(self.prompt_tokens), len(self.output_tokens)}
        if self.sessions is not None:
            sizes.add(len(self.sessions))
        if self.gap_s is not None:
            if self.sessions is None:
                raise UsageError(f"trace {self.name} has gap_s, between turns of no sessions")
            sizes.add(len(self.gap_s))
        if len(sizes) != 1:
            raise UsageError(f"trace {self.name}: columns differ in length: {sorted(sizes)}")
        if len(self.arrival_s) == 0:
            raise UsageError(f"trace {self.name} holds no requests")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """From time zero to the last arrival."""
        return float(self.arrival_s[-1])

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals a second."""
        return len(self) / self.duration_s if self.duration_s > 0 else math.inf

    def head(self, count: int) -> "RequestTrace":
        """The first `count` requests."""
        return self._take(slice(0, count))

    def between(self, start_s: float, end_s: float) -> "RequestTrace":
        """The requests that arrive in [start_s, end_s), with time counted from `start_s`."""
        kept = (self.arrival_s >= start_s) & (self.arrival_s < end_s)
        if not kept.any():
            raise UsageError(
                f"trace {self.name} has no arrivals from {start_s} s to {end_s} s; "
                f"it lasts {self.duration_s:.0f} s"
            )
        taken = self._take(kept)
        return replace(taken, arrival_s=taken.arrival_s - start_s)

    def at_rate(self, rate_per_s: float) -> "RequestTrace":
        """The same requests with time stretched or squeezed to a mean rate: burstiness is kept."""
        if not rate_per_s > 0:
            raise UsageError(f"rate_per_s={rate_per_s} must be positive")
        if not self.duration_s > 0:
            raise UsageError(
                f"trace {self.name} has all its {len(self)} arrivals at one moment, and so no rate "
                f"to bring to rate_per_s={rate_per_s:g}; leave it out"
            )
        stretch = self.rate_per_s / rate_per_s
        gap_s = None if self.gap_s is None else self.gap_s * stretch
        return replace(self, arrival_s=self.arrival_s * stretch, gap_s=gap_s)

    def repeated(self, duration_s: float, *, daily_swing: float = 0.0) -> "RequestTrace":
        """Tiled to `duration_s`; with `daily_swing` s, the rate follows 1 + s * sin over 24 h.

        Arrivals are thinned to follow the swing, so at the peak the trace's own rate holds.
        """
        times = math.ceil(duration_s / max(self.duration_s, 1e-9))
        step_s = self.duration_s + 1.0 / self.rate_per_s
        arrival_s = np.concatenate([self.arrival_s + k * step_s for k in range(times)])
        prompts = np.tile(self.prompt_tokens, times)
        outputs = np.tile(self.output_tokens, times)
        sessions = None
        if self.sessions is not None:  # every repetition has sessions of its own
            apart = int(self.sessions.max()) + 1
            sessions = np.concatenate([self.sessions + k * apart for k in range(times)])
        kept = arrival_s < duration_s
        if daily_swing:
            if not 0 <= daily_swing < 1:
                raise UsageError(f"daily_swing={daily_swing} must be from 0 to below 1")
            share = (1 + daily_swing * np.sin(2 * np.pi * arrival_s / 86_400)) / (1 + daily_swing)
            kept &= np.random.default_rng(0).random(len(arrival_s)) < share
        return RequestTrace(
            name=self.name,
            arrival_s=arrival_s[kept],
            prompt_tokens=prompts[kept],
            output_tokens=outputs[kept],
            sessions=None if sessions is None else sessions[kept],
            common_tokens=self.common_tokens,
            gap_s=None if self.gap_s is None else np.tile(self.gap_s, times)[kept],
            unused=self.unused,
        )

    def sampled(self, share: float, seed: int = 0) -> "RequestTrace":
        """A random part of the requests, each kept with probability `share`."""
        if not 0 < share <= 1:
            raise UsageError(f"share={share} must be above 0, at most 1")
        kept = np.random.default_rng(seed).random(len(self)) < share
        if not kept.any():
            raise UsageError(f"trace {self.name}: no request is left of {len(self)}")
        return self._take(kept)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return int((self.prompt_tokens + self.output_tokens).max())

    def clipped(self, max_total_tokens: int, what: str = "tokens") -> "RequestTrace":
        """Without the requests longer than `max_total_tokens`, as an engine would refuse them.

        Args:
            what: so many of what there are, as the error says it.
        """
        kept = self.prompt_tokens + self.output_tokens <= max_total_tokens
        if not kept.any():
            shortest = int((self.prompt_tokens + self.output_tokens).min())
            raise UsageError(
                f"trace {self.name}: no request fits {max_total_tokens} {what}; the shortest has "
                f"{shortest} tokens"
            )
        return self._take(kept)

    def _take(self, which: slice | np.ndarray) -> "RequestTrace":
        return RequestTrace(
            name=self.name,
            arrival_s=self.arrival_s[which],
            prompt_tokens=self.prompt_tokens[which],
            output_tokens=self.output_tokens[which],
            sessions=None if self.sessions is None else self.sessions[which],
            common_tokens=self.common_tokens,
            gap_s=None if self.gap_s is None else self.gap_s[which],
            unused=self.unused,
        )


# --- readers ----------------------------------------------------------------------------------


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


# --- generators -------------------------------------------------------------------------------


def poisson_arrivals(count: int, rate_per_s: float, seed: int, *, cv: float = 1.0) -> np.ndarray:
    """Arrival times of a renewal process whose gaps are gamma with coefficient of variation `cv`;
    1 is Poisson."""
    if seed < 0:
        raise UsageError(f"seed={seed} must be at least 0")
    if not (rate_per_s > 0 and cv > 0):
        raise UsageError(f"rate_per_s={rate_per_s} and cv={cv} must be positive")
    shape = 1.0 / cv**2
    gaps = np.random.default_rng(seed).gamma(shape, 1.0 / (rate_per_s * shape), count)
    return np.cumsum(gaps)


def lognormal_lengths(
    count: int, mean: float, sigma: float, seed: int, *, most: int = 3000
) -> np.ndarray:
    """Token counts, lognormal with the given mean and log-space deviation, from 1 to `most`."""
    draw = np.random.default_rng(seed).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(draw), 1, most).astype(int)


def synthetic_trace(
    *,
    rate_per_s: float,
    duration_s: float,
    seed: int = 0,
    prompt_mean: float = 250.0,
    prompt_sigma: float = 1.0,
    output_mean: float = 215.0,
    output_sigma: float = 0.8,
    cv: float = 1.0,
    most_tokens: int = 3000,
    name: str = "synthetic",
) -> RequestTrace:
    """Lognormal lengths and Poisson (or burstier) arrivals for `duration_s`."""
    for what, value in (("rate_per_s", rate_per_s), ("duration_s", duration_s), ("cv", cv)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{what}={value} must be positive")
    for what, value in (("prompt_mean", prompt_mean), ("output_mean", output_mean)):
        if not 1 <= value <= most_tokens:
            raise UsageError(f"{what}={value:g} must be from 1 to {most_tokens} tokens")
    count = int(rate_per_s * duration_s + 6 * math.sqrt(rate_per_s * duration_s) * cv + 10)
    arrival_s = poisson_arrivals(count, rate_per_s, seed, cv=cv)
    kept = arrival_s < duration_s
    if not kept.any():
        raise UsageError(
            f"no request arrives in duration_s={duration_s:g} at rate_per_s={rate_per_s:g}: the "
            f"first would come after {arrival_s[0]:.3g} s"
        )
    prompts = lognormal_lengths(count, prompt_mean, prompt_sigma, seed + 1, most=most_tokens)
    outputs = lognormal_lengths(count, output_mean, output_sigma, seed + 2, most=most_tokens)
    return RequestTrace(
        name=name,
        arrival_s=arrival_s[kept],
        prompt_tokens=prompts[kept],
        output_tokens=outputs[kept],
    )


def agent_trace(
    *,
    sessions: int,
    sessions_per_s: float,
    seed: int = 0,
    turns: int = 40,
    prompt_mean: float = 140_000.0,
    output_mean: float = 440.0,
    known_share: float = 0.96,
    common_tokens: int = 16_000,
    tool_mean_s: float = 6.0,
    output_s: float = 0.02,
    most_tokens: int = 1_000_000,
    name: str = "agents",
) -> RequestTrace:
    """Sessions of agents: each prompt is the one before, its answer, and what a tool said of it.

    A prompt grows by as much a turn as leaves `known_share` of it known from the turn before, on
    the mean over a session; the defaults are those of coding agents: some 40 turns of 140,000
    tokens in and 440 out, of which 96 % were there before. The next turn follows when the answer is
    there and the tool has run (`gap_s`).

    Args:
        turns: of a session, on the mean; from a half of it to three halves.
        common_tokens: that all sessions begin with.
        output_s: that a token of an answer is taken to need in `arrival_s`.
    """
    for what, value in (
        ("sessions_per_s", sessions_per_s),
        ("tool_mean_s", tool_mean_s),
        ("output_s", output_s),
    ):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{what}={value} must be a finite positive number")
    for what, value in (("sessions", sessions), ("turns", turns), ("output_mean", output_mean)):
        if not value >= 1:
            raise UsageError(f"{what}={value:g} must be at least 1")
    if not 0 < known_share < 1:
        raise UsageError(f"known_share={known_share} must be between 0 and 1")
    grown = (1 - known_share) * prompt_mean
    if grown < output_mean + 1:
        raise UsageError(
            f"known_share={known_share} of prompt_mean={prompt_mean:g} tokens leaves {grown:.0f} "
            f"new ones a turn, fewer than an answer of output_mean={output_mean:g}; lower one"
        )
    # A request's mean place in its session, of a half to three halves of `turns`.
    first = prompt_mean - grown * (turns * 13 / 12 - 1) / 2
    if first <= common_tokens:
        raise UsageError(
            f"prompt_mean={prompt_mean:g} over {turns} turns begins at {first:.0f} tokens, not "
            f"beyond common_tokens={common_tokens}; raise known_share or lower common_tokens"
        )
    generator = np.random.default_rng(seed)
    begins_s = poisson_arrivals(sessions, sessions_per_s, seed + 1)
    found: list[tuple[float, int, int, int, float]] = []
    for session, began_s in enumerate(begins_s.tolist()):
        count = max(1, round(turns * generator.uniform(0.5, 1.5)))
        length, now_s = common_tokens + int((first - common_tokens) * generator.gamma(4, 0.25)), 0.0
        gap_s = 0.0
        for _ in range(count):
            output = max(1, int(output_mean * generator.lognormal(-0.32, 0.8)))
            if length + output > most_tokens:
                break
            found.append((began_s + now_s, max(1, length), output, session, gap_s))
            gap_s = float(generator.exponential(tool_mean_s))
            now_s += output * output_s + gap_s
            length += output + int((grown - output_mean) * generator.gamma(1, 1.0))
    found.sort()
    arrivals_s, prompts, outputs, numbers, gaps_s = zip(*found, strict=True)
    return RequestTrace(
        name=name,
        arrival_s=np.array(arrivals_s),
        prompt_tokens=np.array(prompts),
        output_tokens=np.array(outputs),
        sessions=np.array(numbers),
        common_tokens=common_tokens,
        gap_s=np.array(gaps_s),
    )
