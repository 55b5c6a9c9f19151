#!/usr/bin/env python
"""A slice of a trace served live over HTTP, beside what the simulator predicts of it.

    scripts/bench_energy_live.py                                     random weights of Llama-3-8B
    scripts/bench_energy_live.py --trace AzureLLMInferenceTrace_conv.csv --rate 4 --duration 90
    scripts/bench_energy_live.py --model tiny --duration 5 --rate 4         on a CPU, to try it
    scripts/bench_energy_live.py --again results/energy_live_h100.json --trace ... without a server

One command: it starts the server (one prefill and one decode instance on two GPUs, on one a single
instance that does both), takes a short profile of the engine there, sends a few requests for what
HTTP adds, replays the slice, and has the simulator replay it on the GPU of that profile. Clocks are
only observed, energy is the GPUs' own counter; on a CPU energy is modelled, and not predicted. What
is known is written as it becomes known, and the server is ended whatever happens. `--again` has the
simulator as it is now predict a recorded run from the profile recorded with it; the first
prediction stays beside it.
"""

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import math
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from jaxsys.errors import RunError, UsageError
from jaxsys.files import write_whole
from jaxsys.model.shapes import PRESETS, preset
from jaxsys.nvml import NvmlGpu
from jaxsys.results import read_result, table, write_result
from jaxsys.serve.deployment import ACCELERATOR_PAGE
from jaxsys.serve.energy.energy_log import EnergyLog
from jaxsys.serve.energy.fixed_clock import FixedClock
from jaxsys.serve.energy.governors import spec_of
from jaxsys.serve.energy.gpu_model import GPUS, Load, gpu_spec, shape_from_sizes
from jaxsys.serve.energy.profile import load_profile
from jaxsys.serve.hooks import FewestRequestsRouter
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.processes.gpus import visible_gpus
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.result import ReplayResult
from jaxsys.serve.simulation.simulator import Simulator
from jaxsys.serve.simulation.trace_files import read_trace
from jaxsys.serve.simulation.traces import RequestTrace
from jaxsys.serve.steps import ExecutorConfig
from studies.measured_gpu import MeasuredGpu
from studies.stream_client import Stream, stream

ROOT = Path(__file__).resolve().parent.parent
PERCENTS = (50, 90, 99)
SPREAD = (1, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.9)
LONE = 16
"""Requests sent one at a time before the replay, for what HTTP adds to a first token ..."""
TOGETHER = 16
"""... and those sent at once, for what it adds to a decode step."""
STEPS = 64
"""Tokens of each of them."""
LANDINGS = 16
"""Prompts handed over beside a request that decodes, for what that adds ..."""
QUIET = 100
"""... to the tokens it has had before."""
PAIRS = 8
"""Prompts that find another at work, for what handing that over adds to them."""
IDLE_S = 2.0
SERVER_KEYS = ("piece_buckets", "decode_buckets", "page_size", "parameters", "dispatch_s")
FORMATS = {"figure": "", "measured": ".3f", "predicted": ".3f", "prediction_error_pct": "+.1f"}


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# --- the server -------------------------------------------------------------------------------


