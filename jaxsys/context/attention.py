"""Causal attention over a sequence that lies on many devices: rings, gathers, exchanged heads.

Each device holds queries, keys and values of its two pieces (`jaxsys.context.split`). Its own come
first, one causal product. Then the others' come one after another: of those of an earlier device
all queries see the early piece and none the late one; of those of a later device the late queries
see both pieces and the early ones neither. So a visit is two whole products of pieces without a
mask, the same for every device, and what differs is picked beforehand. Parts are merged in float32
by their log-sum-exp.

The backward pass is this module's own: it takes the output and the log-sum-exp of the whole
softmax, computes each visit's scores again, and what it finds for keys and values travels on with
them and arrives at home a hop after the last visit. A device holds O(T / P) whatever the way, but
for a gather, whose keys and values are there all at once.

Where a window or segments are given, what a query sees is decided by positions, block by block, and
blocks that nobody sees cost nothing.

Legend: B batch, T tokens of the whole sequence, t = T / P of this device, N query heads, G
key/value heads, K head width, V width of values, P devices, U of them exchange heads, R = P / U
groups.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from . import blocks, fused
from .blocks import Part, Scores, Seen, merge
from .split import ContextSplit

KEPT = "context_attention"
"""The name, for `jax.checkpoint` policies, of what the backward pass wants of the forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What is known while tracing."""

    split: ContextSplit
    scores: Scores
    fused: bool
    """Whether cuDNN's kernels compute the products."""
    shapes: bool = False
    """Whether these are traced for their shapes alone."""

    @property
    def by_position(self) -> bool:
        """Whether parts of pieces may be seen."""
        return self.scores.window is not None


def attend_over(
    q: Float[Array, "B t N K"],
    k: Float[Array, "B t G K"],
    v: Float[Array, "B t G V"],
    *,
    split: ContextSplit,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    segments: Int[Array, "B t"] | None = None,
    use_fused: bool = False,
    shapes: bool = False,
) -> Float[Array, "B t N V"]:
    """Causal self-attention of whole sequences; inside a `shard_map` over the split's axis.

    Args:
        q: this device's queries, its early and its late piece.
        k: its keys.
        v: its values.
        split: how the sequence lies, and what travels.
        scale: of the scores, in place of 1 / sqrt(K).
        window: keys that a query sees, its own the last of them.
        softcap: c, scores become c tanh(scores / c).
        sinks: a score of each head that takes part in its softmax and adds nothing.
        segments: int32, the number of each token's document in its row; a query sees keys of its
            own alone.
        use_fused: whether cuDNN may compute what it can. It takes no segments and no softcap, and
            a window where all heads are exchanged.
        shapes: trace its shapes only, on a machine that may have none.

    Returns:
        This device's rows of the output, in the dtype of q.

    Raises:
        UsageError: if the tokens cannot be halved, or the heads not exchanged.
    """
    tokens = q.shape[1]
    if tokens % 2:
        split.check_length(tokens * split.parts)
    split.check_heads(q.shape[2], k.shape[2])
    length = tokens * split.parts
    if window is not None and window >= length:
        window = None  # it cuts nothing off
    width = v.shape[-1]
    exchanged = split.exchanging > 1
    if exchanged:
        q, k, v, sinks = _exchanged_heads(split, q, k, v, sinks)
        if segments is not None:
            segments = _exchange_rows(split, segments)
    plain = softcap is None and segments is None and q.shape[-1] >= width
    kernel = use_fused and split.fused and plain and (window is None or split.groups == 1)
    if kernel and width < q.shape[-1]:  # cuDNN wants one width: what zeros add is cut off again
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - width)))
    how = _How(
        split=split,
        scores=Scores(
            scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
            softcap=softcap,
            window=window,
        ),
        fused=kernel,
        shapes=shapes,
    )
    whole: Any = _attention(how, q, k, v, sinks, segments)
    out = whole[..., :width]
    return _given_back(split, out) if exchanged else out


# The exchange of heads for sequence.


