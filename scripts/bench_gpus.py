#!/usr/bin/env python
"""Whole steps on all GPUs of this machine: schedules, models, lengths and links, with predictions.

scripts/bench_gpus.py                      every cell not measured yet, the most telling ones first
scripts/bench_gpus.py --links direct --lengths 16384 --shapes 1b --seconds 480

A group of cells (link, model, length) is one run of scripts/bench_train.py, because NCCL takes its
link from the environment when JAX starts. Before it runs, each strategy's step is predicted and its
recompute policy chosen by the planner; the planner's own choice is marked. What has been measured
is kept in results/gpus_N.json, so that the script may be called until nothing is left.

Rows of `gspmd-fsdp` (plain `jax.jit` with sharded parameters) use the policy of ZeRO-3. Memory
predicted is what the trainer goes by. Rows of `torch-fsdp2` and `torch-1f1b` are PyTorch's
(scripts/bench_torch.py), where it is installed: not run unless named.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import SHAPES

from jaxsys.errors import RunError, UsageError
from jaxsys.hardware import device, link
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.named import Comparison, compare
from jaxsys.planner.workload import decoder_workload
from jaxsys.results import read_result, table, write_result
from studies.planner_cells import LINKS

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES = (
    *("weipipe-interleave", "weipipe-wzb1", "1f1b-overlap", "zb-h1"),
    *("zero-3", "zero-3.5", "zero-4", "gspmd-fsdp"),
)
SPECS = {"direct": "nvlink", "host": "host-memory", "sockets": "sockets"}
"""Link -> its name in jaxsys.hardware, for predictions."""
TORCH = "torch-"
"""What PyTorch's rows begin with."""
TOKENS = 16384
"""Tokens of a microbatch; shorter sequences are put together."""


