"""Where an instance's time goes: a row an iteration, and when the front has its tokens.

    turn      the loop plans, asks the governor, prepares and dispatches
    collect   it waits for the device, and then for the interpreter
    end       it completes the iteration, tells the governor, sends tokens on
    front     the event loop takes the tokens in

Sections have their wall time and the thread's own CPU time: what lies between is waiting. Times are
of `time.perf_counter`, on Linux the same clock for all processes of a machine.
"""

import gc
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsys.serve.energy.dispatch_times import DispatchTimes
from jaxsys.serve.engine import Engine
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.instance import Instance

COLUMNS = (
    "turn_s",
    "dispatch_s",
    "dispatched_s",
    "dispatch_cpu_s",
    "turned_s",
    "turn_cpu_s",
    "collect_s",
    "collected_s",
    "collect_cpu_s",
    "ended_s",
    "end_cpu_s",
    "sunk_s",
    "batch",
    "bucket",
    "kv_tokens",
    "prefill_tokens",
    "prefills",
    "landed",
)
"""Of a row: when a section began and ended, its CPU time, and what was computed. `sunk_s` is when
tokens were given to the front; `landed` counts prompts whose pages were taken in since the last."""


def dispatch_times(rows: np.ndarray) -> DispatchTimes | None:
    """What planning and dispatching took in noted iterations; None where some kind never came.

    Args:
        rows: an iteration each, of `COLUMNS`. Batches of one size count as the same requests.
    """
    of = dict(zip(COLUMNS, rows.T, strict=True))
    took_s = of["dispatched_s"] - of["turn_s"]
    prompt = of["prefills"] > 0
    alike = np.zeros(len(rows), bool)
    alike[1:] = (of["batch"][1:] == of["batch"][:-1]) & ~prompt[1:] & ~prompt[:-1]
    lone = prompt & (of["batch"] == 0)
    return DispatchTimes.of(
        {
            "alike": took_s[alike].tolist(),
            "changed": took_s[~alike & ~prompt].tolist(),
            "piece": (took_s[lone] / of["prefills"][lone]).tolist(),
        }
    )


PERCENTS = (50, 90, 99)
HEARD_S = 1.5e-4
"""A host that waits for a step for longer than this was there before its end."""


def dispatch_figures(rows: np.ndarray) -> dict[str, float | int]:
    """Of what was served: dispatch times by what a step follows, and the time between steps' ends.

    Args:
        rows: an iteration each, of `COLUMNS`.
    """
    of = dict(zip(COLUMNS, rows.T, strict=True))
    took_ms = 1e3 * (of["dispatched_s"] - of["dispatch_s"])
    prompt = of["prefills"] > 0
    alike = np.zeros(len(rows), bool)
    alike[1:] = (of["batch"][1:] == of["batch"][:-1]) & ~prompt[1:] & ~prompt[:-1]
    quick_ms = float(np.median(took_ms[alike]))
    found: dict[str, float | int] = {"steps": len(rows)}
    for name, chosen in (("alike", alike), ("new_batch", ~alike & ~prompt), ("prompt", prompt)):
        found[f"{name}_steps"] = int(chosen.sum())
        for percent in PERCENTS:
            value = float(np.percentile(took_ms[chosen], percent)) if chosen.any() else np.nan
            found[f"{name}_p{percent}_ms"] = value
    found["slow_pct"] = 100 * float((took_ms > 1.8 * quick_ms).mean())
    found["slow_alike_pct"] = 100 * float((took_ms[alike] > 1.8 * quick_ms).mean())
    waited_s = of["collected_s"] - of["collect_s"]
    found["host_late_pct"] = 100 * float((waited_s < HEARD_S).mean())
    between_ms = 1e3 * np.diff(of["collected_s"])[~prompt[1:] & ~prompt[:-1]]
    between_ms = between_ms[between_ms < 100]  # the others waited for a request
    for percent in (50, 90, 95, 99):
        found[f"step_p{percent}_ms"] = float(np.percentile(between_ms, percent))
    found["step_mean_ms"] = float(between_ms.mean())
    return found


