"""What runs on one chunk: forward that keeps residuals, backward that uses them.

A chunk is a stack of blocks [K, ...]. Residuals live in a buffer with some slots; forward writes
one slot layer by layer and backward reads it layer by layer, so that no second copy of a chunk's
residuals is ever made. What only reads a buffer hands it on: the next to write it then depends on
the reader, and XLA, which would copy the whole buffer otherwise, writes in place. Weights are never
kept: backward gets the copy that has travelled to it, and a residual that depends on weights alone
is computed again from that copy.

x and its cotangents are lists of arrays, gradients of weights lists of their floats (see `flat`).

Legend: K blocks in a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxsys.context.attention import KEPT
from jaxsys.layered import ALIKE, LayeredModel, PyTree

from .flat import FlatModel, Leaves, check_block, flat_of, floats, pull_back
from .jaxprs import inlined, named, run, slice_of, value_of
from .kinds import Choice, Shared
from .residuals import what_to_keep
from .rows import get_row, put_row, zeros
from .split import split_backward

Recompute = Literal["none", "selective", "around-attention", "block", "chunk"]
"""What backward computes again. `none`: only what elementwise operations make from what is kept,
inside the kernels that use it. `selective`: all but products with weights and fused attention, that
is norms, rotations and gates. `around-attention`: each block from its input and fused attention's
output, which long sequences would spend most of their time on. `block`: each block from its input.
`chunk`: the chunk from its input."""

RECOMPUTE_POLICIES: tuple[Recompute, ...] = get_args(Recompute)
MADE_AGAIN: tuple[Recompute, ...] = ("around-attention", "block")
"""Those that compute a block's products again, so that it may run in its other form
(`jaxsys.layered.WithAgain`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProgram:
    """Forward and backward of one block, with the residuals between them made explicit."""

    forward: Callable[[PyTree, Leaves, PyTree, Any], tuple[Leaves, Leaves]]
    """(weights, x, microbatch, layer index) -> (y, residuals)."""
    backward: Callable[[PyTree, Leaves, Leaves, PyTree, Any], tuple[Leaves, Leaves]]
    """(weights, residuals, dy, microbatch, layer index) -> (dweights, dx)."""
    residuals: list[jax.ShapeDtypeStruct]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkProgram:
    """Forward and backward of one chunk over a buffer of residuals."""

    forward: Callable[..., tuple[Leaves, PyTree]]
    """(weights, x, microbatch, buffer, slot, first_layer) -> (y, buffer)."""
    backward: Callable[..., tuple[PyTree, Leaves, PyTree]]
    """(weights, buffer, slot, dy, microbatch, first_layer) -> (dweights, dx, buffer). Where
    layers are written out, dweights are a list of theirs; else stacked as weights are."""
    residuals: list[jax.ShapeDtypeStruct]
    """What one slot holds, layer by layer."""
    empty_residuals: Callable[[int], PyTree]
    """slots -> a buffer of residuals, zero."""
    split: "SplitChunkProgram | None"
    """The two halves of backward, where they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitChunkProgram:
    """Backward in two halves, I and W, over a buffer of taps."""

    input_gradient: Callable[..., tuple[Leaves, PyTree, PyTree]]
    """(weights, buffer, slot, dy, microbatch, first_layer, taps, tap_slot) ->
    (dx, buffer, taps)."""
    weight_gradient: Callable[..., tuple[PyTree, PyTree]]
    """(taps, tap_slot, first_layer) -> (dweights, taps)."""
    empty_taps: Callable[[int], PyTree]
    """slots -> a buffer of taps, zero."""


INDEX = jax.ShapeDtypeStruct((), jnp.int32)
"""Of a layer's index."""


def block_program(
    model: LayeredModel,
    weights: PyTree,
    x: PyTree,
    microbatch: PyTree,
    recompute: Recompute,
    kind: str = ALIKE,
    *,
    split: bool = False,
) -> BlockProgram:
    """Traces one block into a forward and a backward program.

    Args:
        model: whose block is traced.
        weights: shapes and dtypes of one block's parameters.
        x: shapes and dtypes of the block's input.
        microbatch: shapes and dtypes of one microbatch.
        recompute: any but `chunk`.
        kind: of the block.
        split: whether backward will be cut into I and W. A loop over pieces cannot be.

    Raises:
        UsageError: if the block does not map x to its own structure, shapes and dtypes.
    """
    flat = flat_of(model, x)
    check_block(flat, weights, microbatch, kind)
    again = recompute in MADE_AGAIN and not split

    def block(weights: PyTree, x: Leaves, microbatch: PyTree, index: Any) -> Leaves:
        return flat.block(weights, x, microbatch, index, kind, again=again)

    if recompute == "block":
        return _recomputing_block(block, flat.x)
    if recompute == "selective":
        block = jax.checkpoint(block, policy=_save_products_and_attention)
    if recompute == "around-attention":
        block = jax.checkpoint(block, policy=_is_attention)
    return _saving_block(block, weights, flat, microbatch)


def _save_products_and_attention(primitive: Any, *avals: Any, **parameters: Any) -> Any:
    if _is_attention(primitive, *avals, **parameters):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **parameters)


