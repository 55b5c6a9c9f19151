"""`/dashboard`: what the server does, live and of the last ten minutes, and `/dashboard/data`.

The server itself remembers: once a second what came of that second is put beside what went before,
whether or not anybody looks. Latencies are counted in classes 5 % wide, and percentiles read off
them. Attainment, errors and preemptions count since the server started. Power is shown only where
it is measured: nobody draws what a modelled GPU would take, and its energy is marked as modelled.
What is not known is None, never zero.
"""

import dataclasses
import math
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import Any

import fastapi
from fastapi.responses import HTMLResponse

from jaxsys import __version__
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.engine import Engine
from jaxsys.serve.http.dashboard_page import PAGE
from jaxsys.serve.instance import TokenEvent
from jaxsys.serve.requests import Request

REMEMBERED_S = 600
"""History kept, at a point a second."""
LATELY_S = 60
"""Time over which rates and percentiles are stated."""
PERCENTS = (50, 90, 99)

CLASS_WIDTH = math.log(1.05)
SHORTEST_S = 1e-5
"""Upper end of the first class of latencies."""


@dataclasses.dataclass(slots=True)
class Attainment:
    """Tokens so far, and how many of them kept the SLO that was in force."""

    first_tokens: int = 0
    first_in_time: int = 0
    later_tokens: int = 0
    later_in_time: int = 0

    def add(
        self, first_tokens: int, first_in_time: int, later_tokens: int, later_in_time: int
    ) -> None:
        """Adds what was counted elsewhere."""
        self.first_tokens += first_tokens
        self.first_in_time += first_in_time
        self.later_tokens += later_tokens
        self.later_in_time += later_in_time

    @property
    def ttft_pct(self) -> float | None:
        """Share of first tokens in time; None before there is one."""
        return _share(self.first_in_time, self.first_tokens)

    @property
    def itl_pct(self) -> float | None:
        """Share of later tokens in time; None before there is one."""
        return _share(self.later_in_time, self.later_tokens)


