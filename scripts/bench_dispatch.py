#!/usr/bin/env python
"""What the host takes to dispatch a step, where scratch memory moves and where it stays.

    scripts/bench_dispatch.py                        one GPU, random weights of Llama-3-8B, 200 s
    scripts/bench_dispatch.py --model tiny --seconds 2                     on a CPU, to try it

An instance serves the same requests three times, each in a process of its own: as XLA's pool allots
scratch memory, with room left for small buffers (`jaxsys.serve.spare_room`), and with
`--xla_gpu_temp_buffer_use_separate_color`, XLA's own allocator for scratch memory. The first tokens
of all three must be the same. (Room that is given up again is no fourth way: what it leaves is one
free stretch, from which small buffers are cut as well.)
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from live_server import compile_greedy

from jaxsys.errors import RunError
from jaxsys.model import LoadedModel, preset
from jaxsys.model.shapes import PRESETS
from jaxsys.results import table, write_result
from jaxsys.serve.deployment import (
    DeploymentConfig,
    build_instance,
    choose_devices,
    default_dtype,
    place_weights,
)
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.member import TokenEvent
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.traces import RequestTrace
from studies.iteration_log import COLUMNS, IterationLog, dispatch_figures
from studies.random_weights import random_parameters

SEPARATE = "--xla_gpu_temp_buffer_use_separate_color=true"
PHASES = {"as-it-was": "", "room-left": "", "separate-scratch": SEPARATE}
"""How scratch memory lies, and XLA's flags for it."""
ROOM = "room-left"
SHOWN = (
    "slow_pct",
    "alike_p50_ms",
    "alike_p90_ms",
    "alike_p99_ms",
    "new_batch_p50_ms",
    "prompt_p50_ms",
    "step_mean_ms",
    "step_p50_ms",
    "step_p90_ms",
    "step_p99_ms",
)


class Served:
    """An instance, and the tokens that it sends."""

    def __init__(self, options: argparse.Namespace) -> None:
        config = preset(options.model)
        device = choose_devices(1)[0]
        on_cpu = device.platform == "cpu"
        dtype = jnp.dtype(default_dtype(device))
        with jax.default_device(device):
            parameters = random_parameters(config, dtype)
        model = LoadedModel(
            config=config,
            parameters=parameters,
            tokenizer=None,
            chat_template=None,
            source="random weights",
        )
        self.deployment = DeploymentConfig(
            prefill=1,
            decode=0,
            max_batch=4 if on_cpu else 16,
            max_length=min(4096, config.max_positions),
            max_prefill_tokens=64 if on_cpu else 2048,
            page_count=128 if on_cpu else 1024,
            prefix_caching=False,
        )
        self.vocabulary = config.vocab_size
        self.tokens: dict[str, list[int]] = {}
        self.failures: list[str] = []
        self._left = threading.Semaphore(0)
        self.instance = build_instance(
            config,
            place_weights(model, self.deployment, (device,)),
            self.deployment,
            name="instance-0",
            role="both",
            group=(device,),
            sink=self._sink,
        )
        self.device = device

    def _sink(self, events: Any) -> None:
        event: TokenEvent
        for event in events:
            name = str(event.request.request_id)
            if event.token is not None:
                self.tokens.setdefault(name, []).append(event.token)
            if event.finish_reason is not None:
                if event.finish_reason != "length":
                    self.failures.append(f"{name}: {event.finish_reason} {event.message}")
                self._left.release()

    def serve(self, trace: RequestTrace, phase: str) -> int:
        """Has the instance serve a trace; a checksum of its first tokens."""
        began_s = time.perf_counter()
        self.tokens.clear()
        rows = zip(
            trace.arrival_s.tolist(),
            trace.prompt_tokens.tolist(),
            trace.output_tokens.tolist(),
            strict=True,
        )
        for index, (arrival_s, prompt, output) in enumerate(rows):
            time.sleep(max(0.0, began_s + arrival_s - time.perf_counter()))
            draw = np.random.default_rng(index)
            self.instance.submit(
                Request(
                    f"{phase} {index}",
                    sampling=SamplingParameters(max_tokens=output, temperature=0.0),
                    arrival_s=self.instance.clock.now_s(),
                    prompt_tokens=draw.integers(self.vocabulary, size=prompt).tolist(),
                )
            )
        for _ in range(len(trace)):
            if not self._left.acquire(timeout=60):
                raise RunError(f"{phase}: a request was not answered in 60 s")
        if self.failures:
            raise RunError(f"{phase}: {self.failures[0]}")
        # First tokens alone: each prompt is computed by itself, decode batches are as they come.
        first = [self.tokens[f"{phase} {index}"][0] for index in range(len(trace))]
        return zlib.crc32(repr(first).encode())


