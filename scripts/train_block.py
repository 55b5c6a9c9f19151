"""One block, forward and backward, against the sum of its products and its attention."""

import argparse

import jax
import jax.numpy as jnp
from shapes import SHAPES

from jaxsys.lowering.programs import chunk_program
from jaxsys.model.attention import attend
from jaxsys.model.decoder import abstract_parameters
from jaxsys.model.layers import layered
from jaxsys.planner.timing import median_seconds
from jaxsys.results import table
from jaxsys.train.flops import training_flops_per_token


def looped_seconds(body, start, *, inner: int, repeats: int) -> float:
    """Seconds of `body(carry) -> carry`, run `inner` times in one program to hide its launch."""

    @jax.jit
    def run(carry):
        return jax.lax.fori_loop(0, inner, lambda _, c: body(c), carry)

    return median_seconds(run, start, repeats=repeats) / inner


def time_block(options: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Times and prints a block by recompute policy, and the pieces it is held to."""
    config, dtype = SHAPES[options.shape], jnp.dtype(options.dtype)
    tokens, width, wide = options.sequence_length, config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    key = jax.random.key(0)
    rows = []

    def random(shape, scale=1.0):
        nonlocal key
        key, use = jax.random.split(key)
        return (scale * jax.random.normal(use, shape)).astype(dtype)

    def product(m, k, n):
        """Time of [m, k] x [k, n]; the carry makes each product depend on the last."""
        a, b = random((m, k)), random((k, n), k**-0.5)

        def body(carry):
            a, b = carry
            # The barrier keeps XLA from computing only the element that is read.
            out = jax.lax.optimization_barrier(a @ b)
            return a.at[0, 0].set(out[0, 0]), b

        return looped_seconds(body, (a, b), inner=options.inner, repeats=options.repeats)

    floor = 0.0
    for name, (k, n), count in (
        ("attention projections", (width, heads), 4),
        ("feed-forward in", (width, wide), 2),
        ("feed-forward out", (wide, width), 1),
    ):
        forward = product(tokens, k, n)
        to_input = product(tokens, n, k)
        to_weight = product(k, tokens, n)
        for part, time_s in (("forward", forward), ("dx", to_input), ("dw", to_weight)):
            floor += count * time_s
            rows.append(
                {
                    "piece": f"{name}, {part}, x{count}",
                    "ms": 1e3 * count * time_s,
                    "tflops": 2e-12 * tokens * k * n / time_s,
                }
            )

    q = random((1, tokens, config.num_heads, config.head_dim))
    k, v = (random((1, tokens, config.num_kv_heads, config.head_dim)) for _ in range(2))

    def attention_forward(carry):
        q, k, v = carry
        return attend(q, k, v), k, v

    def attention_both(carry):
        q, k, v = carry
        out, vjp = jax.vjp(attend, q, k, v)
        return vjp(out)

    loop = {"inner": options.inner, "repeats": options.repeats}
    forward = looped_seconds(attention_forward, (q, k, v), **loop)
    both = looped_seconds(attention_both, (q, k, v), **loop)
    half = 2e-12 * tokens * tokens * heads  # causal forward; backward is 2.5 times that in products
    rows.append({"piece": "attention forward", "ms": 1e3 * forward, "tflops": half / forward})
    rows.append({"piece": "attention, both", "ms": 1e3 * both, "tflops": 3 * half / both})
    floor += both
    rows.append({"piece": "sum of the above (floor)", "ms": 1e3 * floor})

    model = layered(config)
    layers = options.layers
    abstract = abstract_parameters(config, dtype)["blocks"]
    weights = jax.tree.map(lambda p: random((layers, *p.shape[1:]), 0.02), abstract)
    x = random((1, tokens, width))
    microbatch = {"inputs": jnp.zeros((1, tokens), jnp.int32)}
    model_flops = layers * training_flops_per_token(
        parameters=config.block_parameter_count(),
        layers=1,
        sequence_length=tokens,
        attention_width=heads,
    )
    results = []
    for recompute in options.recompute:
        program = chunk_program(
            model,
            jax.eval_shape(lambda w: w, weights),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.eval_shape(lambda m: m, microbatch),
            recompute=recompute,
            padded=False,
            unroll=options.unroll,
            split=False,
        )

        @jax.jit
        def both_ways(weights, x, program=program):
            empty = program.empty_residuals(1)
            y, buffer = program.forward(weights, x, microbatch, empty, 0, 0)
            return program.backward(weights, buffer, 0, y, microbatch, 0)[:2]

        time_s = median_seconds(both_ways, weights, x, repeats=options.repeats) / layers
        kept = sum(r.size * r.dtype.itemsize for r in program.residuals) / layers
        results.append(
            {
                "recompute": recompute,
                "ms_per_layer": 1e3 * time_s,
                "floor_ms": 1e3 * floor,
                "floor_share": floor / time_s,
                "model_tflops": 1e-12 * model_flops * tokens / layers / time_s,
                "residual_mib_per_layer": kept / 2**20,
            }
        )
    print(table(rows, {"piece": "", "ms": ".3f", "tflops": ".0f"}))
    print()
    print(
        table(
            results,
            {
                "recompute": "",
                "ms_per_layer": ".3f",
                "floor_ms": ".3f",
                "floor_share": ".3f",
                "model_tflops": ".0f",
                "residual_mib_per_layer": ".0f",
            },
        )
    )
    return results, rows
