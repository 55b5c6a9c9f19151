"""What runs on one chunk: forward that keeps residuals, backward that uses them.

A chunk is a stack of blocks [K, ...]. Residuals live in a ring buffer with leaves [slots, K, ...];
forward writes one slot layer by layer and backward reads it layer by layer, so that no second copy
of a chunk's residuals is ever made. Weights are never kept: backward gets the copy that has
travelled to it, and a residual that depends on weights alone is computed again from that copy.

Legend: K blocks in a chunk, x [B, T, D] or any array that blocks map to its own shape.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, PyTree

from .split import split_backward

Recompute = Literal["none", "selective", "block", "chunk"]
"""What backward computes again. `none`: nothing. `selective`: all but products with weights and
fused attention, that is norms, rotations and gates. `block`: each block from its input. `chunk`:
the chunk from its input."""

RECOMPUTE_POLICIES: tuple[Recompute, ...] = ("none", "selective", "block", "chunk")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProgram:
    """Forward and backward of one block, with the residuals between them made explicit."""

    forward: Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, list[jax.Array]]]
    """(weights, x, microbatch) -> (y, residuals)."""
    backward: Callable[[PyTree, list[jax.Array], jax.Array, PyTree], tuple[PyTree, jax.Array]]
    """(weights, residuals, dy, microbatch) -> (dweights, dx)."""
    residuals: list[jax.ShapeDtypeStruct]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkProgram:
    """Forward and backward of one chunk over a residual buffer with leaves [slots, K, ...]."""

    forward: Callable[..., tuple[jax.Array, PyTree]]
    """(weights, x, microbatch, buffer, slot, first_layer) -> (y, buffer)."""
    backward: Callable[..., tuple[PyTree, jax.Array]]
    """(weights, buffer, slot, dy, microbatch, first_layer) -> (dweights, dx)."""
    residuals: list[jax.ShapeDtypeStruct]
    """One slot's leaves, [K, ...] each."""
    split: "SplitChunkProgram | None"
    """The two halves of backward, where they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitChunkProgram:
    """Backward in two halves, I and W, over a tap buffer with leaves [slots, K, ...]."""

    input_gradient: Callable[..., tuple[jax.Array, PyTree]]
    """(weights, buffer, slot, dy, microbatch, first_layer, taps, tap_slot) -> (dx, taps)."""
    weight_gradient: Callable[..., PyTree]
    """(taps, tap_slot, first_layer) -> dweights."""
    taps: list[jax.ShapeDtypeStruct]
    """One slot's leaves, [K, ...] each."""


def block_program(
    model: LayeredModel,
    weights: PyTree,
    x: jax.ShapeDtypeStruct,
    microbatch: PyTree,
    recompute: Recompute,
) -> BlockProgram:
    """Traces one block into a forward and a backward program.

    Args:
        model: whose `block` is traced.
        weights: shapes and dtypes of one block's parameters.
        x: shape and dtype of the block's input.
        microbatch: shapes and dtypes of one microbatch.
        recompute: `none`, `selective` or `block`.

    Raises:
        UsageError: if the block does not map x to its own shape and dtype.
    """
    y = jax.eval_shape(model.block, weights, x, microbatch)
    if not isinstance(y, jax.ShapeDtypeStruct) or (y.shape, y.dtype) != (x.shape, x.dtype):
        raise UsageError(f"block maps {_show(x)} to {_show(y)}; it must keep shape and dtype")
    if recompute == "block":
        return _recomputing_block(model, x)
    block = model.block
    if recompute == "selective":
        block = jax.checkpoint(model.block, policy=_save_products_and_attention)
    return _saving_block(block, weights, x, microbatch)


def _save_products_and_attention(primitive: Any, *avals: Any, **parameters: Any) -> Any:
    if primitive.name.startswith("dot_product_attention_fwd"):  # cuDNN's kernel
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **parameters)


def _recomputing_block(model: LayeredModel, x: jax.ShapeDtypeStruct) -> BlockProgram:
    def forward(weights, x, microbatch):
        return model.block(weights, x, microbatch), [x]

    def backward(weights, residuals, dy, microbatch):
        _, vjp = jax.vjp(lambda w, v: model.block(w, v, microbatch), weights, residuals[0])
        return vjp(dy)

    return BlockProgram(forward=forward, backward=backward, residuals=[x])