def _exchanged_heads(
    split: ContextSplit, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """[B, t, heads, K] of all heads -> [B, U t, heads / U, K] of this device's."""
    ways, groups = split.exchanging, k.shape[2]
    if groups % ways:  # fewer heads than devices: each is sent to all that use it
        k, v = (jnp.repeat(x, ways // groups, axis=2) for x in (k, v))
    q, k, v = (_exchange(split, x, heads=2, rows=1) for x in (q, k, v))
    q, k, v = (_in_order(x, ways) for x in (q, k, v))
    if sinks is not None:
        mine = q.shape[2]
        place = split.device() % ways
        sinks = lax.dynamic_slice_in_dim(sinks, place * mine, mine, 0)
    return q, k, v, sinks


def _given_back(split: ContextSplit, out: jax.Array) -> jax.Array:
    """[B, U t, N / U, V] -> [B, t, N, V]."""
    ways = split.exchanging
    shape = out.shape
    apart = out.reshape(shape[0], 2, ways, -1, *shape[2:])
    together = jnp.swapaxes(apart, 1, 2).reshape(shape)
    return _exchange(split, together, heads=1, rows=2)


def _exchange(split: ContextSplit, x: jax.Array, *, heads: int, rows: int) -> jax.Array:
    """Cuts `heads` over the devices that exchange and joins their `rows`."""
    groups = None if split.groups == 1 else split.exchange_groups
    return lax.all_to_all(
        x, split.axis, split_axis=heads, concat_axis=rows, tiled=True, axis_index_groups=groups
    )


def _exchange_rows(split: ContextSplit, segments: jax.Array) -> jax.Array:
    """[B, t] -> [B, U t]."""
    groups = None if split.groups == 1 else split.exchange_groups
    whole = lax.all_gather(segments, split.axis, axis=1, tiled=True, axis_index_groups=groups)
    return _in_order(whole, split.exchanging)


def _in_order(x: jax.Array, ways: int) -> jax.Array:
    """[early 0, late 0, early 1, late 1, ...] along axis 1 -> all early pieces, then all late."""
    apart = x.reshape(x.shape[0], ways, 2, -1, *x.shape[2:])
    return jnp.swapaxes(apart, 1, 2).reshape(x.shape)


# Attention of a ring of groups: each has two pieces, and all of some heads.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    how: _How,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    segments: jax.Array | None,
) -> jax.Array:
    return _forward(how, q, k, v, sinks, segments)[0]


def _forward(
    how: _How,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    segments: jax.Array | None,
) -> tuple[jax.Array, Any]:
    travel = _travel(how, (k, v, segments))
    found = _own_part(how, q, k, v, segments)
    visit = _visit_by_position if _by_position(how, segments) else _visit
    for step in range(1, how.split.groups):
        found = visit(how, step, q, segments, travel.arrive(step), found)
    out, lse = found
    if sinks is not None:
        sink = sinks.astype(jnp.float32)[None, :, None]
        whole = jnp.logaddexp(lse, sink)
        out = out.astype(jnp.float32) * jnp.swapaxes(jnp.exp(lse - whole), 1, 2)[..., None]
        lse = whole
    out = checkpoint_name(out.astype(q.dtype), KEPT)
    lse = checkpoint_name(lse, KEPT)
    return out, (q, k, v, sinks, segments, out, lse)


def _backward(how: _How, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, sinks, segments, out, lse = kept
    if how.split.groups > 1:
        # Where the forward pass is computed again its transfers are these, and XLA would make one
        # of both and hold every device's pieces between them; where keys and values alone are made
        # again it would send them before the rest of the block's backward pass, and hold them.
        q, k, v, d_out = lax.optimization_barrier((q, k, v, d_out))
    travel = _travel(how, (k, v, segments))
    gather = how.split.by == "gather"
    home = _Gathered(how) if gather else _Carried(how)
    dq, dk, dv = _own_gradients(how, q, k, v, segments, out, lse, d_out)
    gradients = _gradients_by_position if _by_position(how, segments) else _gradients
    for step in range(1, how.split.groups):
        piece = travel.arrive(step)
        more, *found = gradients(how, step, q, segments, piece, out, lse, d_out)
        dq = dq + more
        if step == how.split.groups - 1:
            dq = dq.astype(q.dtype)
        # Summed before they travel: what they are sums of would be held beside them.
        dq, found = lax.optimization_barrier((dq, found))
        home.leave(step, found)
    others = home.arrive()
    if others is not None:
        dk, dv = dk + others[0], dv + others[1]
    d_sinks = None
    if sinks is not None:
        inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        mass = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
        d_sinks = -jnp.sum(mass * jnp.swapaxes(inner, 1, 2), axis=(0, 2)).astype(sinks.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None


_attention.defvjp(_forward, _backward)


def _by_position(how: _How, segments: jax.Array | None) -> bool:
    return how.by_position or segments is not None


# What travels.


def _travel(how: _How, piece: Any) -> "_Ring | _All":
    return _All(how, piece) if how.split.by == "gather" else _Ring(how, piece)


class _Ring:
    """Pieces that go round: each is sent on before it is used."""

    def __init__(self, how: _How, piece: Any) -> None:
        self._split, self._last = how.split, how.split.groups - 1
        self._next = piece
        if self._last:
            self._send()

    def arrive(self, step: int) -> Any:
        """The piece of the device `step` before this one; steps count from 1."""
        piece = self._next
        if step < self._last:
            self._send()
        return piece

    def _send(self) -> None:
        split = self._split
        self._next = jax.tree.map(lambda x: lax.ppermute(x, split.axis, split.onward), self._next)


class _All:
    """All devices' pieces, there at once."""

    def __init__(self, how: _How, piece: Any) -> None:
        self._split = how.split
        self._whole = jax.tree.map(lambda x: lax.all_gather(x, how.split.axis), piece)

    def arrive(self, step: int) -> Any:
        """The piece of the device `step` before this one."""
        source = (self._split.device() - step) % self._split.parts
        return jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, source, 0, keepdims=False), self._whole
        )


class _Carried:
    """Gradients that go on with the piece they are of, and come home a hop after its last visit."""

    def __init__(self, how: _How) -> None:
        self._split = how.split
        self._travelling: Any = None

    def leave(self, step: int, found: Any) -> None:
        """Adds what a visit found, and sends the sum on."""
        del step
        if self._travelling is not None:
            found = jax.tree.map(jnp.add, self._travelling, found)
        split = self._split
        self._travelling = jax.tree.map(lambda x: lax.ppermute(x, split.axis, split.onward), found)

    def arrive(self) -> Any:
        """The sums of this device's own piece; None where there was no visit."""
        return self._travelling


class _Gathered:
    """Gradients that are put aside by device, and summed where they belong in one collective."""

    def __init__(self, how: _How) -> None:
        self._split = how.split
        self._sums: Any = None

    def leave(self, step: int, found: Any) -> None:
        """Puts aside what a visit found."""
        split = self._split
        source = (split.device() - step) % split.parts
        if self._sums is None:
            # Zeros that wait for the first: constant ones XLA makes once for all layers, and holds.
            found, zero = lax.optimization_barrier((found, jnp.float32(0)))
            self._sums = [jnp.broadcast_to(zero, (split.parts, *part.shape)) for part in found]
        self._sums = [
            lax.dynamic_update_index_in_dim(sums, part, source, 0)
            for sums, part in zip(self._sums, found, strict=True)
        ]

    def arrive(self) -> Any:
        """The sums of this device's own piece."""
        if self._sums is None:
            return None
        return [lax.psum_scatter(sums, self._split.axis) for sums in self._sums]


# Products of pieces.


def _own_part(
    how: _How, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> Part:
    """A group's own pieces: early ones, then late ones, so plainly causal."""
    if how.fused:
        scores = how.scores
        return fused.forward(
            q, k, v, causal=True, scale=scores.scale, window=scores.window, shapes=how.shapes
        )
    return blocks.forward(q, k, v, _own_seen(how, q.shape[1], segments), how.scores)


def _own_gradients(
    how: _How,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, ...]:
    if how.fused:
        scores = how.scores
        found = fused.backward(
            q,
            k,
            v,
            out,
            lse,
            d_out,
            causal=True,
            scale=scores.scale,
            window=scores.window,
            shapes=how.shapes,
        )
        return tuple(part.astype(jnp.float32) for part in found)
    seen = _own_seen(how, q.shape[1], segments)
    return blocks.backward(q, k, v, out, lse, d_out, seen, how.scores)


def _own_seen(how: _How, tokens: int, segments: jax.Array | None) -> Seen:
    places = _positions(how, how.split.group(), tokens)
    return Seen(places, places, segments, segments)


def _positions(how: _How, group: Any, tokens: int) -> jax.Array:
    """Of the tokens of a group's two pieces, in units of which only order and distance matter."""
    half, groups = tokens // 2, how.split.groups
    within = jnp.arange(half, dtype=jnp.int32)
    return jnp.concatenate([group * half + within, (2 * groups - 1 - group) * half + within])


def _pick(condition: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    return jnp.where(condition, yes, no)


def _halves(x: jax.Array, axis: int = 1) -> tuple[jax.Array, jax.Array]:
    early, late = jnp.split(x, 2, axis=axis)
    return early, late


def _visit(
    how: _How, step: int, q: jax.Array, segments: jax.Array | None, piece: Any, found: Part
) -> Part:
    """Adds the keys of the group `step` before this one, or after it past the ring's end."""
    del segments
    k, v, _ = piece
    earlier = how.split.group() >= step

    def product(q: jax.Array, k: jax.Array, v: jax.Array) -> Part:
        scores = how.scores
        if how.fused:
            return fused.forward(q, k, v, causal=False, scale=scores.scale, shapes=how.shapes)
        return blocks.forward(q, k, v, blocks.everything(q.shape[1], k.shape[1]), scores)

    (_, late), (early_k, _), (early_v, _) = map(_halves, (q, k, v))
    first, given = _then(product(late, early_k, early_v), (q, k, v))
    # The second product is the early queries' or the late ones': it weighs nothing for the others.
    second, second_lse = product(*(_pick(earlier, *_halves(x)) for x in given))
    nothing = jnp.full_like(second_lse, -jnp.inf)
    (early_out, late_out), (early_lse, late_lse) = _halves(found[0]), _halves(found[1], axis=2)
    early_part = merge((early_out, early_lse), (second, _pick(earlier, second_lse, nothing)))
    late_part = merge((late_out, late_lse), first, (second, _pick(earlier, nothing, second_lse)))
    return (
        jnp.concatenate([early_part[0], late_part[0]], axis=1),
        jnp.concatenate([early_part[1], late_part[1]], axis=2),
    )


def _then(found: Any, given: Any) -> tuple[Any, Any]:
    """What one product found, and what the next is given, of which it then makes its halves.

    Halves for both would be there at once otherwise.
    """
    return lax.optimization_barrier((found, given))


def _gradients(
    how: _How,
    step: int,
    q: jax.Array,
    segments: jax.Array | None,
    piece: Any,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, ...]:
    """What the keys of a visit have for dq, and dk and dv of the piece."""
    del segments
    k, v, _ = piece
    earlier = how.split.group() >= step

    def product(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
    ) -> tuple[jax.Array, ...]:
        scores = how.scores
        if how.fused:
            return fused.backward(
                q, k, v, out, lse, d_out, causal=False, scale=scores.scale, shapes=how.shapes
            )
        seen = blocks.everything(q.shape[1], k.shape[1])
        return blocks.backward(q, k, v, out, lse, d_out, seen, scores)

    early, late = zip(*map(_halves, (q, k, v, out, d_out)), strict=True)
    _, late_lse = _halves(lse, axis=2)
    first = product(late[0], early[1], early[2], late[3], late_lse, late[4])
    first, (q, k, v, out, lse, d_out) = _then(first, (q, k, v, out, lse, d_out))
    queries, keys, values, outs, d_outs = (
        _pick(earlier, *_halves(x)) for x in (q, k, v, out, d_out)
    )
    lses = _pick(earlier, *_halves(lse, axis=2))
    second = product(queries, keys, values, outs, lses, d_outs)
    (to_late, *to_early_keys), (to_either, *to_keys) = (
        [x.astype(jnp.float32) for x in found] for found in (first, second)
    )
    zero = jnp.zeros_like(to_either)
    dq = jnp.concatenate(
        [_pick(earlier, to_either, zero), to_late + _pick(earlier, zero, to_either)], axis=1
    )
    sums = []
    for first_sum, second_sum in zip(to_early_keys, to_keys, strict=True):
        zero = jnp.zeros_like(second_sum)
        early = first_sum + _pick(earlier, second_sum, zero)
        sums.append(jnp.concatenate([early, _pick(earlier, zero, second_sum)], axis=1))
    return dq, *sums


def _seen_of_visit(
    how: _How, step: int, tokens: int, segments: jax.Array | None, theirs: jax.Array | None
) -> Seen:
    here = how.split.group()
    there = (here - step) % how.split.groups
    return Seen(_positions(how, here, tokens), _positions(how, there, tokens), segments, theirs)


def _visit_by_position(
    how: _How, step: int, q: jax.Array, segments: jax.Array | None, piece: Any, found: Part
) -> Part:
    k, v, theirs = piece
    seen = _seen_of_visit(how, step, q.shape[1], segments, theirs)
    return merge(found, blocks.forward(q, k, v, seen, how.scores))


def _gradients_by_position(
    how: _How,
    step: int,
    q: jax.Array,
    segments: jax.Array | None,
    piece: Any,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, ...]:
    k, v, theirs = piece
    seen = _seen_of_visit(how, step, q.shape[1], segments, theirs)
    return blocks.backward(q, k, v, out, lse, d_out, seen, how.scores)
