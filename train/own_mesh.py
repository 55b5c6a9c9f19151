"""Keeps a trainer's programs on a mesh of their own, whatever mesh the caller works on.

Schedules are written for a mesh of automatic axes. A caller may have arrays on a mesh of explicit
axes (what `jax.make_mesh` makes), or such a mesh as the current one (`jax.set_mesh`): JAX would
type every operation by those.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxsys.layered import PyTree

Method = TypeVar("Method", bound=Callable[..., Any])


def on_own_mesh(method: Method) -> Method:
    """The method with `self.mesh` as the current mesh; not to be called while tracing."""

    @functools.wraps(method)
    def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return method(self, *arguments, **named)

    return cast(Method, wrapped)


def without_axis_types(tree: PyTree) -> PyTree:
    """Arrays on explicit axes, as they lie, on the same mesh of automatic ones; others as given."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
            return leaf
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding) or not _is_typed(sharding.mesh):
            return leaf
        mesh: Any = sharding.mesh
        types = (AxisType.Auto,) * len(mesh.axis_names)
        where = NamedSharding(
            Mesh(mesh.devices, mesh.axis_names, axis_types=types),
            sharding.spec,
            memory_kind=sharding.memory_kind,
        )
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, where, parts)

    return jax.tree.map(plain, tree)


def on_automatic_axes(make: Callable[[Any], Any], tree: PyTree) -> Any:
    """What is made of arrays, on a mesh of automatic axes if the caller works on explicit ones.

    Not to be called while tracing.
    """
    if not _is_typed(jax.sharding.get_abstract_mesh()):
        return make(tree)
    mesh = jax.sharding.get_mesh()
    types = (AxisType.Auto,) * len(mesh.axis_names)
    with jax.set_mesh(Mesh(mesh.devices, mesh.axis_names, axis_types=types)):
        return make(without_axis_types(tree))


def are_typed(shapes: PyTree) -> bool:
    """Whether some of a function's results, as `jax.eval_shape` has them, lie on explicit axes."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(shapes))
    return any(isinstance(s, NamedSharding) and _is_typed(s.mesh) for s in shardings)


def _is_typed(mesh: Any) -> bool:
    return any(kind is not AxisType.Auto for kind in mesh.axis_types)
