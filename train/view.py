"""How an optimizer sees the parameters: each layer's leaf by itself, as in the user's own model.

Schedules keep blocks stacked [L, ...]. A rule that reads ranks, shapes, norms or the tree (a decay
mask, Muon, LAMB, Adafactor, clipping) must not see the stack: it would take vectors for matrices
and one norm for L. A view rearranges stacked parameters into the user's own tree. It is called once
with tokens in place of arrays, so all it can do is place leaves and index layers, and which leaf of
the user's tree lies where is then known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters, PyTree
from jaxsys.train.state import Names, path_names

View = Callable[[Any], PyTree]
"""Stacked parameters in layer order -> the user's tree. May index stacks (`leaf[i]`), no more."""


class Place(NamedTuple):
    """Where a leaf of the user's tree lies among the stacked parameters."""

    leaf: Names
    """The stacked leaf's path: ("blocks", "kernel") or ("edge", "table")."""
    layer: int | None
    """Which layer of it; None for all of it."""


@dataclass(frozen=True, slots=True)
class LayerKey:
    """The last step of a path into a default view: which layer of a stacked leaf."""

    key: str
    """The stacked leaf's own name, since rules commonly read the last key of a path."""
    idx: int

    @property
    def name(self) -> str:
        return self.key

    def __str__(self) -> str:
        return f"[{self.idx}]"


@jax.tree_util.register_pytree_with_keys_class
class Layers:
    """The layers of one stacked leaf, side by side: what a default view has in a leaf's place.

    A mask given in the structure of the stacked parameters has one value here, which counts for all
    layers. Rank and shape are those of one layer.
    """

    def __init__(self, layers: Sequence[Any], name: str = "") -> None:
        self.layers, self.name = tuple(layers), name

    def tree_flatten_with_keys(self) -> tuple[Any, str]:
        pairs = [(LayerKey(self.name, i), layer) for i, layer in enumerate(self.layers)]
        return pairs, self.name

    def tree_flatten(self) -> tuple[Any, str]:
        return self.layers, self.name

    @classmethod
    def tree_unflatten(cls, name: str, layers: Any) -> "Layers":
        return cls(layers, name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layers[0].shape

    @property
    def ndim(self) -> int:
        return self.layers[0].ndim

    @property
    def size(self) -> int:
        return self.layers[0].size

    @property
    def dtype(self) -> Any:
        return self.layers[0].dtype


def layer_by_layer(parameters: Any) -> PyTree:
    """The view of a model that says nothing of its own: every stacked leaf becomes `Layers`."""

    def apart(path: tuple[Any, ...], leaf: Any) -> Layers:
        name = path_names(path[-1:])[0] if path else ""
        return Layers([leaf[i] for i in range(leaf.shape[0])], name)

    blocks = jax.tree_util.tree_map_with_path(apart, parameters["blocks"])
    return {"edge": parameters["edge"], "blocks": blocks}


class _Token:
    """Stands for an array in a view's one call."""

    def __init__(self, place: Place, shape: tuple[int, ...], dtype: Any) -> None:
        self.place, self.shape, self.dtype = place, shape, dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> "_Token":
        if self.place.layer is not None or self.place.leaf[0] != "blocks":
            raise UsageError(f"a view may index a stack's layers, not {self._where()}[{index}]")
        try:
            layer = range(self.shape[0])[index]
        except (TypeError, IndexError):
            layer = None
        if not isinstance(layer, int):
            raise UsageError(
                f"a view may take one of {self.shape[0]} layers, not {self._where()}[{index}]"
            )
        return _Token(Place(self.place.leaf, layer), self.shape[1:], self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def _where(self) -> str:
        return "/".join(self.place.leaf)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserTree:
    """The user's tree, and where its leaves lie."""

    structure: Any
    """Of the leaves that train; constants (integers, booleans) are None in it."""
    paths: tuple[Names, ...]
    places: tuple[Place, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    def tree(self, leaves: Sequence[Any] | None = None) -> PyTree:
        """The user's tree of these leaves; of their shapes if none are given."""
        return jax.tree.unflatten(self.structure, self.shapes if leaves is None else leaves)


def trains(leaf: Any) -> bool:
    """Whether a leaf is a parameter; integers and booleans are constants."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def user_tree(view: View | None, parameters: Parameters) -> UserTree:
    """Calls a view with tokens.

    Args:
        view: the model's, or None for `layer_by_layer`.
        parameters: shapes of the stacked parameters, in layer order.

    Raises:
        UsageError: if the view does something else than place leaves and index layers, leaves out a
            parameter or places one twice.
    """

    def token(path: tuple[Any, ...], leaf: Any) -> _Token:
        return _Token(Place(path_names(path), None), leaf.shape, leaf.dtype)

    tokens = jax.tree_util.tree_map_with_path(token, parameters)
    try:
        made = (view or layer_by_layer)(tokens)
    except (TypeError, AttributeError) as error:
        raise UsageError(
            f"the view does more than place leaves and index layers ({error}); use leaf[i] alone"
        ) from None
    kept = jax.tree.map(lambda leaf: leaf if _is_trained(leaf) else None, made)
    flat, structure = jax.tree_util.tree_flatten_with_path(kept)
    places = [leaf.place for _, leaf in flat]
    _check_once(places, [t for t in jax.tree.leaves(tokens) if trains(t)])
    return UserTree(
        structure=structure,
        paths=tuple(path_names(path) for path, _ in flat),
        places=tuple(places),
        shapes=tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in flat),
    )


def _is_trained(leaf: Any) -> bool:
    if not isinstance(leaf, _Token):
        raise UsageError(
            f"the view put {type(leaf).__name__} in the user's tree, which is no parameter"
        )
    return trains(leaf)


def _check_once(places: list[Place], tokens: list[_Token]) -> None:
    """Raises UsageError unless every part of every parameter stands in the user's tree once."""
    seen = set(places)
    twice = (
        next((p for i, p in enumerate(places) if p in places[:i]), None)
        if (len(seen) < len(places))
        else None
    )
    for token in tokens:
        leaf = token.place.leaf
        name = "/".join(leaf)
        whole = token.place in seen
        layers = (
            [i for i in range(token.shape[0]) if Place(leaf, i) in seen]
            if (leaf[0] == "blocks")
            else []
        )
        if (whole and layers) or (twice is not None and twice.leaf == leaf):
            raise UsageError(f"the view places parameter {name} twice; place each leaf once")
        if not whole and (leaf[0] != "blocks" or len(layers) < token.shape[0]):
            raise UsageError(f"the view leaves out parameter {name}; every one must have a place")
