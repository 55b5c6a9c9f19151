"""Attention over keys and values that lie in pages, by the fastest correct kernel at hand.

    o = softmax(q k^T / sqrt(K)) v  over the positions a request's block table lists

A `Rule` says what a kind of layer does otherwise: a window, another scale, a cap on scores, sinks.

Portable kernels walk the table in chunks with a running maximum and sum (the online softmax of
Milakov & Gimelshein, 1805.02867), for as many chunks as the longest request of the call has: one
compiled step serves every context length, and a chunk's pages stay in the CPU's cache.

On NVIDIA GPUs cuDNN attends in place of them: its paged kernel for decoding, its fused attention
for prompts, where a piece that continues a prompt joins two attentions (earlier tokens; its own) by
their log-sum-exp. On an H100 (32 query heads, 8 key/value heads of 128, 1024 tokens, bfloat16) the
paged kernel took 1.02x the time of copying the keys and values at batch 128; JAX's Pallas kernel
1.28x, gathering pages for cuDNN 3.0x, for XLA 3.3x, the portable walk 4.7x.

Windows, caps, sinks, latent keys, and pages of bytes with a scale a token and head (`Scales`) are
beyond the kernels of cuDNN that JAX reaches: there our own attends (`paged_kernel`).

Legend: B requests, T tokens of a prompt piece, W pages of a block table, P pages, S tokens a page,
G key/value heads, R query heads for each, K head width, C tokens of a chunk.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxsys.mesh import Device
from jaxsys.model import choose_implementation
from jaxsys.model.grouped import serving_way
from jaxsys.serve import paged_kernel
from jaxsys.serve.expert_weights import Grouped, grouped_over, used_by_walk

CHUNK_TOKENS = 128
"""Tokens looked at in one turn of the portable walk."""


LOWEST = -1e30
"""Below any score, and finite: a chunk without a key that is seen weighs nothing and divides none
by zero."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What attention of one kind of layer is, where it is not the plain one."""

    window: int | None = None
    """Keys a query sees, its own the last of them; None: all before it."""
    scale: float | None = None
    """Of scores; 1 / sqrt(K) if None."""
    softcap: float | None = None
    """c: scores become c tanh(scores / c)."""
    value_channels: int | None = None
    """Where keys are latent vectors: values are so many of their first channels, all else None."""

    def of_width(self, width: int) -> float:
        """The scale for heads of a width."""
        return 1 / math.sqrt(width) if self.scale is None else self.scale

    def kernels_know(self, sinks: jax.Array | None) -> bool:
        """Whether cuDNN's paged kernels compute it."""
        return (
            self.window is None
            and self.softcap is None
            and sinks is None
            and self.value_channels is None
        )


PLAIN = Rule()


Scales = tuple[Float[Array, "P S G"], Float[Array, "P S G"] | None] | None
"""Of keys and values in float8 or int8; None where pages hold what is computed with."""


class DecodeAttention(Protocol):
    """One query token a request."""

    def __call__(
        self,
        q: Float[Array, "B G R K"],
        keys: Float[Array, "P S G K"],
        values: Float[Array, "P S G K"] | None,
        tables: Int[Array, "B W"],
        positions: Int[Array, " B"],
        rule: Rule = PLAIN,
        sinks: Float[Array, "G R"] | None = None,
        scales: Scales = None,
    ) -> Float[Array, "B G R K"]: ...


class SeveralAttention(Protocol):
    """A few query tokens a request, which lie in pages with all before them."""

    def __call__(
        self,
        q: Float[Array, "B T G R K"],
        keys: Float[Array, "P S G K"],
        values: Float[Array, "P S G K"] | None,
        tables: Int[Array, "B W"],
        positions: Int[Array, "B T"],
        rule: Rule = PLAIN,
        sinks: Float[Array, "G R"] | None = None,
        scales: Scales = None,
    ) -> Float[Array, "B T G R K"]: ...


class PrefillAttention(Protocol):
    """A piece of one prompt, whose own keys and values are given apart and lie in pages too."""

    def __call__(
        self,
        q: Float[Array, "1 T G R K"],
        k: Float[Array, "1 T G K"],
        v: Float[Array, "1 T G K"] | None,
        keys: Float[Array, "P S G K"],
        values: Float[Array, "P S G K"] | None,
        table: Int[Array, " W"],
        start: Int[Array, ""],
        continued: bool,
        rule: Rule = PLAIN,
        sinks: Float[Array, "G R"] | None = None,
        scales: Scales = None,
    ) -> Float[Array, "1 T G R K"]: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernels:
    """The attentions of a server, its products with experts, and in words why these."""

    decode: DecodeAttention
    prefill: PrefillAttention
    reason: str
    grouped: Grouped = used_by_walk
    several: SeveralAttention = dataclasses.field(default_factory=lambda: attend_pages)
    writes: bool = False
    """Whether new keys and values are put into pages by `page_writes`, in one kernel."""


