#!/usr/bin/env python
"""What training in float8 costs in loss: the same run in bfloat16 and in float8, side by side.

    scripts/bench_float8_loss.py                    # byte-llama-75m, from random weights
    scripts/bench_float8_loss.py --model smollm2    # SmolLM2-135M, all its weights trained further

Each row is one `jaxsys train` on the sources of Python's standard library: loss of the last steps,
held-out loss, the curve, and "kept", the held-out loss of the trained weights as they are served,
in bfloat16. `over_pct` compares with bfloat16 of the same seed, and the spread of bfloat16 over
seeds says how far two runs lie apart for no reason at all. Runs share the device (`--jobs`): no
times are taken.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxsys.model.load import default_model_path
from jaxsys.results import table, write_result

LAST = 20
"""Steps whose mean is the final loss."""
LOSSES = ("loss", "held_out_loss", "kept_held_out_loss")
EVERY = 10
"""Steps that make a point of a curve."""
FORMS = {
    "bfloat16": [],
    "float8": ["--float8"],
    "float8, all sums exact": ["--float8", "--float8-exact", "all"],
    "float8, no sums exact": ["--float8", "--float8-exact", "none"],
    "float8, blocks alone": ["--float8", "attention/.*", "mlp/.*"],
    "float8, gradients alone": ["--float8", "--float8-forward"],
    "float8, gradients alone, no sums exact": [
        "--float8", "--float8-forward", "--float8-exact", "none",
    ],
    "float8, rows back": ["--float8", "--float8-backward", "e4m3-rows"],
    "float8, rows back, all sums exact": [
        "--float8", "--float8-backward", "e4m3-rows", "--float8-exact", "all",
    ],
    "float8, rows back, gradients alone": [
        "--float8", "--float8-forward", "--float8-backward", "e4m3-rows",
    ],
    "float8, head too": ["--float8", "--float8-forward", ".*"],
    "float8, gate and up wide": [
        "--float8", "--float8-forward", "attention/.*", "mlp/down",
    ],
}  # fmt: skip
"""What `jaxsys train` is told."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="byte-llama-75m", help="a preset, or smollm2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16, help="sequences of a step")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["bfloat16", "float8"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=6, help="runs at once")
    parser.add_argument("--share", type=float, default=0.9, help="of the device's memory, for all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    runs = [(form, seed) for seed in range(options.seeds) for form in options.forms]
    workers = concurrent.futures.ThreadPoolExecutor(options.jobs)
    with tempfile.TemporaryDirectory() as folder, workers as pool:
        found = [
            pool.submit(_run, options, Path(folder) / str(number), *run)
            for number, run in enumerate(runs)
        ]
        rows = [one.result() for one in found]
    base = {row["seed"]: row for row in rows if row["form"] == "bfloat16"}
    for row in rows:
        for loss in LOSSES:
            if row["seed"] in base:
                row[f"{loss}_over_pct"] = 100 * (row[loss] / base[row["seed"]][loss] - 1)
    figures: dict[str, Any] = {}
    for loss in LOSSES:
        found_losses = [row[loss] for row in base.values()]
        if found_losses:
            mean = statistics.fmean(found_losses)
            figures[f"{loss}_seeds_pct"] = 100 * (max(found_losses) - min(found_losses)) / mean
        for form in options.forms:
            over = [row[f"{loss}_over_pct"] for row in rows if row["form"] == form and base]
            if over and form != "bfloat16":
                figures[f"{loss}_over_pct: {form}"] = statistics.fmean(over)
    print(table([{k: v for k, v in row.items() if k != "curve"} for row in rows]))
    print("\n".join(f"{name}: {value:.2f}" for name, value in figures.items()))
    name = f"float8_loss_{options.model.replace('-', '_')}"
    config = {k: v for k, v in vars(options).items() if k not in ("out", "jobs", "share")}
    path = options.out / f"{name}.json"
    write_result(path, benchmark=name, kind="measured", config=config, rows=rows, figures=figures)
    return 0


def _run(options: argparse.Namespace, folder: Path, form: str, seed: int) -> dict[str, Any]:
    """A run's row."""
    model = str(default_model_path()) if options.model == "smollm2" else options.model
    share = f"{options.share / options.jobs:.3f}"
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": share}

    def train(folder: Path, model: str, *flags: str) -> list[dict[str, Any]]:
        command = [
            sys.executable, "-m", "jaxsys", "train", "--model", model,
            "--sequence-length", str(options.sequence_length), "--schedule", "dp", "--devices", "1",
            "--microbatches", "1", "--microbatch-size", str(options.rows), "--seed", str(seed),
            "--dtype", options.dtype, "--out", str(folder), "--quiet", *flags,
        ]  # fmt: skip
        subprocess.run(command, check=True, env=environment)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def held_out(lines: list[dict[str, Any]]) -> float:
        return next(line["loss"] for line in reversed(lines) if line["kind"] == "held_out")

    exported = folder / "model"
    lines = train(
        folder / "run", model, "--steps", str(options.steps), "--export", str(exported),
        *FORMS[form],
    )  # fmt: skip
    # A step too small to change anything, for the loss that follows it.
    kept = train(folder / "kept", str(exported), "--steps", "1", "--learning-rate", "1e-30")
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    points = range(0, len(losses) - EVERY + 1, EVERY)
    return {
        "form": form,
        "seed": seed,
        "loss": statistics.fmean(losses[-LAST:]),
        "held_out_loss": held_out(lines),
        "kept_held_out_loss": held_out(kept),
        "curve": [round(statistics.fmean(losses[at : at + EVERY]), 4) for at in points],
    }


if __name__ == "__main__":
    raise SystemExit(main())
