"""Cross-entropy of next tokens without ever holding [B, T, V] logits.

    loss = sum_t [logsumexp(h_t H) - h_t H[:, target_t]]   over targets that are not -1

Tokens go through the head in chunks; a chunk's logits are computed again in the backward pass.
The memory is chunk * V floats in place of B * T * V, the price one more pass through the head.
Gradients of the head add up over chunks in float32 whatever the parameters' dtype.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys.errors import UsageError
from jaxsys.layered import PyTree
from jaxsys.model.config import LlamaConfig
from jaxsys.model.llama import bind_edge

IGNORED = -1
"""The target that counts for nothing."""


def summed_cross_entropy(
    logits: Float[Array, "C V"], targets: Int[Array, " C"]
) -> Float[Array, ""]:
    """Sum over rows of logits [C, V] of the negative log probability of targets [C]; float32."""
    logits = logits.astype(jnp.float32)
    counted = targets != IGNORED
    safe = jnp.where(counted, targets, 0)
    chosen = jnp.take_along_axis(logits, safe[:, None], axis=-1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counted, losses, 0.0))


def head_loss(
    config: LlamaConfig,
    edge: PyTree,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk_tokens: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Final norm, head and cross-entropy, `chunk_tokens` tokens at a time.

    Args:
        config: the model.
        edge: its parameters outside the blocks.
        x: the residual after the last block [B, T, D].
        targets: int [B, T]; -1 is ignored.
        chunk_tokens: tokens whose logits are held at once.

    Returns:
        (summed loss, number of counted tokens), float32 scalars.
    """
    if targets.shape != x.shape[:2]:
        raise UsageError(f"targets of shape {targets.shape} must be {x.shape[:2]}, as x is")
    width = x.shape[-1]
    rows, goals = x.reshape(-1, width), targets.reshape(-1)
    weight = jnp.sum(goals != IGNORED).astype(jnp.float32)
    chunk = min(chunk_tokens, rows.shape[0])
    spare = -rows.shape[0] % chunk
    if spare:
        rows = jnp.pad(rows, ((0, spare), (0, 0)))
        goals = jnp.pad(goals, (0, spare), constant_values=IGNORED)

    # A gradient that passes these casts is summed over chunks on their float32 side. Compiled,
    # the two casts meet and vanish.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), edge)

    @jax.checkpoint
    def chunk_loss(wide: PyTree, rows: jax.Array, goals: jax.Array) -> jax.Array:
        narrow = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), wide, edge)
        logits = bind_edge(config, narrow).logits(rows[None])[0]
        return summed_cross_entropy(logits, goals)

    # A map and not a scan with a carry: nothing needs to be marked as varying in a shard_map.
    losses = jax.lax.map(
        lambda part: chunk_loss(wide, *part),
        (rows.reshape(-1, chunk, width), goals.reshape(-1, chunk)),
    )
    return jnp.sum(losses), weight