def choose_kernels(
    *, dtype: jnp.dtype, head_dim: int, device: Device, mesh: Mesh | None = None, axis: str = ""
) -> AttentionKernels:
    """The kernels for heads of this dtype and width on `device`.

    Args:
        mesh: where key/value heads are split over the mesh's `axis`: each device attends with its
            own heads.
    """
    choice = choose_implementation(dtype=dtype, head_dim=head_dim, device=device)
    if choice.implementation == "cudnn":
        known = paged_kernel.device_of(device)
        own = functools.partial(_own_several, known)
        kernels = AttentionKernels(
            # A kernel sees one device's arrays, which no mesh splits for it.
            writes=known is not None and known.float8 and mesh is None,
            decode=functools.partial(_cudnn_decode, own),
            prefill=functools.partial(_cudnn_prefill, own),
            several=functools.partial(_cudnn_several, own),
            reason=f"cuDNN: {choice.reason}",
        )
    else:
        kernels = AttentionKernels(
            decode=portable_decode, prefill=portable_prefill, reason=f"portable: {choice.reason}"
        )
    grouped = grouped_over(serving_way(dtype, device), mesh, axis)
    kernels = dataclasses.replace(kernels, grouped=grouped)
    return kernels if mesh is None else _split_heads(kernels, mesh, axis)


def attend_pages(
    q: Float[Array, "B T G R K"],
    keys: Float[Array, "P S G K"],
    values: Float[Array, "P S G K"] | None,
    tables: Int[Array, "B W"],
    positions: Int[Array, "B T"],
    rule: Rule = PLAIN,
    sinks: Float[Array, "G R"] | None = None,
    scales: Scales = None,
) -> Float[Array, "B T G R K"]:
    """The portable walk: each query sees the positions up to its own, or a window of them.

    Args:
        values: None where `rule.value_channels` says which channels of the keys they are.
        tables: page numbers; entries past a request's last page, or before its window, may be
            anything.
        positions: int32 [B, T], where each query stands.
        rule: of this kind of layer.
        sinks: scores that take part in each head's softmax and add nothing.
        scales: of pages in float8 or int8.

    Returns:
        [B, T, G, R, K] in the dtype of `q`, K the width of values; softmax in float32.
    """
    batch, steps, groups, rows, width = q.shape
    channels = width if rule.value_channels is None else rule.value_channels
    page_size = keys.shape[1]
    pages = max(1, min(CHUNK_TOKENS // page_size, tables.shape[1]))
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages)))
    length = pages * page_size
    split = q * rule.of_width(width)
    offsets = jnp.arange(length, dtype=positions.dtype)

    def turn(chunk: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        highest, total, output = carry
        index = jax.lax.dynamic_slice_in_dim(tables, chunk * pages, pages, axis=1)
        k, v = _gathered(keys, values, scales, index, q.dtype)
        k = k.reshape(batch, length, groups, width)
        v = k[..., :channels] if v is None else v.reshape(k.shape)
        # Pages may hold anything behind a request's last token and before its window, NaN too,
        # which no weight of zero would keep out of the sum.
        there = (chunk * length + offsets)[None, :]
        own = there <= positions.max(axis=1)[:, None]
        if rule.window is not None:
            own &= there > positions.min(axis=1)[:, None] - rule.window
        v = jnp.where(own[:, :, None, None], v, 0)
        scores = jnp.einsum("btgrk,bsgk->bgrts", split, k, preferred_element_type=jnp.float32)
        if rule.softcap is not None:
            scores = rule.softcap * jnp.tanh(scores / rule.softcap)
        places = (chunk * length + offsets)[None, None, :]
        seen = places <= positions[:, :, None]
        if rule.window is not None:
            seen &= places > positions[:, :, None] - rule.window
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        raised = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - raised)
        fade = jnp.exp(highest - raised)
        total = total * fade + weights.sum(axis=-1, keepdims=True)
        fresh = jnp.einsum(
            "bgrts,bsgk->bgrtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return raised, total, output * fade + fresh

    shape = (batch, groups, rows, steps)
    if sinks is None:
        highest = jnp.full((*shape, 1), LOWEST, jnp.float32)
        total = jnp.zeros((*shape, 1), jnp.float32)
    else:
        highest = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, :, None, None], (*shape, 1))
        total = jnp.ones((*shape, 1), jnp.float32)
    start = (highest, total, jnp.zeros((*shape, channels), jnp.float32))
    first = jnp.int32(0)
    if rule.window is not None:  # what lies before every query's window is not walked
        first = jnp.maximum(jnp.min(positions) - rule.window + 1, 0) // length
    turns = jnp.max(positions) // length + 1
    _, total, output = jax.lax.fori_loop(first, turns, turn, start)
    return (output / total).transpose(0, 3, 1, 2, 4).astype(q.dtype)


