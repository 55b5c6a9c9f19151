"""The decoder's forward passes over a paged key-value cache: pure functions for `jax.jit`.

Each layer keeps its keys and values in a pool [P, S, G, K] of P pages, or its latent vectors and
their turning key in one [P, S, 1, C + R], in the weights' dtype or of one byte with a scale a token
and head. Layers that keep the same tokens are a group and share tables of pages; pools are shared
by groups, a layer of each (`cache_groups`). A request's block table, one a group, lists its pages
in order, so position p lies in page `table[p // S]` at offset `p % S`. Pools come in and go out of
every pass, so that a caller who donates them has pages written in place. Rows that pad a bucket
carry page P, one past the end: their writes are dropped.

The mathematics are those of `jaxsys.model.block`, over the fused weights of `weights`. Layers are
unrolled over separate arrays: a scan over stacked weights would copy each layer's slice before use
on CPU, and a stacked cache could not be handed to attention kernels without a copy.

Legend: B requests, T tokens of a prompt piece, W pages of a block table, P pages, S tokens a page,
D width, G key/value heads, R query heads for each, K head width, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxsys import float8
from jaxsys.model import BoundBlock, DecoderConfig
from jaxsys.model.block import Turn, attention_scale, norm, turn
from jaxsys.model.contract import layer_cache
from jaxsys.model.decoder import finish_logits
from jaxsys.serve import page_writes
from jaxsys.serve.cache_groups import cache_groups
from jaxsys.serve.lora import Adapted
from jaxsys.serve.paged_attention import AttentionKernels, Rule, Scales
from jaxsys.serve.prompt_scores import Scores, score
from jaxsys.serve.weights import HeldFused, LayerWeights, ServingWeights, matmul

CacheForm = Literal["int8", "fp8"]

CACHE_FORMS: tuple[CacheForm, ...] = get_args(CacheForm)

_KEPT = {"int8": jnp.int8, "fp8": float8.E4M3}


class LayerPages(NamedTuple):
    """One layer's keys and values, each [P, S, G, K]; or its latent vectors and key as `keys`.

    Scales [P, S, G] where they are in a small form.
    """

    keys: jax.Array
    values: jax.Array | None = None
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @property
    def scales(self) -> Scales:
        """Those of keys and of values, if there are any."""
        return None if self.key_scales is None else (self.key_scales, self.value_scales)

    @property
    def pools(self) -> Iterator[tuple[jax.Array, jax.Array | None]]:
        """Each pool and its scales."""
        yield self.keys, self.key_scales
        if self.values is not None:
            yield self.values, self.value_scales

    def written(
        self,
        pages: jax.Array,
        offsets: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        *,
        by_kernel: bool = False,
    ) -> "LayerPages":
        """With k and v [..., G, K] at their places [...]; those past the last page are dropped.

        Args:
            by_kernel: whether `page_writes` does it, for GPUs.
        """
        if by_kernel:
            many = [x.reshape(-1, *x.shape[-2:]) for x in (k, v) if x is not None]
            places = pages.reshape(-1), offsets.reshape(-1)
            return _layer_cache(page_writes.write(list(self.pools), many, *places))
        found = []
        for (pool, scales), fresh in zip(self.pools, (k, v), strict=False):
            assert fresh is not None
            if scales is not None:
                fresh, scale = float8.scaled(fresh, pool.dtype, axis=-1)
                scales = scales.at[pages, offsets].set(scale[..., 0], mode="drop")
            found.append((pool.at[pages, offsets].set(fresh, mode="drop"), scales))
        return _layer_cache(found)


def _layer_cache(pools: Sequence[tuple[jax.Array, jax.Array | None]]) -> LayerPages:
    values, of_values = pools[1] if len(pools) > 1 else (None, None)
    return LayerPages(pools[0][0], values, pools[0][1], of_values)


Cache = tuple[LayerPages, ...]

Contents = Float[Array, "N W S G K"]
"""What some pages hold: each pool of each layer in turn, N = 2 * layers, or layers where latent.
One array: to send and receive N of them keeps the host from its next steps for longer than the data
takes. Small forms go as bytes, each head's scale in the four behind it: [N, W, S, G, K + 4]."""

_SCALE_BYTES = 4


def number_bytes(config: DecoderConfig, dtype: DTypeLike, form: CacheForm | None = None) -> float:
    """Bytes that a number of the cache takes, its part of a scale included."""
    if form is None:
        return float(jnp.dtype(dtype).itemsize)
    return 1.0 + _SCALE_BYTES / layer_cache(config, config.kinds[0]).shapes[0][-1]


