#!/usr/bin/env python
"""Three loads served live on two GPUs, beside what was predicted of them before.

    scripts/bench_energy_loads.py predict                  needs no GPU; writes what is to be met
    scripts/bench_energy_loads.py run                      two GPUs, about 260 s; clocks observed
    scripts/bench_energy_loads.py run --model tiny --seconds 4           on a CPU, to try it
    scripts/bench_energy_loads.py again --one-gpu --logs FOLDER      a recorded run, without a GPU

`predict` replays each load on one prefill and one decode instance modelled from the GPU's row and
the model's shape alone: no profile and no request of the run goes into it. `run` takes a short
profile and sends a few requests, predicts the loads of that, serves them with random weights over
HTTP, takes energy from the GPUs' counters (idle included), and sets measured and predicted side by
side.
"""

import argparse
import asyncio
import dataclasses
import datetime
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_energy_live as live
import httpx
import numpy as np

from jaxsys.errors import RunError, UsageError
from jaxsys.files import write_whole
from jaxsys.model.shapes import PRESETS, preset
from jaxsys.results import read_result, table, write_result
from jaxsys.serve.deployment import ACCELERATOR_PAGE
from jaxsys.serve.energy.fixed_clock import FixedClock
from jaxsys.serve.energy.governors import Served
from jaxsys.serve.energy.gpu_model import GPUS, SimulatedGpu, gpu_spec
from jaxsys.serve.hooks import FewestRequestsRouter
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.processes.gpus import visible_gpus
from jaxsys.serve.simulation.installation import ClusterConfig
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.simulator import Simulator
from jaxsys.serve.simulation.traces import RequestTrace
from jaxsys.serve.steps import ExecutorConfig
from studies.iteration_log import dispatch_figures, dispatch_times, heard_late_s, lone_prompt_s

LOADS: dict[str, dict[str, float]] = {
    "chat": {"rate_per_s": 4.0, "prompt_mean": 500, "prompt_sigma": 0.8, "output_mean": 150},
    "documents": {"rate_per_s": 3.0, "prompt_mean": 1500, "prompt_sigma": 0.5, "output_mean": 40},
    "writing": {"rate_per_s": 5.0, "prompt_mean": 100, "prompt_sigma": 0.6, "output_mean": 260},
}
"""Requests a second and lengths; outputs lognormal with a deviation of 0.5."""

