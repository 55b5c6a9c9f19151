#!/usr/bin/env python
"""Searches small weight rings for plans shorter than WeiPipe's, and writes what it finds as JSON.

scripts/search_wzb.py [--out results/search_wzb.json] [--quick]
"""

import argparse
import sys
import time

from jaxsys.results import table, write_result
from jaxsys.schedule import Data, check, peak_live
from jaxsys.strategies import build
from studies.ring_search import plan_cost, shortest_step

NAMES = (
    "weipipe-naive",
    "weipipe-interleave",
    "weipipe-wzb1",
    "weipipe-wzb2",
    "weipipe-wzb2-paired",
)
SIZES = ((2, 2), (2, 4), (2, 6), (3, 3), (3, 6), (4, 8))
TIMES = ((1, 1, 1), (2, 3, 1), (2, 5, 2), (2, 2, 3))


def rows(quick: bool):
    for devices, microbatches in SIZES[:2] if quick else SIZES:
        plans = {}
        for name in NAMES:
            schedule = build(name, devices=devices, microbatches=microbatches)
            held = max(peak_live(schedule, check(schedule), Data.RESIDUAL, Data.TAP))
            plans[name] = (schedule, held)
        # Four workers that run what they like have too many choices.
        for tick_cost in ("busiest", "together") if devices < 4 else ("together",):
            for times in TIMES if devices < 4 else TIMES[:1]:
                for held in range(devices, 2 * devices + 1):
                    start = time.monotonic()
                    best = shortest_step(
                        devices, microbatches, held=held, times=times, tick_cost=tick_cost
                    )
                    row = {
                        "devices": devices,
                        "microbatches": microbatches,
                        "tick_cost": tick_cost,
                        "times": "/".join(map(str, times)),
                        "held": held,
                        "ideal": microbatches * sum(times),
                        "best": best,
                    }
                    for name, (schedule, needs) in plans.items():
                        cost = plan_cost(schedule, times=times, tick_cost=tick_cost)
                        row[name.removeprefix("weipipe-")] = cost if needs <= held else None
                    row["search_s"] = round(time.monotonic() - start, 2)
                    yield row


def main() -> None:
    parser = argparse.ArgumentParser(description="Search small weight rings for short plans.")
    parser.add_argument("--out", help="where to write the JSON")
    parser.add_argument("--quick", action="store_true", help="two workers only")
    arguments = parser.parse_args()
    found = list(rows(arguments.quick))
    print(table(found))
    if arguments.out:
        write_result(
            arguments.out,
            benchmark="search_wzb",
            kind="simulated",
            config={"sizes": SIZES, "times": TIMES},
            rows=found,
        )


if __name__ == "__main__":
    sys.exit(main())
