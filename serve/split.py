"""How one instance's model lies over its devices: which axis of which array a mesh cuts.

An instance's mesh has one axis, over which its devices share every layer: heads and features, and
of experts each expert's features.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxsys.axes import TENSOR
from jaxsys.errors import UsageError
from jaxsys.model import DecoderConfig
from jaxsys.serve.matrix import Matrix

AXIS = TENSOR
"""The axis of an instance's mesh."""
FEEDS = ("mlp", "shared")


def mesh_over(devices: Sequence[Any]) -> Mesh:
    """The mesh of an instance on several devices."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def devices_of(mesh: Mesh | None) -> int:
    """How many devices share the model; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[AXIS]


def cut(axis: int) -> PartitionSpec:
    """Of an array that devices share along an axis."""
    return PartitionSpec(*(None,) * axis, AXIS)


SPLIT: dict[str, Literal["inputs", "outputs"] | PartitionSpec] = {
    "qkv": "outputs",
    "qkv_bias": PartitionSpec(AXIS, None, None),
    "out": "inputs",
    "attention/sinks": PartitionSpec(AXIS, None),
    "attention/query": "outputs",
    "attention/query_up": "outputs",
    "attention/latent_up": PartitionSpec(None, AXIS, None),
    **{f"{name}/up": "outputs" for name in FEEDS},
    **{f"{name}/up_bias": PartitionSpec(AXIS, None, None) for name in FEEDS},
    **{f"{name}/down": "inputs" for name in FEEDS},
}
"""How a mesh splits what it splits; all else is whole on each device. A matrix's scale follows its
outputs, that of groups its inputs too."""


def check_tensor_parallel(config: DecoderConfig, mesh: Mesh) -> None:
    """Raises UsageError where the mesh's `AXIS` axis does not divide heads and feed-forward."""
    ways = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)).get(AXIS)
    if ways is None:
        raise UsageError(f"the mesh has axes {mesh.axis_names}; it needs one named {AXIS!r}")
    sizes = {name: getattr(config, name) for name in ("num_kv_heads", "vocab_size")}
    if any(not kind.experts for kind in config.kinds):
        sizes["intermediate_size"] = config.intermediate_size
    if config.experts is not None:
        sizes["hidden_size"] = config.hidden_size
        sizes["experts intermediate_size"] = config.experts.intermediate_size
        if config.experts.shared_size:
            sizes["experts shared_size"] = config.experts.shared_size
    common = math.gcd(*sizes.values())
    if common % ways:
        fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
        said = [f"{name}={value}" for name, value in sizes.items()]
        raise UsageError(
            f"tensor_parallel={ways} does not divide {', '.join(said[:-1])} and {said[-1]}; "
            f"use {', '.join(fitting)}"
        )


def placed_as(node: Any, split: Any, placement: Sharding | None) -> Any:
    """Puts a matrix or vector where it belongs; `split` says how a mesh cuts it."""
    if placement is None:
        return node
    if not isinstance(placement, NamedSharding):
        return jax.device_put(node, placement)
    if not isinstance(node, Matrix):
        return jax.device_put(node, NamedSharding(placement.mesh, split))
    of_values, of_scale = _specs(node, split)
    scale = node.scale
    if scale is not None:
        scale = jax.device_put(scale, NamedSharding(placement.mesh, of_scale))
    values = jax.device_put(node.values, NamedSharding(placement.mesh, of_values))
    return dataclasses.replace(node, values=values, scale=scale)


def _specs(matrix: Matrix, split: Any) -> tuple[PartitionSpec, PartitionSpec]:
    """How a matrix's values and scale are cut."""
    if isinstance(split, PartitionSpec):
        return split, PartitionSpec()
    inputs = AXIS if split == "inputs" else None
    outputs = AXIS if split == "outputs" else None
    if matrix.packed:  # by whole groups, see `check_tensor_parallel`
        return PartitionSpec(outputs, inputs, None), PartitionSpec(outputs, inputs)
    if matrix.outputs_first:
        return PartitionSpec(outputs, inputs), PartitionSpec(outputs)
    return PartitionSpec(inputs, outputs), PartitionSpec(outputs)