def _gathered(keys, values, scales: Scales, pages, dtype) -> tuple[Any, Any]:
    """Keys and values (None as they are given) of pages, widened where they have scales."""
    found = []
    for pool, of_pool in zip((keys, values), scales or (None, None), strict=True):
        part = None if pool is None else pool.at[pages].get(mode="clip")
        if part is not None and of_pool is not None:
            of_pages = of_pool.at[pages].get(mode="clip")[..., None]
            part = (part.astype(jnp.float32) * of_pages).astype(dtype)
        found.append(part)
    return found[0], found[1]


def portable_decode(q, keys, values, tables, positions, rule=PLAIN, sinks=None, scales=None):
    """`DecodeAttention` by the portable walk."""
    at = positions[:, None]
    return attend_pages(q[:, None], keys, values, tables, at, rule, sinks, scales)[:, 0]


def portable_prefill(
    q, k, v, keys, values, table, start, continued, rule=PLAIN, sinks=None, scales=None
):
    """`PrefillAttention` by the portable walk: the piece's own tokens are read from their pages."""
    positions = start + jnp.arange(q.shape[1], dtype=jnp.int32)
    return attend_pages(q, keys, values, table[None], positions[None], rule, sinks, scales)


def _own_several(device, q, keys, values, tables, positions, rule=PLAIN, sinks=None, scales=None):
    """By the kernel for what cuDNN does not compute, where it takes these pages."""
    rows, apart = q.shape[1] * q.shape[3], values is not None
    heads = q.shape[0] * q.shape[2]
    tile = None if device is None else paged_kernel.tile_for(rows, keys, apart, device, heads)
    if tile is None:
        return attend_pages(q, keys, values, tables, positions, rule, sinks, scales)
    return paged_kernel.attend(
        q,
        keys,
        values,
        tables,
        positions,
        scale=rule.of_width(q.shape[-1]),
        window=rule.window,
        softcap=rule.softcap,
        value_channels=rule.value_channels,
        sinks=sinks,
        scales=scales,
        tile=tile,
    )


def _cudnn_decode(own, q, keys, values, tables, positions, rule=PLAIN, sinks=None, scales=None):
    if scales is not None or not rule.kernels_know(sinks):
        at = positions[:, None]
        return own(q[:, None], keys, values, tables, at, rule, sinks, scales)[:, 0]
    # The only door to cuDNN's paged attention that JAX has. Its public wrapper demands a pool of
    # exactly B * W pages; the primitive under it does not.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    batch, groups, rows, width = q.shape
    ones = jnp.ones(batch, jnp.int32)
    nothing = jnp.zeros(0, q.dtype)
    # Entries past a request's pages may be anything; cuDNN wants page numbers.
    pages = jnp.clip(tables, 0, keys.shape[0] - 1)[:, None, :, None]
    output: Any = cudnn._dot_product_attention(
        q.reshape(batch, 1, groups * rows, width),
        keys,
        values,
        nothing,
        ones,
        positions + 1,
        nothing,
        nothing,
        pages,
        pages,
        rule.of_width(width),
        42,
        0.0,
        (False, False),
        cudnn.MaskType.PADDING,
        cudnn.AttentionLayout.BTNH.value,
        None,
        cudnn.check_cudnn_version(),
        False,
    )
    if isinstance(output, tuple | list):
        output = output[0]
    return output.reshape(q.shape)


def _cudnn_several(own, q, keys, values, tables, positions, rule=PLAIN, sinks=None, scales=None):
    """Each query as a request of its own: cuDNN's paged attention masks by lengths alone."""
    if scales is not None or not rule.kernels_know(sinks):
        return own(q, keys, values, tables, positions, rule, sinks, scales)
    batch, steps = positions.shape
    rows = q.reshape(batch * steps, *q.shape[2:])
    tables = jnp.repeat(tables, steps, axis=0)
    at = positions.reshape(-1)
    return _cudnn_decode(own, rows, keys, values, tables, at, rule, sinks, scales).reshape(q.shape)


