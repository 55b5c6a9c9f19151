#!/usr/bin/env python
"""The longest context that trains, and what it costs: schedules against plain JAX FSDP.

Each try is one run of scripts/bench_train.py in a process of its own, so that a failed allocation
ends nothing else and the peak is that try's. Lengths double from --start until a try fails; then
the gap is halved --refine times. Figures of all tries go to results/long_context_NAME.json. With
--compile-only nothing runs: what fits is read off the compiled program, also for more GPUs than are
here, and the file is named ..._compiled.json.

With --context sequences are shared by that many GPUs: rows of `CONTEXT_ROWS`, each a process of
scripts/context_row.py with a timeout, compile beside each other and run one after another (a first
step counts where no other is as fast: it sets NCCL up); the file
context_SHAPE_N.json is written after each. `million` and `longest` are run if named.

scripts/bench_long_context.py --devices 1 --schedules dp gspmd-fsdp
scripts/bench_long_context.py --devices 2 --schedules weipipe-interleave gspmd-fsdp
scripts/bench_long_context.py --context 2
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
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


CONTEXT_ROW = Path(__file__).with_name("context_row.py")
CONTEXT_COLUMNS = {
    "row": "",
    "recompute": "",
    "length": ",",
    "step_s": ".2f",
    "tokens_per_s": ",.0f",
    "model_tflops_per_gpu": ".0f",
    "compiled_gib": ".1f",
    "predicted_gib": ".1f",
    "peak_gib": ".1f",
    "attention": "",
    "failed": "",
}
SAVED = "around-attention"
CONTEXT_ROWS: dict[str, list[dict]] = {
    "check": [{"check": True, "length": 4096, "layers": 2}],
    "one block": [{"devices": 1, "recompute": "block"}],
    "one kept": [{"devices": 1, "recompute": SAVED}],
    "ring block": [{"by": "ring", "recompute": "block"}],
    "ring kept": [{"by": "ring", "recompute": SAVED}],
    "ulysses kept": [{"by": "ulysses", "recompute": SAVED}],
    "gather kept": [{"by": "gather", "recompute": SAVED}],
    # Attention's output of as many layers is kept as memory has room for.
    "8b": [
        {"shape": "8b", "by": "ring", "recompute": recompute, "repeats": 1}
        for recompute in (SAVED, f"{SAVED}*24,block", f"{SAVED}*10,block", "block")
    ],
    "million": [
        {"by": "ring", "recompute": recompute, "length": 1_003_520, "repeats": 1}
        for recompute in (SAVED, "block")
    ],
}
"""A row -> the ways to run it, of which the first counts whose program fits the memory."""
TOGETHER = 4
"""Rows that compile beside each other; none compiles while one runs."""
LONGEST = {1: (802_816, 851_968), 2: (1_605_632, 1_703_936)}
"""GPUs -> lengths whose programs are compiled to see whether they fit."""


def context_command(options: argparse.Namespace, asked: dict, result: Path, *more: str) -> list:
    """The command line of one row."""
    named = {"shape": options.shape, "devices": options.context, **asked}
    flags = [
        text
        for name, value in named.items()
        for text in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    if not asked.get("check") and "repeats" not in asked:
        flags += ["--repeats", str(options.repeats)]
    if options.length is not None and "length" not in asked:
        flags += ["--length", str(options.length)]
    return [sys.executable, str(CONTEXT_ROW), *flags, "--result", str(result), *more]


class ContextRow:
    """Processes of one row: all its ways compile, one runs."""

    def __init__(self, options: argparse.Namespace, name: str, asked: list[dict]) -> None:
        self.options, self.name, self.asked = options, name, asked
        self.folder = Path(tempfile.mkdtemp(prefix="context-row-"))
        environment = os.environ | {
            # Rows wait beside each other with what they compiled, and one has the memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        }
        self.processes = []
        for number, one in enumerate(asked):
            more = () if one.get("check") else ("--turn", str(self.folder / f"turn-{number}"))
            log = (self.folder / f"log-{number}").open("w")
            self.processes.append(
                subprocess.Popen(
                    context_command(options, one, self.folder / f"{number}.json", *more),
                    stdout=log,
                    stderr=log,
                    env=environment,
                )
            )

    def compiled(self, number: int) -> dict | None:
        """What a way says once it is compiled, or has failed; None before."""
        ready, result = (self.folder / f"{number}.{ending}" for ending in ("ready", "json"))
        for path in (result, ready):
            if path.is_file():
                try:
                    return json.loads(path.read_text())
                except json.JSONDecodeError:  # being written
                    return None
        if self.processes[number].poll() is not None:
            said = (self.folder / f"log-{number}").read_text().strip().splitlines()
            return {"failed": (said or ["ended without a word"])[-1][:200]}
        return None

    def is_compiled(self) -> bool:
        """Whether all its ways are."""
        return all(self.compiled(number) is not None for number in range(len(self.asked)))

    def run(self, timeout_s: float) -> dict:
        """Lets the first way run that fits, and says what it measured."""
        chosen, found = None, {"failed": "not compiled in time"}
        for number in range(len(self.asked)):
            said = self.compiled(number)
            if said is None:
                continue
            found = said
            if said.get("compiled_gib", 0.0) > self.options.memory_gib:
                found = said | {"failed": "more than the memory"}
            if "failed" not in found:
                chosen = number
                break
        if chosen is not None and not self.asked[chosen].get("check"):
            self.end(but=chosen)
            (self.folder / f"turn-{chosen}").touch()
            try:
                self.processes[chosen].wait(timeout_s)
                found = self.compiled(chosen) or found
            except subprocess.TimeoutExpired:
                found |= {"failed": f"no result within {timeout_s:.0f} s"}
        asked = self.asked[chosen or 0]
        length = self.options.length or 262144
        self.end()
        return {"row": self.name, "length": length, "recompute": "", **asked, **found}

    def end(self, but: int | None = None) -> None:
        """Ends what still runs."""
        for number, process in enumerate(self.processes):
            if number != but and process.poll() is None:
                process.kill()
                process.wait()


def bench_context(options: argparse.Namespace) -> int:
    """The rows asked for, one after another, once all are compiled."""
    rows: list[dict] = []

    def show(row: dict) -> None:
        rows.append(row)
        print(table([row], CONTEXT_COLUMNS), flush=True)
        write_result(
            options.out / f"context_{options.shape}_{options.context}.json",
            benchmark="context",
            kind="measured",
            config={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
            rows=rows,
        )

    named = [name for name in options.rows if name != "longest"]
    for first in range(0, len(named), TOGETHER):
        if not run_together(options, named[first : first + TOGETHER], show):
            print("the check did not pass, or cuDNN is not used: nothing is timed (--anyway)")
            return 1
    if "longest" in options.rows:
        compile_longest(options, show)
    speeds = {row["row"]: row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    for one in ("one block", "one kept"):
        for name, speed in speeds.items():
            if one in speeds and not name.startswith("one") and name not in ("8b", "million"):
                print(f"{name}: {speed / speeds[one]:.2f} times the tokens/s of {one}")
    return 0


def run_together(options: argparse.Namespace, named: list[str], show) -> bool:
    """Compiles some rows beside each other, then runs them in turn; whether more should follow."""
    waiting = [ContextRow(options, name, CONTEXT_ROWS[name]) for name in named]
    try:
        deadline = time.monotonic() + options.compile_s
        while time.monotonic() < deadline and not all(row.is_compiled() for row in waiting):
            time.sleep(0.1)
        for row in waiting:
            found = row.run(options.timeout_s)
            show(found)
            not_fused = str(found.get("attention", "")).startswith("blocks")
            wrong = "failed" in found or (not_fused and not options.anyway)
            if row.name == "check" and wrong:
                return False
    finally:
        for row in waiting:
            row.end()
    return True


def compile_longest(options: argparse.Namespace, show) -> None:
    """What programs of long sequences take, compiled beside each other."""
    running = []
    for devices, lengths in LONGEST.items():
        for length in lengths:
            result = Path(tempfile.mkdtemp(prefix="context-row-")) / "row.json"
            asked = {"devices": devices, "length": options.length or length, "recompute": "block"}
            command = context_command(options, asked, result, "--compile-only")
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
            running.append((asked, result, process))
    for asked, result, process in running:
        try:
            process.wait(options.compile_s)
            found = json.loads(result.read_text())
        except (subprocess.TimeoutExpired, OSError) as error:
            process.kill()
            found = {"failed": str(error)[:120]}
        if found.get("compiled_gib", 0.0) > options.memory_gib:
            found["failed"] = "more than the memory"
        show({"row": f"longest of {asked['devices']}", **asked, **found})


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
    parser.add_argument("--context", type=int, help="GPUs that share a sequence: other rows")
    usual = [name for name in CONTEXT_ROWS if name != "million"]
    parser.add_argument(
        "--rows", nargs="+", choices=[*CONTEXT_ROWS, "longest"], default=usual, help="of --context"
    )
    parser.add_argument("--length", type=int, help="of --context: tokens (default 262,144)")
    parser.add_argument("--compile-s", type=float, default=200.0, help="of --context: for all rows")
    parser.add_argument("--anyway", action="store_true", help="time rows though cuDNN is not used")
    options = parser.parse_args()
    if options.context is not None:
        return bench_context(options)
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
