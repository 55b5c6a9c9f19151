#!/usr/bin/env python
"""Products and attention of a decode step in each form: time by rows, against what must be read.

    scripts/bench_products.py [--shape 4096 14336] [--rows 1 16 64 128 256 2048] [--parts ...]

Parts: `serve` (x times weights in each form and layout), `kernel` (blocks of int4's kernel for few
rows), `pages` (decode attention over bfloat16 and float8 pages). Each product takes another of so
many matrices as no cache holds. `error` is the root mean square of a form's distance to the product
in float32, over that of the product. JSON after each row.

On a CPU: --shape 512 256 --rows 1 16 --bytes 1e5 --batches 1 --context 128 --interpret
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys import float8
from jaxsys.results import table, write_result
from jaxsys.serve import few_rows, paged_kernel
from jaxsys.serve.matrix import Matrix, Way, matmul, plain, quantised
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.paged_kernel import Tile
from studies.serving import read_rate

BF16 = jnp.dtype(jnp.bfloat16)
Row = dict[str, Any]
Product = Callable[[jax.Array, Any], jax.Array]


def seconds(function: Callable, *arguments: Any) -> float:
    """Median over five rounds of the seconds a call of some in a row takes."""
    start_s = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    once_s = time.perf_counter() - start_s
    jax.block_until_ready(function(*arguments))
    calls = 10 if once_s < 5 else 1
    samples = []
    for _ in range(5):
        start_s = time.perf_counter()
        result = None
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - start_s) / calls)
    return statistics.median(samples)


def product_seconds(product: Product, x: jax.Array, weights: list) -> float:
    """Of one product, out of a call with a matrix and rows of its own each."""

    @jax.jit
    def run(x: jax.Array, weights: list) -> list[jax.Array]:
        return [product(x[index], w) for index, w in enumerate(weights)]

    return seconds(run, x, weights) / len(weights)


def forms(rows: int) -> dict[str, tuple[Callable[[jax.Array], Any], Product]]:
    """Name -> (how a kernel [K, N] is kept, the product with it)."""

    def by(matrix: Matrix, x: jax.Array) -> jax.Array:
        return matmul(x[None], matrix)[0]

    def small(form: Any, **how: Any) -> tuple[Callable[[jax.Array], Any], Product]:
        return lambda w: quantised(w, form, Way(**how)), lambda x, m: by(m, x)

    def turned(w: jax.Array) -> Matrix:
        return Matrix(w.T, outputs=w.shape[1:], outputs_first=True)

    def scaled_pattern(x: jax.Array, m: Matrix) -> jax.Array:
        """Scales before the product, as XLA's own pattern has them, one for all rows."""
        values, scale = float8.scaled(x, float8.E4M3)
        wide = values.astype(x.dtype) * scale.astype(x.dtype)
        sums = jax.lax.dot_general(wide, m.values.astype(x.dtype), (((1,), (1,)), ((), ())))
        return (sums * m.scale[None]).astype(x.dtype)  # pyright: ignore[reportOptionalSubscript]

    def by_integers(x: jax.Array, m: Matrix) -> jax.Array:
        values, scale = float8.scaled(x, jnp.int8, axis=1)
        sums = jax.lax.dot_general(
            values, m.values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
        return (sums.astype(jnp.float32) * scale * m.scale[None]).astype(x.dtype)  # pyright: ignore

    def summed(x: jax.Array, m: Matrix) -> jax.Array:
        """No product at all: numbers times numbers, summed."""
        wide = m.values.astype(jnp.float32) * x.astype(jnp.float32)
        scale = 1.0 if m.scale is None else m.scale
        return (wide.sum(axis=1) * scale)[None].astype(x.dtype)

    found = {
        "bfloat16, inputs first": (plain, lambda x, m: by(m, x)),
        "bfloat16, outputs first": (
            turned, lambda x, m: by(m, x)
        ),
        "fp8 widened": small("fp8"),
        "fp8 both": small("fp8", both=True),
        "fp8 both, one scale": (lambda w: quantised(w, "fp8"), scaled_pattern),
        "int8 widened": small("int8"),
        "int8 both": (lambda w: quantised(w, "int8"), by_integers),
        "int4 widened": small("int4"),
    }  # fmt: skip
    if rows == 1:
        found["bfloat16 summed"] = (turned, summed)
        for form in ("fp8", "int8"):
            found[f"{form} summed"] = (
                functools.partial(quantised, quantisation=cast(Any, form)),
                summed,
            )
        found["fp8 one row"] = small("fp8", summed_row=True, one_row=True)
    if rows <= few_rows.MOST:
        found["int4 few rows"] = small("int4", few_rows=few_rows.MOST)
    return found


def bench_serve(options: argparse.Namespace, reads: float | None) -> Iterator[Row]:
    """Each form by rows."""
    inputs, outputs = options.shape
    for name in dict.fromkeys(name for rows in options.rows for name in forms(rows)):
        kept, weights, meant = None, [], None
        for rows in options.rows:
            every = forms(rows)
            if name not in every or (options.forms and name not in options.forms):
                continue
            if options.interpret and name.endswith(("few rows", "one row")):
                continue  # for GPUs only; tests interpret it
            make, product = every[name]
            if kept != name:
                count = max(2, min(12, int(options.bytes / (inputs * outputs))))
                keys = jax.random.split(jax.random.key(0), count)
                normal = functools.partial(jax.random.normal, shape=(inputs, outputs), dtype=BF16)
                made = jax.jit(lambda key, make=make, normal=normal: make(0.02 * normal(key)))
                weights, kept = [made(key) for key in keys], name
                meant = 0.02 * normal(keys[0])
            x = jax.random.normal(jax.random.key(1), (len(weights), rows, inputs), BF16)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights[0]))
            row = {"part": "serve", "form": name, "rows": rows}
            try:
                found = np.asarray(jax.jit(product)(x[0], weights[0]), np.float32)
                wanted = np.asarray(x[0].astype(jnp.float32) @ meant.astype(jnp.float32))  # pyright: ignore
                error = float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))
                took_s = product_seconds(product, x, weights)
            except jax.errors.JaxRuntimeError as fault:
                yield row | {"failed": str(fault).splitlines()[0][:100]}
                continue
            yield row | {
                "us": round(took_s * 1e6, 2),
                "floor_ratio": None if reads is None else round(took_s / (size / reads), 2),
                "tflops": round(2 * rows * inputs * outputs / took_s / 1e12, 1),
                "error": round(error, 5),
            }