class Server:
    """scripts/live_server.py as a child; it ends when its standard input does."""

    def __init__(
        self,
        options: argparse.Namespace,
        folder: Path,
        decode: int,
        *,
        load_s: float | None = 1.0,
        log: bool = False,
    ) -> None:
        """
        Args:
            load_s: seconds of each load of the profile; None: none is taken.
            log: whether the server notes when each iteration's parts began and ended.
        """
        line = [sys.executable, str(ROOT / "scripts/live_server.py"), "--model", options.model]
        line += ["--gpu", options.gpu, "--decode", str(decode), "--folder", str(folder)]
        line += ["--max-batch", str(options.max_batch), "--pages", str(options.pages)]
        line += ["--max-length", str(options.max_length)]
        line += ["--max-prefill-tokens", str(options.max_prefill_tokens)]
        line += ["--no-profile"] if load_s is None else ["--load-seconds", str(load_s)]
        line += ["--log"] if log else []
        self.log = folder / "server.log"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def wait_until_ready(self, deadline_s: float) -> tuple[dict[str, Any], dict[str, float]]:
        """Its last message, and the seconds that each stage took."""
        stages: dict[str, float] = {}
        stage, began_s = "start", time.monotonic()
        while True:
            try:
                line = self.lines.get(timeout=max(0.1, deadline_s - time.monotonic()))
            except queue.Empty:
                raise RunError(f"the server is still at {stage!r} when time is up") from None
            if line is None:
                raise RunError(f"the server ended at {stage!r}: {self.last_words()}")
            with contextlib.suppress(json.JSONDecodeError):
                message = json.loads(line)
                stages[stage] = round(time.monotonic() - began_s, 1)
                stage, began_s = message["stage"], time.monotonic()
                note(f"server: {stage}")
                if stage == "ready":
                    return message, stages

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])

    def end(self) -> None:
        """Closes its input, and kills it if that does not help."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=20)


# --- the client -------------------------------------------------------------------------------


class Answers:
    """What clients saw."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.failures: list[str] = []

    @property
    def ttft_s(self) -> list[float]:
        return [one.came_s[0] - one.sent_s for one in self.streams if one.came_s]

    @property
    def itl_s(self) -> list[float]:
        return [
            later - earlier
            for one in self.streams
            for earlier, later in itertools.pairwise(one.came_s)
        ]

    @property
    def tokens(self) -> int:
        return sum(len(one.came_s) for one in self.streams)

    @property
    def ended_s(self) -> float:
        return max((one.came_s[-1] for one in self.streams if one.came_s), default=0.0)


