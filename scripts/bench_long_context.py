#!/usr/bin/env python
"""The longest context that trains, and what it costs: schedules against plain JAX FSDP.

Each try is one run of scripts/bench_train.py in a process of its own, so that a failed allocation
ends nothing else and the peak is that try's. Lengths double from --start until a try fails; then
the gap is halved --refine times. Figures of all tries go to results/long_context_NAME.json. With
--compile-only nothing runs: what fits is read off the compiled program, also for more GPUs than are
here, and the file is named ..._compiled.json.

scripts/bench_long_context.py --devices 1 --schedules dp gspmd-fsdp
scripts/bench_long_context.py --devices 2 --schedules weipipe-interleave gspmd-fsdp
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxsys.results import table, write_result

BENCH_TRAIN = Path(__file__).with_name("bench_train")
GRANULE = 4096
"""Lengths are multiples of this."""
COLUMNS = {
    "schedule": "",
    "recompute": "",
    "sequence_length": ",",
    "tokens_per_s_per_gpu": ",.0f",
    "tflops_per_gpu": ".0f",
    "peak_gib": ".1f",
    "compiled_gib": ".1f",
    "failed": "",
}


def attempt(options: argparse.Namespace, schedule: str, recompute: str, length: int) -> dict:
    """One step's figures at a length, or why it failed."""
    row = {
        "schedule": schedule,
        "recompute": recompute,
        "sequence_length": length,
        "devices": options.devices,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(BENCH_TRAIN), "step", "--shape", options.shape),
            *("--schedules", schedule, "--recompute", recompute, "--devices", str(options.devices)),
            *("--sequence-lengths", str(length), "--microbatches", str(options.microbatches)),
            *("--repeats", str(options.repeats), "--out", folder, "--label", "try"),
            *(["--compile-only"] if options.compile_only else []),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=options.timeout_s
            )
        except subprocess.TimeoutExpired:
            return row | {"failed": f"no result within {options.timeout_s:.0f} s"}
        path = Path(folder) / f"train_{'memory' if options.compile_only else 'step'}_try.json"
        if not path.is_file():
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return row | {"failed": said[-1][:160]}
        (found,) = json.loads(path.read_text())["rows"]
    if "failed" in found:
        return row | {"failed": found["failed"]}
    if options.compile_only:
        compiled = found["compiled_gib"]
        over = {} if compiled <= options.memory_gib else {"failed": "more than the memory"}
        return row | {"compiled_gib": compiled} | over
    return row | {
        "tokens_per_s_per_gpu": found["tokens_per_s_per_gpu"],
        "tflops_per_gpu": found["model_tflops_per_gpu"],
        "peak_gib": found["peak_so_far_gib"],
        "step_s": found["step_s"],
    }


def longest(options: argparse.Namespace, schedule: str, recompute: str) -> list[dict]:
    """All tries of one configuration, in the order they were made."""
    tries: list[dict] = []

    def fits(length: int) -> bool:
        tries.append(attempt(options, schedule, recompute, length))
        print(table([tries[-1]], COLUMNS), flush=True)
        return "failed" not in tries[-1]

    good, length = 0, options.start
    while length <= options.most and fits(length):
        good, length = length, 2 * length
    bad = length
    for _ in range(options.refine if good and bad <= options.most else 0):
        middle = (good + bad) // 2 // GRANULE * GRANULE
        if middle in (good, bad):
            break
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return tries


def main() -> int:
    """Runs the search and prints the longest context of each configuration."""
    parser = argparse.ArgumentParser(prog="scripts/bench_long_context.py", description=__doc__)
    parser.add_argument("--shape", default="1b", help="of scripts/bench_train.py")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--schedules", nargs="+", default=["dp", "gspmd-fsdp"])
    parser.add_argument("--recompute", nargs="+", default=["block"])
    parser.add_argument("--start", type=int, default=32768)
    parser.add_argument("--most", type=int, default=524288, help="lengths beyond are not tried")
    parser.add_argument("--refine", type=int, default=2, help="halvings of the last gap")
    parser.add_argument("--microbatches", type=int, help="default: one a device")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=400.0)
    parser.add_argument("--compile-only", action="store_true", help="run nothing")
    parser.add_argument(
        "--memory-gib", type=float, default=73.0, help="of a GPU, for --compile-only (default 73)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    options.microbatches = options.microbatches or options.devices
    rows = [
        row
        for schedule in options.schedules
        for recompute in options.recompute
        for row in longest(options, schedule, recompute)
    ]
    best: dict[tuple[str, str], dict] = {}
    for row in rows:
        key = (row["schedule"], row["recompute"])
        if "failed" not in row and row["sequence_length"] >= best.get(key, row)["sequence_length"]:
            best[key] = row
    print("\nlongest context that trains:")
    print(table(list(best.values()), COLUMNS) if best else "none")
    ending = "_compiled" * options.compile_only
    write_result(
        options.out / f"long_context_{options.shape}_{options.devices}{ending}.json",
        benchmark="long_context",
        kind="measured",
        config={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        rows=rows,
    )
    return 0 if best else 1


if __name__ == "__main__":
    raise SystemExit(main())
