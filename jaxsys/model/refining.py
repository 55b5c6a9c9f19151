"""Codes and scales of four bits by turns, until they hardly change.

    minimise |x W - x (c s)|^2 = tr (W - c s)^T H (W - c s),  H = x^T x,  over codes c and scales s

What GPTQ leaves is a choice that it took input by input, each once, by scales that were chosen
before any code was. From there each code moves to the best one while all others stand still, each
group's scale likewise, and no turn makes it worse (coordinate descent, as QuantEase has it for
codes, Behdin et al., 2309.01885). With d = (c s - W) H, kept up to date:

    c_j <- nearest(c_j - d_j / (H_jj s)),  s <- s - (c d) / (c H c)  over a group's codes

Legend: N outputs, K inputs, G groups of g inputs that share a scale.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.forms import in_store, nearest


@functools.partial(jax.jit, static_argnames="turns")
def refined(
    rows: Float[Array, "N K"],
    codes: Float[Array, "N K"],
    scales: Float[Array, "N G"],
    products: Float[Array, "K K"],
    *,
    turns: int,
) -> tuple[Float[Array, "N K"], Float[Array, "N G"]]:
    """Codes and scales of int4 that lose less than those given.

    Args:
        rows: that they stand for, float32.
        codes: whole numbers from -8 to 7, as float32.
        scales: float32, each as it is kept.
        products: H, of full rank.
        turns: over all groups.
    """
    groups = scales.shape[1]
    size = rows.shape[1] // groups

    def of_group(number: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        codes, scales, slope = state
        first = (number % groups) * size
        across = jax.lax.dynamic_slice_in_dim(products, first, size, 0)
        own = jax.lax.dynamic_slice_in_dim(across, first, size, 1)
        before = jax.lax.dynamic_slice_in_dim(codes, first, size, 1)
        down = jax.lax.dynamic_slice_in_dim(slope, first, size, 1)
        scale = scales[:, number % groups]

        def of_code(index: jax.Array, pair: tuple[jax.Array, jax.Array]):
            part, down = pair
            old = part[:, index]
            new = nearest(old - down[:, index] / (own[index, index] * scale), "int4")
            moved = (new - old) * scale
            return part.at[:, index].set(new), down + moved[:, None] * own[index][None]

        part, down = jax.lax.fori_loop(0, size, of_code, (before, down))
        curve = jnp.sum(_exactly(part, own) * part, axis=1)
        better = in_store(scale - jnp.sum(part * down, axis=1) / jnp.where(curve > 0, curve, 1.0))
        better = jnp.where(jnp.isfinite(better) & (jnp.abs(better) > 1e-30), better, scale)
        moved = part * better[:, None] - before * scale[:, None]
        return (
            jax.lax.dynamic_update_slice_in_dim(codes, part, first, 1),
            scales.at[:, number % groups].set(better),
            slope + _exactly(moved, across),
        )

    apart = codes * jnp.repeat(scales, size, axis=1) - rows
    state = codes, scales, _exactly(apart, products)
    codes, scales, _ = jax.lax.fori_loop(0, turns * groups, of_group, state)
    return codes, scales


def _exactly(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