def _saving_block(
    block: Callable[..., jax.Array], weights: PyTree, x: jax.ShapeDtypeStruct, microbatch: PyTree
) -> BlockProgram:
    structure: list[Any] = []

    def run(weights, x, microbatch):
        y, vjp = jax.vjp(lambda w, v: block(w, v, microbatch), weights, x)
        leaves, treedef = jax.tree.flatten(vjp)
        structure[:] = [treedef]
        return y, leaves

    closed = jax.make_jaxpr(run)(weights, x, microbatch)
    outputs = closed.jaxpr.outvars[1:]
    needs_x = _depends_on(closed.jaxpr, {len(jax.tree.leaves(weights))})
    kept: list[int] = []  # the first leaf of each distinct residual that depends on x
    position: dict[Any, int] = {}
    for index, variable in enumerate(outputs):
        if needs_x[index] and variable not in position:
            position[variable] = len(kept)
            kept.append(index)
    treedef = structure[0]

    def forward(weights, x, microbatch):
        y, leaves = run(weights, x, microbatch)
        return y, [leaves[index] for index in kept]

    def backward(weights, residuals, dy, microbatch):
        # What depends on weights alone does not see x; the rest of this forward is dead code.
        _, leaves = run(weights, jnp.zeros(x.shape, x.dtype), microbatch)
        filled = [
            residuals[position[variable]] if needs_x[index] else leaves[index]
            for index, variable in enumerate(outputs)
        ]
        return jax.tree.unflatten(treedef, filled)(dy)

    specs = [jax.ShapeDtypeStruct(outputs[i].aval.shape, outputs[i].aval.dtype) for i in kept]
    return BlockProgram(forward=forward, backward=backward, residuals=specs)