FOUND_BEFORE = {
    "front_s": 5.0e-3,
    "dispatch_s": 1.55e-3,
    "plan_after_s": 0.21e-3,
    "hand_over_s": 3.0e-3,
    "hand_out_s": 1.0e-3,
    "landing_s": 0.4e-3,
}
"""What the host adds. The first three: an earlier run on one H200 (results/energy_live_h200.json).
Hand-overs: landing as timed on a CPU, the rest assumed."""
PREDICTED = Path("results/energy_loads_predicted.json")
PROBE = 900
"""Tokens of the prompts sent before any load, one at a time and together."""
SHORT_US = 500
"""How long a thread may keep the interpreter while others wait, where the loads are served a second
time; Python's default is 5000."""
TAIL = ("itl_mean_ms", "itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "ttft_mean_ms", "ttft_p99_ms")
SHOWN = {
    "load": "",
    "within_goal": "",
    "profiled": ".3f",
    "profiled_error_pct": "+.1f",
    "profiled_within_goal": "",
}
GOAL_PCT = {"mean": 10.0, "p50": 10.0, "p90": 10.0, "p99": 15.0, "energy": 10.0}


def trace_of(name: str, seconds: float, longest: int) -> RequestTrace:
    """A load's requests, the same in `predict` and `run`."""
    load = LOADS[name]
    short = min(1.0, longest / 4096)
    return synthetic_trace(
        rate_per_s=load["rate_per_s"],
        duration_s=seconds,
        seed=29,
        prompt_mean=max(1.0, load["prompt_mean"] * short),
        prompt_sigma=load["prompt_sigma"],
        output_mean=max(1.0, load["output_mean"] * short),
        output_sigma=0.5,
        most_tokens=longest // 2 - 1,
        name=name,
    )


def cluster_of(options: argparse.Namespace) -> ClusterConfig:
    """The installation as modelled: nothing in it was measured on the run."""
    served = Served(model=preset(options.model)).shape()
    shape = dataclasses.replace(served, name=options.model)
    scheduler = SchedulerConfig(
        page_count=options.pages,
        page_size=ACCELERATOR_PAGE,
        max_batch=options.max_batch,
        max_prefill_tokens=options.max_prefill_tokens,
        max_length=options.max_length,
    )
    shapes = ExecutorConfig.for_scheduler(scheduler)
    return ClusterConfig(
        gpu=SimulatedGpu(gpu_spec(options.gpu), shape),
        prefill_instances=1,
        decode_instances=options.decode,
        max_batch=options.max_batch,
        max_prefill_tokens=options.max_prefill_tokens,
        page_size=ACCELERATOR_PAGE,
        piece_buckets=shapes.piece_buckets,
        decode_buckets=scheduler.decode_buckets,
        plan_ahead=True,
        dispatch_s=FOUND_BEFORE["dispatch_s"],
        plan_after_s=FOUND_BEFORE["plan_after_s"],
        hand_over_s=FOUND_BEFORE["hand_over_s"],
        hand_out_s=FOUND_BEFORE["hand_out_s"],
        landing_s=FOUND_BEFORE["landing_s"],
    )


def predict(options: argparse.Namespace) -> int:
    cluster = cluster_of(options)
    rows = []
    for name in LOADS:
        trace = trace_of(name, options.seconds, options.max_length)
        result = Simulator(
            trace,
            cluster,
            make_policy=lambda role: FixedClock(cluster.gpu.spec.max_mhz),
            prefill_router=FewestRequestsRouter(),
            decode_router=FewestRequestsRouter(),
        ).run()
        figures = live.predicted_figures(result, FOUND_BEFORE["front_s"], True)
        rows.append({"load": name, "requests": len(trace), **figures})
    write_result(
        options.predicted,
        benchmark="energy_loads_predicted",
        kind="simulated",
        config=config_of(options)
        | {"predicted_on": datetime.date.today().isoformat(), "host": FOUND_BEFORE},
        rows=rows,
    )
    print(table(rows))
    return 0


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "gpu", "seconds", "max_batch", "max_length", "max_prefill_tokens", "pages")
    apart = {} if options.decode else {"instances": "one that does both"}
    return {name: getattr(options, name) for name in names} | apart | {"loads": LOADS}


async def serve_load(
    client: httpx.AsyncClient,
    port: int,
    options: argparse.Namespace,
    trace: RequestTrace,
    gpus: tuple[list, list],
    name: str,
) -> dict[str, Any]:
    """Figures of one load, under the names of `predicted_figures`."""
    live.note(f"load {name}")
    devices, logs = gpus
    clocks_mhz: list[int] = []
    watching = asyncio.ensure_future(live.watch_clocks(devices, clocks_mhz))
    began_s = time.perf_counter()
    answers = await live.replay(port, options, trace)
    watching.cancel()
    if answers.failures or not answers.ttft_s:
        raise RunError(f"{name}: {len(answers.failures)} failed: {answers.failures[:2]}")
    energy_j = None
    if logs:
        energy_j = await asyncio.to_thread(live.total_j, logs, began_s, answers.ended_s)
    figures: dict[str, Any] = {}
    for figure, values in (("ttft", answers.ttft_s), ("itl", answers.itl_s)):
        figures[f"{figure}_mean_ms"] = 1e3 * statistics.fmean(values)
        for p in live.PERCENTS:
            figures[f"{figure}_p{p}_ms"] = 1e3 * float(np.percentile(values, p))
    figures["energy_j_per_token"] = None if energy_j is None else energy_j / answers.tokens
    figures["output_tokens"] = answers.tokens
    figures["duration_s"] = answers.ended_s - began_s
    figures["spread"] = {
        "itl_ms": {f"p{p}": 1e3 * float(np.percentile(answers.itl_s, p)) for p in live.SPREAD},
        "ttft_ms": [round(1e3 * value, 2) for value in answers.ttft_s],
        "requests": len(trace),
    }
    if clocks_mhz:
        figures["clock_mhz"] = {f"p{p}": float(np.percentile(clocks_mhz, p)) for p in (1, 10, 50)}
    figures["held_up"] = (await client.post(f"/take-log/{name}")).json()
    if options.logs is not None:
        streams = [one for one in answers.streams if one.came_s]
        np.savez_compressed(
            options.logs / f"{name} client.npz",
            name=np.array([one.name for one in streams]),
            sent_s=np.array([one.sent_s for one in streams]),
            tokens=np.array([len(one.came_s) for one in streams]),
            came_s=np.concatenate([one.came_s for one in streams]),
        )
    return figures


