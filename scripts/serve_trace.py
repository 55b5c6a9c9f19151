#!/usr/bin/env python
"""Where a decode step's time goes, by kernels of the GPU and by calls of the host that launches it.

From JAX's profiler, behind an untraced measurement. Host calls contain each other.

scripts/serve_trace.py qwen3_30b_a3b --layers 8 --batch 1
"""

import argparse
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
from studies import serving as benchmark
from studies.random_weights import random_parameters

STEPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/serve_trace.py", description=__doc__)
    parser.add_argument("study", choices=benchmark.STUDIES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--form", help="of weights+cache, such as fp8+fp8")
    parser.add_argument("--layers", type=int, help="instead of the model's: quick to compile")
    parser.add_argument("--most", type=int, default=24, help="names shown of each")
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
    executor = benchmark.build_executor(study, config, parameters, options.form)
    del parameters
    benchmark.compile_steps(study, executor, study.batches, ())
    rows: list[dict[str, Any]] = []
    for batch in options.batch:
        with tempfile.TemporaryDirectory() as folder:
            measured = benchmark.measure_decode(
                dataclasses.replace(study, seconds=0.02),  # leaves steps to trace
                executor,
                batch,
                None,
                traced=lambda turn, folder=folder: _traced(turn, folder),
            )
            found = _events(folder)
        kernels = [time for times in found["gpu"].values() for time in times]
        print(
            f"batch {batch}: {measured['itl_ms']} ms a step, launched in "
            f"{measured['dispatch_ms']}, {len(kernels) / STEPS:.0f} kernels of "
            f"{sum(kernels) / STEPS:.0f} us"
        )
        for where, events in found.items():
            dearest = sorted(events.items(), key=lambda pair: -sum(pair[1]))
            rows += [
                {
                    "batch": batch,
                    "form": options.form or study.dtype,
                    "where": where,
                    "us_a_step": round(sum(times) / STEPS, 2),
                    "calls_a_step": round(len(times) / STEPS, 2),
                    "median_us": round(statistics.median(times), 2),
                    "name": name[:100],
                }
                for name, times in dearest[: options.most]
            ]
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


def _events(folder: str) -> dict[str, dict[str, list[float]]]:
    """ "gpu" and "host" -> name -> microseconds of each; Python's own frames are left out."""
    found: dict[str, dict[str, list[float]]] = {"gpu": {}, "host": {}}
    (path,) = Path(folder).rglob("*.xplane.pb")
    for plane in ProfileData.from_file(str(path)).planes:
        on_gpu = plane.name.startswith("/device:GPU")
        if not on_gpu and not plane.name.startswith("/host:CPU"):
            continue
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                if not event.name.startswith("$"):
                    times = found["gpu" if on_gpu else "host"].setdefault(event.name, [])
                    times.append(event.duration_ns / 1e3)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
