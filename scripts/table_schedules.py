#!/usr/bin/env python
"""Simulates every schedule of docs/schedules.md and prints its bubble, memory and traffic.

scripts/table_schedules.py [--out results/schedules.json] [--devices 8] [--microbatches 32]
"""

import argparse
import sys
from typing import Any

from jaxsys.results import table, write_result
from jaxsys.schedule import Costs, Data, Link, check, peak_live, simulate
from jaxsys.strategies import NAMES, build

TIMES = {"equal": (1.0, 1.0, 1.0), "attention": (5.0, 8.0, 3.0)}
"""Of F, I and W. The second is a layer of 2048 wide heads and feed-forward at 16K tokens, where
attention, which has no W, takes two thirds of what the products of weights take in F."""
ONE_BYTE: dict[str, Any] = {
    "forward_s": 1.0,
    "backward_s": 1.0,
    "weight_bytes": 1.0,
    "gradient_bytes": 1.0,
    "activation_bytes": 1.0,
}
HOPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Time of a hop of one chunk, in thirds of T_F + T_I + T_W."""
MODES = {"lockstep": {"lockstep": True}, "coupled": {}, "eager": {"eager_sends": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate every schedule and print its figures.")
    parser.add_argument("--out", help="where to write the JSON")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=32)
    arguments = parser.parse_args()
    rows: list[dict[str, float | str]] = []
    for name in NAMES:
        if not name.startswith(("gpipe", "1f1b", "zb-", "weipipe")):
            continue
        schedule = build(name, devices=arguments.devices, microbatches=arguments.microbatches)
        found = check(schedule)
        row: dict[str, float | str] = {"schedule": name, "ticks": schedule.ticks}
        for label, (forward, inputs, weights) in TIMES.items():
            costs = Costs(
                forward_s=forward,
                backward_s=inputs + weights,
                input_gradient_s=inputs,
                weight_gradient_s=weights,
            )
            for mode, options in MODES.items():
                result = simulate(schedule, costs, Link(), known_trace=found, **options)
                row[f"{label}_{mode}_pct"] = 100 * result.bubble
        per_stage = schedule.devices / schedule.chunks
        sent = simulate(schedule, Costs(**ONE_BYTE), Link(), known_trace=found).sent_bytes
        held = peak_live(schedule, found, Data.RESIDUAL, Data.TAP)
        row["held_stages"] = max(held) * per_stage
        row["blocks_sent"] = max(sent)
        rows.append(row)
    formats = {"schedule": "", "ticks": "d"}
    formats |= {key: ".1f" for key in rows[0] if key.endswith("_pct")}
    print(table(rows, {**formats, "held_stages": "g", "blocks_sent": "g"}))
    links = link_rows(arguments.devices, arguments.microbatches)
    print(table(links, {"times": "", "schedule": ""} | {f"hop_{hop:g}": ".2f" for hop in HOPS}))
    if arguments.out:
        write_result(
            arguments.out,
            benchmark="schedules",
            kind="simulated",
            config={
                "devices": arguments.devices,
                "microbatches": arguments.microbatches,
                "times": TIMES,
                "link": "free",
            },
            rows=rows,
            links=links,
        )


def link_rows(devices: int, microbatches: int) -> list[dict[str, float | str]]:
    """Steps of the weight rings over a link that takes time, as multiples of the ideal step."""
    rows: list[dict[str, float | str]] = []
    for label, (forward, inputs, weights) in TIMES.items():
        for name in NAMES:
            if not name.startswith("weipipe"):
                continue
            schedule = build(name, devices=devices, microbatches=microbatches)
            found = check(schedule)
            costs = Costs(
                forward_s=forward,
                backward_s=inputs + weights,
                input_gradient_s=inputs,
                weight_gradient_s=weights,
                weight_bytes=1.0,
                gradient_bytes=1.0,
            )
            each = forward + inputs + weights
            row: dict[str, float | str] = {"times": label, "schedule": name}
            for hop in HOPS:
                link = Link(bytes_per_s=3 / (hop * each)) if hop else Link()
                result = simulate(schedule, costs, link, known_trace=found)
                row[f"hop_{hop:g}"] = result.step_s / (microbatches * each)
            rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
