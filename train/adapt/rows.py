"""A stacked parameter that a model uses whole beside the scan over its layers, row by row.

A penalty on all weights (`sum(w ** 2)`), a norm, a cast or a scale before the scan reads the stack,
not one layer of it. Each layer has its own row alone, so what is done element by element, and sums,
maxima and the like, are done row by row; only then does one layer's part stay with its block. What
else is done needs all rows at once, which only the head can have.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax

from jaxsys.train.adapt.samples import EACH
from jaxsys.train.adapt.values import Value, bind

_COMBINED: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": lax.add,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_prod": lax.mul,
}


@dataclass(eq=False, slots=True, kw_only=True)
class Rows(Value):
    """A value that has a row of its own for each layer of a stack."""

    rows: tuple[Value, ...]
    axis: int
    """Along which rows lie."""


class Writer(Protocol):
    """What appends operations."""

    def function(self, function: Callable[..., Any], *inputs: Value) -> list[Value]:
        """Appends what a function does to values; its results."""
        ...


def gathered(writer: Writer, value: Value) -> Value:
    """The value in one array."""
    if not isinstance(value, Rows):
        return value
    return writer.function(lambda *rows: jnp.stack(rows, value.axis), *value.rows)[0]


def results(writer: Writer, equation: Any, inputs: Sequence[Value]) -> list[Value] | None:
    """An equation's results row by row; None if it needs all rows at once."""
    name, parameters = equation.primitive.name, equation.params
    mine = [value for value in inputs if isinstance(value, Rows)]
    aval = equation.outvars[0].aval
    axis, count = mine[0].axis, len(mine[0].rows)

    def each(function: Callable[..., Any], *columns: Sequence[Value]) -> list[Value]:
        return [writer.function(function, *row)[0] for row in zip(*columns, strict=True)]

    def bound(**changed: Any) -> Callable[..., Any]:
        return lambda *row: bind(equation.primitive, {**parameters, **changed}, row)[0]

    if name in EACH:
        alike = all(value.axis == axis and len(value.rows) == count for value in mine)
        if not alike or any(v.aval.shape not in ((), aval.shape) for v in inputs):
            return None
        columns = [_column(writer, value, axis, count) for value in inputs]
        return [Rows(**_of(aval), rows=tuple(each(bound(), *columns)), axis=axis)]
    if len(inputs) > 1:
        return None
    (whole,) = mine
    if name in _COMBINED:
        axes = parameters["axes"]
        rest = tuple(a - (a > axis) for a in axes if a != axis)
        rows = each(bound(axes=rest), whole.rows) if rest else list(whole.rows)
        if axis not in axes:
            below = axis - sum(a < axis for a in axes)
            return [Rows(**_of(aval), rows=tuple(rows), axis=below)]
        join = _COMBINED[name]
        return [functools.reduce(lambda a, b: writer.function(join, a, b)[0], rows)]
    if name == "transpose":
        order = parameters["permutation"]
        own = tuple(a - (a > axis) for a in order if a != axis)
        rows = each(bound(permutation=own), whole.rows)
        return [Rows(**_of(aval), rows=tuple(rows), axis=order.index(axis))]
    if name == "broadcast_in_dim" and aval.shape[parameters["broadcast_dimensions"][axis]] == count:
        to = parameters["broadcast_dimensions"]
        moved = to[axis]
        shape = tuple(n for a, n in enumerate(aval.shape) if a != moved)
        own = tuple(a - (a > moved) for n, a in enumerate(to) if n != axis)
        rows = each(lambda row: lax.broadcast_in_dim(row, shape, own), whole.rows)
        return [Rows(**_of(aval), rows=tuple(rows), axis=moved)]
    if name == "reshape" and not axis and aval.shape[:1] == (count,):
        rows = each(lambda row: lax.reshape(row, aval.shape[1:]), whole.rows)
        return [Rows(**_of(aval), rows=tuple(rows), axis=0)]
    if name == "slice":
        starts, stops = parameters["start_indices"], parameters["limit_indices"]
        others = [a for a, n in enumerate(whole.aval.shape) if (starts[a], stops[a]) != (0, n)]
        if parameters["strides"] is not None or others not in ([], [axis]):
            return None
        return [Rows(**_of(aval), rows=whole.rows[starts[axis] : stops[axis]], axis=axis)]
    if name == "squeeze":
        gone = [a % len(whole.aval.shape) for a in parameters["dimensions"]]
        if axis in gone:
            rest = tuple(a - (a > axis) for a in gone if a != axis)
            return each(lambda row: lax.squeeze(row, rest), whole.rows) if rest else [*whole.rows]
    return None


def _of(aval: Any) -> dict[str, Any]:
    return {"aval": aval, "depends": True, "late": True}


def _column(writer: Writer, value: Value, axis: int, count: int) -> list[Value]:
    """What each row reads of a value."""
    if isinstance(value, Rows):
        return list(value.rows)
    if not value.aval.shape:
        return [value] * count
    return [
        writer.function(lambda a, i=i: lax.index_in_dim(a, i, axis, keepdims=False), value)[0]
        for i in range(count)
    ]