def _is_attention(primitive: Any, *avals: Any, **parameters: Any) -> bool:
    """Whether it makes what the backward pass of attention wants: cuDNN's kernel, or our merges."""
    del avals
    if primitive.name == "name":
        return parameters["name"] == KEPT
    return primitive.name.startswith("dot_product_attention_fwd")


def _recomputing_block(block: Callable[..., Leaves], x: list[jax.ShapeDtypeStruct]) -> BlockProgram:
    def forward(weights, x, microbatch, index):
        return block(weights, x, microbatch, index), x

    def backward(weights, residuals, dy, microbatch, index):
        # Nothing but this ties the recomputation to its turn: layers that are written out would
        # otherwise all be recomputed at once, and held.
        x, dy = lax.optimization_barrier((residuals, dy))
        _, vjp = pull_back(lambda w, v: block(w, v, microbatch, index), weights, x)
        dw, dx = vjp(dy)
        return dw, dx

    return BlockProgram(forward=forward, backward=backward, residuals=x)


def _saving_block(
    block: Callable[..., Leaves], weights: PyTree, flat: FlatModel, microbatch: PyTree
) -> BlockProgram:
    structure: list[Any] = []

    def both(weights, x, microbatch, index):
        y, vjp = pull_back(lambda w, v: block(w, v, microbatch, index), weights, x)
        leaves, treedef = jax.tree.flatten(vjp)
        structure[:] = [treedef]
        return y, leaves

    closed = inlined(jax.make_jaxpr(both)(weights, flat.x, microbatch, INDEX))
    jaxpr, (vjp,), width = closed.jaxpr, structure, len(flat.x)
    y, leaves = jaxpr.outvars[:width], jaxpr.outvars[width:]
    before = len(jax.tree.leaves(weights))
    inputs = jaxpr.invars
    given = {*inputs[:before], *inputs[before + width :]}
    kept = what_to_keep(jaxpr, leaves, given)
    making, remaking = slice_of(jaxpr, [*y, *kept]), slice_of(jaxpr, leaves, given=kept)

    def forward(weights, x, microbatch, index):
        values = named(closed, (weights, x, microbatch, index))
        run(making, values)
        return [value_of(v, values) for v in y], [values[v] for v in kept]

    def backward(weights, residuals, dy, microbatch, index):
        values = named(closed, (weights, flat.x, microbatch, index))
        for variable in inputs[before : before + width]:
            del values[variable]
        values.update(zip(kept, residuals, strict=True))
        run(remaking, values)
        return jax.tree.unflatten(vjp, [value_of(v, values) for v in leaves])(dy)

    specs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in kept]
    return BlockProgram(forward=forward, backward=backward, residuals=specs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Store:
    """Slots of a chunk's residuals or taps, one entry for each of its K layers.

    Looped layers share leaves [slots, K, ...] that are updated in place. Written-out layers have
    leaves of their own, [slots, ...] or, with one slot, the bare value: then nothing is copied into
    a buffer and out again.
    """

    specs: list[list[jax.ShapeDtypeStruct]]
    """Of each layer; looped layers have the same."""
    unroll: bool

    def empty(self, slots: int) -> PyTree:
        """All slots, zero."""
        if not self.unroll:
            lead = slots, len(self.specs)
            return [jnp.zeros((*lead, *s.shape), s.dtype) for s in self.specs[0]]
        lead = () if slots == 1 else (slots,)
        return [[jnp.zeros((*lead, *s.shape), s.dtype) for s in specs] for specs in self.specs]

    def put(self, buffer: PyTree, values: list[jax.Array], slot: Any, layer: Any) -> PyTree:
        """The buffer with one layer's values in one slot."""
        if not self.unroll:
            return [put_row(b, v, slot, layer) for b, v in zip(buffer, values, strict=True)]
        row = [
            v if b.ndim == v.ndim else put_row(b, v, slot)
            for b, v in zip(buffer[layer], values, strict=True)
        ]
        return [*buffer[:layer], row, *buffer[layer + 1 :]]

    def get_with(
        self, value: Leaves, buffer: PyTree, slot: Any, layer: Any
    ) -> tuple[Leaves, list[jax.Array]]:
        """`value`, and what `get` returns, not read before `value` is there.

        Slices of layers that are written out would otherwise all be taken at once, and held. With
        one slot there are none.
        """
        pairs = zip(buffer[layer], self.specs[layer], strict=True) if self.unroll else ()
        if any(b.ndim > len(s.shape) for b, s in pairs):
            value, row = lax.optimization_barrier((value, buffer[layer]))
            buffer = [*buffer[:layer], row, *buffer[layer + 1 :]]
        return value, self.get(buffer, slot, layer)

    def get(self, buffer: PyTree, slot: Any, layer: Any) -> list[jax.Array]:
        """One layer's values in one slot."""
        if not self.unroll:
            return [get_row(b, slot, layer) for b in buffer]
        pairs = zip(buffer[layer], self.specs[layer], strict=True)
        return [b if b.ndim == len(s.shape) else get_row(b, slot) for b, s in pairs]


def chunk_program(
    model: LayeredModel,
    weights: PyTree,
    x: PyTree,
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
        weights: shapes and dtypes of a chunk's parameters, leaves [K, ...], whatever their kinds.
        x: shapes and dtypes of the chunk's input.
        microbatch: shapes and dtypes of one microbatch.
        recompute: what backward computes again.
        padded: whether the last chunks hold layers that are not there (K C > L); those pass x on.
        unroll: write the K layers out instead of looping over them.
        split: also make the two halves of backward, I and W.
    """
    layers = jax.tree.leaves(weights)[0].shape[0]
    one = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), weights)
    policy: Recompute = "none" if recompute == "chunk" else recompute
    inner = {
        kind: block_program(model, one, x, microbatch, policy, kind, split=split)
        for kind in model.kinds
    }
    choice = Choice(model, layers, unroll=unroll)
    shared = {
        possible: Shared({kind: inner[kind].residuals for kind in possible})
        for possible in map(choice.possible, range(layers))
    }
    kept = _Store(
        specs=[shared[choice.possible(layer)].specs for layer in range(layers)], unroll=unroll
    )
    no_gradient = floats(one)

    def held(index: Any) -> Shared:
        return shared[choice.possible(index if unroll else 0)]

    def if_present(first_layer, index, run, skip):
        return lax.cond(first_layer + index < model.layers, run, skip) if padded else run()

    def loop(body, carry, weights, *, reverse=False):
        """`body(carry, layer index, weights) -> (carry, output)` over the layers.

        Outputs are stacked, or a list where layers are written out.
        """
        if not unroll:
            scanned = (jnp.arange(layers), weights)
            return lax.scan(lambda c, s: body(c, *s), carry, scanned, reverse=reverse)
        outputs: list[Any] = [None] * layers
        for index in reversed(range(layers)) if reverse else range(layers):
            w = jax.tree.map(lambda p, i=index: p[i], weights)
            carry, outputs[index] = body(carry, index, w)
        return carry, outputs

    def forward(weights, x, microbatch, buffer, slot, first_layer):
        def layer(carry, index, w):
            x, buffer = carry
            number = first_layer + index

            def of_kind(kind):
                y, residuals = inner[kind].forward(w, x, microbatch, number)
                return y, held(index).put(kind, residuals)

            y, residuals = if_present(
                first_layer,
                index,
                lambda: choice.run(index, number, of_kind),
                lambda: (x, zeros(held(index).specs)),
            )
            return (y, kept.put(buffer, residuals, slot, index)), None

        return loop(layer, (x, buffer), weights)[0]

    def backward(weights, buffer, slot, dy, microbatch, first_layer):
        def layer(carry, index, w):
            dx, buffer = carry
            dx, residuals = kept.get_with(dx, buffer, slot, index)
            number = first_layer + index

            def of_kind(kind):
                own = held(index).get(kind, residuals)
                return inner[kind].backward(w, own, dx, microbatch, number)

            dw, dx = if_present(
                first_layer,
                index,
                lambda: choice.run(index, number, of_kind),
                lambda: (zeros(no_gradient), dx),
            )
            if recompute == "block":
                # Weight gradients put off would hold what a layer made again. Not within the
                # block's program: its two halves must stay apart.
                dw, dx = lax.optimization_barrier((dw, dx))
            return (dx, _handed_on(buffer)), dw

        (dx, buffer), dw = loop(layer, (dy, buffer), weights, reverse=True)
        return dw, dx, buffer

    def split_program() -> SplitChunkProgram:
        halves = {
            kind: split_backward(
                inner[kind].backward, one, inner[kind].residuals, floats(x), microbatch, INDEX
            )
            for kind in model.kinds
        }
        tap_of = {
            possible: Shared({kind: halves[kind].taps for kind in possible}) for possible in shared
        }
        tapped = _Store(
            specs=[tap_of[choice.possible(layer)].specs for layer in range(layers)], unroll=unroll
        )

        def tap(index: Any) -> Shared:
            return tap_of[choice.possible(index if unroll else 0)]

        def input_gradient(weights, buffer, slot, dy, microbatch, first_layer, taps, tap_slot):
            def layer(carry, index, w):
                dx, buffer, taps = carry
                dx, residuals = kept.get_with(dx, buffer, slot, index)
                number = first_layer + index

                def of_kind(kind):
                    own = held(index).get(kind, residuals)
                    made, values = halves[kind].input_gradient(w, own, dx, microbatch, number)
                    return made, tap(index).put(kind, values)

                dx, values = if_present(
                    first_layer,
                    index,
                    lambda: choice.run(index, number, of_kind),
                    lambda: (dx, zeros(tap(index).specs)),
                )
                taps = tapped.put(taps, values, tap_slot, index)
                return (dx, _handed_on(buffer), taps), None

            return loop(layer, (dy, buffer, taps), weights, reverse=True)[0]

        def weight_gradient(taps, tap_slot, first_layer):
            def layer(taps, index, _):
                values = tapped.get(taps, tap_slot, index)
                dw = if_present(
                    first_layer,
                    index,
                    lambda: choice.run(
                        index,
                        first_layer + index,
                        lambda kind: halves[kind].weight_gradient(tap(index).get(kind, values)),
                    ),
                    lambda: zeros(no_gradient),
                )
                return _handed_on(taps), dw

            taps, dw = loop(layer, taps, None)
            return dw, taps

        return SplitChunkProgram(
            input_gradient=input_gradient,
            weight_gradient=weight_gradient,
            empty_taps=tapped.empty,
        )

    whole = ChunkProgram(
        forward=forward,
        backward=backward,
        residuals=[spec for specs in kept.specs for spec in specs],
        empty_residuals=kept.empty,
        split=split_program() if split else None,
    )
    return _from_input(whole, jax.tree.leaves(x)) if recompute == "chunk" else whole


def _from_input(inner: ChunkProgram, x: list[jax.ShapeDtypeStruct]) -> ChunkProgram:
    """The same programs with a chunk's input as the only residual."""
    kept = _Store(specs=[x], unroll=False)

    def again(weights, buffer, slot, microbatch, first_layer):
        x = kept.get(buffer, slot, 0)
        return inner.forward(weights, x, microbatch, inner.empty_residuals(1), 0, first_layer)[1]

    def forward(weights, x, microbatch, buffer, slot, first_layer):
        y, _ = inner.forward(weights, x, microbatch, inner.empty_residuals(1), 0, first_layer)
        return y, kept.put(buffer, x, slot, 0)

    def backward(weights, buffer, slot, dy, microbatch, first_layer):
        residuals = again(weights, buffer, slot, microbatch, first_layer)
        dw, dx, _ = inner.backward(weights, residuals, 0, dy, microbatch, first_layer)
        return dw, dx, buffer

    split = inner.split
    if split is not None:
        halves = split

        def input_gradient(weights, buffer, slot, dy, microbatch, first_layer, taps, tap_slot):
            residuals = again(weights, buffer, slot, microbatch, first_layer)
            dx, _, taps = halves.input_gradient(
                weights, residuals, 0, dy, microbatch, first_layer, taps, tap_slot
            )
            return dx, buffer, taps

        split = replace(split, input_gradient=input_gradient)
    return ChunkProgram(
        forward=forward,
        backward=backward,
        residuals=x,
        empty_residuals=kept.empty,
        split=split,
    )


def _handed_on(buffer: PyTree) -> PyTree:
    """A loop's carry that it only reads; as plainly the same value, JAX would take it out of it."""
    return lax.optimization_barrier(buffer)