def heard_late_s(rows: np.ndarray) -> list[float]:
    """By how much the time between two steps' tokens differs from its median where nothing else
    does: percentiles of the difference, of steps of one request that the host waited for. The
    thread that waits is woken now sooner, now later, so that they lie on both sides of nothing.

    Args:
        rows: an iteration each, of `COLUMNS`.
    """
    of = dict(zip(COLUMNS, rows.T, strict=True))
    waited = of["collected_s"] - of["collect_s"] > HEARD_S
    quiet = waited & (of["prefills"] == 0) & (of["batch"] == 1)
    between_s = np.diff(of["sunk_s"])[quiet[1:] & quiet[:-1]]
    if not len(between_s):
        return []
    return np.percentile(between_s - np.median(between_s), np.arange(101)).tolist()


def lone_prompt_s(rows: np.ndarray, prompt: int) -> float | None:
    """Median seconds from plan to token of prompts of so many tokens that were alone; None without.

    Args:
        rows: an iteration each, of `COLUMNS`.
    """
    of = dict(zip(COLUMNS, rows.T, strict=True))
    tokens = np.where((of["prefills"] == 1) & (of["batch"] == 0), of["prefill_tokens"], 0)
    took_s, start, seen = [], 0, 0
    for place, count in enumerate(tokens):  # a prompt's pieces follow one another
        if not count or seen >= prompt:
            start, seen = (place if count else place + 1), 0
        seen += count
        if seen == prompt:
            took_s.append(of["collected_s"][place] - of["turn_s"][start])
    return float(np.median(took_s)) if took_s else None


