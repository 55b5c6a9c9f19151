"""A layered model on lists of arrays, and derivatives of what is floating-point alone.

Between blocks, x is a list of the leaves of the model's own pytree. Cotangents are lists as well,
of floating-point leaves: integers, booleans and random keys, in x as in parameters, are constants,
which have none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.layered import ALIKE, Layer, LayeredModel, PyTree, form_of

from .jaxprs import inlined, is_literal, slice_of

Leaves = list[Any]
"""Arrays, or shapes and dtypes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatModel:
    """A layered model whose x is a list of arrays; made by `flat_model`."""

    model: LayeredModel
    structure: Any
    """Of x as the model has it."""
    x: list[jax.ShapeDtypeStruct]
    metrics: tuple[str, ...]
    """What `head` returns sums of, besides loss and weight."""

    def embed(self, edge: PyTree, microbatch: PyTree) -> Leaves:
        """(edge, microbatch) -> x."""
        return _arrays(self.model.embed(edge, microbatch))

    def block(
        self,
        weights: PyTree,
        x: Leaves,
        microbatch: PyTree,
        index: Any,
        kind: str = ALIKE,
        *,
        again: bool = False,
    ) -> Leaves:
        """Block number `index`, which is of `kind`: x -> x; see `form_of`."""
        tree = jax.tree.unflatten(self.structure, x)
        layer = Layer(index=jnp.asarray(index, jnp.int32))
        run = form_of(self.model.kinds[kind], again=again)
        return _arrays(run(weights, tree, microbatch, layer))

    def head(
        self, edge: PyTree, x: Leaves, microbatch: PyTree
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """(edge, x, microbatch) -> (summed loss, weight, metrics), float32."""
        tree = jax.tree.unflatten(self.structure, x)
        loss, weight, *rest = self.model.head_loss(edge, tree, microbatch)
        found = rest[0] if rest else {}
        metrics = {name: jnp.asarray(found[name], jnp.float32) for name in self.metrics}
        return jnp.asarray(loss, jnp.float32), jnp.asarray(weight, jnp.float32), metrics

    def empty_metrics(self) -> dict[str, jax.Array]:
        """Zeros for the sums of metrics."""
        return {name: jnp.float32(0) for name in self.metrics}

    @property
    def cotangents(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of x's cotangents."""
        return floats(self.x)


def flat_model(model: LayeredModel, edge: PyTree, microbatch: PyTree) -> FlatModel:
    """Traces embedding and head.

    Args:
        model: the layered model.
        edge: its edge's parameters, arrays or shapes.
        microbatch: shapes and dtypes of one microbatch.

    Raises:
        UsageError: if the head does not return scalars, or there are complex numbers.
    """
    refuse_complex(edge, "the edge")
    flat = flat_of(model, jax.eval_shape(lambda e, m: model.embed(e, m), edge, microbatch))
    tree = jax.tree.unflatten(flat.structure, flat.x)
    out = jax.eval_shape(lambda e, x, m: model.head_loss(e, x, m), edge, tree, microbatch)
    if not isinstance(out, tuple) or len(out) not in (2, 3):
        raise UsageError(
            f"head_loss returns {show(out)}; it must return (summed loss, weight), or these and a "
            "dict of metrics"
        )
    metrics = out[2] if len(out) == 3 else {}
    if not isinstance(metrics, dict):
        raise UsageError(f"head_loss returns metrics {show(metrics)}; they must be a dict")
    for name, leaf in {"loss": out[0], "weight": out[1], **metrics}.items():
        if getattr(leaf, "shape", None) != ():
            raise UsageError(f"head_loss returns {name} {show(leaf)}; it must be a scalar")
    return FlatModel(model=model, structure=flat.structure, x=flat.x, metrics=tuple(metrics))


def flat_of(model: LayeredModel, x: PyTree) -> FlatModel:
    """The model on lists, from shapes and dtypes of x; without its metrics."""
    leaves, structure = jax.tree.flatten(x)
    refuse_complex(leaves, "x, what goes from block to block,")
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return FlatModel(model=model, structure=structure, x=shapes, metrics=())


def refuse_complex(tree: PyTree, what: str) -> None:
    """Raises UsageError if there are complex leaves: what is not floating-point is a constant."""
    if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in jax.tree.leaves(tree)):
        raise UsageError(
            f"{what} has complex leaves, which have no gradient here; hold their real and "
            "imaginary parts as two leaves and put them together where they are used (lax.complex)"
        )


def check_block(flat: FlatModel, weights: PyTree, microbatch: PyTree, kind: str = ALIKE) -> None:
    """Raises UsageError if a block does not map x to its own structure, shapes and dtypes."""
    refuse_complex(weights, "a block's parameters")
    tree = jax.tree.unflatten(flat.structure, flat.x)
    run = flat.model.kinds[kind]
    y = jax.eval_shape(
        lambda w, x, m, i: run(w, x, m, Layer(index=i)),
        weights,
        tree,
        microbatch,
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    same = jax.tree.structure(y) == flat.structure and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(y), flat.x, strict=True)
    )
    if not same:
        name = "block" if kind == ALIKE else f"block {kind!r}"
        raise UsageError(
            f"{name} maps {show(tree)} to {show(y)}; it must keep structure, shapes and dtypes"
        )


