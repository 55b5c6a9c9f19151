"""Low-rank adapters for any layered model: frozen blocks W plus trained (scale / rank) A B.

A [in, rank] starts random and B [rank, out] at zero, so training starts at the frozen model's loss.
The block sees ordinary parameters: W + A B is formed when it runs, and dropped after it.
Gradients flow to A and B alone; the frozen leaves' gradients are zeros. Source: LoRA (Hu et al.,
2106.09685).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsys.errors import UsageError
from jaxsys.layered import (
    BlockFunction,
    Layer,
    LayeredModel,
    Parameters,
    PyTree,
    each_form,
    seed_key,
)
from jaxsys.model.peft import Adapters
from jaxsys.train.state import path_names

__all__ = ["Adapters", "add_adapters", "train_adapters"]


def add_adapters(
    model: LayeredModel,
    parameters: Parameters,
    *,
    rank: int,
    targets: Sequence[str],
    scale: float = 16.0,
    seed: int = 0,
) -> tuple[LayeredModel, Parameters, Callable[[Parameters], Parameters]]:
    """Freezes a model and gives its blocks adapters.

    Args:
        model: the layered model.
        parameters: its parameters, in layer order.
        rank: columns of A and rows of B.
        targets: names of block kernels that get one, such as "query" or "mlp/up": [L, in, out], or
            experts' [L, E, in, out], each with its own.
        scale: the adapters' weight is scale / rank.
        seed: of A.

    Returns:
        The adapted model; its parameters, blocks {"frozen", "adapters"}, of each kind if there are
        several; and a function that merges trained ones back into parameters of the model given.

    Raises:
        UsageError: if a target names no kernel, or weights are to travel in float8: blocks would
            add adapters to rounded ones.
    """
    if rank < 1:
        raise UsageError(f"rank={rank} must be at least 1")
    if model.travels_in_float8 is not None:
        raise UsageError(
            "adapters are added to weights as they are, which float8 transfers would round first; "
            "leave float8 transfers out"
        )
    stacks = model.stacks(parameters["blocks"])
    kernels = {
        (kind, "/".join(path_names(path))): leaf
        for kind, stack in stacks.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(stack)[0]
        if leaf.ndim in (3, 4) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    chosen: dict[str, Adapters] = {kind: {} for kind in stacks}
    key = seed_key(seed)
    for target in targets:
        named = [place for place in kernels if f"/{place[1]}".endswith(f"/{target}")]
        if not named:
            there = ", ".join(dict.fromkeys(name for _, name in kernels))
            raise UsageError(f"no block kernel is named {target!r}; there are {there}")
        for kind, name in named:
            key, use = jax.random.split(key)
            *lead, rows, columns = kernels[kind, name].shape
            chosen[kind][name] = {
                "a": jax.random.normal(use, (*lead, rows, rank), jnp.float32) / rows**0.5,
                "b": jnp.zeros((*lead, rank, columns), jnp.float32),
            }
    weight = scale / rank

    def merged(trained: Parameters) -> Parameters:
        return {
            "edge": trained["edge"],
            "blocks": model.blocks(
                {
                    kind: _merge(stack["frozen"], stack["adapters"], weight, _add_by_layer)
                    for kind, stack in model.stacks(trained["blocks"]).items()
                }
            ),
        }

    start: Parameters = {
        "edge": parameters["edge"],
        "blocks": model.blocks(
            {kind: {"frozen": stack, "adapters": chosen[kind]} for kind, stack in stacks.items()}
        ),
    }
    return _with_adapters(model, weight), start, merged


def _with_adapters(model: LayeredModel, weight: float) -> LayeredModel:
    """The model on parameters with adapters; what it draws and how it is evaluated stay."""

    def adapted(inner: BlockFunction) -> BlockFunction:
        @functools.wraps(inner)
        def block(weights: PyTree, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
            frozen = jax.lax.stop_gradient(weights["frozen"])
            return inner(_merge(frozen, weights["adapters"], weight), x, microbatch, layer)

        return block

    @functools.wraps(model.embed)
    def embed(edge: PyTree, microbatch: PyTree) -> PyTree:
        return model.embed(jax.lax.stop_gradient(edge), microbatch)

    @functools.wraps(model.head_loss)
    def head_loss(edge: PyTree, x: PyTree, microbatch: PyTree) -> tuple[Any, ...]:
        return model.head_loss(jax.lax.stop_gradient(edge), x, microbatch)

    across = model.across
    # The user's own tree and the parts of its leaves have no place for adapters.
    return replace(
        model,
        embed=embed,
        block=model.blocks(
            {kind: each_form(adapted, inner) for kind, inner in model.kinds.items()}
        ),
        head_loss=head_loss,
        evaluation=None if model.evaluation is None else _with_adapters(model.evaluation, weight),
        across=None if across is None else lambda split: _with_adapters(across(split), weight),
        in_parts=None,
        in_parts_by={},
        view=None,
    )


def _add(value: jax.Array, a: jax.Array, b: jax.Array, weight: float) -> jax.Array:
    return value + (weight * (a @ b)).astype(value.dtype)


@jax.jit
def _add_by_layer(value: jax.Array, a: jax.Array, b: jax.Array, weight: float) -> jax.Array:
    """Of stacks: beside the result lies only what one layer adds."""
    return jax.lax.map(lambda one: _add(one[0], one[1], one[2], weight), (value, a, b))


def _merge(
    frozen: PyTree, adapters: Adapters, weight: float, add: Callable[..., jax.Array] = _add
) -> PyTree:
    def leaf(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        adapter = adapters.get("/".join(path_names(path)))
        if adapter is None:
            return value
        return add(value, adapter["a"], adapter["b"], weight)

    return jax.tree_util.tree_map_with_path(leaf, frozen)


def train_adapters(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that changes adapters alone and keeps no state for what is frozen."""

    def labels(parameters: PyTree) -> PyTree:
        def label(path: tuple[Any, ...], _: Any) -> str:
            return "train" if "adapters" in path_names(path) else "freeze"

        return jax.tree_util.tree_map_with_path(label, parameters)

    return optax.multi_transform({"train": optimizer, "freeze": optax.set_to_zero()}, labels)
