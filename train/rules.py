"""An optax optimizer on parameters at rest, each layer's leaf seen as the user's own model has it.

The optimizer's `init` and `update` are traced on the user's tree (`view`) and run rolled up on the
stacks (`rolled`). Its state is kept likewise: what follows a layer's leaf, found by its path, is
stacked with the other layers' and lies where that leaf lies; what follows nothing (a count) is
everywhere.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.axes import RING
from jaxsys.layered import Parameters, PyTree
from jaxsys.lowering.reshard import reshard
from jaxsys.mesh import over, ring_axis, shard_axes
from jaxsys.train.alike import traced
from jaxsys.train.refusals import asking, check_same
from jaxsys.train.rolled import Rolled
from jaxsys.train.rolling import Source
from jaxsys.train.state import Names, path_names
from jaxsys.train.view import UserTree, View, trains, user_tree

Rows = Mapping[Names, tuple[np.ndarray, int]]
"""Stacked leaf -> the row that holds each layer, and how many rows there are."""

Arrays = dict[Names, Any]


def by_name(tree: PyTree) -> Arrays:
    """The leaves of a tree by their paths."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_names(path): leaf for path, leaf in flat}


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype alone."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An optimizer for parameters of known shapes; knows no schedule. Made by `rule_of`."""

    optimizer: optax.GradientTransformation
    tree: UserTree
    layers: Mapping[Names, int]
    """Stacked leaf -> L."""
    state_structure: Any
    """Of the optimizer's state for the user's tree."""
    sources: tuple[Source, ...]
    """Where each leaf of that state is kept."""
    structure: Any
    """Of the state as it is kept."""
    keys: tuple[Names, ...]
    """Of its leaves."""
    row_shapes: Mapping[Names, jax.ShapeDtypeStruct]
    """Of one row of what is stacked, of all of what is not."""

    @cached_property
    def stacked(self) -> dict[Names, Names]:
        """Of the state's leaves, those with rows -> the parameter they follow."""
        return {s.key: s.leaf for s in self.sources if s.leaf is not None}

    def shapes(self, counts: Mapping[Names, int] | None = None) -> PyTree:
        """The kept state's shapes with so many rows a stacked leaf; in layer order, if none."""
        counts = counts or self.layers

        def shape(key: Names) -> jax.ShapeDtypeStruct:
            row, leaf = self.row_shapes[key], self.stacked.get(key)
            if leaf is None or self._is_whole(key):
                lead = () if leaf is None else (counts[leaf],)
                return jax.ShapeDtypeStruct((*lead, *row.shape[len(lead) :]), row.dtype)
            return jax.ShapeDtypeStruct((counts[leaf], *row.shape), row.dtype)

        return self.kept({key: shape(key) for key in self.keys})

    def shardings(
        self, mesh: Mesh, parameters: Parameters, state: PyTree, at: Parameters
    ) -> PyTree:
        """Where the kept state lies.

        Args:
            mesh: where.
            parameters: shapes, at rest or in layer order.
            state: shapes of the kept state, likewise.
            at: where the parameters lie.
        """
        shapes, places = by_name(parameters), by_name(at)

        def place(key: Names, leaf: Any) -> NamedSharding:
            follows = self.stacked.get(key) or self._edge_of(key)
            if follows is None:
                return NamedSharding(mesh, PartitionSpec())
            spec, rows = places[follows].spec, key in self.stacked
            if leaf.shape == shapes[follows].shape:
                return NamedSharding(mesh, spec)
            if rows and spec[:1] == (RING,):
                return NamedSharding(mesh, PartitionSpec(RING))
            # Rows, columns or sums of a parameter: along an axis of their own, if one divides.
            free = range(int(rows), leaf.ndim)
            along = ring_axis(spec)
            whole = () if along is None else spec[along] if isinstance(spec[along], tuple) else ()
            names = tuple(name for name in shard_axes(mesh) if name in (RING, *whole))
            parts = math.prod(mesh.shape[name] for name in names)
            axes = [a for a in free if leaf.shape[a] and leaf.shape[a] % parts == 0]
            cut = [None] * axes[0] + [over(names)] if axes and along is not None else []
            return NamedSharding(mesh, PartitionSpec(*cut))

        return self.kept({key: place(key, leaf) for key, leaf in self.apart(state).items()})

    def kept(self, arrays: Mapping[Names, Any]) -> PyTree:
        """The state as it is kept, of its leaves by key."""
        return jax.tree.unflatten(self.structure, [arrays[key] for key in self.keys])

    def apart(self, state: PyTree) -> Arrays:
        """The leaves of a kept state by key."""
        return dict(zip(self.keys, self.structure.flatten_up_to(state), strict=True))

    def user_state(self, state: PyTree) -> PyTree:
        """A kept state in layer order, as the user's own loop would have it."""
        arrays = self.apart(state)
        leaves = [
            arrays[s.key] if s.layer is None else arrays[s.key][s.layer] for s in self.sources
        ]
        return jax.tree.unflatten(self.state_structure, leaves)

    def _is_whole(self, key: Names) -> bool:
        return key in self._whole

    @cached_property
    def _whole(self) -> set[Names]:
        return {s.key for s in self.sources if s.leaf is not None and s.layer is None}

    def _edge_of(self, key: Names) -> Names | None:
        names = (place.leaf for place in self.tree.places if place.leaf[0] == "edge")
        return next((n for n in names if key[-len(n) :] == n), None)