def _cudnn_prefill(
    own, q, k, v, keys, values, table, start, continued, rule=PLAIN, sinks=None, scales=None
):
    if not rule.kernels_know(sinks):
        positions = start + jnp.arange(q.shape[1], dtype=jnp.int32)
        return own(q, keys, values, table[None], positions[None], rule, sinks, scales)
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    one, steps, groups, rows, width = q.shape
    flat = q.reshape(one, steps, groups * rows, width)

    def fused(k, v, mask_type, **lengths) -> Any:
        # JAX's public function rounds the log-sum-exp to bfloat16, too coarse to join by.
        return cudnn.dot_product_attention(
            flat,
            k,
            v,
            scale=rule.of_width(width),
            mask_type=mask_type,
            qkv_layout="BTNH",
            return_residual=True,
            **lengths,
        )

    own, own_sum = fused(k, v, cudnn.MaskType.CAUSAL)
    if not continued:
        return own.reshape(q.shape)
    pages = jnp.clip(table, 0, keys.shape[0] - 1)
    keys, values = _gathered(keys, values, scales, pages, q.dtype)
    before = values.reshape(1, -1, groups, width)
    # Behind `start` pages may hold anything; cuDNN weighs it with zero, which keeps no NaN out.
    written = jnp.arange(before.shape[1], dtype=jnp.int32) < start
    before = jnp.where(written[None, :, None, None], before, 0)
    earlier, earlier_sum = fused(
        keys.reshape(1, -1, groups, width),
        before,
        cudnn.MaskType.PADDING,
        q_seqlen=jnp.full(1, steps, jnp.int32),
        # cuDNN wants at least one key; where there is none its weight is put to zero below.
        kv_seqlen=jnp.maximum(start, 1)[None],
    )
    earlier_sum = jnp.where(start > 0, earlier_sum, -jnp.inf)
    # Sums are [1, N, T], outputs [1, T, N, K].
    share = jax.nn.sigmoid(own_sum - earlier_sum).transpose(0, 2, 1)[..., None]
    joined = own.astype(jnp.float32) * share + earlier.astype(jnp.float32) * (1 - share)
    return joined.astype(q.dtype).reshape(q.shape)


def _of_scales(scales: Scales, pool: PartitionSpec) -> Any:
    """How scales [P, S, G] are split where pools [P, S, G, K] are split so."""
    return jax.tree.map(lambda _: PartitionSpec(*tuple(pool)[:3]), scales)


def _split_heads(kernels: AttentionKernels, mesh: Mesh, axis: str) -> AttentionKernels:
    """Each device of the mesh's `axis` attends with its own heads.

    Those of keys and values, with the queries that they serve; or, where all queries share one
    latent head, which every device keeps, with its own queries.
    """
    spec = PartitionSpec

    def places(rule: Rule) -> tuple[PartitionSpec, PartitionSpec]:
        """Of pools [P, S, G, K], and of queries behind their first axis."""
        if rule.value_channels is None:
            return spec(None, None, axis, None), spec(None, axis)
        return spec(), spec(None, None, axis)

    def of_pages(kernel: Any, queries: Callable[[PartitionSpec], PartitionSpec]) -> Any:
        def call(q, keys, values, tables, positions, rule=PLAIN, sinks=None, scales=None):
            pool, heads = places(rule)
            heads = queries(heads)
            given = {
                "values": (values, pool),
                "sinks": (sinks, spec(axis)),
                "scales": (scales, _of_scales(scales, pool)),
            }
            given = {name: one for name, one in given.items() if one[0] is not None}

            def attend(q, keys, tables, positions, more):
                values, *rest = (more.get(name) for name in ("values", "sinks", "scales"))
                return kernel(q, keys, values, tables, positions, rule, *rest)

            by_name = {name: place for name, (_, place) in given.items()}
            return jax.shard_map(
                attend,
                mesh=mesh,
                in_specs=(heads, pool, spec(), spec(), by_name),
                out_specs=heads,
                check_vma=False,  # the kernels' loops start from constants, the same everywhere
            )(q, keys, tables, positions, {name: one for name, (one, _) in given.items()})

        return call

    decode = of_pages(kernels.decode, lambda heads: heads)
    several = of_pages(kernels.several, lambda heads: spec(None, *heads))

    def prefill(
        q, k, v, keys, values, table, start, continued, rule=PLAIN, sinks=None, scales=None
    ):
        pool, heads = places(rule)
        queries = spec(None, *heads)
        own = spec(None, *pool[1:]) if pool else spec()
        given = {
            "v": (v, own),
            "values": (values, pool),
            "sinks": (sinks, spec(axis)),
            "scales": (scales, _of_scales(scales, pool)),
        }
        given = {name: one for name, one in given.items() if one[0] is not None}

        def attend(q, k, keys, table, start, more):
            v, values, *rest = (more.get(name) for name in ("v", "values", "sinks", "scales"))
            return kernels.prefill(q, k, v, keys, values, table, start, continued, rule, *rest)

        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(
                queries,
                own,
                pool,
                spec(),
                spec(),
                {n: place for n, (_, place) in given.items()},
            ),
            out_specs=queries,
            check_vma=False,
        )(q, k, keys, table, start, {name: one for name, (one, _) in given.items()})

    reason = f"{kernels.reason}; heads split over {axis!r}"
    return dataclasses.replace(
        kernels, decode=decode, several=several, prefill=prefill, reason=reason
    )
