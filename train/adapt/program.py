"""A traced function as a flat list of operations whose every use can be followed.

Calls (`jit`, `nn.jit`) are written out, and so is a `remat` around whole blocks, because schedules
recompute on their own. A loop over stacked blocks (`nn.scan`, `nnx.scan`, `lax.scan`) is unrolled
into one body a layer, each with the layer's own slices of the stack as its parameters.
Everything else stays one operation. What does not depend on blocks and is computed twice from the
same values is one value.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray

from jaxsys.errors import UsageError
from jaxsys.train.adapt import rows
from jaxsys.train.adapt.fingerprint import (
    Derivatives,
    aval_of_type,
    fingerprint,
    opened,
    scan_counts,
    words_of,
)
from jaxsys.train.adapt.linear import not_linear, why_not_by_parts
from jaxsys.train.adapt.values import (
    BatchLeaf,
    BlockLeaf,
    Constant,
    EdgeLeaf,
    Layer,
    Operation,
    Program,
    StackedLeaf,
    Value,
    bind,
    known,
    needed,
)


def trace(
    function: Callable[..., Any],
    leaves: Sequence[Value],
    avals: Sequence[Any],
    microbatch: Any,
    *,
    apart: bool = False,
) -> Program:
    """Traces `function(leaves, microbatch)` flat.

    Args:
        function: of a list of parameter leaves and a microbatch.
        leaves: what each parameter leaf is.
        avals: their shapes and dtypes.
        microbatch: shapes and dtypes.
        apart: write out every remat and scan, to see what comes through them unchanged.

    Returns:
        The program; its outputs are the leaves of the function's result.
    """
    closed = jax.make_jaxpr(function)(list(avals), microbatch)
    batch = [
        BatchLeaf(aval=v.aval, number=n, varies=True)
        for n, v in enumerate(closed.jaxpr.invars[len(avals) :])
    ]
    flat = _Flat(leaf_counts=_leaf_counts(leaves), apart=apart)
    program = flat.program(closed, [*leaves, *batch])
    whole = _used_whole(program)
    if whole is None:
        return program
    # Beside the scan over layers: now that its axes are known, row by row.
    again = _Flat(leaf_counts=flat.leaf_counts, apart=apart)
    lengths = {**_common_lengths(leaves), **flat.lengths}
    apart_leaves = [again.rows_of(leaf, flat.axes, lengths) for leaf in leaves]
    program = again.program(closed, [*apart_leaves, *batch])
    if _used_whole(program) is not None or not (flat.lengths or again.takes_rows):
        raise UsageError(whole)
    program.whole = whole
    return program


def _common_lengths(leaves: Sequence[Value]) -> dict[int, int]:
    """Group of stacked parameters -> the length of axis 0, where all have the same."""
    found: dict[int, set[int]] = {}
    for leaf in leaves:
        if isinstance(leaf, StackedLeaf):
            found.setdefault(leaf.group, set()).update(leaf.aval.shape[:1] or (0,))
    return {group: min(lengths) for group, lengths in found.items() if len(lengths) == 1}


def _used_whole(program: Program) -> str | None:
    """What is said of a stack that an operation reads whole; None where there is none."""
    for operation in program.operations:
        for value in operation.inputs:
            if isinstance(value, StackedLeaf):
                return (
                    f"the stacked parameter {'/'.join(value.name)} is used whole by "
                    f"{operation.primitive.name}, not layer by layer by a scan; hand over a model "
                    "whose blocks use their own slice alone"
                )
    return None


def values_of(function: Callable[..., Any], parameters: Any, microbatch: Any) -> Any:
    """The tree that a function of parameters and a microbatch returns, of values of a program."""
    shapes: list[Any] = []

    def flat(leaves: Sequence[Any], microbatch: Any) -> list[Any]:
        results, structure = jax.tree.flatten(
            function(jax.tree.unflatten(whole, leaves), microbatch)
        )
        shapes[:] = [structure]
        return results

    leaves, whole = jax.tree.flatten(parameters)
    avals = [jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in leaves]
    values = [EdgeLeaf(aval=aval, depends=True, number=n) for n, aval in enumerate(avals)]
    outputs = trace(flat, values, avals, microbatch, apart=True).outputs
    return jax.tree.unflatten(shapes[0], outputs)


def is_still(value: Value, original: Any) -> bool:
    """Whether a value of a program is what a constant was before it."""
    if value.depends or value.varies:
        return False
    now, before = words_of(known(value))[0], words_of(original)[0]
    return now.dtype == before.dtype and np.array_equal(now, before)


_CALLS = ("pjit", "jit", "closed_call", "core_call")
_REMAT = ("remat", "remat2", "checkpoint")
_VIEWS = (
    "convert_element_type",
    "transpose",
    "copy",
    "copy_p",
    "reduce_precision",
)
"""Of a stacked parameter, done to the whole or to each layer's slice alike."""