def rule_of(
    optimizer: optax.GradientTransformation, parameters: Parameters, view: View | None = None
) -> Rule:
    """Traces an optimizer's `init`.

    Args:
        optimizer: any that takes (updates, state, params).
        parameters: shapes, in layer order.
        view: the model's; None for `view.layer_by_layer`.

    Raises:
        UsageError: if the optimizer needs more than gradients, state and parameters, or does not
            take the user's tree.
    """
    tree = user_tree(view, parameters)
    state = asking(optimizer, lambda: jax.eval_shape(optimizer.init, tree.tree()))
    layers = {n: leaf.shape[0] for n, leaf in by_name(parameters).items() if n[0] == "blocks"}
    flat, state_structure = jax.tree_util.tree_flatten_with_path(state)
    sources = _sources([(path_names(path), leaf) for path, leaf in flat], tree, layers)
    row_shapes = {s.key: shape_of(leaf) for s, (_, leaf) in zip(sources, flat, strict=True)}
    keys = tuple(row_shapes)
    _, structure = jax.tree.flatten(_nested(keys))
    rule = Rule(
        optimizer=optimizer,
        tree=tree,
        layers=layers,
        state_structure=state_structure,
        sources=tuple(sources),
        structure=structure,
        keys=tuple(tuple(key) for key in jax.tree.leaves(_nested(keys))),
        row_shapes=row_shapes,
    )
    return _in_own_structure(rule, parameters) or rule


class RuleAtRest:
    """A rule on parameters that rest where a schedule has them.

    Args:
        rule: the rule.
        parameters: shapes at rest.
        rows: of each stacked leaf.
        mesh: where they rest.
    """

    def __init__(self, rule: Rule, parameters: Parameters, rows: Rows, mesh: Mesh) -> None:
        self.rule, self._rows, self._mesh = rule, rows, mesh
        self._parameters = by_name(parameters)
        self.state_shapes = rule.shapes({leaf: count for leaf, (_, count) in rows.items()})
        tree, optimizer = rule.tree, rule.optimizer
        state = jax.tree.unflatten(
            rule.state_structure, [shape_of(s) for s in self._user_state_shapes()]
        )
        self._in = self._sources_of("parameters")
        gradients = self._sources_of("gradients")
        kept = [s._replace(key=("state", *s.key)) for s in rule.sources]
        started, _ = traced(optimizer.init, tree.tree())
        self._init = self._rolled(started, self._in, kept)

        def update(gradients: PyTree, state: PyTree, parameters: PyTree) -> tuple[PyTree, PyTree]:
            updates, state = optimizer.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        updated, out = asking(optimizer, lambda: traced(update, tree.tree(), state, tree.tree()))
        check_same(optimizer, (tree.tree(), state), out)
        self._update = self._rolled(updated, [*gradients, *kept, *self._in], [*self._in, *kept])

    @property
    def layer_by_layer(self) -> set[Names]:
        """Stacked leaves whose layers are taken apart to be updated, see `rolled`."""
        return self._update.layer_by_layer

    def init(self, parameters: Parameters) -> PyTree:
        """The state for parameters at rest."""
        found = self._init(self._named("parameters", by_name(parameters)))
        return self.rule.kept({key: found["state", *key] for key in self.rule.keys})

    def update(
        self, gradients: Parameters, state: PyTree, parameters: Parameters
    ) -> tuple[Parameters, PyTree]:
        """Parameters and state after one step, all at rest; constants stay."""
        found = self._update(
            {
                **self._named("parameters", by_name(parameters)),
                **self._named("gradients", by_name(gradients)),
                **self._named("state", self.rule.apart(state)),
            }
        )
        new = jax.tree_util.tree_map_with_path(
            lambda path, leaf: found.get(("parameters", *path_names(path)), leaf), parameters
        )
        return new, self.rule.kept({key: found["state", *key] for key in self.rule.keys})

    def to_layer_order(self, state: PyTree, at_rest: PyTree, at: PyTree) -> PyTree:
        """A state at rest, which lies as `at_rest` says -> layer order, where it lies as `at`."""
        before, after = self.rule.apart(at_rest), self.rule.apart(at)

        def move(key: Names, leaf: jax.Array) -> jax.Array:
            # Cut along another axis first: the layers' order then changes within each device.
            leaf = reshard(leaf, self._mesh, before[key].spec, after[key].spec)
            if key not in self.rule.stacked:
                return leaf
            order, count = self._rows[self.rule.stacked[key]]
            if np.array_equal(order, np.arange(count)):
                return leaf
            return jnp.take(leaf, order, axis=0)

        return self._moved(state, move)

    def to_rest(self, state: PyTree, at: PyTree, at_rest: PyTree) -> PyTree:
        """A state in layer order -> at rest; rows that hold no layer are zero."""
        before, after = self.rule.apart(at), self.rule.apart(at_rest)

        def move(key: Names, leaf: jax.Array) -> jax.Array:
            if key in self.rule.stacked:
                order, count = self._rows[self.rule.stacked[key]]
                back = np.full(count, len(order))
                back[order] = np.arange(len(order))
                if len(order) < count:
                    leaf = jnp.pad(leaf, [(0, 1)] + [(0, 0)] * (leaf.ndim - 1))
                leaf = jnp.take(leaf, back, axis=0)
            return reshard(leaf, self._mesh, before[key].spec, after[key].spec)

        return self._moved(state, move)

    def _moved(self, state: PyTree, move: Callable[[Names, jax.Array], jax.Array]) -> PyTree:
        return self.rule.kept(
            {key: move(key, leaf) for key, leaf in self.rule.apart(state).items()}
        )

    def _named(self, part: str, arrays: Arrays) -> Arrays:
        return {(part, *name): leaf for name, leaf in arrays.items()}

    def _sources_of(self, part: str) -> list[Source]:
        return [
            Source((part, *p.leaf), p.leaf if p.leaf[0] == "blocks" else None, p.layer)
            for p in self.rule.tree.places
        ]

    def _user_state_shapes(self) -> list[Any]:
        return [self.rule.row_shapes[s.key] for s in self.rule.sources]

    def _rolled(self, closed: Any, inputs: list[Source], outputs: list[Source]) -> Rolled:
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return Rolled(
            closed,
            inputs,
            outputs,
            self._rows,
            lambda stack: jax.lax.with_sharding_constraint(stack, everywhere),
        )