class Latencies:
    """How many latencies lie in each class, the classes 5 % wide."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts: defaultdict[int, int] = defaultdict(int)

    def add(self, seconds: float) -> None:
        """Counts one."""
        short = seconds <= SHORTEST_S
        self.counts[0 if short else 1 + int(math.log(seconds / SHORTEST_S) / CLASS_WIDTH)] += 1

    def percentiles_ms(self) -> dict[str, float | None]:
        """The middle of the class that each percentile lies in; None without any."""
        total, found, below = sum(self.counts.values()), {}, 0
        wanted = list(PERCENTS)
        for place in sorted(self.counts):
            below += self.counts[place]
            while wanted and below >= total * wanted[0] / 100:
                middle_s = SHORTEST_S * math.exp(max(0.0, place - 0.5) * CLASS_WIDTH)
                found[f"p{wanted.pop(0)}"] = 1e3 * middle_s
        return {f"p{percent}": found.get(f"p{percent}") for percent in PERCENTS}


@dataclasses.dataclass(slots=True)
class Span:
    """What happened in a time."""

    seconds: float = 0.0
    tokens: int = 0
    ended: int = 0
    energy_j: float | None = None
    ttft: Latencies = dataclasses.field(default_factory=Latencies)
    itl: Latencies = dataclasses.field(default_factory=Latencies)

    def add(self, other: "Span") -> None:
        """Takes in what happened in another time."""
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.ended += other.ended
        if other.energy_j is not None:
            self.energy_j = (self.energy_j or 0.0) + other.energy_j
        for mine, theirs in ((self.ttft, other.ttft), (self.itl, other.itl)):
            for place, count in theirs.counts.items():
                mine.counts[place] += count

    def figures(self) -> dict[str, Any]:
        """Rates, percentiles and joules a token."""
        energy_j = self.energy_j if self.tokens else None
        return {
            "tokens_per_s": self.tokens / self.seconds if self.seconds else None,
            "requests_per_s": self.ended / self.seconds if self.seconds else None,
            "ttft_ms": self.ttft.percentiles_ms(),
            "itl_ms": self.itl.percentiles_ms(),
            "energy_j_per_token": None if energy_j is None else energy_j / self.tokens,
        }


class Counts:
    """Counts tokens. Give `on_token` every event of the engine."""

    def __init__(self, slo: SharedSlo) -> None:
        self.slo = slo
        self.total = Attainment()
        self.by_instance: defaultdict[str, Attainment] = defaultdict(Attainment)
        """By the instance a token came from."""
        self.errors = 0
        self._last_s: dict[str | int, float] = {}
        self._span = Span()

    def take(self) -> dict[str, Any]:
        """What was counted since the last call, as plain data for a `Dashboard` elsewhere."""
        span = self._span
        data = {
            "tokens": span.tokens,
            "ended": span.ended,
            "ttft": list(span.ttft.counts.items()),
            "itl": list(span.itl.counts.items()),
            "total": dataclasses.astuple(self.total),
            "by_instance": {
                name: dataclasses.astuple(one) for name, one in self.by_instance.items()
            },
            "errors": self.errors,
        }
        self._span, self.total, self.errors = Span(), Attainment(), 0
        self.by_instance.clear()
        return data

    def absorb(self, data: dict[str, Any]) -> None:
        """Adds what another one has counted."""
        span = self._span
        span.tokens += data["tokens"]
        span.ended += data["ended"]
        for mine, theirs in ((span.ttft, data["ttft"]), (span.itl, data["itl"])):
            for place, count in theirs:
                mine.counts[place] += count
        self.errors += data["errors"]
        self.total.add(*data["total"])
        for name, counted in data["by_instance"].items():
            self.by_instance[name].add(*counted)

    def on_token(self, request: Request, event: TokenEvent, instance: str) -> None:
        """Counts one token of an instance against the SLO in force."""
        slo, span = self.slo.current, self._span
        if event.token is not None:
            last_s = self._last_s.get(request.request_id)
            waited_s = event.time_s - (request.timing.arrival_s if last_s is None else last_s)
            span.tokens += 1
            (span.ttft if last_s is None else span.itl).add(waited_s)
            for count in (self.total, self.by_instance[instance]):
                if last_s is None:
                    count.first_tokens += 1
                    count.first_in_time += waited_s <= slo.ttft_s
                else:
                    count.later_tokens += 1
                    count.later_in_time += waited_s <= slo.itl_s
            self._last_s[request.request_id] = event.time_s
        if event.finish_reason is not None:
            span.ended += 1
            self.errors += event.finish_reason == "error"
            self._last_s.pop(request.request_id, None)


class Dashboard(Counts):
    """Counts, remembers and serves the page. Have `tick` called once a second or more often."""

    def __init__(
        self,
        engine: Engine,
        slo: SharedSlo,
        *,
        model_name: str = "",
        refused: Callable[[], int] = lambda: 0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            refused: how many requests were turned away.
        """
        super().__init__(slo)
        self.engine = engine
        self.model_name = model_name
        self._refused = refused
        self._now_s = now_s
        self._started_s = self._ticked_s = now_s()
        self._spans: deque[Span] = deque(maxlen=LATELY_S)
        self._history: deque[dict[str, Any]] = deque(maxlen=REMEMBERED_S)
        self._energies_j: dict[str, float] = {}
        """What each instance said last."""

    def tick(self) -> None:
        """Puts the second that has passed into the history; sooner it does nothing."""
        now_s = self._now_s()
        seconds = now_s - self._ticked_s
        if seconds < 1.0:
            return
        span, self._span, self._ticked_s = self._span, Span(), now_s
        span.seconds = seconds
        span.energy_j = self._energy_since()
        self._spans.append(span)
        found = span.figures()
        point: dict[str, Any] = {"time_s": now_s, "pages_held_pct": self._pages_pct()}
        for name in ("ttft", "itl"):
            for key, value in found.pop(f"{name}_ms").items():
                point[f"{name}_{key}_ms"] = value
        point["instances"] = {
            one.name: {
                "clock_mhz": one.clock_mhz,
                "power_w": one.load.power_w,
                "batch": one.load.batch,
            }
            for one in self.engine.instances
        }
        self._history.append(point | found)

    def data(self, since_s: float | None = None) -> dict[str, Any]:
        """What the page shows.

        Args:
            since_s: the last point of the history that is known already.
        """
        self.tick()
        slo, instances = self.slo.current, self.engine.instances
        lately = Span()
        for span in self._spans:
            lately.add(span)
        newest = self._history[-1]["time_s"] if self._history else None
        if since_s is not None and (newest is None or since_s > newest):
            since_s = None  # of another server, before this one
        return {
            "version": __version__,
            "model": self.model_name,
            "started_s": self._started_s,
            "remembered_s": REMEMBERED_S,
            "ttft_slo_ms": slo.ttft_s * 1e3,
            "itl_slo_ms": slo.itl_s * 1e3,
            "unfinished": self.engine.unfinished,
            "last_minute": lately.figures(),
            "total": {
                "first_tokens": self.total.first_tokens,
                "later_tokens": self.total.later_tokens,
                "ttft_attainment_pct": self.total.ttft_pct,
                "itl_attainment_pct": self.total.itl_pct,
                "errors": self.errors,
                "refused": self._refused(),
            },
            "pages_held_pct": self._pages_pct(),
            "preemptions": sum(one.load.preemptions for one in instances),
            "energy_kind": self._kind(),
            "saving_pct": self._saving_pct(),
            "instances": [
                {
                    "name": one.name,
                    "failed": one.failure is not None,
                    "clock_mhz": one.clock_mhz,
                    "clock_bounds_mhz": one.load.clock_bounds_mhz,
                    "power_w": one.load.power_w,
                    "batch": one.load.batch,
                    "waiting": one.load.waiting,
                    "pages_held": one.load.pages_held,
                    "pages": one.page_count,
                    "preemptions": one.load.preemptions,
                    "faults": one.load.faults,
                    "ttft_attainment_pct": self.by_instance[one.name].ttft_pct,
                    "itl_attainment_pct": self.by_instance[one.name].itl_pct,
                    "measured": one.energy_method.startswith("measured"),
                    "energy_j": one.load.energy_j,
                    "energy_method": one.energy_method,
                }
                for one in instances
            ],
            "history": [p for p in self._history if since_s is None or p["time_s"] > since_s],
        }

    def add_to(self, app: fastapi.FastAPI) -> None:
        """Adds `/dashboard` and `/dashboard/data`."""

        async def data(since_s: float | None) -> dict[str, Any]:
            return self.data(since_s)

        add_pages(app, data)

    # --- of the instances ---------------------------------------------------------------------

    def _energy_since(self) -> float | None:
        """Joules of all instances since the last call; None where nothing tells."""
        found = None
        for one in self.engine.instances:
            energy_j = one.load.energy_j
            if energy_j is None:
                continue
            before_j = self._energies_j.get(one.name)
            self._energies_j[one.name] = energy_j
            if before_j is not None and energy_j >= before_j:  # another of that name begins anew
                found = (found or 0.0) + energy_j - before_j
        return found

    def _kind(self) -> str | None:
        """Measured, modelled, or both where instances differ; None where none tells."""
        kinds = {
            one.energy_method.partition(":")[0]
            for one in self.engine.instances
            if one.load.energy_j is not None
        }
        return " and ".join(sorted(kinds)) or None

    def _saving_pct(self) -> float | None:
        """Against the maximum clock, since the start, where all instances model that."""
        loads = [one.load for one in self.engine.instances if one.load.energy_j is not None]
        at_max_j = [load.energy_at_max_j for load in loads if load.energy_at_max_j]
        if not loads or len(at_max_j) < len(loads):
            return None
        return 100 * (1 - sum(load.energy_j or 0.0 for load in loads) / sum(at_max_j))

    def _pages_pct(self) -> float | None:
        instances = self.engine.instances
        pages = sum(one.page_count for one in instances)
        return _share(sum(one.load.pages_held for one in instances), pages)


def add_pages(
    app: fastapi.FastAPI, found: Callable[[float | None], Awaitable[dict[str, Any]]]
) -> None:
    """Adds `/dashboard` and `/dashboard/data` over data from wherever they are."""

    @app.get("/dashboard", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE)

    @app.get("/dashboard/data", include_in_schema=False)
    async def data(since: float | None = None) -> dict[str, Any]:
        return await found(since)


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