@dataclass(slots=True)
class _Flat:
    leaf_counts: dict[Any, int]
    """Leaves of a block, by layer or, where they are stacked, by group."""
    apart: bool
    operations: list[Operation] = field(default_factory=list)
    known: dict[Any, tuple[Value, ...]] = field(default_factory=dict)
    """Operations that depend on no block, by what they compute."""
    axes: dict[tuple[int, tuple[str, ...]], int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    slices: dict[tuple[int, int, tuple[str, ...]], BlockLeaf] = field(default_factory=dict)
    constants: dict[Any, Constant] = field(default_factory=dict)
    derivatives: Derivatives = field(default_factory=dict)
    takes_rows: bool = False
    """Whether a scan took rows apart."""
    calls: tuple[Any, ...] = ()
    """Where calls were written that are being written out, innermost first."""
    linear: dict[Any, bool] = field(default_factory=dict)
    """Mark of an operation -> whether its custom derivatives, if it has any, are linear."""

    def program(self, closed: Any, inputs: Sequence[Value]) -> Program:
        """A jaxpr as a program."""
        found = self.jaxpr(closed.jaxpr, closed.consts, inputs)
        outputs = [rows.gathered(self, value) for value in found]
        return Program(
            operations=needed(self.operations, outputs),
            outputs=outputs,
            stack_axes=self.axes,
            lengths=self.lengths,
        )

    def rows_of(
        self,
        leaf: Value,
        axes: Mapping[tuple[int, tuple[str, ...]], int],
        lengths: Mapping[int, int],
    ) -> Value:
        """A stacked parameter by its layers, where it is known along which axis they lie."""
        if not isinstance(leaf, StackedLeaf) or leaf.group not in lengths:
            return leaf
        length = lengths[leaf.group]
        axis = axes.get((leaf.group, leaf.name), 0)
        if leaf.aval.shape[axis : axis + 1] != (length,):
            return leaf
        mine = tuple(self.leaf(leaf, index, axis, length) for index in range(length))
        return rows.Rows(aval=leaf.aval, depends=True, late=True, rows=mine, axis=axis)

    def jaxpr(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        """Appends a jaxpr's equations; returns its outputs."""
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, const in zip(jaxpr.constvars, consts, strict=True):
            values[variable] = self.constant(const, variable.aval)

        def read(atom: Any) -> Value:
            return self.constant(atom.val, atom.aval) if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            outputs = self.equation(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def function(self, function: Callable[..., Any], *inputs: Value) -> list[Value]:
        """Appends what a function does to values."""
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs]
        closed = jax.make_jaxpr(function)(*shapes)
        return self.jaxpr(closed.jaxpr, closed.consts, inputs)

    def constant(self, value: Any, aval: Any) -> Constant:
        words, keys = words_of(value)
        content = (aval_of_type(aval), words.tobytes())
        if content not in self.constants:
            self.constants[content] = Constant(aval=aval, words=words, keys=keys, content=content)
        return self.constants[content]

    def equation(self, equation: Any, inputs: list[Value]) -> Sequence[Value]:
        name = equation.primitive.name
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if name in _CALLS and inner is not None:
            around, self.calls = self.calls, (equation.source_info, *self.calls)
            found = self.call(inner, inputs)
            self.calls = around
            return found
        if name == "sharding_constraint":  # of the user's own mesh; a schedule has another
            return inputs
        if name in _REMAT and inner is not None and (self.apart or self.around_blocks(inputs)):
            return self.call(inner, inputs)
        stacked = [value for value in inputs if isinstance(value, StackedLeaf)]
        by_row = any(isinstance(value, rows.Rows) for value in inputs)
        if name in _REMAT and inner is not None and by_row:
            return self.call(inner, inputs)
        if name == "scan" and (stacked or self.apart or _scans_rows(equation, inputs)):
            return self.loop(equation, inputs)
        if by_row:
            found = rows.results(self, equation, inputs)
            if found is not None:
                return found
            inputs = [rows.gathered(self, value) for value in inputs]
        if stacked and name == "slice":
            sliced = self.slice_of_stack(equation, stacked[0])
            if sliced is not None:
                return sliced
        outputs = self.operation(equation, inputs)
        if stacked and len(inputs) == 1 and name in _VIEWS:
            (whole,) = stacked
            output = StackedLeaf(
                aval=outputs[0].aval,
                maker=outputs[0].maker,
                depends=True,
                late=True,
                group=whole.group,
                name=whole.name,
                chain=(*whole.chain, equation),
            )
            self.operations[-1].outputs = (output,)
            return (output,)
        return outputs

    def call(self, inner: Any, inputs: list[Value]) -> list[Value]:
        return self.jaxpr(*opened(inner), inputs)

    def around_blocks(self, inputs: list[Value]) -> bool:
        """Whether a `remat` wraps whole blocks: then it must not hide where they begin and end."""
        found: dict[Layer, int] = {}
        for leaf in frozenset().union(*(value.pure for value in inputs)):
            found[leaf[:2]] = found.get(leaf[:2], 0) + 1
        whole = (
            2 * count > self.leaf_counts.get(layer, self.leaf_counts.get(layer[0], 0))
            for layer, count in found.items()
        )
        return len(found) > 1 or any(whole)

    def operation(self, equation: Any, inputs: list[Value]) -> tuple[Value, ...]:
        mark = fingerprint(equation, self.derivatives)
        depends = any(value.depends for value in inputs)
        if depends and mark not in self.linear:
            if (reason := why_not_by_parts(equation)) is not None:
                raise UsageError(reason)
            self.linear[mark] = not not_linear(equation)
        varies = any(value.varies for value in inputs)
        late = any(value.late for value in inputs)
        key = None
        if not late:
            key = (mark, tuple(v.content if isinstance(v, Constant) else v for v in inputs))
            if key in self.known and not equation.effects:
                return self.known[key]
        pure: frozenset[Any] = frozenset()
        if depends and not varies and all(value.pure or not value.depends for value in inputs):
            pure = frozenset().union(*(value.pure for value in inputs))
        operation = Operation(
            primitive=equation.primitive,
            parameters=equation.params,
            inputs=tuple(inputs),
            mark=mark,
            not_linear=() if not depends or self.linear[mark] else not_linear(equation),
            sources=(equation.source_info, *self.calls),
        )
        operation.outputs = tuple(
            Value(
                aval=variable.aval,
                maker=operation,
                place=place,
                depends=depends,
                varies=varies,
                late=late,
                pure=pure,
            )
            for place, variable in enumerate(equation.outvars)
        )
        self.operations.append(operation)
        if key is not None:
            self.known[key] = operation.outputs
        return operation.outputs

    def loop(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """A scan over stacked blocks, one body a layer."""
        parameters = equation.params
        length, body = parameters["length"], parameters["jaxpr"]
        consts, carry, xs = _scan_parts(equation, inputs)
        consts, carry = ([rows.gathered(self, v) for v in part] for part in (consts, carry))
        xs = [rows.gathered(self, v) if isinstance(v, rows.Rows) and v.axis else v for v in xs]
        whole = next((v for v in (*consts, *carry) if isinstance(v, StackedLeaf)), None)
        if whole is not None:
            raise UsageError(
                f"a loop over layers gets the stacked parameter {'/'.join(whole.name)} whole and "
                "picks its layer by index; scan over the stack (lax.scan's xs) instead"
            )
        self.takes_rows = self.takes_rows or any(isinstance(v, rows.Rows) for v in xs)
        order = range(length)[::-1] if parameters["reverse"] else range(length)
        made: dict[int, list[Value]] = {}
        for index in order:
            slices = [
                v.rows[index]
                if isinstance(v, rows.Rows)
                else self.slice(v, index, length)
                if isinstance(v, StackedLeaf)
                else self.function(lambda a, i=index: lax.index_in_dim(a, i, 0, keepdims=False), v)[
                    0
                ]
                for v in xs
            ]
            outputs = self.jaxpr(*opened(body), [*consts, *carry, *slices])
            carry, made[index] = outputs[: len(carry)], outputs[len(carry) :]
        columns = zip(*(made[index] for index in range(length)), strict=True)
        stacks = [self.function(lambda *rows: jnp.stack(rows), *column)[0] for column in columns]
        return [*carry, *stacks]

    def slice(self, whole: StackedLeaf, index: int, length: int) -> Value:
        """One layer's slice of a stacked parameter whose axis 0 a scan takes apart."""
        axis = 0
        for equation in reversed(whole.chain):
            if equation.primitive.name == "transpose":
                axis = equation.params["permutation"][axis]

        def as_done(leaf: Any) -> Any:
            value = jnp.expand_dims(leaf, axis)
            for equation in whole.chain:
                (value,) = bind(equation.primitive, equation.params, [value])
            return jnp.squeeze(value, 0)

        leaf = self.leaf(whole, index, axis, length)
        return leaf if axis == 0 and not whole.chain else self.function(as_done, leaf)[0]

    def slice_of_stack(self, equation: Any, whole: StackedLeaf) -> list[Value] | None:
        """`stack[i]` in a loop of Python's: the layer's own parameter, its axis kept as 1."""
        shape, parameters = whole.aval.shape, equation.params
        starts, stops = parameters["start_indices"], parameters["limit_indices"]
        cut = [a for a in range(len(shape)) if (starts[a], stops[a]) != (0, shape[a])]
        if whole.chain or len(cut) != 1 or stops[cut[0]] - starts[cut[0]] != 1:
            return None
        (axis,) = cut
        leaf = self.leaf(whole, starts[axis], axis, shape[axis])
        return self.function(lambda a: jnp.expand_dims(a, axis), leaf)

    def leaf(self, whole: StackedLeaf, index: int, axis: int, length: int) -> BlockLeaf:
        if self.axes.setdefault((whole.group, whole.name), axis) != axis:
            raise UsageError(
                f"the stacked parameter {'/'.join(whole.name)} is taken apart along two axes"
            )
        if self.lengths.setdefault(whole.group, length) != length:
            raise UsageError(
                f"the stacked parameter {'/'.join(whole.name)} holds {length} layers, another "
                f"{self.lengths[whole.group]}; all of the group must hold as many"
            )
        key = (whole.group, index, whole.name)
        if key not in self.slices:
            # The chain's first shape: what the user handed over.
            shape = list(_first_aval(whole).shape)
            del shape[axis]
            self.slices[key] = BlockLeaf(
                aval=ShapedArray(tuple(shape), _first_aval(whole).dtype),
                depends=True,
                late=True,
                pure=frozenset([key]),
                layer=(whole.group, index),
                name=whole.name,
            )
        return self.slices[key]


def _leaf_counts(leaves: Sequence[Value]) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for leaf in leaves:
        if isinstance(leaf, BlockLeaf):
            counts[leaf.layer] = counts.get(leaf.layer, 0) + 1
        elif isinstance(leaf, StackedLeaf):
            counts[leaf.group] = counts.get(leaf.group, 0) + 1
    return counts


def _first_aval(whole: StackedLeaf) -> Any:
    return whole.chain[0].invars[0].aval if whole.chain else whole.aval


def _scans_rows(equation: Any, inputs: list[Value]) -> bool:
    """Whether a scan takes a stack apart that is known by its rows."""
    xs = _scan_parts(equation, inputs)[2]
    return any(isinstance(v, rows.Rows) and not v.axis for v in xs)


def _scan_parts(equation: Any, inputs: list[Value]) -> tuple[list[Value], list[Value], list[Value]]:
    """A scan's (constants, carry, xs)."""
    body, _ = opened(equation.params["jaxpr"])
    shapes = [[v.aval.shape for v in side] for side in (equation.invars, equation.outvars)]
    consts, carry = scan_counts(body, *shapes)
    return inputs[:consts], inputs[consts : consts + carry], inputs[consts + carry :]