def empty_cache(
    config: DecoderConfig,
    page_count: int,
    page_size: int,
    dtype: jnp.dtype,
    placement: jax.sharding.Sharding,
    form: CacheForm | None = None,
) -> Cache:
    """Pools of zeros, each laid out by `placement`; of `dtype` without a form."""

    def pools() -> LayerPages:
        found: list[tuple[jax.Array, jax.Array | None]] = []
        for shape in layer_cache(config, config.kinds[0]).shapes:
            size = (page_count, page_size, *shape)
            kept = dtype if form is None else _KEPT[form]
            scales = None
            if form is not None:
                scales = jnp.zeros(size[:-1], jnp.float32, device=placement)
            found.append((jnp.zeros(size, kept, device=placement), scales))
        return _layer_cache(found)

    return tuple(pools() for _ in range(cache_groups(config).depth))


def contents_shape(cache: Cache, width: int) -> jax.ShapeDtypeStruct:
    """Of `width` extracted pages; where they lie is not said."""
    pool = cache[0].keys
    count = sum(1 for layer in cache for _ in layer.pools)
    lead, head = (count, width, *pool.shape[1:3]), pool.shape[3]
    if cache[0].scales is None:
        return jax.ShapeDtypeStruct((*lead, head), pool.dtype)
    return jax.ShapeDtypeStruct((*lead, head + _SCALE_BYTES), jnp.uint8)