def body_of(model: str, vocabulary: int, prompt: int, output: int) -> bytes:
    """A request of so many tokens in and out."""
    draw = random.Random(prompt * 100_003 + output)
    body = {
        "model": model,
        "prompt": [draw.randrange(vocabulary) for _ in range(prompt)],
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    return json.dumps(body).encode()


async def ask(port: int, body: bytes, to: Answers) -> None:
    """Sends one request and notes when its tokens come."""
    one = Stream()
    to.streams.append(one)
    try:
        await stream(port, "/v1/completions", body, one)
    except RunError as error:
        to.failures.append(str(error))


async def probe(
    port: int, options: argparse.Namespace, prompt: int, count: int, times: int
) -> Answers:
    """`times` rounds of `count` requests at once, and what came of the later half."""
    body = body_of(options.model, preset(options.model).vocab_size, prompt, STEPS)
    kept = Answers()
    for number in range(times):
        answers = Answers()
        await asyncio.gather(*(ask(port, body, answers) for _ in range(count)))
        if answers.failures:
            raise RunError(f"the server does not answer: {answers.failures[0]}")
        if number >= times // 2:
            kept.streams += answers.streams
    return kept


async def hand_overs(port: int, options: argparse.Namespace, prompt: int) -> dict:
    """Seconds that handing prompts over takes and holds up, one after the other.

    Returns:
        first_gap_s: from a prompt's first token to its second, beside a request that decodes.
        landing_s: how much longer that request waits, in all, a prompt handed over.
        pair_s: from the first token of a prompt to that of one that came while it was computed.
    """
    vocabulary = preset(options.model).vocab_size

    def send(length: int, tokens: int, to: Answers) -> asyncio.Task[None]:
        body = body_of(options.model, vocabulary, length, tokens)
        return asyncio.ensure_future(ask(port, body, to))

    beside = Answers()
    long = send(16, min(6 * QUIET, options.max_length - 16), beside)
    while len(beside.itl_s) < QUIET and not long.done():
        await asyncio.sleep(0.01)
    from_token, came = len(beside.itl_s), Answers()
    while len(came.itl_s) < LANDINGS and not (long.done() or came.failures):
        await send(prompt, 2, came)
        await asyncio.sleep(0.05)
    longer = beside.itl_s[from_token:]
    await long
    after_s = []
    for _ in range(PAIRS):
        pair = Answers(), Answers()
        first = send(prompt, 2, pair[0])
        await asyncio.sleep(statistics.median(came.ttft_s) / 2)
        await asyncio.gather(first, send(prompt, 2, pair[1]))
        one_s, other_s = (each.ended_s - sum(each.itl_s) for each in pair)
        after_s.append(other_s - one_s)
        await asyncio.sleep(0.05)
    failures = beside.failures + came.failures
    if failures:
        raise RunError(f"the server does not answer: {failures[0]}")
    # The first gap is that request's own hand-over.
    usual_s = statistics.fmean(beside.itl_s[1:from_token])
    return {
        "prompt": prompt,
        "first_gap_s": statistics.median(came.itl_s),
        "landing_s": max(0.0, (sum(longer) - len(longer) * usual_s) / len(came.itl_s)),
        "step_s": usual_s,
        "pair_s": statistics.median(after_s),
    }


async def replay(port: int, options: argparse.Namespace, trace: RequestTrace) -> Answers:
    """Sends the trace's requests at their times."""
    answers = Answers()
    vocabulary = preset(options.model).vocab_size
    bodies = [
        body_of(options.model, vocabulary, prompt, output)
        for prompt, output in zip(
            trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True
        )
    ]
    began_s = time.perf_counter()

    async def one(arrival_s: float, body: bytes) -> None:
        await asyncio.sleep(began_s + arrival_s - time.perf_counter())
        await ask(port, body, answers)

    rows = zip(trace.arrival_s.tolist(), bodies, strict=True)
    waiting = [asyncio.ensure_future(one(*row)) for row in rows]
    _, late = await asyncio.wait(waiting, timeout=trace.duration_s + 120)
    for task in late:
        task.cancel()
    if late:
        answers.failures += [f"{len(late)} requests unanswered 120 s after the last arrival"]
    return answers


async def modelled_energy_j(client: httpx.AsyncClient) -> float | None:
    """Sum of the instances' energy, as /metrics states it."""
    text = (await client.get("/metrics")).text
    rows = [line for line in text.splitlines() if line.startswith("jaxsys_energy_joules_total{")]
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows) if rows else None


@contextlib.contextmanager
def energy_logs(gpus: list[int | str]) -> Iterator[tuple[list[NvmlGpu], list[EnergyLog]]]:
    devices = [NvmlGpu(gpu) for gpu in gpus]
    logs = [EnergyLog(device.energy_j) for device in devices]
    try:
        yield devices, logs
    finally:
        for log in logs:
            log.close()
        for device in devices:
            device.close()


def total_j(logs: list[EnergyLog], start_s: float, end_s: float) -> float | None:
    parts = [log.between(start_s, end_s) for log in logs]
    return sum(part for part in parts if part is not None) if parts and None not in parts else None


async def look_before(
    client: httpx.AsyncClient,
    port: int,
    options: argparse.Namespace,
    prompt: int,
    decode: int,
    logs: list[EnergyLog],
) -> dict[str, Any]:
    """What is found out before a load is served: lone requests, hand-overs, an idle moment."""
    found: dict[str, Any] = {}
    found["lone_prompt"] = prompt = min(prompt, options.max_length - STEPS)
    alone = await probe(port, options, prompt, 1, LONE)
    found["lone_ttft_s"] = statistics.median(alone.ttft_s)
    together = found["together"] = min(TOGETHER, options.max_batch)
    group = await probe(port, options, prompt, together, 2)
    found["itl_s"] = {1: statistics.median(alone.itl_s)}
    found["itl_s"][together] = statistics.median(group.itl_s)
    if decode:
        found["hand_overs"] = await hand_overs(port, options, prompt)
    await asyncio.sleep(0.5)
    idle_from_s = time.perf_counter()
    await asyncio.sleep(IDLE_S if logs else 0.0)
    idle_to_s = time.perf_counter()
    idle_j = await asyncio.to_thread(total_j, logs, idle_from_s, idle_to_s)
    if idle_j is not None:
        found["idle_w"] = idle_j / (idle_to_s - idle_from_s) / len(logs)
    found["plan_after_s"] = (await client.post("/forget-timings")).json()["plan_after_s"]
    return found


