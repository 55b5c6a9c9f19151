"""Products of rows with the matrix of each row's expert, that read no other expert's matrix.

    y[r] = x[r] W[e(r)],  rows in order of their experts

Rows of an expert are cut into tiles of a few; a tile reads one matrix, and experts without rows
have no tile. `jax.lax.ragged_dot` reads and multiplies every expert's matrix instead, on CPUs as
on GPUs (it is lowered to one dense product over masked copies, JAX 0.10 to 0.12): for the eight of
128 experts that a token uses, sixteen times the bytes. On NVIDIA GPUs the tiles are those of a
Triton kernel (`grouped_triton`), with a gradient; elsewhere a loop walks over them, which serves,
and training takes `ragged_dot`.

Legend: R rows, E experts, K inputs, N outputs, T tiles.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys.model import grouped_triton, packed
from jaxsys.model.attention import default_device
from jaxsys.model.experts import Places, group
from jaxsys.model.grouped_triton import Tiles
from jaxsys.model.packed import Packed

Way = Literal["triton", "walk"]

_FLOATS = (jnp.bfloat16, jnp.float16)


def serving_way(dtype: Any, device: Any, *, split: bool = False) -> Way:
    """How a server multiplies by experts.

    Args:
        dtype: of the rows.
        device: the first it serves on.
        split: whether matrices lie over several devices, whose parts the kernel does not know.
    """
    return "triton" if _has_kernel(dtype, device) and not split else "walk"


def _has_kernel(dtype: Any, device: Any) -> bool:
    kind = str(getattr(device, "device_kind", ""))
    return device.platform in ("gpu", "cuda") and "NVIDIA" in kind and dtype in _FLOATS


# Serving ------------------------------------------------------------------------------------------

FEW = 64
"""Rows up to which each is a tile of its own: sorting them takes longer than reading some experts
twice. Not where there are more than half as many rows as experts, of which most then have two: an
H200 took 145 us for 8 tokens of gpt-oss-20b's up sorted, 203 not."""


class Work(NamedTuple):
    """Which rows an expert's products have to do."""

    cut: Tiles
    height: int
    """Static: most rows of a tile."""
    share: int
    """Static: rows of the result that read the same row in turn."""


class RowOrder(NamedTuple):
    """Rows of a batch in the order that products take them."""

    work: Work
    """Of the first product; behind it every row has its own."""
    experts: Int[Array, " RA"]
    """Of each row of the result."""
    places: Places | None
    """Where sorted rows come from; None where they are as chosen."""


def work_of(chosen: Int[Array, "R A"], count: int) -> RowOrder:
    """Sorts the choices of R tokens among `count` experts, unless they are few."""
    rows = chosen.size
    if rows <= min(FEW, max(1, count // 2)):
        flat = chosen.reshape(-1)
        return RowOrder(Work(grouped_triton.single(flat), 1, chosen.shape[1]), flat, None)
    groups, places = group(chosen, count)
    height = grouped_triton.height_for(rows, count)
    cut = grouped_triton.tiles(groups.sizes, rows, height)
    return RowOrder(Work(cut, height, 1), groups.experts, places)


def used_product(
    rows: Float[Array, "R K"],
    weights: Float[Array, "E *N K"] | Packed,
    work: Work,
    way: Way,
) -> Float[Array, "R *N"]:
    """Rows with their experts' matrices, outputs first; no gradient.

    Args:
        weights: of any dtype, widened exactly to that of the rows; or packed, unpacked a tile at a
            time.
        work: whose `share` says how many rows of the result read each of `rows`.
    """
    packs = isinstance(weights, Packed)
    shape = (weights.codes if packs else weights).shape
    count, outputs = work.share * rows.shape[0], shape[1:-1]
    if way == "walk":
        return _walk(rows, weights, work, count, outputs)
    flat = jax.tree.map(lambda leaf: leaf.reshape(shape[0], -1, leaf.shape[-1]), weights)
    depth = rows.shape[1] // 2 if packs else rows.shape[1]
    blocks = grouped_triton.blocks_for(work.height, count, depth, packed=packs)
    if packs:
        found = grouped_triton.packed_product(rows, flat, work.cut, blocks, share=work.share)
    else:
        found = grouped_triton.product(
            rows, flat, work.cut, blocks, outputs_first=True, share=work.share
        )
    return found.reshape(count, *outputs)


def _walk(
    rows: jax.Array, weights: jax.Array | Packed, work: Work, count: int, outputs: tuple[int, ...]
) -> jax.Array:
    """Tile by tile, as many as there are."""
    cut, height, share = work
    padded = jnp.pad(rows, ((0, height), (0, 0)))
    places = jnp.arange(height, dtype=jnp.int32)

    def turn(tile: jax.Array, out: jax.Array) -> jax.Array:
        start, expert = cut.start[tile], cut.expert[tile]
        x = jax.lax.dynamic_slice_in_dim(padded, start // share, height)
        own = jax.tree.map(lambda leaf: leaf[expert], weights)
        matrix = packed.unpacked(own) if isinstance(own, Packed) else own
        axes = (((1,), (matrix.ndim - 1,)), ((), ()))
        y = jax.lax.dot_general(x, matrix.astype(rows.dtype), axes)
        old = jax.lax.dynamic_slice_in_dim(out, start, height)
        of_tile = (start + places < cut.stop[tile]).reshape(-1, *(1 for _ in outputs))
        written = jnp.where(of_tile, y, old)
        return jax.lax.dynamic_update_slice_in_dim(out, written, start, 0)

    zeros = jnp.zeros((count + height, *outputs), rows.dtype)
    return jax.lax.fori_loop(0, cut.used, turn, zeros)[:count]


# Training -----------------------------------------------------------------------------------------


def product(
    rows: Float[Array, "R K"], weights: Float[Array, "E K N"], sizes: Int[Array, " E"]
) -> Float[Array, "R N"]:
    """Rows with their experts' matrices, with gradients of both."""
    if _has_kernel(rows.dtype, default_device()) and _is_local():
        return _product(rows, weights, sizes)
    return jax.lax.ragged_dot(rows, weights, sizes)


def _is_local() -> bool:
    """Whether arrays here are one device's own: alone, or inside a `shard_map` over all axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    manual = jax.sharding.AxisType.Manual
    return all(kind == manual for kind in mesh.axis_types) or mesh.size == 1


class _Kept(NamedTuple):
    rows: jax.Array
    weights: jax.Array
    sizes: jax.Array


@jax.custom_vjp
def _product(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    return _tiled(rows, weights, sizes)


def _tiled(
    rows: jax.Array, weights: jax.Array, sizes: jax.Array, *, outputs_first: bool = False
) -> jax.Array:
    count, inputs = rows.shape
    height = grouped_triton.height_for(count, weights.shape[0])
    blocks = grouped_triton.blocks_for(height, count, inputs)
    cut = grouped_triton.tiles(sizes, count, height)
    return grouped_triton.product(rows, weights, cut, blocks, outputs_first=outputs_first)


def _forward(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> tuple[jax.Array, _Kept]:
    return _tiled(rows, weights, sizes), _Kept(rows, weights, sizes)


def _backward(kept: _Kept, d_out: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, weights, sizes = kept
    d_out = d_out.astype(rows.dtype)
    d_rows = _tiled(d_out, weights, sizes, outputs_first=True)
    d_weights = grouped_triton.outer(rows, d_out, sizes)
    return d_rows, d_weights.astype(weights.dtype), None


_product.defvjp(_forward, _backward)
