"""From a checkpoint's tensors, read one at a time, to the parameters, straight onto devices.

Beside the result, the host and each device hold one layer's leaf at most: a tensor is fetched, cut
into leaves, cast, and written into its layer's place of the stacked array.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import by_kind, nest
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import Leaf, Path
from jaxsys.model.names import FileTensor
from jaxsys.model.packed import Packed

Fetch = Callable[[str], np.ndarray]
"""Tensor name -> its values as the checkpoint has them."""
FetchPacked = Callable[[str], Packed | None]
"""Tensor name -> its codes and exponents, host arrays; None where it is not packed."""
Tensors = Callable[[BlockKind | None], Sequence[FileTensor]]
"""The tensors of one block of a kind; of the edge where it is None."""
Placement = Callable[[Path], Sharding | None]
"""Where a leaf of the parameters, by its path from the root, rests; None: the default device."""


class Read(Protocol):
    """Reads all parameters of an open checkpoint, as often as it is called."""

    def __call__(
        self, dtype: DTypeLike, placement: Placement | None = None, *, layerwise: bool = False
    ) -> Parameters:
        """
        Args:
            dtype: of the result.
            placement: of each leaf; the default device if not given.
            layerwise: see `jaxsys.model.load`.

        Raises:
            UsageError: as `assemble`.
        """
        ...


def assemble(
    config: DecoderConfig,
    fetch: Fetch,
    tensors: Tensors,
    *,
    dtype: DTypeLike,
    placement: Placement | None = None,
) -> Parameters:
    """Reads every leaf.

    Args:
        config: sizes; checked against the checkpoint's by `check_tensors` before.
        fetch: reads one tensor.
        tensors: which tensors hold the leaves.
        dtype: of the result.
        placement: of each leaf, stacked for blocks; the default device if not given.

    Raises:
        UsageError: if a tensor holds NaN or infinity, or values beyond what `dtype` can express.
    """
    dtype = jnp.dtype(dtype)
    where = placement or (lambda path: None)
    edge = _alone(
        tensors(None), fetch, {}, dtype, lambda path: where(("edge", *path)), lambda name: None
    )
    blocks = {}
    for kind in config.kinds:
        lead = ("blocks", kind.name) if config.pattern else ("blocks",)
        blocks[kind.name] = _stack(
            config.layers_of(kind),
            tensors(kind),
            fetch,
            dtype,
            lambda path, lead=lead: where((*lead, *path)),
        )
    return {"edge": edge, "blocks": by_kind(config, blocks)}


def by_layer(
    config: DecoderConfig,
    fetch: Fetch,
    tensors: Tensors,
    *,
    dtype: DTypeLike,
    fetch_packed: FetchPacked = lambda name: None,
) -> Parameters:
    """The edge, and as "blocks" a function that reads the layer of a number when it is asked.

    For those who keep layers in a form of their own: nothing but one layer lies beside that. Arrays
    come to the default device.

    Args:
        fetch_packed: reads a tensor that is packed, as it is; None for others.

    Raises:
        UsageError: as `assemble`; of a layer, when it is read.
    """
    dtype = jnp.dtype(dtype)

    def layer(number: int) -> dict[str, Any]:
        of_kind = tensors(config.kind(number))
        return _alone(of_kind, fetch, {"layer": number}, dtype, lambda path: None, fetch_packed)

    edge = _alone(tensors(None), fetch, {}, dtype, lambda path: None, lambda name: None)
    return {"edge": edge, "blocks": layer}


def _alone(
    tensors: Sequence[FileTensor],
    fetch: Fetch,
    filled: Mapping[str, int],
    dtype: np.dtype,
    where: Placement,
    fetch_packed: FetchPacked,
) -> dict[str, Any]:
    """The leaves of one layer, or of the edge."""
    made: list[tuple[Path, Any]] = []
    flags, names = [], []
    for tensor in tensors:
        name = _named(tensor.name, **filled)
        held = fetch_packed(name)
        if held is not None:
            parts = [held]
            if tensor.form == "woven":  # outputs take turns
                parts = [jax.tree.map(lambda a, at=at: a[:, at::2], held) for at in (0, 1)]
            for leaf, part in zip(tensor.leaves, parts, strict=True):
                made.append((leaf.path, jax.device_put(jax.tree.map(np.array, part))))
            continue
        for leaf, value in _read(tensor, fetch, filled, dtype):
            placed = jax.device_put(value, where(leaf.path))
            flags.append(_is_finite(placed).block_until_ready())
            names.append(name)
            made.append((leaf.path, placed))
    _check_finite(flags, names, dtype)
    return nest(made)


def _stack(
    layers: Sequence[int],
    tensors: Sequence[FileTensor],
    fetch: Fetch,
    dtype: np.dtype,
    where: Placement,
) -> dict[str, Any]:
    """The leaves of the layers of one kind, stacked."""
    made: list[tuple[Path, jax.Array]] = []
    for tensor in tensors:
        places = [where(leaf.path) for leaf in tensor.leaves]
        stacks = [
            jnp.zeros((len(layers), *leaf.shape), dtype, device=place)
            for leaf, place in zip(tensor.leaves, places, strict=True)
        ]
        flags, names = [], []
        for index, layer in enumerate(layers):
            for number, (_, value) in enumerate(_read(tensor, fetch, {"layer": layer}, dtype)):
                placed = jax.device_put(value, _of_layer(places[number]))
                stacks[number], finite = _write(stacks[number], placed, index)
                flags.append(finite)
                names.append(_named(tensor.name, layer=layer))
                finite.block_until_ready()  # or reading runs ahead, and all that is read lies here
        _check_finite(flags, names, dtype)
        made += [(leaf.path, stack) for leaf, stack in zip(tensor.leaves, stacks, strict=True)]
    return nest(made)


def _of_layer(place: Sharding | None) -> Sharding | None:
    """Where one layer of a stack placed so belongs."""
    if not isinstance(place, NamedSharding):
        return place
    return NamedSharding(place.mesh, PartitionSpec(*tuple(place.spec)[1:]))


def _read(
    tensor: FileTensor, fetch: Fetch, filled: Mapping[str, int], dtype: np.dtype
) -> Iterator[tuple[Leaf, np.ndarray]]:
    """The leaves that a tensor holds, one after the other, items put together.

    They are copies, which outlive the file; what `dtype` cannot express becomes infinity, which is
    found later.
    """
    name = _named(tensor.name, **filled)
    if tensor.items is None:
        for leaf, part in zip(tensor.leaves, tensor.take(fetch(name)), strict=True):
            with np.errstate(over="ignore"):
                made = np.array(part, dtype, order="C")
            yield leaf, made
        return
    wholes = [np.empty(leaf.shape, dtype) for leaf in tensor.leaves]
    for item in range(tensor.items):
        with np.errstate(over="ignore"):
            parts = tensor.take(fetch(_named(name, item=item)))
            for whole, part in zip(wholes, parts, strict=True):
                whole[item] = part
    yield from zip(tensor.leaves, wholes, strict=True)


def _named(name: str, **filled: int) -> str:
    for key, value in filled.items():
        name = name.replace(f"{{{key}}}", str(value))
    return name


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: jax.Array, value: jax.Array, index: int) -> tuple[jax.Array, jax.Array]:
    """The stack with one layer written, in place, and whether the layer is finite."""
    written = jax.lax.dynamic_update_index_in_dim(stack, value, index, 0)
    return written, jnp.isfinite(value).all()


@jax.jit
def _is_finite(value: jax.Array) -> jax.Array:
    return jnp.isfinite(value).all()


def _check_finite(flags: Sequence[jax.Array], names: Sequence[str], dtype: np.dtype) -> None:
    """Raises UsageError naming the first tensor that is not finite."""
    for finite, name in zip(flags, names, strict=True):
        if not bool(finite):
            raise UsageError(
                f"tensor {name!r} holds NaN or infinity as {dtype}; the checkpoint is damaged, "
                "of a run that diverged, or needs a dtype of more range"
            )


def check_layers(source: str, config: DecoderConfig, found: Collection[str]) -> None:
    """Raises UsageError if there are fewer tensors than layers, before names are made for all."""
    if config.num_layers > len(found):
        raise UsageError(
            f"{source}: its configuration says {config.num_layers} layers, but it holds "
            f"{len(found)} tensors in all; the file is incomplete or of another model"
        )


def expected_tensors(config: DecoderConfig, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this configuration must hold, with its shape there."""
    found: dict[str, tuple[int, ...]] = {}

    def add(tensor: FileTensor, **filled: int) -> None:
        if tensor.items is None:
            found[_named(tensor.name, **filled)] = tensor.shape
            return
        for item in range(tensor.items):
            found[_named(tensor.name, item=item, **filled)] = tensor.shape

    for tensor in tensors(None):
        add(tensor)
    for kind in config.kinds:
        for tensor in tensors(kind):
            for layer in config.layers_of(kind):
                add(tensor, layer=layer)
    return found


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
