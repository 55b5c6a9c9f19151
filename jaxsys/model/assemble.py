"""From a checkpoint's tensors, read one at a time, to the stacked parameters.

At most one stacked leaf is held on the host beside what is already on the device: a tensor is
fetched, turned, cast into its layer's place, and forgotten.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.model.config import DecoderConfig
from jaxsys.model.names import Leaf, block_leaves, edge_leaves

Fetch = Callable[[Leaf, str], np.ndarray]
"""(leaf, tensor name) -> the tensor as the checkpoint has it, [out, in] for kernels."""


def assemble(
    config: DecoderConfig,
    fetch: Fetch,
    *,
    name_of: Callable[[Leaf], str],
    dtype: DTypeLike,
) -> Parameters:
    """Reads every leaf.

    Args:
        config: sizes; checked against the checkpoint's by `check_tensors` before.
        fetch: reads one tensor.
        name_of: picks the name form, `{layer}` unfilled.
        dtype: of the result.

    Raises:
        UsageError: if a tensor holds NaN or infinity, or values beyond what `dtype` can express.
    """
    dtype = jnp.dtype(dtype)
    edge: dict[str, Any] = {}
    for leaf in edge_leaves(config):
        # A copy: the array on the device must outlive the file behind `value`.
        value = _turn(leaf, fetch(leaf, name_of(leaf)))
        placed = jax.device_put(np.array(value, dtype, order="C"))
        _check_finite(placed[None], name_of(leaf))
        _put(edge, leaf.path, placed)
    blocks: dict[str, Any] = {}
    for leaf in block_leaves(config):
        shape = leaf.shape[::-1] if leaf.transposed else leaf.shape
        stacked = np.empty((config.num_layers, *shape), dtype)
        for layer in range(config.num_layers):
            stacked[layer] = _turn(leaf, fetch(leaf, name_of(leaf).format(layer=layer)))
        placed = jax.device_put(stacked)
        _check_finite(placed, name_of(leaf))
        _put(blocks, leaf.path, placed)
    return {"edge": edge, "blocks": blocks}


def check_layers(source: str, config: DecoderConfig, found: Collection[str]) -> None:
    """Raises UsageError if there are fewer tensors than layers, before names are made for all."""
    if config.num_layers > len(found):
        raise UsageError(
            f"{source}: its configuration says {config.num_layers} layers, but it holds "
            f"{len(found)} tensors in all; the file is incomplete or of another model"
        )


def expected_tensors(
    config: DecoderConfig, name_of: Callable[[Leaf], str]
) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this configuration must hold, with its shape there."""
    tensors = {name_of(leaf): leaf.shape for leaf in edge_leaves(config)}
    for leaf in block_leaves(config):
        for layer in range(config.num_layers):
            tensors[name_of(leaf).format(layer=layer)] = leaf.shape
    return tensors


def check_tensors(
    source: str,
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
    *,
    ignored: Iterable[str] = (),
) -> None:
    """Compares names and shapes before anything is read.

    Raises:
        UsageError: if a tensor is missing, unexpected, or of another shape.
    """
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise UsageError(
            f"{source} lacks {len(missing)} tensor(s) that its configuration names, first "
            f"{missing[0]!r}; the file is incomplete or of another architecture"
        )
    extra = sorted(found.keys() - expected.keys() - set(ignored))
    if extra:
        raise UsageError(
            f"{source} holds {len(extra)} tensor(s) that its configuration does not name, first "
            f"{extra[0]!r}; it is of another architecture or has other layers than it says"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UsageError(
                f"{source}: tensor {name!r} has shape {tuple(found[name])}, its configuration "
                f"says {shape}"
            )


@jax.jit
def _finite_rows(stacked: jax.Array) -> jax.Array:
    """Whether all of each row is finite, bool [rows]."""
    return jnp.isfinite(stacked).all(axis=range(1, stacked.ndim))


def _check_finite(stacked: jax.Array, name: str) -> None:
    """Raises UsageError naming the first tensor, of a row a layer, that is not finite."""
    finite = np.asarray(_finite_rows(stacked))
    if not finite.all():
        name = name.format(layer=int(finite.argmin()))
        raise UsageError(
            f"tensor {name!r} holds NaN or infinity as {stacked.dtype}; the checkpoint is damaged, "
            "of a run that diverged, or needs a dtype of more range"
        )


def _turn(leaf: Leaf, value: np.ndarray) -> np.ndarray:
    return value.T if leaf.transposed else value


def _put(tree: dict[str, Any], path: tuple[str, ...], value: jax.Array) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
