"""What a training run carries from step to step, and where each leaf of it rests.

An optimizer keeps arrays that follow the parameters (Adam's two moments) and others that do not (a
count). Which is which is read from the names: a leaf whose path ends in a parameter's path follows
that parameter, and is laid out, moved and saved as it is. So any optax optimizer works.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.layered import Parameters, PyTree
from jaxsys.lowering import Outcome
from jaxsys.mesh import RING


class TrainState(NamedTuple):
    """All arrays of a run; on the devices in the order the schedule keeps them at rest."""

    parameters: Parameters
    """float32 masters."""
    optimizer: PyTree
    step: jax.Array
    """int32: batches taken, skipped ones too."""
    skipped: jax.Array
    """int32: batches whose loss or gradient was not finite."""


class LoweredStep(Protocol):
    """What the trainer needs of `jaxsys.lowering.lower`'s result."""

    @property
    def compiler_options(self) -> dict[str, Any]: ...

    def rest_shardings(self, parameters: Any) -> Any: ...
    def to_rest(self, parameters: Any) -> Any: ...
    def from_rest(self, parameters: Any) -> Any: ...
    def batch_shardings(self, batch: Any) -> Any: ...
    def loss_and_gradients(self, parameters: Any, batch: Any) -> Outcome: ...


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A pytree path as plain names, the same for dicts, attributes and indices."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def map_followers(
    parameters: Parameters,
    tree: PyTree,
    *,
    followers: Callable[[Parameters], Parameters],
    others: Callable[[Any], Any],
) -> PyTree:
    """Maps the leaves of an optimizer state.

    Args:
        parameters: arrays or shapes; tells which leaves follow a parameter.
        tree: the optimizer state, arrays or shapes.
        followers: maps {"edge": {name: leaf}, "blocks": {name: leaf}}, structure kept; each block
            leaf has the leading layer axis.
        others: maps every other leaf.

    Returns:
        `tree` with its leaves replaced.
    """
    named: dict[tuple[str, ...], Any] = {
        path_names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]
    }
    layers = {name: leaf.shape[0] for name, leaf in named.items() if name[0] == "blocks"}
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    chosen: Parameters = {"edge": {}, "blocks": {}}
    for index, (path, leaf) in enumerate(flat):
        names = path_names(path)
        owner = next((names[i:] for i in range(len(names)) if names[i:] in named), None)
        if owner is None:
            continue
        if owner in layers:
            # Factored optimizers keep rows and columns of a parameter: the layer axis tells.
            if leaf.ndim and leaf.shape[0] == layers[owner]:
                chosen["blocks"][str(index)] = leaf
        elif leaf.shape == named[owner].shape:
            chosen["edge"][str(index)] = leaf
    mapped = followers(chosen)
    result = []
    for index, (_, leaf) in enumerate(flat):
        key = str(index)
        place = next((part for part in ("edge", "blocks") if key in chosen[part]), None)
        result.append(others(leaf) if place is None else mapped[place][key])
    return jax.tree.unflatten(structure, result)


def state_shapes(optimizer: optax.GradientTransformation, parameters: Parameters) -> TrainState:
    """Shapes and dtypes of the state around parameters of this order, from arrays or shapes."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), parameters)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(
        parameters=shapes,
        optimizer=jax.eval_shape(optimizer.init, shapes),
        step=scalar,
        skipped=scalar,
    )


def state_shardings(
    mesh: Mesh, shapes: TrainState, shardings: Callable[[Parameters], Parameters]
) -> TrainState:
    """Where each leaf of the state lies, given where parameters of its order do."""
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        parameters=shardings(shapes.parameters),
        optimizer=map_followers(
            shapes.parameters,
            shapes.optimizer,
            followers=shardings,
            others=lambda _: everywhere,
        ),
        step=everywhere,
        skipped=everywhere,
    )


def layer_shardings(mesh: Mesh) -> Callable[[Parameters], Parameters]:
    """Shardings of parameters in layer order: cut over the ring along an axis of the layer's own.

    So layers can be put in another order, or read one at a time, without moving anything, and any
    number of layers will do. A leaf without an axis that divides is whole everywhere.
    """
    ring = mesh.shape[RING]

    def spec(leaf: Any, first: int) -> NamedSharding:
        axes = [a for a in range(first, leaf.ndim) if leaf.shape[a] and leaf.shape[a] % ring == 0]
        cut = [None] * axes[0] + [RING] if axes and ring > 1 else []
        return NamedSharding(mesh, PartitionSpec(*cut))

    def shardings(shapes: Parameters) -> Parameters:
        return {
            "edge": jax.tree.map(lambda leaf: spec(leaf, 0), shapes["edge"]),
            "blocks": jax.tree.map(lambda leaf: spec(leaf, 1), shapes["blocks"]),
        }

    return shardings


def reorder(state: TrainState, move: Callable[[Parameters], Parameters]) -> TrainState:
    """The state with `move` (to_rest or from_rest) done to parameters and their followers."""
    return TrainState(
        parameters=move(state.parameters),
        optimizer=map_followers(
            state.parameters, state.optimizer, followers=move, others=lambda leaf: leaf
        ),
        step=state.step,
        skipped=state.skipped,
    )