def decode_pass(
    config: DecoderConfig,
    kernels: AttentionKernels,
    weights: ServingWeights,
    cache: Cache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    tables: Int[Array, "B W"],
    adapted: Adapted | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """One token for each of B requests.

    Args:
        tokens: the last token of each, whose keys and values are written at `positions`.
        tables: block tables [B, W], those of several groups of layers one behind the other; pages
            beyond `positions`, or before what a window shows, are never read.
        adapted: which request has which adapter; None where nobody has one.

    Returns:
        float32 logits [B, V] of the next token and the cache.
    """
    page_size = cache[0].keys.shape[1]
    x = _embed(config, weights, tokens[:, None])
    turns = _turns(config, positions[:, None])
    groups = cache_groups(config)
    by_group = jnp.split(tables, len(groups.windows), axis=1)
    blocks = (positions // page_size)[:, None]
    pages = [jnp.take_along_axis(own, blocks, axis=1)[:, 0] for own in by_group]
    offsets = positions % page_size
    pools = list(cache)
    for index, layer in enumerate(weights.layers):
        block, rule, sinks = _bound(config, kernels, index, layer, adapted)
        group, place = groups.places[index]
        where = pages[group][:, None], offsets[:, None]
        q, pool = _project_into(kernels, block, x, turns[block.kind.name], pools[place], *where)
        pools[place] = pool
        o = kernels.decode(
            q[:, 0], pool.keys, pool.values, by_group[group], positions, rule, sinks, pool.scales
        )
        x = block.finish(x, block.read_kept(o[:, None]))[0]
    return _logits(config, weights, x)[:, 0], tuple(pools)


def several_pass(
    config: DecoderConfig,
    kernels: AttentionKernels,
    weights: ServingWeights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    tables: Int[Array, "B W"],
) -> tuple[Float[Array, "B T V"], Cache]:
    """`decode_pass` for the last token of each of B requests and some that may follow it.

    Args:
        starts: positions of the first of them.
        counts: how many of T count, 1 at least; what the others yield is nothing.

    Returns:
        float32 logits [B, T, V] behind each token and the cache.
    """
    page_count, page_size = cache[0].keys.shape[:2]
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    # Those that do not count stand at the last that does: behind it pages may hold anything.
    positions = starts[:, None] + jnp.minimum(steps, counts[:, None] - 1)
    x = _embed(config, weights, tokens)
    turns = _turns(config, positions)
    groups = cache_groups(config)
    by_group = jnp.split(tables, len(groups.windows), axis=1)

    def pages_of(own: jax.Array) -> jax.Array:
        found = jnp.take_along_axis(own, positions // page_size, axis=1)
        return jnp.where(steps < counts[:, None], found, page_count)

    pages = [pages_of(own) for own in by_group]
    offsets = positions % page_size
    pools = list(cache)
    for index, layer in enumerate(weights.layers):
        block, rule, sinks = _bound(config, kernels, index, layer, None)
        group, place = groups.places[index]
        where = pages[group], offsets
        q, pool = _project_into(kernels, block, x, turns[block.kind.name], pools[place], *where)
        pools[place] = pool
        of_pages = (pool.keys, pool.values, by_group[group], positions)
        o = kernels.several(q, *of_pages, rule, sinks, pool.scales)
        x = block.finish(x, block.read_kept(o))[0]
    return _logits(config, weights, x), tuple(pools)


def prefill_pass(
    config: DecoderConfig,
    kernels: AttentionKernels,
    continued: bool,
    weights: ServingWeights,
    cache: Cache,
    tokens: Int[Array, " T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    table: Int[Array, " W"],
    adapted: Adapted | None = None,
) -> tuple[Float[Array, "1 V"], Cache]:
    """A piece of one request's prompt.

    Args:
        continued: static: whether `start` may be over 0.
        tokens: the piece, padded to T.
        start: position of its first token; the positions before are in the cache.
        length: tokens of the piece that count.
        table: the request's block table, long enough for `start + length` tokens; those of several
            groups of layers one behind the other.
        adapted: the request's adapter, in its one row; None where it has none.

    Returns:
        float32 logits [1, V] after the piece's last token and the cache.
    """
    piece = (tokens, start, length, table, adapted)
    x, cache = _piece(config, kernels, continued, weights, cache, *piece)
    last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)
    return _logits(config, weights, last)[:, 0], cache


def score_pass(
    config: DecoderConfig,
    kernels: AttentionKernels,
    continued: bool,
    weights: ServingWeights,
    cache: Cache,
    tokens: Int[Array, " T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    table: Int[Array, " W"],
    following: Int[Array, " T"],
    adapted: Adapted | None = None,
) -> tuple[Float[Array, "1 V"], Cache, Scores]:
    """`prefill_pass` that says how likely the token `following` each of `tokens` is, too."""
    piece = (tokens, start, length, table, adapted)
    x, cache = _piece(config, kernels, continued, weights, cache, *piece)
    last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)
    scores = score(functools.partial(_logits, config, weights), x[0], following)
    return _logits(config, weights, last)[:, 0], cache, scores


def pool_pass(
    config: DecoderConfig,
    kernels: AttentionKernels,
    continued: bool,
    weights: ServingWeights,
    cache: Cache,
    tokens: Int[Array, " T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    table: Int[Array, " W"],
    adapted: Adapted | None = None,
) -> tuple[Float[Array, "1 V"], Cache, Float[Array, "2 D"]]:
    """`prefill_pass` that gives the sum and the last of the hidden states behind the final norm."""
    piece = (tokens, start, length, table, adapted)
    x, cache = _piece(config, kernels, continued, weights, cache, *piece)
    last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)
    hidden = norm(config, x, weights.norm, weights.norm_bias)[0].astype(jnp.float32)
    counted = (jnp.arange(hidden.shape[0]) < length)[:, None]
    total = jnp.sum(jnp.where(counted, hidden, 0), axis=0)
    return _logits(config, weights, last)[:, 0], cache, jnp.stack([total, hidden[length - 1]])


def _piece(
    config: DecoderConfig,
    kernels: AttentionKernels,
    continued: bool,
    weights: ServingWeights,
    cache: Cache,
    tokens: Int[Array, " T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    table: Int[Array, " W"],
    adapted: Adapted | None = None,
) -> tuple[Float[Array, "1 T D"], Cache]:
    """A piece through all blocks: the residual behind the last, and the cache."""
    page_count, page_size = cache[0].keys.shape[:2]
    x = _embed(config, weights, tokens[None])
    steps = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    positions = start + steps
    turns = _turns(config, positions[None])
    groups = cache_groups(config)
    by_group = jnp.split(table, len(groups.windows))

    def pages_of(own: jax.Array) -> jax.Array:
        found = own.at[positions // page_size].get(mode="fill", fill_value=page_count)
        return jnp.where(steps < length, found, page_count)

    pages = [pages_of(own) for own in by_group]
    offsets = positions % page_size
    pools = list(cache)
    for index, layer in enumerate(weights.layers):
        block, rule, sinks = _bound(config, kernels, index, layer, adapted)
        group, place = groups.places[index]
        q, k, v = block.project_kept(x, turns[block.kind.name])
        kept = None if v is None else v[0]
        pool = pools[place] = pools[place].written(
            pages[group], offsets, k[0], kept, by_kernel=kernels.writes
        )
        of_pages = (pool.keys, pool.values, by_group[group], start, continued)
        o = kernels.prefill(q, k, v, *of_pages, rule, sinks, pool.scales)
        x = block.finish(x, block.read_kept(o))[0]
    return x, tuple(pools)


def _project_into(
    kernels: AttentionKernels,
    block: BoundBlock,
    x: Float[Array, "B T D"],
    turn: Turn,
    pool: LayerPages,
    pages: Int[Array, "B T"],
    offsets: Int[Array, "B T"],
) -> tuple[jax.Array, LayerPages]:
    """Queries [B, T, G, R, K] as attention over pages takes them, and their layer's pages with what
    a cache keeps of each token."""
    if not kernels.writes or turn is None or not block.turns_last:
        q, k, v = block.project_kept(x, turn)
        return q, pool.written(pages, offsets, k, v, by_kernel=kernels.writes)
    q, k, v = block.project(x, None)
    fused = jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)
    tokens = pages.size
    cosines, sines = (table.reshape(tokens, -1) for table in turn)
    held, turned = page_writes.turn_and_write(
        list(pool.pools),
        fused.reshape(tokens, *fused.shape[2:]),
        cosines,
        sines,
        pages.reshape(-1),
        offsets.reshape(-1),
        interleaved=block.config.rope_interleaved,
    )
    return turned.reshape(q.shape), _layer_cache(held)


def copy_pages(cache: Cache, sources: Int[Array, " C"], targets: Int[Array, " C"]) -> Cache:
    """Copies pages within the cache; a target past the end copies nothing."""
    return jax.tree.map(lambda pool: pool.at[targets].set(pool[sources], mode="drop"), cache)


def clear_pages(cache: Cache, pages: Int[Array, " C"]) -> Cache:
    """Writes zeros into `pages`; those past the end are dropped."""
    return jax.tree.map(lambda pool: pool.at[pages].set(0, mode="drop"), cache)


def extract_pages(cache: Cache, pages: Int[Array, " W"]) -> Contents:
    """The contents of `pages` as they go to another instance."""
    return jnp.stack([_as_content(*pool, pages) for layer in cache for pool in layer.pools])


def insert_pages(cache: Cache, contents: Contents, pages: Int[Array, " W"]) -> Cache:
    """Writes extracted contents into `pages`; those past the end are dropped."""
    rest = iter(contents)

    def written(pool: jax.Array, scales: jax.Array | None, content: jax.Array):
        if scales is not None:
            of_heads = jax.lax.bitcast_convert_type(content[..., -_SCALE_BYTES:], scales.dtype)
            scales = scales.at[pages].set(of_heads, mode="drop")
            content = jax.lax.bitcast_convert_type(content[..., :-_SCALE_BYTES], pool.dtype)
        return pool.at[pages].set(content, mode="drop"), scales

    return tuple(
        _layer_cache([written(*pool, next(rest)) for pool in layer.pools]) for layer in cache
    )


def _as_content(pool: jax.Array, scales: jax.Array | None, pages: jax.Array) -> jax.Array:
    if scales is None:
        return pool[pages]
    parts = (jax.lax.bitcast_convert_type(p[pages], jnp.uint8) for p in (pool, scales))
    return jnp.concatenate(list(parts), axis=-1)


def _embed(
    config: DecoderConfig, weights: ServingWeights, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    x = weights.embedding[tokens]
    return x if config.embedding_scale == 1.0 else x * config.embedding_scale


def _turns(config: DecoderConfig, positions: Int[Array, "B T"]) -> dict[str, Turn]:
    """Rotary tables by kind of layer, within the positions that a model was trained on: a server
    refuses longer requests where frequencies would change with their length."""
    return {kind.name: turn(config, kind, positions, length=1) for kind in config.kinds}


def _bound(
    config: DecoderConfig,
    kernels: AttentionKernels,
    index: int,
    layer: LayerWeights,
    adapted: Adapted | None,
) -> tuple[BoundBlock, Rule, jax.Array | None]:
    """A layer's mathematics over its weights, and its attention's rule and sinks."""
    own = None if adapted is None else adapted.layer(index)
    block = BoundBlock(config, config.kind(index), HeldFused(config, layer, kernels.grouped, own))
    latent = config.latent
    rule = Rule(
        window=block.kind.window,
        # Latent keys are wider than the heads whose scale it is.
        scale=attention_scale(config) or (config.head_dim**-0.5 if latent else None),
        softcap=config.attention_softcap,
        value_channels=None if latent is None else latent.rank,
    )
    return block, rule, block.held.vector("attention", "sinks")


def _logits(
    config: DecoderConfig, weights: ServingWeights, x: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """float32 logits of the residual, the final norm included."""
    x = norm(config, x, weights.norm, weights.norm_bias)
    if weights.head is not None:
        return finish_logits(config, matmul(x, weights.head, dtype=jnp.dtype(jnp.float32)))
    table = weights.embedding
    product = jax.lax.dot_general(
        x, table, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return finish_logits(config, product)
