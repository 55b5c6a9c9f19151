"""The arrays of a run where a schedule keeps them: made, put there, taken out in layer order."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.layered import Parameters
from jaxsys.lowering.reshard import reshard_all
from jaxsys.train.own_mesh import without_axis_types
from jaxsys.train.rules import RuleAtRest, by_name, rule_of, shape_of
from jaxsys.train.state import (
    AveragedState,
    Names,
    RunnableStep,
    State,
    TrainState,
    layer_shardings,
)
from jaxsys.train.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Parameters that lie in files, and are read when it is known which device keeps what."""

    shapes: Parameters
    """In layer order, float32."""
    read: Callable[[Parameters], Parameters]
    """Shardings in layer order -> the parameters, so placed."""


Given = Parameters | Callable[[], Parameters] | Stored
"""A model's parameters in layer order, what makes them, or where they lie."""


class StateAtRest:
    """How a run's state rests.

    Args:
        lowered: the schedule's step.
        mesh: where it rests.
        optimizer: any that takes (updates, state, params).
        view: how it sees the parameters; None for each layer by itself.
        parameters: in layer order; only their shapes are read here.
        averaged: whether the state holds an average of the parameters.

    Attributes:
        rule: the optimizer on what rests.
        layer_shapes: the state's shapes in layer order.
        layer_shardings: where it lies in layer order.
        shardings: where it rests.
    """

    def __init__(
        self,
        lowered: RunnableStep,
        mesh: Mesh,
        optimizer: optax.GradientTransformation,
        view: View | None,
        parameters: Given,
        *,
        averaged: bool = False,
    ) -> None:
        self._lowered, self._mesh, self._averaged = lowered, mesh, averaged
        shapes = shapes_of(parameters)
        rule = rule_of(optimizer, shapes, view)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        self.layer_shapes = self._state(shapes, rule.shapes(), count)
        at_rest = jax.eval_shape(lowered.to_rest, shapes)
        self.rule = RuleAtRest(rule, at_rest, _rows(lowered, at_rest), mesh)
        self.layer_shardings = self._shardings(
            self.layer_shapes, layer_shardings(mesh)(self.layer_shapes.parameters)
        )
        self.shardings = self._shardings(
            self._state(at_rest, self.rule.state_shapes, count), lowered.rest_shardings(at_rest)
        )

    def initial(self, parameters: Given) -> State:
        """The state before the first step; the caller's arrays stay the caller's."""
        if isinstance(parameters, Stored):
            # Read as they are cut in layer order, and moved to where they rest.
            read = parameters.read(self.layer_shardings.parameters)
            move = jax.jit(self._to_rest, out_shardings=self.shardings.parameters, donate_argnums=0)
            placed = move(read)
        elif callable(parameters):
            made = jax.jit(
                lambda: self._lowered.to_rest(masters(parameters)),
                out_shardings=self.shardings.parameters,
            )
            placed = made()
        else:
            given = jax.device_get(parameters) if jax.process_count() > 1 else parameters
            placed = _apart_from(given, self._lowered.to_rest(masters(given)))

        def start(parameters: Any) -> State:
            optimizer = self.rule.init(parameters)
            return self._state(parameters, optimizer, jnp.int32(0), copy=jnp.copy)

        return jax.jit(start, out_shardings=self.shardings, donate_argnums=0)(placed)

    @cached_property
    def in_layer_order(self) -> Callable[[State], State]:
        """A state at rest -> layer order."""

        def move(state: State) -> State:
            optimizer = self.rule.to_layer_order(
                state.optimizer, self.shardings.optimizer, self.layer_shardings.optimizer
            )
            return self._moved(state, self._layer_order, optimizer)

        return jax.jit(move, out_shardings=self.layer_shardings)

    @cached_property
    def parameters_in_layer_order(self) -> Callable[[Parameters], Parameters]:
        """The same of parameters alone."""
        return jax.jit(self._layer_order, out_shardings=self.layer_shardings.parameters)

    @cached_property
    def to_rest(self) -> Callable[[State], State]:
        """A state in layer order -> at rest."""

        def move(state: State) -> State:
            optimizer = self.rule.to_rest(
                state.optimizer, self.layer_shardings.optimizer, self.shardings.optimizer
            )
            return self._moved(state, self._to_rest, optimizer)

        return jax.jit(move, out_shardings=self.shardings)

    def _layer_order(self, parameters: Any) -> Parameters:
        # Cut along another axis first: the layers' order then changes within each device.
        rest = self._lowered.rest_shardings(parameters)
        cut = layer_shardings(self._mesh)(parameters)
        return self._lowered.from_rest(reshard_all(parameters, self._mesh, rest, cut))

    def _to_rest(self, parameters: Any) -> Parameters:
        """The other way round: put in order within each device, then cut as they rest."""
        moved = jax.eval_shape(self._lowered.to_rest, parameters)
        rest = self._lowered.rest_shardings(moved)
        cut = layer_shardings(self._mesh)(moved)
        placed = self._lowered.in_rest_order(parameters)
        return reshard_all(placed, self._mesh, cut, rest)

    @staticmethod
    def _moved(state: State, move: Callable[[Any], Any], optimizer: Any) -> State:
        moved = state._replace(parameters=move(state.parameters), optimizer=optimizer)
        if isinstance(moved, AveragedState):
            moved = moved._replace(average=move(moved.average))
        return moved

    def _shardings(self, shapes: State, parameters: Parameters) -> State:
        optimizer = self.rule.rule.shardings(
            self._mesh, shapes.parameters, shapes.optimizer, parameters
        )
        return self._state(parameters, optimizer, NamedSharding(self._mesh, PartitionSpec()))

    def _state(
        self,
        parameters: Any,
        optimizer: Any,
        scalar: Any,
        *,
        copy: Callable[[Any], Any] = lambda leaf: leaf,
    ) -> State:
        state = TrainState(parameters=parameters, optimizer=optimizer, step=scalar, skipped=scalar)
        if not self._averaged:
            return state
        return AveragedState(*state, average=jax.tree.map(copy, parameters))


