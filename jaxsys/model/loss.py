"""Cross-entropy of next tokens without ever holding [B, T, V] logits.

    loss = sum_t [logsumexp(h_t H) - h_t H[:, target_t]]   over targets that are not negative

Tokens go through the head in chunks. A scalar's gradient is known up to the factor that comes from
above, so a chunk's is taken while its logits are there: softmax less the one-hot target, then the
two products with it. Three products in all, where computing the logits again in the backward pass
makes four; the memory is chunk * V floats and one float32 gradient of the head. The products take
their operands in the parameters' dtype and sum in float32, over chunks too.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys.errors import UsageError
from jaxsys.float8 import E4M3, scaled
from jaxsys.layered import PyTree
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import bind_edge
from jaxsys.model.float8_products import (
    Float8,
    Sides,
    alike,
    both_ways,
    flowing_back,
    scaled_dot,
)
from jaxsys.model.leaves import HEAD

IGNORED = -1
"""A target that counts for nothing, as every negative one does: PyTorch's scripts write -100."""


def summed_cross_entropy(
    logits: Float[Array, "C V"], targets: Int[Array, " C"]
) -> Float[Array, ""]:
    """Sum over rows of logits [C, V] of the negative log probability of targets [C]; float32."""
    logits = logits.astype(jnp.float32)
    counted = targets >= 0
    safe = jnp.where(counted, targets, 0)
    chosen = jnp.take_along_axis(logits, safe[:, None], axis=-1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counted, losses, 0.0))


def log_total(logits: Float[Array, "C V"], axis: str) -> Float[Array, " C"]:
    """Log-sum-exp over a vocabulary whose parts the devices of a mesh axis have; float32."""
    logits = logits.astype(jnp.float32)
    top = jax.lax.pmax(jnp.max(logits, axis=-1), axis)
    return top + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1), axis))


def head_loss(
    config: DecoderConfig,
    edge: PyTree,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk_tokens: int,
    axis: str | None = None,
    float8: Float8 | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Final norm, head and cross-entropy, `chunk_tokens` tokens at a time.

    Along a mesh axis each device has its part of the sequences and of the vocabulary. It returns
    its part of loss and count: the sums over the devices are meant.

    Args:
        config: the model.
        edge: its parameters outside the blocks.
        x: the residual after the last block [B, T, D].
        targets: int [B, T]; negative ones are ignored.
        chunk_tokens: tokens whose logits are held at once.
        axis: the mesh axis; `x` [B, T / devices, D] and `edge` are a device's parts then.
        float8: which of the head's products run in float8.

    Returns:
        (summed loss, number of counted tokens), float32 scalars.
    """
    ways = 1 if axis is None else jax.lax.axis_size(axis)
    length = ways * x.shape[1]
    if targets.shape != (x.shape[0], length):
        raise UsageError(
            f"targets of shape {targets.shape} must be {(x.shape[0], length)}, as x is"
        )
    mine, edge_module = targets, bind_edge(config, edge)
    if axis is not None:
        start = jax.lax.axis_index(axis) * x.shape[1]
        mine = jax.lax.dynamic_slice_in_dim(targets, start, x.shape[1], axis=1)
        # Cut evenly a sequence's tokens are here in part, its logits of all of them are.
        x = jax.lax.all_gather(edge_module.norm(x), axis, axis=1, tiled=True)
    weight = jnp.sum(mine >= 0).astype(jnp.float32)
    width = x.shape[-1]
    rows, goals = x.reshape(-1, width), targets.reshape(-1)
    chunk = min(chunk_tokens, rows.shape[0])
    spare = -rows.shape[0] % chunk
    if spare:
        rows = jnp.pad(rows, ((0, spare), (0, 0)))
        goals = jnp.pad(goals, (0, spare), constant_values=IGNORED)

    hidden = rows if axis is not None else edge_module.norm(rows[None])[0]
    kernel, hidden = alike(edge_module.head_kernel(), hidden)
    if config.logit_scale != 1.0:
        hidden = hidden * config.logit_scale
    sides = None if float8 is None else float8.of(*HEAD)
    softcap = config.logit_softcap
    return linear_cross_entropy(kernel, hidden, goals, chunk, softcap, axis, sides), weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def linear_cross_entropy(
    kernel: Float[Array, "D V"],
    hidden: Float[Array, "T D"],
    targets: Int[Array, " T"],
    chunk: int,
    softcap: float | None = None,
    axis: str | None = None,
    float8: Sides | None = None,
) -> Float[Array, ""]:
    """Summed cross-entropy of hidden @ kernel, `chunk` tokens at a time; float32.

    Args:
        kernel: the head [D, V].
        hidden: normalised residuals [T, D], T a multiple of `chunk`.
        targets: int [T]; negative ones are ignored.
        chunk: tokens whose logits are held at once.
        softcap: c, logits become c tanh(logits / c).
        axis: a mesh axis whose devices have a part of the vocabulary each, in order: then this is
            one device's part of the loss and of the gradient of `hidden`.
        float8: which of the products run in float8; none if None.
    """
    head = _head(kernel, float8)
    losses = jax.lax.map(
        lambda part: _loss(_capped(head.logits(part[0]), softcap), part[1], axis)[0],
        (hidden.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk)),
    )
    return jnp.sum(losses)


def _loss(
    logits: jax.Array, targets: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Summed loss, softmax [C, V], and where the target is among these columns."""
    columns = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1)
    if axis is None:
        loss = summed_cross_entropy(logits, targets)
        return loss, jax.nn.softmax(logits, axis=-1), columns == targets[:, None]
    total = log_total(logits, axis)
    here = columns + jax.lax.axis_index(axis) * logits.shape[1] == targets[:, None]
    # Of log-sum-exp every device has the whole: each counts its share.
    share = total / jax.lax.axis_size(axis) - jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
    # As on one device: an id beyond the vocabulary is no number.
    share = jnp.where(targets < jax.lax.axis_size(axis) * logits.shape[1], share, jnp.nan)
    loss = jnp.sum(jnp.where(targets >= 0, share, 0.0))
    return loss, jnp.exp(logits - total[:, None]), here


