"""How one sequence lies over the devices that share it.

A sequence of T tokens is cut into 2 P pieces, and each of P devices holds two: an early one and a
late one, so that under a causal mask all have the same work. Piece d and piece 2 P - 1 - d make a
device's half early, half late; a query of the late piece sees what a query of the early one does
not, and every pair of devices costs two pieces' products, whichever of them is earlier.

Where U neighbours exchange heads for sequence, they stand together as one: P = R U devices are a
ring of R groups, and the u-th of group r holds the u-th parts of pieces r and 2 R - 1 - r.

Legend: P devices, U of them exchange heads, R = P / U groups, T tokens of a whole sequence.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxsys.axes import CONTEXT, WAYS, DividedAround, Way
from jaxsys.errors import UsageError
from jaxsys.schedule.inside import exchanging, why_not_shared

__all__ = ["WAYS", "ContextSplit", "Way", "order_of", "said_by", "split_of", "splits_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSplit:
    """Every sequence over P devices of one mesh axis; for use inside a `shard_map` over it."""

    parts: int
    """P."""
    by: Way = "ring"
    exchange: int | None = None
    """U, of `mixed`; all of the others exchange with all (`ulysses`) or with none."""
    axis: str = CONTEXT
    """The mesh axis."""
    fused: bool = True
    """Whether cuDNN's kernel may compute what it can; see `jaxsys.context.fused`."""

    def __post_init__(self) -> None:
        refused = why_not_shared(self.by, self.parts, self.exchange)
        if refused is not None:
            raise UsageError(refused)

    @property
    def exchanging(self) -> int:
        """U."""
        return exchanging(self.by, self.parts, self.exchange)

    @property
    def groups(self) -> int:
        """R."""
        return self.parts // self.exchanging

    @property
    def exchange_groups(self) -> list[list[int]]:
        """The devices of the axis that exchange heads with each other."""
        ways = self.exchanging
        return [list(range(first, first + ways)) for first in range(0, self.parts, ways)]

    @property
    def onward(self) -> list[tuple[int, int]]:
        """(source, target) on the axis of one hop round the ring of groups."""
        return [(d, (d + self.exchanging) % self.parts) for d in range(self.parts)]

    def check_length(self, length: int) -> None:
        """Raises UsageError unless sequences of so many tokens can be cut."""
        step = 2 * self.parts
        if length % step == 0 and length:
            return
        near = sorted({max(1, length // step) * step, -(-length // step) * step} - {0})
        ways = [p for p in range(1, min(length, 4096) // 2 + 1) if length % (2 * p) == 0]
        or_ways = f", or context={_listed(ways)}" if ways else ""
        raise UsageError(
            f"sequence_length={length} cannot be cut into 2 x context={self.parts} pieces; use "
            f"sequence_length={_listed(near)}{or_ways}"
        )

    def check_heads(self, heads: int, key_heads: int) -> None:
        """Raises UsageError unless the heads can be exchanged."""
        ways = self.exchanging
        if _heads_split(heads, key_heads, ways):
            return
        legal = [u for u in range(1, heads + 1) if _heads_split(heads, key_heads, u)]
        raise UsageError(
            f"{self.by} over {ways} devices needs query heads ({heads}) that {ways} divides, and "
            f"key/value heads ({key_heads}) that it divides or that divide it; "
            f"{_listed(legal)} device(s) would do, or context_by='ring' with any number"
        )

    # Inside shard_map.

    def device(self) -> jax.Array:
        """Which of the P devices this is."""
        return lax.axis_index(self.axis)

    def group(self) -> jax.Array:
        """r, of this device."""
        return self.device() // self.exchanging

    def starts(self, device: Any, half: int) -> tuple[Any, Any]:
        """Where a device's early and late pieces of `half` tokens begin in the sequence."""
        ways = self.exchanging
        group, place = device // ways, device % ways
        late = (2 * self.groups - 1 - group) * ways + place
        return device * half, late * half

    def positions(self, tokens: int) -> Int[Array, " tokens"]:
        """The positions in the whole sequence of the `tokens` that this device holds, int32."""
        half = tokens // 2
        early, late = self.starts(self.device(), half)
        within = jnp.arange(half, dtype=jnp.int32)
        return jnp.concatenate([early + within, late + within])

    def own(self, leaf: jax.Array, axis: int) -> jax.Array:
        """This device's pieces, of an array that lies over the devices in plain order.

        The array's other parts are fetched once: for what is small beside activations (tokens).

        Args:
            leaf: the d-th of P consecutive parts, [..., T / P, ...].
            axis: along which the sequence lies.
        """
        if self.parts == 1:
            return leaf
        return self.pieces(lax.all_gather(leaf, self.axis, axis=axis, tiled=True), axis)

    def pieces(self, whole: jax.Array, axis: int) -> jax.Array:
        """This device's pieces of an array that every device has all of.

        So what a model draws at random for a whole sequence is the same however it is cut.

        Args:
            whole: [..., T, ...].
            axis: along which the sequence lies.

        Returns:
            [..., T / P, ...].
        """
        half = whole.shape[axis] // (2 * self.parts)
        starts = self.starts(self.device(), half)
        found = [lax.dynamic_slice_in_dim(whole, start, half, axis) for start in starts]
        return jnp.concatenate(found, axis=axis)


def said_by(parts: DividedAround) -> ContextSplit | None:
    """How sequences lie over devices in a plan or schedule; None where it has each whole on one."""
    return split_of(parts.context, parts.context_by, parts.context_exchange)


@functools.lru_cache(maxsize=1024)
def split_of(parts: int, by: str, exchange: int | None) -> ContextSplit | None:
    """How sequences lie over so many devices; None where each is whole on one."""
    way: Any = by
    return ContextSplit(parts=parts, by=way, exchange=exchange) if parts > 1 else None


def splits_of(parts: int) -> tuple[ContextSplit, ...]:
    """All ways for so many devices, two or more, to share sequences."""
    plain = tuple(ContextSplit(parts=parts, by=by) for by in WAYS if by != "mixed")
    between = (u for u in range(2, parts) if parts % u == 0)
    return (*plain, *(ContextSplit(parts=parts, by="mixed", exchange=u) for u in between))


def order_of(split: ContextSplit, length: int) -> list[int]:
    """The positions that all devices hold, one device after another: a whole sequence's order."""
    half = length // (2 * split.parts)
    found: list[int] = []
    for device in range(split.parts):
        for start in split.starts(device, half):
            found += range(start, start + half)
    return found


def _heads_split(heads: int, key_heads: int, ways: int) -> bool:
    return heads % ways == 0 and (key_heads % ways == 0 or ways % key_heads == 0)


def _listed(values: list[int], most: int = 12) -> str:
    """Values for a message: the first ones where there are many."""
    shown = [str(value) for value in values[:most]]
    if len(values) > most:
        return f"{', '.join(shown)}, ... or {values[-1]}"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