def shapes_of(parameters: Given) -> Parameters:
    """Shapes of the parameters as they are trained, in layer order."""
    if isinstance(parameters, Stored):
        return parameters.shapes
    return jax.tree.map(shape_of, jax.eval_shape(lambda: masters(parameters)))


def masters(parameters: Parameters | Callable[[], Parameters]) -> Parameters:
    """The parameters, made if they are a function, floats as float32."""

    def widen(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    made = parameters() if callable(parameters) else parameters
    return jax.tree.map(widen, without_axis_types(made))


def _rows(lowered: RunnableStep, at_rest: Parameters) -> dict[Names, tuple[np.ndarray, int]]:
    """For each stacked leaf the row at rest that holds each layer, and how many rows there are."""
    numbered = jax.tree.map(lambda leaf: jnp.arange(leaf.shape[0]), at_rest["blocks"])
    order = lowered.from_rest({"edge": {}, "blocks": numbered})
    counts = by_name({"blocks": numbered})
    return {
        name: (np.asarray(rows), len(counts[name]))
        for name, rows in by_name({"blocks": order["blocks"]}).items()
    }


def _apart_from(given: Parameters, placed: Parameters) -> Parameters:
    """`placed`, copied where it still is the caller's memory: the state will be donated."""

    def spans(leaf: Any) -> list[tuple[int, int]]:
        if isinstance(leaf, np.ndarray):
            start = leaf.__array_interface__["data"][0]
            return [(start, start + leaf.nbytes)]
        if not isinstance(leaf, jax.Array):
            return []
        parts = [shard.data for shard in leaf.addressable_shards]
        return [(p.unsafe_buffer_pointer(), p.unsafe_buffer_pointer() + p.nbytes) for p in parts]

    def apart(mine: jax.Array, theirs: Any) -> jax.Array:
        held = spans(theirs)
        shared = any(a < d and c < b for a, b in spans(mine) for c, d in held)
        return jnp.copy(mine) if shared else mine

    return jax.tree.map(apart, placed, given)