def bench_kernel(options: argparse.Namespace, reads: float | None) -> Iterator[Row]:
    """Blocks of int4's kernel for few rows."""
    inputs, outputs = options.shape
    count = max(2, min(6, int(options.bytes / (inputs * outputs))))
    keys = jax.random.split(jax.random.key(0), count)
    x = jax.random.normal(jax.random.key(1), (count, 1, inputs), BF16)
    made = jax.jit(
        lambda key: quantised(0.02 * jax.random.normal(key, (inputs, outputs), BF16), "int4")
    )
    weights = [made(key) for key in keys]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights[0]))
    for own, turn, warps in itertools.product((2, 4, 8), (64, 128, 256), (1, 2)):
        settings: Any = {"outputs": own, "turn": turn, "warps": warps}

        def product(x: jax.Array, m: Matrix, settings: Any = settings) -> jax.Array:
            assert m.scale is not None
            return few_rows.product(
                x, m.values, m.scale, BF16, interpret=options.interpret, **settings
            )

        row = {"part": "kernel", "form": "int4", "rows": 1, **settings}
        try:
            took_s = product_seconds(product, x, weights)
        except Exception as fault:  # noqa: BLE001  a block too large for the device, say
            yield row | {"failed": str(fault).splitlines()[0][:100]}
            continue
        yield row | {
            "us": round(took_s * 1e6, 2),
            "floor_ratio": None if reads is None else round(took_s / (size / reads), 2),
        }
        if options.interpret:
            break


