#!/usr/bin/env python
"""Features that GPUs share, joined by gathers and sums, and piece by piece round a ring.

First loss and every gradient leaf of two layers, either way against one GPU, in bfloat16 and
float32: where they differ nothing is timed. Then whole steps with Adam, each way, with what the
planner predicts beside it. Prints a table and writes joins_SHAPE_N.json.

    scripts/bench_joins.py --devices 2 --shape 8b --sequence-lengths 8192 --microbatches 8
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shapes import SHAPES
from train_steps import compile_step, memory_of, our_step, predicted_bytes, state_shapes, time_step

from jaxsys.axes import JOININGS
from jaxsys.hardware import GIB, device, link
from jaxsys.lowering import lower
from jaxsys.mesh import make_mesh, request_devices
from jaxsys.model.decoder import initial_parameters
from jaxsys.model.layers import layered
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.named import plan_at
from jaxsys.planner.problem import Problem
from jaxsys.planner.workload import decoder_workload
from jaxsys.results import table, write_result
from jaxsys.strategies import STRATEGIES
from jaxsys.train.flops import training_flops_per_token
from jaxsys.train.schedules import joined_by, resolve
from studies.compiled import collective_counts

BOUNDS = {"bfloat16": 0.06, "float32": 0.005}
"""Of a gradient leaf's difference by its norm, and of the loss'."""


def prepare(config, ways: int, by: str | None, options, length: int, dtype: str, recompute: str):
    """(lowered step, batch) of `dp` on so many devices."""
    mesh = make_mesh(1, tensor=ways, devices=request_devices(options.devices)[:ways])
    count = options.microbatches
    schedule = resolve("dp", devices=1, layers=config.num_layers, microbatches=count)
    lowered = lower(
        joined_by(schedule, by, mesh.shape),
        layered(config),
        mesh,
        compute_dtype=jnp.dtype(dtype),
        recompute=recompute,  # pyright: ignore[reportArgumentType] one of its choices
        unroll=True,
    )
    shape = (count, 1, length + 1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    return lowered, {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


def differences(options: argparse.Namespace) -> dict[str, Any]:
    """Of each way and dtype against one device: the loss', and the worst gradient leaf's."""
    config = dataclasses.replace(SHAPES[options.shape], num_layers=2)
    short = argparse.Namespace(**vars(options) | {"microbatches": 1})
    found: dict[str, Any] = {}
    for dtype, bound in BOUNDS.items():
        one: Any = None
        for by in (None, *JOININGS):
            ways = 1 if by is None else options.devices
            lowered, batch = prepare(config, ways, by, short, options.check_length, dtype, "none")
            rest = lowered.to_rest(initial_parameters(config))
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
    return found


def predicted_s(config, by: str, options, length: int, recompute: str) -> float:
    """What the planner says of the step, with the presets of `--device` and `--link`."""
    problem = Problem(
        workload_of=lambda size: decoder_workload(
            "model", config, sequence_length=length, microbatch_size=size
        ),
        cluster=Cluster(
            device=device(options.device), devices=options.devices, link=link(options.link)
        ),
        batch=options.microbatches,
        memory_bytes=1e15,
        lowered=True,
    )
    place = STRATEGIES["dp"].place
    assert place is not None
    plan = plan_at(place, recompute, 1, config.num_layers, 1)
    plan = dataclasses.replace(plan, features=options.devices, features_by=by)
    return float(Evaluator(problem).evaluate(plan, np.array([plan.codes])).step_s[0])


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_joins.py", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--sequence-lengths", nargs="+", type=int, default=[8192])
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--recompute", nargs="+", default=["none"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--check-length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--device", default="h200", help="preset of what is predicted")
    parser.add_argument("--link", default="nvlink", help="likewise")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    config = SHAPES[options.shape]
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    checked = differences(options)
    rows: list[dict[str, Any]] = []
    for length in options.sequence_lengths if "failed" not in checked else []:
        flops = training_flops_per_token(
            parameters=config.active_parameter_count(),
            layers=config.num_layers,
            sequence_length=length,
            attention_width=config.num_heads * config.head_dim,
        )
        for recompute in options.recompute:
            for by in JOININGS:
                rows.append(_row(config, by, options, length, recompute, flops))
                print(table([rows[-1]]), flush=True)
    print(table(rows) if rows else checked["failed"])
    write_result(
        options.out / f"joins_{options.shape}_{options.devices}.json",
        benchmark="joins",
        kind="measured",
        config={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        checked=checked,
        rows=rows,
    )
    return 1 if "failed" in checked else 0


def _row(config, by: str, options, length: int, recompute: str, flops: float) -> dict[str, Any]:
    lowered, batch = prepare(config, options.devices, by, options, length, options.dtype, recompute)
    parameters, optimizer = functools.partial(initial_parameters, config), optax.adamw(1e-4)
    shapes = jax.eval_shape(parameters)
    step, make = our_step(lowered, optimizer, parameters, shapes)
    rest = make.eval_shape()
    state = (rest, state_shapes(optimizer, rest))
    row = {
        "features_by": by,
        "recompute": recompute,
        "sequence_length": length,
        "predicted_s": round(predicted_s(config, by, options, length, recompute), 4),
        "predicted_gib": round(predicted_bytes(lowered, shapes, state, batch) / GIB, 2),
    }
    try:
        each = flops * options.microbatches / options.devices
        ready = compile_step(step, make, optimizer, batch, each)
        counts = collective_counts(ready.compiled.as_text())
        row |= {"permutes": counts.get("collective-permute", 0), **memory_of(ready)}
        return row | time_step(ready, options.repeats)
    except jax.errors.JaxRuntimeError as error:
        return row | {"failed": str(error).splitlines()[0][:120]}


if __name__ == "__main__":
    sys.exit(main())
