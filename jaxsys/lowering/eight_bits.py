"""Matrices that go from device to device in float8: a byte a number, and a scale a matrix.

    w ~ number * scale,  scale = the least 2^n with max |w| <= 448 * 2^n

Blocks that multiply a matrix in e4m3 with such a scale (`LayeredModel.travels_in_float8`) find the
same numbers in what arrives as in what was sent: times a power of two they are numbers of the
compute dtype as they are. So nothing of a block knows that its weights have travelled, and loss and
gradients are to the bit what they are without. The scale is that of the whole matrix: devices that
have pieces of it agree on the largest number of all, once a step, in one reduction for all layers.

Numbers travel as bytes, since XLA widens float8 in collectives on some devices. Gradients travel as
they do without.

Legend: L layers of a kind, K layers of a chunk.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from jaxsys.float8 import E4M3, cast, scale_of
from jaxsys.layered import LayeredModel, PyTree

from .flat import Leaves, is_float
from .kinds import Choice
from .packing import Packing, Row

BYTE = jnp.uint8
SCALE_BYTES = 4
"""That go with a matrix."""
Scale = Any
"""A leaf's scales [L] or [K], float32; None: it travels as it is."""


def travelling(model: LayeredModel, layer: PyTree) -> list[bool]:
    """Which leaves of a layer's parameters go in float8."""
    asked = model.travels_in_float8
    pairs = jax.tree_util.tree_leaves_with_path(layer)
    if asked is None:
        return [False] * len(pairs)
    return [is_float(leaf) and asked(*map(_name, path)) for path, leaf in pairs]