class _Head(NamedTuple):
    """The head's three products with a chunk of hidden rows."""

    logits: Callable[[jax.Array], jax.Array]
    """[C, D] -> float32 [C, V]."""
    gradients: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    """(hidden [C, D], error [C, V]) -> float32 gradients of the kernel and of hidden."""


def _head(kernel: jax.Array, float8: Sides | None) -> _Head:
    wide = jnp.dtype(jnp.float32)
    if float8 is None:

        def gradients(hidden: jax.Array, error: jax.Array) -> tuple[jax.Array, jax.Array]:
            error = error.astype(kernel.dtype)
            to_kernel = jnp.matmul(hidden.T, error, preferred_element_type=jnp.float32)
            return to_kernel, jnp.matmul(error, kernel.T, preferred_element_type=jnp.float32)

        return _Head(
            lambda hidden: jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32),
            gradients,
        )
    # Once for all chunks.
    (w8, w8_turned), of_w = both_ways(kernel, E4M3, powers=float8.powers)

    def logits(hidden: jax.Array) -> jax.Array:
        if not float8.forward:
            return jnp.matmul(hidden, kernel, preferred_element_type=wide)
        values, scale = scaled(hidden, E4M3)
        scale = scale.reshape(()) * of_w
        return scaled_dot(values, w8_turned, scale, wide, exact=float8.exact == "all")

    def small_gradients(hidden: jax.Array, error: jax.Array) -> tuple[jax.Array, jax.Array]:
        (_, h8_turned), of_h = both_ways(hidden, E4M3)
        error = error.astype(kernel.dtype)
        (e8, e8_turned), (of_rows, of_columns) = flowing_back(error, float8.backward)
        exact = float8.exact != "none"
        to_kernel = scaled_dot(h8_turned, e8_turned, of_h * of_columns, wide, exact=exact)
        return to_kernel, scaled_dot(e8, w8, of_rows * of_w, wide, exact=exact)

    return _Head(logits, small_gradients)


def _capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _loss_and_gradients(
    kernel: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    chunk: int,
    softcap: float | None,
    axis: str | None,
    float8: Sides | None,
):
    head = _head(kernel, float8)

    def of_chunk(hidden: jax.Array, targets: jax.Array):
        logits = _capped(head.logits(hidden), softcap)
        loss, probabilities, chosen = _loss(logits, targets, axis)
        counted = (targets >= 0)[:, None]
        error = jnp.where(counted, probabilities - chosen, 0.0)
        if softcap is not None:  # the slope of the cap, 1 - tanh^2
            error = error * (1.0 - jnp.square(logits / softcap))
        to_kernel, to_hidden = head.gradients(hidden, error)
        return (loss, to_kernel), to_hidden.astype(hidden.dtype)

    parts = (hidden.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk))
    # The first chunk outside the loop, so that sums begin as what they are in a shard_map.
    sums, to_hidden = of_chunk(*jax.tree.map(lambda part: part[0], parts))
    if hidden.shape[0] > chunk:

        def onward(sums, part):
            found, to_hidden = of_chunk(*part)
            return jax.tree.map(jnp.add, sums, found), to_hidden

        sums, rest = jax.lax.scan(onward, sums, jax.tree.map(lambda part: part[1:], parts))
        to_hidden = jnp.concatenate([to_hidden[None], rest]).reshape(hidden.shape)
    loss, to_kernel = sums
    return loss, (to_kernel, to_hidden, jnp.zeros((), kernel.dtype))


def _scaled(
    chunk: int,
    softcap: float | None,
    axis: str | None,
    float8: Sides | None,
    kept,
    scale: jax.Array,
):
    to_kernel, to_hidden, like = kept
    wide = to_hidden.astype(jnp.float32)
    return (scale * to_kernel).astype(like.dtype), (scale * wide).astype(to_hidden.dtype), None


linear_cross_entropy.defvjp(_loss_and_gradients, _scaled)
