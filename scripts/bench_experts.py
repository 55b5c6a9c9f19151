#!/usr/bin/env python
"""Measures products with experts' matrices alone, and checks every value: JSON into results/.

scripts/bench_experts.py          shapes of Qwen3-30B-A3B and gpt-oss-20b, bfloat16 and MXFP4:
                                  microseconds by batch and block sizes, against the time of reading
                                  the experts used; forward and backward of training
scripts/bench_experts.py --tune   training's three products one by one, by block sizes
scripts/bench_experts.py --tiny   small shapes, to try the script (interpreted without a GPU)

Each call of a run has a routing of its own, so that matrices come from memory and not from cache.
"""

import argparse
import functools
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.model import grouped, grouped_triton
from jaxsys.model.grouped_triton import Blocks
from jaxsys.model.packed import Packed, unpacked
from jaxsys.results import table, write_result

SHAPES = {  # experts, used by a token, inputs, outputs
    "qwen3 up": (128, 8, 2048, 1536),
    "qwen3 down": (128, 8, 768, 2048),
    "gpt-oss up": (32, 4, 2880, 5760),
    "gpt-oss down": (32, 4, 2880, 2880),
}
TINY = {"tiny": (8, 2, 64, 32)}
CALLS = 6


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_experts.py", description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tune", action="store_true", help="block sizes of training, no more")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 2048])
    parser.add_argument("--tokens", type=int, default=8192, help="of a training product")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON")
    options = parser.parse_args()
    if options.tiny:
        options.batches, options.tokens = [1, 4], 16
    shapes = TINY if options.tiny else {name: SHAPES[name] for name in options.shapes}
    figures = {"read_bytes_per_s": None if options.tiny else read_bandwidth()}
    print(figures, flush=True)
    rows: list[dict[str, Any]] = []

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)

    for name, sizes in shapes.items() if options.tune else ():
        if "gpt" not in name:
            tune(name, sizes, options.tokens, show)
    for name, sizes in shapes.items() if not options.tune else ():
        for form in ("bfloat16", "mxfp4") if "gpt" in name or options.tiny else ("bfloat16",):
            serve(name, sizes, form, options.batches, figures["read_bytes_per_s"], show)
    for name, sizes in shapes.items() if not options.tune else ():
        if "gpt" not in name:
            train(name, sizes, options.tokens, show)
    path = write_result(
        options.out / ("experts_blocks.json" if options.tune else "experts.json"),
        benchmark="experts",
        kind="measured",
        config={"tiny": options.tiny, "batches": options.batches, "tokens": options.tokens},
        rows=rows,
        figures=figures,
    )
    print(table(rows))
    print(f"written to {path}", file=sys.stderr)
    return int(any(row.get("error", 0) > 2e-2 for row in rows))


