"""Where the headroom of a published rate lies: clocks held, or switched by who knows the end.

Each replay holds what it names; all else is at the maximum clock and routed plainly. Energy counts
as a share of what lies between the maximum clock and the sweet spot, and points of attainment lost
as the larger of first tokens' and tokens'. What is best of its kind loses half a point at most;
where all lose more, it loses least.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from jaxsys.serve.energy.ecofreq import EcoFreq, EcoFreqConfig
from jaxsys.serve.energy.fixed_clock import FixedClock
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.policy import ClockPolicy, Clocks, Queue, Ran
from jaxsys.serve.energy.registry import ROUTERS, Situation
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.simulation.comparison import Setting, figures, make_predictor
from jaxsys.serve.simulation.result import ReplayResult
from jaxsys.serve.simulation.simulator import Simulator
from jaxsys.serve.simulation.traces import RequestTrace

MOST_LOST = 0.5
RISES_S = (10.0, 20.0, 30.0, 40.0)
"""When a schedule takes the highest clock."""


class Held(NamedTuple):
    """One replay."""

    what: str
    prefill_mhz: int
    decode_mhz: int
    prompts: str = "round-robin"
    rises_s: float | None = None
    """Where given, decode takes the highest clock from then until the last arrival, and before and
    after the lowest that keeps the ITL."""


class Scheduled(ClockPolicy):
    """The highest clock from one moment to another; else another policy's."""

    def __init__(self, inner: ClockPolicy, rises_s: float, falls_s: float) -> None:
        super().__init__()
        self.inner, self.rises_s, self.falls_s = inner, rises_s, falls_s
        self.idle_after_s = inner.idle_after_s

    def choose(self, load: Load, queue: Queue, clocks: Clocks) -> int | None:
        chosen = self.inner.choose(load, queue, clocks)
        high = self.rises_s <= clocks.now_s < self.falls_s
        return clocks.top_mhz if high else chosen

    def learn(self, ran: Ran) -> None:
        self.inner.learn(ran)


def cases(setting: Setting) -> Iterator[Held]:
    low, top = setting.clocks_mhz[0], setting.gpu.spec.max_mhz
    yield Held("both at the maximum", top, top)
    yield Held("both at the sweet spot", low, low)
    yield Held("prefill at the sweet spot", low, top)
    yield Held("decode at the sweet spot", top, low)
    yield Held("prefill at the sweet spot, gathered", low, top, "gather")
    for mhz in setting.clocks_mhz[1:-1]:
        yield Held("decode held", low, mhz, "gather")
    for rises_s in RISES_S:
        yield Held("decode by schedule", low, low, "gather", rises_s)


def replayed(held: Held, trace: RequestTrace, setting: Setting) -> ReplayResult:
    setting = replace(setting, predictor="model")
    predictor, slo = make_predictor(setting), SharedSlo(setting.slo)
    situation = Situation(
        gpu=setting.gpu,
        slo=slo,
        clocks_mhz=setting.clocks_mhz,
        top_mhz=setting.gpu.spec.max_mhz,
        predictor=lambda: predictor,
    )

    def decode() -> ClockPolicy:
        if held.rises_s is None:
            return FixedClock(held.decode_mhz)
        # Nothing is looked ahead for: the schedule does.
        config = EcoFreqConfig(growth_s=0.0, saturation_s=0.0)
        return Scheduled(EcoFreq(predictor, slo, config=config), held.rises_s, trace.duration_s)

    make: dict[str, Callable[[], ClockPolicy]] = {
        "prefill": lambda: FixedClock(held.prefill_mhz),
        "decode": decode,
    }
    return Simulator(
        trace,
        setting.cluster,
        make_policy=lambda role: make[role](),
        clocks_mhz=setting.clocks_mhz,
        prefill_router=ROUTERS.make(held.prompts, situation),
        decode_router=ROUTERS.make("fewest", situation),
        slo=slo,
    ).run()


def decomposed(trace: RequestTrace, setting: Setting) -> list[dict[str, Any]]:
    """A row for each of `cases`, the best of each kind marked."""
    rows: list[dict[str, Any]] = []
    for held in cases(setting):
        found = figures(replayed(held, trace, setting), setting.slo)
        most = rows[0] if rows else found
        least_j = rows[1]["energy_j"] if len(rows) > 1 else found["energy_j"]
        between_j = most["energy_j"] - least_j
        rows.append(
            {
                "what": held.what,
                "prefill_mhz": held.prefill_mhz,
                "decode_mhz": None if held.rises_s is not None else held.decode_mhz,
                "rises_s": held.rises_s,
                **{
                    key: found[key]
                    for key in ("energy_j", "ttft_attainment_pct", "itl_attainment_pct")
                },
                "headroom_pct": 100 * (most["energy_j"] - found["energy_j"]) / between_j
                if between_j
                else 0.0,
                "lost_points": max(
                    most[key] - found[key] for key in ("ttft_attainment_pct", "itl_attainment_pct")
                ),
            }
        )
    rows[1]["headroom_pct"] = 100.0
    mark_best(rows)
    return rows


def mark_best(rows: list[dict[str, Any]]) -> None:
    """Of each kind the one that saves most within `MOST_LOST`, or else the one that loses least."""
    for what in dict.fromkeys(row["what"] for row in rows):
        alike = [row for row in rows if row["what"] == what]
        kept = [row for row in alike if row["lost_points"] <= MOST_LOST]
        best = (
            max(kept, key=lambda row: row["headroom_pct"])
            if kept
            else min(alike, key=lambda row: row["lost_points"])
        )
        for row in alike:
            row["best"] = row is best
