"""The decoder's forward passes over a paged key-value cache: pure functions for `jax.jit`.

Each layer keeps its keys and values in a pool [P, S, G, K] of P pages; a request's block table
lists its pages in order, so position p lies in page `table[p // S]` at offset `p % S`. Pools come
in and go out of every pass, so that a caller who donates them has pages written in place. Rows that
pad a bucket carry page P, one past the end: their writes are dropped.

Layers are unrolled over separate arrays: a scan over stacked weights would copy each layer's slice
before use on CPU, and a stacked cache could not be handed to attention kernels without a copy.

Legend: B requests, T tokens of a prompt piece, W pages of a block table, P pages, S tokens a page,
D width, N query heads, G key/value heads, K head width, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys.layered import Parameters, PyTree
from jaxsys.model import LlamaConfig, bind_block, bind_edge
from jaxsys.serve.paged_attention import attend_pages


class LayerCache(NamedTuple):
    """One layer's keys and values, each [P, S, G, K]."""

    keys: jax.Array
    values: jax.Array


Cache = tuple[LayerCache, ...]


class ServingParameters(NamedTuple):
    """Weights as the passes take them: one pytree a layer."""

    edge: PyTree
    layers: tuple[PyTree, ...]


def split_layers(parameters: Parameters) -> ServingParameters:
    """Takes stacked blocks [L, ...] apart; the edge is kept as it is."""
    leaves, tree = jax.tree.flatten(parameters["blocks"])
    count = leaves[0].shape[0]
    layers = tuple(tree.unflatten([leaf[index] for leaf in leaves]) for index in range(count))
    return ServingParameters(parameters["edge"], layers)


def empty_cache(
    config: LlamaConfig,
    page_count: int,
    page_size: int,
    dtype: jnp.dtype,
    placement: jax.sharding.Sharding,
) -> Cache:
    """Pools of zeros, each laid out by `placement`."""
    shape = (page_count, page_size, config.num_kv_heads, config.head_dim)

    def pool() -> jax.Array:
        return jnp.zeros(shape, dtype, device=placement)

    return tuple(LayerCache(pool(), pool()) for _ in range(config.num_layers))


def decode_pass(
    config: LlamaConfig,
    parameters: ServingParameters,
    cache: Cache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    tables: Int[Array, "B W"],
) -> tuple[Float[Array, "B V"], Cache]:
    """One token for each of B requests.

    Args:
        tokens: the last token of each, whose keys and values are written at `positions`.
        tables: block tables; pages beyond `positions` are never read.

    Returns:
        float32 logits [B, V] of the next token and the cache.
    """
    page_size = cache[0].keys.shape[1]
    edge = bind_edge(config, parameters.edge)
    x = edge.embed(tokens[:, None])
    pages = jnp.take_along_axis(tables, (positions // page_size)[:, None], axis=1)[:, 0]
    offsets = positions % page_size
    written = []
    for layer, (keys, values) in zip(parameters.layers, cache, strict=True):
        block = bind_block(config, layer)
        q, k, v = block.attention.project(block.attention_norm(x), positions[:, None])
        keys = keys.at[pages, offsets].set(k[:, 0], mode="drop")
        values = values.at[pages, offsets].set(v[:, 0], mode="drop")
        written.append(LayerCache(keys, values))
        o = attend_pages(q, keys, values, tables, positions[:, None])
        x = x + block.attention.output(o)
        x = x + block.mlp(block.mlp_norm(x))
    return edge.logits(x)[:, 0], tuple(written)


def prefill_pass(
    config: LlamaConfig,
    parameters: ServingParameters,
    cache: Cache,
    tokens: Int[Array, " T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    table: Int[Array, " W"],
) -> tuple[Float[Array, "1 V"], Cache]:
    """A piece of one request's prompt.

    Args:
        tokens: the piece, padded to T.
        start: position of its first token; the positions before are in the cache.
        length: tokens of the piece that count.
        table: the request's block table, long enough for `start + length` tokens.

    Returns:
        float32 logits [1, V] after the piece's last token and the cache.
    """
    page_count, page_size = cache[0].keys.shape[:2]
    edge = bind_edge(config, parameters.edge)
    x = edge.embed(tokens[None])
    steps = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    positions = start + steps
    pages = table.at[positions // page_size].get(mode="fill", fill_value=page_count)
    pages = jnp.where(steps < length, pages, page_count)
    offsets = positions % page_size
    written = []
    for layer, (keys, values) in zip(parameters.layers, cache, strict=True):
        block = bind_block(config, layer)
        q, k, v = block.attention.project(block.attention_norm(x), positions[None])
        keys = keys.at[pages, offsets].set(k[0], mode="drop")
        values = values.at[pages, offsets].set(v[0], mode="drop")
        written.append(LayerCache(keys, values))
        o = attend_pages(q, keys, values, table[None], positions[None])
        x = x + block.attention.output(o)
        x = x + block.mlp(block.mlp_norm(x))
    last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)
    return edge.logits(last)[:, 0], tuple(written)


def copy_pages(cache: Cache, sources: Int[Array, " C"], targets: Int[Array, " C"]) -> Cache:
    """Copies pages within the cache; a target past the end copies nothing."""
    return jax.tree.map(lambda pool: pool.at[targets].set(pool[sources], mode="drop"), cache)


def extract_pages(cache: Cache, pages: Int[Array, " W"]) -> Cache:
    """The contents of `pages`, [W, S, G, K] a layer, as they go to another instance."""
    return jax.tree.map(lambda pool: pool[pages], cache)


def insert_pages(cache: Cache, contents: Cache, pages: Int[Array, " W"]) -> Cache:
    """Writes extracted contents into `pages`; those past the end are dropped."""
    return jax.tree.map(
        lambda pool, content: pool.at[pages].set(content, mode="drop"), cache, contents
    )
