#!/usr/bin/env python
"""Energy against attainment on simulated GPUs: studies that write results/energy_*.json and plots.

    scripts/bench_energy.py SECTION... --data FOLDER [--out results] [--quick] [--resume]

Sections: calibration (is the published experiment met?), published (savings at its rates),
matrix (traces x models x GPUs x loads), ablation (prediction error, set latency, clock sets),
day (24 h on 64 instances), decisions (what deciding costs). FOLDER holds the public traces.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxsys.results import read_result, write_result
from jaxsys.serve.energy.ecofreq import EcoFreq
from jaxsys.serve.energy.ecopred import EcoPred
from jaxsys.serve.energy.ecoroute import EnergyRouter, QueueRouter, StateSpaceRouter
from jaxsys.serve.energy.governor import Governor
from jaxsys.serve.energy.gpu_model import Load, SimulatedGpu, gpu_spec, simulated_gpu
from jaxsys.serve.energy.meters import CounterMeter
from jaxsys.serve.energy.profile import simulated_profile
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.simulation.calibration import SLO, lmsys_trace, published, run_static, scenario
from jaxsys.serve.simulation.replay import POLICIES, compare, figures, setting, simulate
from jaxsys.serve.simulation.study_plots import (
    draw_ablation,
    draw_calibration,
    draw_matrix,
    draw_published,
)
from jaxsys.serve.simulation.traces import Trace, lengths_from_csv, read_trace, trace_of_lengths

TABLE = "voltanallm_llama8b_lmsys.csv"
FINE = tuple(range(1005, 1411, 45))
NOISE = 0.02
HELD_OUT_SEED = 11
"""Of arrivals that were not looked at while constants were chosen."""


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def save(out: Path, name: str, content: dict) -> Path:
    kind = content.pop("kind", "simulated")
    config, rows = content.pop("config"), content.pop("rows")
    path = write_result(
        out / f"energy_{name}.json",
        benchmark=f"energy_{name}",
        kind=kind,
        config=config,
        rows=rows,
        **content,
    )
    note(f"wrote {path}")
    return path


def strip(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "series"}


# --- sections ---------------------------------------------------------------------------------


def calibration(data: Path, out: Path, quick: bool, resume: bool) -> None:
    seeds = (3,) if quick else (3, 4)
    rows = []
    for point in published(data / TABLE):
        for clock in (1410, 1005):
            runs = [run_static(point.rate_per_s, clock, seed) for seed in seeds]
            row = {
                "rate_per_s": point.rate_per_s,
                "clock_mhz": clock,
                "energy_j": float(np.mean([run.energy_j for run in runs])),
                "published_energy_j": point.energy_j[str(clock)],
                "ttft_attainment_pct": 100
                * float(np.mean([run.ttft_attainment(SLO.ttft_s) for run in runs])),
                "published_ttft_attainment_pct": point.ttft_attainment_pct[str(clock)],
                "itl_attainment_pct": 100
                * float(np.mean([run.itl_attainment(SLO.itl_s) for run in runs])),
            }
            for key in ("energy_j", "ttft_attainment_pct"):
                known = row[f"published_{key}"]
                row[f"{key}_error_pct"] = None if known is None else 100 * (row[key] / known - 1)
            rows.append(row)
            note(f"calibration {point.rate_per_s:.0f}/s {clock} MHz")
    energy = [abs(r["energy_j_error_pct"]) for r in rows if r["energy_j_error_pct"] is not None]
    ttft = [
        abs(r["ttft_attainment_pct_error_pct"])
        for r in rows
        if r["ttft_attainment_pct_error_pct"] is not None
    ]
    points = [
        abs(r["ttft_attainment_pct"] - r["published_ttft_attainment_pct"])
        for r in rows
        if r["published_ttft_attainment_pct"] is not None
    ]
    path = save(
        out,
        "calibration",
        {
            "config": {"scenario": "VoltanaLLM, 4 x A100-80G 2P2D, Llama-3.1-8B, LMSYS lengths",
                       "seeds": list(seeds)},
            "energy_error_pct": max(energy),
            "energy_error_mean_pct": float(np.mean(energy)),
            "ttft_attainment_error_pct": max(ttft),
            "ttft_attainment_error_mean_pct": float(np.mean(ttft)),
            "ttft_attainment_error_points": max(points),
            "rows": rows,
        },
    )  # fmt: skip
    draw_calibration(path)


def held_out(data: Path, rates: set[float]) -> list[dict]:
    """The policy `both` on arrivals that no constant was chosen with, against the maximum clock."""
    base = replace(scenario(time_noise=NOISE), clocks_mhz=FINE, slo=replace(SLO, reserve=0.02))
    rows = []
    for point in published(data / TABLE):
        if point.rate_per_s not in rates:
            continue
        both = compare(lmsys_trace(point.rate_per_s, HELD_OUT_SEED), base, ["both"])
        most, row = both["max"], both["both"]
        rows.append(
            {
                "rate_per_s": point.rate_per_s,
                "published_saving_pct": point.saving_pct,
                "energy_saving_pct": row["energy_saving_pct"],
                "ttft_attainment_pct": row["ttft_attainment_pct"],
                "max_ttft_attainment_pct": most["ttft_attainment_pct"],
                "itl_attainment_pct": row["itl_attainment_pct"],
                "max_itl_attainment_pct": most["itl_attainment_pct"],
            }
        )
        note(f"held out {point.rate_per_s:.0f}/s: {row['energy_saving_pct']:.1f} %")
    return rows


def published_rates(data: Path, out: Path, quick: bool, resume: bool) -> None:
    names = ["sweet-spot", "window", "ecofreq", "ecoroute", "both", "both-energy"]
    rows = []
    for point in published(data / TABLE):
        if quick and point.rate_per_s not in (75, 95, 110):
            continue
        trace = lmsys_trace(point.rate_per_s, 3)
        base = replace(scenario(time_noise=NOISE), slo=replace(SLO, reserve=0.02))
        ten = compare(trace, replace(base, clocks_mhz=FINE), names)
        two = figures(simulate(trace, POLICIES["both"], base), base.slo)
        two["energy_saving_pct"] = 100 * (1 - two["energy_j"] / ten["max"]["energy_j"])
        for label, policies in (("ten", ten), ("published two", {"max": ten["max"], "both": two})):
            rows.append(
                {
                    "rate_per_s": point.rate_per_s,
                    "clocks": label,
                    "published_saving_pct": point.saving_pct,
                    "published_ttft_attainment_pct": point.ttft_attainment_pct["governed"],
                    "policies": {n: strip(r) for n, r in policies.items()},
                }
            )
        note(f"published {point.rate_per_s:.0f}/s")
    ten = [row for row in rows if row["clocks"] == "ten"]
    best = [max(("both", "both-energy"), key=lambda n: r["policies"][n]["energy_saving_pct"])
            for r in ten]  # fmt: skip
    light = ten[0]["policies"][best[0]]
    path = save(
        out,
        "published",
        {
            "config": {"slo_ttft_ms": 600, "slo_itl_ms": 60, "slo_reserve": 0.02,
                       "time_noise": NOISE, "clocks_mhz": list(FINE), "predictor": "ecopred"},
            "energy_saving_pct": light["energy_saving_pct"],
            "energy_saving_rate_per_s": ten[0]["rate_per_s"],
            "rates_above_published": sum(
                r["policies"][b]["energy_saving_pct"] > r["published_saving_pct"]
                for r, b in zip(ten, best, strict=True)
            ),
            "rates": len(ten),
            "held_out": held_out(data, {row["rate_per_s"] for row in ten}),
            "rows": rows,
        },
    )  # fmt: skip
    draw_published(path)


def capacity_per_s(gpu: SimulatedGpu, prompt: float, output: float, slo: Slo) -> float:
    """Requests a second that one prefill and one decode instance could just serve."""
    top = gpu.spec.max_mhz
    prompts = max(1, min(8, int(8192 / prompt)))
    batch_s = gpu.run(
        Load(prefill_tokens=int(prompts * prompt), prefill_requests=prompts), top
    ).time_s
    context = prompt + output / 2
    batch = int(min(1024, gpu.kv_capacity_tokens / (prompt + output)))
    while batch > 1 and gpu.run(Load(batch=batch, kv_tokens=int(batch * context)), top).time_s > (
        0.9 * slo.itl_s
    ):
        batch = int(batch * 0.9)
    step_s = gpu.run(Load(batch=batch, kv_tokens=int(batch * context)), top).time_s
    return min(prompts / batch_s, batch / step_s / output)


def named_trace(name: str, data: Path) -> Trace:
    if name == "sharegpt":
        prompts, outputs = lengths_from_csv(
            data / "sharegpt_8k_filtered_stats_llama2_tokenizer.csv"
        )
        return trace_of_lengths(prompts, outputs, rate_per_s=1.0, duration_s=6000, name="sharegpt")
    files = {
        "azure-code": "AzureLLMInferenceTrace_code.csv",
        "azure-conv": "AzureLLMInferenceTrace_conv.csv",
        "mooncake": "mooncake_conversation_trace.csv",
    }
    return read_trace(data / files[name])


def matrix(data: Path, out: Path, quick: bool, resume: bool) -> None:
    names = ["sweet-spot", "window", "both", "both-energy"]
    cases = [
        ("h100", "llama-3-8b", trace, load, (2, 2))
        for trace in ("azure-conv", "azure-code", "sharegpt", "mooncake")
        for load in (0.2, 0.5, 0.8, 1.1)
    ]
    cases += [
        (gpu, model, "azure-conv", load, (2, 2))
        for gpu, model in (
            ("a100-80g", "llama-3-8b"),
            ("gh200", "llama-3-8b"),
            ("h100", "llama-3-70b"),
        )
        for load in (0.2, 0.8)
    ]
    cases += [("h100", "llama-3-8b", "azure-conv", 0.3, (n, n)) for n in (8, 32)]
    if quick:
        cases = [case for case in cases if case[4] == (2, 2) and case[3] in (0.2, 0.8)]
        cases = [case for case in cases if case[2] in ("azure-conv", "mooncake")]
    path = out / "energy_matrix.json"
    rows = read_result(path)["rows"] if resume and path.exists() else []
    done = {(r["gpu"], r["model"], r["trace"], r["load"], r["instances"]) for r in rows}
    for gpu, model, name, load, (p, d) in cases:
        if (gpu_spec(gpu).name, model, name, load, f"{p}P{d}D") in done:
            continue
        big = model == "llama-3-70b"
        slo = Slo(ttft_s=1.5 if big else 0.6, itl_s=0.1 if big else 0.06, reserve=0.02)
        if name == "mooncake":  # prompts of 12,000 tokens on average, 85,000 at the 99th percentile
            slo = replace(slo, ttft_s=20.0 if big else 8.0)
        chosen = setting(gpu, model, prefill=p, decode=d, slo=slo, time_noise=NOISE)
        trace = named_trace(name, data).clipped(min(100_000, chosen.gpu.kv_capacity_tokens))
        rate = (
            load
            * p
            * capacity_per_s(
                chosen.gpu,
                float(trace.prompt_tokens.mean()),
                float(trace.output_tokens.mean()),
                slo,
            )
        )
        trace = trace.at_rate(rate).head(400 * p if not quick else 250)
        policies = compare(trace, chosen, names)
        rows.append(
            {
                "gpu": chosen.gpu.spec.name,
                "extrapolated": chosen.gpu.spec.extrapolated,
                "model": model,
                "trace": name,
                "load": load,
                "rate_per_s": rate,
                "instances": f"{p}P{d}D",
                "slo_ttft_ms": slo.ttft_s * 1e3,
                "slo_itl_ms": slo.itl_s * 1e3,
                "requests": len(trace),
                "policies": {n: strip(r) for n, r in policies.items()},
            }
        )
        r = policies["both-energy"]
        note(
            f"{gpu} {model} {name} load {load} {p}P{d}D: {r['energy_saving_pct']:.1f} % "
            f"(sweet spot {policies['sweet-spot']['energy_saving_pct']:.1f} %), "
            f"TTFT {r['ttft_attainment_pct']:.1f} of {policies['max']['ttft_attainment_pct']:.1f}"
        )
        # After each case, so that an interrupted run leaves what it has.
        save(out, "matrix", {"config": {"time_noise": NOISE, "loads": "share of the rate "
                    "that the instances could just serve at the maximum clock",
                    "complete": len(rows) == len(cases)}, "rows": rows})  # fmt: skip
    draw_matrix(path)


def ablation(data: Path, out: Path, quick: bool, resume: bool) -> None:
    trace = lmsys_trace(95, 3).between(0.0, 20.0 if quick else 60.0)
    base = replace(scenario(time_noise=NOISE), clocks_mhz=FINE, slo=replace(SLO, reserve=0.02))

    def cluster(**changes):
        return replace(base, cluster=replace(base.cluster, **changes))

    def governed(**changes):
        return replace(base, clock_options=changes)

    cases = [("baseline", "as used", base)]
    cases += [
        (
            "prediction error",
            f"x{scale}, {what}",
            replace(base, predictor=what, predictor_scale=scale),
        )
        for scale in (0.7, 0.85, 1.15, 1.3)
        for what in ("model", "ecopred")
    ]
    cases += [("set latency", f"{ms:g} ms", cluster(set_latency_s=ms / 1e3)) for ms in (0, 20, 200)]
    cases += [
        ("clock set", label, replace(base, clocks_mhz=clocks))
        for label, clocks in (
            ("2 clocks", (1005, 1410)),
            ("5 clocks", base.gpu.spec.control_mhz),
            ("28 clocks", tuple(range(1005, 1411, 15))),
            ("below the sweet spot", tuple(range(705, 1411, 60)) + (1410,)),
        )
    ]
    cases += [
        (
            "governor",
            "no larger batch borne",
            governed(growth_guard=0.0, growth_s=0.0, saturation_s=0.0),
        ),
        ("governor", "saturation not foreseen", governed(saturation_s=0.0)),
        ("governor", "reserve alone for late steps", governed(late_steps=0.0)),
        ("governor", "no hysteresis, no dwell", governed(hysteresis=0.0, minimum_dwell_s=0.0)),
        ("governor", "no watchdog", governed(watchdog_s=1e9)),
        ("governor", "worth 6, 1 where broken", governed(worth=6.0, broken_worth=1.0)),
        ("governor", "worth 40, 40 where broken", governed(worth=40.0, broken_worth=40.0)),
    ]
    cases += [
        ("reserve", f"{reserve:.0%}", replace(base, slo=replace(SLO, reserve=reserve)))
        for reserve in (0.0, 0.05, 0.1)
    ]
    rows = []
    for study, value, chosen in cases:
        policies = compare(trace, chosen, ["both-energy"])
        row = strip(policies["both-energy"])
        rows.append({"study": study, "value": value, **row,
                     "max_ttft_attainment_pct": policies["max"]["ttft_attainment_pct"],
                     "max_itl_attainment_pct": policies["max"]["itl_attainment_pct"]})  # fmt: skip
        note(f"{study} {value}: {row['energy_saving_pct']:.1f} %")
    path = save(out, "ablation", {"config": {"scenario": "lmsys-like at 95/s, 2P2D A100",
                "policy": "both-energy", "time_noise": NOISE}, "rows": rows})  # fmt: skip
    draw_ablation(path)


def day(data: Path, out: Path, quick: bool, resume: bool) -> None:
    seconds = 1800.0 if quick else 86_400.0
    trace = named_trace("azure-conv", data).repeated(seconds, daily_swing=0.6)
    chosen = setting("h100", prefill=32, decode=32, time_noise=NOISE)
    rows = {}
    for name in ("max", "both-energy"):
        began_s, used_s = time.perf_counter(), time.process_time()
        rows[name] = figures(simulate(trace, POLICIES[name], chosen), chosen.slo)
        rows[name]["wall_s"] = time.perf_counter() - began_s
        rows[name]["cpu_s"] = time.process_time() - used_s
        note(f"day {name}: {rows[name]['wall_s']:.0f} s")
    saving = 100 * (1 - rows["both-energy"]["energy_j"] / rows["max"]["energy_j"])
    save(out, "day", {"config": {"trace": "azure-conv tiled to a day, daily swing 0.6",
         "requests": len(trace), "instances": "32P32D", "seconds": seconds,
         "other_load": f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"},
         "energy_saving_pct": saving, "replay_wall_s": rows["both-energy"]["wall_s"],
         "replay_cpu_s": rows["both-energy"]["cpu_s"],
         "rows": [{"policy": name, **row} for name, row in rows.items()]})  # fmt: skip


def timed(action, repeats: int) -> dict[str, float]:
    """Microseconds: wall clock, and the thread's own time, which other load does not lengthen."""
    action()
    wall, own = [], []
    for _ in range(repeats):
        a, b = time.perf_counter(), time.thread_time()
        action()
        own.append(time.thread_time() - b)
        wall.append(time.perf_counter() - a)
    result = {}
    for label, values in (("wall", wall), ("cpu", own)):
        for percent in (50, 99):
            result[f"{label}_p{percent}_us"] = 1e6 * float(np.percentile(values, percent))
    return result