def serve(name, sizes, form, batches, bandwidth, show) -> None:
    """Forward products of few rows, by block sizes."""
    experts, active, inputs, outputs = sizes
    key = jax.random.key(0)
    weights: Any
    if form == "mxfp4":
        codes = jax.random.bits(key, (experts, outputs, inputs // 2), jnp.uint8)
        weights = Packed(codes, jnp.full((experts, outputs, inputs // 32), 122, jnp.uint8))
    else:
        weights = 0.02 * jax.random.normal(key, (experts, outputs, inputs), jnp.bfloat16)
    expert_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / experts
    values = unpacked(weights) if form == "mxfp4" else weights
    values = values.astype(jnp.bfloat16).swapaxes(1, 2)
    for batch in batches:
        rows = jax.random.normal(jax.random.key(1), (batch * active, inputs), jnp.bfloat16)
        routings = [routed(batch, experts, active, seed) for seed in range(CALLS)]
        used = float(np.mean([np.count_nonzero(one) for one in routings]))
        floor_s = None if bandwidth is None else used * expert_bytes / bandwidth
        wanted = jax.lax.ragged_dot(rows, values, jnp.asarray(routings[0]))
        for blocks in candidates(name, batch * active, experts, inputs, form):
            run = jax.jit(functools.partial(sorted_product, form, blocks))
            row = {"study": "serve", "shape": name, "form": form, "batch": batch}
            row |= {"blocks": "x".join(map(str, blocks))}
            measured(row, run, rows, weights, routings, wanted, floor_s, show)
        if form == "bfloat16" and batch <= 64:
            row = {"study": "serve", "shape": name, "form": "ragged_dot", "batch": batch}
            run = jax.jit(dense_product)
            measured(row, run, rows, values, routings, wanted, floor_s, show)


def sorted_product(form, blocks, rows, weights, routings):
    """One product for each routing, in one program: the host is not timed."""
    results = []
    for sizes in routings:
        rows = after(rows, results)
        cut = grouped_triton.tiles(sizes, rows.shape[0], blocks.rows)
        if form == "mxfp4":
            results.append(grouped_triton.packed_product(rows, weights, cut, blocks))
        else:
            results.append(grouped_triton.product(rows, weights, cut, blocks, outputs_first=True))
    return results


def dense_product(rows, weights, routings):
    results = []
    for sizes in routings:
        results.append(jax.lax.ragged_dot(after(rows, results), weights, sizes))
    return results


def after(rows, results):
    """The rows, once the last result is there: else XLA makes one product of several, and reads
    their matrices once."""
    return jax.lax.optimization_barrier((rows, *results[-1:]))[0]


def measured(row, run, rows, weights, routings, wanted, floor_s, show) -> None:
    try:
        seconds, found = timed(run, rows, weights, routings)
    except Exception as error:  # noqa: BLE001 - a block size that a device cannot take
        show(row | {"failed": str(error).splitlines()[0][:100]})
        return
    row |= {"us": round(1e6 * seconds, 1), "error": relative(found, wanted)}
    if floor_s is not None:
        row |= {"floor_us": round(1e6 * floor_s, 1), "ratio": round(seconds / floor_s, 2)}
    show(row)


def candidates(name: str, rows: int, experts: int, inputs: int, form: str) -> list[Blocks]:
    """What `blocks_for` chooses, and others near it."""
    height = grouped_triton.height_for(rows, experts)
    depth = inputs // 2 if form == "mxfp4" else inputs
    chosen = grouped_triton.blocks_for(height, rows, depth, packed=form == "mxfp4")
    found = [chosen]
    if jax.default_backend() == "cpu" or "down" in name:
        return found
    if chosen.rows == 16:
        for outputs, depth in itertools.product((32, 64), (64, 128, 256)):
            found.append(Blocks(16, outputs, depth, 4, 4))
        found.append(Blocks(16, 32, 128, 2, 5))
    else:
        for height, (warps, stages) in itertools.product((64, 128), ((4, 3), (8, 3))):
            found.append(Blocks(height, 128, 64, warps, stages))
    return list(dict.fromkeys(found))


def train(name, sizes, tokens, show) -> None:
    """A product with its gradients, against `ragged_dot`'s."""
    experts, active, inputs, outputs = sizes
    dtype = jnp.bfloat16 if jax.default_backend() != "cpu" else jnp.float32
    key = jax.random.key(0)
    rows = jax.random.normal(key, (tokens * active, inputs), dtype)
    weights = 0.02 * jax.random.normal(key, (experts, inputs, outputs), dtype)
    slope = jax.random.normal(jax.random.key(2), (tokens * active, outputs), dtype)
    routing = jnp.asarray(routed(tokens, experts, active, 0))

    def step(product, rows, weights):
        def loss(rows, weights):
            return jnp.vdot(product(rows, weights, routing), slope)

        return jax.grad(loss, (0, 1))(rows, weights)

    flops = 6 * tokens * active * inputs * outputs
    results = {}
    for way, product in (("triton", grouped._product), ("ragged_dot", jax.lax.ragged_dot)):
        row = {"study": "train", "shape": name, "form": way, "batch": tokens}
        if way == "ragged_dot" and experts > 32:  # every expert with every row
            few = jax.jit(functools.partial(step, product))
            try:
                results[way] = few(rows, weights)
            except Exception as error:  # noqa: BLE001 - no room for what it forms
                show(row | {"failed": str(error).splitlines()[0][:100]})
            continue
        run = jax.jit(functools.partial(step, product))
        results[way] = run(rows, weights)
        seconds = repeated(lambda run=run: run(rows, weights))
        show(row | {"us": round(1e6 * seconds, 1), "tflops": round(flops / seconds / 1e12, 2)})
    # A plain reference: each expert alone.
    ends = np.cumsum(np.asarray(routing))
    worst = 0.0
    for expert in range(0, experts, max(1, experts // 8)):
        own = slice(int(ends[expert] - routing[expert]), int(ends[expert]))
        x, s = (jnp.asarray(a)[own].astype(jnp.float32) for a in (rows, slope))
        d_weights = results["triton"][1][expert]
        worst = max(worst, relative(d_weights, x.T @ s))
        if own.stop > own.start:
            wanted = s @ weights[expert].astype(jnp.float32).T
            worst = max(worst, relative(results["triton"][0][own], wanted))
    show({"study": "train", "shape": name, "form": "gradients", "batch": tokens, "error": worst})


def tune(name, sizes, tokens, show) -> None:
    """The products of a training step alone, each with several block sizes."""
    experts, active, inputs, outputs = sizes
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    count = tokens * active
    rows = jax.random.normal(jax.random.key(0), (count, inputs), dtype)
    slope = jax.random.normal(jax.random.key(2), (count, outputs), dtype)
    weights = 0.02 * jax.random.normal(jax.random.key(1), (experts, inputs, outputs), dtype)
    routing = jnp.asarray(routed(tokens, experts, active, 0))
    height = grouped_triton.height_for(count, experts)
    chosen = grouped_triton.blocks_for(height, count, inputs)
    tall = [
        Blocks(height, across, deep, warps, stages)
        for height, across, deep, warps, stages in (
            *((128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4)),
            *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (64, 256, 64, 4, 3)),
            *((64, 128, 64, 4, 4), (128, 128, 32, 4, 4), (256, 128, 64, 8, 3)),
        )
    ]
    given = rows, slope, weights, routing
    runs = {
        "forward": lambda blocks, rows, slope, weights, routing: grouped_triton.product(
            rows, weights, grouped_triton.tiles(routing, count, blocks.rows), blocks
        ),
        "d_rows": lambda blocks, rows, slope, weights, routing: grouped_triton.product(
            slope,
            weights,
            grouped_triton.tiles(routing, count, blocks.rows),
            blocks,
            outputs_first=True,
        ),
        "d_weights": lambda blocks, rows, slope, weights, routing: grouped_triton.outer(
            rows, slope, routing, blocks
        ),
    }
    flops = 2 * count * inputs * outputs
    for what, run in runs.items():
        first = Blocks(min(64, height), 128, 128, 8, 3) if what == "d_weights" else chosen
        wide = [blocks._replace(rows=64, inputs=128) for blocks in tall if blocks.rows != 64]
        others = [] if on_cpu else wide if what == "d_weights" else tall
        if on_cpu:
            first = chosen
        for blocks in dict.fromkeys([first, *others]):
            row = {"study": what, "shape": name, "blocks": "x".join(map(str, blocks))}
            try:
                alone = jax.jit(functools.partial(run, blocks))
                seconds = repeated(lambda alone=alone: alone(*given))
            except Exception as error:  # noqa: BLE001 - a block size that a device cannot take
                show(row | {"failed": str(error).splitlines()[0][:100]})
                continue
            show(row | {"us": round(1e6 * seconds, 1), "tflops": round(flops / seconds / 1e12, 1)})


def routed(tokens: int, experts: int, active: int, seed: int) -> np.ndarray:
    """Rows of each expert where every token takes `active` different ones at random."""
    scores = np.random.default_rng(seed).random((tokens, experts))
    chosen = np.argpartition(scores, active - 1, axis=1)[:, :active]
    return np.bincount(chosen.reshape(-1), minlength=experts).astype(np.int32)


def timed(run, rows, weights, routings) -> tuple[float, jax.Array]:
    """Seconds of a call, over calls of unlike routings, and the first one's result."""
    given = [jnp.asarray(one) for one in routings]
    found = jax.block_until_ready(run(rows, weights, given))[0]
    return repeated(lambda: run(rows, weights, given)) / len(given), found


def repeated(run) -> float:
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(5):
        started_s = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - started_s)
    return best


def relative(found: jax.Array, wanted: jax.Array) -> float:
    mine, theirs = (np.asarray(a.astype(jnp.float32)) for a in (found, wanted))
    scale = max(float(np.abs(theirs).max(initial=0.0)), 1e-30)
    return float(f"{np.abs(mine - theirs).max(initial=0.0) / scale:.3g}")


def read_bandwidth() -> float:
    """Bytes a second that a sum over 4 GiB reads."""
    x = jnp.ones((1 << 31,), jnp.bfloat16)
    run = jax.jit(lambda x: jnp.sum(x.reshape(1 << 16, -1), axis=1, dtype=jnp.float32))
    return x.nbytes / repeated(lambda: run(x))


if __name__ == "__main__":
    raise SystemExit(main())