async def measure(
    options: argparse.Namespace, server: dict[str, Any], folder: Path, content: dict[str, Any]
) -> None:
    """Puts into `content` what is known as it becomes known: what was found before any load, what
    is predicted from it, the loads, and perhaps the loads a second time."""
    port, found = server["port"], content["measured"]
    with live.energy_logs(server["gpus"]) as gpus:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            # A compiled step is loaded when it first runs: every size once.
            longest = options.max_length - live.STEPS
            for prompt in sorted({min(length, longest) for length in (8, 64, 256, 1024)}):
                await live.probe(port, options, prompt, 1, 2)
            live.note("before the loads")
            before = await live.look_before(client, port, options, PROBE, options.decode, gpus[1])
            await client.post("/take-log/before")
            note_served(before, folder / "before.npz")
            content["found_before"] = before
            traces = [trace_of(name, options.seconds, options.max_length) for name in LOADS]
            content["predicted_from_profile"] = [
                predict_from_profile(options, trace, server, folder, before) for trace in traces
            ]
            save(options, content)
            for trace in traces:
                found[trace.name] = await serve_load(client, port, options, trace, gpus, trace.name)
                save(options, content)
            if not options.short_switch_interval:
                return
            second = content["short_switch_interval"] = {}
            await client.post(f"/switch-interval/{SHORT_US}")
            for trace in traces:
                if time.monotonic() + 1.2 * options.seconds > options.deadline_s:
                    live.note(f"no time left for {trace.name} at {SHORT_US} us")
                    continue
                name = f"{trace.name}-{SHORT_US}us"
                second[trace.name] = await serve_load(client, port, options, trace, gpus, name)
                save(options, content)


def note_served(before: dict[str, Any], log: Path) -> np.ndarray:
    """Adds to what was found before the loads what the server's own notes say: how long it took for
    a lone prompt, and how unevenly it hears of steps' ends. The log's rows, an iteration of the one
    instance or of the first each."""
    noted = np.load(log)
    rows = next(noted[name] for name in noted.files if name.startswith(("instance", "prefill")))
    served_s = lone_prompt_s(rows, before["lone_prompt"])
    if served_s is not None:
        before["lone_served_s"] = served_s
    before["heard_late_s"] = heard_late_s(rows)
    return rows


def predict_from_profile(
    options: argparse.Namespace,
    trace: RequestTrace,
    server: dict[str, Any],
    folder: Path,
    before: dict[str, Any],
) -> dict[str, Any]:
    """What the simulator says of a load, of the profile and of requests sent before it."""
    known = dict(before)
    simulated, front_s = live.simulate(options, trace, server, options.decode, folder, known)
    late_s = before.get("heard_late_s", [])
    figures = live.predicted_figures(simulated, front_s, "idle_w" in before, late_s)
    return {"load": trace.name, "requests": len(trace), **figures}


def save(options: argparse.Namespace, content: dict[str, Any]) -> None:
    write_result(options.out, benchmark="energy_loads", kind="measured", **content)


