"""Runs a function of the user's tree on arrays that hold all layers of a leaf as one stack.

The function is traced on the user's tree, each layer's leaf an input of its own, so it means exactly
what it means there. Then the trace is rolled up again. An equation whose inputs come from one leaf
of one layer belongs to that leaf. Where the equations of all layers of a stack are alike they are run
once, mapped over the stack's leading axis: arrays stay where they lie, whatever the sharding. What
joins several leaves (a global norm) is shared, and reads from the stacks only what it needs, mostly
one number a layer. Layers that are treated unlike (frozen, another rule) form classes; numbers that
alone differ (a learning rate a layer) become one row a layer. Nothing is assumed of any optimizer:
what cannot be rolled runs layer by layer, as it was traced.
"""

import graphlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxsys.layered import PyTree
from jaxsys.lowering.jaxprs import CALLS, is_literal, results_of, run, value_of
from jaxsys.train.view import Names

MOST_CLASSES = 4
"""Of unlike layers of one stack: each class is computed for all rows, and its own are kept."""

SMALL = 4
"""Elements of what may be spread over a whole leaf in place: a scalar, or a random key's words."""

ELEMENTWISE = frozenset(
    "abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy "
    "cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p "
    "logistic lt max min mul ne neg nextafter not or pow real imag conj complex rem round rsqrt "
    "select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor add_any".split()
)
"""Primitives that treat every element by itself, wherever it lies."""


class Source(NamedTuple):
    """Where a leaf of the traced function is found, or goes to."""

    key: Names
    """Of the array at rest."""
    leaf: Names | None = None
    """The stacked parameter it follows; its rows are that one's. None: a plain array."""
    layer: int | None = None
    """Which layer of the stack; None: all of it, in layer order."""


class _Owner(NamedTuple):
    leaf: Names
    layer: int | None


_SHARED, _SPREAD = "shared", "spread"


