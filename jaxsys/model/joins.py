"""Gathers before products and sums after them in pieces, which travel beside the products.

Of P devices each has a piece of the tokens, and its columns or rows of a matrix. A gather before a
product is P - 1 hops: a device multiplies the piece that it has while the next one comes. A sum
after a product is P - 1 hops as well: the sum for a device begins farthest from it, and each device
on the way adds its own product of that piece, made while the sum came.

    gather, then product     y[d + o] = x[d + o] W        x[d + o] has come |o| hops
    product, then sum        y[d] = sum over o of h[d] W of device d - o, added on the way

Where P > 2 pieces go both ways round, so that none makes more than half the way. Derivatives are
JAX's own: a gather's is such a sum, a sum's such a gather. (Wang et al., ASPLOS 2023,
10.1145/3567955.3567959.)

Legend: P devices, d this one, o an offset between devices; B sequences, t tokens of a piece,
T = P t.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Pieces = Mapping[int, Any]
"""Offset o -> what belongs to the tokens of device d + o, of all P of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoiningRing:
    """P devices of one mesh axis; for use inside a `shard_map` over it, where all run the same."""

    ways: int
    """P."""
    axis: str
    """The mesh axis."""

    @property
    def before(self) -> range:
        """Offsets of the devices before this one, nearest first."""
        return range(-1, -(self.ways // 2) - 1, -1)

    @property
    def behind(self) -> range:
        """Of those behind it: P - 1 together."""
        return range(1, self.ways - self.ways // 2)

    def gathered(self, x: Float[Array, "B t D"]) -> Iterator[tuple[int, jax.Array]]:
        """Offset and piece of every device, this one's own first and each as soon as it is here."""
        yield 0, x
        came = {1: x, -1: x}
        # The piece of device d - s comes onward, that of d + s back.
        for step in range(len(self.before)):
            for way, there in ((1, self.before), (-1, self.behind)):
                if step < len(there):
                    came[way] = self._hop(came[way], way)
                    yield there[step], came[way]

    def summed(self, make: Callable[[int], jax.Array]) -> jax.Array:
        """The sum over devices of what each makes of this one's piece.

        Args:
            make: offset o -> what this device makes of the piece of device d + o.
        """
        sums: list[jax.Array] = []
        for way, there in ((-1, self.before), (1, self.behind)):
            total: jax.Array | None = None
            for offset in reversed(there):
                mine = make(offset)
                total = self._hop(mine if total is None else total + mine, way)
            sums += [] if total is None else [total]
        return functools.reduce(jnp.add, sums, make(0))

    def in_order(self, pieces: Pieces) -> Float[Array, "B T ..."]:
        """Pieces [B, t, ...] one behind the other, as sequences have them."""
        return _in_order(pieces, self)

    def in_pieces(self, whole: Float[Array, "B T ..."]) -> Pieces:
        """`in_order` undone."""
        return _in_pieces(whole, self)

    def start(self, offset: int, size: int) -> jax.Array:
        """Where the `size` tokens of device d + o begin."""
        return (lax.axis_index(self.axis) + offset) % self.ways * size

    def _hop(self, value: jax.Array, way: int) -> jax.Array:
        """Onward (1) or back (-1)."""
        pairs = [(d, (d + way) % self.ways) for d in range(self.ways)]
        return lax.ppermute(value, self.axis, pairs)


# Each other's derivatives, which JAX would make of one update after another, zeros written between.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _in_order(pieces: Pieces, ring: JoiningRing) -> jax.Array:
    rows, size, *rest = pieces[0].shape
    whole = jnp.zeros((rows, ring.ways * size, *rest), pieces[0].dtype)
    for offset, piece in pieces.items():
        whole = lax.dynamic_update_slice_in_dim(whole, piece, ring.start(offset, size), 1)
    return whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _in_pieces(whole: jax.Array, ring: JoiningRing) -> Pieces:
    size = whole.shape[1] // ring.ways
    return {
        offset: lax.dynamic_slice_in_dim(whole, ring.start(offset, size), size, 1)
        for offset in (0, *ring.before, *ring.behind)
    }


_in_order.defvjp(
    lambda pieces, ring: (_in_order(pieces, ring), None),
    lambda ring, _, whole: (_in_pieces(whole, ring),),
)
_in_pieces.defvjp(
    lambda whole, ring: (_in_pieces(whole, ring), None),
    lambda ring, _, pieces: (_in_order(pieces, ring),),
)
