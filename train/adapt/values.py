"""What a program is made of: values, the operations that make them, and how these are evaluated."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np

Layer = tuple[int, int]
"""A block before blocks have an order: (which of the groups of blocks, its number in it)."""


@dataclass(eq=False, slots=True, kw_only=True)
class Value:
    """What an operation reads or makes; compared by identity."""

    aval: Any
    maker: "Operation | None" = None
    place: int = 0
    """Which of its maker's results."""
    depends: bool = False
    """On parameters."""
    varies: bool = False
    """With the microbatch."""
    late: bool = False
    """Depends on parameters of blocks."""
    pure: frozenset[Any] = frozenset()
    """Leaves of blocks, where it is made of such leaves alone."""

    @property
    def bytes(self) -> int:
        """Of what it holds; keys count as two words."""
        itemsize = getattr(self.aval.dtype, "itemsize", 8)
        return math.prod(self.aval.shape) * itemsize


@dataclass(eq=False, slots=True, kw_only=True)
class Constant(Value):
    """A value known now: a literal, a table that the model holds."""

    words: np.ndarray
    """Its elements, on the host: of keys their words."""
    keys: Any = None
    """How keys are made of words, if they are keys."""
    content: Any
    """Equal for constants of equal dtype, shape and elements."""

    def array(self) -> Any:
        """The constant as JAX takes it."""
        return (
            self.words
            if self.keys is None
            # Typed for arrays on a device; words on the host do, and stay constants.
            else jax.random.wrap_key_data(cast(Any, self.words), impl=self.keys)
        )


@dataclass(eq=False, slots=True, kw_only=True)
class EdgeLeaf(Value):
    """A parameter outside the blocks."""

    number: int


@dataclass(eq=False, slots=True, kw_only=True)
class BlockLeaf(Value):
    """A parameter of one block."""

    layer: Layer
    name: tuple[str, ...]


@dataclass(eq=False, slots=True, kw_only=True)
class StackedLeaf(Value):
    """A parameter of all blocks of a group together, and what was done to it before the loop."""

    group: int
    name: tuple[str, ...]
    chain: tuple[Any, ...] = ()
    """Equations of one input, first to last."""


@dataclass(eq=False, slots=True, kw_only=True)
class BatchLeaf(Value):
    """A leaf of the microbatch."""

    number: int


@dataclass(eq=False, slots=True, kw_only=True)
class Whole(Value):
    """What the whole batch has in place of a value of a microbatch's, see `whole`.

    To a program it is what a parameter outside the blocks is: no sample enters it.
    """

    number: int
    """Place among what is handed to a microbatch: behind the leaves of its batch."""
    of: Value
    """A sum over samples, of the batch alone; or a number that is made of B."""
    amount: np.ndarray | None = None
    """Of a number: what it is for B; None for a sum."""
    power: float = 0.0
    """Of a number: it grows as B to this power."""


@dataclass(eq=False, slots=True, kw_only=True)
class Operation:
    """One primitive on values."""

    primitive: Any
    parameters: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()
    mark: Any = None
    """Equal for operations that compute the same of equal inputs."""
    not_linear: tuple[Any, ...] = ()
    """Equations in it, or itself, whose custom derivatives are not linear, see `linear`."""
    sources: tuple[Any, ...] = ()
    """JAX's records of where it was written, and of the calls around it, innermost first."""


@dataclass(eq=False, slots=True, kw_only=True)
class Program:
    """A function, flat: operations in the order in which they ran, only those that are needed."""

    operations: list[Operation]
    outputs: list[Value]
    stack_axes: dict[tuple[int, tuple[str, ...]], int]
    """(group, leaf) -> the axis along which blocks are stacked."""
    lengths: dict[int, int]
    """Group -> its blocks, where it is stacked."""
    whole: str | None = None
    """Of a stack that is used whole, taken row by row: what is to be said if that cannot be cut."""


def run(operations: Iterable[Operation], values: dict[Value, Any]) -> None:
    """Evaluates operations, whose inputs are in `values` or constant, into it."""
    for operation in operations:
        inputs = [value_of(value, values) for value in operation.inputs]
        outputs = bind(operation.primitive, operation.parameters, inputs)
        values.update(zip(operation.outputs, outputs, strict=True))


def bind(primitive: Any, parameters: dict[str, Any], inputs: Sequence[Any]) -> Sequence[Any]:
    """A primitive's results, as a sequence."""
    bound = primitive.get_bind_params(parameters)
    # A pair (functions, parameters) in some JAX releases, parameters alone in others.
    functions, parameters = bound if isinstance(bound, tuple) else ((), bound)
    outputs = primitive.bind(*functions, *inputs, **parameters)
    return outputs if primitive.multiple_results else [outputs]


def value_of(value: Value, values: dict[Value, Any]) -> Any:
    """What an operation reads."""
    return value.array() if isinstance(value, Constant) else values[value]


def known(value: Value, found: dict[Value, Any] | None = None) -> Any:
    """What a value is that depends on neither parameters nor the microbatch.

    Args:
        value: which.
        found: of others, if they are kept; added to.
    """
    values: dict[Value, Any] = {} if found is None else found

    def make(one: Value) -> None:
        if one.maker is not None and one not in values:
            for other in one.maker.inputs:
                make(other)
            run([one.maker], values)

    with jax.ensure_compile_time_eval():
        make(value)
        return value_of(value, values)


def needed(
    operations: Sequence[Operation], outputs: Iterable[Value], given: Iterable[Value] = ()
) -> list[Operation]:
    """The operations that outputs depend on, in order, where `given` values are there."""
    given = set(given)
    wanted = set(outputs) - given
    kept = []
    for operation in reversed(operations):
        if any(value in wanted for value in operation.outputs):
            kept.append(operation)
            wanted.update(value for value in operation.inputs if value not in given)
    return kept[::-1]
