"""Attention of few queries over keys and values that lie in pages.

    o = softmax(q k^T / sqrt(K)) v  over the positions a request's block table lists

The portable form walks the table in chunks with a running maximum and sum (the online softmax of
Milakov & Gimelshein, 1805.02867), for as many chunks as the longest request of the call has: one
compiled step serves every context length, and a chunk's pages stay in the CPU's cache.

Legend: B requests, T query tokens each, W pages of a block table, P pages, S tokens a page, N query
heads, G key/value heads, R = N / G, K head width, C tokens of a chunk.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_TOKENS = 128
"""Tokens looked at in one turn of the loop."""


def attend_pages(
    q: Float[Array, "B T N K"],
    keys: Float[Array, "P S G K"],
    values: Float[Array, "P S G K"],
    tables: Int[Array, "B W"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T N K"]:
    """Each query sees the positions up to its own.

    Args:
        tables: page numbers; entries past a request's last page may be anything.
        positions: int32 [B, T], where each query stands.

    Returns:
        [B, T, N, K] in the dtype of `q`; softmax in float32.
    """
    batch, steps, heads, width = q.shape
    page_size, groups = keys.shape[1:3]
    pages = max(1, min(CHUNK_TOKENS // page_size, tables.shape[1]))
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages)))
    length = pages * page_size
    split = (q * (1 / math.sqrt(width))).reshape(batch, steps, groups, heads // groups, width)
    offsets = jnp.arange(length, dtype=positions.dtype)

    def turn(chunk: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        highest, total, output = carry
        index = jax.lax.dynamic_slice_in_dim(tables, chunk * pages, pages, axis=1)
        k = keys.at[index].get(mode="clip").reshape(batch, length, groups, width)
        v = values.at[index].get(mode="clip").reshape(batch, length, groups, width)
        scores = jnp.einsum("btgrk,bsgk->bgrts", split, k, preferred_element_type=jnp.float32)
        seen = (chunk * length + offsets)[None, None, :] <= positions[:, :, None]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        # The first chunk holds position 0, which every query sees: no row is ever all -inf.
        raised = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - raised)
        fade = jnp.exp(highest - raised)
        total = total * fade + weights.sum(axis=-1, keepdims=True)
        fresh = jnp.einsum(
            "bgrts,bsgk->bgrtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return raised, total, output * fade + fresh

    rows = (batch, groups, heads // groups, steps)
    start = (
        jnp.full((*rows, 1), -jnp.inf, jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
        jnp.zeros((*rows, width), jnp.float32),
    )
    turns = jnp.max(positions) // length + 1
    _, total, output = jax.lax.fori_loop(0, turns, turn, start)
    joined = (output / total).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return joined.astype(q.dtype)
