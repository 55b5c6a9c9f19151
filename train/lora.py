"""Low-rank adapters for any layered model: frozen blocks W plus trained (scale / rank) A B.

A [in, rank] starts random and B [rank, out] at zero, so training starts at the frozen model's loss.
The block sees ordinary parameters: W + A B is formed when it runs, and dropped after it.
Gradients flow to A and B alone; the frozen leaves' gradients are zeros. Source: LoRA (Hu et al.,
2106.09685).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsys.errors import UsageError
from jaxsys.layered import Layer, LayeredModel, Parameters, PyTree
from jaxsys.train.state import path_names


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
        targets: names of block kernels [L, in, out] that get one, such as "query" or "mlp/up".
        scale: the adapters' weight is scale / rank.
        seed: of A.

    Returns:
        The adapted model; its parameters, blocks {"frozen", "adapters"}; and a function that
        merges trained ones back into parameters of the model given.

    Raises:
        UsageError: if a target names no kernel.
    """
    if rank < 1:
        raise UsageError(f"rank={rank} must be at least 1")
    flat = {
        "/".join(path_names(path)): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(parameters["blocks"])[0]
    }
    kernels = {name: leaf for name, leaf in flat.items() if leaf.ndim == 3}
    chosen: dict[str, dict[str, jax.Array]] = {}
    key = jax.random.key(seed)
    for target in targets:
        names = [name for name in kernels if f"/{name}".endswith(f"/{target}")]
        if not names:
            raise UsageError(f"no block kernel is named {target!r}; there are {', '.join(kernels)}")
        for name in names:
            key, use = jax.random.split(key)
            layers, rows, columns = kernels[name].shape
            chosen[name] = {
                "a": jax.random.normal(use, (layers, rows, rank), jnp.float32) / rows**0.5,
                "b": jnp.zeros((layers, rank, columns), jnp.float32),
            }
    weight = scale / rank

    def merge(frozen: PyTree, adapters: dict[str, dict[str, jax.Array]]) -> PyTree:
        def leaf(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
            adapter = adapters.get("/".join(path_names(path)))
            if adapter is None:
                return value
            return value + (weight * (adapter["a"] @ adapter["b"])).astype(value.dtype)

        return jax.tree_util.tree_map_with_path(leaf, frozen)

    (inner,) = model.kinds.values()

    def block(weights: PyTree, x: PyTree, microbatch: PyTree, layer: Layer) -> PyTree:
        frozen = jax.lax.stop_gradient(weights["frozen"])
        return inner(merge(frozen, weights["adapters"]), x, microbatch, layer)

    def embed(edge: PyTree, microbatch: PyTree) -> PyTree:
        return model.embed(jax.lax.stop_gradient(edge), microbatch)

    def head_loss(edge: PyTree, x: PyTree, microbatch: PyTree) -> tuple[Any, ...]:
        return model.head_loss(jax.lax.stop_gradient(edge), x, microbatch)

    adapted = LayeredModel(embed=embed, block=block, head_loss=head_loss, layers=model.layers)

    def merged(trained: Parameters) -> Parameters:
        blocks = trained["blocks"]
        return {
            "edge": trained["edge"],
            "blocks": merge(blocks["frozen"], blocks["adapters"]),
        }

    start: Parameters = {
        "edge": parameters["edge"],
        "blocks": {"frozen": parameters["blocks"], "adapters": chosen},
    }
    return adapted, start, merged


def train_adapters(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that changes adapters alone and keeps no state for what is frozen."""

    def labels(parameters: PyTree) -> PyTree:
        def label(path: tuple[Any, ...], _: Any) -> str:
            return "train" if "adapters" in path_names(path) else "freeze"

        return jax.tree_util.tree_map_with_path(label, parameters)

    return optax.multi_transform({"train": optimizer, "freeze": optax.set_to_zero()}, labels)