def pull_back(
    function: Callable[..., Any], *primals: PyTree
) -> tuple[Any, Callable[[Leaves], tuple[Leaves, ...]]]:
    """`jax.vjp` where what is not floating-point is a constant.

    Returns:
        The function's value, and cotangents of its floats -> those of each primal's floats.
    """

    def of_floats(*parts: Leaves) -> tuple[Leaves, Any]:
        value = function(*[with_floats(p, part) for p, part in zip(primals, parts, strict=True)])
        return floats(value), value

    _, vjp, value = jax.vjp(of_floats, *map(floats, primals), has_aux=True)
    return value, vjp


def head_back(
    flat: FlatModel, edge: PyTree, x: Leaves, microbatch: PyTree
) -> tuple[tuple[jax.Array, jax.Array, dict[str, jax.Array]], Leaves, Leaves]:
    """The head with the gradient of its loss.

    Returns:
        (loss, weight, metrics), gradients of edge's floats, cotangents of x.
    """

    def score(edge: PyTree, x: Leaves) -> tuple[jax.Array, Any]:
        found = flat.head(edge, x, microbatch)
        return found[0], found

    def of_floats(edge_floats: Leaves, x_floats: Leaves) -> tuple[jax.Array, Any]:
        return score(with_floats(edge, edge_floats), with_floats(x, x_floats))

    loss, vjp, found = jax.vjp(of_floats, floats(edge), floats(x), has_aux=True)
    d_edge, dx = vjp(jnp.ones_like(loss))
    return found, d_edge, dx


def read_by_head(flat: FlatModel, edge: PyTree, x: Leaves, microbatch: PyTree) -> list[bool]:
    """Of each of edge's floats whether head and loss read it; arguments may be shapes."""

    def score(edge_floats: Leaves, x: Leaves, microbatch: PyTree) -> Any:
        return flat.head(with_floats(edge, edge_floats), x, microbatch)

    jaxpr = inlined(jax.make_jaxpr(score)(floats(edge), x, microbatch)).jaxpr
    needed = slice_of(jaxpr, [v for v in jaxpr.outvars if not is_literal(v)])
    read = {v for equation in needed for v in equation.invars if not is_literal(v)}
    return [v in read for v in jaxpr.invars[: len(floats(edge))]]


def is_float(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def floats(tree: PyTree) -> Leaves:
    """The floating-point leaves."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def with_floats(tree: PyTree, values: Leaves) -> PyTree:
    """The tree with other floating-point leaves."""
    rest = iter(values)
    return jax.tree.map(lambda leaf: next(rest) if is_float(leaf) else leaf, tree)


def like(parameters: PyTree, gradients: Leaves) -> PyTree:
    """A tree of gradients: those of floats in their places, zeros in those of constants."""
    return with_floats(jax.tree.map(jnp.zeros_like, parameters), gradients)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating-point leaves in a dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)


def show(value: Any) -> str:
    """Shapes and dtypes, for messages."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    leaves, structure = jax.tree.flatten(value)
    if not leaves or jax.tree_util.treedef_is_leaf(structure):
        return repr(value)
    return str(jax.tree.unflatten(structure, [_Shown(show(leaf)) for leaf in leaves]))


class _Shown(str):
    """Prints without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _arrays(tree: PyTree) -> Leaves:
    """Leaves as arrays whose dtypes are their own: Python's numbers would give way to others."""
    return [jnp.asarray(leaf, jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]