def predict(options: argparse.Namespace, between: str, shape: str, length: int) -> Comparison:
    workload = decoder_workload(
        shape,
        SHAPES[shape],
        sequence_length=length,
        microbatch_size=max(1, TOKENS // length),
    )
    cluster = Cluster(
        device=device(options.device), devices=options.devices, link=link(SPECS[between])
    )
    return compare(workload, cluster, microbatches=options.turns * options.devices)


def run_group(
    options: argparse.Namespace,
    between: str,
    shape: str,
    length: int,
    names: list[str],
    left: float,
) -> list[dict]:
    """Runs some strategies at a length over a link; a row each, those it did not come to left out.

    Args:
        left: seconds after which the run is ended.
    """
    predicted = {row.strategy: row for row in predict(options, between, shape, length).rows}
    best = min(predicted.values(), key=lambda row: (not row.fits, row.step_s))
    like = {"gspmd-fsdp": "zero-3", "zb-h1": "1f1b-overlap", "weipipe-wzb1": "weipipe-interleave"}
    torch_rows = [
        torch_row(options, between, shape, length, name) for name in names if name.startswith(TORCH)
    ]
    steps = [
        name
        if ":" in name
        else f"{name}:{predicted[like.get(name, name).partition('/')[0]].recompute}"
        for name in names
        if not name.startswith(TORCH)
    ]
    if not steps:
        return torch_rows
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, str(ROOT / "scripts/bench_train.py"), "step", "--shape", shape]
        line += ["--schedules", *steps]
        line += ["--sequence-lengths", str(length), "--devices", str(options.devices)]
        line += ["--microbatch-sizes", str(max(1, TOKENS // length))]
        line += ["--microbatches", str(options.turns * options.devices)]
        line += ["--repeats", str(options.repeats), "--dtype", options.dtype, "--unroll"]
        line += ["--jobs", str(options.jobs), "--gradient-dtype", options.gradient_dtype]
        line += ["--label", "group", "--out", folder]
        environment = {**os.environ, **LINKS[between]}
        try:
            code = subprocess.run(line, check=False, env=environment, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = 0
        found = Path(folder) / "train_step_group.json"
        if not found.exists():
            if code:
                raise RunError(f"bench_train ended with exit code {code}")
            return torch_rows
        measured = json.loads(found.read_text())["rows"]
    rows = torch_rows
    for row in measured:
        guess = predicted.get(row["schedule"])
        other = row["travel_dtype"] or row["tensor"] > 1
        if guess and (guess.recompute != row["recompute"] or other):
            guess = None
        rows.append(
            {
                "link": between,
                "shape": shape,
                "gradient_dtype": options.gradient_dtype,
                "microbatches": options.turns * options.devices,
                **row,
                "predicted_s": round(guess.step_s, 4) if guess else None,
                "planners_choice": guess is best,
            }
        )
    return rows


def torch_row(
    options: argparse.Namespace, between: str, shape: str, length: int, name: str
) -> dict:
    """PyTorch's step, NAME or NAME:POLICY, over the same link."""
    name, _, policy = name.partition(":")
    row = {
        "travel_dtype": None,
        "link": between,
        "shape": shape,
        "gradient_dtype": "float32",
        "microbatches": options.turns * options.devices,
        "schedule": name,
        "recompute": policy or "none",
        "sequence_length": length,
    }
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "row.json"
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
        line += [str(options.devices), str(ROOT / "scripts/bench_torch.py"), "--shape", shape]
        line += ["--parallel", name.removeprefix(TORCH), "--length", str(length)]
        line += ["--microbatch-size", str(max(1, TOKENS // length))]
        line += ["--microbatches", str(row["microbatches"]), "--recompute", row["recompute"]]
        line += ["--repeats", str(options.repeats), "--out", str(found)]
        try:
            subprocess.run(line, check=False, env={**os.environ, **LINKS[between]}, timeout=150)
        except subprocess.TimeoutExpired:
            return row | {"failed": "longer than 150 s"}
        if not found.exists():
            return row | {"failed": "see above"}
        return row | json.loads(found.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_gpus.py", description=__doc__)
    add = parser.add_argument
    add("--devices", type=int, help="all of this machine's GPUs, if not given")
    add("--device", default="h200", help="of jaxsys.hardware, for predictions")
    add("--links", nargs="+", choices=tuple(LINKS), default=["direct", "host", "sockets"])
    add("--shapes", nargs="+", choices=tuple(SHAPES), default=["1b", "8b"])
    add("--lengths", nargs="+", type=int, default=[16384, 4096, 65536])
    add(
        "--schedules",
        nargs="+",
        default=list(SCHEDULES),
        help="NAME, whose recompute policy the planner chooses, NAME:POLICY, or "
        "NAME:POLICY:DTYPE with a ring's gradients travelling in that type",
    )
    add("--jobs", type=int, default=8, help="compile so many at a time, before timing")
    add("--gradient-dtype", default="float32")
    add("--turns", type=int, default=4, help="microbatches of a step and device")
    add("--repeats", type=int, default=2)
    add("--dtype", default="bfloat16")
    add("--seconds", type=float, default=540, help="end after this long")
    add("--out", type=Path, help="results/gpus_N.json, if not given")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        if options.devices is None:
            options.devices = count_gpus()
        path = options.out or ROOT / f"results/gpus_{options.devices}.json"
        rows = read_result(path)["rows"] if path.exists() else []

        def measured(between: str, shape: str, length: int, name: str) -> bool:
            """Whether a strategy (NAME, or NAME:POLICY) has its row."""
            schedule, policy, travel = (*name.split(":"), "", "")[:3]
            wanted = (between, shape, length, schedule, options.gradient_dtype, travel or None)
            keys = ("link", "shape", "sequence_length", "schedule", "gradient_dtype")
            return any(
                wanted == (*(row[key] for key in keys), row.get("travel_dtype"))
                and policy in ("", row["recompute"])
                for row in rows
            )

        groups = itertools.product(options.shapes, options.lengths, options.links)
        for shape, length, between in groups:
            names = [n for n in options.schedules if not measured(between, shape, length, n)]
            left = options.seconds - (time.monotonic() - start)
            if not names:
                continue
            if left < 60:
                print("time is up; call again for the rest")
                break
            rows += run_group(options, between, shape, length, names, left)
            write_result(
                path,
                benchmark="gpus",
                kind="measured",
                config={"microbatch_tokens": TOKENS, "nccl": LINKS, "dtype": options.dtype},
                rows=rows,
            )  # fmt: skip
        print(summary(rows))
    except (UsageError, RunError) as error:
        print(f"bench_gpus: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def summary(rows: list[dict]) -> str:
    columns = {"link": "", "shape": "", "sequence_length": "", "schedule": "", "recompute": ""}
    columns |= {"travel_dtype": ""}
    columns |= {"step_s": ".3f", "predicted_s": ".3f", "model_tflops_per_gpu": ".0f"}
    columns |= {"temp_gib": ".1f", "argument_gib": ".1f", "predicted_gib": ".1f"}
    return table(rows, columns | {"planners_choice": "", "failed": ""})


def count_gpus() -> int:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], check=False, capture_output=True, text=True
        ).stdout
    except FileNotFoundError:
        listed = ""
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    if count < 2:
        raise UsageError(f"{count} GPUs are here; two at least are needed, or --devices for CPUs")
    return count


if __name__ == "__main__":
    raise SystemExit(main())