async def measure(
    options: argparse.Namespace, trace: RequestTrace, server: dict, decode: int
) -> dict[str, Any]:
    """Lone requests, hand-overs, an idle moment, the replay."""
    port = server["port"]
    prompt = int(np.median(trace.prompt_tokens))
    with energy_logs(server["gpus"]) as (devices, logs):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            found = await look_before(client, port, options, prompt, decode, logs)
            before_j = None if logs else await modelled_energy_j(client)
            note(f"replaying {len(trace)} requests over {trace.duration_s:.0f} s")
            clocks_mhz: list[int] = []
            watching = asyncio.ensure_future(watch_clocks(devices, clocks_mhz))
            began_s = time.perf_counter()
            answers = await replay(port, options, trace)
            watching.cancel()
            if logs:
                found["energy_j"] = await asyncio.to_thread(total_j, logs, began_s, answers.ended_s)
            else:
                after_j = await modelled_energy_j(client)
                if before_j is None or after_j is None:
                    found["energy_j"] = None
                else:
                    found["energy_j"] = after_j - before_j
    found["duration_s"] = answers.ended_s - began_s
    found["answers"] = answers
    if clocks_mhz:
        found["clock_mhz"] = {
            f"p{p}": float(np.percentile(clocks_mhz, p)) for p in (1, 10, 50, 90, 99)
        }
    return found


async def watch_clocks(devices: list[NvmlGpu], readings: list[int]) -> None:
    while devices:
        for device in devices:
            mhz = await asyncio.to_thread(device.actual_mhz)
            if mhz is not None:
                readings.append(mhz)
        await asyncio.sleep(0.25)


# --- the simulator ----------------------------------------------------------------------------


