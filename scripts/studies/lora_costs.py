"""What adapters cost a batch: latency between tokens with none, one or many of them in it.

Rounds of all cases take turns, so that all see the same clocks and neighbours. Adapters are random
and on every matrix that may have one.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.errors import RunError
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.lora import AdapterSlots, Pair, Table, grouped
from jaxsys.serve.steps import ADAPTED
from studies import serving as benchmark
from studies.serving import Row, Study

ROUNDS = 3

STUDIES = {
    "gpu": dataclasses.replace(
        benchmark.STUDIES["gpu"],
        pool_tokens=80_000,
        buckets=(64,),
        batches=(64,),
        prompts=(),
        forms=(),
        seconds=1.0,
    ),
    "tiny": dataclasses.replace(
        benchmark.STUDIES["tiny"], buckets=(4,), batches=(4,), prompts=(), forms=()
    ),
}


def run(
    study: Study, *, adapters: int, rank: int, progress: Callable[[str], None] = print
) -> tuple[dict[str, Any], list[Row], dict[str, Any]]:
    """Measures a study; returns as `benchmark.run` does.

    Args:
        adapters: in a batch at most, and loaded.
        rank: of each.

    Raises:
        RunError: if the device's products of adapters are not those of their numbers.
    """
    config, parameters = benchmark.model_of(study.model, study.dtype)
    executor = benchmark.build_executor(study, config, parameters, None, loras=(adapters, rank))
    del parameters
    slots = executor.adapters
    assert slots is not None
    names = _fill(slots)
    error = _check(slots)
    progress(f"{adapters} adapters of rank {rank}; worst product {error:.1e} of its largest off")
    seconds = benchmark.compile_steps(study, executor, study.batches, ())
    cases = {
        "none": [None],
        "one in all rows": names[:1],
        "one in half the rows": [names[0], None],
        f"{adapters} in turn": names,
    }
    rows: list[Row] = []
    for batch in study.batches:
        seconds += _compile(study, executor, batch)
        found = _rounds(study, executor, batch, cases)
        base = statistics.median(found["none"])
        for name, samples in found.items():
            itl_ms = statistics.median(samples)
            rows.append(
                {
                    "batch": batch,
                    "adapters": name,
                    "itl_ms": round(itl_ms, 4),
                    "cost_pct": round(100 * (itl_ms / base - 1), 2),
                    "itl_ms_of_rounds": [round(one, 4) for one in samples],
                }
            )
            progress("  ".join(f"{key}={value}" for key, value in rows[-1].items()))
    figures = {
        "device": jax.devices()[0].device_kind,
        "compile_s": round(seconds, 1),
        "adapter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(slots.tables)) // adapters,
        "product_error": error,
    }
    return dataclasses.asdict(study) | {"adapters": adapters, "rank": rank}, rows, figures


def _fill(slots: AdapterSlots) -> list[str]:
    """Puts random adapters into all slots; layers of a kind have the same."""
    made: dict[str, Table] = {}
    rng = np.random.default_rng(0)
    for index, table in enumerate(slots.tables):
        kind = slots.config.kind(index).name
        if kind not in made:
            made[kind] = {
                name: Pair(*(_random(rng, leaf) for leaf in pair)) for name, pair in table.items()
            }
    names = [f"adapter-{number}" for number in range(slots.count)]
    for name in names:
        slots.put(name, [made[slots.config.kind(index).name] for index in range(len(slots.tables))])
    return names


def _random(rng: np.random.Generator, table: jax.Array) -> Any:
    return (0.02 * rng.standard_normal(table.shape[1:], np.float32)).astype(table.dtype)


def _check(slots: AdapterSlots) -> float:
    """Largest error of a product, relative to the largest number of it; all kinds of row.

    Raises:
        RunError: if it is larger than rounding, or a row without adapter is not zero.
    """
    worst = 0.0
    for pair in slots.tables[0].values():
        used = list(range(slots.count))
        rows = np.array([-1, *used, 0], np.int32)
        x = jax.random.normal(jax.random.key(1), (len(rows), 1, pair.a.shape[-1]), pair.a.dtype)
        found = np.asarray(
            jax.jit(grouped)(x, pair, jnp.asarray(used, jnp.int32), jnp.asarray(rows)), np.float32
        )
        a, b, wide = (np.asarray(one, np.float32) for one in (*pair, x[:, 0]))
        wanted = np.stack(
            [wide[row] @ a[slot].T @ b[slot] * (slot >= 0) for row, slot in enumerate(rows)]
        )
        worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
        if found[0].any():
            raise RunError("a row without adapter is not left as it was")
    bound = 2e-2 if slots.dtype == jnp.bfloat16 else 1e-4
    if not worst < bound:
        raise RunError(f"products of adapters are {worst:.1e} off, over {bound:g}")
    return worst


def _compile(study: Study, executor: JaxExecutor, batch: int) -> float:
    """Compiles the steps that add adapters; the seconds it took."""
    started_s = time.perf_counter()
    bucket = next(size for size in study.buckets if size >= batch)
    table = executor.shapes.table_buckets[0]
    for used in {executor.shapes.adapter_buckets[0], executor.shapes.adapter_buckets[-1]}:
        executor.steps.compile(("decode" + ADAPTED, bucket, table, used))
    return time.perf_counter() - started_s


def _rounds(
    study: Study, executor: JaxExecutor, batch: int, cases: dict[str, list[Any]]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, adapters in cases.items():
            row = benchmark.measure_decode(study, executor, batch, None, adapters=adapters)
            found[name].append(row["itl_ms"])
    return found
