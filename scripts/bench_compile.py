#!/usr/bin/env python
"""What a step takes to trace and compile on virtual CPU devices, in processor seconds.

A row a strategy, as its first step there compiles; ZeRO's loop over chunks that are alike, or are
written out (`unroll`) as on GPUs. A small decoder: what is compiled goes with layers, not width.

    scripts/bench_compile.py                          # writes results/compile_cpu.json
    scripts/bench_compile.py --schedules zero-3 weipipe-interleave --written-out zero-3
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.lowering import lower
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, abstract_parameters, layered
from jaxsys.results import table, write_result
from jaxsys.strategies import STRATEGIES, for_layers


def measure(
    name: str, *, layers: int, devices: int, microbatches: int, unroll: bool
) -> dict[str, Any]:
    """One row."""
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    schedule = for_layers(name, devices=devices, microbatches=microbatches, layers=layers)
    step = lower(schedule, layered(config), make_mesh(devices), unroll=unroll)
    shapes = jax.eval_shape(step.to_rest, abstract_parameters(config))
    place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)  # noqa: E731
    parameters = jax.tree.map(place, shapes, step.rest_shardings(shapes))
    tokens = jax.ShapeDtypeStruct((microbatches, 1, 16), jnp.int32)
    began_s = time.process_time()
    traced = jax.jit(step.loss_and_gradients).lower(
        parameters, {"inputs": tokens, "targets": tokens}
    )
    traced_s = time.process_time()
    program = traced.compile(compiler_options=step.compiler_options)
    memory: Any = program.memory_analysis()
    return {
        "schedule": name,
        "layers": "written out" if unroll else "looped",
        "trace_cpu_s": round(traced_s - began_s, 1),
        "compile_cpu_s": round(time.process_time() - traced_s, 1),
        "lines": len((program.as_text() or "").splitlines()),
        "temporary_kib": round(memory.temp_size_in_bytes / 1024),
    }


def main() -> None:
    """Measures each row and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=24)
    parser.add_argument("--schedules", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--written-out", nargs="*", default=[], help="of these that form as well")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("layers", "devices", "microbatches")}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    cases = [(name, False) for name in options.schedules]
    cases += [(name, True) for name in options.written_out]
    rows = []
    for name, unroll in cases:
        rows.append(measure(name, unroll=unroll, **sizes))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(table(rows))
    path = write_result(
        options.out / "compile_cpu.json",
        benchmark="compile_cpu",
        kind="measured",
        config=sizes,
        rows=rows,
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