class Instance:
    """A decode instance as a router sees it."""

    name, waiting_tokens, clock_mhz, busy_until_s = "decode", 0, 1080, None

    def __init__(self, batch: int) -> None:
        self.batch = self.in_flight = self.waiting_requests = batch
        self.kv_tokens = 310 * batch
        self.waiting_tokens = 40 * batch


def decisions(data: Path, out: Path, quick: bool, resume: bool) -> None:
    from jaxsys.clocks import SimulatedClocks
    from jaxsys.serve.requests import Request, SamplingParameters
    from jaxsys.serve.scheduler import Iteration, PrefillPiece

    repeats = 200 if quick else 3000
    gpu = simulated_gpu("h100", "llama-3-8b")
    clocks_mhz = gpu.spec.control_mhz
    predictor = EcoPred(simulated_profile(gpu, noise=NOISE))
    slo = SharedSlo(Slo())

    def request(length: int = 300) -> Request:
        return Request(0, sampling=SamplingParameters(), arrival_s=0.0, prompt_length=length)

    clocks = SimulatedClocks(available_mhz=gpu.spec.available_mhz, now_s=lambda: 0.0)
    policy = EcoFreq(predictor, slo)
    governor = Governor(policy, clocks, CounterMeter(clocks), choices_mhz=clocks_mhz)
    decodes = tuple(request() for _ in range(256))
    decode = Iteration(1, (), decodes, (), 0, 0, 80_000, 256, 1)
    prompts = [request() for _ in range(8)]
    pieces = tuple(PrefillPiece(r, 0, r.prompt_length, 0, True) for r in prompts)
    prefill = Iteration(1, pieces, (), (), 2400, 0, 0, 0, 1)
    queue = [request(1500) for _ in range(64)]
    views = [Instance(60 + 3 * k) for k in range(64)]
    idle_w = gpu.idle_power_w(clocks_mhz[0])
    energy = EnergyRouter(predictor, slo, clocks_mhz=clocks_mhz, idle_power_w=idle_w)
    published_rule = StateSpaceRouter(predictor, slo, clocks_mhz=clocks_mhz)
    first = QueueRouter(predictor, clock_mhz=clocks_mhz[0])
    eight = [Load(batch=10 * k, kv_tokens=3000 * k) for k in range(1, 9)]
    rows = {
        "what_if_8x5": timed(lambda: predictor.what_if(eight, clocks_mhz), repeats),
        "ecofreq_decode": timed(lambda: governor.before_iteration(decode, (), 0.0), repeats),
        "ecofreq_prefill_queue_64": timed(
            lambda: governor.before_iteration(prefill, queue, 0.0), repeats
        ),
        # As many as were begun.
        "ecofreq_observe": timed(lambda: governor.after_iteration(decode, 0.02, 0.0), repeats),
        "ecoroute_64": timed(lambda: published_rule.choose(views, request()), repeats),
        "energy_route_64": timed(lambda: energy.choose(views, request()), repeats),
        "queue_route_64": timed(lambda: first.choose(views, request()), repeats),
    }
    for name, row in rows.items():
        note(f"{name}: " + ", ".join(f"{k} {v:.0f}" for k, v in row.items()))
    save(out, "decisions", {
        "kind": "measured",
        "config": {"repeats": repeats, "predictor": "ecopred, 5 clocks",
                   "other_load": f"load average {os.getloadavg()[0]:.1f}"},
        "what_if_cpu_p99_us": rows["what_if_8x5"]["cpu_p99_us"],
        "ecofreq_cpu_p99_us": rows["ecofreq_decode"]["cpu_p99_us"],
        "ecoroute_64_cpu_p99_us": rows["ecoroute_64"]["cpu_p99_us"],
        "rows": [{"decision": name, **row} for name, row in rows.items()],
    })  # fmt: skip


SECTIONS = {
    "calibration": calibration,
    "published": published_rates,
    "matrix": matrix,
    "ablation": ablation,
    "day": day,
    "decisions": decisions,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Energy against attainment on simulated GPUs.")
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, "all"])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public traces")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="a small sample of each section")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted matrix in --out"
    )
    arguments = parser.parse_args()
    chosen = list(SECTIONS) if "all" in arguments.sections else arguments.sections
    for name in chosen:
        SECTIONS[name](arguments.data, arguments.out, arguments.quick, arguments.resume)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
