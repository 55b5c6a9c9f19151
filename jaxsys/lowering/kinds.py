"""Where blocks of unlike kinds rest, and how a chunk finds its own among them.

Blocks rest in one stack a kind, so that an optimizer sees every leaf as the model has it. Chunks
hold unlike numbers of a kind: each is given room for as many as the chunk that has most, and what
is left over is padding. A chunk that computes needs its layers in a row whatever their kinds: their
parameters have one form (`packing` gives it where they are unlike) and are put in order once a
step; their residuals share one set of arrays.

Legend: P devices, C chunks, K layers a chunk, V chunks at rest on a device, n rows of a kind.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsys.axes import RING
from jaxsys.layered import LayeredModel, PyTree

from .flat import Leaves


class RestOrder:
    """Which layer lies in which row of its kind's stack at rest."""

    def __init__(self, model: LayeredModel, chunks: np.ndarray, layers: int) -> None:
        """`chunks` [P, V]: those at rest, or [1, C] where all rest everywhere; `layers`: K."""
        self.model, self.chunks, self.layers = model, chunks, layers
        self.kinds = tuple(model.kinds)
        places = model.places
        count = chunks.size
        held: list[dict[str, list[int]]] = [{kind: [] for kind in self.kinds} for _ in range(count)]
        for layer, (kind, row) in enumerate(places):
            held[layer // layers][kind].append(row)
        self.held = held
        self.rows = {kind: max(len(chunk[kind]) for chunk in held) for kind in self.kinds}
        """n of each kind."""

    @property
    def alike(self) -> bool:
        """Whether there is one kind: then a chunk's rows are its layers."""
        return len(self.kinds) == 1

    @cached_property
    def order(self) -> dict[str, np.ndarray]:
        """Kind -> [C n]: the row of the kind's stack in layer order, -1 for padding."""
        found = {}
        for kind, rows in self.rows.items():
            order = np.full((self.chunks.size, rows), -1, np.int32)
            for place, chunk in enumerate(self.chunks.reshape(-1)):
                mine = self.held[chunk][kind]
                order[place, : len(mine)] = mine
            found[kind] = order.reshape(-1)
        return found

    def to_rest(self, kind: str, leaf: jax.Array) -> jax.Array:
        """[layers of the kind, ...] -> [C n, ...]."""
        order = self.order[kind]
        if (order < 0).any():
            leaf = jnp.pad(leaf, [(0, 1)] + [(0, 0)] * (leaf.ndim - 1))
            order = np.where(order < 0, leaf.shape[0] - 1, order)
        return jnp.take(leaf, order, axis=0)

    def from_rest(self, kind: str, leaf: jax.Array) -> jax.Array:
        """[C n, ...] -> [layers of the kind, ...]."""
        order = self.order[kind]
        real = np.flatnonzero(order >= 0)
        return jnp.take(leaf, real[np.argsort(order[real])], axis=0)

    # Inside shard_map: stacks of one form, [V, n, ...] each, and chunks [V, K, ...].

    def by_position(self, stacks: Mapping[str, PyTree]) -> PyTree:
        """Kind -> [V, n, ...], to the chunks' layers in a row [V, K, ...]."""
        if self.alike:
            return stacks[self.kinds[0]]
        table = self._here(self._tables[0])

        def take(*leaves: jax.Array) -> jax.Array:
            joined = jnp.concatenate(leaves, axis=1)
            return jax.vmap(lambda rows, places: rows[places])(joined, table)

        return jax.tree.map(take, *[stacks[kind] for kind in self.kinds])

    def by_kind(self, chunks: Leaves) -> dict[str, Leaves]:
        """`by_position` undone; rows of padding are zero."""
        if self.alike:
            return {self.kinds[0]: chunks}
        table = self._here(self._tables[1])

        def back(leaf: jax.Array) -> jax.Array:
            padded = jnp.pad(leaf, [(0, 0), (0, 1)] + [(0, 0)] * (leaf.ndim - 2))
            return jax.vmap(lambda rows, places: rows[places])(padded, table)

        joined, found, start = [back(leaf) for leaf in chunks], {}, 0
        for kind, rows in self.rows.items():
            found[kind] = [leaf[:, start : start + rows] for leaf in joined]
            start += rows
        return found

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """[P, V, K]: where among all kinds' rows a layer lies; [P, V, sum of n]: its way back."""
        starts = dict(zip(self.kinds, np.cumsum([0, *self.rows.values()]), strict=False))
        there = np.zeros((self.chunks.size, self.layers), np.int32)
        back = np.full((self.chunks.size, sum(self.rows.values())), self.layers, np.int32)
        for place, chunk in enumerate(self.chunks.reshape(-1)):
            seen = dict(starts)
            first = chunk * self.layers
            for index, kind in enumerate(self.model.kind_of[first : first + self.layers]):
                there[place, index] = seen[kind]
                back[place, seen[kind]] = index
                seen[kind] += 1
        shape = self.chunks.shape
        return there.reshape(*shape, -1), back.reshape(*shape, -1)

    def _here(self, table: np.ndarray) -> jax.Array:
        """A device's part of a table [P, V, ...]."""
        device = 0 if table.shape[0] == 1 else lax.axis_index(RING)
        return jnp.asarray(table)[device]


class Choice:
    """Runs what a layer's kind asks for, known beforehand or not."""

    def __init__(self, model: LayeredModel, layers: int, *, unroll: bool) -> None:
        """`layers`: K; `unroll`: positions in a chunk are known when it is traced."""
        self.kinds = tuple(model.kinds)
        numbers = [self.kinds.index(kind) for kind in model.kind_of]
        self._numbers = np.array(numbers + [numbers[-1]] * (-len(numbers) % layers), np.int32)
        self._at = self._numbers.reshape(-1, layers)
        self.unroll = unroll

    def possible(self, position: int) -> tuple[str, ...]:
        """The kinds that may stand in a position of a chunk; if layers are looped over, of any."""
        numbers = self._at[:, position] if self.unroll else self._at
        return tuple(self.kinds[number] for number in np.unique(numbers))

    def run(self, position: Any, index: Any, call: Callable[[str], Any]) -> Any:
        """`call(kind)` of layer number `index`, which stands in `position` of its chunk."""
        possible = self.possible(position if self.unroll else 0)
        if len(possible) == 1:
            return call(possible[0])
        numbers = [possible.index(k) if k in possible else 0 for k in self.kinds]
        number = jnp.asarray(np.array(numbers, np.int32)[self._numbers])[index]
        return lax.switch(number, [lambda kind=kind: call(kind) for kind in possible])


class Shared:
    """One set of arrays that holds what any of several kinds keeps.

    Arrays that all kinds have, by shape and dtype, are passed as they are. The rest of each kind is
    laid flat into a row a dtype, as long as the longest.
    """

    def __init__(self, kinds: Mapping[str, list[jax.ShapeDtypeStruct]]) -> None:
        counts = [Counter((s.shape, s.dtype) for s in specs) for specs in kinds.values()]
        common = counts[0]
        for other in counts[1:]:
            common &= other
        self.specs = [
            jax.ShapeDtypeStruct(shape, dtype)
            for (shape, dtype), n in common.items()
            for _ in range(n)
        ]
        self._own = dict(kinds)
        self._places: dict[str, list[int]] = {}
        longest: dict[Any, int] = {}
        for kind, specs in kinds.items():
            free: dict[Any, list[int]] = {}
            for place, spec in enumerate(self.specs):
                free.setdefault((spec.shape, spec.dtype), []).append(place)
            places, sizes = [], Counter()
            for spec in specs:
                row = free.get((spec.shape, spec.dtype))
                places.append(row.pop(0) if row else -1)
                if places[-1] < 0:
                    sizes[spec.dtype] += math.prod(spec.shape)
            self._places[kind] = places
            for dtype, size in sizes.items():
                longest[dtype] = max(longest.get(dtype, 0), size)
        self._common, self._dtypes = len(self.specs), list(longest)
        self.specs += [jax.ShapeDtypeStruct((n,), dtype) for dtype, n in longest.items()]

    def put(self, kind: str, values: Leaves) -> Leaves:
        """What a kind keeps -> arrays like `specs`."""
        held: list[Any] = [None] * len(self.specs)
        flat: dict[Any, Leaves] = {dtype: [] for dtype in self._dtypes}
        for place, value in zip(self._places[kind], values, strict=True):
            if place >= 0:
                held[place] = value
            else:
                flat[value.dtype].append(value.reshape(-1))
        for place, (dtype, parts) in enumerate(flat.items(), self._common):
            spare = self.specs[place].shape[0] - sum(part.size for part in parts)
            held[place] = jnp.concatenate([*parts, jnp.zeros((spare,), dtype)])
        return [
            jnp.zeros(spec.shape, spec.dtype) if value is None else value
            for value, spec in zip(held, self.specs, strict=True)
        ]

    def get(self, kind: str, held: Leaves) -> Leaves:
        """`put` undone."""
        starts = dict.fromkeys(self._dtypes, 0)
        values = []
        for place, spec in zip(self._places[kind], self._own[kind], strict=True):
            if place >= 0:
                values.append(held[place])
                continue
            row = held[self._common + self._dtypes.index(spec.dtype)]
            start = starts[spec.dtype]
            starts[spec.dtype] = start + math.prod(spec.shape)
            values.append(row[start : starts[spec.dtype]].reshape(spec.shape))
        return values
