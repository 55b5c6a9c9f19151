"""The loss of a batch without a schedule: weights cut over the ring, gathered one layer at a time.

Forward only, so it compiles in a fraction of a training step's time and holds, besides its share
of the parameters, one layer and one microbatch. It takes parameters in layer order, cut along an
axis of their own (`state.layer_shardings`), and every device runs its share of the rows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxsys.axes import SHARING
from jaxsys.context import ContextSplit
from jaxsys.layered import LayeredModel, Parameters, PyTree, with_totals
from jaxsys.lowering.flat import Leaves, flat_model
from jaxsys.lowering.sequences import Sequences

Sums = tuple[jax.Array, jax.Array]
"""(summed loss, weight)."""


def make_loss(
    model: LayeredModel,
    mesh: Mesh,
    shardings: Parameters,
    *,
    compute_dtype: Any,
    context: ContextSplit | None = None,
) -> Callable[[Parameters, PyTree], Sums]:
    """A jitted (parameters in layer order, batch [R, B, ...]) -> (summed loss, weight).

    Args:
        model: the layered model.
        mesh: of `jaxsys.mesh.make_mesh`.
        shardings: where the parameters lie.
        compute_dtype: of weights in use and activations.
        context: how sequences lie over devices that share them, where the mesh has such.
    """
    sequences, whole_model = Sequences(model=model, split=context), model
    model = model.over(context)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    names = mesh.axis_names
    rows_over = tuple(name for name in names if name not in SHARING)
    devices = math.prod(mesh.shape[name] for name in rows_over)

    def gather(leaf: jax.Array, spec: PartitionSpec, lead: int) -> jax.Array:
        leaf = leaf.astype(compute_dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for axis, over in enumerate(spec):
            if over is not None:
                leaf = lax.all_gather(leaf, over, axis=axis - lead, tiled=True)
        return leaf

    def local(parameters: Parameters, batch: PyTree, counted: jax.Array) -> Sums:
        batch = sequences.own(batch)
        edge = jax.tree.map(lambda p, s: gather(p, s, 0), parameters["edge"], specs["edge"])
        one = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), batch)
        flat = flat_model(model, edge, one)
        stacks, stack_specs = model.stacks(parameters["blocks"]), model.stacks(specs["blocks"])
        kinds = tuple(model.kinds)

        def row(carry: Sums, item: tuple[PyTree, jax.Array]) -> tuple[Sums, None]:
            microbatch, counts = item

            def of_kind(kind: str, x: Leaves, row: jax.Array, index: jax.Array) -> Leaves:
                shard = jax.tree.map(lambda p: p[row], stacks[kind])
                whole = jax.tree.map(lambda p, s: gather(p, s, 1), shard, stack_specs[kind])
                return flat.block(whole, x, microbatch, index, kind, again=True)

            def layer(x: Leaves, item: tuple[jax.Array, ...]) -> tuple[Leaves, None]:
                number, *place = item
                if len(kinds) == 1:
                    return of_kind(kinds[0], x, *place), None
                branches = [functools.partial(of_kind, kind) for kind in kinds]
                return lax.switch(number, branches, x, *place), None

            numbers = [kinds.index(kind) for kind, _ in model.places]
            rows = [row for _, row in model.places]
            items = jnp.array(numbers), jnp.array(rows), jnp.arange(model.layers)
            x, _ = lax.scan(layer, flat.embed(edge, microbatch), items)
            loss, weight, _ = flat.head(edge, x, microbatch)
            # A padded row may hold anything: zero times a NaN would not be zero.
            zero = jnp.float32(0)
            loss, weight = jnp.where(counts, loss, zero), jnp.where(counts, weight, zero)
            return (carry[0] + loss, carry[1] + weight), None

        sums, _ = lax.scan(row, (jnp.float32(0), jnp.float32(0)), (batch, counted))
        return lax.psum(sums, names)

    @jax.jit
    def loss(parameters: Parameters, batch: PyTree) -> Sums:
        sequences.check(batch)
        batch = with_totals(whole_model, batch)
        rows = jax.tree.leaves(batch)[0].shape[0]
        spare = -rows % devices
        counted = jnp.arange(rows + spare) < rows
        padded = jax.tree.map(
            lambda leaf: (
                jnp.concatenate([leaf, jnp.repeat(leaf[:1], spare, axis=0)]) if spare else leaf
            ),
            batch,
        )
        whole = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, sequences.specs(padded, rows_over), PartitionSpec(rows_over)),
            out_specs=(PartitionSpec(), PartitionSpec()),
            check_vma=False,
        )
        return whole(parameters, padded, counted)

    return loss
