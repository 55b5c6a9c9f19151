"""Attention of some queries over some keys, and what merges such parts: plain JAX, in blocks.

    s = cap tanh(q k^T scale / cap);  lse = log sum_visible exp(s);  o = sum_visible exp(s - lse) v

`forward` gives o and lse; `backward` takes the o and lse of *all* keys a query sees and gives these
keys' part of dq, dk and dv, as FlashAttention's does (Dao, 2307.08691): so parts of a sequence that
are never together in one place make one exact softmax. Scores are formed a block at a time, and
blocks in which nothing is visible are passed over. lse is float32 whatever the dtype of q; a query
that sees nothing has o = 0 and lse = -inf, and weighs nothing when parts are merged.

Legend: B batch, T query tokens, S key tokens, N query heads, G key/value heads, K head width, V
width of values.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 512
"""Tokens of a block of queries, and of one of keys: the most whose scores are there at once."""
FAR = jnp.iinfo(jnp.int32).max
"""The position of a key that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What is made of q k^T."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    """Keys that a query sees, its own the last of them; None: all up to its own."""


class Seen(NamedTuple):
    """What decides which keys a query sees: keys at positions up to its own, within the window, of
    its own segment."""

    query_positions: Int[Array, " T"]
    key_positions: Int[Array, " S"]
    query_segments: Int[Array, "B T"] | None = None
    """Numbers of the documents packed into a row; None: all of a row is one."""
    key_segments: Int[Array, "B S"] | None = None


Part = tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]
"""o, and lse in float32."""


def everything(queries: int, keys: int) -> Seen:
    """Every key is seen."""
    return Seen(jnp.zeros(queries, jnp.int32), jnp.zeros(keys, jnp.int32))


def causal(tokens: int) -> Seen:
    """Keys up to the query's own place."""
    places = jnp.arange(tokens, dtype=jnp.int32)
    return Seen(places, places)


