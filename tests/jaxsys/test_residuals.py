"""What a forward pass keeps for its backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.layered import LayeredModel
from jaxsys.lowering import Recompute
from jaxsys.lowering.programs import block_program

TOKENS, WIDTH, WIDE = 6, 4, 10


def gated(w, x, microbatch):
    """A gated feed-forward layer behind a norm."""
    del microbatch
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    normed = normed.astype(x.dtype) * w["scale"][None]
    return x + (jax.nn.silu(normed @ w["gate"]) * (normed @ w["up"])) @ w["down"]


def dropping(w, x, microbatch):
    """Something random: it must be kept as it fell, not drawn again."""
    keep = jax.random.bernoulli(microbatch["key"], 0.5, x.shape)
    return x + jnp.where(keep, jnp.tanh(x @ w["square"]), 0)


def scanning(w, x, microbatch):
    """A recurrence, whose residuals are stacked by the loop that makes them."""
    del microbatch
    return jax.lax.scan(lambda c, row: ((c := jnp.tanh(c + row @ w["square"])), c), x[0], x)[1]


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def case(block):
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    if block is gated:
        weights = {"gate": drawn(WIDTH, WIDE), "up": drawn(WIDTH, WIDE), "down": drawn(WIDE, WIDTH)}
        weights["scale"] = drawn(WIDTH)
    else:
        weights = {"square": drawn(WIDTH, WIDTH)}
    microbatch = {"key": jax.random.key(3)} if block is dropping else {"ids": jnp.zeros(2)}
    return weights, drawn(TOKENS, WIDTH), microbatch


def program_of(block, weights, x, microbatch, policy: Recompute = "none"):
    model = LayeredModel(
        layers=1,
        block=lambda w, x, m, layer: block(w, x, m),
        embed=lambda e, m: m,
        head_loss=lambda e, x, m: (x, x),
    )
    return block_program(model, shapes(weights), shapes(x), shapes(microbatch), policy)


@pytest.mark.parametrize("block", [gated, dropping, scanning])
@pytest.mark.parametrize("policy", ["none", "selective", "block"])
def test_gradients_are_those_of_the_block(block, policy):
    weights, x, microbatch = case(block)
    program = program_of(block, weights, x, microbatch, policy)
    index = jnp.int32(0)
    (y,), residuals = jax.jit(program.forward)(weights, [x], microbatch, index)
    dy = jnp.cos(y)
    expected_y, vjp = jax.vjp(lambda w, v: block(w, v, microbatch), weights, x)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-6)
    got = jax.jit(program.backward)(weights, residuals, [dy], microbatch, index)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(vjp(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert [(r.shape, r.dtype) for r in residuals] == [
        (s.shape, s.dtype) for s in program.residuals
    ]


def test_a_gate_and_a_norm_are_kept_once():
    """Of silu(g) * u: g, u and the product; of the norm its input, output and a sum."""
    weights, x, microbatch = case(gated)
    weights, x = jax.tree.map(lambda w: w.astype(jnp.bfloat16), (weights, x))
    kept = program_of(gated, weights, x, microbatch).residuals
    wide = [s for s in kept if s.shape == (TOKENS, WIDE)]
    narrow = [s for s in kept if s.shape == (TOKENS, WIDTH)]
    assert len(wide) == 3
    assert len(narrow) == 2
    assert {s.dtype for s in wide + narrow} == {jnp.dtype(jnp.bfloat16)}
    sums = [s for s in kept if s not in wide and s not in narrow]
    assert all(s.size == TOKENS for s in sums)
