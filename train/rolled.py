"""Runs a function of the user's tree on arrays that hold all layers of a leaf as one stack.

The function is traced on the user's tree, each layer's leaf an input of its own, so it means there
exactly what it means to the user. Then the trace is rolled up again. An equation whose inputs come
from one leaf of one layer belongs to that leaf. Where the equations of all layers of a stack are
alike they are run once, mapped over the stack's leading axis: arrays stay where they lie, whatever
the sharding. What joins several leaves (a global norm) is shared, and reads from the stacks only
what it needs, mostly one number a layer. Layers that are treated unlike (frozen, another rule) form
classes; numbers that alone differ (a learning rate a layer) become one row a layer. Nothing is
assumed of any optimizer: what cannot be rolled runs layer by layer, as it was traced.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxsys.lowering.jaxprs import is_literal, results_of, run
from jaxsys.train.alike import same, written_out
from jaxsys.train.rolling import Analysis, Class, Source
from jaxsys.train.state import Names

MOST_SPREAD = 1024
"""Elements a layer of what all devices get before it is read layer by layer."""


class Rolled:
    """A traced function, rolled up.

    Args:
        closed: its jaxpr.
        inputs: where each of its inputs is found.
        outputs: where each of its outputs goes.
        rows: for each stacked leaf, the row that holds each layer, and how many rows there are.
        small: called on stacks of a few numbers a layer that are about to be read one by one; a
            place to say that all devices should have them.
    """

    def __init__(
        self,
        closed: core.ClosedJaxpr,
        inputs: Sequence[Source],
        outputs: Sequence[Source],
        rows: Mapping[Names, tuple[np.ndarray, int]],
        small: Callable[[jax.Array], jax.Array] = lambda value: value,
    ) -> None:
        self._closed = written_out(closed)
        self._inputs, self._outputs, self._rows, self._small = inputs, outputs, rows, small
        stacks = {source.leaf for source in inputs if source.leaf is not None}
        rolled = set(stacks)
        while True:
            self._plan = Analysis(self._closed.jaxpr, inputs, outputs, rows, rolled)
            if not self._plan.unrollable:
                break
            rolled -= self._plan.unrollable

    @property
    def layer_by_layer(self) -> set[Names]:
        """The stacked leaves that could not be rolled up: each layer is taken out and put back."""
        every = {s.leaf for s in self._inputs if s.leaf is not None}
        return every - self._plan.rolled

    def __call__(self, arrays: Mapping[Names, jax.Array]) -> dict[Names, jax.Array]:
        """The outputs by key; `arrays` holds the inputs."""
        return _Run(self._plan, self._closed.consts, arrays, self._small).outputs()


class _Run:
    """One evaluation."""

    def __init__(
        self,
        plan: Analysis,
        consts: Sequence[Any],
        arrays: Mapping[Names, jax.Array],
        small: Callable[[jax.Array], jax.Array],
    ) -> None:
        self.plan, self.arrays, self.small = plan, arrays, small
        self.values: dict[Any, Any] = dict(zip(plan.jaxpr.constvars, consts, strict=True))
        self.stacked: dict[tuple[Names, int], dict[tuple[int, int], tuple[Any, bool]]] = (
            defaultdict(dict)
        )
        self.spread: dict[int, Any] = {}
        self.whole: dict[Any, Any] = {}
        for node in plan.order:
            leaf, number, place = node
            if leaf is None:
                self._run_shared(plan.jaxpr.eqns[place])
            else:
                self._run_stacked(leaf, number, place)

    def outputs(self) -> dict[Names, jax.Array]:
        plan = self.plan
        found: dict[Names, Any] = {}
        rows: dict[Names, dict[int, Any]] = defaultdict(dict)
        stacked: dict[Names, list[tuple[Class, Any]]] = defaultdict(list)
        leaf_of: dict[Names, Names] = {}
        for source, variable in plan.apart:
            if source.leaf is None:
                found[source.key] = self._read(variable)
            elif source.layer is None:
                order, count = plan.rows[source.leaf]
                value = self._read(variable)
                base = self._base(source.key, (count, *value.shape[1:]), value.dtype)
                found[source.key] = base.at[order].set(value)
            else:
                leaf_of[source.key] = source.leaf
                rows[source.key][source.layer] = self._read(variable)
        for leaf, classes in plan.classes.items():
            for number, alike in enumerate(classes):
                for key, entry in alike.bodies[0].outputs.items():
                    value, mapped = self._entry(leaf, number, alike, entry)
                    if alike.owners[0].layer is None:
                        found[key] = value
                        continue
                    if not mapped:
                        value = jnp.broadcast_to(
                            jnp.asarray(value)[None], (plan.rows[leaf][1], *jnp.shape(value))
                        )
                    leaf_of[key] = leaf
                    stacked[key].append((alike, value))
        for key, leaf in leaf_of.items():
            order, count = plan.rows[leaf]
            parts = stacked[key]
            if len(parts) == 1 and not rows[key] and len(parts[0][0].owners) == count:
                found[key] = parts[0][1]
                continue
            first = jnp.asarray(next(iter(rows[key].values()))) if rows[key] else parts[0][1]
            shape = first.shape if rows[key] else first.shape[1:]
            value = self._base(key, (count, *shape), first.dtype)
            for alike, part in parts:
                mine = np.zeros(count, bool)
                mine[[order[owner.layer] for owner in alike.owners]] = True
                value = jnp.where(mine.reshape(-1, *[1] * (part.ndim - 1)), part, value)
            if rows[key]:
                at = np.array([order[layer] for layer in rows[key]])
                value = value.at[at].set(jnp.stack(list(rows[key].values())))
            found[key] = value
        return found

    def _base(self, key: Names, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """What rows that nothing is written to hold: what they held."""
        return self.arrays[key] if key in self.arrays else jnp.zeros(shape, dtype)

    def _run_shared(self, equation: Any) -> None:
        for variable in equation.invars:
            if not is_literal(variable):
                self.values[variable] = self._read(variable)
        run([equation], self.values)

    def _read(self, variable: Any) -> Any:
        """A variable's value by itself, taken out of a stack if need be."""
        plan = self.plan
        if is_literal(variable):
            return variable.val
        if variable in self.values:
            return self.values[variable]
        owner = plan.owner[variable]
        source = plan.source.get(variable)
        if source is not None:
            self.values[variable] = self._row(
                ("input", source.key), self.arrays[source.key], source.leaf, source.layer
            )
            return self.values[variable]
        leaf, number, body = plan.home[owner]
        value, mapped = self._entry(
            leaf, number, plan.classes[leaf][number], body.exports[variable]
        )
        if mapped:
            value = self._row((leaf, number, body.exports[variable]), value, leaf, owner.layer)
        self.values[variable] = value
        return value

    def _row(self, name: Any, stack: jax.Array, leaf: Names | None, layer: int | None) -> Any:
        if leaf is None:
            return stack
        order, count = self.plan.rows[leaf]
        if layer is None:
            same = np.array_equal(order, np.arange(count))
            return stack if same else jnp.take(stack, order, axis=0)
        if stack.size <= MOST_SPREAD * count:
            if name not in self.spread:
                self.spread[name] = self.small(stack)
            stack = self.spread[name]
        return jax.lax.index_in_dim(stack, int(order[layer]), keepdims=False)

    def _run_stacked(self, leaf: Names, number: int, place: int) -> None:
        alike = self.plan.classes[leaf][number]
        body = alike.bodies[0]
        equation = body.equations[place]
        entries = [self._entry(leaf, number, alike, entry) for entry in body.wiring[place]]
        inputs = [value for value, _ in entries]
        axes = [0 if mapped else None for _, mapped in entries]

        def once(*inputs: Any) -> list[Any]:
            return results_of(equation, inputs)

        mapped = 0 in axes
        results = jax.vmap(once, in_axes=axes)(*inputs) if mapped else once(*inputs)
        for index, value in enumerate(results):
            self.stacked[leaf, number][place, index] = value, mapped

    def _entry(
        self, leaf: Names, number: int, alike: Class, entry: tuple[Any, ...]
    ) -> tuple[Any, bool]:
        """What a body reads, for all rows at once: (value, whether it has the rows' axis)."""
        kind, *where = entry
        whole = alike.owners[0].layer is None
        if kind == "input":
            return self.arrays[where[0]], not whole
        if kind == "local":
            return self.stacked[leaf, number][tuple(where)]
        if kind == "constant":
            each = [body.constants[where[0]] for body in alike.bodies]
            if all(same(value, each[0]) for value in each):
                return each[0], False
            return self._by_row(leaf, alike, [jnp.asarray(value) for value in each]), True
        variables = [body.shared[where[0]] for body in alike.bodies]
        if all(v is variables[0] for v in variables):
            return self._read(variables[0]), False
        name = (leaf, number, entry)
        if name not in self.whole:
            self.whole[name] = self._by_row(leaf, alike, [self._read(v) for v in variables])
        return self.whole[name], True

    def _by_row(self, leaf: Names, alike: Class, each: list[Any]) -> jax.Array:
        """One value a layer -> [rows, ...]; rows that hold none of these layers get the first."""
        order, count = self.plan.rows[leaf]
        at = np.zeros(count, np.int32)
        for number, owner in enumerate(alike.owners):
            at[order[owner.layer]] = number
        return jnp.stack([each[number] for number in at])
