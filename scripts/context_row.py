#!/usr/bin/env python
"""One row of scripts/bench_long_context.py's comparison: a step over a context axis, timed.

Compiles first and says how much memory the program takes; with --turn it then waits until it is
given the GPUs, so that rows compile beside each other and run one after another. Writes JSON.

    scripts/context_row.py --devices 2 --by ring --length 262144 --recompute block --result row.json
    scripts/context_row.py --check --devices 2 --length 4096 --result check.json
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shapes import SHAPES
from train_steps import compile_step, memory_of, our_step, predicted_bytes, state_shapes

from jaxsys.context import WAYS, ContextSplit, Way
from jaxsys.context.fused import why_not_fused
from jaxsys.hardware import GIB
from jaxsys.lowering import lower
from jaxsys.mesh import devices_ahead, make_mesh, request_devices
from jaxsys.model.decoder import initial_parameters
from jaxsys.model.layers import layered
from jaxsys.train.flops import training_flops_per_token
from jaxsys.train.schedules import resolve
from studies.compiled import collective_counts


def policies_of(text: str, layers: int) -> Any:
    """`block`, or `around-attention*8,block` for the first 8 layers and the rest."""
    if "*" not in text and "," not in text:
        return text
    found: list[str] = []
    for part in text.split(","):
        name, _, count = part.partition("*")
        found += [name] * (int(count) if count else layers - len(found))
    return tuple(found)


def prepare(options: argparse.Namespace, by: Way, devices: int, dtype: str) -> tuple[Any, ...]:
    """(lowered step, its config, batch) of a way on so many devices; one device has no way."""
    config = SHAPES[options.shape]
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    chosen = devices_ahead(devices) if options.compile_only else request_devices(options.devices)
    mesh = make_mesh(1, context=devices, devices=chosen[:devices])
    name = options.schedule if devices > 1 else "dp"
    layers = config.num_layers
    recompute = policies_of(options.recompute, layers)
    split = ContextSplit(parts=devices, by=by) if devices > 1 else None
    lowered = lower(
        resolve(name, devices=1, layers=layers, microbatches=1),
        layered(config),
        mesh,
        compute_dtype=jnp.dtype(dtype),
        recompute=recompute,
        unroll=True,
        context=split,
    )
    shape = (1, 1, options.length + 1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    return lowered, config, {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


def timed(options: argparse.Namespace) -> dict:
    """A row's memory and, unless it is only compiled, its time."""
    lowered, config, batch = prepare(options, options.by, options.devices, options.dtype)
    parameters = functools.partial(initial_parameters, config)
    shapes, optimizer = jax.eval_shape(parameters), optax.adamw(1e-4)
    step, make = our_step(lowered, optimizer, parameters, shapes)
    rest = make.eval_shape()
    state = (rest, state_shapes(optimizer, rest))
    flops = training_flops_per_token(
        parameters=config.parameter_count(),
        layers=config.num_layers,
        sequence_length=options.length,
        attention_width=config.num_heads * config.head_dim,
    )
    predicted = predicted_bytes(lowered, shapes, state, batch)
    ready = compile_step(step, make, optimizer, batch, flops)
    reason = why_not_fused(jax.local_devices()[0])
    row = {
        "attention": "cudnn" if reason is None else f"blocks: {reason}",
        "predicted_gib": round(predicted / GIB, 2),
        **memory_of(ready),
        "collectives": collective_counts(ready.compiled.as_text()),
    }
    if options.compile_only:
        return row
    if options.turn is not None:
        options.result.with_suffix(".ready").write_text(json.dumps(row))
        while not options.turn.exists():
            time.sleep(0.05)
    ready.start()
    state, samples, loss = ready.state, [], None
    ready.state = None
    for _ in range(options.repeats):
        start = time.perf_counter()
        state, loss = ready.compiled(state, batch)
        jax.block_until_ready(loss)
        samples.append(time.perf_counter() - start)
    step_s = min(samples)
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return row | {
        "step_s": round(step_s, 4),
        "samples_s": [round(s, 4) for s in samples],
        "tokens_per_s": round(options.length / step_s, 1),
        "model_tflops_per_gpu": round(1e-12 * flops * options.length / step_s / options.devices, 1),
        "peak_gib": round(peak / GIB, 2) if peak else None,
        "loss": round(float(jnp.asarray(loss)), 4),
    }


def checked(options: argparse.Namespace) -> dict:
    """Loss and every gradient leaf of each way against one device's, as largest differences."""
    found = {}
    runs: list[tuple[Way, int]] = [("ring", 1), *((by, options.devices) for by in options.ways)]
    for dtype, bound in (("bfloat16", 0.06), ("float32", 0.005)):
        one: Any = None
        for by, devices in runs:
            lowered, config, batch = prepare(options, by, devices, dtype)
            parameters = functools.partial(initial_parameters, config)
            rest = jax.device_put(
                parameters(), lowered.rest_shardings(jax.eval_shape(lowered.to_rest, parameters()))
            )
            run = jax.jit(lowered.loss_and_gradients, compiler_options=lowered.compiler_options)
            outcome = jax.device_get(run(rest, batch))
            if one is None:
                one = outcome
                continue
            pairs = zip(
                jax.tree.leaves(outcome.gradients), jax.tree.leaves(one.gradients), strict=True
            )
            worst = max(
                float(np.linalg.norm(np.float32(a - b)) / np.linalg.norm(np.float32(b)))
                for a, b in pairs
            )
            loss = abs(float(outcome.loss) - float(one.loss)) / abs(float(one.loss))
            found[f"{by} {dtype}"] = {"loss": loss, "gradients": worst}
            if not (worst < bound and loss < bound):
                found["failed"] = f"{by} in {dtype} differs: loss {loss:.2g}, gradients {worst:.2g}"
    reason = why_not_fused(jax.local_devices()[0])
    return {"attention": "cudnn" if reason is None else f"blocks: {reason}", **found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/context_row.py", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--by", choices=WAYS, default="ring")
    parser.add_argument("--ways", nargs="+", default=["ring", "gather", "ulysses"])
    parser.add_argument("--schedule", default="zero-3")
    parser.add_argument("--length", type=int, default=262144)
    parser.add_argument("--recompute", default="block", help="or NAME*LAYERS,NAME")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=1, help="steps; the fastest counts")
    parser.add_argument("--check", action="store_true", help="compare values, time nothing")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--turn", type=Path, help="wait for this file before running")
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    try:
        row = checked(options) if options.check else timed(options)
    except Exception as error:  # noqa: BLE001 - a row says what became of it
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        row = {"failed": f"{type(error).__name__}: {first[:200]}"}
    options.result.write_text(json.dumps(row))
    return 1 if "failed" in row else 0


if __name__ == "__main__":
    raise SystemExit(main())
