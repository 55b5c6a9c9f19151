"""What every token goes through alone, some tokens at a time.

    y_i = f(W, x_i);    dx_i = (df/dx)^T dy_i;    dW = sum_i (df/dW)^T dy_i

Of a long sequence the feed-forward's inner values are then never all there: each piece's are made
again when its gradient is taken, which a block that is computed again does anyway. Gradients of
weights are summed over pieces in float32. (Tiled MLP: Bekman et al., 2506.13996, 3.1.)

Legend: R rows, that is tokens of all sequences; r rows of a piece; n pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jaxsys.context import ContextSplit
from jaxsys.layered import PyTree
from jaxsys.model.attention import Implementation
from jaxsys.model.block import BoundBlock

PIECE_TOKENS = 16_384
"""Tokens of a piece: enough that a loop over pieces, which adds a gradient of every weight in each,
takes a hundredth more time than products of all tokens."""
LEAST_PIECES = 4
"""Shorter sequences are whole."""


def pieces_of(rows: int, tokens: int) -> int:
    """n: in how many pieces of at most `tokens` so many rows are; 1 where they stay whole."""
    if rows < LEAST_PIECES * tokens:
        return 1
    least = -(-rows // tokens)
    return next((n for n in range(least, 2 * least) if rows % n == 0), least)


def run_in_pieces(
    bind: Callable[[PyTree], BoundBlock],
    weights: PyTree,
    x: jax.Array,
    *,
    tokens: int,
    implementation: Implementation | None,
    context: ContextSplit | None,
) -> jax.Array:
    """A block's `run` with all but attention in pieces: [B, T, D] -> [B, T, D].

    Args:
        bind: weights -> the block.
        weights: its parameters.
        x: the residual.
        tokens: of a piece, at most.
        implementation: of attention.
        context: how sequences lie over devices.
    """
    bound, (batch, length) = bind(weights), x.shape[:2]
    pieces = pieces_of(batch * length, tokens)
    if pieces == 1:
        return bound.run(x, implementation=implementation, context=context)[0]

    def rows(value: jax.Array) -> jax.Array:
        """[B or 1, T, ...] -> [R, ...]."""
        return jnp.broadcast_to(value, (batch, *value.shape[1:])).reshape(-1, *value.shape[2:])

    def project(weights: PyTree, piece: PyTree, tables: PyTree) -> PyTree:
        turn = None if tables is None else tuple(table[None] for table in tables)
        return [each[0] for each in bind(weights).project(piece[None], turn)]

    def finish(weights: PyTree, piece: PyTree, _: PyTree) -> PyTree:
        return bind(weights).finish(*(each[None] for each in piece))[0][0]

    tables = bound.turn_of(x, context=context)
    tables = None if tables is None else [rows(table) for table in tables]
    heads = in_pieces(project, weights, rows(x), tables, pieces=pieces)
    q, k, v = (each.reshape(batch, length, *each.shape[1:]) for each in heads)
    o = bound.attend(q, k, v, implementation, context)
    return in_pieces(finish, weights, (rows(x), rows(o)), None, pieces=pieces).reshape(x.shape)


def in_pieces(
    function: Callable[[PyTree, PyTree, PyTree], PyTree],
    weights: PyTree,
    rows: PyTree,
    constants: PyTree,
    *,
    pieces: int,
) -> PyTree:
    """`function(weights, rows, constants)`, whose rows do not depend on each other, piece by piece.

    Args:
        function: pure.
        weights: floating-point leaves of any shape; those that it does not read have no gradient.
        rows: leaves [R, ...].
        constants: leaves [R, ...] without a gradient.
        pieces: n. Where it does not divide R, rows of zeros are added, and dropped.
    """
    leaves, structure = jax.tree.flatten(weights)
    count = jax.tree.leaves(rows)[0].shape[0]
    size = -(-count // pieces)
    read = _read(function, weights, *jax.tree.map(lambda x: _first(x, size), (rows, constants)))

    def of_read(own: list[jax.Array], piece: PyTree, constant: PyTree) -> PyTree:
        every = list(leaves)
        for place, leaf in zip(read, own, strict=True):
            every[place] = leaf
        return function(jax.tree.unflatten(structure, every), piece, constant)

    def cut(tree: PyTree) -> PyTree:
        """[R, ...] -> [n, r, ...]."""

        def one(x: jax.Array) -> jax.Array:
            spare = pieces * size - count
            if spare:
                x = jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(pieces, size, *x.shape[1:])

        return jax.tree.map(one, tree)

    def joined(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], tree)

    def forward(own: list[jax.Array], rows: PyTree, constants: PyTree) -> PyTree:
        rows, zero = lax.optimization_barrier((rows, jnp.float32(0)))
        turns = jnp.arange(pieces), *cut((rows, constants))
        first = jax.tree.map(lambda x: x[0], turns[1:])
        made = jax.eval_shape(of_read, own, *first)
        room = jax.tree.map(lambda y: _room(zero, (pieces, *y.shape), y.dtype), made)

        def one(room: PyTree, turn: Any) -> tuple[PyTree, None]:
            number, *piece = turn
            return _put(room, of_read(own, *piece), number), None

        return joined(lax.scan(one, room, turns)[0])

    def ahead(own: list[Any], rows: PyTree, constants: PyTree) -> Any:
        trained = _Trained(tuple(w.perturbed for w in own))
        kept = jax.tree.map(lambda leaf: leaf.value, (own, rows, constants), is_leaf=_is_primal)
        return forward(*kept), (*kept, trained)

    def back(kept: Any, dy: PyTree) -> Any:
        own, rows, constants, trained = kept
        dy = jax.tree.map(_instantiated, dy, is_leaf=lambda e: isinstance(e, SymbolicZero))
        dy, rows, zero = lax.optimization_barrier((dy, rows, jnp.float32(0)))
        errors, of_y = jax.tree.flatten(cut(dy))
        inputs, of_rows = jax.tree.flatten(cut(rows))
        # The gradient of an input takes the place of an output's, once that has been read.
        instead: dict[int, int] = {}
        for place, error in enumerate(errors):
            alike = (n for n, x in enumerate(inputs) if (x.shape, x.dtype) == _form(error))
            found = next((n for n in alike if n not in instead.values()), None)
            if found is not None:
                instead[place] = found

        def one(carry: Any, piece: Any) -> Any:
            sums, there, found = carry
            number, inputs, constant, others = piece
            error = [there[n][number] if n in instead else others[n] for n in range(len(errors))]
            _, vjp = jax.vjp(
                lambda w, x: of_read(
                    [w.get(n, leaf) for n, leaf in enumerate(own)],
                    jax.tree.unflatten(of_rows, x),
                    constant,
                ),
                {n: own[n] for n in sums},
                inputs,
            )
            d_own, d_inputs = vjp(jax.tree.unflatten(of_y, error))
            sums = {n: total + d_own[n].astype(jnp.float32) for n, total in sums.items()}
            # What is read of a piece has been read before it is overwritten.
            sums, d_inputs = lax.optimization_barrier((sums, d_inputs))
            there = _put(there, {place: d_inputs[n] for place, n in instead.items()}, number)
            return (sums, there, _put(found, {n: d_inputs[n] for n in found}, number)), None

        others = {n: error for n, error in enumerate(errors) if n not in instead}
        start = (
            {n: _room(zero, w.shape, jnp.float32) for n, w in enumerate(own) if trained.leaves[n]},
            {place: errors[place] for place in instead},
            {
                n: _room(zero, x.shape, x.dtype)
                for n, x in enumerate(inputs)
                if n not in instead.values()
            },
        )
        turns = jnp.arange(pieces), inputs, cut(constants), others
        (sums, there, found), _ = lax.scan(one, start, turns)
        found |= {n: there[place] for place, n in instead.items()}
        d_rows = jax.tree.unflatten(of_rows, [found[n] for n in range(len(inputs))])
        d_own = [sums[n].astype(w.dtype) if n in sums else None for n, w in enumerate(own)]
        return d_own, joined(d_rows), None

    run = jax.custom_vjp(forward)
    run.defvjp(ahead, back, symbolic_zeros=True)
    return run([leaves[place] for place in read], rows, constants)


@jax.tree_util.register_static
@dataclass(frozen=True, slots=True)
class _Trained:
    """Which leaves of the weights have a gradient: what is frozen has none, and no products."""

    leaves: tuple[bool, ...]


def _room(zero: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros that a loop fills.

    `zero` comes out of a barrier with what the loop reads: XLA makes constant zeros of all loops of
    a step in one kernel at its start, and holds them.
    """
    return jnp.broadcast_to(zero.astype(dtype), shape)


def _put(room: PyTree, made: PyTree, number: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda there, y: lax.dynamic_update_index_in_dim(there, y, number, 0), room, made
    )


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, CustomVJPPrimal)


def _instantiated(error: Any) -> jax.Array:
    form: Any = getattr(error, "aval", error)
    return jnp.zeros(form.shape, form.dtype) if isinstance(error, SymbolicZero) else error


def _read(function: Callable[..., PyTree], weights: PyTree, *rest: PyTree) -> list[int]:
    """Which leaves of the weights a function reads."""
    jaxpr = jax.make_jaxpr(function)(weights, *rest).jaxpr
    inside = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    count = len(jax.tree.leaves(weights))
    return [place for place, v in enumerate(jaxpr.invars[:count]) if id(v) in inside]


def _first(x: jax.Array, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)


def _form(x: jax.Array) -> tuple[tuple[int, ...], Any]:
    return x.shape, x.dtype
