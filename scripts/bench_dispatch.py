#!/usr/bin/env python
"""What the host takes to dispatch a step, where scratch memory moves and where it stays.

    scripts/bench_dispatch.py                        one GPU, random weights of Llama-3-8B, 150 s
    scripts/bench_dispatch.py --model tiny --seconds 2                     on a CPU, to try it

An instance serves the same requests three times: as XLA's pool allots scratch memory, with room
left for small buffers (`jaxsys.serve.spare_room`), and, in a process of its own, with
`--xla_gpu_temp_buffer_use_separate_color`, XLA's own allocator for scratch memory. The first
tokens of all three must be the same.
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
from jaxsys.serve.instance import Instance
from jaxsys.serve.member import TokenEvent
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.simulation.made_traces import synthetic_trace
from jaxsys.serve.simulation.traces import RequestTrace
from studies.iteration_log import COLUMNS, IterationLog
from studies.random_weights import random_parameters

SEPARATE = "--xla_gpu_temp_buffer_use_separate_color=true"
ROOM = {"as it was": False, "room left": True}
PERCENTS = (50, 90, 99)
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


def figures(rows: np.ndarray) -> dict[str, float | int]:
    """Of one phase: dispatch times by what a step follows, and the time between steps' ends.

    Args:
        rows: an iteration each, of `COLUMNS`.
    """
    of = dict(zip(COLUMNS, rows.T, strict=True))
    took_ms = 1e3 * (of["dispatched_s"] - of["dispatch_s"])
    prompt = of["prefills"] > 0
    alike = np.zeros(len(rows), bool)
    alike[1:] = (of["batch"][1:] == of["batch"][:-1]) & ~prompt[1:] & ~prompt[:-1]
    quick_ms = float(np.median(took_ms[alike]))
    found: dict[str, float | int] = {"steps": len(rows)}
    for name, chosen in (("alike", alike), ("new_batch", ~alike & ~prompt), ("prompt", prompt)):
        found[f"{name}_steps"] = int(chosen.sum())
        for percent in PERCENTS:
            value = float(np.percentile(took_ms[chosen], percent)) if chosen.any() else np.nan
            found[f"{name}_p{percent}_ms"] = value
    found["slow_pct"] = 100 * float((took_ms > 1.8 * quick_ms).mean())
    found["slow_alike_pct"] = 100 * float((took_ms[alike] > 1.8 * quick_ms).mean())
    between_ms = 1e3 * np.diff(of["collected_s"])[~prompt[1:] & ~prompt[:-1]]
    between_ms = between_ms[between_ms < 100]  # the others waited for a request
    for percent in (50, 90, 95, 99):
        found[f"step_p{percent}_ms"] = float(np.percentile(between_ms, percent))
    found["step_mean_ms"] = float(between_ms.mean())
    return found


def serve_phases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The phases of one process, in rows."""
    served = Served(options)
    instance: Instance = served.instance
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
    executor = instance.executor
    assert isinstance(executor, JaxExecutor)
    executor.room = []  # as it was: none
    print(f"{options.name}: compiling", file=sys.stderr, flush=True)
    compile_greedy([instance])
    log = IterationLog(instance)
    instance.start()
    rows = []
    for phase, room in ROOM.items() if options.name is None else [(options.name, False)]:
        if room:
            executor.room = executor.leave_room()
        few = trace.between(0.0, 2.0)
        places = places_seen(executor, functools.partial(served.serve, few, f"{phase}, before"))
        log.take()
        print(f"{phase}: serving {len(trace)} requests", file=sys.stderr, flush=True)
        checksum = served.serve(trace, phase)
        noted = log.take()["instance-0"]
        if options.logs is not None:
            np.savez_compressed(options.logs / f"{phase}.npz", columns=COLUMNS, rows=noted)
        row = {"phase": phase, "checksum": checksum, **figures(noted)}
        rows.append(row | {"most_places": max(places.values()), "places": places})
    instance.stop(10.0)
    return rows


def in_a_process(options: argparse.Namespace, name: str, flags: str, cache: str) -> list[dict]:
    """`serve_phases` elsewhere: XLA reads its flags once."""
    line = [
        sys.executable,
        __file__,
        "--child",
        "--model",
        options.model,
        "--seconds",
        str(options.seconds),
    ]
    line += ["--name", name] if name else []
    line += [] if options.logs is None else ["--logs", str(options.logs)]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return [{"phase": name or "both", "failed": f"ended with {done.returncode}"}]
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
    add("--child", action="store_true", help=argparse.SUPPRESS)
    add("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
    if options.child:
        print(json.dumps(serve_phases(options)), flush=True)
        os._exit(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        for name, flags in (("", ""), ("separate scratch", SEPARATE)):
            rows += in_a_process(options, name, flags, cache)
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