def _sources(
    state: list[tuple[Names, Any]], tree: UserTree, layers: Mapping[Names, int]
) -> list[Source]:
    """Where each leaf of a state for the user's tree is kept."""
    places = dict(zip(tree.paths, tree.places, strict=True))
    found = []
    shapes: dict[Names, set[Any]] = defaultdict(set)
    for names, leaf in state:
        spans = [
            (start, end)
            for start in range(len(names))
            for end in range(start + 1, len(names) + 1)
            if names[start:end] in places
        ]
        if not spans:
            found.append(Source(names))
            continue
        start, end = max(spans, key=lambda span: (span[1] - span[0], span[0]))
        place = places[names[start:end]]
        key = (*names[:start], *place.leaf, *names[end:])
        stacked = place.leaf[0] == "blocks"
        if stacked and place.layer is None:
            stacked = leaf.shape[:1] == (layers[place.leaf],)
        found.append(Source(key, place.leaf, place.layer) if stacked else Source(key))
        shapes[key].add((leaf.shape, leaf.dtype, found[-1].leaf))
    # Layers whose states are shaped unlike are kept one by one, as are names that would collide.
    keys = {source.key for source in found}
    plain = {key for key in keys if len(shapes[key]) > 1}
    plain |= {key for key in keys for n in range(1, len(key)) if key[:n] in keys}
    count = {key: 0 for key in keys}
    for index, source in enumerate(found):
        count[source.key] += 1
        if source.key in plain or (source.leaf is None and count[source.key] > 1):
            found[index] = Source((f"leaf-{index}",))
    return found


def _nested(keys: tuple[Names, ...]) -> dict[str, Any]:
    """Dictionaries whose leaves are the keys themselves, wrapped so that they are leaves."""
    root: dict[str, Any] = {}
    for key in keys:
        node = root
        for name in key[:-1]:
            node = node.setdefault(name, {})
        node[key[-1]] = _Key(key)
    return root


class _Key(tuple):
    """A path that is a leaf: only plain tuples are nodes."""

    __slots__ = ()


def _in_own_structure(rule: Rule, parameters: Parameters) -> Rule | None:
    """The rule with the state kept in optax's own structure, where that has the same leaves.

    So checkpoints do not depend on the view where nothing else does.
    """
    stacks = jax.tree.map(lambda leaf: shape_of(leaf) if trains(leaf) else None, parameters)
    try:
        state = jax.eval_shape(rule.optimizer.init, stacks)
    except Exception:  # noqa: BLE001  the user's own functions, on a tree not meant for them
        return None
    wanted = rule.apart(rule.shapes())
    named = by_name(state)
    same = named.keys() == wanted.keys() and all(
        (leaf.shape, leaf.dtype) == (wanted[key].shape, wanted[key].dtype)
        for key, leaf in named.items()
    )
    if not same:
        return None
    return replace(rule, structure=jax.tree.structure(state), keys=tuple(named))