def forward(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    seen: Seen,
    scores: Scores,
) -> Part:
    """o [B, T, N, V] float32 and lse [B, N, T] float32, over the keys given."""
    rows, tokens, heads = q.shape[:3]
    groups = k.shape[2]
    queries, keys = _queries(q, seen, groups), _keys(k, v, seen)

    def of_queries(query: _Queries) -> Part:
        shape = (rows, groups, heads // groups, query.q.shape[1])
        nothing = (
            jnp.zeros((*shape, v.shape[-1]), jnp.float32),
            jnp.full(shape, -jnp.inf, jnp.float32),
            jnp.zeros(shape, jnp.float32),
        )

        def visit(found: Any, key: _Keys) -> tuple[Any, None]:
            def add() -> Any:
                total, top, mass = found
                s, visible = _scores(query, key, scores)
                s = jnp.where(visible, s, -jnp.inf)
                new = jnp.maximum(top, jnp.max(s, axis=-1))
                safe = jnp.where(jnp.isfinite(new), new, 0.0)
                weights = jnp.exp(s - safe[..., None])
                kept = jnp.exp(top - safe)
                added = jnp.einsum(
                    "bgrts,bsgv->bgrtv",
                    weights.astype(v.dtype),
                    key.v,
                    preferred_element_type=jnp.float32,
                )
                mass = mass * kept + jnp.sum(weights, axis=-1)
                return total * kept[..., None] + added, new, mass

            return lax.cond(_any_visible(query, key, scores), add, lambda: found), None

        (total, top, mass), _ = lax.scan(visit, nothing, keys)
        lse = jnp.where(mass > 0, top + jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)
        out = total / jnp.where(mass > 0, mass, 1.0)[..., None]
        return jnp.moveaxis(out, 3, 1).reshape(rows, -1, heads, v.shape[-1]), lse.reshape(
            rows, heads, -1
        )

    out, lse = lax.map(of_queries, queries)
    out = jnp.moveaxis(out, 0, 1).reshape(rows, -1, heads, v.shape[-1])[:, :tokens]
    lse = jnp.moveaxis(lse, 0, 2).reshape(rows, heads, -1)[..., :tokens]
    return out, lse


def backward(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    out: Float[Array, "B T N V"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N V"],
    seen: Seen,
    scores: Scores,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The part of dq, dk and dv, float32, that the keys given have; `out` and `lse` are of all."""
    rows, tokens, heads = q.shape[:3]
    groups, length = k.shape[2], k.shape[1]
    wide = d_out.astype(jnp.float32)
    inner = jnp.sum(wide * out.astype(jnp.float32), axis=-1)  # [B, T, N]
    queries, keys = _queries(q, seen, groups), _keys(k, v, seen)
    block = queries.q.shape[2]
    d_outs = _cut(d_out, 1, block)
    inners = _cut(inner, 1, block)
    lses = _cut(jnp.swapaxes(lse, 1, 2), 1, block, fill=-jnp.inf)
    none = (jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32))

    def grouped(x: jax.Array) -> jax.Array:
        """[B, t, N, ...] -> [B, G, N / G, t, ...]."""
        split = x.reshape(*x.shape[:2], groups, heads // groups, *x.shape[3:])
        return jnp.moveaxis(split, 1, 3)

    def of_queries(sums: Any, item: Any) -> tuple[Any, jax.Array]:
        query, d_o, d_inner, norm = item
        d_o, d_inner, norm = grouped(d_o), grouped(d_inner), grouped(norm)
        safe = jnp.where(jnp.isfinite(norm), norm, 0.0)

        def visit(dq: jax.Array, key: _Keys) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            def add() -> Any:
                s, visible = _scores(query, key, scores)
                weights = jnp.where(visible, jnp.exp(s - safe[..., None]), 0.0)
                d_weights = jnp.einsum(
                    "bgrtv,bsgv->bgrts", d_o, key.v, preferred_element_type=jnp.float32
                )
                ds = weights * (d_weights - d_inner[..., None])
                if scores.softcap is not None:
                    ds = ds * (1.0 - jnp.square(s / scores.softcap))
                ds = jnp.where(visible, ds * scores.scale, 0.0).astype(q.dtype)
                low = weights.astype(d_out.dtype)
                more = jnp.einsum(
                    "bgrts,bsgk->btgrk", ds, key.k, preferred_element_type=jnp.float32
                )
                dk = jnp.einsum(
                    "bgrts,btgrk->bsgk", ds, query.q, preferred_element_type=jnp.float32
                )
                dv = jnp.einsum("bgrts,bgrtv->bsgv", low, d_o, preferred_element_type=jnp.float32)
                return dq + more, (dk, dv)

            def skip() -> Any:
                zero = (jnp.zeros(part.shape, jnp.float32) for part in (key.k, key.v))
                return dq, tuple(zero)

            return lax.cond(_any_visible(query, key, scores), add, skip)

        dq, found = lax.scan(visit, jnp.zeros(query.q.shape, jnp.float32), keys)
        return jax.tree.map(jnp.add, sums, found), dq

    (dk, dv), dq = lax.scan(of_queries, none, (queries, d_outs, inners, lses))
    dq = jnp.moveaxis(dq, 0, 1).reshape(rows, -1, heads, q.shape[-1])[:, :tokens]
    dk, dv = (
        jnp.moveaxis(part, 0, 1).reshape(rows, -1, groups, part.shape[-1])[:, :length]
        for part in (dk, dv)
    )
    return dq, dk, dv


def merge(*parts: Part) -> Part:
    """The softmax over the keys of all parts, from each part's own; float32."""
    outs, lses = zip(*parts, strict=True)
    top = jnp.max(jnp.stack(lses), axis=0)
    safe = jnp.where(jnp.isfinite(top), top, 0.0)
    masses = [jnp.exp(lse - safe) for lse in lses]
    total = sum(masses[1:], masses[0])
    there = total > 0
    out = sum(
        jnp.swapaxes(mass / jnp.where(there, total, 1.0), 1, 2)[..., None] * o.astype(jnp.float32)
        for mass, o in zip(masses, outs, strict=True)
    )
    return jnp.asarray(out), jnp.where(
        there, safe + jnp.log(jnp.where(there, total, 1.0)), -jnp.inf
    )


class _Queries(NamedTuple):
    q: jax.Array  # [B, t, G, N / G, K]
    positions: jax.Array
    segments: jax.Array | None


class _Keys(NamedTuple):
    k: jax.Array  # [B, s, G, K]
    v: jax.Array
    positions: jax.Array
    segments: jax.Array | None


def _cut(x: jax.Array, axis: int, block: int, fill: float = 0) -> jax.Array:
    """Blocks along an axis, leading; what is lacking in the last one is filled."""
    spare = -x.shape[axis] % block
    if spare:
        width = [(0, spare if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, width, constant_values=fill)
    split = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 0)


def _queries(q: jax.Array, seen: Seen, groups: int) -> _Queries:
    block = min(BLOCK, q.shape[1])
    split = q.reshape(*q.shape[:2], groups, -1, q.shape[-1])
    segments = seen.query_segments
    return _Queries(
        _cut(split, 1, block),
        _cut(seen.query_positions, 0, block, fill=-1),
        None if segments is None else _cut(segments, 1, block, fill=-1),
    )


def _keys(k: jax.Array, v: jax.Array, seen: Seen) -> _Keys:
    block = min(BLOCK, k.shape[1])
    segments = seen.key_segments
    return _Keys(
        _cut(k, 1, block),
        _cut(v, 1, block),
        _cut(seen.key_positions, 0, block, fill=FAR),
        None if segments is None else _cut(segments, 1, block, fill=-2),
    )


def _any_visible(query: _Queries, key: _Keys, scores: Scores) -> jax.Array:
    first = jnp.min(key.positions)
    seen = first <= jnp.max(query.positions)
    if scores.window is not None:
        last = jnp.max(jnp.where(key.positions == FAR, -1, key.positions))
        seen &= last > jnp.min(jnp.where(query.positions < 0, FAR, query.positions)) - scores.window
    return seen


def _scores(query: _Queries, key: _Keys, scores: Scores) -> tuple[jax.Array, jax.Array]:
    """Scores [B, G, N / G, t, s], float32, and which are seen, [B or 1, 1, 1, t, s]."""
    s = jnp.einsum("btgrk,bsgk->bgrts", query.q, key.k, preferred_element_type=jnp.float32)
    s = s * scores.scale
    if scores.softcap is not None:
        s = scores.softcap * jnp.tanh(s / scores.softcap)
    rows, columns = query.positions[:, None], key.positions[None, :]
    visible = columns <= rows
    if scores.window is not None:
        visible &= columns > rows - scores.window
    visible = visible[None]
    if query.segments is not None and key.segments is not None:
        visible &= query.segments[:, :, None] == key.segments[:, None, :]
    return s, visible[:, None, None]
