#!/usr/bin/env python
"""Where a decode step's time goes on a GPU, kernel by kernel, from JAX's profiler.

scripts/serve_trace.py qwen3_30b_a3b --layers 8 --batch 1
"""

import argparse
import collections
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from jaxsys.model import preset
from jaxsys.results import table, write_result
from jaxsys.serve import benchmark
from jaxsys.serve.random_weights import random_parameters

STEPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/serve_trace.py", description=__doc__)
    parser.add_argument("study", choices=benchmark.STUDIES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, help="instead of the model's: quick to compile")
    parser.add_argument("--most", type=int, default=24, help="kernels shown")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON")
    options = parser.parse_args()
    study = benchmark.STUDIES[options.study]
    study = dataclasses.replace(
        study, batches=tuple(options.batch), buckets=tuple(options.batch), prompts=()
    )
    config = preset(study.model)
    if options.layers:
        config = dataclasses.replace(
            config, num_layers=options.layers, pattern=config.pattern[: options.layers]
        )
    parameters = random_parameters(config, jnp.dtype(study.dtype), packed=study.packed)
    executor = benchmark.build_executor(study, config, parameters, None)
    del parameters
    benchmark.compile_steps(study, executor, study.batches, ())
    rows: list[dict[str, Any]] = []
    for batch in options.batch:
        with tempfile.TemporaryDirectory() as folder:
            measured = benchmark.measure_decode(
                dataclasses.replace(study, seconds=0.3),
                executor,
                batch,
                None,
                traced=lambda turn, folder=folder: _traced(turn, folder),
            )
            found = sorted(_kernels(folder).items(), key=lambda pair: -sum(pair[1]))
        each = sum(sum(times) for _, times in found) / STEPS
        print(f"batch {batch}: {measured['itl_ms']} ms a step, {each:.1f} us of them in kernels")
        for name, times in found[: options.most]:
            rows.append(
                {
                    "batch": batch,
                    "us_a_step": round(sum(times) / STEPS, 2),
                    "launches_a_step": round(len(times) / STEPS, 2),
                    "median_us": round(statistics.median(times), 2),
                    "kernel": name[:100],
                }
            )
    print(table(rows))
    path = write_result(
        options.out / f"serve_trace_{options.study}.json",
        benchmark="serve_trace",
        kind="measured",
        config={"layers": config.num_layers, "batch": options.batch},
        rows=rows,
    )
    print(f"written to {path}", file=sys.stderr)
    return 0


def _traced(turn: Any, folder: str) -> None:
    with jax.profiler.trace(folder):
        for _ in range(STEPS):
            turn()


def _kernels(folder: str) -> dict[str, list[float]]:
    """Microseconds of each launch by the kernel's name; of the host where there is no GPU."""
    found = collections.defaultdict(list)
    (path,) = Path(folder).rglob("*.xplane.pb")
    planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")] or planes
    for plane in devices:
        for line in plane.lines:
            if not line.name.startswith("Stream") and plane.name.startswith("/device:GPU"):
                continue
            for event in line.events:
                found[event.name].append(event.duration_ns / 1e3)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