def compare(
    before: list[dict[str, Any]], profiled: list[dict[str, Any]], found: dict[str, dict]
) -> list[dict[str, Any]]:
    """A row a load and figure: by the GPU's row, by the profile, and as it was."""
    rows = []
    for row, other in zip(before, profiled, strict=True):
        for figure, said in row.items():
            if figure in ("load", "requests", "duration_s", "output_tokens"):
                continue
            measured = found[row["load"]].get(figure)
            error = live.error_pct(measured, said)
            again = live.error_pct(measured, other.get(figure))
            goal = goal_pct(figure)
            rows.append(
                {
                    "load": row["load"],
                    "figure": figure,
                    "measured": measured,
                    "predicted": said,
                    "prediction_error_pct": error,
                    "within_goal": None if error is None else abs(error) <= goal,
                    "profiled": other.get(figure),
                    "profiled_error_pct": again,
                    "profiled_within_goal": None if again is None else abs(again) <= goal,
                }
            )
    return rows


def run(options: argparse.Namespace) -> int:
    options.deadline_s = time.monotonic() + options.most_seconds
    if not options.predicted.exists():  # then it is made now, before anything is served
        predict(options)
    predicted = read_result(options.predicted)
    mine = config_of(options)
    different = [key for key, value in mine.items() if predicted["config"].get(key) != value]
    if different:
        raise UsageError(
            f"{options.predicted} predicts another {', '.join(different)}; run `predict` with the "
            "same options first"
        )
    content: dict[str, Any] = {
        "config": mine | {"clocks": "default, observed"},
        "rows": [],
        "measured": {},
        "short_switch_interval": {},
        "predicted_on": predicted["config"]["predicted_on"],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = live.Server(options, folder, options.decode, load_s=options.load_seconds, log=True)
        try:
            ready, content["stages_s"] = server.wait_until_ready(time.monotonic() + 300)
            content["energy"] = ready["energy"]
            content["server"] = {key: ready[key] for key in live.SERVER_KEYS}
            content["profile"] = json.loads((folder / "profile.json").read_text())
            asyncio.run(measure(options, ready, folder, content))
        except RunError:
            live.note(server.last_words())
            raise
        finally:
            server.end()
            if options.logs is not None:
                for each in folder.glob("*.npz"):
                    shutil.copy(each, options.logs / each.name)
        decisions = folder / "decisions.json"
        content["decisions"] = json.loads(decisions.read_text()) if decisions.exists() else None
    content["rows"] = rows = compare(
        predicted["rows"], content["predicted_from_profile"], content["measured"]
    )
    for name in ("within_goal", "profiled_within_goal"):
        content[name] = sum(bool(row[name]) for row in rows)
    content["judged"] = sum(row["within_goal"] is not None for row in rows)
    save(options, content)
    shown = [{key: str(v) if isinstance(v, bool) else v for key, v in r.items()} for r in rows]
    print(table(shown, {**live.FORMATS, **SHOWN}))
    for load, figures in content["short_switch_interval"].items():
        tail = ", ".join(f"{key} {figures[key]:.2f}" for key in TAIL)
        was = ", ".join(f"{content['measured'][load][key]:.2f}" for key in TAIL)
        print(f"{load}, threads keep the interpreter for {SHORT_US} us: {tail} (before: {was})")
    for load, figures in content["measured"].items():
        print(f"{load}: held up by {figures['held_up']}")
    print(
        f"of {content['judged']} figures {content['within_goal']} within the goal by the GPU's "
        f"row, {content['profiled_within_goal']} by the profile; wrote {options.out}"
    )
    return 0


def again(options: argparse.Namespace) -> int:
    """Predicts a recorded run with the simulator as it is now, of the part before its loads: its
    profile, its first requests, and how long each of their steps took to dispatch."""
    recorded = read_result(options.out)
    found = recorded["found_before"]
    rows = note_served(found, options.logs / "before.npz")
    found["itl_s"] = {int(count): itl_s for count, itl_s in found["itl_s"].items()}
    if not recorded["profile"].get("dispatch_s"):
        found["dispatch_times"] = dispatch_times(rows)
    predicted = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "profile.json").write_text(json.dumps(recorded["profile"]))
        for load in LOADS:
            trace = trace_of(load, options.seconds, options.max_length)
            predicted[load] = predict_from_profile(
                options, trace, recorded["server"], Path(name), found
            )
    for row in recorded["rows"]:
        row["again"] = predicted[row["load"]].get(row["figure"])
        row["again_error_pct"] = error = live.error_pct(row["measured"], row["again"])
        row["again_within_goal"] = None if error is None else abs(error) <= goal_pct(row["figure"])
    recorded["again_within_goal"] = sum(bool(row["again_within_goal"]) for row in recorded["rows"])
    times = found.pop("dispatch_times", None)
    if times is not None:
        recorded["dispatch_before_s"] = dataclasses.asdict(times)
    recorded["dispatching"] = dispatching(options.logs)
    recorded["predicted_again_on"] = datetime.date.today().isoformat()
    write_whole(options.out, json.dumps(recorded, indent=1) + "\n")
    shown = {"load": "", **live.FORMATS, "profiled_error_pct": "+.1f", "again": ".3f"}
    shown |= {"again_error_pct": "+.1f", "again_within_goal": ""}
    print(table(recorded["rows"], shown))
    print(f"of {recorded['judged']} figures {recorded['again_within_goal']} within the goal")
    return 0