class IterationLog:
    """Rows of one instance, from when it is attached."""

    def __init__(self, instance: Instance) -> None:
        self.name = instance.name
        self.rows: list[dict[str, float]] = []
        self.pages: list[tuple[float, float, float]] = []
        """Of pages taken out or in: when, how long dispatching took, how many."""
        self._in_flight: deque[dict[str, float]] = deque()
        self._turn: dict[str, float] = {}
        self._landed = 0
        self._sunk_s = 0.0
        executor, turns = instance.executor, instance.turns
        assert isinstance(executor, JaxExecutor)
        # Wrapped where they are looked up: the instance itself is what serves always.
        turns.turn = self._of_turn(turns.turn)  # type: ignore[method-assign]
        turns.end = self._of_end(turns.end)  # type: ignore[method-assign]
        executor.dispatch = self._of_dispatch(executor.dispatch)  # type: ignore[method-assign]
        executor.collect = self._of_collect(executor.collect)  # type: ignore[method-assign]
        executor.insert = self._of_pages(executor.insert)  # type: ignore[method-assign]
        executor.extract = self._of_pages(executor.extract)  # type: ignore[method-assign]
        instance.sink = self._of_sink(instance.sink)

    def _of_turn(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def turn() -> Any:
            self._turn = {}
            began_s, cpu_s = time.perf_counter(), time.thread_time()
            result = call()
            self._turn.update(  # of the iteration planned in it, if one was
                turn_s=began_s,
                turned_s=time.perf_counter(),
                turn_cpu_s=time.thread_time() - cpu_s,
            )
            return result

        return turn

    def _of_dispatch(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def dispatch(iteration: Any) -> Any:
            began_s, cpu_s = time.perf_counter(), time.thread_time()
            handle = call(iteration)
            self._turn = row = {
                "dispatch_s": began_s,
                "dispatched_s": time.perf_counter(),
                "dispatch_cpu_s": time.thread_time() - cpu_s,
                "batch": len(iteration.decodes),
                "bucket": iteration.bucket,
                "kv_tokens": iteration.kv_tokens,
                "prefill_tokens": iteration.prefill_tokens,
                "prefills": len(iteration.prefills),
                "landed": self._landed,
            }
            self._landed = 0
            self._in_flight.append(row)
            return handle

        return dispatch

    def _of_collect(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def collect(handle: Any) -> Any:
            row = self._in_flight[0]
            row["collect_s"], cpu_s = time.perf_counter(), time.thread_time()
            result = call(handle)
            row["collected_s"] = time.perf_counter()
            row["collect_cpu_s"] = time.thread_time() - cpu_s
            return result

        return collect

    def _of_end(self, call: Callable[[Any], None]) -> Callable[[Any], None]:
        def end(outcome: Any) -> None:
            cpu_s = time.thread_time()
            call(outcome)
            row = self._in_flight.popleft()
            row["ended_s"], row["end_cpu_s"] = time.perf_counter(), time.thread_time() - cpu_s
            row["sunk_s"] = self._sunk_s
            self.rows.append(row)

        return end

    def _of_sink(self, call: Callable[[Any], None]) -> Callable[[Any], None]:
        def sink(events: Any) -> None:
            self._sunk_s = time.perf_counter()
            call(events)

        return sink

    def _of_pages(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def move(*arguments: Any) -> Any:
            began_s = time.perf_counter()
            result = call(*arguments)
            self.pages.append((began_s, time.perf_counter() - began_s, len(arguments[-1])))
            self._landed += 1
            return result

        return move

    def take(self) -> dict[str, np.ndarray]:
        """What was noted since the last call."""
        rows, self.rows = self.rows, []
        pages, self.pages = self.pages, []
        table = [[row.get(column, np.nan) for column in COLUMNS] for row in rows]
        return {
            self.name: np.array(table, float).reshape(-1, len(COLUMNS)),
            f"{self.name} pages": np.array(pages, float).reshape(-1, 3),
        }


class ServerLog:
    """The instances' rows, the front's, and what else may hold threads up."""

    def __init__(self, engine: Engine) -> None:
        self.instances = [
            IterationLog(one) for one in engine.instances if isinstance(one, Instance)
        ]
        self._front: list[tuple[float, float, float, int]] = []
        self._tokens: defaultdict[str, list[float]] = defaultdict(list)
        self._pauses: list[tuple[float, float, int]] = []
        self._compiled: list[tuple[float, float, str]] = []
        self._gc_s = 0.0
        receive = engine.receive

        def noted(source: Any, events: Any) -> None:
            began_s = time.perf_counter()
            receive(source, events)
            ended_s = time.perf_counter()
            self._front.append((events[0].time_s, began_s, ended_s, len(events)))
            for event in events:
                if event.token is not None:
                    self._tokens[str(event.request.request_id)].append(began_s)

        engine.receive = noted  # type: ignore[method-assign]
        gc.callbacks.append(self._collecting)
        jax.monitoring.register_event_duration_secs_listener(self._compiling)

    def _collecting(self, phase: str, information: dict[str, int]) -> None:
        now_s = time.perf_counter()
        if phase == "start":
            self._gc_s = now_s
        else:
            self._pauses.append((self._gc_s, now_s - self._gc_s, information["generation"]))

    def _compiling(self, event: str, duration_secs: float, **_: Any) -> None:
        self._compiled.append((time.perf_counter(), duration_secs, event))

    def save(self, path: Path) -> dict[str, Any]:
        """Writes what was noted since the last call; on the event loop's thread, between loads.

        Returns:
            Counts of what should not happen while serving.
        """
        arrays: dict[str, np.ndarray] = {"columns": np.array(COLUMNS)}
        for log in self.instances:
            arrays |= log.take()
        front, self._front = self._front, []
        arrays["front"] = np.array(front, float).reshape(-1, 4)
        tokens, self._tokens = self._tokens, defaultdict(list)
        arrays["token_of"] = np.array([name for name, times in tokens.items() for _ in times])
        arrays["token_s"] = np.array([each for times in tokens.values() for each in times], float)
        pauses, self._pauses = self._pauses, []
        arrays["gc"] = np.array(pauses, float).reshape(-1, 3)
        compiled, self._compiled = self._compiled, []
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
        return {
            "garbage_collections": len(pauses),
            "garbage_collection_longest_ms": 1e3 * max((one[1] for one in pauses), default=0.0),
            "compile_events": len(compiled),
            "compile_s": sum(one[1] for one in compiled),
            "compiled": [one[2] for one in compiled[:10]],
        }