def bench_pages(options: argparse.Namespace, reads: float | None) -> Iterator[Row]:
    """Decode attention: 32 query heads, 8 key/value heads of 128, pages of 64 tokens."""
    groups, heads, width, page = 8, 4, 128, 64
    device = jax.devices()[0]
    kernels = choose_kernels(dtype=BF16, head_dim=width, device=device)
    for batch in options.batches:
        pages = options.context // page
        keys = jax.random.split(jax.random.key(0), 3)
        pool = (batch * pages, page, groups, width)
        q = jax.random.normal(keys[0], (batch, groups, heads, width), BF16)
        k, v = (jax.random.normal(key, pool, BF16) for key in keys[1:])
        tables = jax.random.permutation(keys[0], batch * pages).reshape(batch, pages)
        tables = jnp.pad(tables.astype(jnp.int32), ((0, 0), (0, pages)))
        positions = jnp.full(batch, options.context - 2, jnp.int32)
        (k8, of_k), (v8, of_v) = (float8.scaled(x, float8.E4M3, axis=-1) for x in (k, v))
        scales = of_k[..., 0], of_v[..., 0]
        wanted = np.asarray(jax.jit(kernels.decode)(q, k, v, tables, positions), np.float32)
        cases: list[tuple[Row, Callable, tuple, float]] = [
            ({"form": "bfloat16", "kernel": kernels.reason.split(":")[0]},
             kernels.decode, (q, k, v, tables, positions), 2.0 * k.nbytes)]  # fmt: skip
        for programs, warps, stages, tokens in itertools.product(
            options.programs, options.warps, options.stages, options.tokens
        ):
            tile = Tile(paged_kernel.LEAST, warps, stages, tokens)

            def run(
                q: jax.Array, k: Any, v: Any, scales: Any, tables: Any, at: Any,
                settings: Any = (programs, tile),
            ) -> jax.Array:  # fmt: skip
                return paged_kernel.attend(
                    q[:, None], k, v, tables, at[:, None], scale=width**-0.5, scales=scales,
                    programs=settings[0], tile=settings[1], interpret=options.interpret,
                )[:, 0]  # fmt: skip

            row = {"kernel": "paged_kernel", "programs": programs}
            row |= {"warps": warps, "stages": stages, "tokens": tokens}
            size = 2.0 * k8.nbytes + 2.0 * scales[0].nbytes
            cases += [
                (row | {"form": "fp8"}, run, (q, k8, v8, scales, tables, positions), size),
                (
                    row | {"form": "bfloat16"},
                    run,
                    (q, k, v, None, tables, positions),
                    2.0 * k.nbytes,
                ),
            ]
        for row, run, arguments, size in cases:
            row = {"part": "pages", "batch": batch, "context": options.context, **row}
            try:
                found = np.asarray(jax.jit(run)(*arguments), np.float32)
                error = float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))

                @jax.jit
                def many(q: jax.Array, *rest: Any, run: Callable = run) -> jax.Array:
                    for _ in range(8):  # the host's part is small beside so many
                        q = run(q, *rest)
                    return q

                took_s = seconds(many, *arguments) / 8
            except Exception as fault:  # noqa: BLE001
                yield row | {"failed": str(fault).splitlines()[0][:100]}
                continue
            yield row | {
                "us": round(took_s * 1e6, 1),
                "floor_ratio": None if reads is None else round(took_s / (size / reads), 2),
                "error": round(error, 5),
            }


PARTS = {"serve": bench_serve, "kernel": bench_kernel, "pages": bench_pages}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 14336], metavar=("K", "N"))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 128, 256, 2048])
    parser.add_argument("--forms", nargs="+", help="of part `serve`; all if not given")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 128])
    parser.add_argument("--programs", nargs="+", type=int, default=[1, 2, 4, 16])
    parser.add_argument("--warps", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--tokens", nargs="+", type=int, default=[32, 64], help="of a turn")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--bytes", type=float, default=1.5e9, help="of all matrices together")
    parser.add_argument("--interpret", action="store_true", help="kernels, where there is no GPU")
    parser.add_argument("--out", type=Path, default=Path("results/products.json"))
    options = parser.parse_args()
    reads = read_rate(jax.devices()[0])
    rows: list[Row] = []
    for part in options.parts:
        for row in PARTS[part](options, reads):
            rows.append(row)
            print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            write_result(
                options.out,
                benchmark="products",
                kind="measured",
                config={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
                rows=rows,
                figures={"read_bytes_per_s": reads},
            )
    print(table(rows))
    print(f"written to {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
