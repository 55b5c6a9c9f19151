"""Blocks that are computed again go over long sequences in pieces: the same values, less memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.layered import WithAgain, reference_loss
from jaxsys.lowering import Recompute, lower
from jaxsys.lowering.jaxprs import inlined, is_literal
from jaxsys.lowering.memory import block_bytes
from jaxsys.lowering.programs import INDEX, block_program
from jaxsys.mesh import make_mesh
from jaxsys.model import Experts, abstract_parameters, initial_parameters, layered, preset
from jaxsys.model.float8_products import Float8
from jaxsys.model.kinds import BlockKind
from jaxsys.model.pieces import in_pieces, pieces_of
from jaxsys.strategies import for_layers
from jaxsys.train.lora import add_adapters

LLAMA = dataclasses.replace(preset("bench-tiny"), num_layers=1)
NORMED = dataclasses.replace(LLAMA, qk_norm="each", norm_places="both", parallel=True)
"""Head norms, and norms on both sides of an attention and a feed-forward side by side."""


def test_pieces_divide_tokens_where_they_can():
    assert pieces_of(65_535, 16_384) == 1  # short
    assert pieces_of(131_072, 16_384) == 8
    assert pieces_of(501_760, 16_384) == 32  # a number that divides it beside the least, 31
    assert pieces_of(65_537, 16_384) == 5  # prime: the last piece is filled up


@pytest.mark.parametrize(
    ("config", "length", "recompute"),
    [
        (LLAMA, 26, "around-attention"),  # 52 rows, 7 pieces of 8 filled up
        pytest.param(LLAMA, 32, "block", marks=pytest.mark.slow),
        (NORMED, 32, "block"),
    ],
)
def test_a_step_in_pieces_has_the_loss_and_gradients_of_one_that_is_whole(
    config, length, recompute
):
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (2, 2, length + 1), dtype=np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    model = layered(config, piece_tokens=8)
    parameters = initial_parameters(config)
    lowered = lower(
        for_layers("dp", devices=1, microbatches=2, layers=1),
        model,
        make_mesh(1),
        recompute=recompute,
        unroll=True,
    )
    text = str(jax.make_jaxpr(lowered.loss_and_gradients)(parameters, batch))
    assert "scan" in text
    found = jax.jit(lowered.loss_and_gradients)(parameters, batch)
    whole = functools.partial(reference_loss, layered(config))
    loss, wanted = jax.jit(jax.value_and_grad(whole))(parameters, batch)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-6)
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, atol=2e-5 * float(np.abs(b).max()), rtol=0, err_msg=str(path)
        ),
        found.gradients,
        wanted,
    )


def feed_forward(weights, x, constants):
    return jax.nn.gelu(x * constants @ weights["up"]) @ weights["down"]


def weights_and_rows(rows: int, width: int, inner: int, dtype: Any = jnp.float32):
    random = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(random.normal(size=shape) / 8, dtype)  # noqa: E731
    weights = {"up": make(width, inner), "down": make(inner, width), "unread": make(3)}
    return weights, make(rows, width), make(rows, 1)


@pytest.mark.parametrize("rows", [96, 97])
def test_pieces_hold_less(rows):
    rows *= 64
    weights, x, scale = weights_and_rows(rows, 16, 256)

    def loss(pieces, weights, x):
        y = in_pieces(feed_forward, weights, x, scale, pieces=pieces)
        return jnp.sum(y * y)

    def compiled(pieces):
        gradient = jax.grad(functools.partial(loss, pieces), (0, 1))
        return jax.jit(gradient).lower(weights, x).compile()

    whole, cut = compiled(1), compiled(16)
    for a, b in zip(
        jax.tree.leaves(cut(weights, x)), jax.tree.leaves(whole(weights, x)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-30, rtol=0)
    inner = rows * 256 * 4
    taken = [run.memory_analysis() for run in (whole, cut)]
    held = [found.temp_size_in_bytes for found in taken if found is not None]
    assert held[0] > 2 * inner and held[1] < inner


def test_gradients_of_weights_are_summed_in_float32():
    """Sums of ones stand still at 256 in bfloat16."""
    ones = jnp.ones((1024, 2), jnp.bfloat16)

    def loss(scale):
        y = in_pieces(lambda w, x, _: w[None] * x, scale, ones, None, pieces=1024)
        return jnp.sum(y.astype(jnp.float32))

    assert jax.grad(loss)(jnp.ones(2, jnp.bfloat16)).tolist() == [1024, 1024]


def test_what_is_frozen_takes_no_products():
    weights, x, scale = weights_and_rows(32, 8, 16)

    def products(trained: tuple[str, ...]) -> int:
        def loss(own, x):
            every = {**weights, **own}
            return jnp.sum(in_pieces(feed_forward, every, x, scale, pieces=4))

        own = {name: weights[name] for name in trained}
        return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(own, x)).count("dot_general")

    assert products(("up", "down")) - products(("up",)) == 1
    assert products(("up", "down")) - products(()) == 2


def shapes_of(config, length: int, dtype: Any = jnp.bfloat16):
    """A layer's parameters, x and a microbatch, as shapes."""
    parameters = abstract_parameters(config, dtype)
    layer = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), parameters["blocks"]
    )
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    x = jax.ShapeDtypeStruct((1, length, config.hidden_size), dtype)
    return layer, x, {"inputs": ids, "targets": ids}


