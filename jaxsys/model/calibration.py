"""Rounding that knows what a matrix will be multiplied by.

    minimise |x W - x Q|^2 over some tokens' x,  H = x^T x

Weights are rounded input by input, the most used first; what one loses, those that are not rounded
yet make good (GPTQ, Frantar et al., 2210.17323): with U^T U = H^-1, U upper triangular,

    e = (w_i - q_i) / U_ii,   w_j -= e U_ij for all j behind i

Tokens go through the layers once, each matrix being rounded when the tokens first reach it, so that
it sees inputs as they will be.

Legend: T tokens, K inputs, N outputs, g inputs that share a scale.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: what tokens say nothing of is not trusted."""
_BLOCK = 128
"""Inputs whose errors meet those behind them at once."""


def compensated(
    rows: Float[Array, "N K"],
    scales: Float[Array, "N K"],
    products: Float[Array, "K K"],
    nearest: Callable[[jax.Array], jax.Array],
) -> Float[Array, "N K"]:
    """The rounded matrix, in units of its scales.

    Args:
        rows: float32.
        scales: of each number.
        products: H.
        nearest: the number of the form that is nearest.
    """
    used = jnp.diagonal(products)
    order = jnp.argsort(-used)
    damped = products + jnp.diag(jnp.where(used > 0, 0.0, 1.0) + DAMPING * jnp.mean(used))
    damped = damped[order][:, order]
    # The inverse's upper factor by way of the lower one, as LAPACK has it.
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(len(damped)))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    found = _in_order(rows[:, order], scales[:, order], upper, nearest)
    return found[:, jnp.argsort(order)]


@functools.partial(jax.jit, static_argnums=3)
def _in_order(
    rows: jax.Array, scales: jax.Array, upper: jax.Array, nearest: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    inputs = rows.shape[1]
    spare = -inputs % _BLOCK
    rows = jnp.pad(rows, ((0, 0), (0, spare)))
    scales = jnp.pad(scales, ((0, 0), (0, spare)), constant_values=1.0)
    upper = jnp.pad(upper, ((0, spare), (0, spare)))
    # A weight of its own behind the others: it loses nothing.
    upper = upper + jnp.diag(jnp.arange(inputs + spare) >= inputs)

    def block(number: jax.Array, carry: tuple[jax.Array, jax.Array]):
        rows, found = carry
        first = number * _BLOCK
        part, of_part = (
            jax.lax.dynamic_slice_in_dim(one, first, _BLOCK, 1) for one in (rows, scales)
        )
        factor = jax.lax.dynamic_slice_in_dim(upper, first, _BLOCK, 0)
        own = jax.lax.dynamic_slice_in_dim(factor, first, _BLOCK, 1)

        def column(index: jax.Array, state: tuple[jax.Array, ...]):
            part, made, errors = state
            code = nearest(part[:, index] / of_part[:, index])
            error = (part[:, index] - code * of_part[:, index]) / own[index, index]
            part = part - error[:, None] * own[index][None]
            return part, made.at[:, index].set(code), errors.at[:, index].set(error)

        none = jnp.zeros_like(part)
        _, made, errors = jax.lax.fori_loop(0, _BLOCK, column, (part, none, none))
        found = jax.lax.dynamic_update_slice_in_dim(found, made, first, 1)
        return rows - errors @ factor, found

    start = rows, jnp.zeros_like(rows)
    _, found = jax.lax.fori_loop(0, rows.shape[1] // _BLOCK, block, start)
    return found[:, :inputs]