def encoded_bytes(model: LayeredModel, layer: PyTree) -> float:
    """Bytes of a layer on its way, its leaves in the compute dtype; arrays or shapes."""
    pairs = zip(jax.tree.leaves(layer), travelling(model, layer), strict=True)
    return float(
        sum(
            leaf.size + SCALE_BYTES if goes else leaf.size * leaf.dtype.itemsize
            for leaf, goes in pairs
        )
    )


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def scales_of(leaves: Sequence[Float[Array, "L ..."]], axes: tuple[str, ...]) -> Leaves:
    """The scales [L] of matrices.

    Args:
        leaves: pieces of them, or the whole.
        axes: mesh axes whose devices have the other pieces.
    """
    sizes = [leaf.shape[0] for leaf in leaves]
    most = [jnp.max(jnp.abs(p.astype(jnp.float32)), axis=range(1, p.ndim)) for p in leaves]
    together = jnp.concatenate(most)
    # Reductions may take the larger of a number and none: as infinity it is above all, and what is
    # scaled by it is no number anywhere.
    together = jnp.where(jnp.isnan(together), jnp.inf, together)
    together = lax.pmax(together, axes) if axes else together
    scales, starts = scale_of(together, E4M3, powers=True), [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return [scales[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def encoded(leaf: Float[Array, "L ..."], scales: Float[Array, " L"]) -> UInt8[Array, "L ..."]:
    """Numbers as they are sent."""
    small = cast(leaf.astype(jnp.float32) / _beside(scales, leaf), E4M3)
    return lax.bitcast_convert_type(small, BYTE)


def decoded(
    sent: UInt8[Array, "K ..."], scales: Float[Array, " K"], dtype: Any
) -> Float[Array, "K ..."]:
    """`encoded` undone, in a dtype that has e4m3's three bits and float32's exponents."""
    wide = lax.bitcast_convert_type(sent, E4M3).astype(jnp.float32)
    return (wide * _beside(scales, sent)).astype(dtype)


def _beside(scales: jax.Array, leaf: jax.Array) -> jax.Array:
    return scales.reshape(-1, *[1] * (leaf.ndim - 1))


class EncodedRows:
    """Rows of a ring's chunks (`packing`) as they travel, and the rows that tasks read."""

    def __init__(self, model: LayeredModel, layers: dict[str, PyTree], packing: Packing) -> None:
        """Lays them out.

        Args:
            model: whose layers they are.
            layers: kind -> shapes and dtypes of one layer's parameters, as a device has them.
            packing: of the rows that tasks read.
        """
        self._packing = packing
        self._small = {kind: travelling(model, layer) for kind, layer in layers.items()}
        self._trees = layers
        sent = {kind: self._shapes(kind, layer) for kind, layer in layers.items()}
        self._rows = Packing(sent)

    def _shapes(self, kind: str, layer: PyTree) -> Leaves:
        """Of what is sent of a layer: its leaves, and the scales of those in float8."""
        small = self._small[kind]
        leaves = [
            jax.ShapeDtypeStruct(p.shape, BYTE if is_small else p.dtype)
            for p, is_small in zip(jax.tree.leaves(layer), small, strict=True)
        ]
        return [*leaves, *[jax.ShapeDtypeStruct((1,), jnp.float32)] * sum(small)]

    def encode(self, stacks: dict[str, PyTree], axes: tuple[str, ...]) -> dict[str, Row]:
        """Kind -> leaves [V, K, ...], to rows [V, K, size].

        Args:
            stacks: as a device has them at rest.
            axes: mesh axes whose devices have the other pieces of matrices.
        """
        chosen = {
            kind: [
                leaf.reshape(-1, *leaf.shape[2:])
                for leaf, is_small in zip(jax.tree.leaves(stack), self._small[kind], strict=True)
                if is_small
            ]
            for kind, stack in stacks.items()
        }
        scales = iter(scales_of([leaf for leaves in chosen.values() for leaf in leaves], axes))
        found = {}
        for kind, stack in stacks.items():
            lead = jax.tree.leaves(stack)[0].shape[:2]
            own = [next(scales) for _ in chosen[kind]]
            pairs = zip(chosen[kind], own, strict=True)
            small = iter(
                [encoded(leaf, scale).reshape(*lead, *leaf.shape[1:]) for leaf, scale in pairs]
            )
            leaves = [
                next(small) if is_small else leaf
                for leaf, is_small in zip(jax.tree.leaves(stack), self._small[kind], strict=True)
            ]
            found[kind] = self._rows.pack(kind, [*leaves, *[s.reshape(*lead, 1) for s in own]])
        return found

    def decode(self, rows: Row, choice: Choice, first_layer: jax.Array) -> Row:
        """Rows [K, size] of a chunk as they have come, to those that its task reads.

        Args:
            rows: as they have come.
            choice: which kind a layer is of.
            first_layer: the chunk's.
        """
        if len(self._trees) == 1:
            return self._of_kind(next(iter(self._trees)), rows)

        def one(at: tuple[jax.Array, Row]) -> Row:
            index, row = at
            alone = [part[None] for part in row]
            return choice.run(index, first_layer + index, lambda kind: self._of_kind(kind, alone))

        found = lax.map(one, (jnp.arange(rows[0].shape[0]), rows))
        return [part[:, 0] for part in found]

    def _of_kind(self, kind: str, rows: Row) -> Row:
        sent = self._rows.unpack(kind, rows)
        tree, small = self._trees[kind], self._small[kind]
        specs = jax.tree.leaves(tree)
        scales = iter(sent[len(specs) :])
        leaves = [
            decoded(leaf, next(scales)[:, 0], spec.dtype) if is_small else leaf
            for leaf, spec, is_small in zip(sent[: len(specs)], specs, small, strict=True)
        ]
        return self._packing.pack(kind, jax.tree.unflatten(jax.tree.structure(tree), leaves))


class EncodedStack:
    """Shards of a kind's blocks as they are gathered, beside those that are computed with."""

    def __init__(self, leaves: Leaves, scales: list[Scale]) -> None:
        """`leaves` [L, ...] of a device; `scales`: of those that go in float8."""
        self.scales = scales
        self.leaves = [
            leaf if scale is None else encoded(leaf, scale)
            for leaf, scale in zip(leaves, scales, strict=True)
        ]

    def rows(self, take: Callable[[jax.Array], jax.Array]) -> tuple[Leaves, list[Scale]]:
        """What `take` takes of every leaf, and of the scales."""
        scales = [None if scale is None else take(scale) for scale in self.scales]
        return [take(leaf) for leaf in self.leaves], scales


def all_decoded(sent: Leaves, scales: list[Scale], like: Leaves) -> Leaves:
    """Whole leaves [K, ...] as they have come, to those of the dtypes of `like`."""
    return [
        leaf if scale is None else decoded(leaf, scale, spec.dtype)
        for leaf, scale, spec in zip(sent, scales, like, strict=True)
    ]