@pytest.mark.parametrize("recompute", ["block", "around-attention"])
def test_memory_that_is_planned_is_that_of_pieces(recompute: Recompute):
    """Backward passes that are cut into I and W stay whole: a loop is one of both."""
    config = preset("Llama-3-8B")
    layer, x, microbatch = shapes_of(config, 131_072)
    model = layered(config, implementation="shapes")
    found = block_bytes(model, layer, x, microbatch, recompute, split=True)
    inner = 2.0 * 131_072 * config.intermediate_size
    assert found.split_work is not None
    assert found.work < 3 * inner < 5 * inner < found.split_work
    short = shapes_of(config, 32_768)
    assert block_bytes(model, *short, recompute, split=True).split_work is None
    kept = block_bytes(model, layer, x, microbatch, "selective", split=False)
    assert kept.residual > 2 * inner  # what is kept is not made in pieces


def test_what_stays_whole():
    experts = dataclasses.replace(
        LLAMA,
        kinds=(BlockKind(name="experts", experts=True),),
        experts=Experts(count=4, active=2, intermediate_size=8),
    )
    assert isinstance(layered(LLAMA).block, WithAgain)
    assert not isinstance(layered(experts).block, WithAgain)
    assert not isinstance(layered(LLAMA, float8=Float8()).block, WithAgain)
    parts = layered(LLAMA).in_parts
    assert parts is not None and not isinstance(parts({"tensor": 2}).model.block, WithAgain)


def test_a_block_that_is_replaced_or_adapted_is_what_runs_again():
    model = layered(LLAMA, piece_tokens=8)
    layer, x, microbatch = shapes_of(LLAMA, 64, jnp.float32)

    def program(model, layer):
        made = block_program(model, layer, x, microbatch, "block")
        back = jax.make_jaxpr(made.backward)(layer, [x], [x], microbatch, INDEX)
        return str(back)

    assert "scan" in program(model, layer)
    other = dataclasses.replace(model, block=lambda weights, x, microbatch: 2 * x)
    assert "scan" not in program(other, layer)
    parameters = initial_parameters(LLAMA)
    adapted, start, _ = add_adapters(model, parameters, rank=2, targets=["query"])
    own = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), start["blocks"]
    )
    assert "scan" in program(adapted, own)


def test_room_of_a_loop_waits_for_what_it_reads():
    """Constant zeros of all loops of a step XLA makes in one kernel at its start, and holds."""
    weights, x, scale = weights_and_rows(64, 8, 16)

    def loss(weights, x):
        return jnp.sum(in_pieces(feed_forward, weights, x, scale, pieces=4))

    jaxpr = inlined(jax.make_jaxpr(jax.grad(loss, (0, 1)))(weights, x)).jaxpr
    makers = {v: equation for equation in jaxpr.eqns for v in equation.outvars}
    loops = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    waiting = 0
    for variable in [v for loop in loops for v in loop.invars if not is_literal(v)]:
        wide = getattr(variable.aval, "ndim", 0) > 1
        while wide and variable in makers:
            if makers[variable].primitive.name == "optimization_barrier":
                waiting += 1
                break
            made = [v for v in makers[variable].invars if not is_literal(v)]
            assert made, f"{makers[variable]} waits for nothing"
            (variable, *_) = made
    assert len(loops) == 2 and waiting >= 4