def written_out(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The jaxpr without calls, and with both branches of every condition and a choice of results.

    A condition over the whole tree (gradient accumulation, skipping bad updates) would tie all its
    leaves together.
    """

    def bodies(equation: Any) -> list[Any] | None:
        if equation.primitive.name == "cond":
            branches = list(equation.params["branches"])
            return None if any(b.effects for b in branches) else branches
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        return [inner] if equation.primitive.name in CALLS and inner is not None else None

    def evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        values = dict(zip(jaxpr.invars, args, strict=True))
        values.update(zip(jaxpr.constvars, consts, strict=True))
        for equation in jaxpr.eqns:
            inner = bodies(equation)
            if inner is None:
                run([equation], values)
                continue
            inputs = [value_of(v, values) for v in equation.invars]
            which, inputs = (
                (inputs[0], inputs[1:]) if equation.primitive.name == "cond" else (None, inputs)
            )
            results = [
                evaluate(body.jaxpr, body.consts, inputs)
                if hasattr(body, "consts")
                else evaluate(body, (), inputs)
                for body in inner
            ]
            chosen = results[0] if which is None else [_choice(which, r) for r in zip(*results)]
            values.update(zip(equation.outvars, chosen, strict=True))
        return [value_of(v, values) for v in jaxpr.outvars]

    return jax.make_jaxpr(lambda *args: evaluate(closed.jaxpr, closed.consts, args))(
        *closed.in_avals
    )


def _choice(which: Any, results: Sequence[Any]) -> Any:
    if len(results) == 1 or all(r is results[0] for r in results):
        return results[0]
    index = jnp.clip(which, 0, len(results) - 1)
    if len(results) == 2:
        index = index.astype(bool)
    return jax.lax.select_n(index, *results)


@dataclass(slots=True)
class _Body:
    """What one owner computes, in names of its own, so that layers can be compared."""

    signature: Hashable
    equations: list[Any]
    wiring: list[list[tuple[Any, ...]]]
    """An entry for each input of each equation, see `_Analysis._body`."""
    constants: list[Any]
    """Values of literals, by number."""
    shared: list[Any]
    """Variables read from outside, by number."""
    outputs: dict[Names, tuple[Any, ...]]
    """Key -> the entry that is written there."""
    exports: dict[Any, tuple[Any, ...]]
    """Variable that others read -> its entry."""


@dataclass(slots=True)
class _Class:
    """Layers of one stack whose bodies are alike."""

    owners: list[_Owner] = field(default_factory=list)
    bodies: list[_Body] = field(default_factory=list)


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
            self._plan = _Analysis(self._closed.jaxpr, inputs, outputs, rows, rolled)
            if not self._plan.unrollable:
                break
            rolled -= self._plan.unrollable

    @property
    def layer_by_layer(self) -> set[Names]:
        """The stacked leaves that could not be rolled up: each layer is taken out and put back."""
        every = {s.leaf for s in self._inputs if s.leaf is not None}
        return every - self._plan.rolled

    def __call__(self, arrays: Mapping[Names, jax.Array]) -> dict[Names, jax.Array]:
        """The outputs by key; `arrays` holds the inputs, and outputs that keep rows of their own."""
        return _Run(self._plan, self._closed.consts, arrays, self._small).outputs()


class _Analysis:
    def __init__(
        self,
        jaxpr: Any,
        inputs: Sequence[Source],
        outputs: Sequence[Source],
        rows: Mapping[Names, tuple[np.ndarray, int]],
        rolled: set[Names],
    ) -> None:
        self.jaxpr, self.inputs, self.outputs, self.rows = jaxpr, inputs, outputs, rows
        self.rolled = rolled
        self.unrollable: set[Names] = set()
        self.source = dict(zip(jaxpr.invars, inputs, strict=True))
        self.owner: dict[Any, Any] = {}
        self.maker: dict[Any, tuple[int, int]] = {}
        self._assign()
        self.exports: dict[_Owner, dict[Any, None]] = defaultdict(dict)
        self.needed: set[tuple[Any, int]] = set()
        self.mine: dict[_Owner, dict[Names, Any]] = defaultdict(dict)
        self.apart: list[tuple[Source, Any]] = []
        self._demand()
        self.classes: dict[Names, list[_Class]] = {}
        self.order: list[Any] = []
        if not self.unrollable:
            self._classify()
        if not self.unrollable:
            self._sort()

    def _assign(self) -> None:
        for variable, source in self.source.items():
            rolled = source.leaf in self.rolled
            self.owner[variable] = _Owner(source.leaf, source.layer) if rolled else _SHARED
        for variable in self.jaxpr.constvars:
            self.owner[variable] = _SHARED
        for index, equation in enumerate(self.jaxpr.eqns):
            read = [v for v in equation.invars if not is_literal(v)]
            owners = {self.owner[v] for v in read}
            owned = {o for o in owners if isinstance(o, _Owner)}
            if equation.effects or len(owned) > 1:
                owner: Any = _SHARED
            elif owned:
                owner = owned.pop()
            elif _SPREAD in owners or self._spreads(equation, read):
                owner = _SPREAD
            else:
                owner = _SHARED
            for place, variable in enumerate(equation.outvars):
                self.owner[variable] = owner
                self.maker[variable] = index, place

    @staticmethod
    def _spreads(equation: Any, read: list[Any]) -> bool:
        return all(v.aval.size <= SMALL for v in read) and any(
            v.aval.size > SMALL or (not read and v.aval.shape) for v in equation.outvars
        )

    def _demand(self) -> None:
        for variable, source in zip(self.jaxpr.outvars, self.outputs, strict=True):
            place = _Owner(source.leaf, source.layer) if source.leaf in self.rolled else None
            owner = _SPREAD if is_literal(variable) else self.owner[variable]
            if place is not None and owner in (place, _SPREAD):
                self.mine[place][source.key] = variable
                self._require(variable, place)
            else:
                self.apart.append((source, variable))
                self._require(variable, None)
        for index, equation in enumerate(self.jaxpr.eqns):
            if equation.effects:
                self._require_equation(index, None)

    def _require(self, variable: Any, context: _Owner | None) -> None:
        waiting = [(variable, context)]
        while waiting:
            variable, context = waiting.pop()
            if is_literal(variable):
                continue
            owner = self.owner[variable]
            if isinstance(owner, _Owner):
                if context != owner:
                    self.exports[owner][variable] = None
                context = owner
            elif owner is _SHARED:
                context = None
            made = self.maker.get(variable)
            if made is None or (context, made[0]) in self.needed:
                continue
            self.needed.add((context, made[0]))
            waiting += [(v, context) for v in self.jaxpr.eqns[made[0]].invars]

    def _require_equation(self, index: int, context: _Owner | None) -> None:
        self.needed.add((context, index))
        for variable in self.jaxpr.eqns[index].invars:
            self._require(variable, context)

    def _classify(self) -> None:
        by_owner: dict[_Owner, list[int]] = defaultdict(list)
        for context, index in self.needed:
            if context is not None:
                by_owner[context].append(index)
        owners = dict.fromkeys([*by_owner, *self.mine, *self.exports])
        found: dict[Names, dict[Hashable, _Class]] = defaultdict(dict)
        for owner in sorted(owners, key=lambda o: (o.leaf, -1 if o.layer is None else o.layer)):
            body = self._body(owner, sorted(by_owner[owner]))
            if owner.layer is None and not self._in_place(owner, body):
                self.unrollable.add(owner.leaf)
            alike = found[owner.leaf].setdefault(body.signature, _Class())
            alike.owners.append(owner)
            alike.bodies.append(body)
        for leaf, classes in found.items():
            self.classes[leaf] = list(classes.values())
            padded = self.rows[leaf][1] > sum(len(c.owners) for c in self.classes[leaf])
            loops = any(
                equation.primitive.name == "while"
                for c in self.classes[leaf]
                for equation in c.bodies[0].equations
            )
            # A loop until something holds might not end on rows that hold nothing.
            if len(self.classes[leaf]) > MOST_CLASSES or (
                loops and (padded or len(self.classes[leaf]) > 1)
            ):
                self.unrollable.add(leaf)

    def _body(self, owner: _Owner, indices: list[int]) -> _Body:
        equations = [self.jaxpr.eqns[i] for i in indices]
        local: dict[Any, tuple[int, int]] = {}
        constants: list[Any] = []
        shared: dict[Any, int] = {}
        signature: list[Hashable] = []

        def entry(variable: Any) -> tuple[Any, ...]:
            if is_literal(variable):
                constants.append(variable.val)
                return ("constant", len(constants) - 1)
            if variable in local:
                return ("local", *local[variable])
            if self.owner[variable] == owner:
                return ("input", self.source[variable].key)
            return ("shared", shared.setdefault(variable, len(shared)))

        wiring = []
        for number, equation in enumerate(equations):
            wiring.append([entry(v) for v in equation.invars])
            local.update({v: (number, place) for place, v in enumerate(equation.outvars)})
            signature.append(
                (
                    equation.primitive.name,
                    _canonical(equation.params),
                    tuple(wiring[-1]),
                    tuple(_kind(v) for v in (*equation.invars, *equation.outvars)),
                )
            )
        outputs = {key: entry(v) for key, v in self.mine[owner].items()}
        # In the order in which they were made, which is the same for like layers.
        order = sorted(self.exports[owner], key=lambda v: self.maker.get(v, (-1, 0)))
        exports = {v: entry(v) for v in order}
        kinds = [_kind(v) for v in self.mine[owner].values()]
        return _Body(
            signature=(
                tuple(signature),
                tuple(sorted(outputs.items())),
                tuple(kinds),
                tuple(exports.values()),
                tuple(_kind(v) for v in shared),
            ),
            equations=equations,
            wiring=wiring,
            constants=constants,
            shared=list(shared),
            outputs=outputs,
            exports=exports,
        )

    def _in_place(self, owner: _Owner, body: _Body) -> bool:
        """Whether a whole stack's equations do the same in whatever order its rows lie."""
        order, count = self.rows[owner.leaf]
        if np.array_equal(order, np.arange(count)):
            return True
        if len(order) != count or body.exports:
            return False
        shape = self._stack_shape(owner)
        for equation in body.equations:
            spread = equation.primitive.name == "broadcast_in_dim" and all(
                not v.aval.shape for v in equation.invars
            )
            if not spread and equation.primitive.name not in ELEMENTWISE:
                return False
            variables = (*equation.invars, *equation.outvars)
            if any(v.aval.shape not in ((), shape) for v in variables):
                return False
        return all(v.aval.shape == shape for v in self.mine[owner].values())

    def _stack_shape(self, owner: _Owner) -> tuple[int, ...]:
        shapes = {v.aval.shape for v, s in self.source.items() if (s.leaf, s.layer) == owner}
        return shapes.pop() if len(shapes) == 1 else (-1,)

    def _sort(self) -> None:
        """An order in which every node finds what it reads; nodes are equations run once."""
        home: dict[_Owner, tuple[Names, int, _Body]] = {}
        for leaf, classes in self.classes.items():
            for number, alike in enumerate(classes):
                for owner, body in zip(alike.owners, alike.bodies, strict=True):
                    home[owner] = (leaf, number, body)
        self.home = home

        def node_of(variable: Any) -> Any:
            if is_literal(variable):
                return None
            owner = self.owner[variable]
            if isinstance(owner, _Owner):
                leaf, number, body = home[owner]
                kind, *where = body.exports[variable]
                return (leaf, number, where[0]) if kind == "local" else None
            made = self.maker.get(variable)
            return None if made is None else (None, 0, made[0])

        graph: dict[Any, set[Any]] = {}
        for context, index in self.needed:
            if context is None:
                reads = self.jaxpr.eqns[index].invars
                graph[None, 0, index] = {node_of(v) for v in reads} - {None}
        for leaf, classes in self.classes.items():
            for number, alike in enumerate(classes):
                for place, wires in enumerate(alike.bodies[0].wiring):
                    needs: set[Any] = set()
                    for kind, *where in wires:
                        if kind == "local":
                            needs.add((leaf, number, where[0]))
                        elif kind == "shared":
                            needs |= {node_of(body.shared[where[0]]) for body in alike.bodies}
                    graph[leaf, number, place] = needs - {None}
        try:
            self.order = list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            # One layer waits for another: they cannot be run at once.
            self.unrollable |= {node[0] for node in error.args[1] if node[0] is not None}


class _Run:
    """One evaluation."""

    def __init__(
        self,
        plan: _Analysis,
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
        stacked: dict[Names, list[tuple[_Class, Any]]] = defaultdict(list)
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
        if stack.size <= 1024 * count:
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
        self, leaf: Names, number: int, alike: _Class, entry: tuple[Any, ...]
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
            if all(_same(value, each[0]) for value in each):
                return each[0], False
            return self._by_row(leaf, alike, [jnp.asarray(value) for value in each]), True
        variables = [body.shared[where[0]] for body in alike.bodies]
        if all(v is variables[0] for v in variables):
            return self._read(variables[0]), False
        name = (leaf, number, entry)
        if name not in self.whole:
            self.whole[name] = self._by_row(leaf, alike, [self._read(v) for v in variables])
        return self.whole[name], True

    def _by_row(self, leaf: Names, alike: _Class, each: list[Any]) -> jax.Array:
        """One value a layer -> [rows, ...]; rows that hold none of these layers get the first."""
        order, count = self.plan.rows[leaf]
        at = np.zeros(count, np.int32)
        for number, owner in enumerate(alike.owners):
            at[order[owner.layer]] = number
        return jnp.stack([each[number] for number in at])


def _kind(variable: Any) -> Hashable:
    aval = variable.aval
    return aval.shape, str(aval.dtype), getattr(aval, "weak_type", False)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    a, b = np.asarray(one), np.asarray(other)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _canonical(value: Any) -> Hashable:
    """Something equal for parameters of equations that mean the same."""
    if isinstance(value, Mapping):
        return tuple(sorted((k, _canonical(v)) for k, v in value.items()))
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(_canonical(v) for v in value)
    if hasattr(value, "jaxpr") and hasattr(value, "consts"):
        consts = tuple(
            (c.shape, str(c.dtype), np.asarray(c).tobytes())
            if getattr(c, "size", 2**30) <= SMALL and not isinstance(c, jax.core.Tracer)
            else id(c)
            for c in value.consts
        )
        return _canonical(value.jaxpr), consts
    if hasattr(value, "eqns"):
        return _canonical_jaxpr(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _canonical_jaxpr(jaxpr: Any) -> Hashable:
    numbers: dict[Any, int] = {}

    def name(variable: Any) -> Hashable:
        if is_literal(variable):
            value = np.asarray(variable.val)
            return "literal", value.tobytes(), value.shape, str(value.dtype)
        return numbers.setdefault(variable, len(numbers)), _kind(variable)

    head = tuple(name(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    body = tuple(
        (
            equation.primitive.name,
            _canonical(equation.params),
            tuple(name(v) for v in equation.invars),
            tuple(name(v) for v in equation.outvars),
        )
        for equation in jaxpr.eqns
    )
    return head, body, tuple(name(v) for v in jaxpr.outvars)


def traced(function: Callable[..., PyTree], *shapes: PyTree) -> tuple[core.ClosedJaxpr, PyTree]:
    """A function's jaxpr, and the shapes that it returns."""
    return jax.make_jaxpr(function, return_shape=True)(*shapes)