def dispatching(logs: Path) -> dict[str, dict[str, float | int]]:
    """What dispatching took in each load, of the first instance."""
    found = {}
    for name in LOADS:
        noted = np.load(logs / f"{name}.npz")
        rows = next(noted[one] for one in noted.files if one.startswith(("instance", "decode")))
        found[name] = dispatch_figures(rows)
    return found


def goal_pct(figure: str) -> float:
    """How far a prediction of a figure may be off."""
    return GOAL_PCT[figure.split("_")[0 if figure.startswith("energy") else 1]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("action", choices=("predict", "run", "again"))
    add("--model", choices=list(PRESETS), default="Llama-3-8B", help="shape; weights are random")
    add("--gpu", choices=list(GPUS), default="h200", help="row that predicts (default h200)")
    add("--seconds", type=float, default=20.0, help="of arrivals, each load (default 20)")
    add("--predicted", type=Path,
        help=f"what `predict` writes and `run` reads, or makes where it is not there (default "
        f"{PREDICTED}, or beside --out with --one-gpu)")  # fmt: skip
    add("--one-gpu", action="store_true", help="one instance that does both, on one GPU")
    add("--out", type=Path, help="of `run` (default results/energy_loads.json)")
    add("--logs", type=Path, metavar="FOLDER",
        help="of `run`: keep there when each iteration's parts and each token came; of `again`: "
        "where they are")  # fmt: skip
    add("--short-switch-interval", action="store_true",
        help=f"of `run`: serve the loads a second time where threads keep the interpreter for "
        f"{SHORT_US} us while others wait")  # fmt: skip
    add("--load-seconds", type=float, default=0.4,
        help="of `run`: time of each load of the profile (default 0.4)")  # fmt: skip
    add("--most-seconds", type=float, default=270.0,
        help="of `run`: what does not end by then is not begun (default 270)")  # fmt: skip
    options = parser.parse_args()
    tiny = options.model == "tiny"
    options.decode = 0 if options.one_gpu else 1
    beside = (options.out or PREDICTED).parent / "energy_loads_one_gpu_predicted.json"
    options.predicted = options.predicted or (beside if options.one_gpu else PREDICTED)
    options.max_length = min(4096, preset(options.model).max_positions)
    options.max_batch, options.max_prefill_tokens = (4, 64) if tiny else (64, 2048)
    options.pages = 128 if tiny else 1500
    try:
        if options.action == "predict":
            if options.out is not None:
                raise UsageError(f"--out {options.out} is of `run`; `predict` writes --predicted")
            return predict(options)
        one = "_one_gpu" if options.one_gpu else ""
        options.out = options.out or Path(f"results/energy_loads{one}.json")
        if options.action == "again":
            if options.logs is None:
                raise UsageError("`again` needs the run's --logs")
            return again(options)
        if options.logs is not None:
            options.logs.mkdir(parents=True, exist_ok=True)
        needed = 1 + options.decode
        if not tiny and len(visible_gpus()) < needed:
            raise UsageError(
                f"{needed} GPU(s) are needed, one an instance; --model tiny runs on a CPU"
            )
        return run(options)
    except (RunError, UsageError) as error:
        print(f"bench_energy_loads: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    raise SystemExit(main())