def _depends_on(jaxpr: Any, inputs: set[int]) -> list[bool]:
    """For each output but the first, whether it depends on the inputs at these positions."""
    reached = {jaxpr.invars[i] for i in inputs}
    for equation in jaxpr.eqns:
        if any(not _is_literal(v) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    return [not _is_literal(v) and v in reached for v in jaxpr.outvars[1:]]


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def chunk_program(
    model: LayeredModel,
    weights: PyTree,
    x: jax.ShapeDtypeStruct,
    microbatch: PyTree,
    *,
    recompute: Recompute,
    padded: bool,
    unroll: bool,
    split: bool,
) -> ChunkProgram:
    """Makes a chunk's programs from its block's.

    Args:
        model: the layered model.
        weights: shapes and dtypes of a chunk's parameters, leaves [K, ...].
        x: shape and dtype of the chunk's input.
        microbatch: shapes and dtypes of one microbatch.
        recompute: what backward computes again.
        padded: whether the last chunks hold layers that are not there (K C > L); those pass x on.
        unroll: write the K layers out instead of looping over them.
        split: also make the two halves of backward, I and W.
    """
    layers = jax.tree.leaves(weights)[0].shape[0]
    one = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), weights)
    inner = block_program(model, one, x, microbatch, "none" if recompute == "chunk" else recompute)
    steps = layers if unroll else 1

    def present(first_layer, index):
        return first_layer + index < model.layers

    def block_forward(w, x, microbatch, first_layer, index):
        if not padded:
            return inner.forward(w, x, microbatch)
        nothing = [jnp.zeros(r.shape, r.dtype) for r in inner.residuals]
        return lax.cond(
            present(first_layer, index),
            lambda: inner.forward(w, x, microbatch),
            lambda: (x, nothing),
        )

    def block_backward(w, residuals, dy, microbatch, first_layer, index):
        if not padded:
            return inner.backward(w, residuals, dy, microbatch)
        return lax.cond(
            present(first_layer, index),
            lambda: inner.backward(w, residuals, dy, microbatch),
            lambda: (jax.tree.map(jnp.zeros_like, w), dy),
        )

    def forward(weights, x, microbatch, buffer, slot, first_layer):
        def layer(carry, scanned):
            x, buffer = carry
            index, w = scanned
            y, residuals = block_forward(w, x, microbatch, first_layer, index)
            buffer = [_put(b, r, slot, index) for b, r in zip(buffer, residuals, strict=True)]
            return (y, buffer), None

        (y, buffer), _ = lax.scan(layer, (x, buffer), (jnp.arange(layers), weights), unroll=steps)
        return y, buffer

    def backward(weights, buffer, slot, dy, microbatch, first_layer):
        def layer(dx, scanned):
            index, w = scanned
            residuals = [_get(b, slot, index) for b in buffer]
            dw, dx = block_backward(w, residuals, dx, microbatch, first_layer, index)
            return dx, dw

        dx, dw = lax.scan(layer, dy, (jnp.arange(layers), weights), reverse=True, unroll=steps)
        return dw, dx

    def stack(specs: list[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((layers, *s.shape), s.dtype) for s in specs]

    def split_program() -> SplitChunkProgram:
        halves = split_backward(inner.backward, one, inner.residuals, x, microbatch)

        def block_input_gradient(w, residuals, dy, microbatch, first_layer, index):
            if not padded:
                return halves.input_gradient(w, residuals, dy, microbatch)
            nothing = [jnp.zeros(t.shape, t.dtype) for t in halves.taps]
            return lax.cond(
                present(first_layer, index),
                lambda: halves.input_gradient(w, residuals, dy, microbatch),
                lambda: (dy, nothing),
            )

        def input_gradient(weights, buffer, slot, dy, microbatch, first_layer, taps, tap_slot):
            def layer(carry, scanned):
                dx, taps = carry
                index, w = scanned
                residuals = [_get(b, slot, index) for b in buffer]
                dx, kept = block_input_gradient(w, residuals, dx, microbatch, first_layer, index)
                taps = [_put(t, k, tap_slot, index) for t, k in zip(taps, kept, strict=True)]
                return (dx, taps), None

            scanned = (jnp.arange(layers), weights)
            return lax.scan(layer, (dy, taps), scanned, reverse=True, unroll=steps)[0]

        def weight_gradient(taps, tap_slot, first_layer):
            def layer(_, index):
                kept = [_get(t, tap_slot, index) for t in taps]
                dw = halves.weight_gradient(kept)
                if padded:
                    there = present(first_layer, index)
                    dw = jax.tree.map(lambda g: jnp.where(there, g, jnp.zeros_like(g)), dw)
                return None, dw

            return lax.scan(layer, None, jnp.arange(layers), unroll=steps)[1]

        return SplitChunkProgram(
            input_gradient=input_gradient,
            weight_gradient=weight_gradient,
            taps=stack(halves.taps),
        )

    whole = ChunkProgram(
        forward=forward,
        backward=backward,
        residuals=stack(inner.residuals),
        split=split_program() if split else None,
    )
    return _from_input(whole, x) if recompute == "chunk" else whole


def _from_input(inner: ChunkProgram, x: jax.ShapeDtypeStruct) -> ChunkProgram:
    """The same programs with a chunk's input as the only residual."""

    def scratch():
        return [jnp.zeros((1, *r.shape), r.dtype) for r in inner.residuals]

    def again(weights, buffer, slot, microbatch, first_layer):
        x = lax.dynamic_index_in_dim(buffer[0], slot, 0, keepdims=False)[0]
        return inner.forward(weights, x, microbatch, scratch(), 0, first_layer)[1]

    def forward(weights, x, microbatch, buffer, slot, first_layer):
        y, _ = inner.forward(weights, x, microbatch, scratch(), 0, first_layer)
        return y, [lax.dynamic_update_index_in_dim(buffer[0], x[None], slot, 0)]

    def backward(weights, buffer, slot, dy, microbatch, first_layer):
        residuals = again(weights, buffer, slot, microbatch, first_layer)
        return inner.backward(weights, residuals, 0, dy, microbatch, first_layer)

    split = inner.split
    if split is not None:
        halves = split

        def input_gradient(weights, buffer, slot, dy, microbatch, first_layer, taps, tap_slot):
            residuals = again(weights, buffer, slot, microbatch, first_layer)
            return halves.input_gradient(
                weights, residuals, 0, dy, microbatch, first_layer, taps, tap_slot
            )

        split = replace(split, input_gradient=input_gradient)
    return ChunkProgram(
        forward=forward,
        backward=backward,
        residuals=[jax.ShapeDtypeStruct((1, *x.shape), x.dtype)],
        split=split,
    )


def _put(buffer: jax.Array, value: jax.Array, slot: Any, index: Any) -> jax.Array:
    starts = (slot, index) + (0,) * value.ndim
    return lax.dynamic_update_slice(buffer, value[None, None], starts)


def _get(buffer: jax.Array, slot: Any, index: Any) -> jax.Array:
    starts = (slot, index) + (0,) * (buffer.ndim - 2)
    return lax.dynamic_slice(buffer, starts, (1, 1, *buffer.shape[2:]))[0, 0]


def _show(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    return str(jax.tree.map(_show, value))