def places_seen(executor: JaxExecutor, serve: Callable[[], object]) -> dict[str, int]:
    """At how many addresses each buffer lay that decode steps are given, while `serve` ran."""
    seen: dict[str, set[int]] = {}
    dispatch = executor.dispatch

    def noted(iteration: Any) -> Any:
        handle = dispatch(iteration)
        buffers = {"last": executor._last, "pages": jax.tree.leaves(executor._cache)[0]}
        for (batch, _), (inputs, _, logits) in executor._decode_buffers.items():
            buffers |= {f"inputs {batch}": inputs, f"logits {batch}": logits}
        for name, buffer in buffers.items():
            seen.setdefault(name, set()).add(buffer.unsafe_buffer_pointer())
        return handle

    executor.dispatch = noted  # type: ignore[method-assign]
    try:
        serve()
    finally:
        executor.dispatch = dispatch  # type: ignore[method-assign]
    return {name: len(addresses) for name, addresses in seen.items()}


def serve_phase(options: argparse.Namespace) -> dict[str, Any]:
    """One phase, as a row."""
    phase = options.phase
    if phase != ROOM:
        JaxExecutor.leave_room = lambda self: []  # type: ignore[method-assign]
    served = Served(options)
    instance = served.instance
    short = min(1.0, served.deployment.max_length / 4096)
    trace = synthetic_trace(
        rate_per_s=4.0,
        duration_s=options.seconds,
        seed=29,
        prompt_mean=max(1.0, 500 * short),
        prompt_sigma=0.8,
        output_mean=max(1.0, 150 * short),
        output_sigma=0.5,
        most_tokens=served.deployment.max_length // 2 - 1,
    )
    print(f"{phase}: compiling", file=sys.stderr, flush=True)
    compile_greedy([instance])
    log = IterationLog(instance)
    instance.start()
    executor = instance.executor
    assert isinstance(executor, JaxExecutor)
    few = trace.between(0.0, 2.0)
    places = places_seen(executor, functools.partial(served.serve, few, f"{phase}, before"))
    log.take()
    print(f"{phase}: serving {len(trace)} requests", file=sys.stderr, flush=True)
    checksum = served.serve(trace, phase)
    noted = log.take()["instance-0"]
    if options.logs is not None:
        np.savez_compressed(options.logs / f"{phase}.npz", columns=COLUMNS, rows=noted)
    instance.stop(10.0)
    row = {"phase": phase, "checksum": checksum, **dispatch_figures(noted)}
    return row | {"most_places": max(places.values()), "places": places}


def in_a_process(options: argparse.Namespace, phase: str, flags: str, cache: str) -> dict:
    """`serve_phase` elsewhere: XLA reads its flags once, and a pool begins empty once."""
    line = [sys.executable, __file__, "--phase", phase, "--model", options.model]
    line += ["--seconds", str(options.seconds)]
    line += [] if options.logs is None else ["--logs", str(options.logs)]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"phase": phase, "failed": f"ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=list(PRESETS), default="Llama-3-8B", help="shape; weights are random")
    add("--seconds", type=float, default=15.0, help="of arrivals, each phase (default 15)")
    add("--out", type=Path, default=Path("results/dispatch.json"))
    add("--logs", type=Path, metavar="FOLDER", help="keep there what each iteration took")
    add("--phase", choices=list(PHASES), help="this one alone, in this process")
    options = parser.parse_args()
    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
    if options.phase is not None:
        print(json.dumps(serve_phase(options)), flush=True)
        os._exit(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        for phase, flags in PHASES.items():
            rows.append(in_a_process(options, phase, flags, cache))
            write_result(
                options.out,
                benchmark="dispatch",
                kind="measured",
                config={"model": options.model, "seconds": options.seconds, "flag": SEPARATE},
                rows=rows,
            )
    columns = {"phase": "", "steps": ""} | dict.fromkeys(SHOWN, ".2f") | {"most_places": ""}
    print(table(rows, columns))
    sums = {row["checksum"] for row in rows if "checksum" in row}
    print("the same first tokens" if len(sums) == 1 else f"DIFFERENT first tokens: {sums}")
    return 0 if len(sums) == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