def simulate(
    options: argparse.Namespace,
    trace: RequestTrace,
    server: dict,
    decode: int,
    folder: Path,
    found: dict,
) -> tuple[ReplayResult, float]:
    """Replays the slice on the GPU of the profile; also what HTTP adds to a first token."""
    profile = load_profile(folder / "profile.json")
    config = preset(options.model)
    buckets = tuple(server["piece_buckets"])

    def measured(face_s: tuple[float, float]) -> MeasuredGpu:
        return MeasuredGpu(
            profile,
            gpu_spec(options.gpu),
            shape_from_sizes(
                name=options.model,
                parameters=server["parameters"],
                layers=config.num_layers,
                hidden=config.hidden_size,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                heads=config.num_heads,
                vocabulary=0 if config.tie_embeddings else config.vocab_size,
            ),
            piece_buckets=buckets,
            idle_w=found.get("idle_w", 0.0),
            kv_capacity_tokens=options.pages * server["page_size"],
            face_s=face_s,
        )

    gpu, prompt = measured((0.0, 0.0)), found["lone_prompt"]
    budget, left, start, alone_s = options.max_prefill_tokens, prompt, 0, 0.0
    while left:
        piece = min(left, budget)
        padded = next(size for size in buckets if size >= piece)
        alone_s += gpu.run(Load(padded, 1, start), 0).time_s
        start, left = start + piece, left - piece
    # What requests sent before the replay took beyond the engine's own time. One that finds the
    # instance idle takes longer than in the sweep, where it follows the last at once.
    dispatch_s = server["dispatch_s"]
    if "lone_served_s" in found:
        dispatch_s = max(0.0, found["lone_served_s"] - alone_s)
    found["prompt_s"] = alone_s + dispatch_s
    front_s = max(0.0, found["lone_ttft_s"] - found["prompt_s"])
    extra_s = {
        count: max(
            0.0,
            itl_s - gpu.run(Load(batch=count, kv_tokens=count * (prompt + STEPS // 2)), 0).time_s,
        )
        for count, itl_s in found["itl_s"].items()
    }
    few, many = min(extra_s), max(extra_s)
    slope_s = max(0.0, (extra_s[many] - extra_s[few]) / max(1, many - few))
    found["face_s"] = (max(0.0, extra_s[few] - slope_s * few), slope_s)
    gpu = measured(found["face_s"])
    cluster = ClusterConfig(
        gpu=gpu,
        prefill_instances=1,
        decode_instances=decode,
        max_batch=options.max_batch,
        max_prefill_tokens=budget,
        page_size=server["page_size"],
        piece_buckets=buckets,
        decode_buckets=tuple(server["decode_buckets"]),
        plan_ahead=True,
        dispatch_s=dispatch_s,
        dispatch_times=found.get("dispatch_times") or profile.dispatch,
        plan_after_s=found["plan_after_s"],
        **hand_over_times(found.get("hand_overs"), found["prompt_s"]),
    )
    result = Simulator(
        trace,
        cluster,
        make_policy=lambda role: FixedClock(gpu.spec.max_mhz),
        prefill_router=FewestRequestsRouter(),
        decode_router=FewestRequestsRouter(),
    ).run()
    return result, front_s


def hand_over_times(seen: dict[str, float] | None, prompt_s: float) -> dict[str, Any]:
    """What the simulator is told of hand-overs; nothing where none were timed.

    Args:
        prompt_s: the time of a prompt that was computed after another, if nothing held it up.
    """
    if seen is None:
        return {}
    # Who arrives waits for half the step at work and the one planned, and has a step of its own.
    waited_s = 2.5 * seen["step_s"] + seen["landing_s"]
    return {
        "hand_over_s": max(0.0, seen["first_gap_s"] - waited_s),
        "link_bytes_per_s": math.inf,  # all that it took is in the time
        "hand_out_s": max(0.0, seen["pair_s"] - prompt_s),
        "landing_s": seen["landing_s"],
    }


def predicted_figures(
    simulated: ReplayResult,
    front_s: float,
    predicts_energy: bool,
    heard_late_s: Sequence[float] = (),
) -> dict[str, float]:
    """What `compare` and a later prediction set beside the measured figures.

    Args:
        heard_late_s: percentiles of what is added to the time between tokens, drawn with a seed.
    """
    ttft_ms = (simulated.ttft_s + front_s) * 1e3
    figures = {
        "ttft_mean_ms": float(ttft_ms.mean()),
        **{f"ttft_p{p}_ms": float(np.percentile(ttft_ms, p)) for p in PERCENTS},
        "duration_s": simulated.duration_s,
        "output_tokens": simulated.output_tokens,
    }
    if len(simulated.itl_s):
        mean_s = float(np.average(simulated.itl_s, weights=simulated.itl_weight))
        figures["itl_mean_ms"] = 1e3 * mean_s
        figures |= {f"itl_p{p}_ms": 1e3 * simulated.itl_percentile(p) for p in PERCENTS}
        if len(heard_late_s):
            each_s = np.repeat(simulated.itl_s, simulated.itl_weight.astype(int))
            draws = 100 * np.random.default_rng(0).random(len(each_s))
            each_s = each_s + np.interp(draws, np.arange(101), heard_late_s)
            figures |= {f"itl_p{p}_ms": 1e3 * float(np.percentile(each_s, p)) for p in PERCENTS}
    if predicts_energy:
        figures["energy_j_per_token"] = simulated.energy_per_token_j
    return figures


def error_pct(measured: float | None, predicted: float | None) -> float | None:
    return None if not measured or predicted is None else 100 * (predicted / measured - 1)


def compare(found: dict, simulated: ReplayResult | None, front_s: float) -> list[dict[str, Any]]:
    """A row a figure: measured, predicted, error."""
    answers: Answers = found["answers"]
    said: dict[str, float] = {}
    if simulated is not None:  # without its idle power no power was ever read
        said = predicted_figures(simulated, front_s, "idle_w" in found)
    rows: list[dict[str, Any]] = []

    def row(figure: str, measured: float | None) -> None:
        predicted = said.get(figure)
        rows.append({"figure": figure, "measured": measured, "predicted": predicted,
                     "prediction_error_pct": error_pct(measured, predicted)})  # fmt: skip

    for name, values in (("ttft", answers.ttft_s), ("itl", answers.itl_s)):
        if values:
            row(f"{name}_mean_ms", 1e3 * statistics.fmean(values))
            for p in PERCENTS:
                row(f"{name}_p{p}_ms", 1e3 * float(np.percentile(values, p)))
    energy_j = found.get("energy_j")
    row("energy_j_per_token", None if energy_j is None else energy_j / max(1, answers.tokens))
    row("duration_s", found["duration_s"])
    row("output_tokens", answers.tokens)
    return rows


def predict_again(options: argparse.Namespace) -> int:
    """Predicts a recorded run with the simulator as it is now, and writes it beside the first."""
    recorded = options.recorded
    config = recorded["config"]
    trace = read_slice(options)
    found = {
        "requests": len(trace),
        "prompt_tokens_mean": float(trace.prompt_tokens.mean()),
        "output_tokens_mean": float(trace.output_tokens.mean()),
    }
    if any(config[key] != value for key, value in found.items()):
        raise UsageError(
            f"the trace's slice has {found}, which is not what {options.again} was measured with; "
            "give its --trace, --rate and --start"
        )
    scheduler = SchedulerConfig(
        page_count=options.pages,
        page_size=ACCELERATOR_PAGE,
        max_batch=options.max_batch,
        max_prefill_tokens=options.max_prefill_tokens,
        max_length=options.max_length,
    )
    server = recorded.get("server") or {
        "piece_buckets": ExecutorConfig.for_scheduler(scheduler).piece_buckets,
        "decode_buckets": recorded["profile"]["buckets"],
        "page_size": ACCELERATOR_PAGE,
        "parameters": preset(options.model).parameter_count(),
        "dispatch_s": 0.0,  # lies in the profile's prompts then, and in every first token
    }
    known = {key: recorded[key] for key in ("idle_w", "lone_ttft_s", "lone_prompt")}
    if known["idle_w"] is None:
        del known["idle_w"]
    # Runs before this was recorded: nothing is added to a step.
    known["itl_s"] = {int(k): v for k, v in recorded.get("itl_s", {"1": 0.0}).items()}
    known["plan_after_s"] = recorded.get("plan_after_s", 0.0)
    known["hand_overs"] = recorded.get("hand_overs")
    decode = 1 if config["instances"].startswith("one prefill") else 0
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "profile.json").write_text(json.dumps(recorded["profile"]))
        simulated, front_s = simulate(options, trace, server, decode, Path(name), known)
    said = predicted_figures(simulated, front_s, "idle_w" in known)
    for row in recorded["rows"]:
        row["again"] = said.get(row["figure"])
        row["again_error_pct"] = error_pct(row["measured"], row["again"])
    today = datetime.date.today().isoformat()
    recorded["predicted_when"] = {
        "predicted": "with the measurement, from what was known before the replay",
        "again": f"again, with the recorded profile, on {today}",
    }
    recorded["front_again_ms"] = 1e3 * front_s
    write_whole(options.out, json.dumps(recorded, indent=1) + "\n")
    print(table(recorded["rows"], {**FORMATS, "again": ".3f", "again_error_pct": "+.1f"}))
    print(f"predicted {recorded['predicted_when']['again']}")
    return 0


# --- command line -----------------------------------------------------------------------------


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=list(PRESETS), default="Llama-3-8B", help="shape; weights are random")
    add("--trace", type=Path, help="CSV; without it lengths like the Azure conversations'")
    add("--start", type=float, default=0.0, help="second of the trace to begin at")
    add("--duration", type=float, default=60.0, help="seconds to replay")
    add("--rate", type=float, default=4.0, help="mean requests a second")
    add("--instances", choices=("auto", "1P1D", "colocated"), default="auto",
        help="auto: 1P1D where there are two GPUs, else one instance that does both")  # fmt: skip
    add("--gpu", choices=list(GPUS), help="preset of the governor's model; this GPU's, else h100")
    add("--max-length", type=int, help="tokens of a request: 4096, or what the model has")
    add("--max-batch", type=int, default=64)
    add("--max-prefill-tokens", type=int, help="prompt tokens an iteration: 2048, 64 on CPU")
    add("--pages", type=int, help="pages of an instance: 1500, 128 on CPU")
    add("--seconds", type=float, default=540.0, help="time after which the server is given up")
    add("--again", type=Path, metavar="FILE",
        help="predict this recorded run again, and write it back")  # fmt: skip
    add("--out", type=Path, help="results/energy_live.json, or the file of --again")
    options = parser.parse_args()
    gpus: list[Any] = []
    if options.again is None:
        options.recorded = None
        options.out = options.out or Path("results/energy_live.json")
        gpus = visible_gpus()
    else:
        take_recorded(options)
        gpus = options.recorded["hardware"]["gpus"]
    if options.gpu is None:
        options.gpu = "h100"
        if gpus:
            if options.again is None:
                device = NvmlGpu(0)
                name = device.name
                device.close()
            else:
                name = gpus[0]
            spec = spec_of(name)
            options.gpu = next((key for key, known in GPUS.items() if known is spec), "h100")
    positions = preset(options.model).max_positions
    options.max_length = min(options.max_length or 4096, positions)
    if not gpus:
        options.max_batch = min(options.max_batch, 4)
    options.max_prefill_tokens = options.max_prefill_tokens or (2048 if gpus else 64)
    options.pages = options.pages or (1500 if gpus else 128)
    if options.instances == "auto":
        options.instances = "1P1D" if len(gpus) > 1 else "colocated"
    return options


def take_recorded(options: argparse.Namespace) -> None:
    """Puts what a recorded run was given in place of the command line's."""
    options.recorded = read_result(options.again)
    config = options.recorded["config"]
    options.out = options.out or options.again
    options.model = config["model"].partition(",")[0]
    options.start, options.duration = config["start_s"], config["duration_s"]
    for key in ("max_length", "max_batch", "max_prefill_tokens"):
        setattr(options, key, config[key])
    options.rate = config.get("rate_asked_per_s", options.rate)
    options.pages = config.get("pages", options.pages)


def read_slice(options: argparse.Namespace) -> RequestTrace:
    if options.trace is None:
        # Means of the Azure conversation trace; lognormal, as wide as its percentiles ask for.
        long = min(1.0, options.max_length / 4096)
        trace = synthetic_trace(
            rate_per_s=options.rate,
            duration_s=options.duration,
            seed=11,
            prompt_mean=max(1.0, 1155 * long),
            prompt_sigma=0.75,
            output_mean=max(1.0, 211 * long),
            output_sigma=0.9,
            most_tokens=options.max_length // 2 - 1,
            name="azure-conv-like",
        )
    else:
        trace = read_trace(options.trace).at_rate(options.rate)
        trace = trace.between(options.start, options.start + options.duration)
    return trace.clipped(options.max_length)


def main() -> int:
    began_s = time.monotonic()
    try:
        options = read_options()
        if options.recorded is not None:
            return predict_again(options)
        trace = read_slice(options)
        decode = 1 if options.instances == "1P1D" else 0
        with tempfile.TemporaryDirectory() as name:
            return run(options, trace, decode, Path(name), began_s + options.seconds)
    except (RunError, UsageError) as error:
        print(f"bench_energy_live: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def run(
    options: argparse.Namespace, trace: RequestTrace, decode: int, folder: Path, deadline_s: float
) -> int:
    content: dict[str, Any] = {
        "config": {
            "model": f"{options.model}, random weights",
            "trace": trace.name,
            "start_s": options.start,
            "duration_s": options.duration,
            "rate_asked_per_s": options.rate,
            "rate_per_s": trace.rate_per_s,
            "requests": len(trace),
            "prompt_tokens_mean": float(trace.prompt_tokens.mean()),
            "output_tokens_mean": float(trace.output_tokens.mean()),
            "instances": "one prefill and one decode instance, a GPU each"
            if decode
            else "one instance for prefill and decode",
            "max_length": options.max_length,
            "max_batch": options.max_batch,
            "max_prefill_tokens": options.max_prefill_tokens,
            "pages": options.pages,
            "clocks": "default, observed",
        },
        "rows": [],
    }

    def save() -> None:
        write_result(options.out, benchmark="energy_live", kind="measured", **content)

    server = Server(options, folder, decode)
    try:
        ready, content["stages_s"] = server.wait_until_ready(deadline_s)
        content["energy"] = ready["energy"]
        content["server"] = {key: ready[key] for key in SERVER_KEYS}
        content["profile"] = json.loads((folder / "profile.json").read_text())
        save()
        found = asyncio.run(measure(options, trace, ready, decode))
        answers: Answers = found["answers"]
        content["failures"] = answers.failures[:10]
        for key in ("idle_w", "lone_ttft_s", "lone_prompt", "itl_s", "hand_overs"):
            content[key] = found.get(key)
        for key in ("plan_after_s", "clock_mhz"):
            content[key] = found.get(key)
        if not answers.ttft_s:
            raise RunError(f"no request was answered: {answers.failures[:3]}")
        content["rows"] = compare(found, None, 0.0)
        content["ttft_s"] = [round(value, 5) for value in answers.ttft_s]
        content["itl_ms"] = {
            f"p{p}": 1e3 * float(np.percentile(answers.itl_s or [0.0], p)) for p in SPREAD
        }
        save()
    except RunError:
        note(server.last_words())
        raise
    finally:
        server.end()
    decisions = folder / "decisions.json"
    content["decisions"] = json.loads(decisions.read_text()) if decisions.exists() else None
    save()
    simulated, front_s = simulate(options, trace, ready, decode, folder, found)
    content["front_ms"] = 1e3 * front_s
    content["face_ms"], content["face_ms_per_sequence"] = (1e3 * s for s in found["face_s"])
    content["rows"] = compare(found, simulated, front_s)
    if "idle_w" not in found:
        content["energy"] += "; not predicted, as no power was read"
    for row in content["rows"]:
        if row["prediction_error_pct"] is not None:
            content[f"{row['figure']}_prediction_error_pct"] = row["prediction_error_pct"]
    save()
    print(table(content["rows"], FORMATS))
    print(f"energy is {content['energy']}")
    print(
        f"found before the replay: the host plans {1e3 * content['plan_after_s']:.2f} ms after an "
        f"iteration's end; HTTP adds {content['front_ms']:.2f} ms to a first token, "
        f"{content['face_ms']:.2f} ms and {content['face_ms_per_sequence']:.3f} ms a sequence to "
        "a step"
    )
    for name, value_s in hand_over_times(found.get("hand_overs"), found["prompt_s"]).items():
        if value_s < math.inf:
            print(f"of hand-overs: {name} {1e3 * value_s:.2f} ms")
    if content["decisions"]:
        print(table(content["decisions"]))
    if answers.failures:
        print(f"{len(answers.failures)} requests failed: {answers.failures[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
