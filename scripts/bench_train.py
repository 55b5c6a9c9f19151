#!/usr/bin/env python
"""Measures training on the devices at hand and prints tables; JSON goes to results/.

scripts/bench_train.py block   one block, forward and backward, against its products and attention
scripts/bench_train.py step    whole steps: schedules and plain JAX FSDP, model TFLOP/s and memory

`step --compile-only --devices N` compiles for N GPUs of which one need be here, runs nothing, and
sets the memory that XLA gave the program beside the prediction.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from shapes import SHAPES
from train_block import time_block
from train_steps import (
    GIB,
    Ready,
    compile_step,
    hand_step,
    memory_of,
    our_step,
    predicted_bytes,
    state_shapes,
    time_step,
    xla_step,
)

from jaxsys.axes import RING
from jaxsys.errors import UsageError
from jaxsys.files import write_whole
from jaxsys.lowering import RECOMPUTE_POLICIES, lower
from jaxsys.mesh import devices_ahead, make_mesh, own_cpu_devices, request_devices
from jaxsys.model.decoder import initial_parameters
from jaxsys.model.float8_products import BACKWARD, Backward, Float8
from jaxsys.model.layers import layered
from jaxsys.results import table, write_result
from jaxsys.train.flops import training_flops_per_token
from jaxsys.train.schedules import resolve
from studies.timing import compiled_together


def bench_block(options: argparse.Namespace) -> None:
    """One block against the sum of its products and its attention, each alone."""
    rows, pieces = time_block(options)
    write_result(
        options.out / "train_block.json",
        benchmark="train_block",
        kind="measured",
        config=_config(options),
        rows=rows,
        pieces=pieces,
    )


def bench_step(options: argparse.Namespace) -> None:
    """Whole training steps by schedule, sequence length and recompute policy."""
    config, dtype = SHAPES[options.shape], jnp.dtype(options.dtype)
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    devices = options.devices or len(jax.devices())
    if options.compile_only:
        chosen = devices_ahead(devices)
    else:
        chosen = request_devices(devices, allow_virtual=options.coordinator is None)
    mesh = make_mesh(devices, devices=chosen)
    optimizer = optax.adamw(1e-4)
    parameters = functools.partial(initial_parameters, config)
    shapes = jax.eval_shape(parameters)
    rows = []
    benchmark = "train_memory" if options.compile_only else "train_step"

    def show(row: dict) -> None:
        rows.append(row)
        if options.link is not None:
            sent = [row.get("sent_bytes") for row in rows]
            write_whole(options.out / f"sent_{jax.process_index()}.json", json.dumps(sent))
        if jax.process_index() != 0:
            return
        print(table([row]), flush=True)
        write_result(
            options.out / f"{benchmark}_{options.label}.json",
            benchmark=benchmark,
            kind="measured",
            config=_config(options),
            rows=rows,
        )

    def measure(row: dict, ready: Ready | None) -> None:
        try:
            if options.compile_only:
                show(row | (memory_of(ready) if ready else {}))
            else:
                show(row | (time_step(ready, options.repeats, options.link) if ready else {}))
        except jax.errors.JaxRuntimeError as error:
            show(row | _failed(error))

    prepared = prepare_steps(options, config, dtype, mesh, optimizer, parameters, shapes)
    if options.rounds:
        everything = list(prepared)
        for number in range(options.rounds):
            pause(options.meeting, number)
            for row, ready in everything:
                measure(row | {"round": number}, ready)
    else:
        for row, ready in prepared:
            measure(row, ready)
            if ready:
                ready.state = None  # room for the next
    if jax.process_index() == 0:
        print()
        print(table(rows))


def prepare_steps(options, config, dtype, mesh, optimizer, parameters, shapes):
    """Yields a row and, unless it failed, its compiled step with everything it needs.

    With `--jobs` all are compiled before the first is yielded.
    """
    named = [(*name.split(":"), "", "")[:3] for name in options.schedules]
    steps = [
        (name, [policy] if policy else options.recompute, travel or options.travel_dtype)
        for name, policy, travel in named
    ]
    cases = [
        (length, size, name, recompute, travel, float8)
        for length, size, (name, policies, travel) in itertools.product(
            options.sequence_lengths, options.microbatch_sizes, steps
        )
        for recompute in policies
        for float8 in options.float8
    ]

    def prepare(case):
        length, size, name, recompute, travel, float8 = case
        return prepare_step(
            length, size, name, recompute, travel, float8,
            options, config, dtype, mesh, optimizer, parameters, shapes,
        )  # fmt: skip

    if options.jobs == 1:
        yield from map(prepare, cases)
    else:
        yield from compiled_together(prepare, cases, options.jobs)


FORWARD: dict[str, dict[str, Any]] = {
    "": {},
    "-all": {"forward": (".*",)},
    "-backward": {"forward": ()},
    "-fast": {"exact": "none"},
    "-exact": {"exact": "all"},
}
"""Forward products in float8, and sums, by what is written behind the form of what flows back."""


def _float8(name: str) -> Float8:
    form: Backward = "e4m3"
    form = "e5m2" if name.startswith("e5m2") else form
    form = "e4m3-rows" if name.startswith("e4m3-rows") else form
    return Float8(backward=form, **FORWARD[name.removeprefix(form)])


def prepare_step(
    length,
    size,
    name,
    recompute,
    travel,
    float8,
    options,
    config,
    dtype,
    mesh,
    optimizer,
    parameters,
    shapes,
):
    """A row and its compiled step, or None where that failed."""
    devices, microbatches = mesh.devices.size, options.microbatches
    name, _, parts = name.partition("/")
    name, _, each = name.partition("*")
    copies = re.match(r"(\d+)x", name)
    name = name[copies.end() :] if copies else name
    replicas = int(copies.group(1)) if copies else 1
    ways, members = int(parts or 1), int(each or 1)
    model = layered(config, float8=None if float8 == "off" else _float8(float8))
    flops = training_flops_per_token(
        parameters=config.active_parameter_count(),
        layers=config.num_layers,
        sequence_length=length,
        attention_width=config.num_heads * config.head_dim,
    )
    shape = (microbatches, size, length + 1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    row = {
        "schedule": name,
        "tensor": ways,
        "members": members,
        "replicas": replicas,
        "recompute": recompute,
        "float8": float8,
        "sequence_length": length,
        "microbatch_size": size,
        "devices": devices,
        "travel_dtype": travel,
    }
    try:
        lowered = None
        if name == "gspmd-fsdp":
            step, make = xla_step(
                model,
                mesh,
                optimizer,
                microbatches,
                recompute,
                dtype,
                parameters,
                unroll=options.unroll,
            )
        else:
            by_hand = name == "ring-by-hand"
            mesh = of_parts(mesh, ways, members, replicas)
            ring = mesh.shape[RING]
            lowered = lower(
                resolve(
                    "weipipe-interleave" if by_hand else name,
                    devices=ring,
                    layers=config.num_layers,
                    microbatches=microbatches // (members * replicas),
                ),
                model,
                mesh,
                compute_dtype=dtype,
                gradient_dtype=jnp.dtype(options.gradient_dtype),
                travel_dtype=travel and jnp.dtype(travel),
                recompute=recompute,
                unroll=options.unroll,
            )
            of = hand_step if by_hand else our_step
            step, make = of(lowered, optimizer, parameters, shapes)
        if lowered is not None and name != "ring-by-hand":
            rest = make.eval_shape()
            state = (rest, state_shapes(optimizer, rest))
            row["predicted_gib"] = round(predicted_bytes(lowered, shapes, state, batch) / GIB, 2)
        return row, compile_step(step, make, optimizer, batch, flops * microbatches / devices)
    except (jax.errors.JaxRuntimeError, UsageError) as error:
        return row | _failed(error), None


def of_parts(mesh: Mesh, ways: int, members: int, replicas: int) -> Mesh:
    """The mesh, `ways` of whose devices in turn share the features of every block, `members` a
    place of the ring, and `replicas` have rings of their own."""
    around = ways * members * replicas
    if mesh.size % around:
        raise UsageError(f"{replicas}x, *{members} and /{ways} do not divide devices={mesh.size}")
    devices = list(mesh.devices.flat)
    return make_mesh(mesh.size // around, replicas, tensor=ways, member=members, devices=devices)


def pause(folder: Path, number: int) -> None:
    """Says that this process has come to a round, and waits for the word that all may run."""
    (folder / f"ready-{number}-{jax.process_index()}").touch()
    while not (folder / f"run-{number}").exists():
        time.sleep(0.1)


def _failed(error: Exception) -> dict:
    return {"failed": str(error).splitlines()[0][:120]}


def _config(options: argparse.Namespace) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "run"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_train.py", description=__doc__)
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--shape", choices=SHAPES, default="1b")
    common.add_argument("--dtype", default="bfloat16")
    common.add_argument("--recompute", nargs="+", choices=RECOMPUTE_POLICIES, default=["none"])
    common.add_argument("--unroll", action="store_true", help="write a chunk's layers out")
    common.add_argument("--repeats", type=int, default=5)
    common.add_argument("--out", type=Path, default=Path("results"))
    block = commands.add_parser("block", parents=[common])
    block.add_argument("--sequence-length", type=int, default=16384)
    block.add_argument("--layers", type=int, default=4)
    block.add_argument("--inner", type=int, default=10, help="repetitions inside one program")
    block.set_defaults(run=bench_block)
    step = commands.add_parser("step", parents=[common])
    step.add_argument(
        "--schedules",
        nargs="+",
        default=["weipipe-interleave", "gspmd-fsdp"],
        help="names, gspmd-fsdp, ring-by-hand; NAME:POLICY overrides --recompute, "
        "NAME:POLICY:DTYPE --travel-dtype too; NAME/T shares every block's features among T "
        "devices, NAME*D each place of a ring among D, RxNAME runs R of them side by side",
    )
    step.add_argument("--sequence-lengths", nargs="+", type=int, default=[16384])
    step.add_argument("--microbatches", type=int, default=8)
    step.add_argument("--microbatch-sizes", nargs="+", type=int, default=[1], help="sequences")
    step.add_argument("--layers", type=int, help="instead of the shape's")
    step.add_argument(
        "--rounds", type=int, default=0, help="compile everything first, then time it all N times"
    )
    step.add_argument(
        "--meeting",
        type=Path,
        metavar="FOLDER",
        help="with --rounds: before round N, write ready-N-PROCESS there and wait for run-N",
    )
    step.add_argument("--coordinator", help="host:port, with --processes and --process")
    step.add_argument("--processes", type=int)
    step.add_argument("--process", type=int)
    step.add_argument("--devices", type=int)
    step.add_argument(
        "--local-devices", type=int, default=1, help="of each process, with --coordinator"
    )
    step.add_argument(
        "--jobs", type=int, default=1, help="compile so many at a time, before timing"
    )
    step.add_argument("--link", help="network link whose sent bytes are counted, as eth0")
    step.add_argument("--compile-only", action="store_true", help="memory of --devices GPUs")
    step.add_argument("--gradient-dtype", default="float32")
    step.add_argument("--travel-dtype", help="of a ring's gradients on their way")
    step.add_argument(
        "--float8",
        nargs="+",
        choices=("off", *(f"{form}{where}" for form in BACKWARD for where in FORWARD)),
        default=["off"],
        help="products of blocks and head in float8, by the form of what flows back; forward too "
        "but for the head's, or all forward, or none",
    )
    step.add_argument("--label", default="run", help="names the result file")
    step.set_defaults(run=bench_step)
    options = parser.parse_args()
    if getattr(options, "coordinator", None):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        own_cpu_devices(options.local_devices)
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            heartbeat_timeout_seconds=600,  # heartbeats wait behind tensors on a slow network
        )
    try:
        options.run(options)
    except UsageError as error:
        print(f"bench_train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
